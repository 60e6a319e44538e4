"""The backends of each operation, by name, in the order in which dispatch asks them."""

from lora_kernels.backends import cpu, cpu_batched, eager, eager_batched, triton, triton_batched

BACKENDS = {"triton": triton, "cpu": cpu, "eager": eager}
BATCHED_BACKENDS = {"triton": triton_batched, "cpu": cpu_batched, "eager": eager_batched}
