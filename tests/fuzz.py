"""Random problems against the judge: `TRITON_INTERPRET=1 python tests/fuzz.py --n 2000 --seed 0`.

Forward and all gradients, with and without the base term, through every strategy that runs in this process. With
`--orders 10000` it runs batched one-launch kernels instead, their programs in so many random orders, of which each must
give the same bits. Number i of a seed is always the same. A failure prints what repeats it.
"""

import argparse
import collections
import functools
import multiprocessing
import os
import random
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed

import conftest
import torch
from batches import Batch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from lora_kernels import testing


def problem(seed, index, limit, strategies):
    """Case and (backend, strategy) number `index`: the strategy first, then the first case that it supports."""
    rng = random.Random(f"{seed}-{index}")
    backend, strategy = rng.choice(strategies)
    while not conftest.supports(case := testing.random_case(rng, limit), backend, strategy):
        pass
    return case, backend, strategy


def judge(seed, index, limit, strategies):
    """The strategy's name, and None or what went wrong."""
    case, backend, strategy = problem(seed, index, limit, strategies)
    try:
        testing.check(case, backend, strategy, conftest.DEVICE)
    except Exception as error:
        what = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        return f"{backend}-{strategy}", f"{what}\n{reproducer(case, backend, strategy)}"
    return f"{backend}-{strategy}", None


def reproducer(case, backend, strategy):
    mend = "mend_interpreter(); " if conftest.INTERPRETED else ""
    code = f"{mend}check({case}, {backend!r}, {strategy!r}, {conftest.DEVICE!r})"
    setting = "TRITON_INTERPRET=1 " if conftest.INTERPRETED else ""
    return f'{setting}python -c "import torch; from lora_kernels.testing import *; {code}"'


def judge_order(seed, index):
    """The launch's name, and None or what went wrong."""
    import orders

    rng, order = random.Random(f"{seed}-{index}"), []
    name = rng.choice(list(orders.MORE_PROGRAMS))
    batch, expected = in_order(name)

    def shuffle(programs):
        rng.shuffle(programs)
        order[:] = programs

    try:
        assert torch.equal(orders.run(batch, shuffle), expected), "other bits"
    except Exception as error:
        return name, f"{error!r} in orders.MORE_PROGRAMS[{name!r}], its programs in the order {order[::-1]}"
    return name, None


@functools.cache
def in_order(name):
    """A launch's batch, and its y where the programs run in the order of their numbers."""
    import orders

    batch = Batch(**orders.MORE_PROGRAMS[name])
    return batch, orders.run(batch, list.reverse)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="how many problems")
    parser.add_argument("--orders", type=int, help="how many orders of programs, instead of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=64, help="largest m, n and k, about")
    parser.add_argument("--backend", choices=sorted({b for b, _ in conftest.STRATEGIES}))
    parser.add_argument("--strategy", choices=sorted({s for _, s in conftest.STRATEGIES}))
    parser.add_argument("--jobs", type=int, default=1 if conftest.DEVICE == "cuda" else os.cpu_count())
    options = parser.parse_args()
    strategies = [
        (backend, strategy)
        for backend, strategy in conftest.STRATEGIES
        if options.backend in (None, backend) and options.strategy in (None, strategy)
    ]
    if not strategies:
        parser.error(f"no strategy {options.strategy} in backend {options.backend}")
    if options.orders and not conftest.INTERPRETED:
        parser.error("--orders: only the interpreter runs programs in an order that is given")
    what, count = ("orders", options.orders) if options.orders else ("problems", options.n)

    console, passed, failed = Console(), collections.Counter(), 0
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task(what, total=count)
        jobs = [
            pool.submit(judge_order, options.seed, i)
            if options.orders
            else pool.submit(judge, options.seed, i, options.limit, strategies)
            for i in range(count)
        ]
        for job in as_completed(jobs):
            name, wrong = job.result()
            passed[name] += wrong is None
            if wrong:
                failed += 1
                console.print(wrong, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    console.print("passed: " + ", ".join(f"{name} {count}" for name, count in sorted(passed.items())), highlight=False)
    console.print(f"{passed.total()} of {count} {what} passed, seed {options.seed}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
