"""Where PyTorch trains faster than the compiled kernels of the CPU: data, from `python -m benchmarks cpu`."""

# The rank from which on it does, by instruction set: in bf16, without dropout, from 512 rows on.
# amx: benchmarks/results/intel-r-xeon-r-processor-cpu-2-threads/cpu.json, 512 × 2048².
EAGER_FROM_RANK = {"amx": 32}
ROWS = 512
