"""Bad input of the adapter pool: refused with argument, got and expected, and nothing changed."""

import json
import math

import pytest
import torch
from test_pool import LAYERS, make_adapter, pool_of, refused, save

from lora_kernels.adapters.pool import AdapterPool

A, B = torch.ones(2, 8), torch.ones(6, 2)
BAD_TENSORS = {
    "nothing": ({}, ValueError, "adapter 'x': got no tensors"),
    "unknown layer": ({"q": (A, B, 1.0), "k": (A, B, 1.0)}, ValueError, "'k': is no layer of this pool, which has 'q'"),
    "no scaling": ({"q": (A, B)}, TypeError, r"'q': got a tuple, expected a triple \(lora_a, lora_b, scaling\)"),
    "not a tensor": ({"q": (A, [1.0], 1.0)}, TypeError, "'q': lora_B is list, expected a dense tensor"),
    "integers": ({"q": (A.int(), B, 1.0)}, TypeError, "'q': lora_A is torch.int32, expected a dense tensor"),
    "sparse": ({"q": (A.to_sparse(), B, 1.0)}, TypeError, "'q': lora_A is torch.float32, expected a dense"),
    "another K": ({"q": (A[:, :7], B, 1.0)}, ValueError, r"lora_A is \[2, 7\] .*expected \[R, 8\] and \[6, R\]"),
    "another N": ({"v": (A, B, 1.0)}, ValueError, r"'v': .*lora_B \[6, 2\], expected \[R, 8\] and \[3, R\]"),
    "ranks differ": ({"q": (A[:1], B, 1.0)}, ValueError, r"lora_A is \[1, 8\] and lora_B \[6, 2\]"),
    "transposed": ({"q": (A.mT, B.mT, 1.0)}, ValueError, r"lora_A is \[8, 2\]"),
    "3-D": ({"q": (A[None], B, 1.0)}, ValueError, r"lora_A is \[1, 2, 8\]"),
    "0-d": ({"q": (A[0, 0], B, 1.0)}, ValueError, r"lora_A is \[\]"),
    "rank 0": ({"q": (A[:0], B[:, :0], 1.0)}, ValueError, "rank is 0, expected 1 <= rank <= 4"),
    "rank too large": ({"q": (A.repeat(3, 1), B.repeat(1, 3), 1.0)}, ValueError, "rank is 6, expected 1 <= rank <= 4"),
    "NaN": ({"q": (A * math.nan, B, 1.0)}, ValueError, "'x': q: lora_A has NaN or Inf in torch.float16"),
    "Inf": ({"q": (A, B / 0, 1.0)}, ValueError, "q: lora_B has NaN or Inf"),
    "too large for fp16": ({"q": (A, B * 7e4, 1.0)}, ValueError, r"Inf in torch.float16 \(from torch.float32\)"),
    "scaling is a tensor": ({"q": (A, B, torch.ones(()))}, TypeError, "'q': scaling is Tensor, expected a number"),
    "scaling is NaN": ({"q": (A, B, math.nan)}, ValueError, "scaling is nan, expected a finite fp32 number >= 0"),
    "scaling is negative": ({"q": (A, B, -1.0)}, ValueError, "scaling is -1.0"),
    "scaling is past fp32": ({"q": (A, B, 1e39)}, ValueError, r"scaling is 1e\+39"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_change_nothing(case):
    tensors, error, message = BAD_TENSORS[case]
    pool = pool_of(1, dtype=torch.float16)
    pool.acquire("a")
    with refused(pool, error, message):
        pool.load_tensors("x", tensors)
    pool.load_tensors("x", {"q": (A, B, 1.0)})


BAD_CALLS = {
    "acquire unknown": (lambda pool: pool.acquire("z"), LookupError, "got 'z', expected a loaded one: 'a', 'b', 'c'"),
    "prefetch unknown": (lambda pool: pool.prefetch("z"), LookupError, "got 'z'"),
    "release unknown": (lambda pool: pool.release("z"), LookupError, "got 'z'"),
    "unload unknown": (lambda pool: pool.unload("z"), LookupError, "got 'z'"),
    "using unknown": (lambda pool: pool.using("z").__enter__(), LookupError, "got 'z'"),
    "unknown layer": (lambda pool: pool.layer("k"), LookupError, "layer: got 'k', expected one of 'q', 'v'"),
    "release twice": (lambda pool: pool.release("b"), RuntimeError, "name: 'b' is not acquired, expected one acquire"),
    "release, not resident": (lambda pool: pool.release("c"), RuntimeError, "'c' is not acquired"),
    "unload acquired": (lambda pool: pool.unload("a"), RuntimeError, "'a' is in use, acquired 2 times; release it"),
    "taken name": (lambda pool: pool.load_tensors("a", make_adapter(0)), ValueError, "'a' is loaded already; unload"),
    "taken name of a file": (lambda pool: pool.load("a", "nowhere"), ValueError, "name: 'a' is loaded already"),
    "empty name": (lambda pool: pool.load_tensors("", make_adapter(0)), TypeError, "name: got '', expected a str"),
    "name is a number": (lambda pool: pool.load_tensors(3, make_adapter(0)), TypeError, "name: got 3, expected a str"),
    "no such directory": (lambda pool: pool.load("x", "nowhere"), FileNotFoundError, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_change_nothing(case):
    action, error, message = BAD_CALLS[case]
    pool = pool_of(3)
    pool.acquire("a"), pool.acquire("a"), pool.acquire("b"), pool.release("b")
    with refused(pool, error, message):
        action(pool)


BAD_POOLS = {
    "no layers": (dict(layers={}), ValueError, "layers: got none"),
    "layer is a number": (dict(layers={"q": 8}), TypeError, r"layers: q is 8, expected \(in_features, out_features\)"),
    "layer of no width": (dict(layers={"q": (8, 0)}), ValueError, "layers: q: out_features: got 0"),
    "layer name": (dict(layers={0: (8, 8)}), TypeError, "layers: got the name 0, expected a str"),
    "no slots": (dict(slots=0), ValueError, "slots: got 0, expected an int from 1"),
    "slots are a float": (dict(slots=2.0), TypeError, "slots: got float"),
    "max_rank 0": (dict(max_rank=0), ValueError, "max_rank: got 0, expected an int from 1 to 512"),
    "max_rank 513": (dict(max_rank=513), ValueError, "max_rank: got 513"),
    "int8": (dict(dtype=torch.int8), TypeError, "dtype: got torch.int8, expected one of torch.float16"),
    "meta": (dict(device="meta"), ValueError, "device: got meta, expected a CPU or CUDA device"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POOLS)
def test_bad_pools(case):
    change, error, message = BAD_POOLS[case]
    with pytest.raises(error, match=message):
        AdapterPool(**{"layers": LAYERS, "slots": 2, "max_rank": 4, **change})


def edit_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edits(tensors):
    return lambda directory: edit_tensors(directory, tensors)


def edit_tensors(directory, tensors):
    files = pytest.importorskip("safetensors.torch")
    path = directory / "adapter_model.safetensors"
    edited = files.load_file(path) | {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    files.save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, path)


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def as_pickle(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


BAD_FILES = {
    "truncated": (truncate, ValueError, "not a safetensors file"),
    "pickle": (as_pickle, ValueError, r"holds a pickle \(\.bin\)"),
    "config is gone": (lambda d: (d / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
    "NaN": (edits({"q.lora_A.weight": torch.full((3, 8), math.nan)}), ValueError, "q: lora_A has NaN"),
    "wrong shape": (edits({"q.lora_B.weight": torch.ones(7, 3)}), ValueError, r"lora_B \[7, 3\]"),
    "no shape": (edits({"q.lora_A.weight": torch.ones(())}), ValueError, r"'q' has lora_A \[\], expected \[3, K\]"),
    "integers": (edits({"q.lora_A.weight": torch.ones(3, 8).int()}), ValueError, "is torch.int32"),
    "A alone": (edits({"q.lora_B.weight": None}), ValueError, "only one of lora_A and lora_B"),
    "target without tensors": (
        edits({"q.lora_A.weight": None, "q.lora_B.weight": None}),
        ValueError, "has no tensors for q, which its target_modules lists",
    ),
    "unknown layer": (
        edits({"../k.lora_A.weight": torch.ones(3, 8), "../k.lora_B.weight": torch.ones(6, 3)}),
        ValueError, r"'\.\./k': is no layer of this pool",
    ),
    "another rank in config": (lambda d: edit_config(d, r=2), ValueError, r"\[3, 8\], expected \[2, K\] from r = 2"),
    "rank past max_rank": (lambda d: save(d, r=5), ValueError, "rank is 5, expected 1 <= rank <= 4"),
    "DoRA": (lambda d: edit_config(d, use_dora=True), NotImplementedError, "use_dora"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_change_nothing(case, tmp_path):
    pytest.importorskip("safetensors")
    spoil, error, message = BAD_FILES[case]
    save(tmp_path)
    pool = pool_of(2)
    pool.acquire("a")
    spoil(tmp_path)
    with refused(pool, error, message):
        pool.load("x", tmp_path)
