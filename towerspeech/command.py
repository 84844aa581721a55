"""A command's line: a typed function's flags, a system's block, errors as one message; others' output goes to logs."""

import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from towerspeech.errors import UserError, space_needed


def run(function: Callable, settings: type | None = None, read: Callable[[str], dict | None] | None = None) -> None:
    """Make a typed function the script's command line; what the user can mend becomes one message, exit status 1.

    With ``settings``, a dataclass, its fields are the flags, and the function takes one such object. Values of a list
    argument follow its flag, as a shell's glob leaves them: ``--prompts a.jsonl b.jsonl``. ``--config`` takes a YAML
    of flags, or a system's (systems/<name>.yaml), of which the command takes its own block, or what ``read`` makes of
    the file; None means that it is no system's.
    """
    from jsonargparse import auto_cli

    from towerspeech.system import command_name, read_block

    read = read or functools.partial(read_block, name=command_name(Path(inspect.getfile(function))))
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
                args=_gather(_own_block(sys.argv[1:], read), lists),
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


def _own_block(words: list[str], read: Callable[[str], dict | None]) -> list[str]:
    """Put a command's own block in place of each ``--config`` that names a system's YAML."""
    given = []
    for number, word in enumerate(words):
        if word.startswith("--config="):
            config = word.removeprefix("--config=")
        elif words[number - 1 : number] == ["--config"]:
            config = word
        else:
            given.append(word)
            continue
        block = read(config)
        given.append(word if block is None else f"{word.removesuffix(config)}{json.dumps(block)}")
    return given


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
