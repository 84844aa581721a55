"""fit_kmeans.py: which audio its sample holds, and that neither processes nor kills change what comes out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_units import features, fit_kmeans, sample
from speech_units.frame_file import FrameFile
from towerspeech.errors import UserError
from towerspeech.files import hash_file

ROOT = Path(__file__).parents[2]


def write_set(root: Path, name: str, lengths: list[float], **fields) -> Path:
    """A manifest of noises, its durations said."""
    rows = []
    for number, seconds in enumerate(lengths):
        samples = 0.1 * np.random.default_rng(number).standard_normal(round(seconds * 16000))
        soundfile.write(root / f"{name}{number}.wav", samples.astype("f4"), 16000)
        row = {"id": f"{name}{number}", "audio": f"{name}{number}.wav", "language": "en", "text": "a"}
        rows.append(row | {"duration_s": seconds} | fields)
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / f"{name}.jsonl"


# --- The sample -----------------------------------------------------------------------------------
def test_the_sample_has_the_hours_and_each_manifest_its_share():
    rng = np.random.default_rng(0)
    lengths = [rng.uniform(1, 20, 8000).astype("f4"), rng.uniform(1, 20, 2000).astype("f4")]
    held = [part.sum() / 3600 for part in lengths]
    longest = 20 / 3600
    for weights, shares in ((None, [held[0] / sum(held), held[1] / sum(held)]), ([1, 3], [0.25, 0.75])):
        chosen = sample.choose(lengths, 4.0, weights, seed=1)
        for part, mask, share in zip(lengths, chosen, shares, strict=True):
            assert 0 <= part[mask].sum() / 3600 - 4.0 * share < longest
        again = sample.choose(lengths, 4.0, weights, seed=1)
        other = sample.choose(lengths, 4.0, weights, seed=2)
        assert all((a == b).all() for a, b in zip(chosen, again, strict=True))
        assert (chosen[0] != other[0]).sum() > 100
        halves = [mask[: len(mask) // 2].sum() for mask in chosen]  # from everywhere
        assert all(0.4 < half / mask.sum() < 0.6 for half, mask in zip(halves, chosen, strict=True))
    everything = sample.choose(lengths, 1000, None, seed=0)
    assert all(mask.all() for mask in everything)


def test_rows_that_do_not_say_how_long_they_are_count_as_the_others(tmp_path):
    path = write_set(tmp_path, "a", [1.0, 3.0])
    rows = path.read_text() + path.read_text().replace('"id": "a', '"id": "b').replace("duration_s", "nothing")
    path.write_text(rows)
    assert sample.lengths_of(path).tolist() == [1, 3, 2, 2]
    path.write_text(rows.replace("duration_s", "nothing"))
    assert sample.lengths_of(path).tolist() == [10] * 4


def fit(*words, **flags) -> list[str]:
    given = [str(word) for flag, values in flags.items() for word in (f"--{flag}", *np.atleast_1d(values))]
    return [sys.executable, "speech_units/fit_kmeans.py", *given, *words]


@pytest.mark.slow
def test_processes_and_batches_do_not_matter(tmp_path):
    paths = [write_set(tmp_path, "a", [1 + n / 7 for n in range(25)] + [130.0]), write_set(tmp_path, "b", [2.0] * 20)]
    hashes = set()
    for number, settings in enumerate(({}, {"num_workers": 2}, {"num_workers": 3, "batch_seconds": 3.0})):
        fit_kmeans.fit_kmeans(
            paths, [tmp_path], tmp_path / f"k{number}", features="mfcc", num_units=20, hours=1, **settings
        )
        hashes.add(hash_file(tmp_path / f"k{number}/kmeans.safetensors"))
        left = sorted(path.name for path in (tmp_path / f"k{number}").iterdir())
        assert left == [".folder.lock", "features.json", "kmeans.safetensors", "run_info.json"]
    assert len(hashes) == 1
    counts = json.loads((tmp_path / "k0/run_info.json").read_text())["counts"]
    assert counts["utterances"] == 46
    frames = sum(1 + (round(s * 16000) - 480) // 320 for s in [*(1 + n / 7 for n in range(25)), 130.0, *[2.0] * 20])
    assert counts["frames"] == frames  # of the long one's windows, too, each frame once


@pytest.mark.slow
def test_kills_leave_the_same_bytes(tmp_path, pytestconfig):
    path = write_set(tmp_path, "a", [2 + n % 5 for n in range(150)] + [200.0])
    flags = {"manifest": path, "audio_root": tmp_path, "features": "mfcc", "num_units": 50, "num_workers": 1}
    started = time.monotonic()
    subprocess.run(fit(**flags, output_dir=tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    took, rng, killed = time.monotonic() - started, random.Random(1), 0
    while killed < pytestconfig.getoption("--kills"):
        command = fit(**flags, output_dir=tmp_path / "killed")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(rng.uniform(0.4, 1) * took)
            for name in ("run_info.json", "kmeans.safetensors", "features.json"):  # begin anew
                (tmp_path / "killed" / name).unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run(fit(**flags, output_dir=tmp_path / "killed"), cwd=ROOT, check=True, capture_output=True)
    for name in ("kmeans.safetensors", "features.json"):
        assert hash_file(tmp_path / "whole" / name) == hash_file(tmp_path / "killed" / name)


# --- Frames on disk -------------------------------------------------------------------------------
def test_frames_on_disk_are_sorted_and_gone_on_with(tmp_path):
    rng = np.random.default_rng(0)
    pieces = {
        key: rng.normal(size=(5 + key[1], 3)).astype("f4") for key in ((0, 2, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1))
    }
    store = FrameFile(tmp_path / "f.f4")
    for key, frames in pieces.items():
        store.add(key, frames, key != (0, 1, 0))
    wanted = np.concatenate([pieces[key] for key in sorted(pieces)])
    np.testing.assert_array_equal(store.sorted(tmp_path / "s.f4"), wanted)
    assert store.done(0, 4).tolist() == [False, True, True, False] and store.num_frames == len(wanted)
    # Killed: frames without their entry, half an entry, a row whose last window is missing.
    with open(tmp_path / "f.f4", "ab") as file:
        file.write(b"\0" * 50)
    lines = (tmp_path / "f.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "f.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    again = FrameFile(tmp_path / "f.f4")
    assert again.done(0, 4).tolist() == [False, False, True, False]
    for key in ((0, 1, 0), (0, 1, 1)):
        again.add(key, pieces[key], key == (0, 1, 1))
    np.testing.assert_array_equal(again.sorted(tmp_path / "t.f4"), wanted)


def test_bad_items_are_left_out_up_to_a_share(tmp_path, capsys):
    path = write_set(tmp_path, "a", [1.0] * 30)
    (tmp_path / "a7.wav").write_bytes(b"noise")
    (tmp_path / "a9.wav").unlink()
    soundfile.write(tmp_path / "a11.wav", np.zeros(16000), 16000)
    given = {"features": "mfcc", "num_units": 10, "hours": 1}
    with pytest.raises(UserError, match=r"a.jsonl:\d+: .*a\d+.wav .*\n  . of 30 utterances cannot be used"):
        fit_kmeans.fit_kmeans([path], [tmp_path], tmp_path / "k", **given, max_bad_share=0.08)
    fit_kmeans.fit_kmeans([path], [tmp_path], tmp_path / "k", **given, max_bad_share=0.1)
    counts = json.loads((tmp_path / "k/run_info.json").read_text())["counts"]
    assert counts["dropped"] == {"missing": 1, "silent": 1, "unreadable": 1} and counts["utterances"] == 27
    assert "left out: 1 missing, 1 silent, 1 unreadable" in capsys.readouterr().out
    assert features.load_kmeans(tmp_path / "k")[0].shape == (10, 28)
