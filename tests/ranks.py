"""Two processes that are the ranks of one gloo group, and run a test's function as often as there are tests."""

import collections
import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing import connection
from typing import NamedTuple

import torch

WORLD = 2
TIMEOUT = 60  # seconds for a function, counted one by one: a machine that sleeps is no hang


class Ran(NamedTuple):
    """How often our kernels ran, and why they did not, on one rank."""

    calls: int
    reasons: set[str]


class Ranks:
    """Two processes. Started at the first call, and again after a failure, since a rank may then wait for the other."""

    def __init__(self, timeout=TIMEOUT):
        self.timeout = timeout
        self.processes, self.pipes = [], []

    def run(self, function, *args, **kwargs) -> list[Ran]:
        """`function(rank, *args, **kwargs)` in each process; AssertionError if one fails or is not back in time."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        waiting, ran = dict(zip(self.pipes, range(WORLD), strict=True)), {}
        for _ in range(self.timeout):
            for pipe in connection.wait(list(waiting), 1.0):
                try:
                    failed, ran[waiting.pop(pipe)] = pipe.recv()
                except EOFError:
                    failed = "a rank died"
                if failed:
                    self.stop()
                    raise AssertionError(failed)
            if not waiting:
                return [ran[rank] for rank in range(WORLD)]
        self.stop()
        raise AssertionError(f"no answer in {self.timeout} s: ranks {list(waiting.values())} hang")

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["peft", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
        meeting = os.path.join(tempfile.mkdtemp(), "meeting")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(rank, meeting, theirs), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _serve(rank, meeting, pipe):
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels have tests of their own
    os.environ |= {"LORA_KERNELS_BACKEND": "eager", "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{meeting}", datetime.timedelta(seconds=TIMEOUT), world_size=WORLD, rank=rank
    )
    while True:
        function, args, kwargs = pipe.recv()
        try:
            with watched() as (calls, reasons):
                torch.manual_seed(0)
                function(rank, *args, **kwargs)
            pipe.send((None, Ran(calls["forward"], reasons)))
        except BaseException:
            pipe.send((f"rank {rank}:\n{traceback.format_exc()}", None))


@contextlib.contextmanager
def watched():
    from unittest import mock

    from lora_kernels import dispatch, integrations

    calls, reasons, forward = collections.Counter(), set(), dispatch.Plan.forward

    def counted(plan, *args):
        calls["forward"] += 1
        return forward(plan, *args)

    with (
        mock.patch.object(dispatch.Plan, "forward", counted),
        mock.patch.object(integrations, "_warn_once", reasons.add),
    ):
        yield calls, reasons
