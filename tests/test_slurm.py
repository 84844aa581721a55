"""sbatch/ on a real Slurm: every file is accepted, and the chain ends with a local run's CSVs, whatever happens to it.

What happens to it: a stage fails and its dependents are cancelled; continued pretraining, two nodes with a process
each, reaches its time limit; the node of instruction tuning is lost while its processes live on; a task of the
generation array is requeued.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.local_slurm import LocalSlurm, missing, wait_until
from tiny.pipeline import Runner
from towerspeech.stage import read_json

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
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
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
                    60,
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
    wait_until(lambda: (tmp_path / "log").is_file() and "$ sleep" in (tmp_path / "log").read_text(), 30, "it runs")
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_for(job, 60) == ["COMPLETED"]
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
    wait_until(lambda: (tmp_path / "log").is_file() and "sleep 300" in (tmp_path / "log").read_text(), 30, "it runs")
    other = slurm("sbatch", "--parsable", *place, "--output=/dev/null", "--wrap=true").strip()
    assert slurm.wait_for(other, 60) == ["COMPLETED"]
    assert slurm.wait_for(job, 60) == ["COMPLETED"], (tmp_path / "log").read_text()
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
def test_dry_run_prints_the_commands(tmp_path):
    def dry_run(config):
        command = ["bash", REPO / "sbatch/submit_pipeline.sh", config, "--dry_run"]
        return subprocess.run(command, capture_output=True, text=True)

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
    for name in ("job.sh", "pipeline.sh", "submit_pipeline.sh", "status.sh"):
        shutil.copy(REPO / "sbatch" / name, tmp_path / "sbatch" / name)
    for file in FILES:
        stub = STUB.format("%A_%a" if "%A" in file.read_text() else "%j")
        (tmp_path / "sbatch" / file.name).write_text(stub)
    (tmp_path / "audio").mkdir()
    for name in ("base/config.json", "train.jsonl", "test.jsonl", "cpt.yaml", "parallel.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path
    (root / "chain.env").write_text(
        f"RUN=x\nWORK={root}/work\nBASE_MODEL={root}/base\nMANIFESTS={root}\nAUDIO_ROOT={root}/audio\n"
        f"TRAIN_SETS=train\nTEST_SETS=test\nNUM_UNITS=50\nNUM_SHARDS=2\nMIXTURE={root}/cpt.yaml\n"
        f'CPT_CONFIG={root}/cpt.yaml\nSTEPS="1 2"\nSFT_CONFIG={root}/cpt.yaml\nPARALLEL={root}/parallel.jsonl\n'
        f"NUM_ASR=1\nNUM_MT=1\nDATA_ROOT={root}/audio\n"
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
    assert sorted(slurm.states(first["export_checkpoint"])) == ["COMPLETED", "FAILED"]
    told = slurm("bash", stubs / "sbatch/status.sh", stubs / "chain.env")
    row = next(line for line in told.splitlines() if line.startswith("export_checkpoint"))
    assert "1 FAILED" in row and "1 COMPLETED" in row
    (stubs / "fail_export_checkpoint.1").unlink()
    slurm.wait_for(first["build_instructions_sft"])
    second = submit(slurm, stubs)
    done = ["fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer", "build_mixture", "continued_pretraining"]
    done += ["build_instructions", "build_instructions_sft"]
    assert sorted(stage for stage, job in second.items() if job == "-") == sorted(done)
    assert slurm.wait_for(second["summarize"]) == ["COMPLETED"]
    assert set(submit(slurm, stubs).values()) == {"-"}

    config = (stubs / "chain.env").read_text()
    (stubs / "chain.env").write_text(config + "COMET=true\n")
    with_comet = submit(slurm, stubs)
    assert {stage for stage, job in with_comet.items() if job != "-"} == {"comet", "summarize"}
    assert slurm.wait_for(with_comet["summarize"]) == ["COMPLETED"]
    (stubs / "cpt.yaml").write_text("a: 1\n")  # read by the mixture and by both trainings
    changed = submit(slurm, stubs)
    before = {"fit_kmeans", "label_train", "label_test", "train_bpe_tokenizer"}
    assert {stage for stage, job in changed.items() if job == "-"} == {*before, "build_instructions", *done[-1:]}
    assert slurm.wait_for(changed["summarize"]) == ["COMPLETED"]


def test_what_waits_for_a_cancelled_stage_is_submitted_anew(slurm, stubs):
    first = submit(slurm, stubs)
    slurm("scancel", first["build_mixture"])
    second = submit(slurm, stubs)
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
        "export NPROC_PER_NODE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error\n"
        f"ARGS_fit_kmeans=({words(KMEANS)})\nARGS_train_bpe_tokenizer=({words(BPE)})\n"
        "ARGS_export_checkpoint=(--dtype float32)\n"
        f"ARGS_build_instructions=({words(INSTRUCTIONS)})\n"
        f"ARGS_generate_mt=({words(GENERATION)})\nARGS_generate_asr=({words(GENERATION)})\n"
        # USR1 comes 5 to 35 s after each start: Slurm looks every 30 s
        "OPTIONS_continued_pretraining=(--nodes=2 --gres=gpu:1 --time=2 --signal=B:USR1@115)\n"
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
    slurm.wait_for(first["summarize"], 300)
    slurm.wait_for(first["label_test"])
    slurm.wait_for(first["build_instructions"])
    slurm.wait_for(first["build_instructions_sft"])
    seen["states"] = {stage: slurm.states(job) for stage, job in first.items()}
    seen["status"] = slurm("sbatch/status.sh", config)
    seen["log"] = log_of("build_mixture", first["build_mixture"])

    # Mended and submitted again; it reaches its time limit.
    write_config(root, root / "data/parallel.jsonl")
    slurm("sbatch/submit_pipeline.sh", config)
    second = seen["second"] = jobs(root)
    slurm("sbatch/submit_pipeline.sh", config)  # at once again: all are queued already
    seen["third"] = jobs(root)
    slurm.wait_for(second["continued_pretraining"], 600)
    seen["training"] = log_of("continued_pretraining", second["continued_pretraining"])

    # A task of the generation array is requeued while it decodes.
    array = second["generate_mt"]
    seen["requeued_task"] = None

    def decoding_task() -> str:
        for task in slurm("squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%K").split():
            if "starting vLLM" in log_of("generate_mt", array, int(task)):
                return task
        return ""

    task = wait_until(decoding_task, 120, "a task of generate_mt decodes")
    slurm("scontrol", "requeue", f"{array}_{task}")
    seen["requeued_task"] = int(task)

    # Instruction tuning: its node is lost, its processes are not.
    tuning = second["instruction_tuning"]
    train_log = root / "slurm/models/sft/train.log"
    wait_until(train_log.is_file, 120, log_of("instruction_tuning", tuning) or "instruction tuning begins")
    node = slurm("squeue", "-h", "-j", tuning, "-o", "%N").strip()
    slurm.kill_node(node)
    old = [
        process
        for process in slurm.processes()
        if "instruction_tuning/train.py" in " ".join(process.cmdline())
        and process.environ().get("SLURM_JOB_ID") == tuning
    ]
    for process in old:  # cut off and hung, until its successor has begun elsewhere
        process.suspend()

    def training() -> list:
        return [
            process
            for process in slurm.processes()
            if process not in old and "instruction_tuning/train.py --config" in " ".join(process.cmdline())
        ]

    wait_until(training, 180, "instruction tuning is requeued and started")
    seen["other_node"] = slurm("squeue", "-h", "-j", tuning, "-o", "%N").strip() != node
    time.sleep(15)  # enough to load the model and train, but for the lock
    seen["waited"] = "training:" not in log_of("instruction_tuning", tuning).split("was requeued")[1]
    for process in old:
        process.resume()
    slurm.wait_for(tuning, 300)
    seen["survivors"] = len(old)
    seen["tuning"] = log_of("instruction_tuning", tuning)
    psutil.wait_procs(old, timeout=60)
    slurm.start_node(node)
    slurm.wait_for_nodes()

    assert slurm.wait_for(second["summarize"], 600) == ["COMPLETED"]
    seen["requeued_log"] = log_of("generate_mt", array, seen["requeued_task"])
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
    log = chain["training"]
    asked = re.findall(r"asked to stop: saved \S+/checkpoint-(\d+)", log)
    went_on = re.findall(r"going on after step ([\d,]+)", log)
    assert asked and asked == [step.replace(",", "") for step in went_on]
    assert log.count("USR1: asking for a checkpoint") == len(asked) == log.count("was requeued")
    assert "2 processes: replicate 2 x shard 1" in log


@pytest.mark.slow
def test_processes_that_outlive_their_node_corrupt_nothing(chain):
    assert chain["survivors"] >= 1 and chain["other_node"] and chain["waited"]
    assert "already done" in chain["tuning"]  # the new self waited for the old one's lock, and found its work done


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
