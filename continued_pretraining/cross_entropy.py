"""The loss of many tokens without all of their logits at once.

The logits of 2,048 tokens over 37,056 rows take 304 MB in float32, and so do their gradients. Here some tokens at a
time get their logits, their losses and the gradients of these, all in the forward pass: the same three matrix products
as ever, and no logits are kept. (Liger's fused linear cross-entropy, arXiv 2410.10989, has this idea on GPUs.)
"""

import torch

from continued_pretraining.packing import IGNORE

CHUNK = 1024  # tokens whose logits stand at once


def chunks(hidden):
    """Slices of the tokens."""
    return [slice(start, start + CHUNK) for start in range(0, len(hidden), CHUNK)]


def log_probabilities(hidden, head):
    """(tokens, rows) float32, for (tokens, width) and (rows, width)."""
    return torch.log_softmax(hidden @ head.T, dim=1, dtype=torch.float32)


def losses_of(log_probs, targets):
    """The loss of each token, (tokens,) float32; 0 where there is no target."""
    wanted = targets != IGNORE
    return torch.where(wanted, -log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)


class _Mean(torch.autograd.Function):
    """The losses' sum times ``scale``, with its gradient; and the losses, which have none."""

    @staticmethod
    def forward(ctx, hidden, head, targets, scale):
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for part in chunks(hidden):
            log_probs = log_probabilities(hidden[part], head)
            losses[part] = losses_of(log_probs, targets[part])
            # The gradient of a loss by its logits is the probabilities, less 1 for the target.
            by_logits = log_probs.exp_()
            by_logits[torch.arange(len(by_logits), device=hidden.device), targets[part].clamp(min=0)] -= 1
            by_logits = by_logits.to(hidden.dtype)
            wanted = (targets[part] != IGNORE).to(hidden.dtype)[:, None]  # cheaper here than on all rows
            torch.mul(by_logits @ head, wanted, out=hidden_grad[part])
            if hidden.dtype == torch.float32:
                head_grad.addmm_(by_logits.T, hidden[part] * wanted)
            else:
                head_grad += by_logits.T @ (hidden[part] * wanted)
        hidden_grad *= scale  # a Python number, which bfloat16 does not round before it multiplies
        head_grad *= scale
        ctx.grads, ctx.head_dtype = (hidden_grad, head_grad), head.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx, grad, _):
        hidden_grad, head_grad = ctx.grads
        del ctx.grads  # they are changed in place: good for one use
        return hidden_grad.mul_(grad), head_grad.mul_(grad).to(ctx.head_dtype), None, None


def cross_entropy(hidden, head, targets, scale: float):
    """The sum of the tokens' losses times ``scale``, to be differentiated once, and the losses, (tokens,) float32.

    Args:
        hidden: What the last layer gives, (tokens, width).
        head: The output embeddings, (rows, width).
        targets: (tokens,) int64; IGNORE counts nothing.
        scale: What the sum is multiplied with.
    """
    if torch.is_grad_enabled():
        return _Mean.apply(hidden, head, targets, scale)
    losses = torch.cat([losses_of(log_probabilities(hidden[part], head), targets[part]) for part in chunks(hidden)])
    return losses.sum() * scale, losses
