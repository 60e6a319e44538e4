"""Bad input to the formats: one error, which names the argument, what came and what was expected."""

import pytest
import torch

from lora_kernels import LoRALinear, formats, lora_linear
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
    "shape-1d": (lambda: NF4Weight(zeros(1), zeros(1), (N,)), ValueError, "shape: got [6], expected [N, K]"),
    "dtype": (lambda: nf4(dtype=torch.int8), TypeError, "dtype: got torch.int8, expected one of torch.float16"),
    "devices": (lambda: Int8Weight(zeros(N, K, dtype=torch.int8), zeros(N).to("meta")), ValueError,
                "data, scale: got devices ['cpu', 'meta'], expected one"),
    "int8-data": (lambda: Int8Weight(zeros(N, K), zeros(N)), TypeError, "data: got torch.float32, expected torch.int8"),
    "int8-scale": (lambda: Int8Weight(zeros(N, K, dtype=torch.int8), zeros(K)), ValueError,
                   "scale: got shape [128], expected [6]"),
    "fp8-e5m2": (lambda: fp8(torch.float8_e5m2), TypeError, "data: got torch.float8_e5m2, expected torch.float8_e4m3fn"),
    "fp8-scale": (lambda: fp8(scale=(2, 1)), ValueError, "scale: got shape [2, 1], expected [1, 1]"),
    "fp8-scale-dtype": (lambda: fp8(scale_dtype=torch.bfloat16), TypeError, "scale: got torch.bfloat16, expected torch.f"),
    "fp8-block": (lambda: fp8(block=(128, 0)), ValueError, "block: got (128, 0), expected two positive ints"),
    "fp8-scaling": (lambda: formats.quantize(zeros(N, K), "fp8", scaling="col"), ValueError,
                    "scaling: got 'col', expected one of tensor, row, block"),
    "int4-packed": (lambda: int4(packed=(16, N)), ValueError, "packed: got shape [16, 6], expected [6, 16]"),
    "int4-packed-dtype": (lambda: int4(packed_dtype=U8), TypeError, "packed: got torch.uint8, expected torch.int32"),
    "int4-scale": (lambda: int4(scale=(1, N)), ValueError, "scale: got shape [1, 6], expected [6, 1]"),
    "int4-zero": (lambda: int4(zero_dtype=I32), TypeError, "zero: got torch.int32, expected torch.uint8"),
    "int4-group": (lambda: int4(group_size=100), ValueError, "group_size: got 100, expected a positive multiple of 8"),
    "quantize-int": (lambda: formats.quantize(zeros(N, K, dtype=I32), "nf4"), TypeError, "weight: got torch.int32"),
    "quantize-list": (lambda: formats.quantize([[1.0]], "nf4"), TypeError, "weight: got list, expected a dense"),
    "quantize-3d": (lambda: formats.quantize(zeros(1, N, K), "nf4"), ValueError, "weight: got shape [1, 6, 128]"),
    "quantize-empty": (lambda: formats.quantize(zeros(0, K), "nf4"), ValueError, "weight: got shape [0, 128], expected"),
    "format": (lambda: formats.quantize(zeros(N, K), "nf5"), ValueError, "format: got 'nf5', expected one of nf4, int8"),
    "format-none": (lambda: formats.quantize(zeros(N, K), None), TypeError, "format: got NoneType, expected one of nf4"),
    "out-shape": (lambda: nf4().dequantize(out=zeros(K, N)), ValueError, "out: got [128, 6], torch.float32, cpu, expected"),
    "out-dtype": (lambda: nf4().dequantize(F32, zeros(N, K).half()), ValueError, "out: got [6, 128], torch.float16, cpu"),
    "x-wrong-k": (lambda: lora_linear(zeros(2, N), nf4(), zeros(1, K), zeros(N, 1), 1.0), ValueError,
                  "x: got shape [2, 6], expected [..., 128], since weight is [6, 128]"),
    "lora_b": (lambda: lora_linear(zeros(2, K), nf4(), zeros(1, K), zeros(N + 1, 1), 1.0), ValueError,
               "lora_b: got shape [7, 1], expected [6, 1]"),
    "weight-meta": (lambda: lora_linear(zeros(2, K), nf4().to("meta"), zeros(1, K), zeros(N, 1), 1.0), ValueError,
                    "weight: got device meta, expected cpu, as x"),
    "quantize-layer": (lambda: LoRALinear.from_linear(torch.nn.Linear(8, 8), r=1, quantize="nf5"), ValueError,
                       "format: got 'nf5', expected one of"),
    "embedding": (lambda: LoRALinear.from_linear(torch.nn.Embedding(8, 8), r=1), TypeError,
                  "linear: got Embedding, expected an nn.Linear (not a subclass), or a quantised layer in one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_error_says_what_is_wrong(name):
    call, kind, message = CASES[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(message)
