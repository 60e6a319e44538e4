# ruff: noqa: E402
"""vLLM's own layers and wrappers, with us and without: its pure-torch wrapper is the oracle; no server and no GPU."""

import types
from unittest import mock

import pytest
import torch
from features import EXACT, FUSED, feature

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("msgspec")
engines = pytest.importorskip("engines")
pytest.importorskip("vllm", exc_type=ImportError)

from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora import utils
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers import linear

from lora_kernels import integrations, reference
from lora_kernels.integrations import vllm as ours
from lora_kernels.integrations.contract import unsupported

CPU = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
SLOTS, RANK, K, CAPACITY = 4, 16, 64, 64
IDS = [11, 7, None, 5]  # adapter 11 is in slot 0, and so on
RANKS = {11: 16, 7: 3, 5: 8}
RAGGED = [7] * 9 + [0] * 4 + [11] * 1 + [5] * 13 + [7] * 2 + [0]
THEIRS = utils._all_lora_classes
KINDS = {
    "replicated": (linear.ReplicatedLinear, (K, 48), {}, ["x"]),
    "column": (linear.ColumnParallelLinear, (K, 48), {}, ["x"]),
    "row": (linear.RowParallelLinear, (K, 48), {}, ["x"]),
    "gate_up": (linear.MergedColumnParallelLinear, (K, [40, 40]), {}, ["gate", "up"]),
    "qkv": (linear.QKVParallelLinear, (K, 16, 4, 2), {}, ["q", "k", "v"]),
    "four slices": (linear.MergedColumnParallelLinear, (K, [16, 8, 24, 16]), {}, ["a", "b", "c", "d"]),
}


@pytest.fixture(autouse=True)
def one_of_one(monkeypatch):
    """A tensor-parallel group of one, and vLLM's own list of layers afterwards."""
    monkeypatch.setattr(parallel_state, "_TP", group(0, 1))
    monkeypatch.setattr(utils, "_all_lora_classes", utils._all_lora_classes)
    monkeypatch.setattr("vllm.lora.punica_wrapper.utils.async_tensor_h2d", on_the_host)
    integrations._warn_once.cache_clear()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")


def on_the_host(data, dtype, device):
    """Of vLLM's own the one thing that is stood in for: without a GPU there is no pinned memory."""
    return torch.tensor(data, dtype=dtype)


def group(rank, size):
    return types.SimpleNamespace(rank_in_group=rank, world_size=size)


def base_layer(kind, dtype=torch.float32, seed=0, bias=True, base=1.0):
    made, sizes, options, packed = KINDS[kind]
    layer = made(*sizes, bias=bias, params_dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * K**-0.5 * base)
    layer.requires_grad_(False)
    return layer, packed


def adapters_of(kind, dtype=torch.float32):
    """`{id: (A, B)}` as vLLM's loader hands them over: lists where the layer has slices, one of which one adapter lacks."""
    _, sizes, _, packed = KINDS[kind]
    widths = sizes[1] if isinstance(sizes[1], list) else [64, 32, 32] if kind == "qkv" else [sizes[1]]
    found = {}
    for lora_id, r in RANKS.items():
        generator = torch.Generator().manual_seed(lora_id)
        a = [torch.randn(r, K, generator=generator).mul(K**-0.5).to(dtype) for _ in widths]
        b = [torch.randn(n, r, generator=generator).mul(r**-0.5).to(dtype) for n in widths]
        if lora_id == 7 and len(packed) > 1:
            a[1] = b[1] = None
        found[lora_id] = (a, b) if len(packed) > 1 else (a[0], b[0])
    return found


def wrapper(with_us, config, mapping=RAGGED):
    made = ours._with(ours.Punica, PunicaWrapperCPU) if with_us else PunicaWrapperCPU
    punica = made(CAPACITY, CAPACITY, "cpu", lora_config=config)
    if mapping is not None:
        prompts = tuple(dict.fromkeys(mapping))
        punica.update_metadata(LoRAMapping(tuple(mapping), prompts, is_prefill=True), IDS, SLOTS + 1, 100)
    return punica


def lora_layer(kind, with_us, dtype=torch.float32, mapping=RAGGED, adapters=None, base=1.0, **config):
    """vLLM's layer with LoRA around a base layer, made by its own factory; its adapters are loaded."""
    config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=dtype, **config)
    utils._all_lora_classes = THEIRS
    if with_us:
        ours.install(CPU)
    layer, packed = base_layer(kind, dtype, base=base)
    made = utils.from_layer(layer, SLOTS, config, packed)
    made.set_mapping(wrapper(with_us, config, mapping))
    for lora_id, (a, b) in (adapters_of(kind, dtype) if adapters is None else adapters).items():
        made.set_lora(IDS.index(lora_id), a, b)
    return made


def forward(layer, x):
    with torch.inference_mode():
        y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def fused_calls():
    return mock.patch.object(ours.FusedLinear, "_fused", autospec=True, side_effect=ours.FusedLinear._fused)


def inputs(mapping=RAGGED, dtype=torch.float32):
    return torch.randn(len(mapping), K, generator=torch.Generator().manual_seed(3)).to(dtype)


def truth(layer, x, mapping):
    slots = torch.tensor([IDS.index(i) if i else -1 for i in mapping], dtype=torch.int32)
    ranks, ones = torch.full((SLOTS,), RANK), torch.ones(SLOTS)
    n = [b.shape[2] for b in layer.lora_b_stacked]
    weight, bias = layer.base_layer.weight.double().split(n), layer.base_layer.bias.double().split(n)
    return torch.cat([
        reference.lora_linear_batched(x.double(), w, a[:, 0].double(), b[:, 0].double(), ranks, ones, slots, c)
        for w, c, a, b in zip(weight, bias, layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    ], 1)  # fmt: skip


def assert_as_theirs(kind, dtype, mapping=RAGGED, **change):
    x = inputs(mapping, dtype)
    theirs, layer = (lora_layer(kind, with_us, dtype, mapping, **change) for with_us in (False, True))
    with fused_calls() as calls:
        y = forward(layer, x)
    assert calls.call_count == 1
    exact = truth(layer, x, mapping)
    scale = exact.square().mean().sqrt()
    error, allowed = (((t.double() - exact).square().mean().sqrt() / scale).item() for t in (y, forward(theirs, x)))
    assert error <= 1.25 * allowed + 1e-6, (error, allowed)


@feature("`ReplicatedLinear`, `ColumnParallelLinear`, `RowParallelLinear`, biases", FUSED, "vLLM")
@feature("q, k, v and gate, up, any number of slices; adapters that lack some", FUSED, "vLLM")
@feature("adapters of other ranks in one batch; ragged prefill and base rows", FUSED, "vLLM")
@pytest.mark.parametrize("base", [1.0, 0.0], ids=["", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers(kind, dtype, base):
    assert_as_theirs(kind, dtype, base=base)


@feature("a batch without adapters", FUSED, "vLLM")
def test_no_adapters():
    layer, x = lora_layer("qkv", True, mapping=[0] * 7), inputs([0] * 7)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    assert torch.equal(forward(layer, x), expected)
    layer.set_mapping(wrapper(True, layer.lora_config, None))  # nor before the first mapping, when vLLM profiles
    assert torch.equal(forward(layer, x), expected)


@feature("rows that a CUDA graph pads a step to", FUSED, "vLLM")
def test_padded_rows_are_base_rows():
    layer, x = lora_layer("gate_up", True), inputs(RAGGED + [0] * 10)
    y = forward(layer, x)
    assert torch.equal(y[: len(RAGGED)], forward(layer, x[: len(RAGGED)]))
    with torch.inference_mode():
        torch.testing.assert_close(
            y[len(RAGGED) :],
            torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)[len(RAGGED) :],
        )


@feature("adapters loaded, replaced and removed between steps, as in a replayed graph", FUSED, "vLLM")
def test_a_slot_gets_another_adapter():
    adapters = adapters_of("row")
    layer, x = lora_layer("row", True), inputs()
    tensors = [(t, t.data_ptr()) for column in layer._fields for t in column if isinstance(t, torch.Tensor)]
    plan = [(t, t.data_ptr()) for t in layer.punica_wrapper.token_plan.parts if t is not None]
    layer.set_lora(1, *adapters[5])  # rank 8 where rank 3 was, and back
    assert layer._ranks.tolist() == [16, 8, 0, 8]
    layer.reset_lora(3)
    layer.punica_wrapper.update_metadata(LoRAMapping((5,) * 5, (5,), True), IDS, SLOTS + 1, 100)
    assert torch.equal(forward(layer, x[:5]), forward(lora_layer("row", True, mapping=[0] * 5), x[:5]))
    assert all(t.data_ptr() == there for t, there in (*tensors, *plan))
    assert {t.data_ptr() for t, _ in tensors} >= {t.data_ptr() for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)}


@feature("isolation: a tenant's bits, whatever the others' adapters and rows hold", FUSED, "vLLM")
def test_isolation():
    layer, x = lora_layer("qkv", True, torch.float16), inputs(dtype=torch.float16)
    mine = torch.tensor([i == 5 for i in RAGGED])
    y = forward(layer, x)
    for slot in (0, 1, 2):
        for t in (*layer.lora_a_stacked, *layer.lora_b_stacked):
            t[slot] = float("nan")
    x[~mine] = float("inf")
    assert torch.equal(forward(layer, x)[mine], y[mine])


@feature("more adapters in a row of steps than slots: the mapping moves, nothing else", FUSED, "vLLM")
def test_more_adapters_than_slots():
    layer, x = lora_layer("column", True, mapping=None), inputs()
    theirs = lora_layer("column", False, mapping=None)
    everyone = {100 + i: adapters_of("column")[(11, 7, 5)[i % 3]] for i in range(9)}
    for first in range(0, 9, SLOTS):
        ids = [*everyone][first : first + SLOTS]
        rows = [ids[i % len(ids)] for i in range(len(RAGGED))]
        for each in (layer, theirs):
            for slot, lora_id in enumerate(ids):
                each.set_lora(slot, *everyone[lora_id])
            index = ids + [None] * (SLOTS - len(ids))
            each.punica_wrapper.update_metadata(LoRAMapping(tuple(rows), tuple(ids), True), index, SLOTS + 1, 100)
        torch.testing.assert_close(forward(layer, x), forward(theirs, x), atol=1e-5, rtol=1e-5)


@feature("tensor parallelism, without `fully_sharded_loras`", FUSED, "vLLM")
@pytest.mark.parametrize("kind", ["column", "row", "gate_up", "qkv"])
def test_tensor_parallel(kind):
    """Each rank's part, as vLLM shards the adapters; the collectives, which are vLLM's, are left out."""
    x = inputs()
    for rank in range(2):
        parts = []
        for with_us in (False, True):
            with mock.patch.object(parallel_state, "_TP", group(rank, 2)):
                layer = lora_layer(kind, with_us)
            share = x[:, rank * K // 2 :][:, : K // 2] if kind == "row" else x
            with torch.inference_mode():
                parts.append(layer.apply(share, layer.base_layer.bias))
        torch.testing.assert_close(parts[1], parts[0], atol=1e-5, rtol=1e-5)


@feature("`torch.compile(fullgraph=True)` with any number of rows", FUSED, "vLLM")
def test_compile():
    layer, x = lora_layer("qkv", True), inputs()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (len(RAGGED), len(RAGGED) + 3):
        x = torch.randn(rows, K)
        with torch.no_grad():
            assert torch.equal(compiled(x), forward(layer, x))


@feature("lm_head, and base layers with quantised weights", f"{EXACT}; the adapters on our kernels", "vLLM")
def test_adapters_beside_another_base(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    theirs = lora_layer("gate_up", False)

    class Quantised(linear.UnquantizedLinearMethod):
        pass

    config = theirs.lora_config
    ours.install(CPU)
    base, packed = base_layer("gate_up")
    base.quant_method.__class__ = Quantised
    with pytest.warns(UserWarning, match="Quantised has no kernel"):
        layer = utils.from_layer(base, SLOTS, config, packed)
    layer.set_mapping(wrapper(True, config))
    for lora_id, parts in adapters_of("gate_up").items():
        layer.set_lora(IDS.index(lora_id), *parts)
    x = inputs()
    with mock.patch.object(ours, "add", side_effect=ours.add) as calls:
        torch.testing.assert_close(forward(layer, x), forward(theirs, x), atol=1e-5, rtol=1e-5)
        assert calls.call_count == 1
        a, b = torch.randn(SLOTS, 1, RANK, K), torch.randn(SLOTS, 1, 50, RANK)
        hidden, logits = torch.randn(4, K), torch.randn(4, 53)  # the model pads its vocabulary
        results = []
        for with_us in (False, True):
            y = logits.clone()
            wrapper(with_us, config).add_lora_logits(y, hidden, a, b, 1.0)
            results.append(y)
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        assert calls.call_count == 2


@feature("`fully_sharded_loras`", EXACT, "vLLM")
def test_fully_sharded(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    with pytest.warns(UserWarning, match="a collective lies between A and B"):
        layer = lora_layer("row", True, fully_sharded_loras=True)
    theirs, x = lora_layer("row", False, fully_sharded_loras=True), inputs()
    assert torch.equal(forward(layer, x), forward(theirs, x))
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="a collective"):
        lora_layer("row", True, fully_sharded_loras=True)


@feature("batch-invariant mode, another GEMM than PyTorch's", f"{EXACT}; the adapters on our kernels", "vLLM")
@pytest.mark.parametrize("asked", ["batch-invariant", "another"])
def test_another_gemm(monkeypatch, asked):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    theirs, x = lora_layer("gate_up", False), inputs()
    if asked == "another":
        another = lambda layer, x, weight, bias=None: torch.nn.functional.linear(x, weight, bias)  # noqa: E731
        monkeypatch.setattr(linear, "dispatch_unquantized_gemm", lambda backend: another)
    else:
        monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.warns(UserWarning, match="another GEMM than PyTorch's was asked for"):
        layer = lora_layer("gate_up", True)
    with fused_calls() as calls, mock.patch.object(ours, "add", side_effect=ours.add) as adds:
        torch.testing.assert_close(forward(layer, x), forward(theirs, x), atol=1e-5, rtol=1e-5)
    assert not calls.called and adds.call_count == 1


@feature("sleep mode", EXACT, "vLLM")
def test_sleep_mode(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(enable_sleep_mode=True))
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    with pytest.warns(UserWarning, match="sleep mode gives away the memory"):
        assert ours.install(CPU) == CPU
    assert utils._all_lora_classes is THEIRS


@feature("embedding layers", EXACT, "vLLM")
def test_embedding(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=torch.float32)
    h, b = torch.randn(len(RAGGED), RANK), torch.randn(SLOTS, 1, 20, RANK)
    y = torch.zeros(2, len(RAGGED), 20)
    wrapper(False, config).add_lora_embedding(y[0], h, b)
    with pytest.warns(UserWarning, match="embedding"):
        wrapper(True, config).add_lora_embedding(y[1], h, b)
    assert torch.equal(*y)


def test_the_signatures_that_are_relied_on(monkeypatch):
    assert unsupported("vllm", ours.SERIES, ours.SIGNATURES) is None
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    monkeypatch.setattr(utils.BaseLayerWithLoRA, "reset_lora", lambda self, slot: None)
    monkeypatch.setattr(linear.UnquantizedLinearMethod, "apply", lambda self, layer, x: x)
    before = utils._all_lora_classes
    with pytest.warns(
        UserWarning, match=r"UnquantizedLinearMethod.apply takes \(self layer x\), expected \(self layer x bias"
    ):
        assert ours.install(CPU) == CPU
    assert utils._all_lora_classes is before


def test_it_takes_the_place_of_the_platforms_wrapper():
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    platform = type(current_platform)
    with mock.patch.object(platform, "get_punica_wrapper", classmethod(lambda cls: CPU)):
        ours.register()
        ours.register()
        name = current_platform.get_punica_wrapper()
    kind = resolve_obj_by_qualname(name)
    assert issubclass(kind, (ours.Punica, PunicaWrapperCPU)) and kind.__name__ == "FusedPunicaWrapperCPU"
    assert name.endswith(".FusedPunicaWrapper")  # the end of it is what vLLM logs
    assert "LORA_KERNELS" in envs.compile_factors()
    assert LogitsProcessorWithLoRA in utils._all_lora_classes
