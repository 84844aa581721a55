"""The loss by source: of training, and of a mixture's held-out documents."""

import math

from continued_pretraining.packing import Mixture
from towerspeech.processes import Processes

NEVER = 1 << 62  # a step that does not come


class Losses:
    """Sums of losses by source, over several steps and all processes.

    Attributes:
        targets: Tokens of each source whose losses have been added, on all processes, (num_sources,) int64.
    """

    def __init__(self, data: Mixture, device: str):
        self.data, self.device = data, device
        self.clear()

    def clear(self) -> None:
        import torch

        self.targets = self.data.num_targets(range(0))
        self.sums = torch.zeros(len(self.data.names), dtype=torch.float64, device=self.device)  # of this process
        self.first_bad = torch.full_like(self.sums, NEVER)  # the step in which a source's sum ceased to be finite

    def add(self, numbers: range, losses) -> None:
        """Add the losses of this process's windows of these numbers, (windows,)."""
        for number, loss in zip(numbers, losses, strict=True):
            if number < self.data.num_windows:  # others fill a batch up
                self.sums[self.data.owner[number]] += loss

    def end_step(self, step: int, numbers: range) -> None:
        """Count the targets of the windows that all processes had in a step."""
        import torch

        self.targets += self.data.num_targets(numbers)
        known = self.first_bad < step
        self.first_bad = torch.where(self.sums.isfinite() | known, self.first_bad, float(step))

    def means(self) -> tuple[float, dict[str, float], list[str]]:
        """The mean over all targets, that of each source that has some, and the sources that were not finite first.

        All processes call this together.
        """
        import torch.distributed as dist

        sums, first_bad = self.sums.clone(), self.first_bad.clone()
        dist.all_reduce(sums)
        dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        first = first_bad.min().item()
        rows = list(zip(self.data.names, sums.tolist(), self.targets.tolist(), first_bad.tolist(), strict=True))
        by_source = {name: total / targets for name, total, targets, _ in rows if targets}
        bad = [name for name, *_, step in rows if step == first < NEVER]
        return sums.sum().item() / int(self.targets.sum()), by_source, bad


def validate(network, held_out: Mixture, micro_batch_size: int, processes: Processes, device: str) -> dict[str, float]:
    """The mean loss of each source's held-out documents; all processes take their share.

    Documents are packed as in training. Every token is a target, but for each source's first.
    """
    import torch
    from tqdm import tqdm

    losses, share = Losses(held_out, device), micro_batch_size * processes.world
    network.eval()
    starts = range(0, held_out.num_windows, share)
    with torch.no_grad():
        for start in tqdm(starts, desc="validate", unit=" batches", leave=False, disable=processes.rank > 0):
            first = start + processes.rank * micro_batch_size
            own = range(first, first + micro_batch_size)
            inputs, targets = (torch.from_numpy(part).to(device) for part in held_out.batch(own))
            losses.add(own, network.window_losses(inputs, targets, 1.0)[1])
    losses.end_step(0, range(held_out.num_windows))
    network.reshard()  # what the last layers gathered
    network.train()
    return losses.means()[1]


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; e^700 for those beyond, which no number would hold."""
    return math.exp(min(loss, 700.0))
