"""How the stages of a chain fare: done, running, waiting or failed, with the last line of each log.

Usage: bash sbatch/status.sh systems/towerspeech_6b.yaml        (the one that submit_pipeline.sh was given)

States come from sacct where there is accounting, else from squeue, else from what the job's log says last.
"""

import os
from pathlib import Path

from sbatch.jobs import last_line, read_jobs, state, table
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.system import ROOT, read_system


def status(system: Path) -> None:
    """Print a line a stage.

    Args:
        system: YAML such as systems/towerspeech_6b.yaml.
    """
    system = system.resolve()
    os.chdir(ROOT)
    work = Path(read_system(system)["system"]["work"])
    jobs = read_jobs(work)
    if not jobs:
        raise UserError(
            f"{work}/jobs.tsv does not exist: nothing was submitted", f"sbatch/submit_pipeline.sh {system}"
        )
    rows = [("stage", "job", "state", "last line of its log")]
    for stage, job in jobs.items():
        if job == "-":
            rows.append((stage, job, "done before", "-"))
            continue
        line, told = last_line(stage, job), state(job)
        if not told:  # Slurm has forgotten it
            told = "unknown to Slurm"
            if line.startswith("== "):
                told = "done" if line.endswith(": done") else "failed" if ": error:" in line else told
        rows.append((stage, job, told, line or "-"))
    print(table(rows))


if __name__ == "__main__":
    run(status)
