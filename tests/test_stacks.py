# ruff: noqa: E402
"""Training stacks on a tiny model: transformers' blocks run as one, its Trainer, Accelerate, compile and checkpointing."""

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from torch.utils import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from conftest import DEVICE, INTERPRETED
from features import EXACT, FUSED, feature

import lora_kernels
from lora_kernels import integrations, testing
from lora_kernels.integrations import transformers as blocks

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3", {}),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    with torch.device(DEVICE):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The names of the blocks that ran as one."""
    seen = []
    for name in ("lora_projections", "lora_mlp"):
        original = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, f=original, n=name, **k: seen.append(n) or f(*a, **k))
    return seen


@pytest.fixture
def said(monkeypatch):
    """The reasons that were said."""
    reasons = []
    monkeypatch.setattr(integrations, "_warn_once", reasons.append)
    return reasons


def model_of(name="llama", depth=2, **settings):
    family, more = MODELS[name]
    sizes = SIZES | {"num_hidden_layers": depth} | more
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**sizes)
    torch.manual_seed(0)
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def tokens():
    return torch.randint(1, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def step(model, run=None):
    """Loss and all gradients, by name."""
    model.zero_grad()
    loss = (model if run is None else run)(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, theirs, run=None):
    """Within the error budget: twice what PEFT's own forward is off by, and the order of the sums."""
    plain, truth = step(theirs), step(copy.deepcopy(theirs).double())
    ours = step(model, run)
    assert ours.keys() == plain.keys()
    for name in ours:
        zero = torch.zeros_like(truth[name])
        error, yardstick = (testing.errors(t[name], truth[name], zero)["rms"][0] for t in (ours, plain))
        assert error <= testing.Budget(yardstick, 2.0, 2e-6).limit, f"{name}: {error:.2g}, PEFT's {yardstick:.2g}"


def fused(name="llama", **settings):
    model = model_of(name, **settings)
    theirs = copy.deepcopy(model)
    return model, theirs, lora_kernels.apply_lora_kernels_to_model(model, blocks=True)


@feature(
    "q, k, v and gate, up, down as one, in Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3: GQA, biases, q/k norms", FUSED
)
@pytest.mark.parametrize("name", MODELS)
def test_blocks(name, calls):
    model, theirs, report = fused(name)
    assert [block.name.rpartition(".")[2] for block in report.blocks] == ["self_attn", "mlp"] * 2
    assert not any(block.reason for block in report.blocks) and not report.skipped
    assert str(report).splitlines()[15] == "4 of 4 blocks run as one"
    assert_same(model, theirs)
    assert calls == ["lora_projections", "lora_mlp"] * 2
    assert list(model.state_dict()) == list(theirs.state_dict())


@feature("projections without an adapter, ranks that differ, a trained bias", FUSED)
def test_some_projections_have_an_adapter(calls):
    for targets in (["q_proj", "v_proj", "up_proj"], ["k_proj", "v_proj", "gate_proj", "down_proj"]):
        model, theirs, report = fused(target_modules=targets, rank_pattern={targets[0]: 7}, bias="lora_only")
        assert not any(block.reason for block in report.blocks)
        assert_same(model, theirs)
    assert set(calls) == {"lora_projections", "lora_mlp"}


@feature("dropout in blocks: the masks of layer by layer", FUSED)
def test_dropout_draws_the_same_masks(calls):
    model = model_of(lora_dropout=0.3)
    alone = copy.deepcopy(model)
    lora_kernels.apply_lora_kernels_to_model(alone)
    lora_kernels.apply_lora_kernels_to_model(model, blocks=True)
    results = []
    for each in (model, alone):
        torch.manual_seed(5)
        results.append(step(each))
    torch.testing.assert_close(*results)
    assert len(calls) == 4


@feature("blocks: several active adapters, switched and disabled ones, merging, saving", FUSED)
def test_adapters_of_blocks(calls, tmp_path):
    model, theirs, _ = fused()
    for each in (model, theirs):
        torch.manual_seed(2)
        each.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        each.base_model.set_adapter(["default", "other"])
    assert_same(model, theirs)
    assert len(calls) == 4
    with model.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits)
    assert len(calls) == 4
    model.base_model.set_adapter("other")
    theirs.base_model.set_adapter("other")
    assert_same(model, theirs)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        y = theirs.eval()(tokens()).logits
        base = model_of().unload()
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path / "other")(tokens()).logits, y)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens()).logits, y)
        model.unmerge_adapter()
        torch.testing.assert_close(model(tokens()).logits, y)
        torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, y)


def test_an_adapter_of_some_layers_only(calls, said):
    model, theirs, _ = fused()
    for each in (model, theirs):
        torch.manual_seed(2)
        targets = ["q_proj", "v_proj", "up_proj"]
        each.add_adapter("some", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        each.set_adapter("some")
    assert_same(model, theirs)
    assert calls == ["lora_projections", "lora_mlp"] * 2 and not said
    model.base_model.model.model.layers[1].mlp.gate_proj.base_layer.register_forward_pre_hook(no_hook)
    step(model)
    assert calls[4:] == ["lora_projections", "lora_mlp", "lora_projections"] and "a layer has a hook" in said[0]


@feature("blocks: `deepcopy`, `pickle`, `unpatch_peft(model)`", FUSED)
def test_copies_of_blocks(calls):
    model, theirs, _ = fused()
    step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        calls.clear()
        assert_same(other, theirs)
        assert len(calls) == 4
        attention = other.base_model.model.model.layers[0].self_attn
        assert attention.q_proj.together.layers[0] is attention.q_proj is not model.base_model.model.model.layers[0]
    calls.clear()
    lora_kernels.unpatch_peft(model)
    step(model)
    assert not calls and {type(m) for m in model.modules()} == {type(m) for m in theirs.modules()}


def no_hook(module, args):
    return None


@feature(
    "hooks on a projection, another activation, a variant, one adapted projection, other blocks",
    f"{EXACT}; layer by layer",
)
def test_what_does_not_fit_runs_layer_by_layer(calls, said):
    def hooked(model):
        model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(no_hook)
        model.base_model.model.model.layers[0].mlp.up_proj.register_forward_pre_hook(no_hook)

    def another_activation(model):
        for layer in model.base_model.model.model.layers:
            layer.mlp.act_fn = torch.nn.ReLU()

    def another_class(model):
        kind = model.base_model.model.model.layers[0].mlp
        kind.__class__ = type("MyMLP", (type(kind),), {})

    for change, settings, words, left in (
        (hooked, {}, "a layer has a hook", 2),
        (another_activation, {}, "the activation is ReLU()", 2),
        (another_class, {}, "no MLP that we know", 3),
        (lambda model: None, {"use_dora": True}, "DoraLinearVariant has no kernel", 0),
        (
            lambda model: None,
            {"target_modules": ["q_proj", "gate_proj"]},
            "one of its projections has an adapter only",
            2,
        ),
    ):
        calls.clear()
        said.clear()
        model = model_of(**settings)
        change(model)
        theirs = copy.deepcopy(model)
        report = lora_kernels.apply_lora_kernels_to_model(model, blocks=True)
        reasons = [block.reason for block in report.blocks if block.reason]
        assert any(words in reason for reason in reasons) and any(words in reason for reason in said), (words, reasons)
        assert_same(model, theirs)
        assert len(calls) == left, words


def test_a_hook_set_later_is_noticed(calls, said):
    model, theirs, _ = fused()
    model.base_model.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(no_hook)
    model.base_model.model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(no_hook)
    assert_same(model, theirs)
    assert len(calls) == 2
    assert any("gate, up and down as one: a layer has a hook" in reason for reason in said)
    assert any("q, k and v as one: a layer has a hook" in reason for reason in said)


@feature(
    "`nn.DataParallel` (Trainer's choice on several GPUs without torchrun): the MLP as one, q, k and v alone", FUSED
)
def test_replicas_of_data_parallel(calls, said):
    model, theirs, _ = fused()
    ours, plain = step(model, _replica(model)), step(theirs, _replica(theirs))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert calls == ["lora_mlp"] * 2
    assert ["nn.DataParallel" in reason for reason in said] == [True] * 2 * 3


def _replica(model):
    """A copy as nn.DataParallel makes one for each device: parameters are plain tensors of another graph."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._modules.update((name, copies.get(child)) for name, child in module._modules.items())
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
    return copies[model]


@feature("`gradient_checkpointing_enable`, re-entrant or not", FUSED)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    model, *_ = fused(lora_dropout=0.2)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        results.append(step(model))
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))
    assert len(calls) == 12


@feature("selective checkpointing that names `lora_kernels.lora_linear`", FUSED)
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_selective_checkpointing(whole_blocks):
    op, counted = torch.ops.lora_kernels.lora_linear.default, []

    def policy(ctx, called, *args, **kwargs):
        counted.append((called, ctx.is_recompute))
        keep = checkpoint.CheckpointPolicy
        return keep.MUST_SAVE if called == op else keep.PREFER_RECOMPUTE

    model = model_of()
    theirs = copy.deepcopy(model)
    lora_kernels.apply_lora_kernels_to_model(model, blocks=whole_blocks)
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)
    for layer in model.base_model.model.model.layers:
        layer.forward = functools.partial(checkpoint.checkpoint, layer.forward, use_reentrant=False, context_fn=context)
    assert_same(model, theirs)
    assert counted.count((op, False)) == 14


@feature("`torch.compile(fullgraph=True)` of the whole model", f"{FUSED} (an operator a layer)")
def test_compile():
    torch._dynamo.reset()
    (model, theirs, _), graphs = fused(depth=1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(model, theirs, compiled)
    [graph] = graphs
    assert [str(node.target) for node in graph.graph.nodes].count("lora_kernels.lora_linear") == 7


@feature("autocast to bf16", FUSED)
def test_autocast(calls):
    model, theirs, _ = fused()
    truth = step(copy.deepcopy(theirs).double())
    with torch.autocast(DEVICE, torch.bfloat16):
        plain, ours = step(theirs), step(model)
    for name, grad in ours.items():
        zero = torch.zeros_like(truth[name])
        error, yardstick = (testing.errors(t[name], truth[name], zero)["rms"][0] for t in (ours, plain))
        assert grad.dtype == plain[name].dtype
        assert error <= testing.Budget(yardstick, 2.0, 2 * torch.finfo(torch.bfloat16).eps).limit, name
    assert len(calls) == 4


STEPS = 4


def curve_of_trainer(model, folder):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 64, (8, 9), device="cpu")]
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=7, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def curve_of_accelerate(model, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu")
    torch.manual_seed(7)
    rows = torch.utils.data.DataLoader(torch.randint(1, 64, (4 * STEPS, 9), device="cpu"), batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    losses = []
    for ids in rows:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_curve(train, folder, calls):
    curves = []
    for how in (None, {}, {"blocks": True}):
        model = model_of()
        if how is not None:
            lora_kernels.apply_lora_kernels_to_model(model, **how)
        torch.manual_seed(7)
        with contextlib.redirect_stdout(io.StringIO()):
            curves.append(train(model, folder))
    assert len(curves[0]) == STEPS and len(set(curves[0])) == STEPS
    assert len(calls) == 4 * STEPS
    for ours in curves[1:]:
        torch.testing.assert_close(ours, curves[0], rtol=1e-4, atol=0.0)


@feature("transformers' `Trainer`: the loss curve of PEFT alone, layer by layer and with blocks", FUSED)
def test_trainer(tmp_path, calls):
    pytest.importorskip("accelerate")
    assert_same_curve(curve_of_trainer, tmp_path, calls)


@feature("Accelerate: the loss curve of PEFT alone, layer by layer and with blocks", FUSED)
def test_accelerate(tmp_path, calls):
    assert_same_curve(curve_of_accelerate, tmp_path, calls)
