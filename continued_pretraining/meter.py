"""What a run takes of the machine since the last line of its log: seconds, speed, memory."""

import contextlib
import resource
import time
from collections.abc import Iterator

from continued_pretraining.flops import peak_tflops


class Meter:
    """The clocks of a process, and what all of them hold."""

    def __init__(self, device: str, dtype: str, flops_a_token: int, peak: float | None):
        """``peak`` of a device is in 1e12 operations a second; if it is not given, that of a GPU may be known."""
        import torch

        if peak is None and device == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(), dtype)
        self.device, self.flops_a_token, self.peak = device, flops_a_token, peak
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self.seconds = dict.fromkeys(("data", "validation", "saving"), 0.0)
        self.since = time.monotonic()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that is spent within to that of ``name``."""
        began = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - began

    def read(self, tokens: int) -> dict:
        """What train.log tells of it, for so many tokens of all processes, which call this together."""
        import torch.distributed as dist

        whole = time.monotonic() - self.since
        speed = round(tokens / (whole - self.seconds["validation"] - self.seconds["saving"]))
        found = {"tokens_per_s": speed}
        if self.peak is not None:
            found["mfu"] = round(speed * self.flops_a_token / (self.peak * 1e12 * dist.get_world_size()), 4)
        seconds = {name: round(spent, 3) for name, spent in {**self.seconds, "all": whole}.items()}
        return {**found, "memory_gb": self.peak_memory_gb(), "seconds": seconds}

    def peak_memory_gb(self) -> float:
        """The most that any process has held so far, in 1e9 bytes: of its GPU's memory, or as resident memory."""
        import torch
        import torch.distributed as dist

        if self.device == "cuda":
            peak = torch.cuda.max_memory_reserved()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        box = torch.tensor([peak / 1e9], device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return round(box.item(), 3)
