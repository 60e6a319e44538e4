"""Ours: every strategy of every backend that has no reason against the device."""

from functools import partial

import torch
from torch import nn

from benchmarks.providers import OURS, Provider
from lora_kernels import (
    BatchPlan,
    LayerAdapters,
    LoRALinear,
    Projection,
    lora_linear,
    lora_linear_batched,
    lora_mlp,
    lora_projections,
    ops,
)
from lora_kernels.backends import BACKENDS, BATCHED_BACKENDS, triton
from lora_kernels.dispatch import Problem


def providers(device: torch.device) -> list[Provider]:
    operations = {}
    for operation, call, backends, distinct in (
        ("linear", linear, BACKENDS, 0),
        ("batched", _batched, BATCHED_BACKENDS, 8),
    ):
        for backend, strategy in strategies(backends, device, distinct):
            named = operations.setdefault((backend, strategy), {})
            named[operation] = partial(call, backend=backend, strategy=strategy)
            named["quantized" if call is linear else "quantized_batched"] = partial(_over_quantized, named[operation])
    found = [
        Provider(f"{OURS}: {backend} / {strategy}", **named, backend=backend, strategy=strategy)
        for (backend, strategy), named in operations.items()
    ]
    return [*found, Provider(f"{OURS}: LoRALinear", _module, merge=_merge)]


def strategies(backends: dict, device: torch.device, distinct: int = 0) -> list[tuple[str, str]]:
    """(backend, strategy) of what runs on `device`; on a GPU not plain PyTorch, which is there as chained cuBLAS."""
    goal = triton.target(device)
    problems = [
        Problem(m=256, n=4096, k=4096, r=16, dtype=dtype, lora_dtype=dtype, dropout=False, device=device.type,
                capability=goal.capability, num_sms=goal.num_sms, tma=goal.tma, distinct=distinct)
        for dtype in (torch.bfloat16, torch.float32)
    ]  # fmt: skip
    return [
        (name, strategy)
        for name, backend in backends.items()
        if not all(map(backend.reasons_unsupported, problems)) and not (name == "eager" and device.type == "cuda")
        for strategy in backend.STRATEGIES
    ]


def linear(problem, tensors, backend, strategy):
    call = partial(lora_linear, dropout_p=problem.dropout, backend=backend, strategy=strategy)
    lora = (tensors.lora_a, tensors.lora_b)
    return lambda x: call(x, tensors.weight, *lora, problem.scaling), lora


def _over_quantized(call, problem, tensors):
    return call(problem, tensors._replace(weight=tensors.quantized))


def _operator(problem, tensors):
    scaling, lora = torch.tensor(problem.scaling), (tensors.lora_a, tensors.lora_b)
    return lambda x: ops.lora_linear(x, tensors.weight, None, *lora, scaling, 0.0, None)[0], lora


def _batched(problem, tensors, backend, strategy):
    plan = BatchPlan(tensors.slots)
    ranks = tensors.ranks.tolist()  # packed, as a pool keeps them
    a = torch.cat([a[:rank] for a, rank in zip(tensors.a, ranks, strict=True)])
    b = torch.cat([b[:, :rank].mT for b, rank in zip(tensors.b, ranks, strict=True)])
    first_row = tensors.ranks.cumsum(0) - tensors.ranks
    adapters = LayerAdapters(a, b, tensors.ranks, tensors.scalings, first_row, max(ranks))
    return lambda x: lora_linear_batched(x, tensors.weight, adapters, plan, backend=backend, strategy=strategy)


def _module(problem, tensors):
    layer = _lora_linear(problem, tensors)
    return layer, (layer.lora_A.weight, layer.lora_B.weight)


def _lora_linear(problem, tensors):
    """The drop-in module as users get it: with fp32 adapters."""
    base = nn.Linear(problem.k, problem.n, bias=False, device="meta")
    base.weight = nn.Parameter(tensors.weight, requires_grad=False)
    layer = LoRALinear.from_linear(base, problem.r, problem.scaling * problem.r, problem.dropout)
    layer.lora_A.weight.data.copy_(tensors.lora_a)
    layer.lora_B.weight.data.copy_(tensors.lora_b)
    return layer


def _merge(problem, tensors):
    layer = _lora_linear(problem, tensors)

    def step():
        layer.merge()
        merged = layer.merged_weight
        layer.unmerge()
        return merged

    return step


def _block(problems, tensors):
    q, k, v, o, gate, up, down = (
        Projection(t.weight, t.lora_a, t.lora_b, problem.scaling) for problem, t in zip(problems, tensors, strict=True)
    )
    parameters = [p for t in tensors for p in (t.lora_a, t.lora_b)]
    return (
        lambda x: lora_projections(x, (q, k, v)),
        lambda x: lora_linear(x, *o[:4]),
        partial(lora_mlp, gate=gate, up=up, down=down),
        parameters,
    )


BLOCKS = Provider(f"{OURS}: blocks", partial(linear, backend=None, strategy=None), block=_block)
OPERATOR = Provider(f"{OURS}: registered operator", _operator)  # what torch.compile calls
