"""bitsandbytes' nf4 layers: under PEFT, and in the scheme of Unsloth and Axolotl, which dequantise anew in each pass."""

import functools

import torch

from benchmarks.providers import Provider, addmm, peft


def providers(device: torch.device) -> list[Provider]:
    import bitsandbytes  # noqa: F401

    return [
        Provider("bitsandbytes and PEFT", quantized=_linear),
        Provider("addmm scheme, bitsandbytes", quantized=_scheme),
        Provider("bitsandbytes and PEFT, adapter_names", quantized_batched=_adapter_names),
    ]


def _parameter(weight, dtype):
    """The weight as bitsandbytes has it; of other formats it has none."""
    if weight.name != "nf4":
        raise NotImplementedError(f"bitsandbytes' 4-bit layer is nf4, not {weight.name}")
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    from lora_kernels.formats.nf4 import CODE

    code = torch.tensor(CODE, device=weight.device)
    state = QuantState(weight.absmax, weight.shape, code, weight.blocksize, "nf4", dtype)
    return Params4bit(
        weight.packed.view(-1, 1), requires_grad=False, quant_state=state, quant_type="nf4", blocksize=weight.blocksize,
        compress_statistics=False, bnb_quantized=True,
    )  # fmt: skip


def _base(tensors):
    from bitsandbytes.nn import Linear4bit

    n, k = tensors.quantized.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=tensors.x.dtype, quant_type="nf4", device="meta")
    layer.weight = _parameter(tensors.quantized, tensors.x.dtype)
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state
    return layer


def _linear(problem, tensors):
    lora = tuple(t.detach().float() for t in (tensors.lora_a, tensors.lora_b))
    layer = peft.adapted(_base(tensors), {"default": lora}, problem.scaling, problem.dropout)
    return layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def _scheme(problem, tensors):
    from bitsandbytes.functional import dequantize_4bit

    parameter, lora = _parameter(tensors.quantized, tensors.x.dtype), (tensors.lora_a, tensors.lora_b)
    dense = functools.partial(dequantize_4bit, parameter.data, parameter.quant_state)
    return lambda x: addmm.Addmm.apply(x, dense, *lora, problem.scaling), lora


def _adapter_names(problem, tensors):
    return peft.adapter_names(problem, tensors, _base(tensors))
