"""Prompts -> generations: one engine a checkpoint, token ids in, every result written as it comes."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from towerspeech import engine
from towerspeech.errors import UserError
from towerspeech.files import cut_torn_line, read_json
from towerspeech.model_folder import check_tokenizer_fits
from towerspeech.outside_text import check_units, marker, text_tokenizer
from towerspeech.records import METADATA, dumps, prompt_hash, write_jsonl
from towerspeech.stage import Stage, stage
from towerspeech.tokenizer import read_metadata, stop_token_ids

MODEL_FOLDER = "export it with continued_pretraining/export_checkpoint.py"
CONFIG_FIELDS = ("vocab_size", "max_position_embeddings")
SPEED = ("tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization")  # they change no output


@dataclass
class Decoding:
    """How to decode.

    Attributes:
        max_new_tokens: Limit of a generation, in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus of sampling.
        seed: Seed of the sampling; every prompt draws from its own stream.
        dtype: Precision of the computation; auto takes the checkpoint's.
        max_model_len: Limit of prompt and generation together, in tokens; default: the model's context.
        tensor_parallel_size: GPUs that a model is split over.
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

    With a ``marker`` and its ``text_tokenizer``, what the prompt spells is text.
    """
    if "messages" in row:
        messages = [{**turn, "content": mark(turn["content"])} for turn in row["messages"]]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer(mark(row["instruction"]))["input_ids"]


def encode(checkpoint: Path, tasks: dict[str, list[dict]], limit: int, num_rows: int):
    """The tokenizer, and {output file: [ids of each prompt]}; none may be too long for the model."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

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
                problem = f"{where}: prompt {row['id']!r} has {len(ids):,} tokens, the model's context is {limit:,}"
                raise UserError(problem, "use fewer shots or a model with a longer context")
            encoded[name].append(ids)
    return tokenizer, encoded


def partial_file(output_dir: Path, name: str) -> Path:
    """Where results are kept in order of completion until their file is whole."""
    return output_dir / f".{name.replace('/', '-')}.partial"


def finished_rows(partial: Path, rows: list[dict]) -> dict[str, dict]:
    """Results that an earlier, killed run left, by id. Its last line may be cut off."""
    if not partial.is_file():
        return {}
    hashes = {row["id"]: prompt_hash(row) for row in rows}
    cut_torn_line(partial)
    results = map(json.loads, partial.read_bytes().splitlines())
    return {result["id"]: result for result in results if hashes.get(result["id"]) == result["prompt_sha256"]}


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

    ``load`` gives a checkpoint's {output file: prompt rows}; ``arguments`` are the command's other ones, of which
    ``inputs`` are paths.
    """
    for name in ("data_parallel_size", "tensor_parallel_size", "max_new_tokens"):
        if getattr(decoding, name) < 1:
            raise UserError(f"--{name} is {getattr(decoding, name)}", "it must be 1 or more")
    names = [path.resolve().name for path in checkpoints]
    if len(set(names)) < len(names):
        raise UserError(f"two checkpoints have the same name: {', '.join(sorted(names))}", "rename a folder")
    for checkpoint in checkpoints:
        read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
    for checkpoint, name in zip(checkpoints, names, strict=True):
        asked = {**arguments, **asdict(decoding), "checkpoint": checkpoint}
        with stage(__file__, output_dir / name, asked, inputs=["checkpoint", *inputs], ignore=SPEED) as work:
            if not work.done:
                Generation(checkpoint.resolve(), load(checkpoint), decoding, work).run()


class Generation:
    """All tasks with one checkpoint: what an earlier run left is kept, the rest decoded, each file published whole."""

    def __init__(self, checkpoint: Path, tasks: dict[str, list[dict]], decoding: Decoding, work: Stage):
        self.checkpoint, self.tasks, self.decoding, self.work = checkpoint, tasks, decoding, work
        self.config = read_json(checkpoint / "config.json", MODEL_FOLDER, CONFIG_FIELDS)
        context = self.config["max_position_embeddings"]
        self.limit = decoding.max_model_len or context
        if self.limit > context:
            problem = f"--max_model_len is {self.limit:,}, but the context of {checkpoint} is {context:,} tokens"
            raise UserError(problem, "lower it")
        self.tokenizer, self.encoded = encode(checkpoint, tasks, self.limit, self.config["vocab_size"])
        self.results: dict[str, dict[str, dict]] = {}  # task -> id -> row
        self.missing: list[tuple[str, int]] = []  # task, number of the prompt
        for name, rows in tasks.items():
            file, partial = work.output_dir / name, partial_file(work.output_dir, name)
            self.results[name] = finished_rows(file, rows) | finished_rows(partial, rows)
            undone = [i for i, row in enumerate(rows) if row["id"] not in self.results[name]]
            # Prompts that begin alike follow one another: their common beginning is computed once (prefix cache).
            undone.sort(key=self.encoded[name].__getitem__)
            self.missing += [(name, i) for i in undone]

    def run(self) -> None:
        """Decode what is missing; a task's file appears when its last prompt is done."""
        total = sum(map(len, self.tasks.values()))
        if len(self.missing) < total:
            done_before = total - len(self.missing)
            print(f"{self.checkpoint.name}: {done_before:,} of {total:,} prompts were done before", flush=True)
        if self.missing:
            self.decode_missing()
        for name in self.tasks:
            if partial_file(self.work.output_dir, name).is_file() or not (self.work.output_dir / name).is_file():
                self.finish(name)  # a kill came just before
        rows = [row for by_id in self.results.values() for row in by_id.values()]
        reasons = Counter(row["finish_reason"] for row in rows)
        self.work.counts["prompts"] = total
        self.work.counts["new_tokens"] = sum(row["num_tokens"] for row in rows)
        self.work.counts["finish_reasons"] = dict(sorted(reasons.items()))
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        print(f"{self.checkpoint.name}: {total:,} generations, finished by {told}: {self.work.output_dir}", flush=True)

    def finish(self, name: str) -> None:
        """Publish a task's file, in the order of its prompts."""
        write_jsonl(self.work.output_dir / name, (self.results[name][row["id"]] for row in self.tasks[name]))
        partial_file(self.work.output_dir, name).unlink(missing_ok=True)

    def requests(self) -> list[engine.Request]:
        """The missing prompts as the engine takes them; a request's key is its place among them."""
        requests = []
        for key, (name, i) in enumerate(self.missing):
            row, ids = self.tasks[name][i], self.encoded[name][i]
            stream = f"{self.decoding.seed} {name} {row['id']}"
            seed = int(hashlib.sha256(stream.encode()).hexdigest()[:8], 16)
            max_tokens = min(self.decoding.max_new_tokens, self.limit - len(ids))
            # A completion ends at a newline or at an end-of-sequence id; a chat answer at an id alone. Ids, never
            # strings such as "<\s>", which the original waited for in vain.
            stop = [] if "messages" in row else ["\n"]
            requests.append(engine.Request(key, ids, max_tokens, seed, stop))
        return requests

    def engine_arguments(self, requests: list[engine.Request]) -> dict:
        """Arguments of vllm.LLM."""
        dtype = self.decoding.dtype
        if dtype == "auto":  # vLLM's own auto would decode a float32 checkpoint in half precision
            dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "auto"
        on_gpu = engine.on_gpu()
        arguments = {
            "model": str(self.checkpoint),
            "dtype": dtype,
            "max_model_len": self.limit,
            "tensor_parallel_size": self.decoding.tensor_parallel_size,
            "gpu_memory_utilization": self.decoding.gpu_memory_utilization,
            "enable_prefix_caching": True,
            "enforce_eager": not on_gpu,  # on a CPU, compiling costs more than most runs take
            "seed": self.decoding.seed,
        }
        if not on_gpu:
            arguments["block_size"] = engine.CPU_BLOCK
            lengths = [len(request.prompt_token_ids) + request.max_tokens for request in requests]
            arguments["max_model_len"] = max(lengths)  # the cache must hold so much, or vLLM does not start
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                size = engine.kv_cache_bytes(self.config, lengths, self.decoding.data_parallel_size)
                arguments["kv_cache_memory_bytes"] = size
        return arguments

    def decode_missing(self) -> None:
        """Decode the missing prompts with vLLM; every result is kept as it comes."""
        from tqdm import tqdm

        checkpoint, log = self.checkpoint.name, self.work.output_dir / "vllm.log"
        requests = self.requests()
        sampling = {
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "stop_token_ids": stop_token_ids(self.tokenizer),
        }
        ranks = self.decoding.data_parallel_size
        print(f"{checkpoint}: starting vLLM for {len(requests):,} prompts (its log: {log})", flush=True)
        started = time.monotonic()
        num_tokens, cached = 0, 0
        with closing(engine.run_engines(requests, self.engine_arguments(requests), sampling, ranks, log)) as results:
            next(results)  # an engine is up
            ready = time.monotonic()
            answers = filter(None, results)  # without the other engines' word that they are up
            bar = tqdm(answers, desc=checkpoint, total=len(requests), unit=" prompts", mininterval=1)
            for result in bar:
                last = time.monotonic()
                self.keep(result)
                num_tokens, cached = num_tokens + result.num_tokens, cached + result.cached
                bar.set_postfix(tokens_per_s=f"{num_tokens / (last - ready):,.0f}", refresh=False)
        self.work.counts["last_attempt"] = {  # a run that was killed before did a part of the work then
            "start_s": round(ready - started, 1),
            "decode_s": round(last - ready, 1),  # not the engine's start and end
            "new_tokens": num_tokens,
            "prompts": len(requests),
            "prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
            "cached_tokens": cached,
        }

    def keep(self, result: engine.Result) -> None:
        """Write a result to its task's partial file; the task's last one finishes it."""
        name, i = self.missing[result.key]
        row = self.result_row(self.tasks[name][i], result)
        with open(partial_file(self.work.output_dir, name), "a", encoding="utf-8") as file:
            file.write(dumps(row) + "\n")
        self.results[name][row["id"]] = row
        if len(self.results[name]) == len(self.tasks[name]):
            self.finish(name)

    @staticmethod
    def result_row(prompt: dict, result: engine.Result) -> dict:
        """A row of a generations file."""
        return {
            "id": prompt["id"],
            **{key: prompt.get(key) for key in METADATA},
            "reference": prompt.get("output"),
            "prompt_sha256": prompt_hash(prompt),
            "text": result.text,
            "finish_reason": result.finish_reason,
            "num_tokens": result.num_tokens,
        }
