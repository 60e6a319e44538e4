"""Tokens per second against the number of adapters in a batch: ours, PEFT's, merging in turns, and the base model."""

import copy
import functools
import time
from statistics import median

import torch
from peft import PeftModel

from lora_kernels import BatchPlan, attach_pool, dispatch
from lora_kernels.adapters.checkpoint import read_adapter
from lora_kernels.demo.adapters import make_pool, sharing_weights
from lora_kernels.demo.engine import RowCache
from lora_kernels.demo.report import device_name
from lora_kernels.demo.training import relative_error
from lora_kernels.modules import weight_of

BASE = "the base model alone"
CONTEXT = 32  # tokens that every row has in the cache


class Contest:
    """The ways to decode one batch; each takes the adapter of every row and returns the logits and the tokens made."""

    def __init__(self, model, adapters, traffic):
        self.traffic, self.model = traffic, model
        rows, device = traffic.batch, model.device
        self.cache = RowCache(model.config, rows, CONTEXT + 1, model.dtype, device)
        self.tokens = torch.randint(model.config.vocab_size, (rows, CONTEXT + 1), device=device)
        self.positions = torch.arange(CONTEXT + 1, device=device).expand(rows, -1)

        served = sharing_weights(model)
        pool = make_pool(served, adapters, len(adapters))
        self.slots = {name: pool.acquire(name) for name in adapters}
        self.served, self.serving = served, attach_pool(served, pool)
        name, (k, _) = next(iter(pool.layers.items()))
        x = torch.empty(rows, k, dtype=model.dtype, device=device)
        plan = BatchPlan(torch.zeros(rows, dtype=torch.int32, device=device))
        self.plan = dispatch.batched_plan_for(x, weight_of(served.get_submodule(name)), (pool.layer(name),), plan)

        (first, directory), *others = adapters.items()
        options = {"autocast_adapter_dtype": False}  # no rounding to and from fp32: adapters in the model's dtype
        self.peft = PeftModel.from_pretrained(copy.deepcopy(model), directory, first, **options).eval()
        for name, directory in others:
            self.peft.load_adapter(directory, name, **options)
        self.ways = {
            "ours": self.ours,
            "PEFT's adapter_names": self.mixed,
            f"merge, decode {traffic.steps_per_swap} tokens, unmerge": self.swapped,
            BASE: self.base,
        }
        self.forward(model, rows, slice(CONTEXT))  # last: bitsandbytes repacks the weights that it evaluates

    def base(self, names):
        return self.decode(self.model, len(names), self.traffic.steps)

    def ours(self, names):
        slots = torch.tensor([self.slots[name] for name in names], dtype=torch.int32, device=self.model.device)
        with self.serving.batch(slots):
            return self.decode(self.served, len(names), self.traffic.steps)

    def mixed(self, names):
        return self.decode(functools.partial(self.peft, adapter_names=names), len(names), self.traffic.steps)

    def swapped(self, names):
        """One adapter's turn; the turns of the others would follow."""
        self.peft.merge_adapter(adapter_names=names[:1])
        result = self.decode(self.peft, names.count(names[0]), self.traffic.steps_per_swap)
        self.peft.unmerge_adapter()
        return result

    def decode(self, forward, rows, steps):
        """The same token in the same place, again and again: the work of a step does not depend on it."""
        for _ in range(steps):
            logits = self.forward(forward, rows, slice(CONTEXT, None))
            logits.argmax(-1).tolist()  # on the host: the work is done
        return logits, rows * steps

    @torch.inference_mode()
    def forward(self, forward, rows, window):
        tokens, positions = self.tokens[:rows, window], self.positions[:rows, window]
        mask = self.cache.place(0, positions)
        return forward(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits


def measure(report, contest, adapters):
    model, traffic = contest.model, contest.traffic
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= traffic.batch]
    rows = {count: [name for name in list(adapters)[:count] for _ in range(traffic.batch // count)] for count in counts}

    ours, mixed, base = (decode(rows[counts[-1]])[0] for decode in (contest.ours, contest.mixed, contest.base))
    error, effect = relative_error(ours, mixed), relative_error(base, mixed)
    report.check(
        "PEFT's logits for the mixed batch are ours",
        error < effect / 2,
        f"relative RMS difference {error:.1e} in {model.dtype}; without the adapters it is {effect:.1e}",
    )

    speeds = {(way, count): [] for way in contest.ways for count in counts}
    for repeat in range(traffic.repeats):
        for count, names in rows.items():  # taking turns, so that a busy moment hits all
            turn = repeat * (traffic.batch // count) % traffic.batch
            for way, decode in contest.ways.items():
                start = time.perf_counter()
                _, tokens = decode(names[turn:] + names[:turn])
                if model.device.type == "cuda":
                    torch.cuda.synchronize()  # the unmerging too
                speeds[way, count].append(tokens / (time.perf_counter() - start))
    medians = {key: median(values) for key, values in speeds.items()}
    table = [(way, *(f"{medians[way, count]:.1f}" for count in counts)) for way in contest.ways]
    report.table(("tokens/s, by distinct adapters", *map(str, counts)), table)
    ranks = ", ".join(str(read_adapter(directory)[0]["r"]) for directory in adapters.values())
    report.say(f"Medians of {traffic.repeats}, {traffic.batch} rows in {model.dtype}, context {CONTEXT}; ranks {ranks}")
    rounded = {way: {count: [round(v, 1) for v in speeds[way, count]] for count in counts} for way in contest.ways}
    what = {
        "benchmark": "serving",
        "unit": "tokens/s",
        "rows": traffic.batch,
        "dtype": str(model.dtype),
        "context": CONTEXT,
    }
    report.samples("serving.json", what | {"ranks": ranks, "by_distinct_adapters": rounded})
    report.say(
        f"Ours is {contest.plan.backend.__name__.rpartition('.')[2]} / {contest.plan.strategy} ({contest.plan.why})"
    )
    plot(report, contest.ways, counts, speeds, traffic.batch)


def plot(report, ways, counts, speeds, batch):
    """A line through the medians of each way, in a band from its slowest to its fastest."""
    with report.plot("serving.png", "decode throughput against the number of adapters") as axes:
        for i, way in enumerate(ways):
            samples = [speeds[way, count] for count in counts]
            style = {"color": f"C{i}", "marker": "o"}
            if way == BASE:  # for which the number of adapters is no more than a name
                samples = [[speed for each in samples for speed in each]] * len(counts)
                style = {"color": "0.5", "linestyle": "--"}
            low, high = ([extreme(each) for each in samples] for extreme in (min, max))
            axes.plot(counts, [median(each) for each in samples], label=way, **style)
            axes.fill_between(counts, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set_ylim(bottom=0)
        axes.set(
            xlabel="distinct adapters in the batch",
            ylabel="tokens per second",
            title=f"Decoding a batch of {batch} on {device_name()}",
        )
        axes.figure.legend(loc="outside lower center", ncols=2)
