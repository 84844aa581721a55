"""The jobs of a chain: which were submitted, and how Slurm says that they fare."""

import subprocess
from collections import Counter
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import publish

FILE = "jobs.tsv"
HEADER = ("stage", "job", "log")
FAILED = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def read_jobs(work: Path) -> dict[str, str]:
    """Stage -> job, or "-" where it was done before; empty if nothing was submitted."""
    file = work / FILE
    if not file.is_file():
        return {}
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return {row[0]: row[1] for row in rows}


def write_jobs(work: Path, rows: list[tuple[str, str, str]]) -> str:
    """Write a chain's jobs; returns them as a table to print."""
    with publish(work / FILE) as path:
        path.write_text("".join("\t".join(row) + "\n" for row in (HEADER, *rows)), encoding="utf-8")
    return table([HEADER, *rows])


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as columns that stand below one another."""
    from tabulate import tabulate

    return tabulate(rows[1:], rows[0], tablefmt="plain", disable_numparse=True)


def _told(*words: str) -> str | None:
    """What a program of Slurm prints; None if it is not there or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


class Queue:
    """This user's jobs that wait or run."""

    def __init__(self, optional: bool = False):
        """Raises UserError if Slurm does not answer: not to know what is queued would submit it a second time."""
        told = _told("squeue", "--noheader", "--array", "--me", "--format=%F %T %r")
        if told is None and not optional:
            raise UserError("squeue fails", "is Slurm up?")
        self.reasons: dict[str, list[str]] = {}
        for line in (told or "").splitlines():
            job, _, reason = line.split(maxsplit=2)
            self.reasons.setdefault(job, []).append(reason)

    def will_end_well(self, job: str) -> bool:
        """Whether a job waits or runs, and neither a task of it has failed nor what it waits for."""
        reasons = self.reasons.get(job)
        return bool(reasons) and "DependencyNeverSatisfied" not in reasons and not FAILED & {*states(job)}

    def cancel(self, job: str) -> None:
        if job in self.reasons:
            subprocess.run(["scancel", job])


def states(job: str) -> list[str]:
    """Slurm's states of a job or of an array's tasks; none if Slurm has forgotten it."""
    # sacct's "-X" is one line a task. Where there is no accounting, squeue knows a job for a while after its end.
    told = _told("sacct", "--noheader", "-X", "--parsable2", f"--jobs={job}", "--format=State")
    told = told or _told("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T")
    return [line.split()[0] for line in (told or "").splitlines() if line.split()]


def state(job: str) -> str:
    """A job's states, each with its number: "2 COMPLETED, 1 RUNNING"."""
    return ", ".join(f"{count} {name}" for name, count in Counter(states(job)).items())


def last_line(stage: str, job: str) -> str:
    """The last line that says something in the newest of a stage's logs (an array has one a task)."""
    logs = [*Path("logs").glob(f"{stage}-{job}.out"), *Path("logs").glob(f"{stage}-{job}_*.out")]
    if not logs:
        return ""
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    with open(newest, "rb") as file:
        file.seek(max(0, newest.stat().st_size - 20_000))  # a progress bar is one long line
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line[:150] for line in reversed(lines) if line.strip()), "")
