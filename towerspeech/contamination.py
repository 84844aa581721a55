"""Is a sentence of a test set in a training document? Whoever trains on what it is tested on has scores of no worth.

A document is dropped if it contains, without case, accents, punctuation and spacing,

- 13 words in a row of a test sentence, as GPT-3's was ("13-gram"; Brown et al. 2020, arXiv 2005.14165, appendix C);
- a whole test sentence ("sentence") of ``LEAST_WEIGHT`` and ``LEAST_WORDS``;
- a shorter one of ``BREAK_WEIGHT`` and ``BREAK_WORDS`` ("short sentence"), where it stands by itself: on either side
  is a line break, the text's end, or punctuation other than a comma (She said: "The perfect size."), not only a space;
- one that is shorter still, or a single word ("Thank you.", a name, an address, a number), which is in many clean
  documents, only where it is the whole text ("whole text").

Chinese has no spaces, so its words are not known: two of its characters count as a word, which is about their length.

Measured with FLORES-200 devtest and WMT23 (25,671 sentences). Of 6,000 drawn from them and planted into text, 5,950
were found in quotes or on a line of their own, and 5,836 with their own punctuation only, for titles have none. Of
138,981 texts (93 million characters) of manuals, books and quotations in the ten languages, 1 was dropped, for "You
get what you pay for"; 4 were if commas count; 9 if BREAK_WEIGHT is 10 ("User's manual", "Keine Ahnung"); 73 if it is
8 and one word is enough.

How it is found: each 13-gram, and each sentence that has none, has an anchor, which is LONG or SHORT of its characters
in a row. All runs of that length of a text are hashed at once (see folding.py), and looked up among the anchors'
hashes. Where one is met, the characters around it are compared, so no hit is a hash's alone. Short sentences are
looked up by their first characters, at a text's breaks (line breaks, punctuation) alone.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from towerspeech.errors import UserError
from towerspeech.folding import BORDER, HEAVY, fold, hash_heads, hash_runs, is_han, weights_of
from towerspeech.languages import find_language
from towerspeech.records import check_texts
from towerspeech.texts import SAVED, TSV, expand, form, has_fields, iter_lines, iter_rows, iter_texts

FIELDS = re.compile(
    "text|source|target|src|tgt|src_text|tgt_text|ref|references?|translation|output|sentence(_(?!id$).+)?|transcript"
    "|(raw_)?transcription|(raw|original|normed|normalized)_text|text_tn"
)  # that hold texts of a test set; sentence_deu_Latn is FLORES-200's, those of the last line are speech corpora's
NGRAM_WORDS = 13
LEAST_WEIGHT = 28  # of what may be anywhere in a text, in letters; see weights_of
LEAST_WORDS = 5
BREAK_WEIGHT = 12  # of what may be in a text between two breaks
BREAK_WORDS = 2
LONG, SHORT = 24, 10  # characters of an anchor; a pattern has SHORT at least: LEAST_WEIGHT / 3
HEADS = 10, 4  # characters looked up of what is between two breaks (even numbers); it has 4 at least: BREAK_WEIGHT / 3
GROUP_CHARACTERS = 1 << 17  # looked at together, 30 bytes each
HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # and Japanese kana
WORD = re.compile(f"[{HAN}]|[^\\s{HAN}]+")


class Sentence(NamedTuple):
    """A sentence of a test set, and where it stands: ``file:line``, and its field if it has one."""

    test_set: str
    where: str
    text: str


class Hit(NamedTuple):
    """Which test sentence is in a text (``where`` is the sentence's place), and how: see above."""

    test_set: str
    where: str
    how: str


# --- Test sets ------------------------------------------------------------------------------------
def read_test_sets(test_sets: dict[str, list[str]]) -> list[Sentence]:
    """Read the sentences of test sets as they lie on disk, each once.

    Args:
        test_sets: {name of a test set: names of files, folders, patterns}, as in towerspeech/texts.py. Of a folder all
            files are read but hidden ones and notes (.md). JSONL, Parquet, TSV whose first line names its columns, and
            saved data sets give the texts of all their ``FIELDS`` and languages (de, deu_Latn; also inside
            ``translation``); any other file is a sentence a line.

    Raises:
        UserError: A file is missing, empty or malformed; a row has none of the fields, or something else than text in
            one; a test set has no sentences; names file and line.
    """
    sentences: dict[str, Sentence] = {}
    for test_set, names in test_sets.items():
        number_of_sentences = 0
        for path in chain.from_iterable(_files(path) for name in names for path in expand(name)):
            for where, text in _texts_of_file(path):
                if text.strip():
                    sentences.setdefault(text, Sentence(test_set, where, text))
                    number_of_sentences += 1
        if not number_of_sentences:
            remedy = "name its files, or leave the test set out"
            raise UserError(f"test set {test_set!r} has no sentences: {', '.join(map(str, names))}", remedy)
    return [*sentences.values()]


def _files(path: Path) -> list[Path]:
    """A file or a saved data set itself; of another folder what is in it, of any ending."""
    if not path.is_dir() or any((path / name).is_file() for name in SAVED):
        return [path]
    inside = ((file, file.relative_to(path).parts) for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file, parts in inside if file.suffix != ".md" and not any(p.startswith(".") for p in parts)]


def _texts_of_file(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_dir() and not has_fields(path):
        yield from iter_texts(path)
        return
    for where, row in _tsv_rows(path) if form(path) in TSV else iter_rows(path):
        yield from _texts_of_row(row, where)


def _tsv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    lines = iter_lines(path)
    where, names = next(lines, (f"{path}:1", ""))
    names = names.split("\t")
    if not any(map(_holds_text, names)):
        remedy = "write such a line, or make it JSONL or one sentence a line"
        raise UserError(f"{where}: the first line names no column of text (source, sentence, de, ...)", remedy)
    for where, line in lines:
        cells = line.split("\t")
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} columns, but {', '.join(names)} are wanted", "mend the line")
        yield where, dict(zip(names, cells, strict=True))


def _holds_text(name: str) -> bool:
    return FIELDS.fullmatch(name) is not None or find_language(name) is not None


def _texts_of_row(row: dict, where: str) -> Iterator[tuple[str, str]]:
    """The texts of a row, each with its place and field: strings, in lists (references), by language (translation)."""
    texts = {}
    for field, value in row.items():
        if value is None or not _holds_text(field):
            continue
        if isinstance(value, list):
            texts |= {f"{field} {number}": text for number, text in enumerate(value, 1)}
        elif isinstance(value, dict):
            texts |= {f"{field} {name}": text for name, text in value.items() if text is not None}
        else:
            texts[field] = value
    if not texts:
        remedy = (
            "a row has a text, source, target, reference, sentence, transcript, translation, or a language such as de"
        )
        raise UserError(f"{where}: of {', '.join(row)}, none holds a text", remedy)
    check_texts(texts, texts, where)
    yield from ((f"{where}, {field}", text) for field, text in texts.items())


# --- The index ------------------------------------------------------------------------------------
class Anchors:
    """Where runs of one length begin in ``codes`` (int64), to be met by their hashes.

    Two tables say fast which hashes are no anchor's, by two parts of the bits: a small one, which stays in a core's
    cache, 9 in 10; a larger one, of the others, 29 in 30. What is left is looked up in the sorted hashes.
    """

    def __init__(self, starts: np.ndarray, hashes: np.ndarray):
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.starts = hashes[order], starts[order]
        size = 1 << max(1, len(starts)).bit_length()
        self.tables = np.zeros(8 * size, bool), np.zeros(32 * size, bool)
        for number, table in enumerate(self.tables):
            table[self._places(hashes, number)] = True

    def _places(self, hashes: np.ndarray, number: int) -> np.ndarray:
        """Each hash's place in a table, by its highest bits, or by others."""
        bits = len(self.tables[number]).bit_length() - 1
        return ((hashes << np.uint64(24) if number else hashes) >> np.uint64(64 - bits)).view(np.int64)

    def met(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """Where hashes of a text are anchors': the position in the text, and an anchor's start."""
        maybe = np.flatnonzero(self.tables[0].take(self._places(hashes, 0)))
        maybe = maybe[self.tables[1].take(self._places(hashes[maybe], 1))]
        if maybe.size:
            first, last = (np.searchsorted(self.hashes, hashes[maybe], side=side) for side in ("left", "right"))
            for position, *span in zip(maybe.tolist(), first.tolist(), last.tolist(), strict=True):
                yield from ((position, anchor) for anchor in self.starts[slice(*span)].tolist())


class TestSentences:
    """An index of test sentences, which finds them in texts; it can be pickled.

    Args:
        sentences: What no text may contain; those without letters and digits are passed over.
    """

    __test__ = False  # no class of tests, whatever pytest makes of its name

    def __init__(self, sentences: list[Sentence]):
        self.places = [(sentence.test_set, sentence.where) for sentence in sentences]
        words = [WORD.findall(sentence.text) for sentence in sentences]
        codes, borders, _ = fold([word for found in words for word in found])
        self.codes = codes[codes != BORDER]  # of all sentences, one after the other
        word_ends = np.concatenate([[0], borders - np.arange(len(borders))])
        bounds = word_ends[np.cumsum([0, *map(len, words)])]
        self.starts, self.ends = bounds[:-1], bounds[1:]
        self.pattern_starts, self.pattern_ends, between = self._patterns(np.unique(word_ends))
        self.anchors = self._anchors()
        self.heads = self._heads(self.starts[between], self.ends[between])
        self.short = self._short()
        self.longest_short = max(map(len, self.short), default=0) // self.codes.itemsize

    def _patterns(self, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in ``codes`` the 13-grams lie, and the sentences that have none, in order; ``bounds`` are the words'.

        Of a sentence's patterns, one that begins later ends no earlier. Third, which sentences without a pattern count
        between two breaks, bool.
        """
        weight = np.concatenate([[0], np.cumsum(weights_of(self.codes))])
        length = np.concatenate([[0], np.cumsum(2 - is_han(self.codes[bounds[:-1]]))])  # in half words
        last = np.searchsorted(length, length + 2 * NGRAM_WORDS)
        starts, ends = bounds[last < len(bounds)], bounds[last[last < len(bounds)]]
        owners = np.searchsorted(self.ends, starts, side="right")
        good = (ends <= self.ends[owners]) & (weight[ends] - weight[starts] >= LEAST_WEIGHT)
        words = length[np.searchsorted(bounds, self.ends)] - length[np.searchsorted(bounds, self.starts)]
        weights = weight[self.ends] - weight[self.starts]
        whole = (weights >= LEAST_WEIGHT) & (words >= 2 * LEAST_WORDS)
        between = (weights >= BREAK_WEIGHT) & (words >= 2 * BREAK_WORDS) & ~whole
        whole[owners[good]] = between[owners[good]] = False
        starts = np.concatenate([starts[good], self.starts[whole]])
        order = np.argsort(starts)
        return starts[order], np.concatenate([ends[good], self.ends[whole]])[order], between

    def _anchors(self) -> dict[int, Anchors]:
        """Of each pattern the run that is rarest in the sentences; neighbours share theirs, so they are few."""
        anchors = {}
        lengths = self.pattern_ends - self.pattern_starts
        for length, chosen in ((LONG, lengths >= LONG), (SHORT, lengths < LONG)):
            hashes = np.concatenate([np.empty(0, np.uint64), *(part for *_, part in hash_runs(self.codes, [length]))])
            _, number, count = np.unique(hashes, return_inverse=True, return_counts=True)
            rank = (count[number].astype(np.uint64) << np.uint64(40)) + (hashes >> np.uint64(24))
            patterns = zip(self.pattern_starts[chosen].tolist(), self.pattern_ends[chosen].tolist(), strict=True)
            starts = sorted({start + int(rank[start : end - length + 1].argmin()) for start, end in patterns})
            anchors[length] = Anchors(np.array(starts, np.int64), hashes[starts])
        return anchors

    def _heads(self, starts: np.ndarray, ends: np.ndarray) -> dict[int, Anchors]:
        """The beginnings of the sentences that count between two breaks."""
        heads = {}
        for length, chosen in ((HEADS[0], ends - starts >= HEADS[0]), (HEADS[1], ends - starts < HEADS[0])):
            heads[length] = Anchors(starts[chosen], hash_heads(self.codes, starts[chosen], length))
        return heads

    def _short(self) -> dict[bytes, int]:
        """The sentences without a pattern, by their characters."""
        following = np.append(self.pattern_starts, len(self.codes))
        without = following[np.searchsorted(self.pattern_starts, self.starts)] >= self.ends
        short: dict[bytes, int] = {}
        for number in np.flatnonzero(without & (self.starts < self.ends)).tolist():
            short.setdefault(self.codes[self.starts[number] : self.ends[number]].tobytes(), number)
        return short

    def find(self, texts: Sequence[str]) -> list[Hit | None]:
        """Find test sentences in texts: for each text a hit, or None. Texts are told apart: none is in two of them."""
        hits, group, characters = [], [], 0
        for text in texts:
            group.append(text)
            characters += len(text)
            if characters > GROUP_CHARACTERS:
                hits += self._find(group)
                group, characters = [], 0
        return hits + (self._find(group) if group else [])

    def _find(self, texts: list[str]) -> list[Hit | None]:
        codes, ends, breaks = fold(texts)
        starts = np.concatenate([[0], ends + 1])
        hits: list[Hit | None] = [None] * len(texts)
        for number in np.flatnonzero(ends - starts[:-1] <= self.longest_short).tolist():
            sentence = self.short.get(codes[starts[number] : ends[number]].tobytes())
            if sentence is not None:
                hits[number] = Hit(*self.places[sentence], "whole text")
        kinds = 2 if np.count_nonzero(codes >= HEAVY) > len(texts) else 1  # without Chinese and Korean only the longer
        for length, begin, hashes in hash_runs(codes, [LONG, SHORT][:kinds]):
            for position, anchor in self.anchors[length].met(hashes):
                number = int(np.searchsorted(ends, begin + position))
                if hits[number] is None:
                    start = int(starts[number])
                    hits[number] = self._hit(codes[start : ends[number]], begin + position - start, anchor)
        for length in HEADS[:kinds]:
            for place, start in self.heads[length].met(hash_heads(codes, breaks, length)):
                begin, sentence = int(breaks[place]), int(np.searchsorted(self.ends, start, side="right"))
                number, wanted = int(np.searchsorted(ends, begin)), self.codes[start : self.ends[sentence]]
                end = begin + len(wanted)
                same = np.array_equal(codes[begin:end], wanted) and breaks[np.searchsorted(breaks, end)] == end
                if same and hits[number] is None:
                    hits[number] = Hit(*self.places[sentence], "short sentence")
        return hits

    def _hit(self, text: np.ndarray, position: int, anchor: int) -> Hit | None:
        """The hit that a text is, if what is the same around ``position`` and an anchor's start holds a pattern."""
        sentence = int(np.searchsorted(self.ends, anchor, side="right"))
        start, end = int(self.starts[sentence]), int(self.ends[sentence])
        before, behind = min(position, anchor - start), min(len(text) - position, end - anchor)
        other = text[position - before : position + behind] != self.codes[anchor - before : anchor + behind]
        differing = np.flatnonzero(other) - before
        split = int(np.searchsorted(differing, 0))
        first = anchor + (int(differing[split - 1]) + 1 if split else -before)
        last = anchor + (int(differing[split]) if split < len(differing) else behind)
        pattern = int(np.searchsorted(self.pattern_starts, first))
        if pattern == len(self.pattern_starts) or self.pattern_ends[pattern] > last:
            return None
        return Hit(*self.places[sentence], "sentence" if (first, last) == (start, end) else f"{NGRAM_WORDS}-gram")
