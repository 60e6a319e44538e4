"""`lora_linear` under the judge: shapes, dtypes and layouts chosen by reason, on every strategy that supports them."""

import math

import pytest
import torch
from compiled import BUILT
from conftest import DEVICE, STRATEGIES, every_strategy, supports

from lora_kernels import functional, reference, testing
from lora_kernels.testing import Case

ALIGNED = {"m": 40, "n": 72, "k": 80, "r": 8}  # TMA applies, and the last tile of every dimension is partial
ODD = {"m": 37, "n": 71, "k": 75, "r": 5}
BF16 = {"dtype": torch.bfloat16}

SHAPES = {
    "no-rows": Case(**ALIGNED | {"m": 0}, bias=True, needs=testing.TRAINABLE),
    "one-row": Case(**ALIGNED | {"m": 1}, **BF16),
    "one-row-odd": Case(**ODD | {"m": 1}, **BF16),
    "rows-below-tile": Case(**ALIGNED | {"m": 31}, **BF16),
    "rows-fill-tile": Case(**ALIGNED | {"m": 32}, **BF16),
    "rows-above-tile": Case(**ALIGNED | {"m": 33}, **BF16),
    "many-row-tiles": Case(**ALIGNED | {"m": 200}, **BF16),
    "many-column-tiles": Case(**ALIGNED | {"n": 200}, **BF16),
    "many-k-tiles": Case(**ALIGNED | {"k": 264}, **BF16),
    "one-column": Case(**ODD | {"n": 1}, **BF16),
    "one-k": Case(**ODD | {"k": 1}, **BF16),
    "all-one": Case(1, 1, 1, 1, **BF16),
    "all-odd": Case(**ODD, **BF16),
    "k-fills-tile": Case(**ODD | {"k": 64}, **BF16),
    "k-below-tile": Case(**ODD | {"k": 63}, **BF16),
    "k-above-tile": Case(**ODD | {"k": 65}, **BF16),
    "n-above-tile": Case(**ODD | {"n": 65}, **BF16),
}
RANKS = {f"rank-{r}": Case(**ODD | {"r": r}, **BF16) for r in (1, 4, 13, 16, 32, 33, 40, 64, 65, 130, 512)} | {
    f"aligned-rank-{r}": Case(**ALIGNED | {"r": r}, dtype=torch.float16) for r in (16, 24, 64, 72)
}
LAYOUTS = {
    f"{name}-{layout}": Case(**ALIGNED, dtype=torch.float16, bias=True, layouts={name: layout})
    for name, layout in (
        ("x", "padded"),
        ("x", "misaligned"),
        ("x", "transposed"),
        ("x", "strided"),
        ("x", "expanded"),
        ("weight", "padded"),
        ("weight", "misaligned"),
        ("weight", "transposed"),
        ("weight", "strided"),
        ("lora_a", "misaligned"),
        ("lora_a", "transposed"),
        ("lora_b", "misaligned"),
        ("lora_b", "transposed"),
        ("bias", "strided"),
        ("bias", "misaligned"),
        ("dy", "padded"),
        ("dy", "misaligned"),
        ("dy", "transposed"),
        ("dy", "expanded"),
    )
} | {
    # Rows of bf16 with NaN between them: what PyTorch's own products read there on a CPU with AMX.
    f"{name}-padded-bf16": Case(**ALIGNED, **BF16, layouts={name: "padded"})
    for name in ("x", "dy")
}
DTYPES = {
    f"{name}-{dtype}".replace("torch.", ""): Case(**shape, dtype=dtype, bias=True, needs=testing.TRAINABLE)
    for name, shape in (("aligned", ALIGNED), ("odd", ODD))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
} | {
    f"{name}-fp32-adapter-on-{dtype}".replace("torch.", ""): Case(**shape, dtype=dtype, lora_dtype=torch.float32)
    for name, shape in (("aligned", ALIGNED), ("odd", ODD))
    for dtype in testing.HALF
}
NEEDS = {
    "needs-" + ("-".join(needs) or "nothing"): Case(**ALIGNED, **BF16, bias=True, needs=needs)
    for needs in ((), ("x",), ("lora_a",), ("lora_b",), ("bias",), ("x", "lora_b"), ("lora_a", "lora_b"), ("x", "bias"))
}
DROPOUT = {
    f"dropout-{p}{'-odd' if shape is ODD else ''}": Case(**shape, **BF16, dropout_p=p)
    for shape, p in ((ALIGNED, 0.1), (ODD, 0.5), (ALIGNED | {"k": 264}, 0.95), (ODD | {"m": 1, "k": 9}, 0.5))
}
LEADING = {
    "leading-2-3": Case(**ALIGNED | {"m": 7}, **BF16, leading=(2, 3)),
    "leading-0": Case(**ALIGNED, **BF16, leading=(0,)),
    "leading-strided": Case(**ALIGNED | {"m": 7}, **BF16, leading=(2, 3), layouts={"x": "padded", "dy": "transposed"}),
}
SCALINGS = {f"scaling-{s:.3g}": Case(**ODD, **BF16, scaling=s) for s in (0.0, 1 / 3, 16.0 / math.sqrt(5.0))}


@every_strategy(SHAPES | RANKS | LAYOUTS | DTYPES | NEEDS | DROPOUT | LEADING | SCALINGS)
def test_within_the_error_budget(case, backend, strategy, device):
    testing.check(case, backend, strategy, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "r"), [(4096, 4096, 4096, 16), (2048, 1024, 4096, 64), (100, 14336, 4096, 8)])
def test_within_the_error_budget_at_real_sizes(pair, m, n, k, r):
    for dtype in testing.HALF:
        case = Case(m, n, k, r, dtype=dtype)
        if supports(case, *pair):
            testing.check(case, *pair, device="cuda")


def tensors(**changes):
    case = Case(**ALIGNED | changes)
    t = testing.make_tensors(case, DEVICE)
    return t.x, t.weight, t.lora_a, t.lora_b


def test_every_strategy_of_a_backend_is_exercised_here():
    assert ("eager", "chained") in STRATEGIES
    compiled = ("cpu", "chained") in STRATEGIES
    assert compiled == (DEVICE == "cpu" and BUILT)
    assert {backend for backend, _ in STRATEGIES} <= {"cpu", "eager"} or len(STRATEGIES) == 5 + compiled


def test_one_dimensional_x(pair):
    x, *rest = tensors()
    options = {"backend": pair[0], "strategy": pair[1]}
    y = functional.lora_linear(x[0], *rest, 2.0, **options)
    assert y.shape == (ALIGNED["n"],)
    torch.testing.assert_close(y, functional.lora_linear(x[:1], *rest, 2.0, **options)[0])


def test_scaling_tensor_equals_scaling_float(pair):
    args = tensors()
    options = {"backend": pair[0], "strategy": pair[1]}
    expected = functional.lora_linear(*args, 0.75, **options)
    for scaling in (torch.tensor(0.75), torch.tensor(0.75, device=DEVICE), torch.tensor(0.75, dtype=torch.float64)):
        assert torch.equal(functional.lora_linear(*args, scaling, **options), expected)


def test_zero_b_gives_the_base_layer_bit_for_bit(pair):
    """What every fine-tuning run starts from: B = 0 must add nothing, whatever A holds."""
    options = {"backend": pair[0], "strategy": pair[1]}
    x, weight, lora_a, lora_b = tensors(dtype=torch.float16)
    zero = torch.zeros_like(lora_b)
    y = functional.lora_linear(x, weight, lora_a, zero, 2.0, **options)
    assert torch.equal(y, functional.lora_linear(x, weight, torch.zeros_like(lora_a), zero, 2.0, **options))


def test_sum_backward(pair):
    """y.sum() sends a dy whose strides are all zero."""
    options = {"backend": pair[0], "strategy": pair[1]}
    x, weight, lora_a, lora_b = (t.detach() for t in tensors())
    inputs = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    grads = torch.autograd.grad(functional.lora_linear(x, weight, lora_a, lora_b, 2.0, **options).sum(), inputs)
    dy = torch.ones(x.shape[0], weight.shape[0], device=DEVICE)
    with torch.no_grad():
        expected = reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, 2.0)[:3]
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", testing.HALF, ids=str)
def test_fp32_adapters_get_gradients_straight_from_the_accumulators(pair, dtype):
    if pair[0] == "eager":
        pytest.skip("torch's half-precision GEMM rounds its result")
    case = Case(**ALIGNED, dtype=dtype, lora_dtype=torch.float32)
    results = testing.run(case, testing.make_tensors(case, DEVICE), *pair)
    for name in ("da", "db"):
        in_half = results[name] == results[name].to(dtype).float()
        assert in_half.float().mean() < 0.05, f"{name} was rounded to {dtype} on the way"


def test_dropout_draws_from_the_generator(pair):
    if not supports(Case(**ALIGNED, dropout_p=0.5), *pair):
        pytest.skip("no dropout in this strategy")
    options = {"backend": pair[0], "strategy": pair[1], "dropout_p": 0.5}
    args = tensors()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws += [functional.lora_linear(*args, 2.0, **options), functional.lora_linear(*args, 2.0, **options)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3]), "the same seed, another mask"
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[4]), "another seed, the same mask"


def test_dropout_leaves_the_generator_alone_without_dropout():
    state = torch.get_rng_state()
    functional.lora_linear(*tensors(), 2.0, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)
