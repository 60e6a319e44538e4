"""What a config needs to be legal, as far as that is known without compiling; the static gate compiles what passes.

The tile tables, tuned tables, the tuner and the backend's own limits all ask here.
"""

from lora_kernels.configs import INTERPRETER, Config

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one block may opt in to
MAX_REGISTERS = 255  # of a thread
MAX_RANK = {"single_pass": 64, "one_launch": 64, "dy_pass": 32}  # where it is not that of the package
MAX_ROWS = dict.fromkeys(("batched_one_launch", "quantized_extended", "quantized_batched_one_launch"), 256)
LONGEST_RANK = 512

_TILE = ("block_m", "block_n", "block_k")
EXTENTS = {  # that a kernel's tile has
    "shrink": ("block_m", "block_k"),
    "extended": _TILE,
    "single_pass": _TILE,
    "one_launch": _TILE,
    "dy_pass": ("block_m", "block_n"),
    "wgrad": ("block_m", "block_n"),
    "batched_shrink": _TILE,
    "batched_one_launch": _TILE,
    "batched_extended": _TILE,
    "batched_chained": ("block_m", "block_n"),
    "quantized_extended": _TILE,
    "quantized_batched_one_launch": _TILE,
    "dequantize": ("block_m", "block_k"),
}
KERNELS = tuple(EXTENTS)
HALVES = ("extended", "single_pass", "one_launch", "quantized_extended")  # kernels that can store a tile in two halves
NO_DROPOUT = ("single_pass", "one_launch")


def reasons_illegal(
    kernel: str, config: Config, capability: int, itemsize: int, r: int, m: int = 1, dropout: bool = False
) -> list[str]:
    """Why `config` cannot run `kernel` with rank r on m rows of `itemsize`-byte elements; empty if nothing is known."""
    if kernel not in KERNELS:
        return [f"no kernel {kernel!r}, expected one of {', '.join(KERNELS)}"]
    return [
        *_limits(kernel, capability, itemsize, r, m, dropout),
        *_shape(kernel, config),
        *(_resources(kernel, config, capability, itemsize) if capability != INTERPRETER else ()),
    ]


def _limits(kernel, capability, itemsize, r, m, dropout):
    if r > (most := MAX_RANK.get(kernel, LONGEST_RANK)):
        yield f"rank {r} > {most}"
    if m > (most := MAX_ROWS.get(kernel, m)):
        yield f"{m} rows > {most}"
    if dropout and kernel in NO_DROPOUT:
        yield f"{kernel} has no dropout"
    if kernel == "one_launch" and capability != INTERPRETER and (capability < 90 or itemsize != 2):
        yield "one_launch needs TMA and 2-byte elements"


def _shape(kernel, config):
    for name in _TILE:
        extent = getattr(config, name)
        if name not in EXTENTS[kernel]:
            if extent:
                yield f"{name}={extent}, but {kernel} has none"
        elif extent < 16 or extent.bit_count() != 1:
            yield f"{name}={extent}, expected a power of two from 16 on"
    if kernel == "batched_shrink" and config.block_n < 32:
        yield f"block_n={config.block_n}, expected at least 32, the widest block of ranks"
    if config.num_warps not in (1, 2, 4, 8):
        yield f"num_warps={config.num_warps}, expected 1, 2, 4 or 8"
    fewest = 2 if kernel == "one_launch" else 1  # its shrink loop runs with one stage less
    if config.num_stages < fewest:
        yield f"num_stages={config.num_stages}, expected at least {fewest}"
    if config.group_m < 1:
        yield f"group_m={config.group_m}, expected at least 1"
    if config.halves and kernel not in HALVES:
        yield f"halves=True, but {kernel} stores whole tiles"
    if config.max_registers is not None and not 16 <= config.max_registers <= MAX_REGISTERS:
        yield f"max_registers={config.max_registers}, expected 16 to {MAX_REGISTERS}"


def _resources(kernel, config, capability, itemsize):
    """Lower bounds: the operands of the loop in shared memory, the accumulator in registers."""
    known = max((arch for arch in SHARED_LIMIT if arch <= capability), default=min(SHARED_LIMIT))
    m, n, k = config.block_m, config.block_n, config.block_k
    operands = m * k + n * k if k else m * n if kernel in ("dy_pass", "wgrad") else 0
    buffers = config.num_stages if known >= 90 else max(config.num_stages - 1, 1)
    if config.num_stages > 1 and (shared := buffers * operands * itemsize) > SHARED_LIMIT[known]:
        yield f"shared memory: at least {shared} B > {SHARED_LIMIT[known]} B"
    if n and k and known < 100:  # from sm_100 on it lies in tensor memory
        accumulator = m * n // (32 * config.num_warps)
        if accumulator >= MAX_REGISTERS:
            yield f"the accumulator alone takes {accumulator} registers a thread"
