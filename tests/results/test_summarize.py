"""The table's order, numbers and files; what is refused; same bytes again."""

import csv

import pytest

from results.summarize import summarize
from towerspeech.metrics import write_results
from towerspeech.stage import UserError


def row(checkpoint, metric, score, task="mt", dataset="flores", shots="0", pair="de-en", model="tiny"):
    src, tgt = pair.split("-")
    return {
        "model": model,
        "mixture": "ci",
        "checkpoint": checkpoint,
        "task": task,
        "dataset": dataset,
        "shots": shots,
        "src_lang": src,
        "tgt_lang": tgt,
        "metric": metric,
        "score": str(score),
        "ci_low": str(score * 0.9),
        "ci_high": str(score * 1.1),
        "n": "10",
        "signature": f"of {metric}",
        "generations_sha256": "0",
    }


def write_all(folder, checkpoints=("sft", "900", "base", "shuffled-units", "300", "1200")):
    folder.mkdir(parents=True)
    for i, checkpoint in enumerate(checkpoints):
        rows = [
            row(checkpoint, metric, i + j / 4, shots=shots, pair=pair)
            for j, metric in enumerate(("bleu", "chrf2"))
            for shots in ("5", "0")
            for pair in ("en-de", "de-en")
        ]
        for metric in ("wer_basic", "wer_english", "wer_english_insertions"):
            rows.append(row(checkpoint, metric, 0.25 + i / 100, task="asr", dataset="clean", pair="en-en"))
        rows.append(row(checkpoint, "empty", 3) | {"ci_low": "", "ci_high": ""})
        write_results(folder / f"{checkpoint}.csv", rows)
    return folder


def test_rows_columns_and_numbers(tmp_path, capsys):
    summarize([write_all(tmp_path / "results/tiny")], tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[5:11]] == ["base", "300", "900", "1200", "sft", "shuffled-units"]
    assert printed[0].split() == ["ASR", "ASR", *["flores"] * 8]
    assert printed[1].split() == ["clean", "clean", *["de-en", "de-en", "en-de", "en-de"] * 2]
    assert printed[2].split() == ["0-shot"] * 4 + ["5-shot"] * 4
    assert printed[3].split() == ["checkpoint", "WER", "WER", "basic", *["BLEU", "chrF2"] * 4]
    assert printed[5].split() == ["base", "27.0", "27.0", *["2.0", "2.2"] * 4]
    markdown = (tmp_path / "out/table.md").read_text().splitlines()
    assert markdown[2] == "| base | 27.0 | 27.0 | 2.0 | 2.2 | 2.0 | 2.2 | 2.0 | 2.2 | 2.0 | 2.2 |"
    assert "- `bleu|of bleu`" in markdown
    with open(tmp_path / "out/table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["checkpoint"] == "900" and rows[2]["ASR_clean_wer_english"] == "0.26"
    assert rows[2]["flores_de-en_5-shot_chrf2"] == "1.25"


def test_missing_scores_are_dashes(tmp_path, capsys):
    folder = write_all(tmp_path / "results", ["base", "300"])
    write_results(folder / "300.csv", [row("300", "bleu", 12.34)])
    summarize([folder], tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[6].split() == ["300", "-", "-", "12.3", *"-------"]
    with open(tmp_path / "out/table.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file))[1]["ASR_clean_wer_basic"] == ""


def test_same_bytes_again_also_into_the_results_folder(tmp_path):
    folder = write_all(tmp_path / "results/tiny")
    names = ("table.md", "table.csv", "scores.png")
    for out in (tmp_path / "out", folder, folder):
        summarize([tmp_path / "results"], out)
    assert all((tmp_path / "out" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".tmp-*"))


def test_models_are_named_when_there_are_two(tmp_path, capsys):
    write_all(tmp_path / "results/tiny", ["base"])
    write_results(tmp_path / "results/b.csv", [row("base", "bleu", 50, model="big")])
    summarize([tmp_path / "results/tiny", tmp_path / "results"], tmp_path / "out")  # found twice, read once
    printed = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in printed[5:7]] == ["big base ", "tiny base"]


def test_one_score_in_two_files(tmp_path):
    folder = write_all(tmp_path / "results", ["base", "300"])
    (folder / "copy.csv").write_bytes((folder / "300.csv").read_bytes())
    with pytest.raises(UserError, match=r"copy\.csv:2: tiny ci 300 has its bleu on flores in .*/300\.csv too"):
        summarize([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="does not exist\n.*results/score.py"):
        summarize([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no CSV below"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "empty/x.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"x\.csv:1: no results CSV"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    write_results(tmp_path / "empty/x.csv", [row("base", "bleu", 1) | {"score": "12,3"}])
    with pytest.raises(UserError, match=r"x\.csv:2: score or interval is no number"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    write_results(tmp_path / "empty/x.csv", [row("base", "empty", 1)])
    with pytest.raises(UserError, match="no wer_english, wer_basic, bleu, chrf2 in 1 CSVs"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
