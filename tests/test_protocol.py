"""The two one-launch protocols in every interleaving, two launches in a row: no race, no deadlock, each tile once and
right, counters back at zero. Every mutant must be found; orders that are not needed have tests that say why."""

import ast
import contextlib
from functools import partial
from pathlib import Path

import pytest
from explorer import Explorer, Violation, add, barrier, finish, get, protocol, put, read, store, wait, xchg

import lora_kernels

SHAPES = [{}, dict(programs=3), dict(order=((0, 0), (1, 0))), dict(order=((0, 0), (0, 1), (0, 2)))]
RELAXED = {"first ticket": "relaxed", "next ticket": "relaxed"}


def second_arriver(shrinks=2, tiles=2, parts=1, ready_at=None, spilled_at=None, spill_first=True, **limits):
    """`batched_one_launch_kernel`."""
    ready_at = 2 * parts if ready_at is None else ready_at
    spilled_at = parts if spilled_at is None else spilled_at

    def expand(tile, sums):
        planes = []
        for split in range(shrinks):
            planes.append((yield from get(f"planes {split}")))
        yield from finish(tile, *sums, *planes)

    def add_parts(tile):
        sums = []
        for part in range(parts):
            sums.append((yield from get(f"spill {tile} {part}")))
        return sums

    def shrink(split, launch):
        yield from put(f"planes {split}", launch)
        yield barrier("barrier before arrive")
        if (yield add("arrived", 1, "acq_rel", "arrive")) == shrinks - 1:
            yield xchg("arrived", 0, "relaxed", "reset arrived")
            for tile in range(tiles):
                if (yield add(f"state {tile}", parts + 1, "acq_rel", "all of h")) == spilled_at:
                    yield from expand(tile, (yield from add_parts(tile)))
                    yield xchg(f"state {tile}", 0, "relaxed", "shrink resets")

    def gemm(tile, part, launch):
        sums = [(launch, launch)]
        last = parts == 1 and (yield read(f"state {tile}", 0, "acquire", "look")) == ready_at
        if not last:
            if spill_first:
                yield from put(f"spill {tile} {part}", launch)
                yield barrier("barrier before hand over")
            last = (yield add(f"state {tile}", 1, "acq_rel", "hand over")) == ready_at
            if not spill_first:
                yield from put(f"spill {tile} {part}", launch)
        if last:
            if parts > 1:
                sums = yield from add_parts(tile)
            yield from expand(tile, sums)
            yield xchg(f"state {tile}", 0, "relaxed", "gemm resets")

    pieces = [(tile, part) for tile in range(tiles) for part in range(parts)]
    programs = {f"shrink {split}": partial(shrink, split) for split in range(shrinks)}
    programs |= {f"gemm {tile} {part}": partial(gemm, tile, part) for tile, part in pieces}
    counters = ["arrived", *(f"state {tile}" for tile in range(tiles))]
    data = [f"planes {split}" for split in range(shrinks)] + [f"spill {tile} {part}" for tile, part in pieces]
    return protocol(programs, counters, data, range(tiles), parts + shrinks, **limits)


def tickets(order=((0, 0), (1, 0), (0, 1), (1, 1)), programs=2, last=1, resets=True, **limits):
    """`one_launch_kernel` with ordered tickets; `order` is the tiles (m, n) by ticket."""
    rows = sorted({m for m, _ in order})

    def program(launch):
        tile = yield add("ticket", 1, "acq_rel", "first ticket")
        while tile < len(order):
            m, n = order[tile]
            h = launch, launch
            if n == 0:
                yield from put(f"h {m}", launch)
                yield barrier("barrier before publish")
                yield xchg(f"ready {m}", 1, "release", "publish")
            else:
                yield wait(f"ready {m}", 0, "acquire", "spin")
                h = yield from get(f"h {m}")
            yield from finish((m, n), (launch, launch), h)
            tile = yield add("ticket", 1, "acq_rel", "next ticket")
        if resets and tile == len(order) + programs - last:
            for m in rows:
                yield store(f"ready {m}", 0, label="reset ready")
            yield store("ticket", 0, label="reset ticket")

    counters, data = ["ticket", *(f"ready {m}" for m in rows)], [f"h {m}" for m in rows]
    return protocol({f"program {p}": program for p in range(programs)}, counters, data, order, 2, resets, **limits)


@pytest.mark.parametrize(
    ("shrinks", "tiles", "parts"),
    [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (3, 2, 1), (1, 1, 2), (2, 1, 2), (1, 1, 3)],
)
def test_second_arriver(shrinks, tiles, parts):
    second_arriver(shrinks, tiles, parts).explore()


@pytest.mark.parametrize("resident", [None, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_tickets(shape, resident):
    tickets(**shape, resident=resident).explore()


@pytest.mark.parametrize("shape", SHAPES)
def test_relaxed_tickets_leave_the_reset_unordered(shape):
    """The kernel's tickets: they order neither a flag's publication nor its readers before its reset, and need not
    order anything else. Where a consumer saw the flag, hardware orders them all the same: the acquire holds back the
    consumer's next ticket, and stores are not speculated. In a single column nobody waits for the flag: `ready = 1`
    may be performed after the ticket that its program takes next, so after the reset, and meet the next launch."""
    with pytest.raises(Violation, match=r"^race: program .: store ready . 0 .* is not ordered after .* ready"):
        tickets(**shape, edit=RELAXED).explore()
    tickets(**shape, edit=RELAXED, resets=False).explore()


WEAKER = ("release", "acquire", "relaxed")
NEEDED = {  # for the data
    second_arriver: {"barrier before arrive": [None], "barrier before hand over": [None], "look": ["relaxed"]}
    | dict.fromkeys(("arrive", "all of h", "hand over"), WEAKER),
    tickets: {"barrier before publish": [None], "publish": ["relaxed"], "spin": ["relaxed"]},
}
RESETS = {second_arriver: ("reset arrived", "shrink resets", "gemm resets"), tickets: ("reset ready", "reset ticket")}
RACE_ON_DATA = "race: .* load (planes|spill|h) .* is not ordered after .* store"
RACE_OF_RESET = "race: program .: store (ready .|ticket) 0 "
MUTANTS = [
    *((m, {k: sem}, {}, RACE_ON_DATA) for m, sems in NEEDED.items() for k in sems for sem in sems[k]),
    # for the reset; without a first ticket's release only that of the ticket, which coherence orders
    *((tickets, {label: sem}, {}, RACE_OF_RESET) for label in RELAXED for sem in WEAKER),
    *((m, {label: None}, {}, "after launch 0: .*, expected 0") for m, labels in RESETS.items() for label in labels),
    (second_arriver, {}, dict(spill_first=False), RACE_ON_DATA),
    (second_arriver, {}, dict(ready_at=0), "race: .* load planes"),
    (second_arriver, {}, dict(ready_at=1), r"after launch 0: y . is \(\)"),
    (second_arriver, {}, dict(ready_at=3), r"after launch 0: y . is \(\)"),
    (second_arriver, {}, dict(spilled_at=0), "race: .* spill"),
    (second_arriver, {}, dict(tiles=1, parts=2, ready_at=3), "race: .* spill"),
    (second_arriver, {}, dict(tiles=1, parts=2, spilled_at=1), "race: .* spill"),
    (second_arriver, {"barrier before hand over": None}, dict(tiles=1, parts=2), RACE_ON_DATA),
    (second_arriver, {"hand over": "release"}, dict(tiles=1, parts=2), RACE_ON_DATA),
    (tickets, {}, dict(last=2), RACE_OF_RESET),
    (tickets, {}, dict(order=((0, 1), (0, 0)), resident=1), "deadlock: .* at wait ready 0"),
]


@pytest.mark.parametrize(("model", "edit", "change", "found"), MUTANTS, ids=lambda v: str(v) * (type(v) is dict))
def test_mutant_is_found(model, edit, change, found):
    with pytest.raises(Violation, match=rf"^{found}.*\n  launch 0\n"):
        model(**change, edit=edit).explore()


BATCHED = """store planes; barrier; add arrived 1 acq_rel; xchg arrived 0 relaxed;
    add state 0 acquire; store spill; barrier; add state 1 acq_rel;
    add state 2 acq_rel; load spill; load planes; store y; xchg state 0 relaxed"""
TICKETS = """add ticket 1 acq_rel; store h; barrier; xchg ready 1 release; add ready 0 acquire; load h; store y;
    add ticket 1 acq_rel; store ready 0 plain; store ticket 0 plain"""
COUNTING = {"tl.atomic_add": "add", "tl.atomic_xchg": "xchg", "tl.store": "store"}
MOVING = {
    "shrink_tile": ["store planes"],
    "add_parts": ["load spill"],
    "expand_batch": ["load planes"],
    "store_tile": ["store y"],
}


def of_source(file, kernel):
    tree = ast.parse((Path(lora_kernels.__file__).parent / "kernels" / file).read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name, *args = (ast.unparse(node) for node in (call.func, *call.args))
        how = {keyword.arg: ast.unparse(keyword.value).strip("'") for keyword in call.keywords}
        if name == "tl.store" and args[0].startswith("parts_of(spill"):
            yield "store spill"
        elif name in COUNTING or "atomic" in name:
            assert how.get("scope", "gpu") == "gpu"
            value = eval(args[1], {"PARTS": 1})
            yield f"{COUNTING[name]} {args[0].split()[0]} {value} {how.get('sem', 'plain')}"
        elif name.endswith("_rows"):
            yield f"{name.removesuffix('_rows')} {args[0]}"
        else:
            yield from ["barrier"] if name == "tl.debug_barrier" else MOVING.get(name, [])


def of_model(op):
    words = ["add" if op.kind in ("read", "wait") else op.kind, *op.place.split()[:1]]
    return " ".join([*words, str(op.value), op.sem] if op.place and op.label else words)


SOURCES = [
    ("decode.py", "batched_one_launch_kernel", BATCHED, second_arriver()),
    ("gemm.py", "one_launch_kernel", TICKETS, tickets(programs=1)),
]


@pytest.mark.parametrize(("file", "kernel", "text", "model"), SOURCES, ids=["second_arriver", "tickets"])
def test_kernel_and_model_are_one_protocol(file, kernel, text, model):
    operations = [" ".join(operation.split()) for operation in text.split(";")]
    assert list(of_source(file, kernel)) == operations
    model.explore()
    assert {of_model(op) for op in model.performed} - {"load y"} == set(operations)


@pytest.mark.parametrize("sems", [("release", "acquire"), ("release", "relaxed"), ("relaxed", "acquire")])
def test_message_passing(sems):
    """The explorer itself: a new flag with old data, unless the flag is released and acquired."""

    def writer(launch):
        yield xchg("data", 1, "relaxed")
        yield xchg("flag", 1, sems[0])

    def reader(launch):
        flag = yield read("flag", 0, sems[1])
        yield store("stale", flag > (yield read("data", 0, "relaxed")))

    explorer = Explorer(dict(w=writer, r=reader), dict(data=0, flag=0, stale=0), lambda launch: dict(stale=0))
    with pytest.raises(Violation, match="stale is True") if "relaxed" in sems else contextlib.nullcontext():
        explorer.explore()
