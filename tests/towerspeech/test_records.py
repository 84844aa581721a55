"""JSONL, line files and units Parquet: round trips, and bad rows named by file and line."""

import itertools
import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from towerspeech import records
from towerspeech.errors import UserError
from towerspeech.units_parquet import (
    UNIT_COLUMNS,
    check_one_kmeans,
    read_unit_arrays,
    read_unit_texts,
    read_units,
    shard_name,
    write_units,
)

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
ROW = {"id": "u1", "audio": "a/1.wav", "language": "en", "duration_s": 1.5, "units": [0, 4999, 7], "text": "Héllo."}


# --- JSONL ----------------------------------------------------------------------------------------
def test_jsonl_round_trip_keeps_every_character(tmp_path):
    rows = [{"id": "1", "text": "a\u2028b\x85\n\U000f0000"}, {"id": "2", "text": ""}]
    assert records.write_jsonl(tmp_path / "a.jsonl", iter(rows)) == 2
    assert records.read_jsonl(tmp_path / "a.jsonl", ["id", "text"]) == rows
    lines = '{"id": "1", "text": "a\u2028b\x85\\n\U000f0000"}\n{"id": "2", "text": ""}\n'
    assert (tmp_path / "a.jsonl").read_bytes() == lines.encode()
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
        (b'[{"id": 1},\n {"id": "\xff"}]', r"a\.jsonl:2: not UTF-8"),
        (b"", r"a\.jsonl is empty"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.read_jsonl(tmp_path / "a.jsonl", ["id"])


@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf", b"\n\n", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize(
    "content", [b'{"id": 1}\n\n \t\r\n\xef\xbb\xbf{"id": "\\\\ud83d"}\n\n', b'[{"id": 1},\n{"id": "\\\\ud83d"}]']
)
def test_a_bom_and_blank_lines_are_no_rows(tmp_path, beginning, content):
    (tmp_path / "a.jsonl").write_bytes(beginning + content)
    assert records.read_jsonl(tmp_path / "a.jsonl") == [{"id": 1}, {"id": "\\ud83d"}]


def test_rows_keep_the_numbers_of_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"id": 1}\n\n{"id": 2}\n')
    assert [where.rpartition(":")[2] for where, _ in records.iter_jsonl(tmp_path / "a.jsonl")] == ["2", "4"]


def test_a_folder_is_no_file(tmp_path):
    for read in (records.read_jsonl, records.read_lines):
        with pytest.raises(UserError, match="is a folder, but a file is wanted"):
            read(tmp_path)


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
        paths = list((Path(DATA) / "wmt23").glob(f"generaltest2023.{pair}.*"))
        assert paths and {len(records.read_lines(path)) for path in paths} == {size}


# --- Units ----------------------------------------------------------------------------------------
def write_shards(folder: Path, sizes=(3, 0, 2)) -> Path:
    folder.mkdir()
    for shard, size in enumerate(sizes):
        rows = [{**ROW, "id": f"{shard}-{i}"} for i in range(size)]
        write_units(folder / f"{shard_name(shard, len(sizes))}.parquet", rows)
    return folder


def test_units_round_trip_in_order(tmp_path):
    folder = write_shards(tmp_path / "units")
    rows = list(read_units(folder, num_units=5000))
    assert [row["id"] for row in rows] == ["0-0", "0-1", "0-2", "2-0", "2-1"]
    assert rows[0] == {**ROW, "id": "0-0"}
    shard = folder / "units-00000-of-00003.parquet"
    assert list(read_units(shard)) == rows[:3]
    assert str(pq.read_schema(shard).field("units").type.value_type) == "uint16"
    assert tuple(pq.read_schema(shard).names) == UNIT_COLUMNS


def test_pyarrow_reads_what_is_written(tmp_path):
    row = {**ROW, "units": [0, 65533]}  # the largest unit id
    write_units(tmp_path / "a.parquet", [row, {**row, "id": "u2", "units": []}])
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [row, {**row, "id": "u2", "units": []}]
    with pytest.raises(ValueError, match="65536 too large"):
        write_units(tmp_path / "b.parquet", [{**row, "units": [65536]}])


def test_same_rows_same_bytes(tmp_path):
    a, b = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    paths = sorted(a.iterdir())
    names = ["units-00000-of-00003.parquet", "units-00001-of-00003.parquet", "units-00002-of-00003.parquet"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes() == (b / path.name).read_bytes() for path in paths)


def test_incomplete_and_mixed_shards_are_refused(tmp_path):
    folder = write_shards(tmp_path / "units")
    (folder / "units-00001-of-00003.parquet").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"units holds 2 of 3 shards\n.*label_audio\.py for the missing"):
        list(read_units(folder))
    (tmp_path / "away").rename(folder / "units-00001-of-00004.parquet")
    with pytest.raises(UserError, match=r"3 of 4 shards, of sets of different sizes \[3, 4\]"):
        list(read_units(folder))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds no units-\*-of-\*\.parquet"):
        list(read_units(folder))
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(read_units(tmp_path / "nowhere"))


def test_a_unit_out_of_range_is_named_by_file_and_row(tmp_path):
    folder = write_shards(tmp_path / "units")
    with pytest.raises(
        UserError, match=r"00000-of-00003\.parquet, row 1 \(id 0-0\): unit id 4999 is outside 0\.\.499"
    ):
        list(read_units(folder, num_units=500))


def test_a_null_among_units_is_named_by_file_and_row(tmp_path):
    rows = [{**dict.fromkeys(UNIT_COLUMNS), "units": units} for units in ([1, 2], [1, None, 2])]
    write_units(tmp_path / "units-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="units-00000-of-00001.parquet, row 2: a unit is null"):
        list(read_unit_texts(tmp_path, 50))


def many_rows(units: dict[int, object]) -> list[dict]:
    """3000 rows of units, counted from 0, of which some are given."""
    generator = random.Random(0)
    rows = [{**ROW, "id": str(i), "units": generator.choices(range(50), k=i % 7)} for i in range(3000)]
    for row, given in units.items():
        rows[row]["units"] = given
    return rows


def test_unit_texts_are_those_of_the_rows(tmp_path):
    rows = many_rows({})
    for shard in range(2):
        write_units(tmp_path / f"units-0000{shard}-of-00002.parquet", rows[shard * 1700 :][:1700])
    assert list(read_units(tmp_path, 50)) == rows
    texts = ["".join(chr(990000 + unit) for unit in row["units"]) for row in rows]
    assert list(read_unit_texts(tmp_path, 50, offset=990000)) == texts
    assert list(read_unit_texts(tmp_path, 50)) == [text.translate(MOVED) for text in texts]
    flat, starts = [], []
    for units, ends, batch, _ in read_unit_arrays(tmp_path, 50, ["text"]):
        assert units.dtype == "<u4" and ends.dtype == "int64" and len(ends) == len(batch) == len(batch["text"])
        starts += [len(flat) + end for end in ends]
        flat += units.tolist()
    assert flat == [unit for row in rows for unit in row["units"]]
    assert starts == list(itertools.accumulate(len(row["units"]) for row in rows))


MOVED = {990000 + unit: 0xF0000 + unit for unit in range(50)}


@pytest.mark.parametrize("read", [read_units, read_unit_arrays, read_unit_texts])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({2047: [3, 50]}, r"row 2048 \(id 2047\): unit id 50 is outside 0\.\.49\n"),
        ({2048: [50], 2047: [0, 49]}, r"row 2049 \(id 2048\): unit id 50 is outside 0\.\.49\n"),
        ({1023: [1, 60000], 2500: [50]}, r"row 1024 \(id 1023\): unit id 60000 is outside 0\.\.49\n"),
        ({1024: [51, 60000, 50]}, r"row 1025 \(id 1024\): unit id 51 is outside 0\.\.49\n"),
        ({2100: [], 2101: [], 2102: [50], 2103: []}, r"row 2103 \(id 2102\): unit id 50 is outside 0\.\.49\n"),
        ({1024: None, 1500: None}, r"row 1025: units is null\n"),
        ({2999: [1, None]}, r"row 3000: a unit is null\n"),
        ({1023: [], 1024: [None], 1025: [None]}, r"row 1025: a unit is null\n"),
    ],
)
def test_a_bad_row_is_named_wherever_it_is(tmp_path, read, bad, message):
    """Rows are read 1024 at a time."""
    for shard, rows in enumerate((many_rows({})[:1500], many_rows(bad))):
        write_units(tmp_path / f"units-0000{shard}-of-00002.parquet", rows)
    with pytest.raises(UserError, match=rf"units-00001-of-00002\.parquet, {message}"):
        list(read(tmp_path, 50))


@pytest.mark.parametrize("row_group_size", [3000, 700, 1])
def test_a_row_is_named_to_whom_reads_arrays(tmp_path, row_group_size):
    import pyarrow as pa

    table = pa.Table.from_pylist(many_rows({}))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=row_group_size)  # as others may write it
    batches = [(place, len(ends)) for _, ends, _, place in read_unit_arrays(tmp_path / "a.parquet", 50)]
    places = [place(row) for place, rows in batches for row in range(rows)]
    assert len(batches) > 2 and places == [f"{tmp_path}/a.parquet, row {i + 1} (id {i})" for i in range(3000)]


def test_units_of_different_kmeans_are_told_apart(tmp_path):
    """By what label_audio.py has noted, of which the first k-means is what counts; other files are let through."""
    for name, kmeans in (("a", ["one"]), ("b", ["one"]), ("c", ["two"]), ("d", None)):
        folder = write_shards(tmp_path / name, (1, 1))
        for shard in range(2 if kmeans else 0):
            inputs = {"manifest": [name], "kmeans": kmeans}
            (folder / f"units-0000{shard}-of-00002.run_info.json").write_text(json.dumps({"inputs": inputs}))
    (tmp_path / "e.km").write_text("1 2\n")
    folders = [tmp_path / name for name in ("a", "b", "d", "e.km")]
    check_one_kmeans(folders)
    check_one_kmeans([])
    for other in (tmp_path / "c", tmp_path / "c/units-00001-of-00002.parquet"):
        with pytest.raises(UserError, match=rf"{tmp_path}/a and {other} were labelled with different k-means"):
            check_one_kmeans([*folders, other])
    info = tmp_path / "b/units-00001-of-00002.run_info.json"  # one shard of a folder is enough
    info.write_text(info.read_text().replace("one", "three"))
    with pytest.raises(UserError, match="were labelled with different k-means"):
        check_one_kmeans([tmp_path / "b"])


def test_another_kind_of_file_is_refused(tmp_path):
    import pyarrow as pa

    path = tmp_path / "units-00000-of-00001.parquet"
    path.write_text("no Parquet at all")
    with pytest.raises(UserError, match="is no units Parquet"):
        list(read_units(tmp_path))
    pq.write_table(pa.table({"id": ["a"], "units": [[1]]}), path)
    with pytest.raises(UserError, match="lacks audio, duration_s, language, text"):
        list(read_units(tmp_path))


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
        assert [row["units"] for row in read_units(path, 50)] == rows
        [(flat, ends, *_)] = read_unit_arrays(path, 50)
        assert flat.tolist() == [unit for row in rows for unit in row] and ends.tolist()[-1] == len(flat)
        return
    for read in (read_units, read_unit_arrays, read_unit_texts):
        with pytest.raises(UserError, match=message):
            list(read(path, 50))


def test_a_cut_off_parquet_file_is_named(tmp_path):
    path = write_shards(tmp_path / "units", (3,)) / "units-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="00001.parquet is no units Parquet that can be read"):
        list(read_units(path))
