"""Samples of what is too long to hold in memory."""

import random
from collections.abc import Iterable


def reservoir(rows: Iterable, size: int, rng: random.Random) -> tuple[list, int]:
    """Draw ``size`` rows uniformly in one pass, holding no more than these (reservoir sampling).

    Returns:
        The rows (fewer than ``size`` if there are no more), in no order to rely on, and how many there were.
    """
    kept, seen = [], 0
    for row in rows:
        seen += 1
        if len(kept) < size:
            kept.append(row)
        elif (place := rng.randrange(seen)) < size:
            kept[place] = row
    return kept, seen
