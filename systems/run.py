"""Run a system here, from its first stage to its table: each stage's commands, one after the other, as one types them.

Usage: python systems/run.py --system systems/tiny.yaml
       python systems/run.py --system systems/tinyllama_10b.yaml --stages build_mixture,continued_pretraining
       python systems/run.py --system systems/towerspeech_6b.yaml --dry_run true

Runs the files of sbatch/ without Slurm; on a cluster, sbatch/submit_pipeline.sh gives the same ones to it. Paths in
the YAML start at the repo's folder. What is done with the same settings stays, what was killed goes on, and what was
made with other settings is refused before anything runs, unless told to be replaced.
"""

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from towerspeech import chain
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.system import ROOT, moved


class Runner:
    """Runs one stage after the other; a stage that is done is left out."""

    def __init__(self, system: chain.System, overwrite: bool):
        self.system, self.overwrite = system, overwrite
        self.began = time.monotonic()
        self.states: dict[str, chain.State] = {}  # before anything has run
        self.ran = False

    def seconds(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s"

    def check(self, stages: list[chain.Stage], every: list[chain.Stage]) -> None:
        """Refuse, before anything runs, what a command would refuse, and stages whose input nobody makes."""
        parsed = chain.parse_all(every, self.system, chain.here)
        self.states = {name: chain.state(several) for name, several in parsed.items()}
        chain.check(stages, {stage.name for stage in stages}, self.states, self.overwrite)

    def run(self, stage: chain.Stage, number: str) -> None:
        state = self.states[stage.name]
        if self.ran:  # its inputs may be others, and its patterns find more
            state = chain.state(chain.parse_all([stage], self.system, chain.here)[stage.name])
        print(f"[{number} {stage.name}, {self.seconds()}]{' done' if state.done else ''}", flush=True)
        if state.done:
            return
        self.ran = True
        file = ROOT / f"sbatch/{stage.file}.sbatch"
        text = file.read_text(encoding="utf-8")  # bash reads a file as it goes; this one may be edited meanwhile
        given = chain.environment(stage, self.system, "here", self.overwrite)
        given |= {name: str(value) for name, value in chain.here(stage).items()}
        environment = {**chain.own_environment(), **given}
        status = subprocess.run(["bash", "-c", text, file, *stage.arguments], env=environment).returncode
        if status:
            remedy = "see above; run this again and it goes on from there"
            raise UserError(f"{stage.name} ended with status {status}", remedy)


def run_system(
    system: Path,
    work: Path | None = None,
    stages: list[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a system's stages.

    Args:
        system: YAML such as systems/tiny.yaml.
        work: Folder of the run, in place of the YAML's own.
        stages: Run these alone, with commas between them: names, or files of sbatch/ such as label_audio.
        overwrite: Replace what was made with other settings.
        dry_run: Print the commands, and run none.
    """
    system, work = system.resolve(), work and work.resolve()
    os.chdir(ROOT)
    with contextlib.ExitStack() as stack:
        if work:
            system = moved(system, work, stack.enter_context(tempfile.TemporaryDirectory()) if dry_run else work)
        run_stages(system, stages, overwrite, dry_run)


def run_stages(system: Path, stages: list[str] | None, overwrite: bool, dry_run: bool) -> None:
    """Run or show the chosen stages of a system."""
    if system.is_relative_to(ROOT):
        system = system.relative_to(ROOT)
    asked = chain.System(system)
    every = chain.chain(asked)
    chosen = chain.choose(every, [name for text in stages or [] for name in text.split(",")])
    runner = Runner(asked, overwrite)
    if dry_run:
        for stage in chosen:
            print(f"# {stage.name}")
            print("\n".join(map(chain.typed, chain.commands(stage, asked, chain.here(stage)))))
        return
    runner.check(chosen, every)
    for number, stage in enumerate(chosen, 1):
        runner.run(stage, f"{number}/{len(chosen)}")
    table = Path(asked.work) / "summary/table.md"
    if chosen == every:
        print(f"\n{table.read_text(encoding='utf-8')}")
    print(f"all done in {runner.seconds()}. Scores: {asked.work}/results/*.csv; plots: {asked.work}/summary")


if __name__ == "__main__":
    run(run_system)
