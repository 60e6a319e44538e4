"""What the plugins of serving engines do where there is no such engine, or another one than they were written for."""

import importlib.metadata
import pkgutil
import sys
import types
from pathlib import Path

import pytest
import torch

from lora_kernels import LayerAdapters, integrations
from lora_kernels.integrations import contract, sglang, vllm

ENGINES = pytest.mark.parametrize("engine", [vllm, sglang], ids=["vllm", "sglang"])


@pytest.fixture(autouse=True)
def nothing_said_yet():
    integrations._warn_once.cache_clear()


def of_version(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)


def name_of(engine):
    return engine.__name__.rpartition(".")[2]


@ENGINES
def test_without_the_engine(monkeypatch, recwarn, engine):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    before = name_of(engine) in sys.modules
    engine.register()
    assert not recwarn.list and (name_of(engine) in sys.modules) == before


@ENGINES
@pytest.mark.parametrize("version", ["0.32.0", "0.330.0", "0.5.230", "1.0.0"])
def test_with_another_version(monkeypatch, version, engine):
    of_version(monkeypatch, version)
    series = engine.SERIES.replace(".", r"\.")
    said = rf"got {version}, expected {series}; it runs without .*install {name_of(engine)}=={series}\.\*"
    with pytest.warns(UserWarning, match=said):
        engine.register()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"got {version}"):
        engine.register()


def test_the_entry_points_are_there():
    toml = pytest.importorskip("tomllib").loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    groups = toml["project"]["entry-points"]
    found = {group: pkgutil.resolve_name(points["lora_kernels"]) for group, points in groups.items()}
    assert found == {"vllm.general_plugins": vllm.register, "sglang.srt.plugins": sglang.register}


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
