"""Where PyTorch is faster than the compiled kernels of the CPU, and where not: data, from `python -m benchmarks cpu`."""

# The rank from which on it does, by instruction set: in bf16, without dropout, from 512 rows on.
# amx: benchmarks/results/intel-r-xeon-r-processor-cpu-2-threads-amx-bf16/cpu.json, 512 × 2048².
EAGER_FROM_RANK = {"amx": 32}
ROWS = 512

# The rows for which the kernels multiply the base layer too, first and last, by the processor's maker, instruction set and
# dtype: where oneDNN's and MKL's products were slower. MKL's in fp32 are twice as fast on Intel's processors as on AMD's.
# In the forward pass, y = x W'.
BASE_ROWS = {
    ("intel", "amx", "torch.bfloat16"): (1, 128),
    ("intel", "avx512_bf16", "torch.bfloat16"): (16, 2048),
    ("amd", "avx512_bf16", "torch.bfloat16"): (16, 2048),
    ("intel", "amx", "torch.float32"): (8, 128),
    ("intel", "avx512_bf16", "torch.float32"): (8, 128),
    ("amd", "avx512_bf16", "torch.float32"): (2, 2048),
    ("intel", "avx512", "torch.float32"): (8, 128),
}
# In the backward pass, dx = dy W, for which W is packed. With AMX it was not measured. On Intel's processors without, oneDNN
# took 3 % more for 512 x 2048², 1 % less for 512 x 4096² and 4 % less for 256 x 4096²; MKL a fifth less.
DX_ROWS = {
    ("intel", "avx512_bf16", "torch.bfloat16"): (512, 2048),
    ("amd", "avx512_bf16", "torch.bfloat16"): (256, 2048),
    ("amd", "avx512_bf16", "torch.float32"): (4, 2048),
}
