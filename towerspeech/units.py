"""Discrete speech units (DSUs) as text: ids <-> private-use characters, runs, ranges.

A unit is written as one character of plane 15's private use area, ``chr(offset + id)``. SpireLM
(arXiv 2503.10620) counts from U+F0000 = 983040, the default here; the original TowerSpeech from
990000. Tokenizer folders carry their offset in speech_units.json.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from towerspeech.stage import UserError, check_exists, hash_file, read_json

OFFSET = 0xF0000  # SpireLM's first unit character
MAX_NUM_UNITS = 0xFFFFE - OFFSET  # plane 15 ends at U+FFFFD


def to_text(units: Iterable[int], offset: int = OFFSET) -> str:
    """Write unit ids as private-use characters, one a unit."""
    return "".join([chr(offset + unit) for unit in units])


def from_text(text: str, num_units: int, offset: int = OFFSET) -> list[int]:
    """Read unit ids back from ``to_text``'s characters.

    Raises:
        UserError: A character is no unit below ``num_units``.
    """
    units = [ord(char) - offset for char in text]
    check_range(units, num_units, "text")
    return units


def collapse(units: Sequence[int]) -> list[int]:
    """Drop consecutive repeats: 7 7 7 3 3 7 -> 7 3 7 (about 30% shorter for HuBERT units)."""
    return [unit for unit, _ in groupby(units)]


def check_range(units: Sequence[int], num_units: int, where: str) -> None:
    """Raise UserError if a unit id lies outside 0..num_units-1; ``where`` names file and row."""
    if len(units) and (min(units) < 0 or max(units) >= num_units):
        bad = min(units) if min(units) < 0 else max(units)
        raise UserError(
            f"{where}: unit id {bad} is outside 0..{num_units - 1}",
            "label the audio with the k-means that this tokenizer was made for, or make the tokenizer anew",
        )


def read_metadata(tokenizer_dir: Path) -> dict:
    """Read speech_units.json of a tokenizer folder: num_units, offset, merges, special tokens.

    Raises:
        UserError: The folder has none, so its tokenizer knows no units.
    """
    path = Path(tokenizer_dir) / "speech_units.json"
    remedy = "make one with train_bpe_tokenizer/merge_tokenizer.py"
    if not path.is_file():
        raise UserError(f"{path} is missing: this tokenizer knows no speech units", remedy)
    return read_json(path, remedy)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json: token files and models that were made for each other have the same."""
    path = Path(folder) / "tokenizer.json"
    check_exists(path, f"{folder} must be a Hugging Face folder with a fast tokenizer")
    return hash_file(path)
