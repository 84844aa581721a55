"""The systems' YAMLs: every block is its command's own, budgets are what was published, and --config takes a block."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from towerspeech.command import is_command, read_block
from towerspeech.errors import UserError
from towerspeech.languages import LANGUAGES

REPO = Path(__file__).resolve().parent.parent
SYSTEMS = sorted((REPO / "systems").glob("*.yaml"))
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


BLOCKS = [(path, block) for path in SYSTEMS for block in read(path)]


@pytest.mark.parametrize(("path", "block"), BLOCKS, ids=[f"{path.stem}-{block}" for path, block in BLOCKS])
def test_each_block_is_taken_whole_by_its_command(path, block):
    """By its own parser, with the values that stand there; what it does not know, it refuses."""
    taken = run_script(script_of(block), "--config", path.relative_to(REPO), "--print_config")
    assert taken.returncode == 0, taken.stderr
    given, wanted = yaml.safe_load(taken.stdout), read(path)[block]
    if block == "build_mixture":
        wanted["sources"] = [{"max_epochs": 1.0, **source} for source in wanted["sources"]]
    for name, value in wanted.items():
        assert given[name] == value, name


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_budgets_and_steps(path):
    system = read(path)
    sources = system["build_mixture"]["sources"]
    speech, text = BUDGETS[path.stem]
    assert sum(source["budget"] for source in sources if source["kind"] == "speech") == speech
    of_text = [source for source in sources if source["kind"] != "speech"]
    assert sum(source["budget"] for source in of_text) == pytest.approx(text, rel=1e-7)
    mono = {Path(file).stem for source in of_text if source["kind"] == "text" for file in source["paths"]}
    pairs = {Path(file).stem for source in of_text if source["kind"] == "parallel" for file in source["paths"]}
    languages = {"en", "de"} if path.stem in ("tinyllama_10b", "llama2_10b") else set(LANGUAGES)
    assert mono == languages
    assert pairs == {pair for code in languages - {"en"} for pair in (f"en-{code}", f"{code}-en")}

    training = system["continued_pretraining"]
    steps = math.ceil((speech + text) / (training["global_batch_size"] * training["sequence_length"]))
    assert training["keep_steps"] == PUBLISHED_STEPS.get(path.stem, training["keep_steps"])
    assert max(training["keep_steps"]) < steps
    assert f"in {steps:,} steps" in path.read_text(encoding="utf-8")
    assert training["warmup_share"] * steps == pytest.approx(13, abs=0.5)
    assert system["merge_tokenizer"]["base"] == system["extend_model"]["model"]
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
    for path in SYSTEMS:
        text = path.read_text(encoding="utf-8")
        for said in ("# Sources:", "not published", "our default", "Hardware assumed", "# Each command takes its own"):
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
        ({"score": {"model": "x"}}, "has no block 'build_mixture'"),
        ({"seed": 1, "bso": True}, "Option 'bso' is not accepted"),  # flags alone, as ever
    ):
        system.write_text(yaml.safe_dump(changed))
        refused = run_script(script, "--config", system, "--tokenizer", "x", "--output_dir", tmp_path / "out")
        assert refused.returncode and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()


def test_what_is_a_block_and_what_a_file_of_flags(tmp_path, system):
    assert read_block(system, "score") == {"model": "x"}
    with pytest.raises(UserError, match="has no block 'generate'\n.*build_mixture, score"):
        read_block(system, "generate")
    flags = tmp_path / "flags.yaml"
    for text in (
        "metrics: [bleu]\n",
        "sft: {max_length: 5}\n",
        "checkpoints: [a]\nunits: [b]\n",
        "- a\n",
        "a: [\n",
        "",
    ):
        flags.write_text(text)
        assert read_block(flags, "score") is None
    assert read_block(tmp_path / "nowhere.yaml", "score") is None
    assert is_command("instruction_tuning") and is_command("generate_ASR")
    for name in ("sft", "nothing", "units", "packing", "train_bpe_tokenizer"):  # the library's modules, a room's
        assert not is_command(name)
