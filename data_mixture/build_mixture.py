"""Tokenize speech units and text into a mixture with exact token budgets.

Usage: python data_mixture/build_mixture.py --config data_mixture/mixtures/towerspeech_6b.yaml \\
           --tokenizer tokenizer/ --output_dir mixture/towerspeech_6b

Reads units Parquet and JSONL text; writes, for each source, <source>.bin and .idx in Megatron's indexed format, and
manifest.json: documents, tokens, budget, epochs, and the data_path that a Megatron trainer takes. All documents of a
source are tokenized; which of them are trained on, up to the budget, the trainer's seeded shuffle decides.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from towerspeech.stage import UserError, check_exists, run, stage, write_json

BATCH_DOCUMENTS = 2048  # tokenized at once, on all cores; also how much a killed run repeats at most, times 16


@dataclass
class Source:
    """One source of the mixture.

    Attributes:
        name: Names its files.
        kind: ``speech`` (units Parquet with transcripts), ``text`` (JSONL: text) or ``parallel`` (JSONL: src_lang,
            tgt_lang, source, target).
        paths: Units folders or JSONL files.
        budget: Tokens to train on, counted after tokenization.
        max_epochs: How often the source may be repeated to fill its budget.
    """

    name: str
    kind: Literal["speech", "text", "parallel"]
    paths: list[str]
    budget: int
    max_epochs: float = 1.0


def text_of(row: dict, field: str, where: str) -> str:
    """A row's field, which must be text: a null would be trained on as the word None."""
    if not isinstance(row[field], str):
        raise UserError(f"{where}: {field} must be text, got {row[field]!r}", "mend or remove the line")
    return row[field]


def documents(source: Source, num_units: int, offset: int) -> Iterator[str]:
    """Stream a source's documents as text, in the order of its files."""
    from towerspeech import prompts, records, units

    for path in map(Path, source.paths):
        if source.kind == "speech":
            for row in records.read_units(path, num_units):
                if row["text"] is None:
                    raise UserError(f"{path}: utterance {row['id']} has no text", "label it from a manifest with text")
                yield prompts.speech_document(units.to_text(row["units"], offset), row["text"])
        elif source.kind == "text":
            for where, row in records.iter_jsonl(path, ["text"]):
                yield text_of(row, "text", where)
        else:
            fields = ("src_lang", "source", "tgt_lang", "target")
            for where, row in records.iter_jsonl(path, fields):
                yield prompts.parallel_document(*(text_of(row, field, where) for field in fields))


def tokenize(job, source: Source, tokenizer, texts: Iterator[str], bos: bool, eod_id: int) -> None:
    """Write a source's .bin and .idx. Every 16 batches are noted, and a killed run goes on from the last note."""
    import itertools
    import os

    import numpy as np
    from tqdm import tqdm

    from towerspeech.indexed import token_dtype, write_index

    dtype = token_dtype(len(tokenizer))
    before = [tokenizer.bos_token_id] if bos else []
    partial, sizes_file = job.output_dir / f".{source.name}.bin", job.output_dir / f".{source.name}.sizes"
    note = job.output_dir / f".{source.name}.json"
    done = json.loads(note.read_text()) if note.is_file() else {"documents": 0, "tokens": 0}
    with open(partial, "ab") as data, open(sizes_file, "ab") as sizes:
        data.truncate(done["tokens"] * np.dtype(dtype).itemsize)
        sizes.truncate(done["documents"] * 4)
        progress = tqdm(initial=done["documents"], unit=" documents", desc=source.name, mininterval=1)
        rest = itertools.islice(texts, done["documents"], None)
        for number in itertools.count(1):
            batch = list(itertools.islice(rest, BATCH_DOCUMENTS))
            if not batch or number % 16 == 0:
                for file in (data, sizes):
                    file.flush()
                    os.fsync(file.fileno())
                write_json(note, done)
            if not batch:
                break
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            rows = [[*before, *ids, eod_id] for ids in encoded]
            np.array([token for row in rows for token in row], dtype).tofile(data)
            np.array([len(row) for row in rows], np.int32).tofile(sizes)
            done["documents"] += len(rows)
            done["tokens"] += sum(map(len, rows))
            progress.update(len(rows))
        progress.close()
    with job.publish(f"{source.name}.idx") as path:
        write_index(path, np.fromfile(sizes_file, np.int32), dtype)
    os.replace(partial, job.output_dir / f"{source.name}.bin")
    sizes_file.unlink()
    note.unlink()


def build_mixture(
    tokenizer: Path,
    output_dir: Path,
    sources: list[Source],
    bos: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Build a mixture.

    Args:
        tokenizer: Folder written by merge_tokenizer.py (any Hugging Face folder, if no source is speech).
        output_dir: New folder.
        sources: What to mix; in YAML, a list of name, kind, paths, budget and max_epochs.
        bos: Begin documents with BOS. Megatron does not; a model that is prompted with BOS and was not pretrained
            with it needs it.
        seed: Of the trainer's shuffle; recorded in the manifest.
        overwrite: Replace the output of a run with other arguments.
    """
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise UserError(f"sources need distinct names, got {names}", "mend the config")
    for source in sources:
        for path in source.paths:
            check_exists(Path(path), f"check paths of source {source.name!r}")
        if source.budget <= 0 or not source.paths:
            raise UserError(f"source {source.name!r} needs paths and a positive budget", "mend the config")
    arguments = {key: value for key, value in locals().items() if key in build_mixture.__annotations__}
    # Paths are compared by content, the rest of a source by value.
    arguments["paths"] = [path for source in sources for path in source.paths]
    arguments["sources"] = [{**asdict(source), "paths": len(source.paths)} for source in sources]

    with stage(output_dir, arguments, inputs=["tokenizer", "paths"]) as job:
        if job.done:
            return
        from transformers import AutoTokenizer

        from towerspeech import units
        from towerspeech.indexed import IndexedTokens
        from towerspeech.prompts import EOD

        tokenizer_sha256 = units.tokenizer_hash(tokenizer)  # refuses a folder that holds no tokenizer
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        needs_units = any(source.kind == "speech" for source in sources)
        dsu = units.read_metadata(tokenizer) if needs_units else {"num_units": 0, "offset": 0}
        eod_id = loaded.get_vocab().get(EOD, loaded.eos_token_id)
        if eod_id is None or (bos and loaded.bos_token_id is None):
            raise UserError(
                f"{tokenizer} has no {'BOS' if eod_id is not None else '<EOD> or EOS'} token", "name another"
            )
        manifest_sources = []
        for source in sources:
            prefix = output_dir / source.name
            if not prefix.with_name(f"{source.name}.bin").is_file():
                tokenize(job, source, loaded, documents(source, dsu["num_units"], dsu["offset"]), bos, eod_id)
            tokens = IndexedTokens(prefix)
            total = int(tokens.sizes.sum(dtype="int64"))
            epochs = source.budget / total if total else float("inf")
            if epochs > source.max_epochs:
                raise UserError(
                    f"source {source.name!r} has {total:,} tokens for a budget of {source.budget:,}",
                    f"add data, lower its budget, or allow max_epochs: {epochs:.2f} (it is {source.max_epochs})",
                )
            print(
                f"{source.name}: {len(tokens.sizes):,} documents, {total:,} tokens, budget {source.budget:,}"
                f" ({epochs:.2f} epochs)"
            )
            manifest_sources.append(
                {
                    "name": source.name,
                    "kind": source.kind,
                    "documents": len(tokens.sizes),
                    "tokens": total,
                    "budget": source.budget,
                    "epochs": round(epochs, 4),
                }
            )
        budget = sum(source.budget for source in sources)
        with job.publish("manifest.json") as path:
            manifest = {
                "tokenizer_sha256": tokenizer_sha256,
                "vocab_size": len(loaded),
                "eod_id": eod_id,
                "bos": bos,
                "seed": seed,
                "budget": budget,
                "sources": manifest_sources,
                # Megatron draws samples of equal length, so token budgets are its weights.
                "data_path": " ".join(f"{source.budget / budget:.6f} {source.name}" for source in sources),
            }
            path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
        job.counts.update({"budget": budget, **{source["name"]: source["tokens"] for source in manifest_sources}})
        print(f"mixture of {budget:,} tokens: {output_dir}")


if __name__ == "__main__":
    run(build_mixture)
