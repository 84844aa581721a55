"""Metrics against published scores, sacreBLEU and jiwer called directly, and a plain edit-distance loop."""

import csv
import os
import random
from pathlib import Path

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers import tokenizer_spm

from towerspeech import metrics
from towerspeech.errors import UserError
from towerspeech.languages import language
from towerspeech.records import read_lines

DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def sacrebleu_dir(tmp_path, monkeypatch) -> Path:
    """An empty cache of sacreBLEU's: whether this machine has spBLEU's model must not matter."""
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path / "sacrebleu"))
    return tmp_path / "sacrebleu"


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
    rows = published()
    assert len(rows) == 18
    for row in rows:
        found = scores("mt", *submission(row), rows=("bleu", "chrf2"))
        for name, column in (("bleu", "bleu_refA"), ("chrf2", "chrf_refA")):
            assert found[name].score == pytest.approx(float(row[column]), abs=1e-6), (row["pair"], row["system"], name)


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


@pytest.mark.parametrize("task", metrics.TASKS)
def test_signatures_are_those_of_the_scores(task):
    found = metrics.score(task, ["a b c d"] * 3, ["a b c d e"] * 3, "en", ["stop", "length", "stop"])
    assert {score.metric: score.signature for score in found} == metrics.signatures(task, "en")


# --- sacreBLEU's numbers, sooner -------------------------------------------------------------------
def sacrebleus(target_lang: str) -> dict:
    tokenizer = language(target_lang).bleu_tokenizer
    return {"bleu": BLEU(tokenize=tokenizer, force=True), "chrf2": CHRF(), "chrf2++": CHRF(word_order=2)}


def check_against_sacrebleu(found: metrics.Score, metric, hypotheses: list[str], references: list[str]) -> None:
    """Score, interval and signature are sacreBLEU's own, computed by itself."""
    result = metric.corpus_score(hypotheses, [references], n_bootstrap=1000)
    interval = result._mean - result._ci, result._mean + result._ci
    assert found[1:4] == pytest.approx((result.score, *map(float, interval)), abs=1e-9, rel=0)
    assert found.signature == str(metric.get_signature())


CORPORA = {
    "noisy": lambda: noisy(150, seed=5),
    "one segment": lambda: (["the cat sat on a mat"], ["the cat sat on the mat"]),
    "no 4-grams": lambda: (["a b", "c d e", "f"], ["a b c", "c d", "g"]),
    "few matches": lambda: (["the x y z w", "q r s t u v"] * 4, ["the cat sat on the mat", "we all sing today q"] * 4),
    "no matches": lambda: (["x y z w v"] * 3, ["a b c d e"] * 3),
    "blank": lambda: (["", " ", "a cat"], ["a dog", "", "a cat"]),
    "all blank": lambda: (["", ""], ["a b", "c"]),
    "symbols": lambda: (['"Nein!", sagt er.', "(hi)", "größe 5%"], ['"Nein", sagte er.', "(hi) -", "Größe: 5 %"]),
}


# sacreBLEU 2.6.0 cannot average chrF's float32 with the plain 0.0 of a resample without matches: no interval then.
WITHOUT_INTERVAL = {("no 4-grams", "chrf"), ("blank", "chrf")}


@pytest.mark.parametrize("corpus", CORPORA)
def test_translation_scores_and_intervals_are_sacrebleus(corpus):
    hypotheses, references = CORPORA[corpus]()
    found = scores("mt", hypotheses, references, "en")
    for name, metric in sacrebleus("en").items():
        if (corpus, name[:4]) in WITHOUT_INTERVAL:
            with pytest.raises(TypeError):
                metric.corpus_score(hypotheses, [references], n_bootstrap=1000)
            assert found[name][1:4] == (metric.corpus_score(hypotheses, [references]).score, None, None)
            assert found[name].signature == str(metric.get_signature())
        else:
            check_against_sacrebleu(found[name], metric, hypotheses, references)
        alone = scores("mt", hypotheses, references, "en", rows=[name])
        assert alone == {name: found[name]}


@pytest.mark.parametrize("tgt", ["zh", "ko"])
def test_scores_with_other_tokenizers_are_sacrebleus(tgt):
    texts = {
        "zh": (["猫坐在垫子上。", "今天天气好"] * 9, ["猫坐在垫子上。", "今天天气很好。"] * 9),
        "ko": (["고양이가 매트에 앉았다.", "날씨가 좋다"] * 9, ["고양이가 매트 위에 앉았다.", "날씨가 좋다."] * 9),
    }[tgt]
    found = scores("st", *texts, tgt)
    for name, metric in sacrebleus(tgt).items():
        check_against_sacrebleu(found[name], metric, *texts)


@needs_data
def test_intervals_of_real_outputs_are_sacrebleus():
    hypotheses, references, tgt = submission(next(row for row in published() if row["pair"] == "de-en"))
    found = scores("mt", hypotheses, references, tgt)
    for name, metric in sacrebleus(tgt).items():
        check_against_sacrebleu(found[name], metric, hypotheses, references)


# --- spBLEU ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def spm_model(tmp_path_factory) -> Path:
    from sentencepiece import SentencePieceTrainer

    path = tmp_path_factory.mktemp("spm") / "small.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(noisy(300, seed=6)[1]),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def test_spbleu_with_a_local_model_is_sacrebleus_with_that_model(spm_model, sacrebleu_dir, monkeypatch):
    hypotheses, references = noisy(80, seed=7)
    assert "spbleu" not in scores("mt", hypotheses, references, "ko")
    other = scores("mt", hypotheses, references, "ko", spbleu_model=spm_model)["spbleu"]
    assert f"|tok:spm-sha256-{metrics.hash_file(spm_model)[:16]}|" in other.signature

    # Where sacreBLEU keeps its own model, and as if this were that one: the whole signature is sacreBLEU's.
    kept = sacrebleu_dir / "models" / "flores200sacrebleuspm"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(spm_model.read_bytes())
    monkeypatch.setattr(metrics, "FLORES200_SHA256", metrics.hash_file(spm_model))
    found = scores("mt", hypotheses, references, "ko")["spbleu"]
    check_against_sacrebleu(found, BLEU(tokenize="flores200"), hypotheses, references)
    assert found[:5] == other[:5]


def test_spbleu_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"not in sacreBLEU's cache\n.*--spbleu_model"):
        metrics.signatures("mt", "de", ["spbleu"])
    with pytest.raises(UserError, match="none does not exist"):
        metrics.signatures("mt", "de", ["spbleu"], tmp_path / "none")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UserError, match="text is no SentencePiece model"):
        metrics.signatures("mt", "de", ["spbleu"], tmp_path / "text")


# --- Choosing -------------------------------------------------------------------------------------
def test_metrics_that_are_chosen_alone_have_rows():
    assert list(metrics.signatures("mt", "de", ["chrf2", "wer"])) == ["chrf2", "empty", "truncated"]
    assert metrics.signatures("mt", "de", ["wer"]) == metrics.signatures("asr", "de", ["bleu"]) == {}
    whole = metrics.signatures("asr", "en")
    characters = metrics.signatures("asr", "en", ["cer"])
    assert len(characters) == 12 and characters.items() <= whole.items()
    assert "runaway_basic" in whole and "runaway_basic" not in characters
    hypotheses, references = noisy(20, seed=8)
    found = scores("asr", hypotheses, references, "en", rows=characters)
    complete = scores("asr", hypotheses, references, "en")
    assert found.items() <= complete.items() and set(found) == set(characters) - {"truncated"}


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


def test_interval_of_a_mean_is_that_of_a_plain_bootstrap():
    values = np.random.default_rng(4).normal(size=50).tolist()
    generator = np.random.default_rng(12345)
    means = [np.mean([values[i] for i in generator.integers(50, size=50)]) for _ in range(1000)]
    interval = tuple(np.percentile(means, [2.5, 97.5]))
    assert metrics.with_interval(values, [1] * 50) == pytest.approx((np.mean(values), *interval), abs=1e-12)


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
        (("summary", ["a"], ["a"], "de"), "unknown task 'summary'"),
        (("cascaded_st", ["a"], ["a"], "ja"), "unknown language 'ja'"),
        (("asr", ["a"], ["!"], "en"), "all 1 references are empty under Whisper's basic normalizer"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(UserError, match=message.replace("'", ".")):
        metrics.score(*args)


def test_english_normalisation_is_for_english_alone():
    """jiwer over Whisper's own normalizer; the English one takes syllables of Hangul and umlauts apart."""
    from whisper_normalizer.basic import BasicTextNormalizer

    basic = BasicTextNormalizer()
    heard, spoken = ["오늘은 날씨가 좋네요", "나는 학생이다"], ["오늘은 날씨가 좋아요", "나는 학생이다"]
    found = scores("asr", heard, spoken, "ko")
    assert list(found)[0] == "cer_basic" and not any("english" in row for row in found)
    assert (
        found["cer_basic"].score
        == jiwer.cer([basic(text) for text in spoken], [basic(text) for text in heard])
        == 1 / 18
    )
    assert list(scores("asr", ["a"], ["b"], "zh"))[0] == "cer_basic"
    german = scores("asr", ["schon die Bücher"], ["schön die Bücher"], "de")
    assert (
        list(german)[0] == "wer_basic" and german["wer_basic"].score == 1 / 3 and german["cer_basic"].score == 1 / 16
    )
    assert {"wer_english", "wer_basic"} <= scores("asr", ["a"], ["b"], "en").keys()
    assert metrics.signatures("asr", "ko")["runaway_basic"].startswith("count|chars>2*ref+5|")


@pytest.mark.parametrize(("extra", "runaways"), [(0, 0), (1, 1)])
def test_a_runaway_is_longer_than_twice_the_reference_and_five_words(extra, runaways):
    references = ["one two three", "alpha beta"]
    words = ["x"] * (2 * 3 + 5 + extra)  # none is the reference's: three substitutions, the rest insertions
    assert scores("asr", [" ".join(words), "beta"], references, "en")["runaway_basic"].score == runaways
    words = ["x"] * (2 * 2 + 5 + extra)
    assert (
        scores("asr", ["three", " ".join(words)], references, "en")["runaway_basic"].score == runaways
    )  # two deletions


def test_white_space_alone_is_an_empty_output():
    found = scores("asr", ["", " \t\n", "\u3000", "a"], ["a"] * 4, "en")
    assert found["empty"].score == 3
    assert scores("mt", ["", " ", "a"], ["a"] * 3, "de")["empty"].score == 2
