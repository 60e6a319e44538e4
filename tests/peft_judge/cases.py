"""The models and fixtures that the tests of the PEFT integration share."""

import functools

import pytest
import torch
from conftest import DEVICE, INTERPRETED
from features import EXACT, FUSED
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels import integrations
from lora_kernels.integrations.peft import FusedLinear
from peft_judge.judge import Judge

K, N = 24, 40


class Net(nn.Module):
    """Two layers to adapt, one of each layout, and a head that is not."""

    def __init__(self, checkpointing=None):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(K, N), Conv1D(K, N), nn.Linear(K, 3)
        self.checkpointing = checkpointing

    def block(self, x):
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x):
        y = self.block(x) if self.checkpointing is None else checkpoint(self.block, x, **self.checkpointing)
        return self.head(y)


def config(targets=("up",), **settings):
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": list(targets)} | settings
    return LoraConfig(**settings)


def peft_model(lora_config=None, base=None):
    torch.manual_seed(2)
    return get_peft_model(base or Net(), lora_config or config())


@pytest.fixture
def x():
    return torch.randn(2, 5, K, device=DEVICE)


@pytest.fixture
def as_before(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")  # the kernels have tests of their own
    with torch.device(DEVICE):
        yield
    lora_kernels.unpatch_peft()
    integrations._warn_once.cache_clear()


@pytest.fixture
def judge(request):
    """Judges every fused call, and whether calls ran as the test's row of the table says."""
    with Judge().watching() as judge:
        yield judge
    assert not judge.wrong or "planted" in request.node.name
    shown = getattr(request.function, "feature", None)
    if shown and shown.how == FUSED:
        assert judge.calls and not judge.not_fused
    elif shown and shown.how == EXACT:
        assert judge.not_fused and not judge.calls


def step(model, x):
    """y, and the gradients of what trains, by name."""
    y = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y.float().square().sum(), list(trained.values()), allow_unused=True)
    return y, dict(zip(trained, gradients, strict=True))


CLOSE = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
AT_16_BITS = functools.partial(torch.testing.assert_close, rtol=0.1, atol=0.1)  # the judge is stricter
BITWISE = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_same(model, x, close=CLOSE):
    """Fused and unfused give the same y and gradients."""
    y, gradients = step(model, x)
    lora_kernels.unpatch_peft(model)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    expected, expected_gradients = step(model, x)
    lora_kernels.apply_lora_kernels_to_model(model)
    close(y, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        if expected_gradients[name] is None:
            assert gradient is None, name
        else:
            close(gradient, expected_gradients[name])


def assert_compiles_to_one_operator(model, x, expected):
    """`model(x)` is `expected` in one graph, in which our operator stands."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    assert any("lora_kernels.lora_linear" in str(node.target) for node in graphs[-1].graph.nodes)
