"""The tuner's search, on made-up times and a made-up clock; its journal, its table, its gate."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED
from test_launcher import launches  # noqa: F401, a fixture

from benchmarks import compare, timing, tunable, tune
from lora_kernels import configs, testing
from lora_kernels.backends import triton as backend
from lora_kernels.configs import Config, tuned
from lora_kernels.configs.tuned import Key

GOAL = backend.Target(90, 132, True, "NVIDIA Test 9000")
KEY = Key("extended", 8192, 4096, 4096, 16, "bfloat16")
ORIGIN = {"commit": "0123456789abcdef", "uncommitted_changes": False, "versions": {"triton": "3.6.0"}}


def workshop(cost, legal=lambda key, front: front, gate=lambda key, value, full: None, noise=0.0):
    """A machine where `cost(value)` is the time of a step; what was timed is in `timed`, in order, with its clock."""
    rng, now, timed = random.Random(0), [0.0], []

    def timers(key, values):
        def timer(value):
            def sample():
                now[0] += 1.0
                timed.append(value)
                return cost(value) * (1.0 + noise * rng.uniform(-1, 1))

            return sample

        return {value: timer(value) for value in values}

    shop = tune.Workshop(GOAL, legal, gate, timers, clock=lambda: now[0])
    shop.timed = timed
    return shop


def distance(best):
    """Seconds: the farther from `best`, the slower."""
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m", "halves")

    def cost(value):
        return 1e-4 * (1 + sum(abs(getattr(value, n) - getattr(best, n)) / (1 + getattr(best, n)) for n in names))

    return cost


BEST = Config(128, 128, 64, num_warps=4, num_stages=3, group_m=4)


def test_the_search_walks_to_the_best_config_and_it_wins():
    found = tune.search(KEY, workshop(distance(BEST)), until=1e9)
    assert found.best == BEST and found.wins
    assert found.heuristic == configs.lookup("extended", 90, 2, 8192, 4096, 16, 132)
    assert len(found.figures[BEST]["samples_us"]) == tune.FINAL
    assert found.heuristic in found.figures and len(found.figures) >= 4


def test_what_is_not_better_by_more_than_the_noise_does_not_win():
    usual = tunable.heuristic(KEY, GOAL)

    def cost(value):
        return 1e-4 if value == usual else 0.98e-4

    assert tune.search(KEY, workshop(cost), until=1e9).wins
    assert not tune.search(KEY, workshop(cost, noise=0.1), until=1e9).wins
    assert not tune.search(KEY, workshop(lambda value: 1e-4), until=1e9).wins


def test_nothing_is_timed_that_does_not_compile_or_pass_its_gate():
    def legal(key, front):
        return [value for value in front if value.num_warps == 8]

    def gate(key, value, full):
        return "y: over budget" if value.block_k == 32 else None

    shop = workshop(distance(BEST), legal, gate)
    found = tune.search(KEY, shop, until=1e9)
    assert found.best == replace(BEST, num_warps=8)
    assert all(value.num_warps == 8 and value.block_k != 32 for value in shop.timed)
    assert "y: over budget" in found.refused.values()


def test_a_winner_that_fails_in_full_is_not_written():
    def gate(key, value, full):
        return "y: a second run gave other bits" if full and value == BEST else None

    found = tune.search(KEY, workshop(distance(BEST), gate=gate), until=1e9)
    assert found.best != BEST and "other bits" in found.refused[BEST]


def test_a_broken_heuristic_leaves_no_choice_it_could_beat():
    found = tune.search(KEY, workshop(distance(BEST), gate=lambda *_: "y: over budget"), until=1e9)
    assert not found.wins and not found.figures


def test_the_hopeless_leave_a_race_first_and_the_kept_never():
    seconds = {"best": 1.0, "near": 1.1, "far": 2.0, "kept": 3.0, "half": 1.2}
    samples = tune.race({name: lambda s=s: s for name, s in seconds.items()}, kept=("kept",))
    counts = {name: len(times) for name, times in samples.items()}
    assert counts == {"best": 12, "kept": 12, "near": 12, "half": 6, "far": 3}


def test_strategies_are_searched_among_those_that_can_run():
    key = Key(tunable.TRAINING, 8192, 4096, 4096, 16, "bfloat16")
    times = {"extended": 3e-4, "one_launch": 2e-4, "single_pass": 4e-4, "chained": 5e-4}
    found = tune.search(key, workshop(times.get), until=1e9)
    assert (found.best, found.heuristic, found.wins) == ("one_launch", "extended", True)
    found = tune.search(key._replace(r=128, dropout=True), workshop(times.get), until=1e9)
    assert found.figures.keys() == {"extended", "chained"}


def test_a_killed_run_goes_on_and_no_finding_is_lost(tmp_path):
    keys = [KEY, KEY._replace(kn=True), KEY._replace(n=14336)]
    path, said = tmp_path / "journal.jsonl", []
    journal = tune.Journal(path, GOAL, ORIGIN)
    shop = workshop(distance(BEST))
    tune.search(KEY, shop, until=1e9)
    one = shop.clock()
    shop = workshop(distance(BEST))
    left = tune.tune(keys, shop, 1.5 * one, journal, say=said.append)
    assert left == 2 and len(said) == 1
    with path.open("a") as file:
        file.write('{"fingerprint": "cut sho')  # by a kill
    journal = tune.Journal(path, GOAL, ORIGIN)
    assert list(journal.found) == keys[:1]
    with path.open("a") as file:
        file.write("\n")
    shop = workshop(distance(BEST))
    assert tune.tune(keys, shop, 1e9, journal, say=said.append) == 0
    assert len(said) == 3
    assert list(tune.Journal(path, GOAL, ORIGIN).found) == keys


def test_a_choice_that_ends_the_process_twice_is_left_out(tmp_path):
    class Lost(BaseException):
        pass

    def lost(key, value, full):
        raise Lost

    path, said, other = tmp_path / "journal.jsonl", [], KEY._replace(kn=True)
    for _ in range(tune.TRIES):
        with pytest.raises(Lost):
            tune.tune(
                [KEY], workshop(distance(BEST), gate=lost), 1e9, tune.Journal(path, GOAL, ORIGIN), say=said.append
            )
    journal = tune.Journal(path, GOAL, ORIGIN)
    assert tune.tune([KEY, other], workshop(distance(BEST)), 1e9, journal, say=said.append) == 0
    assert "left out" in said[0] and list(journal.found) == [other]
    for _ in range(tune.TRIES + 1):  # to run out of time is no such end
        assert tune.tune([KEY._replace(n=64)], workshop(distance(BEST)), 0.5, tune.Journal(path, GOAL, ORIGIN)) == 1


def test_another_gpu_or_other_kernels_start_anew(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    tune.tune([KEY], workshop(distance(BEST)), 1e9, tune.Journal(path, GOAL, ORIGIN), say=lambda _: None)
    assert tune.Journal(path, GOAL, ORIGIN).found
    assert not tune.Journal(path, GOAL._replace(name="another"), ORIGIN).found
    monkeypatch.setattr(tune, "fingerprint", lambda: "other kernels")
    assert not tune.Journal(path, GOAL, ORIGIN).found


def test_the_table_is_what_the_package_reads(tmp_path):
    path = tmp_path / "table.json"
    journal = tune.Journal(tmp_path / "journal.jsonl", GOAL, ORIGIN)
    strategy = Key(tunable.TRAINING, 8192, 4096, 4096, 16, "bfloat16")
    tune.tune([KEY], workshop(distance(BEST)), 1e9, journal, say=lambda _: None)
    times = {"extended": 3e-4, "one_launch": 2e-4, "single_pass": 4e-4, "chained": 5e-4}
    tune.tune([strategy], workshop(times.get), 1e9, journal, say=lambda _: None)
    assert journal.write(path) == 2
    choices, problems = tuned.read(path, GOAL.name)
    assert not problems
    assert {key: choice.value for key, choice in choices.items()} == {KEY: BEST, strategy: "one_launch"}
    entry = next(entry for entry in json.loads(path.read_text())["entries"] if entry["op"] == "lora_linear")
    assert entry["heuristic"]["strategy"] == "extended" and entry["commit"] == ORIGIN["commit"]
    assert [runner_up["strategy"] for runner_up in entry["runners_up"]] == ["single_pass", "chained"]
    assert len(entry["runners_up"][0]["figures"]["samples_us"]) == tune.FINAL


def test_a_table_keeps_what_was_not_looked_at_and_drops_what_no_longer_wins(tmp_path):
    path, other = tmp_path / "table.json", KEY._replace(n=14336)
    journal = tune.Journal(tmp_path / "1.jsonl", GOAL, ORIGIN)
    tune.tune([KEY, other], workshop(distance(BEST)), 1e9, journal, say=lambda _: None)
    journal.write(path)
    journal = tune.Journal(tmp_path / "2.jsonl", GOAL, ORIGIN)
    tune.tune([KEY], workshop(lambda value: 1e-4), 1e9, journal, say=lambda _: None)
    assert journal.write(path) == 1
    assert list(tuned.read(path).choices) == [other]
    with pytest.raises(SystemExit, match="move it away"):
        tune.Journal(tmp_path / "3.jsonl", GOAL._replace(name="another"), ORIGIN).write(path)


def test_a_strategy_is_timed_with_the_tiles_found_before_it(tmp_path):
    journal = tune.Journal(tmp_path / "journal.jsonl", GOAL, ORIGIN)
    tune.tune([KEY], workshop(distance(BEST)), 1e9, journal, say=lambda _: None)
    launched = []

    def timers(key, values):
        launched.append(backend._lookup("extended", GOAL, torch.bfloat16, 8192, 4096, 4096, 16, False, True, False))
        return {value: lambda: 1.0 for value in values}

    shop = replace(workshop(distance(BEST)), timers=timers)
    tune.tune([Key(tunable.TRAINING, 8192, 4096, 4096, 16, "bfloat16")], shop, 1e9, journal, say=lambda _: None)
    assert set(launched) == {BEST}
    usual = configs.lookup("extended", 90, 2, 8192, 4096, 16, 132)
    assert backend._lookup("extended", GOAL, torch.bfloat16, 8192, 4096, 4096, 16, False, True, False) == usual


@pytest.mark.parametrize("capability", configs.ARCHITECTURES)
@pytest.mark.parametrize("kind", [(), ("dropout",), ("batched",)], ids=str)
@pytest.mark.parametrize("size", [(8192, 4096, 4096, 16), (16, 4096, 14336, 64), (2048, 1024, 4096, 128)], ids=str)
def test_every_choice_has_a_heuristic_and_neighbours(size, kind, capability):
    goal = GOAL._replace(capability=capability, tma=capability >= 90)
    keys = tune.keys_of([(*size, *kind)])
    assert keys[-1].op in configs.STRATEGIES and len(keys) == len(set(keys))
    for key in keys:
        if key.op == "one_launch" and capability < 90:
            with pytest.raises(LookupError):
                tunable.heuristic(key, goal)
            continue
        usual, *_ = tunable.candidates(key, goal)
        near = tunable.neighbours(key, usual, goal)
        assert usual not in near and (len(near) >= 3 or isinstance(usual, str))


@pytest.mark.skipif(not INTERPRETED, reason="runs kernels: needs TRITON_INTERPRET=1, on the CPU")
@pytest.mark.parametrize("key", tune.keys_of([(512, 32, 32, 8), (8, 32, 32, 8, "batched")]), ids=lambda key: key.op)
def test_every_step_runs_what_is_pinned(key, monkeypatch):
    device = torch.device("cpu")
    goal = backend.target(device)
    usual, small = tunable.heuristic(key, goal), key._replace(m=min(key.m, 64))
    value = usual if isinstance(usual, str) else replace(usual, num_warps=8)
    launched = []
    for module in (backend, tunable.triton_batched):
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda *a, launch=launch: (launched.append(a[-1]), launch(*a)))
    tunable.step(small, value, tunable.tensors(small, device))()
    assert launched and (isinstance(value, str) or value in launched)
    wrong = replace(value, block_m=16) if not isinstance(value, str) and key.op == "shrink" else None
    assert tunable.gate(small, value, device) is None
    if wrong:
        monkeypatch.setattr(testing, "check", lambda *_: (_ for _ in ()).throw(AssertionError("y: over budget")))
        assert tunable.gate(small, wrong, device) == "failed: AssertionError: y: over budget"


def test_the_batched_gate_sees_a_wrong_result(monkeypatch):
    if not INTERPRETED:
        pytest.skip("runs kernels")
    key = Key("batched_extended", 8, 32, 32, 8, "bfloat16")
    value = tunable.heuristic(key, backend.target(torch.device("cpu")))
    forward = tunable.triton_batched.forward
    monkeypatch.setattr(tunable.triton_batched, "forward", lambda *a: forward(*a) * 1.02)
    assert "y: " in tunable.gate(key, value, torch.device("cpu"))


@pytest.mark.compile
@pytest.mark.usefixtures("launches")
def test_what_compiles_is_found_by_the_launch(tmp_path):
    from triton import knobs

    key, config = Key("shrink", 256, 16, 256, 16, "bfloat16"), Config(64, block_k=64, num_warps=4, num_stages=3)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        assert tunable.reasons_illegal(key, config, 90, 132) == []
        compiled = set(tmp_path.rglob("shrink_kernel.cubin"))
        tunable.step(key, config, tunable.tensors(key, torch.device("cpu")))()
        assert compiled and compiled == set(tmp_path.rglob("shrink_kernel.cubin"))


@pytest.mark.compile
def test_the_compiler_refuses():
    wide = Key("extended", 8192, 4096, 4096, 16, "bfloat16")
    reasons = tunable.reasons_illegal(wide, Config(128, 256, 64, num_warps=8, num_stages=4), 90, 132)
    assert any("shared memory" in reason for reason in reasons)  # no room for a whole tile of y
    reasons = tunable.reasons_illegal(wide, Config(128, 256, 64, num_warps=4, num_stages=3, halves=True), 90, 132)
    assert any("spills" in reason or "registers" in reason for reason in reasons)


def test_command_line(capsys, monkeypatch):
    assert tune.main(["--list", "--problem", "8192,4096,4096,16", "64,4096,4096,16,batched"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 14
    for wrong in ("8192,4096,4096", "8192,4096,4096,16,fast", "0,4096,4096,16", "8,100,64,8"):
        with pytest.raises(SystemExit):
            tune.main(["--list", "--problem", wrong])
    assert "multiples of 8" in capsys.readouterr().err
    monkeypatch.setattr(tune.report, "local_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tune.main([]) == 1
    assert "no GPU" in capsys.readouterr().out


def test_times_of_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="interpreter's time means nothing"):
        tune.main([])


def test_noise_is_what_quartiles_say():
    def figures(median, spread):
        return timing.summary([(median + spread * step) * 1e-6 for step in (-2, -1, 0, 1, 2)])

    assert compare.verdict(figures(100, 1), figures(90, 1)) == compare.FASTER
    assert compare.verdict(figures(100, 1), figures(110, 1)) == compare.SLOWER
    assert compare.verdict(figures(100, 10), figures(110, 10)) == compare.SAME
    assert compare.verdict(figures(100, 0.01), figures(100.5, 0.01)) == compare.SAME
