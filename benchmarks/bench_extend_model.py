"""Measure extend_model.py on a model of Llama-2-7B's shapes, beside transformers' resize_token_embeddings.

Usage: python benchmarks/bench_extend_model.py --output_dir runs/bench_extend_model

Makes a bfloat16 model in three shards under --output_dir (embeddings and head random, the layers sparse zeros), and
Mistral's 32,000-piece tokenizer with 5000 units and 3000 merges; extends the one for the other in processes of their
own: ours with --init normal and merge_mean; theirs as from_pretrained, resize_token_embeddings (with mean_resizing,
its default) and save_pretrained. Ends with one JSON line a comparison: our peak resident memory against its limit (two
embedding matrices in float32, and 1 GB), then memory and seconds beside theirs. Mapped pages of weight files count as
resident. Ours hashes what it reads and writes, and waits until all is on the disk; theirs does neither. The model
folders are deleted, the logs stay. Needs 16 GB of disk, and as much memory for theirs (less with fewer layers:
--theirs_layers).
"""

import json
import os
import random
import shutil
import struct
import sys
import textwrap
from pathlib import Path

from benchmarks.measure import comparison, measure, run_script
from towerspeech.command import UserError, run
from towerspeech.files import read_json

TOKENS, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32_000, 4096, 11_008, 32, 32  # Llama-2-7B
SHARDS = 3  # as TowerBase-7B has
NUM_UNITS, NUM_MERGES = 5000, 3000
DISK_BYTES = 16e9
LIMIT_BYTES = 2 * TOKENS * HIDDEN * 4 + 1e9
THEIRS = textwrap.dedent("""
    import sys
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, end this and nobody else
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", local_files_only=True)
    model.resize_token_embeddings(int(sys.argv[2]), pad_to_multiple_of=64)
    model.save_pretrained(sys.argv[3])
""")


# --- The model and its tokenizer ------------------------------------------------------------------
def tensors(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's weights, in order."""
    layer = {
        "input_layernorm": (HIDDEN,),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "kqvo"},
    }
    inner = [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in layer.items()]
    ends = ("model.embed_tokens.weight", (TOKENS, HIDDEN)), ("lm_head.weight", (TOKENS, HIDDEN))
    return [ends[0], *inner, ("model.norm.weight", (HIDDEN,)), ends[1]]


def write_shard(path: Path, weights: list[tuple[str, tuple[int, ...]]]) -> None:
    """Write one safetensors file of bfloat16; only embeddings and head take room on the disk."""
    import numpy as np

    header, position = {}, 0
    for name, shape in weights:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in weights:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            for _ in range(shape[0] if shape[0] == TOKENS else 0):
                row = generator.standard_normal(HIDDEN, np.float32) * np.float32(0.02)
                file.write((row.view(np.uint32) >> 16).astype(np.uint16))  # the upper half of a float32
        file.truncate(8 + len(text) + position)
        os.fsync(file.fileno())


def write_model(folder: Path, layers: int, tokenizer: Path) -> None:
    """Write a model folder of Llama-2-7B's shapes with so many layers."""
    weights = tensors(layers)
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": TOKENS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        own = weights[len(weights) * shard // SHARDS : len(weights) * (shard + 1) // SHARDS]
        write_shard(folder / name, own)
        weight_map |= {tensor: name for tensor, _ in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_tokenizer(root: Path) -> tuple[Path, Path]:
    """Mistral's tokenizer.model, and the folder in which merge_tokenizer.py has added units and merges."""
    import mistral_common

    weights = [1 / (1 + unit) for unit in range(NUM_UNITS)]  # some are frequent, so that there are merges to find
    drawn = random.Random(0).choices(range(NUM_UNITS), weights, k=300_000)
    units = root / "units.km"
    root.mkdir(parents=True, exist_ok=True)
    units.write_text("".join(" ".join(map(str, drawn[at : at + 60])) + "\n" for at in range(0, len(drawn), 60)))
    base = root / "base"
    base.mkdir(exist_ok=True)
    shutil.copyfile(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1", base / "tokenizer.model")
    sizes = ["--num_units", NUM_UNITS, "--vocab_size", NUM_UNITS + NUM_MERGES]
    run_script("train_bpe_tokenizer/train_bpe.py", root / "units_bpe", "--units", units, *sizes)
    words = ["--base", base, "--units_bpe", root / "units_bpe"]
    run_script("train_bpe_tokenizer/merge_tokenizer.py", root / "tokenizer", *words)
    return base / "tokenizer.model", root / "tokenizer"


# --- Measuring ------------------------------------------------------------------------------------
def take_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in a model folder, which is then removed."""
    from safetensors import safe_open

    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    shutil.rmtree(folder)
    return shapes


def bench_model(model: Path, tokenizer: Path, layers: int, with_theirs: bool, output_dir: Path) -> list[dict]:
    """Extend one model in both of our ways, and in theirs if it is wanted."""
    lines, measured, shapes = [], {}, {}
    for init in ("normal", "merge_mean"):
        out = output_dir / f"ours_{layers}_{init}"
        words = ["--model", model, "--tokenizer", tokenizer, "--init", init]
        measured[init] = run_script("train_bpe_tokenizer/extend_model.py", out, *words)
        shapes[init] = take_shapes(out)
        title = f"{layers} layers, --init {init}: peak memory, at most"
        seconds = round(measured[init].seconds, 1)
        lines.append(comparison(title, measured[init].memory_gb, LIMIT_BYTES / 1e9, 1.0, "GB", seconds=seconds))
    if with_theirs:
        out, tokens = output_dir / f"theirs_{layers}", read_json(tokenizer / "speech_units.json", "")["vocab_size"]
        print(f"$ from_pretrained({model}), resize_token_embeddings, save_pretrained", flush=True)
        theirs = measure([sys.executable, "-c", THEIRS, model, tokens, out], out.with_suffix(".log"))
        equal, ours = take_shapes(out) == shapes["normal"], measured["normal"]
        title = f"{layers} layers, --init normal, beside resize_token_embeddings"
        facts = {"equal": equal, "same_shapes": equal}
        lines.append(comparison(f"{title}: peak memory", ours.memory_gb, theirs.memory_gb, 1.0, "GB", **facts))
        lines.append(comparison(f"{title}: whole run", ours.seconds, theirs.seconds, 1.0, **facts))
    return lines


def bench_extend_model(output_dir: Path, layers: int = LAYERS, theirs_layers: int = LAYERS) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        layers: Layers of the model on which we are measured; Llama-2-7B has 32.
        theirs_layers: Layers of the one on which both are; as many as fit into memory. 0 leaves theirs out.
    """
    output_dir = output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output_dir).free < DISK_BYTES:
        raise UserError(f"{output_dir} has less than {DISK_BYTES / 1e9:.0f} GB of room", "name another --output_dir")
    print(f"{os.cpu_count()} cores, load before the start {os.getloadavg()[0]:.1f}", flush=True)
    root, lines = output_dir / "scratch", []
    shutil.rmtree(root, ignore_errors=True)
    try:
        pieces, tokenizer = make_tokenizer(root)
        for size in sorted({layers, theirs_layers} - {0}, reverse=True):
            model = root / f"model_{size}"
            write_model(model, size, pieces)
            lines += bench_model(model, tokenizer, size, size == theirs_layers, output_dir)
            shutil.rmtree(model)
    finally:
        for folder in (root, *output_dir.glob("ours_*/"), *output_dir.glob("theirs_*/")):
            shutil.rmtree(folder, ignore_errors=True)
    for told in lines:
        print(json.dumps(told))


if __name__ == "__main__":
    run(bench_extend_model)
