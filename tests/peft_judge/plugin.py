"""A pytest plugin: PEFT's own tests, with every model run fused and judged (JUDGE=fused), or as they are (JUDGE=plain).

Writes the outcome of each test, and what the judge saw, to the file that JUDGE_OUT names; xdist's workers one each.
"""

import collections
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lora_kernels
from peft_judge.judge import FAULTS, Judge, planted

outcomes: dict[str, str] = {}
judge = Judge()


def pytest_configure(config):
    config.addinivalue_line("markers", "regression: PEFT's own")
    if os.environ["JUDGE"] == "plain":
        return
    config.stack = lora_kernels.patch_peft()
    config.stack.enter_context(judge.watching())
    if os.environ["JUDGE"] in FAULTS:
        config.stack.enter_context(planted(os.environ["JUDGE"]))


class EveryModel(collections.Counter):
    """The models that PEFT's tests think they have had from the hub: what they have had they do not ask it for again."""

    def __contains__(self, name):
        return True


def pytest_collection_finish():
    if utilities := sys.modules.get("tests.testing_utils"):
        utilities._HUB_MODEL_ACCESSES = EveryModel()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    seen = {name: getattr(judge, name) for name in ("calls", "mixed", "gradients", "not_fused", "wrong")}
    with open(f"{os.environ['JUDGE_OUT']}.part-{worker}", "w") as file:
        json.dump({"outcomes": outcomes, **seen}, file)
