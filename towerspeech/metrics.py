"""Scores with 95% intervals and full signatures: for translation and for transcription.

BLEU, spBLEU, chrF2 and chrF2++ are sacreBLEU's, WER and CER jiwer's alignments of text that went through Whisper's
normalizers: Basic for every language (it keeps umlauts and the syllables of Hangul), and for English the English one
too, which makes plain letters of umlauts and takes syllables apart. Both are named: one sentence can score 0.64 under
one and 0.0 under the other. sacreBLEU's scores lie in 0..100, COMET's (results/score.py) mostly in 0..1; WER and CER
are shares of the reference's words or characters (0.25, not 25), and can exceed 1.
"""

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from towerspeech.command import UserError
from towerspeech.files import check_exists, hash_file, publish
from towerspeech.languages import language

BOOTSTRAP_SAMPLES = 1000
SEED = 12345  # sacreBLEU's default
NORMALIZERS = ("basic", "english")
CER_LEADS = ("zh", "ja", "ko")  # languages whose words spaces do not tell well
TRANSLATION_TASKS = ("mt", "st", "cascaded_st")
TASKS = (*TRANSLATION_TASKS, "asr")
SACREBLEU_METRICS = ("bleu", "chrf2", "chrf2++", "spbleu")
ERROR_RATES = {"wer": "word", "cer": "char"}
RUNAWAY = (2, 5)  # an output of more words (characters where CER leads) than 2 x the reference's + 5 is a runaway
# What https://tinyurl.com/flores200sacrebleuspm gives, spBLEU's SentencePiece model. sacreBLEU checks no sum; this is
# the one that the hub states for sentencepiece.bpe.model of facebook/nllb-200-distilled-600M, which is the same file.
FLORES200_SHA256 = "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a"
GET_SPBLEU = (
    "fetch it where there is a network: python -c \"from sacrebleu.metrics import BLEU; BLEU(tokenize='flores200')\"; "
    "or name the file with --spbleu_model"
)

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
    check_lengths(hypotheses, references)
    signed = signatures(task, target_lang, spbleu_model=spbleu_model)
    wanted = [row for row in signed if rows is None or row in rows]
    n = len(references)
    if task == "asr":
        lead = headline(target_lang)[:3]
        units = [
            unit
            for unit in ERROR_RATES
            if any(row.startswith((unit, "runaway_" if unit == lead else unit)) for row in wanted)
        ]
        found = {}
        for name in normalizers(target_lang):
            found |= _transcription(hypotheses, references, name, units, lead)
    else:
        found = _translation(hypotheses, references, target_lang, wanted, spbleu_model)
    found["empty"] = (sum(not text.strip() for text in hypotheses), None, None)
    if finish_reasons is not None:
        found["truncated"] = (sum(reason == "length" for reason in finish_reasons), None, None)
    return [Score(metric, *found[metric], n, signed[metric]) for metric in wanted if metric in found]


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
                metric = _sacrebleu(name, target_lang, spbleu_file(spbleu_model) if name == "spbleu" else None)
                metric.num_refs, metric.n_bootstrap, metric.seed = 1, BOOTSTRAP_SAMPLES, str(SEED)
                signed[name] = str(metric.get_signature())
    elif units := [unit for unit in ERROR_RATES if unit in metrics]:
        lead = headline(target_lang)[:3]
        units.sort(key=lambda unit: unit != lead)
        made_by = "+".join(f"{name}-{metadata.version(name)}" for name in ("jiwer", "whisper-normalizer"))
        end = f"bs:{BOOTSTRAP_SAMPLES}|seed:{SEED}|version:{made_by}"
        for name in normalizers(target_lang):
            for unit in units:
                for part in ("", "_substitutions", "_deletions", "_insertions"):
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


def check_lengths(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise UserError unless there is one hypothesis for each reference, and one at least."""
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} hypotheses for {len(references)} references", "generate again, from the same test set"
        )
    if not references:
        raise UserError("0 hypotheses for 0 references: nothing to score", "check the files")


# --- Intervals -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def _draws(n: int):
    """How often each of n segments is in each of sacreBLEU's resamples: (samples, n), float64."""
    import numpy as np

    drawn = np.random.default_rng(SEED).choice(n, size=(BOOTSTRAP_SAMPLES, n), replace=True)
    return np.stack([np.bincount(indices, minlength=n) for indices in drawn]).astype(np.float64)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """A percentile interval of the mean of segments' scores, over resampled segments."""
    import numpy as np

    means = _draws(len(values)) @ np.asarray(values, dtype=np.float64) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# --- One metric's counts, for comparisons -----------------------------------------------------------
def segment_counts(metric: str, hypotheses: Sequence[str], references: Sequence[str], target_lang: str):
    """What one metric counts in each segment; ``corpus_scores`` takes its sums.

    Args:
        metric: bleu, chrf2, chrf2++, or an error rate: wer_basic, cer_basic, wer_english, cer_english.
        hypotheses: Raw outputs, one a segment.
        references: One a segment.
        target_lang: As in ``score``.

    Returns:
        (segments, counts), float64.
    """
    import numpy as np

    unit, _, name = metric.partition("_")
    if unit in ERROR_RATES:
        normalize = normalizer(name)
        normal = ([normalize(text) for text in texts] for texts in (hypotheses, references))
        return edits(*normal, characters=unit == "cer").astype(np.float64)
    found = _sacrebleu(metric, target_lang)._extract_corpus_statistics(list(hypotheses), [list(references)])
    return np.array(found, dtype=np.float64)


def corpus_scores(metric: str, totals):
    """The scores of corpora, (corpora,), as ``score`` gives them.

    Args:
        metric: As in ``segment_counts``.
        totals: (corpora, counts), float64: sums of the segments' counts.
    """
    import numpy as np

    if metric.partition("_")[0] in ERROR_RATES:
        return totals[:, :3].sum(axis=1) / np.maximum(totals[:, 3], 1)
    return _chrfs(totals) if metric.startswith("chrf") else _bleus(totals)


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
def _sacrebleu(name: str, target_lang: str, spbleu: Path | None = None):
    """One of sacreBLEU's metrics. ``force`` silences a warning about tokenized text; it changes no score."""
    from sacrebleu.metrics import BLEU, CHRF

    if name == "bleu":
        return BLEU(tokenize=language(target_lang).bleu_tokenizer, force=True)
    if name == "spbleu":
        metric = BLEU(tokenize="none", force=True)
        metric.tokenizer = _spbleu_tokenizer(spbleu)
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


def _translation(
    hypotheses: Sequence[str],
    references: Sequence[str],
    target_lang: str,
    names: Collection[str],
    spbleu_model: Path | None,
) -> dict[str, tuple]:
    """The scores and intervals that sacreBLEU's ``corpus_score`` gives, sooner.

    Its statistics of a segment are counted once for chrF2 and chrF2++ (the former's come first among the latter's),
    and all resamples are scored at once.
    """
    found = {}
    statistics = {}
    for name in sorted(set(names) & set(SACREBLEU_METRICS), reverse=True):  # chrf2++ before chrf2
        metric = _sacrebleu(name, target_lang, spbleu_file(spbleu_model) if name == "spbleu" else None)
        if name == "chrf2" and "chrf2++" in statistics:
            statistics[name] = [segment[: 3 * metric.order] for segment in statistics["chrf2++"]]
        else:
            statistics[name] = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
        score = float(metric._aggregate_and_compute(statistics[name]).score)
        found[name] = (score, *_sacrebleu_interval(statistics[name], _chrfs if "chrf" in name else _bleus))
    return found


def _sacrebleu_interval(statistics: list[list[int]], score_all: Callable) -> tuple[float, float]:
    """sacreBLEU's interval: around the mean of its resamples, which is not exactly the score."""
    import numpy as np

    totals = _draws(len(statistics)) @ np.array(statistics, dtype=np.float64)
    scores = np.sort(score_all(totals.astype(np.float32)))  # sacreBLEU resamples in float32, and so must we
    cut = BOOTSTRAP_SAMPLES // 40
    half_width = 0.5 * (scores[-1 - cut] - scores[cut])
    mean = scores.dtype.type(scores.mean(dtype=np.float64))
    return float(mean - half_width), float(mean + half_width)


def _bleus(totals):
    """BLEU of many corpora, as sacreBLEU's ``compute_bleu`` with exponential smoothing.

    Args:
        totals: (corpora, 10): lengths of output and reference, matches and counts of 1- to 4-grams.
    """
    import numpy as np

    length, reference = totals[:, :2].astype(np.float64).T
    correct, total = totals[:, 2:6], totals[:, 6:]
    halvings = (2.0 ** np.cumsum(correct == 0, axis=1)).astype(totals.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(correct > 0, 100 * correct / total, 100 / (halvings * total))
        logs = np.where(total > 0, np.log(precisions.astype(np.float64)), -9999999999)
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1)
    return np.where(correct.any(axis=1), brevity * np.exp(logs.sum(axis=1) / 4), 0)


def _chrfs(totals):
    """chrF of many corpora, as sacreBLEU's ``_compute_f_score`` with beta 2.

    Args:
        totals: (corpora, 3 x orders): n-grams in output, in reference, and matches, order by order.
    """
    import numpy as np

    precision, recall, orders = np.zeros((3, len(totals)), dtype=totals.dtype)
    for output, reference, match in totals.T.reshape(-1, 3, len(totals)):
        counts = (output > 0) & (reference > 0)
        precision += np.divide(match, output, where=counts, out=np.zeros_like(match))
        recall += np.divide(match, reference, where=counts, out=np.zeros_like(match))
        orders += counts
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    weighted = 4 * precision + recall
    return 100 * np.divide(5 * precision * recall, weighted, where=weighted > 0, out=np.zeros_like(weighted))


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


def _transcription(
    hypotheses: Sequence[str], references: Sequence[str], name: str, units: Sequence[str], lead: str
) -> dict[str, tuple]:
    normalize = normalizer(name)
    hypotheses, references = [normalize(text) for text in hypotheses], [normalize(text) for text in references]
    found = {}
    for unit in units:
        counts = edits(hypotheses, references, characters=unit == "cer")
        if not counts[:, 3].sum():
            raise UserError(
                f"all {len(references)} references are empty under Whisper's {name} normalizer",
                "check the test set's text",
            )
        rates = _rates_with_intervals(counts)
        for part, value in zip(("", "_substitutions", "_deletions", "_insertions"), rates, strict=True):
            found[f"{unit}_{name}{part}"] = value
        if unit == lead:
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
    draws = _draws(len(lengths))
    # A draw of empty references alone has no rate; with one word as its length it stays finite.
    samples = draws @ errors / np.maximum(draws @ lengths, 1)[:, None]
    lows, highs = np.percentile(samples, [2.5, 97.5], axis=0)
    rates = errors.sum(axis=0) / lengths.sum()
    return [(float(rate), float(low), float(high)) for rate, low, high in zip(rates, lows, highs, strict=True)]


# --- The results CSV, in long form -----------------------------------------------------------------
def read_results(path: Path) -> list[dict[str, str]]:
    """Read a results CSV.

    Raises:
        UserError: It is no text, has other columns, or a row of another length; names file and line.
    """
    lines = read_csv(path)
    if not lines or tuple(lines[0][1]) != COLUMNS:
        raise UserError(f"{path}:1: no results CSV: its columns must be {','.join(COLUMNS)}", "name another file")
    for number, row in lines:
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}:{number}: {len(row)} values, wanted {len(COLUMNS)}", "score anew")
    return [dict(zip(COLUMNS, row, strict=True)) for _, row in lines[1:]]


def read_csv(path: Path, delimiter: str = ",") -> list[tuple[int, list[str]]]:
    """The rows of a CSV, each with the number of its last line: without a BOM, and without blank lines.

    Raises:
        UserError: It is no CSV in UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV in UTF-8 ({error})", "mend it, or move it away") from None


def write_results(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a results CSV atomically."""
    with publish(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def one_line(name: object) -> str:
    """A name as it stands in tables and CSVs: without line breaks, and without blanks around it."""
    return " ".join(str(name).split())


def markdown_table(lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, whatever its cells hold; the second line says how columns are aligned."""
    cells = ([re.sub(r"([\\|])", r"\\\1", one_line(cell)) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"
