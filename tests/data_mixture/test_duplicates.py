"""duplicates.py against plain loops: a set of normalised texts, and Jaccard's share of every pair of 5-grams."""

import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixture import duplicates
from data_mixture.duplicates import BANDS, NearSeen, Seen, exact_key, near_keys, normalise
from towerspeech.errors import UserError

ROOT = Path(__file__).parents[2]
ONE_TEXT = [
    ("Straße", "STRASSE"),
    ("ﬁn de siècle", "fin de sie\u0300cle"),
    (" a\u00a0b\r\n\n", "a b"),
    ("ＡＢＣ　１２", "abc 12"),
    ("ΣΑΣ", "σας"),
    ("ﾄｳｷｮｳ", "トウキョウ"),
    ("", " \n\u3000"),
]
TWO_TEXTS = [("a b", "ab"), ("3.5", "35"), ("Nein!", "Nein?"), ("pêche", "péché"), ("1", "2"), ("", "a")]


def as_read(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def in_batches(seen: Seen | NearSeen, keys: np.ndarray, sizes: list[int]) -> list[bool]:
    """Add keys batch by batch, of these sizes, and of the last size to the end."""
    found, at = [], 0
    while at < len(keys):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        found += seen.add(keys[at : at + size]).tolist()
        at += size
    return found


def by_a_set(items: list) -> list[bool]:
    held, found = set(), []
    for item in items:
        found.append(item in held)
        held.add(item)
    return found


# --- Exact duplicates -----------------------------------------------------------------------------
def test_what_is_one_text_and_what_is_not():
    for one, other in ONE_TEXT:
        assert exact_key(one) == exact_key(other), (one, other)
    for one, other in TWO_TEXTS:
        assert exact_key(one) != exact_key(other), (one, other)


def test_every_character_is_normalised_as_read():
    """Before and after a letter, one after another, and twice."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1 << 16):
        text = "".join(f"{character}x{character}{character}" for character in characters[start : start + (1 << 16)])
        assert normalise(text).decode() == as_read(text)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(st.sampled_from("aAäÄßsS \n\u00a0ﬁi.１1"), max_size=4), max_size=60), st.integers(1, 9))
def test_exact_duplicates_are_those_of_a_set_of_texts(texts, size):
    keys = np.array([exact_key(text) for text in texts], np.uint64)
    assert in_batches(Seen(), keys, [size]) == by_a_set([as_read(text) for text in texts])


@pytest.fixture
def small_arrays(monkeypatch):
    """Arrays and blocks so small that a few keys go through all of them."""
    monkeypatch.setattr(duplicates, "LEVELS", (4, 16))
    monkeypatch.setattr(duplicates, "BLOCK", 8)


def test_seen_is_a_set_whatever_the_batches(small_arrays):
    chosen = random.Random(0)
    for _ in range(200):
        most = chosen.choice([10, 300, 2**64 - 1])
        keys = [chosen.choice([0, 2**64 - 1, chosen.randint(0, most)]) for _ in range(chosen.randint(0, 400))]
        keys += chosen.choices(keys, k=len(keys) // 2)
        chosen.shuffle(keys)
        seen = Seen()
        found = in_batches(seen, np.array(keys, np.uint64), [chosen.randint(0, 50) for _ in range(20)] + [7])
        assert found == by_a_set(keys)
        assert len(seen) == len({*keys})


def test_keys_go_through_all_arrays(small_arrays):
    seen = Seen()
    keys = np.random.default_rng(0).permutation(1000).astype(np.uint64)
    assert not any(in_batches(seen, keys, [3]))
    assert sum(map(len, seen.arrays)) == 1000 and len(seen.arrays[0]) <= 4 and len(seen.arrays[1]) <= 16
    assert all((array[1:] > array[:-1]).all() for array in seen.arrays)
    assert seen.add(keys).all() and not seen.add(keys + np.uint64(1000)).any()


def test_keys_come_back_from_a_file(tmp_path):
    keys = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
    path = tmp_path / "keys"
    path.write_bytes(keys.tobytes() + b"cut")
    seen = Seen()
    seen.load(path, 150_000)
    assert len(seen) == 150_000
    assert seen.add(keys).tolist() == [True] * 150_000 + [False] * 50_000
    with pytest.raises(UserError, match="keys holds fewer than 200,001 keys"):
        Seen().load(path, 200_001)
    near = NearSeen()
    near.load(path, 10_000 * BANDS)
    assert near.add(keys[: 12_000 * BANDS].reshape(12_000, BANDS)).tolist() == [True] * 10_000 + [False] * 2_000


# Adds keys in batches, of which a quarter came before, and tells the bytes a key at the peak and the keys a second.
MEASURED = """
import json
import sys
import time

import numpy as np

from data_mixture.duplicates import Seen

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

number, size = map(int, sys.argv[1:])
keys = np.random.default_rng(0).integers(0, 2**64, number // 3 * 4, np.uint64)
half, quarter = len(keys) // 2, len(keys) // 4
keys[half::2] = keys[:quarter]
Seen().add(keys[:100])  # what numpy loads when it is first called
before, began, seen, repeated = memory("VmRSS"), time.perf_counter(), Seen(), 0
for start in range(0, len(keys), size):
    repeated += int(seen.add(keys[start : start + size]).sum())
seconds = time.perf_counter() - began
used = memory("VmHWM") - before
print(json.dumps({"bytes": used / len(seen), "keys_s": len(keys) / seconds, "repeated": repeated - quarter}))
"""


def measured(number: int, size: int) -> dict:
    command = [sys.executable, "-c", MEASURED, str(number), str(size)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("size", [20_000, 4_000_000])
def test_a_key_takes_16_bytes_at_most(size):
    facts = measured(4_000_000, size)
    assert 8 <= facts["bytes"] <= 16
    assert facts["repeated"] == 0  # by chance


# --- Near duplicates ------------------------------------------------------------------------------
def grams_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def edited_texts(seed: int, number: int = 30) -> list[str]:
    """Texts, each followed by copies in which more and more of its words are others."""
    chosen = random.Random(seed)
    texts = []
    for _ in range(number):
        words = [f"w{chosen.randint(0, 3000)}" for _ in range(chosen.randint(150, 300))]
        texts.append(" ".join(words))
        for changes in (1, 2, 4, 6, 8, 12, 20, 60):
            copy = list(words)
            for place in chosen.sample(range(len(words)), changes):
                copy[place] = f"x{chosen.randint(0, 3000)}"
            texts.append(" ".join(copy))
    return texts


def test_near_duplicates_are_found_as_their_jaccard_says():
    """Of all pairs: nearly all that share 0.9, nearly none that share 0.3, and between them as the formula says."""
    texts = edited_texts(0)
    keys, grams = [near_keys(text) for text in texts], [grams_of(text) for text in texts]
    found, chance = {"high": [], "low": [], "between": []}, []
    for one in range(len(texts)):
        for other in range(one):
            share = len(grams[one] & grams[other]) / len(grams[one] | grams[other])
            band = "high" if share >= 0.9 else "low" if share <= 0.3 else "between"
            found[band].append(bool((keys[one] == keys[other]).any()))
            if band == "between":
                chance.append(1 - (1 - share**8) ** 14)
    assert len(found["high"]) > 50 and len(found["between"]) > 500 and len(found["low"]) > 10_000
    assert np.mean(found["high"]) >= 0.98
    assert np.mean(found["low"]) <= 0.001
    assert abs(np.mean(found["between"]) - np.mean(chance)) < 0.05


def test_near_seen_keeps_the_first_whatever_the_batches():
    texts = edited_texts(1)
    random.Random(1).shuffle(texts)
    keys = np.stack([near_keys(text) for text in texts])
    expected = [bool((keys[:at] == keys[at]).any()) for at in range(len(keys))]
    assert 50 < sum(expected) < len(texts) - 30
    for sizes in ([1], [7], [50, 1, 3], [len(texts)]):
        assert in_batches(NearSeen(), keys, [*sizes]) == expected


def near(one: str, other: str) -> bool:
    return bool((near_keys(one) == near_keys(other)).any())


def test_near_duplicates_in_each_script():
    def chars(first: int, seed: int, number: int = 400) -> str:
        return "".join(chr(first + random.Random(seed * 1000 + at).randint(0, 80)) for at in range(number))

    for first in (0x4E00, 0x3041, 0x20000):
        text = chars(first, 0)
        assert near(text, text[:200] + text[201:]) and not near(text, chars(first, 1))
    words = [chars(0xAC00, seed, 3) for seed in range(200)]  # Korean has spaces
    assert near(" ".join(words), " ".join(words[:-2])) and not near(" ".join(words), " ".join(words[::-1]))
    assert near("Der Hund, der Kater und ich!", "der HUND der Kater – und ich")


def test_short_texts_are_near_duplicates_of_themselves_alone():
    texts = ["", "a", "b", "a b", "a b c d", "a b c d e", "!", "?", "犬", "犬猫", "e d c b a"]
    for one in texts:
        assert [other for other in texts if near(one, other)] == [one]


def test_a_book_is_hashed_in_parts(monkeypatch):
    text = edited_texts(2, 1)[0]
    whole = near_keys(text)
    monkeypatch.setattr(duplicates, "GRAMS_AT_ONCE", 7)
    assert near_keys(text).tolist() == whole.tolist()


# --- The same everywhere --------------------------------------------------------------------------
def test_keys_are_the_same_in_every_process():
    """Also in years to come: a killed run goes on with the keys that it wrote."""
    text = "Der Hund, der Kater und ich gehen heute Abend ans Meer."
    code = "import sys; from data_mixture.duplicates import *; text = sys.argv[1]; "
    code += "print(exact_key(text), near_keys(text).tolist())"
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, text]
        told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert told.strip() == f"{exact_key(text)} {near_keys(text).tolist()}"
    assert exact_key(text) == 5762618649278965855
    assert near_keys(text)[[0, 13]].tolist() == [4903324162170700465, 7006689861954320743]
