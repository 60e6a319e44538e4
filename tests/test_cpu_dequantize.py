"""The CPU's compiled dequantisation: the bits of each format's own, from every instruction set and any number of threads."""

import math

import pytest
import torch
from compiled import every_set, needs_library, on_threads
from test_formats import VARIANTS

from lora_kernels import formats, lora_linear
from lora_kernels.backends import cpu_dequantize, cpu_library, dequantized
from lora_kernels.formats import FP8Weight, Int4Weight, Int8Weight, NF4Weight

pytestmark = needs_library
SHAPES = [(1, 1), (5, 7), (140, 65), (9, 256), (33, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[variant for variant in VARIANTS if variant[0] in cpu_dequantize.OPERANDS], ids=str)
def make(request):
    """Quantises a weight in one of the formats that the library knows."""
    name, options = request.param
    return lambda weight: formats.quantize(weight, name, **options)


def compiled(weight, dtype):
    """Between sentinels: not an element more than there are is written."""
    n, k = weight.shape
    memory = torch.full((n + 2, k), math.nan, dtype=dtype)
    assert cpu_dequantize.dequantize(weight, memory[1:-1])
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    return memory[1:-1]


def assert_same_bits(weight, dtypes=DTYPES):
    for dtype in dtypes:
        actual, expected = compiled(weight, dtype), weight.dequantize(dtype)
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), (weight, dtype)


@every_set
def test_every_set_gives_the_bits_of_the_format(ask_for, isa, make):
    ask_for(isa)
    for shape in SHAPES:
        weight = make(torch.randn(shape))
        assert_same_bits(weight)
    for threads in (2, 3, 16):
        assert torch.equal(on_threads(threads, compiled, weight, torch.bfloat16), weight.dequantize(torch.bfloat16))


@every_set
def test_every_set_keeps_subnormal_values_and_zeros(ask_for, isa, make):
    ask_for(isa)
    for scale in (1e-38, 3e-37, 1e-30, 0.0, 1e30):
        assert_same_bits(make(torch.randn(20, 100) * scale), (torch.float32, torch.bfloat16))


@every_set
def test_every_set_knows_every_code(ask_for, isa):
    ask_for(isa)
    every = torch.arange(256, dtype=torch.uint8)
    data = every.view(torch.float8_e4m3fn)
    nan = data.float().isnan()
    weight = FP8Weight(torch.where(nan, 0, every).view(torch.float8_e4m3fn).view(8, 32), torch.ones(8, 1), (1, 32))
    assert_same_bits(weight)
    weight = FP8Weight(data.view(8, 32), torch.ones(8, 1), (1, 32))
    assert torch.equal(compiled(weight, torch.float32).flatten().isnan(), nan)
    assert_same_bits(Int8Weight(every.view(torch.int8).view(4, 64), torch.rand(4)))
    assert_same_bits(NF4Weight(every, torch.rand(8), (2, 256)))
    words = every.view(torch.int32).view(4, 16)
    assert_same_bits(Int4Weight(words, torch.rand(4, 2), torch.tensor([[0, 255]] * 4).to(torch.uint8), (4, 128), 64))


@every_set
def test_a_set_reads_gptq_as_it_lies(ask_for, isa):
    ask_for(isa)
    words = torch.randint(-(2**31), 2**31 - 1, (16, 24), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (4, 3), dtype=torch.int32)
    weight = Int4Weight.from_gptq(words, torch.rand(4, 24).half(), zeros)
    assert not weight.packed.is_contiguous()
    assert_same_bits(weight)


def test_what_it_cannot_do_is_left_to_pytorch(monkeypatch):
    dense = torch.randn(6, 32)
    weight = formats.quantize(dense, "int8")
    strided = Int8Weight(weight.data.mT.contiguous().mT, weight.scale)
    out = torch.empty(6, 32)
    assert not cpu_dequantize.dequantize(strided, out)
    assert not cpu_dequantize.dequantize(weight, out.double())
    monkeypatch.setattr(cpu_library, "library", lambda: "not built")
    assert not cpu_dequantize.dequantize(weight, out)
    for each in (weight, strided):
        dequantized.fill(each, out.zero_())
        assert torch.equal(out, weight.dequantize(torch.float32))


def test_a_call_uses_it(monkeypatch):
    used = []
    monkeypatch.setattr(
        cpu_dequantize, "dequantize", lambda weight, out: used.append(weight) or weight.dequantize(out=out) is out
    )
    weight = formats.quantize(torch.randn(8, 64), "nf4")
    lora_linear(torch.randn(2, 64), weight, torch.randn(2, 64), torch.randn(8, 2), 1.0)
    assert used == [weight]
