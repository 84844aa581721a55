"""Plain files of outputs; tests/results reads finished generations through the commands."""

import hashlib

import pytest

from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.generations import read_generations, read_line_files
from towerspeech.records import dumps


def test_line_files_need_one_line_a_segment_and_their_hash_is_of_outputs_and_references(tmp_path):
    for name, text in (("out", "a\nb\n"), ("ref", "A\nB\n"), ("src", "x\ny\n"), ("long", "x\ny\nz\n")):
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in ("out", "ref", "src")]
    outputs = read_line_files(*files, {"task": "mt"})
    assert (outputs.hypotheses, outputs.references, outputs.sources) == (["a", "b"], ["A", "B"], ["x", "y"])
    out, ref, src = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert outputs.sha256 == hashlib.sha256(f"{out} {ref}".encode()).hexdigest()
    assert (outputs.sources_sha256, outputs.ids, outputs.finish_reasons) == (src, None, None)
    assert read_line_files(*files[:2], None, {}).sources is None
    with pytest.raises(UserError, match=r"2 hypotheses in .*out for 3 sources in .*long\n"):
        read_line_files(*files[:2], tmp_path / "long", {})


def test_an_errors_line_is_the_files_own_though_lines_are_blank(tmp_path):
    facts = {"task": "mt", "dataset": "d", "shots": 0, "src_lang": "de", "tgt_lang": "en"}
    rows = [{"id": name, **facts, "reference": "r", "text": "t", "finish_reason": "stop"} for name in "aba"]
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n".join(map(dumps, rows)) + "\n")
    with pytest.raises(UserError, match=r"set\.jsonl:5: id 'a' is there twice"):
        read_generations(path, hash_file(path))
