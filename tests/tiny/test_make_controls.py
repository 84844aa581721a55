"""The two controls: units only change their order; the nearest transcript is a plain search's."""

import json

from tiny.make_controls import make_controls
from towerspeech.records import read_jsonl
from towerspeech.units import collapse
from towerspeech.units_parquet import read_units


def test_shuffled_keeps_the_units_and_nearest_finds_the_twin(tmp_path, make_units):
    train = make_units(tmp_path / "train", 40)
    rows = list(read_units(train))
    # The test utterances are training utterances with one unit less: their twins are known.
    test_rows = [{"units": row["units"][1:], "text": "?"} for row in rows[5:15]]
    test = make_units(tmp_path / "test", test_rows)
    make_controls(train, test, tmp_path / "test_shuffled", tmp_path / "nearest", seed=1)
    found = list(read_units(tmp_path / "test_shuffled"))
    assert [row["id"] for row in found] == [f"utt{i:04d}" for i in range(10)]
    for row, original in zip(found, test_rows, strict=True):
        assert row["units"] != original["units"] and collapse(row["units"]) == row["units"]
        assert set(row["units"]) == set(original["units"])
    generations = read_jsonl(tmp_path / "nearest/asr/test.jsonl")
    assert [row["text"] for row in generations] == [row["text"] for row in rows[5:15]]
    assert {row["reference"] for row in generations} == {"?"}
    info = json.loads((tmp_path / "nearest/run_info.json").read_text())
    assert list(info["outputs"]) == ["asr/test.jsonl"]


def test_each_utterance_is_shuffled_in_its_own_way_and_a_seed_decides(tmp_path, make_units):
    """Thirty units, all different: none is lost, none collapsed."""
    test = make_units(tmp_path / "test", [{"units": list(range(30))} for _ in range(4)])
    found = []
    for seed in (0, 1, 0):
        make_controls(test, test, tmp_path / f"shuffled{len(found)}", tmp_path / "nearest", seed=seed)
        found.append([row["units"] for row in read_units(tmp_path / f"shuffled{len(found)}")])
    orders = [tuple(units) for units in found[0] + found[1]]
    assert all(sorted(units) == list(range(30)) for units in orders)
    assert len(set(orders)) == 8
    assert found[2] == found[0]


def test_nearest_is_told_by_the_order_of_units_not_by_their_number(tmp_path, make_units):
    """The same units in another order are another utterance; the facts are the test utterance's own."""
    train = make_units(
        tmp_path / "train", [{"units": list(u), "text": f"{u[0]}"} for u in ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])]
    )
    test = make_units(tmp_path / "test", [{"id": "t", "units": [4, 3, 2, 1], "text": "own", "audio": "t.wav"}])
    make_controls(train, test, tmp_path / "shuffled", tmp_path / "nearest")
    (row,) = read_jsonl(tmp_path / "nearest/asr/test.jsonl")
    assert (row["id"], row["text"], row["reference"], row["source"], row["dataset"]) == (
        "t",
        "5",
        "own",
        "t.wav",
        "test",
    )
