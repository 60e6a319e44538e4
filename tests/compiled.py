"""What the tests of the compiled CPU kernels share: the instruction sets, and numbers of threads."""

import ctypes

import pytest
import torch

from lora_kernels.backends import cpu_library
from lora_kernels.dispatch import choose

BUILT = isinstance(cpu_library.library(), ctypes.CDLL)
SETS = cpu_library.instruction_sets() if BUILT else {}
needs_library = pytest.mark.skipif(not BUILT, reason=str(cpu_library.library()))
every_set = pytest.mark.parametrize("isa", SETS)


@pytest.fixture
def ask_for(monkeypatch):
    """A function that sets LORA_KERNELS_CPU_ISA, which is otherwise read once a process."""

    def forget():
        cpu_library.instruction_set.cache_clear()
        cpu_library.measured_as.cache_clear()
        cpu_library.operator.cache_clear()
        choose.cache_clear()

    def ask(name):
        monkeypatch.setenv("LORA_KERNELS_CPU_ISA", name)
        forget()
        if SETS.get(name) is False:
            pytest.skip(f"this machine has no {name}")

    yield ask
    monkeypatch.undo()
    forget()


def on_threads(threads, run, *arguments):
    """What `run` returns while PyTorch, and so the kernels, have as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(*arguments)
    finally:
        torch.set_num_threads(before)
