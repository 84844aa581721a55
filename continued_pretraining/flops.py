"""How much a token costs to train on, and how much of it a card can do in a second."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: GiB of memory, and TFLOP/s of dense matrix products."""

    memory: float
    bfloat16: float
    float32: float  # not TF32, which train.py does not switch on


# By what torch.cuda.get_device_name says, in lower case; the first that is in it counts. From NVIDIA's data sheets,
# whose larger figures are with sparsity.
CARDS = {
    "a100": Card(80, 312, 19.5),
    "h100 pcie": Card(80, 756, 51),
    "h100 nvl": Card(94, 835, 60),
    "h100": Card(80, 989, 67),
    "h200 nvl": Card(140, 835, 60),  # 141e9 bytes
    "h200": Card(140, 989, 67),
}


def peak_tflops(name: str, dtype: str) -> float | None:
    """The peak of a card in a number format; None if the card is not known."""
    card = next((card for known, card in CARDS.items() if known in name.lower()), None)
    return card and getattr(card, dtype)


def flops_a_token(network, length: int) -> int:
    """Floating-point operations of forward and backward pass for a token, in windows of ``length`` tokens.

    As in PaLM (arXiv 2204.02311, appendix B): 6 for each weight of a matrix product and 12 x layers x width x length
    for attention, of which a causal one does half. The lookup of an embedding costs nothing; what is computed again
    does not count.
    """
    import torch

    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Linear))
    width = network.config.num_attention_heads * network.model.layers[0].self_attn.head_dim
    return 6 * weights + 6 * network.config.num_hidden_layers * width * length
