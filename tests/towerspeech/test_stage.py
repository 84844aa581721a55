"""Stages: done or resume, refusals, locks, SIGKILL, full disks; atomic files; hashes; the command line."""

import errno
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import psutil
import pytest

from towerspeech.command import UserError
from towerspeech.files import check_exists, hash_file, locked, publish, read_json, write_json
from towerspeech.stage import hash_path, stage

ROOT = Path(__file__).parents[2]
# Writes 20 parts, one a file; what is there already it keeps. In the middle of part STOP_IN it waits for a line on
# standard input. Prints what it does.
SLOW = textwrap.dedent("""
    import os
    import sys
    from pathlib import Path

    from towerspeech.command import run
    from towerspeech.stage import stage


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
                    if os.environ.get("STOP_IN") == str(i):
                        sys.stdin.readline()
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
    with stage(output_dir, {"output_dir": output_dir, **arguments}, inputs=inputs, part=part) as work:
        if work.done:
            return "done"
        name = f"{part}.txt" if part else "a.txt"
        with work.publish(name) as path:
            path.write_text(content)
        return "resumed" if work.resumed else "new"


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


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(UserError, match="none does not exist\n.*check --source"):
        write(tmp_path / "out", source=tmp_path / "none", inputs=["source"])
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty is empty"):
        write(tmp_path / "out", source=[tmp_path / "empty"], inputs=["source"])
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_no_input(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--output_dir is also --source: out"):
        write(out, source=[out / "a.txt", Path("out")], inputs=["source"], overwrite=True)
    assert (out / "a.txt").read_text() == "x"


def test_arguments_that_change_no_output_are_settings(tmp_path):
    """And those that decide the last steps alone may change until these are done."""

    def attempt(finish: bool, **arguments) -> bool:
        with stage(tmp_path / "out", arguments, ignore=["workers"], late=["steps"]) as work:
            if not work.done:
                (tmp_path / "out/a.txt").write_text("a")
                if not finish:
                    raise KeyError
            return work.done or work.resumed

    for seed, steps, workers in ((1, 10, 1), (1, 20, 2)):
        with pytest.raises(KeyError):
            attempt(False, seed=seed, steps=steps, workers=workers)
    with pytest.raises(UserError, match="was begun by another run: seed was 1, now 2\n"):
        attempt(True, seed=2, steps=20, workers=3)
    assert attempt(True, seed=1, steps=30, workers=3)
    assert info(tmp_path / "out")["arguments"] == {"seed": 1, "steps": 30}
    assert info(tmp_path / "out")["settings"] == {"workers": 3}
    with pytest.raises(UserError, match="was written by another run: steps was 30, now 20\n"):
        attempt(True, seed=1, steps=20, workers=3)
    assert attempt(True, seed=1, steps=30, workers=4) and info(tmp_path / "out")["settings"] == {"workers": 3}


def test_outputs_are_all_files_but_logs_checkpoints_and_notes(tmp_path):
    out = tmp_path / "out"
    with stage(out, {}) as work:
        for name in ("b.txt", "sub/c.txt", "checkpoint-5/d.txt", "sub/checkpoint-5/e.txt", "f.log", "sub/.g", ".h"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("a")
        work.counts["files"] = 7
    sha256 = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    assert info(out)["outputs"] == dict.fromkeys(("b.txt", "sub/c.txt", "sub/checkpoint-5/e.txt"), sha256)
    assert info(out)["counts"] == {"files": 7}


def test_who_is_asked_to_stop_is_asked_once(tmp_path):
    with stage(tmp_path / "out", {}) as work:
        assert not work.asked_to_stop()
        (tmp_path / "out/.stop").touch()
        assert work.asked_to_stop() and not work.asked_to_stop()


def test_a_failure_leaves_no_run_info_and_can_be_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), stage(out, {}) as work, work.publish("a.txt") as path:
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


def test_a_part_leaves_alone_what_another_is_writing(tmp_path):
    out = tmp_path / "out"
    with stage(out, {}, part="de-en") as work, work.publish("de-en.txt") as path:
        path.write_text("whole")
        (out / ".de-en.note").write_text("progress")
        for overwrite in (False, True):
            assert write(out, part="en-de", overwrite=overwrite, seed=int(overwrite)) == "new"
        assert (out / ".de-en.note").read_text() == "progress"
    assert (out / "de-en.txt").read_text() == "whole"


# --- Killed ---------------------------------------------------------------------------------------
def start(command: list[str], part: int) -> subprocess.Popen:
    """Start, and return when the process waits in the middle of writing this part."""
    environment = {**os.environ, "STOP_IN": str(part)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env=environment)
    for line in process.stdout:
        if line == f"writing {part}\n":
            return process
    raise AssertionError(f"it ended before part {part}, with status {process.wait()}")


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()


def test_killed_half_way_and_run_again(tmp_path, slow):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*slow, "--output_dir", str(whole)], check=True, capture_output=True)
    kill(start([*slow, "--output_dir", str(killed)], 4))
    assert {path.name for path in killed.glob("[!.]*")} == {f"{i}.txt" for i in range(4)}
    assert len(list(killed.glob(".tmp-4.txt-*"))) == 1
    refused = subprocess.run([*slow, "--output_dir", str(killed), "--parts", "7"], capture_output=True, text=True)
    assert refused.returncode == 1 and "parts was 20, now 7" in refused.stderr
    kill(start([*slow, "--output_dir", str(killed)], 6))
    again = subprocess.run([*slow, "--output_dir", str(killed)], check=True, capture_output=True, text=True)
    assert again.stdout.split("\n")[0] == "writing 6"  # it was being written when it was killed again
    assert info(killed)["outputs"] == info(whole)["outputs"]
    assert [(killed / f"{i}.txt").read_text() for i in range(20)] == [f"data {i}" for i in range(20)]
    assert not list(killed.glob(".tmp-*")) and not list(killed.glob(".unfinished*"))
    last = subprocess.run([*slow, "--output_dir", str(killed), "--workers", "9"], capture_output=True, text=True)
    assert last.stdout == f"already done: {killed}\n"


def test_another_scripts_output_is_never_overwritten(tmp_path, slow):
    """Neither finished nor begun: the name of another script's folder is a slip of the finger."""
    finished, begun = tmp_path / "finished", tmp_path / "begun"
    subprocess.run([*slow, "--output_dir", str(finished), "--parts", "2"], check=True, capture_output=True)
    kill(start([*slow, "--output_dir", str(begun)], 2))
    for folder, said in ((finished, "written"), (begun, "begun")):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}
        assert len(before) >= 3
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"was {said} by another run: it is the output of scripts/slow\.py"):
                write(folder, overwrite=overwrite)
        assert {name: (folder / name).read_bytes() for name in before} == before


def test_what_has_written_nothing_yet_is_not_in_the_way(tmp_path, slow):
    """Another plan may take a folder over from an attempt that left nothing but a log."""
    kill(start([*slow, "--output_dir", str(tmp_path / "out")], 0))
    (tmp_path / "out/a.log").write_text("started")
    again = [*slow, "--output_dir", str(tmp_path / "out"), "--parts", "1"]
    subprocess.run(again, check=True, capture_output=True)
    assert info(tmp_path / "out")["arguments"]["parts"] == 1 and not (tmp_path / "out/a.log").exists()


# Replaces a finished folder by another plan's output, in a process of its own that kills itself before its n-th
# change of the file system: once for each n, until one gets through.
REPLACE = textwrap.dedent("""
    import os
    import shutil
    import signal
    import sys
    from pathlib import Path

    from towerspeech.stage import stage


    def write(output_dir: Path, seed: int, overwrite: bool) -> None:
        with stage(output_dir, locals()) as job:
            if job.done:
                return
            for name in ("checkpoint-1", "weights"):  # outputs are kept track of, but not what is in checkpoint-*
                if not (output_dir / name).is_dir():
                    with job.publish(name) as folder:
                        folder.mkdir()
                        (folder / "a").write_text(f"{name} of {seed}")
            if not (output_dir / "z.txt").is_file():
                with job.publish("z.txt") as path:
                    path.write_text(f"z of {seed}")


    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


    def kill_before(number: int) -> None:
        def hook(event: str, args: tuple) -> None:
            nonlocal number
            number -= event in CHANGES or event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
            if number < 0 and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


    if __name__ == "__main__":
        root, number, status = Path(sys.argv[1]), 0, -signal.SIGKILL
        write(root / "old", 1, False)
        while status == -signal.SIGKILL:
            shutil.copytree(root / "old", root / f"killed-{number}")
            child = os.fork()
            if not child:
                kill_before(number)
                write(root / f"killed-{number}", 2, True)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            number += 1
        print(number - 1, status)
""")


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds, but for what a stage notes of itself."""
    files = [path for path in folder.rglob("[!.]*") if path.is_file() and path.name != "run_info.json"]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_killed_at_any_moment_of_overwriting_it_is_neither_done_nor_mixed(tmp_path):
    script = tmp_path / "replace.py"
    script.write_text(REPLACE)
    ran = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    kills, status = map(int, ran.stdout.split())
    assert status == 0 and kills > 15, ran.stderr
    old, new = (
        {"checkpoint-1/a": f"checkpoint-1 of {seed}", "weights/a": f"weights of {seed}", "z.txt": f"z of {seed}"}
        for seed in (1, 2)
    )
    assert contents(tmp_path / "old") == old and contents(tmp_path / f"killed-{kills}") == new
    replace = runpy.run_path(str(script))["write"]
    unfinished = 0
    for number in range(kills):
        killed, again = tmp_path / f"killed-{number}", tmp_path / f"again-{number}"
        if (killed / "run_info.json").exists():
            assert contents(killed) == (old if info(killed)["arguments"]["seed"] == 1 else new), number
        else:
            unfinished += 1
        for seed, wanted in ((1, old), (2, new)):
            shutil.copytree(killed, again)
            try:
                replace(again, seed, False)
            except UserError as error:
                assert "seed was" in str(error)
            else:
                assert contents(again) == wanted, (number, seed)
            replace(again, seed, True)
            assert contents(again) == wanted and info(again)["arguments"] == {"seed": seed}, (number, seed)
            shutil.rmtree(again)
    assert unfinished > 10


# --- Locks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("wait", "seconds"), [("1", 1), ("0", 0), (None, 60)])
def test_a_second_writer_is_told_who_holds_the_folder(tmp_path, slow, monkeypatch, wait, seconds):
    """After a wait, which is counted on a clock that goes on by itself."""
    slept = []
    clock = types.SimpleNamespace(time=time.time, monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr("towerspeech.files.time", clock)
    if wait is None:
        monkeypatch.delenv("TOWERSPEECH_LOCK_WAIT_S")
    else:
        monkeypatch.setenv("TOWERSPEECH_LOCK_WAIT_S", wait)
    holder = start([*slow, "--output_dir", str(tmp_path / "out")], 1)
    try:
        with pytest.raises(UserError, match=rf"out is being written by host .+, pid {holder.pid}\n"):
            write(tmp_path / "out")
    finally:
        kill(holder)
    assert seconds <= sum(slept) <= seconds + 1
    with pytest.raises(UserError, match="it is the output of"):  # the kernel dropped the lock with its holder
        write(tmp_path / "out")


def test_a_second_writer_waits_for_the_first(tmp_path, slow, monkeypatch):
    monkeypatch.setenv("TOWERSPEECH_LOCK_WAIT_S", "60")
    command = [*slow, "--output_dir", str(tmp_path / "out"), "--parts", "3"]
    first = start(command, 1)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lock = str(tmp_path / "out/.folder.lock")
    while lock not in [file.path for file in psutil.Process(second.pid).open_files()]:
        assert second.poll() is None  # until it has the lock's file open, but not the lock
    assert first.communicate("go on\n")[0] == "writing 2\n" and first.returncode == 0
    assert second.communicate()[0] == f"already done: {tmp_path / 'out'}\n" and second.returncode == 0


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
    with stage(tmp_path / "out", {}) as work, work.publish() as folder:
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
    listing = b"sub/f 0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5"  # sha256sum of "same"
    assert hash_path(tmp_path / "x") == hashlib.sha256(listing).hexdigest()
    (tmp_path / "y/sub/f").rename(tmp_path / "y/sub/g")
    assert hash_path(tmp_path / "x") != hash_path(tmp_path / "y")
    (tmp_path / "x/sub/f").write_text("Same")
    assert hash_path(tmp_path / "x") != hashlib.sha256(listing).hexdigest()


def test_a_finished_folders_hash_is_that_of_its_outputs_alone(tmp_path):
    """So that seconds, paths and versions in run_info.json do not make it another input."""
    for name in ("x", "y"):
        write(tmp_path / name, note=name)
    assert hash_path(tmp_path / "x") == hash_path(tmp_path / "y")
    write(tmp_path / "z", content="other")
    assert hash_path(tmp_path / "z") != hash_path(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "'b' is missing"),
        (b"[1]", "an object is wanted, got list"),
        (b'{"a": ', "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"", "is empty"),
    ],
)
def test_wrong_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json:? {message}.*\n  -> run it") as caught:
        read_json(tmp_path / "a.json", "run it", ["a", "b"])
    assert "Traceback" not in str(caught.value)


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
    with told as caught, stage(disk / "out", {}) as work, work.publish("a") as path:
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
