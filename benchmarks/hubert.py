"""What labelling is measured on: utterances as long as LibriSpeech's, and an encoder of HuBERT-large's shape."""

from pathlib import Path

DIM = 1024


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
