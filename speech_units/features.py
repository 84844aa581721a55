"""Audio files and the frame features that speech units are clustered from: MFCC or a HuBERT layer.

Shared by fit_kmeans.py and label_audio.py, so that audio is labelled with exactly what the k-means was fitted on.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path

from speech_units.containers import ends_early
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json

SAMPLE_RATE = 16000  # Hz
RATES = range(1000, 768_001)  # Hz; what else a header says is an error of its own
LOUDEST = 1000  # of samples that should lie between -1 and 1
WHOLE = 1 << 20  # bytes; 30 s of WAV. A fingerprint takes smaller files whole, of larger ones three blocks
BLOCK = 1 << 14  # bytes
READERS = 16  # threads: on a cluster's file system it is the opening that takes time
HOP = 320  # samples: 20 ms
WINDOW = 480  # samples: 30 ms
FFT_SIZE = 512
NUM_MELS = 40
NUM_MFCC = 14  # the 0th, loudness, included
PRE_EMPHASIS = 0.97
DELTA_WEIGHT = 0.7  # deltas count less in k-means' distances
LOG_FLOOR = 1e-10  # power of digital silence
HUBERT_WINDOW = 400  # samples; features.json of earlier versions does not say it


@dataclass(frozen=True)
class FeatureConfig:
    """Which features; kept as features.json beside the k-means."""

    features: str  # mfcc or hubert
    hubert: str = ""  # hub name or folder
    layer: int = 0  # counted from 1
    hop_samples: int = HOP
    window_samples: int = WINDOW  # the shortest audio that gives a frame


# --- Audio ----------------------------------------------------------------------------------------
def fingerprint(rows: Iterable[dict], audio_root: Path) -> str:
    """SHA-256 over the rows' audio: path in the manifest, size, and content (of large files three blocks)."""

    def digest(row: dict) -> bytes:
        path = Path(audio_root) / row["audio"]
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = hashlib.sha256(f"{row['audio']}\0{size}\0".encode())
                if size <= WHOLE:
                    content.update(file.read())
                else:
                    for place in (0, (size - BLOCK) // 2, size - BLOCK):
                        file.seek(place)
                        content.update(file.read(BLOCK))
                return content.digest()
        except OSError as error:
            raise UserError(
                f"{row['where']}: {path} cannot be read ({error.strerror})", "check --audio_root and the line"
            ) from None

    with ThreadPoolExecutor(READERS) as readers:
        return hashlib.sha256(b"".join(readers.map(digest, rows))).hexdigest()


def read_audio(path: Path, where: str, min_samples: int = 1, said_s: float | None = None):
    """Read an audio file as mono at 16 kHz: float32 array (samples,).

    Raises:
        UserError: It cannot be read, ends early, holds what is no sound, is shorter than ``min_samples``, or lasts
            over a second more or less than the manifest says, ``said_s``; ``where`` names the manifest's line.
    """
    import numpy as np
    import soundfile
    from scipy.signal import resample_poly

    def refuse(problem: str):
        raise UserError(f"{where}: {path} {problem}", "replace the file or remove the line") from None

    try:
        with soundfile.SoundFile(path) as file:
            rate, container, announced = file.samplerate, file.format, file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's own, and what its arguments, numpy and the system raise
        refuse(f"is not readable audio ({str(error) or 'it is damaged or ends early'})")
    fewer = len(samples) < announced and container != "MP3"  # which may announce an estimate
    if fewer or ends_early(path, container, len(samples)):
        refuse("ends early: less of it can be read than its header or its frames announce, or its end is missing")
    if rate not in RATES:
        refuse(f"has {rate} samples a second, but {RATES[0]:,} to {RATES[-1]:,} are possible")
    if len(samples) and not np.abs(samples).max() <= LOUDEST:  # nor if it is NaN
        refuse(f"holds samples that are not numbers, or above {LOUDEST:,}; they should lie between -1 and 1")
    samples = samples.mean(axis=1)
    if rate != SAMPLE_RATE and len(samples):
        samples = resample_poly(samples, SAMPLE_RATE, rate).astype(np.float32)
    if len(samples) < min_samples:
        refuse(f"has {len(samples)} samples at 16 kHz, at least {min_samples} are needed")
    seconds = len(samples) / SAMPLE_RATE
    if said_s is not None and not (isinstance(said_s, int | float) and abs(seconds - said_s) <= 1):
        refuse(f"lasts {seconds:.2f} s, but the manifest says {said_s!r}: does the row mean a part of it?")
    return samples


# --- MFCC -----------------------------------------------------------------------------------------
def static_mfcc(samples):
    """Plain MFCC, (frames, NUM_MFCC): pre-emphasis, Hann window, power, HTK mel, natural log, orthonormal DCT-II."""
    import numpy as np
    from scipy.fft import dct
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(FFT_SIZE // 2 + 1, NUM_MELS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, mel_scale="htk")
    samples = np.asarray(samples, dtype=np.float64)
    emphasised = np.append(samples[:1] * (1 - PRE_EMPHASIS), samples[1:] - PRE_EMPHASIS * samples[:-1])
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, WINDOW)[::HOP]
    window = np.hanning(WINDOW + 1)[:-1]  # periodic
    power = np.abs(np.fft.rfft(frames * window, FFT_SIZE)) ** 2
    mels = np.log(np.maximum(power @ filters, LOG_FLOOR))
    return dct(mels, type=2, norm="ortho", axis=1)[:, :NUM_MFCC]


def mfcc(samples):
    """MFCC less the utterance's mean, smoothed over 3 frames, and weighted deltas: float32 (frames, 2 * NUM_MFCC).

    The deltas are half the difference between the next and the previous frame; the ends repeat.
    """
    import numpy as np

    static = static_mfcc(samples)
    static -= static.mean(axis=0)
    padded = np.pad(static, ((1, 1), (0, 0)), mode="edge")
    static = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    padded = np.pad(static, ((1, 1), (0, 0)), mode="edge")
    delta = (padded[2:] - padded[:-2]) / 2
    return np.concatenate([static, DELTA_WEIGHT * delta], axis=1).astype(np.float32)


# --- HuBERT ---------------------------------------------------------------------------------------
def hubert_config(name: str, layer: int) -> FeatureConfig:
    """What the model's config, which must be a HuBERT's with such a layer, says: how its convolutions cut up audio."""
    from transformers import AutoConfig

    with _loading(name):
        config = AutoConfig.from_pretrained(name)
    if config.model_type != "hubert":
        raise UserError(f"{name} is a {config.model_type} model, not a HuBERT", "check --hubert")
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(f"{name} has {config.num_hidden_layers} layers, not {layer}", "check --layer")
    window = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        window = (window - 1) * stride + kernel
    return FeatureConfig("hubert", name, layer, prod(config.conv_stride), window)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers, safetensors and pickle raise into one error."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"HuBERT {name!r} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "give a folder with config.json and weights, or a hub name and a network",
        ) from None


def load_hubert(name: str, layer: int, device: str) -> Callable:
    """Load HuBERT up to ``layer``; returns samples (n,) -> float32 (frames, hidden).

    The output of that layer, without the encoder's final layer norm where the model has one after its last layer
    (hubert-large has; hubert-base norms before its first layer, and that stays). One utterance at a time: padding
    would change the convolutions' group norm and so the units.

    Raises:
        UserError: No such model, it has fewer layers, or its checkpoint lacks weights (they would be random).
    """
    import numpy as np
    import torch
    from transformers import HubertModel

    hubert_config(name, layer)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}, but PyTorch sees no GPU", "use --device auto or cpu")
    with _loading(name):
        model, loaded = HubertModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model = model.eval().to(device)
    model.encoder.layers = model.encoder.layers[:layer]  # the others' work would be thrown away
    if model.config.do_stable_layer_norm:
        model.encoder.layer_norm = torch.nn.Identity()
    model.masked_spec_embed = None  # used in training alone
    weights = dict(model.named_parameters())
    bad = [key for key in weights if key in loaded["missing_keys"] or not weights[key].isfinite().all()]
    if bad:
        raise UserError(
            f"HuBERT {name!r} lacks weights, or they are not numbers: {bad[0]}"
            + (f" and {len(bad) - 1} more" if bad[1:] else ""),
            "get the whole checkpoint",
        )

    @torch.inference_mode()
    def extract(samples):
        samples = np.asarray(samples, dtype=np.float32)
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)  # as Wav2Vec2FeatureExtractor does
        output = model(torch.from_numpy(samples)[None].to(model.device)).last_hidden_state
        return output[0].float().cpu().numpy()

    return extract


def extractor(config: FeatureConfig, device: str) -> Callable:
    """The function that turns samples at 16 kHz, (n,), into features, float32 (frames, dim)."""
    if config.features == "mfcc":
        return mfcc
    model = hubert_config(config.hubert, config.layer)
    if model != config:
        raise UserError(
            f"HuBERT {config.hubert!r} gives a frame every {model.hop_samples} samples from {model.window_samples} on,"
            f" but the k-means was fitted to {config.hop_samples} and {config.window_samples}",
            "fit the k-means anew with speech_units/fit_kmeans.py",
        )
    return load_hubert(config.hubert, config.layer, device)


# --- The k-means folder ---------------------------------------------------------------------------
def features_json(config: FeatureConfig, num_units: int, dim: int) -> dict:
    """What features.json holds: the choice, and for MFCC the numbers behind it, for the record and for checking."""
    settings = {"sample_rate_hz": SAMPLE_RATE, "num_units": num_units, "dim": dim}
    if config.features == "mfcc":
        settings |= {
            "fft_size": FFT_SIZE,
            "num_mels": NUM_MELS,
            "num_mfcc": NUM_MFCC,
            "pre_emphasis": PRE_EMPHASIS,
            "delta_weight": DELTA_WEIGHT,
        }
    return {**asdict(config), **settings}


def load_kmeans(folder: Path):
    """Read a k-means folder: (centroids float32 (num_units, dim), FeatureConfig).

    Raises:
        UserError: A file is missing or unreadable, or was made with other MFCC settings than this code's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    made_by = "run speech_units/fit_kmeans.py"
    check_exists(Path(folder) / "kmeans.safetensors", made_by)
    saved = read_json(Path(folder) / "features.json", made_by, ("features", "hubert", "layer"))
    try:
        if saved["features"] == "mfcc":
            config = FeatureConfig("mfcc")
        else:
            saved.setdefault("window_samples", HUBERT_WINDOW)
            config = FeatureConfig(**{field.name: saved[field.name] for field in fields(FeatureConfig)})
        centroids = load_file(Path(folder) / "kmeans.safetensors")["centroids"]
    except (ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} is no k-means folder: {error!r}", made_by) from None
    for name, value in features_json(config, *centroids.shape).items():
        if saved.get(name) != value:
            raise UserError(
                f"{folder}/features.json: {name} is {saved.get(name)!r}, this version computes {value!r}",
                "fit the k-means anew with speech_units/fit_kmeans.py",
            )
    return centroids, config
