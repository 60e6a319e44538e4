"""Decoding over a base weight in NF4, the adapters in the same launch: csrc/cuda/nf4.cu.

No GPU has run it yet: it runs where backend="cuda" is asked for. It takes the tensors of bitsandbytes' layout as they are.
"""

import torch

from lora_kernels.backends import cuda_batched
from lora_kernels.backends.operands import on_16_bytes

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
STEP_K = 256  # kTurn


def reasons_unsupported(problem) -> list[str]:
    """Why this kernel cannot run a `problem` that `cuda_batched` can; empty if it can."""
    if problem.format != "nf4":
        return [f"no kernel of cuda / one_launch does it in its K loop, for {problem.format}"]
    if problem.k % 64:
        return [f"K = {problem.k}, and the kernel in whose K loop it is done takes multiples of 64"]
    return [f"its K loop cannot, for {problem.no_tile}"] if problem.no_tile else []


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters, for up to 16 rows and an `NF4Weight`; as `decode`."""
    x = x if on_16_bytes(x) else x.contiguous().clone()
    return decode(x, weight.packed, weight.scales(), weight.blocksize, bias, adapters, plan)


def decode(x, packed, absmax, blocksize, bias, adapters, plan):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters, for up to 16 rows; W stays in 4 bits.

    x          `[M, K]` bf16 or fp16, K a multiple of 64, rows on 16-byte boundaries
    packed     `[N K / 2]` uint8, of any shape, contiguous: W flattened, two elements a byte, the first in its high half
    absmax     `[N K / blocksize]` fp32, rounded up: what each block of W was divided by; nested absmax is to be expanded before
    blocksize  64, 128, ... 4096
    adapters   a tuple of LayerAdapters, one a slice of y's columns, whose widths add up to N; plan: a BatchPlan

    An element of W is the table's value, rounded to x's dtype, times absmax in fp32, which multiplies sums.
    Raises TypeError or ValueError for tensors that break the above, NotImplementedError for more rows or slices, RuntimeError
    with the name of CUDA's error where the launch fails.
    """
    m, n = len(x), sum(one.b.shape[1] for one in adapters)
    _check(x, packed, absmax, blocksize, adapters, n)
    if m > cuda_batched.MAX_ROWS:
        raise NotImplementedError(f"x: got {m} rows, expected at most {cuda_batched.MAX_ROWS}")
    given = dict(w=packed.data_ptr(), absmax=absmax.data_ptr(), block_shift=blocksize.bit_length() - 1)
    return cuda_batched.decode("lora_cuda_decode_nf4", x, n, bias, adapters, plan, STEP_K, **given)


def _check(x, packed, absmax, blocksize, adapters, n):
    k = x.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x: got {x.dtype}, expected torch.bfloat16 or torch.float16")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    if k % 64:
        raise ValueError(f"x: got {k} columns, expected a multiple of 64")
    expected = {"packed": (packed, torch.uint8, n * k // 2), "absmax": (absmax, torch.float32, -(-n * k // blocksize))}
    for name, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
        if tensor.numel() != size or not tensor.is_contiguous() or tensor.device != x.device:
            got = f"{tensor.numel()} elements of shape {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: got {got}, expected {size}, contiguous, on {x.device}")
    matrices = {"x": x, "packed": packed.view(1, -1)} | {f"adapters[{i}].a": one.a for i, one in enumerate(adapters)}
    for name, tensor in matrices.items():
        row = tensor.stride(-2) * tensor.element_size()
        if tensor.data_ptr() % 16 or row % 16 or tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got rows that are not on 16-byte boundaries")
    for i, one in enumerate(adapters):
        if one.a.shape[-1] != k or one.a.dtype != x.dtype:
            got = f"{one.a.dtype} with {one.a.shape[-1]} columns"
            raise ValueError(f"adapters[{i}].a: got {got}, expected {x.dtype} with {k}, as x")
