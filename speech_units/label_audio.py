"""Turn audio into speech units: the nearest k-means centroid of every frame, consecutive repeats collapsed.

Usage: python speech_units/label_audio.py --manifest audio/train.jsonl --audio_root audio --kmeans runs/kmeans \
           --output_dir runs/units/train

Reads: a manifest, JSONL rows {"id", "audio" (path relative to audio_root), "language", "text"}, the audio, and the
folder that fit_kmeans.py wrote.
Writes, in output_dir: units-00000-of-00001.parquet and so on (id, audio, language, duration_s, units, text). Each
shard is finished, or begun anew, by itself: array tasks with --shard N fill one folder together.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from speech_units.features import SAMPLE_RATE, extractor, fingerprint, load_kmeans, read_audio
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.manifests import duration, read_manifest
from towerspeech.stage import Stage, stage
from towerspeech.units import collapse
from towerspeech.units_parquet import shard_name, write_units

SETTINGS = ("audio_root", "shard", "num_workers", "device")  # arguments that do not change the output
FRAMES_AT_ONCE = 2048  # bounds the distance table: 2048 x 5000 units is 41 MB


def nearest(frames, centroids) -> list[int]:
    """Index of the centroid nearest to each frame: (frames, dim), (num_units, dim) -> frames ids.

    |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and |f|^2 is the same for all c.
    """
    norms = (centroids**2).sum(axis=1)
    ids: list[int] = []
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        ids += (norms - 2 * frames[start : start + FRAMES_AT_ONCE] @ centroids.T).argmin(axis=1).tolist()
    return ids


@functools.cache  # a worker loads the k-means and the model once
def load(kmeans: Path, device: str) -> tuple:
    """The k-means' centroids, the settings of its features, and the function that computes them."""
    centroids, config = load_kmeans(kmeans)
    return centroids, config, extractor(config, device)


def label(row: dict, kmeans: Path, audio_root: Path, device: str) -> dict:
    """One manifest row with what a units row has besides."""
    centroids, config, extract = load(kmeans, device)
    samples = read_audio(audio_root / row["audio"], row["where"], config.window_samples, duration(row))
    units = collapse(nearest(extract(samples), centroids))
    return row | {"duration_s": len(samples) / SAMPLE_RATE, "units": units}


@contextlib.contextmanager
def mapper(num_workers: int) -> Iterator[Callable]:
    """Give ``map``, by worker processes if more than one."""
    if num_workers == 1:
        yield map
        return
    # Spawned: CUDA does not survive a fork, and a forked worker would keep the folder's lock.
    with multiprocessing.get_context("spawn").Pool(num_workers) as workers:
        yield functools.partial(workers.imap, chunksize=8)


def write_shard(work: Stage, name: str, rows: list[dict]) -> None:
    """Write one shard of units rows, and say how much speech it holds."""
    with work.publish(f"{name}.parquet") as path:
        write_units(path, rows)
    num_units, seconds = sum(len(row["units"]) for row in rows), sum(row["duration_s"] for row in rows)
    work.counts.update(utterances=len(rows), units=num_units, seconds_of_audio=round(seconds, 2))
    rate = f", {num_units / seconds:.1f} units a second" if rows else ""
    print(f"{name}: {len(rows):,} utterances, {num_units:,} units, {seconds / 3600:.2f} h{rate}", flush=True)


def label_audio(
    manifest: Path,
    audio_root: Path,
    kmeans: Path,
    output_dir: Path,
    num_shards: int = 1,
    shard: int | None = None,
    num_workers: int = 1,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Label every utterance of a manifest with units.

    Args:
        manifest: JSONL with "id", "audio", "language" and "text".
        audio_root: Folder that the manifest's audio paths start from.
        kmeans: Folder written by fit_kmeans.py.
        output_dir: Folder of units shards to write.
        num_shards: Files to write; a shard's rows are held in memory, so give one for every 100,000 utterances or so.
        shard: Write this one alone, counted from 0 (for array tasks); without it all, in turn.
        num_workers: Processes; each loads its own HuBERT.
        device: auto, cpu or cuda, for HuBERT.
        overwrite: Replace a shard if it was made from other input.
    """
    arguments = dict(locals())
    if num_shards < 1 or (shard is not None and not 0 <= shard < num_shards):
        raise UserError(f"--shard {shard} of --num_shards {num_shards}", "shards are 0 to num_shards - 1")
    if num_workers < 1:
        raise UserError(f"--num_workers is {num_workers}", "give at least 1")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy: threads only get in workers' way
        os.environ.setdefault(variable, "1")
    from tqdm import tqdm

    load_kmeans(kmeans)  # bad input is found before workers start
    num_rows = sum(1 for _ in read_manifest(manifest, audio_root if shard is None else None))
    shards = range(num_shards) if shard is None else [shard]
    begins = [num_rows * index // num_shards for index in range(num_shards + 1)]  # the first row of each shard
    left = read_manifest(manifest, audio_root, begins[shards[0]])
    label_row = functools.partial(label, kmeans=kmeans, audio_root=audio_root, device=device)
    with contextlib.ExitStack() as stack:
        map_rows = None
        for index in shards:
            name = shard_name(index, num_shards)
            spoken = list(islice(left, begins[index + 1] - begins[index]))
            arguments["audio"] = fingerprint(spoken, audio_root)  # the same files elsewhere are the same input
            with stage(__file__, output_dir, arguments, ["manifest", "kmeans"], SETTINGS, part=name) as work:
                if work.done:
                    continue
                if map_rows is None:  # workers start with the first shard that is not done yet
                    map_rows = stack.enter_context(mapper(num_workers))
                labelled = tqdm(map_rows(label_row, spoken), total=len(spoken), desc=name, unit="utt")
                write_shard(work, name, list(labelled))
    print(output_dir)


if __name__ == "__main__":
    run(label_audio)
