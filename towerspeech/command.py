"""A command's errors and its command line: what the user can mend becomes one message."""

import contextlib
import errno
import inspect
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 1 << 16  # a disk with less room than this is full


class UserError(Exception):
    """A mistake that the user can mend: what is wrong (and where), and what to do about it."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


def run(function: Callable, settings: type | None = None) -> None:
    """Make a typed function the script's command line; what the user can mend becomes one message, exit status 1.

    With ``settings``, a dataclass, its fields are the flags, and the function takes one such object. Values of a list
    argument follow its flag, as a shell's glob leaves them: ``--prompts a.jsonl b.jsonl``. ``--config`` takes a YAML
    of flags, or a system's (systems/<name>.yaml), of which the command takes its own block.
    """
    from jsonargparse import auto_cli

    flags = settings or function
    lists = {f"--{name}" for name, kind in inspect.get_annotations(flags).items() if "list[" in str(kind)}
    description = inspect.getdoc(sys.modules[function.__module__])
    try:
        with space_needed():
            filled = auto_cli(
                flags,
                as_positional=False,
                allow_abbrev=False,
                description=description,
                args=_gather(_own_block(sys.argv[1:], Path(inspect.getfile(function))), lists),
            )
            if settings:
                function(filled)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        sys.exit(1)


def _gather(words: list[str], lists: set[str]) -> list[str]:
    """Turn ``--flag a b`` into ``--flag ["a", "b"]`` for the flags of ``lists``."""
    gathered: list[str] = []
    for are_flags, group in itertools.groupby(words, lambda word: word.startswith("--")):
        values = list(group)
        if not are_flags and gathered and gathered[-1] in lists and not values[0].startswith("["):
            values = [json.dumps(values)]  # jsonargparse makes numbers of them where numbers are wanted
        gathered += values
    return gathered


def _own_block(words: list[str], script: Path) -> list[str]:
    """Put a command's own block in place of each ``--config`` that names a system's YAML.

    A block is called as its command is; the two train.py as their folders.
    """
    name, given = script.parent.name if script.stem == "train" else script.stem, []
    for number, word in enumerate(words):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif words[number - 1 : number] == ["--config"]:
            path = word
        else:
            given.append(word)
            continue
        block = read_block(Path(path), name)
        given.append(word if block is None else f"{word.removesuffix(path)}{json.dumps(block)}")
    return given


def read_block(path: Path, name: str) -> dict | None:
    """A command's block of a system's YAML; None if the file holds flags, or is jsonargparse's to refuse.

    Raises:
        UserError: A system's YAML without such a block, or with one of no command.
    """
    import yaml

    try:
        blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(blocks, dict) or not any(isinstance(blocks[key], dict) and is_command(key) for key in blocks):
        return None
    for key in blocks:
        if not is_command(key):
            raise UserError(f"{path}: {key!r} is no command's block", f"blocks are called as commands are: {name}")
    if name not in blocks:
        raise UserError(f"{path} has no block {name!r}", f"it has: {', '.join(blocks)}")
    return blocks[name]


def is_command(name: object) -> bool:
    """Whether a system's YAML may have a block of this name: a script that is run, or a folder of a train.py."""
    scripts = [*ROOT.glob(f"*/{name}.py"), *ROOT.glob(f"{name}/train.py")]
    return any('__name__ == "__main__"' in script.read_text(encoding="utf-8") for script in scripts)


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
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, UserError) or not no_space(error, folder):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no space left{f' for {where}' if where else ''}: {said[-1]}",
            "make room on that disk (or quota) and run this again, or write to another one",
        ) from error


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
