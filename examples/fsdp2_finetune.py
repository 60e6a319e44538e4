"""A PEFT model, sharded by FSDP2 on several processes, with its adapters fused; saved for PEFT alone.

    torchrun --nproc-per-node 2 examples/fsdp2_finetune.py

On GPUs each process takes one and nccl carries the weights; without, they share the CPU and gloo does.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import lora_kernels

WIDTH, CLASSES, ROWS = 64, 10, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, CLASSES))


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"])).to(device)
    report = lora_kernels.apply_lora_kernels_to_model(model)  # before fully_shard
    for block in model.modules():
        if isinstance(block, Block):
            fully_shard(block)
    fully_shard(model)

    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(ROWS, WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)
    mine = [part.chunk(world)[rank].to(device) for part in (x, target)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(mine[0]), mine[1])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    y = model(x.to(device)).cpu()
    if rank == 0:
        print(str(report).splitlines()[0])
        print(f"loss on {world} processes {losses[0]:.3f} -> {losses[-1]:.3f}")
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory, state_dict=state)
            alone = PeftModel.from_pretrained(base_model(), directory)
        print(f"loaded in PEFT alone: at most {(alone(x) - y).abs().max():.1e} apart")
    dist.barrier()  # the others wait until rank 0 has saved
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
