"""The simulator of benchmarks/: what it must find by hand, by a bound or by a formula, and the page that quotes it."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import support_table

from benchmarks import fleet, pool, report
from benchmarks.simulator import Crowds, Server, Trace, arrivals, clairvoyant_hits, residence, simulate, zipf

ROOT = Path(__file__).resolve().parent.parent
STEP, LINK, ROW = 0.5, 100.0, 10  # a rank of 10 takes 1 s on the link


def server(**changes) -> Server:
    return Server(**{"slots": 8, "rows": 64, "step_s": STEP, "link_bytes_s": LINK, "row_bytes": ROW, **changes})


def trace(*requests) -> Trace:
    """Of (arrival, tenant, steps)."""
    return Trace(*(np.array(column) for column in zip(*requests, strict=True)))


def test_copies_share_the_link_and_the_batch_waits_for_them():
    run = simulate(trace((0.0, 0, 2), (0.0, 1, 2), (0.2, 0, 1)), np.array([10, 20]), server())
    assert run.joined.tolist() == [3.0, 3.0, 3.5]  # 1 s and then 2 s of copies; at the next step a hit
    assert run.rows.tolist() == [10, 20, 0]
    assert run.stalled.tolist() == [3.0, 0.0, 0.0]


def test_prefetch_copies_while_the_batch_runs():
    requests = trace((0.0, 0, 4), (1.1, 1, 1))
    waited = {prefetch: simulate(requests, np.array([10, 5]), server(), prefetch) for prefetch in (False, True)}
    assert waited[False].joined.tolist() == [1.0, 2.0] and waited[False].stalled[1] == 0.5
    assert waited[True].joined.tolist() == pytest.approx([1.0, 1.6]) and waited[True].stalled[1] == pytest.approx(0.1)


def test_a_request_without_a_place_waits_for_a_release():
    run = simulate(trace((0.0, 0, 3), (0.1, 1, 1)), np.array([10, 10]), server(slots=1))
    assert run.joined.tolist() == [1.0, 3.5]  # after three steps of the first, and a copy
    assert run.refused.tolist() == [0, 2]


def test_the_batch_limit_holds():
    run = simulate(trace(*((0.0, 0, 2) for _ in range(6))), np.array([10]), server(batch=2))
    assert run.joined.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def steady(count, popularity, seed=0, **changes) -> tuple[Trace, Server]:
    """A light load of short requests, so that few adapters are held."""
    return arrivals(count, rate=20, popularity=popularity, mean_steps=5, seed=seed), Server(**changes)


def test_with_every_adapter_resident_all_hit_after_the_first():
    requests, machine = steady(3000, np.full(50, 1 / 50), slots=50, rows=400)
    run = simulate(requests, np.full(50, 8), machine)
    assert (run.rows > 0).sum() == 50
    assert not run.rows[1000:].any() and not run.refused.any()


def test_uniform_popularity_hits_in_proportion_to_the_slots():
    requests, machine = steady(6000, np.full(200, 1 / 200), slots=50, rows=3200)
    hits = simulate(requests, np.full(200, 8), machine).rows[1000:] == 0
    assert hits.mean() == pytest.approx(50 / 200, abs=0.02)


def test_the_pool_does_what_the_approximation_says():
    popularity, ranks = zipf(500, 1.0), np.random.default_rng(0).choice([8, 16, 16, 64], 500)
    rows = round(ranks @ residence(popularity, 0.6))
    requests, machine = steady(6000, popularity, slots=rows // 8, rows=rows)
    hits = simulate(requests, ranks, machine).rows[2000:] == 0
    assert hits.mean() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("crowds", [None, Crowds(every_s=2, last_s=2, tenants=2)])
def test_no_request_is_lost_however_short_of_slots(crowds, prefetch):
    requests = arrivals(800, 100, zipf(300, 1.0), 20, crowds)
    run = simulate(requests, np.resize([8, 16, 64], 300), Server(slots=6, rows=128, batch=16), prefetch)
    assert run.refused.sum() > 0
    assert (run.joined >= run.arrival).all()
    assert (np.diff(run.joined) >= 0).all()  # in the order of arrival


def test_arrivals_have_their_rate_with_and_without_crowds():
    for crowds in (None, Crowds(every_s=4, last_s=1, tenants=3)):
        requests = arrivals(40_000, 50, zipf(1000, 1.0), 20, crowds)
        assert (np.diff(requests.arrival) > 0).all()
        assert len(requests.arrival) / requests.arrival[-1] == pytest.approx(50, rel=0.05)
        assert requests.steps.mean() == pytest.approx(20, rel=0.05)


def test_in_a_crowd_a_few_tenants_send_half_of_twice_as_many_requests():
    requests = arrivals(40_000, 100, np.full(1000, 0.001), 20, Crowds(every_s=30, last_s=10, tenants=3))
    second = requests.arrival.astype(int)
    busy = np.bincount(second) > 135  # the calm rate is 80, that of a crowd 160
    top_three = [np.sort(np.bincount(requests.tenant[second == each]))[-3:].sum() for each in range(second[-1])]
    shares = top_three / np.bincount(second)[:-1]
    assert np.median(shares[busy[:-1]]) == pytest.approx(0.5, abs=0.06)
    assert np.median(shares[~busy[:-1]]) < 0.1


def test_the_clairvoyant_evicts_what_is_needed_last():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tenants, slots, resident, hits = rng.integers(7, size=60), int(rng.integers(1, 6)), set(), []
        for i, tenant in enumerate(tenants):
            hits.append(tenant in resident)
            if not hits[-1] and len(resident) == slots:
                later = tenants[i:].tolist()
                resident.remove(max(resident, key=lambda each: later.index(each) if each in later else len(later)))
            resident.add(tenant)
        assert clairvoyant_hits(tenants, slots).sum() == sum(hits)


def test_a_lost_machine_moves_its_own_tenants_only():
    before, after = fleet.rendezvous(1000, 8)[:, 0], fleet.rendezvous(1000, 7)[:, 0]
    assert (before == after)[before != 7].all()
    assert set(after[before == 7]) == set(range(7))
    assert (fleet.modulo(1000, 8)[:, 0] == fleet.modulo(1000, 7)[:, 0]).mean() < 0.2


def test_a_bound_spreads_a_hot_tenant_and_leaves_the_others():
    requests = arrivals(20_000, 400, zipf(1000, 1.2), 100)
    order = fleet.rendezvous(1000, 8)
    strict, bounded = (fleet.sticky(requests, order, 0.01, bound) for bound in (np.inf, 1.25))
    assert (strict == order[requests.tenant, 0]).all()
    busiest = [np.bincount(machine, minlength=8).max() / 2500 for machine in (strict, bounded)]
    assert busiest[0] > 1.5 and busiest[1] < 1.26
    assert (strict == bounded).mean() > 0.7


def test_a_case_is_the_same_twice_and_another_with_other_numbers(monkeypatch):
    monkeypatch.setattr(pool, "TENANTS", 500)
    case = pool.Case(300, machines=3, rows=1024, router="hashed, bounded", prefetch=True)
    row = pool.run(case)
    assert row == pool.run(case)
    assert row["hit_rate"] != pool.run(dataclasses.replace(case, rows=4096))["hit_rate"]


def test_the_full_form_writes_results_and_plots(monkeypatch, tmp_path, capsys):
    pool_figures = pytest.importorskip("benchmarks.pool_figures", reason="needs matplotlib")
    every_case = [dataclasses.replace(case, requests=12) for case in pool.cases(full=True)]
    monkeypatch.setattr(pool, "cases", lambda full: every_case)
    monkeypatch.setattr(pool, "TENANTS", 300)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(pool_figures, "IMAGES", tmp_path / "images")
    pool.main(full=True)
    record = json.loads((tmp_path / "benchmarks" / "results" / "simulation" / "pool.json").read_text())
    assert "no GPU" in record["method"] and record["versions"]["numpy"]
    assert [row["case"] for row in record["rows"]] == [dataclasses.asdict(case) for case in every_case]
    assert all(0 < path.stat().st_size < 100_000 for path in (tmp_path / "images").glob("*.svg"))
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        path.name for path in (ROOT / "docs" / "images").glob("pool_*.svg")
    }
    assert "Zipf 0.9; 4,096 rows" in capsys.readouterr().out


def test_the_tables_of_serving_are_those_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text()
    assert set(support_table.MARKED.findall(page)) and support_table.update(page) == page, "run: make readme"


def test_the_results_are_those_of_the_code():
    record = support_table._simulated()
    assert record["parameters"] == json.loads(json.dumps(pool.parameters()))
    assert record["sizing"] == pool.sizing()
    assert [row["case"] for row in record["rows"]] == [dataclasses.asdict(case) for case in pool.cases(full=True)]
