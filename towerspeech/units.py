"""Discrete speech units (DSUs) as text: ids <-> private-use characters, runs, ranges.

A unit is written as one character of plane 15's private use area, ``chr(offset + id)``. SpireLM
(arXiv 2503.10620) counts from U+F0000 = 983040, the default here; the original TowerSpeech from
990000. Tokenizer folders carry their offset in speech_units.json.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from towerspeech.errors import UserError

OFFSET = 0xF0000  # SpireLM's first unit character
OFFSETS = (OFFSET, 990000)  # and the original's
MAX_DIGITS = 20  # of a unit id, with zeros before it; int() refuses thousands with an error of its own
MAX_NUM_UNITS = 0xFFFFE - OFFSET  # plane 15 ends at U+FFFFD


def to_text(units: Iterable[int], offset: int = OFFSET) -> str:
    """Write unit ids as private-use characters, one a unit."""
    return "".join([chr(offset + unit) for unit in units])


def from_text(text: str, num_units: int, offset: int = OFFSET) -> list[int]:
    """Read unit ids back from ``to_text``'s characters, each of which must be a unit below ``num_units``."""
    units = [ord(char) - offset for char in text]
    check_range(units, num_units, "text")
    return units


def parse_km(line: bytes, num_units: int, where: str) -> list[int]:
    """Read one line of a .km file: unit ids with ASCII's white space between them.

    Raises:
        UserError: A word is no id, or one that is not below ``num_units``; ``where`` names file and line.
    """
    units = []
    for word in line.split():
        if not word.isdigit() or len(word) > MAX_DIGITS:  # int() takes +1, 1_0 and -0, too
            shown = ascii(word[:40].decode("utf-8", "backslashreplace"))
            problem = f"{where}: not unit ids, which are digits alone, with spaces between them: {shown}"
            raise UserError(problem, "mend the line; is it another kind of file?")
        units.append(int(word))
    check_range(units, num_units, where)
    return units


def collapse(units: Sequence[int]) -> list[int]:
    """Drop consecutive repeats: 7 7 7 3 3 7 -> 7 3 7 (about 30% shorter for HuBERT units)."""
    return [unit for unit, _ in groupby(units)]


def check_num_units(num_units: int) -> None:
    """Raise UserError unless so many units have a character each: 2 to MAX_NUM_UNITS."""
    if not 2 <= num_units <= MAX_NUM_UNITS:
        remedy = f"give 2 to {MAX_NUM_UNITS:,}, for which plane 15 has characters"
        raise UserError(f"--num_units is {num_units:,}", remedy)


def check_range(units: Sequence[int], num_units: int, where: str) -> None:
    """Raise UserError if a unit id lies outside 0..num_units-1; ``where`` names file and row."""
    if len(units) and (min(units) < 0 or max(units) >= num_units):
        bad = min(units) if min(units) < 0 else max(units)
        raise UserError(
            f"{where}: unit id {bad} is outside 0..{num_units - 1}",
            "give the number of units of the k-means that they are of; a tokenizer must be made for the same",
        )


def split_units(units, ends, offset: int = OFFSET) -> Iterator[str]:
    """Private-use text of each row, from all rows' units, (num_units,) uint32, and where a row's end, (num_rows,)."""
    text = (units + offset).tobytes().decode("utf-32-le")
    start = 0
    for end in ends.tolist():
        yield text[start:end]
        start = end
