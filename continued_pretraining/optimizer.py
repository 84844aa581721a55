"""AdamW, and its learning rate at each step."""

import math
from typing import Literal

import torch


def learning_rate_at(
    step: int,
    steps: int,
    peak: float,
    *,
    warmup_steps: int,
    decay: Literal["cosine", "linear"],
    decay_steps: int,
    final_share: float,
) -> float:
    """The learning rate of a step, which counts from 0.

    It rises linearly to the peak, stays there, and falls in the last ``decay_steps`` (or those that the warm-up
    leaves) to ``final_share`` of it: in half a cosine, or in a line.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    begin = max(warmup_steps, steps - decay_steps)
    if step < begin:
        return peak
    progress = (step - begin) / max(1, steps - 1 - begin)
    left = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_share + (1 - final_share) * left)


def make_optimizer(network, learning_rate: float, betas: tuple[float, float], weight_decay: float):
    """AdamW; vectors (norms, biases) do not decay."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )
