"""Continuous batching: requests join and leave a running batch, each with its own adapter."""

from collections import deque
from dataclasses import dataclass, field

import torch
from transformers import Cache

from lora_kernels import AdapterPool, PoolFullError, attach_pool


@dataclass(eq=False)
class Request:
    """Greedy decoding of `prompt` with an adapter, up to `new_tokens` tokens or a stop token."""

    adapter: str | None  # None is the base model
    prompt: list[int]
    new_tokens: int
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    fed: int = 0  # tokens whose keys and values are in the cache

    @property
    def pending(self) -> list[int]:
        """What the model has not seen yet: the prompt at first, later the last token."""
        return [*self.prompt, *self.tokens][self.fed :]


class RowCache(Cache):
    """Keys and values of one request a row, each row written at positions of its own."""

    def __init__(self, config, rows: int, length: int, dtype, device):
        super().__init__(layers=[])
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.states = torch.zeros(config.num_hidden_layers, 2, rows, heads, length, width, dtype=dtype, device=device)

    def place(self, first: int, positions: torch.Tensor) -> torch.Tensor:
        """Write the next tokens into rows `first` and on, at `positions [B, T]`; returns the mask `[B, 1, T, length]`."""
        self.rows = slice(first, first + len(positions))
        self.positions, self.length = positions, int(positions.max()) + 1
        return torch.arange(self.length, device=positions.device) <= positions[:, None, :, None]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        batch = torch.arange(len(keys), device=keys.device)[:, None]
        states = self.states[layer_idx, :, self.rows]
        for state, new in zip(states, (keys, values), strict=True):
            state[batch, :, self.positions] = new.transpose(1, 2)
        return states[..., : self.length, :].unbind()

    def move(self, source: int, target: int):
        self.states[:, :, target] = self.states[:, :, source]


class Engine:
    """A model and its pool, serving up to `rows` requests of up to `length` tokens at a time.

    Row i of the cache is that of `running[i]`; where a request leaves, the last one takes its row.
    """

    def __init__(self, model, pool: AdapterPool, rows: int, length: int):
        self.model, self.pool, self.rows = model, pool, rows
        self.cache = RowCache(model.config, rows, length, model.dtype, model.device)
        self.queue, self.running = deque(), []
        self.refused, self.generated, self.history = 0, 0, []
        stop = model.generation_config.eos_token_id
        self.stop_tokens = set(stop if isinstance(stop, list) else [stop])
        self.serving = attach_pool(model, pool)

    def submit(self, request: Request):
        self.queue.append(request)
        if request.adapter is not None:
            self.pool.prefetch(request.adapter)

    def close(self):
        self.serving.detach()

    @torch.inference_mode()
    def step(self):
        """Let in whom the pool has a slot for, and give every running request its next token."""
        joining = self._admit()
        if joining:
            self._advance(joining, len(self.running))
            self.running += joining
        self._retire()
        if self.running:
            self.history.append((len(self.running), len({request.adapter for request in self.running})))
            self._advance(self.running, 0)
            self._retire()

    def _admit(self) -> list[Request]:
        joining = []
        for request in list(self.queue):
            if len(self.running) + len(joining) == self.rows:
                break
            try:
                request.slot = -1 if request.adapter is None else self.pool.acquire(request.adapter)
            except PoolFullError:
                self.refused += 1  # it stays in the queue; a later one whose adapter is there may go first
                continue
            self.queue.remove(request)
            joining.append(request)
        return joining

    def _advance(self, requests, first_row):
        """Feed the pending tokens of each request, padded at the end: a pad's place is overwritten before it is read."""
        lengths = torch.tensor([len(request.pending) for request in requests])
        tokens = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.pending)] = torch.tensor(request.pending)
        positions = torch.tensor([[request.fed] for request in requests]) + torch.arange(tokens.shape[1])
        slots = torch.tensor([request.slot for request in requests], dtype=torch.int32)
        tokens, positions, slots = (tensor.to(self.model.device) for tensor in (tokens, positions, slots))
        mask = self.cache.place(first_row, positions)
        with self.serving.batch(slots):
            logits = self.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
            ).logits
        last = logits[torch.arange(len(requests)), lengths - 1].argmax(-1)
        for request, length, token in zip(requests, lengths.tolist(), last.tolist(), strict=True):
            request.fed += length
            request.tokens.append(token)
        self.generated += len(requests)

    def _retire(self):
        for row in reversed(range(len(self.running))):
            request = self.running[row]
            if len(request.tokens) < request.new_tokens and request.tokens[-1] not in self.stop_tokens:
                continue
            if request.adapter is not None:
                self.pool.release(request.adapter)
            last = self.running.pop()
            if last is not request:
                self.running[row] = last
                self.cache.move(len(self.running), row)
