"""Who uses which adapter in this batch, and where one layer's adapters lie: all on the device, nothing read back."""

from dataclasses import dataclass

import torch
from torch import Tensor


class BatchPlan:
    """The adapters of a step's rows; build it once, and let every layer of the step share it.

    slots  `[M]` int32 on the device of x: row i uses the adapter in slot `slots[i]`; -1 is the base layer alone

    Building it launches a sort and reads nothing back. `update` writes a new step's slots into the same memory, so that a
    CUDA graph that was captured with this plan replays with them.
    A slot that the adapters do not have counts as -1; on the CPU it is refused when the plan is used.
    Raises TypeError or ValueError where slots is not a 1-D int32 tensor.

    >>> plan = BatchPlan(torch.tensor([2, -1, 0, 2], dtype=torch.int32))
    >>> plan.order.tolist()
    [1, 2, 0, 3]
    """

    def __init__(self, slots: Tensor):
        self.slots = torch.empty_like(_checked(slots))
        self.order = torch.empty_like(self.slots)  # rows sorted by slot: neighbours share an adapter
        self.update(slots)

    def update(self, slots: Tensor) -> None:
        """Take the slots of another step with as many rows; raises ValueError if there are more or fewer."""
        if _checked(slots).shape != self.slots.shape:
            raise ValueError(
                f"slots: got {slots.shape[0]} rows, expected {self.slots.shape[0]}, as when the plan was made"
            )
        self.slots.copy_(slots)
        self.order.copy_(torch.argsort(self.slots, stable=True))

    def __len__(self) -> int:
        return self.slots.shape[0]


def _checked(slots):
    if not isinstance(slots, Tensor) or slots.dtype != torch.int32:
        raise TypeError(f"slots: got {getattr(slots, 'dtype', type(slots).__name__)}, expected an int32 tensor [M]")
    if slots.dim() != 1:
        raise ValueError(f"slots: got shape {list(slots.shape)}, expected [M]")
    return slots


@dataclass(frozen=True)
class LayerAdapters:
    """One layer's adapters, one a slot: each with room for the largest rank, or packed, each with rows for its own.

    a          `[slots, R_max, K]`, contiguous; packed `[rows, K]`
    b          `[slots, N, R_max]`, contiguous, same dtype as a; packed `[rows, N]`, a rank a row
    ranks      `[slots]` int32: what lies past a slot's rank is never used; 0 is an empty slot
    scalings   `[slots]` fp32
    first_row  packed only: `[slots]` int64, the row of a and b where a slot's adapter begins
    max_rank   packed only: the largest rank that a slot may have

    Contents may change between calls (and between replays of a CUDA graph), shapes may not.
    Raises TypeError or ValueError for tensors that break the above.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    scalings: Tensor
    first_row: Tensor | None = None
    max_rank: int | None = None

    def __post_init__(self):
        packed = self.first_row is not None
        tables = {"ranks": torch.int32, "scalings": torch.float32} | ({"first_row": torch.int64} if packed else {})
        matrices = {"a": None, "b": self.a.dtype}
        for name, dtype in (matrices | tables).items():
            dims = 1 if name in tables else 2 if packed else 3
            tensor = getattr(self, name)
            if dtype is not None and tensor.dtype != dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
            if tensor.dim() != dims or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: got shape {list(tensor.shape)}, strides {tensor.stride()}, expected {dims}-D, contiguous"
                )
            if tensor.device != self.a.device:
                raise ValueError(f"{name}: got device {tensor.device}, expected {self.a.device}, as a")
        slots = self.ranks.shape[0] if packed else self.a.shape[0]
        expected = [self.a.shape[0], "N"] + ([] if packed else [self.a.shape[1]])
        if [*self.b.shape[:1], "N", *self.b.shape[2:]] != expected:
            expected = f"[{', '.join(map(str, expected))}], since a is {list(self.a.shape)}"
            raise ValueError(f"b: got shape {list(self.b.shape)}, expected {expected}")
        for name in tables:
            if getattr(self, name).shape[0] != slots:
                owner = "ranks" if packed else "a"
                raise ValueError(f"{name}: got {getattr(self, name).shape[0]} slots, expected {slots}, as {owner}")
        if packed != (self.max_rank is not None):
            raise ValueError("first_row, max_rank: got one of them, expected both or neither")
        if not packed:
            object.__setattr__(self, "max_rank", self.a.shape[1])
            first_row = torch.arange(slots, dtype=torch.int64, device=self.a.device) * self.max_rank
            object.__setattr__(self, "first_row", first_row)

    @property
    def strides_b(self) -> tuple[int, int]:
        """Of b: from one n to the next, from one rank to the next."""
        return (self.b.stride(1), self.b.stride(2)) if self.b.dim() == 3 else (1, self.b.stride(0))

    def slot(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        """`A [rank, K]` and `B [N, rank]` of one slot: views. Reads `first_row` on the host."""
        if self.a.dim() == 3:
            return self.a[slot, :rank], self.b[slot, :, :rank]
        rows = slice(first := int(self.first_row[slot]), first + rank)
        return self.a[rows], self.b[rows].mT
