"""How a kernel gets onto the device, for the Triton backend: compiled once per specialisation, then called directly."""

import functools

import torch
from torch import Tensor

_compiled = {}


def launch(kernel, grid, args: tuple, constants: dict, config) -> None:
    """Run `kernel` on the current device and stream; `constants` are its constexprs, in its own order.

    After the first launch of a specialisation the compiled kernel is called directly: Triton's own argument binding
    costs several times as much.
    """
    if type(kernel).__name__ == "InterpretedFunction":
        kernel[grid](*args, **constants)
        return
    key = (kernel, _driver().get_current_device(), config, *constants.values(), *map(_specialization, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants, **config.options)
    else:
        compiled[grid](*args, *constants.values())


@functools.cache
def _driver():
    from triton.runtime import driver

    return driver.active


def _specialization(arg):
    """What Triton compiles differently for, and nothing else."""
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(_specialization, arg))
    if arg is None or isinstance(arg, float):
        return type(arg)
    return arg.base.dtype, *arg.block_shape


_counters_of = {}  # by device and stream
_arena_of = {}  # by device
_ARENA = 2**20


class _Arena:
    """Zeros for launches that are captured in CUDA graphs, a piece for each: two graphs may replay at the same time."""

    def __init__(self, device):
        self.zeros, self.used = torch.zeros(_ARENA, dtype=torch.int32, device=device), 0

    def take(self, size):
        self.used += size
        return self.zeros[self.used - size : self.used]


def reset() -> None:
    """Set the counters of `one_launch` to zero; call it after a launch was aborted, with nothing else under way."""
    for zeros in (*_counters_of.values(), *(arena.zeros for arena in _arena_of.values())):
        zeros.zero_()


def counters(device, size: int) -> Tensor:
    """At least `size` int32 zeros that a launch uses and leaves at zero: a set per stream, whose launches never overlap."""
    if _is_capturing(device):
        arena = _arena_of.get(device)
        if arena is None or arena.used + size > _ARENA:  # a graph without a warm-up, or very many: one more node each
            return torch.zeros(size, dtype=torch.int32, device=device)
        return arena.take(size)
    if device not in _arena_of:
        _arena_of[device] = _Arena(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    zeros = _counters_of.get((device, stream))
    if zeros is None or zeros.numel() < size:
        zeros = _counters_of[device, stream] = torch.zeros(max(size, 1024), dtype=torch.int32, device=device)
    return zeros


def _is_capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
