"""Two processes under torchrun, and one alone: they agree, and end together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from towerspeech.errors import UserError
from towerspeech.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.processes import Processes


def act(folder: Path, refused: bool = False) -> None:
    def begin():
        if refused:
            raise UserError("the folder is taken")
        return f"work of process {processes.rank}"

    processes = Processes()
    processes.join("cpu")
    work = processes.on_first(begin)
    agreed = processes.agree({"from": processes.rank})
    processes.wait()
    (folder / str(processes.rank)).write_text(f"{work} {agreed} {processes.world}")
    processes.leave()


run(act)
"""


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "act.py").write_text(SCRIPT)
    words = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", folder / "act.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*words, "--folder", folder, *arguments], capture_output=True, text=True, env=environment, timeout=240
    )


@pytest.mark.slow
def test_two_processes_act_as_one(tmp_path):
    result = start(tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "0").read_text() == "work of process 0 {'from': 0} 2"
    assert (tmp_path / "1").read_text() == "None {'from': 0} 2"


@pytest.mark.slow
def test_what_stops_the_first_stops_all_and_is_said_once(tmp_path):
    result = start(tmp_path, "--refused", "true")
    assert result.returncode == 1
    assert result.stderr.count("error: the folder is taken") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in result.stderr
    assert not list(tmp_path.glob("[01]"))


def test_a_process_alone_needs_no_group(monkeypatch):
    import torch.distributed as dist

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes = Processes()
    assert processes.agree("mine") == "mine" and processes.on_first(lambda: 3) == 3
    processes.wait()
    with pytest.raises(UserError, match="enough"):
        processes.stop(UserError("enough"))
    processes.join("cpu")
    assert dist.get_world_size() == 1
    processes.leave()
    assert not dist.is_initialized()
