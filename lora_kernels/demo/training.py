"""The first half: fine-tune two adapters, and check what the README promises on the way."""

import copy
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_kernels import LoRALinear, apply_lora, dispatch, load_adapter, save_adapter, testing, trainable_parameters
from lora_kernels.adapters.checkpoint import WEIGHTS_NAME
from lora_kernels.demo.material import make_corpus, read_texts
from lora_kernels.demo.report import device_name
from lora_kernels.modules import linears_by_name, lora_layers

PROMPTS = ("The with statement is used to", 'def read_lines(path):\n    """')


@dataclass(frozen=True)
class Losses:
    training: list[float]
    held_out: dict[int, float]  # by the number of steps taken
    times: list[float]  # of the steps, in seconds

    @property
    def after(self) -> float:
        return self.held_out[len(self.training)]

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def train_and_check(report, model, tokenizer, out, recipe) -> tuple[str, ...]:
    """Adapters `docs` and `code`, below `out`; returns their names."""
    corpora = {name: make_corpus(text, tokenizer, recipe, model.device) for name, text in read_texts().items()}
    with report.phase("The first steps, beside PEFT's"):
        compare_with_peft(report, model, corpora["docs"].train, recipe)
    with report.phase("Training"):
        losses = {name: fine_tune(report, model, name, corpus, recipe, out / name) for name, corpus in corpora.items()}
        plot(report, losses, "Two LoRA adapters on all linear layers")
    with report.phase("The adapter files"):
        adapted = load_adapter(copy.deepcopy(model), out / "docs")
        check_files(report, adapted, out / "docs", corpora["docs"], losses["docs"], recipe)
    with report.phase("Merged and unmerged"):
        compare_merged(report, adapted, corpora["docs"].held_out, recipe)
    with report.phase("What they write"):
        answer(report, model, adapted, tokenizer, out, list(corpora), recipe)
    return tuple(corpora)


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
    compare_steps(report, dict(zip(("PEFT", "ours"), models[2:], strict=True)), windows[: recipe.batch])


def compare_steps(report, models, windows):
    """Seconds of a forward and backward pass of ours, of its eager backend, and of PEFT's, which take turns."""
    backends = {"PEFT": None, "ours": None, "ours, eager backend": "eager"}
    seconds = {name: [] for name in backends}
    for _ in range(3):
        for name, backend in backends.items():
            model = models[name.partition(",")[0]]
            with mock.patch.dict(os.environ, {"LORA_KERNELS_BACKEND": backend} if backend else {}):
                start = time.perf_counter()
                model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
                model.zero_grad(set_to_none=True)
                if windows.is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    each = ", ".join(f"{name} {windows.numel() / time_:,.0f}" for name, time_ in best.items())
    ratio = best["PEFT"] / best["ours"]
    report.say(f"Tokens a second, forward and backward (best of 3): {each}; ours is {ratio:.2f} times as fast as PEFT")


def losses_and_gradients(model, parameters, window):
    loss = model(input_ids=window, labels=window).loss
    loss.backward()
    grads = [parameter.grad.flatten() for parameter in parameters]
    return {"loss": loss.detach(), "dA": torch.cat(grads[::2]), "dB": torch.cat(grads[1::2])}


def relative_error(actual, truth) -> float:
    return testing.errors(actual, truth.double(), truth.new_zeros(()))["rms"][0]


def fine_tune(report, model, name, corpus, recipe, directory) -> Losses:
    """Train an adapter on a copy of `model`, and save it to `directory`."""
    model = apply_lora(copy.deepcopy(model), r=recipe.r, lora_alpha=recipe.lora_alpha)
    trainable = trainable_parameters(model)
    losses = Losses([], {0: held_out_loss(model, corpus, recipe)}, [])
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
            start = time.perf_counter()
            loss = model(input_ids=window, labels=window, use_cache=False).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.training.append(loss.item())
            losses.times.append(time.perf_counter() - start)
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


def plot(report, losses, title):
    with report.plot("loss.png", "training and held-out loss") as axes:
        for colour, (name, loss) in enumerate(losses.items()):
            steps = range(1, len(loss.training) + 1)
            axes.plot(steps, loss.training, f"C{colour}", alpha=0.4, label=f"{name}, training batch")
            axes.plot(list(loss.held_out), list(loss.held_out.values()), f"C{colour}o-", label=f"{name}, held out")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.figure.legend(loc="outside lower center", ncols=len(losses))


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
