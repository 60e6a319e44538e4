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
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lora_kernels import BatchPlan, LayerAdapters, integrations, lora_linear, lora_linear_batched, sharding
from lora_kernels.integrations import Layer

if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 18):
    raise ImportError(f"peft: got {peft.__version__}, expected 0.18 or newer")

MAX_RANK = 512
fall_back = torch.compiler.assume_constant_result(integrations.fall_back)  # said while tracing, not in the graph


class NotFused(Exception):
    """Why a call runs PEFT's own forward."""


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
        y = lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=dropout_p)
        return y if isinstance(weight, Tensor) else y.to(x.dtype)  # bitsandbytes returns that under autocast too

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
        check_call(self, x, weight, lora_a)
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
            check_call(self, x, weight, lora_a)
            if dropout_p > 0.0 or self.bias_of_b(name) is not None:
                raise NotFused("a mixed batch with dropout or lora_bias")
            if torch.is_grad_enabled() and (x.requires_grad or lora_a.requires_grad or lora_b.requires_grad):
                raise NotFused("a mixed batch with gradients; call it under torch.inference_mode()")
        if torch.compiler.is_compiling() or weight.dtype != x.dtype or casts(x):
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
            _check_itself(what, module)
        base = self._modules["base_layer"]
        if sharding.styled(base) and getattr(base, "_hf_tp_plan", None) not in ("colwise", "rowwise"):
            raise NotFused("the base layer's tp_plan is one for which PEFT has none")
        return [module for _, module in parts]

    def weight_and_bias(self):
        """The base layer's `weight [N,K]` and bias."""
        base, quantised = sharding.unwrapped(self._modules["base_layer"]), _bitsandbytes()
        kind = sharding.kind(base)
        if quantised is not None and kind in quantised.KINDS:
            return quantised.weight_and_bias(base)
        if kind is not nn.Linear and kind is not Conv1D:
            raise NotFused(f"the base layer is a {kind.__module__}.{kind.__name__}")
        weight, bias = _parameter("the base layer", base, "weight"), _parameter("the base layer", base, "bias")
        return weight if kind is nn.Linear else weight.mT, bias

    def adapter(self, name):
        """`(lora_a [R,K], lora_b [N,R], scaling, dropout_p)` of one adapter."""
        if name in self.lora_variant:
            raise NotFused(f"{type(self.lora_variant[name]).__name__} has no kernel")
        weights = []
        for part in ("lora_A", "lora_B"):
            module = sharding.unwrapped(self._modules[part]._modules[name])
            if sharding.kind(module) is not nn.Linear:
                raise NotFused(f"{part} is a {type(module).__name__}")
            weights.append(_parameter(part, module, "weight"))
        if weights[0].shape[0] > MAX_RANK:
            raise NotFused(f"the rank is {weights[0].shape[0]}, more than {MAX_RANK}")
        dropout, dropout_p = self._modules["lora_dropout"]._modules[name], 0.0
        _check_itself("lora_dropout", dropout)
        if type(dropout) is nn.Dropout and 0.0 <= dropout.p < 1.0:
            dropout_p = dropout.p if dropout.training else 0.0
        elif type(dropout) is not nn.Identity:
            raise NotFused(f"lora_dropout is {dropout}")
        return *weights, self.scaling[name], dropout_p

    def bias_of_b(self, name):
        """What `lora_bias` adds to an adapter's B; its A has none."""
        return _parameter("lora_B", sharding.unwrapped(self._modules["lora_B"]._modules[name]), "bias")

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


def check_hooks(what, module):
    d = module.__dict__
    if (
        d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]
        or "forward" in d
    ):  # fmt: skip
        raise NotFused(f"{what} has a hook, or a forward of its own")


def _check_itself(what, module):
    """`check_hooks`, but for those of an engine."""
    if not sharding.is_itself(module):
        raise NotFused(f"{what} has a hook, or a forward of its own")


def _is_sharded(module):
    return sharding.gathered(module) or sharding.styled(module)


def _parameter(what, module, name):
    parameter = module._parameters.get(name, module.__dict__.get(name))  # where FSDP1 has its views
    plain = type(parameter) in (nn.Parameter, Tensor) or sharding.is_dtensor(parameter)
    if not plain and not (parameter is None and name == "bias"):
        kind = "parametrised" if parameter is None else f"a {type(parameter).__name__}"
        raise NotFused(f"the {name} of {what} is {kind}, not a plain tensor")
    return parameter


def check_call(layer, x, weight, lora_a):
    """Whether this x can run fused, here and now."""
    if type(x) not in (Tensor, nn.Parameter) and not sharding.is_dtensor(x):
        raise NotFused(f"x is a {type(x).__name__}")
    if not sharding.is_dtensor(x) is sharding.is_dtensor(weight) is sharding.is_dtensor(lora_a):
        raise NotFused("x, the base weight and the adapter are not all DTensors")
    if x.is_nested or x.is_meta or x.layout is not torch.strided:
        raise NotFused("x is nested, sparse or on the meta device")
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotFused("the base weight trains")
    fits = lora_a.dtype is x.dtype or (lora_a.dtype is torch.float32 and layer.cast_input_dtype_enabled)
    if not isinstance(weight, Tensor) and _autocasts(x) and torch.get_autocast_dtype(x.device.type) is not weight.dtype:
        raise NotFused(f"bitsandbytes computes in {weight.dtype}, autocast in another dtype")
    if not (fits and weight.dtype is x.dtype) and not _autocasts(x):
        raise NotFused(f"x is {x.dtype}, the base weight {weight.dtype}, the adapter {lora_a.dtype}")
    if torch.compiler.is_compiling():
        return
    if _has_any_global_hook():
        raise NotFused("there are global module hooks")
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        raise NotFused("torch.jit.trace, torch.func or forward-mode AD look inside")


def _autocasts(x) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64


def casts(x) -> bool:
    """Whether autocast would give the result another dtype than x's."""
    return _autocasts(x) and torch.get_autocast_dtype(x.device.type) is not x.dtype


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
