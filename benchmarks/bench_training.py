"""Time train.py beside transformers' Trainer, its memory too, and how a model is loaded.

Usage: python benchmarks/bench_training.py --output_dir runs/bench_training

Makes synthetic text, a mixture of it, and a model of 90M parameters with 32,768 rows, and compares
  speed   of whole steps (reading, forward, backward, optimizer) of 8 windows of 512 tokens: one process; two that
          share the batch, and two that share the model too, beside the Trainer's DDP (it has no FSDP on CPUs)
  memory  of one process, the largest that was resident: activations kept, and computed again
  start   of two processes with TinyLlama-1.1B's shape and 37,056 rows, in bfloat16 on disk: from imported libraries
          to weights in place, by shards and by whole copies in turns
and ends with one JSON line a comparison. Both sides train on the same windows in float32; that the losses of all steps
are the same to 1e-4 is said beside the speed. A time is the median of three runs, which come in turns; of a run, the
median step but the first. All processes together have as many threads as there are cores.
"""

import json
import os
import statistics
import time
from pathlib import Path

from benchmarks.corpora import write_text_corpus
from benchmarks.measure import apart, comparison, copy_mistral_tokenizer, report, run_script
from benchmarks.shapes import TINYLLAMA
from towerspeech.command import run
from towerspeech.files import publish

LENGTH, BATCH, STEPS, ROUNDS = 512, 8, 4, 3
SHAPE = dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10, vocab_size=32_768)
LESS_MEMORY = 1 / 0.7
GOALS = {"one process": 1.02, "replicate 2": 1.0, "shard 2": 0.9}


# --- What is made ---------------------------------------------------------------------------------
def write_model(shape: dict, dtype: str, folder: Path) -> None:
    """A Llama of this shape with random weights, beside whose tokenizer.model a fast tokenizer is put."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=False, **shape)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def prepare(folder: Path) -> None:
    """Make models and mixture, unless an earlier run has."""
    for name, shape, dtype in (("model", SHAPE, "float32"), ("tinyllama", TINYLLAMA, "bfloat16")):
        if not (folder / name).is_dir():
            print(f"making {name}", flush=True)
            with publish(folder / name) as path:
                copy_mistral_tokenizer(path)
                apart(write_model, shape, dtype, path)
    tokens = LENGTH * BATCH * STEPS
    if not (folder / "text").is_dir():
        with publish(folder / "text") as path:
            apart(write_text_corpus, 4 * tokens, folder / "model", path, False)
    source = {"name": "text", "kind": "text", "paths": [str(folder / "text")], "budget": tokens}
    words = ["--tokenizer", folder / "model", "--sources", json.dumps([source]), "--validation_tokens", 0]
    run_script("data_mixture/build_mixture.py", folder / "mixture", *words)


# --- Speed and memory -----------------------------------------------------------------------------
def ours(folder: Path, processes: int, mesh: list, again: bool) -> dict:
    """Seconds and loss of each step of train.py, and its memory."""
    words = ["--model", folder / "model", "--mixture", folder / "mixture", "--sequence_length", LENGTH]
    words += ["--global_batch_size", BATCH, "--micro_batch_size", BATCH // processes, "--dtype", "float32"]
    words += ["--learning_rate", 1e-4, "--final_learning_rate_share", 1, "--warmup_share", 0, "--device", "cpu"]
    words += ["--log_every", 1, "--activation_checkpointing", "full" if again else "none", *mesh]
    run_script("continued_pretraining/train.py", folder / "ours", *words, processes=processes)
    rows = [json.loads(line) for line in (folder / "ours/train.log").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": [row["seconds"]["all"] - row["seconds"]["saving"] for row in rows[1:]],
        "losses": [row["loss"] for row in rows],
        "memory_gb": rows[-2]["memory_gb"],  # before the checkpoint at the end, which the other side does not write
    }


def theirs(folder: Path, processes: int, again: bool) -> dict:
    """The same of the Trainer."""
    words = ["--model", folder / "model", "--mixture", folder / "mixture", "--sequence_length", LENGTH]
    words += ["--batch_size", BATCH, "--gradient_checkpointing", str(again).lower()]
    run_script("benchmarks/other_trainer.py", folder / "theirs", *words, processes=processes)
    return json.loads((folder / "theirs/trainer.json").read_text(encoding="utf-8"))


def same_losses(runs: list[dict]) -> float:
    """The share of steps whose losses are the same to 1e-4 in all runs."""
    steps = list(zip(*(one["losses"] for one in runs), strict=True))
    return sum(max(step) - min(step) <= 1e-4 * max(step) for step in steps) / len(steps)


def matmul_peak(threads: int) -> float:
    """Floating-point operations a second of a float32 matrix product, the best of ten."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    fastest = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * 2048**3 / fastest


def flops_a_step() -> float:
    """Floating-point operations of forward and backward pass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from continued_pretraining.flops import flops_a_token

    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SHAPE))
    return LENGTH * BATCH * flops_a_token(network, LENGTH)


def speed(folder: Path, cores: int) -> list[dict]:
    """Steps of each way, and the memory of one process."""
    ways = {
        "one process": lambda: ours(folder, 1, [], False),
        "Trainer, one process": lambda: theirs(folder, 1, False),
        "replicate 2": lambda: ours(folder, 2, ["--replicate", 2], False),
        "shard 2": lambda: ours(folder, 2, ["--shard", 2], False),
        "Trainer, DDP 2": lambda: theirs(folder, 2, False),
    }
    found: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            os.environ["OMP_NUM_THREADS"] = str(max(1, cores // (2 if "2" in name else 1)))
            found[name].append(way())
            print(f"{name}: {[round(second, 2) for second in found[name][-1]['seconds']]}", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    again = [ours(folder, 1, [], True), theirs(folder, 1, True)]

    step = {name: statistics.median(statistics.median(one["seconds"]) for one in runs) for name, runs in found.items()}
    _, peak = apart(matmul_peak, cores)
    _, flops = apart(flops_a_step)
    lines = []
    for name, goal in GOALS.items():
        other = "Trainer, one process" if name == "one process" else "Trainer, DDP 2"
        facts = {
            "tokens_per_s": round(LENGTH * BATCH / step[name]),
            "share_of_matmul_peak": round(flops / step[name] / peak, 2),
        }
        same = same_losses([*found[name], *found[other]])
        lines.append(comparison(f"training: {name}", step[name], step[other], goal, same, "s a step", **facts))
    for name, mine, other in (
        ("memory", found["one process"][0], found["Trainer, one process"][0]),
        ("memory, activations computed again", *again),
    ):
        same = same_losses([mine, other])
        lines.append(comparison(name, mine["memory_gb"], other["memory_gb"], LESS_MEMORY, same, "GB"))
    return lines


# --- Start ----------------------------------------------------------------------------------------
def start(folder: Path) -> list[dict]:
    """Loading by shards beside whole copies."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict]] = {"shards": [], "whole": []}
    for _ in range(ROUNDS):
        for way, runs in found.items():
            words = ["--model", folder / "tinyllama", "--way", way]
            run_script("benchmarks/loading.py", folder / "loading", *words, processes=2)
            runs.append(json.loads((folder / "loading/loading.json").read_text(encoding="utf-8")))
    mine, other = ({name: statistics.median(one[name] for one in runs) for name in runs[0]} for runs in found.values())
    return [
        comparison("start: seconds", mine["seconds"], other["seconds"], 4),
        comparison("start: resident memory", mine["memory_gb"], other["memory_gb"], unit="GB"),
        # theirs: 1.2 times the float32 weights of a process's shards
        comparison("start: private memory", mine["private_gb"], 1.2 * mine["weights_gb"], 1, unit="GB"),
    ]


def bench_training(output_dir: Path) -> None:
    """Measure both sides, and print one JSON line a comparison.

    Args:
        output_dir: Folder for what is made, kept between runs, and for the runs.
    """
    cores = len(os.sched_getaffinity(0))
    prepare(output_dir)
    report([*start(output_dir), *speed(output_dir, cores)])


if __name__ == "__main__":
    run(bench_training)
