"""What the demo says, to the terminal and to summary.md."""

import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_kernels import __version__

matplotlib.use("Agg")
from matplotlib import pyplot


class Report:
    """Everything that is said goes to the terminal and to summary.md; every check counts."""

    def __init__(self, path: Path, title: str):
        self.path, self.console = path, Console()
        self.page = [f"# {title}"]
        self.seconds, self.failed = {}, []

    @contextmanager
    def phase(self, title):
        self.console.rule(f"[bold]{title}")
        self.page.append(f"\n## {title}\n")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start

    def say(self, text):
        self.console.print(text, markup=False, highlight=False)
        self.page.append(f"- {text}")

    def check(self, claim, holds, evidence):
        self.console.print("[green]✓[/]" if holds else "[bold red]✗[/]", end=" ")
        self.say(f"{claim}: {evidence}")
        self.page[-1] = self.page[-1].replace("- ", "- ✓ " if holds else "- **✗** ", 1)
        if not holds:
            self.failed.append(claim)

    def table(self, header, rows):
        table = Table(*header)
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)
        lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        self.page += ["", *(f"| {' | '.join(cell.replace(chr(10), '<br>') for cell in line)} |" for line in lines), ""]

    @contextmanager
    def plot(self, name, caption):
        """Axes to draw on; the figure goes beside summary.md, and the caption below it there."""
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        yield axes
        axes.grid(alpha=0.3)
        figure.savefig(self.path.with_name(name), dpi=120)
        pyplot.close(figure)
        self.page.append(f"\n![{caption}]({name})")

    def samples(self, name, record):
        """The figures behind a plot, as JSON beside summary.md, with what is needed to repeat them."""
        head = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
        commit = subprocess.run(head, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        installed = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        origin = {
            "device": device_name(),
            "versions": {"lora_kernels": __version__, **installed},
            "commit": commit or None,
        }
        self.path.with_name(name).write_text(json.dumps(origin | record, indent=1) + "\n", encoding="utf-8")
        self.say(f"Samples: {name}")

    def close(self) -> int:
        with self.phase("Time"):
            self.table(("phase", "seconds"), [(title, f"{value:.1f}") for title, value in self.seconds.items()])
            self.say(f"{sum(self.seconds.values()):.0f} s in all, on {device_name()}")
        verdict = f"FAILED: {'; '.join(self.failed)}" if self.failed else "Every check holds."
        self.say(verdict)
        self.path.write_text("\n".join(self.page) + "\n", encoding="utf-8")
        self.console.print(f"Written: {self.path}")
        return 1 if self.failed else 0


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' * (threads > 1)}"
