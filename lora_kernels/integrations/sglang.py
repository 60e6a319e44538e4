"""SGLang: `--lora-backend lora_kernels`, its LoRA layers as one operation with their base layers.

`register` is an entry point of the group `sglang.srt.plugins`; it adds the name to SGLang's backends. The backend is `Fused`
before SGLang's own triton_v2: who uses which adapter, its pool of them and what of a batch lies in a CUDA graph stay SGLang's;
we add one `BatchPlan` for all layers. What cannot run fused runs as in triton_v2, and is said once.

SGLang's pool packs the A of q, k and v (or gate and up) by the adapter's own rank, and B by the largest one: no layout of
ours. So what an adapter has for such a layer is copied, slice by slice, when SGLang loads it into a slot.
"""

import functools
import importlib.metadata
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import BatchPlan, LayerAdapters, add_lora_batched, lora_linear_batched
from lora_kernels.integrations import fall_back
from lora_kernels.integrations.contract import unsupported

NAME = "lora_kernels"
SERIES = "0.5.23"
PLUGIN = {
    "sglang.srt.lora.backend.lora_registry:register_lora_backend": "name",
    "sglang.srt.plugins.hook_registry:HookRegistry.register": "target hook hook_type source",
    "sglang.srt.server_args:ServerArgs.add_cli_args": "parser",
    "sglang.srt.arg_groups.lora_hook:check_lora_server_args": "server_args",
    "sglang.srt.arg_groups.lora_hook:_check_v2_lora_modes": "cfg option",
    "sglang.srt.arg_groups.overrides:resolving_view": "server_args",
}
V2 = "sglang.srt.lora.backend.triton_v2_backend:TritonV2LoRABackend"
SIGNATURES = {
    f"{V2}.__init__": "self max_loras_per_batch device kwargs",
    f"{V2}._new_batch": "self requests tokens graph",
    f"{V2}._runner_for": "self pruned_batch_info",
    f"{V2}.prepare_lora_batch": (
        "self forward_batch weight_indices lora_ranks scalings use_decode_cuda_graph use_prefill_cuda_graph"
    ),
    f"{V2}.forward_with_base": (
        "self layer x base_fn lora_a lora_b output_offset offsets all_reduce kind pruned_batch_info"
    ),
    "sglang.srt.lora.lora_manager:LoRAManager.update_lora_info": "self",
    "sglang.srt.lora.lora_manager:LoRAManager._notify_lora_slots_updated": "self slot_ids",
    "sglang.srt.lora.layers:RowParallelLinearWithLoRA.forward": "self input_ skip_all_reduce forward_batch",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply": "self layer x bias",
    "sglang.srt.layers.quantization.unquant:get_bf16_gemm_backend": "",
    "sglang.srt.batch_invariant_ops:is_batch_invariant_mode_enabled": "",
    "sglang.srt.distributed.utils:get_group_rank_size": "group",
    "sglang.srt.utils.common:use_intel_amx_backend": "layer",
}


def register() -> None:
    """Add `lora_kernels` to the LoRA backends of this process's SGLang. Does nothing without SGLang.

    Another SGLang than the one this was written for goes on as it is, without that name, which is said once, or raised as
    RuntimeError with LORA_KERNELS_STRICT=1.
    """
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return
    if reason := unsupported("sglang", SERIES, {}) or unsupported("sglang", SERIES, PLUGIN):
        fall_back(reason)
        return
    from sglang.srt.lora.backend.lora_registry import register_lora_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    register_lora_backend(NAME)(backend)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.add_cli_args", _offer, HookType.AFTER)
    HookRegistry.register("sglang.srt.arg_groups.lora_hook.check_lora_server_args", _check, HookType.BEFORE)


def _offer(_, parser):
    """After SGLang's options are there: `--lora-backend` takes our name too."""
    option = parser._option_string_actions["--lora-backend"]
    option.choices = [*option.choices, NAME]


def _check(server_args):
    """Before SGLang checks them: what triton_v2 does not support, the backend on top of it does not either."""
    from sglang.srt.arg_groups.lora_hook import _check_v2_lora_modes
    from sglang.srt.arg_groups.overrides import resolving_view

    settings = resolving_view(server_args)
    if settings.lora_backend == NAME:
        _check_v2_lora_modes(settings, f"--lora-backend {NAME}")


@functools.cache
def backend() -> type:
    """The class of the backend; a worker's LoRA manager asks for it, just before it makes the layers."""
    from sglang.srt.lora.backend.triton_v2_backend import TritonV2LoRABackend
    from sglang.srt.lora.lora_manager import LoRAManager

    if reason := unsupported("sglang", SERIES, SIGNATURES):
        fall_back(f"{reason}, on triton_v2")
        return TritonV2LoRABackend
    theirs = LoRAManager.update_lora_info

    @functools.wraps(theirs)
    def update_lora_info(manager):
        theirs(manager)
        if isinstance(manager.lora_backend, Fused):
            manager.lora_backend.attach(manager)

    LoRAManager.update_lora_info = update_lora_info
    return type("FusedLoRABackend", (Fused, TritonV2LoRABackend), {})


class Layer(NamedTuple):
    """What we know of one of SGLang's LoRA layers; `not_fused` is why its base layer runs as in SGLang, if so."""

    adapters: tuple[LayerAdapters, ...]
    bias: Tensor | None
    not_fused: str | None


class Fused:
    """Before SGLang's triton_v2: a plan of each batch, and a layer's base and adapters in one operation."""

    def __init__(self, max_loras_per_batch, device, **kwargs):
        super().__init__(max_loras_per_batch, device, **kwargs)
        with torch.inference_mode(False):  # else they could be updated only there
            self.ranks = torch.zeros(max_loras_per_batch, dtype=torch.int32, device=device)
            self.scalings = torch.zeros(max_loras_per_batch, device=device)

    def _new_batch(self, requests, tokens, *, graph=False):
        batch = super()._new_batch(requests, tokens, graph=graph)
        if graph:
            with torch.inference_mode(False):
                batch.plan = BatchPlan(batch.token_slots)
        return batch

    def prepare_lora_batch(self, *args, **kwargs):
        super().prepare_lora_batch(*args, **kwargs)
        batch = self.batch_info
        slots = batch.token_slots[: batch.num_tokens]
        if batch.use_cuda_graph:
            batch.plan.update(slots)
        else:
            batch.plan = BatchPlan(slots)
        batch.plans = {}  # by the number of rows that a graph pads them to
        self.ranks.copy_(batch.lora_ranks)
        self.scalings.copy_(batch.scalings)

    def attach(self, manager) -> None:
        """Know the LoRA layers of a model, once SGLang has given them their adapters' memory."""
        layers = itertools.chain(*(layers.values() for layers in manager.lora_modules), [manager.lm_head_module])
        for layer in layers:
            a = getattr(layer, "lora_a", getattr(layer, "lm_head_A_buffer", None))
            if a is None:  # experts, or no lm_head
                continue
            b = getattr(layer, "lora_b", getattr(layer, "lm_head_B_buffer", None))
            adapters = self._adapters(manager, layer, a, b)
            layer.lora_kernels = known = Layer(adapters, _bias(layer.base_layer), _reason(layer, a))
            if known.not_fused is not None:
                fall_back(f"SGLang's {type(layer.base_layer).__name__}: {known.not_fused}")

    def _adapters(self, manager, layer, a, b):
        tables = self.ranks, self.scalings
        widths = [end - start for start, end in itertools.pairwise(layer.lora_offsets)]
        if len(widths) == 1:
            return (LayerAdapters(a, b, *tables),)
        slots, _, max_rank = b.shape
        with torch.inference_mode(False):
            adapters = tuple(
                LayerAdapters(a.new_zeros(slots, max_rank, a.shape[2]), b.new_zeros(slots, width, max_rank), *tables)
                for width in widths
            )

        def copy(slots):
            for slot in slots:
                if adapter := manager.loras.get(manager.memory_pool.buffer_id_to_uid[slot]):
                    r = adapter.config.r
                    parts = zip(a[slot, : r * len(widths)].split(r), b[slot, :, :r].split(widths), strict=True)
                    for ours, (of_a, of_b) in zip(adapters, parts, strict=True):
                        ours.a[slot, :r], ours.b[slot, :, :r] = of_a, of_b

        layer.on_lora_slots_updated = copy  # SGLang calls it where there is one
        copy(range(slots))
        return adapters

    def forward_with_base(
        self, layer, x, base_fn, lora_a, lora_b, output_offset, offsets, *, all_reduce=None, pruned_batch_info=None, **kind
    ):  # fmt: skip
        known = getattr(layer, "lora_kernels", None)
        if reason := self._not_ours(layer, known, x, pruned_batch_info):
            fall_back(f"SGLang's {type(layer.base_layer).__name__}: {reason}")
            return super().forward_with_base(
                layer, x, base_fn, lora_a, lora_b, output_offset, offsets, all_reduce=all_reduce,
                pruned_batch_info=pruned_batch_info, **kind,
            )  # fmt: skip
        plan = self._plan(x.shape[0], pruned_batch_info)
        if known.not_fused is None:
            y = lora_linear_batched(x, layer.base_layer.weight, known.adapters, plan, bias=known.bias)
        else:
            y = base_fn()
            add_lora_batched(y[:, : offsets[-1]], x, known.adapters, plan)  # a base layer may have more columns
        return y if all_reduce is None else all_reduce(y)

    def _not_ours(self, layer, known, x, pruned_batch_info):
        if known is None:
            return "there is no operation for B alone"
        if x.dtype != known.adapters[0].a.dtype:
            return f"x is {x.dtype}, LoRA {known.adapters[0].a.dtype}"
        if pruned_batch_info is None and x.shape[0] < self.batch_info.num_tokens:
            return "it has fewer rows than the batch"
        return None

    def _plan(self, rows, pruned_batch_info):
        if pruned_batch_info is not None:  # lm_head's rows in a prefill, which are in no graph
            return BatchPlan(self._runner_for(pruned_batch_info).token_slots)
        batch = self.batch_info
        if rows not in batch.plans:
            batch.plans[rows] = batch.plan.first(rows)
        return batch.plans[rows]


def _bias(base):
    """What SGLang's LoRA layers add within `base_fn`."""
    from sglang.srt.distributed.utils import get_group_rank_size
    from sglang.srt.layers.linear import RowParallelLinear

    added_elsewhere = isinstance(base, RowParallelLinear) and get_group_rank_size(base.tp_group)[0] > 0
    return None if added_elsewhere or getattr(base, "skip_bias_add", False) else getattr(base, "bias", None)


def _reason(layer, a) -> str | None:
    """Why this layer's base layer never runs fused, if so; its adapters run on our kernels all the same."""
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod, get_bf16_gemm_backend
    from sglang.srt.lora.layers import ParallelLMHeadWithLoRA
    from sglang.srt.utils.common import use_intel_amx_backend

    base = layer.base_layer
    method, weight = base.quant_method, getattr(base, "weight", None)
    if not isinstance(layer, ParallelLMHeadWithLoRA):  # whose base_fn is F.linear
        if type(method) is not UnquantizedLinearMethod:
            return f"{type(method).__name__} has no kernel; the adapters alone run on ours"
        asked = get_bf16_gemm_backend()
        if asked.is_cutedsl() or asked.is_gemv() or use_intel_amx_backend(base):
            return "another GEMM than PyTorch's was asked for; the adapters alone run on ours"
    if is_batch_invariant_mode_enabled():
        return "SGLang's batch-invariant GEMM was asked for; the adapters alone run on ours"
    expected = [layer.lora_offsets[-1], a.shape[2]]
    if not isinstance(weight, Tensor) or list(weight.shape) != expected:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        return f"its weight is {got}, not {expected}; the adapters alone run on ours"
    if weight.dtype != a.dtype:
        return f"its weight is {weight.dtype}, LoRA {a.dtype}"
    return None
