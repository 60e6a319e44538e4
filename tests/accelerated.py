"""What `accelerate launch` runs on each rank: two steps of training, as PEFT alone takes them on the whole batch."""

import sharded
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from ranks import watched


def main():
    with watched() as (calls, reasons):
        accelerator = Accelerator()
        if accelerator.device.type == "cpu":  # on which accelerate itself never shards
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # of the config file
            accelerator.state.distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2, accelerator.state
        net = sharded.model()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], sharded.STEP)
        net, optimizer = accelerator.prepare(net, optimizer)
        x = sharded.mine(sharded.batch(), accelerator.process_index).to(accelerator.device)
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(sharded.loss(net(x)))
            optimizer.step()
    assert calls["forward"] and not reasons, reasons
    units = [module for module in net.modules() if isinstance(module, torch.distributed.fsdp.FSDPModule)]
    assert len(units) == 3, units  # two blocks, and the rest
    sharded.same(sharded.tensors(net, lambda p: p.full_tensor().cpu()), sharded.right(steps=2)[1])
    accelerator.print("as PEFT alone")
    accelerator.end_training()


if __name__ == "__main__":
    main()
