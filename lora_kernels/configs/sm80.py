"""Ampere: cp.async and mma.sync, 166,912 B of shared memory.

Compiled figures: tests/resources/static_gate.json; unmeasured.
"""

from lora_kernels.configs import Config, Row

NUM_SMS = 108
FLOPS, BANDWIDTH = 250e12, 1.7e12  # A100, 80 % of the datasheet
ISSUE = 108 * 128 * 1.41e9  # SMs, lanes that get an instruction, clock

ROWS = (
    Row("shrink", Config(64, block_k=64, num_warps=8, num_stages=4)),
    Row("extended", Config(128, 128, 32, num_warps=8, num_stages=4), dropout=False, unaligned=False),
    Row("extended", Config(64, 128, 32, num_warps=4, num_stages=4), dropout=False, unaligned=False, efficiency=0.85),
    Row("extended", Config(64, 128, 32, num_warps=8, num_stages=3), efficiency=0.5),
    Row("single_pass", Config(64, 128, 32, num_warps=8, num_stages=4), max_rank=64),
    Row("single_pass", Config(16, 64, 128, num_warps=4, num_stages=4), max_rank=64, max_m=32),
    Row("dy_pass", Config(64, 128, num_warps=4, num_stages=3), max_rank=32),
    Row("wgrad", Config(64, 128, num_warps=8, num_stages=4)),
    Row(
        "batched_shrink", Config(16, 64, 128, num_warps=4, num_stages=4, max_registers=255), max_m=256, unaligned=False
    ),
    Row("batched_shrink", Config(64, 64, 64, num_warps=4, num_stages=4, max_registers=255), unaligned=False),
    Row("batched_shrink", Config(16, 32, 32, num_warps=4, num_stages=3, max_registers=255), efficiency=0.1),
    Row("batched_one_launch", Config(16, 64, 128, num_warps=4, num_stages=3), max_m=16, unaligned=False),
    Row("batched_one_launch", Config(64, 128, 64, num_warps=8, num_stages=3), max_m=256, unaligned=False),
    Row("batched_chained", Config(64, 128, num_warps=8, max_registers=255), unaligned=False),
    Row("batched_chained", Config(32, 64, num_warps=8, max_registers=255), efficiency=0.5),
    Row("batched_extended", Config(64, 64, 64, num_warps=4, num_stages=3), max_m=256, unaligned=False),
    Row("batched_extended", Config(128, 64, 32, num_warps=8, num_stages=4, max_registers=255), unaligned=False),
    Row(
        "batched_one_launch",
        Config(16, 64, 64, num_warps=8, num_stages=3, max_registers=255),
        max_m=256,
        efficiency=0.1,
    ),
    Row("batched_extended", Config(32, 32, 32, num_warps=4, num_stages=3), efficiency=0.5),
    Row("quantized_extended", Config(16, 128, 128, num_warps=4, num_stages=4), max_m=16),
    Row("quantized_extended", Config(16, 64, 128, num_warps=4, num_stages=4), max_m=16, efficiency=0.85),
    Row("quantized_extended", Config(64, 128, 64, num_warps=4, num_stages=3), max_m=256),
    Row("quantized_batched_one_launch", Config(16, 128, 128, num_warps=4, num_stages=4), max_m=16),
    Row("quantized_batched_one_launch", Config(64, 128, 64, num_warps=8, num_stages=3), max_m=256),
    Row("dequantize", Config(32, block_k=128, num_warps=4)),
    Row("dequantize", Config(32, block_k=128, num_warps=4), itemsize=4),
    Row("shrink", Config(32, block_k=32, num_warps=4, num_stages=3), itemsize=4),
    Row("extended", Config(64, 64, 16, num_warps=4, num_stages=3), itemsize=4),
    Row("single_pass", Config(64, 64, 32, num_warps=8, num_stages=3), itemsize=4, max_rank=64),
    Row("dy_pass", Config(32, 64, num_warps=4, num_stages=2), itemsize=4, max_rank=32),
    Row("wgrad", Config(32, 64, num_warps=4, num_stages=2), itemsize=4),
    Row("batched_shrink", Config(16, 32, 32, num_warps=4, num_stages=2, max_registers=255), itemsize=4),
    Row("batched_extended", Config(32, 32, 32, num_warps=8, num_stages=3, max_registers=255), itemsize=4),
    Row("batched_chained", Config(32, 32, num_warps=8), itemsize=4),
)
