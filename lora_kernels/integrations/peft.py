"""PEFT: its `lora.Linear` with another forward, and nothing else changed.

`y = base(x) + Σ scaling B(A(dropout(x)))`, summed over the active adapters, runs as one operation where its parts are what
they look like: plain modules without hooks, a frozen dense weight. Everything is read anew on each call, since users swap
weights, change scalings and set hooks whenever they like. What does not apply goes to PEFT's own forward, and is said.
"""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import BatchPlan, LayerAdapters, lora_linear, lora_linear_batched, sharding
from lora_kernels.integrations import Layer, checks
from lora_kernels.integrations.checks import MAX_RANK, NotFused, check_itself, fall_back, parameter

if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 18):
    raise ImportError(f"peft: got {peft.__version__}, expected 0.18 or newer")


class Fused:
    """The forward of a PEFT layer, before PEFT's own."""

    together = None  # the layers that read the same x and run as one: a Together of integrations/transformers.py

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not (self._disable_adapters or self.merged_adapters):
            try:
                y = None if self.together is None or args or kwargs else self.together.result(self, x)
                return self._fused(x, *args, **kwargs) if y is None else y
            except NotFused as reason:
                fall_back(f"lora.{self._get_name()}: {reason.args[0]}")
        return super().forward(x, *args, **kwargs)

    def _fused(self, x, *args, adapter_names=None, alora_offsets=None, **kwargs):
        if args or kwargs:
            raise NotFused("the base layer gets arguments besides x")
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if not self.active_names():
            return self._modules["base_layer"](x)
        base, *adapters = self.parts(self.active_names())
        if sharding.styled(base):
            return sharding.in_style(base, self._active, x)
        return sharding.inside((base, *adapters), x, self._active)

    def _active(self, x):
        weight, lora_a, lora_b, scaling, bias, dropout_p = self._operands(x)
        if dropout_p > 0.0 and sharding.is_dtensor(x):
            raise NotFused("dropout on DTensors")
        return as_theirs(lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=dropout_p), weight, x)

    def operands(self, x):
        """`(weight [N,K], lora_a [R,K], lora_b [N,R], scaling, bias, dropout_p)` of the active adapters, for x."""
        if sharding.is_dtensor(x) or any(map(_is_sharded, self.parts(self.active_names()))):
            raise NotFused("the weights are sharded")
        return self._operands(x)

    def _operands(self, x):
        weight, bias = self.weight_and_bias()
        names = self.active_names()
        lora_a, lora_b, scaling, dropout_p = combined([self.adapter(name) for name in names])
        if sharding.styled(self._modules["base_layer"]):
            if dropout_p > 0.0 or any(self.bias_of_b(name) is not None for name in names):
                raise NotFused("dropout or lora_bias with the tensor parallelism of transformers")
            lora_a, lora_b = sharding.placed_beside(x, lora_a), sharding.placed_beside(x, lora_b)
        checks.check_call(x, weight, lora_a, self.cast_input_dtype_enabled)
        for name in names:
            lora_bias = self.bias_of_b(name)
            if lora_bias is not None:
                term = (lora_bias * self.scaling[name]).to(weight.dtype)
                bias = term if bias is None else bias + term
        return weight, lora_a, lora_b, scaling, bias, dropout_p

    def _mixed(self, x, names):
        """A batch in which sample i uses the adapter `names[i]`, or none (`"__base__"`): inference."""
        self._check_forward_args(x, adapter_names=names)
        weight, bias = self.weight_and_bias()
        slots, plan = _batch(tuple(names), x.shape[1:-1].numel(), x.device)
        present = self._modules["lora_A"]._modules
        parts = self.parts(name for name in slots if name in present)
        if sharding.is_dtensor(x) or any(map(_is_sharded, parts)):
            raise NotFused("a mixed batch with sharded weights")
        adapters = {name: self.adapter(name) for name in slots if name in present}
        if not adapters:
            return self._modules["base_layer"](x)
        for name, (lora_a, lora_b, _, dropout_p) in adapters.items():
            checks.check_call(x, weight, lora_a, self.cast_input_dtype_enabled)
            if dropout_p > 0.0 or self.bias_of_b(name) is not None:
                raise NotFused("a mixed batch with dropout or lora_bias")
            if torch.is_grad_enabled() and (x.requires_grad or lora_a.requires_grad or lora_b.requires_grad):
                raise NotFused("a mixed batch with gradients; call it under torch.inference_mode()")
        if torch.compiler.is_compiling() or weight.dtype != x.dtype or checks.casts(x):
            raise NotFused("a mixed batch under torch.compile, or under autocast to another dtype")
        return lora_linear_batched(x, weight, _stacked(adapters, slots, x), plan, bias=bias)

    def active_names(self) -> list[str]:
        """The active adapters that this layer has."""
        active, present = self._active_adapter, self._modules["lora_A"]._modules
        return [name for name in ((active,) if isinstance(active, str) else active) if name in present]

    def parts(self, names) -> list[nn.Module]:
        """The modules that hold the weights of the layer and its adapters `names`."""
        parts = [("the base layer", self._modules["base_layer"])]
        parts += [(part, self._modules[part]._modules[name]) for name in names for part in ("lora_A", "lora_B")]
        for what, module in parts:
            check_itself(what, module)
        base = self._modules["base_layer"]
        if sharding.styled(base) and getattr(base, "_hf_tp_plan", None) not in ("colwise", "rowwise"):
            raise NotFused("the base layer's tp_plan is one for which PEFT has none")
        return [module for _, module in parts]

    def weight_and_bias(self):
        """The base layer's `weight [N,K]` and bias."""
        return weight_and_bias(self._modules["base_layer"])

    def adapter(self, name):
        """`(lora_a [R,K], lora_b [N,R], scaling, dropout_p)` of one adapter."""
        if name in self.lora_variant:
            raise NotFused(f"{type(self.lora_variant[name]).__name__} has no kernel")
        weights = []
        for part in ("lora_A", "lora_B"):
            module = sharding.unwrapped(self._modules[part]._modules[name])
            if sharding.kind(module) is not nn.Linear:
                raise NotFused(f"{part} is a {type(module).__name__}")
            weights.append(parameter(part, module, "weight"))
        checks.check_rank(weights[0])
        dropout = self._modules["lora_dropout"]._modules[name]
        return *weights, self.scaling[name], checks.dropout_p("lora_dropout", dropout)

    def bias_of_b(self, name):
        """What `lora_bias` adds to an adapter's B; its A has none."""
        return parameter("lora_B", sharding.unwrapped(self._modules["lora_B"]._modules[name]), "bias")

    def extra_repr(self) -> str:
        return "fused by lora_kernels"


class FusedLinear(Fused, Linear):
    """PEFT's `lora.Linear`, of which it is one in all but its forward."""

    def _get_name(self) -> str:
        return "Linear"  # PEFT reads the type of a layer off its repr


def _bitsandbytes():
    """What runs bitsandbytes' layers, where that is imported: without it there are none."""
    if sys.modules.get("bitsandbytes") is None:
        return None
    from lora_kernels.integrations import peft_bnb

    return peft_bnb


def _classes() -> dict[type, type]:
    """PEFT's classes, and ours."""
    quantised = _bitsandbytes()
    return {Linear: FusedLinear} | ({} if quantised is None else {quantised.bnb.Linear4bit: quantised.FusedLinear4bit})


def weight_and_bias(base):
    """`weight [N,K]` and bias of a layer without an adapter."""
    base, quantised = sharding.unwrapped(base), _bitsandbytes()
    kind = sharding.kind(base)
    if quantised is not None and kind in quantised.KINDS:
        return quantised.weight_and_bias(base)
    if kind is not nn.Linear and kind is not Conv1D:
        raise NotFused(f"the base layer is a {kind.__module__}.{kind.__name__}")
    weight, bias = parameter("the base layer", base, "weight"), parameter("the base layer", base, "bias")
    return weight if kind is nn.Linear else weight.mT, bias


def as_theirs(y, weight, x):
    """y in the dtype that the library returns: bitsandbytes' layers keep x's under autocast too."""
    return y if isinstance(weight, Tensor) else y.to(x.dtype)


def combined(adapters):
    """Several adapters as one: the sum of their terms is one term of their ranks' sum."""
    _check_sum(adapters)
    if len(adapters) == 1 and _is_constant(adapters[0][2]):
        return adapters[0]
    # What lora_linear's scaling cannot be (negative, trained, another one for each adapter) can be a part of A.
    dtype = torch.promote_types(adapters[0][0].dtype, torch.float32)
    lora_a = torch.cat([lora_a.to(dtype) * scaling for lora_a, _, scaling, _ in adapters])
    lora_b = torch.cat([lora_b.to(dtype) for _, lora_b, _, _ in adapters], 1)
    return lora_a, lora_b, 1.0, adapters[0][3]


def _check_sum(adapters):
    if len(adapters) > 1 and any(dropout_p > 0.0 for *_, dropout_p in adapters):
        raise NotFused("several active adapters with dropout: each has random numbers of its own")
    if sum(lora_a.shape[0] for lora_a, *_ in adapters) > MAX_RANK:
        raise NotFused(f"the ranks of the active adapters add up to more than {MAX_RANK}")


def _is_constant(scaling) -> bool:
    """Whether lora_linear takes it as it is."""
    if not isinstance(scaling, Tensor):
        return 0.0 <= scaling < math.inf
    if scaling.requires_grad or scaling.dim() or not scaling.is_floating_point():
        return False
    return scaling.device.type != "cpu" or torch.compiler.is_compiling() or 0.0 <= float(scaling) < math.inf


def _stacked(adapters, slots, like) -> LayerAdapters:
    """The adapters (by name) packed anew, each in its slot, on the device and in the dtype of `like`."""
    ranks = [adapters[name][0].shape[0] if name in adapters else 0 for name in slots]
    scalings = [adapters[name][2] if name in adapters else 0.0 for name in slots]
    if any(isinstance(scaling, Tensor) for scaling in scalings):
        scalings = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=like.device) for s in scalings])
    else:
        scalings = _tensor(tuple(scalings), torch.float32, like.device)
    return LayerAdapters(
        torch.cat([lora_a for lora_a, *_ in adapters.values()]).to(like.dtype),
        torch.cat([lora_b.mT for _, lora_b, *_ in adapters.values()]).to(like.dtype),
        _tensor(tuple(ranks), torch.int32, like.device),
        scalings,
        _tensor(tuple(itertools.accumulate(ranks[:-1], initial=0)), torch.int64, like.device),
        max(ranks),
    )


@functools.lru_cache(maxsize=256)
def _tensor(values, dtype, device):
    """A constant: the same values are on the device once, whatever layer or step they come from."""
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _batch(names: tuple[str, ...], rows_each: int, device) -> tuple[dict[str, int], BatchPlan]:
    """The slot of each adapter named, and the plan of a batch of `rows_each` rows a sample: all layers share them."""
    slots = {name: slot for slot, name in enumerate(dict.fromkeys(name for name in names if name != "__base__"))}
    rows = torch.tensor([slots.get(name, -1) for name in names], dtype=torch.int32).repeat_interleave(rows_each)
    return slots, BatchPlan(rows.to(device))


def _is_sharded(module):
    return sharding.gathered(module) or sharding.styled(module)


def fuse(model: nn.Module) -> Iterator[Layer]:
    """Swap the class of every linear layer of `model`, adapters added later included; yields what became of each layer."""
    _follow_injections()
    _swap(model, _classes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            theirs = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("peft.tuners."))
            yield Layer(name, f"{theirs.__module__.split('.')[2]}.{theirs.__name__}", reason_not_fused(module))


def unfuse(model: nn.Module) -> None:
    """Give every layer of `model` PEFT's own class back."""
    _swap(model, {ours: theirs for theirs, ours in _classes().items()})


def _swap(model, classes):
    for module in model.modules():
        if new := classes.get(type(module)):
            module.__class__ = new


def reason_not_fused(module) -> str | None:
    """Why `module` cannot run fused with its active adapters, or with all of them if none is."""
    if not isinstance(module, Fused):
        if sharding.kind(module) is not type(module):
            return "call us before fully_shard"
        quantised = _bitsandbytes()
        int8 = quantised is not None and isinstance(module, quantised.bnb.Linear8bitLt)
        return quantised.QUANTISES_X if int8 else "no kernel for this class"
    own_forward = module.__dict__.get("_old_forward") or module.__dict__.get("forward")  # accelerate keeps the old one
    if own_forward is not None and getattr(own_forward, "__func__", None) is not Fused.forward:
        return "it has a forward of its own"
    try:
        names = module.active_names() or list(module.lora_A)
        module.parts(names)
        weight, _ = module.weight_and_bias()
        _check_sum([module.adapter(name) for name in names])
    except NotFused as reason:
        return reason.args[0]
    return "the base weight trains" if weight.requires_grad else None


_inject_adapter = BaseTuner.inject_adapter
_everywhere = False


@functools.wraps(_inject_adapter)
def _inject_and_fuse(self, model, *args, **kwargs):
    # The one way by which adapters get into a model: new ones, loaded ones, and those added to other layers later.
    fused = _everywhere or any(isinstance(module, Fused) for module in model.modules())
    _inject_adapter(self, model, *args, **kwargs)
    if fused:
        _swap(model, _classes())


def _follow_injections():
    BaseTuner.inject_adapter = _inject_and_fuse


def patch() -> contextlib.ExitStack:
    """See `lora_kernels.patch_peft`."""
    global _everywhere
    at_exit = contextlib.ExitStack()
    if not _everywhere:
        at_exit.callback(unpatch)
    _everywhere = True
    _follow_injections()
    return at_exit


def unpatch() -> None:
    """See `lora_kernels.unpatch_peft`."""
    global _everywhere
    _everywhere = False
