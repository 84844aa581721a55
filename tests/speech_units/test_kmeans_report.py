"""The report's figures, against scikit-learn, scipy and plain loops over frames."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import save_file
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from speech_units import features
from speech_units.kmeans import Nearest, squared_distances
from speech_units.kmeans_report import kmeans_report, phones_of_frames, read_phones
from speech_units.unit_statistics import DISTANCE_EDGES, PhoneStatistics, UnitStatistics
from towerspeech.errors import UserError
from towerspeech.files import hash_file

HOP, WINDOW = 320, 480  # samples of MFCC


def spoken(num_units: int = 9, utterances: int = 30, seed: int = 0):
    """Utterances of frames that stay near a centroid for a while: [(frames, ids)], and the centroids."""
    rng = np.random.default_rng(seed)
    centroids = rng.normal(3, 2, (num_units, 6)).astype("f4")
    found = []
    for _ in range(utterances):
        lengths = rng.geometric(0.4, rng.integers(1, 20))
        ids = np.repeat(rng.integers(0, num_units - 2, len(lengths)), lengths)  # the last two are never used
        found.append((centroids[ids] + rng.normal(0, 0.05, (len(ids), 6)).astype("f4"), ids))
    return found, centroids


def nearest(frames: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As the report has them: ids, and squared distances."""
    found = torch.from_numpy(frames)
    (ids,) = Nearest(centroids, "cpu")([found])
    return ids.numpy(), squared_distances(found, torch.from_numpy(centroids), ids).numpy()


# --- Figures --------------------------------------------------------------------------------------
def test_figures_of_units():
    utterances, centroids = spoken()
    statistics = UnitStatistics(*centroids.shape)
    for frames, _ in utterances:
        statistics.add(frames, *nearest(frames, centroids))
    figures = statistics.figures(50)

    every, ids = np.concatenate([f for f, _ in utterances]), np.concatenate([i for _, i in utterances])
    model = KMeans(len(centroids), init=centroids, n_init=1, max_iter=1).fit(every)
    model.cluster_centers_ = centroids
    np.testing.assert_array_equal(model.predict(every), ids)
    repeated = runs = 0
    lengths = []
    for _, said in utterances:
        for before, after in zip([None, *said], said, strict=False):
            repeated, runs = repeated + (before == after), runs + (before != after)
            lengths = [*lengths[:-1], lengths[-1] + 1] if before == after else [*lengths, 1]
    counts = np.unique(ids, return_counts=True)[1]
    assert figures == {
        "utterances": 30,
        "frames": len(ids),
        "hours": pytest.approx(len(ids) * 0.02 / 3600),
        "units": 9,
        "units_used": 7,
        "perplexity": pytest.approx(2 ** entropy(counts, base=2)),
        "repeated_frames": pytest.approx(repeated / len(ids)),
        "units_a_second": pytest.approx(runs / (len(ids) * 0.02)),
        "mean_squared_distance": pytest.approx(-model.score(every) / len(every), rel=1e-5),
        "explained_variance": pytest.approx(1 + model.score(every) / len(every) / every.var(axis=0).sum(), rel=1e-6),
    }
    np.testing.assert_array_equal(statistics.runs, np.bincount(lengths))
    squared = ((every.astype("f8") - centroids[ids]) ** 2).sum(axis=1)
    np.testing.assert_array_equal(statistics.distances, np.histogram(squared, DISTANCE_EDGES)[0])


def test_all_frames_are_in_the_histogram_of_distances():
    statistics = UnitStatistics(2, 1)
    statistics.add(np.zeros((4, 1)), np.zeros(4, int), np.array([0, 1e-9, 1e6, 1e12]))
    assert statistics.distances[0] == 2 and statistics.distances[-1] == 2 and statistics.distances.sum() == 4
    statistics.add(np.zeros((0, 1)), np.zeros(0, int), np.zeros(0))  # an utterance without frames
    assert (statistics.utterances, statistics.frames, statistics.collapsed) == (2, 4, 1)
    assert statistics.figures(50)["explained_variance"] is None  # all frames are the same


def test_variance_far_from_zero():
    """A sum of squares less the squared sum would be off by more than the variance."""
    frames = (1e6 + np.random.default_rng(0).normal(size=(3000, 2))).astype("f8")
    statistics = UnitStatistics(1, 2)
    for some in np.array_split(frames, [1, 7, 1000, 2999]):
        statistics.add(some, np.zeros(len(some), int), np.ones(len(some)))
    wanted = 1 - 1 / frames.var(axis=0).sum()
    assert statistics.figures(50)["explained_variance"] == pytest.approx(wanted, rel=1e-9)


def test_nearest_equals_a_plain_search_and_keeps_small_distances():
    rng = np.random.default_rng(0)
    frames, centroids = rng.normal(size=(5000, 8)).astype("f4"), rng.normal(size=(40, 8)).astype("f4")
    frames[7] = centroids[3] = 1000
    frames[7, 0] += 0.001
    ids, found = nearest(frames, centroids)
    table = ((frames[:, None].astype("f8") - centroids) ** 2).sum(axis=2)
    np.testing.assert_array_equal(ids, table.argmin(axis=1))
    np.testing.assert_allclose(found, table.min(axis=1), rtol=1e-5)
    assert 0 < found[7] < 2e-6


def test_phone_figures_equal_scikit_learns():
    rng = np.random.default_rng(0)
    statistics, phones, units = PhoneStatistics(12), [], []
    for _ in range(20):
        said = rng.choice(["AA", "B", "SIL", None], 50, p=[0.2, 0.3, 0.4, 0.1]).tolist()
        ids = np.array([hash_of(phone) if rng.random() < 0.7 else rng.integers(0, 11) for phone in said])
        statistics.add(said, ids)
        phones += [phone for phone in said if phone]
        units += [unit for phone, unit in zip(said, ids, strict=True) if phone]
    table = contingency_matrix(phones, units)
    phone_right = cluster_right = 0
    for unit in {*units}:
        of_it = [phone for phone, other in zip(phones, units, strict=True) if other == unit]
        phone_right += max(of_it.count(phone) for phone in of_it)
    for phone in {*phones}:
        of_it = [unit for other, unit in zip(phones, units, strict=True) if other == phone]
        cluster_right += max(of_it.count(unit) for unit in of_it)
    figures = statistics.figures()
    assert figures == {
        "phones": 3,
        "frames_with_phone": len(phones),
        "phone_purity": pytest.approx(phone_right / len(phones)),
        "cluster_purity": pytest.approx(cluster_right / len(phones)),
        "pnmi": pytest.approx(mutual_info_score(phones, units) / entropy(table.sum(axis=1))),
    }
    assert figures["phone_purity"] == pytest.approx(table.max(axis=0).sum() / table.sum())
    assert 0 < figures["pnmi"] < 1 and figures["cluster_purity"] < figures["phone_purity"] < 1


def hash_of(phone: str | None) -> int:
    return {"AA": 1, "B": 4, "SIL": 7, None: 9}[phone]


def test_units_that_are_phones_and_units_that_tell_nothing():
    same, nothing, one = PhoneStatistics(3), PhoneStatistics(3), PhoneStatistics(3)
    same.add(["a", "b", "b", "c"], np.array([0, 2, 2, 1]))
    assert [same.figures()[name] for name in ("phone_purity", "cluster_purity")] == [1, 1]
    assert same.figures()["pnmi"] == pytest.approx(1)
    nothing.add(["a", "b", "a", "b"], np.array([0, 0, 1, 1]))
    assert nothing.figures()["pnmi"] == pytest.approx(0)
    one.add(["a", "a"], np.array([0, 1]))
    assert one.figures()["pnmi"] is None and one.figures()["phone_purity"] == 1


# --- Phones ---------------------------------------------------------------------------------------
def test_the_phone_in_the_middle_of_a_frame(tmp_path):
    phones = [["A", 0.0, 0.055], ["B", 0.055, 0.1], ["C", 0.13, 9]]
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "u", "phones": phones}) + '\n{"id": "v", "phones": []}')
    found = read_phones(tmp_path / "p.jsonl", {"u"})
    wanted = []
    for frame in range(10):
        middle = (frame * HOP + WINDOW / 2) / 16000
        wanted.append(next((label for label, start, end in phones if start <= middle < end), None))
    assert phones_of_frames(found["u"], 10, features.FeatureConfig("mfcc")) == wanted
    assert wanted == ["A", "A", "B", "B", "B", None, "C", "C", "C", "C"]  # the third's middle is 0.055
    assert [*found] == ["u"]
    (empty,) = read_phones(tmp_path / "p.jsonl", {"v"}).values()
    assert phones_of_frames(empty, 2, features.FeatureConfig("mfcc")) == [None, None]


@pytest.mark.parametrize(
    ("phones", "message"),
    [
        ([["A", 0, 1], ["B", 0.9, 2]], r"p.jsonl:2: \['B', 0.9, 2\] starts before 1"),
        ([["A", 1, 1]], r"p.jsonl:2: .* is no phone"),
        ([["A", -1, 1]], r"p.jsonl:2: .* is no phone"),
        ([["A", 0, "1"]], r"p.jsonl:2: .* is no phone"),
        ([["A", 0]], r"p.jsonl:2: .* is no phone"),
        ([[7, 0, 1]], r"p.jsonl:2: .* is no phone"),
        ([["A", 0, float("inf")]], r"p.jsonl:2: .* is no phone"),
        ("abc", r"p.jsonl:2: 'abc' is no phone"),
        (None, r"p.jsonl:2: None is no phone"),
    ],
)
def test_wrong_phones_are_named(tmp_path, phones, message):
    rows = [{"id": "v", "phones": []}, {"id": "u", "phones": phones}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        read_phones(tmp_path / "p.jsonl", {"u"})


# --- The command ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight utterances of three vowels each, their phones, and a k-means of our MFCC; the last is part of a file."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows, phones, every = [], [], []
    for i in range(8):
        samples, said, at = [], [], 0
        for label in rng.choice(["AA", "IY", "SIL"], 3, replace=False).tolist():
            length = int(rng.integers(4000, 9000))
            time = np.arange(length) / 16000
            pitch = {"AA": 700, "IY": 2300, "SIL": 0}[label]
            samples.append(0.2 * np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(length))
            said.append([label, at / 16000, (at + length) / 16000])
            at += length
        samples = np.concatenate(samples).astype("f4")
        row = {"id": f"u{i}", "audio": f"{i}.wav", "language": "en", "text": "", "duration_s": at / 16000}
        if i == 7:
            soundfile.write(root / "7.wav", np.concatenate([samples[:5000], samples, samples, samples[:3000]]), 16000)
            row |= {"start_s": 5000 / 16000, "end_s": (5000 + at) / 16000}
        else:
            soundfile.write(root / f"{i}.wav", samples, 16000)
        rows.append(row)
        phones.append({"id": f"u{i}", "phones": said})
        read = soundfile.read(root / f"{i}.wav", dtype="float32")[0]
        every.append(features.mfcc(read[5000 : 5000 + at] if i == 7 else read))
    for name, content in (("m.jsonl", rows), ("p.jsonl", phones)):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    centroids = KMeans(20, n_init=1, random_state=0).fit(np.concatenate(every)).cluster_centers_
    (root / "k").mkdir()
    save_file({"centroids": centroids}, root / "k/kmeans.safetensors")
    saved = features.features_json(features.FeatureConfig("mfcc"), 20, 28)
    (root / "k/features.json").write_text(json.dumps(saved))
    return root, every, phones, centroids


def report(corpus, output_dir: Path, **more) -> dict:
    root = corpus[0]
    kmeans_report(root / "m.jsonl", root, root / "k", output_dir, **more)
    return json.loads((output_dir / "report.json").read_text())


def test_report_of_all(corpus, tmp_path, capsys):
    root, every, phones, centroids = corpus
    found = report(corpus, tmp_path / "o", phones=root / "p.jsonl")
    frames = np.concatenate(every)
    table = ((frames[:, None].astype("f8") - centroids) ** 2).sum(axis=2)
    ids = table.argmin(axis=1)
    assert found["frames"] == len(frames) and found["utterances"] == 8
    assert found["mean_squared_distance"] == pytest.approx(table.min(axis=1).mean(), rel=1e-5)
    assert found["units_used"] == len({*ids.tolist()})
    assert found["perplexity"] == pytest.approx(np.exp(entropy(np.unique(ids, return_counts=True)[1])))
    said = []
    for of_it, row in zip(every, phones, strict=True):
        for frame in range(len(of_it)):
            middle = (frame * HOP + WINDOW / 2) / 16000
            said += [label for label, start, end in row["phones"] if start <= middle < end]
    assert len(said) == found["frames_with_phone"] == len(frames)
    assert found["pnmi"] == pytest.approx(
        mutual_info_score(said, ids) / entropy(np.unique(said, return_counts=True)[1])
    )
    assert found["pnmi"] > 0.6 and found["phone_purity"] > 0.85  # the vowels are easy to tell
    image = (tmp_path / "o/report.png").read_bytes()
    assert image.startswith(b"\x89PNG") and b"matplotlib" not in image
    out = capsys.readouterr().out
    assert (
        "these are not 1.0 hours, though 8 of 8 utterances were drawn" in out and f"pnmi  {found['pnmi']:.4f}" in out
    )


def test_same_bytes_and_done_again(corpus, tmp_path, capsys):
    for place in ("a", "b"):
        report(corpus, tmp_path / place, hours=2.5 / 3600)
    for name in ("report.json", "report.png"):
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "b" / name)
    report(corpus, tmp_path / "a", hours=2.5 / 3600)
    assert "already done" in capsys.readouterr().out


def test_sample_of_whole_utterances(corpus, tmp_path):
    """Drawn by the seed, each whole; processes do not matter."""
    _, every, *_ = corpus
    lengths = [len(frames) for frames in every]
    drawn = set()
    for seed in range(6):
        found = report(corpus, tmp_path / str(seed), hours=2.5 / 3600, seed=seed)
        assert "pnmi" not in found
        assert found["frames"] + 2 * found["utterances"] >= 125  # an utterance has up to two frames less than its time
        assert found["frames"] < sum(lengths)
        drawn.add(found["frames"])
    assert len(drawn) > 2
    assert found["hours"] == pytest.approx(found["frames"] * 0.02 / 3600)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hours": 0}, "--hours is 0"),
        ({"hours": float("nan")}, "--hours is nan"),
        ({"phones": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"phones": "others.jsonl"}, "others.jsonl has none of the utterances' ids"),
        ({"phones": "late.jsonl"}, "late.jsonl has no phone for any frame"),
    ],
)
def test_what_cannot_be_reported(corpus, tmp_path, more, message):
    (tmp_path / "others.jsonl").write_text('{"id": "x", "phones": []}')
    (tmp_path / "late.jsonl").write_text('{"id": "u0", "phones": [["AA", 13000, 14000]]}')  # milliseconds
    if "phones" in more:
        more = {"phones": tmp_path / more["phones"]}
    with pytest.raises(UserError, match=message):
        report(corpus, tmp_path / "o", **more)
    assert not list(tmp_path.glob("o/report*"))


def test_a_segment_that_is_not_there(corpus, tmp_path):
    root = corpus[0]
    row = {"id": "u", "audio": "0.wav", "language": "en", "text": "", "start_s": 100}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="1 of 1 utterances cannot be used: 1 beyond the end"):
        kmeans_report(tmp_path / "m.jsonl", root, root / "k", tmp_path / "o")


def test_random_order_does_not_change_the_figures():
    utterances, centroids = spoken(seed=3)
    found = []
    for seed in (0, 1):
        random.Random(seed).shuffle(utterances)
        statistics = UnitStatistics(*centroids.shape)
        for frames, _ in utterances:
            statistics.add(frames, *nearest(frames, centroids))
        found.append(statistics.figures(50))
    assert found[0] == {name: pytest.approx(value, rel=1e-12) for name, value in found[1].items()}
