"""Scores with 95% intervals and full signatures: BLEU and chrF2 for translation, WER and CER for transcription.

BLEU and chrF2 are sacreBLEU's, WER and CER jiwer's alignments over Whisper's Basic and English normalizers. Both
normalizers are always reported and named: one sentence can score 0.64 under one and 0.0 under the other. BLEU and chrF
lie in 0..100; WER and CER are shares of the reference's words or characters (0.25, not 25), and can exceed 1.
"""

import csv
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from towerspeech.languages import language
from towerspeech.stage import UserError, publish

BOOTSTRAP_SAMPLES = 1000
SEED = 12345  # sacreBLEU's default
NORMALIZERS = ("basic", "english")
TASKS = ("mt", "asr")
RUNAWAY = (2, 5)  # an output of more words than 2 x the reference's + 5 is a runaway

COLUMNS = (
    *("model", "mixture", "checkpoint", "task", "dataset", "shots", "src_lang", "tgt_lang"),
    *("metric", "score", "ci_low", "ci_high", "n", "signature", "generations_sha256"),
)
TEST_SET = COLUMNS[:8]  # these name a system and a test set; with the metric, a row


class Score(NamedTuple):
    metric: str
    score: float
    ci_low: float | None  # None for counts
    ci_high: float | None
    n: int  # segments
    signature: str


def score(
    task: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    target_lang: str,
    finish_reasons: Sequence[str | None] | None = None,
) -> list[Score]:
    """All scores of one test set.

    Args:
        task: ``mt`` or ``asr``.
        hypotheses: Raw outputs, one a segment.
        references: One reference a segment.
        target_lang: ISO 639-1 code of the output's language; chooses BLEU's tokenizer.
        finish_reasons: Why each output ended; with them, those cut off at the token limit (``length``) are counted.

    Raises:
        UserError: No segments, unequal lengths, or an unknown task or language.
    """
    check_lengths(hypotheses, references)
    signed = signatures(task, target_lang)
    n = len(references)
    if task == "mt":
        found = _translation(hypotheses, references, target_lang)
    else:
        found = {}
        for name in NORMALIZERS:
            found |= _transcription(hypotheses, references, name)
    found["empty"] = (sum(not text.strip() for text in hypotheses), None, None)
    if finish_reasons is not None:
        found["truncated"] = (sum(reason == "length" for reason in finish_reasons), None, None)
    return [Score(metric, *found[metric], n, signed[metric]) for metric in signed if metric in found]


def signatures(task: str, target_lang: str) -> dict[str, str]:
    """The metrics of a task, in the order in which they are reported, and how each is computed."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}", f"name one of: {', '.join(TASKS)}")
    if task == "mt":
        signed = {}
        for name, metric in _sacrebleu(target_lang).items():
            metric.num_refs, metric.n_bootstrap, metric.seed = 1, BOOTSTRAP_SAMPLES, str(SEED)
            signed[name] = str(metric.get_signature())
    else:
        language(target_lang)
        made_by = "+".join(f"{name}-{metadata.version(name)}" for name in ("jiwer", "whisper-normalizer"))
        end = f"bs:{BOOTSTRAP_SAMPLES}|seed:{SEED}|version:{made_by}"
        signed = {}
        for name in NORMALIZERS:
            for unit, level in (("wer", "word"), ("cer", "char")):
                for part in ("", "_substitutions", "_deletions", "_insertions"):
                    signed[f"{unit}_{name}{part}"] = f"level:{level}|norm:whisper-{name}|{end}"
            signed[f"empty_references_{name}"] = f"count|norm:whisper-{name}|version:{made_by}"
            factor, extra = RUNAWAY
            signed[f"runaway_{name}"] = f"count|words>{factor}*ref+{extra}|norm:whisper-{name}|version:{made_by}"
    signed["empty"] = "count|blank output"
    signed["truncated"] = "count|finish_reason:length"
    return signed


def check_lengths(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise UserError unless there is one hypothesis for each reference, and one at least."""
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} hypotheses for {len(references)} references", "generate again, from the same test set"
        )
    if not references:
        raise UserError("0 hypotheses for 0 references: nothing to score", "check the files")


# --- Translation ----------------------------------------------------------------------------------
def _sacrebleu(target_lang: str) -> dict:
    """New metric objects. ``force`` silences a warning about tokenized text; it changes no score."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU(tokenize=language(target_lang).bleu_tokenizer, force=True), "chrf2": CHRF()}


def _translation(hypotheses: Sequence[str], references: Sequence[str], target_lang: str) -> dict[str, tuple]:
    os.environ["SACREBLEU_SEED"] = str(SEED)  # the only way to tell it; ours is also its default
    found = {}
    for name, metric in _sacrebleu(target_lang).items():
        result = metric.corpus_score(list(hypotheses), [list(references)], n_bootstrap=BOOTSTRAP_SAMPLES)
        # sacreBLEU's interval lies around the mean of its resamples, which is not exactly the score.
        mean, half_width = result._mean, result._ci
        found[name] = (float(result.score), float(mean - half_width), float(mean + half_width))
    return found


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

    split = jiwer.transformations.cer_default if characters else jiwer.transformations.wer_default
    process = jiwer.process_characters if characters else jiwer.process_words
    counts = np.zeros((len(references), 4), dtype=np.int64)
    filled = [i for i, reference in enumerate(references) if reference]
    for i, reference in enumerate(references):
        if not reference:
            counts[i, 2] = len(hypotheses[i]) if characters else len(hypotheses[i].split())
    if filled:
        aligned = process([references[i] for i in filled], [hypotheses[i] for i in filled], split, split)
        columns = {"substitute": 0, "delete": 1, "insert": 2}
        for i, chunks, reference in zip(filled, aligned.alignments, aligned.references, strict=True):
            counts[i, 3] = len(reference)
            for chunk in chunks:
                if chunk.type in columns:
                    length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                    counts[i, columns[chunk.type]] += length
    return counts


def _transcription(hypotheses: Sequence[str], references: Sequence[str], name: str) -> dict[str, tuple]:
    normalize = normalizer(name)
    hypotheses, references = [normalize(text) for text in hypotheses], [normalize(text) for text in references]
    found = {}
    for unit in ("wer", "cer"):
        counts = edits(hypotheses, references, characters=unit == "cer")
        if not counts[:, 3].sum():
            raise UserError(
                f"all {len(references)} references are empty under Whisper's {name} normalizer",
                "check the test set's text",
            )
        rates = _rates_with_intervals(counts)
        for part, value in zip(("", "_substitutions", "_deletions", "_insertions"), rates, strict=True):
            found[f"{unit}_{name}{part}"] = value
        if unit == "wer":
            factor, extra = RUNAWAY
            output_lengths = counts[:, 3] - counts[:, 1] + counts[:, 2]
            found[f"runaway_{name}"] = (int((output_lengths > factor * counts[:, 3] + extra).sum()), None, None)
    found[f"empty_references_{name}"] = (sum(not text for text in references), None, None)
    return found


def _rates_with_intervals(counts) -> list[tuple[float, float, float]]:
    """Error rate, and its substitutions, deletions and insertions, each with a percentile interval.

    Args:
        counts: As ``edits`` gives them, (segments, 4). Segments are drawn anew, with their counts.
    """
    import numpy as np

    errors = np.column_stack([counts[:, :3].sum(axis=1), counts[:, :3]])  # (segments, 4)
    lengths = counts[:, 3]
    generator = np.random.default_rng(SEED)
    samples = np.empty((BOOTSTRAP_SAMPLES, 4))
    for i in range(BOOTSTRAP_SAMPLES):
        drawn = generator.integers(len(lengths), size=len(lengths))
        # A draw of empty references alone has no rate; with one word as its length it stays finite.
        samples[i] = errors[drawn].sum(axis=0) / max(int(lengths[drawn].sum()), 1)
    lows, highs = np.percentile(samples, [2.5, 97.5], axis=0)
    rates = errors.sum(axis=0) / lengths.sum()
    return [(float(rate), float(low), float(high)) for rate, low, high in zip(rates, lows, highs, strict=True)]


# --- The results CSV, in long form -----------------------------------------------------------------
def read_results(path: Path) -> list[dict[str, str]]:
    """Read a results CSV.

    Raises:
        UserError: It has other columns or a row of another length; names file and line.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise UserError(f"{path}:1: no results CSV: its columns must be {','.join(COLUMNS)}", "name another file")
        rows = []
        for row in reader:
            if len(row) != len(COLUMNS):
                raise UserError(f"{path}:{reader.line_num}: {len(row)} values, wanted {len(COLUMNS)}", "score anew")
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def write_results(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a results CSV atomically."""
    with publish(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
