"""The specification: what every backend must compute, in plain PyTorch.

`x [M,K]`, `weight [N,K]`, `lora_a [R,K]`, `lora_b [N,R]`, any dtype. Evaluated in fp64 these functions are the
truth of the error budget; evaluated in the working dtype they are its yardstick (docs/numerics.md).
LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"): the fewest that pass BigCrush
_WORD = 0xFFFFFFFF


def lora_linear(x, weight, lora_a, lora_b, scaling, bias=None, keep=None, dropout_p=0.0) -> Tensor:
    """`y [M,N] = x Wᵀ + bias + scaling (drop(x) Aᵀ) Bᵀ`, with `drop(x) = x * keep / (1 - p)`."""
    y = x @ weight.mT
    if bias is not None:
        y = y + bias
    return y + scaling * ((drop(x, keep, dropout_p) @ lora_a.mT) @ lora_b.mT)


def lora_linear_backward(dy, x, weight, lora_a, lora_b, scaling, keep=None, dropout_p=0.0):
    """Gradients `(dx [M,K], da [R,K], db [N,R], dbias [N])` of `lora_linear` for `dy [M,N]`; docs/math.md derives them."""
    x_dropped = drop(x, keep, dropout_p)
    g = scaling * (dy @ lora_b)
    dx = dy @ weight + drop(g @ lora_a, keep, dropout_p)
    return dx, g.mT @ x_dropped, dy.mT @ (scaling * (x_dropped @ lora_a.mT)), dy.sum(0)


class Layer(NamedTuple):
    """What `lora_linear` takes beside x; without an adapter its rank is 0."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    keep: Tensor | None = None
    dropout_p: float = 0.0


def lora_projections(x, layers) -> list[Tensor]:
    """`[y_i [M,N_i]]`: layers that read the same x, each with its own adapter."""
    return [lora_linear(x, *layer) for layer in layers]


def lora_projections_backward(dys, x, layers):
    """`dx [M,K]`, the sum of what each layer sends back, and the layers' `[(da, db, dbias)]`."""
    gradients = [lora_linear_backward(dy, x, *layer[:4], *layer[5:]) for dy, layer in zip(dys, layers, strict=True)]
    return sum(dx for dx, *_ in gradients), [rest for _, *rest in gradients]


def lora_mlp(x, gate, up, down, activation="silu") -> Tensor:
    """`y [M,K] = down(f(gate(x)) ∘ up(x))`. SwiGLU, GeGLU: Shazeer 2020, arXiv:2002.05202, equation 6."""
    z, u = lora_projections(x, (gate, up))
    return lora_linear(activated(z, activation)[0] * u, *down)


def lora_mlp_backward(dy, x, gate, up, down, activation="silu"):
    """`dx [M,K]`, and `[(da, db, dbias)]` of gate, up and down."""
    z, u = lora_projections(x, (gate, up))
    f, slope = activated(z, activation)
    dp, of_down = lora_projections_backward([dy], f * u, [down])
    dx, of_both = lora_projections_backward([dp * u * slope, dp * f], x, (gate, up))
    return dx, of_both + of_down


def activated(z, activation) -> tuple[Tensor, Tensor]:
    """f(z) and f'(z) of "silu" (z σ(z)), or "gelu_tanh": Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2."""
    if activation == "silu":
        gate = torch.sigmoid(z)
        return z * gate, gate * (1.0 + z * (1.0 - gate))
    c, cubic = math.sqrt(2.0 / math.pi), 0.044715
    t = torch.tanh(c * (z + cubic * z**3))
    return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (1.0 + 3.0 * cubic * z * z)


def lora_linear_batched(x, weight, a, b, ranks, scalings, slots, bias=None, weights=None) -> Tensor:
    """`y [M,N]` where row i uses the adapters `slots[i]` of `a [slots,R_max,K]` and `b [slots,N,R_max]`, and -1 is none.

    Row i adds `weights[i,j] scaling (x Aᵀ) Bᵀ` for each entry j of `slots [M,S]`; `[M]` is `[M,1]`, and weights None is 1.
    """
    y = lora_linear(x, weight, a[0, :0], b[0, :, :0], 0.0, bias)
    for i, row in enumerate((slots[:, None] if slots.dim() == 1 else slots).tolist()):
        for j, slot in enumerate(row):
            if 0 <= slot < len(ranks) and (r := int(ranks[slot])):
                scaling = float(scalings[slot]) * (1.0 if weights is None else float(weights[i, j]))
                y[i] += scaling * ((x[i] @ a[slot, :r].mT) @ b[slot, :, :r].mT)
    return y


def dropout_keep(seed, rows: int, cols: int, dropout_p: float, device=None) -> Tensor:
    """The mask `keep [rows, cols]` (bool) that `seed` (int, or 0-d int64 tensor) stands for.

    Philox-4x32-7 with key `seed` and counter `(row, col // 8, 0, 0)` gives four words, which are eight 16-bit lanes, one
    for each of eight neighbouring columns, low half first. An element stays where its lane is below `keep_threshold(p)`.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    zero = torch.zeros(rows, -(-cols // 8), dtype=torch.int64, device=seed.device)
    c0 = zero + torch.arange(rows, device=seed.device)[:, None]
    c1 = zero + torch.arange(zero.shape[1], device=seed.device)
    c2 = c3 = zero
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps both 32-bit halves
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ key0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ key1, p0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return lanes.flatten(1)[:, :cols] < keep_threshold(dropout_p)


def keep_threshold(dropout_p: float) -> int:
    """How many of the 65,536 values of a 16-bit lane keep their element; p is honoured to 1/65536."""
    return round((1.0 - dropout_p) * 65536)


def drop(x, keep, dropout_p) -> Tensor:
    """`x * keep / (1 - p)`; x itself where `keep` is None."""
    return x if keep is None else torch.where(keep, x / (1.0 - dropout_p), 0.0)
