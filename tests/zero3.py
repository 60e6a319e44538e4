"""What the ranks run under DeepSpeed."""

import os
from unittest import mock

import sharded
import torch


def train(rank, ours=False):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    net = sharded.model(ours)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], sharded.STEP)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    with mock.patch.dict(deepspeed.ops.__compatible_ops__, clear=True):  # nothing to compile first: gloo does
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(sharded.loss(engine(sharded.mine(sharded.batch(), rank))))
    sharded.same(sharded.tensors(engine, safe_get_full_grad), sharded.right()[0])
