"""`make demo-qlora`: the same model with a base in nf4 and in bf16: fine-tuned with LoRA, then decoding with many adapters."""

import copy
import gc
import tempfile
from pathlib import Path

import torch

from lora_kernels import apply_lora, formats
from lora_kernels.demo import throughput, training
from lora_kernels.demo.adapters import make_adapters
from lora_kernels.demo.material import in_4_bits, make_corpus, read_texts
from lora_kernels.modules import linears_by_name

BASES = "bf16", "nf4"


def train_and_decode(report, model, tokenizer, out: Path, recipe):
    corpus = make_corpus(read_texts()["docs"], tokenizer, recipe, model.device)
    models = {"bf16": model, "nf4": in_4_bits(copy.deepcopy(model))}
    losses, sizes = {}, {}
    with report.phase("Training over bf16 and over nf4"):
        for name in BASES:
            formats.release_scratch()
            gc.collect()
            torch.manual_seed(0)  # the same adapters to begin with
            losses[name] = training.fine_tune(report, models[name], name, corpus, recipe, out / name)
            sizes[name] = weights(models[name], recipe), formats.scratch_bytes()
        training.plot(report, losses, "LoRA on all linear layers, over a base in bf16 and in nf4")
        compare(report, losses, sizes)
    with report.phase("Decoding over the base in 4 bits"), tempfile.TemporaryDirectory(dir=out) as folder:
        trained = [out / name for name in BASES]
        made = make_adapters(model, trained, Path(folder), recipe.traffic.batch - len(trained))
        adapters = {path.name: path for path in (*trained, *made)}
        contest, dense = (throughput.Contest(models[name], adapters, recipe.traffic) for name in reversed(BASES))
        contest.ways = {
            "ours, nf4": contest.ours,
            "ours, bf16": dense.ours,
            "PEFT's adapter_names, nf4": contest.mixed,
            throughput.BASE: contest.base,
        }
        throughput.measure(report, contest, adapters)
        report.say("The base model alone is bitsandbytes' own, which has repacked its weights where the CPU has bf16")


def weights(model, recipe) -> dict[str, int]:
    """Bytes of the linear layers' weights, of all others, and of the adapters with their gradients and Adam's moments."""
    adapted = apply_lora(copy.deepcopy(model), r=recipe.r, lora_alpha=recipe.lora_alpha)
    found = {"linear layers": 0, "the rest": 0, "what trains": 0}
    tensors = {
        tensor.data_ptr(): (name, tensor) for name, tensor in (*adapted.named_parameters(), *adapted.named_buffers())
    }
    layers = linears_by_name(adapted)
    for name, tensor in tensors.values():
        if tensor.requires_grad:
            found["what trains"] += 4 * tensor.nbytes
        elif any(
            name.startswith(f"{layer}.") for layer in layers if layers[layer] is not adapted.get_output_embeddings()
        ):
            found["linear layers"] += tensor.nbytes
        else:
            found["the rest"] += tensor.nbytes
    return found


def compare(report, losses, sizes):
    columns = []
    for name in BASES:
        (parts, scratch), loss = sizes[name], losses[name]
        held = {**parts, "scratch": scratch, "in all": sum(parts.values()) + scratch}
        figures = {"held-out loss, before": f"{loss.held_out[0]:.3f}", "after": f"{loss.after:.3f}"}
        figures["seconds a step"] = f"{loss.seconds:.2f}"
        columns.append(figures | {f"MB, {part}": f"{size / 1e6:.1f}" for part, size in held.items()})
    rows = zip(columns[0], *(column.values() for column in columns), strict=True)
    report.table(("base", *BASES), list(rows))
    report.say(
        "MB are what stays resident: weights; adapters, their gradients and Adam's moments; the scratch that layers are "
        "dequantised into, one after another"
    )
    bf16, nf4 = (losses[name] for name in BASES)
    cost, left = nf4.held_out[0] - bf16.held_out[0], nf4.after - bf16.after
    report.check(
        "Training makes up for a third of what 4 bits cost, or more",
        left < max(2 / 3 * cost, 0.1),
        f"the held-out loss over nf4 is {cost:.3f} above that over bf16 before, {left:.3f} after",
    )
    share = sizes["nf4"][0]["linear layers"] / sizes["bf16"][0]["linear layers"]
    report.check("In nf4 the linear layers take less than half", share < 0.5, f"{share:.1%} of their bytes in bf16")
