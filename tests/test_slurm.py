"""sbatch/ on a real Slurm: every file is accepted, and the chain ends with a local run's CSVs, whatever happens to it.

What happens to it: a stage fails and its dependents are cancelled; continued pretraining, two nodes with a process
each, reaches its time limit; the node of instruction tuning is lost while its processes live on; a task of the
generation array is requeued. What is to happen at a certain moment is held (a job, or its processes) until it happens,
so that nothing depends on how quick the machine is.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from tests.local_slurm import WAIT_S, LocalSlurm, missing, wait_until
from tiny.pipeline import Runner
from towerspeech.files import read_json

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "sbatch").glob("*.sbatch"))
SCRIPTS = [*FILES, *sorted((REPO / "sbatch").glob("*.sh"))]
NUM_UNITS, NUM_SHARDS, STEPS = 50, 2, (400, 1200)
NAMES = ("base", *(f"checkpoint-{step}" for step in STEPS), "sft")


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
    assert {name for name in used if not name.startswith("SLURM_")} == read
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
def dry_run(config: Path) -> subprocess.CompletedProcess:
    command = ["bash", REPO / "sbatch/submit_pipeline.sh", config, "--dry_run"]
    return subprocess.run(command, capture_output=True, text=True)


def test_dry_run_prints_the_commands(tmp_path):
    campaign = tmp_path / "campaign.env"
    campaign.write_text((REPO / "sbatch/towerspeech_6b.env").read_text() + f"WORK={tmp_path}/work\n")
    printed = dry_run(campaign)
    lines = printed.stdout.splitlines()
    assert printed.returncode == 0 and len(lines) == 24 and not (tmp_path / "work").exists(), printed.stderr
    named = [re.search(r"sbatch/(\w+)\.sbatch", line)[1] for line in lines]
    assert set(named) == {file.stem for file in FILES}  # each stage has its place
    assert all("--kill-on-invalid-dep=yes" in line for line in lines)
    asr = next(line for line in lines if "--job-name=generate_asr " in line)
    assert "--array=0-4" in asr and "label_fleurs" in asr.split("--dependency=afterok:")[1].split()[0]
    config = tmp_path / "short.env"
    config.write_text("RUN=x\n")
    printed = dry_run(config)
    assert printed.returncode and "does not set BASE_MODEL" in printed.stderr
    assert "no config" in dry_run(tmp_path / "none.env").stderr


def test_lists_and_blanks_in_the_config(tmp_path):
    """Lists with line breaks give the commands that lists with blanks give; single values hold their blanks."""
    text = (REPO / "sbatch/towerspeech_6b.env").read_text()
    text += 'SFT_SETS="voxpopuli_en mls_en"\nPARALLEL="a.jsonl b.jsonl"\nSTEPS="1500 5000"\n'
    plain, broken, blanks = (tmp_path / f"{name}.env" for name in ("plain", "broken", "blanks"))
    plain.write_text(text)
    lists = r'(?m)^(TRAIN_SETS|TEST_SETS|SFT_SETS|STEPS|PARALLEL)="([^"$]+)"'
    broken.write_text(re.sub(lists, lambda found: f'{found[1]}="\n{found[2]}\n"'.replace(" ", "\n\t "), text))
    expected = dry_run(plain)
    assert expected.returncode == 0, expected.stderr
    assert dry_run(broken).stdout == expected.stdout
    words = {line.split("--job-name=")[1].split()[0]: shlex.split(line) for line in expected.stdout.splitlines()}
    assert "PARALLEL=a.jsonl b.jsonl" in words["instruction_tuning"]
    assert "UNITS=units/voxpopuli_en units/mls_en" in words["instruction_tuning"]
    assert "STEPS=1500 5000" in words["export_checkpoint"] and "--array=0-1" in words["export_checkpoint"]
    assert "MANIFEST=manifests/spgispeech.jsonl" in words["fit_kmeans"]

    single = ("MANIFESTS", "AUDIO_ROOT", "BASE_MODEL", "MIXTURE", "CPT_CONFIG", "SFT_CONFIG", "DATA_ROOT", "KMEANS")
    blanks.write_text(text + "".join(f'{name}="my {name}"\n' for name in single))
    printed = dry_run(blanks)
    assert printed.returncode == 0, printed.stderr
    words = {line.split("--job-name=")[1].split()[0]: shlex.split(line) for line in printed.stdout.splitlines()}
    assert {"MANIFEST=my MANIFESTS/mls_en.jsonl", "AUDIO_ROOT=my AUDIO_ROOT", "KMEANS=my KMEANS"} <= {
        *words["label_mls_en"]
    }
    assert (
        "BASE_MODEL=my BASE_MODEL" in words["train_bpe_tokenizer"] and "MIXTURE=my MIXTURE" in words["build_mixture"]
    )
    assert "CONFIG=my CPT_CONFIG" in words["continued_pretraining"]
    assert "CONFIG=my SFT_CONFIG" in words["instruction_tuning"]
    assert "DATA_ROOT=my DATA_ROOT" in words["build_instructions"]


ONE_WORD = ("WORK", "UNITS_DIR", "RESULTS_DIR", "NUM_UNITS", "NUM_SHARDS", "COMET")
NOT_BLANK = ("RUN", "BASE_MODEL", "TRAIN_SETS", "TEST_SETS", "SFT_SETS", "STEPS", "PARALLEL")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        *((name, f'{name}="some thing"') for name in ONE_WORD),
        *((name, f"{name}=$' \\n'") for name in NOT_BLANK),
        ("WORK", 'WORK="runs/*"'),
        ("WORK", "WORK=$'runs/x\\r'"),
        ("WORK", 'RUN="a b"'),  # WORK is runs/$RUN
    ],
)
def test_values_that_cannot_work_are_refused_by_name(tmp_path, name, line):
    config = tmp_path / "campaign.env"
    config.write_text((REPO / "sbatch/towerspeech_6b.env").read_text() + line + "\n")
    for script in ("submit_pipeline.sh", "status.sh"):
        done = subprocess.run(["bash", REPO / "sbatch" / script, config], capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        assert re.match(rf"error: .*\b{name}\b", done.stderr), done.stderr


STUB = """#!/bin/bash
#SBATCH --open-mode=append --signal=B:USR1@120 --output=logs/%x-{}.out
source "$SLURM_SUBMIT_DIR/sbatch/job.sh"
outputs=("$OUTPUT_DIR")
begin OUTPUT_DIR
mkdir -p "$OUTPUT_DIR"
run test ! -e "fail_$SLURM_JOB_NAME.${{SLURM_ARRAY_TASK_ID:-}}"
finish
"""


@pytest.fixture
def stubs(tmp_path) -> Path:
    """The chain's own scripts, with stages that do nothing, or fail where a file fail_<stage>.<task> is."""
    (tmp_path / "sbatch").mkdir()
    for name in ("job.sh", "words.sh", "pipeline.sh", "submit_pipeline.sh", "status.sh"):
        shutil.copy(REPO / "sbatch" / name, tmp_path / "sbatch" / name)
    for file in FILES:
        stub = STUB.format("%A_%a" if "%A" in file.read_text() else "%j")
        (tmp_path / "sbatch" / file.name).write_text(stub)
    root = tmp_path
    (root / "my audio").mkdir()
    for name in ("my base/config.json", "my sets/train.jsonl", "my sets/test.jsonl", "my cpt.yaml", "parallel.jsonl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "chain.env").write_text(
        f'RUN=x\nWORK={root}/work\nBASE_MODEL="{root}/my base"\nMANIFESTS="{root}/my sets"\n'
        f'AUDIO_ROOT="{root}/my audio"\nTRAIN_SETS=train\nTEST_SETS=test\nNUM_UNITS=50\nNUM_SHARDS=2\n'
        f'MIXTURE="{root}/my cpt.yaml"\nCPT_CONFIG="{root}/my cpt.yaml"\nSTEPS="1\n2"\n'
        f'SFT_CONFIG="{root}/my cpt.yaml"\nPARALLEL="{root}/parallel.jsonl\n{root}/parallel.jsonl"\n'
        f'NUM_ASR=1\nNUM_MT=1\nDATA_ROOT="{root}/my audio"\n'
    )
    return root


def submit(slurm, root: Path) -> dict[str, str]:
    """Submit the stubs' chain; stage -> job."""
    slurm("bash", root / "sbatch/submit_pipeline.sh", root / "chain.env")
    return jobs(root, "work")


@pytest.mark.slow
def test_what_is_submitted_again(slurm, stubs):
    """What failed and all that waits for it, nothing else; and what has other settings."""
    (stubs / "fail_export_checkpoint.1").touch()
    first = submit(slurm, stubs)
    assert slurm.wait_for(first["summarize"]) == ["CANCELLED"]
    assert sorted(slurm.wait_for(first["export_checkpoint"])) == ["COMPLETED", "FAILED"]
    told = slurm("bash", stubs / "sbatch/status.sh", stubs / "chain.env")
    row = next(line for line in told.splitlines() if line.startswith("export_checkpoint"))
    assert "1 FAILED" in row and "1 COMPLETED" in row
    (stubs / "fail_export_checkpoint.1").unlink()
    done = ["fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer", "build_mixture", "continued_pretraining"]
    done += ["build_instructions", "build_instructions_sft"]
    assert all(set(slurm.wait_for(first[stage])) == {"COMPLETED"} for stage in done)
    second = submit(slurm, stubs)
    assert sorted(stage for stage, job in second.items() if job == "-") == sorted(done)
    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    assert set(submit(slurm, stubs).values()) == {"-"}

    config = (stubs / "chain.env").read_text()
    (stubs / "chain.env").write_text(config + "COMET=true\n")
    with_comet = submit(slurm, stubs)
    assert {stage for stage, job in with_comet.items() if job != "-"} == {"comet", "summarize"}
    assert slurm.wait_for(with_comet["summarize"]) == ["COMPLETED"]
    (stubs / "my cpt.yaml").write_text("a: 1\n")  # read by the mixture and by both trainings
    changed = submit(slurm, stubs)
    before = {"fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer"}
    assert {stage for stage, job in changed.items() if job == "-"} == {*before, "build_instructions", *done[-1:]}
    assert slurm.wait_for(changed["summarize"]) == ["COMPLETED"]


def test_nothing_is_submitted_where_an_input_is_not_there(slurm, stubs):
    """Such as the halves of a path with blanks in a list."""
    before = slurm("squeue", "-h", "-t", "all", "-o", "%i")
    with open(stubs / "chain.env", "a") as config:
        config.write(f'PARALLEL="{stubs}/parallel.jsonl {stubs}/my parallel.jsonl"\n')
    told = slurm("bash", stubs / "sbatch/submit_pipeline.sh", stubs / "chain.env", check=False)
    assert f"{stubs}/my does not exist" in told and "hold no blanks" in told
    assert slurm("squeue", "-h", "-t", "all", "-o", "%i") == before and not (stubs / "work").exists()


def test_what_waits_for_a_cancelled_stage_is_submitted_anew(slurm, stubs):
    with open(stubs / "chain.env", "a") as config:
        config.write("OPTIONS_fit_kmeans=(--hold)\n")  # so that no stage begins before this test lets it
    first = submit(slurm, stubs)
    slurm("scancel", first["build_mixture"])
    second = submit(slurm, stubs)
    slurm("scontrol", "release", first["fit_kmeans"])
    kept = [stage for stage, job in first.items() if second[stage] in (job, "-")]
    assert "train_bpe_tokenizer" in kept and not {"build_mixture", "export_checkpoint", "summarize"} & {*kept}
    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    assert slurm.states(first["summarize"]) == ["CANCELLED"]


TRAINING = {
    "sequence_length": 256,
    "global_batch_size": 2,
    "learning_rate": 3e-3,
    "warmup_share": 0.05,
    "save_every": 100,
    "dtype": "float32",
    "device": "cpu",
    "keep_steps": list(STEPS),
}
SFT = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "learning_rate": 2e-3,
    "gradient_checkpointing": False,
    "save_steps": 50,
}
KMEANS = {"features": "mfcc", "max_frames": 20000}
BPE = {"held_out": 0}
INSTRUCTIONS = {"test_set": "flores200", "dataset": "tiny", "pairs": "de-en", "test_lines": "1-20"}
GENERATION = {"max_new_tokens": 24}
NUM_EXAMPLES = 300  # of each, ASR and MT


def budgets(units: Path, parallel: Path) -> list[dict]:
    """The mixture's sources: 1200 steps of 2 x 256 tokens, long enough to meet the time limit."""
    return [
        {"name": "speech", "kind": "speech", "paths": [str(units)], "budget": 512000, "max_epochs": 100},
        {"name": "parallel", "kind": "parallel", "paths": [str(parallel)], "budget": 102400, "max_epochs": 100},
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the chain begins with: audio, texts, a base model."""
    root, do = tmp_path_factory.mktemp("chain"), Runner(1)
    sizes = {"num_train": 300, "num_tuning": 20, "num_test": 20, "voices": 1, "max_concepts": 4}
    do("tiny/make_data.py", output_dir=root / "data", templates=["buy", "ask"], **sizes)
    shape = {"vocab_size": 500, "hidden_size": 128, "num_layers": 2, "intermediate_size": 256, "head_dim": 64}
    base = {"mono": root / "data/mono.jsonl", "output_dir": root / "base", "max_position_embeddings": 512}
    do("tiny/make_base.py", **base, **shape)
    return root


@pytest.fixture(scope="module")
def local_results(inputs) -> Path:
    """The CSVs of the same scripts called one after the other, continued pretraining with two processes."""
    root, do, work = inputs, Runner(2), inputs / "local"
    audio, units, models = root / "data/audio", work / "units", work / "models"
    parallel = root / "data/parallel.jsonl"
    speech = {"audio_root": audio, "manifest": audio / "train.jsonl"}
    do("speech_units/fit_kmeans.py", num_units=NUM_UNITS, output_dir=work / "kmeans", **speech, **KMEANS)
    for name in ("train", "test"):
        labelled = {"manifest": audio / f"{name}.jsonl", "audio_root": audio, "kmeans": work / "kmeans"}
        do("speech_units/label_audio.py", output_dir=units / name, num_shards=NUM_SHARDS, **labelled)
    bpe = {"units": [units / "train"], "num_units": NUM_UNITS, "vocab_size": NUM_UNITS + 30}
    do("train_bpe_tokenizer/train_bpe.py", output_dir=work / "bpe", **bpe, **BPE)
    merge = {"base": root / "base", "units_bpe": work / "bpe"}
    do("train_bpe_tokenizer/merge_tokenizer.py", output_dir=work / "tokenizer", **merge)
    extend = {"model": root / "base", "tokenizer": work / "tokenizer"}
    do("train_bpe_tokenizer/extend_model.py", output_dir=models / "base", **extend)
    mixed = {"tokenizer": models / "base", "sources": budgets(units / "train", parallel)}
    do("data_mixture/build_mixture.py", output_dir=work / "mixture", **mixed)
    training = {"model": models / "base", "mixture": work / "mixture", "replicate": 2, **TRAINING}
    do("continued_pretraining/train.py", output_dir=work / "run", **training)
    for step in STEPS:
        export = {"checkpoint": work / f"run/checkpoint-{step}", "model": models / "base", "dtype": "float32"}
        do("continued_pretraining/export_checkpoint.py", output_dir=models / f"checkpoint-{step}", **export)
    examples = {"units": [units / "train"], "parallel": [parallel], "num_asr": NUM_EXAMPLES, "num_mt": NUM_EXAMPLES}
    do("instruction_tuning/build_sft_data.py", output_dir=work / "sft_data", **examples)
    tuning = {"model": models / NAMES[-2], "data": work / "sft_data/sft.jsonl"}
    tuning |= {f"sft.{name}": value for name, value in SFT.items()}
    Runner(1)("instruction_tuning/train.py", output_dir=models / "sft", **tuning)
    for style, names in (("original", NAMES[:-1]), ("chat", NAMES[-1:])):
        shown = {"data_root": root / "data/flores", "style": style, **INSTRUCTIONS}
        do("instructions/build_instructions.py", output_dir=work / style, **shown)
        decoded = {"checkpoints": [models / name for name in names], **GENERATION}
        do(
            "generate/generate.py",
            prompts=[work / style / "0_shot/tiny_de-en.jsonl"],
            output_dir=work / "mt",
            **decoded,
        )
        do("generate/generate_ASR.py", units=[units / "test"], style=style, output_dir=work / "asr", **decoded)
    scored = {"generations": [work / task / name for name in NAMES for task in ("mt", "asr")]}
    do("results/score.py", model="tiny", mixture="5to1", output_dir=work / "results", **scored)
    return work / "results"


def words(settings: dict) -> str:
    """Settings as a bash array's words."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in settings.items())


def write_config(root: Path, parallel: Path) -> Path:
    """The chain's config; its mixture reads ``parallel``."""
    audio, work = root / "data/audio", root / "slurm"
    (root / "mixture.yaml").write_text(yaml.safe_dump({"sources": budgets(work / "units/train", parallel)}))
    (root / "cpt.yaml").write_text(yaml.safe_dump(TRAINING))
    (root / "sft.yaml").write_text(yaml.safe_dump({"sft": SFT}))
    config = root / "chain.env"
    config.write_text(
        f"RUN=tiny\nWORK={work}\nMIXTURE_NAME=5to1\nBASE_MODEL={root}/base\nMANIFESTS={audio}\nAUDIO_ROOT={audio}\n"
        f"TRAIN_SETS=train\nTEST_SETS=test\nNUM_UNITS={NUM_UNITS}\nVOCAB_SIZE={NUM_UNITS + 30}\n"
        f"NUM_SHARDS={NUM_SHARDS}\nMIXTURE={root}/mixture.yaml\nCPT_CONFIG={root}/cpt.yaml\n"
        f'STEPS="{STEPS[0]} {STEPS[1]}"\nSFT_CONFIG={root}/sft.yaml\nPARALLEL={root}/data/parallel.jsonl\n'
        f"NUM_ASR={NUM_EXAMPLES}\nNUM_MT={NUM_EXAMPLES}\nDATA_ROOT={root}/data/flores\n"
        "export NPROC_PER_NODE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error SAVE_SECONDS=900\n"
        f"ARGS_fit_kmeans=({words(KMEANS)})\nARGS_train_bpe_tokenizer=({words(BPE)})\n"
        "ARGS_export_checkpoint=(--dtype float32)\n"
        f"ARGS_build_instructions=({words(INSTRUCTIONS)})\n"
        f"ARGS_generate_mt=({words(GENERATION)})\nARGS_generate_asr=({words(GENERATION)})\n"
        "OPTIONS_continued_pretraining=(--nodes=2 --gres=gpu:1)\n"
        "OPTIONS_instruction_tuning=(--gres=gpu:1)\n"
        "OPTIONS_generate_mt=(--gres=gpu:8)\nOPTIONS_generate_asr=(--gres=gpu:8)\n"  # one a node at a time
    )
    return config


def jobs(root: Path, work: str = "slurm") -> dict[str, str]:
    """Stage -> job, or - where it was done before."""
    rows = [line.split("\t") for line in (root / work / "jobs.tsv").read_text().splitlines()[1:]]
    return {row[0]: row[1] for row in rows}


def log_of(stage: str, job: str, task: int | None = None) -> str:
    path = REPO / f"logs/{stage}-{job}{'' if task is None else f'_{task}'}.out"
    return path.read_text(errors="replace") if path.is_file() else ""


@pytest.fixture(scope="module")
def chain(slurm, inputs) -> dict:
    """The chain, with all that happens to it; what was seen on the way."""
    root, seen = inputs, {}
    # A stage fails: one of its inputs is not there.
    config = write_config(root, root / "no_such.jsonl")
    seen["submitted"] = slurm("sbatch/submit_pipeline.sh", config)
    first = jobs(root)
    seen["states"] = {stage: slurm.wait_for(job) for stage, job in first.items()}
    seen["status"] = slurm("sbatch/status.sh", config)
    seen["log"] = log_of("build_mixture", first["build_mixture"])

    # Mended and submitted again; instruction tuning may not begin yet.
    write_config(root, root / "data/parallel.jsonl")
    slurm("sbatch/submit_pipeline.sh", config)
    second = seen["second"] = jobs(root)
    training, array, tuning = (
        second[stage] for stage in ("continued_pretraining", "generate_mt", "instruction_tuning")
    )
    slurm("scontrol", "hold", tuning)
    slurm("sbatch/submit_pipeline.sh", config)  # at once again: all are queued already
    seen["third"] = jobs(root)

    # Continued pretraining is amid its steps when its time limit comes near; it has no other one.
    wait_until((root / "slurm/cpt_run/train.log").is_file, "continued pretraining begins")
    trainers = slurm.processes_of(training, "continued_pretraining/train.py")
    for process in trainers:
        process.suspend()
    slurm("scontrol", "update", f"JobId={training}", "EndTime=now+100")
    wait_until(lambda: "USR1" in log_of("continued_pretraining", training), "Slurm's warning")
    slurm("scontrol", "update", f"JobId={training}", "TimeLimit=1-0")
    for process in trainers:
        process.resume()
    assert slurm.wait_for(training) == ["COMPLETED"], log_of("continued_pretraining", training)
    seen["training"] = log_of("continued_pretraining", training)

    # A task of the generation array is requeued while it decodes.
    def decoding_task() -> str:
        for task in slurm("squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%K").split():
            if "starting vLLM" in log_of("generate_mt", array, int(task)):
                return task
        return ""

    task = wait_until(decoding_task, "a task of generate_mt decodes")
    slurm("scontrol", "requeue", f"{array}_{task}")

    # Instruction tuning: its node is lost, its processes are not. They are cut off and hung, until their successors
    # want the lock that they hold.
    slurm("scontrol", "release", tuning)
    script, folder = "instruction_tuning/train.py", root / "slurm/models/sft"
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
    assert slurm.wait_for(tuning) == ["COMPLETED"], log_of("instruction_tuning", tuning)
    seen["survivors"] = [process.pid for process in old]
    seen["tuning"] = log_of("instruction_tuning", tuning)
    assert not psutil.wait_procs(old, timeout=WAIT_S)[1]
    slurm.start_node(node)
    slurm.wait_for_nodes()

    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    seen["requeued_log"] = log_of("generate_mt", array, int(task))
    seen["last"] = slurm("sbatch/submit_pipeline.sh", config)
    seen["status_done"] = slurm("sbatch/status.sh", config)
    return seen


@pytest.mark.slow
def test_a_stage_that_fails_cancels_its_dependents_and_is_named(chain):
    states = chain["states"]
    assert states["build_mixture"] == ["FAILED"]
    done = ("fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer", "build_instructions")
    assert all(set(states[stage]) == {"COMPLETED"} for stage in done)
    after = ("continued_pretraining", "export_checkpoint", "instruction_tuning", "generate_mt", "score", "summarize")
    assert all(set(states[stage]) == {"CANCELLED"} for stage in after)
    assert "no_such.jsonl does not exist" in chain["log"]
    told = next(line for line in chain["status"].splitlines() if line.startswith("build_mixture"))
    assert "FAILED" in told and "error: python data_mixture/build_mixture.py ended with status 1" in told


@pytest.mark.slow
def test_submitted_again_it_leaves_out_what_is_done_or_queued(chain):
    second = chain["second"]
    assert [stage for stage, job in second.items() if job == "-"] == [
        "fit_kmeans",
        "label_train",
        "label_test",
        "train_bpe_tokenizer",
        "build_instructions",
        "build_instructions_sft",
    ]
    assert chain["third"] == second
    rows = [line.split() for line in chain["last"].splitlines() if line and not line.startswith(("stage", "job ids"))]
    assert len(rows) == 16 and all(row[1] == "-" for row in rows)
    assert chain["status_done"].count("done before") == 16


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
def test_the_csvs_are_those_of_a_local_run(chain, inputs, local_results):
    found = sorted((inputs / "slurm/results").glob("*.csv"))
    assert [path.stem for path in found] == ["1200", "400", "base", "sft"]
    for path in found:
        assert path.read_bytes() == (local_results / path.name).read_bytes(), path.name
    summed = (inputs / "slurm/summary/table.md").read_text()
    assert "sft" in summed
    info = read_json(inputs / "slurm/cpt_run/run_info.json", "")
    assert info["counts"]["steps"] == STEPS[-1]
