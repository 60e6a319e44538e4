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
    "not a mapping": ([A, B], TypeError, r"adapter 'x': got a list, expected \{layer: \(lora_a, lora_b, scaling\)\}"),
    "unknown layer": ({"q": (A, B, 1.0), "k": (A, B, 1.0)}, ValueError, "'k': is no layer of this pool, which has 'q'"),
    "no scaling": ({"q": (A, B)}, TypeError, r"'q': got a tuple, expected a triple \(lora_a, lora_b, scaling\)"),
    "not a tensor": ({"q": (A, [1.0], 1.0)}, TypeError, "'q': lora_B is list, expected a dense tensor"),
    "integers": ({"q": (A.int(), B, 1.0)}, TypeError, "'q': lora_A is torch.int32, expected a dense tensor"),
    "sparse": ({"q": (A.to_sparse(), B, 1.0)}, TypeError, "'q': lora_A is torch.float32, expected a dense"),
    "no data": ({"q": (A, B.to("meta"), 1.0)}, ValueError, "'q': lora_B is a meta tensor, expected one with data"),
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
    "scaling is true": ({"q": (A, B, True)}, TypeError, "'q': scaling is bool, expected a number"),
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
    "long name": (
        lambda pool: pool.load_tensors("x" * 10**6, {}), ValueError, r"^adapter 'x{76}\.\.\.: got no tensors.{,60}$",
    ),
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
    "layers are a list": (dict(layers=["q"]), TypeError, r"layers: got \['q'\], expected \{name: \(in_features"),
    "no layers": (dict(layers={}), ValueError, "layers: got none"),
    "layer is a number": (dict(layers={"q": 8}), TypeError, r"layers: q is 8, expected \(in_features, out_features\)"),
    "layer of no width": (dict(layers={"q": (8, 0)}), ValueError, "layers: q: out_features: got 0"),
    "layer name": (dict(layers={0: (8, 8)}), TypeError, "layers: got the name 0, expected a str"),
    "no slots": (dict(slots=0), ValueError, "slots: got 0, expected an int from 1"),
    "slots are a float": (dict(slots=2.0), TypeError, "slots: got float"),
    "max_rank 0": (dict(max_rank=0), ValueError, "max_rank: got 0, expected an int from 1 to 512"),
    "max_rank 513": (dict(max_rank=513), ValueError, "max_rank: got 513"),
    "no rows": (dict(rows=0), ValueError, "rows: got 0, expected an int from 1"),
    "too few rows": (dict(rows=3), ValueError, "rows: got 3, expected at least 4, the max_rank"),
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


def edit_bytes(edit):
    """A change of the weights file: `edit(header length, header, data)` gives the new ones."""

    def spoil(directory):
        path = directory / "adapter_model.safetensors"
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        length, header, data = edit(end - 8, whole[8:end], whole[end:])
        path.write_bytes(length.to_bytes(8, "little") + header + data)

    return spoil


def header(length):
    return edit_bytes(lambda _, header, data: (length, header, data))


def edit_header(edit):
    def spoil(length, header, data):
        fields = json.loads(header)
        edit(fields)
        header = json.dumps(fields).encode()
        return len(header), header, data

    return edit_bytes(spoil)


def first_shape(shape):
    return edit_header(lambda fields: fields["base_model.model.q.lora_A.weight"].update(shape=shape))


@edit_header
def overlapping(fields):
    a, b = (fields[f"base_model.model.q.lora_{which}.weight"] for which in "AB")
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + 72]


def edit_text(old, new):
    def spoil(directory):
        path = directory / "adapter_config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def pad_config(directory):
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().ljust(2**22 + 1))


BAD_FILES = {
    "header past any memory": (header(2**63), ValueError, "not a safetensors file .*header too large"),
    "header past the file": (header(10**6), ValueError, "not a safetensors file"),
    "shape past any memory": (first_shape([2**40, 2**40]), ValueError, "not a safetensors file .*overflow"),
    "two tensors share memory": (overlapping, ValueError, "not a safetensors file .*invalid offset"),
    "a field twice": (edit_text('"r": 3', '"r": 3, "r": 4'), ValueError, r"not valid JSON \('r' is there twice\)"),
    "a layer's rank twice": (
        edit_text('_pattern": {}', '_pattern": {"q": 3, "q": 2}'),
        ValueError, r"not valid JSON \('q' is there twice\)",
    ),
    "endless config": (pad_config, ValueError, "has 4194305 bytes, expected at most 4194304"),
    "truncated": (truncate, ValueError, "not a safetensors file"),
    "pickle": (as_pickle, ValueError, r"holds a pickle \(\.bin\)"),
    "config is gone": (lambda d: (d / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
    "NaN": (edits({"q.lora_A.weight": torch.full((3, 8), math.nan)}), ValueError, "q: lora_A has NaN"),
    "too large for fp16": (edits({"q.lora_B.weight": torch.full((6, 3), 7e4)}), ValueError, "Inf in torch.float16"),
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
    "path in a name": (
        edits({"/etc/q.lora_A.weight": torch.ones(3, 8), "/etc/q.lora_B.weight": torch.ones(6, 3)}),
        ValueError, r"'/etc/q': is no layer of this pool",
    ),
    "line in a name": (edits({"q\n.lora_A.weight": torch.ones(3, 8)}), ValueError, r"holds 'base_model\.model\.q\\n\."),
    "endless name": (edits({"q." * 300 + "lora_A.weight": torch.ones(3, 8)}), ValueError, r"holds 'base_model.{,66}\.\.\., ex"),
    "rank_pattern": (lambda d: edit_config(d, rank_pattern={"q": 2}), ValueError, r"\[3, 8\], expected \[2, K\] from r = 2"),
    "another rank in config": (lambda d: edit_config(d, r=2), ValueError, r"\[3, 8\], expected \[2, K\] from r = 2"),
    "rank past max_rank": (lambda d: save(d, r=5), ValueError, "rank is 5, expected 1 <= rank <= 4"),
    "DoRA": (lambda d: edit_config(d, use_dora=True), NotImplementedError, "use_dora"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_change_nothing(case, tmp_path):
    pytest.importorskip("safetensors")
    spoil, error, message = BAD_FILES[case]
    save(tmp_path)
    pool = pool_of(2, dtype=torch.float16)
    pool.acquire("a")
    spoil(tmp_path)
    with refused(pool, error, message):
        pool.load("x", tmp_path)
