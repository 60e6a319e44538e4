"""The tile tables: every row is legal, and every problem finds one."""

import itertools
from dataclasses import replace

import pytest

from lora_kernels import configs
from lora_kernels.configs import Config, legality

TABLES = {capability: configs.architecture(capability) for capability in (configs.INTERPRETER, *configs.ARCHITECTURES)}
ROWS = [(capability, row) for capability, table in TABLES.items() for row in table.ROWS]


@pytest.mark.parametrize(
    ("capability", "row"), ROWS, ids=[f"{c}-{r.kernel}-{r.itemsize}-{i}" for i, (c, r) in enumerate(ROWS)]
)
def test_row_is_legal(capability, row):
    rank = min(row.max_rank, legality.MAX_RANK.get(row.kernel, 512))
    rows = min(row.max_m, legality.MAX_ROWS.get(row.kernel, row.max_m))
    assert not legality.reasons_illegal(row.kernel, row.config, capability, row.itemsize, rank, rows)
    assert capability == configs.INTERPRETER or (rank, rows) == (row.max_rank, row.max_m)
    assert 0.0 < row.efficiency <= 1.0


@pytest.mark.parametrize(
    ("kernel", "change", "problem", "reason"),
    [
        ("gemm", {}, {}, "no kernel 'gemm'"),
        ("extended", dict(block_m=48), {}, "block_m=48, expected a power of two"),
        ("extended", dict(block_k=8), {}, "block_k=8"),
        ("extended", dict(num_warps=3), {}, "num_warps=3"),
        ("extended", dict(num_stages=0), {}, "num_stages=0, expected at least 1"),
        ("one_launch", dict(num_stages=1), {}, "num_stages=1, expected at least 2"),
        ("extended", dict(group_m=0), {}, "group_m=0"),
        ("extended", dict(max_registers=256), {}, "max_registers=256"),
        ("extended", dict(num_stages=6), {}, "at least 294912 B > 232448 B"),
        ("extended", dict(block_m=256), {}, "256 registers a thread"),
        ("extended", dict(), dict(r=513), "rank 513 > 512"),
        ("single_pass", dict(), dict(r=65), "rank 65 > 64"),
        ("single_pass", dict(), dict(dropout=True), "no dropout"),
        ("one_launch", dict(), dict(capability=80), "needs TMA"),
        ("one_launch", dict(), dict(itemsize=4), "2-byte"),
        ("dy_pass", dict(), {}, "block_k=64, but dy_pass has none"),
        ("shrink", dict(), {}, "block_n=256, but shrink has none"),
        ("batched_extended", dict(halves=True), {}, "stores whole tiles"),
        ("batched_one_launch", dict(), dict(m=257), "257 rows > 256"),
        ("batched_shrink", dict(block_n=16), {}, "block_n=16, expected at least 32"),
    ],
)
def test_what_is_illegal_is_refused_with_the_reason(kernel, change, problem, reason):
    config = replace(Config(128, 256, 64, num_warps=8, num_stages=4), **change)
    problem = dict(capability=90, itemsize=2, r=16) | problem
    assert reason in "; ".join(legality.reasons_illegal(kernel, config, **problem))


@pytest.mark.parametrize("capability", TABLES)
@pytest.mark.parametrize("kernel", ["shrink", "extended", "wgrad", "dy_pass"])
def test_every_problem_finds_a_row(capability, kernel):
    sizes = (1, 33, 64, 4096, 10**6)
    ranks = (1, 16, 32) if kernel == "dy_pass" else (1, 16, 64, 65, 512)
    for m, n, r, itemsize, dropout in itertools.product(sizes, sizes, ranks, (2, 4), (False, True)):
        configs.lookup(kernel, capability, itemsize, m, n, r, num_sms=132, dropout=dropout)


@pytest.mark.parametrize("capability", TABLES)
@pytest.mark.parametrize("kernel", ["shrink", "extended", "chained", "one_launch"])
def test_every_batch_finds_a_row(capability, kernel):
    decoding = kernel == "one_launch"
    rows, itemsizes = ((1, 16, 17, 256), (2,)) if decoding else ((1, 16, 256, 257, 10**6), (2, 4))
    for m, n, r, itemsize, aligned in itertools.product(rows, (1, 4096), (1, 33, 512), itemsizes, (False, True)):
        configs.lookup(f"batched_{kernel}", capability, itemsize, m, n, r, num_sms=132, aligned=aligned)
    if decoding and capability != configs.INTERPRETER:
        assert not configs.candidates("batched_one_launch", capability, 2, 257, 16)


def test_unknown_architectures_use_the_nearest_older_table():
    assert configs.architecture(89).__name__.endswith("sm80")
    assert configs.architecture(103).__name__.endswith("sm100")
    assert configs.architecture(0).__name__.endswith("interpreter")


def test_missing_row_is_an_error_that_names_the_problem():
    with pytest.raises(LookupError, match="one_launch.*capability 80.*r=16"):
        configs.lookup("one_launch", 80, 2, 8192, 4096, 16, 108)


def test_large_problems_get_the_large_tile_and_small_ones_fill_the_machine():
    large = configs.lookup("extended", 90, 2, 8192, 4096, 16, 132)
    assert (large.block_m, large.block_n, large.block_k, large.num_stages) == (128, 256, 64, 4)
    assert configs.lookup("extended", 90, 2, 512, 4096, 16, 132).block_n == 128
    assert configs.lookup("extended", 90, 2, 8192, 4096, 16, 132, dropout=True).block_n == 128


@pytest.mark.parametrize("capability", configs.ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 16, 17, 64, 96, 256])
def test_tiles_for_unaligned_rows_are_the_last_resort_while_decoding(capability, m):
    """They are low, so that W would be read once for every 16 rows."""
    for kernel in ("batched_one_launch", "batched_shrink"):
        problem = (capability, 2, m, 4096, 16, configs.architecture(capability).NUM_SMS)
        chosen = configs.lookup(kernel, *problem)
        [row] = [row for row in configs.candidates(kernel, capability, 2, m, 16) if row.config == chosen]
        assert not row.unaligned
