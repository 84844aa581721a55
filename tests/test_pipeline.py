"""The whole pipeline, as tiny/run.sh runs it: killed twice it goes on, it learns, and it knows when all is done."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tiny"))

from check_scores import problems  # noqa: E402 (tiny/ is a folder of scripts)

from benchmarks.other_ways import with_transformers  # noqa: E402
from towerspeech.decoding import read_prompts  # noqa: E402
from towerspeech.prompts import speech_rows  # noqa: E402
from towerspeech.records import read_jsonl  # noqa: E402
from towerspeech.units import read_metadata  # noqa: E402


def start(root: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
    with open(root.with_suffix(".log"), "ab") as log:
        command = ["bash", str(REPO / "tiny/run.sh"), str(root)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def kill_when(process: subprocess.Popen, ready, seconds: float) -> None:
    """SIGKILL a process and all its children as soon as ``ready()``."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in children:
        child.kill()
    process.wait()
    psutil.wait_procs(children, timeout=10)


def finish(root: Path) -> str:
    process = start(root)
    assert process.wait() == 0, root.with_suffix(".log").read_text()[-3000:]
    return root.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> tuple[Path, str]:
    """A run that is killed in the middle of continued pretraining and in the middle of generation."""
    root = tmp_path_factory.mktemp("pipeline") / "killed"
    log = root / "cpt_run/train.log"
    kill_when(start(root), lambda: log.is_file() and log.read_text().count("\n") >= 85, 900)
    assert sorted(p.name for p in (root / "cpt_run").glob("checkpoint-*")) == ["checkpoint-600", "checkpoint-800"]
    partial = root / "generations/mt/checkpoint-600"
    kill_when(start(root), lambda: sum(p.stat().st_size > 0 for p in partial.glob(".*.partial")) > 0, 900)
    printed = finish(root)
    assert "going on after step 800" in printed and "prompts were done before" in printed
    return root, printed


@pytest.mark.slow
def test_it_learns(killed_run):
    """The limits were fixed on the tuning split, before the test split was opened: see the YAML."""
    assert problems(killed_run[0] / "results/tiny", REPO / "tiny/ci_limits.yaml") == []


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
def test_run_again_it_says_that_all_is_done(killed_run):
    root, before = killed_run
    started = time.monotonic()
    printed = finish(root)[len(before) :]
    assert time.monotonic() - started < 15
    assert "all done before" in printed and "| sft" in printed and "[stage" not in printed


@pytest.mark.slow
def test_the_generations_that_were_killed_are_an_unbroken_runs(killed_run):
    """Decoded anew without a kill and scored anew, the CSVs are the same bytes. test_train.py does so for training."""
    root, _ = killed_run
    printed = root.with_suffix(".log").read_text()
    csvs = sorted((root / "results/tiny").glob("*.csv"))
    assert [path.stem for path in csvs] == ["1200", "1800", "600", "base", "control_nearest", "sft"]
    before = {path: path.read_bytes() for path in csvs}
    table = (root / "summary/table.md").read_bytes()
    for name in ("generations/mt/checkpoint-600", "results", "summary"):
        shutil.rmtree(root / name)
    printed = finish(root)[len(printed) :]
    assert printed.count("already done") > 20 and printed.count("starting vLLM") == 1
    assert {path: path.read_bytes() for path in csvs} == before
    assert (root / "summary/table.md").read_bytes() == table
    assert (root / "summary/scores.png").stat().st_size > 10_000
