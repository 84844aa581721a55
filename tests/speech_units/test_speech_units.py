"""Features, k-means and labels, against transformers' audio code, a hooked HuBERT, scikit-learn and plain loops."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from towerspeech.records import read_units
from towerspeech.stage import UserError, hash_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "speech_units"))  # as for `python speech_units/label_audio.py`

import features  # noqa: E402
import fit_kmeans  # noqa: E402
import label_audio  # noqa: E402


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
    fit_kmeans.fit_kmeans(corpus / "train.jsonl", corpus, folder, features="mfcc", num_units=12, max_frames=200)
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


@pytest.fixture(scope="module", params=[True, False], ids=["large-like", "base-like"])
def hubert(request, tmp_path_factory):
    import torch
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    stable = request.param
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group", conv_bias=stable,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hubert")
    HubertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [2, 3])
def test_hubert_is_the_hooked_output_of_its_layer(hubert, layer):
    import torch
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    samples = tone(1, 0.7)
    model = HubertModel.from_pretrained(hubert).eval()
    caught = []
    model.encoder.layers[layer - 1].register_forward_hook(lambda m, i, output: caught.append(output))
    normalised = Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        model(normalised.input_values)
    wanted = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    got = features.load_hubert(str(hubert), layer, "cpu")(samples)
    assert got.shape == (1 + (len(samples) - 400) // 320, 32)
    np.testing.assert_allclose(got, wanted.reshape(got.shape).numpy(), atol=1e-5)


def test_hubert_errors(hubert, tmp_path):
    with pytest.raises(UserError, match="has 3 layers, not 4"):
        features.load_hubert(str(hubert), 4, "cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        features.load_hubert(str(tmp_path / "nothing"), 1, "cpu")


def test_hubert_units_end_to_end(corpus, hubert, tmp_path):
    fit_kmeans.fit_kmeans(
        corpus / "train.jsonl", corpus, tmp_path / "k", hubert=str(hubert), layer=2, num_units=5, max_frames=100
    )
    label_audio.label_audio(corpus / "train.jsonl", corpus, tmp_path / "k", tmp_path / "u")
    assert [row["id"] for row in read_units(tmp_path / "u", 5)] == [f"u{i}" for i in range(7)]


# --- k-means --------------------------------------------------------------------------------------
def test_reservoir_is_fair_bounded_and_seeded():
    hits = np.zeros(50)
    for seed in range(2000):
        drawn = fit_kmeans.sample_rows(({"n": n} for n in range(50)), 5, seed)
        assert len(drawn) == 5
        hits[[row["n"] for row in drawn]] += 1
    assert abs(hits / 2000 - 0.1).max() < 0.035  # five standard deviations
    assert fit_kmeans.sample_rows(iter([{"n": 1}]), 5, 0) == [{"n": 1}]


def test_kmeans_finds_what_full_kmeans_finds():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (6, 4))
    frames = (centres[rng.integers(0, 6, 3000)] + rng.normal(0, 0.3, (3000, 4))).astype(np.float32)
    found, distance = fit_kmeans.cluster(frames, 6, seed=0)
    full = KMeans(6, n_init=10, random_state=0).fit(frames)
    assert found.dtype == np.float32
    assert distance == pytest.approx(full.inertia_ / 3000, rel=0.02)


def test_kmeans_same_bytes_and_done_again(corpus, kmeans, tmp_path, capsys):
    arguments = {"features": "mfcc", "num_units": 12, "max_frames": 200}
    fit_kmeans.fit_kmeans(corpus / "train.jsonl", corpus, tmp_path, **arguments)
    for name in ("kmeans.safetensors", "features.json"):
        assert hash_file(tmp_path / name) == hash_file(kmeans / name)
    fit_kmeans.fit_kmeans(corpus / "train.jsonl", corpus, tmp_path, **arguments)
    assert "already done" in capsys.readouterr().out


# --- Labels ---------------------------------------------------------------------------------------
def test_nearest_equals_a_plain_search():
    rng = np.random.default_rng(0)
    frames, centroids = rng.normal(size=(5000, 8)).astype("f4"), rng.normal(size=(40, 8)).astype("f4")
    wanted = [int(((centroids - frame) ** 2).sum(axis=1).argmin()) for frame in frames]
    assert label_audio.nearest(frames, centroids) == wanted


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
        ([row(0), row(4, id="u0")], r"bad.jsonl:2: id 'u0' stands in line 1 already"),
        ([row(0), row(4, audio="gone.wav")], r"bad.jsonl:2: .*gone.wav does not exist"),
        ([row(0), row(4, audio="noise.wav")], r"bad.jsonl:2: .*noise.wav is not readable audio"),
        ([row(0), row(4, audio="empty.wav")], r"bad.jsonl:2: .*empty.wav has 0 samples"),
        ([], r"bad.jsonl is empty"),
    ],
)
@pytest.mark.parametrize("script", ["fit", "label", "label, 2 workers"])
def test_bad_rows_are_named(corpus, kmeans, tmp_path, rows, message, script):
    (corpus / "noise.wav").write_bytes(b"this is no audio")
    soundfile.write(corpus / "empty.wav", np.zeros(0, "f4"), 16000)
    manifest = tmp_path / "bad.jsonl"
    write_manifest(manifest, rows)
    if script == "label, 2 workers" and "noise" not in message:
        pytest.skip("found before there are workers, or as noise.wav is")
    with pytest.raises(UserError, match=message):
        if script == "fit":
            fit_kmeans.fit_kmeans(manifest, corpus, tmp_path / "o", features="mfcc", num_units=5, max_frames=500)
        else:
            label_audio.label_audio(manifest, corpus, kmeans, tmp_path / "o", num_workers=1 + ("2" in script))
    assert not list(tmp_path.glob("o/*.parquet")) and not list(tmp_path.glob("o/*.safetensors"))


def test_bad_arguments(corpus, kmeans, tmp_path):
    manifest = corpus / "train.jsonl"
    with pytest.raises(UserError, match="shards are 0 to num_shards - 1"):
        label_audio.label_audio(manifest, corpus, kmeans, tmp_path, num_shards=2, shard=2)
    with pytest.raises(UserError, match="frames for 5,000 units"):
        fit_kmeans.fit_kmeans(manifest, corpus, tmp_path / "k", features="mfcc", num_units=5000)
    with pytest.raises(UserError, match="features.json does not exist|kmeans.safetensors does not exist"):
        label_audio.label_audio(manifest, corpus, corpus, tmp_path / "u")
