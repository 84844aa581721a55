"""From what a source's files hold to documents of tokens, in batches: what the processes beside the reader do."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_mixture.drawing import key, uniform
from data_mixture.duplicates import exact_key, near_keys
from data_mixture.encoding import NO_UNITS, Document, Encoder
from towerspeech import prompts
from towerspeech.contamination import Hit, TestSentences
from towerspeech.errors import UserError
from towerspeech.languages import find_language
from towerspeech.mixture import Source, bounds
from towerspeech.outside_text import check_outside_text
from towerspeech.texts import Part, Reading, parse_direction, parse_parallel, parse_text
from towerspeech.tokenizer import EOD, read_metadata

TEST_SENTENCE = "with a sentence of a test set"


class Item(NamedTuple):
    """What was read of a source: a row, a line."""

    part: int  # the number of its part
    number: int  # its own in the part
    raw: Any


class Task(NamedTuple):
    """Items, as they were read."""

    source: int  # its place among the sources
    parts: dict[int, Part]  # those of the items, by number
    items: list[Item]
    size: int  # about how many bytes these hold


class Utterance(NamedTuple):
    """An item of a units folder."""

    speech: str  # its units' characters
    language: str
    text: str | None
    duration_s: float | None
    id: str


@dataclass
class Made:
    """What becomes of a task: n documents, and what was left out."""

    items: int  # of the task
    at: list[int]  # where the reading is after it: the number of a part, and of the next item in it
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))  # of all documents, one after another
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # (n,) tokens of each
    keys: np.ndarray | None = None  # (n,) uint64 of texts, to find those that are there twice
    near: np.ndarray | None = None  # (n, bands) uint64
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) in [0, 1): the least are for validation
    characters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (n,) of each
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) of speech
    left_out: Counter = field(default_factory=Counter)  # by reason
    bad: list[str] = field(default_factory=list)  # what could not be read: place and reason
    hits: list[tuple[str, Hit]] = field(default_factory=list)  # place, and the test sentence in it


class Found(NamedTuple):
    """A document before it is encoded."""

    item: Item
    where: str
    document: Document
    texts: tuple[str, ...]  # what it says: one text, or both sides
    languages: tuple[str | None, ...]  # of each of them, as far as it is told
    seconds: float


def nothing_of(task: Task) -> Made:
    """What is to be filled."""
    return Made(len(task.items), [task.items[-1].part, task.items[-1].number + 1])


class LeftOut(Exception):
    """Raised for a document that is not wanted; says why."""


# --- One document ---------------------------------------------------------------------------------
class Reader:
    """Makes documents of one source's items."""

    def __init__(self, source: Source, encoder: Encoder, seed: int):
        self.source, self.encoder = source, encoder
        self.bounds = bounds(source)
        self.direction = parse_direction(source.direction) if source.direction else None
        self.reading = reading(source)
        self.language = find_language(source.language) if source.language else None
        self.languages = [find_language(language) for language in source.languages]
        names, weights = zip(*((name, weight) for name, weight in source.templates.items() if weight), strict=True)
        self.templates, self.template_ends = names, np.cumsum(weights) / math.fsum(weights)
        self.key = key("templates", seed, source.name)

    def __call__(self, part: Part, item: Item) -> Found:
        """Make the document of an item.

        Raises:
            LeftOut: It is not wanted.
            UserError: It cannot be read.
        """
        read = {"speech": self.speech, "text": self.text, "parallel": self.parallel}[self.source.kind]
        return read(part, item)

    def speech(self, part: Part, item: Item) -> Found:
        raw: Utterance = item.raw
        where = f"{part.path}, row {item.number + 1} (id {raw.id})"
        text = raw.text or ""
        language = find_language(raw.language or "")
        if language not in self.languages:
            remedy = "leave other languages' speech out of the mixture, or name it in languages of the source"
            raise UserError(f"{where}: language {raw.language!r}, but speech must be in {self.languages}", remedy)
        if not raw.speech:
            raise LeftOut("without units")
        template = self.templates[0]
        if len(self.templates) > 1:
            place = uniform(self.key ^ item.part, [item.number])[0]
            template = self.templates[int(np.searchsorted(self.template_ends, place, side="right"))]
        if template != "units" and not text.strip():
            raise LeftOut("without a transcript")
        check_outside_text(text, where)
        document = prompts.speech_document(self.encoder.stand_in, self.encoder.mark(text), template, language)
        return Found(item, where, (document, raw.speech), (text,), (language,), raw.duration_s or 0.0)

    def text(self, part: Part, item: Item) -> Found:
        where, text, row = parse_text(part, item.number, item.raw, self.reading)
        if not text.strip():
            raise LeftOut("without text")
        self.check_bounds(row, len(text), where)
        return Found(item, where, (self.encoder.mark(text), NO_UNITS), (text,), (self.language,), 0.0)

    def parallel(self, part: Part, item: Item) -> Found:
        where, row = parse_parallel(part, item.number, item.raw, self.reading)
        if self.direction and self.direction != (row["src_lang"], row["tgt_lang"]):
            raise LeftOut("in another direction")
        source, target = row["source"], row["target"]
        if not source.strip() or not target.strip():
            raise LeftOut("without text")
        self.check_bounds(row, len(source) + len(target), where)
        sides = row["src_lang"], self.encoder.mark(source), row["tgt_lang"], self.encoder.mark(target)
        document = prompts.parallel_document(*sides), NO_UNITS
        return Found(item, where, document, (source, target), (row["src_lang"], row["tgt_lang"]), 0.0)

    def check_bounds(self, row: dict, length: int, where: str) -> None:
        """Raise LeftOut for a document beyond the lengths or the bounds of fields that are wanted."""
        for name, within in self.bounds.items():
            value = row.get(name)
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                problem = f"{where}: its {name} is {value!r}, but keep wants a number"
                raise UserError(problem, "name a field that the data carry") from None
            if not within(number):
                raise LeftOut(f"beyond keep: {name}")
        if length < self.source.min_characters:
            raise LeftOut("shorter than min_characters")
        if self.source.max_characters is not None and length > self.source.max_characters:
            raise LeftOut("longer than max_characters")


def reading(source: Source) -> Reading:
    """How texts.py reads a source."""
    return Reading(source.text_field, source.paragraphs, source.direction, source.kind == "parallel", (*source.keep,))


# --- Batches --------------------------------------------------------------------------------------
class Maker:
    """Makes token ids of tasks. Processes have copies, which do that alone: not ``compare``, without ``tokenizer``."""

    def __init__(self, tokenizer: Path, sources: list[Source], sentences: TestSentences | None, bos: bool, seed: int):
        """
        Raises:
            UserError: The tokenizer lacks a token that is wanted.
        """
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.eod = self.tokenizer.get_vocab().get(EOD, self.tokenizer.eos_token_id)
        if self.eod is None:
            raise UserError(f"{tokenizer} has no <EOD> or EOS token", "name another")
        if bos and self.tokenizer.bos_token_id is None:
            raise UserError(f"{tokenizer} has no BOS token", "name another")
        facts = {"num_units": 0, "offset": 0}
        if any(source.kind == "speech" for source in sources):
            facts = read_metadata(tokenizer)
        self.num_units, self.offset = facts["num_units"], facts["offset"]
        self.encoder = Encoder(self.tokenizer, self.num_units, self.offset)
        self.sources, self.sentences, self.seed = sources, sentences, seed
        self.before = np.array([self.tokenizer.bos_token_id] if bos else [], self.encoder.dtype)
        self.after = np.array([self.eod], self.encoder.dtype)
        self.readers = [Reader(source, self.encoder, seed) for source in sources]

    def __getstate__(self) -> dict:
        """What a process is given: without the tokenizer, as of Encoder, and the readers' functions."""
        return {**self.__dict__, "tokenizer": None, "readers": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.readers = [Reader(source, self.encoder, self.seed) for source in self.sources]

    def find(self, task: Task, made: Made) -> Iterator[Found]:
        """The documents of a task's items; what has none is noted in ``made``."""
        reader = self.readers[task.source]
        for item in task.items:
            try:
                yield reader(task.parts[item.part], item)
            except LeftOut as reason:
                made.left_out[str(reason)] += 1
            except UserError as error:
                made.bad.append(str(error))

    def __call__(self, task: Task) -> Made:
        """Every document of the task's items that is wanted, between BOS (if wanted) and EOD."""
        made = nothing_of(task)
        found = self.without_test_sentences([*self.find(task, made)], made)
        if not found:
            made.ids = made.ids.astype(self.encoder.dtype)
        else:
            rows = self.encoder([each.document for each in found])
            made.ids = np.concatenate([part for ids in rows for part in (self.before, ids, self.after)])
            around = len(self.before) + len(self.after)
            made.sizes = np.array([len(ids) + around for ids in rows], np.int32)
            made.characters = np.array([sum(map(len, each.texts)) for each in found], np.int64)
            made.seconds = np.array([each.seconds for each in found])
        source = self.sources[task.source]
        made.held_out = self.held_out(source, [each.item for each in found])
        said = ["\n".join(each.texts) for each in found]
        if twice(source) in ("exact", "near"):
            made.keys = np.array([exact_key(text) for text in said], np.uint64)
        if twice(source) == "near":
            made.near = np.array([near_keys(text) for text in said], np.uint64)
        return made

    def held_out(self, source: Source, items: list[Item]) -> np.ndarray:
        """A number in [0, 1) for each item, (n,): the least are for validation."""
        of_parts = [[item.number for item in same] for _, same in groupby(items, lambda item: item.part)]
        keys = [key("validation", self.seed, source.name, part) for part, _ in groupby(items, lambda item: item.part)]
        drawn = [uniform(mine, numbers) for mine, numbers in zip(keys, of_parts, strict=True)]
        return np.concatenate([np.zeros(0), *drawn])

    def without_test_sentences(self, found: list[Found], made: Made) -> list[Found]:
        """The documents that hold no sentence of a test set; the others are noted in ``made``."""
        if self.sentences is None:
            return found
        places = [place for place, each in enumerate(found) for _ in each.texts]
        hits: dict[int, Hit] = {}
        for place, hit in zip(places, self.sentences.find([t for each in found for t in each.texts]), strict=True):
            if hit:
                hits.setdefault(place, hit)
        made.hits = [(found[place].where, hit) for place, hit in hits.items()]
        made.left_out[TEST_SENTENCE] += len(hits)
        return [each for place, each in enumerate(found) if place not in hits]

    def said(self, task: Task) -> Iterator[tuple[str, str]]:
        """The texts of a task's documents whose language is told, with its code."""
        for each in self.find(task, nothing_of(task)):
            yield from ((code, text) for code, text in zip(each.languages, each.texts, strict=True) if code)

    def compare(self, task: Task, most: int) -> int:
        """Compare the encoder's ids of so many of a task's documents with the tokenizer's own; tell how many it did.

        Raises:
            UserError: They are not the same.
        """
        documents = [each.document for each in islice(self.find(task, nothing_of(task)), most)]
        self.encoder.compare(documents)
        return len(documents)


def twice(source: Source) -> str:
    """What is done with documents that are there twice: keep, exact or near."""
    return source.duplicates or ("keep" if source.kind == "speech" else "exact")
