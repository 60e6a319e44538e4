"""Bad input to the formats: one error, which names the argument, what came and what was expected."""

import pytest
import torch
from torch import nn

from lora_kernels import BatchPlan, LayerAdapters, LoRALinear, formats, lora_linear, lora_linear_batched, ops
from lora_kernels.formats import FP8Weight, Int4Weight, Int8Weight, NF4Weight
from lora_kernels.formats.nf4 import Nested

N, K = 6, 128
U8, F32, I32 = torch.uint8, torch.float32, torch.int32


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def nf4(packed=(N * K // 2,), absmax=(12,), packed_dtype=U8, absmax_dtype=F32, **options):
    return NF4Weight(zeros(*packed, dtype=packed_dtype), zeros(*absmax, dtype=absmax_dtype), (N, K), **options)


def int4(packed=(N, 16), scale=(N, 1), zero=(N, 1), packed_dtype=I32, zero_dtype=U8, **options):
    return Int4Weight(
        zeros(*packed, dtype=packed_dtype), zeros(*scale), zeros(*zero, dtype=zero_dtype), (N, K), **options
    )


def gptq(qweight=(K // 8, N), scales=(1, N), dtype=I32, **options):
    return Int4Weight.from_gptq(zeros(*qweight, dtype=dtype), zeros(*scales), zeros(1, 1, dtype=I32), **options)


def checkpoint(scale, **options):
    return FP8Weight.from_checkpoint(zeros(N, K).to(torch.float8_e4m3fn), scale, **options)


def fp8(dtype=torch.float8_e4m3fn, scale=(1, 1), scale_dtype=F32, block=(128, 128)):
    return FP8Weight(zeros(N, K).to(dtype), zeros(*scale, dtype=scale_dtype), block)


NESTED = Nested(zeros(1), zeros(256), zeros())
CASES = {
    "packed-2d": (lambda: nf4(packed=(N, K // 2)), ValueError, "packed: got shape [6, 64], expected [384]"),
    "packed-truncated": (lambda: nf4(packed=(383,)), ValueError, "packed: got shape [383], expected [384]"),
    "packed-int8": (lambda: nf4(packed_dtype=torch.int8), TypeError, "packed: got torch.int8, expected torch.uint8"),
    "packed-none": (lambda: NF4Weight(None, zeros(12), (N, K)), TypeError, "packed: got NoneType, expected a tensor"),
    "absmax-truncated": (lambda: nf4(absmax=(11,)), ValueError, "absmax: got shape [11], expected [12]"),
    "absmax-bf16": (lambda: nf4(absmax_dtype=torch.bfloat16), TypeError, "absmax: got torch.bfloat16, expected torch.f"),
    "absmax-not-nested": (lambda: nf4(nested=NESTED), TypeError, "absmax: got torch.float32, expected torch.uint8"),
    "nested-absmax": (lambda: nf4(absmax_dtype=U8, nested=NESTED._replace(absmax=zeros(2))), ValueError,
                      "nested.absmax: got shape [2], expected [1]"),
    "nested-code": (lambda: nf4(absmax_dtype=U8, nested=NESTED._replace(code=zeros(16))), ValueError,
                    "nested.code: got shape [16], expected [256]"),
    "blocksize": (lambda: nf4(blocksize=96), ValueError, "blocksize: got 96, expected one of 64, 128, 256, 512"),
    "blocksize-quantize": (lambda: formats.quantize(zeros(N, K), "nf4", blocksize=32), ValueError, "blocksize: got 32"),
    "blocksize-float": (lambda: nf4(blocksize=64.0), ValueError, "blocksize: got 64.0, expected one of 64, 128, 256"),
    "shape-none": (lambda: NF4Weight(zeros(1), zeros(1), None), ValueError, "shape: got None, expected [N, K]"),
    "shape-1d": (lambda: NF4Weight(zeros(1), zeros(1), (N,)), ValueError, "shape: got (6,), expected [N, K]"),
    "dtype": (lambda: nf4(dtype=torch.int8), TypeError, "dtype: got torch.int8, expected one of torch.float16"),
    "devices": (lambda: Int8Weight(zeros(N, K, dtype=torch.int8), zeros(N).to("meta")), ValueError,
                "data, scale: got devices ['cpu', 'meta'], expected one"),
    "int8-data": (lambda: Int8Weight(zeros(N, K), zeros(N)), TypeError, "data: got torch.float32, expected torch.int8"),
    "int8-none": (lambda: Int8Weight(None, zeros(N)), TypeError, "data: got NoneType, expected a tensor"),
    "int8-scale": (lambda: Int8Weight(zeros(N, K, dtype=torch.int8), zeros(K)), ValueError,
                   "scale: got shape [128], expected [6]"),
    "fp8-e5m2": (lambda: fp8(torch.float8_e5m2), TypeError, "data: got torch.float8_e5m2, expected torch.float8_e4m3fn"),
    "fp8-scale": (lambda: fp8(scale=(2, 1)), ValueError, "scale: got shape [2, 1], expected [1, 1]"),
    "fp8-scale-dtype": (lambda: fp8(scale_dtype=torch.bfloat16), TypeError, "scale: got torch.bfloat16, expected torch.f"),
    "fp8-block": (lambda: fp8(block=(128, 0)), ValueError, "block: got (128, 0), expected two positive ints"),
    "fp8-block-int": (lambda: fp8(block=128), ValueError, "block: got 128, expected two positive ints"),
    "fp8-block-quantize": (lambda: formats.quantize(zeros(N, K), "fp8", block=(0, 4)), ValueError,
                           "block: got (0, 4), expected two positive ints"),
    "fp8-scaling": (lambda: formats.quantize(zeros(N, K), "fp8", scaling="col"), ValueError,
                    "scaling: got 'col', expected one of tensor, row, block"),
    "int4-packed": (lambda: int4(packed=(16, N)), ValueError, "packed: got shape [16, 6], expected [6, 16]"),
    "int4-packed-dtype": (lambda: int4(packed_dtype=U8), TypeError, "packed: got torch.uint8, expected torch.int32"),
    "int4-scale": (lambda: int4(scale=(1, N)), ValueError, "scale: got shape [1, 6], expected [6, 1]"),
    "int4-zero": (lambda: int4(zero_dtype=I32), TypeError, "zero: got torch.int32, expected torch.uint8"),
    "int4-group": (lambda: int4(group_size=100), ValueError, "group_size: got 100, expected a positive multiple of 8"),
    "gptq-1d": (lambda: gptq(qweight=(16 * N,)), ValueError, "qweight: got shape [96], expected [K / 8, N]"),
    "gptq-dtype": (lambda: gptq(dtype=U8), TypeError, "qweight: got torch.uint8, expected torch.int32"),
    "gptq-scales": (lambda: gptq(scales=(1, N - 1)), ValueError, "scales: got shape [1, 5], expected [K / group_size, 6]"),
    "gptq-offset": (lambda: gptq(zero_offset=2), ValueError, "zero_offset: got 2, expected 0 or 1"),
    "awq-none": (lambda: Int4Weight.from_awq(None, zeros(1, N), None), TypeError, "qweight: got NoneType, expected a tensor"),
    "awq-scales": (lambda: Int4Weight.from_awq(zeros(K, 1, dtype=I32), zeros(N), None), ValueError,
                   "scales: got shape [6], expected [K / group_size, N]"),
    "checkpoint-none": (lambda: checkpoint(None), TypeError, "weight_scale_inv: got NoneType, expected one of torch.float32"),
    "checkpoint-bytes": (lambda: checkpoint(zeros(1, 1, dtype=U8)), TypeError, "weight_scale_inv: got torch.uint8, expected"),
    "checkpoint-fp64": (lambda: checkpoint(zeros(1, 1).double()), TypeError, "weight_scale_inv: got torch.float64, expected"),
    "checkpoint-shape": (lambda: checkpoint(zeros(2, 1)), ValueError, "weight_scale_inv: got shape [2, 1], expected [1, 1]"),
    "checkpoint-block": (lambda: checkpoint(zeros(1, 1), block_size=128), ValueError,
                         "block_size: got 128, expected two positive ints"),
    "checkpoint-weight": (lambda: FP8Weight.from_checkpoint(zeros(N, K), zeros(1, 1)), TypeError,
                          "weight: got torch.float32, expected torch.float8_e4m3fn"),
    "bitsandbytes-4": (lambda: NF4Weight.from_bitsandbytes(zeros(N, K)), ValueError, "weight: has no quant_state"),
    "bitsandbytes-8": (lambda: Int8Weight.from_bitsandbytes(nn.Linear(8, 8)), TypeError,
                       "linear: got Linear, expected a Linear8bitLt"),
    "torchao-int8": (lambda: Int8Weight.from_torchao(zeros(N, K)), TypeError, "weight: got Tensor, expected an int8 tensor"),
    "torchao-fp8": (lambda: FP8Weight.from_torchao(zeros(N, K)), TypeError, "weight: got Tensor, expected a float8 tensor"),
    "quantize-int": (lambda: formats.quantize(zeros(N, K, dtype=I32), "nf4"), TypeError, "weight: got torch.int32"),
    "quantize-list": (lambda: formats.quantize([[1.0]], "nf4"), TypeError, "weight: got list, expected a dense"),
    "quantize-3d": (lambda: formats.quantize(zeros(1, N, K), "nf4"), ValueError, "weight: got shape [1, 6, 128]"),
    "quantize-empty": (lambda: formats.quantize(zeros(0, K), "nf4"), ValueError, "weight: got shape [0, 128], expected"),
    "format": (lambda: formats.quantize(zeros(N, K), "nf5"), ValueError, "format: got 'nf5', expected one of nf4, int8"),
    "format-none": (lambda: formats.quantize(zeros(N, K), None), TypeError, "format: got NoneType, expected one of nf4"),
    "dequantize": (lambda: nf4().dequantize(I32), TypeError, "dtype: got torch.int32, expected one of torch.float16"),
    "out-shape": (lambda: nf4().dequantize(out=zeros(K, N)), ValueError, "out: got [128, 6], torch.float32, cpu, expected"),
    "out-dtype": (lambda: nf4().dequantize(F32, zeros(N, K).half()), ValueError, "out: got [6, 128], torch.float16, cpu"),
    "x-wrong-k": (lambda: lora_linear(zeros(2, N), nf4(), zeros(1, K), zeros(N, 1), 1.0), ValueError,
                  "x: got shape [2, 6], expected [..., 128], since weight is [6, 128]"),
    "lora_b": (lambda: lora_linear(zeros(2, K), nf4(), zeros(1, K), zeros(N + 1, 1), 1.0), ValueError,
               "lora_b: got shape [7, 1], expected [6, 1]"),
    "weight-meta": (lambda: lora_linear(zeros(2, K), nf4().to("meta"), zeros(1, K), zeros(N, 1), 1.0), ValueError,
                    "weight: got device meta, expected cpu, as x"),
    "quantize-layer": (lambda: LoRALinear.from_linear(nn.Linear(8, 8), r=1, quantize="nf5"), ValueError,
                       "format: got 'nf5', expected one of"),
    "quantize-by-5": (lambda: LoRALinear.from_linear(nn.Linear(8, 8), r=1, quantize=5), TypeError,
                      "format: got int, expected one of nf4"),
    "quantize-by-nothing": (lambda: LoRALinear.from_linear(nn.Linear(8, 8), r=1, quantize=lambda w: w), TypeError,
                            "quantize: got Parameter [8, 8] of it, expected a QuantizedWeight [8, 8]"),
    "quantize-another": (lambda: LoRALinear.from_linear(nn.Linear(8, 8), r=1, quantize=lambda w: nf4()), TypeError,
                         "quantize: got NF4Weight [6, 128] of it, expected a QuantizedWeight [8, 8]"),
    "operator-dense": (lambda: ops.quantized_linear(zeros(2, K), zeros(N, K), None, (N, K), False), TypeError,
                       "format: got NoneType, expected one of nf4"),
    "operator-no-format": (lambda: call("lora_linear", zeros(N, K), None, [], zeros(3)), ValueError,
                           "format: got None, expected a name, since there are layout [], 1 scales"),
    "embedding": (lambda: LoRALinear.from_linear(nn.Embedding(8, 8), r=1), TypeError,
                  "linear: got Embedding, expected an nn.Linear (not a subclass), or a quantised layer in one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_error_says_what_is_wrong(name):
    call, kind, message = CASES[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(message)


X, A, B = zeros(2, K), zeros(2, 1, K), zeros(2, N, 1)
SLOTS = LayerAdapters(A, B, torch.ones(2, dtype=I32), torch.ones(2))
PLAN = BatchPlan(torch.tensor([0, 1], dtype=I32))


def call(operator, codes, *quantized, x=X, n=N):
    """One of the registered operators, with the parts of a weight as they are given."""
    b = zeros(2, n, 1)
    rest = torch.tensor(1.0), 0.0, None
    if operator == "lora_linear":
        return ops.lora_linear(x, codes, None, A[0], b[0], *rest, None, None, *quantized)
    if operator == "lora_linear_backward":
        needs = (True, True, True)
        return ops.lora_linear_backward(
            zeros(2, n), x, zeros(2, 1), codes, A[0], b[0], *rest, needs, None, None, *quantized
        )
    if operator == "lora_linear_batched":
        fields = map(list, zip(LayerAdapters(A, b, *SLOTS.fields[2:4]).fields, strict=True))
        return ops.lora_linear_batched(x, codes, None, *fields, *PLAN.parts, None, None, *quantized)
    return ops.quantized_linear(x, codes, None, (n, x.shape[1]), False, *quantized)


OPERATORS = "lora_linear", "lora_linear_backward", "lora_linear_batched", "quantized_linear"
every_format = pytest.mark.parametrize("format", formats.FORMATS)


@pytest.mark.parametrize("operator", OPERATORS)
@every_format
def test_an_operator_refuses_parts_that_make_no_weight(format, operator):
    """None is given more than it can check, and none reads past what it has."""
    codes, (name, layout, *scales) = ops.parts(formats.quantize(torch.randn(N, K), format))
    call(operator, codes, name, layout, *scales)
    named = "|".join(["weight", *formats.quantize(zeros(N, K), format)._buffers])
    wrong = {
        "a scale missing": dict(scales=scales[:-1]),
        "a scale too many": dict(scales=[*scales, zeros(3)]),
        "a layout too long": dict(layout=[*layout, 64]),
        "codes of another dtype": dict(codes=zeros(*codes.shape, dtype=torch.float64)),
        "codes truncated": dict(codes=codes[:-1]),
        "a scale of another dtype": dict(scales=[scales[0].double(), *scales[1:]]),
        "a scale truncated": dict(scales=[scales[0][:-1], *scales[1:]]),
        "another N": dict(n=N + 1),
        "another K": dict(x=zeros(2, K - 64)),
    } | ({"no layout": dict(layout=[])} if layout else {})
    for what, change in wrong.items():
        given = {"codes": codes, "layout": layout, "scales": scales} | change
        extra = {key: value for key, value in change.items() if key in ("n", "x")}
        with pytest.raises((TypeError, ValueError), match=f"^({named}): got ") as error:
            call(operator, given["codes"], name, given["layout"], *given["scales"], **extra)
        assert "expected" in str(error.value), what


@pytest.mark.parametrize("batched", [False, True])
@every_format
def test_a_buffer_that_was_replaced_is_checked_again(format, batched):
    """By one that is too short: a compiled kernel would read past its end."""

    def run(weight):
        return lora_linear_batched(X, weight, SLOTS, PLAN) if batched else lora_linear(X, weight, A[0], B[0], 1.0)

    for name in formats.quantize(zeros(N, K), format)._buffers:
        weight = formats.quantize(torch.randn(N, K), format)
        run(weight)
        if getattr(weight, name) is not None:
            setattr(weight, name, getattr(weight, name)[:-1].clone())
            with pytest.raises(ValueError, match=f"^{name}: got .* expected"):
                run(weight)


@every_format
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_is_cast(format):
    weight = formats.quantize(torch.randn(N, K), format)
    before = [t.clone() for t in weight.state()]
    for name, tensor in weight.state_dict().items():
        for wrong in (tensor[:-1], tensor.to(torch.float64)):
            for assign in (False, True):
                other = formats.quantize(torch.randn(N, K), format)
                with pytest.raises(RuntimeError, match=rf"{name}.*(shape|got torch.float64)"):
                    other.load_state_dict(weight.state_dict() | {name: wrong}, assign=assign)
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            weight.load_state_dict({key: t for key, t in weight.state_dict().items() if key != name})
    assert all(torch.equal(a, b) for a, b in zip(before, weight.state(), strict=True))
