"""How good is a k-means? Figures and a plot of its units on audio that it was not fitted on.

Usage: python speech_units/kmeans_report.py --manifest audio/dev.jsonl --audio_root audio --kmeans runs/kmeans \\
           --output_dir runs/kmeans_report --phones audio/dev_phones.jsonl

Reads: a manifest, its audio, and the folder that fit_kmeans.py or import_kmeans.py wrote; --hours of the utterances,
drawn at random, are used. With --phones, JSONL rows {"id", "phones": [["HH", 0.13, 0.21], ...]}: the phones of an
utterance of the manifest in order, each with where it starts and ends, in seconds from the utterance's start.
Writes, in output_dir: report.json and report.png.

In report.json:
    hours, frames, utterances    what was used; an hour is counted by its frames
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
import random
from collections.abc import Iterator
from pathlib import Path

from speech_units.features import SAMPLE_RATE, FeatureConfig, extractor, fingerprint, load_kmeans, read_audio
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.manifests import read_manifest, seconds, segment
from towerspeech.records import iter_jsonl
from towerspeech.sampling import reservoir
from towerspeech.stage import stage

FRAMES_AT_ONCE = 2048  # bounds the distance table: 2048 x 5000 units is 41 MB
COMPARED = 10_000  # files that decide whether the audio is still the same


def frames_of(rows: list[dict], audio_root: Path, config: FeatureConfig, device: str) -> Iterator[tuple]:
    """Stream manifest rows with their features, float32 (frames, dim)."""
    extract = extractor(config, device)
    for row in rows:
        start, end = segment(row)
        whole = start == 0 and end is None
        path, where = audio_root / row["audio"], row["where"]
        samples = read_audio(path, where, config.window_samples, seconds(row) if whole else None)
        spoken = samples[round(start * SAMPLE_RATE) : None if end is None else round(end * SAMPLE_RATE)]
        if len(spoken) < config.window_samples:
            raise UserError(f"{where}: {path} has {len(spoken)} samples from {start} s on", "mend or remove the line")
        yield row, extract(spoken)


def nearest(frames, centroids, norms):
    """Ids of the nearest centroids, (frames,), and the squared distances to them, float64 (frames,)."""
    import numpy as np

    ids = np.empty(len(frames), dtype=np.int64)
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        some = slice(start, start + FRAMES_AT_ONCE)
        ids[some] = (norms - 2 * frames[some] @ centroids.T).argmin(axis=1)
    # Not from the table, in which large numbers that cancel leave little of a small distance.
    return ids, ((frames - centroids[ids]) ** 2).sum(axis=1, dtype=np.float64)


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


def phones_of_frames(phones: tuple, num_frames: int, config: FeatureConfig) -> list[str | None]:
    """The phone in the middle of each frame; None where there is none."""
    import numpy as np

    labels, starts, ends = phones
    middles = (np.arange(num_frames) * config.hop_samples + config.window_samples / 2) / SAMPLE_RATE
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


def kmeans_report(
    manifest: Path,
    audio_root: Path,
    kmeans: Path,
    output_dir: Path,
    hours: float = 1.0,
    phones: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Measure a k-means on audio that it was not fitted on.

    Args:
        manifest: JSONL with "id", "audio", "language" and "text".
        audio_root: Folder that the manifest's audio paths start from.
        kmeans: Folder written by fit_kmeans.py or import_kmeans.py.
        output_dir: Folder to write.
        hours: Audio to use, in whole utterances. 5,000 units want an hour or more for each to have its chance.
        phones: JSONL with "id" and "phones", for purity and PNMI.
        seed: Seed of the sample.
        device: auto, cpu or cuda, for HuBERT.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    if not 0 < hours < math.inf:
        raise UserError(f"--hours is {hours}", "give more than 0")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy; features of one utterance are small
        os.environ.setdefault(variable, "1")
    from tqdm import tqdm

    from speech_units.unit_statistics import PhoneStatistics, UnitStatistics

    centroids, config = load_kmeans(kmeans)
    norms = (centroids**2).sum(axis=1)
    rng = random.Random(seed)
    rows, num_rows = reservoir(read_manifest(manifest), math.ceil(hours * 3600), rng)  # a second each, at the least
    rng.shuffle(rows)
    arguments["audio"] = fingerprint(rows[:COMPARED], audio_root)  # the same files elsewhere are the same input
    inputs = ["manifest", "kmeans", "phones"]
    with stage(__file__, output_dir, arguments, inputs, ignore=["audio_root", "device"]) as work:
        if work.done:
            return
        known = read_phones(phones, {row["id"] for row in rows}) if phones else {}
        statistics, of_phones = UnitStatistics(*centroids.shape), PhoneStatistics(len(centroids))
        frames_a_second = SAMPLE_RATE / config.hop_samples
        wanted = math.ceil(hours * 3600 * frames_a_second)
        with tqdm(total=wanted, desc="features", unit="frame") as progress:
            for row, frames in frames_of(rows, audio_root, config, device):
                ids, distances = nearest(frames, centroids, norms)
                statistics.add(frames, ids, distances)
                if row["id"] in known:
                    of_phones.add(phones_of_frames(known[row["id"]], len(ids), config), ids)
                progress.update(len(ids))
                if statistics.frames >= wanted:
                    break
        figures = statistics.figures(frames_a_second)
        if phones and not of_phones.table:
            raise UserError(f"{phones} has no phone for any frame that was used", "times must be in seconds")
        figures |= of_phones.figures() if phones else {}
        write_json(output_dir / "report.json", figures)
        with work.publish("report.png") as path:
            draw(statistics, figures, path)
        work.counts.update(utterances=figures["utterances"], frames=figures["frames"])
        for name, value in figures.items():
            print(f"{name:>22}  {value:,.4f}" if isinstance(value, float) else f"{name:>22}  {value}")
        if statistics.frames < wanted:
            print(f"these are not {hours} hours: {len(rows):,} of {num_rows:,} utterances were drawn, and are used up")
    print(output_dir)


if __name__ == "__main__":
    run(kmeans_report)
