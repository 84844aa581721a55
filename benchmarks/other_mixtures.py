"""Text and units made token files as others do, for bench_mixture.py to compare with.

Each way takes the kind of the source (``text`` or ``speech``), its files in order, a tokenizer folder, the file of
tokens to write, and the number of processes; it is called in a process of its own. Imports are here, since they count.
"""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def with_datasets(
    kind: str, files: list[Path], tokenizer: Path, target: Path, num_processes: int, threads: bool = False
) -> None:
    """``load_dataset`` and a batched ``map`` that calls the fast tokenizer, then all rows' ids into one file.

    ``threads`` lets the tokenizer encode a batch on all cores. No cache of an earlier run is there.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    eod_id = loaded.convert_tokens_to_ids("<EOD>")

    def encode(batch: dict) -> dict:
        texts = documents(batch["units"], batch["text"]) if kind == "speech" else batch["text"]
        ids = loaded(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"ids": [[*row, eod_id] for row in ids]}

    cache = target.with_suffix(".cache")
    shutil.rmtree(cache, ignore_errors=True)
    form = "parquet" if files[0].suffix == ".parquet" else "json"
    words = {"split": "train", "cache_dir": str(cache), "num_proc": num_processes if num_processes > 1 else None}
    rows = datasets.load_dataset(form, data_files=[str(file) for file in files], **words)
    ids = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    encoded = rows.map(
        encode, batched=True, remove_columns=rows.column_names, features=ids, num_proc=words["num_proc"]
    )
    with open(target, "wb") as file:
        for batch in encoded.with_format("arrow").iter(1000):
            file.write(batch.column("ids").combine_chunks().flatten().to_numpy().tobytes())
    shutil.rmtree(cache)


def with_megatron(kind: str, files: list[Path], tokenizer: Path, target: Path, num_processes: int) -> None:
    """The loop of Megatron-LM's tools/preprocess_data.py: a pool, of which a call encodes a line, and its own writer.

    Processes are forked, 32 lines are sent at a time and documents end with EOD, all as there. Of Parquet, which it
    does not read, a row is sent as a line.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import multiprocessing

    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder = LineEncoder(kind, tokenizer)
    encoder.initializer()  # there, too, the process that writes has a tokenizer
    builder = IndexedDatasetBuilder(str(target), dtype=np.uint16)
    with multiprocessing.get_context("fork").Pool(num_processes, initializer=encoder.initializer) as pool:
        for ids, lengths in pool.imap(encoder.encode, lines(files), 32):
            builder.add_document(ids, lengths)
    builder.finalize(str(target.with_suffix(".idx")))


class LineEncoder:
    """Encodes a line, or a row of Parquet, in a process of its own."""

    tokenizer = None  # of a process
    eod_id = 0

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder

    def initializer(self) -> None:
        from transformers import AutoTokenizer

        LineEncoder.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        LineEncoder.eod_id = self.tokenizer.convert_tokens_to_ids("<EOD>")

    def encode(self, line: str | dict) -> tuple[list[int], list[int]]:
        row = json.loads(line) if isinstance(line, str) else line
        text = documents([row["units"]], [row["text"]])[0] if self.kind == "speech" else row["text"]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(self.eod_id)
        return ids, [len(ids)]


def lines(files: list[Path]) -> Iterator[str | dict]:
    """Lines of JSONL.gz, or the rows of Parquet: their units and text."""
    from pyarrow.parquet import ParquetFile

    for path in files:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from file
        else:
            with ParquetFile(path) as file:
                columns = [name for name in ("units", "text") if name in file.schema_arrow.names]
                for batch in file.iter_batches(1024, columns=columns):
                    yield from batch.to_pylist()


def documents(units: list[list[int]], texts: list[str]) -> list[str]:
    """The document of each utterance, as build_mixture.py makes it."""
    from towerspeech.prompts import speech_document
    from towerspeech.units import to_text

    return [speech_document(to_text(row), text) for row, text in zip(units, texts, strict=True)]
