"""The pocket language: its grammar, its splits, its speech; make_base's tokenizer is in test_make_base.py."""

import itertools
import os
import signal
import subprocess
import sys
import time
import wave
from collections import Counter
from pathlib import Path

import pytest

from towerspeech.records import read_jsonl, read_lines
from towerspeech.stage import UserError, hash_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tiny"))  # as for `python tiny/make_data.py`

import grammar  # noqa: E402
import make_data  # noqa: E402

SMALL = {"num_train": 28, "num_tuning": 7, "num_test": 7, "num_text": 10}


# --- Grammar --------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", grammar.languages())
def test_every_language_has_every_template_and_concept(code):
    column, english = grammar.load(code), grammar.load("en")
    assert column["templates"].keys() == grammar.TEMPLATES.keys()
    assert {name: table.keys() for name, table in column["words"].items()} == {
        name: table.keys() for name, table in english["words"].items()
    }


@pytest.mark.parametrize("code", grammar.languages())
@pytest.mark.parametrize("template", grammar.TEMPLATES)
def test_every_word_renders_in_every_template(code, template):
    """Each pair of slots takes all its concepts, so that every agreement (two words at most) is looked up."""
    slots = grammar.TEMPLATES[template]
    first = {slot: grammar.choices(kind)[0] for slot, kind in slots.items()}
    for a, b in itertools.combinations(slots, 2):
        for x, y in itertools.product(grammar.choices(slots[a]), grammar.choices(slots[b])):
            text = grammar.render(code, template, first | {a: x, b: y})
            assert text == text.lower() and "{" not in text and "  " not in text and text.replace(" ", "").isalpha()
            assert 4 <= len(text.split()) <= 13


@pytest.mark.parametrize(
    ("template", "concepts", "english", "german"),
    [
        (
            "buy",
            {"det": "my", "person": "sister", "verb": "pick_up", "odet": "a", "adjective": "old", "thing": "umbrella"},
            "my sister picks up an old umbrella",
            "meine schwester holt einen alten regenschirm ab",
        ),
        (
            "give",
            {"day": "monday", "det": "the", "person": "boy", "giving": "give", "det2": "your", "person2": "neighbor",
             "odet": "a", "thing": "clock"},
            "on monday the boy gives your neighbor a clock",
            "am montag gibt der junge deinem nachbarn eine uhr",
        ),
        (
            "modal",
            {"det": "our", "person": "girl", "modal": "want", "verb": "throw_away", "odet": "my", "thing": "book",
             "day": "tomorrow"},
            "our girl wants to throw away my book tomorrow",
            "unser mädchen will morgen mein buch wegwerfen",
        ),
        (
            "because",
            {"det": "the", "person": "girl", "feeling": "sad", "verb": "lose", "odet": "the", "thing": "ball"},
            "the girl is sad because she lost the ball",
            "das mädchen ist traurig weil es den ball verloren hat",
        ),
        (
            "need",
            {"pronoun": "she", "having": "need", "no": "no", "adjective": "new", "thing": "car"},
            "she does not need a new car",
            "sie braucht kein neues auto",
        ),
        (
            "lie",
            {"odet": "our", "thing": "cup", "preposition": "before", "odet2": "the", "adjective": "big",
             "thing2": "lamp"},
            "our cup is in front of the big lamp",
            "unsere tasse ist vor der großen lampe",
        ),
        (
            "travel",
            {"day": "today", "pronoun": "they", "travel": "go", "the": "the", "vehicle": "ferry", "city": "geneva"},
            "today they go to geneva by ferry",
            "heute fahren sie mit der fähre nach genf",
        ),
    ],
)  # fmt: skip
def test_case_gender_and_word_order(template, concepts, english, german):
    assert grammar.render("en", template, concepts) == english
    assert grammar.render("de", template, concepts) == german


def test_sentences_are_distinct_and_templates_balanced():
    said = list(itertools.islice(grammar.sentences(["en", "de"], seed=0), 3400))
    for code in ("en", "de"):
        assert len({s[code] for s in said}) == 3400
    first_words = Counter(s["en"].split()[0] for s in said)
    assert first_words["there"] == pytest.approx(3400 / len(grammar.TEMPLATES), abs=1)
    assert len({word for s in said for word in s["en"].split()}) > 250


def test_the_grammar_ends_instead_of_stalling(monkeypatch):
    monkeypatch.setattr(grammar, "TEMPLATES", {"weather": grammar.TEMPLATES["weather"]})
    with pytest.raises(UserError, match="5,000 sentences are asked for, the grammar gives 2,304"):
        make_data.make_splits(["en", "de"], {"train": 5000}, seed=0)


# --- Data -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data.make_data(folder, **SMALL, num_workers=1)
    return folder


def test_files(data):
    mono, parallel = read_jsonl(data / "mono.jsonl"), read_jsonl(data / "parallel.jsonl")
    assert len(mono) == len(parallel) == 2 * 38
    assert {(row["src_lang"], row["tgt_lang"]) for row in parallel} == {("en", "de"), ("de", "en")}
    assert len({row["id"] for row in mono + parallel}) == 4 * 38
    for split, size in (("train", 28), ("tuning", 7), ("test", 7)):
        rows = read_jsonl(data / "audio" / f"{split}.jsonl")
        assert len(rows) == size
        for row in rows:
            with wave.open(str(data / "audio" / row["audio"])) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
                assert 0.8 < file.getnframes() / 16000 < 6
    assert [r["text"] for r in read_jsonl(data / "audio/test.jsonl")] == read_lines(
        data / "flores/devtest/eng_Latn.devtest"
    )


def test_splits_are_disjoint_in_both_languages(data):
    trained = {row["text"] for row in read_jsonl(data / "mono.jsonl")}
    trained |= {row[side] for row in read_jsonl(data / "parallel.jsonl") for side in ("source", "target")}
    held_out = [
        line
        for name in ("dev", "devtest")
        for code in ("eng_Latn", "deu_Latn")
        for line in read_lines(data / f"flores/{name}/{code}.{name}")
    ]
    assert len(held_out) == len(set(held_out)) == 28
    assert not trained & set(held_out)


def wavs(folder: Path) -> dict:
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*.wav"))}


def test_same_bytes_with_more_workers_and_after_sigkill(data, tmp_path):
    command = [sys.executable, ROOT / "tiny/make_data.py", "--output_dir", tmp_path, "--num_workers", "2"]
    command += [str(part) for name, value in SMALL.items() for part in (f"--{name}", value)]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.wav")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("train*.wav")}
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert wavs(tmp_path) == wavs(data)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())  # not done twice
    assert not list(tmp_path.rglob(".tmp-*"))
    for name in ("mono.jsonl", "parallel.jsonl", "audio/train.jsonl"):
        assert hash_file(tmp_path / name) == hash_file(data / name)


def test_done_again(data, capsys):
    make_data.make_data(data, **SMALL, num_workers=1)
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"voices": 9}, {"num_train": 0}, {"num_text": -1}])
def test_bad_arguments(wrong, tmp_path):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        make_data.make_data(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_missing_espeak(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    make_data.espeak.cache_clear()
    try:
        with pytest.raises(UserError, match="pip install -r tiny/requirements.txt"):
            make_data.make_data(tmp_path, **SMALL, num_workers=1)
    finally:
        make_data.espeak.cache_clear()
    assert not (tmp_path / "mono.jsonl").exists()
