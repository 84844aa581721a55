"""Prompts against the original's own files, byte for byte; leaks, bad input, done-again."""

import json
import os
import re
from pathlib import Path

import pytest

from instructions import build_instructions as script
from towerspeech import prompts, records, units
from towerspeech.errors import UserError
from towerspeech.languages import language
from towerspeech.stage import hash_path
from towerspeech.units_parquet import shard_name, write_units

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")
CODES = {"de": "deu_Latn", "en": "eng_Latn", "zh": "zho_Hans"}


def build_instructions(*flags, **named_flags) -> None:
    script.build_instructions(script.Request(*flags, **named_flags))


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
    rows = json.loads((Path(DATA) / "original_instructions" / name).read_text(encoding="utf-8"))
    assert len(rows) == 5  # no test loops over nothing
    return rows


@needs_data
@pytest.mark.parametrize("name", ["flores_de-en", "flores_en-zh", "wmt23_en-de"])
def test_0_shot_equals_the_original(tmp_path, name):
    folder, pair = name.split("_")
    test_set = {"flores": "flores200", "wmt23": "wmt23"}[folder]
    build_instructions(tmp_path, test_set, Path(DATA) / test_set, pairs=pair)
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
    build_instructions(tmp_path, "wmt23", Path(DATA) / "wmt23", pairs="de-en")
    row = records.read_jsonl(tmp_path / "0_shot" / "wmt23_de-en.jsonl")[0]
    assert row["instruction"].startswith("Translate the following German source text to English:\nGerman: ")
    assert row["instruction"].endswith("\nEnglish:") and "Text::" not in row["instruction"]


@needs_data
def test_all_pairs_and_their_sizes(tmp_path, capsys):
    """In one go, from a folder that holds flores200/ and wmt23/; without a pool no 5-shot prompts."""
    build_instructions(tmp_path, data_root=Path(DATA), all=True)
    infos = {path.name: json.loads(path.read_text()) for path in (tmp_path / "0_shot").glob("*.run_info.json")}
    sizes = {name.split(".")[0]: info["counts"]["prompts"] for name, info in infos.items()}
    others = ("es", "fr", "it", "pt", "ru", "zh", "de", "nl", "ko")
    flores = {f"flores_{pair}": 1012 for code in others for pair in (f"{code}-en", f"en-{code}")}
    wmt23 = {"de-en": 549, "en-de": 557, "en-ru": 2074, "en-zh": 2074, "ru-en": 1723, "zh-en": 1976}
    assert sizes == {**flores, **{f"wmt23_{pair}": size for pair, size in wmt23.items()}}
    shown = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[-10:]]
    assert ["flores", "mt", "0", "18", "18,216"] in shown and ["wmt23", "mt", "0", "6", "8,953"] in shown
    assert any(
        line[0] == "flores200" and line[2] == "5" and "dev/spa_Latn.dev does not exist" in line[-1] for line in shown
    )
    assert any(line[0] == "wmt23" and line[-1].endswith("no dev split") for line in shown)
    assert not (tmp_path / "5_shot").exists()


@needs_data
def test_5_shot_from_other_lines_of_the_test_files(tmp_path):
    """The run on real data that the README shows: test on lines 1-100, examples from 101-300."""
    lines = {"test_lines": "1-100", "example_lines": "101-300"}
    flores = {"pairs": "de-en,en-fr", "example_split": "devtest", **lines}
    build_instructions(tmp_path, "flores200", Path(DATA) / "flores200", shots=5, **flores)
    build_instructions(tmp_path, "wmt23", Path(DATA) / "wmt23", pairs="en-de", shots=5, **lines)
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
    build_instructions(tmp_path / "a", "flores200", root, shots=5)
    build_instructions(tmp_path / "b", "flores200", root, pairs="de-en", shots=5, test_lines="11-20")
    build_instructions(tmp_path / "c", "flores200", root, pairs="de-en", shots=5, seed=1)
    drawn = shown_lines(tmp_path / "a/5_shot/flores_de-en.jsonl")
    assert all(len(set(lines)) == 5 for lines in drawn) and len({tuple(lines) for lines in drawn}) == 30
    for pair in ("en-de", "en-zh", "zh-en"):
        assert shown_lines(tmp_path / f"a/5_shot/flores_{pair}.jsonl") == drawn
    assert shown_lines(tmp_path / "b/5_shot/flores_de-en.jsonl") == drawn[10:20]
    assert shown_lines(tmp_path / "c/5_shot/flores_de-en.jsonl") != drawn


def test_rows_and_chat_style(tmp_path):
    root = write_flores(tmp_path / "data", 2)
    build_instructions(tmp_path / "o", "flores200", root, pairs="de-en", dataset="tiny")
    build_instructions(tmp_path / "c", "flores200", root, pairs="de-en", dataset="tiny", style="chat")
    row = records.read_jsonl(tmp_path / "o/0_shot/tiny_de-en.jsonl")[1]
    instruction = "Translate the following German source text to English:\nGerman: de devtest sentence 2\nEnglish:"
    facts = dict(task="mt", dataset="tiny", shots=0, src_lang="de", tgt_lang="en", source="de devtest sentence 2")
    shared = {"id": "tiny_de-en:2", "output": "en devtest sentence 2", **facts}
    assert row == {"instruction": instruction, **shared}
    chat = records.read_jsonl(tmp_path / "c/0_shot/tiny_de-en.jsonl")[1]
    assert chat == {"messages": [{"role": "user", "content": instruction}], **shared}


def test_fixed_examples(tmp_path):
    """The same five for all sentences of all pairs; another seed, other ones; the prompts share their beginning."""
    root = write_flores(tmp_path / "data", 30)
    build_instructions(tmp_path / "a", "flores200", root, shots=5, examples="fixed")
    build_instructions(tmp_path / "b", "flores200", root, pairs="en-de", shots=5, examples="fixed", test_lines="4-8")
    build_instructions(tmp_path / "c", "flores200", root, pairs="en-de", shots=5, examples="fixed", seed=1)
    drawn = {tuple(lines) for path in (tmp_path / "a/5_shot").glob("*[a-z].jsonl") for lines in shown_lines(path)}
    assert len(drawn) == 1 and len(set(*drawn)) == 5 and len(list((tmp_path / "a/5_shot").glob("*.jsonl"))) == 4
    assert set(map(tuple, shown_lines(tmp_path / "b/5_shot/flores_en-de.jsonl"))) == drawn
    assert set(map(tuple, shown_lines(tmp_path / "c/5_shot/flores_en-de.jsonl"))) != drawn
    rows = records.read_jsonl(tmp_path / "a/5_shot/flores_en-de.jsonl")
    heads = {row["instruction"].removesuffix(f"{row['source']}\nGerman text:") for row in rows}
    assert len(heads) == 1 and heads.pop().count("German text:") == 5
    with pytest.raises(UserError, match="examples was 'fixed', now 'per_sentence'"):
        build_instructions(tmp_path / "a", "flores200", root, shots=5)


def test_examples_of_a_file(tmp_path):
    root, pool = write_flores(tmp_path / "data", splits=["devtest"]), tmp_path / "pool.jsonl"
    rows = [
        {"src_lang": src, "tgt_lang": tgt, "source": f"{src} shown {i}", "target": f"{tgt} shown {i}"}
        for i in range(8)
        for src, tgt in (("de", "en"), ("en", "de"))
    ]
    records.write_jsonl(pool, rows)
    arguments = {"test_set": "flores200", "data_root": root, "shots": 5, "example_file": pool}
    build_instructions(tmp_path / "out", pairs="de-en,en-de", **arguments)
    drawn = {
        src: [re.findall(rf"^{name} text: {src} shown (\d)$", row["instruction"], re.MULTILINE) for row in made]
        for src, name, made in (
            ("de", "German", records.read_jsonl(tmp_path / "out/5_shot/flores_de-en.jsonl")),
            ("en", "English", records.read_jsonl(tmp_path / "out/5_shot/flores_en-de.jsonl")),
        )
    }
    assert drawn["de"] == drawn["en"] and all(len(set(lines)) == 5 for lines in drawn["de"])
    with pytest.raises(UserError, match=r"no examples for zh-en: .*pool\.jsonl has no rows"):
        build_instructions(tmp_path / "out", pairs="zh-en", **arguments)
    with pytest.raises(UserError, match="is a pool of its own"):
        build_instructions(tmp_path / "out", pairs="de-en", example_lines="1-9", **arguments)
    rows[7]["source"] = "de devtest sentence 3"  # en-de row 4: on the wrong side, so no test sentence of en-de
    rows[6]["source"] = "de devtest sentence 3"
    records.write_jsonl(pool, rows)
    with pytest.raises(UserError, match=r"pool\.jsonl:7 is a test sentence \(.*deu_Latn\.devtest:3\)"):
        build_instructions(tmp_path / "new", pairs="de-en", **arguments)
    records.write_jsonl(pool, [{**row, "target": None} for row in rows])
    with pytest.raises(UserError, match=r"pool\.jsonl:1: it has no target, but"):
        build_instructions(tmp_path / "new", pairs="de-en", **arguments)


def test_spire_style_is_spirelms_templates_as_a_users_message(tmp_path):
    """The templates of utter-project/SpireLM's instruction-templates/spire-style-template.json, filled in."""
    root = write_flores(tmp_path / "data", 2)
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", style="spire")
    row = records.read_jsonl(tmp_path / "out/0_shot/flores_de-en.jsonl")[1]
    template = "Translate the following text from {src_lang} to {tgt_lang}.\n{src_lang}: {example}\n{tgt_lang}:"
    filled = template.format(src_lang="German", tgt_lang="English", example="de devtest sentence 2")
    assert row["messages"] == [{"role": "user", "content": filled}] and "instruction" not in row
    with pytest.raises(UserError, match="no template with examples"):
        build_instructions(tmp_path / "out", "flores200", root, shots=5, style="spire")


def test_a_second_call_is_a_no_op_and_another_one_is_refused(tmp_path, capsys):
    root, out = write_flores(tmp_path / "data"), tmp_path / "out"
    build_instructions(out, "flores200", root, pairs="de-en", shots=5)
    before = hash_path(out / "5_shot"), (out / "5_shot/flores_de-en.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    build_instructions(out, "flores200", root, pairs="de-en", shots=5)
    assert capsys.readouterr().out == f"already done: {out}/5_shot (flores_de-en)\n"
    assert before == (hash_path(out / "5_shot"), (out / "5_shot/flores_de-en.jsonl").stat().st_mtime_ns)
    build_instructions(out, "flores200", root)  # more pairs and other shots share the folder
    build_instructions(out, "flores200", root, shots=5)
    assert hash_path(out / "5_shot") != before[0]
    with pytest.raises(UserError, match="seed was 0, now 1"):
        build_instructions(out, "flores200", root, pairs="de-en", shots=5, seed=1)
    build_instructions(out, "flores200", root, pairs="de-en", shots=5, seed=1, overwrite=True)
    assert json.loads((out / "5_shot/flores_de-en.run_info.json").read_text())["arguments"]["seed"] == 1
    (root / "devtest" / "zho_Hans.devtest").write_text("x\n" * 20)
    with pytest.raises(UserError, match="the content of data differs"):
        build_instructions(out, "flores200", root, pairs="zh-en")


# --- Leaks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", ["de", "en"])
def test_a_pool_that_holds_a_test_sentence_is_refused(tmp_path, code):
    root = write_flores(tmp_path / "data")
    path = root / "dev" / f"{CODES[code]}.dev"
    lines = path.read_text().splitlines()
    lines[6] = f"{code} devtest sentence 13"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"{CODES[code]}\.dev:7 is a test sentence \(.*devtest:13\)"):
        build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5)
    for changes in ({"test_lines": "1-12"}, {"examples": "fixed"}, {"example_lines": "3-9"}):
        with pytest.raises(UserError, match="is a test sentence"):  # whether it would be drawn, or is tested, or not
            build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5, **changes)
    assert not (tmp_path / "out").exists()
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5, example_lines="8-20")
    lines[6] = f"{code.upper()}  devtest, Sentence 13!"  # the same sentence to a reader
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="is a test sentence"):
        build_instructions(tmp_path / "other", "flores200", root, pairs="de-en", shots=5)


def test_examples_from_the_tested_lines_are_refused(tmp_path):
    root = write_flores(tmp_path / "data", splits=["devtest"])
    arguments = {"test_set": "flores200", "data_root": root, "pairs": "de-en", "shots": 5, "example_split": "devtest"}
    for examples in ("per_sentence", "fixed"):
        with pytest.raises(UserError, match="is a test sentence"):
            build_instructions(tmp_path / "out", examples=examples, **arguments)
        lines = {"test_lines": "1-10", "example_lines": "10-20"}
        with pytest.raises(UserError, match=r"devtest:10 is a test sentence \(.*devtest:10\)"):
            build_instructions(tmp_path / "out", examples=examples, **arguments, **lines)
        lines["example_lines"] = "11-20"  # the user has cut the file in two: untested lines may be shown
        build_instructions(tmp_path / examples, examples=examples, **arguments, **lines)


def test_a_missing_pool_names_the_option(tmp_path):
    root = write_flores(tmp_path / "data", splits=["devtest"])
    with pytest.raises(UserError, match="--example_lines FIRST-LAST"):
        build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5)
    wmt = tmp_path / "wmt"
    wmt.mkdir()
    for name in ("src.de", "ref.refA.en"):
        (wmt / f"generaltest2023.de-en.{name}").write_text("".join(f"{name} {i}\n" for i in range(20)))
    with pytest.raises(UserError, match="no dev split\n.*--example_lines"):
        build_instructions(tmp_path / "out", "wmt23", wmt, shots=5)
    build_instructions(tmp_path / "out", "wmt23", wmt, shots=5, test_lines="1-10", example_lines="11-20")
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
        ({"test_lines": "²-5"}, "is no range of lines"),
        ({"test_lines": "1-٣"}, "is no range of lines"),
        ({"example_lines": "1 -5", "shots": 5}, "is no range of lines"),
        ({"test_lines": "15-21", "pairs": "de-en"}, "ends at line 21, but .* has 20"),
        ({"shots": 5, "example_lines": "1-4"}, "4 lines to draw 5 examples from"),
        ({"dataset": "../x"}, "cannot name a file"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    root = write_flores(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        build_instructions(tmp_path / "out", "flores200", root, **arguments)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named(tmp_path):
    root, out = write_flores(tmp_path / "data"), tmp_path / "out"
    german = root / "devtest/deu_Latn.devtest"
    whole = german.read_text()
    german.write_text("one\n")
    with pytest.raises(UserError, match=r"deu_Latn\.devtest has 1 lines, .*eng_Latn\.devtest 20"):
        build_instructions(out, "flores200", root)
    german.write_text(whole.replace("de devtest sentence 4\n", " \n"))
    with pytest.raises(UserError, match=r"deu_Latn\.devtest:4: the line is empty"):
        build_instructions(out, "flores200", root)
    german.write_text(whole.replace("de devtest sentence 4\n", "Satz \U000f0005\n"))
    with pytest.raises(UserError, match=r"deu_Latn\.devtest:4: character 6 of the text is U\+F0005"):
        build_instructions(out, "flores200", root)
    german.write_text("")
    with pytest.raises(UserError, match=r"deu_Latn\.devtest is empty"):
        build_instructions(out, "flores200", root)
    with pytest.raises(UserError, match="missing does not exist"):
        build_instructions(out, "flores200", tmp_path / "missing")
    assert not out.exists()


def test_a_bom_is_no_text(tmp_path):
    root = write_flores(tmp_path / "data")
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en")
    for file in (root / "devtest").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    build_instructions(tmp_path / "bom", "flores200", root, pairs="de-en")
    name = "0_shot/flores_de-en.jsonl"
    assert (tmp_path / "bom" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_reference_of_several_lines_is_for_chats_alone(tmp_path):
    folder = tmp_path / "data/mt/own.de-en"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"src": "a", "ref": "b"}\n{"src": "a", "ref": "b\\nc"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl:2: the reference has several lines"):
        build_instructions(tmp_path / "out", "towereval", tmp_path / "data")
    build_instructions(tmp_path / "out", "towereval", tmp_path / "data", style="chat")
    assert records.read_jsonl(tmp_path / "out/0_shot/own_de-en.jsonl")[1]["output"] == "b\nc"


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
        write_units(folder / f"{shard_name(shard, 2)}.parquet", rows)
    return folder


def test_speech(tmp_path):
    folder = write_speech(tmp_path / "clean")
    build_instructions(tmp_path / "out", "units", folder)
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
    build_instructions(tmp_path / "out", "units", folder, dataset="few", test_lines="2-4", style="chat")
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
        build_instructions(tmp_path / "out", "units", write_speech(tmp_path / "clean", **changes))
    assert not (tmp_path / "out").exists()


def test_speech_takes_no_shots_and_wants_all_shards(tmp_path):
    folder = write_speech(tmp_path / "clean")
    with pytest.raises(UserError, match="are for translation"):
        build_instructions(tmp_path / "out", "units", folder, shots=5)
    with pytest.raises(UserError, match="ends at 7, but .* has 6 rows"):
        build_instructions(tmp_path / "out", "units", folder, test_lines="1-7")
    (folder / "units-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 shards"):
        build_instructions(tmp_path / "out", "units", folder)


def write_translations(path: Path, ids=("u00", "u01", "u02", "u10", "u11", "u12"), codes=("de", "ko")) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": key, "tgt_lang": code, "target": f"{code} of {key}"} for code in codes for key in ids]
    records.write_jsonl(path, rows)
    return path


def test_direct_speech_translation(tmp_path):
    folder, translations = write_speech(tmp_path / "fleurs"), write_translations(tmp_path / "translations.jsonl")
    build_instructions(tmp_path / "out", "units", folder, translations=translations)
    assert sorted(path.name for path in (tmp_path / "out/st").glob("*[a-z].jsonl")) == [
        "fleurs_en-de.jsonl",
        "fleurs_en-ko.jsonl",
    ]
    row = records.read_jsonl(tmp_path / "out/st/fleurs_en-ko.jsonl")[4]
    speech = units.to_text([1, 7, 99])
    assert row == {
        "id": "u11",
        "instruction": f"Speech: {speech}\nKorean:",
        "output": "ko of u11",
        "task": "st",
        "dataset": "fleurs",
        "shots": 0,
        "src_lang": "en",
        "tgt_lang": "ko",
        "source": "Text 1 1.",
    }
    settings = {"translations": translations.parent, "pairs": "en-de", "test_lines": "5-5", "unit_offset": 990000}
    write_translations(tmp_path / "fleurs.jsonl", codes=["de"])
    build_instructions(tmp_path / "spire", "units", folder, style="spire", **settings)
    (row,) = records.read_jsonl(tmp_path / "spire/st/fleurs_en-de.jsonl")
    content = f"Speech: {units.to_text([1, 7, 99], 990000)}\nGerman:"
    assert row["messages"] == [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"id": "u00", "tgt_lang": "de", "target": "x"},
            r"t\.jsonl:3: 'u00' is translated twice \(also .*t\.jsonl:1\)",
        ),
        ({"id": "u02", "tgt_lang": "ja", "target": "x"}, r"t\.jsonl:3: tgt_lang is 'ja'\n.*es, fr"),
        ({"id": "u02", "tgt_lang": "en", "target": "x"}, r"t\.jsonl:3: tgt_lang is 'en'"),
        ({"id": "u02", "tgt_lang": "de", "target": " "}, r"t\.jsonl:3: its target is blank"),
        ({"id": 2, "tgt_lang": "de", "target": "x"}, r"t\.jsonl:3: its id is a int, but a text is wanted: 2"),
        ({"id": "u02", "target": "x"}, r"t\.jsonl:3: field 'tgt_lang' is missing"),
        (None, r"row 3 \(id u02\): no translation into German"),
    ],
)
def test_bad_translations(tmp_path, line, message):
    folder, path = write_speech(tmp_path / "fleurs"), write_translations(tmp_path / "t.jsonl", ["u00", "u01"], ["de"])
    if line:
        records.write_jsonl(path, [*records.read_jsonl(path), line])
    with pytest.raises(UserError, match=message):
        build_instructions(tmp_path / "out", "units", folder, translations=path)
    path.write_text(path.read_text().replace("}", "", 1))
    with pytest.raises(UserError, match=r"t\.jsonl:1: not JSON"):
        build_instructions(tmp_path / "out", "units", folder, translations=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("en-fr", r"holds no translations into French \(fr\)\n.*it has: de, ko"),
        ("de-en", "speech is English"),
        ("en-de,en-de", "names a pair twice"),
        ("en-xx", "unknown language 'xx'"),
    ],
)
def test_bad_pairs_of_speech(tmp_path, pairs, message):
    folder, translations = write_speech(tmp_path / "fleurs"), write_translations(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=message):
        build_instructions(tmp_path / "out", "units", folder, pairs=pairs, translations=translations)


# --- Cascades -------------------------------------------------------------------------------------
def write_transcriptions(path: Path, texts: list[str], references: list[str] | None = None, **changes) -> Path:
    """Generations as generate/generate_ASR.py writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"u{i}",
            "task": "asr",
            "dataset": path.stem,
            "shots": 0,
            "src_lang": "en",
            "tgt_lang": "en",
            "source": f"{i}.wav",
            "reference": references[i] if references else f"Reference {i}.",
            "prompt_sha256": "0" * 64,
            "text": text,
            "finish_reason": "stop",
            "num_tokens": 7,
        }
        for i, text in enumerate(texts)
    ]
    rows[-1].update(changes)
    records.write_jsonl(path, rows)
    return path


@needs_data
@pytest.mark.parametrize("step", ["4500", "5000"])
def test_a_cascade_of_the_originals_asr_outputs_is_the_originals_prompt_file(tmp_path, step):
    """AST_de.json's five prompts show the first five outputs of its 5to1 model on FLEURS, as it saved them."""
    outputs = Path(DATA) / f"towerspeech_outputs/ASR/{step}/ASR_5to1_fleurs.txt"
    original = sample("0_shot/AST_de.json")
    asr = write_transcriptions(tmp_path / "asr/fleurs.jsonl", records.read_lines(outputs)[:5])
    translations = tmp_path / "t.jsonl"
    rows = [{"id": f"u{i}", "tgt_lang": "de", "target": row["output"]} for i, row in enumerate(original)]
    records.write_jsonl(translations, rows)
    build_instructions(tmp_path / "out", "cascade", asr, translations=translations)
    built = records.read_jsonl(tmp_path / "out/cascaded_st/fleurs_en-de.jsonl")
    assert [{key: row[key] for key in ("instruction", "output")} for row in built] == original


def test_cascades(tmp_path, capsys):
    """Sources are the reference transcripts; ids the utterances'; an empty output is kept, shown and counted."""
    astray = f"{chr(0xF0003)}x{chr(0xF0004)}"  # units that a model wrote are no words
    asr = write_transcriptions(tmp_path / "ckpt/asr/fleurs.jsonl", [" hello  there", " ", astray])
    write_transcriptions(tmp_path / "ckpt/asr/clean.jsonl", ["never translated"])
    write_translations(tmp_path / "translations/fleurs.jsonl", ["u0", "u1", "u2", "u3"])
    arguments = {"test_set": "cascade", "data_root": tmp_path / "ckpt", "translations": tmp_path / "translations"}
    build_instructions(tmp_path / "out", **arguments)
    out = capsys.readouterr().out
    assert (
        "left out: " in out
        and "clean.jsonl" in out
        and "3 prompts, 1 empty asr outputs, 1 asr outputs without their units" in out
    )
    rows = records.read_jsonl(tmp_path / "out/cascaded_st/fleurs_en-de.jsonl")
    heads = "Translate the following English source text to German Text: "
    assert [row["instruction"] for row in rows] == [f"{heads}{x}\n. German:" for x in (" hello  there", " ", "x")]
    facts = {"task": "cascaded_st", "dataset": "fleurs", "shots": 0, "src_lang": "en", "tgt_lang": "de"}
    assert rows[1] == {
        "id": "u1",
        "instruction": f"{heads} \n. German:",
        "output": "de of u1",
        **facts,
        "source": "Reference 1.",
    }
    info = json.loads((tmp_path / "out/cascaded_st/fleurs_en-de.run_info.json").read_text())
    assert info["counts"] == {"prompts": 3, "empty_asr_outputs": 1, "asr_outputs_without_their_units": 1}
    assert hash_path(asr) in info["inputs"]["data"]  # which ASR outputs these are
    build_instructions(tmp_path / "chat", style="chat", pairs="en-ko", test_lines="2-3", **arguments)
    rows = records.read_jsonl(tmp_path / "chat/cascaded_st/fleurs_en-ko.jsonl")
    assert [row["id"] for row in rows] == ["u1", "u2"]
    assert rows[1]["messages"][0]["content"] == f"{heads.replace('German', 'Korean')}x\n. Korean:"
    build_instructions(tmp_path / "spire", style="spire", pairs="en-de", **arguments)
    row = records.read_jsonl(tmp_path / "spire/cascaded_st/fleurs_en-de.jsonl")[0]
    told = "Translate the following text from English to German.\nEnglish: hello there\nGerman:"
    assert row["messages"][0]["content"] == told
    write_transcriptions(asr, [" hello", " ", "x"])
    with pytest.raises(UserError, match="the content of data differs"):
        build_instructions(tmp_path / "out", **arguments)


def test_5_shot_cascades_and_their_pool(tmp_path):
    asr = write_transcriptions(tmp_path / "fleurs.jsonl", ["one", "two\nlines", ""])
    translations, pool = write_translations(tmp_path / "t.jsonl", ["u0", "u1", "u2"], ["de"]), tmp_path / "pool.jsonl"
    shown = [{"src_lang": "en", "tgt_lang": "de", "source": f"S{i}", "target": f"T{i}"} for i in range(6)]
    records.write_jsonl(pool, shown)
    arguments = {"test_set": "cascade", "data_root": asr, "translations": translations, "shots": 5}
    with pytest.raises(UserError, match="cascade has no dev split\n.*--example_file"):
        build_instructions(tmp_path / "out", **arguments)
    build_instructions(tmp_path / "out", example_file=pool, **arguments)
    rows = records.read_jsonl(tmp_path / "out/cascaded_st/fleurs_en-de_5_shot.jsonl")
    asked = [row["instruction"].rsplit("\n", 2)[-2:] for row in rows]
    assert asked == [[f"English text: {text}", "German text:"] for text in ("one", "two lines", "")]
    assert all(len(re.findall(r"^German text: T\d$", row["instruction"], re.MULTILINE)) == 5 for row in rows)
    for side, text in (("source", "reference 1"), ("target", "de of u1")):
        records.write_jsonl(pool, [*shown, {**shown[0], side: text}])
        with pytest.raises(UserError, match=r"pool\.jsonl:7 is a test sentence"):
            build_instructions(tmp_path / "new", example_file=pool, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mt"}, r"fleurs\.jsonl:2: task is 'mt'"),
        ({"id": "u0"}, r"fleurs\.jsonl:2: id 'u0' is there twice, first at .*fleurs\.jsonl:1"),
        ({"id": "u9"}, r"fleurs\.jsonl:2: no translation of 'u9' into de"),
        ({"reference": None}, r"fleurs\.jsonl:2: it has no reference, but a text is wanted"),
        ({"reference": " "}, r"fleurs\.jsonl:2: its reference is blank"),
        ({"text": 3}, r"fleurs\.jsonl:2: its text is a int, but a text is wanted: 3"),
        ({"id": ["u0"]}, r"fleurs\.jsonl:2: its id is a list, but a text is wanted: \['u0'\]"),
        ({"dataset": "other"}, r"fleurs\.jsonl:2: data sets 'fleurs' and 'other'"),
    ],
)
def test_bad_transcriptions(tmp_path, changes, message):
    asr = write_transcriptions(tmp_path / "fleurs.jsonl", ["a", "b"], **changes)
    translations = write_translations(tmp_path / "t.jsonl", ["u0", "u1"], ["de"])
    with pytest.raises(UserError, match=message):
        build_instructions(tmp_path / "out", "cascade", asr, translations=translations)
    with pytest.raises(UserError, match="scored against translations"):
        build_instructions(tmp_path / "out", "cascade", asr)
    with pytest.raises(UserError, match=r"holds no asr/\*\.jsonl"):
        build_instructions(tmp_path / "out", "cascade", tmp_path, translations=translations)
    assert not (tmp_path / "out").exists()


# --- Everything at once ---------------------------------------------------------------------------
def towereval_pair(root: Path, name: str, pair: str, splits=("dev", "test"), lines: int = 6) -> None:
    for split in splits:
        folder = root / "mt" / f"{name}.{pair}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"src": f"{name} {pair} {split} {i}", "ref": f"translated {name} {split} {i}"} for i in range(lines)]
        records.write_jsonl(folder / f"{split}.jsonl", rows)


def test_all_builds_what_it_finds_and_says_what_it_skips(tmp_path, capsys):
    data = tmp_path / "data"
    write_flores(data / "flores200", 8, codes=("de", "en"))
    towereval_pair(data / "towereval", "flores", "de-en")
    towereval_pair(data / "towereval", "flores", "en-zh")
    towereval_pair(data / "towereval", "tico19", "en-fr", ["test"])
    (data / "units").mkdir()
    write_speech(data / "units/clean")
    write_speech(data / "units/fleurs")
    write_translations(data / "translations/fleurs.jsonl")
    write_transcriptions(data / "cascade/asr/fleurs2.jsonl", ["a", "b"])
    write_translations(data / "translations/fleurs2.jsonl", ["u0", "u1"], ["de"])
    out = tmp_path / "out"
    build_instructions(out, data_root=data, all=True)
    made = {str(path.relative_to(out)): len(records.read_jsonl(path)) for path in out.glob("*/*.jsonl")}
    assert made == {
        **{f"{shots}_shot/flores_{pair}.jsonl": 8 for shots in (0, 5) for pair in ("de-en", "en-de")},
        **{f"{shots}_shot/flores_en-zh.jsonl": 6 for shots in (0, 5)},
        "0_shot/tico19_en-fr.jsonl": 6,
        "asr/clean.jsonl": 6,
        "asr/fleurs.jsonl": 6,
        "st/fleurs_en-de.jsonl": 6,
        "st/fleurs_en-ko.jsonl": 6,
        "cascaded_st/fleurs2_en-de.jsonl": 2,
    }
    lines = capsys.readouterr().out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("test set  ")) :]
    table = {tuple(cells[:3]): cells[3:] for cells in (re.split("  +", line) for line in lines)}
    assert table["flores", "mt", "5"] == ["3", "22"] and table["clean", "asr", "0"] == ["-", "6"]
    assert table["fleurs", "st", "0"] == ["2", "12"] and table["fleurs2", "cascaded_st", "0"] == ["1", "2"]
    reasons = {key: cells[-1] for key, cells in table.items() if key[1] == "-"}
    assert reasons["wmt23", "-", "0"] == f"skipped: no {data}/wmt23"
    assert reasons["flores", "-", "0"] == "skipped: 1 pairs are built from flores200"
    assert "tico19.en-fr/dev.jsonl does not exist" in reasons["tico19", "-", "5"]
    assert "translations/clean.jsonl does not exist" in reasons["clean (st)", "-", "0"]
    assert "cascade has no dev split" in reasons["cascade", "-", "5"]
    before = hash_path(out / "5_shot")
    build_instructions(out, data_root=data, all=True)
    assert hash_path(out / "5_shot") == before and capsys.readouterr().out.count("already done") == len(made)


def test_all_with_a_pool_for_what_has_no_dev_split(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "wmt23").mkdir(parents=True)
    for name in ("src.de", "ref.refA.en"):
        (data / f"wmt23/generaltest2023.de-en.{name}").write_text("".join(f"{name} {i}\n" for i in range(7)))
    shown = [{"src_lang": "de", "tgt_lang": "en", "source": f"S{i}", "target": f"T{i}"} for i in range(6)]
    records.write_jsonl(data / "examples.jsonl", shown)
    build_instructions(tmp_path / "out", data_root=data, all=True, style="chat", examples="fixed")
    rows = records.read_jsonl(tmp_path / "out/5_shot/wmt23_de-en.jsonl")
    assert len(rows) == 7 and rows[0]["messages"][0]["content"].count("\n German text: ") == 5
    build_instructions(tmp_path / "spire", data_root=data, all=True, style="spire")
    assert "no template with examples" in capsys.readouterr().out and not (tmp_path / "spire/5_shot").exists()
    records.write_jsonl(data / "examples.jsonl", [*shown, {**shown[0], "target": "ref.refA.en 3"}])
    with pytest.raises(UserError, match="is a test sentence"):  # a leak is no reason to go on
        build_instructions(tmp_path / "new", data_root=data, all=True)
    for wrong in ({"pairs": "de-en"}, {"shots": 5}, {"test_set": "wmt23"}, {"data_root": None}):
        with pytest.raises(UserError, match="--all true takes --data_root and nothing that names"):
            build_instructions(tmp_path / "new", **{"data_root": data, "all": True, **wrong})
    with pytest.raises(UserError, match="no test set"):
        build_instructions(tmp_path / "new", data_root=data)
    with pytest.raises(UserError, match="--translations are of utterances"):
        build_instructions(tmp_path / "new", "wmt23", data / "wmt23", translations=data / "examples.jsonl")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"example_lines": "1-10"}, "a pool of examples, but --shots 0"),
        ({"examples": "fixed"}, "--examples fixed, but --shots 0"),
        ({"test_set": "wmt23", "split": "dev"}, "wmt23 has no splits"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        build_instructions(tmp_path / "out", **{"test_set": "flores200", "data_root": tmp_path, **options})


# --- Meaning --------------------------------------------------------------------------------------
def write_pool(path: Path, count: int, pairs: list[tuple[str, str]]) -> Path:
    """The same sources in all directions, each with its own language's target."""
    rows = [
        {"src_lang": src, "tgt_lang": tgt, "source": f"{src} shown {i}", "target": f"{tgt} shown {i}"}
        for i in range(count)
        for src, tgt in pairs
    ]
    records.write_jsonl(path, rows)
    return path


def turns_of(instruction: str, source: str, target: str) -> list[tuple[str, str]]:
    """The sentence pairs that a 5-shot prompt shows, in languages of these names; the last one is its own."""
    lines = instruction.split("\n")
    assert len(lines) == 12
    for line, name in zip(lines, [source, target] * 6, strict=True):
        assert line.startswith(f"{name} text:")
    told = [line.partition(" text:")[2].removeprefix(" ") for line in lines]
    return list(zip(told[::2], told[1::2], strict=True))


def test_a_pool_of_several_directions_gives_each_pair_its_own(tmp_path):
    """en-de and en-fr have the same sources: only the targets tell them apart."""
    root = tmp_path / "data"
    (root / "devtest").mkdir(parents=True)
    for name in ("eng_Latn", "deu_Latn", "fra_Latn"):
        (root / f"devtest/{name}.devtest").write_text("".join(f"{name} line {i}\n" for i in range(9)))
    pool = write_pool(tmp_path / "pool.jsonl", 5, [("en", "de"), ("en", "fr"), ("fr", "en"), ("de", "en")])
    build_instructions(tmp_path / "out", "flores200", root, shots=5, example_file=pool)
    names = {"en": "English", "de": "German", "fr": "French"}
    for pair in ("en-de", "en-fr", "fr-en", "de-en"):
        src, tgt = pair.split("-")
        rows = records.read_jsonl(tmp_path / f"out/5_shot/flores_{pair}.jsonl")
        assert len(rows) == 9
        for number, row in enumerate(rows):
            *shown, own = turns_of(row["instruction"], names[src], names[tgt])
            assert own == (f"{CODES.get(src, 'fra_Latn')} line {number}", "")
            assert sorted(shown) == [(f"{src} shown {i}", f"{tgt} shown {i}") for i in range(5)]


def test_examples_go_with_their_translations_and_their_order_is_drawn(tmp_path):
    root = write_flores(tmp_path / "data", 30, codes=("de", "en"))
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5)
    orders = []
    for number, row in enumerate(records.read_jsonl(tmp_path / "out/5_shot/flores_de-en.jsonl"), 1):
        *shown, own = turns_of(row["instruction"], "German", "English")
        assert own == (f"de devtest sentence {number}", "") and row["output"] == f"en devtest sentence {number}"
        places = [int(source.removeprefix("de dev sentence ")) for source, _ in shown]
        assert shown == [(f"de dev sentence {i}", f"en dev sentence {i}") for i in places]
        orders.append(places == sorted(places))
    assert orders.count(False) > 0
    # python -c "import random; print(random.Random('0 1').sample(range(30), 5))", of line 1 with seed 0
    first = records.read_jsonl(tmp_path / "out/5_shot/flores_de-en.jsonl")[0]["instruction"]
    assert [int(n) - 1 for n in re.findall(r"^German text: de dev sentence (\d+)$", first, re.MULTILINE)] == [
        4,
        23,
        6,
        27,
        26,
    ]


def test_the_last_line_and_a_pool_of_just_enough_are_taken(tmp_path):
    root = write_flores(tmp_path / "data", 20, codes=("de", "en"))
    lines = {"test_lines": "20-20", "example_lines": "16-20"}
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5, **lines)
    (row,) = records.read_jsonl(tmp_path / "out/5_shot/flores_de-en.jsonl")
    assert row["id"] == "flores_de-en:20" and row["source"] == "de devtest sentence 20"
    assert sorted(examples_of(row["instruction"])) == [f"de dev sentence {i}" for i in range(16, 21)]


def test_the_first_and_the_last_line_of_a_pool_are_drawn_too(tmp_path):
    root = write_flores(tmp_path / "data", 40, codes=("de", "en"))
    build_instructions(tmp_path / "out", "flores200", root, pairs="de-en", shots=5, example_lines="3-9")
    rows = records.read_jsonl(tmp_path / "out/5_shot/flores_de-en.jsonl")
    drawn = {line for row in rows for line in examples_of(row["instruction"])}
    assert drawn == {f"de dev sentence {i}" for i in range(3, 10)}
