"""Every interleaving of a few GPU programs under acquire/release semantics; an interpreter runs one and sees no race.

A program is a generator of operations, each done by one of two threads. Thread 0 does the atomics, as in Triton's code,
and an atomic whose result is used (all but `xchg`) ends with a barrier that hands it over. What happens before an
operation is kept per thread as a set of events, one bit each: the vector clock of a run this short.

- A release leaves what its thread knows at the place, an acquire takes it over; read-modify-writes keep what is there.
- Two accesses of a place race if neither happens before the other, one writes and one is plain. Without a race a plain
  load has one value to return, so plain operations need no interleaving: they run with the atomic before them.
- An atomic `read`, Triton's code for an atomic_add of 0, may return what nothing known to its thread overwrote.
- A `wait` is a spin: it goes on with a read that is not zero. Schedules are taken to be fair.
- The search is breadth first, so the first violation has the fewest atomics. A launch happens before the next one.

Not explored: executions with a cycle of program order and reads-from, which PTX allows for relaxed operations.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import NamedTuple

THREADS = 2
PLAIN = ("load", "store", "barrier")


class Op(NamedTuple):
    kind: str
    place: str = ""
    value: Hashable = None
    sem: str = "plain"
    label: str = ""
    thread: int = 0

    def __str__(self):
        value = "" if self.value is None else f" {self.value}"
        return f"{self.kind} {self.place}{value} [{self.sem}, thread {self.thread}]"


load, store, add, xchg, read, wait = (partial(Op, kind) for kind in ("load", "store", "add", "xchg", "read", "wait"))
barrier = partial(Op, "barrier", "", None, "cta")


def put(what, value):
    """Each thread stores one half."""
    for thread in range(THREADS):
        yield store(f"{what}.{thread}", value, thread=thread)


def get(what):
    """Each thread loads the half that the other stored."""
    return (yield load(f"{what}.0", thread=1)), (yield load(f"{what}.1", thread=0))


def finish(tile, *terms):
    """A tile is the sequence of all its results, so that one too many shows."""
    done = yield load(f"y {tile}")
    yield store(f"y {tile}", (*done, terms))


class Access(NamedTuple):
    """`event` 0 is before the launch; `released` is what an acquire that reads this write takes over."""

    event: int
    atomic: bool
    writes: bool
    value: Hashable = None
    released: int = 0


class State(NamedTuple):
    """`results`: per program what its operations returned; `known`: per thread; `log`: a place's accesses in order."""

    launch: int
    results: tuple
    known: tuple
    log: frozenset


class Violation(AssertionError):
    """What went wrong, and under it the trace that leads there."""


class Explorer:
    """`programs`: name -> generator function of the launch; `start` and `expected(launch)`: the value of each place.

    `edit` is a mutation: label -> another sem, or None to drop the operation. At most `resident` programs (None: all)
    have started and not finished at any time, as on a small GPU. `performed` collects the operations.
    """

    def __init__(
        self,
        programs: dict[str, Callable[[int], Iterator[Op]]],
        start: dict[str, Hashable],
        expected: Callable[[int], dict[str, Hashable]],
        launches: int = 2,
        resident: int | None = None,
        edit: dict[str, str | None] | None = None,
    ):
        self.names, self.programs = list(programs), list(programs.values())
        self.start, self.expected, self.launches = start, expected, launches
        self.resident, self.edit = resident or len(programs), edit or {}
        self.next_op = cache(self._next_op)
        self.performed: set[Op] = set()
        self.lines: list[str] = []

    def explore(self) -> int:
        """The number of states; raises Violation with a shortest trace."""
        parents: dict[State, tuple[State | None, list[str]]] = {}
        queue: deque[State] = deque()

        def reach(state, parent):
            if state not in parents:
                parents[state] = parent, self.lines
                queue.append(state)

        state = None
        try:
            reach(self._begin(0, self.start), None)
            while queue:
                state = queue.popleft()
                for successor in self._successors(state):
                    reach(successor, state)
        except Violation as violation:
            trace = self.lines
            while state is not None:
                state, lines = parents[state]
                trace = lines + trace
            raise Violation("\n  ".join([str(violation), *trace])) from None
        return len(parents)

    def _begin(self, launch, values):
        self.lines = [f"launch {launch}"]
        log = frozenset((place, (Access(0, True, True, value),)) for place, value in values.items())
        return State(launch, ((),) * len(self.programs), (0,) * (THREADS * len(self.programs)), log)

    def _successors(self, state):
        ops = [self.next_op(state.launch, p, results) for p, results in enumerate(state.results)]
        if not any(ops):
            yield from self._end(state)
            return
        full = sum(bool(op and results) for op, results in zip(ops, state.results, strict=True)) >= self.resident
        stuck = True
        for program, results in enumerate(state.results):
            if not ops[program] or (full and not results):
                continue
            self.lines = []
            before = self._run_plain(state, program)
            lines, op = self.lines, self.next_op(state.launch, program, before.results[program])
            for source in self._sources(before, program, op):
                stuck, self.lines = False, lines
                yield self._run_plain(self._perform(before, program, op, source), program)
        if stuck:
            self.lines = []
            raise Violation(f"deadlock: {', '.join(f'{self.names[p]} at {op}' for p, op in enumerate(ops) if op)}")

    def _end(self, state):
        self.lines = []
        values = {place: self._writes(accesses)[-1].value for place, accesses in state.log}
        for place, value in self.expected(state.launch).items():
            if values[place] != value:
                raise Violation(f"after launch {state.launch}: {place} is {values[place]}, expected {value}")
        if state.launch + 1 < self.launches:
            yield self._begin(state.launch + 1, values)

    def _next_op(self, launch, program, results):
        """A generator cannot be copied, so each one is run again up to where it was."""
        generator, result = self.programs[program](launch), None
        while True:
            try:
                op = generator.send(result)
            except StopIteration:
                return None
            op = op._replace(sem=self.edit.get(op.label, op.sem))
            if op.sem is None:
                result = None
            elif not results:
                return op
            else:
                result, *results = results

    def _run_plain(self, state, program):
        while (op := self.next_op(state.launch, program, state.results[program])) and op.kind in PLAIN:
            (source,) = self._sources(state, program, op)
            state = self._perform(state, program, op, source)
        return state

    @staticmethod
    def _writes(accesses):
        return [access for access in accesses if access.writes]

    def _sources(self, state, program, op):
        """The writes that `op` may read from."""
        if op.kind == "barrier":
            return [None]
        writes = self._writes(dict(state.log)[op.place])
        if op.kind not in ("read", "wait"):
            return writes[-1:]
        known = state.known[THREADS * program]
        newest_known = max(i for i, write in enumerate(writes) if not write.event & ~known)
        return [write for write in writes[newest_known:] if op.kind == "read" or write.value]

    def _perform(self, state, program, op, source):
        known, log = list(state.known), dict(state.log)
        event = 1 << (len(self.programs) * len(state.results[program]) + program)
        threads = range(THREADS * program, THREADS * (program + 1))
        thread = threads[op.thread]
        result = None
        if op.kind != "barrier":
            atomic, writes = op.kind not in PLAIN, op.kind in ("store", "add", "xchg")
            self._check_race(state, program, op, known[thread], atomic, writes)
            known[thread] |= event
            if op.sem in ("acquire", "acq_rel"):
                known[thread] |= source.released
            released = known[thread] if op.sem in ("release", "acq_rel") else 0
            if atomic:
                released |= source.released
            value = source.value + op.value if op.kind == "add" else op.value
            log[op.place] += (Access(event, atomic, writes, value, released),)
            result = None if op.kind in ("store", "xchg") else source.value
        if op.kind in ("barrier", "add", "read", "wait"):
            for t in threads:
                known[t] |= known[threads[0]] | known[threads[1]]
        self.lines = [*self.lines, f"{self.names[program]}: {op}" + (f" -> {result}" if result is not None else "")]
        self.performed.add(op)
        results = list(state.results)
        results[program] += (result,)
        return State(state.launch, tuple(results), tuple(known), frozenset(log.items()))

    def _check_race(self, state, program, op, known, atomic, writes):
        for other in dict(state.log)[op.place]:
            if other.event & ~known and (writes or other.writes) and not (atomic and other.atomic):
                step, rival = divmod(other.event.bit_length() - 1, len(self.programs))
                against = self.next_op(state.launch, rival, state.results[rival][:step])
                names = self.names[program], self.names[rival]
                raise Violation(f"race: {names[0]}: {op} is not ordered after {names[1]}: {against}")


def protocol(programs, counters, data, tiles, terms, resets=True, **limits):
    """Each launch writes its number; the result of a tile is `terms` pairs of halves. Without `resets`, one launch."""
    counters, start = dict.fromkeys(counters, 0), dict.fromkeys(f"{what}.{half}" for what in data for half in (0, 1))

    def expected(launch):
        results = tuple(((past, past),) * terms for past in range(launch + 1))
        return {f"y {tile}": results for tile in tiles} | (counters if resets else {})

    start |= counters | {f"y {tile}": () for tile in tiles}
    return Explorer(programs, start, expected, launches=2 if resets else 1, **limits)
