"""The command line, in this process: what it prints and what it answers to bad input."""

import importlib

import pytest
import torch

import lora_kernels
from lora_kernels import __main__ as command_line


def test_info_names_versions_and_says_why_a_backend_is_not_usable(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command_line.main(["info"]) == 0
    out = capsys.readouterr().out
    assert lora_kernels.__version__ in out
    assert torch.__version__ in out
    if not torch.cuda.is_available():
        assert "not usable here: x is on the CPU" in out


def test_explain_prints_what_explain_returns(capsys):
    arguments = "explain --m 512 --n 1024 --k 2048 --r 8 --dtype fp16 --dropout --device-capability 80".split()
    assert command_line.main(arguments) == 0
    expected = lora_kernels.explain(512, 1024, 2048, 8, torch.float16, capability=80, dropout=True)
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_takes_the_adapters_of_a_batch(capsys):
    assert command_line.main("explain --m 64 --n 4096 --k 4096 --r 16 --adapters 8 --device-capability 90".split()) == 0
    assert capsys.readouterr().out == f"{lora_kernels.explain(64, 4096, 4096, 16, adapters=8, capability=90)}\n"


def test_explain_takes_the_format_of_the_weight(capsys):
    assert (
        command_line.main("explain --m 16 --n 64 --k 64 --r 16 --weight-format nf4 --device-capability 90".split()) == 0
    )
    assert capsys.readouterr().out == f"{lora_kernels.explain(16, 64, 64, 16, weight_format='nf4', capability=90)}\n"


def test_explain_takes_backend_and_strategy(capsys):
    arguments = "explain --m 8 --n 64 --k 64 --r 8 --device-capability 90 --backend eager --strategy chained".split()
    assert command_line.main(arguments) == 0
    assert "eager / chained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "--backend nonsense",
        "--strategy nonsense",
        "--backend eager --strategy extended",
        "--adapters -7",
        "--adapters 0",
    ],
)
def test_explain_answers_what_cannot_be_with_the_reason(arguments, capsys):
    problem = "explain --m 8 --n 64 --k 64 --r 8 --device-capability 90"
    assert command_line.main(f"{problem} {arguments}".split()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert arguments.split()[-1] in captured.err


@pytest.mark.parametrize(
    "arguments", ["", "nonsense", "info --nonsense", "explain --m 8", "explain --m x --n 1 --k 1 --r 1"]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments.split())
    assert stop.value.code == 2
    assert "usage: python -m lora_kernels" in capsys.readouterr().err


@pytest.mark.parametrize("command, module", [("demo", "demo"), ("compile", "static_gate")])
def test_arguments_and_status_pass_through(command, module, monkeypatch):
    seen = []
    target = importlib.import_module(f"lora_kernels.{module}")
    monkeypatch.setattr(target, "main", lambda argv: seen.append(argv) or 3)
    assert command_line.main([command, "--some", "thing"]) == 3
    assert seen == [["--some", "thing"]]


def test_bench_says_so_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line, "CHECKOUT", tmp_path)
    assert command_line.main(["bench"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_bench_refuses_the_interpreter(monkeypatch, capfd):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command_line.main(["bench"]) != 0
    assert "interpreter's time means nothing" in capfd.readouterr().err
