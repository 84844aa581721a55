"""Units from elsewhere and back, against pyarrow, json and files as fairseq, textlesslib and slamkit write them."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speech_units.export_units import export_units
from speech_units.import_units import import_units
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.units_parquet import read_units, shard_name, write_units

UNITS = [[17, 17, 17, 296, 20, 20, 461], [], [499, 0, 0], [5], [8, 9, 8, 9]]
IDS = ["84-1-0000", "84-1-0001", "é ü", "b", "a"]
TEXTS = ["HE SAID", "", "Ünïcode, “quoted”", 'tab\\t and "', "last"]
SAMPLES = [48000, 16001, 399, 0, 7]


def dump_km(path: Path, units: list[list[int]]) -> None:
    """As fairseq's dump_km_label.py does."""
    with open(path, "w") as file:
        for ids in units:
            file.write(" ".join(map(str, ids)) + "\n")


@pytest.fixture
def files(tmp_path):
    """The five utterances in every form that is read."""
    dump_km(tmp_path / "u.km", UNITS)
    (tmp_path / "u.ids").write_text("\n".join(IDS) + "\n", encoding="utf-8")
    (tmp_path / "u.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    paths = [f"{name[:2]}/{name}.flac" for name in IDS]
    tsv = ["/data/root", *(f"{path}\t{samples}" for path, samples in zip(paths, SAMPLES, strict=True))]
    (tmp_path / "u.tsv").write_text("\n".join(tsv) + "\n", encoding="utf-8")
    with open(tmp_path / "u.jsonl", "w", encoding="utf-8") as file:
        for name, path, text, samples in zip(IDS, paths, TEXTS, SAMPLES, strict=True):
            row = {"id": name, "audio": path, "language": "en", "text": text, "duration_s": samples / 16000}
            file.write(json.dumps(row) + "\n")
    return tmp_path


def table(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def written(folder: Path) -> list[Path]:
    """All that lies in a folder but the stage's note and its lock."""
    notes = (".unfinished.json", ".folder.lock")
    return [path for path in folder.glob("*") if path.name not in notes]


def wanted(collapse: bool = True, **columns) -> list[dict]:
    units = [[unit for unit, _ in itertools.groupby(ids)] for ids in UNITS] if collapse else UNITS
    columns = {
        "id": IDS,
        "audio": [f"{name[:2]}/{name}.flac" for name in IDS],
        "language": ["en"] * 5,
        "duration_s": [samples / 16000 for samples in SAMPLES],
        "units": units,
        "text": TEXTS,
    } | columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# --- What is read ---------------------------------------------------------------------------------
@pytest.mark.parametrize("collapse", [True, False])
def test_manifest_tsv_and_ids(files, collapse, capsys):
    km = files / "u.km"
    import_units(km, files / "m", 500, manifest=files / "u.jsonl", collapse=collapse)
    import_units(km, files / "t", 500, tsv=files / "u.tsv", texts=files / "u.txt", language="en", collapse=collapse)
    assert table(files / "m") == wanted(collapse) == list(read_units(files / "t", 500))
    import_units(km, files / "i", 500, ids=files / "u.ids", language="de", collapse=collapse)
    none = {"audio": [""] * 5, "duration_s": [None] * 5, "text": [""] * 5, "language": ["de"] * 5}
    assert table(files / "i") == wanted(collapse, **none)
    (files / "other.ids").write_text("1\n2\n3\n4\n5")  # no newline at the end
    import_units(km, files / "o", 500, tsv=files / "u.tsv", ids=files / "other.ids", language="en", collapse=collapse)
    assert table(files / "o") == wanted(collapse, id=list("12345"), text=[""] * 5)
    said = "5 utterances, 11 units; 4 consecutive repeats dropped" if collapse else "15 units; no repeats dropped"
    assert capsys.readouterr().out.count(said) == 4
    counts = json.loads((files / "m/run_info.json").read_text())["counts"]
    assert counts == {"utterances": 5, "units_read": 15, "units": 11 if collapse else 15}


def test_the_bytes_are_those_that_label_audio_would_write(files):
    import_units(files / "u.km", files / "o", 500, manifest=files / "u.jsonl", num_shards=2)
    rows = wanted()
    for index, part in enumerate((rows[:2], rows[2:])):  # label_audio.py's shards
        write_units(files / "wanted.parquet", part)
        assert hash_file(files / f"o/{shard_name(index, 2)}.parquet") == hash_file(files / "wanted.parquet")


def test_durations_of_segments(files):
    parts = [{"start_s": 1.5, "end_s": 4}, {"start_s": 2}, {"start_s": 2, "duration_s": 3.5}, {"duration": 2}, {}]
    rows = [json.loads(line) for line in (files / "u.jsonl").read_text().splitlines()]
    del rows[1]["duration_s"], rows[3]["duration_s"], rows[4]["duration_s"]
    lines = [json.dumps(row | part | {"audio": "x.tar"}) for row, part in zip(rows, parts, strict=True)]
    (files / "s.jsonl").write_text("\n".join(lines))
    import_units(files / "u.km", files / "o", 500, manifest=files / "s.jsonl")
    assert [row["duration_s"] for row in table(files / "o")] == [2.5, None, 3.5, 2.0, None]


@pytest.mark.parametrize("kind", ["textlesslib", "slamkit"])
def test_units_with_names_go_by_them(files, kind):
    order = [3, 0, 4, 2, 1]  # slamkit writes the longest first, textlesslib's processes take turns
    path = files / ("n.jsonl" if kind == "slamkit" else "n.units")
    with open(path, "w", encoding="utf-8") as file:
        for i in order:
            if kind == "slamkit":
                runs = [(unit, len([*run])) for unit, run in itertools.groupby(UNITS[i])]
                units, durations = [unit for unit, _ in runs], [length for _, length in runs]
                row = {"units": units, "duration": durations, "file_name": f"../x/{IDS[i]}.flac"}
                file.write(json.dumps(row) + "\n")
            else:
                print(f"{IDS[i]}\t{' '.join(map(str, UNITS[i]))}", file=file)
    import_units(path, files / "m", 500, manifest=files / "u.jsonl")
    assert table(files / "m") == [wanted()[i] for i in order]
    import_units(path, files / "o", 500, language="en")
    audio = [f"../x/{name}.flac" if kind == "slamkit" else "" for name in IDS]
    alone = wanted(duration_s=[None] * 5, text=[""] * 5, audio=audio)
    assert table(files / "o") == [alone[i] for i in order]
    more = (files / "u.jsonl").read_text() + json.dumps(wanted()[0] | {"id": "more"})
    (files / "more.jsonl").write_text(more)
    with pytest.raises(UserError, match="more.jsonl has 6 utterances, but .* 5"):
        import_units(path, files / "p", 500, manifest=files / "more.jsonl")
    (files / "less.jsonl").write_text("\n".join((files / "u.jsonl").read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=f"{path.name}:3: .*less.jsonl has no id 'a'"):
        import_units(path, files / "p", 500, manifest=files / "less.jsonl")
    assert written(files / "p") == []


# --- Round trips ----------------------------------------------------------------------------------
@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_km_to_parquet_and_back_and_again(files, num_shards):
    more = {"manifest": files / "u.jsonl", "collapse": False, "num_shards": num_shards}
    import_units(files / "u.km", files / "p", 500, **more)
    export_units(files / "p", files / "e")
    assert (files / "e/units.km").read_bytes() == (files / "u.km").read_bytes()
    exported = [json.loads(line) for line in (files / "e/utterances.jsonl").read_text(encoding="utf-8").splitlines()]
    assert exported == [json.loads(line) for line in (files / "u.jsonl").read_text().splitlines()]
    import_units(files / "e/units.km", files / "q", 500, **more | {"manifest": files / "e/utterances.jsonl"})
    shards = sorted((files / "p").glob("*.parquet"))
    assert [path.name for path in shards] == [f"{shard_name(i, num_shards)}.parquet" for i in range(num_shards)]
    assert [hash_file(path) for path in shards] == [hash_file(files / "q" / path.name) for path in shards]
    export_units(shards[-1], files / "f")  # a file alone
    assert (files / "u.km").read_bytes().endswith((files / "f/units.km").read_bytes())


# What a manifest may hold: any text but of plane 15, whose characters are units.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXT.filter(str.strip),
            "audio": TEXT,
            "language": TEXT,
            "duration_s": st.none() | st.floats(0, allow_infinity=False),
            "units": st.lists(st.integers(0, 65533)),
            "text": TEXT,
        }
    ),
    min_size=1,
    unique_by=lambda row: row["id"],
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS)
def test_any_rows_come_back_as_the_same_bytes(rows):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p").mkdir()
        write_units(folder / "p/units-00000-of-00001.parquet", rows)
        export_units(folder / "p", folder / "e")
        again = {"manifest": folder / "e/utterances.jsonl", "collapse": False}
        import_units(folder / "e/units.km", folder / "q", 65534, **again)
        names = [folder / place / "units-00000-of-00001.parquet" for place in "pq"]
        assert hash_file(names[0]) == hash_file(names[1])


def test_done_again_and_other_input(files, capsys):
    import_units(files / "u.km", files / "p", 500, manifest=files / "u.jsonl")
    export_units(files / "p", files / "e")
    capsys.readouterr()
    import_units(files / "u.km", files / "p", 500, manifest=files / "u.jsonl")
    export_units(files / "p", files / "e")
    assert capsys.readouterr().out.count("already done") == 2
    dump_km(files / "u.km", UNITS[::-1])
    with pytest.raises(UserError, match="the content of units differs"):
        import_units(files / "u.km", files / "p", 500, manifest=files / "u.jsonl")


def test_a_row_without_text_cannot_be_exported(files):
    (files / "p").mkdir()
    write_units(files / "p/units-00000-of-00001.parquet", [*wanted()[:2], wanted()[2] | {"text": None}])
    with pytest.raises(UserError, match=r"p, row 3 \(id é ü\): it has no text"):
        export_units(files / "p", files / "e")
    assert written(files / "e") == []


# --- What is wrong --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("u.km", "499", "500", r"u.km:3: unit id 500 is outside 0..499"),
        ("u.km", "499", "-1", r"u.km:3: not unit ids, .*: '-1'"),
        ("u.km", "499", "1_0", r"u.km:3: not unit ids, .*: '1_0'"),
        ("u.km", "499", "4.0", r"u.km:3: not unit ids, .*: '4.0'"),
        ("u.km", "499", "٣", r"u.km:3: not unit ids, .*: '\\u0663'"),
        ("u.km", "499", "9" * 5000, r"u.km:3: not unit ids, "),
        ("u.km", "5\n", "5\n\n", r"u.km:6: .*u.(jsonl|tsv|ids) has no line for it, it has 5"),
        ("u.km", "\n8 9 8 9\n", "\n", r"u.(jsonl|tsv|ids):[56]: .*u.km has no line for it, it has 4"),
        ("u.km", "499", "x\t499", r"u.km:3: it brings a name, but earlier lines do not"),
        ("u.km", "8 9 8 9", "8\t9\t1", r"u.km:5: not unit ids"),
        ("u.jsonl", '"b"', '"a"', r"u.jsonl:5: id 'a' is there a second time"),
        ("u.jsonl", '"b"', '" "', r"u.jsonl:4: its id is blank"),
        ("u.jsonl", '"last"', "3", r"u.jsonl:5: its text is a int"),
        ("u.jsonl", '"last"', '"\\udb80\\udc05"', r"u.jsonl:5: character 1 of the text is U\+F0005"),
        ("u.jsonl", ': 3.0}', ': "3"}', r"u.jsonl:1: its length is no number of seconds"),
        ("u.jsonl", ': 3.0}', ': true}', r"u.jsonl:1: its length is no number of seconds"),
        ("u.jsonl", ': 3.0}', ': Infinity}', r"u.jsonl:1: its length is no number of seconds"),
        ("u.jsonl", ': 3.0}', ': NaN}', r"u.jsonl:1: its length is no number of seconds"),
        ("u.jsonl", ': 3.0}', ': 3, "start_s": "0", "end_s": 2}', r"u.jsonl:1: its length is no number"),
        ("u.tsv", "\t48000", "\t4.8", r"u.tsv:2: not path<TAB>samples: '84/84-1-0000.flac\\t4.8'"),
        ("u.tsv", "b/b.flac", "b/a.flac", r"u.tsv:6: id 'a' is there a second time"),
        ("u.tsv", "b/b.flac", "", r"u.tsv:5: not path<TAB>samples"),
        ("u.txt", "last\n", "last\nmore\n", r"u.txt:6: .*u.tsv has no line for it, it has 5"),
        ("u.txt", "last\n", "", r"u.tsv:6: .*u.txt has no line for it, it has 4"),
        ("u.txt", "last", "\U000f0005", r"u.txt:5: character 1 of the text is U\+F0005"),
        ("u.ids", "b\na\n", "b\nb\n", r"u.ids:5: id 'b' is there a second time"),
        ("u.ids", "a\n", "", r"u.km:5: .*u.ids has no line for it, it has 4"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_and_nothing_written(files, name, old, new, message):
    text = (files / name).read_text(encoding="utf-8")
    at = text.rindex(old)
    (files / name).write_text(text[:at] + new + text[at + len(old) :], encoding="utf-8")
    tsv = {"tsv": files / "u.tsv", "language": "en"}
    ways = {
        "u.jsonl": {"manifest": files / "u.jsonl"},
        "u.tsv": tsv,
        "u.txt": tsv | {"texts": files / "u.txt"},
        "u.ids": {"ids": files / "u.ids", "language": "en"},
    }
    if name == "u.km":
        del ways["u.txt"]
    for way in ways.values() if name == "u.km" else [ways[name]]:
        with pytest.raises(UserError, match=message):
            import_units(files / "u.km", files / "o", 500, num_shards=2, **way)
        assert written(files / "o") == []


def test_bytes_that_are_no_text(files):
    (files / "u.ids").write_bytes(b"\xef\xbb\xbf1\r\n2\n3\n\xff\n5\n")
    with pytest.raises(UserError, match="u.ids:4: not UTF-8"):
        import_units(files / "u.km", files / "o", 500, ids=files / "u.ids", language="en")
    (files / "u.ids").write_bytes(b"\xef\xbb\xbf1\r\n2\n3\n4\n5\n")
    import_units(files / "u.km", files / "o", 500, ids=files / "u.ids", language="en")
    assert [row["id"] for row in table(files / "o")] == list("12345")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"units": [1, 2.0], "file_name": "a"}, r"n.jsonl:2: its units are no list of integers"),
        ({"units": [True], "file_name": "a"}, r"n.jsonl:2: its units are no list of integers"),
        ({"units": "1 2", "file_name": "a"}, r"n.jsonl:2: its units are no list of integers"),
        ({"units": [1, 500], "file_name": "a"}, r"n.jsonl:2: unit id 500"),
        ({"units": [1]}, r"n.jsonl:2: field 'file_name' is missing"),
        ({"units": [1], "file_name": "y/b.wav"}, r"n.jsonl:2: id 'b' is there a second time"),
    ],
)
def test_a_wrong_row_of_slamkit(tmp_path, row, message):
    rows = [{"units": [1], "duration": [1], "file_name": "x/b.wav"}, row]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        import_units(tmp_path / "n.jsonl", tmp_path / "o", 500, language="en")
    assert written(tmp_path / "o") == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "which language"),
        ({"language": "en"}, "nothing says whose units"),
        ({"language": "en", "texts": "u.txt"}, "nothing says whose --texts"),
        ({"manifest": "u.jsonl", "tsv": "u.tsv"}, "--manifest says it all"),
        ({"manifest": "u.jsonl", "language": "en"}, "--manifest says it all"),
        ({"manifest": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"manifest": "u.jsonl", "num_shards": 0}, "--num_shards is 0"),
        ({"manifest": "u.jsonl", "num_units": 70000}, "--num_units is 70,000"),
    ],
)
def test_options_that_do_not_fit(files, more, message):
    more = {name: files / value if "." in str(value) else value for name, value in more.items()}
    with pytest.raises(UserError, match=message):
        import_units(**{"units": files / "u.km", "output_dir": files / "o", "num_units": 500} | more)
    assert written(files / "o") == []


def test_large_ids_stay(tmp_path):
    units = np.random.default_rng(0).integers(0, 65534, 5000).tolist()
    dump_km(tmp_path / "u.km", [units])
    (tmp_path / "u.ids").write_text("a")
    import_units(tmp_path / "u.km", tmp_path / "o", 65534, ids=tmp_path / "u.ids", language="en", collapse=False)
    assert table(tmp_path / "o")[0]["units"] == units
