"""LoRALinear, and how it gets into a model: names and semantics are PEFT's."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import formats, functional, sharding
from lora_kernels.formats import QuantizedWeight


class MergeError(NamedTuple):
    """How far a requantised merged weight is from `weight + scaling B A`, as an RMS.

    relative_to_weight  over the RMS of the exact merged weight
    relative_to_update  over the RMS of `scaling B A`: at 1 and above the adapter drowns in it; Inf or NaN where that is 0
    """

    relative_to_weight: float
    relative_to_update: float


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its LoRA update in one operation: `y = x Wᵀ + bias + scaling (drop(x) Aᵀ) Bᵀ`.

    weight, bias    `[out_features, in_features]` and `[out_features]`, frozen; `bias.requires_grad_()` trains the bias;
                    weight may be a `QuantizedWeight` (lora_kernels/formats), which x's dtype need not agree with
    lora_A, lora_B  `nn.Linear` without bias: weights `[r, in_features]` (Kaiming-uniform), `[out_features, r]` (zero)
    lora_alpha      `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`
    lora_dropout    in [0, 1), on the adapter's input, in training mode only
    lora_dtype      of lora_A and lora_B; None is the weight's dtype, or fp32 for a 16-bit weight: at 16 bits most
                    optimiser steps are smaller than half an ulp of what they should change, and are lost

    x is `[..., in_features]` in the weight's dtype. The state dict holds `weight`, `bias`, `lora_A.weight` and
    `lora_B.weight`, merged or not.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

    >>> layer = LoRALinear(64, 32, r=8, lora_alpha=16)
    >>> layer(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        lora_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adopt(base, r, lora_alpha, lora_dropout, use_rslora, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        quantize: str | Callable[[Tensor], QuantizedWeight] | None = None,
    ) -> "LoRALinear":
        """The layer over `linear`'s own parameters: shared, not copied, and frozen from now on.

        linear    an `nn.Linear`, or a layer quantised by bitsandbytes, torchao or transformers that a format can hold
        quantize  None keeps the weight; "nf4", or another format's name, or a function such as
                  `functools.partial(NF4Weight.quantize, double_quant=True)` quantises that of a plain `nn.Linear`

        Raises TypeError or ValueError for another layer, or one that is quantised already where `quantize` is given.

        >>> layer = LoRALinear.from_linear(nn.Linear(64, 32), r=8, quantize="nf4")
        >>> layer.weight.nbytes, layer(torch.randn(2, 64)).shape
        (1152, torch.Size([2, 32]))
        """
        quantized = formats.from_linear(linear) if isinstance(linear, nn.Module) else None
        if quantized is None:
            check_linear("linear", linear)
        if quantize is not None:
            if quantized is not None:
                raise ValueError(
                    f"quantize: got {quantize!r}, expected None, since linear is in {quantized.name} already"
                )
            make = quantize if callable(quantize) else formats.named(quantize).quantize
            quantized = make(linear.weight)
            if not isinstance(quantized, QuantizedWeight) or quantized.shape != linear.weight.shape:
                got = f"{type(quantized).__name__} {list(getattr(quantized, 'shape', ()))}"
                raise TypeError(f"quantize: got {got} of it, expected a QuantizedWeight {list(linear.weight.shape)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, quantized)
        return layer.train(linear.training)

    def _adopt(self, linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, quantized=None):
        check_adapter(r, lora_alpha, lora_dropout)
        self.in_features, self.out_features, self.r = linear.in_features, linear.out_features, r
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        self.weight = linear.weight if quantized is None else quantized
        self.register_parameter("bias", linear.bias)
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        weight = self.weight
        where = {"device": weight.device, "dtype": lora_dtype or torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **where)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("merged_weight", None, persistent=False)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            linear = nn.functional.linear if isinstance(self.merged_weight, Tensor) else functional.quantized_linear
            return linear(x, self.merged_weight, self.bias)
        return sharding.inside((self.lora_A, self.lora_B), x, self._fused)

    def _fused(self, x):
        return functional.lora_linear(
            x,
            self.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            bias=self.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def merge(self) -> MergeError | None:
        """Run the plain base layer on `weight + scaling B A`, computed in fp32 (or better) and rounded once.

        A quantised weight is dequantised, added to and quantised again in the same format, which loses much more than a
        rounding; what it loses is returned. None for a dense weight.

        `weight` itself stays as it is, so that unmerging is exact and a tied weight is not changed elsewhere; this
        costs the memory of one more weight while merged. A merged adapter gets no gradients.
        Raises RuntimeError if merged already, ValueError if the sum is not finite or lora_A or lora_B alias `weight`.
        """
        if self.merged:
            raise RuntimeError("merge: the adapter is merged already; call unmerge() first to merge its present values")
        if isinstance(self.weight, QuantizedWeight):
            return self._merge_quantized()
        storage = self.weight.untyped_storage().data_ptr()
        for name, parameter in (("lora_A", self.lora_A.weight), ("lora_B", self.lora_B.weight)):
            if parameter.untyped_storage().data_ptr() == storage:
                raise ValueError(f"merge: {name}.weight shares its storage with weight; give {name} its own tensor")
        compute = torch.promote_types(self.weight.dtype, torch.float32)
        weight, a, b = (tensor.to(compute) for tensor in (self.weight, self.lora_A.weight, self.lora_B.weight))
        merged = torch.addmm(weight, b, a, alpha=self.scaling).to(self.weight.dtype)
        _check_finite(merged)
        self.merged_weight = merged
        return None

    def _merge_quantized(self):
        update = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        exact = self.weight.dequantize(torch.float32).add_(update)
        _check_finite(exact)
        merged = self.weight.requantize(exact)
        for name, tensor in merged.named_buffers():
            merged.register_buffer(name, tensor, persistent=False)  # the state dict holds the weight it came from
        lost = _rms(merged.dequantize(torch.float32).sub_(exact))
        self.merged_weight = merged
        return MergeError(float(lost / _rms(exact)), float(lost / _rms(update)))

    def unmerge(self) -> None:
        """Run base and adapter again, on the very bits from before `merge`. Raises RuntimeError if not merged."""
        if not self.merged:
            raise RuntimeError("unmerge: the adapter is not merged; call merge() first")
        self.merged_weight = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, merged={self.merged}"
        )


class TrainableParameters(NamedTuple):
    """What an optimiser gets (`parameters`), and how much of the model that is."""

    parameters: list[nn.Parameter]
    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.count:,} of {self.total:,} parameters train ({self.share:.2%})"

    __repr__ = __str__


def apply_lora(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    lora_dtype: torch.dtype | None = None,
    quantize: str | Callable[[Tensor], QuantizedWeight] | None = None,
) -> nn.Module:
    """Replace the targeted `nn.Linear` of `model` by `LoRALinear`, in place, and freeze everything but the adapters.

    target_modules  a list of names, each matching the module of that name and those ending in `.name`; a str is a
                    regular expression for the whole name; "all-linear" is every `nn.Linear` but the output head
                    (`model.get_output_embeddings()`, where there is such a method)
    quantize        as in `LoRALinear.from_linear`: "nf4" makes it QLoRA

    Returns `model`. Adapters that were there before keep training. Raises, before anything is changed, ValueError if a
    name matches nothing or a layer has an adapter already, TypeError if what matches is not a plain `nn.Linear`.

    >>> model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), ["0"], r=2)
    >>> print(trainable_parameters(model))
    32 of 122 parameters train (26.23%)
    """
    check_adapter(r, lora_alpha, lora_dropout)
    settings = (r, lora_alpha, lora_dropout, use_rslora, lora_dtype, quantize)
    replace_linears(
        model, {linear: LoRALinear.from_linear(linear, *settings) for linear in _find_targets(model, target_modules)}
    )
    freeze_base(model)
    return model


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """The parameters of `model` that require grad, their count and the model's; tied ones count once.

    >>> layer = LoRALinear(64, 64, r=8)
    >>> optimizer = torch.optim.AdamW(trainable_parameters(layer).parameters, lr=1e-3)
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(module.shape.numel() for module in model.modules() if isinstance(module, QuantizedWeight))
    return TrainableParameters(parameters, sum(parameter.numel() for parameter in parameters), total)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model` by name; one held under two names appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def linears_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of `model`, quantised ones and LoRALinear too, under all their names; not the adapters' own."""
    return {
        name: module for name, module in _modules(model).items() if isinstance(module, LoRALinear) or is_linear(module)
    }


def weight_of(linear: nn.Module) -> Tensor | QuantizedWeight:
    """The weight of one of `linears_by_name`; of another library's quantised layer converted, the codes shared."""
    return linear.weight if isinstance(linear, LoRALinear) else formats.from_linear(linear) or linear.weight


def replace_linears(model: nn.Module, replacements: dict[nn.Linear, LoRALinear]) -> None:
    """Put each `LoRALinear` wherever `model` holds its `nn.Linear`."""
    for name, module in _modules(model).items():
        if module in replacements:
            model.set_submodule(name, replacements[module])


def freeze_base(model: nn.Module) -> None:
    """Freeze all of `model` but its adapters."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def name_matches(name: str, targets: Iterable[str]) -> bool:
    """Whether one of `targets` is `name`, or its end after a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def check_adapter(r, lora_alpha, lora_dropout) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: got {type(r).__name__}, expected an int from 1 to {functional.MAX_RANK}")
    if not 1 <= r <= functional.MAX_RANK:
        raise ValueError(f"r: got {r}, expected an int from 1 to {functional.MAX_RANK}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (math.isfinite(lora_alpha) and lora_alpha >= 0):
        raise ValueError(f"lora_alpha: got {lora_alpha}, expected a finite number >= 0")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: got {lora_dropout}, expected a number in [0, 1)")


def _check_finite(merged):
    if not merged.isfinite().all():
        raise ValueError(
            f"merge: weight + scaling B A holds NaN or Inf in {merged.dtype}; nothing was changed. "
            "Look for them in weight, lora_A.weight and lora_B.weight"
        )


def _rms(t):
    return t.square().mean().sqrt()


def check_linear(name: str, module) -> None:
    """Raise TypeError where `module` is no plain `nn.Linear` and no layer that a format can hold."""
    if not is_linear(module):
        raise TypeError(
            f"{name}: got {type(module).__name__}, expected an nn.Linear (not a subclass), or a quantised layer in one of "
            f"{', '.join(formats.FORMATS)}"
        )


def is_linear(module) -> bool:
    # Another subclass has its own forward or weight: say, one whose owner reads the weight directly.
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and formats.from_linear(module) is not None)


def _modules(model) -> dict[str, nn.Module]:
    """All modules under all their names, without the model itself and the adapters' own lora_A and lora_B."""
    own = {part for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B)}
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if name and module not in own}


def _find_targets(model, target_modules) -> list[nn.Linear]:
    modules = _modules(model)
    if target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {name for name, module in modules.items() if module is not head and is_linear(module)}
        missing = [] if found else ["all-linear"]
    elif isinstance(target_modules, str):
        found = {name for name in modules if re.fullmatch(target_modules, name)}
        missing = [] if found else [target_modules]
    else:
        target_modules = list(target_modules)
        found = {name for name in modules if name_matches(name, target_modules)}
        missing = [target for target in target_modules if not any(name_matches(name, [target]) for name in found)]
        if not target_modules:
            raise ValueError("target_modules: got an empty list, expected names of nn.Linear layers")

    if missing:
        raise ValueError(f"target_modules: {missing} match no layer of the model; {_suggest(missing, modules)}")
    for name in sorted(found):
        if isinstance(modules[name], LoRALinear):
            raise ValueError(f"target_modules: {name} has an adapter already, expected a plain nn.Linear")
        check_linear(f"target_modules: {name}", modules[name])
    return list(dict.fromkeys(modules[name] for name in modules if name in found))


def _suggest(missing, modules) -> str:
    linears = [name for name, module in modules.items() if type(module) is nn.Linear]
    known = dict.fromkeys([name.rpartition(".")[2] for name in linears] + linears)
    close = [match for name in missing for match in difflib.get_close_matches(name, known, n=3)]
    if close:
        return f"did you mean {', '.join(dict.fromkeys(close))}?"
    if known:
        return f"its nn.Linear layers are called {', '.join(list(known)[:8])}"
    return "it holds no nn.Linear (for a single layer use LoRALinear.from_linear)"
