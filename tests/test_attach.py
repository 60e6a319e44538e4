"""A pool attached to a model: every sequence gets its own adapter in every layer, and detaching leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import AdapterPool, BatchPlan, apply_lora, attach_pool, lora_linear_batched

SIZES = {"up": (8, 12), "down": (12, 8)}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")


class Block(nn.Module):
    """Two layers; the second sees the last token alone, as an output head does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))[..., -1:, :])


@pytest.fixture
def model():
    return Block().eval().requires_grad_(False)


@pytest.fixture
def pool(model):
    """Adapters of ranks 3, 2 and 1; the last one adapts `up` alone."""
    pool = AdapterPool.for_model(model, slots=3, max_rank=3)
    for name, rank, layers in (("a", 3, SIZES), ("b", 2, SIZES), ("c", 1, ["up"])):
        tensors = {each: (torch.randn(rank, SIZES[each][0]), torch.randn(SIZES[each][1], rank), 0.5) for each in layers}
        pool.load_tensors(name, tensors)
    return pool


def slots_of(pool, *names):
    return torch.tensor([-1 if name is None else pool.acquire(name) for name in names], dtype=torch.int32)


def alone(model, pool, name, x):
    """The model with the adapter in its weights."""
    merged = copy.deepcopy(model)
    if name is not None:
        slot = pool.resident[name]
        for layer in SIZES:
            adapters = pool.layer(layer)
            a, b = adapters.slot(slot, int(adapters.ranks[slot]))
            getattr(merged, layer).weight.data += adapters.scalings[slot] * b @ a
    return merged(x)


def test_every_sequence_gets_its_own_adapter(model, pool):
    names, x = ("b", None, "a", "c", "b"), torch.randn(5, 4, 8)
    slots = slots_of(pool, *names)
    expected = torch.stack([alone(model, pool, name, row) for name, row in zip(names, x, strict=True)])
    serving = attach_pool(model, pool)
    with serving.batch(slots):
        y = model(x)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y[0], model(x)[0], atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8), (3, 5, 8), (15, 8), (3, 2, 2, 8), (3, 0, 8)], ids=str)
def test_rows_are_those_of_the_plan(model, pool, shape):
    slots, x = slots_of(pool, "a", None, "b"), torch.randn(shape)
    plan = BatchPlan(slots.repeat_interleave(x.shape[:-1].numel() // 3))
    expected = lora_linear_batched(x, model.up.weight, pool.layer("up"), plan, bias=model.up.bias)
    serving = attach_pool(model, pool)
    with serving.batch(slots):
        assert torch.equal(model.up(x), expected)


def test_several_adapters_a_sequence(model, pool):
    """With weight 0 an adapter is as good as none, and half of it twice is all of it."""
    serving, x = attach_pool(model, pool), torch.randn(3, 4, 8)
    a, b = slots_of(pool, "a", "b").tolist()
    with serving.batch(torch.tensor([a, b, -1], dtype=torch.int32)):
        expected = model(x)
    slots = torch.tensor([[a, b], [b, b], [-1, -1]], dtype=torch.int32)
    with serving.batch(slots, torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])):
        torch.testing.assert_close(model(x), expected)


def test_one_plan_for_all_layers_with_as_many_rows(model, pool, monkeypatch):
    made = []
    monkeypatch.setattr(
        "lora_kernels.adapters.attach.BatchPlan", lambda *parts: made.append(parts[0]) or BatchPlan(*parts)
    )
    serving = attach_pool(model, pool)
    for _ in range(2):
        with serving.batch(slots_of(pool, "a", "b")):
            model(torch.randn(2, 4, 8)), model(torch.randn(2, 4, 8))
    assert [len(slots) for slots in made] == [2, 8] * 2


def test_outside_of_a_batch_it_is_the_base_model(model, pool):
    x, keys, parameters = torch.randn(2, 4, 8), list(model.state_dict()), list(model.parameters())
    base, modules = model(x), list(model.modules())
    serving = attach_pool(model, pool)
    slots = slots_of(pool, "a", "b")
    assert torch.equal(model(x), base)
    with pytest.raises(RuntimeError, match="stop"), serving.batch(slots):
        raise RuntimeError("stop")
    assert torch.equal(model(x), base)
    with serving.batch(torch.full((2,), -1, dtype=torch.int32)):
        torch.testing.assert_close(model(x), base)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_detach_leaves_no_trace(model, pool):
    x = torch.randn(2, 4, 8)
    before, base = {name: dict(vars(module)) for name, module in model.named_modules()}, model(x)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    serving = attach_pool(model, pool)
    with serving.batch(slots_of(pool, "a", "b")):
        model(x)
    serving.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), base)
    copy.deepcopy(model)
    attach_pool(model, pool)


def test_only_the_layers_of_the_pool(model):
    pool = AdapterPool.for_model(model, slots=1, max_rank=1, target_modules=["down"])
    pool.load_tensors("a", {"down": (torch.randn(1, 12), torch.randn(8, 1), 1.0)})
    slots, x = slots_of(pool, "a"), torch.randn(1, 4, 8)
    base = model.up(x)
    with attach_pool(model, pool).batch(slots):
        assert torch.equal(model.up(x), base)
        assert "forward" not in vars(model.up) and "forward" in vars(model.down)


def test_inference_mode_and_hooks(model, pool):
    serving, x, seen = attach_pool(model, pool), torch.randn(2, 4, 8), []
    model.up.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    slots = slots_of(pool, "a", "b")
    with serving.batch(slots):
        y = model(x)
    with torch.inference_mode(), serving.batch(slots):
        assert torch.equal(model(x), y)
    assert seen == [(2, 4, 12)] * 2


def test_layers_that_require_grad(model, pool):
    serving = attach_pool(model.requires_grad_(True), pool)
    with serving.batch(slots_of(pool, "a")):
        with pytest.raises(NotImplementedError, match="inference_mode"):
            model(torch.randn(1, 4, 8))
        with torch.no_grad():
            model(torch.randn(1, 4, 8))


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 1], TypeError, "int32"),
        (torch.tensor([0, 1]), TypeError, "got torch.int64, expected an int32"),
        (torch.zeros(2, 1, 1, dtype=torch.int32), ValueError, r"got shape \[2, 1, 1\], expected \[M\]"),
        (
            torch.zeros(3, dtype=torch.int32),
            ValueError,
            "got 3, one a sequence, expected a divisor of a layer's 8 rows",
        ),
        (torch.zeros(0, dtype=torch.int32), ValueError, "got 0, one a sequence"),
        (torch.tensor([0, 3], dtype=torch.int32), ValueError, "got slot 3, expected at most 2"),
    ],
    ids=str,
)
def test_bad_slots(model, pool, slots, error, message):
    serving, x = attach_pool(model, pool), torch.randn(2, 4, 8)
    with pytest.raises(error, match=message), serving.batch(slots):
        model(x)
    with serving.batch(slots_of(pool, "a", "b")):  # and all is well again
        model(x)


def test_batches_at_the_wrong_time(model, pool):
    serving, slots = attach_pool(model, pool), slots_of(pool, "a")
    with serving.batch(slots):
        with pytest.raises(RuntimeError, match="another one is active"), serving.batch(slots):
            pass
        with pytest.raises(RuntimeError, match="leave it first"):
            serving.detach()
        model(torch.randn(1, 4, 8))
    model.train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"), serving.batch(slots):
        pass
    serving.detach()
    with pytest.raises(RuntimeError, match="detached"), serving.batch(slots):
        pass
    with pytest.raises(RuntimeError, match="detached already"):
        serving.detach()


def without_down(model):
    del model.down


def with_lora(model):
    apply_lora(model, ["up"], r=2)


def with_other_width(model):
    model.up = nn.Linear(8, 16)


def in_fp16(model):
    model.half()


def with_one_layer_twice(model):
    model.up = model.down = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_down, ValueError, "has no layer down, which the pool has"),
        (with_lora, TypeError, "model: up: got LoRALinear, expected an nn.Linear \\(not a subclass\\)"),
        (with_other_width, ValueError, "up is 8 -> 16, torch.float32, cpu, expected 8 -> 12, torch.float32, cpu"),
        (in_fp16, ValueError, "up is 8 -> 12, torch.float16, cpu, expected 8 -> 12, torch.float32"),
    ],
)
def test_models_that_do_not_fit(model, pool, change, error, message):
    change(model)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(error, match=message):
        attach_pool(model, pool)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_layer_under_two_names(model):
    with_one_layer_twice(model)
    pool = AdapterPool({"up": (8, 8), "down": (8, 8)}, slots=1, max_rank=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="down is the same layer as another"):
        attach_pool(model, pool)


def test_attached_already(model, pool):
    serving = attach_pool(model, pool)
    with pytest.raises(ValueError, match="call its detach"):
        attach_pool(model, pool)
    with pytest.raises(TypeError, match=r"call detach\(\) first"):
        copy.deepcopy(model)
    serving.detach()
