"""The whole pipeline, as tiny/run.sh runs it: killed twice it goes on, it learns, and it knows when all is done."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.other_ways import with_transformers
from tiny.check_scores import problems
from towerspeech.records import (
    read_jsonl,
    read_prompts,
)
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import read_metadata

REPO = Path(__file__).resolve().parent.parent


def start(root: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
    with open(root.with_suffix(".log"), "ab") as log:
        command = ["bash", str(REPO / "tiny/run.sh"), str(root)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def stopped(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it, each stopped before it is asked for its children: none is born meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        return [process, *(other for child in process.children() for other in stopped(child))]
    return []


def kill_when(process: subprocess.Popen, ready, seconds: float) -> None:
    """SIGKILL a process and all its children as soon as ``ready()``."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    everybody = stopped(psutil.Process(process.pid))
    for one in everybody:
        one.kill()
    process.wait()
    assert not psutil.wait_procs(everybody, timeout=60)[1]


def begun(folder: Path) -> bool:
    """Whether some results of a checkpoint are on the disk."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):  # just published
            return path.stat().st_size > 0
    return False


def finish(root: Path) -> str:
    process = start(root)
    assert process.wait() == 0, root.with_suffix(".log").read_text()[-3000:]
    return root.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> tuple[Path, str]:
    """A run that is killed in the middle of continued pretraining and in the middle of generation."""
    root = tmp_path_factory.mktemp("pipeline") / "killed"
    log = root / "cpt_run/train.log"
    kill_when(start(root), lambda: log.is_file() and log.read_text().count("\n") >= 85, 1800)
    steps = sorted(int(path.name.split("-")[1]) for path in (root / "cpt_run").glob("checkpoint-*"))
    assert len(steps) >= 2 and steps[0] == 600 and 800 <= steps[-1] < 1800  # however late the kill came
    kill_when(start(root), lambda: begun(root / "generations/mt/checkpoint-600"), 1800)
    printed = finish(root)
    assert f"going on after step {steps[-1]}" in printed and "prompts were done before" in printed
    return root, printed


@pytest.mark.slow
def test_it_learns(killed_run):
    """The limits were fixed on the tuning split, before the test split was opened: see the YAML."""
    assert problems(killed_run[0] / "results", REPO / "tiny/limits.yaml") == []


@pytest.mark.slow
def test_every_output_of_the_tuned_model_is_transformers_own(killed_run):
    """Greedy search in float32, token for token: translation 0- and 5-shot, speech, and shuffled speech."""
    root = killed_run[0]
    model = root / "models/sft"
    prompts = read_prompts(list(root.glob("instructions/chat/*_shot/*.jsonl")))
    tasks = {f"mt/sft/{name}": rows for name, rows in prompts.items()}
    dsu = read_metadata(model)
    for name in ("test", "test_shuffled"):
        rows = speech_rows(root / "units" / name, name, "chat", dsu["offset"], dsu["num_units"])
        tasks[f"asr/sft/asr/{name}.jsonl"] = rows
    assert {name: len(rows) for name, rows in tasks.items()} == {
        **{f"mt/sft/{shots}_shot/tiny_{pair}.jsonl": 100 for shots in (0, 5) for pair in ("de-en", "en-de")},
        **{f"asr/sft/asr/{name}.jsonl": 200 for name in ("test", "test_shuffled")},
    }
    theirs, _ = with_transformers(model, tasks, max_new_tokens=64, batch_size=16)
    for name, rows in tasks.items():
        ours = read_jsonl(root / "generations" / name)
        assert [row["id"] for row in ours] == [row["id"] for row in rows]
        for row, (text, num_tokens) in zip(ours, theirs[name], strict=True):
            assert (row["text"].strip(), row["num_tokens"]) == (text.strip(), num_tokens), (name, row["id"])


@pytest.mark.slow
def test_its_prompts_are_the_committed_ones(killed_run):
    root, _ = killed_run
    for shots in (0, 5):
        built = {path.name: path.read_bytes() for path in root.glob(f"instructions/original/{shots}_shot/*.jsonl")}
        committed = {path.name: path.read_bytes() for path in REPO.glob(f"instructions/{shots}_shot/tiny_*.jsonl")}
        assert built == committed and len(built) == 2


@pytest.mark.slow
def test_run_again_it_says_that_all_is_done(killed_run):
    root, before = killed_run
    printed = finish(root)[len(before) :]
    assert printed.count(" s] done\n") == 26 and "python " not in printed  # not one script is run
    assert "| sft" in printed and "all done in " in printed and "the model has learned" in printed


@pytest.mark.slow
def test_the_generations_that_were_killed_are_an_unbroken_runs(killed_run):
    """Decoded anew without a kill and scored anew, the CSVs are the same bytes. test_train.py does so for training."""
    root, _ = killed_run
    printed = root.with_suffix(".log").read_text()
    csvs = sorted((root / "results").glob("*.csv"))
    assert [path.stem for path in csvs] == ["1200", "1800", "600", "base", "control_nearest", "sft"]
    before = {path: path.read_bytes() for path in csvs}
    table = (root / "summary/table.md").read_bytes()
    for name in ("generations/mt/checkpoint-600", "results", "summary"):
        shutil.rmtree(root / name)
    printed = finish(root)[len(printed) :]
    assert printed.count(" s] done\n") == 23 and printed.count("starting vLLM") == 1  # all but three stages
    assert {path: path.read_bytes() for path in csvs} == before
    assert (root / "summary/table.md").read_bytes() == table
    assert (root / "summary/scores.png").stat().st_size > 10_000
