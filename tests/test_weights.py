"""Every format in the kernels' K loops, and in the kernel that makes it dense: to the bit what its `dequantize` gives."""

from typing import NamedTuple

import pytest
import torch
from batches import Batch, assert_within_budget
from broken import broken_kernels
from conftest import DEVICE, INTERPRETED

from lora_kernels import BatchPlan, configs, dispatch, explain, formats, testing
from lora_kernels.backends import dequantized, launcher, operands, triton, triton_batched
from lora_kernels.backends.dequantized import Dequantized, InLoop
from lora_kernels.formats import scratch

pytest.importorskip("triton")
needs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
FORMATS = [name for name, kind in formats.FORMATS.items() if kind.INSTRUCTIONS]  # that a kernel reads
VARIANTS = [(name, options) for name in FORMATS for options in formats.FORMATS[name].VARIANTS]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())])
)


def quantized(variant, n, k, dtype=torch.bfloat16):
    name, options = variant
    return formats.quantize((torch.randn(n, k) * torch.rand(n, 1)).to(dtype).to(DEVICE), name, **options)


def made_dense(weight, dtype):
    """What the kernel writes, into memory of which it may not touch the rest."""
    n, k = weight.shape
    memory = torch.full((n + 2, k), torch.nan, dtype=dtype, device=DEVICE)
    dequantized.dequantize(weight, memory[1:-1])
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    return memory[1:-1]


@needs_kernels
@every_variant
@pytest.mark.parametrize(("n", "k"), [(1, 32), (37, 96), (140, 160)])
def test_the_kernel_makes_the_dense_values_to_the_bit(variant, n, k):
    """Tails in N and K; blocks of weights that begin in one row and end in the next; zeros; more than one block of scales."""
    weight = quantized(variant, n, k)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(made_dense(weight, dtype), weight.dequantize(dtype))


@needs_kernels
@pytest.mark.parametrize(("n", "k"), [(37, 96), (300, 288)])
def test_fp8_blocks_in_tiles_of_128_rows(monkeypatch, n, k):
    """Such tiles read four rows' scales at once."""
    weight = quantized(("fp8", {"scaling": "block"}), n, k)
    monkeypatch.setattr(dequantized.triton, "_lookup", lambda *_, **__: configs.Config(128, block_k=64))
    assert torch.equal(made_dense(weight, torch.float32), weight.dequantize(torch.float32))


@needs_kernels
def test_fp8_is_converted_where_there_are_instructions_and_looked_up_where_not(monkeypatch):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).repeat(2).view(2, 256)
    weight = formats.FP8Weight(codes, torch.tensor([[0.5], [3.0]], device=DEVICE), (1, 256))
    expected = weight.dequantize(torch.float32)
    monkeypatch.setattr(formats.fp8, "NATIVE", 10**6)
    assert torch.equal(made_dense(weight, torch.float32).nan_to_num(7.0), expected.nan_to_num(7.0))
    monkeypatch.setattr(formats.fp8, "NATIVE", 0)
    finite = expected.isfinite()  # Triton's interpreter has no NaN of this dtype
    assert finite.sum() == 2 * 254 and torch.equal(made_dense(weight, torch.float32)[finite], expected[finite])


@needs_kernels
@every_variant
def test_lora_linear_in_the_k_loop(variant):
    """The same kernel and tile over the dense values gives the same bits; `test_kernels.py` judges those."""
    m, n, k, r, dtype = 5, 70, 160, 24, torch.bfloat16
    weight, bias = quantized(variant, n, k), torch.randn(n).to(dtype).to(DEVICE)
    x, a, b = (torch.randn(shape).to(dtype).to(DEVICE) for shape in ((m, k), (r, k), (n, r)))
    with testing.poisoned_empty():
        y, h = triton.forward(x, weight, bias, a, b, 0.5, 0.0, None, "extended")
    if INTERPRETED:
        expected = triton.forward(x, weight.dequantize(dtype), bias, a, b, 0.5, 0.0, None, "extended")
        assert torch.equal(y, expected[0]) and torch.equal(h, expected[1])
    truth = x.double() @ weight.dequantize(torch.float64).mT + bias + 0.5 * x.double() @ a.double().mT @ b.double().mT
    assert (y - truth).norm() < 4 * torch.finfo(dtype).eps * truth.norm()


class OverFormat(Batch):
    """A batch over a quantised weight; the reference has its dense values."""

    def __init__(self, variant, **options):
        super().__init__(**options)
        self.quantized = quantized(variant, *self.weight.shape)
        self.weight = self.quantized.dequantize(self.x.dtype).cpu()

    def run(self, rows=slice(None), strategy="one_launch", **change):
        t = {**vars(self), **change}
        names = ("x", "bias", "slots", "weights")
        x, bias, slots, weights = (None if t[name] is None else t[name].to(DEVICE) for name in names)
        plan = BatchPlan(slots[rows], None if weights is None else weights[rows])
        with testing.poisoned_empty():
            y = triton_batched.forward(x[rows], self.quantized, bias, t["adapters"], plan, strategy)
        return y.cpu()


BATCHES = dict(
    slices=dict(m=5, widths=(20, 33), k=96, slots=2, rank=20, dtype=torch.bfloat16),
    parts=dict(m=3, widths=(24,), k=288, slots=2, rank=5, dtype=torch.float16, per_row=2),
)


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "variant"),
    [*(("parts", variant) for variant in VARIANTS), *(("slices", (name, {})) for name in FORMATS)],
    ids=str,
)
def test_a_batch_in_the_k_loop(batch, variant):
    """The error budget; without a GPU the bits of the dense values; rows by themselves; neighbours full of NaN."""
    batch = OverFormat(variant, device=DEVICE, **BATCHES[batch])
    y = batch.run()
    assert_within_budget(batch, y)
    if INTERPRETED:
        assert torch.equal(y, Batch.run(batch, ("triton", "one_launch")))
    assert torch.equal(batch.run(rows=slice(1, 3)), y[1:3])
    assert not launcher.counters(torch.device(DEVICE), 1).any()
    poisoned = batch.x.clone()
    poisoned[2:] = torch.nan
    assert torch.equal(batch.run(x=poisoned)[:2], y[:2])


@needs_kernels
def test_a_batch_without_a_base_term_has_its_adapters():
    """W = 0: nothing for a wrong adapter to hide behind."""
    batch = OverFormat(("nf4", {}), device=DEVICE, bias=False, **BATCHES["slices"])
    batch.quantized = formats.quantize(torch.zeros_like(batch.weight), "nf4")
    batch.weight.zero_()
    assert_within_budget(batch, batch.run())


@needs_kernels
def test_x_off_16_byte_boundaries_is_copied():
    weight, a, b = quantized(("int8", {}), 70, 160), torch.randn(4, 160).to(DEVICE), torch.randn(70, 4).to(DEVICE)
    x = torch.randn(5, 161).to(DEVICE)[:, 1:]
    for strided in (x, x.contiguous()):
        y, _ = triton.forward(strided, weight, None, a, b, 0.5, 0.0, None, "extended")
        assert torch.equal(y, triton.forward(x.contiguous(), weight, None, a, b, 0.5, 0.0, None, "extended")[0])


class Mutant(NamedTuple):
    """A function of kernels/weights.py with `old` in its source replaced by `new`, and a weight that shows it."""

    name: str
    old: str
    new: str
    variant: tuple
    module: str = "weights"


NF4, NESTED, INT8, INT4 = ("nf4", {}), ("nf4", {"double_quant": True}), ("int8", {}), ("int4", {"group_size": 32})
BLOCKS = ("fp8", {"scaling": "block"})
MUTANTS = [
    Mutant("int8: scale dropped", "q.to(tl.float32) * tl.load(w[1] + rows)[:, None]", "q.to(tl.float32)", INT8),
    Mutant("int8: another row's scale", "tl.load(w[1] + rows)[:, None]", "tl.load(w[1] + (rows ^ 1))[:, None]", INT8),
    Mutant("the last block of K missed", "mask=(offs < end)", "mask=(offs < end // 64 * 64)", INT8),
    Mutant("rows taken for columns of codes", "rows[:, None] * stride + offs", "rows[:, None] + offs", INT8),
    Mutant("nf4: nibbles swapped", "tl.join(q >> 4, q & 15)", "tl.join(q & 15, q >> 4)", NF4),
    Mutant("nf4: scale dropped", "values * spread(absmax, CHUNK)", "values", NF4),
    Mutant("nf4: the last block's scale missed", "live = (chunk < K)", "live = (chunk < K - CHUNK)", NF4),
    Mutant("nf4: blocks begin with each row", "first = rows * K", "first = rows // 3 * 3 * K", NF4),
    Mutant("nf4: offset dropped", " + tl.load(w[5])", "", NESTED),
    Mutant("nf4: one group for all", "tl.load(w[3] + block // 256", "tl.load(w[3] + block * 0", NESTED),
    Mutant("nf4: absmax not looked up", "coded = look_up(w[4], 256, absmax)", "coded = absmax / 255.0", NESTED),
    Mutant("int4: nibbles swapped", "tl.join(low, high)", "tl.join(high, low)", INT4),
    Mutant("int4: zero points ignored", "(q >> 4).to(tl.float32) - zero", "(q >> 4).to(tl.float32)", INT4),
    Mutant("the first group for all", "(chunk // GROUP)[None, :]", "(chunk // GROUP * 0)[None, :]", INT4),
    Mutant("fp8: every row its own block", "rows // LAYOUT[0], w[4], w[5]", "rows, w[4] * 0, w[5]", BLOCKS),
]


@pytest.mark.skipif(not INTERPRETED, reason="a wild load on a GPU would harm other tests")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_a_broken_format_is_rejected(monkeypatch, tmp_path, mutant):
    batch = OverFormat(mutant.variant, m=2, widths=(140,), k=160, slots=2, rank=4, dtype=torch.float16)
    weight = batch.quantized
    broken = broken_kernels(mutant, monkeypatch, tmp_path)["weights"]
    monkeypatch.setattr(operands, "loads", lambda name: getattr(broken, name))
    assert not torch.equal(made_dense(weight, torch.float32), weight.dequantize(torch.float32))
    with pytest.raises(AssertionError):
        assert_within_budget(batch, batch.run())


# Dispatch.


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("capability", configs.ARCHITECTURES)
def test_few_rows_are_dequantised_in_the_k_loop_and_many_into_a_scratch(name, capability):
    for adapters, strategy in ((None, "extended"), (8, "one_launch")):
        explained = explain(16, 14336, 4096, 16, capability=capability, adapters=adapters, weight_format=name)
        assert type(explained.plan.backend) is InLoop and explained.plan.strategy == strategy
        assert f"{name} is dequantised in the K loop (modelled, not measured: " in str(explained)
        assert "tile     quantized_" in str(explained)
        many = explain(8192, 4096, 4096, 16, capability=capability, adapters=adapters, weight_format=name)
        assert type(many.plan.backend) is Dequantized
        assert f"{name} is dequantised into a scratch: 8192 rows > 256" in str(many)


def test_the_model_knows_the_bytes_of_a_format():
    in_loop = {name: explain(1, 4096, 4096, 16, adapters=1, weight_format=name).costs["one_launch"] for name in FORMATS}
    dense = explain(1, 4096, 4096, 16, adapters=1).costs["one_launch"].bytes
    for name, cost in in_loop.items():
        saved = 2 * 4096**2 - 64 * formats.quantize(torch.zeros(64, 4096), name).nbytes
        assert cost.bytes == dense - saved
    assert in_loop["nf4"].seconds < explain(1, 4096, 4096, 16, adapters=1).costs["one_launch"].seconds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            dict(k=4104, strategy="extended"),
            "its K loop cannot, for rows of codes that do not begin on 16-byte boundaries",
        ),
        (dict(backend="triton", strategy="chained"), "no kernel of triton / chained does it in its K loop"),
        (dict(dtype=torch.float32), "no kernel of triton / chained does it"),
        (dict(m=257), "257 rows > 256"),
    ],
)
def test_why_it_goes_into_a_scratch(change, reason):
    plan = explain(**dict(m=16, n=4096, k=4096, r=16, weight_format="nf4") | change).plan
    assert type(plan.backend) is Dequantized and f"nf4 is dequantised into a scratch: {reason}" in plan.why


def test_nothing_measured_over_a_dense_weight_is_taken_for_a_measurement_over_a_format(monkeypatch):
    """A tuned strategy of the dense layer has no say; tiles have names of their own."""
    problem = explain(16, 4096, 4096, 16, weight_format="int8").problem
    monkeypatch.setattr(dispatch.tuned, "table", lambda name: pytest.fail("a tuned table was asked"))
    assert dispatch._tuned_strategy(triton, problem) is None


def test_codes_that_lie_otherwise_have_no_tile():
    weight = quantized(("int4", {}), 64, 256)
    assert not isinstance(weight.tile(90), str)
    packed = weight.packed.mT.contiguous().mT
    transposed = formats.Int4Weight(packed, weight.scale, weight.zero, weight.shape, weight.group_size)
    assert transposed.tile(90) == "a state that lies in memory with strides (1, 64)"
    every_other = formats.Int8Weight(torch.zeros(64, 256, dtype=torch.int8), torch.ones(128)[::2])
    assert every_other.tile(90) == "a state that lies in memory with strides (2,)"
    assert transposed.signature != weight.signature
    shifted = torch.zeros(64 * 256 + 1, dtype=torch.int8)[1:].view(64, 256)
    off = formats.Int8Weight(shifted, torch.ones(64))
    assert off.tile(90) == "rows of codes that do not begin on 16-byte boundaries" and not isinstance(
        weight.tile(80), str
    )


def test_why_pytorch_dequantises():
    goal = triton.Target(90, 132, True)
    weight = quantized(("nf4", {}), 64, 256)
    assert dequantized.reasons_no_kernel(weight, torch.bfloat16, goal) == []
    assert dequantized.reasons_no_kernel(weight, torch.float64, goal) == ["torch.float64 has no kernel"]
    assert (
        "expected 8.0 or newer" in dequantized.reasons_no_kernel(weight, torch.float16, goal._replace(capability=75))[0]
    )
    assert "16-byte" in dequantized.reasons_no_kernel(quantized(("nf4", {}), 64, 72), torch.float16, goal)[0]


def test_the_scratch_is_filled_by_whoever_is_asked():
    weight, filled = quantized(("int8", {}), 8, 32), []
    with scratch.dense(weight, torch.float32, lambda weight, out: filled.append(out.fill_(3.0))) as w:
        assert w.eq(3.0).all() and len(filled) == 1
