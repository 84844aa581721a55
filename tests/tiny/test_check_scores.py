"""Limits that hold are quiet, limits that do not are named, and a score that is missing is an error."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tiny"))

from check_scores import problems

from towerspeech.metrics import COLUMNS, write_results
from towerspeech.stage import UserError


def write(folder: Path, checkpoint: str, wer: float, bleu: float) -> None:
    facts = {**dict.fromkeys(COLUMNS, ""), "model": "tiny", "checkpoint": checkpoint}
    speech = {**facts, "task": "asr", "dataset": "test", "metric": "wer_english", "score": str(wer)}
    pair = {"task": "mt", "dataset": "tiny", "shots": "0", "src_lang": "de", "tgt_lang": "en"}
    folder.mkdir(exist_ok=True)
    write_results(folder / f"{checkpoint}.csv", [speech, {**facts, **pair, "metric": "bleu", "score": str(bleu)}])


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
