"""vLLM: its LoRA layers as one operation with their base layers, reading the adapters where vLLM keeps them.

`register` is an entry point of the group `vllm.general_plugins`. Nothing happens until a worker makes its LoRA layers: then
each of vLLM's linear ones is made with `FusedLinear` before it, and its Punica wrapper with `Punica`. An adapter's slot,
its padded weights (B with the scaling in it) and who uses it in a step stay vLLM's; we add the rank of each slot, and one
`BatchPlan` for all layers. What cannot run fused runs as in vLLM, and is said once.
"""

import functools
import importlib.metadata

import torch
from torch import Tensor

from lora_kernels import BatchPlan, LayerAdapters, integrations
from lora_kernels.integrations.contract import unsupported

SERIES = "0.33"
LINEAR = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
PUNICA = "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
SIGNATURES = {
    f"{LINEAR}._apply_sync": "self x bias",
    f"{LINEAR}._apply_base_forward": "self x",
    f"{LINEAR}._apply_lora_to_output": "self x output",
    f"{LINEAR}.create_lora_weights": "self max_loras lora_config model_config",
    f"{LINEAR}.set_lora": "self index lora_a lora_b",
    f"{LINEAR}.reset_lora": "self index",
    f"{PUNICA}.__init__": "self max_num_batched_tokens max_batches device kwargs",
    f"{PUNICA}.update_metadata": "self mapping lora_index_to_id max_loras vocab_size kwargs",
    f"{PUNICA}.add_shrink": "self y x lora_a_stacked scale kwargs",
    f"{PUNICA}.add_lora_embedding": "self y x lora_b_stacked add_inputs kwargs",
    f"{PUNICA}.add_lora_linear": "self y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    f"{PUNICA}.add_lora_logits": "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply": "self layer x bias",
    "vllm.model_executor.layers.utils:default_unquantized_gemm": "layer x weight bias",
    "vllm.lora.utils:_all_lora_classes": None,
    "vllm.envs:environment_variables": None,
}
fall_back = torch.compiler.assume_constant_result(integrations.fall_back)  # said while tracing, not in the graph


def register() -> None:
    """Have the workers of this process's vLLM make fused LoRA layers. Does nothing without vLLM, or a second time.

    Another vLLM than the one this was written for goes on as it is, which is said once, or raised as RuntimeError with
    LORA_KERNELS_STRICT=1.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return
    if reason := unsupported("vllm", SERIES, {}):  # signatures wait for a worker that imports these modules anyway
        integrations.fall_back(reason)
        return
    from vllm.platforms import current_platform

    platform = type(current_platform)
    theirs = platform.get_punica_wrapper
    if getattr(theirs, "__func__", None) is not _get_punica_wrapper:
        platform._punica_wrapper_of_vllm = theirs
        platform.get_punica_wrapper = classmethod(_get_punica_wrapper)


def _get_punica_wrapper(platform) -> str:
    """vLLM asks for the name of its wrapper's class in each worker, just before it makes the layers."""
    return install(platform._punica_wrapper_of_vllm())


def install(qualname: str) -> str:
    """Put our layers into vLLM's list; returns the name of the wrapper's class that goes with them."""
    from vllm import envs
    from vllm.config import get_current_vllm_config_or_none
    from vllm.lora import utils
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = get_current_vllm_config_or_none()
    reason = unsupported("vllm", SERIES, SIGNATURES)
    if config is not None and config.model_config is not None and config.model_config.enable_sleep_mode:
        reason = reason or "vLLM's sleep mode gives away the memory in which our tables lie"
    if reason:
        integrations.fall_back(reason)
        return qualname
    utils._all_lora_classes = tuple(
        _with(FusedLinear, kind) if issubclass(kind, BaseLinearLayerWithLoRA) else kind
        for kind in utils._all_lora_classes
    )
    # A factor of its compile cache's key: a graph that was compiled without us must not be found with us.
    envs.environment_variables["LORA_KERNELS"] = lambda: importlib.metadata.version("lora-kernels")
    global FusedPunicaWrapper
    FusedPunicaWrapper = _with(Punica, resolve_obj_by_qualname(qualname))
    return f"{__name__}.FusedPunicaWrapper"


@functools.cache
def _with(ours, theirs):
    return theirs if issubclass(theirs, ours) else type(f"Fused{theirs.__name__}", (ours, theirs), {})


class Punica:
    """Before vLLM's wrapper of this platform: a plan of who uses which adapter, in tensors that last."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device, **kwargs):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        with torch.inference_mode(False):  # else they could be updated only there
            nobody = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32, device=device)
            self.token_plan, self.sample_plan = BatchPlan(nobody), BatchPlan(nobody)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.token_plan.update(self.token_lora_indices.int())
        self.sample_plan.update(self.sampler_indices.int())

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
    ):  # fmt: skip
        if scale == 1.0 and buffer is None and add_inputs and _fits(y, x, lora_a_stacked, lora_b_stacked):
            adapters = [_every_rank(*pair) for pair in zip(lora_a_stacked, lora_b_stacked, strict=True)]
            return add(y, x, _fields(adapters), self.token_plan)
        fall_back("vLLM's add_lora_linear: another dtype than x's, a scale or a buffer, or it overwrites")
        return super().add_lora_linear(
            y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, add_inputs=add_inputs, **kwargs
        )

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs):
        columns = y[..., : lora_b_stacked.shape[2]]  # the model may pad its vocabulary
        if scale == 1.0 and buffer is None and _fits(columns, x, (lora_a_stacked,), (lora_b_stacked,)):
            return add(columns, x, _fields([_every_rank(lora_a_stacked, lora_b_stacked)]), self.sample_plan)
        fall_back("vLLM's lm_head: the logits have another dtype than the hidden states, or fewer columns than B")
        return super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs):
        fall_back("vLLM's embedding: there is no operation for B alone")
        return super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        if self._fully_sharded:
            fall_back("vLLM's fully_sharded_loras: a collective lies between A and B")
        return super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)

    @functools.cached_property
    def _fully_sharded(self):
        return bool(getattr(getattr(self, "lora_config", None), "fully_sharded_loras", False))


class FusedLinear:
    """Before a class of vLLM's linear layers with LoRA: what it computes, in one operation where it can be."""

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._ranks = torch.zeros(max_loras, dtype=torch.int32, device=self.device)
        scalings = torch.ones(max_loras, device=self.device)  # B has it in it
        self._fields = _fields([
            LayerAdapters(a[:, 0], b[:, 0], self._ranks, scalings)
            for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)
        ])  # fmt: skip
        self._not_fused = self._reason()
        if self._not_fused is not None:
            fall_back(f"vLLM's {type(self.base_layer).__name__}: {self._not_fused}")

    def reset_lora(self, index):
        super().reset_lora(index)
        self._ranks[index] = 0

    def set_lora(self, index, lora_a, lora_b):
        super().set_lora(index, lora_a, lora_b)
        parts = lora_a if isinstance(lora_a, (list, tuple)) else [lora_a]
        self._ranks[index] = max((a.shape[0] for a in parts if a is not None), default=0)  # past it all is zero

    def _apply_sync(self, x, bias=None):
        return self._fused(x, bias) if self._can_fuse(x) else super()._apply_sync(x, bias)

    def _apply_base_forward(self, x):
        base = self.base_layer
        if not (self._plain_forward and self._can_fuse(x)):
            return super()._apply_base_forward(x)
        return self._fused(x, None if base.skip_bias_add else base.bias)

    def _apply_lora_to_output(self, x, output):
        if _fits(output, x, self.lora_a_stacked, self.lora_b_stacked):
            return add(output, x, self._fields, self.punica_wrapper.token_plan)
        return super()._apply_lora_to_output(x, output)

    def _fused(self, x, bias):
        weight, rows = self.base_layer.weight, x.flatten(0, -2)
        parts = plan_parts(self.punica_wrapper.token_plan, rows.shape[0])
        y = torch.ops.lora_kernels.lora_linear_batched(rows, weight, bias, *self._fields, *parts)
        return y.view(*x.shape[:-1], weight.shape[0])

    def _can_fuse(self, x):
        if self._not_fused is not None:
            return False
        if x.dtype == self.lora_a_stacked[0].dtype:
            return True
        fall_back(f"vLLM's {type(self.base_layer).__name__}: x is {x.dtype}, LoRA {self.lora_a_stacked[0].dtype}")
        return False

    @functools.cached_property
    def _plain_forward(self):
        """Whether the base layer's forward is its product and nothing else, where vLLM calls it whole."""
        from vllm.model_executor.layers.linear import ReplicatedLinear

        return type(self.base_layer).forward is ReplicatedLinear.forward

    def _reason(self) -> str | None:
        """Why this layer never runs fused, if so."""
        from vllm import envs
        from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
        from vllm.model_executor.layers.utils import default_unquantized_gemm

        base, method, weight = self.base_layer, self.base_layer.quant_method, getattr(self.base_layer, "weight", None)
        if self.lora_config.fully_sharded_loras and not isinstance(base, ReplicatedLinear):
            return "fully_sharded_loras: a collective lies between A and B"
        if self._enable_aux_cuda_stream:
            return "VLLM_LORA_ENABLE_DUAL_STREAM runs them on two streams"
        if type(method) is not UnquantizedLinearMethod:
            return f"{type(method).__name__} has no kernel; the adapters alone run on ours"
        if envs.VLLM_BATCH_INVARIANT or getattr(method, "_gemm_impl", None) is not default_unquantized_gemm:
            return "another GEMM than PyTorch's was asked for; the adapters alone run on ours"
        expected = [sum(self.output_slices), self.lora_a_stacked[0].shape[-1]]
        if not isinstance(weight, Tensor) or list(weight.shape) != expected:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            return f"its weight is {got}, not {expected}"
        if weight.dtype != self.lora_a_stacked[0].dtype:
            return f"its weight is {weight.dtype}, LoRA {self.lora_a_stacked[0].dtype}"
        return None


def add(y: Tensor, x: Tensor, fields, plan: BatchPlan) -> Tensor:
    """y plus each row's own adapters, in place."""
    rows = x.flatten(0, -2)
    torch.ops.lora_kernels.add_lora_batched(y.view(-1, y.shape[-1]), rows, *fields, *plan_parts(plan, rows.shape[0]))
    return y


def plan_parts(plan, rows):
    """`plan.first(rows).parts`, as torch.compile can trace it."""
    return [None if part is None else part[:rows] for part in plan.parts]


def _fields(adapters):
    return [list(column) for column in zip(*(one_slice.fields for one_slice in adapters), strict=True)]


def _fits(y, x, lora_a, lora_b) -> bool:
    return y.dtype == x.dtype == lora_a[0].dtype == lora_b[0].dtype and y.shape[-1] == sum(b.shape[2] for b in lora_b)


def _every_rank(a, b) -> LayerAdapters:
    """Views of `a [slots,1,R,K]` and `b [slots,1,N,R]`; R is every slot's rank, since past its own all is zero."""
    ranks = torch.full(a.shape[:1], a.shape[2], dtype=torch.int32, device=a.device)
    return LayerAdapters(a[:, 0], b[:, 0], ranks, torch.ones(a.shape[:1], device=a.device))
