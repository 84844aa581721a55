"""Each form of text, written by what researchers write it with: gzip and zstd themselves, pyarrow, datasets."""

import gzip
import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_sentences
from towerspeech import texts
from towerspeech.errors import UserError
from towerspeech.records import write_jsonl
from towerspeech.texts import (
    Reading,
    expand,
    iter_parallel,
    iter_texts,
    parallel_parts,
    parse_parallel,
    parse_text,
    read_raw,
    text_parts,
)
from towerspeech.units_parquet import write_units

TEXTS = [*make_sentences(40), "", 'a "quoted" <|im_end|>', "Ende\u2028der Zeile", "한국어 글", "  space  "]
PAIRS = list(zip(TEXTS[:40], reversed(make_sentences(40, seed=1)), strict=True))


def zstd(path: Path) -> None:
    """Pack in two frames, as pzstd and what joins files do."""
    data = path.read_bytes()
    half = len(data) // 2
    packed = [pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:])]
    path.with_name(f"{path.name}.zst").write_bytes(b"".join(packed))
    path.unlink()


# --- Text -----------------------------------------------------------------------------------------
def as_mc4(root: Path) -> dict:
    """Two gzipped files of JSON lines, with other fields beside the text."""
    rows = [{"url": f"https://example.org/{i}", "timestamp": "2019", "text": text} for i, text in enumerate(TEXTS)]
    for number, part in enumerate((rows[:20], rows[20:])):
        path = root / f"c4-de.tfrecord-{number:05d}-of-00002.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))  # \\u escapes
        subprocess.run(["gzip", path], check=True)
    return {"name": f"{root}/c4-de.tfrecord-*.json.gz"}


def as_folder(root: Path) -> dict:
    as_mc4(root / "b" if (root / "b").mkdir() is None else root)
    (root / "b/README.md").write_text("not a document\n")
    (root / ".cache").mkdir()
    (root / ".cache/c.jsonl").write_text('{"text": "hidden"}\n')
    return {"name": root}


def as_zstd(root: Path) -> dict:
    write_jsonl(root / "a.jsonl", [{"content": text} for text in TEXTS])
    zstd(root / "a.jsonl")
    return {"name": root / "a.jsonl.zst", "field": "content"}


def as_parquet(root: Path) -> dict:
    table = pa.table({"id": list(range(len(TEXTS))), "raw_content": TEXTS})
    pq.write_table(table, root / "train-00000-of-00001.parquet", row_group_size=7)
    return {"name": root, "field": "raw_content"}


def as_lines(root: Path) -> dict:
    (root / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*TEXTS, ""]).encode())
    return {"name": root / "a.txt"}


def as_packed_lines(root: Path) -> dict:
    (root / "a.de").write_text("\n".join(TEXTS), encoding="utf-8")  # no newline at the end
    subprocess.run(["gzip", root / "a.de"], check=True)
    return {"name": root / "a.de.gz"}


def as_saved(root: Path) -> dict:
    datasets.Dataset.from_dict({"other": [1] * len(TEXTS), "text": TEXTS}).save_to_disk(root / "saved", num_shards=3)
    return {"name": root / "saved"}


FORMS = (as_mc4, as_folder, as_zstd, as_parquet, as_lines, as_packed_lines, as_saved)


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_documents_are_the_same_in_every_form(tmp_path, write):
    rows = list(iter_texts(**write(tmp_path)))
    assert [text for _, text in rows] == TEXTS
    assert len({where for where, _ in rows}) == len(TEXTS)  # each says where it stands


def test_paragraphs_end_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\n two\n \t\n\nthree\nfour\n\nlast")
    rows = list(iter_texts(tmp_path / "a.txt", paragraphs=True))
    assert [text for _, text in rows] == ["one\n two", "three\nfour", "last"]
    assert [where.rpartition(":")[2] for where, _ in rows] == ["3", "7", "10"]
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthree\n\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:5: not UTF-8"):
        list(iter_texts(tmp_path / "a.txt", paragraphs=True))


def test_a_pattern_is_sorted_and_a_name_with_its_signs_is_a_name(tmp_path):
    for name in ("b.txt", "a.txt", "a[1].txt", "x{1,2}.txt"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in expand(tmp_path / "[ab].txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in expand(tmp_path / "a[1].txt")] == ["a[1].txt"]
    assert [path.name for path in expand(tmp_path / "x{1,2}.txt")] == ["x{1,2}.txt"]
    assert [path.name for path in expand(tmp_path / "{b,a}.*")] == ["b.txt", "a.txt"]


def test_zstd_of_many_frames_is_read_whole(tmp_path):
    """Larger than any buffer."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(400_000)))
    zstd(path)
    rows = [text for _, text in iter_texts(f"{path}.zst")]
    assert len(rows) == 400_000 and rows[-1] == "line 399999"


# --- Parallel text --------------------------------------------------------------------------------
def rows_of(*fields: str) -> list[dict]:
    return [dict(zip(fields, pair, strict=True)) for pair in PAIRS]


def ours(root: Path) -> dict:
    write_jsonl(root / "a.jsonl", [{"src_lang": "de", "tgt_lang": "en", **row} for row in rows_of("source", "target")])
    return {"name": root / "a.jsonl"}


def flores_codes_and_names(root: Path) -> dict:
    rows = [
        {"src_lang": "deu_Latn" if i % 2 else "German", "tgt_lang": "English", **row}
        for i, row in enumerate(rows_of("source", "target"))
    ]
    write_jsonl(root / "a.jsonl", rows)
    return {"name": root / "a.jsonl"}


def translations(root: Path) -> dict:
    """As WMT's sets on the hub."""
    write_jsonl(root / "a.jsonl", [{"translation": row} for row in rows_of("de", "en")])
    return {"name": root / "a.jsonl"}


def translations_the_other_way(root: Path) -> dict:
    rows = [{"translation": {"en": en, "fr": "autre", "de": de}} for de, en in PAIRS]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet", row_group_size=9)
    return {"name": root / "a.parquet", "direction": "de-en"}


def columns(root: Path) -> dict:
    table = pa.table(
        {"deu_Latn": [de for de, _ in PAIRS], "score": [0.5] * len(PAIRS), "eng_Latn": [e for _, e in PAIRS]}
    )
    pq.write_table(table, root / "a.parquet")
    return {"name": root / "a.parquet"}


def tsv(root: Path) -> dict:
    (root / "a.tsv").write_text("".join(f"{de}\t{en}\t0.91\n" for de, en in PAIRS), encoding="utf-8")
    return {"name": root / "a.tsv", "direction": "German-English"}


def tsv_with_names(root: Path) -> dict:
    (root / "a.tsv").write_text("score\ten\tde\n" + "".join(f"1\t{en}\t{de}\n" for de, en in PAIRS), encoding="utf-8")
    subprocess.run(["gzip", root / "a.tsv"], check=True)
    return {"name": root / "a.tsv.gz", "direction": "de-en"}


def moses(root: Path) -> dict:
    for number, code in enumerate(("de", "en")):
        path = root / f"europarl.{code}"
        path.write_text("".join(f"{pair[number]}\n" for pair in PAIRS), encoding="utf-8")
    return {"name": root / "europarl.{de,en}"}


def moses_in_parts(root: Path) -> dict:
    for number, side in enumerate(("src", "trg")):
        for part, pairs in enumerate((PAIRS[:15], PAIRS[15:])):
            path = root / f"part{part}.{side}.gz"
            path.write_bytes(gzip.compress("".join(f"{pair[number]}\n" for pair in pairs).encode()))
    return {"name": root / "part*.{src,trg}.gz", "direction": "de-en"}


def moses_the_other_way(root: Path) -> dict:
    return {"name": str(moses(root)["name"]).replace("{de,en}", "{en,de}"), "direction": "de-en"}


PARALLEL = (
    ours,
    flores_codes_and_names,
    translations,
    translations_the_other_way,
    columns,
    tsv,
    tsv_with_names,
    moses,
    moses_the_other_way,
    moses_in_parts,
)


@pytest.mark.parametrize("write", PARALLEL, ids=lambda write: write.__name__)
def test_pairs_are_the_same_in_every_form(tmp_path, write):
    rows = [row for _, row in iter_parallel(**write(tmp_path))]
    assert [(row["source"], row["target"]) for row in rows] == PAIRS
    assert {(row["src_lang"], row["tgt_lang"]) for row in rows} == {("de", "en")}
    assert len({row["id"] for row in rows}) == len(PAIRS)


def test_a_saved_set_of_pairs_and_one_of_several_splits(tmp_path):
    rows = datasets.Dataset.from_list([{"translation": row} for row in rows_of("de", "en")])
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "wmt")
    found = [(row["source"], row["target"]) for _, row in iter_parallel(tmp_path / "wmt/train")]
    assert found == PAIRS
    with pytest.raises(UserError, match=r"wmt holds several splits\n.*name one: .*wmt/dev, .*wmt/train"):
        next(iter_parallel(tmp_path / "wmt"))


def test_braces_name_several_files_with_fields(tmp_path):
    for name, source in (("a", "one"), ("b", "two")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{**PAIR, "source": source}])
    assert [row["source"] for _, row in iter_parallel(tmp_path / "{b,a}.jsonl")] == ["two", "one"]


def test_two_stars_read_nothing_twice(tmp_path):
    (tmp_path / "text/sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / "text" / name).write_text(f"{name}\n")
    for pattern in ("text/**", "text/**/*", "te*", "text/**/*.txt"):
        assert sorted(text for _, text in iter_texts(tmp_path / pattern)) == ["a.txt", "sub/b.txt"], pattern


def test_rows_keep_their_ids_and_their_direction(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "id": 7}, {**PAIR, "src_lang": "fr"}])
    (first, second) = [row for _, row in iter_parallel(tmp_path / "a.jsonl", "en-de")]
    assert first == {**PAIR, "id": "7"} and second == {**PAIR, "src_lang": "fr", "id": "a.jsonl:2"}


# --- What is wrong is named -----------------------------------------------------------------------
PAIR = {"src_lang": "en", "tgt_lang": "de", "source": "a", "target": "b"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tgt_lang": "xx"}, r"a\.jsonl:3001: unknown language 'xx' as tgt_lang"),
        ({"src_lang": ["en"]}, r"a\.jsonl:3001: its src_lang is a list, but a text is wanted: \['en'\]"),
        ({"tgt_lang": "English"}, r"a\.jsonl:3001: src_lang and tgt_lang are both 'en'"),
        ({"source": None}, r"a\.jsonl:3001: it has no source, but a text"),
        ({"target": 3}, r"a\.jsonl:3001: its target is a int, but a text is wanted: 3"),
        ({"target": "an icon \U000f0005"}, r"a\.jsonl:3001, target: character 9 of the text is U\+F0005"),
        ({"source": "\U000fffff"}, r"a\.jsonl:3001, source: character 1 of the text is U\+FFFFF"),
        ({"translation": {"en": "a", "xx": "b"}}, r"a\.jsonl:3001: of en, xx, none are source and target, or two"),
        ({"translation": {"en": "a", "de": "b", "fr": "c"}}, r"a\.jsonl:3001: of en, de, fr, none are source and"),
    ],
)
def test_a_wrong_pair_is_named_by_line(tmp_path, wrong, message):
    write_jsonl(tmp_path / "a.jsonl", [PAIR] * 3000 + [{**PAIR, **wrong}])
    pairs = iter_parallel(tmp_path / "a.jsonl")
    assert [next(pairs)[1] for _ in range(3000)] == [{**PAIR, "id": f"a.jsonl:{n}"} for n in range(1, 3001)]
    with pytest.raises(UserError, match=message):
        next(pairs)


def test_a_column_that_is_not_there_is_named(tmp_path):
    as_parquet(tmp_path)
    as_saved(tmp_path)
    for name, there in (("train-00000-of-00001.parquet", "id, raw_content"), ("saved", "other, text")):
        with pytest.raises(UserError, match=rf"{name}: field 'none' is missing, there are {there}"):
            list(iter_texts(tmp_path / name, "none"))


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_a_file_that_was_cut_is_named(tmp_path):
    lines = "".join(f"{i} {text}\n" for i, text in enumerate(TEXTS * 2000))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(lines.encode()))
    other = tmp_path / "b.txt"
    other.write_text(lines, encoding="utf-8")
    zstd(other)
    for path in (cut(packed), cut(other.with_name("b.txt.zst"))):
        with pytest.raises(UserError, match=rf"{path.name} is cut short or damaged \(.*\)\n.*fetch or pack it again"):
            list(iter_texts(path))
    as_parquet(tmp_path)
    with pytest.raises(UserError, match="train-00000-of-00001.parquet is no Parquet, or cut short"):
        list(iter_texts(cut(next(tmp_path.glob("*.parquet"))), "raw_content"))
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "not packed"}\n')
    with pytest.raises(UserError, match="plain.jsonl.gz is cut short or damaged"):
        list(iter_texts(tmp_path / "plain.jsonl.gz"))


def test_sides_of_other_lengths_are_refused(tmp_path):
    moses(tmp_path)
    with open(tmp_path / "europarl.en", "a") as file:
        file.write("one more\n")
    with pytest.raises(UserError, match=r"europarl\.de has 40 lines, \S*europarl\.en has more"):
        list(iter_parallel(tmp_path / "europarl.{de,en}"))
    moses_in_parts(tmp_path)
    (tmp_path / "part1.trg.gz").unlink()
    with pytest.raises(UserError, match="2 files end in src, 1 in trg"):
        list(iter_parallel(tmp_path / "part*.{src,trg}.gz", "de-en"))


@pytest.mark.parametrize(
    ("name", "direction"), [("a.{de,en}", "de-fr"), ("a.{de,xx}", "de-en"), ("a.{de,en,fr}", "de-en")]
)
def test_endings_that_are_languages_are_those_of_the_direction(tmp_path, name, direction):
    for code in ("de", "en", "fr", "xx"):
        (tmp_path / f"a.{code}").write_text("a line\n")
    wanted = direction.replace("-", " and ")
    with pytest.raises(UserError, match=rf"{{{name[3:-1]}}} does not name {wanted}"):
        list(iter_parallel(tmp_path / name, direction))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a line\n", "a.txt holds plain text, one side of a pair at most"),
        ("a.tsv", "a\tb\n", "a.tsv:1: it has neither src_lang nor tgt_lang"),
        ("a.tsv", "de\ten\na\tb\nc\n", "a.tsv:3: 1 columns, but de, en are wanted"),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl:1: of text, none are source and target, or two languages"),
        ("a.{de,xx}", "", "{de,xx} does not name two of the ten languages"),
        ("none*.jsonl", "", "no file is called .*none"),
        ("none.jsonl", "", "none.jsonl does not exist"),
    ],
)
def test_what_is_no_parallel_text_is_refused(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(iter_parallel(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"content": "b"}\n', "a.jsonl:2: field 'text' is missing"),
        ("a.jsonl", '{"text": null}\n', "a.jsonl:1: it has no text, but a text is wanted"),
        ("a.txt", "a\n\U000f0001\n", r"a.txt:2: character 1 of the text is U\+F0001"),
        ("a.tsv", "a\tb\n", "a.tsv has columns, and which is the text is not known"),
        ("a.txt", b"a\n\xff\n", "a.txt:2: not UTF-8"),
        ("part-00000", '\n{"text": "a"}\n', "part-00000:2: JSON, but the file's name does not end in .jsonl"),
        ("a.txt", '[{"text": "a"}]', "a.txt:1: JSON, but the file's name does not end in .jsonl"),
        ("sub/a.bin", "a", "holds no text: .json, .jsonl"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(iter_texts(path.parent if path.parent != tmp_path else path))


# --- Reading and parsing apart --------------------------------------------------------------------
def as_paragraphs(root: Path) -> dict:
    (root / "a.txt").write_text("\n\n".join(f"{text}\n+ {text}" for text in TEXTS), encoding="utf-8")
    return {"name": root / "a.txt", "paragraphs": True}


def as_list(root: Path) -> dict:
    (root / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    return {"name": root / "a.json"}


def as_joined_jsonl(root: Path) -> dict:
    """As ``cat`` joins files: blank lines, and a BOM in the middle."""
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    (root / "a.jsonl").write_bytes(
        b"\n \n".join([b"\xef\xbb\xbf", *lines[:9], b"", b"\xef\xbb\xbf" + lines[9], *lines[10:]])
    )
    return {"name": root / "a.jsonl"}


def as_hub(root: Path) -> dict:
    return {"name": f"hub:{as_parquet(root)['name']}", "field": "raw_content"}


READ_APART = (*FORMS, as_paragraphs, as_list, as_joined_jsonl, as_hub, *PARALLEL)


def apart(write, root: Path):
    """The parts of what ``write`` writes, how they are read, and what iter_texts or iter_parallel gives of it."""
    given = write(root)
    if write in PARALLEL:
        direction = given.get("direction")
        return (
            parallel_parts(given["name"], direction),
            Reading(direction=direction, parallel=True),
            iter_parallel(**given),
        )
    reading = Reading(given.get("field", "text"), given.get("paragraphs", False))
    return text_parts(given["name"]), reading, iter_texts(**given)


def parse(part, number, raw, reading):
    if reading.parallel:
        return parse_parallel(part, number, raw, reading)
    return parse_text(part, number, raw, reading)[:2]


@pytest.mark.parametrize("write", READ_APART, ids=lambda write: write.__name__)
def test_what_is_read_and_parsed_apart_is_the_same(tmp_path, write):
    parts, reading, rows = apart(write, tmp_path)
    items = [(part, number, raw) for part in parts for number, raw in read_raw(part, reading)]
    sent = pickle.loads(pickle.dumps(items))  # as to other processes
    assert [parse(*item, reading) for item in sent] == list(rows)
    assert len(items) == len(PAIRS if reading.parallel else TEXTS)


@pytest.mark.parametrize("block", [1, 3, 8192])
@pytest.mark.parametrize("write", READ_APART, ids=lambda write: write.__name__)
def test_items_are_chosen_by_number(tmp_path, monkeypatch, write, block):
    parts, reading, _ = apart(write, tmp_path)
    whole = [list(read_raw(part, reading)) for part in parts]
    monkeypatch.setattr(texts, "BLOCK_ITEMS", block)
    monkeypatch.setattr(texts, "BATCH_ROWS", 2 * block)
    rng = random.Random(block)
    for share in (0, 0.02, 0.1, 0.5, 0.98, 1):
        chosen, start = {number for number in range(200) if rng.random() < share}, rng.randrange(12)
        asked = []

        def wanted(first, count, chosen=chosen, asked=asked):
            asked.extend(range(first, first + count))
            return np.array([number in chosen for number in range(first, first + count)])

        for part, items in zip(parts, whole, strict=True):
            asked.clear()
            found = list(read_raw(part, reading, wanted, start))
            assert found == [(number, raw) for number, raw in items if number >= start and number in chosen]
            assert asked == list(range(start, start + len(asked)))  # each once, in order
            assert list(read_raw(part, reading, start=start)) == [item for item in items if item[0] >= start]


def every(step: int):
    return lambda first, count: [number % step == 0 for number in range(first, first + count)]


def test_what_is_not_wanted_is_not_parsed(tmp_path, monkeypatch):
    lines = [b'{"text": "%d"}' % number if number % 100 == 0 else b"{\xff not JSON" for number in range(20_000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    (part,) = text_parts(tmp_path / "a.jsonl")
    items = list(read_raw(part, Reading(), every(100)))
    assert not parsed and len(items) == 200
    assert [parse_text(part, *item, Reading())[1] for item in items] == [
        str(number) for number in range(0, 20_000, 100)
    ]
    assert len(parsed) == 200


def test_a_row_group_of_which_nothing_is_wanted_is_not_read(tmp_path, monkeypatch):
    path = as_parquet(tmp_path)["name"]
    parts = text_parts(path)
    assert [(part.group, part.first) for part in parts] == [(n, 7 * n) for n in range(7)]
    groups = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *given: groups.append((given[2], given[3])) or iter_batches(*given)
    )
    reading = Reading("raw_content")
    wanted = {3: [True] * 7}
    found = []
    for part in parts:
        mask = wanted.get(part.group, [False] * 7)
        found += read_raw(part, reading, lambda first, count, mask=mask: mask[first : first + count])
    assert groups == [([3], ["raw_content"])]
    assert [parse_text(parts[3], *item, reading)[1] for item in found] == TEXTS[21:28]


def test_parts_tell_their_share_of_the_bytes(tmp_path):
    texts_of_sizes = ["a" * 10, *make_sentences(60)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts_of_sizes}), path, row_group_size=20, compression="none", use_dictionary=False
    )
    sizes = [part.size for part in text_parts(path)]
    assert len(sizes) == 4 and sizes[3] < min(sizes[:3])
    assert 0 <= path.stat().st_size - sum(sizes) < 4
    moses(tmp_path)
    (part,) = parallel_parts(tmp_path / "europarl.{en,de}", "de-en")
    assert (part.path.name, part.other.name, part.languages) == ("europarl.de", "europarl.en", ("de", "en"))
    assert part.size == part.path.stat().st_size + part.other.stat().st_size
    (part,) = text_parts(as_saved(tmp_path)["name"])
    assert part.size == sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.arrow")) > 0


def test_other_fields_come_along(tmp_path):
    rows = [{"text": "a", "url": "u", "score": 0.5}, {"text": "b", "url": "v", "score": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "c")
    for name, kept in (
        ("a.jsonl", {"text", "url", "score"}),
        ("b.parquet", {"text", "score"}),
        ("c", {"text", "score"}),
    ):
        reading = Reading(fields=("score", "none"))
        (part,) = text_parts(tmp_path / name)
        parsed = [parse_text(part, number, raw, reading)[2] for number, raw in read_raw(part, reading)]
        assert parsed == [{field: row[field] for field in row if field in kept} for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\nnot JSON\n{"text": "b"}', "a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n{"text": "b"}', "a.jsonl:2: an object is wanted, got list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}', "a.jsonl:2: half a character"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "c"}\n{"text": "b"}', "a.jsonl:2: field 'text' is missing"),
        ("a.json", b'[{"text": "a"}, 3, {"text": "b"}]', "a.json, item 2: an object is wanted, got int"),
        ("a.json", b'[{"text": "a"}, {"text": 3}, {"text": "b"}]', "a.json, item 2: its text is a int"),
        ("a.txt", b"a\n\xff\nb", "a.txt:2: not UTF-8"),
        ("a.txt", "a\n\U000f0001\nb".encode(), r"a.txt:2: character 1 of the text is U\+F0001"),
    ],
)
def test_a_bad_row_costs_no_other(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (part,) = text_parts(tmp_path / name)
    items = list(read_raw(part, Reading()))
    assert [parse_text(part, *items[row], Reading())[1] for row in (0, 2)] == ["a", "b"]
    with pytest.raises(UserError, match=message):
        parse_text(part, *items[1], Reading())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "de\ten\na\tb\nc\nd\te\n", "a.tsv:3: 1 columns, but de, en are wanted"),
        ("a.tsv", b"de\ten\na\tb\nc\t\xff\nd\te\n", "a.tsv:3: not UTF-8"),
        (
            "a.jsonl",
            '{"de": "a", "en": "b"}\n{"de": "c"}\n{"de": "d", "en": "e"}',
            "a.jsonl:2: of de, none are de and",
        ),
        ("a.{de,en}", {"de": b"a\nc\nd\n", "en": b"b\n\xff\ne\n"}, "a.en:2: not UTF-8"),
        ("a.{de,en}", {"de": b"a\n\xf3\xb0\x80\x80\nd\n", "en": b"b\n\ne\n"}, "a.de:2, source: character 1 of"),
    ],
)
def test_a_bad_pair_costs_no_other(tmp_path, name, content, message):
    for ending, data in content.items() if isinstance(content, dict) else [("", content)]:
        path = tmp_path / (f"a.{ending}" if ending else name)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    reading = Reading(direction="de-en", parallel=True)
    (part,) = parallel_parts(tmp_path / name, "de-en")
    items = list(read_raw(part, reading))
    good = [parse_parallel(part, *items[row], reading)[1] for row in (0, 2)]
    assert [(row["source"], row["target"]) for row in good] == [("a", "b"), ("d", "e")]
    with pytest.raises(UserError, match=message):
        parse_parallel(part, *items[1], reading)


def test_a_bad_row_of_parquet_costs_no_other(tmp_path):
    """Other writers than pyarrow do not look whether texts are UTF-8."""
    column = pa.array([b"a", b"\xff", None, b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (part,) = text_parts(tmp_path / "a.parquet")
    items = pickle.loads(pickle.dumps(list(read_raw(part, Reading()))))
    assert [parse_text(part, *items[row], Reading())[1] for row in (0, 3)] == ["a", "b"]
    for item, message in ((items[1], "a.parquet, row 2: not UTF-8"), (items[2], "a.parquet, row 3: it has no text")):
        with pytest.raises(UserError, match=message):
            parse_text(part, *item, Reading())


def test_what_is_wrong_with_a_file_shows_while_it_is_read(tmp_path):
    """Though nothing of it is wanted."""
    moses(tmp_path)
    with open(tmp_path / "europarl.en", "a") as file:
        file.write("one more\n")
    (part,) = parallel_parts(tmp_path / "europarl.{de,en}")
    with pytest.raises(UserError, match=r"europarl\.de has 40 lines, \S*europarl\.en has more"):
        list(read_raw(part, Reading(parallel=True), lambda first, count: [False] * count))
    lines = "".join(f"{i} {text}\n" for i, text in enumerate(TEXTS * 2000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.txt").write_text('\n{"text": "a"}\n')
    (tmp_path / "c.jsonl").write_text("[1, 2")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"\n \n"))
    (tmp_path / "e.json").write_text("[]\n")
    cut(tmp_path / "a.txt.gz")
    for name, message in (
        ("a.txt.gz", "a.txt.gz is cut short or damaged"),
        ("b.txt", "b.txt:2: JSON, but the file's name"),
        ("c.jsonl", "c.jsonl:1: not JSON"),
        ("d.jsonl.gz", "d.jsonl.gz holds no rows"),
        ("e.json", "e.json holds no rows"),
    ):
        (part,) = text_parts(tmp_path / name)
        with pytest.raises(UserError, match=message):
            list(read_raw(part, Reading(), lambda first, count: [False] * count))


def test_the_packed_side_that_was_cut_is_named(tmp_path):
    """Of two, which are open at once."""
    lines = "".join(f"{number} line\n" for number in range(50_000)).encode()
    for code in ("de", "en"):
        (tmp_path / f"a.{code}.gz").write_bytes(gzip.compress(lines))
    for code in ("en", "de"):
        cut(tmp_path / f"a.{code}.gz", 0.9)
        with pytest.raises(UserError, match=rf"a\.{code}\.gz is cut short or damaged"):
            list(iter_parallel(tmp_path / "a.{de,en}.gz"))
        (tmp_path / f"a.{code}.gz").write_bytes(gzip.compress(lines))


def test_units_are_no_text(tmp_path):
    row = {"id": "a", "audio": "a.wav", "language": "en", "duration_s": 1.0, "units": [1, 2], "text": "a"}
    write_units(tmp_path / "units-00000-of-00001.parquet", [row])
    with pytest.raises(UserError, match=r"units-\S+: these are units of speech\n.*kind: speech"):
        text_parts(tmp_path)


def test_blank_lines_are_those_that_strip_leaves_nothing_of():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for character in characters:
        line = f" {character}\r\n"
        assert bool(texts.BLANK.match(line.encode())) == (not line.strip()), hex(ord(character))
    assert texts.BLANK.match(" \u3000\xa0\t\n".encode()) and not texts.BLANK.match(" \u3000\xa0x\n".encode())


# --- The hub --------------------------------------------------------------------------------------
def test_a_data_set_of_the_hub_has_configurations_and_splits(tmp_path):
    """A folder stands in for it: the datasets library reads it alike."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: de\n  data_files:\n  - {split: train, path: de/train.parquet}\n"
        "  - {split: test, path: de/test.parquet}\n"
        "- config_name: fr\n  data_files: fr.parquet\n---\n"
    )
    (tmp_path / "de").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": [f"{split} 1", f"{split} 2"]}), tmp_path / f"de/{split}.parquet")
    pq.write_table(pa.table({"text": ["un"]}), tmp_path / "fr.parquet")
    for config, found in ((":de", ["train 1", "train 2"]), (":de:test", ["test 1", "test 2"]), (":fr", ["un"])):
        name = f"hub:{tmp_path}{config}"
        assert [str(path) for path in expand(name)] == [name]
        assert list(iter_texts(Path(name))) == [(f"{name}, row {n}", text) for n, text in enumerate(found, 1)]
    for wrong, message in (("", "Config name is missing"), (":de:dev", "Bad split: dev"), (":it", "'it' not found")):
        with pytest.raises(UserError, match=rf"hub:{tmp_path}{wrong}: the hub did not give it \(.*{message}"):
            list(iter_texts(f"hub:{tmp_path}{wrong}"))
    with pytest.raises(UserError, match=rf"hub:{tmp_path}:fr: field 'none' is missing, there are text"):
        list(iter_texts(f"hub:{tmp_path}:fr", "none"))


@pytest.mark.parametrize("write", [translations, translations_the_other_way], ids=["jsonl", "parquet"])
def test_pairs_of_the_hub(tmp_path, write):
    write(tmp_path)
    rows = [row for _, row in iter_parallel(f"hub:{tmp_path}", "de-en")]
    assert [(row["source"], row["target"]) for row in rows] == PAIRS


def test_without_a_network_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=re.escape("hub:nobody/nothing:de: the hub did not give it (")) as error:
        list(iter_texts("hub:nobody/nothing:de"))
    assert "HF_HUB_OFFLINE" in str(error.value)
