"""What the ranks run under the tensor parallelism of transformers, with PEFT on top of it."""

import sharded
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import lora_kernels

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attention_bias=True, mlp_bias=True,
)  # fmt: skip
COLUMNS, ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]


def adapted(base, **settings):
    torch.manual_seed(2)
    settings = {"target_modules": COLUMNS + ROWS, "init_lora_weights": False} | settings
    net = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, **settings)).train()
    for parameter in net.parameters():
        if parameter.requires_grad and isinstance(parameter, DTensor):  # no two shards alike
            parameter.data.to_local().mul_(1 + torch.distributed.get_rank())
    return net


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(net, ids):
    """The loss, the gradients, and the logits without gradients."""
    net.zero_grad()
    loss = net(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        logits = net(input_ids=ids).logits
    gradients = sharded.tensors(net, lambda p: whole(p.grad))
    return {"loss": loss.detach(), "logits": whole(logits)} | gradients


def train(rank, directory, exactly=False, **settings):
    """As PEFT alone in one process; `exactly`: as PEFT under the same plan, to the bit, in the layers that it can train."""
    torch.manual_seed(1)
    if rank == 0:
        base = LlamaForCausalLM(CONFIG)
        for name, bias in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(bias)
        base.save_pretrained(directory)
    torch.distributed.barrier()
    ids = torch.randint(CONFIG.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))
    if exactly:  # PEFT 0.21 gives the A of the others a width that transformers 5.23 does not expect
        settings["target_modules"] = COLUMNS
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    ours, theirs = (
        adapted(AutoModelForCausalLM.from_pretrained(directory, distributed_config=plan), **settings) for _ in range(2)
    )
    lora_kernels.apply_lora_kernels_to_model(ours)
    if not exactly:
        theirs = adapted(AutoModelForCausalLM.from_pretrained(directory), **settings)
        theirs.load_state_dict({name: whole(tensor) for name, tensor in ours.state_dict().items()})
    results = []
    for net in (ours, theirs):
        torch.manual_seed(4)
        results.append(trained(net, ids))
    sharded.same(*results, **({"rtol": 0, "atol": 0} if exactly else {}))
