"""JSONL, line files and units Parquet: round trips, and bad rows named by file and line."""

import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from towerspeech import records, units
from towerspeech.stage import UserError

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
ROW = {"id": "u1", "audio": "a/1.wav", "language": "en", "duration_s": 1.5, "units": [0, 4999, 7], "text": "Héllo."}


# --- JSONL ----------------------------------------------------------------------------------------
def test_jsonl_round_trip_keeps_every_character(tmp_path):
    rows = [{"id": "1", "text": "a\u2028b\x85\n\U000f0000"}, {"id": "2", "text": ""}]
    assert records.write_jsonl(tmp_path / "a.jsonl", iter(rows)) == 2
    assert records.read_jsonl(tmp_path / "a.jsonl", ["id", "text"]) == rows
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2
    assert [where for where, _ in records.iter_jsonl(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
    ]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    records.write_jsonl(tmp_path / "a.jsonl", [{"id": 1}])

    def rows():
        yield {"id": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        records.write_jsonl(tmp_path / "a.jsonl", rows())
    assert records.read_jsonl(tmp_path / "a.jsonl") == [{"id": 1}]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_originals_json_lists_are_read(tmp_path):
    rows = [{"instruction": "Übersetze", "output": "x"}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    assert records.read_jsonl(tmp_path / "a.json", ["instruction", "output"]) == rows


@pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")
def test_all_sample_files_of_the_original_are_read():
    paths = sorted((Path(DATA) / "original_instructions").glob("*/*.json"))
    assert len(paths) == 7
    assert all(len(records.read_jsonl(path, ["instruction", "output"])) == 5 for path in paths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1}\n{"id": 2\n{"id": 3}\n', r"a\.jsonl:2: not JSON"),
        (b'{"id": 1}\n\n{"ID": 3}\n', r"a\.jsonl:3: field 'id' is missing"),
        (b'{"id": 1}\n{"id": "\\ud83d"}\n', r"a\.jsonl:2: half a character \(the lone surrogate \\ud83d\)"),
        (b'{"id": "\\ud83d\\ude00"}\n{"id": "\\uDE00\\uD83D"}\n', r"a\.jsonl:2: half a character"),
        (b'{"id": 1, "\\udfff": 2}\n', r"a\.jsonl:1: half a character"),
        (b'[{"id": 1},\n {"id": ["\\ud800"]}]', r"a\.jsonl:1: half a character"),
        (b'{"id": 1}\n{"id": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: not JSON that can be read"),
        (b"\xef\xbb\xbf \n\n", r"a\.jsonl holds no rows"),
        (b'{"id": 1}\n{"id": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        (b'{"id": 1}\n[1, 2]\n', r"a\.jsonl:2: an object is wanted, got list"),
        (b'{"id": 1}\n{"ID": 2}\n', r"a\.jsonl:2: field 'id' is missing\n.*every row needs: id"),
        (b'{"id": 1}\n{"id": 2}\n{"id": ', r"a\.jsonl:3: not JSON"),
        (b'[{"id": 1},\n {"ID": 2}]', r"a\.jsonl, item 2: field 'id' is missing"),
        (b'[{"id": 1},\n {"id": ]', r"a\.jsonl:2: not JSON"),
        (b"", r"a\.jsonl is empty"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.read_jsonl(tmp_path / "a.jsonl", ["id"])


@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf", b"\n\n", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize(
    "content", [b'{"id": 1}\n\n \t\r\n{"id": "\\\\ud83d"}\n\n', b'[{"id": 1},\n{"id": "\\\\ud83d"}]']
)
def test_a_bom_and_blank_lines_are_no_rows(tmp_path, beginning, content):
    (tmp_path / "a.jsonl").write_bytes(beginning + content)
    assert records.read_jsonl(tmp_path / "a.jsonl") == [{"id": 1}, {"id": "\\ud83d"}]


def test_rows_keep_the_numbers_of_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"id": 1}\n\n{"id": 2}\n')
    assert [where.rpartition(":")[2] for where, _ in records.iter_jsonl(tmp_path / "a.jsonl")] == ["2", "4"]


def test_a_folder_is_no_file(tmp_path):
    for read in (records.read_jsonl, records.read_lines, lambda path: list(records.iter_parallel(path))):
        with pytest.raises(UserError, match="is a folder, but a file is wanted"):
            read(tmp_path)


PAIR = {"src_lang": "en", "tgt_lang": "de", "source": "a", "target": "b"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tgt_lang": "xx"}, r"a\.jsonl:3001: unknown language 'xx' as tgt_lang"),
        ({"src_lang": "DE"}, r"a\.jsonl:3001: unknown language 'DE' as src_lang"),
        ({"src_lang": ["en"]}, r"a\.jsonl:3001: src_lang is \['en'\], but it must be text"),
        ({"tgt_lang": "en"}, r"a\.jsonl:3001: src_lang and tgt_lang are both 'en'"),
        ({"source": None}, r"a\.jsonl:3001: source is None, but"),
        ({"target": 3}, r"a\.jsonl:3001: target is 3, but"),
        ({"target": "an icon \U000f0005"}, r"a\.jsonl:3001, target: character 9 of the text is U\+F0005"),
        ({"source": "\U000fffff"}, r"a\.jsonl:3001, source: character 1 of the text is U\+FFFFF"),
    ],
)
def test_a_wrong_pair_is_named_by_line(tmp_path, wrong, message):
    records.write_jsonl(tmp_path / "a.jsonl", [PAIR] * 3000 + [{**PAIR, **wrong}])
    pairs = records.iter_parallel(tmp_path / "a.jsonl")
    assert [next(pairs)[1] for _ in range(3000)] == [PAIR] * 3000
    with pytest.raises(UserError, match=message):
        next(pairs)


def test_a_missing_file(tmp_path):
    for read in (records.read_jsonl, records.read_lines):
        with pytest.raises(UserError, match="none does not exist"):
            read(tmp_path / "none")


# --- Lines ----------------------------------------------------------------------------------------
def test_only_newlines_end_a_line(tmp_path):
    (tmp_path / "a").write_bytes("a\u2028b\x0bc\r\n\nlast".encode())
    assert records.read_lines(tmp_path / "a") == ["a\u2028b\x0bc", "", "last"]
    (tmp_path / "a").write_bytes(b"a\n\n")
    assert records.read_lines(tmp_path / "a") == ["a", ""]
    (tmp_path / "a").write_bytes(
        b"\xef\xbb\xbf\na\n\n\xef\xbb\xbfb\n"
    )  # blank lines are lines; only a first BOM is one
    assert records.read_lines(tmp_path / "a") == ["", "a", "", "\ufeffb"]
    (tmp_path / "a").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        records.read_lines(tmp_path / "a")


@pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")
def test_line_counts_of_flores_and_wmt23():
    sizes = {path.name: len(records.read_lines(path)) for path in (Path(DATA) / "flores200/devtest").iterdir()}
    assert len(sizes) == 10 and set(sizes.values()) == {1012}
    for pair, size in (("de-en", 549), ("en-de", 557), ("en-ru", 2074), ("zh-en", 1976)):
        for path in (Path(DATA) / "wmt23").glob(f"generaltest2023.{pair}.*"):
            assert len(records.read_lines(path)) == size


# --- Units ----------------------------------------------------------------------------------------
def write_shards(folder: Path, sizes=(3, 0, 2)) -> Path:
    folder.mkdir()
    for shard, size in enumerate(sizes):
        rows = [{**ROW, "id": f"{shard}-{i}"} for i in range(size)]
        records.write_units(folder / f"{records.shard_name(shard, len(sizes))}.parquet", rows)
    return folder


def test_units_round_trip_in_order(tmp_path):
    folder = write_shards(tmp_path / "units")
    rows = list(records.read_units(folder, num_units=5000))
    assert [row["id"] for row in rows] == ["0-0", "0-1", "0-2", "2-0", "2-1"]
    assert rows[0] == {**ROW, "id": "0-0"}
    shard = folder / "units-00000-of-00003.parquet"
    assert list(records.read_units(shard)) == rows[:3]
    assert str(pq.read_schema(shard).field("units").type.value_type) == "uint16"
    assert tuple(pq.read_schema(shard).names) == records.UNIT_COLUMNS


def test_same_rows_same_bytes(tmp_path):
    a, b = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    assert all(path.read_bytes() == (b / path.name).read_bytes() for path in a.iterdir())


def test_incomplete_and_mixed_shards_are_refused(tmp_path):
    folder = write_shards(tmp_path / "units")
    (folder / "units-00001-of-00003.parquet").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"units holds 2 of 3 shards\n.*label_audio\.py for the missing"):
        list(records.read_units(folder))
    (tmp_path / "away").rename(folder / "units-00001-of-00004.parquet")
    with pytest.raises(UserError, match=r"3 of 4 shards, of sets of different sizes \[3, 4\]"):
        list(records.read_units(folder))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds no units-\*-of-\*\.parquet"):
        list(records.read_units(folder))
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(records.read_units(tmp_path / "nowhere"))


def test_a_unit_out_of_range_is_named_by_file_and_row(tmp_path):
    folder = write_shards(tmp_path / "units")
    with pytest.raises(
        UserError, match=r"00000-of-00003\.parquet, row 1 \(id 0-0\): unit id 4999 is outside 0\.\.499"
    ):
        list(records.read_units(folder, num_units=500))


def test_a_null_among_units_is_named_by_file_and_row(tmp_path):
    rows = [{**dict.fromkeys(records.UNIT_COLUMNS), "units": units} for units in ([1, 2], [1, None, 2])]
    records.write_units(tmp_path / "units-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="units-00000-of-00001.parquet, row 2: a unit is null"):
        list(records.read_unit_texts(tmp_path, 50))


def test_unit_texts_are_those_of_the_rows(tmp_path):
    generator = random.Random(0)
    rows = [
        {
            "id": str(i),
            "audio": "",
            "language": "en",
            "duration_s": 0.0,
            "text": "",
            "units": generator.choices(range(60), k=i % 7),
        }
        for i in range(2500)
    ]
    for shard in range(2):
        records.write_units(tmp_path / f"{records.shard_name(shard, 2)}.parquet", rows[shard::2])
    texts = [units.to_text(row["units"], 990000) for row in records.read_units(tmp_path)]
    assert list(records.read_unit_texts(tmp_path, 60, offset=990000)) == texts
    with pytest.raises(UserError) as wanted:
        list(records.read_units(tmp_path, 59))
    with pytest.raises(UserError) as got:
        list(records.read_unit_texts(tmp_path, 59))
    assert str(got.value) == str(wanted.value) and "unit id 59" in str(got.value)


def test_another_kind_of_file_is_refused(tmp_path):
    import pyarrow as pa

    path = tmp_path / "units-00000-of-00001.parquet"
    path.write_text("no Parquet at all")
    with pytest.raises(UserError, match="is no units Parquet"):
        list(records.read_units(tmp_path))
    pq.write_table(pa.table({"id": ["a"], "units": [[1]]}), path)
    with pytest.raises(UserError, match="lacks audio, duration_s, language, text"):
        list(records.read_units(tmp_path))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("list<double>", [[1.0], [3.7]], "units is of type list<.*double>, but lists of integers are wanted"),
        ("list<double>", [[1.0], [float("nan")]], "lists of integers are wanted"),
        ("list<string>", [["1"], ["3"]], "lists of integers are wanted"),
        ("list<bool>", [[True], [False]], "lists of integers are wanted"),
        ("int64", [1, 2], "units is of type int64, but lists of integers are wanted"),
        ("list<int64>", [[1], [2**32 + 3]], r"row 2 \(id b\): unit id 4294967299 is outside 0\.\.49"),
        ("list<int64>", [[1], [2**16 + 3]], r"row 2 \(id b\): unit id 65539 is outside 0\.\.49"),
        ("list<int32>", [[1, 2], [7, -1]], r"row 2 \(id b\): unit id -1 is outside 0\.\.49"),
        ("list<uint64>", [[1], [2**64 - 1]], r"row 2 \(id b\): unit id 18446744073709551615 is outside"),
        ("list<int64>", [[1], None], r"00001\.parquet, row 2: units is null"),
        ("large_list<int8>", [[1], [2, 49]], None),
        ("fixed<int32>", [[1, 1], [2, 49]], None),
    ],
)
def test_units_are_lists_of_integers_of_any_width(tmp_path, kind, rows, message):
    import pyarrow as pa

    value = {name: getattr(pa, name) for name in ("string", "int8", "int32", "int64", "uint64")}
    value |= {"double": pa.float64, "bool": pa.bool_}
    outer, _, inner = kind.rstrip(">").partition("<")
    lists = {"list": pa.list_, "large_list": pa.large_list, "fixed": lambda inner: pa.list_(inner, 2)}
    units_type = lists[outer](value[inner]()) if inner else pa.int64()
    texts = pa.array(["a", "b"])
    columns = dict.fromkeys(("id", "audio", "language", "text"), texts) | {"duration_s": pa.array([1.0, 1.0])}
    path = tmp_path / "units-00000-of-00001.parquet"
    pq.write_table(pa.table({**columns, "units": pa.array(rows, units_type)}), path)
    if message is None:
        assert [row["units"] for row in records.read_units(path, 50)] == rows
        [(flat, ends, *_)] = records.read_unit_arrays(path, 50)
        assert flat.tolist() == [unit for row in rows for unit in row] and ends.tolist()[-1] == len(flat)
        return
    for read in (records.read_units, records.read_unit_arrays, records.read_unit_texts):
        with pytest.raises(UserError, match=message):
            list(read(path, 50))


def test_a_cut_off_parquet_file_is_named(tmp_path):
    path = write_shards(tmp_path / "units", (3,)) / "units-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="00001.parquet is no units Parquet that can be read"):
        list(records.read_units(path))
