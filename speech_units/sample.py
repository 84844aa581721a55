"""Which utterances a sample of so many hours holds."""

from itertools import compress, islice
from pathlib import Path

from speech_units.audio import fingerprint
from towerspeech.manifests import read_manifest, read_rows, seconds

UNKNOWN_S = 10.0  # seconds of an utterance, where no row says how long it lasts
COMPARED = 10_000  # files that decide whether the audio is still the same


def lengths_of(manifest: Path):
    """Seconds of each row, float32 (rows,); rows that do not say how long they last count as the others' mean."""
    import numpy as np

    lengths = np.fromiter((seconds(row) or np.nan for row in read_manifest(manifest)), dtype="f4")
    known = lengths[np.isfinite(lengths)]
    return np.nan_to_num(lengths, nan=known.mean() if len(known) else UNKNOWN_S)


def choose(lengths: list, hours: float, weights: list[float] | None, seed: int) -> list:
    """Draw utterances of several manifests until there are so many hours: a bool array (rows,) for each.

    Each gives its weight's share of the hours; without weights what it holds of all. All of it, if it holds less.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    shares = np.array(weights or [held.sum() for held in lengths])
    chosen = []
    for held, wanted_s in zip(lengths, 3600 * hours * shares / shares.sum(), strict=True):
        order = rng.permutation(len(held))
        before = np.cumsum(held[order], dtype="f8") - held[order]
        mask = np.zeros(len(held), dtype=bool)
        mask[order[before < wanted_s]] = True
        chosen.append(mask)
    return chosen


def fingerprint_of_sample(manifest: Path, audio_root: Path, chosen, max_bad_share: float) -> str:
    """``fingerprint`` of the first chosen rows: the same files elsewhere are the same input."""
    rows = compress(read_rows(manifest, 0, len(chosen)), chosen)
    return fingerprint(islice(rows, COMPARED), audio_root, max_bad_share)
