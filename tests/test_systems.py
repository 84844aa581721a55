"""The systems' YAMLs: every block is its command's own, budgets are what was published, and --config takes a block."""

import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from towerspeech import chain
from towerspeech.languages import LANGUAGES
from towerspeech.mixture import Group, Source, with_budgets

REPO = Path(__file__).resolve().parent.parent
EVERY = sorted((REPO / "systems").glob("*.yaml"))
SYSTEMS = [path for path in EVERY if path.stem not in ("tiny", "tiny_ci")]
BILLION = 1_000_000_000
BUDGETS = {  # of speech and text, in tokens, as the original states them
    "towerspeech_6b": (5 * BILLION, BILLION),
    "towerspeech_8b": (5 * BILLION, 3 * BILLION),
    "llamaspeech_6b": (5 * BILLION, BILLION),
    "tinyllama_10b": (5 * BILLION, 5 * BILLION),
    "llama2_10b": (5 * BILLION, 5 * BILLION),
}
PUBLISHED_STEPS = {"towerspeech_6b": [1500, 3000, 4500, 5000], "towerspeech_8b": [1500, 3000, 5000]}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def script_of(block: str) -> Path:
    [script] = [*REPO.glob(f"*/{block}.py")] or [REPO / block / "train.py"]
    return script


def run_script(script: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *map(str, words)], cwd=REPO, capture_output=True, text=True)


def test_the_five_are_there():
    assert {path.stem for path in SYSTEMS} == BUDGETS.keys()
    assert {path.stem for path in EVERY} == {*BUDGETS, "tiny", "tiny_ci"}


NOT_COMMANDS = ("system", "sbatch", "base", "few_shot")
BLOCKS = [(path, block) for path in EVERY for block in read(path) if block not in NOT_COMMANDS]


@pytest.mark.parametrize(("path", "block"), BLOCKS, ids=[f"{path.stem}-{block}" for path, block in BLOCKS])
def test_each_block_is_taken_whole_by_its_command(path, block):
    """By its own parser, with the values that stand there; what it does not know, it refuses."""
    taken = run_script(script_of(block), "--config", path.relative_to(REPO), "--print_config")
    assert taken.returncode == 0, taken.stderr
    given, wanted = yaml.safe_load(taken.stdout), chain.System(path).blocks[block]
    if block == "build_mixture":
        wanted["sources"] = [asdict(Source(**source)) for source in wanted["sources"]]  # with what it does not name
    for name, value in wanted.items():
        assert given[name] == value, name


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_budgets_and_steps(path):
    system = read(path)
    mixture = system["build_mixture"]
    groups = {name: Group(**group) for name, group in mixture["groups"].items()}
    sources = with_budgets([Source(**source) for source in mixture["sources"]], groups)
    speech, text = BUDGETS[path.stem]
    assert sum(source.budget for source in sources if source.kind == "speech") == speech
    of_text = [source for source in sources if source.kind != "speech"]
    assert sum(source.budget for source in of_text) == text
    mono = {Path(file).stem for source in of_text if source.kind == "text" for file in source.paths}
    pairs = {Path(file).stem for source in of_text if source.kind == "parallel" for file in source.paths}
    assert all(source.language == Path(source.paths[0]).stem for source in of_text if source.kind == "text")
    assert all(source.direction == Path(source.paths[0]).stem for source in of_text if source.kind == "parallel")
    assert {*mixture["test_sets"]} == {"flores200", "wmt23", *system["system"]["test_sets"]}
    languages = {"en", "de"} if path.stem in ("tinyllama_10b", "llama2_10b") else set(LANGUAGES)
    assert mono == languages
    assert pairs == {pair for code in languages - {"en"} for pair in (f"en-{code}", f"{code}-en")}

    training = system["continued_pretraining"]
    steps = math.ceil((speech + text) / (training["global_batch_size"] * training["sequence_length"]))
    assert training["keep_steps"] == PUBLISHED_STEPS.get(path.stem, training["keep_steps"])
    assert max(training["keep_steps"]) < steps
    assert f"in {steps:,} steps" in path.read_text(encoding="utf-8")
    assert training["warmup_share"] * steps == pytest.approx(13, abs=0.5)
    assert system["system"]["work"] == f"runs/{path.stem}"
    assert system["system"]["tokenizer"] == f"tokenizers/{system['system']['base']}"  # shared by those of one base
    assert system["score"]["model"] == path.stem


def test_readme_tells_of_the_same():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for path in SYSTEMS:
        row = next(line for line in readme.splitlines() if f"({path.relative_to(REPO)})" in line)
        speech, text = (f"{budget // BILLION}B" for budget in BUDGETS[path.stem])
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:4] == [speech, text]
        assert cells[5] == ", ".join(map(str, read(path)["continued_pretraining"]["keep_steps"]))


def test_every_source_of_a_number_is_said():
    for path in EVERY:
        text = path.read_text(encoding="utf-8")
        for said in (
            "# Sources:",
            "published",
            "our (default|own)",
            "Hardware assumed",
            "Each command takes its own",
        ):
            assert re.search(said, text, re.IGNORECASE), (path.name, said)


# --- --config -------------------------------------------------------------------------------------
SYSTEM = {"build_mixture": {"bos": True, "seed": 7}, "score": {"model": "x"}}


@pytest.fixture
def system(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SYSTEM))
    return path


@pytest.mark.parametrize("joined", [False, True])
def test_flags_override_a_block(system, joined):
    words = [f"--config={system}"] if joined else ["--config", system]
    shown = run_script(REPO / "data_mixture/build_mixture.py", *words, "--seed", "9", "--print_config")
    given = yaml.safe_load(shown.stdout)
    assert (given["bos"], given["seed"]) == (True, 9)


def test_keys_and_blocks_that_are_not_known_are_refused(system, tmp_path):
    script = REPO / "data_mixture/build_mixture.py"
    for changed, message in (
        ({**SYSTEM, "build_mixture": {"sed": 1}}, "Option 'sed' is not accepted"),
        ({**SYSTEM, "build_mixtures": {}}, "'build_mixtures' is no command's block"),
        ({"seed": 1, "bso": True}, "Option 'bso' is not accepted"),  # flags alone, as ever
    ):
        system.write_text(yaml.safe_dump(changed))
        refused = run_script(script, "--config", system, "--tokenizer", "x", "--output_dir", tmp_path / "out")
        assert refused.returncode and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()


# --- Dry runs -------------------------------------------------------------------------------------
def test_every_stage_of_every_system_is_shown(dry_runs):
    """And every file of sbatch/ has its place in a chain."""
    files = set()
    for path in EVERY:
        shown, stages = dry_runs[path.stem], {stage.name: stage for stage in chain.chain(chain.System(path))}
        assert [*shown] == [*stages]
        for name, lines in shown.items():
            words = shlex.split(lines[0])
            files.add(re.search(r"sbatch/(\w+)\.sbatch", lines[0])[1])
            waits = [word for word in words if word.startswith("--dependency=afterok:")]
            named = re.findall(r"<(\w+)>", waits[0]) if waits else []
            assert named == [*stages[name].after] and [*shown].index(name) >= len(named), name
            tasks = stages[name].tasks
            assert (f"--array=0-{(tasks or 0) - 1}" in words) == bool(tasks)
            assert len(lines) - 1 >= (tasks or 1)
    assert files == {file.stem for file in REPO.glob("sbatch/*.sbatch")}
    assert [len(dry_runs[name]) for name in ("towerspeech_6b", "tiny", "tiny_ci")] == [33, 26, 20]


def test_options_of_slurm_reach_their_stage(dry_runs):
    """Nodes and processes too: 4 nodes of 8 GPUs are 4 copies of the model, over 8 GPUs each."""
    sbatch, command = dry_runs["towerspeech_6b"]["continued_pretraining"]
    assert "--nodes=4 --time=24:00:00 sbatch/continued_pretraining.sbatch" in sbatch
    assert "--nnodes 4" in command and "--nproc_per_node 8" in command
    assert "--replicate 4 --shard 8" in command
    assert "--replicate 8 --shard 1" in dry_runs["tinyllama_10b"]["continued_pretraining"][1]


def test_systems_share_what_they_name_alike(dry_runs):
    """Units with all, tokenizer and extended model with those of the same base."""

    def output(system: str, stage: str) -> list[str]:
        return re.findall(r"--output_dir (\S+)", "\n".join(dry_runs[system][stage][1:]))

    for stage in ("fit_kmeans", "label_mls_en"):
        assert len({tuple(output(name, stage)) for name in BUDGETS}) == 1
    made = {name: tuple(output(name, "train_bpe_tokenizer")) for name in BUDGETS}
    assert made["towerspeech_6b"] == made["towerspeech_8b"] and made["llamaspeech_6b"] == made["llama2_10b"]
    assert len(set(made.values())) == 3
    own = [folder for name in BUDGETS for stage in ("build_mixture", "score") for folder in output(name, stage)]
    assert len(set(own)) == 2 * len(BUDGETS)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_command_that_is_shown_is_parsed_by_its_script(dry_runs, path):
    """Tasks of label_audio differ in their shard alone, so one of them speaks for all."""
    commands = []
    for name, (_, *lines) in dry_runs[path.stem].items():
        if name.startswith("label_"):
            alike = {re.sub(r"--shard \d+$", "--shard 0", line) for line in lines}
            assert len(alike) == 1 and [int(line.split()[-1]) for line in lines] == [*range(len(lines))]
            lines = [*alike]
        commands += map(shlex.split, lines)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for words, flags in zip(commands, pool.map(chain.parsed, commands), strict=True):
            script, own = chain.script_of(words)
            for flag, value in re.findall(r"--(\w+) (\S+)", " ".join(own)):
                if flag != "config":
                    assert value in str(flags[flag]), (script, flag)


def test_a_mistake_in_a_block_shows_before_anything_is_submitted(tmp_path):
    blocks = read(REPO / "systems/tiny.yaml")
    for block, key, value, message in (
        ("generate", "max_tokens", 5, "generate.py refuses its flags: .*'max_tokens' is not accepted"),
        ("continued_pretraining", "learning_rate", -1, "continued_pretraining/train.py refuses its flags"),
        ("train_bpe", "num_units", 99, "num_units differs in fit_kmeans and train_bpe"),
        ("continued_pretraining", "keep_steps", [], "block 'continued_pretraining' does not say keep_steps"),
        ("build_sft_data", "parallel", ["a b.jsonl"], "build_sft_data.parallel holds 'a b.jsonl'"),
    ):
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump({**blocks, block: {**blocks[block], key: value}}))
        told = subprocess.run(
            ["bash", REPO / "sbatch/submit_pipeline.sh", changed, "--dry_run"], capture_output=True, text=True
        )
        assert told.returncode == 1 and re.search(message, told.stderr), (told.stderr, told.stdout)
        assert "Traceback" not in told.stderr and not told.stdout
