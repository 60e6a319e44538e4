"""The batched operation for the few rows of a decoding step, in one launch of a CUDA kernel: csrc/cuda/decode.cu.

On request only: it has not been timed on a GPU yet.
"""

import torch

from lora_kernels.backends import cuda_library
from lora_kernels.backends.cuda_library import DTYPES, MAX_SLICES, Decode, Slice
from lora_kernels.backends.launcher import counters
from lora_kernels.backends.operands import cdiv, row_major
from lora_kernels.backends.triton import device_guard, target

STRATEGIES = ("one_launch",)
MAX_ROWS = 16
TILE_N, TILE_R, STEP_K = 64, 16, 128  # kColumns, kRanks and kStep
MAX_PARTS, STEPS_A_PART = 8, 4  # kMaxParts; fewer steps would not fill a ring


def reasons_unsupported(problem) -> list[str]:
    """Why this backend cannot run `problem`; empty if it can."""
    if problem.device != "cuda":
        return [f"x is on {problem.device}, not a GPU"]
    if isinstance(reason := cuda_library.library(), str):
        return [reason]
    reasons = []
    if problem.capability < 80:
        reasons.append(f"sm_{problem.capability} is older than sm_80")
    if problem.dtype not in DTYPES:
        reasons.append(f"{problem.dtype} is neither torch.bfloat16 nor torch.float16")
    if problem.m > MAX_ROWS:
        reasons.append(f"{problem.m} rows are more than {MAX_ROWS}")
    return reasons


def strategy_reasons_unsupported(strategy, problem) -> list[str]:
    """Why `strategy` cannot run `problem`: never a reason."""
    return []


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters; `adapters` is a tuple, one a slice of y's columns.

    Raises NotImplementedError for more than 16 slices, RuntimeError with the name of CUDA's error where the launch fails.
    """
    stride_wn, stride_wk = weight.stride()
    given = dict(w=weight.data_ptr(), stride_wn=stride_wn, stride_wk=stride_wk)
    return decode("lora_cuda_decode", x, weight.shape[0], bias, adapters, plan, STEP_K, **given)


def decode(function, x, n, bias, adapters, plan, step_k, **given):
    """`y [M,n]` by a C function of the library; W is what the other fields of its struct, `given`, say."""
    if len(adapters) > MAX_SLICES:
        raise NotImplementedError(f"adapters: got {len(adapters)} slices, the cuda backend has at most {MAX_SLICES}")
    (m, k), entries = x.shape, plan.slots.numel()
    y = x.new_empty(m, n)
    if not y.numel():
        return y
    x, bias = row_major(x), None if bias is None else bias.contiguous()
    slices, stride_h = (Slice * MAX_SLICES)(), 0
    for i, s in enumerate(adapters):
        slices[i] = (
            s.a.data_ptr(), s.b.data_ptr(), s.first_row.data_ptr(), s.ranks.data_ptr(), s.scalings.data_ptr(),
            s.b.shape[1], *s.strides_b, s.max_rank, stride_h,
        )  # fmt: skip
        stride_h += cdiv(s.max_rank, TILE_R) * TILE_R
    num_sms, num_slots = target(x.device).num_sms, len(adapters[0].ranks)
    tiles = sum(cdiv(s.b.shape[1], TILE_N) for s in adapters)
    parts = parts_of(tiles, cdiv(k, step_k), num_sms)
    blocks_of_ranks = max(cdiv(s.max_rank, TILE_R) for s in adapters)
    units = blocks_of_ranks * min(entries, num_slots) * len(adapters) * parts
    on_gpu = x.device.type == "cuda"
    with device_guard(x.device):
        planes = x.new_empty(parts, entries, stride_h, dtype=torch.float32)
        spill = x.new_empty(tiles, parts, TILE_N, 8 * cdiv(m, 8), dtype=torch.float32)
        problem = Decode(
            x=x.data_ptr(), bias=None if bias is None else bias.data_ptr(), y=y.data_ptr(), slots=plan.slots.data_ptr(),
            segment=plan.segment.data_ptr(), distinct=plan.distinct.data_ptr(),
            weights=None if plan.weights is None else plan.weights.data_ptr(), planes=planes.data_ptr(),
            spill=spill.data_ptr(), arrived=counters(x.device, tiles + 1).data_ptr(), rows=m, k=k, stride_x=x.stride(0),
            stride_y=y.stride(0), stride_h=stride_h, adapters_per_row=plan.adapters_per_row, num_slots=num_slots,
            num_slices=len(adapters), tiles=tiles, parts=parts, shrinks=max(1, min(units, num_sms)), dtype=DTYPES[x.dtype],
            device=x.get_device() if on_gpu else 0, slices=slices, **given,
        )  # fmt: skip
        stream = torch.cuda.current_stream(x.device).cuda_stream if on_gpu else None
        error = getattr(cuda_library.library(), function)(problem, stream)
    if error:
        raise RuntimeError(f"lora_linear_batched: the CUDA kernel could not be launched: {error.decode()}")
    return y


def parts_of(tiles: int, steps: int, num_sms: int) -> int:
    """Into how many parts a tile's sum over K is cut so that the SMs share them out evenly; whatever the batch."""

    def evenness(parts):
        blocks = tiles * parts
        return round(blocks / (cdiv(blocks, num_sms) * num_sms), 1)

    most = max(1, min(MAX_PARTS, steps // STEPS_A_PART))
    return max(range(1, most + 1), key=lambda parts: (evenness(parts), -parts))
