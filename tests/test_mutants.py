"""The judge must reject every broken backend and every broken kernel, and accept what they break."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import mutants
import pytest
import torch
from broken import broken_kernels
from conftest import DEVICE, INTERPRETED

from lora_kernels import reference, testing
from lora_kernels.backends import BACKENDS, launcher, triton

PROBLEM = testing.Case(33, 40, 80, 8, scaling=0.75, bias=True, dropout_p=0.25, needs=testing.TRAINABLE, seed=5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def check(monkeypatch, device):
    def run(mutant, **changes):
        monkeypatch.setitem(BACKENDS, mutant.__name__, mutant())
        testing.check(replace(PROBLEM, **changes | mutant.case), mutant.__name__, device=device)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("like", [mutants.Model, *mutants.MUTANTS], ids=lambda mutant: mutant.__name__)
def test_the_model_is_accepted(monkeypatch, check, like, dtype):
    monkeypatch.setattr(mutants.Model, "case", like.case)
    check(mutants.Model, dtype=dtype)


@pytest.mark.parametrize(
    ("mutant", "dtype"),
    [(m, dtype) for m in mutants.MUTANTS for dtype in DTYPES if dtype in testing.HALF or not m.half_only],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_backend_is_rejected(check, mutant, dtype):
    with pytest.raises(AssertionError, match=mutant.rejected):
        check(mutant, dtype=dtype)


def test_allclose_would_accept_what_the_judge_rejects(check):
    """The adapter's term beside a base term a hundred times its size: why every case also runs with W = 0."""
    t = testing.make_tensors(replace(PROBLEM, dtype=torch.float32, scaling=0.01), DEVICE)
    base = torch.nn.functional.linear(t.x, t.weight, t.bias)
    whole = reference.lora_linear(t.x, t.weight, t.lora_a, t.lora_b, 0.01, t.bias)
    assert torch.allclose(base, whole, atol=5e-2)
    with pytest.raises(AssertionError, match="^y: "):
        check(mutants.AdapterDropped, dtype=torch.float32)


class KernelMutant(NamedTuple):
    """A kernel module with `old` in its source replaced by `new`, and a strategy that runs it."""

    name: str
    module: str
    old: str
    new: str
    rejected: str
    strategy: str = "extended"
    dropout_p: float = 0.0
    aligned: bool = False


LAST_TILE = "range(tl.maximum(tl.cdiv({}), 1))"
SCALE = "h_acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling"
KERNEL_MUTANTS = (
    KernelMutant(
        "column mask of a tile load dropped",
        "tile",
        "        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]\n        return",
        "        mask = (offs_row < rows)[:, None] & (offs_col >= 0)[None, :]\n        return",
        "^y: ",
    ),
    KernelMutant(
        "row mask of a tile load dropped",
        "tile",
        "        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]\n        return",
        "        mask = (offs_row >= 0)[:, None] & (offs_col < cols)[None, :]\n        return",
        "^(y|dx|da|db): ",
    ),
    KernelMutant(
        "row mask of a strided load dropped",
        "tile",
        "\n    mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]\n    offs",
        "\n    mask = (offs_row >= 0)[:, None] & (offs_col < cols)[None, :]\n    offs",
        "NaN",
    ),
    KernelMutant(
        "rank mask of h dropped",
        "tile",
        "(offs_r < R)[None, :]\n    return",
        "(offs_r >= 0)[None, :]\n    return",
        "NaN",
    ),
    KernelMutant(
        "row mask of the store of h dropped",
        "tile",
        "    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]\n    tl.store",
        "    mask = (offs_m >= 0)[:, None] & (offs_r < R)[None, :]\n    tl.store",
        "outside its buffer",
    ),
    KernelMutant(
        "row mask of the store of y dropped",
        "tile",
        "mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]",
        "mask = (offs_m >= 0)[:, None] & (offs_n < N)[None, :]",
        "outside its buffer",
    ),
    KernelMutant(
        "last K tile of the base product skipped",
        "gemm",
        LAST_TILE.format("K, BLOCK_K") + ":  # a zero-trip",
        "range(K // BLOCK_K):  # a zero-trip",
        "^y: ",
    ),
    KernelMutant(
        "last K tile of h skipped",
        "shrink",
        LAST_TILE.format("K, BLOCK_K * SPLIT"),
        "range(K // (BLOCK_K * SPLIT))",
        "^y: ",
    ),
    KernelMutant(
        "last rows of dA and dB skipped",
        "wgrad",
        LAST_TILE.format("CHUNK, BLOCK_M") + ":\n        m = part * CHUNK + i * BLOCK_M\n        wide_tile",
        "range(min(M - part * CHUNK, CHUNK) // BLOCK_M):\n        m = part * CHUNK + i * BLOCK_M\n        wide_tile",
        "^da: ",
    ),
    KernelMutant("scaling ignored", "gemm", f"\n    {SCALE}\n", "\n", "^y: ", "single_pass"),
    KernelMutant("scaling ignored", "gemm", f"\n            {SCALE}\n", "\n", "^y: ", "one_launch", aligned=True),
    KernelMutant(
        "scaling ignored in a sum of planes",
        "shrink",
        "        planes += SIZE\n    acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling\n",
        "        planes += SIZE\n",
        "^dx: ",
    ),
    KernelMutant(
        "h not rounded",
        "gemm",
        "\n    acc = tl.dot(h_tile, b_tile, acc,",
        "\n    acc = tl.dot(h_acc, b_tile.to(ACC), acc,",
        "^y: not h Bᵀ rounded once",
        "single_pass",
    ),
    KernelMutant(
        "one h for all rows of tiles",
        "gemm",
        "h_tile = load_rows(h, m, 0, M, R,",
        "h_tile = load_rows(h, 0, 0, M, R,",
        "^dx: ",
        "one_launch",
        aligned=True,
    ),
    KernelMutant(
        "counters left as they are",
        "gemm",
        "        tl.store(ticket, 0)",
        "        pass",
        "^y: ",
        "one_launch",
        aligned=True,
    ),
    KernelMutant(
        "another mask in dA",
        "wgrad",
        "drop(wide_tile, key, m, c,",
        "drop(wide_tile, key, m + 1, c,",
        "^da: ",
        dropout_p=0.5,
    ),
    KernelMutant(
        "another mask in dX",
        "gemm",
        "drop(term, tl.load(seed), m, n,",
        "drop(term, tl.load(seed), n, m,",
        "^dx: ",
        dropout_p=0.5,
    ),
    KernelMutant("another mask everywhere", "tile", "n_rounds=7", "n_rounds=10", "^y: ", dropout_p=0.5),
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what lies beyond a mask
@pytest.mark.skipif(not INTERPRETED, reason="a wild store on a GPU would harm other tests")
@pytest.mark.parametrize(
    "mutant", KERNEL_MUTANTS, ids=lambda mutant: f"{mutant.strategy}-{mutant.name}".replace(" ", "_")
)
def test_a_broken_kernel_is_rejected(monkeypatch, tmp_path, mutant):
    n, k, r = (40, 80, 8) if mutant.aligned else (37, 75, 5)
    case = replace(PROBLEM, m=77, n=n, k=k, r=r, dtype=torch.bfloat16, dropout_p=mutant.dropout_p)
    kernels = SimpleNamespace(**vars(triton._kernels()) | broken_kernels(mutant, monkeypatch, tmp_path))
    monkeypatch.setattr(triton, "_kernels", lambda: kernels)
    try:
        with pytest.raises(AssertionError, match=mutant.rejected):
            testing.check(case, "triton", mutant.strategy)
    finally:
        launcher.reset()
