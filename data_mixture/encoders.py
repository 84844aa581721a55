"""Processes that make tokens of tasks, while one reads: results come in the order of the tasks."""

import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_mixture.documents import Made, Maker, Task
from towerspeech.ahead import ahead
from towerspeech.errors import UserError

HERE = 2048  # items that are done here before processes are started, which takes a second or two

_maker: Maker  # of a process


def _start(state: Path) -> None:
    global _maker

    def leave_with_parent() -> None:  # else a process whose parent was killed would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
    with open(state, "rb") as file:
        _maker = pickle.load(file)


def _make(task: Task) -> Made:
    return _maker(task)


def few(tasks: Iterator[Task]) -> Iterator[Task]:
    """The first tasks, up to HERE items or the task that goes beyond."""
    items = 0
    while items < HERE and (task := next(tasks, None)) is not None:
        items += len(task.items)
        yield task


class Encoders:
    """Some processes, started when there is work for them; one is this process and a thread.

    What they need goes through a file of ``folder``: through their pipes, they would start one after another.
    """

    def __init__(self, maker: Maker, num_processes: int = 1, folder: Path | None = None):
        self.maker, self.num_processes = maker, num_processes
        self.state = folder and folder / ".maker"
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)
        if self.state:
            self.state.unlink(missing_ok=True)  # a killed run's, too

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
            with open(self.state, "wb") as file:
                pickle.dump(self.maker, file)
            self.pool = ProcessPoolExecutor(self.num_processes, context, _start, (self.state,))
        try:
            yield from ahead(self.pool, _make, itertools.chain([first], rest), limit=2 * self.num_processes)
        except BrokenProcessPool:
            raise UserError(
                "a process that encodes was ended from outside (out of memory?)",
                "lower --num_processes or give more memory, and run this again: what is done stays",
            ) from None
