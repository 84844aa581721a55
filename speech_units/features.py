"""Audio files and the frame features that speech units are clustered from: MFCC or a HuBERT layer, 50 frames a second.

Shared by fit_kmeans.py and label_audio.py, so that audio is labelled with exactly what the k-means was fitted on.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from towerspeech.stage import UserError, check_exists

SAMPLE_RATE = 16000  # Hz
HOP = 320  # samples: 20 ms
WINDOW = 480  # samples: 30 ms
FFT_SIZE = 512
NUM_MELS = 40
NUM_MFCC = 14  # the 0th, loudness, included
PRE_EMPHASIS = 0.97
DELTA_WEIGHT = 0.7  # deltas count less in k-means' distances
LOG_FLOOR = 1e-10  # power of digital silence
HUBERT_WINDOW = 400  # samples that HuBERT's convolutions need for one frame


@dataclass(frozen=True)
class FeatureConfig:
    """Which features; kept as features.json beside the k-means."""

    features: str  # mfcc or hubert
    hubert: str = ""  # hub name or folder
    layer: int = 0  # counted from 1

    @property
    def min_samples(self) -> int:
        """The shortest audio that gives a frame."""
        return WINDOW if self.features == "mfcc" else HUBERT_WINDOW


# --- Manifests and audio --------------------------------------------------------------------------
def read_manifest(
    manifest: Path, audio_root: Path | None = None, start: int = 0, end: int | None = None
) -> Iterator[dict]:
    """Stream the manifest's rows (id, audio, language, text), with "where" = manifest:line added.

    Rows start..end-1, counted from 0, are given; every line is parsed. With ``audio_root`` their audio must exist.

    Raises:
        UserError: A line is malformed, an id occurs twice, an audio file is missing; names manifest:line.
    """
    check_exists(manifest, "check --manifest")
    first_line: dict[str, int] = {}
    with open(manifest, "rb") as file:  # bytes, so that a line that is not UTF-8 can be named
        for number, line in enumerate(file, 1):
            where = f"{manifest}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8", "convert the manifest to UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg})", "mend or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: an object is wanted, got {type(row).__name__}", "mend or remove the line")
            for name in ("id", "audio", "language", "text"):
                if not isinstance(row.get(name), str):
                    problem = "missing" if name not in row else f"not a string: {row[name]!r}"
                    raise UserError(f"{where}: field {name!r} is {problem}", "rows need id, audio, language, text")
            if row["id"] in first_line:
                raise UserError(
                    f"{where}: id {row['id']!r} stands in line {first_line[row['id']]} already", "make ids unique"
                )
            first_line[row["id"]] = number
            if number > start and (end is None or number <= end):
                if audio_root is not None and not (Path(audio_root) / row["audio"]).is_file():
                    raise UserError(
                        f"{where}: {Path(audio_root) / row['audio']} does not exist", "check --audio_root and the line"
                    )
                yield {**row, "where": where}


def read_audio(path: Path, where: str, min_samples: int = 1):
    """Read an audio file as mono at 16 kHz: float32 array (samples,).

    Raises:
        UserError: It cannot be read, or is shorter than ``min_samples``; ``where`` names the manifest's line.
    """
    import numpy as np
    import soundfile
    from scipy.signal import resample_poly

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(
            f"{where}: {path} is not readable audio ({error})", "replace the file or remove the line"
        ) from None
    samples = samples.mean(axis=1)
    if rate != SAMPLE_RATE and len(samples):
        samples = resample_poly(samples, SAMPLE_RATE, rate).astype(np.float32)
    if len(samples) < min_samples:
        raise UserError(
            f"{where}: {path} has {len(samples)} samples at 16 kHz, at least {min_samples} are needed",
            "replace the file or remove the line",
        )
    return samples


# --- MFCC -----------------------------------------------------------------------------------------
def mel_filters():
    """Triangular filters, evenly spaced on the HTK mel scale from 0 to 8000 Hz: (FFT_SIZE // 2 + 1, NUM_MELS)."""
    import numpy as np

    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)  # Hz
    frequencies = np.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def static_mfcc(samples):
    """Plain MFCC, (frames, NUM_MFCC): pre-emphasis, Hann window, power, mel, natural log, orthonormal DCT-II."""
    import numpy as np
    from scipy.fft import dct

    samples = np.asarray(samples, dtype=np.float64)
    emphasised = np.append(samples[:1] * (1 - PRE_EMPHASIS), samples[1:] - PRE_EMPHASIS * samples[:-1])
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, WINDOW)[::HOP]
    window = np.hanning(WINDOW + 1)[:-1]  # periodic
    power = np.abs(np.fft.rfft(frames * window, FFT_SIZE)) ** 2
    mels = np.log(np.maximum(power @ mel_filters(), LOG_FLOOR))
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
def pick_device(device: str) -> str:
    """Resolve "auto": cuda if there is one, else cpu."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}, but PyTorch sees no GPU", "use --device auto or cpu")
    return device


def load_hubert(name: str, layer: int, device: str) -> Callable:
    """Load HuBERT up to ``layer``; returns samples (n,) -> float32 (frames, hidden).

    The output of that layer, without the encoder's final layer norm where the model has one after its last layer
    (hubert-large has; hubert-base norms before its first layer, and that stays). One utterance at a time: padding
    would change the convolutions' group norm and so the units.

    Raises:
        UserError: No such model, or it has fewer layers.
    """
    import numpy as np
    import torch
    from transformers import AutoConfig, HubertModel

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "hubert":
            raise UserError(f"{name} is a {config.model_type} model, not a HuBERT", "check --hubert")
        if not 1 <= layer <= config.num_hidden_layers:
            raise UserError(f"{name} has {config.num_hidden_layers} layers, not {layer}", "check --layer")
        model = HubertModel.from_pretrained(name, dtype=torch.float32).eval().to(pick_device(device))
    except (OSError, ValueError) as error:
        raise UserError(
            f"HuBERT {name!r} cannot be loaded: {str(error).splitlines()[0]}",
            "give a folder with config.json and weights, or a hub name and a network",
        ) from None
    model.encoder.layers = model.encoder.layers[:layer]  # the others' work would be thrown away
    if config.do_stable_layer_norm:
        model.encoder.layer_norm = torch.nn.Identity()

    @torch.inference_mode()
    def extract(samples):
        samples = np.asarray(samples, dtype=np.float32)
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)  # as Wav2Vec2FeatureExtractor does
        output = model(torch.from_numpy(samples)[None].to(model.device)).last_hidden_state
        return output[0].float().cpu().numpy()

    return extract


def extractor(config: FeatureConfig, device: str) -> Callable:
    """The function that turns samples at 16 kHz, (n,), into features, float32 (frames, dim)."""
    return mfcc if config.features == "mfcc" else load_hubert(config.hubert, config.layer, device)


# --- The k-means folder ---------------------------------------------------------------------------
def features_json(config: FeatureConfig, num_units: int, dim: int) -> dict:
    """What features.json holds: the choice, and for MFCC the numbers behind it, for the record and for checking."""
    settings = {"sample_rate_hz": SAMPLE_RATE, "hop_samples": HOP, "num_units": num_units, "dim": dim}
    if config.features == "mfcc":
        settings |= {
            "window_samples": WINDOW,
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

    for name in ("kmeans.safetensors", "features.json"):
        check_exists(Path(folder) / name, "run speech_units/fit_kmeans.py")
    try:
        found = json.loads((Path(folder) / "features.json").read_text(encoding="utf-8"))
        config = FeatureConfig(found["features"], found["hubert"], found["layer"])
        centroids = load_file(Path(folder) / "kmeans.safetensors")["centroids"]
    except (ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} is no k-means folder: {error!r}", "run speech_units/fit_kmeans.py") from None
    wanted = features_json(config, *centroids.shape)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{folder}/features.json: {name} is {found.get(name)!r}, this version computes {value!r}",
                "fit the k-means anew with speech_units/fit_kmeans.py",
            )
    return centroids, config
