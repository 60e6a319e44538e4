"""The backends of each operation, by name, in the order in which dispatch asks them."""

from lora_kernels.backends import cpu, cpu_batched, cuda_batched, eager, eager_batched, triton, triton_batched

BACKENDS = {"triton": triton, "cpu": cpu, "eager": eager}
BATCHED_BACKENDS = {"triton": triton_batched, "cuda": cuda_batched, "cpu": cpu_batched, "eager": eager_batched}

# Those that run only where they are asked for by name, and why.
ON_REQUEST = {"cuda": "it has not been timed on a GPU yet"}
