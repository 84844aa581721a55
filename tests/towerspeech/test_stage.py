"""Stages: done or resume, refusals, locks, SIGKILL, full disks; atomic files; hashes; the command line."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from towerspeech.stage import (
    UserError,
    check_exists,
    hash_file,
    hash_path,
    locked,
    publish,
    stage,
    write_json,
)

ROOT = Path(__file__).parents[2]
# Writes 20 parts, one a file, 0.1 s each; what is there already it keeps. Prints what it did.
SLOW = textwrap.dedent("""
    import time
    from pathlib import Path

    from towerspeech.stage import run, stage


    def slow(source: Path, output_dir: Path, parts: int = 20, workers: int = 1, names: list[Path] | None = None,
             overwrite: bool = False) -> None:
        with stage(output_dir, locals(), inputs=["source"], ignore=["workers"]) as job:
            if job.done:
                return
            for i in range(parts):
                if (output_dir / f"{i}.txt").is_file():
                    continue
                with job.publish(f"{i}.txt") as path, open(path, "w") as file:
                    file.write(source.read_text())
                    file.flush()
                    print("writing", i, flush=True)
                    time.sleep(0.1)
                    file.write(str(i))
            job.counts["parts"] = parts


    if __name__ == "__main__":
        run(slow)
""")


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setenv("TOWERSPEECH_LOCK_WAIT_S", "1")


@pytest.fixture
def slow(tmp_path):
    """The script's command line, and its input."""
    script = tmp_path / "scripts" / "slow.py"
    script.parent.mkdir()
    script.write_text(SLOW)
    (tmp_path / "source.txt").write_text("data ")
    return [sys.executable, str(script), "--source", str(tmp_path / "source.txt")]


def write(output_dir: Path, content="x", inputs=(), part="", **arguments) -> str:
    """A stage that writes one file; returns what it found."""
    with stage(output_dir, {"output_dir": output_dir, **arguments}, inputs=inputs, part=part) as job:
        if job.done:
            return "done"
        name = f"{part}.txt" if part else "a.txt"
        with job.publish(name) as path:
            path.write_text(content)
        return "resumed" if job.resumed else "new"


def info(folder: Path, name="run_info.json") -> dict:
    return json.loads((folder / name).read_text())


# --- Done -----------------------------------------------------------------------------------------
def test_run_info_says_what_was_done(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("input")
    assert write(tmp_path / "out", source=source, inputs=["source"], seed=3, overwrite=False) == "new"
    found = info(tmp_path / "out")
    assert found["stage"] == "towerspeech/test_stage.py"
    assert found["arguments"] == {"seed": 3}
    assert found["inputs"] == {"source": [hash_file(source)]} and found["paths"] == {"source": [str(source)]}
    assert found["outputs"] == {"a.txt": hash_file(tmp_path / "out/a.txt")}
    assert {"commit", "versions", "counts", "seconds", "command"} <= set(found)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".folder.lock", "a.txt", "run_info.json"]


def test_done_again_says_so_and_touches_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    write(out, seed=3)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*")}
    assert write(out, content="y", seed=3) == "done"
    assert capsys.readouterr().out == f"already done: {out}\n"
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*")} == before


def test_other_arguments_are_refused_by_name(tmp_path):
    out, source = tmp_path / "out", tmp_path / "in.txt"
    source.write_text("one")
    write(out, source=source, inputs=["source"], seed=3)
    with pytest.raises(UserError, match="seed was 3, now 4\n.*--overwrite true"):
        write(out, source=source, inputs=["source"], seed=4)
    with pytest.raises(UserError, match="style was None, now 'chat'"):
        write(out, source=source, inputs=["source"], seed=3, style="chat")
    source.write_text("two")
    with pytest.raises(UserError, match="the content of source differs"):
        write(out, source=source, inputs=["source"], seed=3)
    assert (out / "a.txt").read_text() == "x"


def test_an_input_moved_elsewhere_is_the_same_input(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "in.txt").write_text("same")
        found = write(tmp_path / "out", source=tmp_path / name, inputs=["source"])
    assert found == "done"


def test_overwrite_replaces_all(tmp_path):
    out = tmp_path / "out"
    write(out, seed=3)
    (out / "old").mkdir()
    (out / "old" / "file").write_text("of the first run")
    assert write(out, content="y", seed=4, overwrite=True) == "new"
    assert (out / "a.txt").read_text() == "y" and not (out / "old").exists()
    assert write(out, seed=4, overwrite=True) == "done"


def test_a_lost_output_is_named(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out/a.txt").unlink()
    with pytest.raises(UserError, match="a.txt is gone"):
        write(tmp_path / "out")
    assert write(tmp_path / "out", overwrite=True) == "new"


def test_foreign_folders_and_files_are_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="already holds thesis.tex, which this stage did not write"):
            write(out, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "precious"
    with pytest.raises(UserError, match="is a file, but an output folder is wanted"):
        write(out / "thesis.tex")


def test_another_scripts_output_is_refused(tmp_path, slow):
    subprocess.run([*slow, "--output_dir", str(tmp_path / "out"), "--parts", "1"], check=True, capture_output=True)
    with pytest.raises(UserError, match=r"it is the output of scripts/slow\.py"):
        write(tmp_path / "out")


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(UserError, match="none does not exist\n.*check --source"):
        write(tmp_path / "out", source=tmp_path / "none", inputs=["source"])
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty is empty"):
        write(tmp_path / "out", source=[tmp_path / "empty"], inputs=["source"])
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_no_run_info_and_can_be_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), stage(out, {}) as job, job.publish("a.txt") as path:
        path.write_text("half")
        _ = 1 / 0
    assert [path.name for path in out.glob("[!.]*")] == []
    assert not list(out.glob(".tmp-*"))
    assert write(out) == "resumed"


# --- Parts ----------------------------------------------------------------------------------------
def test_parts_share_a_folder(tmp_path, capsys):
    out = tmp_path / "out"
    assert [write(out, part=part, seed=i) for i, part in enumerate(("de-en", "en-de"))] == ["new", "new"]
    assert write(out, part="de-en", seed=0) == "done"
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed was 1, now 2"):
        write(out, part="en-de", seed=2)
    write(out, part="en-de", seed=2, content="new", overwrite=True)
    assert (out / "de-en.txt").read_text() == "x" and (out / "en-de.txt").read_text() == "new"
    assert info(out, "en-de.run_info.json")["outputs"] == {"en-de.txt": hash_file(out / "en-de.txt")}


# --- Killed ---------------------------------------------------------------------------------------
def start(command: list[str], parts: int) -> subprocess.Popen:
    """Start, and return in the middle of writing part number ``parts``."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(parts + 1):
        process.stdout.readline()
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_killed_half_way_and_run_again(tmp_path, slow):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*slow, "--output_dir", str(whole)], check=True, capture_output=True)
    kill(start([*slow, "--output_dir", str(killed)], 4))
    assert {path.name for path in killed.glob("[!.]*")} == {f"{i}.txt" for i in range(4)}
    assert len(list(killed.glob(".tmp-4.txt-*"))) == 1
    refused = subprocess.run([*slow, "--output_dir", str(killed), "--parts", "7"], capture_output=True, text=True)
    assert refused.returncode == 1 and "parts was 20, now 7" in refused.stderr
    kill(start([*slow, "--output_dir", str(killed)], 2))
    again = subprocess.run([*slow, "--output_dir", str(killed)], check=True, capture_output=True, text=True)
    assert again.stdout.split("\n")[0] == "writing 6"  # the sixth was being written when it was killed again
    assert info(killed)["outputs"] == info(whole)["outputs"]
    assert not list(killed.glob(".tmp-*")) and not list(killed.glob(".unfinished*"))
    last = subprocess.run([*slow, "--output_dir", str(killed), "--workers", "9"], capture_output=True, text=True)
    assert last.stdout == f"already done: {killed}\n"


def test_killed_while_overwriting_is_never_taken_for_done(tmp_path):
    """The first thing that an overwriting run does is to take the old run_info away."""
    out = tmp_path / "out"
    write(out, seed=1)
    os.replace(out / "run_info.json", out / ".unfinished.json")  # as left by a kill right after that
    assert write(out, seed=2, overwrite=True) == "new"
    assert info(out)["arguments"] == {"seed": 2}


# --- Locks ----------------------------------------------------------------------------------------
def test_a_second_writer_is_told_who_holds_the_folder(tmp_path, slow):
    holder = start([*slow, "--output_dir", str(tmp_path / "out"), "--parts", "100"], 1)
    try:
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"out is being written by host .+, pid {holder.pid}\n"):
            write(tmp_path / "out")
        assert 1 <= time.monotonic() - started < 5
    finally:
        kill(holder)
    with pytest.raises(UserError, match="it is the output of"):  # the kernel dropped the lock with its holder
        write(tmp_path / "out")


def test_a_second_writer_waits_for_the_first(tmp_path, slow, monkeypatch):
    monkeypatch.setenv("TOWERSPEECH_LOCK_WAIT_S", "60")
    command = [*slow, "--output_dir", str(tmp_path / "out"), "--parts", "5"]
    first = start(command, 1)
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == f"already done: {tmp_path / 'out'}\n"
    assert first.wait() == 0
    first.stdout.close()


def test_the_lock_names_the_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    holder = f"pid {os.getpid()}, job 4711"
    with locked(tmp_path / "a.lock"), pytest.raises(UserError, match=holder), locked(tmp_path / "a.lock"):
        pass
    with locked(tmp_path / "a.lock"):
        pass


# --- Files ----------------------------------------------------------------------------------------
def test_publish_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with publish(target) as path:
        path.write_text("one")
        assert path.parent == target.parent and not target.exists()
    with pytest.raises(ValueError), publish(target) as path:
        path.write_text("half")
        raise ValueError
    assert target.read_text() == "one" and list(target.parent.iterdir()) == [target]
    for content in ("one", "two"):
        with publish(tmp_path / "folder") as path:
            path.mkdir()
            (path / content).write_text(content)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


def test_a_stage_publishes_files_from_a_folder(tmp_path):
    with stage(tmp_path / "out", {}) as job, job.publish() as folder:
        for name in "ab":
            (folder / name).write_text(name)
    assert sorted(info(tmp_path / "out")["outputs"]) == ["a", "b"]
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_hashes(tmp_path):
    (tmp_path / "a").write_text("a")
    assert hash_file(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert hash_path(tmp_path / "a") == hash_file(tmp_path / "a")
    for name in ("x", "y"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text("same")
        (tmp_path / name / ".lock").write_text(name)
    assert hash_path(tmp_path / "x") == hash_path(tmp_path / "y")
    (tmp_path / "y/sub/f").rename(tmp_path / "y/sub/g")
    assert hash_path(tmp_path / "x") != hash_path(tmp_path / "y")


def test_a_finished_folders_hash_is_that_of_its_outputs_alone(tmp_path):
    """So that seconds, paths and versions in run_info.json do not make it another input."""
    for name in ("x", "y"):
        write(tmp_path / name, note=name)
    assert hash_path(tmp_path / "x") == hash_path(tmp_path / "y")
    write(tmp_path / "z", content="other")
    assert hash_path(tmp_path / "z") != hash_path(tmp_path / "x")


def test_write_json_and_check_exists(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1]}
    check_exists(tmp_path, "x")
    with pytest.raises(UserError, match="b.json does not exist\n  -> run it"):
        check_exists(tmp_path / "b.json", "run it")


def test_quiet_sends_childrens_output_to_the_log(tmp_path):
    script = """
        import subprocess, sys
        from pathlib import Path
        from towerspeech.stage import quiet
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
    with told as caught, stage(disk / "out", {}) as job, job.publish("a") as path:
        writer(path)
    assert len(str(caught.value).splitlines()) == 2
    assert sorted(path.name for path in (disk / "out").rglob("*")) == [".folder.lock", ".unfinished.json"]


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
