"""Models on two ranks (gloo, on the CPU): a test is a row of docs/distributed.md; PEFT alone on the whole batch judges it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import sharded
import tp_plan
from features import EXACT, FUSED, feature
from ranks import Ranks

ADAPTERS = ("lora_A", "lora_B")
SPLITS = {"block": (), "adapters": ADAPTERS, "all parts": ("base_layer", *ADAPTERS)}


@pytest.fixture(scope="module")
def processes():
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.fixture
def ranks(processes, request):
    """Runs a function on both ranks, and sees that it ran as the test's row of the table says."""

    def run(function, *args, **kwargs):
        for ran in processes.run(function, *args, **kwargs):
            if request.function.feature.how.startswith(FUSED):
                assert ran.calls and not ran.reasons
            else:
                assert ran.reasons

    return run


@feature("DDP: `find_unused_parameters`, `static_graph`, `no_sync`", FUSED)
def test_ddp(ranks):
    ranks(sharded.ddp)
    ranks(sharded.ddp, accumulate=True, find_unused_parameters=True)
    ranks(sharded.ddp, static_graph=True)


@feature("FSDP2, a block at a time", FUSED)
def test_fsdp2_block(ranks):
    ranks(sharded.fsdp2)
    ranks(sharded.fsdp2, reshard_after_forward=False)


@feature("FSDP2, with units inside a layer (`lora_A`, `lora_B`; the base layer too)", FUSED)
@pytest.mark.parametrize("split", [ADAPTERS, SPLITS["all parts"]], ids="-".join)
def test_fsdp2_parts(ranks, split):
    ranks(sharded.fsdp2, split=split)
    ranks(sharded.fsdp2, split=split, reshard_after_forward=False)


@feature("FSDP2: activation checkpointing", FUSED)
def test_fsdp2_checkpointing(ranks):
    for split, reshard in itertools.product(((), ADAPTERS), (True, False)):
        ranks(sharded.fsdp2, split=split, checkpointing=True, reshard_after_forward=reshard)


@feature("FSDP2: gradient accumulation (`set_requires_gradient_sync`)", FUSED)
def test_fsdp2_accumulation(ranks):
    for split in ((), ADAPTERS):
        ranks(sharded.fsdp2_accumulation, split)


@feature("FSDP2: `MixedPrecisionPolicy`", FUSED)
def test_fsdp2_mixed_precision(ranks):
    for split in ((), ADAPTERS):
        ranks(sharded.fsdp2_mixed_precision, split, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@feature("FSDP2: adapters with a `param_dtype` other than the base layer's", EXACT)
def test_fsdp2_policies_apart(ranks):
    ranks(sharded.fsdp2_policies_apart)


@feature("FSDP2: full state dict into PEFT alone, and back", FUSED)
def test_fsdp2_state_dict(ranks, tmp_path):
    for split in ((), ADAPTERS):
        ranks(sharded.fsdp2_state_dict, tmp_path, split)


@feature("FSDP2: an adapted layer that was sharded, as a unit, before we were called", EXACT)
def test_fsdp2_sharded_first(ranks):
    ranks(sharded.fsdp2_sharded_first)


@feature("FSDP1 with PEFT's `fsdp_auto_wrap_policy`, `use_orig_params` both ways, activation checkpointing", FUSED)
def test_fsdp1(ranks):
    ranks(sharded.fsdp1, use_orig_params=False)
    ranks(sharded.fsdp1, use_orig_params=True, checkpointing=True)


@feature("FSDP2 by accelerate: `accelerate launch --config_file examples/fsdp2_accelerate.yaml`", FUSED)
@pytest.mark.integration  # 20 s, most of them imports
def test_accelerate():
    pytest.importorskip("accelerate")
    here = Path(__file__).resolve().parent
    command = "-m accelerate.commands.launch --config_file examples/fsdp2_accelerate.yaml tests/accelerated.py".split()
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}", "LORA_KERNELS_BACKEND": "eager"}
    if not torch.accelerator.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [sys.executable, *command], cwd=here.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "as PEFT alone" in done.stdout


@feature("tensor parallelism: `ColwiseLoRA`, `RowwiseLoRA`", f"{FUSED} (one operator a rank)")
def test_tensor_parallel(ranks):
    ranks(sharded.tensor_parallel)


@feature("sequence parallelism between such layers", FUSED)
def test_sequence_parallel(ranks):
    ranks(sharded.sequence_parallel)


@feature("tensor parallelism under `torch.compile(fullgraph=True)`", f"{FUSED} (one operator)")
def test_compiled(ranks):
    ranks(sharded.compiled)


@feature("tensor parallelism with dropout in training", EXACT)
def test_tensor_parallel_dropout(ranks):
    ranks(sharded.tensor_parallel_dropout)


@feature('transformers\' `tp_plan="auto"` under PEFT', f"{FUSED} (one operator a rank)")
def test_tp_plan(ranks, tmp_path):
    ranks(tp_plan.train, tmp_path)


@feature(
    'transformers\' `tp_plan="auto"` under PEFT: layers sharded by column, with dropout in training or `lora_bias`',
    EXACT,
)
def test_tp_plan_exact(ranks, tmp_path):
    ranks(tp_plan.train, tmp_path, exactly=True, lora_dropout=0.5)
    ranks(tp_plan.train, tmp_path, exactly=True, lora_bias=True)


@feature("`LoRALinear`: DDP, FSDP2 (blocks, `lora_A` and `lora_B`), tensor parallelism", FUSED)
def test_our_own_layers(ranks):
    ranks(sharded.ddp, ours=True)
    for split in ((), ADAPTERS):
        ranks(sharded.fsdp2, ours=True, split=split)
    ranks(sharded.tensor_parallel, ours=True)


@pytest.mark.parametrize("fault", sharded.FAULTS)
def test_a_planted_fault_is_found(processes, fault):
    with pytest.raises(
        AssertionError, match="lora_a: got a DTensor" if "gathered" in fault else "Mismatched|not close"
    ):
        processes.run(sharded.faulty, fault)
