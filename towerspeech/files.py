"""Files that appear whole or not at all, locks that die with their holder, content hashes, JSON objects."""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from towerspeech.errors import UserError, space_needed

BLOCK = 1 << 20  # bytes read at a time
PACKED = (".gz", ".zst")  # endings of files that are unpacked as they are read


def sync(path: Path) -> None:
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
                    sync(path)
                if target.is_dir():  # a rename cannot replace a folder that holds files
                    remove(target)
            else:
                sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder: whole or gone, never half, whenever this is killed."""
    if path.is_dir():
        gone = path.with_name(f".tmp-{path.name.removeprefix('.tmp-')}-{os.urandom(4).hex()}")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _unpacking(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    """What an open file holds, unpacked if its name ends in .gz or .zst; UserError if it is cut short or damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(file) as plain:
                yield plain
        elif path.suffix == ".zst":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as plain:
                yield io.BufferedReader(plain, BLOCK)
        else:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        if path.suffix not in PACKED:
            raise
        raise UserError(f"{path} is cut short or damaged ({error})", "fetch or pack it again") from None


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked if its name ends in .gz or .zst.

    Raises:
        UserError: What is packed is cut short or damaged, also where this shows only while it is read.
    """
    with open(path, "rb") as file, _unpacking(path, file) as plain:
        yield plain


def unpacked_size(path: Path, looked_at: int = 1 << 25) -> float:
    """A file's size in bytes when unpacked, which is estimated from how well so many of its first bytes are packed.

    Raises:
        UserError: As ``open_plain``.
    """
    size = path.stat().st_size
    if path.suffix not in PACKED:
        return size
    with open(path, "rb") as file, _unpacking(path, file) as plain:
        found = 0
        while found < looked_at and (block := plain.read(BLOCK)):
            found += len(block)
        return found if found < looked_at else found * size / file.tell()


def cut_torn_line(path: Path) -> None:
    """Cut off what a killed run left of the last line of a file that lines are appended to."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def write_json(target: Path, value: dict) -> None:
    """Write one JSON object atomically."""
    with publish(target) as path:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


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


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
