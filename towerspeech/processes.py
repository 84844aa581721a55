"""Processes that act as one: they join, agree, stop and leave together. Also a process alone is such a team."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from towerspeech.errors import UserError


class Processes:
    """The processes that torchrun started, or this one alone.

    Attributes:
        rank: The number of this process; the first one, 0, decides for all, writes and prints.
        world: How many there are.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.joined = False

    def join(self, device: str) -> None:
        """Make them one process group of torch.distributed, for tensors on ``device`` (cpu or cuda) and on the CPU."""
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # objects and files are agreed on over gloo
        if "RANK" in os.environ:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.joined = True

    def agree(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Do something on the first process alone; returns what it gives there, and None on the others.

        Raises:
            UserError: The action raised it. It ends all processes.
        """
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except UserError as raised:
                error = raised
        if self.agree(error is not None):
            self.stop(error)
        return result

    def stop(self, error: UserError | None) -> NoReturn:
        """End all processes: the first one raises the error, which says it for all; the others exit with status 1."""
        self.leave()
        if self.rank:
            sys.exit(1)
        raise error

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.joined:
            import torch.distributed as dist

            dist.barrier()

    def leave(self) -> None:
        """Leave the group together: a process that goes first takes its connections from under the others."""
        if self.joined:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()
            self.joined = False
