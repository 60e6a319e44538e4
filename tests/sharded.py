"""What the ranks run: some engine shards a model and trains it a step; PEFT alone on the whole batch is what is right."""

import contextlib
import re
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_kernels
from lora_kernels.integrations.tensor_parallel import ColwiseLoRA, RowwiseLoRA

K, N, ROWS, STEP = 16, 24, 8, 0.5
WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|base_model\.model|_fsdp_wrapped_module|_checkpoint_wrapped_module|default)\."
)
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(K, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def alone(**settings):
    """PEFT's model, as it is."""
    base = Net()
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **SETTINGS | settings))


def model(ours=False, **settings):
    """The same model with our kernels: PEFT's, or with our own layers."""
    peft_model = alone(**settings)
    if not ours:
        lora_kernels.apply_lora_kernels_to_model(peft_model)
        return peft_model
    net = lora_kernels.apply_lora(Net(), SETTINGS["target_modules"], SETTINGS["r"], SETTINGS["lora_alpha"])
    theirs = tensors(peft_model)
    net.load_state_dict({name: theirs[name] for name in tensors(net)}, strict=False)
    return net


def tensors(module, of=lambda p: p):
    """`of` each trained parameter, under the name that it has in the base model."""
    return {WRAPPERS.sub("", name): of(p).detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def batch(rows=ROWS):
    return torch.randn(rows, 3, K, generator=torch.Generator().manual_seed(3))


def mine(x, rank):
    return x.chunk(2)[rank]


def loss(y):
    return y.float().square().mean()


def right(x=None, steps=1, **settings):
    """Gradients of the last step, and the parameters after it, of PEFT alone on the whole batch."""
    net = alone(**settings)
    return train(net, batch() if x is None else x, steps), tensors(net)


def train(net, x, steps=1, of=lambda p: p.grad):
    """The last step's gradients."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], STEP)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(x)).backward()
        gradients = tensors(net, of)
        optimizer.step()
    return gradients


def full(p):
    """The whole gradient, which must be sharded like its parameter."""
    if not isinstance(p.grad, DTensor):
        return p.grad
    assert p.grad.placements == p.placements, (p.grad.placements, p.placements)
    return p.grad.full_tensor()


def same(got, expected, rtol=1e-4, atol=1e-6):
    assert got.keys() == expected.keys() and got
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


# What the tests run.


def ddp(rank, ours=False, accumulate=False, **options):
    net = DistributedDataParallel(model(ours), **options)
    halves = mine(batch(), rank).chunk(2) if accumulate else [mine(batch(), rank)]
    for i, x in enumerate(halves):
        with contextlib.nullcontext() if i == len(halves) - 1 else net.no_sync():
            (loss(net(x)) / len(halves)).backward()
    same(tensors(net, full), right()[0])


def shard(net, split=(), **options):
    """FSDP2: the parts named in `split` are units of their own, and so is each block, and the rest."""
    for block in blocks(net):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and any(part in name for part in split):
                fsdp.fully_shard(module, **options)
        fsdp.fully_shard(block, **options)
    return fsdp.fully_shard(net, **options)


def shard_adapters(net, dtype):
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and "lora_" in name:
            fsdp.fully_shard(module, mp_policy=fsdp.MixedPrecisionPolicy(dtype))
    return fsdp.fully_shard(net)


def blocks(net):
    return [module for module in net.modules() if isinstance(module, Block)]


def checkpointed(net):
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            for i, block in enumerate(module):
                module[i] = checkpoint_wrapper(block)
    return net


def fsdp2(rank, ours=False, split=(), checkpointing=False, reshard_after_forward=True):
    net = checkpointed(model(ours)) if checkpointing else model(ours)
    shard(net, split, reshard_after_forward=reshard_after_forward)
    gradients, parameters = right(steps=2)
    same(train(net, mine(batch(), rank), steps=2, of=full), gradients)
    same(tensors(net, lambda p: p.full_tensor()), parameters)


def fsdp2_accumulation(rank, split=()):
    net = shard(model(), split)
    for i, x in enumerate(mine(batch(), rank).chunk(2)):
        net.set_requires_gradient_sync(i == 1)
        (loss(net(x)) / 2).backward()
    same(tensors(net, full), right()[0])


def fsdp2_mixed_precision(rank, split=(), **policy):
    """As close to fp32 as PEFT is under the same policy."""
    policy = fsdp.MixedPrecisionPolicy(**policy)
    expected = right()[0]
    off = [
        max((gradient - expected[name]).norm() / expected[name].norm() for name, gradient in got.items())
        for net in (model(), alone())
        for got in [train(shard(net, split, mp_policy=policy), mine(batch(), rank), of=full)]
    ]
    # 1.3 here, whether fp32 or bf16 is reduced: the layer's own roundings; 2 is C where sums are reordered (docs/numerics.md).
    assert off[0] <= 2 * off[1] < 0.05, off


def fsdp2_policies_apart(rank):
    """Adapters in bf16 beside a base in fp32: x would lose bits on its way to the base layer."""
    net, theirs = (shard_adapters(net, torch.bfloat16) for net in (model(), alone()))
    x = mine(batch(), rank)
    same(train(net, x, of=full), train(theirs, x, of=full), rtol=0, atol=0)


def fsdp2_state_dict(rank, directory, split=()):
    net = shard(model(), split)
    train(net, mine(batch(), rank))
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        net.save_pretrained(directory, state_dict=state)
    torch.distributed.barrier()
    theirs = PeftModel.from_pretrained(Net(), directory)
    torch.testing.assert_close(theirs(batch()), net(batch()))
    back = shard(model(), split)
    set_model_state_dict(back, theirs.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert torch.equal(back(batch()), net(batch()))


def fsdp2_sharded_first(rank):
    """A layer that is a unit itself has another class already."""
    net = alone()
    for block in blocks(net):
        fsdp.fully_shard(block.up)
    report = lora_kernels.apply_lora_kernels_to_model(fsdp.fully_shard(net))
    assert set(report.skipped.values()) == {"call us before fully_shard"} and len(report.fused) == 2, report
    same(train(net, mine(batch(), rank), of=full), right()[0])


def fsdp1(rank, use_orig_params, checkpointing=False):
    net = checkpointed(model()) if checkpointing else model()
    net = fsdp.FullyShardedDataParallel(
        net, auto_wrap_policy=fsdp_auto_wrap_policy(net), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    train(net, mine(batch(), rank), steps=2, of=lambda p: p)
    with fsdp.FullyShardedDataParallel.summon_full_params(net):
        same(tensors(net), right(steps=2)[1])


def parallelize(net, up=ColwiseLoRA, down=RowwiseLoRA, **options):
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks(net):
        parallelize_module(block, mesh, {"up": up(**options), "down": down(**options)})
    return net


def tensor_parallel(rank, ours=False, rows=ROWS):
    net = parallelize(model(ours))
    gradients, parameters = right(batch(rows), steps=2)
    same(train(net, batch(rows), steps=2, of=full), gradients)
    same(tensors(net, lambda p: p.full_tensor()), parameters)


def sequence_parallel(rank):
    """x and y in parts of their second dimension between the layers."""
    net, mesh = model(), init_device_mesh("cpu", (2,))
    x = torch.randn(4, 6, K, generator=torch.Generator().manual_seed(4))
    for block in blocks(net):
        parallelize_module(
            block, mesh, {"up": ColwiseLoRA(input_layouts=Shard(1)), "down": RowwiseLoRA(output_layouts=Shard(1))}
        )
    y = nn.Sequential(*(block for block in blocks(net)))(x.chunk(2, 1)[rank])
    y = DTensor.from_local(y, mesh, [Shard(1)]).full_tensor()
    loss(y).backward()
    theirs = alone()
    loss(nn.Sequential(*blocks(theirs))(x)).backward()
    same(tensors(net, full), tensors(theirs, lambda p: p.grad))


def tensor_parallel_dropout(rank):
    """Without a mask of the whole x the layer runs as PEFT's own."""
    results = []
    for make in (model, alone):
        net = parallelize(make(lora_dropout=0.5).train())
        torch.manual_seed(5)
        results.append(train(net, batch(), of=lambda p: p.grad.full_tensor()))
    same(*results, rtol=0, atol=0)


def compiled(rank):
    """Tensor parallelism under torch.compile: the layer is one operator of one graph."""
    net = parallelize(model(), use_local_output=False)
    layer, x = blocks(net)[0].up, DTensor.from_local(batch(), init_device_mesh("cpu", (2,)), [Replicate()])
    graphs = []

    def backend(graph, inputs):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y.full_tensor(), layer(x).full_tensor())
    assert graphs.count("lora_kernels.lora_linear") == 1, graphs


FAULTS = {
    "weights that are not gathered": (fsdp2, {"split": ("lora_A", "lora_B"), "ours": True}),
    "a sum that is not reduced: y": (tensor_parallel, {"rows": 5}),
    "a sum that is not reduced: dA": (tensor_parallel, {"rows": 6}),
    "a sum that is not reduced: dx": (tensor_parallel, {"rows": 7}),
}


def faulty(rank, fault):
    """What is right otherwise, with something broken. Raises AssertionError or whatever comes of it."""
    function, settings = FAULTS[fault]
    with planted(fault):
        function(rank, **settings)


@contextlib.contextmanager
def planted(fault):
    from lora_kernels import dtensor, sharding

    if "gathered" in fault:
        with mock.patch.object(sharding, "inside", lambda modules, x, compute: compute(x)):
            yield
        return
    kind, result = {"y": ("_forward", 0), "dA": ("_backward", 1), "dx": ("_backward", 0)}[fault[-2:].strip()]
    rules = getattr(dtensor, kind)

    def broken(*args):
        wrong = [(list(results), arguments) for results, arguments in rules(*args)]
        for results, _ in wrong:
            if isinstance(results[result], Partial):
                results[result] = Replicate()
        return wrong

    operator = getattr(torch.ops.lora_kernels, {"_forward": "lora_linear", "_backward": "lora_linear_backward"}[kind])
    register_sharding(operator.default)(broken)
    try:
        yield
    finally:
        register_sharding(operator.default)(rules)  # the broken ones are remembered for the shapes of this fault only
