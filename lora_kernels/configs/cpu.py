"""Where PyTorch is faster than the compiled kernels of the CPU, and where not: data, from `python -m benchmarks cpu`."""

# The rank from which on it does, by instruction set: in bf16, without dropout, from 512 rows on.
# amx: benchmarks/results/intel-r-xeon-r-processor-cpu-2-threads/cpu.json, 512 × 2048².
EAGER_FROM_RANK = {"amx": 32}
ROWS = 512

# The rows for which the batched kernels multiply the base layer too, first and last, by instruction set and dtype: where
# oneDNN's and MKL's products were slower on that machine. avx512_bf16: beside oneDNN without AMX, where fewer rows lost.
BASE_ROWS = {
    ("amx", "torch.bfloat16"): (1, 128),
    ("avx512_bf16", "torch.bfloat16"): (16, 64),
    **{(isa, "torch.float32"): (8, 128) for isa in ("amx", "avx512_bf16", "avx512")},
}
