"""Where an adapter's rows go, and whom to evict for them: first fit, the least recently used first, nobody in vain."""


def find_place(size: int, held: list[range], idle: list[range], slots: int, rows: int) -> tuple[range, int] | None:
    """`size` rows in one piece and a slot among `slots` and `rows`, as `(place, evicted)`, or None.

    held, idle  the places taken; those of `idle`, least recently used first, can be had
    evicted     how many of `idle` are to be considered: those that overlap `place`, or else, for their slot, the first

    >>> find_place(4, held=[range(0, 2)], idle=[range(2, 4), range(4, 6)], slots=3, rows=7)
    (range(2, 6), 2)
    """
    for evicted in range(len(idle) + 1):
        staying = held + idle[evicted:]
        first = _first_gap(staying, size)
        if first + size <= rows and len(staying) < slots:
            return range(first, first + size), evicted
    return None


def overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _first_gap(places, size) -> int:
    end = 0
    for place in sorted(places, key=lambda place: place.start):
        if place.start - end >= size:
            break
        end = place.stop
    return end
