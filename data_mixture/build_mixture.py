"""Tokenize speech units and text into a mixture with exact token budgets.

Usage: python data_mixture/build_mixture.py --config systems/towerspeech_6b.yaml \\
           --tokenizer tokenizer/ --output_dir mixture/towerspeech_6b

Reads units Parquet, and text in the forms that towerspeech/texts.py tells; writes, for each source, <source>.bin and
.idx in Megatron's indexed format, and manifest.json: documents, tokens, budget, epochs, and the data_path that a
Megatron trainer takes. All documents of a source are tokenized; which of them are trained on, up to the budget, the
trainer's seeded shuffle decides.

The tokens are those of the Hugging Face tokenizer called on each document. Text is encoded by it, on all cores; runs
of units by SentencePiece, which does the same merges several times as fast. The two are compared before they are used.
"""

import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from towerspeech import prompts, units
from towerspeech.ahead import ahead
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.indexed import IndexedTokens, token_dtype, write_index
from towerspeech.mixture import Source, recorded_budgets, recorded_files
from towerspeech.outside_text import MARK, check_outside_text, marker, text_tokenizer
from towerspeech.stage import stage
from towerspeech.texts import iter_parallel, iter_texts, parse_direction
from towerspeech.tokenizer import EOD, read_metadata, tokenizer_hash, unit_tokens
from towerspeech.units_parquet import check_one_kmeans, read_unit_arrays

BATCH_DOCUMENTS = 2048  # tokenized at once, on all cores; also how much a killed run repeats at most, times 16
COMPARED_DOCUMENTS = 64  # of each source, with the tokenizer's own ids


# A text, and its run of units, as their characters. In the text, unit 0 stands for the whole run, as the first unit in
# it. Without a run the text is the document.
Document = tuple[str, str]
NO_UNITS, NO_TEXT = "", "without text"


# --- Encoding -------------------------------------------------------------------------------------
def unit_processor(pieces: list[str]):
    """A SentencePiece BPE of these pieces, the best first; they follow <unk>, which has id 0."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    unknown = proto.pieces.add(piece="<unk>", score=0)
    unknown.type = unknown.UNKNOWN
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


class Encoder:
    """Encodes documents as a Hugging Face tokenizer does, without special tokens, several times as fast.

    Marked text from outside makes no control tokens (towerspeech/outside_text.py).

    merge_tokenizer.py sees to it that no token crosses the border between text and units, and that the tokens of a run
    of units do not depend on what is around it. So the tokenizer encodes the text, with one unit in the run's place;
    SentencePiece encodes the run; and the run's tokens replace that unit's, whose place is known from the text before
    it, which all speech documents share.
    """

    def __init__(self, tokenizer, num_units: int, offset: int):
        """Prepare for ``num_units`` units; 0 if there are to be no runs."""
        self.tokenizer, self.num_units, self.offset = tokenizer, num_units, offset
        self.dtype, self.mark = token_dtype(len(tokenizer)), marker(tokenizer)
        self.backend = text_tokenizer(tokenizer).backend_tokenizer
        self.stand_in = units.to_text([0], offset)
        before = prompts.speech_document(self.stand_in, "").partition(self.stand_in)[0]
        self.position = len(self.reference(before + self.stand_in)) - 1  # of the stand-in's token
        if num_units:
            tokens = unit_tokens(tokenizer, num_units, offset)
            ids = self.unit_ids(tokens)
            self.processor = unit_processor([units.to_text(tokens[index], offset) for index in ids])
            self.lookup = np.array([0, *ids], self.dtype)  # the token of each piece; <unk> does not occur

    def unit_ids(self, tokens: dict[int, list[int]]) -> list[int]:
        """Order the tokens of units alone as SentencePiece wants its pieces: merges, the best first, then units.

        Raises:
            UserError: A unit has no token.
        """
        singles = {spoken[0]: index for index, spoken in tokens.items() if len(spoken) == 1}
        missing = sorted(set(range(self.num_units)) - set(singles))
        if missing:
            remedy = "make it anew with train_bpe_tokenizer/merge_tokenizer.py"
            raise UserError(f"the tokenizer has no token for unit {missing[0]}", remedy)
        ranks = {}  # of merges: their ids may have another order
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        for rank, (left, right) in enumerate(model.get("merges", ())):
            ranks.setdefault(left + right, rank)
        names = dict(zip(tokens, self.tokenizer.convert_ids_to_tokens(list(tokens)), strict=True))
        merged = [index for index, spoken in tokens.items() if len(spoken) > 1 and names[index] in ranks]
        return [*sorted(merged, key=lambda index: ranks[names[index]]), *[singles[u] for u in range(self.num_units)]]

    def reference(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(self, batch: list[Document]) -> list[np.ndarray]:
        """Token ids, (num_tokens,), of each document."""
        # The tokenizer's own call, but without offsets, masks and types: they take most of its time.
        encodings = self.backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        runs = [speech for _, speech in batch if speech]
        encoded_runs = iter(self.processor.encode(runs, return_type="numpy") if runs else [])
        rows = []
        for (_, speech), encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, self.dtype)
            if speech:
                run = self.lookup[next(encoded_runs)]
                ids = np.concatenate([ids[: self.position], run, ids[self.position + 1 :]])
            rows.append(ids)
        return rows

    def compare(self, batch: list[Document]) -> None:
        """Raise UserError if the ids of documents without control tokens are not the tokenizer's own."""
        batch = [(text, speech) for text, speech in batch if MARK not in text]
        for (text, speech), ids in zip(batch, self(batch), strict=True):
            document = text.replace(self.stand_in, speech, 1) if speech else text
            if ids.tolist() != self.reference(document):
                raise UserError(
                    f"the tokenizer's tokens of units depend on the text around them: {document[:80]!r}",
                    "make it anew with train_bpe_tokenizer/merge_tokenizer.py",
                )


# --- Reading --------------------------------------------------------------------------------------
def speech_documents(source: Source, path: str, encoder: Encoder, left_out: Counter) -> Iterator[Document]:
    """Utterances of a units folder."""
    for flat, ends, batch, place in read_unit_arrays(Path(path), encoder.num_units, ["language", "text"]):
        runs = units.split_units(flat, ends, encoder.offset)
        languages, texts = batch.column("language").to_pylist(), batch.column("text").to_pylist()
        for row, (speech, language, text) in enumerate(zip(runs, languages, texts, strict=True)):
            if language != "en":
                problem = f"{place(row)}: language {language!r}, but speech must be English (en)"
                raise UserError(problem, "leave other languages' speech out of the mixture")
            if not speech:
                left_out["without units"] += 1
            elif not (text or "").strip():
                left_out["without a transcript"] += 1
            else:
                check_outside_text(text, place(row))
                yield prompts.speech_document(encoder.stand_in, encoder.mark(text)), speech


def text_documents(source: Source, path: str, encoder: Encoder, left_out: Counter) -> Iterator[Document]:
    """Texts of a file or folder."""
    for _, text in iter_texts(path, source.text_field, source.paragraphs):
        if not text.strip():
            left_out[NO_TEXT] += 1
            continue
        yield encoder.mark(text), NO_UNITS


def parallel_documents(source: Source, path: str, encoder: Encoder, left_out: Counter) -> Iterator[Document]:
    """Sentence pairs of a file or folder, or of two files of which line follows line."""
    asked = parse_direction(source.direction) if source.direction else None
    for _, row in iter_parallel(path, source.direction):
        if asked and asked != (row["src_lang"], row["tgt_lang"]):
            left_out["in another direction"] += 1
        elif not row["source"].strip() or not row["target"].strip():
            left_out[NO_TEXT] += 1
        else:
            sides = row["src_lang"], encoder.mark(row["source"]), row["tgt_lang"], encoder.mark(row["target"])
            yield prompts.parallel_document(*sides), NO_UNITS


def documents(source: Source, encoder: Encoder, left_out: Counter) -> Iterator[Document]:
    """Stream a source's documents in the order of its files; ``left_out`` counts what has nothing to learn from."""
    read = {"speech": speech_documents, "text": text_documents, "parallel": parallel_documents}[source.kind]
    for path in source.files() if source.kind == "speech" else source.paths:  # of text a name may mean two sides
        yield from read(source, path, encoder, left_out)


# --- Tokenizing -----------------------------------------------------------------------------------
def tokenize(work, source: Source, encoder: Encoder, begin: list[int], end: list[int]) -> None:
    """Write a source's .bin and .idx; every document stands between ``begin`` and ``end``, token ids.

    Every 16 batches are noted, and a killed run goes on from the last note. The last note stays: it tells what was
    left out.
    """
    from tqdm import tqdm

    tokens = work.output_dir / f"{source.name}.bin"
    partial, sizes_file, note = (work.output_dir / f".{source.name}.{ending}" for ending in ("bin", "sizes", "json"))
    if tokens.is_file() and note.is_file():
        sizes_file.unlink(missing_ok=True)  # a kill came just before
        return
    done = json.loads(note.read_text()) if note.is_file() else {}
    if "left_out" not in done:  # of an earlier version, which had other documents
        done = {"documents": 0, "tokens": 0}
    before, after = np.array(begin, encoder.dtype), np.array(end, encoder.dtype)
    left_out = Counter()
    rest = itertools.islice(documents(source, encoder, left_out), done["documents"], None)
    batches = iter(lambda: list(itertools.islice(rest, BATCH_DOCUMENTS)), [])
    # two batches are encoded in the background while others are read and written
    with open(partial, "ab") as data, open(sizes_file, "ab") as sizes, ThreadPoolExecutor(2) as pool:

        def note_down() -> None:
            for file in (data, sizes):
                file.flush()
                os.fsync(file.fileno())
            write_json(note, {**done, "left_out": left_out})

        data.truncate(done["tokens"] * encoder.dtype().itemsize)
        sizes.truncate(done["documents"] * 4)
        progress = tqdm(initial=done["documents"], unit=" documents", desc=source.name, mininterval=1)
        for number, rows in enumerate(ahead(pool, encoder, batches, limit=2), 1):
            lengths = np.array([len(before) + len(ids) + len(after) for ids in rows], np.int32)
            # write, since tofile hides a full disk
            data.write(np.concatenate([part for ids in rows for part in (before, ids, after)]))
            sizes.write(lengths)
            done["documents"] += len(rows)
            done["tokens"] += int(lengths.sum(dtype=np.int64))
            progress.update(len(rows))
            if number % 16 == 0:
                note_down()
        note_down()
        progress.close()
    with work.publish(f"{source.name}.idx") as path:
        write_index(path, np.fromfile(sizes_file, np.int32), encoder.dtype)
    os.replace(partial, tokens)
    sizes_file.unlink()


# --- The stage ------------------------------------------------------------------------------------
def check_sources(sources: list[Source]) -> None:
    """Raise UserError unless the sources have names that can name files, data, and budgets."""
    names = [source.name for source in sources]
    if not names or len({name.casefold() for name in names}) < len(names):  # some file systems tell no case
        raise UserError(f"sources need distinct names, got {names}", "mend the config")
    for source in sources:
        if not re.fullmatch(r"\w[\w.+-]*", source.name, re.ASCII):  # it stands in Megatron's data_path, too
            raise UserError(f"a source is named {source.name!r}", "use letters, digits, and . _ + - after the first")
        source.files()
        if source.direction:
            parse_direction(source.direction)
        if source.budget <= 0 or not source.paths:
            raise UserError(f"source {source.name!r} needs paths and a positive budget", "mend the config")
    check_one_kmeans(Path(path) for source in sources if source.kind == "speech" for path in source.files())


def make_encoder(tokenizer: Path, loaded, sources: list[Source]) -> Encoder:
    """The sources' encoder, compared with the tokenizer on the first documents of each."""
    facts = {"num_units": 0, "offset": 0}
    if any(source.kind == "speech" for source in sources):
        facts = read_metadata(tokenizer)
    encoder = Encoder(loaded, facts["num_units"], facts["offset"])
    for source in sources:
        encoder.compare(list(itertools.islice(documents(source, encoder, Counter()), COMPARED_DOCUMENTS)))
    return encoder


def check_budget(source: Source, folder: Path) -> dict:
    """What the manifest tells of a source that is tokenized, which must have enough tokens for its budget."""
    sizes = IndexedTokens(folder / source.name).sizes
    left_out = json.loads((folder / f".{source.name}.json").read_text())["left_out"]
    told = "".join(f", left out {count:,} {reason}" for reason, count in left_out.items())
    total = int(sizes.sum(dtype="int64"))
    epochs = source.budget / total if total else float("inf")
    if epochs > source.max_epochs:
        raise UserError(
            f"source {source.name!r} has {total:,} tokens for a budget of {source.budget:,}{told}",
            f"add data, or lower its budget or allow max_epochs: {epochs:.2f} (it is {source.max_epochs}) and "
            "run this again: what is tokenized stays",
        )
    print(
        f"{source.name}: {len(sizes):,} documents, {total:,} tokens, budget {source.budget:,} ({epochs:.2f} epochs)"
        f"{told}"
    )
    return {
        "name": source.name,
        "kind": source.kind,
        "documents": len(sizes),
        "left_out": left_out,
        "tokens": total,
        "budget": source.budget,
        "epochs": round(epochs, 4),
    }


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
        sources: What to mix; in YAML, a list of what towerspeech/mixture.py says of a source.
        bos: Begin documents with BOS. Megatron does not; a model that is prompted with BOS and was not pretrained
            with it needs it.
        seed: Seed of the trainer's shuffle; recorded in the manifest.
        overwrite: Replace the output of a run with other arguments.
    """
    check_sources(sources)
    arguments = {
        "tokenizer": tokenizer,
        **recorded_files(sources, {source.name: source.files() for source in sources}),
        "budgets": recorded_budgets(sources),
        "bos": bos,
        "seed": seed,
        "overwrite": overwrite,
    }
    # Tokens do not depend on budgets: if one is too large, what was tokenized stays.
    with stage(__file__, output_dir, arguments, inputs=["tokenizer", "paths"], late=["budgets", "seed"]) as work:
        if work.done:
            return
        from transformers import AutoTokenizer

        tokenizer_sha256 = tokenizer_hash(tokenizer)  # refuses a folder that holds no tokenizer
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        eod_id = loaded.get_vocab().get(EOD, loaded.eos_token_id)
        if eod_id is None:
            raise UserError(f"{tokenizer} has no <EOD> or EOS token", "name another")
        if bos and loaded.bos_token_id is None:
            raise UserError(f"{tokenizer} has no BOS token", "name another")
        encoder = make_encoder(tokenizer, loaded, sources)
        began, tokenized = time.perf_counter(), []
        for source in sources:
            tokenize(work, source, encoder, [loaded.bos_token_id] if bos else [], [eod_id])
            tokenized.append(check_budget(source, output_dir))
        work.counts["last_attempt"] = {"tokenize_s": round(time.perf_counter() - began, 3)}
        budget = sum(source.budget for source in sources)
        manifest = {
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": len(loaded),
            "eod_id": eod_id,
            "bos": bos,
            "seed": seed,
            "budget": budget,
            "sources": tokenized,
            # Megatron draws samples of equal length, so token budgets are its weights.
            "data_path": " ".join(f"{source.budget / budget:.6f} {source.name}" for source in sources),
        }
        write_json(output_dir / "manifest.json", manifest)
        work.counts.update({"budget": budget, **{source["name"]: source["tokens"] for source in tokenized}})
        print(f"mixture of {budget:,} tokens: {output_dir}")


if __name__ == "__main__":
    run(build_mixture)
