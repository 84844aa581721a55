"""Prompts against the original's own files, byte for byte; leaks, bad input, done-again."""

import json
import os
import re
from pathlib import Path

import pytest

from instructions import build_instructions as script
from instructions.build_instructions import build_instructions
from towerspeech import prompts, records, units
from towerspeech.languages import language
from towerspeech.stage import UserError, hash_path

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")
CODES = {"de": "deu_Latn", "en": "eng_Latn", "zh": "zho_Hans"}


def write_flores(root: Path, lines: int = 20, splits=("dev", "devtest"), codes=("de", "en", "zh")) -> Path:
    for split in splits:
        (root / split).mkdir(parents=True)
        for code in codes:
            text = "".join(f"{code} {split} sentence {i}\n" for i in range(1, lines + 1))
            (root / split / f"{CODES[code]}.{split}").write_text(text, encoding="utf-8")
    return root


def examples_of(instruction: str) -> list[str]:
    """The source sides that a 5-shot prompt shows, but its own."""
    return re.findall(r"^ ?German text: (.*)$", instruction, re.MULTILINE)[:-1]


# --- Against the original -------------------------------------------------------------------------
def sample(name: str) -> list[dict]:
    return json.loads((Path(DATA) / "original_instructions" / name).read_text(encoding="utf-8"))


@needs_data
@pytest.mark.parametrize("name", ["flores_de-en", "flores_en-zh", "wmt23_en-de"])
def test_0_shot_equals_the_original(tmp_path, name):
    folder, pair = name.split("_")
    test_set = {"flores": "flores200", "wmt23": "wmt23"}[folder]
    build_instructions(test_set, Path(DATA) / test_set, tmp_path, pairs=pair)
    rows = records.read_jsonl(tmp_path / "0_shot" / f"{name}.jsonl")
    original = sample(f"0_shot/{name}.json")
    assert len(original) == 5 and len(rows) == {"flores": 1012, "wmt23": 557}[folder]
    assert [{key: row[key] for key in ("instruction", "output")} for row in rows[:5]] == original


@needs_data
@pytest.mark.parametrize("name", ["flores_de-en", "flores_en-ko", "wmt23_en-de"])
def test_5_shot_template_over_the_originals_own_examples(name):
    """Its examples, taken out of its text and put through our template, give its text again."""
    folder, pair = name.split("_")
    test_set = {"flores": "flores200", "wmt23": "wmt23"}[folder]
    src, tgt = pair.split("-")
    for row in sample(f"5_shot/{name}.json"):
        names = f"{language(src).name} text: ", f"\n{language(tgt).name} text:"
        parts = re.split(rf"(?:^|\n ?){names[0]}", row["instruction"])[1:]
        turns = [part.split(names[1]) for part in parts]
        examples = [(source, target.removeprefix(" ")) for source, target in turns[:5]]
        assert len(turns) == 6 and turns[-1][1] == ""
        built = prompts.mt_few_shot(src, tgt, turns[-1][0], examples, script.SEPARATORS[test_set])
        assert built == row["instruction"]


@needs_data
def test_the_originals_fault_in_wmt23_x_en_is_not_rebuilt(tmp_path):
    build_instructions("wmt23", Path(DATA) / "wmt23", tmp_path, pairs="de-en")
    row = records.read_jsonl(tmp_path / "0_shot" / "wmt23_de-en.jsonl")[0]
    assert row["instruction"].startswith("Translate the following German source text to English:\nGerman: ")
    assert row["instruction"].endswith("\nEnglish:") and "Text::" not in row["instruction"]


@needs_data
def test_all_pairs_and_their_sizes(tmp_path, capsys):
    build_instructions("wmt23", Path(DATA) / "wmt23", tmp_path)
    build_instructions("flores200", Path(DATA) / "flores200", tmp_path, test_lines="1-10")
    infos = [json.loads(path.read_text()) for path in (tmp_path / "0_shot").glob("wmt23_*.run_info.json")]
    assert sorted(info["counts"]["prompts"] for info in infos) == [549, 557, 1723, 1976, 2074, 2074]
    assert len(list((tmp_path / "0_shot").glob("flores_*.jsonl"))) == 18


@needs_data
def test_5_shot_from_other_lines_of_the_test_files(tmp_path):
    """The run on real data that the README shows: test on lines 1-100, examples from 101-300."""
    lines = {"test_lines": "1-100", "example_lines": "101-300"}
    build_instructions(
        "flores200", Path(DATA) / "flores200", tmp_path, "de-en,en-fr", 5, example_split="devtest", **lines
    )
    build_instructions("wmt23", Path(DATA) / "wmt23", tmp_path, "en-de", 5, **lines)
    tested = set(records.read_lines(Path(DATA) / "flores200/devtest/deu_Latn.devtest")[:100])
    rows = records.read_jsonl(tmp_path / "5_shot" / "flores_de-en.jsonl")
    assert len(rows) == 100
    assert all(len(set(examples_of(row["instruction"])) - tested) == 5 for row in rows)


# --- What is drawn --------------------------------------------------------------------------------
def shown_lines(path: Path) -> list[list[int]]:
    return [
        [int(n) for n in re.findall(r"dev sentence (\d+)$", row["instruction"], re.MULTILINE)][::2]
        for row in records.read_jsonl(path)
    ]


def test_examples_are_the_same_lines_for_all_pairs_and_line_ranges(tmp_path):
    root = write_flores(tmp_path / "data", 30)
    build_instructions("flores200", root, tmp_path / "a", shots=5)
    build_instructions("flores200", root, tmp_path / "b", pairs="de-en", shots=5, test_lines="11-20")
    build_instructions("flores200", root, tmp_path / "c", pairs="de-en", shots=5, seed=1)
    drawn = shown_lines(tmp_path / "a/5_shot/flores_de-en.jsonl")
    assert all(len(set(lines)) == 5 for lines in drawn) and len({tuple(lines) for lines in drawn}) == 30
    for pair in ("en-de", "en-zh", "zh-en"):
        assert shown_lines(tmp_path / f"a/5_shot/flores_{pair}.jsonl") == drawn
    assert shown_lines(tmp_path / "b/5_shot/flores_de-en.jsonl") == drawn[10:20]
    assert shown_lines(tmp_path / "c/5_shot/flores_de-en.jsonl") != drawn


def test_rows_and_chat_style(tmp_path):
    root = write_flores(tmp_path / "data", 2)
    build_instructions("flores200", root, tmp_path / "o", pairs="de-en", dataset="tiny")
    build_instructions("flores200", root, tmp_path / "c", pairs="de-en", dataset="tiny", style="chat")
    row = records.read_jsonl(tmp_path / "o/0_shot/tiny_de-en.jsonl")[1]
    instruction = "Translate the following German source text to English:\nGerman: de devtest sentence 2\nEnglish:"
    facts = dict(task="mt", dataset="tiny", shots=0, src_lang="de", tgt_lang="en", source="de devtest sentence 2")
    shared = {"id": "tiny_de-en:2", "output": "en devtest sentence 2", **facts}
    assert row == {"instruction": instruction, **shared}
    chat = records.read_jsonl(tmp_path / "c/0_shot/tiny_de-en.jsonl")[1]
    assert chat == {"messages": [{"role": "user", "content": instruction}], **shared}


def test_a_second_call_is_a_no_op_and_another_one_is_refused(tmp_path, capsys):
    root, out = write_flores(tmp_path / "data"), tmp_path / "out"
    build_instructions("flores200", root, out, pairs="de-en", shots=5)
    before = hash_path(out / "5_shot"), (out / "5_shot/flores_de-en.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    build_instructions("flores200", root, out, pairs="de-en", shots=5)
    assert capsys.readouterr().out == f"already done: {out}/5_shot (flores_de-en)\n"
    assert before == (hash_path(out / "5_shot"), (out / "5_shot/flores_de-en.jsonl").stat().st_mtime_ns)
    build_instructions("flores200", root, out)  # more pairs and other shots share the folder
    build_instructions("flores200", root, out, shots=5)
    assert hash_path(out / "5_shot") != before[0]
    with pytest.raises(UserError, match="seed was 0, now 1"):
        build_instructions("flores200", root, out, pairs="de-en", shots=5, seed=1)
    build_instructions("flores200", root, out, pairs="de-en", shots=5, seed=1, overwrite=True)
    assert json.loads((out / "5_shot/flores_de-en.run_info.json").read_text())["arguments"]["seed"] == 1
    (root / "devtest" / "zho_Hans.devtest").write_text("x\n" * 20)
    with pytest.raises(UserError, match="the content of data differs"):
        build_instructions("flores200", root, out, pairs="zh-en")


# --- Leaks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", ["de", "en"])
def test_a_pool_that_holds_a_test_sentence_is_refused(tmp_path, code):
    root = write_flores(tmp_path / "data")
    path = root / "dev" / f"{CODES[code]}.dev"
    lines = path.read_text().splitlines()
    lines[6] = f"{code} devtest sentence 13"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"{CODES[code]}\.dev:7 is a test sentence \(.*devtest:13\)"):
        build_instructions("flores200", root, tmp_path / "out", pairs="de-en", shots=5)
    assert not (tmp_path / "out").exists()
    build_instructions("flores200", root, tmp_path / "out", pairs="de-en", shots=5, test_lines="1-12")


def test_examples_from_the_tested_lines_are_refused(tmp_path):
    root = write_flores(tmp_path / "data", splits=["devtest"])
    args = ("flores200", root, tmp_path / "out", "de-en", 5)
    with pytest.raises(UserError, match="is a test sentence"):
        build_instructions(*args, example_split="devtest")
    with pytest.raises(UserError, match="is a test sentence"):
        build_instructions(*args, example_split="devtest", test_lines="1-10", example_lines="10-20")
    build_instructions(*args, example_split="devtest", test_lines="1-10", example_lines="11-20")


def test_a_missing_pool_names_the_option(tmp_path):
    root = write_flores(tmp_path / "data", splits=["devtest"])
    with pytest.raises(UserError, match="--example_lines FIRST-LAST"):
        build_instructions("flores200", root, tmp_path / "out", pairs="de-en", shots=5)
    wmt = tmp_path / "wmt"
    wmt.mkdir()
    for name in ("src.de", "ref.refA.en"):
        (wmt / f"generaltest2023.de-en.{name}").write_text("".join(f"{name} {i}\n" for i in range(20)))
    with pytest.raises(UserError, match="no dev split\n.*--example_lines"):
        build_instructions("wmt23", wmt, tmp_path / "out", shots=5)
    build_instructions("wmt23", wmt, tmp_path / "out", shots=5, test_lines="1-10", example_lines="11-20")
    row = records.read_jsonl(tmp_path / "out/5_shot/wmt23_de-en.jsonl")[0]
    assert row["instruction"].count("\n German text: ") == 5


# --- Bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": "de-xx"}, "unknown language 'xx'"),
        ({"pairs": "deen"}, "'deen' is not a language pair"),
        ({"pairs": "de-en,de-en"}, "names a pair twice"),
        ({"pairs": "fr-en"}, r"fra_Latn\.devtest does not exist"),
        ({"split": "test"}, "no flores200 files under"),
        ({"test_lines": "5"}, "is no range of lines"),
        ({"test_lines": "9-5"}, "is no range of lines"),
        ({"test_lines": "0-5"}, "is no range of lines"),
        ({"test_lines": "15-21", "pairs": "de-en"}, "ends at line 21, but .* has 20"),
        ({"shots": 5, "example_lines": "1-4"}, "4 lines to draw 5 examples from"),
        ({"dataset": "../x"}, "cannot name a file"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    root = write_flores(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        build_instructions("flores200", root, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named(tmp_path):
    root, out = write_flores(tmp_path / "data"), tmp_path / "out"
    german = root / "devtest/deu_Latn.devtest"
    whole = german.read_text()
    german.write_text("one\n")
    with pytest.raises(UserError, match=r"deu_Latn\.devtest has 1 lines, .*eng_Latn\.devtest 20"):
        build_instructions("flores200", root, out)
    german.write_text(whole.replace("de devtest sentence 4\n", " \n"))
    with pytest.raises(UserError, match=r"deu_Latn\.devtest:4: the line is empty"):
        build_instructions("flores200", root, out)
    german.write_text("")
    with pytest.raises(UserError, match=r"deu_Latn\.devtest is empty"):
        build_instructions("flores200", root, out)
    with pytest.raises(UserError, match="missing does not exist"):
        build_instructions("flores200", tmp_path / "missing", out)
    assert not out.exists()


# --- Speech ---------------------------------------------------------------------------------------
def write_speech(folder: Path, **changes) -> Path:
    folder.mkdir()
    for shard in range(2):
        rows = [
            {
                "id": f"u{shard}{i}",
                "audio": f"{shard}/{i}.wav",
                "language": "en",
                "duration_s": 1.0,
                "units": [i, 7, 99],
                "text": f"Text {shard} {i}.",
            }
            for i in range(3)
        ]
        rows[1].update(changes)
        records.write_units(folder / f"{records.shard_name(shard, 2)}.parquet", rows)
    return folder


def test_speech(tmp_path):
    folder = write_speech(tmp_path / "clean")
    build_instructions("units", folder, tmp_path / "out")
    rows = records.read_jsonl(tmp_path / "out/asr/clean.jsonl")
    assert [row["id"] for row in rows] == ["u00", "u01", "u02", "u10", "u11", "u12"]
    assert rows[4]["instruction"] == f"Speech: {units.to_text([1, 7, 99])}\nEnglish:"
    assert rows[4]["output"] == "Text 1 1." and rows[4]["source"] == "1/1.wav"
    assert {name: rows[4][name] for name in ("task", "dataset", "shots", "src_lang", "tgt_lang")} == {
        "task": "asr",
        "dataset": "clean",
        "shots": 0,
        "src_lang": "en",
        "tgt_lang": "en",
    }
    build_instructions("units", folder, tmp_path / "out", dataset="few", test_lines="2-4", style="chat")
    few = records.read_jsonl(tmp_path / "out/asr/few.jsonl")
    assert [row["messages"][0]["content"] for row in few] == [row["instruction"] for row in rows[1:4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, r"row 2 \(id u01\): no text"),
        ({"units": []}, r"row 2 \(id u01\): no units"),
        ({"language": "de"}, "speech must be English"),
        ({"id": "u00"}, "the id is there twice"),
    ],
)
def test_bad_speech(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_instructions("units", write_speech(tmp_path / "clean", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_speech_takes_no_shots_and_wants_all_shards(tmp_path):
    folder = write_speech(tmp_path / "clean")
    with pytest.raises(UserError, match="are for translation"):
        build_instructions("units", folder, tmp_path / "out", shots=5)
    with pytest.raises(UserError, match="ends at 7, but .* has 6 rows"):
        build_instructions("units", folder, tmp_path / "out", test_lines="1-7")
    (folder / "units-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 shards"):
        build_instructions("units", folder, tmp_path / "out")
