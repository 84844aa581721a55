"""Seconds and peak memory of a command, as the kernel counts them."""

import os
import subprocess
import time
from pathlib import Path

from towerspeech.command import UserError


def measure(command: list, log: Path) -> tuple[float, float]:
    """Run a command; its seconds, from outside, and its peak resident memory in bytes.

    The kernel counts what the starting process held in at first, so this one must stay small.

    Raises:
        UserError: It failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # not to wait for what an earlier one wrote
    began = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{log.stem} ended with status {process.returncode}", f"see {log}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024
