"""The frame features that speech units are clustered from: MFCC, or a layer of HuBERT, wav2vec 2.0 or WavLM.

Shared by fit_kmeans.py and label_audio.py, so that audio is labelled with exactly what the k-means was fitted on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path

from speech_units.audio import SAMPLE_RATE
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json

HOP = 320  # samples: 20 ms
WINDOW = 480  # samples: 30 ms
FFT_SIZE = 512
NUM_MELS = 40
NUM_MFCC = 14  # the 0th, loudness, included
PRE_EMPHASIS = 0.97
DELTA_WEIGHT = 0.7  # deltas count less in k-means' distances
LOG_FLOOR = 1e-10  # power of digital silence
HUBERT_WINDOW = 400  # samples; features.json of earlier versions does not say it
BATCH_SECONDS = 320.0  # of audio on a GPU: HuBERT-large then takes an estimated 8 GB of it
ENCODERS = ("hubert", "wav2vec2", "wavlm")  # as transformers calls these architectures


@dataclass(frozen=True)
class FeatureConfig:
    """Which features; kept as features.json beside the k-means."""

    features: str  # mfcc, or one of ENCODERS
    encoder: str = ""  # hub name or folder
    layer: int = 0  # counted from 1
    hop_samples: int = HOP
    window_samples: int = WINDOW  # the shortest audio that gives a frame
    normalise: bool = False  # whether an utterance's samples are brought to mean 0 and variance 1


def prepare(samples, config: FeatureConfig):
    """What a decoding process makes of samples, float32 (n,): MFCC (frames, dim), or samples for the encoder (n,)."""
    import numpy as np

    if config.features == "mfcc":
        return mfcc(samples)
    if config.normalise:  # as Wav2Vec2FeatureExtractor does
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    return np.asarray(samples, dtype=np.float32)


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


# --- Encoders -------------------------------------------------------------------------------------
def encoder_config(features: str, name: str, layer: int) -> FeatureConfig:
    """What a model's folder or hub page says of its features: how its convolutions cut up audio, and of normalising.

    Raises:
        UserError: It is another architecture than ``features``, has no such layer, or cannot be read.
    """
    from transformers import AutoConfig, AutoFeatureExtractor

    with _loading(name):
        config = AutoConfig.from_pretrained(name)
    if config.model_type != features:
        raise UserError(f"{name} is a {config.model_type} model, --features {features}", "check --encoder, --features")
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(f"{name} has {config.num_hidden_layers} layers, not {layer}", "check --layer")
    normalise = True  # as in facebook/hubert-large-ll60k; some folders hold weights alone
    with contextlib.suppress(OSError):
        normalise = AutoFeatureExtractor.from_pretrained(name).do_normalize
    window = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        window = (window - 1) * stride + kernel
    hop = prod(config.conv_stride)
    if SAMPLE_RATE % hop:
        raise UserError(
            f"{name} gives a frame every {hop} samples, no whole number a second", "take another --encoder"
        )
    return FeatureConfig(features, name, layer, hop, window, normalise)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers, safetensors and pickle raise into one error."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"encoder {name!r} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "give a folder with config.json and weights, or a hub name and a network",
        ) from None


def check_dim(config: FeatureConfig, dim: int | None) -> None:
    """Raise UserError if centroids of ``dim`` dimensions cannot be of these features."""
    from transformers import AutoConfig

    if dim is None:
        return
    own, called = 2 * NUM_MFCC, "MFCC"
    if config.features != "mfcc":
        called = f"encoder {config.encoder!r}"
        with _loading(config.encoder):
            own = AutoConfig.from_pretrained(config.encoder).hidden_size
    if dim != own:
        problem = f"the centroids have {dim} dimensions, but a frame of {called} has {own}"
        raise UserError(problem, "label with the encoder that the k-means was fitted on, or fit it anew")


def choose_device(device: str):
    """torch.device of auto, cpu or cuda; UserError if there is no such one."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}, but PyTorch sees no GPU", "use --device auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


class Encoder:
    """Turns what ``prepare`` gives into features.

    Attributes:
        device: torch.device of the features.
        batches: How utterances share a pass: "alone", of "equal" lengths, or "padded".

    On a CPU each goes alone: the rounding of batches would make units depend on neighbours. On a GPU they are padded,
    but for models whose convolutions have a group norm over time (hubert-base), which padding would change.

    Raises:
        UserError: No such model, it has fewer layers, its checkpoint lacks weights (they would be random), it cuts up
            audio in another way than the config says, or its frames have other dimensions than ``dim``, if given.
    """

    def __init__(self, config: FeatureConfig, device: str, dim: int | None = None):
        self.config, self.device, self.model = config, choose_device(device), None
        self.batches = "alone"
        check_dim(config, dim)
        if config.features == "mfcc":
            return
        found = encoder_config(config.features, config.encoder, config.layer)
        if replace(found, normalise=config.normalise) != config:  # which is the k-means' affair
            raise UserError(
                f"encoder {config.encoder!r} gives a frame every {found.hop_samples} samples from"
                f" {found.window_samples} on, but the k-means was fitted to {config.hop_samples} and"
                f" {config.window_samples}",
                "fit the k-means anew with speech_units/fit_kmeans.py",
            )
        self.model = _load(config.encoder, config.layer).to(self.device)
        if self.device.type == "cuda":
            self.batches = "equal" if self.model.config.feat_extract_norm == "group" else "padded"

    def encode(self, prepared: Sequence) -> list:
        """Features of utterances or windows: float32 tensors (frames, dim), on ``device``.

        An encoder's are the output of its layer: hidden_states[layer] of transformers, before the norm that follows
        the last layer where the model has one there, as hubert-large has.
        """
        import torch

        if self.model is None:
            return [torch.from_numpy(frames).to(self.device) for frames in prepared]
        with torch.inference_mode():
            if self.batches == "alone":
                return [self._forward(torch.from_numpy(samples)[None])[0] for samples in prepared]
            lengths = [len(samples) for samples in prepared]
            padded = torch.zeros(len(prepared), max(lengths))
            for row, samples in zip(padded, prepared, strict=True):
                row[: len(samples)] = torch.from_numpy(samples)
            mask = None
            if self.batches == "padded":
                mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
            found = self._forward(padded, mask)
            return [frames[: self.num_frames(length)] for frames, length in zip(found, lengths, strict=True)]

    def num_frames(self, num_samples: int) -> int:
        return 1 + (num_samples - self.config.window_samples) // self.config.hop_samples

    def _forward(self, samples, mask=None):
        """(utterances, n) -> float32 (utterances, frames, hidden)."""
        import torch

        samples = samples.to(self.device, non_blocking=True)
        mask = mask if mask is None else mask.to(self.device, torch.long, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(samples, attention_mask=mask).last_hidden_state.float()


def _load(name: str, layer: int):
    """A model up to ``layer``, without the norm after its last layer if it has one there."""
    import torch
    from transformers import AutoModel

    with _loading(name):
        model, loaded = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model = model.eval()
    model.encoder.layers = model.encoder.layers[:layer]  # the others' work would be thrown away
    if model.config.do_stable_layer_norm:
        model.encoder.layer_norm = torch.nn.Identity()
    model.masked_spec_embed = None  # used in training alone
    model.adapter = None  # of some wav2vec 2.0 models, after their last layer
    weights = dict(model.named_parameters())
    bad = [key for key in weights if key in loaded["missing_keys"] or not weights[key].isfinite().all()]
    if bad:
        raise UserError(
            f"encoder {name!r} lacks weights, or they are not numbers: {bad[0]}"
            + (f" and {len(bad) - 1} more" if bad[1:] else ""),
            "get the whole checkpoint",
        )
    convolve = model.feature_extractor.forward

    def in_float32(samples):  # bfloat16's 8 bits are too few for a waveform
        with torch.autocast(samples.device.type, enabled=False):
            return convolve(samples)

    model.feature_extractor.forward = in_float32
    return model


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
    saved = read_json(Path(folder) / "features.json", made_by, ("features", "layer"))
    saved.setdefault("encoder", saved.pop("hubert", ""))  # of earlier versions
    try:
        if saved["features"] == "mfcc":
            config = FeatureConfig("mfcc")
            saved.setdefault("normalise", False)
        else:
            saved.setdefault("window_samples", HUBERT_WINDOW)
            saved.setdefault("normalise", True)
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
