"""The compiled CPU kernels: every instruction set, any number of threads, and installs with and without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from batches import Batch, assert_within_budget
from compiled import SETS, every_set, needs_library, on_threads

from lora_kernels import BatchPlan, lora_linear_batched
from lora_kernels import __main__ as command_line
from lora_kernels.backends import cpu_library
from lora_kernels.dispatch import Problem, choose

ROOT = Path(__file__).resolve().parent.parent
CHOICE = ("cpu", "chained")
PROBLEM = Problem(32, 64, 64, 16, torch.bfloat16, torch.bfloat16, False, "cpu", 0, 3, False, distinct=32)
SHAPES = [
    dict(),
    dict(m=20, widths=(72, 40, 33), k=64, slots=4, rank=16),
    dict(m=12, widths=(40, 130), k=1000, slots=6, rank=24, per_row=3),
    dict(m=1, widths=(1,), k=1, slots=1, rank=1),
    dict(m=70, widths=(1093,), k=37, slots=2, rank=7),
    dict(m=9, widths=(200,), k=130, slots=3, rank=512),
]


@needs_library
@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())) or "plain")
def test_every_instruction_set_is_right_with_any_number_of_threads(ask_for, isa, dtype, shape):
    ask_for(isa)
    assert cpu_library.instruction_set() == isa
    batch = Batch(**shape, dtype=dtype)
    batch.weight.zero_()  # beside the base term a wrong adapter could hide
    y = batch.run(CHOICE)
    assert_within_budget(batch, y)
    for threads in (2, 3, 16):
        assert torch.equal(on_threads(threads, batch.run, CHOICE), y)


@needs_library
@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_does_not_depend_on_its_company(ask_for, isa, dtype):
    """Alone, in a pair or among many of its adapter; of the base layer, whose bits may differ, there is only the zero."""
    ask_for(isa)
    batch = Batch(m=37, widths=(150,), k=203, dtype=dtype, popularity="identical", bias=False)
    batch.weight.zero_()
    y = batch.run(CHOICE)
    for rows in (slice(0, 1), slice(3, 5), slice(8, 37)):
        assert torch.equal(batch.run(CHOICE, rows=rows), y[rows])


@needs_library
def test_a_slice_does_not_depend_on_those_beside_it():
    """What is kept of a layer's adapters, with the first slice, is of those very slices."""
    one, other = Batch(widths=(40, 24)), Batch(widths=(40, 25))
    first, second = one.adapters
    where = BatchPlan(one.slots)

    def run(*adapters):
        weight = torch.zeros(sum(layer.b.shape[1] for layer in adapters), one.x.shape[1], dtype=one.x.dtype)
        return lora_linear_batched(one.x, weight, adapters, where, backend="cpu")

    y = run(first, second)
    assert torch.equal(run(first), y[:, :40])
    assert torch.equal(run(first, other.adapters[1])[:, 40:], run(other.adapters[1]))
    assert torch.equal(run(first, second), y)


@needs_library
@every_set
def test_rounding_to_16_bits_is_that_of_torch(ask_for, isa):
    """Every exponent, ties, Inf and NaN, as x + 1 · (1 · b) with x = 0: what is stored is b, rounded in between."""
    ask_for(isa)
    values = torch.cat([torch.randn(500) * 2.0**e for e in range(-13, 15)] + [torch.tensor([65504.0, 0.0, -0.0])])
    for dtype in (torch.bfloat16, torch.float16):
        b = values.to(dtype)
        batch = Batch(m=1, widths=(len(b),), k=1, slots=1, rank=1, dtype=dtype, bias=False, popularity="identical")
        (adapters,) = batch.adapters
        batch.weight.zero_(), batch.x.fill_(1), adapters.a.fill_(1), adapters.scalings.fill_(1 + 2**-9)
        adapters.b.copy_(b.view(1, -1, 1))
        h = torch.tensor(1 + 2**-9).to(dtype).float()
        assert torch.equal(batch.run(CHOICE)[0], (b.float() * h).to(dtype))


@needs_library
@pytest.mark.parametrize("name", ["nonsense", "avx2"])
def test_an_instruction_set_that_cannot_be_is_refused(ask_for, monkeypatch, capsys, name):
    monkeypatch.setattr(cpu_library, "instruction_sets", lambda: {"avx2": False, "generic": True})
    monkeypatch.setitem(SETS, "avx2", True)
    ask_for(name)
    why = {"nonsense": "which is not built", "avx2": "which this machine lacks"}[name]
    with pytest.raises(ValueError, match=f"LORA_KERNELS_CPU_ISA: got '{name}', {why}, expected one of generic"):
        Batch().run(CHOICE)
    assert command_line.main(["info"]) == 0
    assert "avx2 (not on this machine), generic" in (out := capsys.readouterr().out) and why in out


@needs_library
def test_info_says_what_is_built_and_in_use(capsys):
    assert command_line.main(["info"]) == 0
    assert f"generic; uses {cpu_library.instruction_set()}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(PATH=ROOT / "none"), "installed without its CPU kernels"),
        (dict(PATH=Path(__file__)), "its library does not load"),
        pytest.param(dict(ABI=0), "is of other sources", marks=needs_library),
    ],
    ids=["missing", "broken", "stale"],
)
def test_without_the_library_eager_runs_and_dispatch_says_why(monkeypatch, capsys, change, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, value in change.items():
        monkeypatch.setattr(cpu_library, name, value)
    cpu_library.library.cache_clear()
    choose.cache_clear()
    try:
        plan = choose(PROBLEM)
        assert plan.strategy == "looped" and reason in plan.why
        assert command_line.main(["info"]) == 0 and reason in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()
        choose.cache_clear()


@needs_library
def test_it_is_the_default_without_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose.cache_clear()
    assert choose(PROBLEM).backend.__name__.endswith("cpu_batched")
    assert choose(PROBLEM._replace(dtype=torch.float64)).strategy == "looped"
    choose.cache_clear()


@needs_library
def test_there_is_one_openmp_runtime():
    script = (
        "import torch; from lora_kernels.backends import cpu_library; cpu_library.library().lora_abi()\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]}\n"
        "assert len(maps) == 1, maps"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_all_that_it_takes_from_torch_is_its_stable_abi():
    """Of another version too: C functions of the shims, and no C++."""
    run = subprocess.run(["nm", "-D", "--undefined-only", cpu_library.PATH], check=True, capture_output=True, text=True)
    names = {line.split()[-1] for line in run.stdout.splitlines()}
    taken = {name for name in names if re.search("torch|c10|aten", name)}
    assert "torch_library_impl" in taken and all(re.match("(aoti_)?torch_", name) for name in taken)


@pytest.fixture
def source(tmp_path):
    """What is released, without anything built."""
    for folder in ("lora_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(source, what="wheel", **environment):
    pytest.importorskip("setuptools", minversion="77")
    script = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=source, env=environment, capture_output=True, text=True, check=False
    )


def contents(source):
    [wheel] = (source / "dist").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_an_install_without_a_compiler_is_pure_python_and_says_so(source, what):
    run = build(source, what, PATH="", LORA_KERNELS_BUILD="auto")
    assert run.returncode == 0, run.stderr
    for kernels, compiler in (("CPU", "g++"), ("CUDA", "nvcc")):
        said = [line for line in run.stderr.splitlines() if f"without its {kernels} kernels" in line]
        assert len(said) == 1 and f"install {compiler}" in said[0]
    _, names = contents(source)
    assert ("lora_kernels/functional.py" in names) == (what == "wheel")
    assert not any(name.endswith(".so") for name in names) and not list(source.rglob("*.so"))


def test_a_build_of_nothing_is_a_wheel_for_every_system(source):
    assert build(source, LORA_KERNELS_BUILD="none").returncode == 0
    assert contents(source)[0].endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_one_wheel_serves_every_python(source):
    run = build(source, LORA_KERNELS_BUILD="cpu")
    assert run.returncode == 0, run.stderr
    name, names = contents(source)
    assert "-py3-none-" in name and not name.endswith("any.whl") and "lora_kernels/_cpu.so" in names


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cuda", "no-such-compiler"),
        ("fast", "got 'fast', expected auto, cpu, cuda or none"),
        ("cpu", "no-such-compiler"),
    ],
)
def test_builds_that_cannot_be_fail_with_the_reason(source, mode, message):
    run = build(source, LORA_KERNELS_BUILD=mode, CXX="no-such-compiler")
    assert run.returncode and message in run.stderr


def test_a_build_without_the_headers_of_torch_says_so(source):
    compilers = source / "csrc" / "compilers.py"
    compilers.write_text(compilers.read_text().replace("shim.h", "none.h"))
    run = build(source, LORA_KERNELS_BUILD="cpu")
    assert run.returncode and "no headers of torch 2.10 or newer beside this Python" in run.stderr


def test_the_source_distribution_holds_csrc(source):
    run = build(source, "sdist")
    assert run.returncode == 0, run.stderr
    [path] = (source / "dist").glob("*.tar.gz")
    names = {name.split("/", 1)[-1] for name in tarfile.open(path).getnames()}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*") if file.suffix != ".pyc"}
    assert "csrc/compilers.py" in files and files <= names
