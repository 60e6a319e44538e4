"""PEFT over bitsandbytes: nf4 layers run fused where that computes what bitsandbytes does; int8 layers quantise x too."""

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4
from peft.tuners.lora import bnb
from torch.utils.weak import WeakIdKeyDictionary

from lora_kernels import formats
from lora_kernels.integrations.checks import NotFused, check_hooks
from lora_kernels.integrations.peft import Fused

KINDS = (Linear4bit, LinearNF4, Linear8bitLt)
QUANTISES_X = "bitsandbytes' Linear8bitLt quantises x too"


class FusedLinear4bit(Fused, bnb.Linear4bit):
    """PEFT's `lora.bnb.Linear4bit`, of which it is one in all but its forward."""

    def _get_name(self) -> str:
        return "Linear4bit"


def weight_and_bias(base):
    """The base layer's `NF4Weight`, whose dtype is the one that bitsandbytes computes in, and the bias in that."""
    if type(base) is Linear8bitLt:
        raise NotFused(QUANTISES_X)
    if torch.compiler.is_compiling():
        raise NotFused("bitsandbytes' layers under torch.compile")
    check_hooks("the base layer", base)
    dtype, state = base.compute_dtype, base.weight.quant_state
    if dtype is None or state is None:
        raise NotFused("bitsandbytes has not quantised the weight, or chosen its compute_dtype")
    if getattr(state, "packing_format_for_cpu", False):
        raise NotFused("bitsandbytes has repacked the weight for its own CPU kernel")
    if state.quant_type != "nf4":
        raise NotFused(f"the weight is in {state.quant_type}")
    if state.dtype not in (torch.float32, dtype):  # which its backward pass rounds to first
        raise NotFused(f"the weight was {state.dtype}, and bitsandbytes computes in {dtype}")
    bias = base.bias
    return _converted(base.weight, dtype), bias if bias is None or bias.dtype == dtype else bias.to(dtype)


_weights = WeakIdKeyDictionary()


def _converted(parameter, dtype):
    """Once for each weight: the codes are compared with a table on the host. A merged or moved one is another tensor."""
    key = (parameter.data_ptr(), parameter.quant_state, dtype)
    known, weight = _weights.get(parameter, (None, None))
    if known is None or not (known[0] == key[0] and known[1] is key[1] and known[2] is dtype):
        try:
            weight = formats.NF4Weight.from_bitsandbytes(parameter)
        except ValueError as reason:  # a block size, say, that bitsandbytes has and the format has not
            raise NotFused(str(reason)) from None
        weight.dtype = dtype
        _weights[parameter] = key, weight
    return weight
