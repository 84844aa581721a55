"""What several benchmarks measure on: TinyLlama's shape and HuBERT-large's, utterances as long as LibriSpeech's."""

from pathlib import Path

DIM = 1024  # of HuBERT-large
TINYLLAMA = dict(  # of TinyLlama-1.1B, with 5,000 units and the padding
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=37_056,
)


def librispeech_lengths(count: int, seed: int = 0) -> list[float]:
    """Seconds like train-clean-360's: most between 12 and 16, the others spread from 1 to 12, few up to 35."""
    import numpy as np

    rng = np.random.default_rng(seed)
    kinds = rng.random(count)
    most, short, long = rng.uniform(12, 16.5, count), rng.uniform(1.3, 12, count), rng.uniform(16.5, 35, count)
    return np.where(kinds < 0.68, most, np.where(kinds < 0.99, short, long)).tolist()


def write_encoder(folder: Path, layer: int) -> None:
    """An encoder with HuBERT-large's shape up to a layer, and random weights."""
    import torch
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    shape = {"hidden_size": DIM, "num_hidden_layers": layer, "num_attention_heads": 16, "intermediate_size": 4096}
    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    HubertModel(HubertConfig(**shape, **large)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
