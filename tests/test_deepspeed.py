# ruff: noqa: E402
"""DeepSpeed's ZeRO-3 on two ranks (gloo, on the CPU): a row of docs/distributed.md."""

import pytest

pytestmark = pytest.mark.integration
pytest.importorskip("deepspeed")
pytest.importorskip("peft")

import zero3
from features import FUSED, feature
from ranks import Ranks


@pytest.fixture(scope="module")
def processes():
    ranks = Ranks(timeout=200)
    yield ranks
    ranks.stop()


@feature("DeepSpeed ZeRO-3, PEFT's layers and `LoRALinear`", FUSED)
@pytest.mark.parametrize("ours", [False, True])
def test_zero3(processes, ours):
    for ran in processes.run(zero3.train, ours):
        assert ran.calls and not ran.reasons
