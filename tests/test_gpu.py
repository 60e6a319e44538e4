"""What only a GPU can show: real shapes and tiles, CUDA graphs, streams, several devices."""

import pytest
import torch

from lora_kernels import functional, testing
from lora_kernels.backends import launcher
from lora_kernels.testing import Case

pytestmark = pytest.mark.gpu
STRATEGIES = ("extended", "single_pass", "one_launch", "chained")
SHAPES = {
    "square": dict(m=2048, n=4096, k=4096, r=16),
    "gqa": dict(m=4096, n=1024, k=4096, r=16),
    "wide": dict(m=1024, n=14336, k=4096, r=64),
    "ragged": dict(m=1111, n=4104, k=4088, r=8),
    "decode": dict(m=16, n=4096, k=4096, r=16),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_shapes_keep_the_budget_and_the_bits(shape, strategy, dtype):
    testing.check(Case(**SHAPES[shape], dtype=dtype, bias=True), "triton", strategy, "cuda")


@pytest.mark.parametrize("strategy", ["extended", "chained"])
def test_real_shapes_with_dropout(strategy):
    testing.check(Case(**SHAPES["square"], dtype=torch.bfloat16, dropout_p=0.1), "triton", strategy, "cuda")


def layer(m=512, n=1024, k=512, r=16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((m, k), (n, k), (r, k), (n, r))
    return [torch.randn(s, generator=generator, device="cuda").mul_(s[-1] ** -0.5).bfloat16() for s in shapes]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_graph_replays_with_new_inputs(strategy):
    x, weight, lora_a, lora_b = layer()
    scaling = torch.tensor(2.0, device="cuda")

    def call():
        return functional.lora_linear(x, weight, lora_a, lora_b, scaling, strategy=strategy)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for value in (0.5, 3.0):
        x.normal_()
        scaling.fill_(value)
        for _ in range(3):
            y.fill_(torch.nan)
            graph.replay()
            torch.testing.assert_close(y, call(), rtol=0, atol=0)


def test_cuda_graph_draws_a_new_dropout_mask_each_replay():
    x, weight, lora_a, lora_b = layer()
    functional.lora_linear(x, weight, lora_a, lora_b, 2.0, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.lora_linear(x, weight, lora_a, lora_b, 2.0, dropout_p=0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


def test_one_launch_on_two_streams_at_once():
    x, weight, lora_a, lora_b = layer(m=2048, n=4096, k=2048)
    expected = functional.lora_linear(x, weight, lora_a, lora_b, 2.0, strategy="one_launch")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(functional.lora_linear(x, weight, lora_a, lora_b, 2.0, strategy="one_launch"))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
    for stream in streams:
        with torch.cuda.stream(stream):
            assert not launcher.counters(x.device, 1).any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    tensors = [t.to("cuda:1") for t in layer()]
    y = functional.lora_linear(*tensors, 2.0, backend="triton")
    expected = functional.lora_linear(*tensors, 2.0, backend="eager")
    assert y.device.index == 1
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
