"""Tokenize speech units and text into a mixture with exact token budgets.

Usage: python data_mixture/build_mixture.py --config data_mixture/mixtures/towerspeech_6b.yaml \\
           --tokenizer tokenizer/ --output_dir mixture/towerspeech_6b

Reads units Parquet and JSONL text; writes, for each source, <source>.bin and .idx in Megatron's indexed format, and
manifest.json: documents, tokens, budget, epochs, and the data_path that a Megatron trainer takes. All documents of a
source are tokenized; which of them are trained on, up to the budget, the trainer's seeded shuffle decides.

The tokens are those of the Hugging Face tokenizer called on each document. Text is encoded by it, on all cores; runs
of units by SentencePiece, which does the same merges several times as fast. The two are compared before they are used.
"""

import itertools
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from towerspeech import prompts, records, units
from towerspeech.command import UserError, run
from towerspeech.files import check_exists, write_json
from towerspeech.outside_text import MARK, check_outside_text, marker, text_tokenizer
from towerspeech.stage import stage
from towerspeech.tokenizer import read_metadata, tokenizer_hash, unit_tokens
from towerspeech.units_parquet import check_one_kmeans, read_unit_arrays

BATCH_DOCUMENTS = 2048  # tokenized at once, on all cores; also how much a killed run repeats at most, times 16
COMPARED_DOCUMENTS = 64  # of each source, with the tokenizer's own ids
UNKNOWN, BPE = 2, 2  # SentencePiece's types of the <unk> piece and of a model


# --- Reading --------------------------------------------------------------------------------------
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


# What has nothing to learn from is left out and counted.
NO_UNITS, NO_TRANSCRIPT, NO_TEXT = "without units", "without a transcript", "without text"


def documents(
    source: Source, num_units: int, offset: int, mark: Callable[[str], str], left_out: Counter
) -> Iterator[tuple[str, np.ndarray]]:
    """Stream a source's documents in the order of its files, each as its text and the units of its run, (n,) uint32.

    In the text, unit 0 stands for the whole run, as the first unit in it. Without a run the text is the document.

    Args:
        source: What to read.
        num_units: Every unit must lie below it.
        offset: Code point of unit 0.
        mark: For texts from outside (towerspeech/tokenizer.py).
        left_out: Counts documents that are left out, by reason.

    Raises:
        UserError: A row is malformed, spells units in its text, or is speech of another language than English.
    """
    stand_in, no_units = units.to_text([0], offset), np.zeros(0, np.uint32)

    def outside(text: str, where: str) -> str:
        check_outside_text(text, where)
        return mark(text)

    for path in map(Path, source.paths):
        if source.kind == "speech":
            for flat, ends, batch, place in read_unit_arrays(path, num_units, ["language", "text"]):
                runs = np.split(flat, ends[:-1])
                languages, texts = batch.column("language").to_pylist(), batch.column("text").to_pylist()
                for row, (speech, language, text) in enumerate(zip(runs, languages, texts, strict=True)):
                    if language != "en":
                        problem = f"{place(row)}: language {language!r}, but speech must be English (en)"
                        raise UserError(problem, "leave other languages' speech out of the mixture")
                    if not len(speech) or not (text or "").strip():
                        left_out[NO_TRANSCRIPT if len(speech) else NO_UNITS] += 1
                        continue
                    yield prompts.speech_document(stand_in, outside(text, place(row))), speech
        elif source.kind == "text":
            for where, row in records.iter_jsonl(path, ["text"]):
                if not isinstance(row["text"], str):
                    raise UserError(f"{where}: text must be text, got {row['text']!r}", "mend or remove the line")
                if not row["text"].strip():
                    left_out[NO_TEXT] += 1
                    continue
                yield outside(row["text"], where), no_units
        else:
            for _, row in records.iter_parallel(path):
                if not row["source"].strip() or not row["target"].strip():
                    left_out[NO_TEXT] += 1
                    continue
                sides = row["src_lang"], mark(row["source"]), row["tgt_lang"], mark(row["target"])
                yield prompts.parallel_document(*sides), no_units


# --- Encoding -------------------------------------------------------------------------------------
def ranks_of_merges(tokenizer) -> dict[str, int]:
    """The tokens that a Hugging Face BPE's merges make, each with the rank of the best of them."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", ())
    return {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}


def unit_processor(pieces: list[str]):
    """A SentencePiece BPE of these pieces, the best first; they follow <unk>, which has id 0."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = BPE
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece="<unk>", score=0, type=UNKNOWN)
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


class Encoder:
    """Encodes documents as a Hugging Face tokenizer does, without special tokens, several times as fast.

    Marked text from outside makes no control tokens (towerspeech/tokenizer.py).

    merge_tokenizer.py sees to it that no token crosses the border between text and units, and that the tokens of a run
    of units do not depend on what is around it. So the tokenizer encodes the text, with one unit in the run's place;
    SentencePiece encodes the run; and the run's tokens replace that unit's, whose place is known from the text before
    it, which all speech documents share.
    """

    def __init__(self, tokenizer, num_units: int, offset: int):
        """Prepare for ``num_units`` units; 0 if there are to be no runs."""
        from towerspeech.indexed import token_dtype

        self.tokenizer, self.offset, self.dtype = tokenizer, offset, token_dtype(len(tokenizer))
        self.backend = text_tokenizer(tokenizer).backend_tokenizer
        self.stand_in = units.to_text([0], offset)
        before = prompts.speech_document(self.stand_in, "").partition(self.stand_in)[0]
        self.position = len(self.reference(before + self.stand_in)) - 1  # of the stand-in's token

        tokens = unit_tokens(tokenizer, num_units, offset) if num_units else {}
        names = dict(zip(tokens, tokenizer.convert_ids_to_tokens(list(tokens)), strict=True))
        singles = {found[0]: index for index, found in tokens.items() if len(found) == 1}
        missing = sorted(set(range(num_units)) - set(singles))
        if missing:
            remedy = "make it anew with train_bpe_tokenizer/merge_tokenizer.py"
            raise UserError(f"the tokenizer has no token for unit {missing[0]}", remedy)
        ranks = ranks_of_merges(tokenizer) if len(tokens) > num_units else {}  # their ids may have another order
        merged = [index for index, found in tokens.items() if len(found) > 1 and names[index] in ranks]
        merged.sort(key=lambda index: ranks[names[index]])
        ids = [singles[unit] for unit in range(num_units)]
        self.processor = None  # without merges, a unit's id is looked up
        if merged:
            ids = [*merged, *ids]
            self.processor = unit_processor([units.to_text(tokens[index], offset) for index in ids])
            ids = [0, *ids]  # <unk> does not occur
        self.lookup = np.array(ids, self.dtype)

    def reference(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def run_of(self, speech: np.ndarray) -> str:
        """Units, (n,) uint32, as private-use characters; units.to_text for arrays."""
        return (speech + self.offset).tobytes().decode("utf-32-le")

    def __call__(self, batch: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """Token ids, (num_tokens,), of each of some ``documents``."""
        # The tokenizer's own call, but without offsets, masks and types: they take most of its time.
        encodings = self.backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        runs = [speech for _, speech in batch if len(speech)]
        if self.processor is not None and runs:
            runs = self.processor.encode([self.run_of(speech) for speech in runs], return_type="numpy")
        runs = iter(runs)
        rows = []
        for (_, speech), encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, self.dtype)
            if len(speech):
                ids = np.concatenate([ids[: self.position], self.lookup[next(runs)], ids[self.position + 1 :]])
            rows.append(ids)
        return rows

    def compare(self, batch: list[tuple[str, np.ndarray]]) -> None:
        """Raise UserError if the ids of some ``documents`` without control tokens are not the tokenizer's own."""
        batch = [(text, speech) for text, speech in batch if MARK not in text]
        for (text, speech), ids in zip(batch, self(batch), strict=True):
            document = text.replace(self.stand_in, self.run_of(speech), 1) if len(speech) else text
            if ids.tolist() != self.reference(document):
                raise UserError(
                    f"the tokenizer's tokens of units depend on the text around them: {document[:80]!r}",
                    "make it anew with train_bpe_tokenizer/merge_tokenizer.py",
                )


def encode_ahead(encoder: Encoder, batches: Iterator[list]) -> Iterator[list[np.ndarray]]:
    """Encode batches in their order, two in the background while others are read and written."""
    with ThreadPoolExecutor(2) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(encoder, batch))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def tokenize(
    work,
    source: Source,
    encoder: Encoder,
    stream: Iterator[tuple],
    before: list[int],
    eod_id: int,
    left_out: Counter,
) -> None:
    """Write a source's .bin and .idx. Every 16 batches are noted, and a killed run goes on from the last note.

    The last note stays: it tells what was left out.
    """
    from tqdm import tqdm

    from towerspeech.indexed import write_index

    dtype = encoder.dtype
    begin, end = np.array(before, dtype), np.array([eod_id], dtype)
    partial, sizes_file = work.output_dir / f".{source.name}.bin", work.output_dir / f".{source.name}.sizes"
    note = work.output_dir / f".{source.name}.json"
    done = json.loads(note.read_text()) if note.is_file() else {}
    if "left_out" not in done:  # of an earlier version, which had other documents
        done = {"documents": 0, "tokens": 0}
    with open(partial, "ab") as data, open(sizes_file, "ab") as sizes:

        def note_down() -> None:
            for file in (data, sizes):
                file.flush()
                os.fsync(file.fileno())
            write_json(note, {**done, "left_out": left_out})

        data.truncate(done["tokens"] * np.dtype(dtype).itemsize)
        sizes.truncate(done["documents"] * 4)
        progress = tqdm(initial=done["documents"], unit=" documents", desc=source.name, mininterval=1)
        rest = itertools.islice(stream, done["documents"], None)
        batches = iter(lambda: list(itertools.islice(rest, BATCH_DOCUMENTS)), [])
        for number, rows in enumerate(encode_ahead(encoder, batches), 1):
            lengths = np.array([len(begin) + len(ids) + 1 for ids in rows], np.int32)
            data.write(
                np.concatenate([part for ids in rows for part in (begin, ids, end)])
            )  # tofile hides a full disk
            sizes.write(lengths)
            done["documents"] += len(rows)
            done["tokens"] += int(lengths.sum(dtype=np.int64))
            progress.update(len(rows))
            if number % 16 == 0:
                note_down()
        note_down()
        progress.close()
    with work.publish(f"{source.name}.idx") as path:
        write_index(path, np.fromfile(sizes_file, np.int32), dtype)
    os.replace(partial, work.output_dir / f"{source.name}.bin")
    sizes_file.unlink()


# --- The stage ------------------------------------------------------------------------------------
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
    if not names or len({name.casefold() for name in names}) < len(names):  # some file systems tell no case
        raise UserError(f"sources need distinct names, got {names}", "mend the config")
    for name in names:
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):  # names files, and stands in Megatron's data_path
            raise UserError(f"a source is named {name!r}", "use letters, digits, and . _ + - after the first")
    for source in sources:
        for path in source.paths:
            check_exists(Path(path), f"check paths of source {source.name!r}")
        if source.budget <= 0 or not source.paths:
            raise UserError(f"source {source.name!r} needs paths and a positive budget", "mend the config")
    check_one_kmeans(Path(path) for source in sources if source.kind == "speech" for path in source.paths)
    arguments = {key: value for key, value in locals().items() if key in build_mixture.__annotations__}
    # Paths are compared by content, the rest of a source by value.
    arguments["paths"] = [path for source in sources for path in source.paths]
    arguments["sources"] = [[source.name, source.kind, len(source.paths)] for source in sources]
    arguments["budgets"] = {source.name: [source.budget, source.max_epochs] for source in sources}

    # Tokens do not depend on budgets: if one is too large, what was tokenized stays.
    with stage(output_dir, arguments, inputs=["tokenizer", "paths"], late=["budgets", "seed"]) as work:
        if work.done:
            return
        from transformers import AutoTokenizer

        from towerspeech.indexed import IndexedTokens
        from towerspeech.tokenizer import EOD

        tokenizer_sha256 = tokenizer_hash(tokenizer)  # refuses a folder that holds no tokenizer
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        needs_units = any(source.kind == "speech" for source in sources)
        dsu = read_metadata(tokenizer) if needs_units else {"num_units": 0, "offset": 0}
        eod_id = loaded.get_vocab().get(EOD, loaded.eos_token_id)
        if eod_id is None or (bos and loaded.bos_token_id is None):
            raise UserError(
                f"{tokenizer} has no {'BOS' if eod_id is not None else '<EOD> or EOS'} token", "name another"
            )
        encoder, mark = Encoder(loaded, dsu["num_units"], dsu["offset"]), marker(loaded)

        def read(source: Source, left_out: Counter) -> Iterator[tuple[str, np.ndarray]]:
            return documents(source, dsu["num_units"], dsu["offset"], mark, left_out)

        for source in sources:
            encoder.compare(list(itertools.islice(read(source, Counter()), COMPARED_DOCUMENTS)))
        manifest_sources, began = [], time.perf_counter()
        for source in sources:
            prefix = output_dir / source.name
            note = output_dir / f".{source.name}.json"
            if prefix.with_name(f"{source.name}.bin").is_file() and note.is_file():
                (output_dir / f".{source.name}.sizes").unlink(missing_ok=True)  # a kill came just before
            else:
                before, left_out = [loaded.bos_token_id] if bos else [], Counter()
                tokenize(work, source, encoder, read(source, left_out), before, eod_id, left_out)
            left_out = json.loads(note.read_text())["left_out"]
            told = "".join(f", left out {count:,} {reason}" for reason, count in left_out.items())
            tokens = IndexedTokens(prefix)
            total = int(tokens.sizes.sum(dtype="int64"))
            epochs = source.budget / total if total else float("inf")
            if epochs > source.max_epochs:
                raise UserError(
                    f"source {source.name!r} has {total:,} tokens for a budget of {source.budget:,}{told}",
                    f"add data, or lower its budget or allow max_epochs: {epochs:.2f} (it is {source.max_epochs}) and "
                    "run this again: what is tokenized stays",
                )
            print(
                f"{source.name}: {len(tokens.sizes):,} documents, {total:,} tokens, budget {source.budget:,}"
                f" ({epochs:.2f} epochs){told}"
            )
            manifest_sources.append(
                {
                    "name": source.name,
                    "kind": source.kind,
                    "documents": len(tokens.sizes),
                    "left_out": left_out,
                    "tokens": total,
                    "budget": source.budget,
                    "epochs": round(epochs, 4),
                }
            )
        work.counts["last_attempt"] = {"tokenize_s": round(time.perf_counter() - began, 3)}
        budget = sum(source.budget for source in sources)
        with work.publish("manifest.json") as path:
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
        work.counts.update({"budget": budget, **{source["name"]: source["tokens"] for source in manifest_sources}})
        print(f"mixture of {budget:,} tokens: {output_dir}")


if __name__ == "__main__":
    run(build_mixture)
