"""Limits that hold are quiet, limits that do not are named, and a score that is missing is an error."""

from pathlib import Path

import pandas
import pytest

from tiny.check_scores import check_scores, problems
from towerspeech.errors import UserError
from towerspeech.results_table import COLUMNS, write_results


def write(folder: Path, checkpoint: str, wer: float, bleu: float) -> None:
    facts = {**dict.fromkeys(COLUMNS, ""), "model": "tiny", "checkpoint": checkpoint}
    speech = {**facts, "task": "asr", "dataset": "test", "metric": "wer_english", "score": str(wer)}
    pair = {"task": "mt", "dataset": "tiny", "shots": "0", "src_lang": "de", "tgt_lang": "en"}
    folder.mkdir(exist_ok=True)
    rows = [speech, {**facts, **pair, "metric": "bleu", "score": str(bleu)}]
    write_results(folder / f"{checkpoint}.csv", pandas.DataFrame(rows))


def test_limits(tmp_path):
    write(tmp_path / "r", "base", 0.9, 3.0)
    write(tmp_path / "r", "600", 0.4, 5.0)
    limits = tmp_path / "limits.yaml"
    limits.write_text(
        "limits:\n- [base, asr, wer_english, above, 50]\n- [600, asr, wer_english, below, base]\n"
        "- [600, de-en_0-shot, bleu, above, base]\n"
    )
    assert problems(tmp_path / "r", limits) == []
    limits.write_text("limits:\n- [600, asr, wer_english, below, 39.9]\n- [base, de-en_0-shot, bleu, above, '600']\n")
    assert problems(tmp_path / "r", limits) == [
        "600 asr wer_english is 40.0, but should be below 39.9",
        "base de-en_0-shot bleu is 3.0, but should be above 600's 5.0",
    ]
    limits.write_text("limits:\n- [sft, asr, wer_english, below, 10]\n")
    with pytest.raises(UserError, match="no score sft asr wer_english"):
        problems(tmp_path / "r", limits)


def test_a_score_on_the_limit_is_neither_below_nor_above(tmp_path):
    write(tmp_path / "r", "600", 0.5, 5.0)
    limits = tmp_path / "limits.yaml"
    for metric, test, bound in (("wer_english", "asr", 50), ("bleu", "de-en_0-shot", 5)):
        for operator in ("below", "above"):
            limits.write_text(f"limits:\n- [600, {test}, {metric}, {operator}, {bound}]\n")
            assert len(problems(tmp_path / "r", limits)) == 1
            limits.write_text(f"limits:\n- [600, {test}, {metric}, {operator}, '600']\n")
            assert len(problems(tmp_path / "r", limits)) == 1


def test_shuffled_speech_is_a_test_of_its_own(tmp_path):
    facts = {**dict.fromkeys(COLUMNS, ""), "model": "tiny", "checkpoint": "sft", "task": "asr", "metric": "wer_basic"}
    rows = [{**facts, "dataset": name, "score": score} for name, score in (("test", "0.1"), ("test_shuffled", "1.2"))]
    (tmp_path / "r").mkdir()
    write_results(tmp_path / "r/sft.csv", pandas.DataFrame(rows))
    limits = tmp_path / "limits.yaml"
    limits.write_text("limits:\n- [sft, asr, wer_basic, below, 11]\n- [sft, asr_shuffled, wer_basic, above, 119]\n")
    assert problems(tmp_path / "r", limits) == []


def test_the_script_prints_what_is_broken(tmp_path, capsys):
    write(tmp_path / "r", "600", 0.5, 5.0)
    limits = tmp_path / "limits.yaml"
    limits.write_text("limits:\n- [600, asr, wer_english, below, 20]\n")
    check_scores(tmp_path / "r", limits)
    assert capsys.readouterr().out == "warning: 600 asr wer_english is 50.0, but should be below 20\n"
    limits.write_text("limits:\n- [600, asr, wer_english, below, 60]\n")
    check_scores(tmp_path / "r", limits)
    assert "has learned" in capsys.readouterr().out
