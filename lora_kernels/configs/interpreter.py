"""Triton's interpreter: tiles small enough that toy problems have several of each, large enough to run fast."""

from lora_kernels.configs import Config, Row

NUM_SMS = 3
FLOPS, BANDWIDTH, ISSUE = 1e9, 1e9, 1e9  # placeholders: nothing is timed in the interpreter

ROWS = tuple(
    Row(kernel, config, itemsize)
    for itemsize in (2, 4, 8)
    for kernel, config in (
        ("shrink", Config(32, block_k=64)),
        ("extended", Config(32, 64, 64, group_m=2, halves=True)),
        ("single_pass", Config(32, 32, 64, group_m=2)),
        ("one_launch", Config(32, 64, 32, group_m=2, halves=True, num_stages=2)),
        ("dy_pass", Config(32, 64)),
        ("wgrad", Config(32, 64)),
        ("batched_shrink", Config(16, 64, 64)),
        ("batched_one_launch", Config(32, 32, 64)),
        ("batched_extended", Config(32, 32, 64, group_m=2)),
        ("batched_chained", Config(32, 32, group_m=2)),
        # As over a dense weight, so that the bits are too.
        ("quantized_extended", Config(32, 64, 64, group_m=2, halves=True)),
        ("quantized_batched_one_launch", Config(32, 32, 64)),
        ("dequantize", Config(32, block_k=64)),
    )
)
