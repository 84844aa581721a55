"""label_audio.py at the size of corpora: segments, archives, long recordings, bad items, kills."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import save_file

from benchmarks.bench_units import librispeech_lengths
from speech_units import audio, features, frames, label_audio
from speech_units.kmeans import Nearest
from speech_units.make_manifest import make_manifest
from tests.corpus_trees import CORPORA
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.units import collapse
from towerspeech.units_parquet import read_units

ROOT = Path(__file__).parents[2]
MFCC = features.FeatureConfig("mfcc")


def speech(seed: int, seconds: float, rate: int = 16000) -> np.ndarray:
    """Noise whose colour changes every tenth of a second."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(round(seconds * rate))
    tenth = rate // 10
    for start in range(0, len(samples), tenth):
        part = samples[start : start + tenth]
        samples[start : start + tenth] = np.convolve(part, rng.standard_normal(8), mode="same")
    return (0.05 * samples).astype("f4")


def row(number: int, audio_path: str, **fields) -> dict:
    return {"id": f"u{number}", "audio": audio_path, "language": "en", "text": f"text {number}", **fields}


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def kmeans(tmp_path_factory):
    """A k-means of MFCC, 60 centroids among frames of ``speech``."""
    folder = tmp_path_factory.mktemp("kmeans")
    found = features.mfcc(speech(0, 30))
    save_file({"centroids": np.ascontiguousarray(found[::25][:60])}, folder / "kmeans.safetensors")
    (folder / "features.json").write_text(json.dumps(features.features_json(MFCC, 60, found.shape[1])))
    return folder


def units_of(folder: Path) -> dict[str, list[int]]:
    return {row["id"]: row["units"] for row in read_units(folder)}


def plain_units(samples: np.ndarray, kmeans: Path) -> list[int]:
    """By a search in float64 over all distances."""
    centroids = features.load_kmeans(kmeans)[0].astype("f8")
    found = features.mfcc(samples).astype("f8")
    return collapse(((found[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1).tolist())


# --- Which audio a row means ----------------------------------------------------------------------
SEGMENTS = (
    (0.0, 1.5),
    (1.5, 2.25),
    (3.1, 5.317),
    (2.0, 2.5),
    (8.0, None),
    (0.7, 9.04),
)  # of 9 s; in no order, overlapping


@pytest.mark.parametrize(
    ("name", "rate", "subtype"),
    [("a.wav", 16000, "PCM_16"), ("a.flac", 22050, "PCM_16"), ("a.ogg", 44100, "VORBIS"), ("a.opus", 48000, "OPUS")],
)
def test_segments_are_the_same_audio_cut_into_files(tmp_path, kmeans, name, rate, subtype):
    whole = speech(1, 9, rate)
    soundfile.write(tmp_path / name, whole, rate, format="OGG" if subtype == "OPUS" else None, subtype=subtype)
    decoded, _ = soundfile.read(tmp_path / name, dtype="f4")
    rows, cut = [], []
    for number, (start, end) in enumerate(SEGMENTS):
        last = None if end is None else round(end * rate)
        soundfile.write(tmp_path / f"{number}.wav", decoded[round(start * rate) : last], rate, subtype="FLOAT")
        cut.append(row(number, f"{number}.wav"))
        rows.append(row(number, name, start_s=start, **({} if end is None else {"end_s": end})))
    for folder, manifest in (("segments", rows), ("files", cut)):
        path = write_manifest(tmp_path / f"{folder}.jsonl", manifest)
        label_audio.label_audio(path, tmp_path, kmeans, tmp_path / folder)
    found = units_of(tmp_path / "segments")
    assert found == units_of(tmp_path / "files")
    assert len(found) == len(SEGMENTS) and len({tuple(units) for units in found.values()}) == len(SEGMENTS)
    durations = [row["duration_s"] for row in read_units(tmp_path / "segments")]
    assert durations == pytest.approx([min(end or 9, 9) - start for start, end in SEGMENTS], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "rate", "subtype"),
    [("a.flac", 16000, None), ("a.ogg", 16000, "VORBIS"), ("b.ogg", 44100, "VORBIS"), ("a.opus", 48000, "OPUS"),
     ("a.mp3", 16000, None)],
)  # fmt: skip
def test_segments_are_sought_to_the_sample(tmp_path, name, rate, subtype):
    """One after the other in one open recording: after a seek libsndfile may read Ogg Vorbis wrongly."""
    soundfile.write(tmp_path / name, speech(4, 40, rate), rate, format="OGG" if subtype else None, subtype=subtype)
    whole, _ = soundfile.read(tmp_path / name, dtype="f4")
    rows = [
        row(n, name, start_s=start, end_s=start + 0.7, where="") for n, start in enumerate(np.arange(0.1, 37, 0.9))
    ]
    shuffled = random.Random(0).sample(rows, len(rows))
    for order in (rows, shuffled):
        for told, piece in audio.utterances(order, tmp_path):
            start, end = (round(told[key] * rate) for key in ("start_s", "end_s"))
            wanted = audio.Recording.resampled(SimpleNamespace(rate=rate), whole[start:end])
            np.testing.assert_allclose(piece.samples, wanted, atol=0 if name != "a.mp3" else 1e-3)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_audio_in_archives(tmp_path, kmeans, kind, num_workers):
    files, rows = [], []
    for number in range(7):
        data = io.BytesIO()
        soundfile.write(data, speech(number, 1 + number / 3), 16000, format="FLAC")
        files.append(data.getvalue())
        (tmp_path / f"{number}.flac").write_bytes(files[-1])
    places = (("id 3", 3), ("id 0", 0), ("id 6", 6), ("id 5", 5), ("id 5 again", 5))
    archive = f"a.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = [{"bytes": data, "path": f"{number}.flac"} for number, data in enumerate(files)]
        table = pa.table({"info": [{"n": 1}] * 7, "audio": column, "text": ["t"] * 7})
        pq.write_table(table, tmp_path / archive, row_group_size=2)
        rows = [row(number, archive, row=place) for number, (_, place) in enumerate(places)]
    else:
        with tarfile.open(tmp_path / archive, "w:gz" if kind == "tar.gz" else "w") as tar:
            for number, data in enumerate(files):
                info = tarfile.TarInfo(f"x/{number}.flac")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        rows = [row(number, archive, member=f"x/{place}.flac") for number, (_, place) in enumerate(places)]
    rows.append(rows[0] | {"id": "part", "start_s": 0.25, "end_s": 1.25})
    path = write_manifest(tmp_path / "m.jsonl", rows)
    label_audio.label_audio(path, tmp_path, kmeans, tmp_path / "u", num_workers=num_workers)
    plain = [row(number, f"{place}.flac") for number, (_, place) in enumerate(places)]
    plain.append(plain[0] | {"id": "part", "start_s": 0.25, "end_s": 1.25})
    label_audio.label_audio(write_manifest(tmp_path / "p.jsonl", plain), tmp_path, kmeans, tmp_path / "p")
    assert units_of(tmp_path / "u") == units_of(tmp_path / "p") and len(units_of(tmp_path / "u")) == 6
    gone = {"row": 7} if kind == "parquet" else {"member": "x/7.flac"}
    path = write_manifest(tmp_path / "gone.jsonl", [row(9, archive, **gone)])
    with pytest.raises(UserError, match=f"gone.jsonl:1: .*{archive}:(7|x/7.flac) does not exist"):
        label_audio.label_audio(path, tmp_path, kmeans, tmp_path / "g")


def test_archives_that_are_none(tmp_path, kmeans):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(
        pa.table({"audio": [{"bytes": None, "path": "a"}, {"bytes": b"x", "path": "b"}]}), tmp_path / "n.parquet"
    )
    (tmp_path / "a.tar").write_bytes(b"no tar" * 500)
    for fields, said in (
        (row(1, "text.parquet", row=0), "text.parquet:0 is not readable audio .it has no column of audio bytes"),
        (row(1, "n.parquet", row=0), "n.parquet:0 is not readable audio .the row holds no bytes"),
        (row(1, "n.parquet", row=1), "n.parquet:1 is not readable audio .Format not recognised"),
        (row(1, "a.tar", member="a.wav"), "a.tar:a.wav is not readable audio .file could not be opened"),
    ):
        with pytest.raises(UserError, match=f"m.jsonl:1: .*{said}"):
            label_audio.label_audio(
                write_manifest(tmp_path / "m.jsonl", [fields]), tmp_path, kmeans, tmp_path / "u", overwrite=True
            )


# --- Long recordings ------------------------------------------------------------------------------
class StandIn:
    """An encoder that looks 100 ms around each frame: what it finds of a long recording is known."""

    config = features.FeatureConfig("hubert", "stand-in", 1, 320, 400, False)
    device = torch.device("cpu")
    batches = "alone"

    def encode(self, prepared: list) -> list:
        found = []
        for samples in prepared:
            samples = np.pad(samples.astype("f8"), 1600)
            number = 1 + (len(samples) - 3200 - 400) // 320
            windows = np.lib.stride_tricks.sliding_window_view(samples, 3600)[::320][:number]
            found.append(torch.from_numpy(np.stack([windows.mean(axis=1), (windows**2).mean(axis=1)], axis=1)))
        return found


@pytest.mark.parametrize("seconds", [59.99, 60.0, 60.02, 63.99, 64.01, 116.0, 116.01, 171.37])
def test_windows_of_a_long_recording_meet(tmp_path, seconds):
    """Stitched, the frames are those of one pass: none missing, none twice, none shifted."""
    rate = 22050
    samples = speech(2, seconds, rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    path = write_manifest(tmp_path / "m.jsonl", [row(0, "a.wav")])
    decoder = frames.Decoder(path, tmp_path, StandIn.config, None, 0, 1)
    stitched, pieces = [], 0
    for batch, found in frames.Frames(decoder, StandIn(), 0, 10.0):
        assert len(batch) == 1 and batch[0].num_samples <= 60 * 16000
        pieces += 1
        stitched.append(found[0])
    (piece,) = [p for _, p in audio.utterances([row(0, "a.wav", where="")], tmp_path)][:1]
    assert pieces == (1 if seconds <= 60 else -(-round((seconds - 4) * rate) // (56 * rate)))
    whole = StandIn().encode([audio.Recording.resampled(SimpleNamespace(rate=rate), samples)])[0]
    assert torch.cat(stitched).shape == whole.shape
    torch.testing.assert_close(torch.cat(stitched), whole, rtol=1e-5, atol=1e-7)
    assert piece.duration_s == pytest.approx(seconds, abs=1e-4)


def peak_mb(*command: str) -> float:
    """Peak memory of a command. Not ru_maxrss: that begins at this process's own."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "print('PEAK', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return int(ran.stdout.rpartition("PEAK ")[2]) / 1024


@pytest.mark.slow
def test_memory_is_flat_at_an_hour(tmp_path, kmeans):
    """An hour would be 230 MB as samples at 16 kHz, and its frames 20 MB (of HuBERT-large 740 MB)."""
    peaks = {}
    for name, seconds in (("short", 130), ("hour", 3600)):
        soundfile.write(tmp_path / f"{name}.flac", np.resize(speech(3, 130), seconds * 16000), 16000)
        path = write_manifest(tmp_path / f"{name}.jsonl", [row(0, f"{name}.flac")])
        flags = {"manifest": path, "audio_root": tmp_path, "kmeans": kmeans, "output_dir": tmp_path / name}
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        peaks[name] = peak_mb("speech_units/label_audio.py", *words)
        (found,) = read_units(tmp_path / name)
        assert found["duration_s"] == seconds
    assert peaks["hour"] < peaks["short"] + 60, peaks


# --- Batches --------------------------------------------------------------------------------------
def decoded(lengths: list[float]) -> list[frames.Decoded]:
    return [frames.Decoded(i, "", None, None, round(length * 16000)) for i, length in enumerate(lengths)]


def test_batches_are_full_and_hardly_padded():
    pieces = decoded(librispeech_lengths(800))
    batches = list(frames.plan(pieces, "padded", 320))
    assert sorted(piece.index for batch in batches for piece in batch) == list(range(800))
    padded = [len(batch) * max(piece.num_samples for piece in batch) for batch in batches]
    assert max(padded) <= 320 * 16000 and sum(padded) / len(padded) > 150 * 16000
    assert sum(padded) < 1.05 * sum(piece.num_samples for piece in pieces)
    assert [len(batch) for batch in frames.plan(pieces, "alone", 320)] == [1] * 800
    equal = list(frames.plan(decoded([1, 2, 1, 3, 2, 1, 1]), "equal", 3))
    assert [[piece.index for piece in batch] for batch in equal] == [[3], [1], [4], [0, 2, 5], [6]]
    assert [len(batch) for batch in frames.plan(decoded([500, 1, 1.1]), "padded", 320)] == [1, 2]


def test_the_pool_is_refilled_as_it_is_encoded(tmp_path, monkeypatch):
    """Decoding goes on evenly, and everything comes once, however parcels and batches fall. Few times are held."""
    monkeypatch.setattr(frames, "CLOCKED", 4)
    monkeypatch.setattr(time, "perf_counter", iter(range(10_000)).__next__)  # asked before and after each batch
    for number in range(60):
        soundfile.write(tmp_path / f"{number}.wav", speech(number, 0.5 + number % 7 + number / 1000), 16000)
    rows = [row(n, f"{n}.wav") for n in range(60)]
    rows[5]["audio"] = rows[40]["audio"] = "gone.wav"
    path = write_manifest(tmp_path / "m.jsonl", rows)
    stand_in = StandIn()
    for batches, seconds in (("alone", 1.0), ("alone", 400.0), ("padded", 5.0), ("equal", 9.0)):
        stand_in.batches = batches
        found = frames.Frames(frames.Decoder(path, tmp_path, StandIn.config, None, 0, 60), stand_in, 0, seconds)
        encoded = [[piece.index for piece in batch] for batch, _ in found]
        assert sorted(index for batch in encoded for index in batch) == list(range(60))
        assert len(found.clock) == 4 and found.encoder_s() == len(encoded) - 2  # the bad ones were not encoded
        assert found.audio_s == pytest.approx(sum(0.5 + n % 7 + n / 1000 for n in range(60) if n not in (5, 40)))
        assert (found.padding_s > 0) == (batches == "padded")


# --- Shards ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 utterances: files, segments of a long recording, one of three windows, bad ones among them."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    rows = []
    for number in range(40):
        soundfile.write(root / f"{number}.flac", speech(number, rng.uniform(0.3, 6)), 16000)
        rows.append(row(number, f"{number}.flac"))
    soundfile.write(root / "long.opus", speech(99, 130, 48000), 48000, format="OGG", subtype="OPUS")
    for number in range(40, 59):
        rows.append(row(number, "long.opus", start_s=(number - 40) * 6.1, end_s=(number - 40) * 6.1 + 5.03))
    rows.append(row(59, "long.opus"))
    (root / "noise.wav").write_bytes(b"this is no audio")
    (root / "cut.flac").write_bytes((root / "3.flac").read_bytes()[:2000])
    soundfile.write(root / "silent.wav", np.zeros(20000, "f4"), 16000)
    soundfile.write(root / "long_silence.wav", np.zeros(16000 * 70, "f4"), 16000)
    for place, name in (
        (3, "noise.wav"),
        (17, "gone.wav"),
        (30, "silent.wav"),
        (41, "cut.flac"),
        (2, "long_silence.wav"),
    ):
        rows.insert(place, row(100 + place, name))
    rows.insert(50, row(150, "long.opus", start_s=125, end_s=131))
    rows.insert(20, row(120, "0.flac", start_s=0.1, end_s=0.11))
    write_manifest(root / "m.jsonl", rows)
    return root


BAD = {
    "u103": "unreadable", "u117": "missing", "u130": "silent", "u141": "unreadable", "u102": "silent",
    "u150": "beyond the end", "u120": "too short",
}  # fmt: skip


def test_bad_items_are_listed_and_left_out(corpus, kmeans, tmp_path, capsys):
    label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.2)
    listed = [json.loads(line) for line in (tmp_path / "u/units-00000-of-00001.dropped.jsonl").open()]
    reasons = {row["id"]: row["reason"] for row in listed}
    assert reasons["u141"] in ("unreadable", "cut short")
    assert reasons == BAD | {"u141": reasons["u141"]}
    order = [json.loads(line)["id"] for line in (corpus / "m.jsonl").open()]
    assert [row["id"] for row in listed] == [name for name in order if name in BAD]
    assert all(str(corpus) not in json.dumps(row) and row["problem"] for row in listed)
    assert [row["id"] for row in read_units(tmp_path / "u")] == [name for name in order if name not in BAD]
    info = json.loads((tmp_path / "u/units-00000-of-00001.run_info.json").read_text())
    assert sum(info["counts"]["dropped"].values()) == 7 and info["counts"]["utterances"] == 60
    assert "left out: 1 beyond the end" in capsys.readouterr().out
    assert not list((tmp_path / "u").glob(".*.jsonl"))
    for name in ("u0", "u39"):
        samples, _ = soundfile.read(corpus / f"{name[1:]}.flac", dtype="f4")
        assert units_of(tmp_path / "u")[name] == plain_units(samples, kmeans)


def test_above_the_share_it_stops_and_a_higher_one_goes_on(corpus, kmeans, tmp_path):
    with pytest.raises(
        UserError, match=r"m.jsonl:\d+: .*\n  3 of 67 utterances cannot be used, more than --max_bad_share 0.04"
    ):
        label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.04)
    assert not list((tmp_path / "u").glob("*.parquet"))
    (journal,) = (tmp_path / "u").glob(".*.journal.jsonl")
    done = len(journal.read_text().splitlines())
    assert 3 <= done < 67
    with pytest.raises(UserError, match="3 of 67 utterances cannot be used"):  # again, and not passed over
        label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.04)
    assert len(journal.read_text().splitlines()) == done
    label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.2)
    label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "v", max_bad_share=0.2)
    for name in ("parquet", "dropped.jsonl"):
        assert hash_file(tmp_path / f"u/units-00000-of-00001.{name}") == hash_file(
            tmp_path / f"v/units-00000-of-00001.{name}"
        )


def test_a_mistyped_root_is_found_before_anything_is_loaded(corpus, kmeans, tmp_path, monkeypatch):
    monkeypatch.setattr(label_audio, "Encoder", None)
    with pytest.raises(UserError, match=r"m.jsonl:1: .*0.flac does not exist\n  67 of 67 utterances cannot be used"):
        label_audio.label_audio(corpus / "m.jsonl", corpus / "mistyped", kmeans, tmp_path / "u", max_bad_share=0.5)


@pytest.mark.slow
def test_neither_neighbours_nor_batches_nor_workers_nor_shards_matter(corpus, kmeans, tmp_path):
    wanted = None
    for number, settings in enumerate(
        ({}, {"batch_seconds": 1.0}, {"num_workers": 2}, {"num_shards": 4}, {"num_shards": 3, "num_workers": 3})
    ):
        folder = tmp_path / str(number)
        label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, folder, max_bad_share=1, **settings)
        found = list(read_units(folder))
        wanted = wanted or found
        assert found == wanted
    assert hash_file(tmp_path / "0/units-00000-of-00001.parquet") == hash_file(
        tmp_path / "2/units-00000-of-00001.parquet"
    )


def test_shards_are_of_equal_hours_if_rows_say_them():
    lengths = np.array([10, 1, 1, 1, 1, 1, 5, 10, 10, 20], "f4")
    assert label_audio.boundaries(lengths, 1) == [0, 10]
    assert label_audio.boundaries(lengths, 3) == [0, 7, 9, 10]  # 20, 20, 20
    assert label_audio.boundaries(lengths, 2) == [0, 8, 10]
    assert label_audio.boundaries(np.full(10, 7, "f4"), 2) == [0, 5, 10]
    begins = label_audio.boundaries(np.ones(2, "f4"), 4)
    assert begins[0] == 0 and begins[-1] == 2 and sorted(begins) == begins


# --- Kills ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("left", [0, 1, 7, 200])
def test_a_journal_that_ends_in_a_line_goes_on_before_it(corpus, kmeans, tmp_path, left):
    from speech_units.journal import Journal

    with pytest.raises(UserError):
        label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.05)
    (path,) = (tmp_path / "u").glob(".*.journal.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: min(left, len(lines[-1]) - 1)])
    journal = Journal(path, 0, 67)
    assert journal.done().sum() == len(lines) - 1 and path.read_bytes() == b"".join(lines[:-1])
    label_audio.label_audio(corpus / "m.jsonl", corpus, kmeans, tmp_path / "u", max_bad_share=0.2)
    assert len(list(read_units(tmp_path / "u"))) == 60


@pytest.mark.slow
def test_kills_at_any_moment_leave_the_same_bytes(corpus, kmeans, tmp_path, pytestconfig):
    rows = [json.loads(line) for line in (corpus / "m.jsonl").open()]
    many = [row | {"id": f"{row['id']}-{copy}"} for copy in range(8) for row in rows]
    path = write_manifest(tmp_path / "m.jsonl", many)
    flags = {"manifest": path, "audio_root": corpus, "kmeans": kmeans, "num_shards": 2, "max_bad_share": 0.2}
    flags |= {"num_workers": 1}
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    command = [sys.executable, "speech_units/label_audio.py", *words, "--output_dir"]
    started = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True)
    took = time.monotonic() - started
    rng = random.Random(0)
    killed = 0
    while killed < pytestconfig.getoption("--kills"):
        process = subprocess.Popen(
            [*command, tmp_path / "killed"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.3, 1) * took)
            for shard in (tmp_path / "killed").glob("*.run_info.json"):
                shard.unlink()  # it was done: begin anew for the kills that are left
                (tmp_path / "killed" / shard.name.replace("run_info.json", "parquet")).unlink()
                (tmp_path / "killed" / shard.name.replace("run_info.json", "dropped.jsonl")).unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, check=True, capture_output=True)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == names and len(names) >= 6
    for name in names:
        if name.endswith((".parquet", "dropped.jsonl")):
            assert hash_file(tmp_path / "killed" / name) == hash_file(tmp_path / "whole" / name)


# --- Corpora --------------------------------------------------------------------------------------
@pytest.mark.parametrize("corpus", CORPORA)
def test_each_corpus_becomes_units(tmp_path, kmeans, corpus):
    """From its real layout: every utterance gets the units of its own audio, segments those of their part."""
    CORPORA[corpus](tmp_path / "corpus")
    split = "TEST" if corpus == "gigaspeech" else "test"
    make_manifest(tmp_path / "m", corpus=corpus, root=tmp_path / "corpus", split=split)
    path = tmp_path / "m/manifest.jsonl"
    label_audio.label_audio(path, tmp_path / "corpus", kmeans, tmp_path / "u")
    found = units_of(tmp_path / "u")
    rows = [json.loads(line) for line in path.open()]
    assert list(found) == [row["id"] for row in rows] and len(rows) >= 2
    nearest = Nearest(features.load_kmeans(kmeans)[0], "cpu")
    for row in rows:
        file = tmp_path / "corpus" / row["audio"]
        if "member" in row:
            with tarfile.open(file) as tar:
                file = io.BytesIO(tar.extractfile(row["member"]).read())
        samples, rate = soundfile.read(file, dtype="f4")
        start, end = (round(row.get(name, place) * rate) for name, place in (("start_s", 0), ("end_s", 1e9)))
        samples = audio.Recording.resampled(SimpleNamespace(rate=rate), samples[start:end])
        (ids,) = nearest([torch.from_numpy(features.mfcc(samples))])  # in float32: a tone's frames are all but ties
        assert found[row["id"]] == collapse(ids.tolist())
