"""Runs of commands, measured, and how two of them compare."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from towerspeech.errors import UserError

REPO = Path(__file__).resolve().parent.parent
LEAST_SAME = 0.98  # share of outputs below which no goal holds


class Measured(NamedTuple):
    """One run of a command, as seen from outside and as the kernel counts it."""

    seconds: float
    memory_gb: float  # peak resident memory, in 1e9 bytes


def run_script(script: str, output_dir: Path, *words, processes: int | None = None) -> Measured:
    """Run a script of the repo anew, on so many processes of torchrun if wanted; its output goes beside output_dir.

    The kernel counts what the starting process held in at first, so this one must stay small.

    Raises:
        UserError: It failed.
    """
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    launcher = [] if processes is None else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if processes is None else ["--nproc_per_node", processes]
    command = list(map(str, [sys.executable, *launcher, REPO / script, *words, "--output_dir", output_dir]))
    print(" ".join(["$ python", *map(str, launcher), script, *command[len(launcher) + 2 :]])[:300], flush=True)
    log = output_dir.with_suffix(".log")
    os.sync()  # not to wait for what an earlier one wrote
    began = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{script} ended with status {process.returncode}", f"see {log}")
    return Measured(time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9)


def apart(function: Callable, *arguments) -> tuple[float, Any]:
    """Call a function in a process of its own, so that this one stays small; see ``run_script``.

    Returns:
        The seconds that the process took, start and imports included, and what the function returned.
    """
    os.sync()
    began = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        returned = pool.submit(function, *arguments).result()
    return time.perf_counter() - began, returned


def copy_mistral_tokenizer(folder: Path) -> None:
    """Copy the 32,000-piece SentencePiece model of the package mistral-common to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    package = metadata.distribution("mistral-common")
    shutil.copy(package.locate_file("mistral_common/data/tokenizer.model.v1"), folder / "tokenizer.model")


def comparison(
    name: str,
    ours: float,
    theirs: float,
    goal: float | None = None,
    same: float | None = None,
    unit: str = "s",
    **facts,
) -> dict:
    """One comparison: what both took, in ``unit``; theirs has to be ``goal`` times as much at least, if there is one.

    ``same`` is the share of equal outputs, where they are compared; below 98% no goal holds.
    """
    ratio = theirs / ours
    return {
        "name": name,
        "ours": round(ours, 2),
        "theirs": round(theirs, 2),
        "unit": unit,
        "ratio": round(ratio, 2),
        "goal": None if goal is None else round(goal, 2),
        "holds": None if goal is None else ratio >= goal and (same is None or same >= LEAST_SAME),
        "same": same,
        **facts,
    }


def report(lines: list[dict]) -> None:
    """Print one JSON line a comparison."""
    for line in lines:
        print(json.dumps(line))
