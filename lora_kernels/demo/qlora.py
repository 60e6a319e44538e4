"""`make demo-qlora`: the same model with a base in nf4 and in bf16: fine-tuned with LoRA, then decoding with many adapters."""

import copy
import gc
import tempfile
from pathlib import Path

import torch

from lora_kernels import apply_lora, formats
from lora_kernels.demo import throughput, training
from lora_kernels.demo.adapters import make_adapters
from lora_kernels.demo.material import make_corpus, read_texts
from lora_kernels.modules import linears_by_name

BASES = "bf16", "nf4"


def in_4_bits(model):
    """The model with its linear layers in nf4, doubly quantised, as transformers' `load_in_4bit` makes them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in linears_by_name(model).items():
        if linear is model.get_output_embeddings():
            continue
        n, k = linear.weight.shape
        layer = Linear4bit(k, n, linear.bias is not None, model.dtype, quant_type="nf4", device="meta")
        layer.weight = Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", module=layer)
        layer.bias = linear.bias
        model.set_submodule(name, layer.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # so that PEFT takes its layers for what they are
    return model


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
    before, bf16, nf4 = losses["bf16"].held_out[0], losses["bf16"].after, losses["nf4"].after
    way = (before - nf4) / (before - bf16)
    report.check(
        "Over nf4 the held-out loss falls nearly as far as over bf16",
        way > 0.7,
        f"from {before:.3f} over bf16 to {bf16:.3f}, and over nf4 to {nf4:.3f}, {way:.0%} of the way",
    )
    share = sizes["nf4"][0]["linear layers"] / sizes["bf16"][0]["linear layers"]
    report.check("In nf4 the linear layers take less than half", share < 0.5, f"{share:.1%} of their bytes in bf16")
