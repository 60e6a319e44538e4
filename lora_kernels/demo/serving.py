"""The second half: serve the trained adapters and thirty more, and hold every request against its adapter alone."""

import copy
import random
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import mean

import torch
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_kernels.demo import throughput
from lora_kernels.demo.adapters import NOISE, RANKS, STRENGTH, make_adapters, make_pool, merged
from lora_kernels.demo.engine import Engine, Request

BASE = "(base)"
PROMPTS = (
    "The with statement is used to",
    'def read_lines(path):\n    """',
    "A list comprehension",
    "class Stack:\n",
    "Write a function that returns the largest of three numbers.\n\ndef",
)


def serve_and_check(report, model, tokenizer, trained: list[Path], traffic):
    with tempfile.TemporaryDirectory(dir=trained[0].parent) as directory:
        with report.phase("More adapters"):
            made = make_adapters(model, trained, Path(directory), traffic.adapters - len(trained))
            adapters = {path.name: path for path in (*trained, *made)}
            report.say(
                f"{len(made)} adapters of ranks {', '.join(map(str, RANKS[: len(made)]))} in turn, as PEFT files: half of "
                f"the rank are the leading singular directions of {STRENGTH} (cos t W_docs + sin t W_code), the two "
                f"trained updates, with t going round the circle; half are random, {NOISE} times as large"
            )
        with report.phase("Serving"):
            fp32 = copy.deepcopy(model).float()
            pool = make_pool(fp32, adapters, traffic.slots, traffic.pool_rows)
            arrivals = make_arrivals(list(adapters), tokenizer, traffic)
            serve(report, fp32, pool, tokenizer, arrivals, traffic)
        with report.phase("Every request again, alone and merged"):
            check_alone(report, fp32, adapters, tokenizer, [request for _, request in arrivals])
        del fp32, pool
        with report.phase("Throughput"):
            some = dict(list(adapters.items())[: traffic.batch])
            throughput.measure(report, throughput.Contest(model, some, traffic), some)


def make_arrivals(names, tokenizer, traffic) -> list[tuple[float, Request]]:
    """`(step, request)` in order: Poisson arrivals, and adapters by Zipf's law; the base model is the third tenant."""
    tenants = [*names[:2], None, *names[2:]]
    draw = random.Random(0)
    step, arrivals = 0.0, []
    for _ in range(traffic.requests):
        [tenant] = draw.choices(tenants, [1 / rank for rank in range(1, len(tenants) + 1)])
        prompt = tokenizer.encode(draw.choice(PROMPTS))
        arrivals.append((step, Request(tenant, prompt, draw.randint(*traffic.new_tokens))))
        step += draw.expovariate(traffic.rate)
    return arrivals


def serve(report, model, pool, tokenizer, arrivals, traffic):
    requests = [request for _, request in arrivals]
    engine = Engine(model, pool, traffic.rows, max(len(r.prompt) + r.new_tokens for r in requests))
    coming, steps, start = deque(arrivals), 0, time.perf_counter()
    with Live(console=report.console, transient=True, auto_refresh=False) as live:
        while coming or engine.queue or engine.running:
            while coming and coming[0][0] <= steps:
                engine.submit(coming.popleft()[1])
            engine.step()
            steps += 1
            if report.console.is_terminal:
                live.update(view(engine, tokenizer, steps, len(coming), time.perf_counter() - start), refresh=True)
    seconds = time.perf_counter() - start
    engine.close()
    summarise(report, engine, requests, seconds)


def summarise(report, engine, requests, seconds):
    pool, statistics = engine.pool, engine.pool.statistics
    rows, distinct = zip(*engine.history, strict=True)
    adapters = {request.adapter for request in requests} - {None}
    facts = {
        "requests": f"{len(requests)}, for {len(adapters)} adapters and the base model",
        "tokens": f"{engine.generated} in {seconds:.1f} s, {engine.generated / seconds:.1f} a second, in {engine.model.dtype}",
        "decode steps": f"{mean(rows):.1f} rows of {mean(distinct):.1f} adapters; at most {max(rows)} of {max(distinct)}",
        "pool": f"{pool.slots} slots, {pool.rows} rows, {pool.nbytes / 1e6:.0f} MB, for {len(pool)} adapters",
        "hits, misses": f"{statistics.hits}, {statistics.misses} (prefetched at arrival, some evicted again meanwhile)",
        "pool full": f"{engine.refused} times; the request stayed in the queue",
        "evictions": f"{statistics.evictions}; {statistics.bytes_copied / 1e6:.0f} MB were copied into slots",
    }
    report.table(("served", ""), list(facts.items()))


def view(engine, tokenizer, steps, coming, seconds) -> Table:
    """What is running now, and how the pool is doing."""
    statistics = engine.pool.statistics
    table = Table(
        *("adapter", "slot", "token", "text"),
        title=f"{engine.generated / seconds:.1f} tokens/s: {len(engine.running)} requests running, "
        f"{len(engine.queue)} queued, {coming} to come after step {steps}",
        caption=f"pool: {len({request.adapter for request in engine.running})} adapters in use, {statistics.hits} hits, "
        f"{statistics.misses} misses, {statistics.evictions} evictions, {engine.refused} refusals",
        expand=True,
    )
    for request in engine.running:
        text = Text(repr(tokenizer.decode(request.tokens))[1:-1], no_wrap=True, overflow="ellipsis")
        progress = f"{len(request.tokens)}/{request.new_tokens}"
        table.add_row(request.adapter or BASE, str(request.slot), progress, text)
    return table


def check_alone(report, model, adapters, tokenizer, requests):
    """Hold the tokens of every request against transformers' `generate` on a model with its adapter merged."""
    alone, gaps, flips = {}, [], []
    for adapter in dict.fromkeys(request.adapter for request in requests):
        writer = model if adapter is None else merged(model, adapters[adapter])
        for prompt in dict.fromkeys(tuple(request.prompt) for request in requests if request.adapter == adapter):
            same = [request for request in requests if (request.adapter, tuple(request.prompt)) == (adapter, prompt)]
            expected, logits = generate(writer, prompt, max(request.new_tokens for request in same))
            alone[adapter, prompt] = expected
            gaps += [first - second for first, second in logits.topk(2).values.tolist()]
            for request in same:
                if request.tokens != expected[: request.new_tokens]:
                    flips.append(describe_flip(request, expected, logits))
    for flip in flips:
        report.say(flip)
    report.check(
        "Every request's tokens are those of its adapter merged and run alone by transformers' generate",
        not flips,
        f"{len(requests) - len(flips)} of {len(requests)} requests, in fp32; the closest call was decided by a logit "
        f"gap of {min(gaps):.1e}",
    )
    tell_apart(report, tokenizer, alone)


def generate(model, prompt, new_tokens) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits `[tokens, vocabulary]` that decided each."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def describe_flip(request, expected, logits) -> str:
    pairs = zip(request.tokens, expected, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if at is None:
        return f"{request.adapter or BASE}: {len(request.tokens)} tokens, alone {len(expected)}, of up to {request.new_tokens}"
    gap = logits[at, expected[at]] - logits[at, request.tokens[at]]
    return f"{request.adapter or BASE}: token {at} is {request.tokens[at]}, alone {expected[at]}; the logit gap is {gap:.1e}"


def tell_apart(report, tokenizer, alone):
    """Say how different the adapters' texts are, and show those of the most popular prompt."""
    prompts = [prompt for _, prompt in alone]
    shown = max(prompts, key=prompts.count)
    texts = {prompt: [tokens for (_, each), tokens in alone.items() if each == prompt] for prompt in prompts}
    alike = sum(any(same_start(a, b) for b in group if b is not a) for group in texts.values() for a in group)
    report.say(f"{len(alone)} pairs of adapter and prompt: {len(alone) - alike} texts are unlike any other adapter's")
    rows = [
        (adapter or BASE, repr(tokenizer.decode(tokens)))
        for (adapter, prompt), tokens in alone.items()
        if prompt == shown
    ]
    report.table(("adapter", f"after {tokenizer.decode(list(shown))!r}"), rows[:10])


def same_start(a, b) -> bool:
    return all(x == y for x, y in zip(a, b, strict=False))
