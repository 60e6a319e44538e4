"""A Llama-style block, forward and backward, with an adapter on each of its seven linear layers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.problems import BOTH, FORWARD, Linear, LinearTensors
from benchmarks.providers import Provider, ours
from benchmarks.runner import Suite
from lora_kernels import testing

HEAD = 128


class BlockTensors(NamedTuple):
    """The block's x and dy, and the tensors of each linear layer, whose own x and dy are empty."""

    x: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor
    linears: tuple


@dataclass(frozen=True)
class Block:
    """`m` tokens of one sequence; `n` wide in the MLP, `k` in the model, `kv` in keys and values."""

    m: int
    n: int
    k: int
    kv: int
    r: int = 16
    dtype: str = "bfloat16"
    sets: int = 1

    operation, passes = "linear", (FORWARD, BOTH)
    case = None

    def __str__(self):
        return f"{self.m} tokens, hidden {self.k}, MLP {self.n}, kv {self.kv}, r {self.r}, {self.dtype}"

    @property
    def linears(self) -> list[Linear]:
        """q, k, v, o, gate, up, down."""
        sizes = ((self.k, self.k), (self.kv, self.k), (self.kv, self.k), (self.k, self.k), (self.n, self.k),
                 (self.n, self.k), (self.k, self.n))  # fmt: skip
        return [Linear(self.m, n, k, self.r, self.dtype) for n, k in sizes]

    def tensors(self, device: torch.device, seed: int = 0) -> BlockTensors:
        linears = []
        for i, problem in enumerate(self.linears):
            _, *own, _ = problem.tensors(device, 7 * seed + i)
            x = torch.empty(0, dtype=own[0].dtype, device=device)
            linears.append(LinearTensors(x, *own, x))
        x = torch.randn(self.m, self.k, device=device).to(linears[0].weight.dtype)
        return BlockTensors(x.requires_grad_(), linears[0].weight, torch.randn_like(x), tuple(linears))

    def cost(self, what: str, base: bool) -> tuple[int, int]:
        """Of the linear layers and the attention's two products; what else a block does is not counted."""
        moved, flops = map(sum, zip(*(linear.cost(what, base) for linear in self.linears), strict=True))
        return moved, flops + (6 if what == BOTH else 2) * self.m * self.m * self.k

    def step(self, provider, tensors: BlockTensors, what: str):
        """The function that is timed."""
        *layers, parameters = (provider.block or partial(_of_linears, provider))(self.linears, tensors.linears)
        angles = torch.outer(torch.arange(self.m), 1e4 ** (-torch.arange(0, HEAD, 2) / HEAD)).to(tensors.x.device)
        rotation = angles.cos().to(tensors.x.dtype), angles.sin().to(tensors.x.dtype)
        if what == FORWARD:
            return lambda: _block(tensors.x, layers, rotation)
        return lambda: torch.autograd.grad(_block(tensors.x, layers, rotation), (tensors.x, *parameters), tensors.dy)

    def judge(self, provider, device: torch.device) -> float:
        """The worst of its linear layers; with blocks of its own, of y, dx and all other gradients of a smaller one."""
        if provider.block is None:
            return max(linear.judge(provider, device) for linear in dict.fromkeys(self.linears))
        small = replace(self, m=64, n=384, k=256, kv=HEAD)
        tensors = small.tensors(device)
        double = BlockTensors(*(_to_double(t) for t in tensors[:3]), tuple(map(_to_double, tensors.linears)))
        runs = (provider, tensors), (Provider("", _eager), tensors), (Provider("", _eager), double)
        results = [(small.step(*each, FORWARD)().detach(), *small.step(*each, BOTH)()) for each in runs]
        floor = 4 * torch.finfo(tensors.x.dtype).eps + 64 * torch.finfo(torch.float32).eps
        worst = 0.0
        for actual, eager, truth in zip(*results, strict=True):
            error, yardstick = (testing.errors(t, truth, torch.zeros_like(truth))["rms"][0] for t in (actual, eager))
            worst = max(worst, error / testing.Budget(yardstick, 2.0, floor).limit)
        return worst


def _to_double(t):
    if isinstance(t, torch.Tensor):
        return t.detach().double().requires_grad_(t.requires_grad)
    return t._replace(**{name: _to_double(value) for name, value in t._asdict().items() if value is not None})


def _eager(problem, tensors):
    lora = (tensors.lora_a, tensors.lora_b)
    return lambda x: x @ tensors.weight.mT + problem.scaling * ((x @ lora[0].mT) @ lora[1].mT), lora


def _of_linears(provider, linears, tensors):
    """The parts of a block from its linear layers, one by one."""
    built = [provider.linear(*both) for both in zip(linears, tensors, strict=True)]
    *qkv, o, gate, up, down = (layer for layer, _ in built)
    parameters = [p for _, own in built for p in own]
    return lambda x: [layer(x) for layer in qkv], o, lambda x: down(F.silu(gate(x)) * up(x)), parameters


def _block(x, layers, rotation):
    qkv_proj, o_proj, mlp = layers
    h = F.rms_norm(x, x.shape[-1:])
    q, k, v = (projected.view(len(x), -1, HEAD).transpose(0, 1)[None] for projected in qkv_proj(h))
    attended = F.scaled_dot_product_attention(
        _rotate(q, *rotation), _rotate(k, *rotation), v, is_causal=True, enable_gqa=True
    )
    x = x + o_proj(attended[0].transpose(0, 1).reshape(len(x), -1))
    return x + mlp(F.rms_norm(x, x.shape[-1:]))


def _rotate(t, cos, sin):
    left, right = t.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


GPU = (
    Block(4096, 14336, 4096, 1024),
    Block(8192, 14336, 4096, 1024),
    Block(4096, 14336, 4096, 1024, r=64),
    Block(4096, 28672, 8192, 1024),
)
CPU = (
    Block(256, 1536, 512, 256, dtype="float32"),
    Block(256, 1536, 512, 256),
    Block(256, 2816, 1024, 256, dtype="float32"),
)

SUITE = Suite(
    "layer",
    "A Llama-style block",
    {"cuda": GPU, "cpu": CPU},
    quick={"cuda": 1, "cpu": 1},
    more=(ours.BLOCKS,),
    without=("torch.compile",),  # its users compile the whole block, not one projection after another
)
