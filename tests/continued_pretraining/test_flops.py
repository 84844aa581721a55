"""The operations of a token against torch's own counter, on transformers' model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from continued_pretraining.flops import flops_a_token, peak_tflops

WINDOWS, LENGTH = 3, 48


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied):
    """Matrix products to the last one; attention, of which a causal one does half, by whole scores in plain torch."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    network, tokens = LlamaForCausalLM(config), torch.ones((WINDOWS, LENGTH), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        network(input_ids=tokens, labels=tokens).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    attention = 6 * 3 * 32 * LENGTH
    assert (flops_a_token(network, LENGTH) - attention) * tokens.numel() == counted[torch.ops.aten.mm]
    # Beside attention only the angles of the positions are batched products.
    assert 2 * attention * tokens.numel() == pytest.approx(counted[torch.ops.aten.bmm], rel=1e-3)


def test_llama_2_7b_has_the_operations_that_are_known():
    """6 x 6.607e9 for matrices (without the embeddings), and 6 x 32 x 4096 x 4096 for attention at 4,096 tokens."""
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, vocab_size=32_000))
    assert flops_a_token(network, 4096) / 1e9 == pytest.approx(39.64 + 3.22, abs=0.01)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA RTX A4000", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_cards(card, peak):
    assert peak_tflops(card, "bfloat16") == peak
    assert peak is None or peak_tflops(card, "float32") < peak / 10
