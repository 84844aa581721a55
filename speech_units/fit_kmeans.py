"""Cluster audio frames into speech units with k-means.

Usage: python speech_units/fit_kmeans.py --manifest audio/train/manifest.jsonl --audio_root audio \
           --output_dir runs/kmeans
       python speech_units/fit_kmeans.py --manifest mls/manifest.jsonl gigaspeech/manifest.jsonl \
           --audio_root corpora/mls corpora/gigaspeech --weights 1 1 --hours 100 --output_dir runs/kmeans

Reads: manifests (make_manifest.py; their fields stand in towerspeech/manifests.py), and of their audio a sample.
Writes, in output_dir: kmeans.safetensors ("centroids", float32, (num_units, dim)) and features.json (which features
the centroids belong to; label_audio.py computes the same). While it works, the sample's frames lie there too, twice:
30 GB for 20 hours of HuBERT-large.
"""

import contextlib
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from speech_units.audio import SAMPLE_RATE, is_silent, too_many_bad
from speech_units.features import BATCH_SECONDS, Encoder, FeatureConfig, encoder_config, features_json
from speech_units.kmeans import fit
from speech_units.sample import choose, fingerprint_of_sample, lengths_of
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import remove, write_json
from towerspeech.stage import Stage, stage
from towerspeech.units import check_num_units

KEPT = ".centroids.safetensors"  # what a fit has done so far
SETTINGS = ("audio_root", "num_workers", "batch_seconds", "max_bad_share", "device")


def collect(store, frames, manifest: int, chosen: int, max_bad_share: float, progress) -> Counter:
    """Add one manifest's chosen utterances to a FrameFile; returns how many could not be used, by reason."""
    reasons: Counter[str] = Counter()
    first = ""
    numbers: Counter[int] = Counter()  # windows so far of a row
    for pieces, encoded in frames:
        for piece, found in itertools.zip_longest(pieces, encoded):
            if piece.error or is_silent(piece.peak):
                reason, problem = (piece.error.reason, piece.error.problem) if piece.error else ("silent", "is silent")
                reasons[reason] += 1
                first = first or f"{piece.place} {problem}"
                if reasons.total() > max_bad_share * chosen:
                    raise too_many_bad(reasons.total(), chosen, max_bad_share, first)
                continue
            store.add((manifest, piece.index, numbers[piece.index]), found.cpu().numpy(), piece.last)
            numbers[piece.index] += 1
            progress.update(piece.num_samples / SAMPLE_RATE)
    return reasons


def cluster(work: Stage, store, encoder: Encoder, num_units: int, seed: int, reasons: Counter) -> None:
    """Fit k-means to the frames of a FrameFile, write it, and say how it fits."""
    if store.num_frames < num_units:
        problem = f"the sample has {store.num_frames:,} frames for {num_units:,} units"
        raise UserError(problem, "lower --num_units, raise --hours, or add audio")
    frames = store.sorted(work.output_dir / ".sorted.f4")
    utterances = len({key[:2] for key in store.entries})
    print(f"{len(frames):,} frames of {utterances:,} utterances, {frames.shape[1]} numbers each", flush=True)
    if reasons:
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())))
    fitted = fit(frames, num_units, seed, encoder.device, work.output_dir / KEPT)

    from safetensors.numpy import save_file

    with work.publish("kmeans.safetensors") as path:
        save_file({"centroids": fitted.centroids}, path)
    write_json(work.output_dir / "features.json", features_json(encoder.config, *fitted.centroids.shape))
    work.counts.update(frames=len(frames), utterances=utterances, dropped=dict(reasons))
    work.counts.update(mean_squared_distance=round(fitted.distance, 4))
    work.counts.update(distinct_units=num_units, used_units=fitted.used)
    print(f"{num_units:,} distinct units, {fitted.used:,} of them used; mean squared distance {fitted.distance:.4g}")


def fit_kmeans(
    manifest: list[Path],
    audio_root: list[Path],
    output_dir: Path,
    features: Literal["mfcc", "hubert", "wav2vec2", "wavlm"] = "hubert",
    encoder: str = "facebook/hubert-large-ll60k",
    layer: int = 22,
    num_units: int = 5000,
    hours: float = 20,
    weights: list[float] | None = None,
    max_seconds: float = 7200,
    seed: int = 0,
    num_workers: int | None = None,
    batch_seconds: float = BATCH_SECONDS,
    max_bad_share: float = 0.01,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Fit k-means on the frames of a sample of the audio.

    Args:
        manifest: One or more manifests.
        audio_root: Folder that their audio paths start from: one for all, or one for each.
        output_dir: Folder to write.
        features: mfcc (no model needed), hubert, wav2vec2 or wavlm.
        encoder: The model: hub name or folder.
        layer: Layer of the encoder whose output is clustered, counted from 1.
        num_units: Clusters, that is speech units; at most 65,534.
        hours: Hours of audio to fit on, all manifests together.
        weights: What share of the hours each manifest gives; default: as it has of all.
        max_seconds: Longer utterances are left out.
        seed: Decides the sample and the clusters' start.
        num_workers: Processes that decode audio ahead; default: on a GPU one for each CPU but one, else none.
        batch_seconds: Seconds of audio that a GPU encodes at a time, padding included.
        max_bad_share: Of a manifest's sample, how many utterances may be left out because they cannot be used.
        device: auto, cpu or cuda.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    check_num_units(num_units)
    roots = audio_root * len(manifest) if len(audio_root) == 1 else audio_root
    if len(roots) != len(manifest) or len(weights or manifest) != len(manifest):
        given = f"{len(manifest)} manifests, {len(audio_root)} of --audio_root, {len(weights or [])} of --weights"
        raise UserError(given, "give one --audio_root for all or one each, and one of --weights each or none")
    if not hours > 0 or any(not weight > 0 for weight in weights or []):
        raise UserError(f"--hours {hours:g}, --weights {weights}", "give numbers above 0")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: threads get in the decoding processes' way
    from tqdm import tqdm

    from speech_units.frame_file import FrameFile
    from speech_units.frames import Decoder, Frames

    chosen = choose([lengths_of(path) for path in manifest], hours, weights, seed)
    samples = zip(manifest, roots, chosen, strict=True)
    arguments["audio"] = [fingerprint_of_sample(*sample, max_bad_share) for sample in samples]
    with stage(__file__, output_dir, arguments, inputs=["manifest"], ignore=SETTINGS) as work:
        if not work.done:
            config = FeatureConfig("mfcc") if features == "mfcc" else encoder_config(features, encoder, layer)
            model, reasons = Encoder(config, device), Counter()
            with (
                contextlib.closing(FrameFile(output_dir / ".frames.f4")) as store,
                tqdm(desc="features", unit="s") as progress,
            ):
                for number, (path, root, mask) in enumerate(zip(manifest, roots, chosen, strict=True)):
                    skip = ~mask | store.done(number, len(mask))
                    found = Frames(
                        Decoder(path, root, config, max_seconds, 0, len(mask), skip), model, num_workers, batch_seconds
                    )
                    reasons += collect(store, found, number, int(mask.sum()), max_bad_share, progress)
            cluster(work, store, model, num_units, seed, reasons)
    for path in output_dir.glob(".*.f4"):  # the sample's frames, also of a run that was killed just before
        remove(path)
    for name in (".frames.jsonl", KEPT):
        (output_dir / name).unlink(missing_ok=True)
    print(output_dir)


if __name__ == "__main__":
    run(fit_kmeans)
