"""Tile tables: data, one file per architecture, and the rule that picks a row where nothing was measured (`tuned`).

A row names a kernel, the tile, and the problems it is meant for. Where several rows fit, the one whose waves of tiles
cost least wins: a smaller tile wastes less of the last wave, and pays for it with `efficiency`.
"""

import importlib
import math
from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)
INTERPRETER = 0
STRATEGIES = {  # of the Triton backend, by operation
    "lora_linear": ("one_launch", "extended", "single_pass", "chained"),
    "lora_linear_batched": ("one_launch", "extended", "chained"),
}


@dataclass(frozen=True)
class Config:
    """Tile and launch shape. `block_n` is the output width (of dx or the gradient too), `block_k` the K step.

    `halves` stores a tile's left and right half one after the other, for half the shared memory; `group_m` rows of
    tiles run together for L2. `max_registers` a thread may use: left alone, ptxas spills some to fit more programs on an
    SM. Fields that a kernel does not use keep their default.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    group_m: int = 8
    halves: bool = False
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told, beside the constexprs."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


@dataclass(frozen=True)
class Row:
    """One line of a table: `kernel` for `itemsize`-byte elements and ranks up to `max_rank`; `efficiency` is modelled.

    `dropout=False` marks a tile that would spill registers with a dropout mask in its epilogue, `unaligned=False` one
    that would where rows do not begin on 16-byte boundaries: tiles then pass through registers two bytes at a time.
    """

    kernel: str
    config: Config
    itemsize: int = 2
    max_rank: int = 512
    max_m: int = 2**31
    dropout: bool = True
    unaligned: bool = True
    efficiency: float = 1.0

    def fits(self, kernel, itemsize: int, m: int, r: int, dropout: bool = False, aligned: bool = True) -> bool:
        """Whether this row may run such a problem."""
        return (
            self.kernel == kernel
            and self.itemsize == itemsize
            and r <= self.max_rank
            and m <= self.max_m
            and (self.dropout or not dropout)
            and (self.unaligned or aligned)
        )


def architecture(capability: int):
    """The table (a module) of the newest architecture not above `capability`: 90 is sm_90, 0 the interpreter."""
    known = max((arch for arch in ARCHITECTURES if arch <= capability), default=INTERPRETER)
    return importlib.import_module(f"lora_kernels.configs.sm{known}" if known else "lora_kernels.configs.interpreter")


def candidates(
    kernel: str, capability: int, itemsize: int, m: int, r: int, dropout: bool = False, aligned: bool = True
) -> list[Row]:
    """Every row that is legal for the problem, in the order of the table."""
    return [row for row in architecture(capability).ROWS if row.fits(kernel, itemsize, m, r, dropout, aligned)]


def lookup(
    kernel, capability, itemsize, m: int, n: int, r: int, num_sms: int, dropout: bool = False, aligned: bool = True
) -> Config:
    """The config for `kernel` on `[m, n]` outputs with rank `r`; raises LookupError if the table has no row for it."""
    rows = candidates(kernel, capability, itemsize, m, r, dropout, aligned)
    if not rows:
        raise LookupError(f"no {kernel} row for capability {capability}, {itemsize}-byte elements, m={m}, r={r}")
    return min(rows, key=lambda row: _waves_cost(row, m, n, num_sms)).config


def _waves_cost(row: Row, m: int, n: int, num_sms: int) -> float:
    block_m, block_n = row.config.block_m, row.config.block_n or n
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
    return math.ceil(tiles / num_sms) * block_m * block_n / row.efficiency
