"""What the error budget does not see: orders, masks, counters, partial sums, offsets past 2³¹, and equal bits on every path."""

import os

import pytest
import torch

from lora_kernels import reference
from lora_kernels.backends import launcher
from lora_kernels.backends import triton as backend

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from lora_kernels.kernels.gemm import _look_ahead_tile  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
STRATEGIES = ("extended", "single_pass", "one_launch", "chained")


def tensors(device, m=80, n=136, k=96, r=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m * n + k * r)
    shapes = dict(x=(m, k), weight=(n, k), lora_a=(r, k), lora_b=(n, r), dy=(m, n))
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def forward(t, strategy, dropout_p=0.0, seed=None):
    return backend.forward(t["x"], t["weight"], None, t["lora_a"], t["lora_b"], 0.5, dropout_p, seed, strategy)


def backward(t, h, strategy, dropout_p=0.0, seed=None):
    adapters = (t["lora_a"], t["lora_b"], 0.5, dropout_p, seed)
    return backend.backward(t["dy"], t["x"], h, t["weight"], *adapters, (True, True, True), strategy)


def misaligned(t):
    """The same values where TMA cannot reach them."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("strategy", ["extended", "single_pass", "chained"])
def test_tma_and_pointers_give_the_same_bits(device, strategy):
    t = tensors(device)
    by_pointer = {name: misaligned(value) for name, value in t.items()}
    assert backend.tma_applies(*list(t.values())[:4])
    assert not backend.tma_applies(*list(by_pointer.values())[:4])
    y, h = forward(t, strategy)
    y_pointer, h_pointer = forward(by_pointer, strategy)
    assert torch.equal(h, h_pointer)
    if strategy != "chained":  # cuBLAS may choose its kernel by alignment
        assert torch.equal(y, y_pointer)
    for grad, grad_pointer in zip(backward(t, h, strategy)[1:], backward(by_pointer, h, strategy)[1:], strict=True):
        assert torch.equal(grad, grad_pointer)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_transposed_weight_is_read_in_place(device, strategy):
    t = tensors(device)
    transposed = t | {"weight": t["weight"].mT.contiguous().mT}
    y, h = forward(t, strategy)
    y_transposed, h_transposed = forward(transposed, strategy)
    torch.testing.assert_close(h, h_transposed, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y, y_transposed, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("m", "n"), [(1, 8), (33, 64), (200, 136), (260, 8), (130, 520)])
@pytest.mark.parametrize("num_sms", [1, 3, 10**4])
def test_one_launch_leaves_its_counters_at_zero(device, monkeypatch, m, n, num_sms):
    goal = backend.target(torch.device(device))
    monkeypatch.setattr(backend, "target", lambda _: goal._replace(num_sms=num_sms))
    t = tensors(device, m=m, n=n, k=40, r=8)
    expected, _ = forward(t, "extended")
    for _ in range(2):
        y, h = forward(t, "one_launch")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
        dx, _, _ = backward(t, h, "one_launch")
        torch.testing.assert_close(dx, backward(t, h, "extended")[0], rtol=1e-5, atol=1e-4)
    assert not launcher.counters(t["x"].device, 1).any()


@triton.jit
def look_ahead_kernel(out, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    t = tl.program_id(0)
    tile_m, tile_n = _look_ahead_tile(t, tiles_m, tiles_n, GROUP_M)
    tl.store(out + 2 * t, tile_m)
    tl.store(out + 2 * t + 1, tile_n)


def test_look_ahead_order_covers_every_tile_once_producers_first(device):
    for tiles_m, tiles_n, group_m in (
        (1, 1, 2),
        (1, 5, 2),
        (2, 3, 2),
        (3, 4, 2),
        (5, 1, 2),
        (7, 3, 3),
        (8, 2, 4),
        (9, 5, 4),
    ):
        out = torch.full((tiles_m * tiles_n, 2), -1, dtype=torch.int32, device=device)
        look_ahead_kernel[(tiles_m * tiles_n,)](out, tiles_m, tiles_n, group_m)
        order = [tuple(tile) for tile in out.tolist()]
        assert sorted(order) == [(i, j) for i in range(tiles_m) for j in range(tiles_n)], (tiles_m, tiles_n, group_m)
        position = {tile: index for index, tile in enumerate(order)}
        assert all(position[i, 0] < position[i, j] for i, j in order if j > 0)
        groups = [order[position[i, 0]][0] // group_m for i in range(tiles_m)]
        assert groups == sorted(groups)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (33, 70), (64, 300)])
@pytest.mark.parametrize("dropout_p", [0.0001, 0.1, 0.5, 0.999])
def test_dropout_mask_is_the_references(device, shape, dropout_p):
    seed = torch.tensor(-(2**62) + 12345, device=device)
    dropped = backend._drop_in_place(torch.ones(shape, device=device), dropout_p, seed)
    keep = reference.dropout_keep(seed, *shape, dropout_p, device)
    assert torch.equal(dropped != 0, keep)
    torch.testing.assert_close(dropped, keep / (1 - dropout_p))


@pytest.mark.parametrize("strategy", ["extended", "chained"])
def test_forward_and_backward_see_the_same_dropout_mask(device, strategy):
    """With A = B = 1 on one output, dy = 1 and no base, dx_i = scaling keep_i / (1 - p): the mask itself."""
    m, k, p = 40, 72, 0.25
    seed = torch.tensor(3, device=device)
    keep = reference.dropout_keep(seed, m, k, p, device)
    ones = torch.ones
    t = dict(
        x=torch.rand(m, k, device=device) + 0.5, weight=torch.zeros(1, k, device=device), lora_a=ones(1, k, device=device),
        lora_b=ones(1, 1, device=device), dy=ones(m, 1, device=device),
    )  # fmt: skip
    y, h = forward(t, strategy, p, seed)
    dx, da, _ = backward(t, h, strategy, p, seed)
    dropped = t["x"] * keep / (1 - p)
    torch.testing.assert_close(y, 0.5 * dropped.sum(1, keepdim=True))
    torch.testing.assert_close(dx, 0.5 * keep / (1 - p))
    torch.testing.assert_close(da, 0.5 * dropped.sum(0, keepdim=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropped_elements_never_reach_the_adapter(device, strategy):
    """NaN in a dropped element reaches the base term only: with that weight column zero, y would be NaN * 0, so use h."""
    if strategy in ("single_pass", "one_launch"):
        pytest.skip("no dropout in this strategy")
    t = tensors(device)
    seed = torch.tensor(11, device=device)
    keep = reference.dropout_keep(seed, *t["x"].shape, 0.5, device)
    t["x"] = torch.where(keep, t["x"], torch.nan)
    _, h = forward(t, strategy, 0.5, seed)
    _, da, _ = backward(t, h, strategy, 0.5, seed)
    assert h.isfinite().all() and da.isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_computes_only_what_is_needed(device, strategy, monkeypatch):
    launched = []
    real = backend.launch
    monkeypatch.setattr(
        backend, "launch", lambda kernel, *args: (launched.append(kernel.__name__), real(kernel, *args))
    )
    t = tensors(device)
    _, h = forward(t, strategy)
    full = backward(t, h, strategy)
    for i in range(3):
        needs = tuple(i == j for j in range(3))
        launched.clear()
        saved_x, saved_h = t["x"] if needs[1] else None, h if needs[2] else None
        adapters = (t["lora_a"], t["lora_b"], 0.5, 0.0, None)
        grads = backend.backward(t["dy"], saved_x, saved_h, t["weight"], *adapters, needs, strategy)
        assert [grad is not None for grad in grads] == list(needs)
        torch.testing.assert_close(grads[i], full[i], rtol=1e-5, atol=1e-4)
        gemms = {"extended_kernel", "one_launch_kernel"} & set(launched)
        assert bool(gemms) == (needs[0] and strategy != "chained")
        assert ("wgrad_kernel" in launched) == (not needs[0])


@pytest.mark.parametrize("scaling", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scaling_on_the_device_is_read_there(device, strategy, scaling):
    t = tensors(device)
    expected = forward(t, strategy)
    on_device = scaling.to(device) if isinstance(scaling, torch.Tensor) else scaling
    y, h = backend.forward(t["x"], t["weight"], None, t["lora_a"], t["lora_b"], on_device, 0.0, None, strategy)
    assert torch.equal(h, expected[1]) and torch.equal(y, expected[0])


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "dy"])
def test_offsets_past_two_to_the_31(device, name):
    """A row stride of 2³⁰ elements: the third row lies past what an int32 can address. The memory is never touched."""
    t = tensors(device, m=3, n=3, k=5, r=3, dtype=torch.float16)
    _, h = forward(t, "extended")
    expected = (*forward(t, "extended"), *backward(t, h, "extended"))
    far = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device=device)
    t[name] = far.as_strided(t[name].shape, (2**30, 1)).copy_(t[name])
    actual = (*forward(t, "extended"), *backward(t, h, "extended"))
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
