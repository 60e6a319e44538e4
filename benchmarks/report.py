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

RESULTS = Path(__file__).resolve().parent / "results"


def refuse_interpreter() -> None:
    """Raise SystemExit under TRITON_INTERPRET=1: an interpreter's time is nobody's performance."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("benchmarks: TRITON_INTERPRET=1 is set, and the interpreter's time means nothing; unset it")


def local_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def write(benchmark: str, method: str, rows: list[dict], device: torch.device) -> Path:
    """Write `rows` with all that is needed to repeat them; returns the file."""
    name = _device_name(device)
    record = {
        "method": method,
        "device": name,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "capability": triton.target(device).capability,
        "rows": rows,
    }
    return save(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), benchmark, record)


def save(folder: str, benchmark: str, record: dict) -> Path:
    """Write `record` with the versions and the commit that made it to `folder` of the results; returns the file."""
    path = RESULTS / folder / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {
        "benchmark": benchmark,
        "python": platform.python_version(),
        "versions": {"lora_kernels": __version__, **{name: _version(name) for name in ("torch", "triton", "numpy")}},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    text = json.dumps({**origin, **record}, indent=1)
    path.write_text(re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda list_: f"[{' '.join(list_[1].split())}]", text) + "\n")
    return path


def show(title: str, path: Path | None, columns: list[str], rows: list[list[str]]) -> None:
    """A table of what went to `path`, if anything; plain where rich is not installed."""
    title = f"{title}\n{path.relative_to(RESULTS.parent.parent) if path else '(not written)'}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *("\t".join(row) for row in [columns, *rows]), sep="\n")
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{match[1] if match else platform.processor() or platform.machine()} CPU, {os.cpu_count()} threads"


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments):
    run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None
