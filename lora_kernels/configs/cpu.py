"""Where PyTorch is faster than the compiled kernels of the CPU, and where not: data, from `python -m benchmarks cpu`."""

# The rank from which on it does, by instruction set: in bf16, without dropout, from 512 rows on.
# amx: benchmarks/results/intel-r-xeon-r-processor-cpu-2-threads/cpu.json, 512 × 2048².
EAGER_FROM_RANK = {"amx": 32}
ROWS = 512

# The rows for which the kernels multiply the base layer too, first and last, by instruction set and dtype: where oneDNN's
# and MKL's products were slower. amx and avx512 were measured on Intel's machine, avx512_bf16 on AMD's.
# In the forward pass, y = x W'.
BASE_ROWS = {
    ("amx", "torch.bfloat16"): (1, 128),
    ("avx512_bf16", "torch.bfloat16"): (16, 2048),
    ("amx", "torch.float32"): (8, 128),
    ("avx512_bf16", "torch.float32"): (2, 2048),
    ("avx512", "torch.float32"): (8, 128),
}
# In the backward pass, dx = dy W, for which W is packed; measured on AMD's machine only.
DX_ROWS = {
    ("avx512_bf16", "torch.bfloat16"): (256, 2048),
    ("avx512_bf16", "torch.float32"): (4, 2048),
}
