"""The whole pipeline, as tiny/run.sh runs it: killed twice, it goes on; it learns; its CSVs are an unbroken run's."""

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

# What an unbroken run is compared from: everything up to the mixture is copied, and the rest is made again.
COPIED = ("data", "base_untrained", "base_mixture", "base_run", "base", "kmeans", "units", "units_bpe", "tokenizer")


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
def test_a_killed_run_ends_with_an_unbroken_runs_csvs(tmp_path, killed_run):
    killed, printed = killed_run
    root = tmp_path / "whole"
    root.mkdir()
    for name in COPIED:
        shutil.copytree(killed / name, root / name)
    finish(root)
    csvs = sorted(path.relative_to(root) for path in root.glob("results/tiny/*.csv"))
    assert [path.name for path in csvs] == [
        "1200.csv",
        "1800.csv",
        "600.csv",
        "base.csv",
        "control_nearest.csv",
        "sft.csv",
    ]
    for path in csvs:
        assert (root / path).read_bytes() == (killed / path).read_bytes()
    table = (killed / "summary/table.md").read_text()
    assert table == (root / "summary/table.md").read_text()
    assert (killed / "summary/scores.png").stat().st_size > 10_000


@pytest.mark.slow
def test_run_again_it_says_that_all_is_done(killed_run):
    root, before = killed_run
    started = time.monotonic()
    printed = finish(root)[len(before) :]
    assert time.monotonic() - started < 15 or os.getloadavg()[0] > os.cpu_count()
    assert printed.count("already done") > 20 and "all done" in printed
    assert "vLLM" not in printed
