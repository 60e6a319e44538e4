"""Many adapters in host memory, some of them in device slots: loaded, evicted and replaced while batches run."""

import contextlib
import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_kernels.adapters.checkpoint import _short, is_target, read_adapter
from lora_kernels.adapters.packed import PackedAdapter, listed, pack
from lora_kernels.adapters.placement import Gaps, find_place
from lora_kernels.adapters.plan import LayerAdapters
from lora_kernels.functional import DTYPES, MAX_RANK
from lora_kernels.modules import linears_by_name, name_matches, weight_of


class PoolFullError(RuntimeError):
    """Adapters that are in use leave no slot, or not enough rows: wait for a release, or make the pool larger."""


@dataclasses.dataclass
class PoolStatistics:
    """What a pool has done since it was made.

    hits, misses    acquisitions that found their adapter in a slot, and those that had to copy it there
    evictions       adapters that lost their slot to another
    bytes_copied    from host to device
    waits           acquisitions that made their stream wait for a copy; on the CPU copies are done on return, so 0
    prefetch_hits   hits that a prefetch had made: the first acquisition after one that copied
    refusals        acquisitions that raised PoolFullError; neither hits nor misses
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_copied: int = 0
    waits: int = 0
    prefetch_hits: int = 0
    refusals: int = 0


@dataclasses.dataclass(eq=False)
class _Adapter:
    packed: PackedAdapter
    slot: int | None = None
    rows: range | None = None  # of each layer's memory
    references: int = 0
    prefetched: bool = False  # into the slot, and not acquired since
    copied: torch.cuda.Event | None = None  # the end of the last copy into a slot
    uses: dict = dataclasses.field(default_factory=dict)  # the last release on each stream, while in a slot


class AdapterPool:
    """Any number of adapters by name in host memory, and `slots` of them at a time on the device, for all layers.

    layers    `{name: (in_features, out_features)}`
    slots     adapters on the device at once, at most
    max_rank  largest rank of any layer of any adapter, from 1 to 512
    rows      ranks on the device at once, over all slots: an adapter takes as many as its largest rank, in one piece;
              None is `slots * max_rank`
    dtype     of the adapters on the device, fp16, bf16, fp32 or fp64; must be that of the layers' inputs
    device    a CPU or CUDA device

    `acquire` puts an adapter into a slot and keeps it there until `release`; adapters that nobody holds stay until
    their slot is needed, the least recently used going first. The tensors of `layer` never move, so CUDA graphs replay.
    With CUDA, copies run on a stream of the pool's own: `acquire` makes the current stream wait for the one it needs,
    and a slot is overwritten only when the streams that were current at its `release`s have got that far.
    All methods may be called from any thread, and none while a CUDA graph is captured. Where one raises, the pool is
    as it was, but for `refusals`.

    >>> from lora_kernels import BatchPlan, lora_linear_batched
    >>> pool = AdapterPool({"proj": (64, 32)}, slots=2, max_rank=8, dtype=torch.float32)
    >>> pool.load_tensors("alice", {"proj": (torch.randn(4, 64), torch.randn(32, 4), 2.0)})
    >>> with pool.using("alice") as slot:
    ...     plan = BatchPlan(torch.tensor([slot, -1, slot], dtype=torch.int32))
    ...     y = lora_linear_batched(torch.randn(3, 64), torch.randn(32, 64), pool.layer("proj"), plan)
    >>> pool.statistics
    PoolStatistics(hits=0, misses=1, evictions=0, bytes_copied=1544, waits=0, prefetch_hits=0, refusals=0)
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        rows: int | None = None,
    ):
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers: got {_short(layers)}, expected {{name: (in_features, out_features)}}")
        self._shapes = {name: _checked_shape(name, shape) for name, shape in layers.items()}
        if not self._shapes:
            raise ValueError("layers: got none, expected {name: (in_features, out_features)}")
        _check_count("slots", slots, 2**31 - 1)
        _check_count("max_rank", max_rank, MAX_RANK)
        rows = slots * max_rank if rows is None else rows
        _check_count("rows", rows, 2**31 - 1)
        if rows < max_rank:
            raise ValueError(f"rows: got {rows}, expected at least {max_rank}, the max_rank")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device: got {device}, expected a CPU or CUDA device")
        self.slots, self.max_rank, self.rows, self.dtype = slots, max_rank, rows, dtype
        with torch.inference_mode(False):  # inference tensors could not be written outside of it
            self._ranks = torch.zeros(len(layers), slots, dtype=torch.int32, device=device)
            self._scalings = torch.zeros(len(layers), slots, dtype=torch.float32, device=device)
            self._first_rows = torch.zeros(slots, dtype=torch.int64, device=device)
            self._layers = {
                name: LayerAdapters(
                    torch.empty(rows, k, dtype=dtype, device=device),
                    torch.empty(rows, n, dtype=dtype, device=device),
                    self._ranks[i],
                    self._scalings[i],
                    self._first_rows,
                    max_rank,
                )
                for i, (name, (k, n)) in enumerate(self._shapes.items())
            }
        self.device = self._ranks.device
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))  # for the zeros
            for tensor in self._tensors():
                tensor.record_stream(self._copies)  # a pool may die with a copy under way
        self._lock = threading.Lock()
        self._adapters: dict[str, _Adapter] = {}
        self._held: dict[str, _Adapter] = {}  # in a slot and acquired
        self._idle: OrderedDict[str, _Adapter] = OrderedDict()  # in a slot and not, least recently used first
        self._free, self._gaps = list(reversed(range(slots))), Gaps(rows)
        self._statistics = PoolStatistics()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        slots: int,
        max_rank: int,
        target_modules: Iterable[str] | None = None,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "AdapterPool":
        """A pool for the linear layers of `model`, quantised ones too, in their dtype and on their device.

        target_modules  names, each matching the layer of that name and those ending in `.name`; None is every layer
        dtype           of the layers' inputs; None is the layers' dtype, of quantised ones that of the weight before

        A layer under two names counts under its first, as in adapter files.
        Raises ValueError if they match nothing, or layers of several dtypes or devices.
        """
        targets = None if target_modules is None else list(target_modules)
        every = linears_by_name(model)
        linears = {
            name: every[name]
            for name, _ in model.named_modules()
            if name in every and (targets is None or name_matches(name, targets))
        }
        if not linears:
            raise ValueError(f"target_modules: {targets} match no nn.Linear of the model")
        kinds = {(dtype or weight.dtype, weight.device) for weight in map(weight_of, linears.values())}
        if len(kinds) > 1:
            raise ValueError(f"model: its layers have {sorted(map(str, kinds))}, expected one; make a pool for each")
        shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
        return cls(shapes, slots, max_rank, *kinds.pop(), rows)

    def load(self, name: str, directory: str | os.PathLike) -> None:
        """Read PEFT's files into host memory, in the pool's dtype. Layers the adapter lacks have rank 0.

        The files are mapped while they are read: replace them by renaming others, as `save_adapter` does.
        Raises as `lora_kernels.load_adapter` does, and as `load_tensors`.
        """
        self._check_new(name)
        config, tensors, adapters = read_adapter(directory)
        for layer, (a, _) in tensors.items():
            if a.shape[:1] != (r := adapters[layer].r,):
                got = f"{_short(layer)} has lora_A {list(a.shape)}"
                raise ValueError(f"adapter {_short(name)}: {got}, expected [{r}, K] from r = {r} in its config")
        for layer in self._shapes.keys() - tensors.keys():
            if is_target(layer, config):
                raise ValueError(f"adapter {_short(name)}: has no tensors for {layer}, which its target_modules lists")
        self.load_tensors(name, {layer: (a, b, adapters[layer].scaling) for layer, (a, b) in tensors.items()})

    @torch.no_grad()
    def load_tensors(self, name: str, tensors: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        """Copy `{layer: (lora_a [R, K], lora_b [N, R], scaling)}` into host memory, in the pool's dtype.

        Raises TypeError or ValueError for a name that is taken, a layer that the pool does not have, wrong shapes or
        dtypes, ranks past max_rank, and values that are not finite in the pool's dtype.
        """
        self._check_new(name)
        packed = pack(name, tensors, self._shapes, self.max_rank, self.dtype, pinned=self._copies is not None)
        with self._lock:
            self._check_new(name)
            self._adapters[name] = _Adapter(packed)

    @torch.no_grad()
    def unload(self, name: str) -> None:
        """Forget the adapter and free its slot.

        Raises LookupError if it is unknown, RuntimeError if it is acquired.
        """
        with self._lock:
            adapter = self._known(name)
            if adapter.references:
                raise RuntimeError(
                    f"name: {_short(name)} is in use, acquired {_times(adapter.references)}; release it first"
                )
            if adapter.slot is not None:
                self._vacate(name)
            del self._adapters[name]

    @torch.no_grad()
    def acquire(self, name: str) -> int:
        """The adapter's slot, where it stays until as many calls of `release`; copied there if need be.

        Raises LookupError if it is unknown, PoolFullError if others hold every slot, or too many rows.
        """
        with self._lock:
            adapter, counted = self._known(name), self._statistics
            if adapter.slot is not None:
                counted.hits += 1
                counted.prefetch_hits += adapter.prefetched
            elif self._place(name, adapter):
                counted.misses += 1
            else:
                counted.refusals += 1
                raise PoolFullError(
                    f"acquire: no slot with {adapter.packed.rank} rows in one piece for {_short(name)} among {self.slots} "
                    f"slots, {self.rows} rows. Acquired: {listed(self._held, self._held_as)}; "
                    "release an adapter, or make a larger pool"
                )
            if adapter.copied is not None and not adapter.copied.query():
                torch.cuda.current_stream(self.device).wait_event(adapter.copied)
                counted.waits += 1
            adapter.prefetched = False
            if not adapter.references:
                self._held[name] = self._idle.pop(name)
            adapter.references += 1
            return adapter.slot

    def release(self, name: str) -> None:
        """Undo one `acquire`, after the last launch that uses it, with the stream of that launch current.

        Raises LookupError if the adapter is unknown, RuntimeError if it is not acquired.
        """
        with self._lock:
            adapter = self._known(name)
            if not adapter.references:
                raise RuntimeError(f"name: {_short(name)} is not acquired, expected one acquire for each release")
            if self._copies is not None:
                stream = torch.cuda.current_stream(self.device)
                adapter.uses.setdefault(stream, torch.cuda.Event()).record(stream)
            adapter.references -= 1
            if not adapter.references:
                self._idle[name] = self._held.pop(name)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[int]:
        """`with pool.using(name) as slot:` acquires, and releases in the end."""
        slot = self.acquire(name)
        try:
            yield slot
        finally:
            self.release(name)

    @torch.no_grad()
    def prefetch(self, name: str) -> bool:
        """Start copying the adapter into a slot if one can be had; return whether it has one now.

        A hint: it counts as a use, holds nothing, and waits for nothing. Raises LookupError if the adapter is unknown.
        """
        with self._lock:
            adapter = self._known(name)
            if adapter.slot is None:
                adapter.prefetched = self._place(name, adapter)
            elif name in self._idle:
                self._idle.move_to_end(name)
            return adapter.slot is not None

    def layer(self, name: str) -> LayerAdapters:
        """The layer's adapters, one a slot: always the same tensors. Raises LookupError for an unknown layer."""
        if name not in self._layers:
            raise LookupError(f"layer: got {_short(name)}, expected one of {listed(self._layers)}")
        return self._layers[name]

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """`{layer: (in_features, out_features)}`."""
        return dict(self._shapes)

    @property
    def statistics(self) -> PoolStatistics:
        with self._lock:
            return dataclasses.replace(self._statistics)

    @property
    def resident(self) -> dict[str, int]:
        """`{adapter: slot}`: those that nobody holds, least recently used first, and then those that are acquired."""
        with self._lock:
            return {name: adapter.slot for name, adapter in (*self._idle.items(), *self._held.items())}

    @property
    def nbytes(self) -> int:
        """Bytes of the slots on the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        """The number of adapters loaded."""
        return len(self._adapters)

    def _tensors(self) -> list[Tensor]:
        slots = [tensor for layer in self._layers.values() for tensor in (layer.a, layer.b)]
        return [*slots, self._ranks, self._scalings, self._first_rows]

    def _known(self, name) -> _Adapter:
        if name not in self._adapters:
            raise LookupError(f"name: got {_short(name)}, expected a loaded one: {listed(self._adapters)}")
        return self._adapters[name]

    def _check_new(self, name):
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: got {_short(name)}, expected a str that is not empty")
        if name in self._adapters:
            raise ValueError(f"name: {_short(name)} is loaded already; unload it first, or choose another name")

    def _place(self, name, adapter) -> bool:
        """Copy the adapter into a slot, evicting adapters that nobody holds; False if that gives none."""
        packed = adapter.packed
        idle = ((other, holder.rows) for other, holder in self._idle.items())
        found = find_place(packed.rank, self._gaps, idle, bool(self._free))
        if found is None:
            return False
        rows, victims = found
        with self._copying():
            staged = packed.to(self.device)  # before the first change: there may be no memory for it
            for victim in victims:
                self._vacate(victim)
                self._statistics.evictions += 1
            slot = self._free[-1]
            for layer, a, b in packed.views(staged.flat, self._shapes):
                r = a.shape[0]
                self._layers[layer].a[rows.start : rows.start + r].copy_(a)
                self._layers[layer].b[rows.start : rows.start + r].copy_(b)
            self._first_rows[slot] = rows.start
            self._ranks[:, slot].copy_(staged.ranks)
            self._scalings[:, slot].copy_(staged.scalings)
            if self._copies is not None:
                adapter.copied = self._copies.record_event()
        self._statistics.bytes_copied += packed.nbytes
        self._free.pop()
        self._gaps.take(rows)
        adapter.slot, adapter.rows = slot, rows
        self._idle[name] = adapter
        return True

    def _vacate(self, name):
        """Rank 0 for the adapter's slot, once its last uses have ended; later copies into it queue behind that."""
        adapter = self._idle.pop(name)
        with self._copying():
            for event in adapter.uses.values():
                self._copies.wait_event(event)
            self._ranks[:, adapter.slot] = 0
        adapter.uses.clear()
        self._gaps.give(adapter.rows)
        self._free.append(adapter.slot)
        adapter.slot = None

    def _held_as(self, name) -> str:
        adapter = self._held[name]
        return f"{_short(name)} {_times(adapter.references)}, {len(adapter.rows)} rows"

    def _copying(self):
        return contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies)


def _checked_shape(name, shape) -> tuple[int, int]:
    if not isinstance(name, str):
        raise TypeError(f"layers: got the name {_short(name)}, expected a str")
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise TypeError(f"layers: {name} is {_short(shape)}, expected (in_features, out_features)")
    for which, size in zip(("in_features", "out_features"), shape, strict=True):
        _check_count(f"layers: {name}: {which}", size, 2**31 - 1)
    return shape


def _check_count(name, value, maximum):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int from 1 to {maximum}")
    if not 1 <= value <= maximum:
        raise ValueError(f"{name}: got {value}, expected an int from 1 to {maximum}")


def _times(count) -> str:
    return "once" if count == 1 else f"{count} times"
