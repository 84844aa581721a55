"""How much a token costs to train on, and how much of it a card can do in a second."""

# Dense bfloat16, in 1e12 floating-point operations a second, by what torch.cuda.get_device_name says; the first that
# fits counts. From NVIDIA's data sheets, whose larger figures are with sparsity.
PEAK_TFLOPS = {
    "A100": 312,
    "L40S": 362,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
}


def flops_a_token(network, length: int) -> int:
    """Floating-point operations of forward and backward pass for a token, in windows of ``length`` tokens.

    As in PaLM (arXiv 2204.02311, appendix B): 6 for each weight of a matrix product and 12 x layers x width x length
    for attention, of which a causal one does half. The lookup of an embedding costs nothing; what is computed again
    does not count.
    """
    head, config = network.lm_head.weight, network.config
    weights = sum(parameter.numel() for parameter in network.model.layers.parameters() if parameter.dim() > 1)
    width = config.num_attention_heads * network.model.layers[0].self_attn.head_dim
    return 6 * (weights + head.numel()) + 6 * config.num_hidden_layers * width * length


def peak_tflops(card: str) -> float | None:
    """The peak of a card by its name; None if it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)
