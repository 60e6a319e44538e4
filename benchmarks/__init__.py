"""Timings, each after its correctness gate; `python -m benchmarks` in a checkout, or `make bench`."""
