"""Which documents of a source are taken: a seeded draw of items by their number, so that it needs no state.

A source is parts (files, row groups) of numbered items. A round says how many of the parts, in a seeded order, are
read and which share of their items is taken. The first round is chosen from a sample, so that it should meet the
wanted tokens; if it does not, further ones take more.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

FEWEST_PARTS = 16  # are read of a source that has them, and at least
READ_FOR_ONE = 8  # times as much text is read as is taken, of sources of many parts
STRATUM = 64  # items, of which the wanted share is taken as nearly as it goes
MASK = 2**64 - 1
AIM = 1.02  # times the wanted tokens are aimed at, since a sample tells them only nearly


def key(*of) -> int:
    """A 64-bit number of some values, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8).digest(), "little")


def uniform(key: int, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each of some numbers, (n,) -> (n,) float64.

    SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2714064.2660195) as a function of its counter.
    """
    with np.errstate(over="ignore"):  # it counts modulo 2**64
        z = (np.asarray(numbers, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def evenly(key: int, first: int, count: int) -> np.ndarray:
    """As ``uniform``, of the numbers first, first + 1, ..., but spread evenly over each STRATUM of them.

    So the share of items below a number is nearly that number, whichever they are (stratified sampling).
    """
    begin, end = first // STRATUM, -(-(first + count) // STRATUM)
    numbers = np.arange(begin * STRATUM, end * STRATUM)
    order, within = uniform(key, numbers).reshape(-1, STRATUM), uniform(~key & MASK, numbers).reshape(-1, STRATUM)
    ranks = order.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    skipped = first - begin * STRATUM
    return ((ranks + within) / STRATUM).ravel()[skipped : skipped + count]


class Round(NamedTuple):
    """What is taken: of the first ``parts`` parts in the seeded order, this share of the items."""

    parts: int
    share: float


class Draw:
    """The seeded draw of one source.

    Attributes:
        order: Its parts, in the seeded order.
    """

    def __init__(self, name: str, seed: int, sizes: Sequence[int]):
        """For a source of parts of these sizes, in bytes."""
        self.of = (seed, name)
        self.sizes = np.maximum(np.array(sizes, np.float64), 1.0)
        self.order = np.random.default_rng(key("parts", *self.of)).permutation(len(sizes)).tolist()
        self.rank = {part: rank for rank, part in enumerate(self.order)}

    def first_round(self, wanted: float) -> Round:
        """A round that takes this share of the source's tokens."""
        if wanted * AIM >= 1:
            return Round(len(self.order), 1.0)
        return self._round(wanted * AIM, max(FEWEST_PARTS, math.ceil(len(self.order) * wanted * READ_FOR_ONE)))

    def _round(self, wanted: float, parts: int) -> Round:
        """A round over so many parts, or as many more as it takes."""
        reached = np.cumsum(self.sizes[self.order]) / self.sizes.sum()
        parts = min(max(parts, int(np.searchsorted(reached, wanted)) + 1), len(self.order))
        return Round(parts, min(1.0, wanted / float(reached[parts - 1])))

    def next_round(self, last: Round, met: float) -> Round:
        """A round that takes more than the last, which met this share of the wanted tokens.

        Further parts come first: of those that were read, all items would have to be passed over once more.
        """
        reached = np.cumsum(self.sizes[self.order]) / self.sizes.sum()
        taken = float(reached[last.parts - 1]) * last.share
        wanted = min(1.0, taken / max(met, 0.1) * AIM)
        parts = max(last.parts + 1, int(np.searchsorted(reached, wanted / last.share)) + 1)
        if parts <= len(self.order):
            return Round(parts, last.share)
        return Round(len(self.order), min(1.0, max(wanted, 1.01 * last.share)))

    def takes(self, part: int, rounds: Sequence[Round]) -> Callable[[int, int], np.ndarray] | None:
        """Tell of items by number whether the last of the rounds takes them, and none before did; None: takes none."""
        *before, last = [each.share if self.rank[part] < each.parts else 0.0 for each in rounds]
        least = max(before, default=0.0)
        if last <= least:
            return None
        mine = key("items", *self.of, part)

        def wanted(first: int, count: int) -> np.ndarray:
            if (least, last) == (0.0, 1.0):
                return np.ones(count, bool)
            drawn = evenly(mine, first, count)
            return (least <= drawn) & (drawn < last)

        return wanted
