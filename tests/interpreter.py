"""Triton's interpreter, mended for bfloat16, checked against torch, and made twice as fast."""

import contextlib
import functools
import inspect
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from lora_kernels import testing


def prepare():
    """Call it before the first kernel; raises AssertionError if the interpreter still miscomputes."""
    testing.mend_interpreter()
    _quicken()
    _assert_mended()


def _quicken():
    """Spare it int32 overflow checks, and patching `tl` again for every device function that is called."""

    @functools.cache
    def builtin_members(namespace):
        return [(name, member) for name, member in inspect.getmembers(namespace) if tl.core.is_builtin(member)]

    def patch_builtins(namespace, builder, scope):
        for name, member in builtin_members(namespace):
            interpreter._patch_attr(namespace, name, member, builder, scope)

    patch_lang, namespaces = interpreter._patch_lang, SimpleNamespace(__globals__=dict(tl=tl, core=tl.core))
    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = lambda kernel: patch_lang(namespaces)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@contextlib.contextmanager
def programs_in_order(rearrange):
    """Launches run their programs, a list of numbers, in the order that `rearrange` leaves the list in, last one first."""
    builder = type(interpreter.interpreter_builder)
    set_grid_idx, order = builder.set_grid_idx, []

    def rearranged(self, x, y, z):
        if not order:
            order.extend(range(self.grid_dim[0]))
            rearrange(order)
        set_grid_idx(self, order.pop(), y, z)

    with mock.patch.object(builder, "set_grid_idx", rearranged):
        yield


@triton.jit
def _probe(a, b, dot, total, rounded, less, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a_tile, b_tile = tl.load(a + offs), tl.load(b + offs)
    tl.store(dot + offs, tl.dot(a_tile, b_tile))
    tl.store(total + offs, a_tile + b_tile)
    tl.store(rounded + offs, (a_tile.to(tl.float32) * 1.00390625).to(tl.bfloat16))
    tl.store(less + offs, (a_tile < b_tile).to(tl.int32))


@triton.jit
def cast_kernel(source, out, SIZE, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out + offs, tl.load(source + offs, mask=offs < SIZE).to(out.dtype.element_ty), mask=offs < SIZE)


def _assert_mended():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, 16, generator=generator).bfloat16()
    dot, less = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.int32)
    total, rounded = torch.empty_like(a), torch.empty_like(a)
    _probe[(1,)](a, b, dot, total, rounded, less, BLOCK=16)
    torch.testing.assert_close(dot, a.float() @ b.float())
    assert torch.equal(total, a + b), "the interpreter adds bfloat16 wrongly"
    assert torch.equal(rounded, (a.float() * 1.00390625).bfloat16()), "the interpreter rounds to bfloat16 wrongly"
    assert torch.equal(less.bool(), a < b), "the interpreter compares bfloat16 wrongly"
