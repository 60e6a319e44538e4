"""Compile a Triton launch for an architecture that need not be here, measure its machine code and judge it.

What is checked, what it has caught, and what it cannot see: docs/static_gate.md.
"""

import collections
import contextlib
import io
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lora_kernels.configs.legality import SHARED_LIMIT

REGISTER_FILE = 65_536
TENSOR_MEMORY_COLUMNS = 512
MMA = ("HMMA.", "HGMMA.", "UTCHMMA")  # mma.sync, wgmma, tcgen05
ASYNC_COPY = ("LDGSTS.", "UTMALDG.")  # cp.async, TMA
LOAD = ("LDG.", "LDGSTS.")
_BUFFERS = re.compile(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
LOAD_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Code(NamedTuple):
    """A compiled kernel: `asm` by stage, Triton's metadata, and what ptxas said."""

    asm: dict[str, Any]
    metadata: Any
    ptxas_log: str
    capability: int


@dataclass(frozen=True)
class Figures:
    """What the code needs; from `mma` on, of its main loops: the innermost ones with an MMA, if possible pipelined."""

    registers: int
    spills: int  # bytes
    stack: int  # bytes
    shared: int  # bytes
    mma: dict[str, int]  # instruction -> how often
    buffers: int  # tiles of one operand in shared memory at a time
    wait_depth: int | None  # the fewest wgmma groups that a wait leaves in flight
    async_copies: int  # instructions
    narrowest_load: int | None  # bytes
    loop_length: int  # instructions, of the longest


def specialise(kernel, args: tuple, constants: dict, config, capability: int):
    """The source and options that `kernel[grid](*args, **constants, **config.options)` compiles."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **constants, **config.options)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), options


def compile_launch(kernel, args: tuple, constants: dict, config, capability: int, keep: bool = False) -> Code:
    """Compile a launch for sm_`capability`, exactly as Triton would on such a device.

    With `keep` the binary goes to Triton's own cache, where a launch on such a device finds it.
    """
    source, options = specialise(kernel, args, constants, config, capability)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.compilation.always_compile = True  # a cached binary comes without its ptxas log
        if not keep:
            knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
    return Code(compiled.asm, compiled.metadata, log.getvalue(), capability)


def measure(code: Code) -> Figures:
    has_mma = any(dot.tensor_core for loop in _dot_loops(code.asm["ttir"]) for dot in loop.dots)
    loops = (
        main_loops(*disassemble(code.asm["cubin"]).values()) if has_mma else []
    )  # a third of the time goes into this
    body = [instruction for loop in loops for instruction in loop]
    used = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", code.ptxas_log)
    stack, stored, loaded = map(int, used.groups())
    return Figures(
        registers=int(re.search(r"Used (\d+) registers", code.ptxas_log)[1]),
        spills=stored + loaded,
        stack=stack,
        shared=code.metadata.shared,
        mma=dict(collections.Counter(_mma_name(i.opcode) for i in body if i.opcode.startswith(MMA))),
        buffers=max(map(int, _BUFFERS.findall(code.asm["ttgir"])), default=1),
        wait_depth=min((int(n, 16) for i in body for n in re.findall(r"gsb0,0x(\w+)", i.operands)), default=None),
        async_copies=count(body, ASYNC_COPY),
        narrowest_load=min((_load_bytes(i.opcode) for i in body if i.opcode.startswith(LOAD)), default=None),
        loop_length=max(map(len, loops), default=0),
    )


def judge(code: Code, figures: Figures, aligned: bool = True) -> list[str]:
    """What is wrong with the code, empty if nothing; `aligned` says that every row begins on a 16-byte boundary."""
    problems = [f"ptxas {number}: {advice}" for number, advice in re.findall(r"\((C75\d\d)\) (.*)", code.ptxas_log)]
    if figures.spills or figures.stack:
        problems.append(f"spills {figures.spills} B, stack {figures.stack} B")
    threads = 32 * code.metadata.num_warps
    if figures.registers * threads > REGISTER_FILE:
        problems.append(f"{figures.registers} registers x {threads} threads > {REGISTER_FILE}")
    if figures.shared > SHARED_LIMIT[code.capability]:
        problems.append(f"shared memory {figures.shared} B > {SHARED_LIMIT[code.capability]} B")
    if code.metadata.tmem_size > TENSOR_MEMORY_COLUMNS:
        problems.append(f"tensor memory {code.metadata.tmem_size} columns > {TENSOR_MEMORY_COLUMNS}")
    if re.search(r"\.f64\s", code.asm["ptx"]):
        problems.append("fp64 arithmetic")
    problems += [f"TMA box {box} != tile {tile} in shared memory" for box, tile in _tma_copies(code) if box != tile]
    return problems + _judge_main_loops(code, figures, aligned)


def _judge_main_loops(code, figures, aligned):
    """Half precision only: wgmma takes tf32 operands K-major alone, so half of those go through registers."""
    loops = [loop for loop in _dot_loops(code.asm["ttir"]) if any(dot.half for dot in loop.dots)]
    dots = [dot for loop in loops for dot in loop.dots]
    missing = {_wanted_mma(dot, code) for dot in dots} - figures.mma.keys()
    found = ", ".join(figures.mma) or "scalar code"
    problems = [f"no {name} in the main loop, only {found}" for name in sorted(missing)]
    if not aligned or not any((loop.num_stages or code.metadata.num_stages) > 1 for loop in loops):
        return problems
    if not figures.async_copies or figures.buffers < 2:
        problems.append(f"not pipelined: {figures.async_copies} asynchronous copies into {figures.buffers} buffer(s)")
    if figures.wait_depth == 0 and all(dot.accumulates for dot in dots):
        problems.append("the main loop waits for all wgmma in flight")
    if figures.narrowest_load is not None and figures.narrowest_load < _widest_load(code):
        problems.append(f"a load of {figures.narrowest_load} B in the main loop")
    return problems


def _widest_load(code) -> int:
    """What the loads should be as wide as: 16 bytes, or less where the smallest tile has fewer for each thread."""
    tiles = re.findall(r"(?:tt\.load|async_copy_global).*: tensor<(\d+)x(\d+)x!tt\.ptr<\w*?(\d+)>", code.asm["ttgir"])
    smallest = min((int(rows) * int(columns) * int(bits) // 8 for rows, columns, bits in tiles), default=2**31)
    return min(16, smallest // (32 * code.metadata.num_warps))


class _Dot(NamedTuple):
    """A `tt.dot` with result `[m, n]`; `accumulates` over a loop's iterations, rather than being read in each."""

    m: int
    n: int
    half: bool
    tensor_core: bool
    accumulates: bool


class _Region:
    """A region of the TTIR: its dots, also those in branches, and whether a loop inside it has dots of its own."""

    def __init__(self, header):
        self.is_loop = "scf.for" in header or header.startswith("} do")
        self.carried = set(re.findall(r"(%[\w#]+) = ", header.partition("iter_args")[2]))
        self.dots: list[_Dot] = []
        self.has_dot_loop = False
        self.num_stages = None  # its own; None where the launch's applies


_DOT = re.compile(r"tt\.dot \S+ \S+ (%[^,\s]+).* : tensor<\w+x(\w+)> \* .* -> tensor<(\d+)x(\d+)x")


def _dot_loops(ttir) -> list[_Region]:
    """The innermost loops with dots: those that Triton pipelines."""
    loops, stack = [], []
    for line in ttir.splitlines():
        line = line.partition(" loc(")[0].strip()
        if line.startswith("}") and stack:
            region = stack.pop()
            if stages := re.search(r"tt\.num_stages = (\d+)", line):
                region.num_stages = int(stages[1])
            if region.is_loop and region.dots and not region.has_dot_loop:
                loops.append(region)
            if stack:
                stack[-1].has_dot_loop |= region.has_dot_loop or (region.is_loop and bool(region.dots))
                stack[-1].dots += [] if region.is_loop else region.dots
        if line.endswith("{"):
            stack.append(_Region(line))
        elif dot := _DOT.search(line):
            accumulator, dtype, m, n = dot.groups()
            carried = any(accumulator in region.carried for region in stack)
            half = dtype in ("f16", "bf16")
            stack[-1].dots.append(_Dot(int(m), int(n), half, half or "= tf32" in line, carried))
    return loops


def _wanted_mma(dot, code) -> str:
    """The instruction that half-precision `dot` should become."""
    warps = code.metadata.num_warps
    if code.capability < 90 or dot.m < 64 or warps % 4:
        return "HMMA.16816"
    if code.capability >= 100:
        return "UTCHMMA"
    columns_of_warps = max(warps // (dot.m // 16), 1)
    return f"HGMMA.64x{min(max(dot.n // columns_of_warps, 8), 256)}x16"


def _tma_copies(code) -> list[tuple[str, str]]:
    """Box and tile in shared memory of every TMA load, as `128x64`."""
    pattern = r"async_tma_copy_global_to_local.*?tensordesc<tensor<([\dx]+)x\w+.*?-> !ttg\.memdesc<([\dx]+)x\w+"
    return re.findall(pattern, code.asm["ttgir"])


class _Instruction(NamedTuple):
    address: int
    guarded: bool
    opcode: str
    operands: str

    @property
    def target(self):
        """Where a branch goes, else None."""
        found = self.opcode.startswith("BRA") and re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self):
        always = self.opcode == "EXIT" or (self.target is not None and "," not in self.operands)
        return self.guarded or not always


def disassemble(cubin: bytes) -> dict[str, list[_Instruction]]:
    """The instructions of each function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-json", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, functions = json.loads(output)
    return {
        function["function-name"]: [
            _Instruction(16 * index, "predicate" in i, i["opcode"], i.get("operands", ""))
            for index, i in enumerate(function["sass-instructions"])
        ]
        for function in functions
    }


def main_loops(instructions, *_) -> list[list[_Instruction]]:
    """The innermost loops of a function with an MMA, if possible those with asynchronous copies."""
    loops = _innermost([loop for loop in _loops(instructions) if count(loop, MMA)])
    return [loop for loop in loops if count(loop, ASYNC_COPY)] or loops


def _loops(instructions) -> list[list[_Instruction]]:
    """The natural loops: for every branch back to a block that dominates it, the blocks between the two."""
    starts = {0} | {i.target for i in instructions if i.target is not None}
    starts |= {after.address for i, after in pairwise(instructions) if i.target is not None or not i.falls_through}
    blocks = {}
    for i in instructions:
        if i.address in starts:
            block = blocks[i.address] = []
        block.append(i)
    following = dict(pairwise(blocks))
    successors = {}
    for start, block in blocks.items():
        last = block[-1]
        reached = (last.target, following.get(start) if last.falls_through else None)
        successors[start] = [block for block in reached if block in blocks]
    predecessors = {start: [b for b in blocks if start in successors[b]] for start in blocks}
    dominators = _dominators(blocks, predecessors)
    loops = []
    for tail in blocks:
        for head in successors[tail]:
            if head in dominators[tail]:
                body, frontier = {head}, [tail]
                while frontier:
                    block = frontier.pop()
                    if block not in body:
                        body.add(block)
                        frontier += predecessors[block]
                loops.append([i for block in sorted(body) for i in blocks[block]])
    return loops


def _dominators(blocks, predecessors):
    entries = {block for block in blocks if block == 0 or not predecessors[block]}
    dominators = {block: {block} if block in entries else set(blocks) for block in blocks}
    changed = True
    while changed:
        changed = False
        for block in dominators.keys() - entries:
            new = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _innermost(loops):
    return [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]


def count(instructions, opcodes) -> int:
    return sum(i.opcode.startswith(opcodes) for i in instructions)


def _mma_name(opcode) -> str:
    """`HGMMA.64x256x16` of `HGMMA.64x256x16.F32.BF16`."""
    return re.match(r"\w+(\.\d\w+)?", opcode)[0]


def _load_bytes(opcode) -> int:
    return next((LOAD_BYTES[part] for part in opcode.split(".") if part in LOAD_BYTES), 4)
