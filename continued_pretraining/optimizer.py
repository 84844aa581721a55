"""AdamW, and its learning rate at each step."""

import math

import torch


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """Linear warm-up, then half a cosine to ``final_share`` of the peak; ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


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
