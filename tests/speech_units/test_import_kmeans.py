"""Other people's k-means, against scikit-learn's own predictions on transformers' hidden states."""

import json
import pickle
from pathlib import Path

import joblib
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from speech_units import features
from speech_units.import_kmeans import import_kmeans
from towerspeech.errors import UserError

DIM = 32


@pytest.fixture(scope="module", params=[True, False], ids=["large-like", "base-like"])
def hubert(request, tmp_path_factory):
    import torch
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    stable = request.param
    config = HubertConfig(
        hidden_size=DIM, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group", conv_bias=stable,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hubert")
    HubertModel(config).save_pretrained(folder)
    return str(folder)


def frames(count: int = 400, dim: int = 28) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, dim)).astype("f4")


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_are_those_of_hidden_states_and_units_those_of_scikit_learn(hubert, tmp_path, layer):
    """fairseq's and slamkit's layer L is hidden_states[L]."""
    import torch
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    samples = (0.05 * np.random.default_rng(0).standard_normal(64000)).astype("f4")
    normalised = Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        states = HubertModel.from_pretrained(hubert).eval()(normalised.input_values, output_hidden_states=True)
    theirs = states.hidden_states[layer][0].numpy()
    model = MiniBatchKMeans(12, n_init=1, random_state=0).fit(theirs)
    joblib.dump(model, tmp_path / "km.bin")  # as fairseq's learn_kmeans.py
    import_kmeans(tmp_path / "km.bin", tmp_path / "k", encoder=str(hubert), layer=layer, trust_pickle=True)
    centroids, config = features.load_kmeans(tmp_path / "k")
    assert config == features.encoder_config("hubert", str(hubert), layer)
    assert centroids.dtype == np.float32 and centroids.shape == (12, DIM)
    (ours,) = features.Encoder(config, "cpu", DIM).encode([features.prepare(samples, config)])
    ours = ours.numpy()
    ids = ((ours[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(ids, model.predict(theirs))
    assert len({*ids.tolist()}) > 6


@pytest.mark.parametrize("kind", ["joblib", "joblib, compressed", "pickle", "pickled array", "npy", "npy, float64"])
def test_every_kind_gives_the_same(tmp_path, kind):
    model = KMeans(9, n_init=1, random_state=0).fit(frames())
    path = tmp_path / ("km.npy" if "npy" in kind else "km.bin")
    if "joblib" in kind:
        joblib.dump(model, path, compress=3 * ("compressed" in kind))
    elif "pickle" in kind:
        path.write_bytes(pickle.dumps(model if kind == "pickle" else model.cluster_centers_))
    else:
        np.save(path, model.cluster_centers_.astype("f8" if "float64" in kind else "f4"))
    import_kmeans(path, tmp_path / "k", features="mfcc", trust_pickle="npy" not in kind)
    np.testing.assert_array_equal(load_file(tmp_path / "k/kmeans.safetensors")["centroids"], model.cluster_centers_)
    assert features.load_kmeans(tmp_path / "k")[1] == features.FeatureConfig("mfcc")
    counts = json.loads((tmp_path / "k/run_info.json").read_text())["counts"]
    assert counts == {"units": 9, "distinct_units": 9}


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_not_loaded_untold(tmp_path):
    (tmp_path / "km.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(UserError, match="(?s)runs whatever code was put into it.*--trust_pickle true"):
        import_kmeans(tmp_path / "km.bin", tmp_path / "k", features="mfcc")
    np.save(tmp_path / "objects.npy", np.array([Runs(tmp_path / "ran")]), allow_pickle=True)
    with pytest.raises(UserError, match="objects.npy cannot be read: .*allow_pickle=False"):
        import_kmeans(tmp_path / "objects.npy", tmp_path / "k", features="mfcc", trust_pickle=True)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "k").exists()
    with pytest.raises(UserError, match="holds a TextIOWrapper, neither"):
        import_kmeans(tmp_path / "km.bin", tmp_path / "k", features="mfcc", trust_pickle=True)
    assert (tmp_path / "ran").exists()


def test_centroids_that_are_the_same_are_counted(tmp_path, capsys):
    table = frames(6)
    table[4] = table[1]
    np.save(tmp_path / "km.npy", table)
    import_kmeans(tmp_path / "km.npy", tmp_path / "k", features="mfcc")
    assert "6 units of 28 numbers, of which only 5 differ" in capsys.readouterr().out
    np.testing.assert_array_equal(load_file(tmp_path / "k/kmeans.safetensors")["centroids"], table)  # ids stay
    import_kmeans(tmp_path / "km.npy", tmp_path / "k", features="mfcc", trust_pickle=True)
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (frames(5, 27), r"centroids of 27 numbers, but our MFCC gives 28"),
        (frames(5, 39), r"(?s)of 39 numbers.*such as fairseq's"),
        (frames(1), r"has 1 centroids"),
        (np.zeros((65535, 28), "f4"), r"has 65,535 centroids"),
        (frames(5)[0], r"of shape \(28,\) and type float32, no centroids"),
        (frames(5) > 0, r"type bool, no centroids"),
        (np.where(np.arange(28) == 3, np.nan, frames(5)), r"centroid 0 holds NaN"),
        (
            np.where(np.arange(5)[:, None] == 3, 1e39, frames(5).astype("f8")),
            r"centroid 3 holds NaN, or what float32 cannot",
        ),
        (b"this is no pickle", r"km.npy cannot be loaded as joblib or pickle: "),
        (b"", r"km.npy is empty"),
        (None, r"km.npy does not exist"),
        ({"a": 1}, r"holds a dict, neither"),
        (MiniBatchKMeans(4), r"holds a MiniBatchKMeans, neither an array nor a fitted"),
        ("cut", r"cannot be read: "),
        ("cut joblib", r"cannot be loaded as joblib or pickle"),
        (b"cno_such_package.k_means_\nKMeans\n.", r"ModuleNotFoundError: .*(?s:\n).*with its own scikit-learn"),
    ],
)
def test_what_is_no_kmeans_is_refused(tmp_path, content, message):
    path = tmp_path / "km.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        np.save(path, frames())
        path.write_bytes(path.read_bytes()[:-1])
    elif content == "cut joblib":
        joblib.dump(frames(), path)
        path.write_bytes(path.read_bytes()[:-1])
    elif content is not None:
        joblib.dump(content, path)
    with pytest.raises(UserError, match=message):
        import_kmeans(path, tmp_path / "k", features="mfcc", trust_pickle=True)
    assert not list(tmp_path.glob("k/*"))


def test_width_and_layer_are_the_models(hubert, tmp_path):
    np.save(tmp_path / "km.npy", frames(5, DIM + 1))
    with pytest.raises(UserError, match=f"centroids of 33 numbers, but {hubert} gives 32"):
        import_kmeans(tmp_path / "km.npy", tmp_path / "k", encoder=str(hubert), layer=2)
    with pytest.raises(UserError, match="has 3 layers, not 22"):
        import_kmeans(tmp_path / "km.npy", tmp_path / "k", encoder=str(hubert))
