"""What the plugins of serving engines do where there is no such engine, or another one than they were written for."""

import importlib.metadata
import sys
import types

import pytest
import torch

from lora_kernels import LayerAdapters, integrations
from lora_kernels.integrations import contract, vllm


@pytest.fixture(autouse=True)
def nothing_said_yet():
    integrations._warn_once.cache_clear()


def of_version(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)


def test_without_vllm(monkeypatch, recwarn):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    vllm.register()
    assert not recwarn.list and "vllm" not in sys.modules


@pytest.mark.parametrize("version", ["0.32.0", "0.330.0", "1.0.0"])
def test_with_another_vllm(monkeypatch, version):
    of_version(monkeypatch, version)
    with pytest.warns(UserWarning, match=rf"got {version}, expected 0\.33; it runs without .*install vllm==0\.33\.\*"):
        vllm.register()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"got {version}"):
        vllm.register()


def test_signatures(monkeypatch):
    of_version(monkeypatch, "0.33.1")
    engine = types.ModuleType("an_engine")
    engine.run, engine.table = (lambda x, bias=None: x), ()
    monkeypatch.setitem(sys.modules, "an_engine", engine)
    assert contract.unsupported("engine", "0.33", {"an_engine:run": "x bias", "an_engine:table": None}) is None
    assert "takes (x bias), expected (x)" in contract.unsupported("engine", "0.33", {"an_engine:run": "x"})
    for place in ("an_engine:gone", "no_such_engine:run"):
        assert "Error" in contract.unsupported("engine", "0.33", {place: None})


def test_the_adapters_are_views_of_vllms_tensors():
    a, b = torch.randn(3, 1, 8, 32), torch.randn(3, 1, 40, 8)
    adapters = vllm._every_rank(a, b)
    assert isinstance(adapters, LayerAdapters) and adapters.ranks.tolist() == [8, 8, 8]
    assert (adapters.a.data_ptr(), adapters.b.data_ptr()) == (a.data_ptr(), b.data_ptr())
