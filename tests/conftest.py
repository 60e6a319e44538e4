"""What every test shares: the device, the strategies that run in this process, an interpreter that can be trusted."""

import contextlib
import os

import pytest
import torch
from compiled import ask_for  # noqa: F401  a fixture

from lora_kernels import dispatch, testing
from lora_kernels.backends import BACKENDS

DEVICE = os.environ.get("LORA_KERNELS_TEST_DEVICE", "cpu")
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # a machine with a GPU may have torch and pytest only
    from hypothesis import Phase, settings

    quick = {"max_examples": 20, "derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}
    settings.register_profile("default", deadline=None, **quick)  # shrinking takes minutes in the interpreter
    settings.register_profile("thorough", deadline=None, max_examples=500)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def supports(case, backend, strategy) -> bool:
    """Whether dispatch would run `case` that way on the device under test."""
    t = testing.make_tensors(case, DEVICE)
    x = t.x.reshape(-1, case.k)
    try:
        dispatch.plan_for(x, t.weight, t.lora_a, t.lora_b, case.dropout_p, backend, strategy)
    except NotImplementedError:
        return False
    return True


if INTERPRETED:
    import interpreter

    interpreter.prepare()

_PROBE = testing.Case(m=16, n=16, k=16, r=16, dtype=torch.float16)
STRATEGIES = [(b, s) for b, module in BACKENDS.items() for s in module.STRATEGIES if supports(_PROBE, b, s)]


def every_strategy(cases):
    """`cases` (name -> Case) times the strategies that support them, as parameters (case, backend, strategy)."""
    return pytest.mark.parametrize(
        ("case", "backend", "strategy"),
        [
            pytest.param(case, backend, strategy, id=f"{name}-{backend}-{strategy}")
            for name, case in cases.items()
            for backend, strategy in STRATEGIES
            if supports(case, backend, strategy)
        ],
    )


def pytest_collection_modifyitems(items):
    if DEVICE != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU and LORA_KERNELS_TEST_DEVICE=cuda"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=STRATEGIES, ids="-".join, scope="session")
def pair(request):
    """A (backend, strategy) that runs in this process."""
    return request.param


@pytest.fixture(autouse=True)
def _same_draws_in_every_order():
    torch.manual_seed(0)
