"""Cluster audio frames into speech units with k-means.

Usage: python speech_units/fit_kmeans.py --manifest audio/train.jsonl --audio_root audio --output_dir runs/kmeans

Reads: a manifest, JSONL rows {"id", "audio" (path relative to audio_root), "language", "text"}, and the audio.
Writes, in output_dir: kmeans.safetensors ("centroids", float32, (num_units, dim)) and features.json (which features
the centroids belong to; label_audio.py computes the same).
"""

import os
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

from speech_units.features import FeatureConfig, extractor, features_json, fingerprint, hubert_config, read_audio
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.manifests import duration, read_manifest
from towerspeech.sampling import reservoir
from towerspeech.stage import stage
from towerspeech.units import check_num_units

BATCH_SIZE = 10_000  # frames of a k-means step; the default of HuBERT's own recipe
EPOCHS = 20  # passes over the frames, at most
MIN_STEPS = 100
COMPARED = 10_000  # files that decide whether the audio is still the same


def sample_frames(rows: list[dict], audio_root: Path, config: FeatureConfig, device: str, max_frames: int):
    """Features of the rows, in order, up to ``max_frames``: float32 (frames, dim), and the number of rows used."""
    import numpy as np
    from tqdm import tqdm

    extract = extractor(config, device)
    frames, filled, used = None, 0, 0
    with tqdm(total=max_frames, desc="features", unit="frame") as progress:
        for row in rows:
            samples = read_audio(audio_root / row["audio"], row["where"], config.window_samples, duration(row))
            spoken = extract(samples)[: max_frames - filled]
            if frames is None:
                frames = np.empty((max_frames, spoken.shape[1]), dtype=np.float32)  # touched, and so used, as it fills
            frames[filled : filled + len(spoken)] = spoken
            filled, used = filled + len(spoken), used + 1
            progress.update(len(spoken))
            if filled == max_frames:
                break
    return frames[:filled], used


class Fit(NamedTuple):
    """One fit of k-means."""

    centroids: Any  # (num_units, dim) float32
    distance: float  # mean squared
    used: int  # centroids that are nearest to a frame
    distinct: int  # centroids that differ


def fit_once(frames, num_units: int, seed: int, **settings) -> Fit:
    """Fit scikit-learn's mini-batch k-means to frames, (frames, dim)."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    steps_an_epoch = max(1, len(frames) // BATCH_SIZE)
    model = MiniBatchKMeans(
        n_clusters=num_units,
        batch_size=BATCH_SIZE,
        max_iter=max(EPOCHS, -(-MIN_STEPS // steps_an_epoch)),
        max_no_improvement=100,
        init_size=3 * max(BATCH_SIZE, num_units),
        n_init=1,
        random_state=seed,
        **settings,
    )
    model.fit(frames)
    centroids = np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
    used, distinct = len(np.unique(model.predict(frames))), len(np.unique(centroids, axis=0))
    return Fit(centroids, float(-(model.score(frames) / len(frames))), used, distinct)


def differing_start(frames, num_units: int, seed: int):
    """Choose centroids to begin with among frames that differ, of which there must be enough: (num_units, dim)."""
    import numpy as np
    from sklearn.cluster import kmeans_plusplus

    keys = [hash((frame + 0.0).tobytes()) for frame in frames]  # 0.0 and -0.0 are the same
    _, rows, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(rows) < num_units:
        raise UserError(
            f"there are only {len(rows):,} distinct frames for {num_units:,} units",
            "lower --num_units, or add audio (digital silence is the same in every frame)",
        )
    order = rows.argsort()  # np.unique sorts by hash, which is another one in every process
    order = np.random.default_rng(seed).permutation(order)[: 3 * max(BATCH_SIZE, num_units)]
    weights = counts[order].astype(frames.dtype)
    return kmeans_plusplus(frames[rows[order]], num_units, sample_weight=weights, random_state=seed)[0]


def cluster(frames, num_units: int, seed: int) -> Fit:
    """Mini-batch k-means (k-means++ start).

    Centroids that hardly any frame is nearest to are begun anew at random frames, which helps in speech; where many
    frames are the same, as in digital silence, it makes more and more centroids the same. So if any centroid is used
    by no frame, k-means is fitted a second time, begun at frames that differ and without that; the better fit is kept.
    On one thread: then the same frames give the same bytes on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        best = fit_once(frames, num_units, seed)
        if min(best.used, best.distinct) < num_units:
            start = differing_start(frames, num_units, seed)
            other = fit_once(frames, num_units, seed, init=start, reassignment_ratio=0)
            best = max(best, other, key=lambda fit: (min(fit.used, fit.distinct), -fit.distance))
    if best.distinct < num_units:
        raise UserError(
            f"only {best.distinct:,} of {num_units:,} centroids are distinct",
            "lower --num_units or add audio that differs",
        )
    return best


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
        num_units: Clusters, that is speech units; at most 65,534.
        max_frames: Frames to fit on, most often 20 ms each. They are held in memory: 4 KB a frame for hubert-large.
        seed: Decides the sample and the clusters' start.
        device: auto, cpu or cuda, for HuBERT.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    check_num_units(num_units)
    if max_frames < num_units:
        raise UserError(f"--max_frames {max_frames} is less than --num_units {num_units}", "raise --max_frames")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy; features of one utterance are small
        os.environ.setdefault(variable, "1")
    rng = random.Random(seed)
    rows, _ = reservoir(read_manifest(manifest, audio_root), max_frames, rng)
    rng.shuffle(rows)
    arguments["audio"] = fingerprint(rows[:COMPARED], audio_root)  # the same files elsewhere are the same input
    with stage(__file__, output_dir, arguments, inputs=["manifest"], ignore=["audio_root", "device"]) as work:
        if work.done:
            return
        config = hubert_config(hubert, layer) if features == "hubert" else FeatureConfig("mfcc")
        frames, used = sample_frames(rows, audio_root, config, device, max_frames)
        if len(frames) < num_units:
            raise UserError(
                f"{manifest} has {len(frames):,} frames for {num_units:,} units", "lower --num_units or add audio"
            )
        print(f"{len(frames):,} frames of {used:,} utterances, {frames.shape[1]} numbers each", flush=True)
        fit = cluster(frames, num_units, seed)

        from safetensors.numpy import save_file

        with work.publish("kmeans.safetensors") as path:
            save_file({"centroids": fit.centroids}, path)
        write_json(output_dir / "features.json", features_json(config, *fit.centroids.shape))
        work.counts.update(frames=len(frames), utterances=used, mean_squared_distance=round(fit.distance, 4))
        work.counts.update(distinct_units=num_units, used_units=fit.used)
        print(f"{num_units:,} distinct units, {fit.used:,} of them used; mean squared distance {fit.distance:.4g}")
    print(output_dir)


if __name__ == "__main__":
    run(fit_kmeans)
