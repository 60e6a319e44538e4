"""The programs of a one-launch kernel in any order: the same bits as in their own order, and all counters back at zero."""

import contextlib
from unittest import mock

import torch
from interpreter import programs_in_order

from lora_kernels.backends import launcher, triton_batched
from lora_kernels.configs import Config

SMALL = dict(m=4, k=96, slots=2, rank=5, popularity="distinct")  # two shrink programs
FIVE_PROGRAMS = dict(
    tiles=dict(SMALL, widths=(40,)),  # three tiles
    parts=dict(SMALL, widths=(12,)),  # one, its K in three parts
)
MORE_PROGRAMS = dict(
    tiles=dict(SMALL, widths=(50,)),
    parts=dict(SMALL, widths=(12,), k=190),
    rows=dict(SMALL, widths=(12,), m=18),
    slices=dict(SMALL, widths=(20, 5)),
    pairs=dict(SMALL, widths=(24,), per_row=2, m=9, slots=3, rank=17),
)


@contextlib.contextmanager
def small_tiles():
    """Tiles so small that a toy problem has several programs of each kind, and adapters in several groups."""
    small = dict(batched_shrink=Config(16, 32, 64), batched_one_launch=Config(16, 16, 16))
    with (
        mock.patch.object(triton_batched.backend, "config_for", lambda kernel, *_, **__: small[kernel]),
        mock.patch.object(triton_batched, "GROUP", 1),
    ):
        yield


def run(batch, rearrange=lambda programs: None):
    """y of the batch; `rearrange` changes the list of its programs in place."""
    with small_tiles(), programs_in_order(rearrange):
        y = batch.run(("triton", "one_launch"))
    assert not launcher.counters(torch.device("cpu"), 1).any(), "counters are not back at zero"
    return y
