"""Time training and labelling on one GPU, in each way that there is: speed, MFU, memory.

Usage: python -m benchmarks.bench_gpu
       python -m benchmarks.bench_gpu --device cpu   # small: only to see that it runs

Needs PyTorch, transformers and accelerate, and no data; towerspeech need not be installed. Compares
  training   whole steps (forward, backward, AdamW) of TinyLlama-1.1B's shape with 37,056 rows and random weights, by
             train.py's own functions: 4 windows of 2,048 tokens at once, bfloat16; eager and compiled, with each kind
             of activation checkpointing, beside the plain way: eager, nothing computed again, logits that stand whole
  labelling  an encoder of HuBERT-large's shape up to layer 22, and 5,000 centroids: batches by length as those of
             label_audio.py, beside one utterance at a time
and ends with one JSON line a comparison: seconds, tokens/s or times real time, MFU, and the most memory that PyTorch
has reserved, in 1e9 bytes. Each way of training runs in a process of its own; one may be out of memory.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measure import apart, comparison, report
from benchmarks.shapes import DIM, TINYLLAMA, librispeech_lengths, write_encoder

SMALL = TINYLLAMA | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
LENGTH, WINDOWS, WARM_UP, STEPS = 2048, 4, 3, 10
LAYER, NUM_UNITS, UTTERANCES, SAMPLE_RATE = 22, 5000, 400, 16_000
RECOMPUTED = ("none", "selective", "full")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def reserved_gb(device: str) -> float | None:
    """The largest memory that PyTorch has reserved on the GPU, in 1e9 bytes."""
    import torch

    return round(torch.cuda.max_memory_reserved() / 1e9, 2) if device == "cuda" else None


# --- Training -------------------------------------------------------------------------------------
def whole_logits(network, inputs, targets, scale: float):
    """As ``window_losses``, with all logits at once."""
    import torch

    logits = network.lm_head(network.model(input_ids=inputs, use_cache=False).last_hidden_state).float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.sum() * scale, losses.detach()


def train(device: str, shape: dict, length: int, compiled: bool, recomputed: str, whole: bool) -> dict:
    """Median seconds of a step, and what goes with them; {} if the memory does not suffice."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaConfig

    from continued_pretraining import network as networks
    from continued_pretraining.flops import flops_a_token, peak_tflops
    from continued_pretraining.optimizer import make_optimizer
    from towerspeech.processes import Processes

    processes = Processes()
    processes.join(device)
    if whole:
        networks.window_losses = whole_logits
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, max_position_embeddings=length, tie_word_embeddings=False).save_pretrained(folder)
        network = networks.empty_network(Path(folder))
    networks.recompute(network, recomputed)
    mesh = init_device_mesh(device, (1, 1), mesh_dim_names=("replicate", "shard"))
    networks.divide(network, mesh, "bfloat16", compiled)
    networks.allocate(network, device)
    torch.manual_seed(0)
    for weight in network.parameters():
        torch.nn.init.normal_(weight.to_local(), std=0.02) if weight.dim() > 1 else torch.nn.init.ones_(weight)
    optimizer = make_optimizer(network.train(), 1e-5, (0.9, 0.95), 0.1)
    tokens = torch.randint(0, shape["vocab_size"], (WINDOWS, length + 1), device=device)
    seconds, losses = [], []
    try:
        for _ in range(WARM_UP + STEPS):
            synchronize(device)
            began = time.perf_counter()
            loss, _ = network.window_losses(tokens[:, :-1], tokens[:, 1:], 1 / (WINDOWS * length))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
            losses.append(loss.item())
    except torch.OutOfMemoryError:
        return {}
    step = statistics.median(seconds[WARM_UP:])
    found = {"seconds": step, "losses": losses, "tokens_per_s": round(WINDOWS * length / step)}
    peak = peak_tflops(torch.cuda.get_device_name(), "bfloat16") if device == "cuda" else None
    found["mfu"] = peak and round(found["tokens_per_s"] * flops_a_token(network, length) / (peak * 1e12), 3)
    processes.leave()
    return {**found, "memory_gb": reserved_gb(device)}


def training(device: str) -> list[dict]:
    """Each way beside the plain one."""
    shape, length = (TINYLLAMA, LENGTH) if device == "cuda" else (SMALL, 64)
    _, plain = apart(train, device, shape, length, False, "none", True)
    print(f"plain: {plain or 'out of memory'}", flush=True)
    lines = []
    for compiled, recomputed in itertools.product((False, True), RECOMPUTED):
        name = f"training: {'compiled' if compiled else 'eager'}, computed again: {recomputed}"
        _, found = apart(train, device, shape, length, compiled, recomputed, False)
        print(f"{name}: {found or 'out of memory'}", flush=True)
        if found and plain:
            facts = {key: found[key] for key in ("tokens_per_s", "mfu", "memory_gb")}
            facts |= {"plain_mfu": plain["mfu"], "plain_memory_gb": plain["memory_gb"]}
            pairs = list(zip(found["losses"], plain["losses"], strict=True))
            same = sum(abs(a - b) <= 2e-3 * abs(b) for a, b in pairs) / len(pairs)  # bfloat16 has 8 bits
            lines.append(comparison(name, found["seconds"], plain["seconds"], same=same, unit="s a step", **facts))
        else:
            lines.append({"name": name, "ours": found.get("seconds"), "theirs": plain.get("seconds"), "same": None})
    return lines


# --- Labelling ------------------------------------------------------------------------------------
def label(device: str, layer: int, utterances: int) -> dict:
    """Seconds of both ways, seconds of audio, and the share of utterances with the same units."""
    import numpy as np

    from speech_units.features import BATCH_SECONDS, Encoder, encoder_config, prepare
    from speech_units.kmeans import Nearest

    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), layer)
        config = encoder_config("hubert", folder, layer)
        encoder = Encoder(config, device)
    rng = np.random.default_rng(0)
    lengths = sorted(librispeech_lengths(utterances), reverse=True)
    samples = [rng.standard_normal(round(seconds * SAMPLE_RATE)).astype("f4") for seconds in lengths]
    samples = [prepare(part, config) for part in samples]
    nearest = Nearest(rng.standard_normal((NUM_UNITS, DIM)).astype("f4"), encoder.device)
    batches: list[list] = [[]]
    for part in samples:
        if batches[-1] and (len(batches[-1]) + 1) * len(batches[-1][0]) > BATCH_SECONDS * SAMPLE_RATE:
            batches.append([])
        batches[-1].append(part)
    found: dict = {"audio": sum(lengths)}
    units = {}
    for name, groups in (("batches", batches), ("alone", [[part] for part in samples])):
        nearest(encoder.encode(groups[0]))  # the first call takes longer
        synchronize(device)
        began = time.perf_counter()
        units[name] = [each.tolist() for group in groups for each in nearest(encoder.encode(group))]
        found[name] = time.perf_counter() - began
    same = sum(a == b for a, b in zip(units["batches"], units["alone"], strict=True)) / utterances
    return {**found, "same": same, "memory_gb": reserved_gb(device)}


def labelling(device: str) -> list[dict]:
    """Batches beside one utterance at a time; padding and bfloat16 may change a unit here and there."""
    _, found = apart(label, device, *((LAYER, UTTERANCES) if device == "cuda" else (2, 4)))
    facts = {"times_real_time": round(found["audio"] / found["batches"]), "memory_gb": found["memory_gb"]}
    facts["share_of_utterances_with_the_same_units"] = found["same"]
    return [comparison("labelling", found["batches"], found["alone"], **facts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="With cpu all is small.")
    device = parser.parse_args().device
    report([*training(device), *labelling(device)])


if __name__ == "__main__":  # argparse: jsonargparse is not there where only PyTorch and transformers are
    main()
