"""Cluster audio frames into speech units with k-means.

Usage: python speech_units/fit_kmeans.py --manifest audio/train.jsonl --audio_root audio --output_dir runs/kmeans

Reads: a manifest, JSONL rows {"id", "audio" (path relative to audio_root), "language", "text"}, and the audio.
Writes, in output_dir: kmeans.safetensors ("centroids", float32, (num_units, dim)) and features.json (which features
the centroids belong to; label_audio.py computes the same).
"""

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from features import FeatureConfig, extractor, features_json, read_audio, read_manifest

from towerspeech.stage import UserError, run, stage, write_json

BATCH_SIZE = 10_000  # frames of a k-means step; the default of HuBERT's own recipe
EPOCHS = 20  # passes over the frames, at most
MIN_STEPS = 100


def sample_rows(rows: Iterable[dict], size: int, seed: int) -> list[dict]:
    """Draw up to ``size`` rows at random and in random order; memory is bounded by ``size`` (reservoir sampling)."""
    rng = random.Random(seed)
    kept: list[dict] = []
    for number, row in enumerate(rows):
        if number < size:
            kept.append(row)
        elif (place := rng.randrange(number + 1)) < size:
            kept[place] = row
    rng.shuffle(kept)
    return kept


def sample_frames(rows: list[dict], audio_root: Path, config: FeatureConfig, device: str, max_frames: int):
    """Features of the rows, in order, up to ``max_frames``: float32 (frames, dim), and the number of rows used."""
    import numpy as np
    from tqdm import tqdm

    extract = extractor(config, device)
    frames, filled, used = None, 0, 0
    with tqdm(total=max_frames, desc="features", unit="frame") as progress:
        for row in rows:
            found = extract(read_audio(audio_root / row["audio"], row["where"], config.min_samples))
            if frames is None:
                frames = np.empty((max_frames, found.shape[1]), dtype=np.float32)  # touched, and so used, as it fills
            found = found[: max_frames - filled]
            frames[filled : filled + len(found)] = found
            filled, used = filled + len(found), used + 1
            progress.update(len(found))
            if filled == max_frames:
                break
    return frames[:filled], used


def cluster(frames, num_units: int, seed: int):
    """Mini-batch k-means (k-means++ start): centroids float32 (num_units, dim), and the mean squared distance.

    On one thread: then the same frames give the same bytes on any number of cores.
    """
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    steps_an_epoch = max(1, len(frames) // BATCH_SIZE)
    model = MiniBatchKMeans(
        n_clusters=num_units,
        batch_size=BATCH_SIZE,
        max_iter=max(EPOCHS, -(-MIN_STEPS // steps_an_epoch)),
        max_no_improvement=100,
        init_size=max(3 * BATCH_SIZE, 3 * num_units),
        n_init=1,
        random_state=seed,
    )
    with threadpool_limits(1):
        model.fit(frames)
        distance = -model.score(frames) / len(frames)
    return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32), float(distance)


def fit_kmeans(
    manifest: Path,
    audio_root: Path,
    output_dir: Path,
    features: Literal["mfcc", "hubert"] = "hubert",
    hubert: str = "facebook/hubert-large-ll60k",
    layer: int = 22,
    num_units: int = 5000,
    max_frames: int = 1_000_000,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Fit k-means on a sample of the frames.

    Args:
        manifest: JSONL with "id", "audio", "language" and "text".
        audio_root: Folder that the manifest's audio paths start from.
        output_dir: Folder to write.
        features: mfcc (no model needed) or hubert.
        hubert: HuBERT model: hub name or folder.
        layer: HuBERT layer whose output is clustered, counted from 1.
        num_units: Clusters, that is speech units; at most 65,536.
        max_frames: Frames to fit on, 20 ms each. They are held in memory: 4 KB a frame for hubert-large.
        seed: Decides the sample and the clusters' start.
        device: auto, cpu or cuda, for HuBERT.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    if not 2 <= num_units <= 65536:  # units are stored as uint16
        raise UserError(f"--num_units is {num_units}", "give 2 to 65536")
    if max_frames < num_units:
        raise UserError(f"--max_frames {max_frames} is less than --num_units {num_units}", "raise --max_frames")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy; features of one utterance are small
        os.environ.setdefault(variable, "1")
    config = FeatureConfig(features, hubert, layer) if features == "hubert" else FeatureConfig(features)
    with stage(output_dir, arguments, inputs=["manifest"], ignore=["audio_root", "device"]) as job:
        if job.done:
            return
        rows = sample_rows(read_manifest(manifest, audio_root), max_frames, seed)
        frames, used = sample_frames(rows, audio_root, config, device, max_frames)
        if len(frames) < num_units:
            raise UserError(
                f"{manifest} has {len(frames):,} frames for {num_units:,} units", "lower --num_units or add audio"
            )
        print(f"{len(frames):,} frames of {used:,} utterances, {frames.shape[1]} numbers each", flush=True)
        centroids, distance = cluster(frames, num_units, seed)

        from safetensors.numpy import save_file

        with job.publish("kmeans.safetensors") as path:
            save_file({"centroids": centroids}, path)
        write_json(output_dir / "features.json", features_json(config, *centroids.shape))
        job.counts.update(frames=len(frames), utterances=used, mean_squared_distance=round(distance, 4))
        print(f"{num_units:,} units; mean squared distance {distance:.4g}")
    print(output_dir)


if __name__ == "__main__":
    run(fit_kmeans)
