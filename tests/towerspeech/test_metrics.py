"""Metrics against sacreBLEU's published scores, jiwer called directly, and a plain edit-distance loop."""

import csv
import os
import random
from pathlib import Path

import jiwer
import numpy as np
import pytest

from towerspeech import metrics
from towerspeech.records import read_lines
from towerspeech.stage import UserError

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")


def scores(*args, **kwargs) -> dict[str, metrics.Score]:
    return {score.metric: score for score in metrics.score(*args, **kwargs)}


def published() -> list[dict]:
    with open(Path(DATA) / "wmt23" / "published_scores.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plain_distance(reference: list, hypothesis: list) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        before, row = row, [i]
        for j, h in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (r != h)))
    return row[-1]


def submission(row: dict) -> tuple[list[str], list[str], str]:
    root, tgt = Path(DATA) / "wmt23", row["pair"].split("-")[1]
    hypotheses = root / "systems" / f"generaltest2023.{row['pair']}.hyp.{row['system']}.{tgt}"
    return read_lines(hypotheses), read_lines(root / f"generaltest2023.{row['pair']}.ref.refA.{tgt}"), tgt


@needs_data
@pytest.mark.parametrize("pair", ["de-en", "en-zh"])
def test_a_wmt23_submission_scores_as_published_with_intervals(pair):
    row = next(row for row in published() if row["pair"] == pair)
    found = scores("mt", *submission(row))
    for name, column in (("bleu", "bleu_refA"), ("chrf2", "chrf_refA")):
        assert found[name].score == pytest.approx(float(row[column]), abs=1e-6)
        assert found[name].ci_low < found[name].score < found[name].ci_high


@pytest.mark.slow
@needs_data
def test_all_wmt23_submissions_score_as_published():
    """All 18, without the bootstrap: it changes no score."""
    rows = published()
    assert len(rows) == 18
    for row in rows:
        hypotheses, references, tgt = submission(row)
        found = metrics._sacrebleu(tgt)
        for name, column in (("bleu", "bleu_refA"), ("chrf2", "chrf_refA")):
            score = found[name].corpus_score(hypotheses, [references]).score
            assert score == pytest.approx(float(row[column]), abs=1e-6), (row["pair"], row["system"], name)


@needs_data
def test_the_original_recorded_the_same_bleu():
    text = (Path(DATA) / "towerspeech_outputs/MT/5_shot/3000/flores_5to1_de-en").read_text(encoding="utf-8")
    outputs, recorded = text.split("\nResults bleu: ")
    references = read_lines(Path(DATA) / "flores200/devtest/eng_Latn.devtest")
    found = scores("mt", outputs.split("\n"), references, "en")
    assert recorded.startswith("{'bleu': 0.44142839914952997,")
    assert found["bleu"].score == pytest.approx(44.142839914952997, abs=1e-6)
    assert found["chrf2"].score == pytest.approx(68.61192892501053, abs=1e-6)


def test_signature_names_the_targets_tokenizer():
    signed = {tgt: metrics.signatures("mt", tgt)["bleu"] for tgt in ("de", "zh", "ko")}
    assert "|tok:13a|" in signed["de"] and "|tok:zh|" in signed["zh"] and "|tok:ko-mecab" in signed["ko"]
    assert all(text.startswith("nrefs:1|bs:1000|seed:12345|") and "|version:" in text for text in signed.values())


@pytest.mark.parametrize("task", ["mt", "asr"])
def test_signatures_are_those_of_the_scores(task):
    found = metrics.score(task, ["a b c d"] * 3, ["a b c d e"] * 3, "en", ["stop", "length", "stop"])
    assert {score.metric: score.signature for score in found} == metrics.signatures(task, "en")


def test_sacrebleus_own_signature_is_ours():
    metric = metrics._sacrebleu("de")["bleu"]
    metric.corpus_score(["ein Satz"], [["ein Satz"]], n_bootstrap=1000)
    assert str(metric.get_signature()) == metrics.signatures("mt", "de")["bleu"]


def test_another_seed_in_the_environment_changes_nothing(monkeypatch):
    hypotheses, references = ["the cat sat", "on a mat", "all day long"], ["the cat sat", "on the mat", "all night"]
    first = metrics.score("mt", hypotheses, references, "en")
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    assert metrics.score("mt", hypotheses, references, "en") == first


def noisy(count: int, seed: int) -> tuple[list[str], list[str]]:
    generator = random.Random(seed)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "hat", "Mr.", "colour", "twenty-one", "don't"]
    references = [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(count)]
    hypotheses = []
    for reference in references:
        kept = [word for word in reference.split() if generator.random() < 0.8]
        hypotheses.append(" ".join(kept + generator.choices(words, k=generator.randint(0, 2))))
    return hypotheses, references


@pytest.mark.parametrize("name", metrics.NORMALIZERS)
def test_wer_and_cer_equal_jiwers(name):
    hypotheses, references = noisy(200, seed=1)
    found = scores("asr", hypotheses, references, "en")
    normalize = metrics.normalizer(name)
    normal = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    words, characters = jiwer.process_words(*normal), jiwer.process_characters(*normal)
    assert found[f"wer_{name}"].score == pytest.approx(words.wer, abs=1e-12)
    assert found[f"cer_{name}"].score == pytest.approx(characters.cer, abs=1e-12)
    for unit, result in (("wer", words), ("cer", characters)):
        length = result.hits + result.substitutions + result.deletions
        for part in ("substitutions", "deletions", "insertions"):
            assert found[f"{unit}_{name}_{part}"].score == pytest.approx(getattr(result, part) / length, abs=1e-12)


def test_edits_sum_to_the_plain_distance():
    hypotheses, references = noisy(50, seed=2)
    counts = metrics.edits(hypotheses, references)
    for hypothesis, reference, row in zip(hypotheses, references, counts, strict=True):
        assert row[:3].sum() == plain_distance(reference.split(), hypothesis.split())
        assert row[3] == len(reference.split())


def test_the_normalizers_differ_and_both_are_reported():
    found = scores("asr", ["Mr. Brown can't pay $5"], ["mister brown can not pay five dollars"], "en")
    assert found["wer_english"].score == 0 < found["wer_basic"].score


def test_intervals_are_those_of_a_plain_bootstrap():
    hypotheses, references = noisy(60, seed=3)
    found = scores("asr", hypotheses, references, "en")["wer_basic"]
    counts = metrics.edits(
        *[[metrics.normalizer("basic")(text) for text in texts] for texts in (hypotheses, references)]
    )
    generator = np.random.default_rng(12345)
    drawn = [generator.integers(60, size=60) for _ in range(1000)]
    rates = sorted(counts[d, :3].sum() / counts[d, 3].sum() for d in drawn)
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.percentile(rates, [2.5, 97.5])))
    assert found.ci_low < found.score < found.ci_high


def test_empty_references_count_as_insertions():
    found = scores("asr", ["yes", "a b", ""], ["uh", "a b", "c d"], "en", ["stop", "length", "length"])
    assert found["empty_references_english"].score == 1  # the English normalizer drops "uh"
    assert found["empty_references_basic"].score == 0
    assert found["wer_english"].score == pytest.approx(3 / 4)  # one insertion, two deletions, four words
    assert found["empty"].score == 1 and found["truncated"].score == 2


def test_runaways_are_counted():
    found = scores("asr", ["go " * 100, "one two three"], ["go", "one two three"], "en")
    assert found["runaway_english"].score == 1
    assert found["wer_english"].score > 1


def test_all_outputs_empty():
    assert scores("mt", ["", ""], ["a b", "c"], "de")["bleu"].score == 0
    found = scores("asr", ["", ""], ["a b", "c"], "en")
    assert (found["wer_basic"].score, found["wer_basic_deletions"].score, found["empty"].score) == (1, 1, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mt", ["a"] * 41, ["a"] * 42, "de"), "41 hypotheses for 42 references"),
        (("asr", [], [], "en"), "0 hypotheses for 0 references"),
        (("mt", ["a"], ["a"], "xx"), "unknown language 'xx'"),
        (("asr", ["a"], ["a"], "xx"), "unknown language 'xx'"),
        (("st", ["a"], ["a"], "de"), "unknown task 'st'"),
        (("asr", ["a"], ["!"], "en"), "all 1 references are empty under Whisper's basic normalizer"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(UserError, match=message.replace("'", ".")):
        metrics.score(*args)


def test_results_csv_of_another_kind_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match=r"a\.csv:1: no results CSV"):
        metrics.read_results(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(",".join(metrics.COLUMNS) + "\na,b\n")
    with pytest.raises(UserError, match=r"b\.csv:2: 2 values, wanted 15"):
        metrics.read_results(tmp_path / "b.csv")
