"""A script that is a stage, for the tests of stages and of command lines."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from towerspeech.stage import stage

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
        with stage(__file__, output_dir, locals(), inputs=["source"], ignore=["workers"]) as work:
            if work.done:
                return
            for i in range(parts):
                if (output_dir / f"{i}.txt").is_file():
                    continue
                with work.publish(f"{i}.txt") as path, open(path, "w") as file:
                    file.write(source.read_text())
                    file.flush()
                    print("writing", i, flush=True)
                    if os.environ.get("STOP_IN") == str(i):
                        sys.stdin.readline()
                    file.write(str(i))
            work.counts["parts"] = parts


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
    with stage(
        "towerspeech/test_stage.py", output_dir, {"output_dir": output_dir, **arguments}, inputs=inputs, part=part
    ) as work:
        if work.done:
            return "done"
        name = f"{part}.txt" if part else "a.txt"
        with work.publish(name) as path:
            path.write_text(content)
        return "resumed" if work.resumed else "new"


def info(folder: Path, name="run_info.json") -> dict:
    return json.loads((folder / name).read_text())
