"""Submit a system's chain, audio to scores, to Slurm: each stage waits for those whose output it reads.

Usage: bash sbatch/submit_pipeline.sh systems/towerspeech_6b.yaml [--dry_run] [--stages a,b] [--overwrite]

Jobs run a copy of the code and of the YAML, <work>/code/<hash>/, so that the checkout may be edited meanwhile. Writes
<work>/jobs.tsv: stage, job or "-" (done before), log. Submitted again, it leaves out what is done with these settings
or still queued, and submits the rest. What a stage's run_info.json says decides; no corpus is read.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from sbatch.frozen import freeze
from sbatch.jobs import Queue, read_jobs, write_jobs
from towerspeech import chain
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import locked
from towerspeech.system import ROOT
from towerspeech.texts import expand


def check_inputs(system: chain.System) -> None:
    """Refuse a system of which something that no stage makes is not there."""
    places, blocks = system.places, system.blocks
    heard = places["train_sets"] + places["test_sets"]
    wanted = [places["sets"][name][key] for name in heard for key in ("root", "manifest")]
    wanted = [path for path in wanted if path is not None]
    wanted += [f"{places['base']}/config.json", system.need("build_instructions", "data_root")]
    wanted += system.need("build_sft_data", "parallel")
    for names in (blocks["build_mixture"].get("test_sets") or {}).values():
        wanted += names
    made = [
        Path(system.work),
        Path(places["manifests"]),
        *(Path(system.units) / name for name in places["train_sets"]),
    ]
    for source in blocks["build_mixture"].get("sources", []):
        wanted += source.get("paths", [])
    for name in wanted:
        if not any(Path(name).is_relative_to(folder) for folder in made):
            expand(name, f"mend {system.config}; its paths start at {ROOT}")


class Submission:
    """One call: a job for each chosen stage that is neither done nor queued."""

    def __init__(self, system: chain.System, overwrite: bool, dry_run: bool):
        self.system, self.overwrite, self.dry_run = system, overwrite, dry_run
        self.earlier = read_jobs(Path(system.work))
        self.queue = Queue(optional=dry_run)
        self.job_of: dict[str, str] = {}  # stage -> job, or "-" if it is done
        self.anew: set[str] = set()
        self.frozen, self.to_run = ROOT, system

    def queued(self, name: str) -> bool:
        """Whether an earlier call's job waits or runs, and can still come to a good end."""
        return self.queue.will_end_well(self.earlier.get(name, "-"))

    def freeze(self) -> None:
        """From now on jobs get a copy of the code, and of the YAML."""
        self.frozen, config = freeze(self.system.config, Path(self.system.work) / "code")
        self.to_run = chain.System(config)

    def place(self, stage: chain.Stage, state: chain.State) -> None:
        """Submit a stage unless it is done or queued, and nothing that it waits for is submitted anew."""
        job = self.earlier.get(stage.name, "-")
        waits = [self.job_of.get(name, "-") for name in stage.after]
        waits = [other for other in waits if other != "-"]
        fresh = any(name in self.anew for name in stage.after)
        if not fresh and not waits and state.done:
            job = "-"
            if self.dry_run:
                print(f"# {stage.name} is done\n")
        elif fresh or not self.queued(stage.name):
            words = self.words(stage, waits)
            if self.dry_run:
                self.show(stage, words)
                job = f"<{stage.name}>"
            else:
                self.queue.cancel(job)  # it waits for what has failed
                job = self.submit(stage, words)
            self.anew.add(stage.name)
        self.job_of[stage.name] = job

    def words(self, stage: chain.Stage, waits: list[str]) -> list[str]:
        """The sbatch command of a stage."""
        words = ["sbatch", "--parsable", "--export=ALL", "--kill-on-invalid-dep=yes", f"--job-name={stage.name}"]
        if waits:
            words.append(f"--dependency=afterok:{':'.join(waits)}")
        if stage.tasks:
            limit = self.system.places["array_limit"]
            words.append(f"--array=0-{stage.tasks - 1}{f'%{limit}' if limit else ''}")
        words += self.system.blocks.get("sbatch", {}).get(stage.file, [])
        file = self.frozen / f"sbatch/{stage.file}.sbatch"
        return [*words, str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file), *stage.arguments]

    def variables(self, stage: chain.Stage) -> dict[str, str]:
        """What a job's file reads; paths of code and YAML are those of the copy."""
        (copied,) = chain.choose(chain.chain(self.to_run), [stage.name])
        given = chain.environment(copied, self.to_run, "slurm", self.overwrite)
        return {**given, "TOWERSPEECH_CODE": str(self.frozen.resolve())}

    def show(self, stage: chain.Stage, words: list[str]) -> None:
        """Print the sbatch command, and below it what the job or each task of its array runs."""
        variables = chain.environment(stage, self.system, "slurm", self.overwrite)
        print(f"# {stage.name}")
        print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *words]))
        for task in range(stage.tasks or 1):
            given = self.slurm_variables(stage) | ({"SLURM_ARRAY_TASK_ID": task} if stage.tasks else {})
            for command in chain.commands(stage, self.system, given, self.overwrite):
                print("    " + chain.typed(command))
        print()

    def slurm_variables(self, stage: chain.Stage) -> dict[str, object]:
        """What Slurm will tell a job, as far as its file and its options say it."""
        return chain.allotted(stage, self.system.blocks.get("sbatch", {}).get(stage.file, []))

    def submit(self, stage: chain.Stage, words: list[str]) -> str:
        done = subprocess.run(words, env={**os.environ, **self.variables(stage)}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            remedy = "what was submitted before it stays queued"
            raise UserError(f"sbatch refused {stage.name} (see above)", remedy)
        return done.stdout.strip().partition(";")[0]

    def table(self, every: list[chain.Stage]) -> list[tuple[str, str, str]]:
        """Stage, job, log; of stages that this call was not asked for, what an earlier one noted."""
        rows = []
        for stage in every:
            job = self.job_of.get(stage.name) or self.earlier.get(stage.name)
            if job:
                log = f"logs/{stage.name}-{'%A_%a' if stage.tasks else '%j'}.out"
                rows.append((stage.name, job, "done" if job == "-" else log))
        return rows


def submit_pipeline(
    system: Path, stages: list[str] | None = None, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Submit a system's stages.

    Args:
        system: YAML such as systems/towerspeech_6b.yaml.
        stages: Submit these alone, with commas between them: names, or files of sbatch/ such as label_audio.
        overwrite: Replace what was made with other settings.
        dry_run: Print the sbatch commands and what their jobs run; submit nothing.
    """
    system = system.resolve()
    os.chdir(ROOT)  # jobs start where they are submitted
    asked = chain.System(system.relative_to(ROOT) if system.is_relative_to(ROOT) else system)
    every = chain.chain(asked)
    chosen = chain.choose(every, [name for text in stages or [] for name in text.split(",")])
    if not dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here", "log in to a node that submits jobs, or give --dry_run")
    if not dry_run:
        check_inputs(asked)
    submission = Submission(asked, overwrite, dry_run)
    parsed = chain.parse_all(every, asked, submission.slurm_variables)
    states = {name: chain.state(several) for name, several in parsed.items()}
    if dry_run:
        for stage in chosen:
            submission.place(stage, states[stage.name])
        return
    coming = {stage.name for stage in every if stage in chosen or submission.queued(stage.name)}
    chain.check([stage for stage in chosen if not submission.queued(stage.name)], coming, states, overwrite)
    work = Path(asked.work)
    Path("logs").mkdir(exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / ".submit.lock"):
        submission.earlier, submission.queue = read_jobs(work), Queue()  # another call may just have submitted
        submission.freeze()
        for stage in every:
            if stage in chosen:
                submission.place(stage, states[stage.name])
            elif submission.queued(stage.name):
                submission.job_of[stage.name] = submission.earlier[stage.name]
            write_jobs(work, submission.table(every))  # a killed call loses no job
    print(write_jobs(work, submission.table(every)))
    print(f"job ids: {work}/jobs.tsv; how they fare: bash sbatch/status.sh {asked.config}")


if __name__ == "__main__":
    run(submit_pipeline)
