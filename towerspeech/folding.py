"""Text as it is compared: letters and digits, without case, accents, punctuation and spacing; runs of it as hashes."""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BORDER = 0x110000  # a character that is none, behind each text
BREAK = 1  # what characters become that stand between sentences
COMMAS = ",،、"
BREAKS = "P", "S", "Cc", "Zl", "Zp"  # categories of punctuation, symbols, line breaks and tabs
HEAVY = 0x3005  # the first character that says more than a letter
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
BLOCK = 1 << 13  # characters hashed at a time


@functools.cache
def folding() -> tuple[np.ndarray, list[list[int]]]:
    """What each character is compared as: [0x110000] of code points, and those that become several (ß, ½).

    0 is nothing, BREAK a line break or punctuation other than a comma; BORDER + 1 + i is number i of those that become
    several. Beside case and what NFKC does away with (width, ligatures), accents are left out: texts have them as
    characters of their own, and Russian writes ё as е.
    """
    table, several = np.zeros(0x110000, np.uint32), []
    for code in chain(range(0xD800), range(0xE000, 0x40000)):  # above are no letters; between, halves of characters
        parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        kept = [ord(c) for c in unicodedata.normalize("NFC", "".join(c for c in parts if c.isalnum()))]
        if len(kept) > 1:
            several.append(kept)
            table[code] = BORDER + len(several)
        elif kept:
            table[code] = kept[0]
        elif parts not in COMMAS and unicodedata.category(chr(code)).startswith(BREAKS):
            table[code] = BREAK
    return table, several


def fold(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The letters and digits of texts as they are compared, each text with a BORDER behind it, and where they break.

    Returns:
        Code points, uint32, of all texts one after the other; the positions of the borders in it, [number of texts];
        where a sentence may begin or end, in order, some twice: at each BREAK, which is left out of the codes, and
        at the beginning and end of each text.
    """
    table, several = folding()
    texts = [unicodedata.normalize("NFC", text) for text in texts]  # for Korean in parts of syllables
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = table.take(codes)
    codes[[end - 1 for end in accumulate(len(text) + 1 for text in texts)]] = BORDER
    codes = codes[codes != 0]
    longer = np.flatnonzero(codes > BORDER)
    if longer.size:
        parts = [several[code - BORDER - 1] for code in codes[longer].tolist()]
        codes[longer] = [part[0] for part in parts]
        behind = np.repeat(longer + 1, [len(part) - 1 for part in parts])
        codes = np.insert(codes, behind, [code for part in parts for code in part[1:]])
    is_break = codes == BREAK
    breaks = np.flatnonzero(is_break)
    codes = codes[~is_break]
    ends = np.flatnonzero(codes == BORDER)
    breaks -= np.arange(len(breaks))
    breaks = breaks[np.flatnonzero(np.diff(breaks, prepend=-1))]  # one where several are in a row
    breaks = np.concatenate([[0], breaks, ends, ends + 1])
    breaks.sort(kind="stable")  # fast, for its parts are in order
    return codes, ends, breaks


def is_han(codes: np.ndarray) -> np.ndarray:
    """Which characters are Chinese ones (or Japanese kana), bool."""
    return (codes >= 0x3005) & ((codes <= 0x9FFF) | ((codes >= 0xF900) & (codes <= 0xFAFF)) | (codes >= 0x20000))


def weights_of(codes: np.ndarray) -> np.ndarray:
    """How much of a sentence each character is, in letters: 3 of Chinese, 2 of Korean, 0 of digits.

    On FLORES devtest, English has 2.8 times the characters of Chinese, and 2.2 times those of Korean. Digits say
    nothing: dates and tables are in many texts.
    """
    weights = np.ones(len(codes), np.int64)
    weights[(codes >= ord("0")) & (codes <= ord("9"))] = 0
    weights[(codes >= 0xAC00) & (codes <= 0xD7A3)] = 2
    weights[is_han(codes)] = 3
    return weights


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """MULTIPLIER to the powers 1, 2, ... and 0, -1, ..., uint64."""
    up, down, inverse = [MULTIPLIER], [1], pow(MULTIPLIER, -1, 1 << 64)
    for _ in range(2 * BLOCK):
        up.append(up[-1] * MULTIPLIER % (1 << 64))
        down.append(down[-1] * inverse % (1 << 64))
    return np.array(up, np.uint64), np.array(down, np.uint64)


def hash_runs(codes: np.ndarray, lengths: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Hash all runs of some lengths, block by block, so that all stays in a core's cache.

    A hash is a polynomial of the run's characters: the difference of two running sums of characters times powers,
    divided by the power of the run's beginning.

    Yields:
        A length; where the first of some runs of it begins; the hashes of that run and those behind it, uint64.
    """
    up, down = _powers()
    for begin in range(0, len(codes), BLOCK):
        block = codes[begin : begin + BLOCK + max(lengths)]
        sums = np.zeros(len(block) + 1, np.uint64)
        np.cumsum(block * up[: len(block)], out=sums[1:])
        for length in lengths:
            count = max(0, min(BLOCK, len(block) - length + 1))
            yield length, begin, (sums[length : length + count] - sums[:count]) * down[:count]


def hash_heads(codes: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Hash the ``length`` (even) characters from each of some places on, in order, but for those too near the end.

    Other hashes than those of ``hash_runs``: for few places it is faster to look at each.
    """
    if len(codes) < length:
        return np.empty(0, np.uint64)
    runs = sliding_window_view(codes, length)
    runs = runs[places[: np.searchsorted(places, len(runs))]].view(np.uint64)  # two characters a number
    return runs @ _powers()[0][: length // 2]
