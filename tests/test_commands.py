"""The commands as users type them: quick --help, wrong flags refused, and a README that names real ones. And CI's."""

import ast
import functools
import graphlib
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "speech_units/make_manifest.py",
    "speech_units/fit_kmeans.py",
    "speech_units/label_audio.py",
    "speech_units/kmeans_report.py",
    "speech_units/import_kmeans.py",
    "speech_units/import_units.py",
    "speech_units/export_units.py",
    "train_bpe_tokenizer/train_bpe.py",
    "train_bpe_tokenizer/merge_tokenizer.py",
    "train_bpe_tokenizer/extend_model.py",
    "data_mixture/build_mixture.py",
    "continued_pretraining/plan.py",
    "continued_pretraining/train.py",
    "continued_pretraining/export_checkpoint.py",
    "continued_pretraining/megatron_arguments.py",
    "continued_pretraining/import_megatron.py",
    "instruction_tuning/build_sft_data.py",
    "instruction_tuning/train.py",
    "instructions/build_instructions.py",
    "generate/generate.py",
    "generate/generate_ASR.py",
    "results/score.py",
    "results/compare.py",
    "results/summarize.py",
    "results/published/score_published.py",
    "systems/run.py",
    "sbatch/submit_pipeline.py",
    "sbatch/status.py",
)


SMALL = {"jsonargparse", "yaml", "docstring_parser", "typeshed_client", "typing_extensions", "attr", "attrs", "numpy"}


def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, REPO / script, *arguments], cwd=REPO, capture_output=True, text=True)


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a script's --help lists."""
    found = call(script, "--help")
    assert found.returncode == 0, found.stderr
    options = found.stdout.split("\noptions:", 1)[1]
    return frozenset(re.findall(r"(?<![\w-])--[A-Za-z_][\w.]*", options))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_big_library_and_works_from_any_folder(script, tmp_path):
    """Without them it takes a fraction of a second."""
    command = [sys.executable, "-X", "importtime", REPO / script, "--help"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"usage: {Path(script).name}")
    modules = set(re.findall(r"(?m)^import time:.*\| +([\w.]+)$", found.stderr))
    installed = {name.split(".")[0] for name in modules} & metadata.packages_distributions().keys()
    assert "jsonargparse" in installed and installed <= SMALL | {"towerspeech", "_distutils_hack"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_and_abbreviated_flags_are_refused(script):
    flag = max(sorted(flag for flag in flags_of(script) if "." not in flag), key=len)
    for wrong in ("--no_such_flag", flag[:-1], f"--{flag[3:]}"):
        found = call(script, wrong, "x")
        assert found.returncode == 2
        assert f"unrecognized arguments: {wrong}" in found.stderr
        assert "Traceback" not in found.stderr


# --- README ---------------------------------------------------------------------------------------
def fenced(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of these languages."""
    return re.findall(rf"^ *```(?:{'|'.join(languages)}) *\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def problems(text: str) -> list[str]:
    """What is wrong with the commands and the Python in a Markdown text: files and flags that there are not."""
    found = []
    for block in fenced(text, "bash", "sh", "console"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            script = None
            for word in words:
                if word in ("|", "||", "&&", "&", ";", ">") or word.endswith(";"):
                    script = None
                elif word.endswith((".py", ".sh", ".sbatch")) and not word.startswith("-"):
                    script = word
                    if not (REPO / word).is_file():
                        found.append(f"{word} does not exist: {line.strip()}")
                        script = None
                elif script and script.endswith(".py") and word.startswith("--"):
                    known = word.split("=")[0].rstrip("+") in flags_of(script)
                    found += [] if known else [f"{script} has no {word}: {line.strip()}"]
    for block in fenced(text, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "towerspeech":
                code = f"from {node.module} import {', '.join(name.name for name in node.names)}"
                imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                if imported.returncode:
                    found.append(f"{code}: {imported.stderr.splitlines()[-1]}")
    return found


READMES = sorted(
    path for pattern in ("README.md", "[!.]*/*.md", "results/published/*.md") for path in REPO.glob(pattern)
)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPO)))
def test_readme_names_only_files_and_flags_that_exist(path):
    readme = path.read_text(encoding="utf-8")
    assert fenced(readme, "bash", "sh", "console")
    assert problems(readme) == []
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (path.parent / target).exists(), f"{path} links to {target}, which does not exist"


def test_every_stage_has_a_readme_that_shows_each_of_its_commands():
    for script in SCRIPTS:
        readme = REPO / Path(script).parent / "README.md"
        assert Path(script).name in readme.read_text(encoding="utf-8"), f"{readme} does not name {script}"


def test_readme_check_finds_what_is_wrong():
    wrong = "python generate/generate.py --checkpoints a \\\n  --no_such b | tee x  # --comment\nbash none.sh"
    assert [problem.split(":")[0] for problem in problems(f"```bash\n{wrong}\n```")] == [
        "generate/generate.py has no --no_such",
        "none.sh does not exist",
    ]
    assert len(problems("```python\nfrom towerspeech.units import no_such_name\n```")) == 1
    right = "torchrun --nproc_per_node 2 continued_pretraining/train.py --dtype=float32"
    assert problems(f"```bash\n{right}\n```") == []


# --- Continuous integration -----------------------------------------------------------------------
SKIPPING = """
import pytest

def test_runs():
    pass

@pytest.mark.skipif(True, reason="TOWERSPEECH_TEST_DATA is not set")
def test_marked():
    pass

def test_in_its_body():
    pytest.skip("no disk can be mounted to be filled")

@pytest.fixture
def slurm():
    pytest.skip("no slurmctld")

def test_in_a_fixture(slurm):
    pass

@pytest.mark.skipif(True, reason="torch sees no CUDA device on this machine")
def test_on_a_gpu():
    pass

@pytest.mark.xfail
def test_that_is_known_to_fail():
    raise AssertionError
"""


def test_ci_lets_nothing_skip_but_what_needs_another_machine(tmp_path):
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed, 5 skipped, 1 xfailed" in done.stdout  # the plugin makes the difference
    (options,) = re.findall(r"(?m)^bash tests/run.sh (.*)$", (REPO / ".ci/run").read_text())
    command += [*shlex.split(options), "--continue-on-collection-errors"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) .*?(test_some.py::\w+|test_whole.py)", done.stdout)
    assert sorted(failed) == [
        "test_some.py::test_in_a_fixture",
        "test_some.py::test_in_its_body",
        "test_some.py::test_marked",
        "test_whole.py",
    ]
    assert "1 passed, 1 skipped, 1 xfailed" in re.sub(r"\d+ failed, |, \d+ errors?", "", done.stdout)
    assert "may not skip here: Skipped: no slurmctld" in done.stdout


# --- The house's imports --------------------------------------------------------------------------
def imports_of(path: Path) -> set[str]:
    """The repo's own modules that a file imports anywhere, dotted: towerspeech.files, results.plots."""
    own = {str(file.relative_to(REPO))[:-3].replace("/", ".") for file in python_files()}
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports have one form, from the repo's root"
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & own


def python_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=REPO, capture_output=True)
    return [path for name in listed.stdout.decode().split() if (path := REPO / name).is_file()]


def is_command(path: Path) -> bool:
    """Whether a file is one that is run: its last statement says so (a docstring may quote that line)."""
    *_, last = ast.parse(path.read_text(encoding="utf-8")).body or [None]
    return isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def test_nothing_outside_the_tests_imports_a_command_or_edits_the_path_and_the_library_imports_no_stage():
    commands = {str(path.relative_to(REPO))[:-3].replace("/", ".") for path in python_files() if is_command(path)}
    assert len(commands) > 25
    for path in python_files():
        name = path.relative_to(REPO)
        imported = imports_of(path)
        assert path == Path(__file__) or not re.search(r"sys\.path\b", path.read_text(encoding="utf-8")), name
        if name.parts[0] != "tests":
            assert not imported & commands, f"{name} imports a command"
        if name.parts[0] == "towerspeech":
            assert all(module.startswith("towerspeech.") for module in imported), f"{name} imports a stage"


def test_no_module_imports_itself_over_others():
    graph = {str(path.relative_to(REPO))[:-3].replace("/", "."): imports_of(path) for path in python_files()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle
