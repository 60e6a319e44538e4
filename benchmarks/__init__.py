"""Timings, each after its correctness gate, and a simulation; `python -m benchmarks` in a checkout, or `make bench`."""
