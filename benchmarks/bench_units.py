"""Time what makes units of speech beside other ways, all in one run, on a CPU or a GPU.

Usage: python benchmarks/bench_units.py --output_dir runs/bench_units
       python benchmarks/bench_units.py --output_dir runs/bench_units --device cuda --hours 4

Needs what install.sh installs, and no data. The audio is noise, as long as LibriSpeech's utterances are; the encoder
has HuBERT-large's shape up to layer 22 and random weights. Compares
  labelling   label_audio.py (decoding, encoding, units, writing; without its start, which a run on two seconds of
              audio tells) beside encoding alone; beside a plain loop over the utterances; beside batches of 8, padded,
              in the order of the files
  assignment  5,000 centroids of 1,024 numbers, beside the matrix product in it, scikit-learn's predict and torch.cdist
  fitting     1,000 units, 100,000 frames of 1,024 numbers, beside MiniBatchKMeans with the settings of HuBERT's recipe
              (but one start, and early stopping as there)
  decoding    Ogg Opus of 48 kHz, two processes beside one, and beside two that share nothing: what the machine gives
and ends with one JSON line a comparison. ``ours`` and ``theirs`` are seconds, if no other unit is named; ``same`` is
the share of utterances with the same units.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import apart, comparison, report, run_script
from benchmarks.shapes import DIM, librispeech_lengths, write_encoder
from speech_units.features import BATCH_SECONDS
from towerspeech.command import run
from towerspeech.files import read_json
from towerspeech.units_parquet import read_units

NUM_UNITS = 5000
UNSORTED_BATCH = 8  # utterances
REPEATS = 9
LABEL_ROUNDS = 3  # in turns, of which the fastest counts: the machine's speed drifts
SHORT = 2.0  # seconds of audio, of which a run is its start
CLUSTERS, LATENT = 3000, 40  # of the frames that are fitted


# --- What is measured on --------------------------------------------------------------------------
def make_audio(folder: Path, lengths: list[float], rate: int, suffix: str, files: int) -> Path:
    """Write noise as so many files, and a manifest that names them again and again, an utterance a row."""
    import numpy as np
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    lengths = [lengths[number % files] for number in range(len(lengths))]
    for number, seconds in enumerate(lengths[:files]):
        samples = np.random.default_rng(number).standard_normal(round(seconds * rate)) * 0.1
        soundfile.write(folder / f"{number}.{suffix}", samples, rate, format="OGG" if suffix == "opus" else None)
    with open(folder / "manifest.jsonl", "w") as file:
        for number, seconds in enumerate(lengths):
            row = {"id": f"u{number}", "audio": f"{number % files}.{suffix}", "language": "en", "text": ""}
            file.write(json.dumps(row | {"duration_s": round(seconds, 2)}) + "\n")
    return folder / "manifest.jsonl"


def make_kmeans(folder: Path, encoder: Path, layer: int) -> None:
    """An encoder with HuBERT-large's shape and random weights, and random centroids for it."""
    import numpy as np
    from safetensors.numpy import save_file

    from speech_units.features import encoder_config, features_json

    write_encoder(encoder, layer)
    folder.mkdir(parents=True, exist_ok=True)
    centroids = np.random.default_rng(0).standard_normal((NUM_UNITS, DIM)).astype("f4")
    save_file({"centroids": centroids}, folder / "kmeans.safetensors")
    config = encoder_config("hubert", str(encoder), layer)
    (folder / "features.json").write_text(json.dumps(features_json(config, *centroids.shape)))


# --- Labelling ------------------------------------------------------------------------------------
def label(manifest: Path, kmeans: Path, device: str) -> tuple[dict, list[list[int]]]:
    """Seconds of the other ways of labelling, and the units that a plain loop finds."""
    import soundfile
    import torch

    from speech_units import frames
    from speech_units.features import Encoder, load_kmeans, prepare
    from speech_units.kmeans import Nearest
    from towerspeech.manifests import read_manifest
    from towerspeech.units import collapse

    rows = list(read_manifest(manifest))
    centroids, config = load_kmeans(kmeans)
    samples = [soundfile.read(manifest.parent / row["audio"], dtype="float32")[0] for row in rows]
    prepared = [prepare(part, config) for part in samples]
    pieces = [frames.Decoded(n, "", None, part, len(part)) for n, part in enumerate(prepared)]
    seconds = {}

    def timed(name: str, function: Callable):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
        return found

    encoder = Encoder(config, device)
    encoder.encode(prepared[:2])  # the first call takes longer
    batches = [[p.prepared for p in batch] for batch in frames.plan(pieces, encoder.batches, BATCH_SECONDS)]
    timed("encoding", lambda: [encoder.encode(batch) for batch in batches])

    def plainly() -> list[list[int]]:
        nearest, units = Nearest(centroids, encoder.device), []
        for row in rows:
            part = prepare(soundfile.read(manifest.parent / row["audio"], dtype="float32")[0], config)
            units.append(collapse(nearest(encoder.encode([part]))[0].tolist()))
        return units

    plain = timed("one at a time", plainly)

    def unsorted() -> None:
        nearest, model = Nearest(centroids, encoder.device), encoder.model
        for first in range(0, len(rows), UNSORTED_BATCH):
            parts = prepared[first : first + UNSORTED_BATCH]
            lengths = torch.tensor([len(part) for part in parts])
            padded = torch.zeros(len(parts), int(lengths.max()))
            for row, part in zip(padded, parts, strict=True):
                row[: len(part)] = torch.from_numpy(part)
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            autocast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=device == "cuda")
            with torch.inference_mode(), autocast:
                found = model(padded.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
            nearest([f[: encoder.num_frames(int(n))] for f, n in zip(found, lengths, strict=True)])

    timed("padded, unsorted", unsorted)
    return seconds, plain


def padding_share(hours: float = 100) -> float:
    """Of the batches that a GPU would be given for audio of LibriSpeech's lengths."""
    from speech_units import frames

    lengths = librispeech_lengths(round(hours * 3600 / 12.3))
    pieces = [frames.Decoded(n, "", None, None, round(s * 16000)) for n, s in enumerate(lengths)]
    pool = round(frames.POOL_BATCHES * BATCH_SECONDS / 12.3)  # what lies there to be sorted
    padded = total = 0
    for first in range(0, len(pieces), pool):
        for batch in frames.plan(pieces[first : first + pool], "padded", BATCH_SECONDS):
            padded += len(batch) * max(piece.num_samples for piece in batch)
            total += sum(piece.num_samples for piece in batch)
    return 1 - total / padded


def bench_labelling(output_dir: Path, device: str, hours: float, layer: int) -> list[dict]:
    lengths = librispeech_lengths(max(UNSORTED_BATCH, round(hours * 3600 / 12.3)))
    manifest = make_audio(output_dir / "audio", lengths, 16000, "flac", min(len(lengths), 200))
    short = make_audio(output_dir / "short", [SHORT], 16000, "flac", 1)
    apart(make_kmeans, output_dir / "kmeans", output_dir / "encoder", layer)
    kmeans, units = output_dir / "kmeans", output_dir / "units"
    rounds = []
    for _ in range(LABEL_ROUNDS):
        _, (others, plain) = apart(label, manifest, kmeans, device)
        for name, labelled in (("start", short), ("ours", manifest)):
            words = ["--manifest", labelled, "--audio_root", labelled.parent, "--kmeans", kmeans, "--device", device]
            run_script("speech_units/label_audio.py", units, *words)
            info = read_json(next(units.glob("*run_info.json")), "run again")
            others[name] = info["seconds"]  # without imports
        rounds.append(others)
        print(f"labelling, seconds: {others}", flush=True)
    took = {name: min(one[name] for one in rounds) for name in rounds[0]}
    counts = info["counts"]
    found = [row["units"] for row in read_units(units)]
    same = round(sum(a == b for a, b in zip(found, plain, strict=True)) / len(plain), 4)
    audio_s = counts["seconds_of_audio"]
    ours = (took["ours"] - took["start"]) / (audio_s - SHORT) * audio_s
    facts = {"audio_s": audio_s, "audio_s_a_second": round(audio_s / ours, 1), "start_s": round(took["start"], 1)}
    if device == "cuda":
        facts["idle_share"] = counts["encoder_idle_share"]
    name = f"labelling {audio_s / 3600:.2f} h on {device}"
    return [
        comparison(f"{name}, beside encoding alone", ours, took["encoding"], 1 / 1.1, **facts),
        comparison(f"{name}, beside one at a time", ours, took["one at a time"], 1 / 1.02, same),
        comparison(f"{name}, beside padded as they come", ours, took["padded, unsorted"], 1.5),
        comparison("padding of batches of LibriSpeech's lengths", padding_share(), 0.05, 1.0, unit="share"),
    ]


# --- Assignment -----------------------------------------------------------------------------------
def assign(device: str) -> dict[str, float]:
    """Seconds for a million frames, the median of some rounds; each way once a round."""
    import numpy as np
    import torch
    from sklearn.cluster import MiniBatchKMeans

    from speech_units.kmeans import Nearest

    number, part = (1 << 14, 1 << 12) if device == "cpu" else (1 << 20, 1 << 16)
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((NUM_UNITS, DIM)).astype("f4")
    frames = torch.randn(number, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    parts, on_device = list(frames.split(part)), torch.from_numpy(centroids).to(device)
    few = frames[: 1 << 14].cpu().numpy()
    sklearn = MiniBatchKMeans(NUM_UNITS, init=centroids, n_init=1, max_iter=1, batch_size=NUM_UNITS).fit(centroids)
    nearest = Nearest(centroids, device)
    ways = {
        "ours": lambda: nearest([frames]),
        "scikit-learn's predict": lambda: sklearn.predict(few),
        "torch.cdist": lambda: [torch.cdist(f, on_device).argmin(dim=1) for f in parts],
    }
    for rows in (1 << 10, 1 << 12, 1 << 13):  # the peak is the fastest
        out = torch.empty(rows, NUM_UNITS, device=device)
        ways[f"product {rows}"] = lambda rows=rows, out=out: [
            torch.mm(f, on_device.T, out=out[: len(f)]) for f in frames.split(rows)
        ]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) * 1e6
            took[name].append(seconds / (len(few) if "scikit" in name else number))
    best = {name: float(np.median(seconds)) for name, seconds in took.items()}
    best["product"] = min(took for name, took in best.items() if name.startswith("product "))
    return best


def bench_assignment(device: str) -> list[dict]:
    _, took = apart(assign, device)
    gflops = round(2 * NUM_UNITS * DIM / took["product"] / 1e3)
    name = f"a million frames to {NUM_UNITS:,} centroids on {device}, beside"
    product = "the matrix product in it"
    return [
        comparison(f"{name} {product}", took["ours"], took["product"], 0.85, peak_gflops=gflops),
        comparison(f"{name} scikit-learn's predict on the CPU", took["ours"], took["scikit-learn's predict"]),
        comparison(f"{name} torch.cdist", took["ours"], took["torch.cdist"]),
    ]


# --- Fitting --------------------------------------------------------------------------------------
def fit(device: str, num_frames: int, num_units: int) -> dict[str, tuple[float, float]]:
    """Seconds and mean squared distance, measured in the same way, of both."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import pairwise_distances_argmin_min

    from speech_units import kmeans

    rng = np.random.default_rng(0)
    shares = np.arange(1, CLUSTERS + 1) ** -0.7  # some sounds are frequent
    of = rng.choice(CLUSTERS, num_frames, p=shares / shares.sum())
    inner = rng.normal(size=(CLUSTERS, LATENT))[of] + 0.4 * rng.normal(size=(num_frames, LATENT))
    spread = rng.normal(size=(LATENT, DIM)) / np.sqrt(np.arange(1, LATENT + 1))[:, None]
    frames = (inner @ spread + 0.5 * rng.normal(size=(num_frames, DIM))).astype("f4")

    def ours():
        return kmeans.fit(frames, num_units, seed=0, device=device).centroids

    def theirs():
        recipe = {"batch_size": 10_000, "max_no_improvement": 100, "init_size": 30_000, "n_init": 1}
        return MiniBatchKMeans(num_units, max_iter=20, random_state=0, **recipe).fit(frames).cluster_centers_

    found = {}
    for name, way in (("ours", ours), ("theirs", theirs)):
        began = time.perf_counter()
        centroids = way()
        took = time.perf_counter() - began
        _, to_nearest = pairwise_distances_argmin_min(frames, centroids)
        found[name] = took, float((to_nearest.astype("f8") ** 2).mean())
        print(f"fitting, {name}: {found[name]}", flush=True)
    return found


def bench_fitting(device: str, num_frames: int = 100_000, num_units: int = 1000) -> list[dict]:
    _, found = apart(fit, device, num_frames, num_units)
    (ours, our_distance), (theirs, their_distance) = found["ours"], found["theirs"]
    name = f"fitting {num_units:,} units to {num_frames:,} frames on {device}, beside MiniBatchKMeans"
    return [
        comparison(name, ours, theirs, 2.0),
        comparison(f"{name}: distance", our_distance, their_distance, 1 / 1.01, unit="mean squared distance"),
    ]


# --- Decoding -------------------------------------------------------------------------------------
def decode(manifest: Path, num_workers: int, together=None) -> float:
    """Seconds for an hour of audio, but for the first parcels, which wait until the processes have started.

    ``together`` is a barrier before which several calls wait for one another.
    """
    from torch.utils.data import DataLoader

    from speech_units.features import FeatureConfig
    from speech_units.frames import PARCELS_AHEAD, Decoder
    from speech_units.sample import lengths_of

    decoder = Decoder(manifest, manifest.parent, FeatureConfig("hubert"), None, 0, len(lengths_of(manifest)))
    ahead = {"prefetch_factor": PARCELS_AHEAD, "multiprocessing_context": "spawn"} if num_workers else {}
    parcels = iter(DataLoader(decoder, batch_size=None, num_workers=num_workers, collate_fn=list, **ahead))
    for _ in range(num_workers or 1):  # one from each
        next(parcels)
    if together:
        together.wait()
    began = time.perf_counter()
    audio_s = sum(piece.num_samples for parcel in parcels for piece in parcel) / 16000
    return (time.perf_counter() - began) / audio_s * 3600


def decode_at_once(manifest: Path) -> float:
    """Seconds for an hour of audio by two processes that each decode all of it: what the machine gives."""
    with multiprocessing.Manager() as manager, ThreadPoolExecutor(2) as threads:
        together = manager.Barrier(2)
        both = [threads.submit(apart, decode, manifest, 0, together) for _ in range(2)]
        return max(one.result()[1] for one in both) / 2


def bench_decoding(output_dir: Path, hours: float) -> list[dict]:
    lengths = librispeech_lengths(round(hours * 3600 / 12.3))
    manifest = make_audio(output_dir / "opus", lengths, 48000, "opus", 50)
    rounds = []
    for _ in range(3):
        rounds.append({number: apart(decode, manifest, number)[1] for number in (2, 1)})
        rounds[-1]["at once"] = decode_at_once(manifest)
        print(f"decoding an hour of Opus, seconds by processes: {rounds[-1]}", flush=True)
    took = {name: min(one[name] for one in rounds) for name in rounds[0]}
    name = "decoding an hour of Opus, two processes beside"
    return [
        comparison(f"{name} one", took[2], took[1], 1.8),
        comparison(f"{name} two that share nothing", took[2], took["at once"]),
    ]


def bench_units(output_dir: Path, device: str = "cpu", hours: float = 0.035, layer: int = 22) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        device: cpu or cuda.
        hours: Audio to label; of 0.035 h each way takes a CPU of two cores a minute.
        layer: Layers of the encoder; HuBERT-large has 24, and units are of the 22nd.
    """
    lines = bench_decoding(output_dir, hours=1.5)
    lines += bench_assignment(device)
    lines += bench_fitting(device)
    lines += bench_labelling(output_dir, device, hours, layer)
    report(lines)


if __name__ == "__main__":
    run(bench_units)
