"""Processes that make tokens of tasks, while one reads: results come in the order of the tasks."""

import itertools
import mmap
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import reduction
from typing import Any

from data_mixture.documents import Made, Maker, Task
from towerspeech.ahead import ahead
from towerspeech.errors import UserError

HERE = 1 << 18  # bytes of items that are done here before processes are started, which takes a second or two

_maker: Maker  # of a process


class Given:
    """What all processes are given when they start, through one file that has no name.

    Through their pipes, which hold little, each would start only after the last had imported what it needs.
    """

    def __init__(self, value: Any):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (processes start as long as this lives)
        pickle.dump(value, self.file)
        self.file.flush()

    def __reduce__(self) -> tuple:
        return _taken, (reduction.DupFd(self.file.fileno()),)


def _taken(descriptor) -> Any:
    """The value of Given, in another process."""
    with open(descriptor.detach(), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return pickle.loads(mapped)  # not read: processes share the place in the file


def _start(maker: Maker) -> None:
    global _maker

    def leave_with_parent() -> None:  # else a process whose parent was killed would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
    _maker = maker


def _make(task: Task) -> Made:
    return _maker(task)


def few(tasks: Iterator[Task]) -> Iterator[Task]:
    """The first tasks, up to HERE bytes or the task that goes beyond."""
    size = 0
    while size < HERE and (task := next(tasks, None)) is not None:
        size += task.size
        yield task


class Encoders:
    """Some processes, started when there is work for them; one is this process and a thread."""

    def __init__(self, maker: Maker, num_processes: int):
        self.maker, self.num_processes = maker, num_processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def map(self, tasks: Iterable[Task]) -> Iterator[Made]:
        """Make tokens of tasks, in their order.

        Raises:
            UserError: A process was killed.
        """
        rest = iter(tasks)
        with ThreadPoolExecutor(1) as thread:  # works while the next task is read
            here = rest if self.num_processes == 1 else [] if self.pool else few(rest)
            yield from ahead(thread, self.maker, here, limit=1)
        if (first := next(rest, None)) is None:
            return
        if not self.pool:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.num_processes, context, _start, (Given(self.maker),))
        try:
            yield from ahead(self.pool, _make, itertools.chain([first], rest), limit=2 * self.num_processes)
        except BrokenProcessPool:
            raise UserError(
                "a process that encodes was ended from outside (out of memory?)",
                "lower --num_processes or give more memory, and run this again: what is done stays",
            ) from None
