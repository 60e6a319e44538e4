"""The backends, by name, in the order in which dispatch asks them."""

from lora_kernels.backends import eager, triton

BACKENDS = {"triton": triton, "eager": eager}
