"""Runs of commands, measured, and how two of them compare."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from towerspeech.command import UserError

REPO = Path(__file__).resolve().parent.parent


@dataclass
class Measured:
    """One run of a command, as seen from outside and as the kernel counts it."""

    seconds: float
    memory_gb: float  # peak resident memory, in 1e9 bytes
    load: float  # the machine's over the last minute, before the start: above 1, others were at work


def measure(command: list, log: Path) -> Measured:
    """Run a command; its output goes to ``log``.

    The kernel counts what the starting process held in at first, so this one must stay small.

    Raises:
        UserError: It failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # not to wait for what an earlier one wrote
    load, began = os.getloadavg()[0], time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{log.stem} ended with status {process.returncode}", f"see {log}")
    return Measured(time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9, load)


def run_script(script: str, output_dir: Path, *words) -> Measured:
    """Run a script of the repo anew; its output goes to a file beside output_dir."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, REPO / script, *words, "--output_dir", output_dir]
    print(" ".join(["$ python", script, *map(str, command[2:])])[:300], flush=True)
    return measure(command, output_dir.with_suffix(".log"))


def comparison(
    name: str, ours: float, theirs: float, goal: float | None = None, unit: str = "s", equal: bool = True, **facts
) -> dict:
    """One comparison: what both took, in ``unit``; theirs has to be ``goal`` times as much at least, if there is one.

    Without ``equal`` results no goal holds.
    """
    ratio = theirs / ours
    return {
        "name": name,
        "ours": round(ours, 2),
        "theirs": round(theirs, 2),
        "unit": unit,
        "ratio": round(ratio, 2),
        "goal": None if goal is None else round(goal, 2),
        "holds": None if goal is None else ratio >= goal and equal,
        **facts,
    }
