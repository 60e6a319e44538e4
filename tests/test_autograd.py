"""The autograd Function: gradcheck through the real kernels, what is saved, and how training code uses it."""

import pytest
import torch
from conftest import DEVICE, supports
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, testing
from lora_kernels.testing import Case

TRAINED = ("x", "lora_a", "lora_b")


def tensors(case):
    t = testing.make_tensors(case, DEVICE)
    return {
        name: None if getattr(t, name) is None else getattr(t, name).detach().clone().requires_grad_(name in case.needs)
        for name in testing.INPUTS[:-1]
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_in_fp64(pair, dropout_p):
    case = Case(3, 4, 6, 2, dtype=torch.float64, bias=True, dropout_p=dropout_p, needs=testing.TRAINABLE)
    if not supports(case, *pair):
        pytest.skip("this strategy does not support the case")
    t = tensors(case)

    def run(x, bias, lora_a, lora_b):
        torch.manual_seed(7)  # the same mask every time
        adapter = {"lora_a": lora_a, "lora_b": lora_b, "scaling": 0.75, "dropout_p": dropout_p}
        return lora_linear(x, t["weight"], bias=bias, backend=pair[0], strategy=pair[1], **adapter)

    torch.autograd.gradcheck(run, [t[name] for name in testing.TRAINABLE])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("needs", [(), ("x",), ("lora_a",), ("lora_b",), ("bias",), TRAINED], ids="-".join)
def test_saves_x_and_h_where_a_gradient_needs_them_and_nothing_else(needs, dropout_p):
    case = Case(5, 6, 7, 3, bias=True, dropout_p=dropout_p, needs=needs)
    t = tensors(case)
    parameters = {value.data_ptr() for name, value in t.items() if name != "x"}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lora_linear(**t, scaling=2.0, dropout_p=dropout_p)
    activations = sorted((tuple(s.shape) for s in saved if s.data_ptr() not in parameters), key=len)
    x, h, seed = (5, 7), (5, 3), ()
    expected = [x] * ("lora_a" in needs) + [h] * ("lora_b" in needs)
    assert activations == [seed] * (dropout_p > 0 and needs != ()) + expected


def test_eager_and_no_grad_record_nothing():
    t = tensors(Case(5, 6, 7, 3, needs=()))
    assert lora_linear(**t, scaling=2.0).grad_fn is None
    t["lora_a"].requires_grad_()
    with torch.no_grad():
        assert lora_linear(**t, scaling=2.0).grad_fn is None


@pytest.mark.parametrize("wanted", TRAINED)
@pytest.mark.parametrize("through_the_operator", [False, True])
def test_double_backward_raises(wanted, through_the_operator):
    """Also where dy needs no gradient: a gradient penalty must not be silently worth nothing."""
    t = tensors(Case(5, 6, 7, 3))
    if through_the_operator:
        y, _ = torch.ops.lora_kernels.lora_linear(*list(t.values())[:2], None, t["lora_a"], t["lora_b"],
                                                  torch.tensor(2.0), 0.0, None)  # fmt: skip
    else:
        y = lora_linear(**t, scaling=2.0)
    (grad,) = torch.autograd.grad(y.sum(), t[wanted], create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward; compute second derivatives with"):
        grad.square().sum().backward()


def test_create_graph_alone_is_fine():
    t = tensors(Case(5, 6, 7, 3))
    inputs = [t[name] for name in TRAINED]
    expected = torch.autograd.grad(lora_linear(**t, scaling=2.0).sum(), inputs)
    actual = torch.autograd.grad(lora_linear(**t, scaling=2.0).sum(), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout_mask(pair, reentrant):
    case = Case(17, 24, 40, 8, dropout_p=0.5)
    if not supports(case, *pair):
        pytest.skip("no dropout in this strategy")
    t = tensors(case)
    inputs = [t[name] for name in TRAINED]

    def layer(x, lora_a, lora_b):
        y = lora_linear(x, t["weight"], lora_a, lora_b, 2.0, dropout_p=0.5, backend=pair[0], strategy=pair[1])
        return torch.nn.functional.gelu(y)

    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    torch.manual_seed(3)
    for value in inputs:
        value.grad = None
    checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(value.grad, grad) for value, grad in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("dtype", testing.HALF, ids=str)
def test_autocast_equals_the_casts_by_hand(pair, dtype):
    t = tensors(Case(17, 24, 40, 8, bias=True, needs=testing.TRAINABLE))
    options = {"backend": pair[0], "strategy": pair[1]}
    inputs = [t[name] for name in testing.TRAINABLE]
    with torch.autocast(DEVICE, dtype):
        y = lora_linear(**t, scaling=2.0, **options)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.sum(), inputs)
    cast = t | {name: t[name].to(dtype) for name in ("x", "weight", "bias")}
    expected = lora_linear(**cast, scaling=2.0, **options)
    assert torch.equal(y, expected)
    for grad, by_hand in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, by_hand)


def test_autocast_leaves_fp64_alone():
    """As F.linear does."""
    t = tensors(Case(5, 6, 7, 3, dtype=torch.float64))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert lora_linear(**t, scaling=2.0).dtype == torch.float64


@pytest.mark.parametrize("leading", [(), (2,)])
def test_y_may_be_modified_in_place(pair, leading):
    """As PEFT's AdaLoRA does (`result += ...`), and a fused ReLU."""
    t = tensors(Case(17, 24, 40, 8, leading=leading))
    options = {"backend": pair[0], "strategy": pair[1]}
    inputs = [t[name] for name in TRAINED]
    y = lora_linear(**t, scaling=2.0, **options)
    expected = torch.autograd.grad(torch.relu(y * 2 + 1).sum(), inputs)
    y = lora_linear(**t, scaling=2.0, **options)
    y *= 2
    y += 1
    actual = torch.autograd.grad(y.relu_().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_accumulate(pair):
    t = tensors(Case(17, 24, 40, 8))
    options = {"backend": pair[0], "strategy": pair[1]}
    for _ in range(2):
        lora_linear(**t, scaling=2.0, **options).sum().backward(retain_graph=True)
    (once,) = torch.autograd.grad(lora_linear(**t, scaling=2.0, **options).sum(), t["lora_a"])
    assert torch.equal(t["lora_a"].grad, 2 * once)


def test_backward_after_a_parameter_changed_raises():
    t = tensors(Case(5, 6, 7, 3))
    y = lora_linear(**t, scaling=2.0)
    with torch.no_grad():
        t["lora_b"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
