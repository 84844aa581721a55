"""Prompts -> generations: one engine a checkpoint, token ids in, every result written as it comes."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from towerspeech import prompts
from towerspeech.command import UserError
from towerspeech.files import read_json
from towerspeech.model_folder import check_tokenizer_fits
from towerspeech.outside_text import check_units, marker, text_tokenizer
from towerspeech.records import METADATA, dumps, prompt_hash, write_jsonl
from towerspeech.stage import stage
from towerspeech.tokenizer import stop_token_ids

MODEL_FOLDER = "export it with continued_pretraining/export_checkpoint.py"
CONFIG_FIELDS = ("vocab_size", "max_position_embeddings")


@dataclass
class Decoding:
    """How to decode.

    Attributes:
        max_new_tokens: Limit of a generation, in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus of sampling.
        seed: Of sampling; every prompt draws from its own stream.
        dtype: Of the computation: auto takes the checkpoint's.
        max_model_len: Limit of prompt and generation together; default: the model's context.
        tensor_parallel_size: GPUs a model is split over.
        data_parallel_size: Engines that share the prompts, each with GPUs (or CPU cores) of its own.
        gpu_memory_utilization: Share of a GPU's memory that vLLM takes.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def token_ids(tokenizer, row: dict, mark: Callable[[str], str] = str) -> list[int]:
    """A prompt's ids. A plain instruction begins with BOS, once; a chat begins as in training, without it.

    Args:
        tokenizer: Of ``text_tokenizer``, where prompts are marked.
        row: The prompt.
        mark: Of ``marker``: what the prompt spells is text.
    """
    if "messages" in row:
        messages = [{**turn, "content": mark(turn["content"])} for turn in row["messages"]]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer(mark(row["instruction"]))["input_ids"]


def encode(checkpoint: Path, tasks: dict[str, list[dict]], limit: int, num_rows: int):
    """Load the tokenizer and encode all prompts; refuse any that is too long for the model.

    Returns:
        The tokenizer, and {output file: [ids of each prompt]}.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    from towerspeech.tokenizer import read_metadata

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} has no tokenizer that loads: {str(error).splitlines()[0]}",
            "copy the tokenizer's files beside the model (export_checkpoint.py does so)",
        ) from None
    check_tokenizer_fits(checkpoint, len(tokenizer), num_rows)
    dsu = read_metadata(checkpoint, required=False)
    mark, encoder, encoded = marker(tokenizer), text_tokenizer(tokenizer), {}
    for name, rows in tasks.items():
        encoded[name] = []
        for row in rows:
            where = row.get("where", f"{name}, id {row['id']}")  # rows made from units come from no prompt file
            for text in [turn["content"] for turn in row.get("messages", ())] or [row["instruction"]]:
                check_units(text, row.get("task"), dsu["num_units"], dsu["offset"], where)
            if "messages" in row and not tokenizer.chat_template:
                raise UserError(f"{where}: {checkpoint} has no chat template", "use prompts of another --style")
            try:
                ids = token_ids(encoder, row, mark)
            except TemplateError as error:
                problem = f"{where}: the chat template of {checkpoint} does not take this chat: {error}"
                raise UserError(problem, "mend the messages") from None
            if len(ids) >= limit:
                raise UserError(
                    f"{where}: prompt {row['id']!r} has {len(ids):,} tokens, the model's context is {limit:,}",
                    "use fewer shots or a model with a longer context",
                )
            encoded[name].append(ids)
    return tokenizer, encoded


def partial_file(output_dir: Path, name: str) -> Path:
    """Where results are kept in order of completion until their file is whole."""
    return output_dir / f".{name.replace('/', '-')}.partial"


def finish(output_dir: Path, name: str, rows: list[dict], results: dict[str, dict]) -> None:
    """Publish a task's file, in the order of its prompts."""
    write_jsonl(output_dir / name, (results[row["id"]] for row in rows))
    partial_file(output_dir, name).unlink(missing_ok=True)


def told(reasons: Counter) -> str:
    """Finish reasons and their counts: 980 stop, 32 length."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), reverse=True))


def finished_rows(partial: Path, rows: list[dict]) -> dict[str, dict]:
    """Results that an earlier, killed run left, by id. Its last line may be cut off."""
    found = {}
    if partial.is_file():
        hashes = {row["id"]: prompt_hash(row) for row in rows}
        lines = partial.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        for result in map(json.loads, whole):
            if hashes.get(result["id"]) == result["prompt_sha256"]:
                found[result["id"]] = result
        os.truncate(partial, sum(map(len, whole)))
    return found


def decode(
    checkpoints: list[Path],
    load: Callable[[Path], dict[str, list[dict]]],
    output_dir: Path,
    decoding: Decoding,
    arguments: dict,
    inputs: list[str],
) -> None:
    """Decode the prompts with each checkpoint into <output_dir>/<checkpoint's name>/.

    A generations row: id, the prompt's metadata, reference, prompt_sha256, text (raw, as decoded), finish_reason
    (stop, length), num_tokens. It carries the reference so that no score can ever use another one.

    Args:
        checkpoints: Model folders, decoded in turn.
        load: Checkpoint -> {output file: prompt rows}.
        output_dir: Folder of the checkpoints' folders.
        decoding: How.
        arguments: The script's, for run_info.json.
        inputs: Names of those that are paths.
    """
    for name in ("data_parallel_size", "tensor_parallel_size", "max_new_tokens"):
        if getattr(decoding, name) < 1:
            raise UserError(f"--{name} is {getattr(decoding, name)}", "it must be 1 or more")
    names = [path.resolve().name for path in checkpoints]
    if len(set(names)) < len(names):
        raise UserError(f"two checkpoints have the same name: {', '.join(sorted(names))}", "rename a folder")
    for checkpoint in checkpoints:
        read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
    speed = ["tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization"]
    for checkpoint, name in zip(checkpoints, names, strict=True):
        own = {**{key: value for key, value in arguments.items() if key != "checkpoints"}, "checkpoint": checkpoint}
        with stage(output_dir / name, own, inputs=["checkpoint", *inputs], ignore=speed) as work:
            if not work.done:
                decode_one(checkpoint.resolve(), load(checkpoint), decoding, work)


def decode_one(checkpoint: Path, tasks: dict[str, list[dict]], decoding: Decoding, work) -> None:
    """Decode what is missing of all tasks with one checkpoint; a task's file appears when its last prompt is done."""
    config = read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
    context = config["max_position_embeddings"]
    limit = decoding.max_model_len or context
    if limit > context:
        raise UserError(
            f"--max_model_len is {limit:,}, but the context of {checkpoint} is {context:,} tokens", "lower it"
        )
    tokenizer, encoded = encode(checkpoint, tasks, limit, config["vocab_size"])
    results, missing = {}, []
    for name, rows in tasks.items():
        file, partial = work.output_dir / name, partial_file(work.output_dir, name)
        results[name] = finished_rows(file, rows) | finished_rows(partial, rows)
        undone = [i for i, row in enumerate(rows) if row["id"] not in results[name]]
        # Prompts that begin alike follow one another: their common beginning is computed once (prefix cache).
        missing += [(name, i) for i in sorted(undone, key=lambda i, name=name: encoded[name][i])]
    total = sum(map(len, tasks.values()))
    if len(missing) < total:
        print(f"{checkpoint.name}: {total - len(missing):,} of {total:,} prompts were done before", flush=True)
    if missing:
        stop_ids = stop_token_ids(tokenizer)
        run_prompts(checkpoint, config, tasks, encoded, missing, results, limit, stop_ids, decoding, work)
    reasons: Counter = Counter()
    for name, rows in tasks.items():
        if partial_file(work.output_dir, name).is_file() or not (work.output_dir / name).is_file():
            finish(work.output_dir, name, rows, results[name])  # a kill came just before
        reasons.update(result["finish_reason"] for result in results[name].values())
    new_tokens = sum(result["num_tokens"] for found in results.values() for result in found.values())
    work.counts.update({"prompts": total, "new_tokens": new_tokens, "finish_reasons": dict(sorted(reasons.items()))})
    print(f"{checkpoint.name}: {total:,} generations, finished by {told(reasons)}: {work.output_dir}", flush=True)


def run_prompts(
    checkpoint, config, tasks, encoded, missing, results, limit, stop_ids, decoding: Decoding, work
) -> None:
    """Put the missing prompts through vLLM; append each result to its task's partial file as it comes."""
    from tqdm import tqdm

    from towerspeech.engine import CPU_BLOCK, Request, kv_cache_bytes, on_gpu, run_engines

    log = work.output_dir / "vllm.log"
    dtype = decoding.dtype
    if dtype == "auto":  # vLLM's own auto would decode a float32 checkpoint in half precision
        dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    engine = {
        "model": str(checkpoint),
        "dtype": dtype,
        "max_model_len": limit,
        "tensor_parallel_size": decoding.tensor_parallel_size,
        "gpu_memory_utilization": decoding.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "enforce_eager": not on_gpu(),  # on a CPU, compiling costs more than most runs take
        "seed": decoding.seed,
    }
    if not on_gpu():
        engine["block_size"] = CPU_BLOCK
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "stop_token_ids": stop_ids}
    requests = []
    for key, (name, i) in enumerate(missing):
        row, ids = tasks[name][i], encoded[name][i]
        seed = int(hashlib.sha256(f"{decoding.seed} {name} {row['id']}".encode()).hexdigest()[:8], 16)
        max_tokens = min(decoding.max_new_tokens, limit - len(ids))
        requests.append(Request(key, ids, max_tokens, seed, prompts.stop_strings(chat="messages" in row)))
    if not on_gpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        lengths = [len(request.prompt_token_ids) + request.max_tokens for request in requests]
        engine["kv_cache_memory_bytes"] = kv_cache_bytes(config, lengths, decoding.data_parallel_size)
    left = Counter(name for name, _ in missing)
    print(f"{checkpoint.name}: starting vLLM for {len(missing):,} prompts (its log: {log})", flush=True)
    started, ready, last, num_tokens, cached = time.monotonic(), None, None, 0, 0
    with ExitStack() as files, tqdm(total=len(missing), unit=" prompts", desc=checkpoint.name, mininterval=1) as bar:
        partials = {}
        for result in run_engines(requests, engine, sampling, decoding.data_parallel_size, log):
            if result is None:
                if ready is None:
                    ready = time.monotonic()
                    bar.reset()  # the rate is that of decoding, not of loading
                continue
            last = time.monotonic()
            name, i = missing[result.key]
            row = tasks[name][i]
            results[name][row["id"]] = {
                "id": row["id"],
                **{key: row.get(key) for key in METADATA},
                "reference": row.get("output"),
                "prompt_sha256": prompt_hash(row),
                "text": result.text,
                "finish_reason": result.finish_reason,
                "num_tokens": result.num_tokens,
            }
            if name not in partials:
                partials[name] = files.enter_context(open(partial_file(work.output_dir, name), "a", encoding="utf-8"))
            partials[name].write(dumps(results[name][row["id"]]) + "\n")
            partials[name].flush()
            num_tokens, cached = num_tokens + result.num_tokens, cached + result.cached
            bar.set_postfix(tokens_per_s=f"{num_tokens / (time.monotonic() - ready):,.0f}", refresh=False)
            bar.update()
            left[name] -= 1
            if not left[name]:
                finish(work.output_dir, name, tasks[name], results[name])
                reasons = Counter(result["finish_reason"] for result in results[name].values())
                bar.write(f"{checkpoint.name}: {name}: {len(tasks[name]):,} generations, finished by {told(reasons)}")
    seconds = last - ready  # of decoding: not of the engine's start and end
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    speed = {"start_s": round(ready - started, 1), "decode_s": round(seconds, 1), "new_tokens": num_tokens}
    speed |= {"prompts": len(missing), "prompt_tokens": prompt_tokens, "cached_tokens": cached}
    work.counts["last_attempt"] = speed  # a run that was killed before did a part of the work then
    print(
        f"{checkpoint.name}: {num_tokens:,} new tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s), "
        f"after {ready - started:.1f} s of starting; {cached / prompt_tokens:.0%} of {prompt_tokens:,} prompt tokens "
        "came from the prefix cache",
        flush=True,
    )
