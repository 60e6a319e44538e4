"""What a base-weight format is: a frozen `[N, K]` weight in fewer bits, defined by its dequantisation."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

CHUNK = 2**20  # elements that are dequantised at a time: their fp32 values stay in a CPU's cache
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QuantizedWeight(nn.Module):
    """A frozen weight `[N, K]` whose state is plain tensors: buffers, which follow the module that holds them.

    shape    `[N, K]`
    dtype    what `dequantize()` returns unless told: the dtype of the weight before
    device, nbytes  of the state
    options  what `quantize` was told, so that `requantize` makes another weight of the very same kind

    The first buffer holds the codes. Buffers keep their dtype whatever the module around them is cast to: an fp32 scale
    in bf16 would be another weight. A subclass has `name`, `VARIANTS`, `_quantize`, `_rows` and `options`; where a library
    stores weights this way it has converters too, and where a kernel reads them, `_tile`. docs/formats.md shows how to add one.
    """

    name: ClassVar[str]
    VARIANTS: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # the options that tests and figures go through
    INSTRUCTIONS: ClassVar[float | None] = (
        None  # a weight, to dequantise it in the K loop: at most; None without a kernel
    )
    PARTS: ClassVar[tuple[int, ...]] = (2,)  # how many tensors its state may be
    LAYOUT: ClassVar[int] = 0  # how many ints its layout is
    requires_grad: ClassVar[bool] = False

    def __init__(self, shape, dtype: torch.dtype, **state: Tensor | None):
        super().__init__()
        if dtype not in FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, FLOATS))}")
        self.shape, self.dtype = torch.Size(shape), dtype
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self._made_of = [(name, tensor.dtype, tensor.shape) for name, tensor in state.items() if tensor is not None]
        if len(devices := {tensor.device for tensor in self.state()}) > 1:
            raise ValueError(f"{', '.join(state)}: got devices {sorted(map(str, devices))}, expected one")

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def layout(self) -> tuple[int, ...]:
        """The ints that make a weight of the state, beside its shape: what an operator's schema can hold."""
        return ()

    @classmethod
    def of_parts(cls, state: Sequence[Tensor], shape, layout: Sequence[int]) -> "QuantizedWeight":
        """The weight of another one's `state()`, shape and `layout`."""
        return cls(*state)

    @classmethod
    def whole(cls, state: Sequence[Tensor], shape, layout: Sequence[int]) -> "QuantizedWeight":
        """`of_parts` of what anybody may have put together; TypeError or ValueError where that is no weight of `shape`."""
        if len(state) not in cls.PARTS or len(layout) != cls.LAYOUT:
            raise ValueError(
                f"weight: got {len(state)} tensors and a layout of {len(layout)} ints, expected "
                f"{' or '.join(map(str, cls.PARTS))} and {cls.LAYOUT}, of which {cls.name} is made"
            )
        weight = cls.of_parts(state, shape, layout)
        if weight.shape != torch.Size(shape):
            raise ValueError(f"weight: got {cls.name} of shape {list(weight.shape)}, expected {list(shape)}")
        return weight

    def _rows(self, start: int, stop: int) -> Tensor:
        """The fp32 values `[stop - start, K]` of some rows: the definition of the format."""
        raise NotImplementedError

    @classmethod
    def _quantize(cls, values: Tensor, dtype: torch.dtype, **options) -> "QuantizedWeight":
        """The format of finite fp32 `values [N, K]`; `dtype` is that of the weight they come from."""
        raise NotImplementedError

    @classmethod
    def from_linear(cls, linear: nn.Module) -> "QuantizedWeight | None":
        """The weight of another library's layer where it is stored this way, else None."""
        return None

    @classmethod
    def reasons_unsupported(cls, device: torch.device) -> list[str]:
        """Why a weight of this format cannot be dequantised on `device`; empty if it can."""
        return [] if device.type in ("cpu", "cuda") else [f"x is on {device}, expected cpu or cuda"]

    def tile(self, capability: int) -> tuple[tuple, tuple] | str:
        """What the function of this name in lora_kernels/kernels/weights.py takes on sm_`capability`, or why it cannot.

        Its operands, and the constants that it is compiled for.
        """
        codes, *rest = self.state()
        for tensor in (codes, *(t for t in rest if t.dim() < 2)):  # strides of a matrix of scales are no matter
            if not tensor.is_contiguous():
                return f"a state that lies in memory with strides {tensor.stride()}"
        if codes.data_ptr() % 16 or codes.nbytes // self.shape[0] % 16 or codes.nbytes % self.shape[0]:
            return "rows of codes that do not begin on 16-byte boundaries"
        return self._tile(capability)

    def _tile(self, capability: int) -> tuple[tuple, tuple] | str:
        return "no kernel of its own"

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, **options) -> "QuantizedWeight":
        """`weight [N, K]` in this format, on its device.

        Raises TypeError or ValueError where `weight` is no dense floating-point matrix, is empty, or holds a value that
        is not finite in fp32.
        """
        if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.dtype not in FLOATS:
            got = f"{weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: got {got}, expected a dense fp16, bf16, fp32 or fp64 tensor [N, K]")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K] with N, K >= 1")
        values = weight.detach().float()
        if not values.isfinite().all():
            raise ValueError("weight: holds NaN, or values that are infinite in fp32; a quantised weight cannot")
        return cls._quantize(values, weight.dtype, **options)

    def requantize(self, weight: Tensor) -> "QuantizedWeight":
        """Another dense `weight [N, K]`, quantised as this one is."""
        again = self.quantize(weight, **self.options)
        again.dtype = self.dtype
        return again

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense `[N, K]`: computed in fp32, and rounded once to `dtype`, or to that of `out`, which it is written to."""
        if dtype not in (None, *FLOATS):
            raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        expected = (self.shape, dtype or out.dtype, self.device)
        if (out.shape, out.dtype, out.device) != expected or out.dtype not in FLOATS:
            got = f"{list(out.shape)}, {out.dtype}, {out.device}"
            raise ValueError(f"out: got {got}, expected {list(self.shape)}, {dtype or 'floating point'}, {self.device}")
        rows = max(1, CHUNK // self.shape[1]) if out.is_cpu else self.shape[0]
        for start in range(0, self.shape[0], rows):
            chunk = out[start : start + rows]
            chunk.copy_(self._rows(start, start + len(chunk)))
        return out

    def check_state(self) -> None:
        """Raise TypeError or ValueError where a buffer was replaced by one of another dtype or shape: kernels read it all."""
        for name, dtype, shape in self._made_of:
            check_tensor(name, self._buffers[name], (dtype,), shape)

    def state(self) -> tuple[Tensor, ...]:
        """The tensors that are the weight, the codes first."""
        return tuple(tensor for tensor in self._buffers.values() if tensor is not None)

    @property
    def device(self) -> torch.device:
        return next(iter(self._buffers.values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state())

    @property
    def signature(self) -> tuple:
        """All that checks and dispatch read of it."""
        codes = self.state()[0]
        return type(self), self.shape, self.device, codes.data_ptr() % 16, codes.stride(), self.nbytes

    def like(self, dtype: torch.dtype) -> Tensor:
        """A tensor without data that looks as the dequantised weight will."""
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{list(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes:,}{options}"

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name, buffer in self._buffers.items():  # copying would cast without a word
            loaded = state_dict.get(prefix + name)
            if buffer is not None and loaded is not None and loaded.dtype != buffer.dtype:
                errors.append(
                    f"{prefix}{name}: got {loaded.dtype}, expected {buffer.dtype}, as {self.name} has it here."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def check_tensor(name: str, tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | str, ...]) -> None:
    """Raise TypeError or ValueError, naming the argument, where `tensor` has none of `dtypes` or not that shape.

    An extent that is a str may be any.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    fits = (isinstance(extent, str) or extent == given for extent, given in zip(shape, tensor.shape, strict=False))
    if tensor.dim() != len(shape) or not all(fits):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")


def check_shape(shape) -> torch.Size:
    """`shape` as a Size; ValueError where it is not `[N, K]` with N, K >= 1."""
    if not is_extents(shape):
        raise ValueError(f"shape: got {shape}, expected [N, K] with N, K >= 1")
    return torch.Size(shape)


def is_extents(pair) -> bool:
    """Whether `pair` is two positive ints."""
    ints = isinstance(pair, (tuple, list)) and all(isinstance(extent, (int, torch.SymInt)) for extent in pair)
    return ints and len(pair) == 2 and min(pair) >= 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def safe_scale(scale: Tensor) -> Tensor:
    """`scale`, with 1 for a group of zeros, so that nothing is divided by zero."""
    return torch.where(scale > 0, scale, 1.0)
