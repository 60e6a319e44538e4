# ruff: noqa: E402
"""SGLang's own LoRA manager, pool and layers, with us and without: its torch_native backend is the oracle; no server or GPU."""

import argparse
import importlib.metadata
import inspect
import types
from unittest import mock

import pytest
import torch
from features import EXACT, FUSED, UNSUPPORTED, feature
from torch import nn

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("dill")
pytest.importorskip("msgspec")
pytest.importorskip("engines")
pytest.importorskip("sglang", exc_type=ImportError)

from sglang.srt import plugins
from sglang.srt.arg_groups import lora_hook
from sglang.srt.layers.moe import MoeRunnerBackend
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.lora import layers as sglang_layers
from sglang.srt.lora import lora_manager
from sglang.srt.lora.backend import lora_registry
from sglang.srt.lora.backend.triton_v2_backend import TritonV2LoRABackend
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from sglang_model import (
    RAGGED,
    SLOTS,
    WHOLE,
    K,
    Unpinned,
    forward,
    inputs,
    layer,
    load,
    manager,
    parallel,
    step,
)

from lora_kernels import integrations
from lora_kernels.integrations import contract
from lora_kernels.integrations import sglang as ours


@pytest.fixture(autouse=True)
def a_process_of_one(monkeypatch):
    """Tensor parallelism of one, SGLang's settings without a server, and its own functions afterwards."""
    settings = types.SimpleNamespace(
        enable_lora_overlap_loading=False, lora_eviction_policy="lru", experts_shared_outer_loras=False,
        lora_use_virtual_experts=False, lora_strict_loading=True, speculative_algorithm=None, max_loras_per_batch=SLOTS,
    )  # fmt: skip
    for getter in ("get_lora", "get_spec"):
        monkeypatch.setattr(lora_manager, getter, lambda: settings)
    monkeypatch.setattr(lora_manager, "get_available_gpu_memory", lambda *device: 0.0)
    monkeypatch.setattr(lora_manager.LoRAManager, "update_lora_info", lora_manager.LoRAManager.update_lora_info)
    monkeypatch.setitem(lora_registry.LORA_SUPPORTED_BACKENDS, ours.NAME, ours.backend)
    ours.backend.cache_clear()
    integrations._warn_once.cache_clear()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with parallel(0, 1), Unpinned(), torch.no_grad():
        yield


def fused_calls():
    return mock.patch.object(ours, "lora_linear_batched", side_effect=ours.lora_linear_batched)


@feature("q, k, v and gate, up; adapters that lack layers; adapters of other ranks in one batch", FUSED, "SGLang")
@feature("column, row and replicated layers, biases; ragged prefill and base rows", FUSED, "SGLang")
@pytest.mark.parametrize("base", [1.0, 0.0], ids=["", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_numbers(dtype, base):
    truth, theirs, made = (
        manager(name, of, base=base)
        for name, of in (("torch_native", torch.float64), ("torch_native", dtype), (ours.NAME, dtype))
    )
    for each in (truth, theirs, made):
        step(each)
    for kind in WHOLE:
        with fused_calls() as calls:
            y = forward(made, kind, inputs(dtype=dtype))
        assert calls.call_count == 1 and y.dtype == dtype
        exact = forward(truth, kind, inputs(dtype=torch.float64))
        results = (t.double() - exact for t in (y, forward(theirs, kind, inputs(dtype=dtype))))
        error, allowed = ((t.square().mean() / exact.square().mean()).sqrt().item() for t in results)
        assert error <= 1.25 * allowed + 1e-6, (kind, error, allowed)


def assert_as_theirs(made, theirs, x, kinds=WHOLE):
    for kind in kinds:
        torch.testing.assert_close(forward(made, kind, x), forward(theirs, kind, x), atol=1e-5, rtol=1e-5)


@feature("a batch without adapters; a graph that is captured with none", FUSED, "SGLang")
def test_no_adapters(monkeypatch):
    made, x = manager(ours.NAME), inputs()
    step(made, [(None, len(x))])
    for captured in (False, True):
        monkeypatch.setattr(sglang_layers, "capturing_lora_graph", lambda captured=captured: captured)
        for kind in WHOLE:
            base = layer(made, kind).base_layer
            with fused_calls() as calls:
                assert torch.equal(forward(made, kind, x), nn.functional.linear(x, base.weight, base.bias))
            assert calls.call_count == captured


def decoding(*names):
    return [(name, 1) for name in names]


@feature(
    "what CUDA graphs of decoding and prefill read: memory that lasts; padded rows are base rows",
    FUSED,
    "SGLang",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "eager"])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_graphs(decode, dtype):
    made, theirs = manager(ours.NAME, dtype), manager("torch_native", dtype)
    made.init_decode_cuda_graph_batch_info(8, 1)
    made.init_prefill_cuda_graph_batch_info(64, 16)
    there = None
    for segments in (decoding("wide", None, "half"), decoding("narrow", "half", "wide", "narrow", "half", None)):
        segments = segments if decode else [(name, 3) for name, _ in segments]
        step(made, segments, decode)
        step(theirs, segments, decode)
        backend = made.lora_backend
        assert backend.batch_info.use_cuda_graph
        x, padded = inputs(segments, dtype), inputs([(None, 8 if decode else 32)], dtype)
        padded[: len(x)] = x
        for kind in WHOLE:
            y, base = forward(made, kind, padded), layer(made, kind).base_layer
            torch.testing.assert_close(y[: len(x)], forward(theirs, kind, x), atol=1e-5, rtol=1e-5)
            expected = nn.functional.linear(padded[len(x) :], base.weight, base.bias)
            torch.testing.assert_close(y[len(x) :], expected, atol=1e-5, rtol=1e-5)
        tables = [t for kind in WHOLE for a in layer(made, kind).lora_kernels.adapters for t in a.fields[:5]]
        lasting = [t.data_ptr() for t in (*tables, *backend.batch_info.plan.parts) if t is not None]
        assert there in (None, lasting)
        there = lasting


@feature("adapters loaded, replaced and removed between steps; more of them than slots", FUSED, "SGLang")
def test_more_adapters_than_slots():
    made, theirs = manager(ours.NAME), manager("torch_native")
    for each in (made, theirs):
        for i in range(6):
            load(each, f"tenant {i}", (11, 7, 5)[i % 3], seed=100 + i)
    for first in (0, 3, 1):
        for names in [[f"tenant {first + i}" for i in range(3)], ["wide", "tenant 5", "narrow"]]:
            for each in (made, theirs):
                step(each, [(name, 5) for name in names] + [(None, 2)])
            assert_as_theirs(made, theirs, inputs()[:17])
    qkv, o = (layer(made, kind) for kind in ("qkv_proj", "o_proj"))
    assert (
        sum(t.numel() for s in qkv.lora_kernels.adapters for t in (s.a, s.b)) == qkv.lora_a.numel() + qkv.lora_b.numel()
    )
    assert o.lora_kernels.adapters[0].a is o.lora_a  # without slices nothing is there twice
    with mock.patch.object(qkv, "on_lora_slots_updated") as copies:
        step(made, [("wide", 5)])
        assert not copies.called  # they are there
        made.unload_lora_adapter(made.lora_refs["wide"])
        assert copies.called
    step(made, [("half", 5), (None, 3)])
    step(theirs, [("half", 5), (None, 3)])
    assert_as_theirs(made, theirs, inputs()[:8])


@feature("isolation: a tenant's bits, whatever the others' adapters and rows hold", FUSED, "SGLang")
def test_isolation():
    made, x = manager(ours.NAME, torch.float16), inputs(dtype=torch.float16)
    step(made)
    mine = torch.cat([torch.full((length,), name == "half") for name, length in RAGGED])
    before = {kind: forward(made, kind, x)[mine] for kind in WHOLE}
    own = made.memory_pool.get_buffer_id("half")
    for kind in WHOLE:
        for adapters in layer(made, kind).lora_kernels.adapters:
            for t in (adapters.a, adapters.b):
                t[torch.arange(SLOTS) != own] = float("nan")
    x[~mine] = float("inf")
    for kind in WHOLE:
        assert torch.equal(forward(made, kind, x)[mine], before[kind])


@feature("tensor parallelism", FUSED, "SGLang")
def test_tensor_parallel():
    """Each rank's part, as SGLang shards weights and adapters; a collective, which is SGLang's, doubles it instead."""
    kinds = ("qkv_proj", "gate_up_proj", "q_b_proj", "o_proj")
    for rank in range(2):
        with parallel(rank, 2), mock.patch.object(sglang_layers, "tensor_model_parallel_all_reduce", lambda y: 2 * y):
            made, theirs = manager(ours.NAME, kinds=kinds), manager("torch_native", kinds=kinds)
            for each in (made, theirs):
                step(each)
            with fused_calls() as calls:
                assert_as_theirs(made, theirs, inputs(), kinds[:3])
                assert_as_theirs(made, theirs, inputs()[:, : K // 2], kinds[3:])
            assert calls.call_count == 4


@feature("lm_head, the rows of a prefill that it is asked for included", FUSED, "SGLang")
def test_lm_head():
    made, theirs = (manager(name, kinds=("o_proj",), extra=("lm_head",)) for name in (ours.NAME, "torch_native"))
    asked = decoding(*(name for name, _ in RAGGED))
    x = inputs(asked)
    step(theirs, asked, decode=True)
    expected = theirs.base_model.lm_head(x)
    for decode in (True, False):
        step(made, asked if decode else RAGGED, decode)
        with fused_calls() as calls:
            torch.testing.assert_close(made.base_model.lm_head(x), expected, atol=1e-5, rtol=1e-5)
        assert calls.call_count == 1


@feature(
    "base layers with quantised weights, another GEMM, or columns without adapters", f"{EXACT}; the adapters on our kernels",
    "SGLang",
)  # fmt: skip
def test_adapters_beside_another_base(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")

    class Quantised(UnquantizedLinearMethod):
        pass

    with pytest.warns(UserWarning, match=r"its weight is \[48, 64\], not \[40, 64\]; the adapters alone"):
        made = manager(ours.NAME, kinds=("o_proj", "in_proj"))
    theirs = manager("torch_native", kinds=("o_proj", "in_proj"))
    layer(made, "o_proj").base_layer.quant_method = Quantised()
    with pytest.warns(UserWarning, match="RowParallelLinear: Quantised has no kernel; the adapters alone run on ours"):
        made.update_lora_info()
    for each in (made, theirs):
        step(each)
    with mock.patch.object(ours, "add_lora_batched", side_effect=ours.add_lora_batched) as adds, fused_calls() as fused:
        assert_as_theirs(made, theirs, inputs(), ("o_proj", "in_proj"))
    assert (adds.call_count, fused.call_count) == (2, 0)
    for patched, name in (
        ("sglang.srt.layers.quantization.unquant.get_bf16_gemm_backend", "another GEMM"),
        ("sglang.srt.batch_invariant_ops.is_batch_invariant_mode_enabled", "batch-invariant"),
    ):
        with mock.patch(patched), pytest.warns(UserWarning, match=name):
            manager(ours.NAME, kinds=("q_b_proj",))
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"Quantised has no kernel.*STRICT"):
        made.update_lora_info()


@feature("embedding layers; activations of another dtype than the adapters", EXACT, "SGLang")
def test_what_runs_as_in_triton_v2(monkeypatch):
    made = manager(ours.NAME, kinds=("o_proj",), extra=("embed_tokens",))
    step(made)
    embed, tokens, x = made.base_model.model.embed_tokens, torch.arange(len(inputs())), inputs(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no operation for B alone"):
        embed(tokens)
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    with mock.patch.object(TritonV2LoRABackend, "forward_with_base", autospec=True) as theirs:
        with pytest.warns(UserWarning, match="VocabParallelEmbedding: there is no operation for B alone"):
            embed(tokens)
        with pytest.warns(UserWarning, match="RowParallelLinear: x is torch.float64, LoRA torch.float32"):
            forward(made, "o_proj", x)
        with pytest.warns(UserWarning, match="fewer rows than the batch"):
            forward(made, "o_proj", inputs()[:3])
    assert theirs.call_count == 3
    for call in theirs.call_args_list:
        inspect.signature(TritonV2LoRABackend.forward_with_base).bind(*call.args, **call.kwargs)
    assert theirs.call_args_list[0].kwargs["kind"] == "embedding"


@feature("adapters of routed experts", f"{UNSUPPORTED}, said by SGLang", "SGLang")
def test_experts():
    base = nn.Module()
    vars(base).update(
        quant_method=None, dispatcher=None, num_local_experts=2, should_fuse_routed_scaling_factor_in_topk=False, moe_tp_size=1,
        moe_tp_rank=0, intermediate_size_per_partition=8, moe_runner_config=types.SimpleNamespace(gemm1_alpha=None),
        runner=types.SimpleNamespace(runner_backend=MoeRunnerBackend.TRITON),
    )  # fmt: skip
    with (
        mock.patch("sglang.srt.layers.moe.utils.get_moe_runner_backend", lambda: MoeRunnerBackend.AUTO),
        pytest.raises(ValueError, match="Routed MoE LoRA must pair"),
    ):
        sglang_layers.FusedMoEWithLoRA(base, ours.backend()(SLOTS, torch.device("cpu")))


def test_the_signatures_that_are_relied_on(monkeypatch):
    assert contract.unsupported("sglang", ours.SERIES, ours.PLUGIN | ours.SIGNATURES) is None
    monkeypatch.setenv("LORA_KERNELS_STRICT", "0")
    monkeypatch.setattr(TritonV2LoRABackend, "_new_batch", lambda self, requests: None)
    with pytest.warns(
        UserWarning, match=r"_new_batch takes \(self requests\), expected \(self requests tokens graph\)"
    ):
        assert ours.backend() is TritonV2LoRABackend


def test_the_plugin(monkeypatch):
    monkeypatch.setattr(ServerArgs, "add_cli_args", staticmethod(ServerArgs.add_cli_args))
    monkeypatch.setattr(lora_hook, "check_lora_server_args", lora_hook.check_lora_server_args)
    monkeypatch.delitem(lora_registry.LORA_SUPPORTED_BACKENDS, ours.NAME)
    point = importlib.metadata.EntryPoint(ours.NAME, f"{ours.__name__}:register", plugins.GENERAL_PLUGINS_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    try:
        plugins.load_plugins()
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        assert parser.parse_args(["--model-path", "x", "--lora-backend", ours.NAME]).lora_backend == ours.NAME
        kind = lora_registry.get_backend_from_name(ours.NAME)
        assert issubclass(kind, (ours.Fused, TritonV2LoRABackend)) and kind.__name__ == "FusedLoRABackend"
        settings = types.SimpleNamespace(
            lora_backend=ours.NAME, attn_dp_size=2, enable_pdmux=False, enable_two_batch_overlap=False
        )  # fmt: skip
        monkeypatch.setattr("sglang.srt.arg_groups.overrides.resolving_view", lambda server_args: settings)
        with pytest.raises(ValueError, match="--lora-backend lora_kernels does not yet support DP-attention"):
            lora_hook.check_lora_server_args(settings)
    finally:
        HookRegistry.reset()
