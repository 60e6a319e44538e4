"""Who uses which adapter in this batch, and where one layer's adapters lie: all on the device, nothing read back."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_SLOT = torch.iinfo(torch.int32).max


class BatchPlan:
    """The adapters of a step's rows; build it once, and let every layer of the step share it.

    slots    `[M]` int32 on the device of x: row i uses the adapter in slot `slots[i]`; -1 is the base layer alone;
             or `[M, S]`: row i uses up to S adapters, whose terms are added up in this order
    weights  `[M, S]` fp32, as slots: what each of them is multiplied by, beside its scaling; None is 1

    Building it launches a sort and a few small kernels, and reads nothing back. `update` writes a new step's slots into
    the same memory, so that a CUDA graph that was captured with this plan replays with them. A step may have fewer rows
    than the plan: then `first` has the plan of just those, or of as many as a graph pads them to, in the same memory.
    A plan made under `torch.inference_mode()` can be updated only there, as any tensor made there.
    A slot that the adapters do not have counts as -1; on the CPU it is refused when the plan is used.
    Raises TypeError or ValueError where slots is no int32, or weights no fp32 tensor of the shapes above.

    >>> plan = BatchPlan(torch.tensor([2, -1, 0, 2], dtype=torch.int32))
    >>> plan.order.tolist(), plan.segment.tolist(), plan.distinct[:3].tolist()
    ([1, 2, 0, 3], [0, 1, 2, 2], [-1, 0, 2])
    """

    def __init__(self, slots: Tensor, weights: Tensor | None = None):
        _check_slots(slots)
        self.slots = torch.empty_like(slots, memory_format=torch.contiguous_format)
        self.weights = None if weights is None else torch.empty(slots.shape, device=slots.device)
        # Of the entries, which are the elements of slots, in the order of their slots:
        self.order = torch.empty_like(self.slots).view(-1)
        self.segment = torch.empty_like(self.order)  # numbers the distinct slots, 0 and up
        self.distinct = torch.empty_like(self.order)  # the slot of a segment
        self.update(slots, weights)

    @classmethod
    def of_parts(cls, *parts: Tensor | None) -> "BatchPlan":
        """A plan from another one's `parts`."""
        plan = object.__new__(cls)
        plan.slots, plan.weights, plan.order, plan.segment, plan.distinct = parts
        return plan

    def first(self, rows: int) -> "BatchPlan":
        """The plan of the first `rows` rows, as a view; of at least as many as the last update had."""
        entries = rows * self.adapters_per_row
        by_row = (None if t is None else t[:rows] for t in self.parts[:2])
        return BatchPlan.of_parts(*by_row, *(t[:entries] for t in self.parts[2:]))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """slots, weights, order, segment, distinct."""
        return self.slots, self.weights, self.order, self.segment, self.distinct

    def update(self, slots: Tensor, weights: Tensor | None = None) -> None:
        """Take the slots (and weights) of another step. If it has fewer rows, the others are rows of the base layer.

        Raises ValueError for more rows than when the plan was made, or another number of adapters a row.
        """
        _check_slots(slots)
        rows, all_rows = slots.shape[0], self.slots.shape[0]  # len would make them constants of an exported program
        if slots.shape[1:] != self.slots.shape[1:] or rows > all_rows:
            raise ValueError(
                f"slots: got shape {list(slots.shape)}, expected {list(self.slots.shape)}, as when the plan was made, "
                "or fewer rows"
            )
        if (weights is None) != (self.weights is None):
            raise ValueError(
                f"weights: got {'none' if weights is None else 'some'}, but there were "
                f"{'none' if self.weights is None else 'some'} when the plan was made"
            )
        if weights is not None:
            _check_weights(weights, slots)
            self.weights[:rows].copy_(weights)
        keys = self.slots[:rows].copy_(slots).view(-1)
        if rows < all_rows:  # the others go last, so that each beginning of the order is one of its own rows
            self.slots[rows:].fill_(-1)
            keys = self.slots.view(-1).clone()
            keys[slots.numel() :] = NO_SLOT
        ascending, order = keys.sort(stable=True)
        starts = torch.zeros_like(ascending)
        starts[1:] = ascending[1:] != ascending[:-1]
        self.order.copy_(order)
        segment = torch.cumsum(starts, 0)
        self.segment.copy_(segment)
        self.distinct.fill_(-1).scatter_(0, segment, ascending.masked_fill(ascending == NO_SLOT, -1))
        for read_back in ("groups", "largest_slot"):
            self.__dict__.pop(read_back, None)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int, Tensor]]:
        """`(j, slot, rows)`: the rows whose entry j is `slot`, -1 left out. Read back to the host, once a step."""
        return [
            (j, slot, (column == slot).nonzero().squeeze(1))
            for j, column in enumerate(self.slots.view(len(self), self.adapters_per_row).unbind(1))
            for slot in column.unique().tolist()
            if slot >= 0
        ]

    @functools.cached_property
    def largest_slot(self) -> int:
        """-1 without rows. Read back to the host, once a step."""
        return int(self.slots.max()) if len(self) else -1

    @functools.cached_property
    def signature(self) -> tuple:
        """What never changes: the shape and the device of slots."""
        return self.slots.shape, self.slots.device

    @property
    def adapters_per_row(self) -> int:
        """S."""
        return self.slots.shape[1] if self.slots.dim() == 2 else 1

    def __len__(self) -> int:
        return self.slots.shape[0]


def _check_slots(slots):
    if not isinstance(slots, Tensor) or slots.dtype != torch.int32:
        raise TypeError(f"slots: got {getattr(slots, 'dtype', type(slots).__name__)}, expected an int32 tensor")
    if slots.dim() not in (1, 2) or slots.shape[1:] == (0,):
        raise ValueError(f"slots: got shape {list(slots.shape)}, expected [M] or [M, S] with S >= 1")


def _check_weights(weights, slots):
    if not isinstance(weights, Tensor) or weights.dtype != torch.float32:
        got = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights: got {got}, expected a torch.float32 tensor")
    if weights.shape != slots.shape or weights.device != slots.device:
        raise ValueError(
            f"weights: got shape {list(weights.shape)} on {weights.device}, "
            f"expected {list(slots.shape)} on {slots.device}, as slots"
        )


@dataclass(frozen=True, eq=False)
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
    memory: dict = field(init=False, repr=False, default_factory=dict)  # what callers know of these very tensors

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

    @classmethod
    def unchecked(cls, *fields) -> "LayerAdapters":
        """From all of another one's `fields`."""
        adapters = object.__new__(cls)
        for name, value in zip(cls.__dataclass_fields__, (*fields, {}), strict=True):
            object.__setattr__(adapters, name, value)
        return adapters

    def __reduce__(self):
        return LayerAdapters.unchecked, self.fields

    @property
    def fields(self) -> tuple:
        """a, b, ranks, scalings, first_row, max_rank."""
        return self.a, self.b, self.ranks, self.scalings, self.first_row, self.max_rank

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
