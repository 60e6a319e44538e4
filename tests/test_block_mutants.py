"""Blocks with one line changed: the tests of theirs must notice."""

import inspect
from types import ModuleType
from typing import NamedTuple

import pytest
from block_cases import check, check_glu
from broken import broken_kernels
from conftest import INTERPRETED
from test_blocks import CASES

from lora_kernels.backends import launcher, shared, triton_shared
from lora_kernels.blocks import autograd


class Mutant(NamedTuple):
    """`old` in the source of `module` replaced by `new`, and a case that shows it."""

    name: str
    module: ModuleType | str
    case: str
    old: str
    new: str


SHARED = [
    Mutant(name, shared, *row)
    for name, *row in (
        ("dx of the last layer only", "qkv-only-v", "dx.add_(own)", "own"),
        ("dx: one base weight for all", "qkv", "    for i in others:\n", "    for i in ():\n"),
        ("dx: sums are not kept", "qkv", "dy.mm(w) if dx is None else dx.addmm_(dy, w)", "dy.mm(w)"),
        ("dx of layers without an adapter left out", "qkv-k-without-adapter",
         "dx = _add_base(dx, dy, layer.weight) if needs_x else None", "pass"),
        ("dx: another layer's g", "qkv", "g, a = torch.cat(gs, 1)", "g, a = torch.cat(gs[::-1], 1)"),
        ("h: the first scaling for all", "qkv-scalings",
         "len(together) > 1 and all(_same(layers[i].scaling, first.scaling) for i in together)", "len(together) > 1"),
        ("g: the first scaling for all", "qkv-scalings", "layers[i].scaling, needs_x", "layers[0].scaling, needs_x"),
        ("dropout forgotten", "qkv-dropout", "layer.dropout_p == 0.0 and ", ""),
    )
]  # fmt: skip
AUTOGRAD = [
    Mutant(name, autograd, *row)
    for name, *row in (
        ("gate and up swapped between", "mlp", "kernels.glu_backward(dp, z, u,", "kernels.glu_backward(dp, u, z,"),
        ("gate and up swapped before", "mlp", "hs[:2], (gate, up), needs_x", "hs[:2], (up, gate), needs_x"),
        ("their h swapped", "mlp", "x, hs[:2], (gate,", "x, hs[1::-1], (gate,"),
        ("their needs swapped", "mlp-frozen-some", "(of_gate, of_up))", "(of_up, of_gate))"),
        ("their biases' gradients swapped", "mlp-biases-and-dropout", "(*dz_du, dy)", "(*dz_du[::-1], dy)"),
        ("the product of another activation", "mlp-gelu-and-biases", "z, u, ctx.activation) if", 'z, u, "silu") if'),
        ("the product where db needs it", "mlp-frozen-some", "if of_down[0] else", "if of_down[1] else"),
        ("A's needs for B's", "qkv-frozen-some", "return [(needs_a, needs_b)", "return [(needs_b, needs_a)"),
        ("gate and up left out without dx", "mlp-frozen-x", "needs_x or any(needs[: 2 * PER_LAYER])", "needs_x"),
    )
]  # fmt: skip
GLU = [
    Mutant(name, "glu", *row)
    for name, *row in (
        ("SiLU's slope", "silu", "gate + z * gate * (e * gate) * inner", "gate - z * gate * (e * gate) * inner"),
        ("GELU's inner slope", "gelu_tanh", "0.134145", "0.044715"),
        ("GELU's constant", "gelu_tanh", "twice_v = 1.5957691216057308", "twice_v = 1.59"),
        ("overflow far from zero", "silu", "tl.minimum(-twice_v, 80.0)", "-twice_v"),
        ("du: f' for f", "silu", "(grad * f)", "(grad * slope)"),
        ("dz: f for f'", "silu", "mask=mask, other=0.0).to(ACC) * slope", "mask=mask, other=0.0).to(ACC) * f"),
        ("u for gate", "silu", "    product = f * tl.load(u +", "    product = tl.load(u +"),
        ("the last element", "silu", "dz_block.to(dz.dtype.element_ty), mask=mask",
         "dz_block.to(dz.dtype.element_ty), mask=offs < SIZE - 1"),
        ("past the last element", "silu", "product.to(p.dtype.element_ty), mask=mask",
         "product.to(p.dtype.element_ty), mask=offs >= 0"),
    )
]  # fmt: skip


def named(mutant):
    return mutant.name.replace(" ", "_")


@pytest.mark.parametrize("mutant", [*SHARED, *AUTOGRAD], ids=named)
def test_a_broken_block_is_rejected(monkeypatch, mutant):
    assert inspect.getsource(mutant.module).count(mutant.old) == 1, "the source has changed; adapt the mutant to it"
    change(monkeypatch, mutant.module, mutant.old, mutant.new)
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        check(CASES[mutant.case], "eager")


@pytest.mark.parametrize("module", [shared, autograd], ids=["shared", "autograd"])
def test_an_unbroken_copy_is_accepted(monkeypatch, module):
    change(monkeypatch, module, "", "")
    for case in ("qkv-scalings", "mlp-frozen-some"):
        check(CASES[case], "eager")


def change(monkeypatch, module, old, new):
    """Have `module` do what its source says with `old` replaced by `new`."""
    copy = {"__name__": module.__name__}
    exec(compile(inspect.getsource(module).replace(old, new), module.__file__, "exec"), copy)
    for name, value in copy.items():
        if getattr(value, "__module__", None) == module.__name__:
            monkeypatch.setattr(module, name, value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about an overflow
@pytest.mark.skipif(not INTERPRETED, reason="a wild store on a GPU would harm other tests")
@pytest.mark.parametrize("mutant", GLU, ids=named)
def test_a_broken_kernel_is_rejected(monkeypatch, tmp_path, mutant):
    kernels = broken_kernels(mutant, monkeypatch, tmp_path)["glu"]
    monkeypatch.setattr(triton_shared, "_kernels", lambda: kernels)
    try:
        with pytest.raises(AssertionError):
            check_glu(triton_shared, mutant.case)
    finally:
        launcher.reset()
