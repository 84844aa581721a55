"""Scores with 95% intervals and full signatures: for translation and for transcription.

BLEU, spBLEU, chrF2 and chrF2++ are sacreBLEU's, WER and CER jiwer's alignments of text that went through Whisper's
normalizers: Basic for every language (it keeps umlauts and the syllables of Hangul), and for English the English one
too, which makes plain letters of umlauts and takes syllables apart. Both are named: one sentence can score 0.64 under
one and 0.0 under the other. sacreBLEU's scores lie in 0..100; WER and CER are shares of the reference's words or
characters (0.25, not 25), and can exceed 1.
"""

import os
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file
from towerspeech.languages import language

BOOTSTRAP_SAMPLES = 1000
SEED = 12345  # sacreBLEU's default
NORMALIZERS = ("basic", "english")
CER_LEADS = ("zh", "ja", "ko")  # languages whose words spaces do not tell well
TRANSLATION_TASKS = ("mt", "st", "cascaded_st")
TASKS = (*TRANSLATION_TASKS, "asr")
SACREBLEU_METRICS = ("bleu", "chrf2", "chrf2++", "spbleu")
ERROR_RATES = {"wer": "word", "cer": "char"}
PARTS = ("", "_substitutions", "_deletions", "_insertions")  # of an error rate's rows
RUNAWAY = (2, 5)  # an output of more words (characters where CER leads) than 2 x the reference's + 5 is a runaway
# What https://tinyurl.com/flores200sacrebleuspm gives, spBLEU's SentencePiece model. sacreBLEU checks no sum; this is
# the one that the hub states for sentencepiece.bpe.model of facebook/nllb-200-distilled-600M, which is the same file.
FLORES200_SHA256 = "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a"
GET_SPBLEU = (
    "fetch it where there is a network: python -c \"from sacrebleu.metrics import BLEU; BLEU(tokenize='flores200')\"; "
    "or name the file with --spbleu_model"
)


class Score(NamedTuple):
    metric: str
    score: float
    ci_low: float | None  # None for counts, and where sacreBLEU gives no interval
    ci_high: float | None
    n: int  # segments
    signature: str


def score(
    task: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    target_lang: str,
    finish_reasons: Sequence[str | None] | None = None,
    rows: Collection[str] | None = None,
    spbleu_model: Path | None = None,
) -> list[Score]:
    """All scores of one test set.

    Args:
        task: ``mt``, ``st``, ``cascaded_st`` or ``asr``.
        hypotheses: Raw outputs, one a segment.
        references: One reference a segment.
        target_lang: ISO 639-1 code of the output's language; chooses BLEU's tokenizer, or the normalizers.
        finish_reasons: Why each output ended; with them, those cut off at the token limit (``length``) are counted.
        rows: Those of ``signatures`` to compute; default: all.
        spbleu_model: As in ``signatures``.

    Raises:
        UserError: No segments, unequal lengths, or an unknown task or language.
    """
    if len(hypotheses) != len(references) or not references:
        problem = f"{len(hypotheses)} hypotheses for {len(references)} references"
        raise UserError(problem, "generate again, from the same test set, one output for each reference")
    signed = signatures(task, target_lang, spbleu_model=spbleu_model)
    wanted = [row for row in signed if rows is None or row in rows]
    computed = {"empty": (sum(not text.strip() for text in hypotheses), None, None)}
    if finish_reasons is not None:
        computed["truncated"] = (sum(reason == "length" for reason in finish_reasons), None, None)
    if task == "asr":
        for name in normalizers(target_lang):
            computed |= _transcription(hypotheses, references, name, target_lang, wanted)
    else:
        for name in SACREBLEU_METRICS:
            if name in wanted:
                metric = sacrebleu_metric(name, target_lang, spbleu_model)
                computed[name] = _translation(metric, hypotheses, references)
    return [Score(row, *computed[row], len(references), signed[row]) for row in wanted if row in computed]


def signatures(
    task: str, target_lang: str, metrics: Collection[str] | None = None, spbleu_model: Path | None = None
) -> dict[str, str]:
    """The rows of a task, in the order in which they are reported, and how each is computed.

    Args:
        task: As in ``score``.
        target_lang: As in ``score``.
        metrics: Of SACREBLEU_METRICS and ERROR_RATES; those that are not for the task have no rows. Default: all;
            spBLEU only if its model is there.
        spbleu_model: spBLEU's SentencePiece model; default: the one in sacreBLEU's own cache.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}", f"name one of: {', '.join(TASKS)}")
    language(target_lang)
    if metrics is None:
        without = () if spbleu_file(spbleu_model) else ("spbleu",)
        metrics = [name for name in (*SACREBLEU_METRICS, *ERROR_RATES) if name not in without]
    signed = {}
    if task != "asr":
        for name in SACREBLEU_METRICS:
            if name in metrics:
                metric = sacrebleu_metric(name, target_lang, spbleu_model)
                metric.num_refs, metric.n_bootstrap, metric.seed = 1, BOOTSTRAP_SAMPLES, str(SEED)
                signed[name] = str(metric.get_signature())
    elif units := [unit for unit in ERROR_RATES if unit in metrics]:
        lead = headline(target_lang)[:3]
        units.sort(key=lambda unit: unit != lead)
        made_by = "+".join(f"{name}-{metadata.version(name)}" for name in ("jiwer", "whisper-normalizer"))
        end = f"bs:{BOOTSTRAP_SAMPLES}|seed:{SEED}|version:{made_by}"
        for name in normalizers(target_lang):
            for unit in units:
                for part in PARTS:
                    signed[f"{unit}_{name}{part}"] = f"level:{ERROR_RATES[unit]}|norm:whisper-{name}|{end}"
            signed[f"empty_references_{name}"] = f"count|norm:whisper-{name}|version:{made_by}"
            if lead in units:
                limit = f"{ERROR_RATES[lead]}s>{RUNAWAY[0]}*ref+{RUNAWAY[1]}"
                signed[f"runaway_{name}"] = f"count|{limit}|norm:whisper-{name}|version:{made_by}"
    if signed:
        signed["empty"] = "count|blank output"
        signed["truncated"] = "count|finish_reason:length"
    return signed


def normalizers(target_lang: str) -> tuple[str, ...]:
    """The normalizers of transcripts in a language: Whisper's English one is for English alone."""
    return NORMALIZERS if target_lang == "en" else NORMALIZERS[:1]


def headline(target_lang: str) -> str:
    """The error rate that speaks for a language: wer_english for English, cer_basic for zh, ja, ko, else wer_basic."""
    return f"{'cer' if target_lang in CER_LEADS else 'wer'}_{normalizers(target_lang)[-1]}"


# --- Intervals -------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _draws(n: int):
    """The segments that are in each of sacreBLEU's resamples: (samples, n), integers."""
    import numpy as np

    return np.random.default_rng(SEED).choice(n, size=(BOOTSTRAP_SAMPLES, n), replace=True)


def with_interval(values: Sequence[float], lengths: Sequence[float]) -> tuple[float, float, float]:
    """The sum of segments' values by the sum of their lengths, and its percentile interval over resampled segments."""
    import numpy as np

    values, lengths = np.asarray(values), np.asarray(lengths)
    drawn = _draws(len(values))
    # A draw of empty references alone has no rate; with one word as its length it stays finite.
    samples = values[drawn].sum(axis=1) / np.maximum(lengths[drawn].sum(axis=1), 1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(values.sum() / lengths.sum()), float(low), float(high)


# --- Translation ----------------------------------------------------------------------------------
def spbleu_file(spbleu_model: Path | None) -> Path | None:
    """spBLEU's SentencePiece model: the one given, else the one in sacreBLEU's cache, if it is there."""
    if spbleu_model:
        check_exists(spbleu_model, "check --spbleu_model")
        return spbleu_model
    from sacrebleu.tokenizers import tokenizer_spm

    cached = Path(tokenizer_spm.SACREBLEU_DIR, "models", Path(tokenizer_spm.SPM_MODELS["flores200"]["url"]).name)
    return cached if cached.is_file() and cached.stat().st_size else None


@cache  # mecab's dictionary and SentencePiece models take long to load
def sacrebleu_metric(name: str, target_lang: str, spbleu_model: Path | None = None):
    """One of sacreBLEU's metrics. ``force`` silences a warning about tokenized text; it changes no score."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "bleu":
        return BLEU(tokenize=language(target_lang).bleu_tokenizer, force=True)
    if name == "spbleu":
        metric = BLEU(tokenize="none", force=True)
        metric.tokenizer = _spbleu_tokenizer(spbleu_file(spbleu_model))
        metric.tokenizer_signature = metric.tokenizer.signature()
        return metric
    return CHRF(word_order=2 if name == "chrf2++" else 0)


@cache
def _spbleu_tokenizer(model: Path | None):
    """sacreBLEU's flores200 tokenizer over a local file, which its own constructor does not take."""
    from sacrebleu.tokenizers.tokenizer_spm import TokenizerSPM
    from sentencepiece import SentencePieceProcessor

    if not model:
        raise UserError("spBLEU's SentencePiece model is not in sacreBLEU's cache", GET_SPBLEU)
    sha256 = hash_file(model)
    tokenizer = TokenizerSPM.__new__(TokenizerSPM)
    tokenizer.name = "flores200" if sha256 == FLORES200_SHA256 else f"spm-sha256-{sha256[:16]}"
    try:
        tokenizer.sp = SentencePieceProcessor(model_file=str(model))
    except RuntimeError:
        raise UserError(f"{model} is no SentencePiece model", GET_SPBLEU) from None
    return tokenizer


def _translation(metric, hypotheses: Sequence[str], references: Sequence[str]) -> tuple:
    """Score and interval, as sacreBLEU gives them: the interval is around the mean of its resamples."""
    os.environ["SACREBLEU_SEED"] = str(SEED)
    texts = list(hypotheses), [list(references)]
    try:
        result = metric.corpus_score(*texts, n_bootstrap=BOOTSTRAP_SAMPLES)
    except TypeError:  # sacreBLEU 2.6.0 cannot average chrF's float32 with the plain 0.0 of a resample without matches
        return float(metric.corpus_score(*texts).score), None, None
    return float(result.score), float(result._mean - result._ci), float(result._mean + result._ci)


# --- Transcription --------------------------------------------------------------------------------
@cache
def normalizer(name: str) -> Callable[[str], str]:
    """Whisper's ``basic`` or ``english`` text normalizer."""
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    normalize = {"basic": BasicTextNormalizer, "english": EnglishTextNormalizer}[name]()
    return lambda text: " ".join(normalize(text).split())


def edits(hypotheses: Sequence[str], references: Sequence[str], characters: bool = False):
    """Count each segment's edits, from jiwer's alignment of normalised text.

    Where the reference is empty, every word of the output is an insertion.

    Returns:
        Integers, (segments, 4): substitutions, deletions, insertions, length of the reference; in words, or in
        characters with the spaces between words.
    """
    import jiwer
    import numpy as np

    process = jiwer.process_characters if characters else jiwer.process_words
    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        aligned = process(reference, hypothesis)
        length = aligned.hits + aligned.substitutions + aligned.deletions
        counts.append((aligned.substitutions, aligned.deletions, aligned.insertions, length))
    return np.array(counts, dtype=np.int64)


def _transcription(
    hypotheses: Sequence[str], references: Sequence[str], name: str, target_lang: str, wanted: Sequence[str]
) -> dict[str, tuple]:
    """Rows under one normalizer: rates with intervals, and counts; the error rates only if rows of them are wanted."""
    normalize = normalizer(name)
    hypotheses, references = [normalize(text) for text in hypotheses], [normalize(text) for text in references]
    if not any(references):
        problem = f"all {len(references)} references are empty under Whisper's {name} normalizer"
        raise UserError(problem, "check the test set's text")
    computed = {f"empty_references_{name}": (sum(not text for text in references), None, None)}
    lead = headline(target_lang)[:3]
    for unit in ERROR_RATES:
        runaway = f"runaway_{name}" if unit == lead else None
        if not any(row == runaway or row.startswith(f"{unit}_{name}") for row in wanted):
            continue
        counts = edits(hypotheses, references, characters=unit == "cer")
        errors = [counts[:, :3].sum(axis=1), *counts[:, :3].T]
        for part, values in zip(PARTS, errors, strict=True):
            computed[f"{unit}_{name}{part}"] = with_interval(values, counts[:, 3])
        if runaway:
            factor, extra = RUNAWAY
            output_lengths = counts[:, 3] - counts[:, 1] + counts[:, 2]
            computed[runaway] = (int((output_lengths > factor * counts[:, 3] + extra).sum()), None, None)
    return computed
