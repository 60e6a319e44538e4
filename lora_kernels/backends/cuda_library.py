"""The compiled library of the CUDA kernels; csrc/lora.h holds its structs. It loads where there is no driver, too."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from lora_kernels.backends.cpu_library import ABI

PATH = Path(__file__).resolve().parent.parent / "_cuda.so"
MAX_SLICES = 16
DTYPES = {torch.bfloat16: 1, torch.float16: 2}


class Slice(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "first_row", "ranks", "scalings")),
        *((name, c_int64) for name in ("width", "stride_bn", "stride_br", "max_rank", "first_rank")),
    ]


class Decode(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "w", "bias", "absmax", "y", "slots", "segment", "distinct", "weights")),
        *((name, c_void_p) for name in ("planes", "spill", "arrived")),
        *((name, c_int64) for name in ("rows", "k", "stride_x", "stride_y", "stride_wn", "stride_wk", "stride_h")),
        *((name, c_int32) for name in ("adapters_per_row", "num_slots", "num_slices", "tiles", "parts", "shrinks")),
        *((name, c_int32) for name in ("dtype", "device", "block_shift")),
        ("slices", Slice * MAX_SLICES),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not PATH.exists():
        return "lora_kernels was installed without its CUDA kernels (install nvcc, then lora_kernels again)"
    try:
        found = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"its library does not load: {error}"
    if found.lora_cuda_abi() != ABI:
        return (
            f"its library is of other sources (version {found.lora_cuda_abi()}, expected {ABI}): "
            "install lora_kernels again"
        )
    found.lora_cuda_architectures.restype = c_char_p
    for launch in (found.lora_cuda_decode, found.lora_cuda_decode_nf4):
        launch.argtypes = (POINTER(Decode), c_void_p)
        launch.restype = c_char_p
    return found


def architectures() -> str:
    """Those that the library was built for."""
    return library().lora_cuda_architectures().decode()
