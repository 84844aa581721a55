"""Tells which documents of a stream came before: exact duplicates, and on request near duplicates.

Processes compute the keys of documents; one process asks, in the order of the documents, whether they were seen. So
the first of several stays, whatever the number of processes and the sizes of the batches.

Near duplicates are found by MinHash with the settings of FineWeb (arXiv 2406.17557) and datatrove: 5-grams of words,
14 bands of 8 hashes. Two documents share the key of a band with the probability s^8, where s is the share of 5-grams
that they have in common (Jaccard's), and that of one band at least with 1 - (1 - s^8)^14:

    s             0.3    0.6   0.75    0.9
    probability  0.001   0.21   0.77  0.9996

A shared key is enough, as in datatrove: the texts are not compared. What was itself a near duplicate counts as seen,
so a chain of small changes stays one document.
"""

import re
import unicodedata
from functools import cache
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from towerspeech.errors import UserError

BANDS, ROWS, WORDS = 14, 8, 5  # each band has so many rows, hashes; WORDS make an n-gram
HAN_KANA = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{HAN_KANA}]+|\w")  # where no spaces part words, a character is one
SPACES = bytes.maketrans(b"\t\n\v\f\r\x1c\x1d\x1e\x1f", b" " * 9)  # white space of ASCII
WIDE_SPACES = [space.encode() for space in "\x85\u1680\u2028\u2029"]  # the others, of which NFKC makes no space
GRAMS_AT_ONCE = 512  # their hashes fit a processor's cache; a book's would take 450 bytes a word
LEVELS = (1 << 15, 1 << 19)  # keys that wait before they go on into the next, larger array
BLOCK = 1 << 16  # keys that are looked up, moved or read at once


# --- Keys of documents ----------------------------------------------------------------------------
def normalise(text: str) -> bytes:
    """Take out differences of encoding, case and white space alone: 3.5 is another text than 35, péché than pêche.

    That is ``" ".join(text.split())`` of a text of one case, which would take twice as long.
    """
    data = unicodedata.normalize("NFKC", text).casefold().encode().translate(SPACES)
    for wide in WIDE_SPACES:
        data = data.replace(wide, b" ")
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return data.strip(b" ")


def _hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def exact_key(text: str) -> int:
    """A text's 64 bits, the same in every process. That any two of 100 million collide has a probability of 0.03%."""
    return _hash64(normalise(text))


def _gram_hashes(words: list[str]) -> list[int]:
    """32 bits of each n-gram. To hash each word once, and sum, takes less than half of the time of hashing n-grams.

    The sum is multilinear hashing (Lemire and Kaser, arXiv 1202.4961), of which the upper bits are the good ones.
    """
    hashes = np.array([crc32(word.encode()) for word in words], np.uint64)
    grams = sliding_window_view(hashes, min(WORDS, len(words)))
    factors = np.array([_hash64(bytes([place])) for place in range(grams.shape[1])], np.uint64)
    return ((grams * factors).sum(axis=1) >> np.uint64(32)).tolist()


@cache
def _empty_minhash():
    from datasketch import MinHash

    return MinHash(num_perm=BANDS * ROWS, seed=1, scheme="affine32", hashfunc=int)


def near_keys(text: str) -> np.ndarray:
    """The keys of a text's bands, (BANDS,) uint64, each of the band's number and hashes.

    Punctuation does not count. A text of fewer than five words is one n-gram; one without words is its own word.
    """
    text = normalise(text).decode()
    grams, minhash = _gram_hashes(WORD.findall(text) or [text]), _empty_minhash().copy()
    for start in range(0, len(grams), GRAMS_AT_ONCE):
        minhash.update_batch(grams[start : start + GRAMS_AT_ONCE])
    bands = minhash.hashvalues.astype("<u4").reshape(BANDS, ROWS)
    return np.array([_hash64(bytes([band]) + rows.tobytes()) for band, rows in enumerate(bands)], np.uint64)


# --- Keys that were seen --------------------------------------------------------------------------
def _holds(array: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which keys a sorted array holds, (n,) bool."""
    if not len(array):
        return np.zeros(len(keys), bool)
    return array[np.searchsorted(array[:-1], keys)] == keys


def _merge(array: np.ndarray, keys: np.ndarray) -> None:
    """Merge sorted new keys into a sorted array in its place, since a second array would double the memory.

    It goes from the end, block by block: what is written over was moved already.
    """
    size, end = len(array), len(keys)
    array.resize(size + end, refcheck=False)
    for start in reversed(range(0, max(size, 1), BLOCK)):
        stop = min(start + BLOCK, size)
        begin = np.searchsorted(keys[:end], array[start]) if start else 0
        both = np.concatenate([array[start:stop], keys[begin:end]])
        both.sort(kind="stable")  # which merges sorted runs
        array[start + begin : stop + end] = both
        end = begin


class Seen:
    """A set of 64-bit keys that takes 8 bytes a key and some 10 MB, also while it grows.

    Three sorted arrays: new keys go into a small one, which goes into a larger one when it is full, and so on.
    """

    def __init__(self):
        self.arrays = [np.empty(0, np.uint64) for _ in range(len(LEVELS) + 1)]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add keys, (n,) uint64. Tell which were there before, also earlier among these, (n,) bool."""
        blocks = [self._add(keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
        return np.concatenate([np.empty(0, bool), *blocks])

    def _add(self, keys: np.ndarray) -> np.ndarray:
        distinct, first = np.unique(keys, return_index=True)
        new = ~np.any([_holds(array, distinct) for array in self.arrays], axis=0)
        seen = np.ones(len(keys), bool)
        seen[first[new]] = False
        _merge(self.arrays[0], distinct[new])
        for level, most in enumerate(LEVELS):
            if len(self.arrays[level]) > most:
                _merge(self.arrays[level + 1], self.arrays[level])
                self.arrays[level] = np.empty(0, np.uint64)
        return seen

    def load(self, path: Path, count: int) -> None:
        """Add the first keys of a file that a killed run left; UserError if it holds fewer, while more do no harm."""
        if path.stat().st_size < count * 8:
            raise UserError(f"{path} holds fewer than {count:,} keys", "remove its folder and run this again")
        for start in range(0, count, BLOCK):
            self._add(np.fromfile(path, np.uint64, min(BLOCK, count - start), offset=start * 8))


class NearSeen(Seen):
    """As ``Seen``, of documents with BANDS keys each, so 112 bytes a document; ``load`` and ``len`` count keys."""

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add documents' keys, (n, BANDS). Tell which share one with an earlier document, (n,) bool."""
        return super().add(keys.ravel()).reshape(-1, BANDS).any(axis=1)
