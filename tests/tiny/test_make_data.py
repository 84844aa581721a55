"""The pocket language: its grammar, its splits, its speech; make_base's tokenizer is in test_make_base.py."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
import wave
from collections import Counter
from pathlib import Path

import pytest

from tiny import grammar, make_data
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.records import read_jsonl, read_lines

ROOT = Path(__file__).parents[2]

SMALL = {"num_train": 28, "num_tuning": 7, "num_test": 7}


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


def spoken_rows(data: Path, split: str) -> list[dict]:
    """What the Kaldi files of a split say."""
    texts, audio = (
        dict(line.split(" ", 1) for line in read_lines(data / f"audio/{split}/{name}")) for name in ("text", "wav.scp")
    )
    assert list(texts) == list(audio)
    return [{"id": name, "audio": f"{split}/{audio[name]}", "text": text} for name, text in texts.items()]


def test_files(data):
    mono, parallel = read_jsonl(data / "mono.jsonl"), read_jsonl(data / "parallel.jsonl")
    assert len(mono) == len(parallel) == 2 * 28
    assert {(row["src_lang"], row["tgt_lang"]) for row in parallel} == {("en", "de"), ("de", "en")}
    assert len({row["id"] for row in mono + parallel}) == 4 * 28
    for split, size in (("train", 28), ("tuning", 7), ("test", 7)):
        rows = spoken_rows(data, split)
        assert len(rows) == size
        for row in rows:
            with wave.open(str(data / "audio" / row["audio"])) as file:
                assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
                assert 0.8 < file.getnframes() / 16000 < 6
    assert [r["text"] for r in spoken_rows(data, "test")] == read_lines(data / "flores/devtest/eng_Latn.devtest")


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
    while not list(tmp_path.rglob("[!.]*.wav")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("run_info.json")), "it was done before it was killed"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.wav")}
    assert before
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert wavs(tmp_path) == wavs(data)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())  # not done twice
    assert not list(tmp_path.rglob(".tmp-*"))
    for name in ("mono.jsonl", "parallel.jsonl", "audio/train/wav.scp", "audio/train/text"):
        assert hash_file(tmp_path / name) == hash_file(data / name)


def test_done_again(data, capsys):
    make_data.make_data(data, **SMALL, num_workers=1)
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"voices": 9}, {"num_train": 0}])
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


def test_more_training_text_leaves_tuning_and_test_as_they_are():
    sizes = {"tuning": 5, "test": 5, "train": 20}
    one = make_data.make_splits(["en", "de"], sizes, seed=0)
    more = make_data.make_splits(["en", "de"], {**sizes, "train": 60}, seed=0)
    assert {name: len(rows) for name, rows in more.items()} == {"tuning": 5, "test": 5, "train": 60}
    assert (one["tuning"], one["test"]) == (more["tuning"], more["test"]) and one["train"] == more["train"][:20]
    other = make_data.make_splits(["en", "de"], sizes, seed=1)
    assert not {row["en"] for row in other["test"]} & {row["en"] for row in one["test"]}
    said = [row["en"] for rows in more.values() for row in rows]
    assert len(set(said)) == len(said) == 70


def test_a_smaller_language_is_made_of_its_templates_and_first_concepts():
    drawn = list(itertools.islice(grammar.sentences(["en"], 0, ["buy", "compare"], 3), 40))
    larger = list(itertools.islice(grammar.sentences(["en"], 0, ["buy", "compare"]), 40))
    assert len({word for said in drawn for word in said["en"].split()}) < 40
    assert len({word for said in larger for word in said["en"].split()}) > 60
    for said in drawn[1::2]:
        assert " than " in said["en"]  # every second one compares
    for _ in range(200):
        concepts = grammar.draw("compare", random.Random(_), 2)
        assert concepts["animal"] != concepts["animal2"]


def test_who_speaks_depends_on_the_id_and_the_seed_alone(tmp_path):
    rows = [{"id": f"train-{i:06d}", "audio": f"train/{i}.wav", "text": f"text {i}"} for i in range(120)]
    chunks = make_data.speech_chunks(tmp_path, rows, 3, seed=0)
    assert [len(chunk) for chunk in chunks] == [50, 50, 20]
    spoken = [line for chunk in chunks for line in chunk]
    assert [(path, text) for path, text, *_ in spoken] == [(str(tmp_path / r["audio"]), r["text"]) for r in rows]
    assert {voice for _, _, voice, _, _ in spoken} == {"en-us", "en-us+f2", "en-gb-x-rp"}  # the first three
    assert {rate for *_, rate, _ in spoken} == {180, 200, 220} and {pitch for *_, pitch in spoken} == {35, 50, 65}
    assert len({tuple(sound) for _, _, *sound in spoken}) > 20  # of 27
    some = make_data.speech_chunks(tmp_path, rows[60:], 3, seed=0)
    assert [line for chunk in some for line in chunk] == spoken[60:]
    other = [line for chunk in make_data.speech_chunks(tmp_path, rows, 3, seed=1) for line in chunk]
    assert sum(a == b for a, b in zip(spoken, other, strict=True)) < 20  # of 120, by chance 1 in 27


def test_16_khz_is_resampled_and_not_just_named(data):
    """A sentence lasts as long at 16 kHz as in eSpeak's own 22,050 Hz."""
    (path, *sound), *_ = make_data.speech_chunks(data / "audio", spoken_rows(data, "train"), 3, 0)[0]
    with wave.open(path) as file:
        seconds = file.getnframes() / 16000
    rate = make_data.espeak()[1]
    assert rate == 22050
    assert seconds == pytest.approx(len(make_data.speak(*sound)) / 2 / rate, rel=0.05)


def test_tuning_and_test_are_drawn_first(data):
    """The first 14 sentences of the seed, whatever else is asked for."""
    drawn = list(itertools.islice(grammar.sentences(grammar.languages(), 0), 14))
    for name, said in (("dev", drawn[:7]), ("devtest", drawn[7:])):
        for code, file in (("en", "eng_Latn"), ("de", "deu_Latn")):
            assert read_lines(data / f"flores/{name}/{file}.{name}") == [sentence[code] for sentence in said]


def test_each_side_is_in_its_language(data):
    texts = {row["id"]: row["text"] for row in read_jsonl(data / "mono.jsonl")}
    for row in read_jsonl(data / "parallel.jsonl"):
        _, src, tgt, number = row["id"].split("-")
        assert (row["src_lang"], row["tgt_lang"]) == (src, tgt)
        assert (row["source"], row["target"]) == (texts[f"mono-{src}-{number}"], texts[f"mono-{tgt}-{number}"])
    english = {text for name, text in texts.items() if name.startswith("mono-en")}
    spoken = {row["text"] for row in spoken_rows(data, "train")}
    assert spoken == english


def test_a_text_that_two_sentences_share_in_one_language_alone_is_said_once(monkeypatch):
    whole = grammar.render

    def without_its_last_word(code: str, *sentence) -> str:
        text = whole(code, *sentence)
        return text if code == "en" else text.rpartition(" ")[0]

    monkeypatch.setattr(grammar, "render", without_its_last_word)
    said = list(itertools.islice(grammar.sentences(["en", "de"], 0, ["lie"], 4), 60))
    assert len({s["en"] for s in said}) == len({s["de"] for s in said}) == 60
