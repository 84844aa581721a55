"""sbatch/ on a real Slurm: every file is accepted, and the chain ends with a local run's CSVs, whatever happens to it.

What happens to it: a stage fails and its dependents are cancelled; continued pretraining, two nodes with a process
each, reaches its time limit; the node of instruction tuning is lost while its processes live on; a task of the
generation array is requeued. What is to happen at a certain moment is held (a job, or its processes) until it happens,
so that nothing depends on how quick the machine is. While jobs wait, the checkout that they were submitted from is
edited: they run a copy.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import checkout
from tests.local_slurm import WAIT_S, LocalSlurm, missing, wait_until
from towerspeech.files import read_json

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "sbatch").glob("*.sbatch"))
SCRIPTS = [*FILES, *sorted((REPO / "sbatch").glob("*.sh"))]
TINY = REPO / "systems/tiny_ci.yaml"
STEPS = yaml.safe_load(TINY.read_text())["continued_pretraining"]["keep_steps"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    lacking = missing()
    if lacking or os.geteuid() != 0:
        reason = f"no {', '.join(lacking)}: bash tests/run.sh installs them as root" if lacking else "not root"
        pytest.skip(reason)
    with LocalSlurm(tmp_path_factory.mktemp("slurm") / "state") as running:
        yield running


def header(file: Path) -> str:
    """The comment below the #SBATCH lines, without the marks."""
    lines = file.read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines[1:] if re.match(r"#(?!SBATCH)", line))


def example(file: Path) -> str:
    """The command with which a file's header says that it is submitted."""
    joined = re.sub(r"\\\n", " ", header(file))
    return next(line for line in joined.splitlines() if re.search(rf"sbatch/{file.name}\b", line))


# --- Each file ------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_is_bash(file):
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    assert not re.search(r"(?m)^#SBATCH.*(partition|account|--time|constraint|qos|mail)", file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_variables_of_the_example_are_those_of_the_script(file):
    shown = set(re.findall(r"\b([A-Z][A-Z_]+)=", example(file)))
    code = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    read = set(re.findall(r'"\$\{([A-Z_]+):[?=]', code)) - {"SLURM_SUBMIT_DIR", "SLURM_ARRAY_TASK_ID"}
    assert shown == read
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", code))
    assert {name for name in used if not name.startswith(("SLURM_", "TOWERSPEECH_"))} == read
    begun = set(re.search(r"(?m)^begin (.*)$", code)[1].split())
    assert begun - {"SLURM_ARRAY_TASK_ID"} == read  # all are shown in the log


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_header(file):
    text = file.read_text()
    array = "SLURM_ARRAY_TASK_ID" in text
    for line in (
        f"#SBATCH --job-name={file.stem}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@120",
        f"#SBATCH --output=logs/%x-{'%A_%a' if array else '%j'}.out",
        "set -euo pipefail",
        "#   mkdir -p logs",
    ):
        assert line in text.splitlines(), line
    assert ("--array=" in example(file)) == array
    assert re.search(r'(?m)"\$@"', text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_readme_lists_it_with_its_variables(file):
    table = (REPO / "sbatch/README.md").read_text()
    row = re.search(rf"(?m)^\| {file.name}(?: \(array.*?\))? \| ([A-Z_ ]+) \| (\S+)", table)
    assert set(row[1].split()) == set(re.findall(r"\b([A-Z][A-Z_]+)=", example(file)))
    assert row[2] in file.read_text()


# --- What reaches the scripts ---------------------------------------------------------------------
LISTS = {  # file and variable -> the flag before its words; without one, an array's task takes one of them
    ("comet", "GENERATIONS"): "--generations",
    ("export_checkpoint", "STEPS"): "",
    ("fit_kmeans", "MANIFEST"): "--manifest",
    ("fit_kmeans", "AUDIO_ROOT"): "--audio_root",
    ("generate_asr", "CHECKPOINTS"): "",
    ("generate_asr", "UNITS"): "--units",
    ("generate_mt", "CHECKPOINTS"): "",
    ("generate_mt", "PROMPTS"): "--prompts",
    ("instruction_tuning", "UNITS"): "--units",
    ("instruction_tuning", "PARALLEL"): "--parallel",
    ("score", "GENERATIONS"): "--generations",
    ("summarize", "RESULTS"): "--results",
    ("train_bpe_tokenizer", "UNITS"): "--units",
}
each_list = pytest.mark.parametrize(("name", "variable"), LISTS)


@pytest.fixture
def by_bash(tmp_path):
    """A function that runs a file as a job's bash does, with all its variables: (process, the words of each command).

    The commands that it would run note their words instead. Each variable that is not given holds blanks, but for
    lists and numbers.
    """
    shutil.copytree(REPO / "sbatch", tmp_path / "sbatch")
    for command in ("python", "torchrun", "srun", "scontrol", "../.venv-comet/bin/python"):
        path = tmp_path / "bin" / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("""#!/bin/bash\nprintf '%s\\0' "$@" "" >>calls\n""")
        path.chmod(0o755)

    def run(name: str, **given: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        file = REPO / f"sbatch/{name}.sbatch"
        variables = {variable: f"my {variable}" for variable in re.findall(r"\b([A-Z][A-Z_]+)=", example(file))}
        variables |= {variable: "a b c" for stage, variable in LISTS if stage == name}
        variables |= dict.fromkeys({"NUM_SHARDS", "NPROC_PER_NODE", "REPLICATE"} & variables.keys(), "2")
        job = {"SUBMIT_DIR": tmp_path, "JOB_NAME": name, "JOB_ID": 7, "ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 1}
        job |= {"JOB_NODELIST": "n1", "JOB_NUM_NODES": 1}
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **variables, **given}
        environment |= {f"SLURM_{key}": str(value) for key, value in job.items()}
        done = subprocess.run(["bash", file], env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return done, [call.split("\0") for call in calls.split("\0\0")[:-1]]

    return run


def test_the_lists_are_these():
    found = [
        (file.stem, name)
        for file in FILES
        for words in re.findall(r"(?m)^words (.+)$", file.read_text())
        for name in words.split()
    ]
    assert sorted(found) == sorted(LISTS)


@each_list
def test_a_list_is_split_at_any_white_space(by_bash, name, variable):
    """And at nothing else: a star is no pattern."""
    done, calls = by_bash(name, **{variable: "\n  gen/a\n\n gen/b\t\tgen/c\r\ngen/*\n"})
    assert done.returncode == 0, done.stderr
    if flag := LISTS[name, variable]:
        (words,) = (words for words in calls if flag in words)
        start = words.index(flag) + 1
        assert words[start : start + 4] == ["gen/a", "gen/b", "gen/c", "gen/*"] and words[start + 4].startswith("--")
    else:  # task 1 takes the second
        joined = [word for words in calls for word in words]
        assert any(word.endswith("gen/b") for word in joined) and not any("gen/a" in word for word in joined)


@each_list
@pytest.mark.parametrize(
    ("value", "message"), [(" \n\t", "nothing but blanks"), ("my folder", "'my folder' is one path")]
)
def test_a_list_of_blanks_and_a_path_with_blanks_are_refused(by_bash, tmp_path, name, variable, value, message):
    (tmp_path / "my folder").mkdir()
    done, calls = by_bash(name, **{variable: value})
    assert done.returncode == 1 and not calls
    assert variable in done.stderr and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_prompts_may_be_patterns(by_bash, tmp_path):
    """What they find may hold blanks."""
    for name in ("p/0_shot/a.jsonl", "p/5_shot/a b.jsonl", "p/5_shot/other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done, calls = by_bash("generate_mt", PROMPTS="p/*_shot/*.jsonl\nq.jsonl")
    start = calls[-1].index("--prompts") + 1
    assert calls[-1][start : start + 4] == ["p/0_shot/a.jsonl", "p/5_shot/a b.jsonl", "q.jsonl", "--output_dir"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_single_value_may_hold_blanks(by_bash, file):
    done, calls = by_bash(file.stem)
    assert done.returncode == 0, done.stderr
    words = [word for call in calls for word in call]
    given = {name for name in re.findall(r"\b([A-Z][A-Z_]+)=", example(file)) if (file.stem, name) not in LISTS}
    if file.stem == "tiny":  # the output folder is among the arguments
        given.remove("OUTPUT_DIR")
    for name in given - {"NUM_SHARDS", "NPROC_PER_NODE", "REPLICATE"}:
        assert any(re.fullmatch(rf"my {name}(/.*)?", word) for word in words), (name, calls)


def test_a_list_with_line_breaks_reaches_its_script_through_slurm(slurm, tmp_path):
    results = f"{tmp_path}/a\n{tmp_path}/b\n"
    variables = {"RESULTS": results, "OUTPUT_DIR": tmp_path / "a folder"}
    job = slurm("sbatch", "--parsable", f"--output={tmp_path}/log", "sbatch/summarize.sbatch", **variables).strip()
    assert slurm.wait_for(job) == ["FAILED"]  # there are no such results
    log = (tmp_path / "log").read_text()
    assert f"--results {tmp_path}/a {tmp_path}/b --output_dir {tmp_path}/a\\ folder\n" in log, log
    assert f"{tmp_path}/a does not exist" in log


# --- On Slurm -------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_slurm_accepts_it(slurm, file):
    """As its example submits it, GPUs included, and with the GPU options of the README."""
    options = re.findall(r"(?<=\s)--(?:array|nodes|time)=\S+", example(file))
    options = [option.replace("--nodes=4", "--nodes=2") for option in options]  # there are two
    for more in ([], ["--gres=gpu:a100:1"], ["--gres=gpu:4"], ["--time=24:00:00", "--partition=gpu"]):
        told = slurm("sbatch", "--test-only", *options, *more, file)
        assert "to start at" in told, told


def test_missing_variables_are_named_with_what_makes_them(slurm, tmp_path):
    job = slurm("sbatch", "--parsable", f"--output={tmp_path}/out", "sbatch/score.sbatch", MODEL="x").strip()
    assert slurm.wait_for(job) == ["FAILED"]
    assert re.search(r"GENERATIONS: .*sbatch/generate_mt.sbatch", (tmp_path / "out").read_text())


@pytest.mark.slow
def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(slurm, tmp_path):
    """Requeued twice without anything new it fails; with something new each time it goes on."""
    for name, grows in (("idle", "true"), ("moving", "touch $OUT/$restarts.jsonl")):
        out = tmp_path / name
        script = tmp_path / f"{name}.sbatch"
        script.write_text(
            "#!/bin/bash\n#SBATCH --requeue --open-mode=append --signal=B:USR1@120\n"
            f"OUT={out}; mkdir -p $OUT\nsource sbatch/job.sh\noutputs=($OUT)\nbegin OUT\n{grows}\n"
            "((restarts < 4)) || exit 0\necho waiting\nrun sleep 300\n"
        )
    jobs = {
        name: slurm(
            "sbatch", "--parsable", f"--output={tmp_path}/{name}.out", tmp_path / f"{name}.sbatch", MAX_IDLE_REQUEUES=2
        ).strip()
        for name in ("idle", "moving")
    }
    for attempt in range(1, 5):
        for name, job in jobs.items():
            log = tmp_path / f"{name}.out"
            if name == "moving" or attempt < 3:
                wait_until(
                    lambda log=log, attempt=attempt: log.is_file() and log.read_text().count("waiting") == attempt,
                    f"attempt {attempt} of {name}",
                )
                slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_for(jobs["idle"]) == ["FAILED"]
    assert slurm.wait_for(jobs["moving"]) == ["COMPLETED"]
    assert "requeued 2 times in a row and nothing new" in (tmp_path / "idle.out").read_text()
    assert "restart 4" in (tmp_path / "moving.out").read_text()


def test_a_trainer_that_does_not_save_in_time_is_requeued_all_the_same(slurm, tmp_path):
    """And one that is asked to stop before its folder exists."""
    script = tmp_path / "deaf.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append --signal=B:USR1@120\nsource sbatch/job.sh\n"
        f"outputs=({tmp_path}/out)\nbegin SAVE_SECONDS\n((restarts == 0)) || exit 0\n"
        f"stop_file={tmp_path}/out/.stop\necho waiting\nrun sleep 300\n"
    )
    job = slurm("sbatch", "--parsable", f"--output={tmp_path}/log", script, SAVE_SECONDS=2).strip()

    def is_waited_for() -> bool:
        return any(sleep.parent().status() == psutil.STATUS_SLEEPING for sleep in slurm.processes_of(job, "300"))

    wait_until(is_waited_for, "the job waits for its trainer")
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_for(job) == ["COMPLETED"]
    log = (tmp_path / "log").read_text()
    assert log.index("USR1: asking") < log.index("requeueing") < log.index("restart 1")


def test_preempted_without_a_warning_it_goes_on(slurm, tmp_path):
    """GraceTime's SIGTERM ends the command of the job before Slurm takes the job away: that is no failure."""
    script = tmp_path / "low.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append\nsource sbatch/job.sh\n"
        f"outputs=({tmp_path}/out)\nbegin\n((restarts == 0)) || exit 0\nrun srun sleep 300\n"
    )
    place = ["--exclusive", f"--nodelist={slurm.nodes[0]}"]
    job = slurm("sbatch", "--parsable", "--partition=low", *place, f"--output={tmp_path}/log", script).strip()
    wait_until(lambda: slurm.processes_of(job, "300"), "it runs")
    other = slurm("sbatch", "--parsable", *place, "--output=/dev/null", "--wrap=true").strip()
    assert slurm.wait_for(other) == ["COMPLETED"]
    assert slurm.wait_for(job) == ["COMPLETED"], (tmp_path / "log").read_text()
    assert "restart 1" in (tmp_path / "log").read_text()


def test_a_failure_is_said_and_not_requeued(slurm, tmp_path):
    script = tmp_path / "wrong.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --requeue\nsource sbatch/job.sh\noutputs=({tmp_path})\nbegin\nrun false\n"
    )
    job = slurm("sbatch", "--parsable", f"--output={tmp_path}/out", script).strip()
    assert slurm.wait_for(job) == ["FAILED"]
    assert "error: false  ended with status 1" in (tmp_path / "out").read_text()


# --- The chain ------------------------------------------------------------------------------------
def write_system(path: Path, work: Path, **changes: dict) -> Path:
    """systems/tiny_ci.yaml with another work folder and changed keys of blocks."""
    blocks = yaml.safe_load(TINY.read_text())
    for name, block in {"system": {"work": str(work)}, **changes}.items():
        blocks[name] = {**blocks.get(name, {}), **block}
    path.write_text(yaml.safe_dump(blocks, sort_keys=False))
    return path


def jobs(work: Path) -> dict[str, str]:
    """Stage -> job, or - where it was done before."""
    rows = [line.split("\t") for line in (work / "jobs.tsv").read_text().splitlines()[1:]]
    return {row[0]: row[1] for row in rows}


# A command that notes what it was asked, as its own stage would, and does nothing else.
STUB = """#!{python}
import os, sys
from pathlib import Path
words = sys.argv[1:]
if words[0].startswith(os.environ["CHECKOUT"] + "/sbatch/") or words[0] in ("-c", "-m"):
    os.execv(sys.executable, [sys.executable, *words])
from towerspeech.chain import as_recorded, parsed, run_infos, script_of
from towerspeech.files import write_json
from towerspeech.stage import plain
from towerspeech.system import command_name
name = os.environ["SLURM_JOB_NAME"]
if Path(f"fail_{{name}}.{{os.environ.get('SLURM_ARRAY_TASK_ID', '')}}").exists():
    sys.exit(1)
command = command_name(script_of(words)[0])
flags = parsed(words)
noted = {{key: value for key, value in flags.items() if key not in ("shard", "checkpoints", "overwrite")}}
for path in run_infos(command, flags):
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = {{"paths": {{}}, "inputs": {{}}, "outputs": {{}}}}
    write_json(path, {{"arguments": plain(as_recorded(command, noted)), **empty}})
"""


@pytest.fixture
def stubs(tmp_path) -> Path:
    """A checkout whose jobs' commands only note what they were asked, or fail where a file fail_<stage>.<task> is."""
    root = checkout(tmp_path / "checkout")
    (root / ".venv").unlink(missing_ok=True)
    for command in ("python", "torchrun", "srun", ".venv-comet/bin/python"):
        path = (root if "/" in command else tmp_path / "bin") / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB.format(python=sys.executable))
        path.chmod(0o755)
    site = f"export CHECKOUT={root} PATH={tmp_path}/bin:{os.path.dirname(sys.executable)}:$PATH\n"
    (root / "sbatch/site.env").write_text(site)
    write_system(root / "chain.yaml", root / "work")
    return root


def submit(slurm, root: Path) -> dict[str, str]:
    """Submit the stubs' chain; stage -> job."""
    slurm("bash", root / "sbatch/submit_pipeline.sh", root / "chain.yaml")
    return jobs(root / "work")


MANIFESTS = ["manifest_train", "manifest_test"]
BEFORE = ["make_data", "make_base", *MANIFESTS, "fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer"]


@pytest.mark.slow
def test_what_is_submitted_again(slurm, stubs):
    """What failed and all that waits for it, nothing else; and what has other settings."""
    (stubs / "fail_export_checkpoint.1").touch()
    first = submit(slurm, stubs)
    assert slurm.wait_for(first["summarize"]) == ["CANCELLED"]
    assert sorted(slurm.wait_for(first["export_checkpoint"])) == ["COMPLETED", "FAILED"]
    told = slurm("bash", stubs / "sbatch/status.sh", stubs / "chain.yaml")
    row = next(line for line in told.splitlines() if line.startswith("export_checkpoint"))
    assert "1 FAILED" in row and "1 COMPLETED" in row
    (stubs / "fail_export_checkpoint.1").unlink()
    done = [*BEFORE, "build_mixture", "continued_pretraining", "build_instructions", "build_instructions_sft"]
    assert all(set(slurm.wait_for(first[stage])) == {"COMPLETED"} for stage in done)
    second = submit(slurm, stubs)
    assert sorted(stage for stage, job in second.items() if job == "-") == sorted(done)
    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    assert set(submit(slurm, stubs).values()) == {"-"}

    write_system(stubs / "chain.yaml", stubs / "work", score_comet={"metrics": ["comet22"]})
    with_comet = submit(slurm, stubs)
    assert {stage for stage, job in with_comet.items() if job != "-"} == {"comet", "summarize"}
    assert slurm.wait_for(with_comet["summarize"]) == ["COMPLETED"]

    write_system(stubs / "chain.yaml", stubs / "work", continued_pretraining={"learning_rate": 1e-3})
    refused = slurm("bash", stubs / "sbatch/submit_pipeline.sh", stubs / "chain.yaml", check=False)
    assert re.search(r"cpt_run: learning_rate was 0.003, now 0.001\n.*--overwrite true", refused), refused
    slurm("bash", stubs / "sbatch/submit_pipeline.sh", stubs / "chain.yaml", "--overwrite")
    changed = jobs(stubs / "work")
    before = {*BEFORE, "build_mixture", "build_instructions", "build_instructions_sft"}
    assert {stage for stage, job in changed.items() if job == "-"} == before
    assert slurm.wait_for(changed["summarize"]) == ["COMPLETED"]
    assert "--overwrite true" in log_of("continued_pretraining", changed["continued_pretraining"], root=stubs)


def test_a_part_of_the_chain(slurm, stubs):
    """What it reads must be there or be queued; the rest of the chain's jobs stay noted."""
    command = ["bash", stubs / "sbatch/submit_pipeline.sh", stubs / "chain.yaml", "--stages"]
    told = slurm(*command, "build_mixture,continued_pretraining", check=False)
    assert "build_mixture reads what train_bpe_tokenizer makes, which is not there" in told
    assert "there is no stage 'mixture'" in slurm(*command, "mixture", check=False)
    assert not (stubs / "work").exists()
    slurm(*command, ",".join(BEFORE))
    slurm(*command, "build_mixture,continued_pretraining")
    both = jobs(stubs / "work")
    assert [*both] == [*BEFORE, "build_mixture", "continued_pretraining"]
    assert slurm.wait_for(both["continued_pretraining"]) == ["COMPLETED"]
    slurm(*command, "label_audio")
    again = jobs(stubs / "work")
    assert {stage for stage, job in again.items() if job == "-"} == {"label_train", "label_test"}
    assert again["build_mixture"] == both["build_mixture"]


def test_nothing_is_submitted_where_an_input_is_not_there(slurm, stubs):
    before = slurm("squeue", "-h", "-t", "all", "-o", "%i")
    write_system(stubs / "chain.yaml", stubs / "work", build_sft_data={"parallel": [f"{stubs}/none.jsonl"]})
    told = slurm("bash", stubs / "sbatch/submit_pipeline.sh", stubs / "chain.yaml", check=False)
    assert f"{stubs}/none.jsonl does not exist" in told
    assert slurm("squeue", "-h", "-t", "all", "-o", "%i") == before and not (stubs / "work").exists()


def test_what_waits_for_a_cancelled_stage_is_submitted_anew(slurm, stubs):
    # Held, so that no stage begins before this test lets it.
    write_system(stubs / "chain.yaml", stubs / "work", sbatch={"tiny": ["--hold"]})
    first = submit(slurm, stubs)
    slurm("scancel", first["build_mixture"])
    second = submit(slurm, stubs)
    slurm("scontrol", "release", first["make_data"], first["make_base"])
    kept = [stage for stage, job in first.items() if second[stage] in (job, "-")]
    assert "train_bpe_tokenizer" in kept and not {"build_mixture", "export_checkpoint", "summarize"} & {*kept}
    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    assert slurm.states(first["summarize"]) == ["CANCELLED"]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The work folder of the same system, run without Slurm; continued pretraining with two processes, as there."""
    work = tmp_path_factory.mktemp("chain") / "local"
    first = "make_data,make_base,make_manifest,fit_kmeans,label_audio,train_bpe_tokenizer,build_mixture"
    for stages, processes in ((first, 1), ("continued_pretraining", 2), ("", 1)):
        command = [sys.executable, REPO / "systems/run.py", "--system", TINY, "--work", work]
        command += ["--stages", stages] if stages else []
        counts = {"NPROC_PER_NODE": str(processes), "REPLICATE": str(processes)}
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **counts}, check=True)
    return work


def log_of(stage: str, job: str, task: int | None = None, root: Path = REPO) -> str:
    path = root / f"logs/{stage}-{job}{'' if task is None else f'_{task}'}.out"
    return path.read_text(errors="replace") if path.is_file() else ""


@pytest.fixture(scope="module")
def chain(slurm, tmp_path_factory) -> dict:
    """The chain, with all that happens to it; what was seen on the way."""
    root = checkout(tmp_path_factory.mktemp("slurm_chain") / "checkout")
    work, seen = root / "runs/chain", {"root": root, "work": root / "runs/chain"}
    settings = {"NPROC_PER_NODE": 1, "OMP_NUM_THREADS": 1, "TRANSFORMERS_VERBOSITY": "error", "SAVE_SECONDS": 900}
    (root / "sbatch/site.env").write_text("export " + " ".join(f"{name}={v}" for name, v in settings.items()) + "\n")

    def submit(*words: str) -> str:
        return slurm(root / "sbatch/submit_pipeline.sh", config, *words)

    def log(stage: str, job: str, task: int | None = None) -> str:
        return log_of(stage, job, task, root)

    # A stage fails: one of its inputs is not there.
    sources = yaml.safe_load(TINY.read_text())["build_mixture"]["sources"]
    broken = [{**source, "paths": [f"{work}/no_such.jsonl"]} for source in sources]
    config = write_system(root / "chain.yaml", work, build_mixture={"sources": [sources[0], broken[1]]})
    seen["submitted"] = submit()
    first = jobs(work)
    seen["states"] = {stage: slurm.wait_for(job) for stage, job in first.items()}
    seen["status"] = slurm(root / "sbatch/status.sh", config)
    seen["log"] = log("build_mixture", first["build_mixture"])

    # Mended and submitted again; instruction tuning may not begin yet.
    write_system(config, work)
    submit()
    second = seen["second"] = jobs(work)
    training, array, tuning = (
        second[stage] for stage in ("continued_pretraining", "generate_mt", "instruction_tuning")
    )
    slurm("scontrol", "hold", tuning)
    submit()  # at once again: all are queued already
    seen["third"] = jobs(work)

    # The checkout is edited while jobs wait: whatever ran it would fail.
    edited = ["towerspeech/files.py", "results/score.py", "instruction_tuning/train.py", "sbatch/job.sh"]
    for name in edited:
        (root / name).write_text("exit(3)\n")
    config.write_text("edited too\n")

    # Continued pretraining is amid its steps when its time limit comes near; it has no other one.
    wait_until((work / "cpt_run/train.log").is_file, "continued pretraining begins")
    trainers = slurm.processes_of(training, "continued_pretraining/train.py")
    for process in trainers:
        process.suspend()
    slurm("scontrol", "update", f"JobId={training}", "EndTime=now+100")
    wait_until(lambda: "USR1" in log("continued_pretraining", training), "Slurm's warning")
    slurm("scontrol", "update", f"JobId={training}", "TimeLimit=1-0")
    for process in trainers:
        process.resume()
    assert slurm.wait_for(training) == ["COMPLETED"], log("continued_pretraining", training)
    seen["training"] = log("continued_pretraining", training)

    # A task of the generation array is requeued while it decodes.
    def decoding_task() -> str:
        for task in slurm("squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%K").split():
            if "starting vLLM" in log("generate_mt", array, int(task)):
                return task
        return ""

    task = wait_until(decoding_task, "a task of generate_mt decodes")
    slurm("scontrol", "requeue", f"{array}_{task}")

    # Instruction tuning: its node is lost, its processes are not. They are cut off and hung, until their successors
    # want the lock that they hold.
    slurm("scontrol", "release", tuning)
    script, folder = "instruction_tuning/train.py", work / "models/sft"
    wait_until((folder / "train.log").is_file, "instruction tuning begins")
    old = slurm.processes_of(tuning, script)
    for process in old:
        process.suspend()
    node = slurm("squeue", "-h", "-j", tuning, "-o", "%N").strip()
    slurm.kill_node(node)

    def wants_the_lock() -> bool:
        opened = set()
        for process in slurm.processes_of(tuning, script):
            with contextlib.suppress(psutil.Error):
                opened |= {file.path for file in process.open_files() if process not in old}
        return str(folder / ".folder.lock") in opened

    wait_until(wants_the_lock, "instruction tuning is requeued and begins")
    seen["other_node"] = slurm("squeue", "-h", "-j", tuning, "-o", "%N").strip() != node
    seen["holder"] = (folder / ".folder.lock").read_text()
    for process in old:
        process.resume()
    assert slurm.wait_for(tuning) == ["COMPLETED"], log("instruction_tuning", tuning)
    seen["survivors"] = [process.pid for process in old]
    seen["tuning"] = log("instruction_tuning", tuning)
    assert not psutil.wait_procs(old, timeout=WAIT_S)[1]
    slurm.start_node(node)
    slurm.wait_for_nodes()

    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    seen["requeued_log"] = log("generate_mt", array, int(task))
    subprocess.run(["git", "-C", root, "checkout", "-q", *edited], check=True)
    write_system(config, work)
    seen["last"] = submit()
    seen["status_done"] = slurm(root / "sbatch/status.sh", config)
    return seen


@pytest.mark.slow
def test_a_stage_that_fails_cancels_its_dependents_and_is_named(chain):
    states = chain["states"]
    assert states["build_mixture"] == ["FAILED"]
    done = (*BEFORE, "build_instructions")
    assert all(set(states[stage]) == {"COMPLETED"} for stage in done)
    after = ("continued_pretraining", "export_checkpoint", "instruction_tuning", "generate_mt", "score", "summarize")
    assert all(set(states[stage]) == {"CANCELLED"} for stage in after)
    assert "no_such.jsonl does not exist" in chain["log"]
    told = next(line for line in chain["status"].splitlines() if line.startswith("build_mixture"))
    assert "FAILED" in told and "error: python data_mixture/build_mixture.py ended with status 1" in told


@pytest.mark.slow
def test_submitted_again_it_leaves_out_what_is_done_or_queued(chain):
    second = chain["second"]
    done = [*BEFORE, "build_instructions", "build_instructions_sft"]
    assert [stage for stage, job in second.items() if job == "-"] == done
    # What was queued keeps its job, or has ended in the meantime.
    assert [*chain["third"]] == [*second]
    assert all(job in (second[stage], "-") for stage, job in chain["third"].items())
    assert chain["third"]["summarize"] == second["summarize"] != "-"
    rows = [line.split() for line in chain["last"].splitlines() if line and not line.startswith(("stage", "job ids"))]
    assert len(rows) == 20 and all(row[1] == "-" for row in rows)
    assert chain["status_done"].count("done before") == 20


@pytest.mark.slow
def test_training_saves_before_its_time_limit_and_goes_on(chain):
    first, second = chain["training"].split("was requeued")  # once
    (step,) = re.findall(r"asked to stop: saved \S+/checkpoint-(\d+) of 1,200 steps", first)
    assert 0 < int(step) < STEPS[-1]
    assert re.findall(r"going on after step ([\d,]+)", second) == [f"{int(step):,}"]
    assert (first + second).count("USR1: asking for a checkpoint") == 1
    assert "2 processes: replicate 2 x shard 1" in first and f"checkpoint-{STEPS[-1]}" in second


@pytest.mark.slow
def test_processes_that_outlive_their_node_corrupt_nothing(chain):
    assert chain["other_node"]
    assert int(re.search(r"pid (\d+)", chain["holder"])[1]) in chain["survivors"]
    after = chain["tuning"].split("was requeued")[1]  # the new self waited for the old one, and found its work done
    assert re.search(r"already done: \S+/models/sft\n", after) and "examples," not in after


@pytest.mark.slow
def test_a_requeued_generation_task_goes_on(chain):
    assert "was requeued" in chain["requeued_log"] and "restart 1" in chain["requeued_log"]


@pytest.mark.slow
def test_editing_the_checkout_changes_no_job_that_waits(chain):
    """The library too: the commit that a run_info has is the one that stands beside the library that wrote it."""
    head = subprocess.run(["git", "-C", chain["root"], "rev-parse", "HEAD"], capture_output=True, text=True)
    (frozen,) = {line.split()[-1] for line in chain["tuning"].splitlines() if ", code frozen in " in line}
    assert Path(frozen).is_relative_to(chain["work"] / "code")
    for name in ("models/sft/run_info.json", "results/score.run_info.json", "generations/asr/sft/run_info.json"):
        info = read_json(chain["work"] / name, "")
        assert info["commit"] == head.stdout.strip() and info["command"][0].startswith(frozen)
    assert f"commit {head.stdout.strip()}" in chain["training"]


@pytest.mark.slow
def test_the_csvs_are_those_of_a_local_run(chain, local):
    csvs = sorted((chain["work"] / "results").glob("*.csv"))
    assert [path.stem for path in csvs] == ["1200", "400", "base", "sft"]
    for path in csvs:
        assert path.read_bytes() == (local / "results" / path.name).read_bytes(), path.name
    assert "sft" in (chain["work"] / "summary/table.md").read_text()
    assert read_json(chain["work"] / "cpt_run/run_info.json", "")["counts"]["steps"] == STEPS[-1]


# --- A changed key --------------------------------------------------------------------------------
SCORED = {"score", "summarize"}
DECODED = {"generate_mt", "generate_asr", "generate_mt_sft", "generate_asr_sft", *SCORED}
TUNED = {"instruction_tuning", "generate_mt_sft", "generate_asr_sft", *SCORED}
TRAINED = {"continued_pretraining", "export_checkpoint", "instruction_tuning", *DECODED}
CHANGES = [  # block, key, value, the stages that depend on it
    ("score", "mixture", "other", SCORED),
    ("generate", "max_new_tokens", 25, {"generate_mt", "generate_mt_sft", *SCORED}),
    ("generate_ASR", "max_new_tokens", 25, {"generate_asr", "generate_asr_sft", *SCORED}),
    (
        "build_instructions",
        "test_lines",
        "1-10",
        {"build_instructions", "build_instructions_sft", "generate_mt"} | {"generate_mt_sft", *SCORED},
    ),
    ("instruction_tuning", "sft", {"learning_rate": 1e-3}, TUNED),
    ("build_sft_data", "num_asr", 299, TUNED),
    ("export_checkpoint", "dtype", "bfloat16", TRAINED - {"continued_pretraining"}),
    ("continued_pretraining", "learning_rate", 1e-3, TRAINED),
    ("continued_pretraining", "save_every", 99, set()),  # changes no output
    ("build_mixture", "bos", True, {"build_mixture", *TRAINED}),
    ("extend_model", "seed", 1, {"train_bpe_tokenizer", "build_mixture", *TRAINED}),
    ("label_audio", "num_workers", 2, set()),
    (
        "fit_kmeans",
        "seed",
        1,
        {"fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer", "build_mixture"} | TRAINED,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "key", "value", "stages"), CHANGES, ids=[f"{c[0]}-{c[1]}" for c in CHANGES])
def test_a_changed_key_runs_the_stages_that_depend_on_it(local, tmp_path, block, key, value, stages):
    config = write_system(tmp_path / "changed.yaml", local, **{block: {key: value}})
    command = ["bash", REPO / "sbatch/submit_pipeline.sh", config, "--dry_run"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = re.findall(r"(?m)^# (\w+)( is done)?$", told)
    assert {name for name, done in named if not done} == stages and len(named) == 20


@pytest.mark.slow
def test_a_changed_key_here(local, tmp_path):
    """Refused, then run again with --overwrite: what depends on it, nothing else. Changed back, it runs once more."""
    command = [sys.executable, REPO / "systems/run.py", "--overwrite", "true", "--system"]
    before = {path.name: path.read_bytes() for path in (local / "results").glob("*.csv")}
    for tokens, message in ((23, "max_new_tokens was 24, now 23"), (24, "max_new_tokens was 23, now 24")):
        config = write_system(tmp_path / "changed.yaml", local, generate={"max_new_tokens": tokens})
        plain = [word for word in command if word not in ("--overwrite", "true")]
        refused = subprocess.run([*plain, config], capture_output=True, text=True)
        assert refused.returncode == 1 and refused.stderr.count(message) == len(STEPS) + 2
        told = subprocess.run([*command, config], capture_output=True, text=True, check=True).stdout
        ran = re.findall(r"(?m)^\[\S+ (\w+), \d+ s\]$", told)
        assert ran == ["generate_mt", "generate_mt_sft", "score", "summarize"]
    assert {path.name: path.read_bytes() for path in (local / "results").glob("*.csv")} == before
