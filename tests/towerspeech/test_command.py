"""Errors that are one message, the command line, full disks, other people's output in a log."""

import errno
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.towerspeech.conftest import info, write
from towerspeech.errors import UserError
from towerspeech.files import publish
from towerspeech.stage import stage

ROOT = Path(__file__).parents[2]


# --- The command line -----------------------------------------------------------------------------
def test_user_errors_are_one_message(tmp_path, slow):
    command = [*slow[:2], "--source", "nowhere", "--output_dir", str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: nowhere does not exist\n  -> check --source\n"


@pytest.mark.parametrize("flags", [["--part", "3"], ["--prts", "3"], ["--parts", "3k"], ["--overwrite", "maybe"]])
def test_wrong_flags_are_refused(tmp_path, slow, flags):
    failed = subprocess.run([*slow, "--output_dir", str(tmp_path / "out"), *flags], capture_output=True, text=True)
    assert failed.returncode not in (0, 1) and not (tmp_path / "out").exists()


def test_lists_follow_their_flag(tmp_path, slow):
    command = [*slow, "--names", "a b.txt", "2", "ü", "--parts", "1", "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    assert info(tmp_path / "out")["arguments"] == {"names": ["a b.txt", "2", "ü"], "parts": 1}


def test_quiet_sends_childrens_output_to_the_log(tmp_path):
    script = """
        import subprocess, sys
        from pathlib import Path
        from towerspeech.command import quiet
        with quiet(Path("logs/a.log")) as terminal:
            subprocess.run([sys.executable, "-c", "print('chatter')"], check=True)
            print("more chatter")
            print("progress", file=terminal)
        print("after")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("after\n", "progress\n")
    assert (tmp_path / "logs/a.log").read_text() == "chatter\nmore chatter\n"


# --- No space left --------------------------------------------------------------------------------
@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount"):
        pytest.skip("there is no mount command, so no disk to fill")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted to be filled: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes of a disk; returns the file that takes the others."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    assert shutil.disk_usage(disk).free == left
    return filler


def write_safetensors(path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((512, 512))}, path)


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = random.Random(0).randbytes(1 << 20)
    pq.write_table(pa.table({"a": [noise[i : i + 64] for i in range(0, len(noise), 64)]}), path)


def write_plot(path):
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().imshow(np.random.default_rng(0).random((900, 900)))
    figure.savefig(path, format="png", dpi=150)


def write_torch_checkpoint(path):
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.zeros(1 << 19)}, checkpoint_id=path, no_dist=True)


def write_model(path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).save_pretrained(path)


def write_tokenizer(path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"word{i}": i for i in range(1 << 16)}, "word0")).save(str(path))


def write_over_quota(path):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


WRITERS = [write_safetensors, write_parquet, write_plot, write_torch_checkpoint, write_model, write_tokenizer]


@pytest.mark.parametrize("writer", [*WRITERS, write_over_quota], ids=lambda writer: writer.__name__)
def test_no_space_left_whichever_library_finds_out(disk, writer):
    fill(disk, 1 << 16)
    told = pytest.raises(UserError, match="no space left for .*disk/out/a: .*\n  -> make room")
    with told as caught, stage(__file__, disk / "out", {}) as work, work.publish("a") as path:
        writer(path)
    assert len(str(caught.value).splitlines()) == 2
    assert sorted(path.name for path in (disk / "out").rglob("*")) == [".folder.lock", ".unfinished.json"]


def test_other_errors_are_not_for_want_of_space(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), ValueError("no"), UserError("no")):
        with pytest.raises(type(error)) as caught, publish(tmp_path / "a") as path:
            path.write_text("half")
            raise error
        assert caught.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [0, 4096, 8192])
def test_no_space_for_the_notes(disk, left):
    """Pages of 4096 bytes: for nothing, for the lock, for lock and note."""
    fill(disk, left)
    with pytest.raises(UserError, match="no space left for .*disk/out"):
        write(disk / "out")
    assert all(path.name.startswith(".") and ".tmp-" not in path.name for path in (disk / "out").rglob("*"))
    (disk / "filler").unlink()
    assert write(disk / "out") in ("new", "resumed")


@pytest.mark.parametrize(
    ("script", "left"),
    [("train_bpe", 8192), ("train_bpe", 24576), ("extend_model", 65536), ("extend_model", "its weights")],
)
def test_a_script_without_space(request, disk, tmp_path, script, left):
    if script == "extend_model":
        base, tokenizer, done = map(request.getfixturevalue, ("base_model_dir", "tokenizer_dir", "model_dir"))
        flags = ["--model", base, "--tokenizer", tokenizer]
        left = left if left != "its weights" else -(-(done / "model.safetensors").stat().st_size // 4096 + 4) * 4096
    else:
        units = request.getfixturevalue("make_units")(tmp_path / "units")
        flags = ["--units", units, "--num_units", 50, "--vocab_size", 60]
    command = list(map(str, [sys.executable, ROOT / f"train_bpe_tokenizer/{script}.py", *flags, "--output_dir"]))
    filler = fill(disk, left)
    failed = subprocess.run([*command, str(disk / "out")], capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert f"error: no space left for {disk / 'out'}" in failed.stderr and "-> make room" in failed.stderr
    assert not list(disk.rglob(".tmp-*")) and not list(disk.rglob("run_info.json"))
    elsewhere = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert elsewhere.returncode == 0, elsewhere.stderr
    for path in (disk / "out").glob("[!.]*"):  # nothing, or what had been finished
        assert path.suffix == ".log" or path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path
    filler.unlink()
    subprocess.run([*command, str(disk / "out")], check=True, capture_output=True)
    assert info(disk / "out")["outputs"] == info(tmp_path / "out")["outputs"]
