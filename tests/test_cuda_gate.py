"""The compile gate of the CUDA kernels: for each architecture, registers, main loop and shared memory as recorded, no spills.

`python tests/test_cuda_gate.py` writes the record anew.
"""

import itertools
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import torch

machine_code = pytest.importorskip("lora_kernels.machine_code", reason="Triton brings nvdisasm")
ROOT = Path(__file__).resolve().parent.parent
compilers = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "compilers.py")))
RECORD = ROOT / "tests" / "resources" / "cuda_gate.json"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
KERNEL = re.compile(r"decodeI4(?P<dtype>bf16|fp16)Li(?P<halves>\d)E\S*?(?P<weights>DenseILb[01]|NormalFloat4)")
WEIGHTS = {"DenseILb1": "aligned", "DenseILb0": "any layout", "NormalFloat4": "NF4"}
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i];
  for (int turn = 0; turn < 100; ++turn)
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(7 * i + 1) % 64] + x[turn];
  for (int i = 0; i < 64; ++i) x[i] = v[i];
}
"""


def find_nvcc():
    nvcc = compilers.find_nvcc()
    if nvcc is None:
        pytest.skip("the CUDA gate needs nvcc: pip install -r requirements/cuda.txt, or CUDA_HOME")
    return nvcc


def compiled(nvcc, *sources):
    """{kernel: {registers, ...}} of what ptxas says of `sources`, for every architecture that is built."""
    options = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in compilers.ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas=-v", '-DLORA_CUDA_ARCHITECTURES=""']
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for source, option in itertools.product(sources, options):
            cubin = Path(folder, "out.cubin")
            command = [nvcc, *flags, option, str(source), "-o", str(cubin)]
            said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stderr
            code = machine_code.disassemble(cubin.read_bytes())
            for entry in ENTRY.finditer(said):
                figures[f"{entry['arch']} {_name(entry['name'])}"] = {
                    "registers": int(entry["registers"]),
                    "spills": int(entry["stores"]) + int(entry["loads"]),
                    "stack": int(entry["stack"]),
                    **_main_loop(code[entry["name"]]),
                }
    return dict(sorted(figures.items()))


def _main_loop(instructions):
    """Of the loop with the most MMAs, among those with asynchronous copies: how many instructions, MMAs and copies."""
    loops = machine_code.main_loops(instructions)
    loop = max(loops, key=lambda loop: machine_code.count(loop, machine_code.MMA), default=())
    kinds = {"mma": machine_code.MMA, "copies": machine_code.ASYNC_COPY}
    return {"loop": len(loop)} | {name: machine_code.count(loop, kind) for name, kind in kinds.items()}


def _name(symbol):
    if (found := KERNEL.search(symbol)) is None:
        return symbol
    return f"decode {found['dtype']} {8 * int(found['halves'])} rows {WEIGHTS[found['weights']]}"


def problems(figures):
    return [f"{name}: spills" for name, found in figures.items() if found["spills"] or found["stack"]]


def version(nvcc):
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def shared_memory():
    """Bytes a block, by rows: what a launch asks for, read off the emulator."""
    from batches import Batch
    from test_cuda import CHOICE
    from test_cuda_nf4 import Quantized

    found = {}
    with emulated.emulating(emulated.build()) as emulator:
        for rows in (8, 16):
            Batch(m=rows, k=8, rank=1, dtype=torch.float16).run(CHOICE)
            found[f"{rows} rows"] = emulator.shared_bytes()
            Quantized(m=rows, k=64, rank=1, dtype=torch.float16).run()
            found[f"{rows} rows NF4"] = emulator.shared_bytes()
    return found


@pytest.mark.compile
def test_the_machine_code_is_as_recorded_and_nothing_spills():
    nvcc, record = find_nvcc(), json.loads(RECORD.read_text())
    figures = compiled(nvcc, *compilers.CUDA_SOURCES)
    assert figures.keys() == record["kernels"].keys() and not problems(figures)
    if version(nvcc) != record["nvcc"]:
        pytest.skip(f"nothing spills; the record is nvcc {record['nvcc']}'s, and this is {version(nvcc)}")
    assert figures == record["kernels"], "run python tests/test_cuda_gate.py, and look at what it changes"


@pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ for the emulator")
def test_shared_memory_is_as_recorded_and_two_blocks_fit():
    """Into an SM of sm_80, or with NF4 of sm_90."""
    recorded = json.loads(RECORD.read_text())["shared"]
    assert shared_memory() == recorded
    for name, size in recorded.items():
        assert 2 * (size + 1024) <= (228 if "NF4" in name else 164) * 1024


@pytest.mark.compile
def test_a_kernel_that_spills_is_refused(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert any("spills" in problem for problem in problems(compiled(find_nvcc(), source)))


if __name__ == "__main__":
    nvcc = compilers.find_nvcc() or sys.exit("no nvcc")
    kernels = compiled(nvcc, *compilers.CUDA_SOURCES)
    lines = ",\n".join(f'"{name}": {json.dumps(found)}' for name, found in kernels.items())
    RECORD.write_text(
        f'{{"nvcc": "{version(nvcc)}", "shared": {json.dumps(shared_memory())},\n"kernels": {{\n{lines}\n}}}}\n'
    )
    sys.exit("\n".join(problems(kernels)) or None)
