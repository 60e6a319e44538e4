"""Where results go: one JSON file per benchmark and device, then a table on the terminal."""

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from lora_kernels import __version__
from lora_kernels.backends import triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "numpy", "peft", "vllm", "sglang", "nemo_automodel", "axolotl", "unsloth", "unsloth_zoo",
)  # fmt: skip
CODE = ("lora_kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results")


def refuse_interpreter() -> None:
    """Raise SystemExit under TRITON_INTERPRET=1: an interpreter's time is nobody's performance."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("benchmarks: TRITON_INTERPRET=1 is set, and the interpreter's time means nothing; unset it")


def local_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def write(benchmark: str, method: str, rows: list[dict], device: torch.device, **more) -> Path:
    """Write `rows` with all that is needed to repeat them, and what else is in `more`; returns the file."""
    record = {"method": method, **describe(device), **more, "rows": rows}
    return save(folder(device), benchmark, record)


def path_of(benchmark: str, device: torch.device) -> Path:
    """Where the result of this device is, or would be."""
    return RESULTS / folder(device) / f"{benchmark}.json"


def read(benchmark: str, device: torch.device) -> dict | None:
    """What was written for this device, if anything."""
    path = path_of(benchmark, device)
    return json.loads(path.read_text()) if path.exists() else None


def describe(device: torch.device) -> dict:
    """The device and what runs it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "capability": triton.target(device).capability,
        **({"clocks": _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem", device),
            "driver": _nvidia_smi("driver_version", device)} if device.type == "cuda" else {}),
    }  # fmt: skip


def origin() -> dict:
    """The versions and the commit: the last one that changed the code, so that committing results is no change."""
    return {
        "python": platform.python_version(),
        "versions": {"lora_kernels": __version__, **{name: _version(name) for name in PACKAGES}},
        "commit": _git("log", "-1", "--format=%H", "--", *CODE),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
    }


def folder(device: torch.device) -> str:
    """The name of the folder of a device's results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def save(folder: str, benchmark: str, record: dict) -> Path:
    """Write `record` with the versions and the commit that made it to `folder` of the results; returns the file."""
    path = RESULTS / folder / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": benchmark, **origin(), **record}, indent=1)
    path.write_text(re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda list_: f"[{' '.join(list_[1].split())}]", text) + "\n")
    return path


def show(title: str, path: Path | None, columns: list[str], rows: list[list[str]]) -> None:
    """A table of what went to `path`, if anything; plain where rich is not installed. An empty row is a line."""
    title = f"{title}\n{path.relative_to(RESULTS.parent.parent) if path else '(not written)'}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *("\t".join(row) for row in [columns, *rows]), sep="\n")
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = max(console.width, 120)
    console.print(table)


def device_name(device: torch.device) -> str:
    """The GPU, or the processor, its threads and the instructions that make the difference: a virtual one may lack some."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    flags = (flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in cpuinfo.split())
    processor = f"{match[1] if match else platform.processor() or platform.machine()} CPU"
    return ", ".join((processor, f"{os.cpu_count()} threads", *list(flags)[:1]))


def _nvidia_smi(query, device):
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments):
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None
