"""Bad input: one error before any launch, which names the argument, what came and what was expected."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import dispatch, lora_linear

M, N, K, R = 4, 6, 8, 2


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def fake(*shape):
    with FakeTensorMode():
        return torch.empty(shape, device="cuda")


def nested():
    return torch.nested.nested_tensor([zeros(2, K), zeros(3, K)])


def negated():
    return torch.complex(zeros(M, K), torch.ones(M, K)).conj().imag


CASES = {
    # name: (changed arguments, exception, "argument: got ..., expected ...")
    "x-list": ({"x": [[0.0] * K]}, TypeError, "x: got list, expected a torch.Tensor"),
    "x-none": ({"x": None}, TypeError, "x: got NoneType, expected a torch.Tensor"),
    "weight-module": ({"weight": torch.nn.Linear(K, N)}, TypeError, "weight: got Linear, expected a torch.Tensor"),
    "lora_a-none": ({"lora_a": None}, TypeError, "lora_a: got NoneType, expected a torch.Tensor"),
    "lora_b-float": ({"lora_b": 0.0}, TypeError, "lora_b: got float, expected a torch.Tensor"),
    "bias-true": ({"bias": True}, TypeError, "bias: got bool, expected a torch.Tensor"),
    "x-0d": ({"x": zeros()}, ValueError, "x: got a 0-d tensor, expected [..., K]"),
    "x-wrong-k": ({"x": zeros(M, K + 1)}, ValueError, "x: got shape [4, 9], expected [..., 8]"),
    "x-transposed": ({"x": zeros(K, M)}, ValueError, "x: got shape [8, 4], expected [..., 8]"),
    "x-3d-wrong-k": ({"x": zeros(2, M, 1)}, ValueError, "x: got shape [2, 4, 1], expected [..., 8]"),
    "x-no-k": ({"x": zeros(M, 0)}, ValueError, "x: got shape [4, 0], expected [..., 8]"),
    "weight-1d": ({"weight": zeros(K)}, ValueError, "weight: got shape [8], expected [N, K]"),
    "weight-3d": ({"weight": zeros(1, N, K)}, ValueError, "weight: got shape [1, 6, 8], expected [N, K]"),
    "weight-no-n": ({"weight": zeros(0, K)}, ValueError, "weight: got shape [0, 8], expected [N, K] with N, K >= 1"),
    "weight-no-k": ({"weight": zeros(N, 0)}, ValueError, "weight: got shape [6, 0], expected [N, K] with N, K >= 1"),
    "weight-transposed": ({"weight": zeros(K, N)}, ValueError, "x: got shape [4, 8], expected [..., 6]"),
    "lora_a-transposed": ({"lora_a": zeros(K, R)}, ValueError, "lora_a: got shape [8, 2], expected [R, 8]"),
    "lora_a-1d": ({"lora_a": zeros(K)}, ValueError, "lora_a: got shape [8], expected [R, 8]"),
    "lora_a-3d": ({"lora_a": zeros(1, R, K)}, ValueError, "lora_a: got shape [1, 2, 8], expected [R, 8]"),
    "rank-0": ({"lora_a": zeros(0, K), "lora_b": zeros(N, 0)}, ValueError,
               "lora_a: got rank 0 (shape [0, 8]), expected 1 <= R <= 512"),
    "rank-513": ({"lora_a": zeros(513, K), "lora_b": zeros(N, 513)}, ValueError,
                 "lora_a: got rank 513 (shape [513, 8]), expected 1 <= R <= 512"),
    "lora_b-transposed": ({"lora_b": zeros(R, N)}, ValueError, "lora_b: got shape [2, 6], expected [6, 2]"),
    "lora_b-wrong-n": ({"lora_b": zeros(N + 1, R)}, ValueError, "lora_b: got shape [7, 2], expected [6, 2]"),
    "lora_b-wrong-rank": ({"lora_b": zeros(N, R + 1)}, ValueError, "lora_b: got shape [6, 3], expected [6, 2]"),
    "bias-2d": ({"bias": zeros(1, N)}, ValueError, "bias: got shape [1, 6], expected [6]"),
    "bias-wrong-n": ({"bias": zeros(K)}, ValueError, "bias: got shape [8], expected [6]"),
    "bias-0d": ({"bias": zeros()}, ValueError, "bias: got shape [], expected [6]"),
    "x-int": ({"x": zeros(M, K, dtype=torch.int64)}, TypeError, "x: got torch.int64, expected one of torch.float16"),
    "x-bool": ({"x": zeros(M, K, dtype=torch.bool)}, TypeError, "x: got torch.bool, expected one of torch.float16"),
    "x-complex": ({"x": zeros(M, K, dtype=torch.complex64)}, TypeError, "x: got torch.complex64, expected one of"),
    "x-fp8": ({"x": zeros(M, K).to(torch.float8_e4m3fn)}, TypeError, "x: got torch.float8_e4m3fn, expected one of"),
    "x-bf16-weight-fp32": ({"x": zeros(M, K, dtype=torch.bfloat16)}, TypeError,
                           "weight: got torch.float32, expected torch.bfloat16, as x (cast one, or use"),
    "weight-int8": ({"weight": zeros(N, K, dtype=torch.int8)}, TypeError, "weight: got torch.int8, expected torch."),
    "bias-fp16": ({"bias": zeros(N, dtype=torch.float16)}, TypeError, "bias: got torch.float16, expected torch."),
    "lora_a-fp16": ({"lora_a": zeros(R, K, dtype=torch.float16)}, TypeError,
                    "lora_a: got torch.float16, expected torch.float32, as x, or torch.float32"),
    "lora_b-fp64": ({"lora_b": zeros(N, R, dtype=torch.float64)}, TypeError,
                    "lora_b: got torch.float64, expected torch.float32, as lora_a"),
    "x-meta": ({"x": zeros(M, K, device="meta")}, ValueError, "x: got a meta tensor, expected one with data"),
    "weight-meta": ({"weight": zeros(N, K, device="meta")}, ValueError, "weight: got a meta tensor, expected one"),
    "lora_a-meta": ({"lora_a": zeros(R, K, device="meta")}, ValueError, "lora_a: got a meta tensor, expected one"),
    "lora_b-other-device": ({"lora_b": fake(N, R)}, ValueError, "lora_b: got device cuda:0, expected cpu, as x"),
    "bias-other-device": ({"bias": fake(N)}, ValueError, "bias: got device cuda:0, expected cpu, as x"),
    "x-sparse": ({"x": zeros(M, K).to_sparse()}, TypeError, "x: got a tensor of layout torch.sparse_coo, expected"),
    "weight-csr": ({"weight": zeros(N, K).to_sparse_csr()}, TypeError, "weight: got a tensor of layout torch."),
    "x-nested": ({"x": nested()}, TypeError, "x: got a nested tensor, expected a dense one"),
    "x-negated": ({"x": negated()}, TypeError, "x: got a lazily negated view, expected plain memory"),
    "weight-requires-grad": ({"weight": zeros(N, K, requires_grad=True)}, ValueError,
                             "weight: requires grad, expected a frozen base weight"),
    "scaling-nan": ({"scaling": float("nan")}, ValueError, "scaling: got nan, expected a finite number >= 0"),
    "scaling-inf": ({"scaling": float("inf")}, ValueError, "scaling: got inf, expected a finite number >= 0"),
    "scaling-negative": ({"scaling": -1.0}, ValueError, "scaling: got -1.0, expected a finite number >= 0"),
    "scaling-none": ({"scaling": None}, TypeError, "scaling: got NoneType, expected a float or a 0-d tensor"),
    "scaling-str": ({"scaling": "2.0"}, TypeError, "scaling: got str, expected a float or a 0-d tensor"),
    "scaling-bool": ({"scaling": True}, TypeError, "scaling: got bool, expected a float or a 0-d tensor"),
    "scaling-complex": ({"scaling": 1j}, TypeError, "scaling: got complex, expected a float or a 0-d tensor"),
    "scaling-tensor-nan": ({"scaling": torch.tensor(float("nan"))}, ValueError, "scaling: got nan, expected a finite"),
    "scaling-tensor-1d": ({"scaling": torch.ones(1)}, ValueError,
                          "scaling: got a torch.float32 tensor of shape [1], expected a float or a 0-d"),
    "scaling-tensor-int": ({"scaling": torch.tensor(2)}, ValueError, "scaling: got a torch.int64 tensor of shape []"),
    "scaling-tensor-requires-grad": ({"scaling": torch.tensor(2.0, requires_grad=True)}, ValueError,
                                     "scaling: requires grad, expected a constant"),
    "scaling-tensor-meta": ({"scaling": torch.tensor(2.0, device="meta")}, ValueError,
                            "scaling: got device meta, expected cpu, as x"),
    "dropout-1": ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0, expected a float in [0, 1)"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1, expected a float in [0, 1)"),
    "dropout-nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan, expected a float in [0, 1)"),
    "dropout-none": ({"dropout_p": None}, TypeError, "dropout_p: got NoneType, expected a float in [0, 1)"),
    "dropout-bool": ({"dropout_p": True}, TypeError, "dropout_p: got bool, expected a float in [0, 1)"),
    "dropout-tensor": ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p: got Tensor, expected a float in"),
    "backend-unknown": ({"backend": "cublas"}, ValueError, "backend: got 'cublas', expected one of triton, cpu, eager"),
    "backend-module": ({"backend": dispatch}, TypeError, "backend: got module, expected a name or None"),
    "strategy-unknown": ({"strategy": "split_k"}, ValueError, "strategy: got 'split_k', expected one of chained"),
    "strategy-int": ({"strategy": 1}, TypeError, "strategy: got int, expected a name or None"),
}  # fmt: skip


def good():
    return {"x": zeros(M, K), "weight": zeros(N, K), "lora_a": zeros(R, K), "lora_b": zeros(N, R), "scaling": 2.0}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    lora_linear(**good())  # which is remembered
    monkeypatch.setattr(dispatch.Plan, "forward", lambda *args: pytest.fail("a bad problem was run"))


@pytest.mark.parametrize(("changes", "exception", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_named(changes, exception, message):
    with pytest.raises(exception) as caught:
        lora_linear(**good() | changes)
    assert str(caught.value).startswith(message), caught.value


def test_what_is_no_tensor_is_named_under_autocast():
    with torch.autocast("cpu"), pytest.raises(TypeError, match="x: got list"):
        lora_linear(**good() | {"x": [[0.0] * K]})


def test_a_strategy_that_cannot_run_the_problem_says_why():
    with pytest.raises(
        NotImplementedError, match="backend='eager' and strategy='one_launch' cannot run this problem: "
    ):
        lora_linear(**good(), backend="eager", strategy="one_launch")


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "cublas")
    with pytest.raises(ValueError, match="backend: got 'cublas', expected one of"):
        lora_linear(**good())
