"""How DTensor may shard `lora_linear` and its backward; imported at the first DTensor.

On each dimension of the mesh by M (data), by N (column), by K (row), or not at all; what comes otherwise is redistributed.
Never by R: y would be the sum of the devices' adapter terms, and of one base term. Everything is linear, so sums that are
not reduced yet (Partial) pass through: y and h of a row-sharded layer, with 1/P of its bias on each of P devices, and in the
backward pass dx, da and db; that of a row-sharded layer takes h as it was saved, such a sum, and gives db as one.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

WHOLE, SUM, FIRST, LAST = Replicate(), Partial(), Shard(0), Shard(1)


@register_sharding(torch.ops.lora_kernels.lora_linear.default)
def _forward(x, weight, bias, lora_a, lora_b, scaling, *_):
    rules = [  # y, h; x, weight, bias, lora_a, lora_b
        ([WHOLE, WHOLE], [WHOLE, WHOLE, WHOLE, WHOLE, WHOLE]),
        ([FIRST, FIRST], [FIRST, WHOLE, WHOLE, WHOLE, WHOLE]),
    ]
    if _for_every_device(weight, 0):
        rules.append(([LAST, WHOLE], [WHOLE, FIRST, FIRST, WHOLE, FIRST]))
    if _for_every_device(weight, 1):
        rules.append(([SUM, SUM], [LAST, LAST, SUM, LAST, WHOLE]))
    if bias is None:
        rules = [(results, [*arguments[:2], *arguments[3:]]) for results, arguments in rules]
    return [(results, [*arguments, WHOLE]) for results, arguments in rules]  # and scaling


@register_sharding(torch.ops.lora_kernels.lora_linear_backward.default)
def _backward(dy, x, h, weight, lora_a, lora_b, scaling, *_):
    rules = [  # dx, da, db; dy, x, h, weight, lora_a, lora_b
        ([WHOLE, WHOLE, WHOLE], [WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE]),
        ([FIRST, SUM, SUM], [FIRST, FIRST, FIRST, WHOLE, WHOLE, WHOLE]),
    ]
    if _for_every_device(weight, 0):
        rules.append(([SUM, SUM, FIRST], [LAST, WHOLE, WHOLE, FIRST, WHOLE, FIRST]))
    if _for_every_device(weight, 1):
        rules.append(([LAST, LAST, SUM], [WHOLE, LAST, SUM, LAST, LAST, WHOLE]))
    return [(results, [*arguments, WHOLE]) for results, arguments in rules]


def _for_every_device(weight, dim) -> bool:
    """Whether none is left without a part of that dimension."""
    size, devices = weight.shape[dim], weight.mesh.size()
    return (devices - 1) * -(-size // devices) < size
