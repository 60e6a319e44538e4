"""Hugging Face's `kernels`: a layer whose forward it gives to LoRA layers that are decorated for it.

    @use_kernel_forward_from_hub("LoRALinear")      # a LoRA layer of yours
    register_kernel_mapping({"LoRALinear": {"cuda": Installed("LoRALinear")}})
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

A layer here is what that package wants of one: a forward without a state, bound to modules of other classes. For a repository
in the hub's layout this file is the `layers`: its `__init__.py` says `from lora_kernels.integrations import hub as layers`.
"""

from typing import NamedTuple

from torch import Tensor, nn

from lora_kernels.integrations import checks, linears
from lora_kernels.integrations.checks import NotFused, fall_back
from lora_kernels.integrations.linears import Parts, check_plain, parameter


class LoRALinear(nn.Module):
    """For modules that compute `y = x Wᵀ + bias + scaling B(A(lora_dropout(x)))` and have these attributes:

    weight, bias      parameters `[N,K]`, frozen, and `[N]`; bias may be None, or not there
    lora_A, lora_B    parameters `[R,K]` and `[N,R]`, or each an `nn.Linear` without bias that holds one
    scaling           a number
    lora_dropout      `nn.Dropout` or `nn.Identity`; may not be there
    merged, disabled  where one is there and true, the module's own forward runs

    x is `[..., K]`. A call that cannot run fused runs the module's own forward too, with one warning for each reason;
    with LORA_KERNELS_STRICT=1 it raises RuntimeError instead.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        if not (getattr(self, "merged", False) or getattr(self, "disabled", False)):
            try:
                return linears.compute(_parts(self), x)
            except NotFused as reason:
                fall_back(f"{type(self).__name__}: {reason.args[0]}")
        return type(self).forward(self, x)


class Installed(NamedTuple):
    """What `register_kernel_mapping` takes as the repository of a layer in this file: no hub, nothing to fetch."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return {"LoRALinear": LoRALinear}[self.layer_name]


def _parts(module) -> Parts:
    return Parts(
        parameter("the layer", module, "weight"), parameter("the layer", module, "bias"),
        _matrix(module, "lora_A"), _matrix(module, "lora_B"), module.scaling,
        checks.dropout_p("lora_dropout", getattr(module, "lora_dropout", None)),
    )  # fmt: skip


def _matrix(module, name):
    layer = module._modules.get(name)
    if layer is None:
        return parameter("the layer", module, name)
    check_plain(name, layer)
    if layer.bias is not None:
        raise NotFused(f"{name} has a bias")
    return parameter(name, layer, "weight")
