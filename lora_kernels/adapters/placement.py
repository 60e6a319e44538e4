"""Where an adapter's rows go, and whom to evict for them: first fit, the least recently used first, nobody in vain."""

from collections.abc import Iterable


class Gaps:
    """The free ones of `rows` rows: gaps that know where they end, so that neighbours merge without a search."""

    def __init__(self, rows: int):
        self._stops, self._starts = {0: rows}, {rows: 0}  # each gap, by its start and by its stop

    def copy(self) -> "Gaps":
        gaps = Gaps(0)
        gaps._stops, gaps._starts = self._stops.copy(), self._starts.copy()
        return gaps

    def first(self, size: int) -> range | None:
        """The first place for `size` rows in one piece."""
        start = min((start for start, stop in self._stops.items() if stop - start >= size), default=None)
        return None if start is None else range(start, start + size)

    def take(self, place: range) -> None:
        """Occupy `place`, which `first` returned."""
        stop = self._stops.pop(place.start)
        if place.stop == stop:
            del self._starts[stop]
        else:
            self._stops[place.stop], self._starts[stop] = stop, place.stop

    def give(self, place: range) -> range:
        """Free `place`; return the gap that it is now a part of."""
        start, stop = self._starts.pop(place.start, place.start), self._stops.pop(place.stop, place.stop)
        self._stops[start], self._starts[stop] = stop, start
        return range(start, stop)


def find_place(
    size: int, gaps: Gaps, idle: Iterable[tuple[str, range]], slot_is_free: bool
) -> tuple[range, list[str]] | None:
    """`size` rows in one piece and a slot, as `(place, victims)`, or None if evicting all of `idle` gives no such place.

    idle  names and places of those that can be evicted, least recently used first

    >>> gaps = Gaps(7)
    >>> [gaps.take(place) for place in (range(0, 2), range(2, 4), range(4, 6))]
    [None, None, None]
    >>> find_place(4, gaps, [("old", range(2, 4)), ("new", range(4, 6))], slot_is_free=False)
    (range(2, 6), ['old', 'new'])
    """
    place = gaps.first(size)
    if place is not None and slot_is_free:
        return place, []
    gaps, evicted = gaps.copy(), {}
    for name, rows in idle:
        evicted[name] = rows
        gap = gaps.give(rows)
        if place is not None or len(gap) >= size:
            place = gaps.first(size)
            victims = [name for name, rows in evicted.items() if rows.start < place.stop and place.start < rows.stop]
            return place, victims or [name]
    return None
