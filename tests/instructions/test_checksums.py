"""The prompts of FLORES-200 and WMT23 against the recorded checksums, and these against the original's own rows."""

import json
import os
import shutil
from pathlib import Path

import pytest

from instructions import build_instructions as script
from instructions.checksums import RECORDED, checksums, verify
from instructions.record_checksums import record_checksums
from towerspeech.languages import LANGUAGES
from towerspeech.records import write_jsonl

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set: no FLORES, no WMT23")


def build_instructions(*flags, **named_flags) -> None:
    script.build_instructions(script.Request(*flags, **named_flags))


def test_there_are_checksums_for_the_originals_24_files():
    sums = json.loads(RECORDED.read_text(encoding="utf-8"))
    others = [code for code in LANGUAGES if code != "en"]
    flores = {f"0_shot/flores_{pair}.jsonl": 1012 for code in others for pair in (f"en-{code}", f"{code}-en")}
    wmt23 = {"de-en": 549, "en-de": 557, "en-ru": 2074, "en-zh": 2074, "ru-en": 1723, "zh-en": 1976}
    sizes = flores | {f"0_shot/wmt23_{pair}.jsonl": size for pair, size in wmt23.items()}
    assert {name: len(each["prompts"]) // 4 for name, each in sums.items()} == sizes


@needs_data
@pytest.mark.parametrize("name", ["flores_de-en", "flores_en-zh", "wmt23_en-de"])
def test_the_originals_own_rows_have_the_recorded_checksums(name):
    rows = json.loads((Path(DATA) / f"original_instructions/0_shot/{name}.json").read_text(encoding="utf-8"))
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"0_shot/{name}.jsonl"]
    assert len(rows) == 5 and checksums(rows)["prompts"] == recorded["prompts"][:20]


@needs_data
def test_one_command_builds_the_24_files_and_verifies_them(tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("flores200", "wmt23"):
        shutil.copytree(Path(DATA) / name, data / name)
    build_instructions(tmp_path / "out", data_root=data, all=True)
    assert "\n24 of 24 files have the checksums" in capsys.readouterr().out
    build_instructions(tmp_path / "out", data_root=data, all=True)  # already done: verified again
    assert "\n24 of 24 files have the checksums" in capsys.readouterr().out

    # Another release: a sentence corrected, and one more at the end.
    path = data / "flores200/devtest/kor_Hang.devtest"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:6], lines[6] + "!", *lines[7:], ""]), encoding="utf-8")
    for name in ("src.de", "ref.refA.en"):
        with open(data / f"wmt23/generaltest2023.de-en.{name}", "a", encoding="utf-8") as file:
            file.write("Hallo.\n")
    build_instructions(tmp_path / "new", data_root=data, all=True)
    printed = capsys.readouterr().out
    assert "\n21 of 24 files have the checksums" in printed
    for pair in ("ko-en", "en-ko"):
        assert f"\n0_shot/flores_{pair}.jsonl differs: lines 7 are of another release" in printed
    assert "\n0_shot/wmt23_de-en.jsonl differs: 550 prompts, not 549" in printed


@needs_data
@pytest.mark.parametrize("changed", [{"test_lines": "1-10"}, {"style": "chat"}, {"dataset": "mine"}])
def test_other_prompts_have_no_checksums(tmp_path, capsys, changed):
    build_instructions(tmp_path, "flores200", Path(DATA) / "flores200", pairs="de-en", **changed)
    assert "checksums" not in capsys.readouterr().out


def test_recorded_files_are_verified_by_prompt_and_reference_alone(tmp_path, monkeypatch):
    rows = [{"id": f"x:{i}", "instruction": f"say {i}", "output": str(i)} for i in range(3)]
    write_jsonl(tmp_path / "0_shot/x_de-en.jsonl", rows)
    record_checksums([tmp_path / "0_shot/x_de-en.jsonl"], tmp_path / "sums.json")
    monkeypatch.setattr("instructions.checksums.RECORDED", tmp_path / "sums.json")
    name = "0_shot/x_de-en.jsonl"
    assert verify([(name, [{**row, "id": "y"} for row in rows])]) == ["1 of 1 files have the checksums of sums.json"]
    assert verify([("0_shot/another.jsonl", rows)]) == []
    for changed in ({"output": "9"}, {"instruction": "sing"}):
        _, told = verify([(name, [rows[0], rows[1] | changed, rows[2]])])
        assert told == f"{name} differs: lines 2 are of another release"
    _, told = verify([(name, rows[:2])])
    assert told == f"{name} differs: 2 prompts, not 3; lines none are of another release"
