"""Stages: done or resume, refusals, locks, SIGKILL, hashes."""

import hashlib
import os
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

from tests.towerspeech.conftest import info, write
from towerspeech.errors import UserError
from towerspeech.files import hash_file, locked
from towerspeech.stage import hash_path, stage

ROOT = Path(__file__).parents[2]


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
        with stage(__file__, tmp_path / "out", arguments, ignore=["workers"], late=["steps"]) as work:
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
    with stage(__file__, out, {}) as work:
        for name in ("b.txt", "sub/c.txt", "checkpoint-5/d.txt", "sub/checkpoint-5/e.txt", "f.log", "sub/.g", ".h"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("a")
        work.counts["files"] = 7
    sha256 = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    assert info(out)["outputs"] == dict.fromkeys(("b.txt", "sub/c.txt", "sub/checkpoint-5/e.txt"), sha256)
    assert info(out)["counts"] == {"files": 7}


def test_who_is_asked_to_stop_is_asked_once(tmp_path):
    with stage(__file__, tmp_path / "out", {}) as work:
        assert not work.asked_to_stop()
        (tmp_path / "out/.stop").touch()
        assert work.asked_to_stop() and not work.asked_to_stop()


def test_a_failure_leaves_no_run_info_and_can_be_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), stage(__file__, out, {}) as work, work.publish("a.txt") as path:
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
    with stage(__file__, out, {}, part="de-en") as work, work.publish("de-en.txt") as path:
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
        with stage(__file__, output_dir, locals()) as job:
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


def test_a_stage_publishes_files_from_a_folder(tmp_path):
    with stage(__file__, tmp_path / "out", {}) as work, work.publish() as folder:
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
