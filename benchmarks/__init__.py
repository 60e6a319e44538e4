"""Timings, each after its correctness gate, and a simulation of the pool; `python -m benchmarks` in a checkout, or `make bench`."""
