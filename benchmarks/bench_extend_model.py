"""Measure extend_model.py on a model of Llama-2-7B's shapes, beside transformers' resize_token_embeddings.

Usage: python benchmarks/bench_extend_model.py --output_dir runs/bench_extend_model

Makes a random bfloat16 model under --output_dir, in three shards, and Mistral's 32,000-piece tokenizer with 5000 units
and 3000 merges; extends the one for the other in processes of their own: theirs as from_pretrained,
resize_token_embeddings (with mean_resizing, its default) and save_pretrained. Ends with one JSON line a comparison:
our peak resident memory against its limit (two embedding matrices in float32, and 1 GB), then memory and seconds
beside theirs. Mapped pages of weight files count as resident. Ours hashes what it reads and writes, and waits until
all is on the disk; theirs does neither. That both have the same shapes is tested in tests/train_bpe_tokenizer. The
model folders are deleted, the logs stay. Needs 36 GB of disk, and 15 GB of memory to make the model and for theirs
(less with fewer --layers).
"""

import random
import resource
import shutil
from pathlib import Path

from benchmarks.measure import apart, comparison, copy_mistral_tokenizer, report, run_script
from towerspeech.command import run
from towerspeech.files import read_json

NUM_UNITS, NUM_MERGES = 5000, 3000
LIMIT_GB = 2 * 32_000 * 4096 * 4 / 1e9 + 1


def make_model(folder: Path, layers: int) -> None:
    """Write a random model of Llama-2-7B's shapes, with 32 layers in three shards, as TowerBase-7B is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))  # its other defaults are Llama-2-7B's
    model.save_pretrained(folder, max_shard_size="5GB")


def make_tokenizer(model: Path, root: Path) -> Path:
    """The folder in which merge_tokenizer.py has added units and merges to the model's tokenizer."""
    weights = [1 / (1 + unit) for unit in range(NUM_UNITS)]  # some are frequent, so that there are merges to find
    drawn = random.Random(0).choices(range(NUM_UNITS), weights, k=300_000)
    units = root / "units.km"
    units.write_text("".join(" ".join(map(str, drawn[at : at + 60])) + "\n" for at in range(0, len(drawn), 60)))
    sizes = ["--num_units", NUM_UNITS, "--vocab_size", NUM_UNITS + NUM_MERGES]
    run_script("train_bpe_tokenizer/train_bpe.py", root / "units_bpe", "--units", units, *sizes)
    words = ["--base", model, "--units_bpe", root / "units_bpe"]
    run_script("train_bpe_tokenizer/merge_tokenizer.py", root / "tokenizer", *words)
    return root / "tokenizer"


def resize(model: Path, tokens: int, target: Path) -> float:
    """Give a model rows for so many tokens as transformers does; returns the peak resident memory, in 1e9 bytes."""
    from transformers import AutoModelForCausalLM

    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, end this and nobody else
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    loaded.resize_token_embeddings(tokens, pad_to_multiple_of=64)
    loaded.save_pretrained(target)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bench_extend_model(output_dir: Path, layers: int = 32, theirs: bool = True) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        layers: Layers of the model; Llama-2-7B has 32.
        theirs: Measure theirs too.
    """
    model = output_dir / "model"
    try:
        apart(make_model, model, layers)
        copy_mistral_tokenizer(model)
        tokenizer = make_tokenizer(model, output_dir)
        words = ["--model", model, "--tokenizer", tokenizer]
        ours = run_script("train_bpe_tokenizer/extend_model.py", output_dir / "ours", *words)
        lines = [comparison(f"{layers} layers: peak memory, at most", ours.memory_gb, LIMIT_GB, 1.0, unit="GB")]
        if theirs:
            tokens = read_json(tokenizer / "speech_units.json", "run again")["vocab_size"]
            seconds, memory_gb = apart(resize, model, tokens, output_dir / "theirs")
            title = f"{layers} layers, beside resize_token_embeddings"
            lines += [
                comparison(f"{title}: peak memory", ours.memory_gb, memory_gb, 1.0, unit="GB"),
                comparison(f"{title}: whole run", ours.seconds, seconds, 1.0),
            ]
    finally:
        for name in ("model", "ours", "theirs"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
    report(lines)


if __name__ == "__main__":
    run(bench_extend_model)
