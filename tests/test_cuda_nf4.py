"""Decoding over a base weight in NF4: against W dequantised as bitsandbytes does it, emulated or on the GPU under test."""

import random

import emulated
import pytest
import torch
from batches import Batch, assert_within_budget, on
from conftest import DEVICE
from test_cuda import HALF, ON_GPU, every_dtype, needs_kernels, shuffle  # noqa: F401

from lora_kernels import BatchPlan, explain, formats, lora_linear_batched, testing
from lora_kernels.backends import cuda_nf4, launcher

pytestmark = [needs_kernels, pytest.mark.usefixtures("shuffle")]
TABLE = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=torch.float64,
)  # fmt: skip


def quantize(weight, blocksize):
    """`packed [N K / 2, 1]` uint8, `absmax` fp32, and W as they give it, in fp64."""
    flat = weight.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1).float()
    index = (blocks / absmax.double().clamp(min=1e-30)[:, None]).unsqueeze(-1).sub(TABLE).abs().argmin(-1)
    values = (TABLE[index] * absmax[:, None]).flatten()[: len(flat)].view(weight.shape)
    index = index.flatten()[: len(flat)]
    return (index[::2] * 16 + index[1::2]).to(torch.uint8)[:, None], absmax, values


class Quantized(Batch):
    """A batch whose weight is in NF4; the reference has W in fp64, eager in x's dtype."""

    def __init__(self, *, blocksize=64, **options):
        super().__init__(device=DEVICE, **options)
        self.blocksize = blocksize
        self.packed, self.absmax, self.weight = quantize(self.weight, blocksize)

    def run(self, rows=slice(None), **change):
        t = {**vars(self), **change}
        names = ("x", "packed", "absmax", "bias", "slots", "weights")
        x, packed, absmax, bias, slots, weights = (None if t[n] is None else t[n].to(DEVICE) for n in names)
        plan = BatchPlan(slots[rows], None if weights is None else weights[rows])
        adapters = tuple(on(one, DEVICE) for one in self.adapters)
        with testing.poisoned_empty():
            return cuda_nf4.decode(x[rows], packed, absmax, self.blocksize, bias, adapters, plan).cpu()


SHAPES = [
    dict(m=1, widths=(1,), k=64, slots=1, rank=1),
    dict(m=16, widths=(72, 33), k=320, slots=5, rank=24, blocksize=128),  # blocks that reach into the next row
    dict(m=8, widths=(130,), k=576, slots=3, rank=40, blocksize=64),
    dict(m=9, widths=(64, 20), k=1344, slots=4, rank=16, per_row=2, blocksize=4096),
]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_it_is_the_dequantised_layer_in_any_order(shuffle, shape, dtype):  # noqa: F811
    batch, ys = Quantized(**shape, dtype=dtype), []
    for seed in range(3):
        shuffle(seed)
        ys.append(batch.run())
    assert_within_budget(batch, ys[0])
    assert all(torch.equal(y, ys[0]) for y in ys)
    assert not launcher.counters(torch.device(DEVICE), 1).any()


@pytest.mark.parametrize("seed", range(10))
def test_random_problems(shuffle, seed):  # noqa: F811
    rng = random.Random(seed)
    batch = Quantized(
        m=rng.randint(1, 16),
        widths=tuple(rng.randint(1, 150) for _ in range(rng.choice((1, 2)))),
        k=64 * rng.randint(1, 12),
        slots=rng.randint(1, 8),
        rank=rng.randint(1, 40),
        dtype=rng.choice(HALF),
        blocksize=rng.choice(cuda_nf4.BLOCKSIZES),
    )
    shuffle(seed)
    assert_within_budget(batch, batch.run())


def test_every_byte_is_its_pair():
    """x is one 1 a row: y is a column of W, times a scale that no rounding touches."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)[:, None]  # [16, 64]
    expected = TABLE[torch.stack([packed // 16, packed % 16], 1).flatten().long()].view(16, 64).float()
    batch = Quantized(m=16, widths=(16,), k=64, slots=1, rank=1, dtype=torch.float16, popularity="base", bias=False)
    absmax = torch.full((16,), 2.0)
    for first in range(0, 64, 16):
        x = torch.zeros(16, 64, dtype=torch.float16)
        x[:, first : first + 16] = torch.eye(16, dtype=torch.float16)
        y = batch.run(x=x, packed=packed, absmax=absmax)
        assert torch.equal(y, 2 * expected[:, first : first + 16].mT.half())


def test_a_row_does_not_depend_on_its_company():
    batch = Quantized(m=16, widths=(72,), k=640, slots=5, rank=16, dtype=torch.bfloat16)
    y = batch.run()
    for rows in (slice(0, 1), slice(3, 5), slice(5, 13)):
        assert torch.equal(batch.run(rows=rows), y[rows])


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_is_what_runs_over_a_quantised_weight_on_request(double_quant):
    batch = Batch(m=5, widths=(72,), k=320, slots=3, rank=8, dtype=torch.float16)
    weight = formats.quantize(batch.weight.to(DEVICE), "nf4", double_quant=double_quant, blocksize=128)
    adapters = tuple(on(one, DEVICE) for one in batch.adapters)
    x, slots, bias = (t.to(DEVICE) for t in (batch.x, batch.slots, batch.bias))
    with testing.poisoned_empty():
        y = lora_linear_batched(x, weight, adapters, BatchPlan(slots), bias=bias, backend="cuda")
        again = cuda_nf4.decode(x, weight.packed, weight.scales(), 128, bias, adapters, BatchPlan(slots))
    batch.weight = weight.dequantize(torch.float32).cpu()
    assert torch.equal(y, again)
    assert_within_budget(batch, y.cpu())


def test_what_it_cannot_run_goes_by_way_of_the_scratch():
    problem = explain(4, 128, 64, 4, adapters=2, weight_format="nf4").problem
    assert cuda_nf4.reasons_unsupported(problem) == []
    assert "for int8" in cuda_nf4.reasons_unsupported(problem._replace(format="int8"))[0]
    assert "K = 96" in cuda_nf4.reasons_unsupported(problem._replace(k=96))[0]
    assert "16-byte" in cuda_nf4.reasons_unsupported(problem._replace(no_tile="rows off 16-byte boundaries"))[0]


FAULTS = {
    "the barrier behind the table": ("    barrier();\n\n    constexpr int kTurn", "    constexpr int kTurn"),
    "the barrier of a warp": ("      warp_barrier();", ""),
    "the wait for a stage": ("copy_wait<kGemmStages - 2>", "copy_wait<kGemmStages - 1>"),
    "the order of a byte": ("kNormalFloat[i / 16], kNormalFloat[i % 16]", "kNormalFloat[i % 16], kNormalFloat[i / 16]"),
    "a lane's byte": ("quarter % 2 * 16 + byte * 8", "quarter % 2 * 8 + byte * 16"),
    "the row of a scale": ("16 * i + g + c / 2 * 8", "16 * i + g"),
    "the block of a scale": ("(scaled + 32 * i * p.k) >>", "scaled >>"),
    "the mask of K": ("left > 0 ? at.live : 0", "at.live"),
    "the mask of W's rows": ("16 * i + lane / 2 < w_rows", "w_rows"),
}


@pytest.fixture(scope="module")
def faulty():
    return emulated.build_faulty("nf4.cu", FAULTS)


@pytest.mark.skipif(ON_GPU, reason="faults are planted in the emulator")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(faulty, fault):
    with pytest.raises((AssertionError, RuntimeError)), emulated.emulating(faulty[fault]) as emulator:
        launcher.reset()
        try:
            for seed in range(10):
                emulator.seed(seed)
                batch = Quantized(m=9, widths=(40, 70), k=832, slots=2, rank=4, dtype=torch.float16)
                assert_within_budget(batch, batch.run())
        finally:
            launcher.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(packed=torch.zeros(5, dtype=torch.uint8)), ValueError, "packed: got 5 elements"),
        (dict(packed=torch.zeros(2304)), TypeError, "packed: got torch.float32, expected torch.uint8"),
        (dict(absmax=torch.zeros(9)), ValueError, "absmax: got 9 elements of shape .* expected 72"),
        (dict(x=torch.zeros(2, 48, dtype=torch.float16)), ValueError, "x: got 48 columns, expected a multiple of 64"),
        (dict(x=torch.zeros(2, 64)), TypeError, "x: got torch.float32, expected torch.bfloat16 or torch.float16"),
        (dict(x=torch.zeros(2, 68, dtype=torch.float16)[:, 4:]), ValueError, "x: got rows that are not on 16-byte"),
        (dict(blocksize=32), ValueError, "blocksize: got 32, expected one of 64, 128"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    batch = Quantized(m=2, widths=(72,), k=64, slots=2, rank=4, dtype=torch.float16)
    batch.blocksize = change.pop("blocksize", 64)
    with pytest.raises(error, match=message):
        batch.run(**change)


def test_more_than_16_rows_are_refused():
    with pytest.raises(NotImplementedError, match="x: got 17 rows, expected at most 16"):
        Quantized(m=17, widths=(8,), k=64, dtype=torch.float16).run()
