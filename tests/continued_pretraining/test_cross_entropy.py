"""The loss by chunks against torch's own, whose logits stand whole."""

import pytest
import torch

from continued_pretraining import cross_entropy as module
from continued_pretraining.packing import IGNORE

TOKENS, WIDTH, ROWS, SCALE = 50, 24, 300, 8 / (576 * 2048)  # a step of 6B on 8 GPUs; no number of bfloat16


def plain(hidden, head, targets, scale):
    logits = hidden @ head.T
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORE)
    return losses.sum() * scale, losses.detach()


def run(function, hidden, head, targets) -> list[torch.Tensor]:
    """The total, the losses, and the gradients of three times the total."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    total, losses = function(hidden, head, targets, SCALE)
    (3 * total).backward()
    return [total.detach(), losses, hidden.grad, head.grad]


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, WIDTH, generator=generator) for size in (TOKENS, ROWS))
    targets = torch.randint(0, ROWS, (TOKENS,), generator=generator)
    targets[[0, 7, 8, 49]] = IGNORE
    return hidden, head, targets


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1024])
def test_loss_and_gradients_are_those_of_whole_logits(given, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    ours, theirs = run(module.cross_entropy, *given), run(plain, *given)
    assert not ours[1].requires_grad and (ours[1] == 0).nonzero()[:, 0].tolist() == [0, 7, 8, 49]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())
    assert (ours[2][[0, 7, 8, 49]] == 0).all() and ours[2][1].abs().sum() > 0
    with torch.no_grad():
        total, losses = module.cross_entropy(*given, SCALE)
    assert torch.equal(losses, ours[1]) and torch.equal(total, ours[0])


def test_without_any_target_nothing_moves(given):
    hidden, head, targets = given
    total, losses, *gradients = run(module.cross_entropy, hidden, head, torch.full_like(targets, IGNORE))
    assert total == 0 and not losses.any() and not any(gradient.any() for gradient in gradients)


def test_in_bfloat16_it_is_as_near_to_the_truth(given, monkeypatch):
    """Chunks add up in float32: no farther from float64's gradients than whole logits are."""
    monkeypatch.setattr(module, "CHUNK", 7)
    hidden, head, targets = given
    truth = run(plain, hidden.bfloat16().double(), head.bfloat16().double(), targets)
    ours = run(module.cross_entropy, hidden.bfloat16(), head.bfloat16(), targets)
    theirs = run(plain, hidden.bfloat16(), head.bfloat16(), targets)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == ours[3].dtype == torch.bfloat16
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        distance, limit = ((x.double() - true).norm() for x in (mine, other))
        assert distance <= 1.2 * limit + 1e-6 * true.norm()
        assert mine.double().norm().item() == pytest.approx(true.norm().item(), rel=5e-4)


def test_a_second_backward_pass_is_refused(given):
    """The gradients are kept once, and changed in place."""
    hidden, head, targets = given
    total, _ = module.cross_entropy(hidden.requires_grad_(), head, targets, SCALE)
    total.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        total.backward()


def test_logits_never_stand_whole(monkeypatch):
    """Of 4,096 tokens over 8,192 rows they would take 134 MB; no tensor that is made is larger than a chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                sizes.append(found.numel())
            return found

    sizes: list[int] = []
    monkeypatch.setattr(module, "CHUNK", 64)
    hidden, head = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    with Largest():
        module.cross_entropy(hidden, head, torch.zeros(4096, dtype=torch.int64), 1.0)[0].backward()
    assert max(sizes) == 64 * 8192
