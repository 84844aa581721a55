"""A paired approximate randomisation test of two systems' outputs: what results/compare.py computes.

sacreBLEU's own (--paired-ar) draws the same swaps, but never takes all that there are where few segments differ,
takes ties but for rounding for differences, and knows no error rates.
"""

import itertools
from collections.abc import Sequence

from towerspeech.errors import UserError
from towerspeech.metrics import BOOTSTRAP_SAMPLES, ERROR_RATES, SEED, edits, normalizer, sacrebleu_metric, signatures

COMPARED = ("bleu", "chrf2", "chrf2++", "wer_basic", "cer_basic", "wer_english", "cer_english")


def compare_texts(
    task: str, a: Sequence[str], b: Sequence[str], references: Sequence[str], target_lang: str
) -> dict[str, tuple[float, float, float, int, str]]:
    """Compare two systems' outputs by each metric.

    Args:
        task: ``mt``, ``st``, ``cascaded_st`` or ``asr``.
        a: Raw outputs of a system, one a segment.
        b: Those of the other.
        references: One a segment.
        target_lang: ISO 639-1 code of the outputs' language.

    Returns:
        metric -> score of a, score of b, p, number of segments that differ, signature.
    """
    import numpy as np

    compared = {}
    for metric, signature in signatures(task, target_lang, ("bleu", "chrf2", "chrf2++", *ERROR_RATES)).items():
        if metric not in COMPARED:
            continue
        counts = np.stack([segment_counts(metric, texts, references, target_lang) for texts in (a, b)])
        scores = corpus_scores(metric, target_lang, counts.sum(axis=1))
        differing = (counts[0] != counts[1]).any(axis=1)  # (segments,)
        swapped = swaps(differing)
        one, other = (
            corpus_scores(metric, target_lang, swapped @ x + (1 - swapped) @ y) for x, y in (counts[::-1], counts)
        )
        as_far = np.abs(other - one) >= abs(scores[1] - scores[0]) - 1e-9  # ties but for rounding are ties
        signature = signature.replace("|bs:", "|ar:")
        compared[metric] = (*map(float, scores), float(as_far.mean()), int(differing.sum()), signature)
    return compared


def swaps(differing):
    """Which segments' outputs change places in each try: (tries, segments), 0 or 1; the first try swaps none.

    Args:
        differing: Which segments differ, (segments,), bool.
    """
    import numpy as np

    num_segments, num_differing = len(differing), int(differing.sum())
    if 2**num_differing <= BOOTSTRAP_SAMPLES:
        swapped = np.zeros((2**num_differing, num_segments))
        swapped[:, differing] = list(itertools.product((0, 1), repeat=num_differing))
        return swapped
    drawn = np.random.default_rng(SEED).integers(2, size=(BOOTSTRAP_SAMPLES, num_segments), dtype=bool)
    return np.vstack([np.zeros(num_segments), drawn])  # drawn as sacreBLEU's --paired-ar draws


def segment_counts(metric: str, hypotheses: Sequence[str], references: Sequence[str], target_lang: str):
    """What a metric counts in each segment: (segments, counts), float64; ``corpus_scores`` takes its sums."""
    import numpy as np

    unit, _, name = metric.partition("_")
    if unit not in ERROR_RATES:
        counter = sacrebleu_metric(metric, target_lang)
        counts = counter._extract_corpus_statistics(list(hypotheses), [list(references)])
        return np.array(counts, dtype=np.float64)
    normalize = normalizer(name)
    normal = [[normalize(text) for text in texts] for texts in (hypotheses, references)]
    if not any(normal[1]):
        raise UserError(f"{metric}: all {len(references)} references are normalised to nothing", "check their text")
    return edits(*normal, characters=unit == "cer").astype(np.float64)


def corpus_scores(metric: str, target_lang: str, totals):
    """The scores of corpora, (corpora,), as towerspeech/metrics.py gives them.

    Args:
        metric: As in ``segment_counts``.
        target_lang: As in ``segment_counts``.
        totals: (corpora, counts), float64: sums of the segments' counts.
    """
    import numpy as np

    if metric.partition("_")[0] in ERROR_RATES:
        return totals[:, :3].sum(axis=1) / np.maximum(totals[:, 3], 1)
    counter = sacrebleu_metric(metric, target_lang)
    return np.array([counter._compute_score_from_stats(total).score for total in totals.astype(int).tolist()])
