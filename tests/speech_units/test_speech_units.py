"""Features, k-means and labels, against transformers' audio code, a hooked HuBERT, scikit-learn and plain loops."""

import contextlib
import io
import json
import os
import shutil
import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_units import audio, containers, features, fit_kmeans, label_audio
from speech_units import kmeans as clustering
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.manifests import read_manifest, read_rows
from towerspeech.units_parquet import read_units

ROOT = Path(__file__).parents[2]


def tone(seed: int, seconds: float, rate: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = 200 + 150 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) + 0.02 * rng.standard_normal(len(time))).astype("f4")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Seven utterances: 16 kHz, 22.05 kHz, stereo, FLAC."""
    root = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(7):
        rate, ending = (22050, "wav") if i == 1 else (16000, "flac" if i == 2 else "wav")
        samples = tone(i, 0.5 + 0.2 * i, rate)
        soundfile.write(root / f"{i}.{ending}", np.stack([samples, samples], 1) if i == 3 else samples, rate)
        rows.append({"id": f"u{i}", "audio": f"{i}.{ending}", "language": "en", "text": f"text {i}"})
    write_manifest(root / "train.jsonl", rows)
    return root


def write_manifest(path: Path, rows: list) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def kmeans(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kmeans")
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], folder, features="mfcc", num_units=12, hours=1)
    return folder


# --- Features -------------------------------------------------------------------------------------
def test_static_mfcc_equals_transformers():
    from scipy.fft import dct
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    samples = tone(5, 1.3)
    filters = mel_filter_bank(257, 40, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    emphasised = np.append(samples[0] * 0.03, samples[1:].astype(float) - 0.97 * samples[:-1].astype(float))
    reference = spectrogram(
        emphasised,
        window_function(480, "hann"),
        frame_length=480,
        hop_length=320,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-10,
        log_mel="log",
        dtype=np.float64,
    )
    wanted = dct(reference, axis=0, norm="ortho")[:14].T
    np.testing.assert_allclose(features.static_mfcc(samples), wanted, rtol=1e-4, atol=1e-3)


def test_mfcc_mean_smoothing_and_deltas():
    samples = tone(6, 0.4)
    static = features.static_mfcc(samples) - features.static_mfcc(samples).mean(axis=0)
    got, n = features.mfcc(samples), len(static)
    assert got.shape == (1 + (len(samples) - 480) // 320, 28) and got.dtype == np.float32

    def at(table, t):
        return table[min(max(t, 0), n - 1)]

    smooth = [(at(static, t - 1) + static[t] + at(static, t + 1)) / 3 for t in range(n)]
    for t in range(n):
        np.testing.assert_allclose(got[t, :14], smooth[t], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[t, 14:], 0.35 * (at(smooth, t + 1) - at(smooth, t - 1)), rtol=1e-4, atol=1e-4)
    assert np.isfinite(features.mfcc(np.zeros(4000, "f4"))).all()


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": (16,) * 7}
SMALL |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}


def small_encoder(folder: Path, kind: str, large: bool, **changes) -> Path:
    """A random model of one of ENCODERS; large ones norm before each layer and at each place of the convolutions."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    norms = {"do_stable_layer_norm": large, "feat_extract_norm": "layer" if large else "group", "conv_bias": large}
    AutoModel.from_config(
        AutoConfig.for_model(kind, **SMALL | norms | {"num_hidden_layers": 3} | changes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["large-like", "base-like"])
def hubert(request, tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("hubert"), "hubert", request.param)


def encode(name: str, layer: int, samples: list, kind: str = "hubert", batches: str = "alone") -> list:
    config = features.encoder_config(kind, str(name), layer)
    encoder = features.Encoder(config, "cpu")
    encoder.batches = batches
    return [found.numpy() for found in encoder.encode([features.prepare(part, config) for part in samples])]


@pytest.mark.parametrize("kind", features.ENCODERS)
@pytest.mark.parametrize("large", [True, False], ids=["large-like", "base-like"])
def test_layer_is_a_hidden_state(tmp_path, kind, large):
    """--layer is hidden_states[layer]: of large models' last layer, too, not what the norm after it makes of it."""
    import torch
    from transformers import AutoModel, Wav2Vec2FeatureExtractor

    folder, samples = small_encoder(tmp_path, kind, large), tone(1, 0.7)
    model = AutoModel.from_pretrained(folder).eval()
    normalised = Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        output = model(normalised.input_values, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for layer in (1, 2, 3):
        (got,) = encode(folder, layer, [samples], kind)
        assert got.shape == (1 + (len(samples) - 400) // 320, 32)
        np.testing.assert_allclose(got, output.hidden_states[layer][0].numpy(), atol=1e-5)
    assert (np.abs(got - output.last_hidden_state[0].numpy()).max() > 0.1) == large


def test_normalising_is_the_models_own(tmp_path, hubert):
    from transformers import Wav2Vec2FeatureExtractor

    assert features.encoder_config("hubert", str(hubert), 1).normalise
    shutil.copytree(hubert, tmp_path / "m")
    for does in (False, True):
        Wav2Vec2FeatureExtractor(do_normalize=does).save_pretrained(tmp_path / "m")
        config = features.encoder_config("hubert", str(tmp_path / "m"), 1)
        assert config.normalise == does
        samples = 3 * tone(1, 0.5) + 1
        prepared = features.prepare(samples, config)
        found = (abs(prepared.mean()) < 1e-4 and abs(prepared.std() - 1) < 1e-3, np.array_equal(prepared, samples))
        assert found == (does, not does)


@pytest.mark.parametrize("kind", features.ENCODERS)
def test_a_padded_batch_is_what_each_is_alone(tmp_path, kind):
    """As on a GPU, up to rounding: large models padded, base models in equal lengths, which padding would change."""
    samples = [tone(i, length) for i, length in enumerate((0.7, 1.3, 0.31, 0.7, 0.025))]
    large, base = small_encoder(tmp_path / "large", kind, True), small_encoder(tmp_path / "base", kind, False)
    for folder, batches, several in ((large, "padded", samples), (base, "equal", [samples[0], samples[3]])):
        together, alone = encode(folder, 2, several, kind, batches), encode(folder, 2, several, kind)
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    changed = encode(base, 2, samples, kind, "padded")[0] - encode(base, 2, samples, kind)[0]
    assert np.abs(changed).max() > 1e-3


def test_encoder_errors(hubert, tmp_path):
    with pytest.raises(UserError, match="has 3 layers, not 4"):
        features.encoder_config("hubert", str(hubert), 4)
    with pytest.raises(UserError, match="is a hubert model, --features wavlm"):
        features.encoder_config("wavlm", str(hubert), 1)
    with pytest.raises(UserError, match="cannot be loaded"):
        features.encoder_config("hubert", str(tmp_path / "nothing"), 1)
    with pytest.raises(UserError, match=r"centroids have 28 dimensions, but a frame of encoder .* has 32"):
        features.Encoder(features.encoder_config("hubert", str(hubert), 1), "cpu", dim=28)
    with pytest.raises(UserError, match="centroids have 32 dimensions, but a frame of MFCC has 28"):
        features.Encoder(features.FeatureConfig("mfcc"), "cpu", dim=32)


def damaged(hubert: Path, folder: Path, change) -> str:
    """A copy of the model's folder, its weights changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hubert, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


KEY = "encoder.layers.1.attention.k_proj.weight"  # of the second layer


@pytest.mark.parametrize("how", ["gone", "NaN", "cut", "no file"])
def test_hubert_with_weights_missing_is_refused(hubert, tmp_path, how):
    def change(weights):
        if how == "gone":
            del weights[KEY]
        elif how == "NaN":
            weights[KEY][0, 0] = float("nan")
        elif how == "cut":
            weights[KEY] = weights[KEY][:5].clone()

    name = damaged(hubert, tmp_path / "m", change)
    if how == "no file":
        (tmp_path / "m/model.safetensors").write_bytes((tmp_path / "m/model.safetensors").read_bytes()[:5000])
    message = f"lacks weights, or they are not numbers: {KEY}$" if how in ("gone", "NaN") else "cannot be loaded"
    with pytest.raises(UserError, match=f"(?m){message}"):
        encode(name, 2, [tone(0, 1)])


def test_hubert_lacks_only_what_is_not_used(hubert, tmp_path):
    def change(weights):
        weights.pop("masked_spec_embed", None)
        del weights[KEY]
        for name in [name for name in weights if "parametrizations.weight.original" in name]:  # their older names
            weights[name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v")] = weights.pop(name)  # fmt: skip

    name = damaged(hubert, tmp_path / "m", change)
    samples = tone(1, 0.3)
    np.testing.assert_array_equal(encode(name, 1, [samples]), encode(hubert, 1, [samples]))


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_missing_weights_end_workers_too(corpus, hubert_25hz, tmp_path, num_workers):
    name = damaged(hubert_25hz, tmp_path / "m", lambda weights: None)
    fit = {"encoder": name, "layer": 1, "num_units": 5, "hours": 0.000333333}
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], tmp_path / "k", **fit)
    shutil.rmtree(name)
    damaged(hubert_25hz, Path(name), lambda weights: weights.pop(KEY.replace("1", "0")))
    with pytest.raises(UserError, match="lacks weights"):
        label_audio.label_audio(
            corpus / "train.jsonl", corpus, tmp_path / "k", tmp_path / "u", num_workers=num_workers
        )


@pytest.fixture(scope="module")
def hubert_25hz(tmp_path_factory):
    """Convolutions of mHuBERT-25Hz: an eighth that halves the rate."""
    eight = {"conv_dim": (16,) * 8, "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2, 2)}
    folder = tmp_path_factory.mktemp("hubert25")
    return small_encoder(folder, "hubert", False, num_hidden_layers=1, num_feat_extract_layers=8, **eight)


def test_hop_and_shortest_audio_are_the_models_own(corpus, hubert_25hz, tmp_path):
    from transformers import HubertModel

    model = HubertModel.from_pretrained(hubert_25hz)
    shortest = next(n for n in range(300, 2000) if model._get_feat_extract_output_lengths(n) >= 1)
    hop = next(n for n in range(1, 2000) if model._get_feat_extract_output_lengths(shortest + n) == 2)
    assert (shortest, hop) == (720, 640)
    fit = {"encoder": str(hubert_25hz), "layer": 1, "num_units": 5, "hours": 0.000333333}
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], tmp_path / "k", **fit)
    found = json.loads((tmp_path / "k/features.json").read_text())
    assert (found["hop_samples"], found["window_samples"], found["num_units"], found["dim"]) == (640, 720, 5, 32)
    for n in (719, 720):
        soundfile.write(tmp_path / f"{n}.wav", tone(0, 1)[:n], 16000)
        write_manifest(tmp_path / f"{n}.jsonl", [row(0, audio=f"{n}.wav")])
    with pytest.raises(UserError, match=r"719.jsonl:1: .* has 719 samples at 16 kHz, at least 720 are needed"):
        label_audio.label_audio(tmp_path / "719.jsonl", tmp_path, tmp_path / "k", tmp_path / "u719")
    label_audio.label_audio(tmp_path / "720.jsonl", tmp_path, tmp_path / "k", tmp_path / "u720")
    (only,) = read_units(tmp_path / "u720", 5)
    assert len(only["units"]) == 1


def test_kmeans_folders_of_earlier_versions_load(hubert_25hz, tmp_path):
    from safetensors.numpy import save_file

    save_file({"centroids": np.zeros((5, 28), "f4")}, tmp_path / "kmeans.safetensors")
    old = {"sample_rate_hz": 16000, "hop_samples": 320, "num_units": 5, "dim": 28}
    of_mfcc = {"window_samples": 480, "fft_size": 512, "num_mels": 40, "num_mfcc": 14, "pre_emphasis": 0.97}
    of_mfcc |= {"delta_weight": 0.7}

    def load(**fields):
        (tmp_path / "features.json").write_text(json.dumps(fields))
        return features.load_kmeans(tmp_path)[1]

    assert load(features="mfcc", hubert="", layer=0, **old, **of_mfcc).window_samples == 480
    with pytest.raises(UserError, match="window_samples is 400, this version computes 480"):
        load(features="mfcc", hubert="", layer=0, **old, **of_mfcc | {"window_samples": 400})
    loaded = load(features="hubert", hubert="not/here", layer=22, **old)  # the model itself is not looked for
    assert (loaded.hop_samples, loaded.window_samples) == (320, 400)
    with pytest.raises(UserError, match="a frame every 640 samples from 720 on, .* was fitted to 320"):
        features.Encoder(load(features="hubert", hubert=str(hubert_25hz), layer=1, **old), "cpu")


def test_hubert_units_end_to_end(corpus, hubert, tmp_path):
    fit_kmeans.fit_kmeans(
        [corpus / "train.jsonl"],
        [corpus],
        tmp_path / "k",
        encoder=str(hubert),
        layer=2,
        num_units=5,
        hours=0.000555556,
    )
    label_audio.label_audio(corpus / "train.jsonl", corpus, tmp_path / "k", tmp_path / "u")
    assert [row["id"] for row in read_units(tmp_path / "u", 5)] == [f"u{i}" for i in range(7)]


# --- k-means --------------------------------------------------------------------------------------
def test_kmeans_finds_what_full_kmeans_finds():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (6, 4))
    frames = (centres[rng.integers(0, 6, 3000)] + rng.normal(0, 0.3, (3000, 4))).astype(np.float32)
    found, distance, used = clustering.fit(frames, 6, seed=0)
    full = KMeans(6, n_init=10, random_state=0).fit(frames)
    assert found.dtype == np.float32 and used == 6
    assert distance == pytest.approx(full.inertia_ / 3000, rel=0.02)


def test_kmeans_same_bytes_and_done_again(corpus, kmeans, tmp_path, capsys):
    arguments = {"features": "mfcc", "num_units": 12, "hours": 1}
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], tmp_path, **arguments)
    for name in ("kmeans.safetensors", "features.json"):
        assert hash_file(tmp_path / name) == hash_file(kmeans / name)
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], tmp_path, **arguments)
    assert "already done" in capsys.readouterr().out


@pytest.fixture(scope="module")
def silent_frames():
    """20 files of 4 s of digital silence; every second one begins with 1 s of noise."""
    found = []
    for i in range(20):
        samples = np.zeros(64000, "f4")
        if i % 2 == 0:
            samples[:16000] = 0.1 * np.random.default_rng(i).standard_normal(16000)
        found.append(features.mfcc(samples))
    return np.concatenate(found)


def test_no_dead_units_in_silence(silent_frames):
    from sklearn.cluster import KMeans

    centroids, distance, used = clustering.fit(silent_frames, 400, seed=0)
    to_each = ((silent_frames[:, None].astype("f8") - centroids.astype("f8")) ** 2).sum(axis=2)
    assert len({tuple(centroid) for centroid in centroids.tolist()}) == 400
    assert used == len(set(to_each.argmin(axis=1).tolist())) == 400
    assert distance == pytest.approx(to_each.min(axis=1).mean(), rel=1e-3)
    # 480 points that lie nowhere near one another, in pairs and alone: greedy k-means++ is the best start here.
    full = KMeans(400, n_init=1, random_state=0).fit(silent_frames)
    random = KMeans(400, init="random", n_init=1, random_state=0).fit(silent_frames)
    assert distance < 1.25 * full.inertia_ / len(silent_frames) < random.inertia_ / len(silent_frames) < 0.035


def test_as_many_units_as_distinct_frames_and_no_more(silent_frames):
    num_distinct = len({tuple(frame) for frame in silent_frames.tolist()})
    assert num_distinct < len(silent_frames) / 5
    with pytest.raises(UserError, match=f"only {num_distinct} distinct frames for {num_distinct + 1} units"):
        clustering.fit(silent_frames, num_distinct + 1, seed=0)
    frames = np.repeat(np.eye(6, dtype="f4"), [1, 2, 3, 4, 5, 600], axis=0)
    frames[0] *= -1  # -0.0, which is 0.0
    centroids, distance, used = clustering.fit(frames, 6, seed=0)
    assert distance < 1e-6 and used == 6
    with pytest.raises(UserError, match="only 1 distinct frames for 2 units"):
        clustering.fit(np.array([[0.0], [-0.0], [0.0]], "f4"), 2, seed=0)


def test_used_units_are_reported(corpus, kmeans, tmp_path, capsys):
    fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [corpus], tmp_path, features="mfcc", num_units=12, hours=1)
    assert "12 distinct units, 12 of them used; mean squared distance" in capsys.readouterr().out
    counts = json.loads((tmp_path / "run_info.json").read_text())["counts"]
    assert (counts["distinct_units"], counts["used_units"], counts["utterances"]) == (12, 12, 7)
    lengths = [len(read_audio(path, "m:1")) for path in sorted(corpus.glob("[0-6].*"))]
    assert counts["frames"] == sum(1 + (length - 480) // 320 for length in lengths)


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """Frames of 400 clusters, few of which hold most of them, as sounds do: (15000, 24)."""
    rng = np.random.default_rng(0)
    of_each = 1 / np.arange(1, 401)
    centres = rng.normal(0, 3, (400, 24))[rng.choice(400, 15000, p=of_each / of_each.sum())]
    return (centres + rng.normal(0, 0.6, centres.shape)).astype("f4")


@pytest.mark.parametrize("num_units", [50, 200])
def test_a_fit_is_as_near_as_scikit_learns(clusters, num_units):
    """Settings: HuBERT's recipe, but one start. A benchmark compares large fits, and their time."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import pairwise_distances_argmin_min

    centroids, distance, used = clustering.fit(clusters, num_units, seed=7)
    theirs = MiniBatchKMeans(
        num_units, batch_size=10000, max_iter=100, max_no_improvement=100, init_size=30000, n_init=1, random_state=7
    ).fit(clusters)
    ids, to_nearest = pairwise_distances_argmin_min(clusters, centroids)
    assert distance == pytest.approx((to_nearest.astype("f8") ** 2).mean(), rel=1e-5)
    assert used == len(set(ids.tolist())) == num_units
    assert distance <= 1.01 * theirs.inertia_ / len(clusters)


def test_one_unit_is_the_mean():
    """Of many frames far from zero, where float32 would lose most of what they differ by."""
    frames = (1000 + np.random.default_rng(0).normal(0, 1, (300_000, 2))).astype("f4")
    found = clustering.fit(frames, 1, seed=0)
    np.testing.assert_array_equal(found.centroids[0], frames.mean(axis=0, dtype="f8").astype("f4"))
    assert found.distance == pytest.approx(frames.var(axis=0, dtype="f8").sum(), rel=1e-5)


def test_samples_grow_to_all_frames():
    assert clustering.sizes(9_000, 100) == [9_000] and clustering.sizes(39_999, 100) == [39_999]
    assert clustering.sizes(40_003, 100) == [10_000, 40_003]
    assert clustering.sizes(3_600_000, 5000) == [56_250, 225_000, 900_000, 3_600_000]


@pytest.mark.parametrize("number", [1, 3])
def test_a_fit_is_the_same_on_any_number_of_cores(clusters, tmp_path, monkeypatch, number):
    large = np.tile(clusters, (3, 1)) + np.arange(3).repeat(len(clusters))[:, None].astype("f4")  # in two samples
    large.tofile(tmp_path / "f4")
    wanted = clustering.fit(large, 60, seed=1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(number)))
    found = clustering.fit(np.memmap(tmp_path / "f4", "f4", "r", shape=large.shape), 60, seed=1)
    np.testing.assert_array_equal(found.centroids, wanted.centroids)
    assert (found.distance, found.used) == (wanted.distance, wanted.used)
    assert (clustering.fit(large, 60, seed=2).centroids != wanted.centroids).any()


def test_a_killed_fit_goes_on(clusters, tmp_path, monkeypatch):
    large, kept = np.tile(clusters, (3, 1)), tmp_path / "kept"
    wanted = clustering.fit(large, 60, seed=1)
    assign, passes, killed = clustering.Sample.assign, [], [0]

    def until_killed(sample, centroids, told):
        if told != "k-means: start":
            passes.append(told)
            if len(passes) > killed[0] + 3:  # a pass that is killed is done again
                killed[0] = len(passes)
                raise KeyboardInterrupt
        return assign(sample, centroids, told)

    monkeypatch.setattr(clustering.Sample, "assign", until_killed)
    for _ in range(30):
        with contextlib.suppress(KeyboardInterrupt):
            found = clustering.fit(large, 60, seed=1, kept=kept)
            break
    assert len(passes) > len(set(passes)) > 15 and passes[-1].startswith("k-means: 45,000 frames")
    np.testing.assert_array_equal(found.centroids, wanted.centroids)


def test_frames_that_are_no_numbers_are_refused(clusters):
    bad = clusters.copy()
    bad[777, 3] = np.nan
    with pytest.raises(UserError, match="some frames hold what is no number"):
        clustering.fit(bad, 20, seed=0)


# --- Audio is an input ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["fit", "label"])
def test_other_audio_is_not_done(corpus, kmeans, tmp_path, capsys, script):
    def again(root: Path, **more):
        if script == "fit":
            fit = {"features": "mfcc", "num_units": 12, "hours": 1}
            fit_kmeans.fit_kmeans([corpus / "train.jsonl"], [root], tmp_path / "o", **fit, **more)
        else:
            label_audio.label_audio(corpus / "train.jsonl", root, kmeans, tmp_path / "o", num_shards=2, **more)
        return capsys.readouterr().out.count("already done")

    shards = 1 + (script == "label")
    assert again(corpus) == 0
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    assert again(corpus) == again(moved) == shards
    samples, rate = soundfile.read(moved / "6.wav")  # 1.7 s, of which the middle block alone is changed
    samples[len(samples) // 2] *= -1
    soundfile.write(moved / "6.wav", samples, rate)
    assert (moved / "6.wav").stat().st_size == (corpus / "6.wav").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="by another run: audio was "):
        again(moved)
    capsys.readouterr()
    assert again(moved, overwrite=True) == shards - 1  # the other shard's audio is the same
    (moved / "6.wav").unlink()
    with pytest.raises(UserError, match="train.jsonl:7: .*6.wav does not exist"):
        again(moved)


def test_fingerprint_of_large_files(tmp_path):
    """Of files above 1 MiB: the first, middle and last 16 KiB, and the size."""
    path, rows = tmp_path / "a", [{"audio": "a", "where": "m:1"}]
    found = set()
    large = [(2_000_000, place) for place in (None, 16383, 1_000_000, 1_983_616)]
    for size, place in [(1 << 20, None), ((1 << 20) + 1, None), (1 << 20, 300_000), *large, (2_000_001, None)]:
        data = bytearray(size)
        if place is not None:
            data[place] = 1
        path.write_bytes(data)
        found.add(audio.fingerprint(rows, tmp_path, 0))
    assert len(found) == 8


# --- Labels ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 3])
def test_nearest_equals_a_plain_search(threads, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(clustering, "THREADED", 1000)
    rng = np.random.default_rng(0)
    frames, centroids = rng.normal(size=(5000, 8)).astype("f4"), rng.normal(size=(40, 8)).astype("f4")
    wanted = [int(((centroids - frame) ** 2).sum(axis=1).argmin()) for frame in frames]
    (found,) = clustering.Nearest(centroids, "cpu")([torch.from_numpy(frames)])
    assert found.tolist() == wanted


def test_units_do_not_depend_on_shards_and_workers(corpus, kmeans, tmp_path):
    manifest = corpus / "train.jsonl"
    label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "one")
    label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "many", num_shards=3, num_workers=2)
    for shard in (2, 0, 1):  # array tasks, in any order
        label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "array", num_shards=3, shard=shard)
    one = list(read_units(tmp_path / "one", 12))
    assert one == list(read_units(tmp_path / "many")) == list(read_units(tmp_path / "array"))
    assert [row["id"] for row in one] == [f"u{i}" for i in range(7)]
    assert one[1]["duration_s"] == pytest.approx(0.7, abs=1e-3)  # was 22.05 kHz
    assert all(a != b for row in one for a, b in zip(row["units"], row["units"][1:], strict=False))
    assert hash_file(tmp_path / "many/units-00001-of-00003.parquet") == hash_file(
        tmp_path / "array/units-00001-of-00003.parquet"
    )


def test_a_missing_shard_is_made_and_finished_ones_kept(corpus, kmeans, tmp_path, capsys):
    manifest = corpus / "train.jsonl"
    label_audio.label_audio(manifest, corpus, kmeans, tmp_path, num_shards=2, shard=1)
    with pytest.raises(UserError, match="holds 1 of 2 shards"):
        list(read_units(tmp_path))
    stamp = (tmp_path / "units-00001-of-00002.parquet").stat().st_mtime_ns
    label_audio.label_audio(manifest, corpus, kmeans, tmp_path, num_shards=2)
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "units-00001-of-00002.parquet").stat().st_mtime_ns == stamp
    assert len(list(read_units(tmp_path))) == 7


def row(i: int = 0, **changes) -> dict:
    return {"id": f"u{i}", "audio": f"{i}.wav", "language": "en", "text": "a"} | changes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), "{"], r"bad.jsonl:2: not JSON"),
        ([row(0), "[]"], r"bad.jsonl:2: an object is wanted"),
        ([row(0), {"id": "x"}], r"bad.jsonl:2: field 'audio' is missing"),
        ([row(0), row(4, id="u0")], r"bad.jsonl:2: id 'u0' is there twice, first at .*bad.jsonl:1"),
        ([row(0), "", row(4), row(4)], r"bad.jsonl:4: id 'u4' is there twice, first at .*bad.jsonl:3"),
        ([row(0), row(4, audio="gone.wav")], r"bad.jsonl:2: .*gone.wav does not exist"),
        ([row(0), row(4, audio="noise.wav")], r"bad.jsonl:2: .*noise.wav is not readable audio"),
        ([row(0), row(4, audio="empty.wav")], r"bad.jsonl:2: .*empty.wav has 0 samples"),
        ([row(0), row(4, audio="nan.wav")], r"bad.jsonl:2: .*nan.wav holds samples that are not numbers"),
        ([row(0), row(4, audio="cut.wav")], r"bad.jsonl:2: .*cut.wav ends early"),
        ([row(0), row(4, audio="noise.raw")], r"bad.jsonl:2: .*noise.raw is not readable audio"),
        ([row(0), "", row(4, start=1.5)], r"bad.jsonl:3: field 'start' means a part"),
        ([row(0), row(4, start_s=2, end_s=1.5)], r"bad.jsonl:2: its segment ends at 1.5 s, but starts at 2 s"),
        ([row(0), row(4, start_s=1, end_s=1)], r"bad.jsonl:2: its segment ends at 1 s, but starts at 1 s"),
        ([row(0), row(4, start_s=-1)], r"bad.jsonl:2: its start_s is -1"),
        ([row(0), row(4, start_s="0:01")], r"bad.jsonl:2: its start_s is '0:01'"),
        ([row(0), row(4, end_s=True)], r"bad.jsonl:2: its end_s is True"),
        ([row(0), row(4, end_s=1.4)], r"bad.jsonl:2: .*4.wav lasts 1.300 s, but the segment is 0 to 1.4 s"),
        ([row(0), row(4, start_s=1.4)], r"bad.jsonl:2: .*4.wav lasts 1.300 s, but the segment is 1.4 to its end s"),
        ([row(0), row(4, member="a.wav")], r"bad.jsonl:2: audio is '4.wav', member 'a.wav'"),
        ([row(0), row(4, audio="a.tar")], r"bad.jsonl:2: audio is 'a.tar', member None"),
        ([row(0), row(4, row=1)], r"bad.jsonl:2: audio is '4.wav', row 1"),
        ([row(0), row(4, audio="a.parquet", row=-1)], r"bad.jsonl:2: audio is 'a.parquet', row -1"),
        ([row(0), row(4, duration_s="1")], r"bad.jsonl:2: its duration_s is '1'"),
        ([row(0), row(4, audio="silent.wav")], r"bad.jsonl:2: .*silent.wav is silent"),
        ([row(0), row(4, text=None)], r"bad.jsonl:2: it has no text, but a text is wanted"),
        ([row(0), row(4, language=["en"])], r"bad.jsonl:2: its language is a list, but a text is wanted: \['en'\]"),
        ([row(0), row(4, text="\ud83d")], r"bad.jsonl:2: half a character"),
        ([row(0), row(4, text="icon \U000f0005")], r"bad.jsonl:2: character 6 of the text is U\+F0005"),
        (["", " "], r"bad.jsonl holds no rows"),
        ([], r"bad.jsonl is empty"),
    ],
)
@pytest.mark.parametrize("script", ["fit", "label", "label, 2 workers"])
def test_bad_rows_are_named(corpus, kmeans, tmp_path, rows, message, script):
    (corpus / "noise.wav").write_bytes(b"this is no audio")
    (corpus / "noise.raw").write_bytes(bytes(2000))
    (corpus / "cut.wav").write_bytes((corpus / "0.wav").read_bytes()[:-1])
    soundfile.write(corpus / "nan.wav", np.where(np.arange(8000) == 100, np.nan, 0), 16000, subtype="FLOAT")
    soundfile.write(corpus / "empty.wav", np.zeros(0, "f4"), 16000)
    soundfile.write(corpus / "silent.wav", 1e-4 * tone(4, 1), 16000)
    manifest = tmp_path / "bad.jsonl"
    write_manifest(manifest, rows)
    if script == "label, 2 workers" and "noise.wav" not in message:
        pytest.skip("found before there are workers, or as noise.wav is")
    with pytest.raises(UserError, match=message):
        if script == "fit":
            fit_kmeans.fit_kmeans([manifest], [corpus], tmp_path / "o", features="mfcc", num_units=5, hours=0.00277778)
        else:
            label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "o", num_workers=1 + ("2" in script))
    assert not list(tmp_path.glob("o/*.parquet")) and not list(tmp_path.glob("o/*.safetensors"))


def test_bom_and_blank_lines_in_a_manifest(corpus, tmp_path):
    lines = (corpus / "train.jsonl").read_bytes().splitlines()
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert [row["id"] for row in read_manifest(tmp_path / "m.jsonl")] == [f"u{i}" for i in range(7)]
    rows = list(read_rows(tmp_path / "m.jsonl", 2, 4))
    assert [(row["id"], row["where"][-2:]) for row in rows] == [("u2", ":5"), ("u3", ":7")]
    with pytest.raises(UserError, match="is a folder"):
        list(read_manifest(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"start": 0.0, "end": 3}, {"offset": 0, "duration": 2.0}, {"offset": 1.5}, {"offset_s": 0.0, "duration_s": 2},
        {"start_time": 1}, {"end_time": 1}, {"begin_time": "0:01"}, {"begin": 1}, {"startTime": 1}, {"start-ms": 5},
        {"segment": [1, 2]}, {"segments": [{"start": 1}]}, {"segment_start": 3}, {"channel": 1}, {"frame_offset": 7},
        {"END_S": 4}, {"stop": 1}, {"timestamps": [0, 1]}, {"audio_end": 2.0},
        {"offset": 0, "len": 2}, {"t_start": 1}, {"tstart": 1}, {"t0": 1, "t1": 2}, {"start_offset": 1}, {"stime": 1},
        {"xmin": 1, "xmax": 2}, {"from": 1, "to": 2}, {"seg": [1, 2]}, {"audio_channel": 0}, {"channel_id": 1},
        {"start_timestamp": 1}, {"clipStart": 1}, {"to": 2.0},
    ],
)  # fmt: skip
def test_segments_by_other_names_are_refused(tmp_path, fields):
    write_manifest(tmp_path / "m.jsonl", [row(0), row(1, **fields)])
    with pytest.raises(UserError, match=f"m.jsonl:2: field '{next(iter(fields))}' means a part of the recording"):
        list(read_manifest(tmp_path / "m.jsonl"))


@pytest.mark.parametrize(
    "fields",
    [
        {"duration": 2.5}, {"duration_s": 2.5}, {"offset": 0}, {"offset": None, "duration": 1}, {"start": None},
        {"offset": 0.0, "duration": None}, {"segments": []}, {"speaker": "a", "gender": "f", "segment_id": 3},
        {"num_channels": 2, "sampling_rate": 16000, "num_samples": 5, "end_punctuation": "."},
        {"translated_from": "de", "gender": "f", "restarted": True, "tokens": 3, "weekend": "no"},
    ],
)  # fmt: skip
def test_fields_of_whole_files_are_not(tmp_path, fields):
    write_manifest(tmp_path / "m.jsonl", [row(1, **fields)])
    (found,) = read_manifest(tmp_path / "m.jsonl")
    assert found == row(1, **fields) | {"where": f"{tmp_path}/m.jsonl:1"}


def read_audio(path: Path, where: str, min_samples: int = 1) -> np.ndarray:
    """All samples of a file, as a UserError with its place in place of an AudioError."""
    row = {"audio": path.name, "where": where}
    pieces = [piece for _, piece in audio.utterances([row], path.parent, min_samples)]
    if isinstance(pieces[-1], audio.AudioError):
        raise UserError(f"{audio.place(row, path.parent)} {pieces[-1].problem}")
    (whole,) = pieces
    return whole.samples


# --- Broken audio ---------------------------------------------------------------------------------
KINDS = {
    "pcm.wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "extensible.wav": ("WAVEX", "PCM_24"), "long.wav": ("RF64", "PCM_16"), "sony.w64": ("W64", "PCM_16"),
    "mac.aiff": ("AIFF", "PCM_16"), "sun.au": ("AU", "PCM_16"), "core.caf": ("CAF", "PCM_16"),
    "sphere.wav": ("NIST", "PCM_16"), "free.flac": ("FLAC", "PCM_16"), "vorbis.ogg": ("OGG", "VORBIS"),
    "opus.opus": ("OGG", "OPUS"), "layer3.mp3": ("MP3", "MPEG_LAYER_III"),
}  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """4 s of every kind of file; NIST also in stereo, MP3 of MPEG 1, without its header, and between tags."""
    folder = tmp_path_factory.mktemp("recordings")
    for name, (container, subtype) in KINDS.items():
        soundfile.write(folder / name, tone(3, 4), 16000, format=container, subtype=subtype)
    soundfile.write(folder / "mpeg1.mp3", tone(3, 4, 44100), 44100, format="MP3")
    soundfile.write(folder / "stereo.sph", np.stack([tone(3, 4)] * 2, axis=1), 16000, format="NIST", subtype="PCM_16")
    mp3 = (folder / "layer3.mp3").read_bytes()
    assert mp3[:3] == b"\xff\xf3\x88" and b"Xing" in mp3[:40]  # a frame of 64 kbit/s, at 16 kHz 288 bytes
    (folder / "variable.mp3").write_bytes(mp3[288:])
    soundfile.write(
        folder / "bare.mp3", tone(3, 4), 16000, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5
    )
    bare = (folder / "bare.mp3").read_bytes()
    assert b"Info" in bare[:40]
    (folder / "bare.mp3").write_bytes(bare[bare.index(bare[:2], 4) :])
    (folder / "tagged.mp3").write_bytes(b"ID3\4\0\0\0\0\2\1" + bytes(257) + mp3 + b"TAG" + bytes(125))
    return folder


@pytest.mark.parametrize("name", [*KINDS, "stereo.sph", "mpeg1.mp3", "bare.mp3", "tagged.mp3"])
def test_files_that_end_early(recordings, tmp_path, name):
    whole = (recordings / name).read_bytes()
    seconds = len(read_audio(recordings / name, "m:1")) / 16000
    assert seconds == pytest.approx(4, abs=0.15)  # an MP3 without header keeps the encoder's delay and padding
    size = len(whole) - 128 * (name == "tagged.mp3")
    for left in (size - 1, size - 3, size - 40, size * 9 // 10, size // 2 + 1, size // 3 + 1, 100, 30):
        (tmp_path / name).write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"^m:7: .*(ends early|is not readable audio|has \d+ samples)"):
            read_audio(tmp_path / name, "m:7", 400)


@pytest.mark.parametrize("name", ["vorbis.ogg", "opus.opus", "layer3.mp3"])
def test_of_two_files_in_one_libsndfile_reads_the_first(recordings, tmp_path, name):
    (tmp_path / name).write_bytes((recordings / name).read_bytes() * 2)
    assert soundfile.info(tmp_path / name).duration == pytest.approx(4, abs=0.1)  # of 8 s
    with pytest.raises(UserError, match="m:7: .* ends early"):
        read_audio(tmp_path / name, "m:7")


def test_a_duration_must_be_the_files(corpus, kmeans, tmp_path):
    """Of 0.wav, 0.5 s, as NeMo's manifests say it; a part without its offset is left out."""
    for said, fits in ((0.5, True), (1, True), (None, True), (1.51, False), (30, False)):
        for name in ("duration", "duration_s"):
            write_manifest(tmp_path / "m.jsonl", [row(0, **{name: said})])
            if fits:
                label_audio.label_audio(tmp_path / "m.jsonl", corpus, kmeans, tmp_path / "u", overwrite=True)
            else:
                with pytest.raises(UserError, match=f"m.jsonl:1: .*0.wav lasts 0.50 s, but the manifest says {said}"):
                    label_audio.label_audio(tmp_path / "m.jsonl", corpus, kmeans, tmp_path / "u", overwrite=True)


def test_ogg_cut_between_pages_and_mp3_between_frames(recordings, tmp_path):
    with pytest.raises(UserError, match="ends early"):  # libsndfile guesses its length, and reads 2 s of 4
        read_audio(recordings / "variable.mp3", "m:1")
    for name, mark in (("vorbis.ogg", b"OggS"), ("opus.opus", b"OggS"), ("layer3.mp3", b"\xff\xf3")):
        whole = (recordings / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: whole.rindex(mark, 0, len(whole) * 3 // 4 + 2000)])
        with pytest.raises(UserError, match="m:7: .* ends early"):
            read_audio(tmp_path / name, "m:7")


def test_frames_of_mpeg_audio_are_as_long_as_mpg123_says():
    """Of every version, layer, bit rate and sampling rate: 20 empty frames of our length are 20 to libsndfile."""
    for version, layer, bit_rate, rate, padding in product((3, 2, 0), (1, 2, 3), range(1, 15), range(3), (0, 1)):
        head = 0x7FF << 21 | version << 19 | 4 - layer << 17 | 1 << 16 | bit_rate << 12 | rate << 10 | padding << 9
        head = (head | 3 << 6).to_bytes(4, "big")  # mono
        frame = head + bytes(containers._mp3_frame(head, 0) - 4)
        samples_a_frame = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
        assert len(soundfile.read(io.BytesIO(20 * frame))[0]) == 20 * samples_a_frame, head.hex()


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0x7FFFFFFF - 36, 0xFFFFFFFF - 36])
def test_wav_from_a_pipe(recordings, tmp_path, size):
    data = bytearray((recordings / "pcm.wav").read_bytes())
    assert data[36:40] == b"data"
    data[4:8], data[40:44] = b"\xff\xff\xff\xff", struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav", "m:1")) == 64000


def test_aiff_from_a_pipe(recordings, tmp_path):
    """SoX announces 0x7F000008 bytes."""
    data = bytearray((recordings / "mac.aiff").read_bytes())
    place = data.index(b"SSND") + 4
    data[place : place + 4] = struct.pack(">I", 0x7F000008)
    (tmp_path / "a.aiff").write_bytes(data)
    assert len(read_audio(tmp_path / "a.aiff", "m:1")) == 64000


def test_wav_with_chunks_before_and_after(recordings, tmp_path):
    data = (recordings / "pcm.wav").read_bytes()
    odd, after = b"LIST" + struct.pack("<I", 3001) + bytes(3002), b"junk" + struct.pack("<I", 4) + b"data"
    for cut in (0, 1):
        (tmp_path / "a.wav").write_bytes(data[:36] + odd + data[36 : len(data) - cut] + after * (not cut))
        if cut:
            with pytest.raises(UserError, match="ends early"):
                read_audio(tmp_path / "a.wav", "m:1")
        else:
            assert len(read_audio(tmp_path / "a.wav", "m:1")) == 64000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1000.5])
def test_samples_that_are_no_sound(tmp_path, value):
    samples = np.stack([tone(0, 1), tone(1, 1)], axis=1)
    samples[777, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match="m:7: .*a.wav holds samples that are not numbers, or above 1,000"):
        read_audio(tmp_path / "a.wav", "m:7")
    samples[777, 1] = 999
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", "m:7"), samples.mean(axis=1))


def test_what_soundfile_raises_is_one_error(recordings, tmp_path):
    flac = bytearray((recordings / "free.flac").read_bytes())
    flac[21] &= 0xF0  # of STREAMINFO's 36 bits of samples
    flac[22:26] = bytes(4)
    wav = bytearray((recordings / "pcm.wav").read_bytes())
    wav[24:28] = struct.pack("<I", 2_000_000_000)  # Hz
    for name, data in (("unknown.flac", flac), ("a.raw", wav), ("rate.wav", wav), ("a.m4a", b"\0\0\0 ftypM4A ")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"m:7: .*{name} (is not readable|has 2000000000 samples a second)"):
            read_audio(tmp_path / name, "m:7")


@pytest.mark.parametrize("num_units", [1, 65535, 65536])
def test_the_number_of_units_is_checked_first(tmp_path, num_units):
    with pytest.raises(UserError, match="--num_units is .*\n.*2 to 65,534"):
        fit_kmeans.fit_kmeans([tmp_path / "none"], [tmp_path], tmp_path / "o", num_units=num_units, hours=5.55556e-06)


def test_bad_arguments(corpus, kmeans, tmp_path):
    manifest = corpus / "train.jsonl"
    with pytest.raises(UserError, match="1 manifests, 2 of --audio_root, 0 of --weights"):
        fit_kmeans.fit_kmeans([manifest], [corpus, corpus], tmp_path / "k2", features="mfcc")
    with pytest.raises(UserError, match="--hours 0"):
        fit_kmeans.fit_kmeans([manifest], [corpus], tmp_path / "k2", features="mfcc", hours=0)
    with pytest.raises(UserError, match="--batch_seconds 0"):
        label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "u", batch_seconds=0)
    with pytest.raises(UserError, match="shards are 0 to num_shards - 1"):
        label_audio.label_audio(manifest, corpus, kmeans, tmp_path, num_shards=2, shard=2)
    with pytest.raises(UserError, match="frames for 5,000 units"):
        fit_kmeans.fit_kmeans([manifest], [corpus], tmp_path / "k", features="mfcc", num_units=5000)
    with pytest.raises(UserError, match="features.json does not exist|kmeans.safetensors does not exist"):
        label_audio.label_audio(manifest, corpus, corpus, tmp_path / "u")
