"""A model that serves a pool's adapters: its linear layers take each sequence's own."""

import contextlib
import functools
from collections.abc import Iterator

from torch import Tensor, nn

from lora_kernels.adapters.plan import BatchPlan, LayerAdapters
from lora_kernels.adapters.pool import AdapterPool
from lora_kernels.formats import QuantizedWeight
from lora_kernels.functional import lora_linear_batched
from lora_kernels.modules import check_linear, weight_of


def attach_pool(model: nn.Module, pool: AdapterPool) -> "Serving":
    """Let each linear layer of `model` that `pool` has a layer for add the adapters of the batch that is active.

    That is an `nn.Linear`, or one that bitsandbytes, torchao or transformers has quantised and a format can hold
    (docs/formats.md): its weight is converted here, once, and shares the codes. In a batch it is computed in x's dtype.

    Nothing changes outside of a batch, nor do the state dict, the parameters and the modules themselves: their
    `forward` alone is another one, until `detach()`. Inference only, one batch at a time.

    Raises ValueError if the model lacks a layer of the pool, holds it under two names, has a pool attached already, or
    differs from the pool in shape, dtype (where it is dense) or device; TypeError if a layer is neither. Nothing is
    attached then.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    >>> pool = AdapterPool.for_model(model, slots=2, max_rank=4)
    >>> pool.load_tensors("alice", {"0": (torch.randn(3, 8), torch.randn(16, 3), 0.5)})
    >>> serving = attach_pool(model, pool)
    >>> slots = torch.tensor([pool.acquire("alice"), -1], dtype=torch.int32)  # one a sequence; -1 is the base model
    >>> x = torch.randn(2, 5, 8)  # two sequences of five tokens
    >>> with torch.inference_mode():
    ...     base = model(x)
    ...     with serving.batch(slots):
    ...         y = model(x)
    >>> torch.equal(y[1], base[1]), torch.equal(y[0], base[0])
    (True, False)
    >>> pool.release("alice")
    >>> serving.detach()
    """
    return Serving(model, pool)


class Serving:
    """A model with a pool's adapters attached; made by `attach_pool`."""

    def __init__(self, model: nn.Module, pool: AdapterPool):
        self._model = model
        self._linears = _linears_of(model, pool)
        self._batch: BatchPlan | None = None  # of one row a sequence
        self._plans: dict[int, BatchPlan] = {}  # of the active batch, by the number of rows
        for name, linear in self._linears.items():
            weight = weight_of(linear)
            quantized = weight if isinstance(weight, QuantizedWeight) else None  # a dense one may be exchanged
            linear.forward = functools.partial(self._forward, linear, quantized, pool.layer(name))

    @contextlib.contextmanager
    def batch(self, slots: Tensor, weights: Tensor | None = None) -> Iterator[None]:
        """While it is active, sequence i of every input of `model` uses the adapter in slot `slots[i]`.

        slots    `[B]` int32 on the model's device; -1 is the base model alone; or `[B, S]`, up to S adapters a sequence
        weights  as slots, fp32: what each adapter's term is multiplied by; None is 1

        A layer's input is `[..., K]` with B·T rows, the T tokens of sequence 0 first; T may differ from layer to layer.
        There is one `BatchPlan` for each T, made by the first layer that needs it and shared by the others. In a CUDA
        graph's capture, enter the batch inside of it: the plan is then made anew by each replay, from what `slots` holds.

        Raises TypeError or ValueError where slots or weights are not as above, RuntimeError while another batch is active,
        the model is in training mode, or the pool has been detached. The layers raise as `lora_linear_batched` does, and
        ValueError for rows that are no multiple of B.
        """
        if self._batch is not None:
            raise RuntimeError("batch: another one is active, expected one at a time; leave it first")
        if not self._linears:
            raise RuntimeError("batch: the pool is detached; attach it with attach_pool(model, pool)")
        if self._model.training:
            raise RuntimeError("batch: the model is in training mode, expected inference; call model.eval()")
        self._batch = BatchPlan(slots, weights)
        self._plans[len(slots)] = self._batch
        try:
            yield
        finally:
            self._batch = None
            self._plans.clear()

    def detach(self) -> None:
        """Give the layers back their own `forward`. Raises RuntimeError in a batch, or if it has been done."""
        if self._batch is not None:
            raise RuntimeError("detach: a batch is active; leave it first")
        if not self._linears:
            raise RuntimeError("detach: the pool is detached already")
        for linear in self._linears.values():
            del linear.forward
        self._linears = {}

    def __reduce__(self):
        # A copy's layers would go on computing with this model's weights.
        raise TypeError("cannot copy or pickle a model with a pool attached; call detach() first")

    def _forward(
        self, linear: nn.Linear, quantized: QuantizedWeight | None, adapters: LayerAdapters, x: Tensor
    ) -> Tensor:
        if self._batch is None:
            return type(linear).forward(linear, x)
        plan = self._plan(x.shape[:-1].numel())
        weight = linear.weight if quantized is None else quantized
        return lora_linear_batched(x, weight, adapters, plan, bias=linear.bias)

    def _plan(self, rows: int) -> BatchPlan:
        if rows not in self._plans:
            sequences = len(self._batch)
            if not sequences or rows % sequences:
                raise ValueError(f"slots: got {sequences}, one a sequence, expected a divisor of a layer's {rows} rows")
            per_token = (
                None if t is None else t.repeat_interleave(rows // sequences, 0) for t in self._batch.parts[:2]
            )
            self._plans[rows] = BatchPlan(*per_token)
        return self._plans[rows]


def _linears_of(model, pool) -> dict[str, nn.Linear]:
    """The model's layer for each of the pool's: all there, and all fit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {}
    for name, shape in pool.layers.items():
        linear = modules.get(name)
        if linear is None:
            raise ValueError(
                f"model: has no layer {name}, which the pool has; make the pool with AdapterPool.for_model(model, ...)"
            )
        check_linear(f"model: {name}", linear)
        if "forward" in vars(linear):
            raise ValueError(
                f"model: {name} has another forward than nn.Linear's; if a pool is attached, call its detach() first"
            )
        if linear in linears.values():
            raise ValueError(f"model: {name} is the same layer as another of the pool's; leave one of the names out")
        weight = weight_of(linear)
        dtype = pool.dtype if isinstance(weight, QuantizedWeight) else weight.dtype  # that of x is another matter
        got, expected = (
            f"{k} -> {n}, {dtype}, {device}"
            for (k, n), dtype, device in (
                ((linear.in_features, linear.out_features), dtype, weight.device),
                (shape, pool.dtype, pool.device),
            )
        )
        if got != expected:
            raise ValueError(f"model: {name} is {got}, expected {expected}, as in the pool")
        linears[name] = linear
    return linears
