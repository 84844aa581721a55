"""build_sft_data.py: prompts, exact counts, few-shot examples, determinism, refusals."""

import json
from collections import Counter
from pathlib import Path

import pytest

from instruction_tuning.build_sft_data import build_sft_data as build
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.records import read_jsonl, write_jsonl
from towerspeech.units_parquet import read_units


def write_parallel(path: Path, count: int = 30, src: str = "en", tgt: str = "de") -> Path:
    write_jsonl(
        path,
        (
            {"id": i, "src_lang": src, "tgt_lang": tgt, "source": f"{src} line {i}", "target": f"{tgt} Zeile {i}"}
            for i in range(count)
        ),
    )
    return path


def test_prompts_and_exact_counts(tmp_path, make_units):
    units = make_units(tmp_path / "units", 40, num_shards=2)
    files = [write_parallel(tmp_path / "a.jsonl"), write_parallel(tmp_path / "b.jsonl", src="de", tgt="en")]
    build(tmp_path / "out", [units], files, num_asr=25, num_mt=50, few_shot_share=0.2, seed=3)
    rows = read_jsonl(tmp_path / "out/sft.jsonl")
    assert Counter(row["task"] for row in rows) == {"asr": 25, "mt_0_shot": 40, "mt_5_shot": 10}
    assert len({row["id"] for row in rows}) == 75
    utterances = {f"asr_{row['id']}": row for row in read_units(units)}
    pairs = {f"mt_{r['src_lang']}-{r['tgt_lang']}_{r['id']}": r for path in files for r in read_jsonl(path)}
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        if row["task"] == "asr":
            utterance = utterances[row["id"]]
            assert user["content"] == f"Speech: {dsu.to_text(utterance['units'])}\nEnglish:"
            assert assistant["content"] == utterance["text"]
            continue
        pair = pairs[row["id"]]
        assert assistant["content"] == pair["target"]
        if row["task"] == "mt_0_shot":
            assert user["content"] == prompts.mt_0_shot(pair["src_lang"], pair["tgt_lang"], pair["source"])
        else:
            lines = user["content"].split("\n")
            sources = lines[0::2]
            assert len(lines) == 12 and len(set(sources)) == 6  # five others and its own, all different
            assert sources[-1].endswith(f"text: {pair['source']}")
            assert f" {pair['target']}" not in [line.partition(" text:")[2] for line in lines]
            for source, target in zip(lines[0:10:2], lines[1:10:2], strict=True):
                assert source.rpartition(" ")[2] == target.rpartition(" ")[2]  # the pair's own number
    assert json.loads((tmp_path / "out/run_info.json").read_text())["counts"]["examples"] == 75


def test_same_seed_same_bytes(tmp_path, make_units, capsys):
    units, parallel = make_units(tmp_path / "units", 20), write_parallel(tmp_path / "a.jsonl")
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build(tmp_path / name, [units], [parallel], num_asr=10, num_mt=10, seed=seed)
    contents = [(tmp_path / name / "sft.jsonl").read_bytes() for name in ("one", "again", "two")]
    assert contents[0] == contents[1] != contents[2]
    build(tmp_path / "one", [units], [parallel], num_asr=10, num_mt=10, seed=1)
    assert "already done" in capsys.readouterr().out


def test_original_offset(tmp_path, make_units):
    units = make_units(tmp_path / "units", [{"units": [0, 49]}])
    build(tmp_path / "out", [units], num_asr=1, unit_offset=990000)
    content = read_jsonl(tmp_path / "out/sft.jsonl")[0]["messages"][0]["content"]
    assert content == f"Speech: {chr(990000)}{chr(990049)}\nEnglish:"


def test_rows_without_transcript_are_counted(tmp_path, make_units):
    rows = [{"units": [1, 2], "text": text} for text in ("one", "", None, "two")] + [{"units": [], "text": "three"}]
    build(tmp_path / "out", [make_units(tmp_path / "units", rows)], num_asr=2)
    counts = json.loads((tmp_path / "out/run_info.json").read_text())["counts"]
    assert (counts["utterances_without_transcript"], counts["utterances_without_units"]) == (2, 1)


def test_refusals(tmp_path, make_units):
    units, parallel = make_units(tmp_path / "units", 10), write_parallel(tmp_path / "a.jsonl", 5)

    def refused(message: str, **arguments) -> None:
        with pytest.raises(UserError, match=message):
            build(tmp_path / "out", **arguments)
        assert not (tmp_path / "out/sft.jsonl").exists()
        for path in (tmp_path / "out").glob(".unfinished*"):
            path.unlink()

    refused("--num_asr is 11, but there are 10", units=[units], num_asr=11)
    refused("--num_mt is 6, but there are 5", parallel=[parallel], num_mt=6)
    refused("5 different sources; a 5-shot prompt needs 6", parallel=[parallel], num_mt=5, few_shot_share=1.0)
    refused("make no data set", units=[units])
    refused("not a share", units=[units], num_asr=1, few_shot_share=2.0)
    refused("--parallel is missing", units=[units], num_asr=1, num_mt=1)
    refused("nowhere does not exist", units=[tmp_path / "nowhere"], num_asr=1)
    german = make_units(tmp_path / "german", [{"units": [1], "language": "de"}])
    refused("utterance utt0000 is in 'de'", units=[german], num_asr=1)
    good = {"id": 0, "src_lang": "en", "tgt_lang": "de", "source": "a", "target": "b"}
    for change, message in (
        ({"target": " "}, "bad.jsonl:2: its target is blank"),
        ({"tgt_lang": "xx"}, "bad.jsonl:2: unknown language 'xx'"),
        ({"tgt_lang": "en"}, "bad.jsonl:2: src_lang and tgt_lang"),
    ):
        write_jsonl(tmp_path / "bad.jsonl", [good, {**good, **change}])
        refused(message, parallel=[tmp_path / "bad.jsonl"], num_mt=1)
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n{oops\n")
    refused("bad.jsonl:2: not JSON", parallel=[tmp_path / "bad.jsonl"], num_mt=1)
    (tmp_path / "empty.jsonl").touch()
    refused("empty.jsonl is empty", parallel=[tmp_path / "empty.jsonl"], num_mt=1)


# --- Meaning --------------------------------------------------------------------------------------
def shown_in(row: dict) -> tuple[list[tuple[str, str]], str]:
    """The sentence pairs that a 5-shot prompt shows, and its own source."""
    told = [line.partition(" text: ")[2] for line in row["messages"][0]["content"].split("\n")]
    assert len(told) == 12 and told[-1] == ""
    return list(zip(told[:-2:2], told[1:-2:2], strict=True)), told[-2]


def test_parallel_text_in_other_forms(tmp_path):
    """Two files of which line follows line, and pairs without ids, become what the same pairs as our JSONL do."""
    pairs = [(f"the dog {i}", f"der Hund {i}") for i in range(9)]
    for number, code in enumerate(("en", "de")):
        (tmp_path / f"a.{code}").write_text("".join(f"{pair[number]}\n" for pair in pairs))
    rows = [{"src_lang": "en", "tgt_lang": "de", "source": en, "target": de} for en, de in pairs]
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": f"a.en:{n}"} for n, row in enumerate(rows, 1)])
    write_jsonl(tmp_path / "b.jsonl", [{"translation": {"eng_Latn": en, "German": de}} for en, de in pairs])
    made = []
    for name in ("a.jsonl", "a.{en,de}", "b.jsonl"):
        folder = tmp_path / f"sft {name}"
        build(folder, parallel=[tmp_path / name], num_mt=9, few_shot_share=0.5)
        made.append(read_jsonl(folder / "sft.jsonl"))
    assert made[0] == made[1] and len(made[0]) == 9
    assert [row["messages"] for row in made[2]] == [row["messages"] for row in made[0]]
    assert len({row["id"] for row in made[2]}) == 9


def test_few_shot_examples_are_all_the_others_of_the_direction(tmp_path):
    """Six sources a direction, the same for two of them: each prompt shows just the other five, in its language."""
    files = []
    for src, tgt in (("en", "de"), ("en", "fr"), ("de", "en")):
        files.append(write_parallel(tmp_path / f"{src}-{tgt}.jsonl", 6, src, tgt))
    build(tmp_path / "out", parallel=files, num_mt=18, few_shot_share=1.0)
    rows = read_jsonl(tmp_path / "out/sft.jsonl")
    assert len({row["id"] for row in rows}) == 18
    names = {"en": "English", "de": "German", "fr": "French"}
    for row in rows:
        _, direction, number = row["id"].split("_")
        src, tgt = direction.split("-")
        shown, own = shown_in(row)
        assert own == f"{src} line {number}" and row["messages"][1]["content"] == f"{tgt} Zeile {number}"
        assert sorted(shown) == [(f"{src} line {i}", f"{tgt} Zeile {i}") for i in range(6) if i != int(number)]
        prefixes = [line.partition(":")[0] for line in row["messages"][0]["content"].split("\n")]
        assert prefixes == [f"{names[src]} text", f"{names[tgt]} text"] * 6


def test_a_sentence_that_is_there_twice_is_never_its_own_example(tmp_path):
    """Nor is any sentence shown twice."""
    rows = [
        {"id": i, "src_lang": "en", "tgt_lang": "de", "source": f"line {i % 7}", "target": f"Zeile {i}"}
        for i in range(42)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    build(tmp_path / "out", parallel=[tmp_path / "a.jsonl"], num_mt=42, few_shot_share=1.0)
    orders = set()
    for row in read_jsonl(tmp_path / "out/sft.jsonl"):
        shown, own = shown_in(row)
        sources = [source for source, _ in shown]
        assert len({*sources, own}) == 6
        orders.add(tuple(sources))
    assert len(orders) > 30  # other ones, in another order, each time


def test_0_shot_and_speech_prompts_to_the_letter(tmp_path, make_units):
    units = make_units(tmp_path / "units", [{"units": [7, 3], "text": " one two "}])
    write_parallel(tmp_path / "a.jsonl", 1, "fr", "zh")
    build(tmp_path / "out", [units], [tmp_path / "a.jsonl"], num_asr=1, num_mt=1, few_shot_share=0)
    rows = {row["task"]: row for row in read_jsonl(tmp_path / "out/sft.jsonl")}
    assert rows["asr"] == {
        "id": "asr_utt0000",
        "task": "asr",
        "messages": [
            {"role": "user", "content": "Speech: \U000f0007\U000f0003\nEnglish:"},
            {"role": "assistant", "content": "one two"},
        ],
    }
    asked = "Translate the following French source text to Chinese:\nFrench: fr line 0\nChinese:"
    assert rows["mt_0_shot"] == {
        "id": "mt_fr-zh_0",
        "task": "mt_0_shot",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "zh Zeile 0"}],
    }


def test_all_that_there_is_once_and_in_another_order(tmp_path, make_units):
    """As many as there are: each once; the tasks are mixed, and drawn from all files."""
    units = [make_units(tmp_path / name, [{"id": f"{name}{i}", "units": [i]} for i in range(20)]) for name in "xy"]
    files = [write_parallel(tmp_path / "a.jsonl", 20), write_parallel(tmp_path / "b.jsonl", 20, "de", "en")]
    build(tmp_path / "out", units, files, num_asr=40, num_mt=40, few_shot_share=0.5)
    rows = read_jsonl(tmp_path / "out/sft.jsonl")
    wanted = {f"asr_{name}{i}" for name in "xy" for i in range(20)}
    wanted |= {f"mt_{direction}_{i}" for direction in ("en-de", "de-en") for i in range(20)}
    assert len(rows) == 80 and {row["id"] for row in rows} == wanted
    for half in (rows[:40], rows[40:]):
        assert Counter(row["task"] for row in half)["asr"] in range(10, 31)
    assert Counter(row["task"] for row in rows) == {"asr": 40, "mt_0_shot": 20, "mt_5_shot": 20}
    build(tmp_path / "some", units, files, num_asr=20, num_mt=20, few_shot_share=0.5)
    ids = {row["id"] for row in read_jsonl(tmp_path / "some/sft.jsonl")}
    for beginning in ("asr_x", "asr_y", "mt_en", "mt_de"):
        assert 2 < sum(name.startswith(beginning) for name in ids) < 18
    with pytest.raises(UserError, match="--num_asr is 41, but there are 40"):
        build(tmp_path / "more", units, num_asr=41)
    with pytest.raises(UserError, match="--num_mt is 41, but there are 40"):
        build(tmp_path / "more", parallel=files, num_mt=41)
