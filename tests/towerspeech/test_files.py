"""Files that appear whole or not at all; JSON objects."""

import json

import pytest

from towerspeech.errors import UserError
from towerspeech.files import check_exists, cut_torn_line, publish, read_json, write_json


def test_publish_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with publish(target) as path:
        path.write_text("one")
        assert path.parent == target.parent and not target.exists()
    with pytest.raises(ValueError), publish(target) as path:
        path.write_text("half")
        raise ValueError
    assert target.read_text() == "one" and list(target.parent.iterdir()) == [target]
    for content in ("one", "two"):
        with publish(tmp_path / "folder") as path:
            path.mkdir()
            (path / content).write_text(content)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "'b' is missing"),
        (b"[1]", "an object is wanted, got list"),
        (b'{"a": ', "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"", "is empty"),
    ],
)
def test_wrong_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json:? {message}.*\n  -> run it") as caught:
        read_json(tmp_path / "a.json", "run it", ["a", "b"])
    assert "Traceback" not in str(caught.value)


def test_write_json_and_check_exists(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1]}
    check_exists(tmp_path, "x")
    with pytest.raises(UserError, match="b.json does not exist\n  -> run it"):
        check_exists(tmp_path / "b.json", "run it")


@pytest.mark.parametrize("whole", [b"", b"a\n", b"one\ntwo\n", b"long" * 700_000 + b"\nb\n"])
@pytest.mark.parametrize("torn", [b"", b"x", b"torn" * 600_000])
def test_a_torn_last_line_is_cut_off(tmp_path, whole, torn):
    (tmp_path / "f").write_bytes(whole + torn)
    cut_torn_line(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == whole
