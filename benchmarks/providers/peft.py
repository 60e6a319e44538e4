"""PEFT's modules as its users get them: with fp32 adapters, unless `autocast_adapter_dtype=False` keeps the layer's dtype."""

import torch
from torch import nn

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    from peft.tuners.lora import Linear  # noqa: F401

    return [
        Provider("PEFT", _linear, merge=_merge),
        Provider("PEFT, adapters as base", _linear_as_base),
        Provider("PEFT adapter_names", batched=adapter_names),
        Provider("PEFT, one adapter", batched=_one_adapter),
    ]


def dense(weight):
    base = nn.Linear(*weight.mT.shape, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def adapted(base, adapters, scaling, dropout=0.0):
    """PEFT's layer over `base`, with `{name: (a, b)}`, which it shares."""
    from peft import LoraConfig

    if type(base) is nn.Linear:
        from peft.tuners.lora import Linear
    else:
        from peft.tuners.lora.bnb import Linear4bit as Linear
    first, *others = adapters
    ranks = {name: len(a) for name, (a, _) in adapters.items()}
    config = LoraConfig(r=ranks[first], lora_alpha=1, lora_dropout=dropout)
    layer = Linear(base, first, config=config, r=ranks[first], lora_alpha=ranks[first] * scaling)
    for name in others:
        layer.update_layer(name, ranks[name], lora_alpha=ranks[name] * scaling, config=config)
    for name, (a, b) in adapters.items():
        layer.lora_A[name].weight, layer.lora_B[name].weight = nn.Parameter(a), nn.Parameter(b)
    return layer


def _linear(problem, tensors, dtype=torch.float32):
    lora = (tensors.lora_a.detach().to(dtype), tensors.lora_b.detach().to(dtype))
    layer = adapted(dense(tensors.weight), {"default": lora}, problem.scaling, problem.dropout)
    return layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def _linear_as_base(problem, tensors):
    if tensors.x.dtype == torch.float32:
        raise NotImplementedError("the base is fp32, as PEFT's adapters are by default")
    return _linear(problem, tensors, tensors.x.dtype)


def _merge(problem, tensors):
    lora = (tensors.lora_a.detach(), tensors.lora_b.detach())
    layer = adapted(dense(tensors.weight.clone()), {"default": lora}, problem.scaling)

    def step():
        layer.merge()
        layer.merged_adapters.clear()  # unmerging would be a second product: the next merge adds to the sum
        return layer.base_layer.weight

    return step


def _batched_layer(tensors, base=None):
    adapters = {
        f"adapter_{slot}": (tensors.a[slot, :rank], tensors.b[slot, :, :rank].contiguous())
        for slot, rank in enumerate(tensors.ranks.tolist())
    }
    layer = adapted(base or dense(tensors.weight), adapters, float(tensors.scalings[0])).eval()
    return layer, list(adapters)


def adapter_names(problem, tensors, base=None):
    layer, names = _batched_layer(tensors, base)
    layer.set_adapter(names)
    of_rows = [names[slot] for slot in tensors.slots.tolist()]
    return lambda x: layer(x, adapter_names=of_rows)


def _one_adapter(problem, tensors):
    if problem.distinct > 1:
        raise NotImplementedError("a batch has one adapter, unless it names one for each row")
    return _batched_layer(tensors)[0]
