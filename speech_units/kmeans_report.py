"""How good is a k-means? Figures and a plot of its units on audio that it was not fitted on.

Usage: python speech_units/kmeans_report.py --manifest audio/dev.jsonl --audio_root audio --kmeans runs/kmeans \\
           --output_dir runs/kmeans_report --phones audio/dev_phones.jsonl

Reads: a manifest, its audio, and the folder that fit_kmeans.py or import_kmeans.py wrote; --hours of the utterances,
drawn at random, are used. With --phones, JSONL rows {"id", "phones": [["HH", 0.13, 0.21], ...]}: the phones of an
utterance of the manifest in order, each with where it starts and ends, in seconds from the utterance's start.
Writes, in output_dir: report.json and report.png.

In report.json:
    hours, frames, utterances    what was used; an hour is counted by its frames. Windows of utterances above 60 s
                                 (label_audio.py) count as utterances
    units, units_used            units that there are, and that are the nearest to a frame
    perplexity                   of the frames' units: so many, used equally often, would be as hard to guess
    repeated_frames              share of the frames whose unit is that of the frame before
    units_a_second               what is left of them when repeats are collapsed
    mean_squared_distance        of a frame to its centroid
    explained_variance           1 less that over the frames' mean squared distance to their own mean
    phones, frames_with_phone, phone_purity, cluster_purity, pnmi    see unit_statistics.py
A frame is the phone that is spoken in its middle. Labels are taken as they are, silence and stress marks too.
"""

import math
import os
from collections import Counter
from itertools import compress
from pathlib import Path

from speech_units.audio import SAMPLE_RATE, is_silent
from speech_units.features import BATCH_SECONDS, Encoder, FeatureConfig, load_kmeans
from speech_units.kmeans import Nearest, squared_distances
from speech_units.sample import choose, fingerprint_of_sample, lengths_of
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.manifests import read_rows
from towerspeech.records import iter_jsonl
from towerspeech.stage import stage


# --- Phones ---------------------------------------------------------------------------------------
def read_phones(path: Path, ids: set[str]) -> dict[str, tuple]:
    """Read the phones of the utterances ``ids``: {id: (labels, starts, ends)}, starts and ends in seconds.

    Raises:
        UserError: A row is malformed, its phones overlap or are not in order, or no row is of these utterances.
    """
    import numpy as np

    found = {}
    for where, row in iter_jsonl(path, required=["phones"], texts=["id"], unique_ids=True):
        before = 0.0
        phones = row["phones"] if isinstance(row["phones"], list) else [row["phones"]]
        for phone in phones:
            try:
                label, start, end = phone
                right = isinstance(label, str) and 0 <= start < end < math.inf
            except (TypeError, ValueError):
                right = False
            if not right:
                raise UserError(
                    f"{where}: {phone!r:.80} is no phone", 'each must be ["label", start_s, end_s], end after start'
                )
            if start < before:
                raise UserError(f"{where}: {phone} starts before {before}, where the one before ends", "mend the row")
            before = end
        if row["id"] in ids:
            labels, starts, ends = zip(*phones, strict=True) if phones else ((), (), ())
            found[row["id"]] = labels, np.array(starts, dtype=np.float64), np.array(ends, dtype=np.float64)
    if not found:
        raise UserError(f"{path} has none of the utterances' ids", "ids must be those of the manifest")
    return found


def phones_of_frames(phones: tuple, num_frames: int, config: FeatureConfig, first: int = 0) -> list[str | None]:
    """The phone in the middle of each frame, from frame ``first`` of the utterance on; None where there is none."""
    import numpy as np

    labels, starts, ends = phones
    middles = (np.arange(first, first + num_frames) * config.hop_samples + config.window_samples / 2) / SAMPLE_RATE
    places = np.searchsorted(starts, middles, side="right") - 1
    return [
        labels[place] if place >= 0 and middle < ends[place] else None
        for place, middle in zip(places.tolist(), middles.tolist(), strict=True)
    ]


# --- The report -----------------------------------------------------------------------------------
def draw(statistics, figures: dict, path: Path) -> None:
    """Plot how often units are used, how far frames are from them, and how long they last."""
    import numpy as np
    from matplotlib.figure import Figure

    from speech_units.unit_statistics import DISTANCE_EDGES

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_rank, by_distance, by_length = figure.subplots(1, 3)
    used = np.sort(statistics.units[statistics.units > 0])[::-1]
    by_rank.loglog(np.arange(1, len(used) + 1), used, marker="." if len(used) < 100 else None)
    by_rank.set(xlabel="rank of the unit", ylabel="frames")
    by_rank.set_title(f"{len(used):,} of {figures['units']:,} units used, perplexity {figures['perplexity']:,.0f}")
    filled = np.flatnonzero(statistics.distances)
    some = slice(filled[0], filled[-1] + 1)
    by_distance.stairs(statistics.distances[some], DISTANCE_EDGES[filled[0] : filled[-1] + 2], fill=True)
    by_distance.set(xlabel="squared distance to the centroid", ylabel="frames", xscale="log")
    explained = figures["explained_variance"]
    explains = "" if explained is None else f", {explained:.0%} of the variance explained"
    by_distance.set_title(f"mean {figures['mean_squared_distance']:.4g}{explains}")
    lengths = np.flatnonzero(statistics.runs)
    by_length.bar(lengths, statistics.runs[lengths], log=True)
    by_length.set(xlabel="frames in a row with the same unit", ylabel="runs")
    by_length.set_title(
        f"{figures['repeated_frames']:.0%} of frames repeat, {figures['units_a_second']:.1f} units a second"
    )
    for axes in (by_rank, by_distance, by_length):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})  # the same bytes from every version


def measure(frames, centroids, ids: dict[int, str], phones: dict[str, tuple], progress) -> tuple:
    """Count what the utterances' frames are; ids are by the manifest's rows.

    Returns:
        UnitStatistics, PhoneStatistics, and how many utterances could not be used, by reason.
    """
    from speech_units.unit_statistics import PhoneStatistics, UnitStatistics

    statistics, of_phones, reasons = UnitStatistics(*centroids.shape), PhoneStatistics(len(centroids)), Counter()
    nearest = Nearest(centroids, frames.encoder.device)
    begun: Counter[int] = Counter()  # frames so far of utterances in windows
    config = frames.encoder.config
    for pieces, encoded in frames:
        for piece in pieces:
            if piece.error or is_silent(piece.peak):
                reasons[piece.error.reason if piece.error else "silent"] += 1
        for piece, found, ids_found in zip(pieces, encoded, nearest(encoded), strict=False):  # bad ones have no frames
            if is_silent(piece.peak):
                continue
            to_nearest = squared_distances(found, nearest.centroids, ids_found).cpu().numpy()
            units = ids_found.cpu().numpy()
            statistics.add(found.cpu().numpy(), units, to_nearest)
            if ids[piece.index] in phones:
                said = phones_of_frames(phones[ids[piece.index]], len(units), config, begun[piece.index])
                of_phones.add(said, units)
            begun[piece.index] += len(units)
            progress.update(len(units))
    return statistics, of_phones, reasons


def kmeans_report(
    manifest: Path,
    audio_root: Path,
    kmeans: Path,
    output_dir: Path,
    hours: float = 1.0,
    phones: Path | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    batch_seconds: float = BATCH_SECONDS,
    max_bad_share: float = 0.01,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Measure a k-means on audio that it was not fitted on.

    Args:
        manifest: Manifest of the audio, or of more of which a sample is drawn.
        audio_root: Folder that the manifest's audio paths start from.
        kmeans: Folder written by fit_kmeans.py or import_kmeans.py.
        output_dir: Folder to write.
        hours: Audio to use, in whole utterances. 5,000 units want an hour or more for each to have its chance.
        phones: JSONL with "id" and "phones", for purity and PNMI.
        seed: Seed of the sample.
        num_workers: Processes that decode audio ahead; default: on a GPU one for each CPU but one, else none.
        batch_seconds: Seconds of audio that a GPU encodes at a time, padding included.
        max_bad_share: Of the sample, how many utterances may be left out because they cannot be used.
        device: auto, cpu or cuda, for the encoder.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    if not 0 < hours < math.inf:
        raise UserError(f"--hours is {hours}", "give more than 0")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: threads get in the decoding processes' way
    from tqdm import tqdm

    from speech_units.frames import Decoder, Frames

    centroids, config = load_kmeans(kmeans)
    [chosen] = choose([lengths_of(manifest)], hours, None, seed)
    arguments["audio"] = fingerprint_of_sample(manifest, audio_root, chosen, max_bad_share)
    settings = ("audio_root", "num_workers", "batch_seconds", "max_bad_share", "device")
    with stage(__file__, output_dir, arguments, ["manifest", "kmeans", "phones"], ignore=settings) as work:
        if work.done:
            return
        rows = enumerate(read_rows(manifest, 0, len(chosen)))
        ids = {number: row["id"] for number, row in compress(rows, chosen)}
        known = read_phones(phones, {*ids.values()}) if phones else {}
        decoder = Decoder(manifest, audio_root, config, None, 0, len(chosen), ~chosen)
        frames = Frames(decoder, Encoder(config, device, centroids.shape[1]), num_workers, batch_seconds)
        frames_a_second = SAMPLE_RATE / config.hop_samples
        wanted = math.ceil(hours * 3600 * frames_a_second)
        with tqdm(total=wanted, desc="features", unit="frame") as progress:
            statistics, of_phones, reasons = measure(frames, centroids, ids, known, progress)
        if reasons.total() > max_bad_share * len(ids) or not statistics.frames:
            told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
            problem = f"{manifest}: {reasons.total():,} of {len(ids):,} utterances cannot be used: {told}"
            raise UserError(problem, "mend the audio, or raise --max_bad_share; label_audio.py names each")
        figures = statistics.figures(frames_a_second)
        if phones and not of_phones.table:
            raise UserError(f"{phones} has no phone for any frame that was used", "times must be in seconds")
        figures |= of_phones.figures() if phones else {}
        write_json(output_dir / "report.json", figures)
        with work.publish("report.png") as path:
            draw(statistics, figures, path)
        work.counts.update(utterances=figures["utterances"], frames=figures["frames"], dropped=dict(reasons))
        for name, value in figures.items():
            print(f"{name:>22}  {value:,.4f}" if isinstance(value, float) else f"{name:>22}  {value}")
        if statistics.frames < 0.9 * wanted:
            print(f"these are not {hours} hours, though {len(ids):,} of {len(chosen):,} utterances were drawn")
    print(output_dir)


if __name__ == "__main__":
    run(kmeans_report)
