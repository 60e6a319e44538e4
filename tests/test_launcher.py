"""The launcher against a driver that compiles for sm_90 and launches nothing: what would reach the GPU, and how."""

from unittest import mock

import pytest
import torch

from lora_kernels import BatchPlan, LayerAdapters, configs
from lora_kernels.backends import launcher, triton_batched
from lora_kernels.backends import triton as backend

pytestmark = pytest.mark.compile


class RecordingLauncher:
    """Stands for Triton's C launcher; keeps the grid and the arguments of every launch."""

    launches = []

    def __init__(self, src, metadata):
        self.name = src.fn.__name__

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, metadata, enter, leave, *args):
        self.launches.append((self.name, (grid_x, grid_y, grid_z), args))


class Driver:
    """The part of Triton's driver interface that a launch uses."""

    launcher_cls = RecordingLauncher

    class utils:
        @staticmethod
        def get_device_properties(device):
            return dict(max_shared_mem=232_448, multiprocessor_count=132, max_num_regs=65_536, warpSize=32)

        @staticmethod
        def load_binary(name, kernel, shared, device):
            return 1, 2, 32, 0, 1024

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime import driver

    fake = Driver()
    monkeypatch.setattr(type(driver), "active", fake)
    monkeypatch.setattr(backend, "target", lambda device: backend.Target(90, configs.architecture(90).NUM_SMS, True))
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_driver", lambda: fake)
    RecordingLauncher.launches.clear()
    return RecordingLauncher.launches


def run(strategy, m=256, n=512, k=256, r=16, offset=0, dtype=torch.bfloat16):
    x = torch.empty(m * k + offset, dtype=dtype)[offset:].view(m, k)
    weight, lora_a, lora_b = (torch.empty(*shape, dtype=dtype) for shape in ((n, k), (r, k), (n, r)))
    y, h = backend.forward(x, weight, None, lora_a, lora_b, 2.0, 0.0, None, strategy)
    backend.backward(torch.empty_like(y), x, h, weight, lora_a, lora_b, 2.0, 0.0, None, (True, True, True), strategy)


def run_batched(strategy, m=64, widths=(256, 128), k=256, r=16, slots=4, dtype=torch.bfloat16):
    adapters = tuple(
        LayerAdapters(
            torch.empty(slots, r, k, dtype=dtype), torch.empty(slots, width, r, dtype=dtype),
            torch.ones(slots, dtype=torch.int32), torch.ones(slots),
        )
        for width in widths
    )  # fmt: skip
    x, weight = torch.empty(m, k, dtype=dtype), torch.empty(sum(widths), k, dtype=dtype)
    triton_batched.forward(x, weight, None, adapters, BatchPlan(torch.zeros(m, dtype=torch.int32)), strategy)


def summary(launches):
    """Names, grids and argument kinds: addresses differ from run to run."""
    return [
        (name, grid, [a if isinstance(a, (int, float, str)) else type(a) for a in args])
        for name, grid, args in launches
    ]


@pytest.mark.parametrize("strategy", ["extended", "single_pass", "one_launch"])
def test_second_launch_skips_the_jit_and_passes_the_same(launches, strategy):
    run(strategy)
    first = summary(launches)
    assert len(first) >= 4
    launches.clear()
    with mock.patch("triton.runtime.jit.JITFunction.run", side_effect=AssertionError("went through the JIT again")):
        run(strategy)
    assert summary(launches) == first


@pytest.mark.parametrize("strategy", ["one_launch", "extended", "chained"])
def test_tuples_of_arguments_reach_the_launch(launches, strategy):
    """A slice more, or one of another width's divisibility, is compiled anew; the same is not."""
    run_batched(strategy)
    first, compiled = summary(launches), len(launcher._compiled)
    assert any(isinstance(arg, tuple) for _, _, args in launches for arg in args)
    launches.clear()
    with mock.patch("triton.runtime.jit.JITFunction.run", side_effect=AssertionError("went through the JIT again")):
        run_batched(strategy)
    assert summary(launches) == first
    for widths in ((128, 128, 128), (256, 120)):
        run_batched(strategy, widths=widths)
        assert len(launcher._compiled) > compiled
        compiled = len(launcher._compiled)


def test_other_alignment_dtype_and_divisibility_are_compiled_anew(launches):
    run("extended")
    compiled = len(launcher._compiled)
    run("extended")
    assert len(launcher._compiled) == compiled
    for change in (dict(offset=1), dict(dtype=torch.float16), dict(k=264), dict(r=1)):
        run("extended", **change)
        assert len(launcher._compiled) > compiled, change
        compiled = len(launcher._compiled)


def test_specialization_key_is_as_fine_as_tritons():
    """Arguments with equal keys must get equal specialisations from Triton's own binder."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from lora_kernels.kernels.shrink import drop_kernel

    bind = create_function_from_signature(
        drop_kernel.signature, drop_kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    buffer = torch.empty(64, dtype=torch.int16)
    tensors = [buffer[i:].view(dtype) for i in (0, 1, 8) for dtype in (torch.float16, torch.bfloat16)]
    integers = [0, 1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, 2**33]
    seen = {}
    for value in (*tensors, *integers):
        _, specialization, _ = bind(value, value, value, 0.5, value, value, 16, 256, None)
        assert seen.setdefault(launcher._specialization(value), specialization[0]) == specialization[0], value


def test_counters_are_zero_per_stream_and_reset():
    zeros = launcher.counters(torch.device("cpu"), 8)
    assert zeros.numel() >= 8 and not zeros.any()
    assert launcher.counters(torch.device("cpu"), 4) is zeros
    zeros[3] = 1  # an aborted launch
    launcher.reset()
    assert not launcher.counters(torch.device("cpu"), 8).any()
