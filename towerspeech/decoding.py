"""Prompts -> generations with vLLM: one engine a checkpoint, token ids in, every result written as it comes."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from towerspeech import prompts
from towerspeech.records import dumps, iter_jsonl, write_jsonl
from towerspeech.stage import UserError, quiet, read_json, stage
from towerspeech.units import OFFSET

MODEL_FOLDER = "export it with continued_pretraining/export_checkpoint.py"
CONFIG_FIELDS = ("vocab_size", "max_position_embeddings")
METADATA = ("task", "dataset", "shots", "src_lang", "tgt_lang", "source")


@dataclass
class Decoding:
    """How to decode.

    Attributes:
        max_new_tokens: Limit of a generation, in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus of sampling.
        seed: Of sampling; every prompt draws from its own stream.
        dtype: vLLM's: auto takes the checkpoint's.
        max_model_len: Limit of prompt and generation together; default: the model's context.
        tensor_parallel_size: GPUs a model is split over.
        gpu_memory_utilization: Share of a GPU's memory that vLLM takes.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def read_prompts(files: list[Path]) -> dict[str, list[dict]]:
    """Read prompt files (JSONL, or the original's JSON lists) as {output file: rows}.

    A file in a folder such as 5_shot/ or asr/ keeps that folder's name. Rows without an id get their number.

    Raises:
        UserError: Malformed rows, ids that repeat, or two files that would be written to one.
    """
    tasks = {}
    for path in map(Path, files):
        folder = path.parent.name if re.fullmatch(r"\d+_shot|asr", path.resolve().parent.name) else ""
        name = str(Path(folder) / f"{path.stem}.jsonl")
        if name in tasks:
            raise UserError(f"{path}: another prompt file is already called {name}", "rename one of them")
        rows, seen = [], set()
        for number, (where, row) in enumerate(iter_jsonl(path)):
            row.setdefault("id", f"{path.stem}-{number}")
            asked = row.get("messages") or row.get("instruction")
            if not asked or not isinstance(asked, list if "messages" in row else str):
                raise UserError(f"{where}: neither instruction nor messages", "run instructions/build_instructions.py")
            if row["id"] in seen:
                raise UserError(f"{where}: id {row['id']!r} repeats", "ids must be unique in a file")
            seen.add(row["id"])
            rows.append({**row, "where": where})
        tasks[name] = rows
    return tasks


def token_ids(tokenizer, row: dict) -> list[int]:
    """A prompt's ids. A plain instruction begins with BOS, once; a chat begins as in training, without it."""
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    return tokenizer(row["instruction"])["input_ids"]


def prompt_hash(row: dict) -> str:
    """SHA-256 of what the model is asked."""
    return hashlib.sha256(dumps(row.get("messages") or row["instruction"]).encode()).hexdigest()


def check_units(text: str, dsu: dict, where: str) -> None:
    """Raise UserError if a text holds speech units that the tokenizer lacks."""
    for char in set(text):
        unit = ord(char) - dsu["offset"]
        if ord(char) >= OFFSET and not 0 <= unit < dsu["num_units"]:
            problem = f"speech unit U+{ord(char):X} (id {unit}) is none of the tokenizer's {dsu['num_units']}"
            raise UserError(f"{where}: {problem}", "use the checkpoint and the k-means that belong together")


def encode(checkpoint: Path, tasks: dict[str, list[dict]], limit: int, num_rows: int) -> dict[str, list[list[int]]]:
    """Tokenize all prompts, (number of rows, their lengths); refuse any that is too long for the model."""
    from transformers import AutoTokenizer

    from towerspeech.units import read_metadata

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    if len(tokenizer) > num_rows:
        raise UserError(
            f"{checkpoint}: its tokenizer has {len(tokenizer):,} tokens, its model only {num_rows:,} embedding rows",
            "keep together the tokenizer and the model that train_bpe_tokenizer/extend_model.py made for it",
        )
    has_units = (checkpoint / "speech_units.json").is_file()
    dsu = read_metadata(checkpoint) if has_units else {"num_units": 0, "offset": OFFSET}
    encoded = {}
    for name, rows in tasks.items():
        encoded[name] = []
        for row in rows:
            where = row.get("where", f"{name}, id {row['id']}")  # rows made from units come from no prompt file
            check_units(dumps(row.get("messages") or row["instruction"]), dsu, where)
            if "messages" in row and not tokenizer.chat_template:
                raise UserError(f"{where}: {checkpoint} has no chat template", "use prompts of another --style")
            ids = token_ids(tokenizer, row)
            if len(ids) >= limit:
                raise UserError(
                    f"{where}: prompt {row['id']!r} has {len(ids):,} tokens, the model's context is {limit:,}",
                    "use fewer shots or a model with a longer context",
                )
            encoded[name].append(ids)
    return encoded


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
    names = [path.resolve().name for path in checkpoints]
    if len(set(names)) < len(names):
        raise UserError(f"two checkpoints have the same name: {', '.join(sorted(names))}", "rename a folder")
    for checkpoint in checkpoints:
        read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
    speed = ["tensor_parallel_size", "gpu_memory_utilization"]
    for checkpoint, name in zip(checkpoints, names, strict=True):
        own = {**{key: value for key, value in arguments.items() if key != "checkpoints"}, "checkpoint": checkpoint}
        with stage(output_dir / name, own, inputs=["checkpoint", *inputs], ignore=speed) as job:
            if not job.done:
                decode_one(checkpoint.resolve(), load(checkpoint), decoding, job)


def decode_one(checkpoint: Path, tasks: dict[str, list[dict]], decoding: Decoding, job) -> None:
    """Decode what is missing of all tasks with one checkpoint."""
    config = read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
    limit = min(decoding.max_model_len or config["max_position_embeddings"], config["max_position_embeddings"])
    encoded = encode(checkpoint, tasks, limit, config["vocab_size"])
    results, missing = {}, []
    for name, rows in tasks.items():
        partial = job.output_dir / f".{name.replace('/', '-')}.partial"
        results[name] = finished_rows(job.output_dir / name, rows) | finished_rows(partial, rows)
        missing += [(name, i) for i, row in enumerate(rows) if row["id"] not in results[name]]
    total = sum(map(len, tasks.values()))
    if len(missing) < total:
        print(f"{checkpoint.name}: {total - len(missing):,} of {total:,} prompts were done before", flush=True)
    if missing:
        run_engine(checkpoint, tasks, encoded, missing, results, limit, decoding, job)
    reasons: dict[str, int] = {}
    for name, rows in tasks.items():
        write_jsonl(job.output_dir / name, (results[name][row["id"]] for row in rows))
        for result in results[name].values():
            reasons[result["finish_reason"]] = reasons.get(result["finish_reason"], 0) + 1
    for name in tasks:
        (job.output_dir / f".{name.replace('/', '-')}.partial").unlink(missing_ok=True)
    job.counts.update({"prompts": total, "finish_reasons": dict(sorted(reasons.items()))})
    print(f"{checkpoint.name}: {total:,} generations, finished by {reasons}: {job.output_dir}", flush=True)


def run_engine(checkpoint, tasks, encoded, missing, results, limit, decoding: Decoding, job) -> None:
    """Put the missing prompts through vLLM; append each result to its task's partial file as it comes."""
    from tqdm import tqdm

    # One process: what is killed is gone, and several checkpoints in turn import vLLM once.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    log = job.output_dir / "vllm.log"
    print(f"{checkpoint.name}: starting vLLM for {len(missing):,} prompts (its log: {log})", flush=True)
    with quiet(log) as terminal:
        import torch
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory

        llm = LLM(
            model=str(checkpoint),
            dtype=decoding.dtype,
            max_model_len=limit,
            tensor_parallel_size=decoding.tensor_parallel_size,
            gpu_memory_utilization=decoding.gpu_memory_utilization,
            enable_prefix_caching=True,
            enforce_eager=not torch.cuda.is_available(),  # on CPU, compiling costs more than most runs take
            seed=decoding.seed,
        )
        stop_ids = prompts.stop_token_ids(llm.get_tokenizer())
        for number, (name, i) in enumerate(missing):
            ids = encoded[name][i]
            row = tasks[name][i]
            params = SamplingParams(
                max_tokens=min(decoding.max_new_tokens, limit - len(ids)),
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=int(hashlib.sha256(f"{decoding.seed} {name} {row['id']}".encode()).hexdigest()[:8], 16),
                stop=prompts.stop_strings(chat="messages" in row),
                stop_token_ids=stop_ids,
            )
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        partials = {}
        num_tokens = 0
        with tqdm(total=len(missing), unit=" prompts", desc=checkpoint.name, mininterval=1, file=terminal) as progress:
            while llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    if not output.finished:
                        continue
                    name, i = missing[int(output.request_id)]
                    row, completion = tasks[name][i], output.outputs[0]
                    results[name][row["id"]] = {
                        "id": row["id"],
                        **{key: row.get(key) for key in METADATA},
                        "reference": row.get("output"),
                        "prompt_sha256": prompt_hash(row),
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "num_tokens": len(completion.token_ids),
                    }
                    if name not in partials:
                        path = job.output_dir / f".{name.replace('/', '-')}.partial"
                        partials[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
                    partials[name].write(dumps(results[name][row["id"]]) + "\n")
                    partials[name].flush()
                    num_tokens += len(completion.token_ids)
                    progress.set_postfix(tokens=f"{num_tokens:,}", refresh=False)
                    progress.update()
        for file in partials.values():
            file.close()
        del llm
        cleanup_dist_env_and_memory()
