"""What the user can mend: an error of one message, and a full disk as one."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 1 << 16  # a disk with less room than this is full


class UserError(Exception):
    """A mistake that the user can mend: what is wrong (and where), and what to do about it."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


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
