"""Give a model rows for a merged tokenizer's new tokens.

Usage: python train_bpe_tokenizer/extend_model.py --model Llama-2-7b/ --tokenizer tokenizer/ --output_dir extended/

Reads a Hugging Face model folder (safetensors, in shards or one file) and the folder that merge_tokenizer.py wrote.
Writes one folder with model and tokenizer. Weights are streamed: only the files that hold the input embeddings and the
output head are rewritten, the others are hard-linked, or copied where that is impossible. Old rows stay as they are,
bit for bit. Nothing is written before transformers' own loader has taken the result's names and shapes. Memory: at
most two embedding matrices in float32, and 1 GB.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from towerspeech.command import quiet, run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json
from towerspeech.model_folder import TOKENIZER_FILES, copy_files, notes
from towerspeech.stage import stage
from towerspeech.tokenizer import PAD, read_metadata, unit_tokens, vocabulary

INDEX = "model.safetensors.index.json"
MODEL_FOLDER = "name a Hugging Face model folder"
LLAMA_LIKE = "use a causal language model of the Llama family, as transformers saves it"
DTYPES = ("F32", "F16", "BF16")  # safetensors' names
COVARIANCE = 1e-5  # SpireLM and the original: how much of the old rows' covariance new rows get
CHUNK_ROWS = 1024
CHUNK_BYTES = 1 << 24


# --- safetensors files, as streams ----------------------------------------------------------------
def read_header(path: Path) -> tuple[dict, int]:
    """Read a safetensors header: its entries by name, and the byte at which the data begins.

    Raises:
        UserError: The file is no safetensors file, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        safe_open(path, framework="pt")
    except SafetensorError as error:
        remedy = "copy it anew; it may be a Git LFS pointer"
        raise UserError(f"{path} is no whole safetensors file: {error}", remedy) from None
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)), 8 + length


def copy_bytes(source: BinaryIO, start: int, count: int, target: BinaryIO) -> None:
    """Copy ``count`` bytes from ``start`` on, a little at a time."""
    source.seek(start)
    while count:
        chunk = source.read(min(CHUNK_BYTES, count))
        target.write(chunk)
        count -= len(chunk)


def rewrite(
    source: Path, target: Path, matrices: list[str], keep_rows: int, num_rows: int, new_rows: Callable[[str], Any]
) -> None:
    """Copy a safetensors file; the named matrices keep their first ``keep_rows`` rows and get new ones after them.

    ``new_rows`` gives them by a matrix's name, (num_rows - keep_rows, hidden), in the file's dtype. It is called when
    they are written, so that only one matrix is in memory at a time.
    """
    import torch

    header, data = read_header(source)
    metadata = header.pop("__metadata__", None)
    changed, position = {"__metadata__": metadata} if metadata else {}, 0
    kept = {}  # bytes of each tensor, in the order of the file
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        start, end = header[name]["data_offsets"]
        shape, size = list(header[name]["shape"]), end - start
        kept[name] = size
        if name in matrices:
            kept[name] = size // shape[0] * keep_rows
            size = size // shape[0] * num_rows
            shape[0] = num_rows
        changed[name] = {"dtype": header[name]["dtype"], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(changed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for name, size in kept.items():
            copy_bytes(old, data + header[name]["data_offsets"][0], size, new)
            if name in matrices:
                new.write(new_rows(name).view(torch.uint8).numpy())


# --- New rows -------------------------------------------------------------------------------------
Init = Literal["normal", "mean", "merge_mean"]


def make_rows(old, count: int, init: Init, seed: int, merges: dict[int, list[int]] | None = None):
    """Draw new embedding rows from the old ones' statistics.

    Args:
        old: (num_old, hidden), any dtype; or the head's bias, (num_old,), whose rows are numbers.
        count: Number of new rows.
        init: See ``extend_model``.
        seed: Seed of the draw.
        merges: For ``merge_mean``: ``merge_rows``.

    Returns:
        (count, hidden) or (count,), computed in float32, cast to ``old``'s dtype.
    """
    import torch

    matrix = old.to(torch.float32, copy=True).view(len(old), -1)
    # In chunks: torch would make a float64 copy of the whole matrix.
    total = sum(chunk.sum(0, dtype=torch.float64) for chunk in matrix.split(CHUNK_ROWS))
    mean = (total / len(matrix)).to(torch.float32)
    rows = mean.repeat(count, 1)
    if init != "mean":
        # With X the centred rows and z standard normal, z @ X / sqrt(n) has exactly their covariance: no
        # (hidden, hidden) matrix, and no Cholesky factor that rounding could make impossible.
        matrix -= mean
        generator = torch.Generator().manual_seed(seed)
        scale = math.sqrt(COVARIANCE / len(matrix))
        for start in range(0, count, 512):
            noise = torch.randn(min(512, count - start), len(matrix), generator=generator)
            rows[start : start + 512] += scale * (noise @ matrix)
    if init == "merge_mean":
        for merge, units in merges.items():
            rows[merge] = rows[units].mean(0)
    return rows.to(old.dtype).view(count, *old.shape[1:])


def merge_rows(tokenizer: Path, metadata: dict) -> dict[int, list[int]]:
    """Number the merges among the new rows, each with the numbers of its units.

    Raises:
        UserError: The tokenizer's units and merges are not those of its speech_units.json.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    tokens = unit_tokens(loaded, metadata["num_units"], metadata["offset"])
    row = {units[0]: index - metadata["base_vocab_size"] for index, units in tokens.items() if len(units) == 1}
    has = f"{len(row):,} units and {len(tokens) - len(row):,} merges"
    wanted = f"{metadata['num_units']:,} units and {metadata['merges']:,} merges"
    if has != wanted or min(row.values()) < 0:
        raise UserError(f"{tokenizer} has {has}, its metadata say {wanted}", "make it anew with merge_tokenizer.py")
    return {
        index - metadata["base_vocab_size"]: [row[unit] for unit in units]
        for index, units in tokens.items()
        if len(units) > 1
    }


# --- The model ------------------------------------------------------------------------------------
def parse_config(model: Path, config: dict):
    """transformers' own reading of a config.json.

    Raises:
        UserError: It is none of a plain language model whose code transformers has; names what it is.
    """
    from transformers import CONFIG_MAPPING

    path, kind = model / "config.json", config["model_type"]
    if config.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized", "use them in float32, float16 or bfloat16")
    if (model / "adapter_config.json").is_file():
        raise UserError(f"{model} holds an adapter", "merge it into its base model, and name that folder")
    if kind not in CONFIG_MAPPING:
        code = ", and the model's own code (auto_map) is not run" if "auto_map" in config else ""
        raise UserError(f"{path}: transformers has no model_type {kind!r}{code}", LLAMA_LIKE)
    try:
        parsed = CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # each class has its own
        raise UserError(f"{path}: {_first_line(error)}", MODEL_FOLDER) from None
    more = {
        "an encoder": parsed.is_encoder_decoder,
        "a text_config, and more than text": parsed.get_text_config() is not parsed,
        "embeddings for every layer": hasattr(parsed, "vocab_size_per_layer_input"),  # Gemma 3n's
    }
    for what, is_there in more.items():
        if is_there:
            raise UserError(f"{path}: {kind} has {what}", LLAMA_LIKE)
    return parsed


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_entries(model: Path) -> dict[str, dict]:
    """The entry of each tensor in its file's header, with that ``file``.

    Raises:
        UserError: The folder holds no safetensors model, or two, or lacks a shard, or its index is wrong.
    """
    remedy = "download the model again; weights must be safetensors (save_pretrained writes them)"
    single, weight_map = "model.safetensors", None
    if (model / INDEX).is_file():
        if (model / single).is_file():
            raise UserError(f"{model} holds {single} and {INDEX}", "remove the one that is not the model")
        weight_map = read_json(model / INDEX, remedy, ["weight_map"])["weight_map"]
    entries, held = {}, set()
    for name in sorted({single} if weight_map is None else {*weight_map.values()}):
        check_exists(model / name, remedy)
        header = read_header(model / name)[0]
        header.pop("__metadata__", None)
        entries |= {tensor: {**entry, "file": model / name} for tensor, entry in header.items()}
        held |= {(tensor, Path(name).name) for tensor in header}
    if weight_map is not None and (differing := held ^ {*weight_map.items()}):
        tensor, name = min(differing)
        raise UserError(f"{model / INDEX} and the files beside it disagree on {tensor} ({name})", remedy)
    return entries


def find_matrices(model: Path, entries: dict[str, dict], tied: bool) -> list[str]:
    """Names of the input embeddings and, where the files have them, of the output head and its bias.

    Raises:
        UserError: They are not where Llama-like models have them, are quantized, or contradict one another.
    """
    embeddings = [name for name in entries if name.endswith("embed_tokens.weight")]
    heads = [name for name in entries if name.endswith("lm_head.weight")]
    biases = [name for name in entries if name.endswith("lm_head.bias")]
    if len(embeddings) != 1 or len(heads) > 1 or len(biases) > 1 or not (heads or tied):
        raise UserError(
            f"{model}: one embed_tokens.weight and {'at most ' if tied else ''}one lm_head.weight are wanted, got "
            f"{embeddings + heads + biases}",
            LLAMA_LIKE,
        )
    first = entries[embeddings[0]]
    for name in embeddings + heads + biases:
        entry = entries[name]
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{entry['file']}: {name} is {entry['dtype']}", "use float32, float16 or bfloat16 weights")
        if entry["shape"] != (first["shape"][:1] if name in biases else first["shape"]):
            raise UserError(f"{name} is {entry['shape']}, {embeddings[0]} {first['shape']}", "check the model")
    if tied and heads:
        import torch

        one, other = (load_rows(entries[name]["file"], name, first["shape"][0]) for name in embeddings + heads)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise UserError(
                f"{model}/config.json ties {heads[0]} to {embeddings[0]}, but they differ",
                'set "tie_word_embeddings" to false there, or remove the head from the weights',
            )
    return embeddings + heads + biases


def check_loads(model: Path, config: dict, shapes: dict[str, list[int]]) -> str:
    """Have transformers load weights of these names and shapes, on the meta device, where they hold no data.

    Returns:
        The class that it makes of them.

    Raises:
        UserError: It would leave weights out, draw some at random, or fail.
    """
    import torch
    from transformers import AutoModelForCausalLM

    parsed = parse_config(model, config)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with quiet(Path(os.devnull)):
            with torch.device("meta"):
                network = type(AutoModelForCausalLM.from_config(parsed, trust_remote_code=False))
            options = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
            _, told = network.from_pretrained(None, config=parsed, state_dict=weights, **options)
    except Exception as error:  # each class has its own
        raise UserError(f"{model}, extended, would not load: {_first_line(error)}", LLAMA_LIKE) from None
    problems = [
        *(f"{name} is missing" for name in sorted(told["missing_keys"])),
        *(f"{name} has no place in it" for name in sorted(told["unexpected_keys"])),
        *(f"{name} is {[*got]}, not {[*wanted]}" for name, got, wanted in sorted(told["mismatched_keys"])),
        *told["error_msgs"],
    ]
    named = config.get("architectures") or [network.__name__]
    if network.__name__ not in named:
        problems.append(f"config.json calls it {', '.join(named)}")
    if problems:
        listed = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if problems[4:] else "")
        raise UserError(f"{model}, extended, would not load as {network.__name__}: {listed}", LLAMA_LIKE)
    return network.__name__


def check_belongs(model: Path, tokenizer: Path, rows: int, base_vocab_size: int) -> None:
    """Raise UserError unless the tokenizer was made from the one that the model was trained with."""
    remedy = "give merge_tokenizer.py this very model as --base"
    if rows < base_vocab_size:
        raise UserError(f"{model} has {rows:,} embeddings, the base of {tokenizer} {base_vocab_size:,} tokens", remedy)
    own, merged = vocabulary(model), vocabulary(tokenizer)
    if own is None and rows != base_vocab_size:
        problem = f"{model} has no tokenizer to compare, and {rows:,} embeddings for {base_vocab_size:,} tokens"
        raise UserError(problem, remedy)
    if merged is None:
        raise UserError(f"{tokenizer} has no tokenizer.json and no tokenizer.model", "run merge_tokenizer.py")
    base = {token: index for token, index in merged.items() if index < base_vocab_size}
    if own not in (None, base):
        differing = sorted((index, token) for token, index in own.items() - base.items())
        example = "".join(f"; the first is {ascii(token)} ({index})" for index, token in differing[:1])
        raise UserError(
            f"{tokenizer} was not made from the tokenizer of {model}: {len(own):,} and {len(base):,} tokens, "
            f"{len(differing):,} of them different{example}",
            remedy,
        )


def load_rows(path: Path, name: str, count: int):
    """The first ``count`` rows of a matrix in a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[:count]


def write_weights(work, entries: dict[str, dict], matrices: list[str], *rows) -> None:
    """Rewrite the weight files that hold one of the matrices, see ``rewrite``, and link the others."""
    from tqdm import tqdm

    rewritten = {entries[name]["file"] for name in matrices}
    for path in tqdm(sorted({entry["file"] for entry in entries.values()}), unit=" files", disable=None):
        if (work.output_dir / path.name).is_file():  # a killed run's: it appeared whole, and the request is the same
            continue
        with work.publish(path.name) as temporary:
            if path in rewritten:
                rewrite(path, temporary, matrices, *rows)
                continue
            try:
                os.link(path.resolve(), temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, temporary)


def write_settings(model: Path, folder: Path, config: dict, padding: dict, grown: int) -> None:
    """Write config.json, and the model's generation settings and index brought up to it.

    ``padding`` is the new padding token as config.json has it, ``grown`` by how many bytes the weights have grown.
    """

    def dump(name: str, value: dict) -> None:
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    dump("config.json", config)
    if (model / "generation_config.json").is_file():
        dump("generation_config.json", read_json(model / "generation_config.json", MODEL_FOLDER) | padding)
    if (model / INDEX).is_file():
        index = read_json(model / INDEX, MODEL_FOLDER)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += grown
        index.get("metadata", {}).pop("total_parameters", None)
        dump(INDEX, index)


def extend_model(
    model: Path,
    tokenizer: Path,
    output_dir: Path,
    init: Init = "normal",
    seed: int = 0,
    pad_to_multiple_of: int = 64,
    overwrite: bool = False,
) -> None:
    """Extend a model's embeddings and head.

    Args:
        model: Hugging Face folder of a causal language model with its base tokenizer.
        tokenizer: Folder written by merge_tokenizer.py from that base tokenizer.
        output_dir: New folder, for model and tokenizer.
        init: New rows: drawn around the mean of the old ones, with 1e-5 of their covariance (normal); equal to that
            mean (mean); or drawn, but a BPE merge equal to the mean of its units (merge_mean).
        seed: Seed of the draw.
        pad_to_multiple_of: The number of rows is rounded up to a multiple of this.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    if pad_to_multiple_of < 1:
        raise UserError(f"--pad_to_multiple_of {pad_to_multiple_of} is not positive", "use 64, or 1 for no padding")
    with stage(__file__, output_dir, arguments, inputs=["model", "tokenizer"]) as work:
        if work.done:
            return
        metadata = read_metadata(tokenizer)
        config = read_json(model / "config.json", MODEL_FOLDER, ["model_type"])
        tied = getattr(parse_config(model, config), "tie_word_embeddings", False)
        entries = read_entries(model)
        matrices = find_matrices(model, entries, tied)
        old_rows, hidden = entries[matrices[0]]["shape"]
        keep = metadata["base_vocab_size"]
        check_belongs(model, tokenizer, old_rows, keep)
        rows = math.ceil(metadata["vocab_size"] / pad_to_multiple_of) * pad_to_multiple_of
        merges = merge_rows(tokenizer, metadata) if init == "merge_mean" else None
        pad = metadata["special_tokens"].get(PAD)  # the base's own stays if the tokenizer has none
        padding = {} if pad is None else {"pad_token_id": pad}
        shapes = {name: entry["shape"] for name, entry in entries.items()}
        shapes |= {name: [rows, *shapes[name][1:]] for name in matrices}
        config |= {"vocab_size": rows, **padding}
        config.pop("auto_map", None)  # code that would be missing; transformers' own loads the weights
        config["architectures"] = [check_loads(model, config, shapes)]

        def new_rows(name: str):
            # A head that is tied but stored must stay equal to the embeddings.
            source = matrices[0] if tied and name.endswith(".weight") else name
            old = load_rows(entries[source]["file"], source, keep)
            return make_rows(old, rows - keep, init, seed + matrices.index(source), merges)

        write_weights(work, entries, matrices, keep, rows, new_rows)
        old_bytes = sum(end - start for start, end in (entries[name]["data_offsets"] for name in matrices))
        with work.publish() as folder:
            copy_files(model, folder, notes(model))
            copy_files(tokenizer, folder, TOKENIZER_FILES)
            write_settings(model, folder, config, padding, grown=old_bytes // old_rows * (rows - old_rows))
        work.counts.update({"base_vocab_size": keep, "vocab_size": metadata["vocab_size"], "rows": rows})
        print(
            f"{keep:,} old rows + {metadata['vocab_size'] - keep:,} new tokens + {rows - metadata['vocab_size']:,} of "
            f"padding = {rows:,} rows of {hidden:,} in {' and '.join(matrices)}: {output_dir}"
        )


if __name__ == "__main__":
    run(extend_model)
