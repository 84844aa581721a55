"""Token ids of texts from those of their words, each of which is encoded once: Zipf's law makes it fast.

A tokenizer of SentencePiece's kind has no words: it merges the characters of a whole text. But its pieces hold a space
(as "▁") at their beginning only, or are nothing but spaces. So no merge ever reaches from a character to a space that
follows it, and what is between two such places gets the same ids by itself as in the text.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from towerspeech.outside_text import UNMARK

SPACE = "\u2581"  # what a space becomes
CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
BREAK = "\U000fffff"  # between words; of plane 15, whose characters no text from outside may hold, but never a unit
AROUND_BREAK = re.compile("(?<=[^ ]) (?=[^ ])")  # several spaces in a row belong to the word that they are in
LONGEST = 40  # characters of a word that is kept: what is longer is a line of a language without spaces, or a link
MOST = 1 << 19  # words that are kept, about 100 MB
TOGETHER = 64  # words that are encoded as one text
MOST_ADDED = 100  # added tokens: each is looked for in each text
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}  # of converted Llama tokenizers, the newer way
PREPEND = [  # and the older
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


def is_by_words(saved: dict) -> bool:
    """Tell of a tokenizer.json whether its tokenizer gives a text the ids of its words, one after another."""
    model, before, steps = saved["model"], saved["pre_tokenizer"], list(steps_of(saved["normalizer"]))
    if (
        model["type"] != "BPE"
        or SPACE not in model["vocab"]
        or any(CROSSING.search(piece) for piece in model["vocab"])
    ):
        return False
    # A text gets a space before it, so that its first word is as its others: in one of the two ways that are known.
    if before:
        spaced = not steps and before == METASPACE | {"prepend_scheme": before.get("prepend_scheme")}
        spaced = spaced and before["prepend_scheme"] in ("first", "always")
    else:
        spaced = steps == PREPEND
    added = [token["content"] for token in saved["added_tokens"]]
    within = any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return spaced and not within and len(added) <= MOST_ADDED and not any({SPACE, " "} & {*token} for token in added)


def steps_of(normalizer: dict | None) -> Iterator[dict]:
    """The steps of a normalizer, which may hold others; without the one that takes out marks."""
    if normalizer and normalizer["type"] == "Sequence":
        for step in normalizer["normalizers"]:
            yield from steps_of(step)
    elif normalizer and normalizer != UNMARK:
        yield normalizer


def encode_whole(backend, texts: list[str], dtype: type) -> list[np.ndarray]:
    """A tokenizer's own ids of texts, but without offsets, masks and types: they take most of its time."""
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


class Words:
    """Encodes texts as a tokenizer does for which ``is_by_words`` holds, without special tokens."""

    def __init__(self, backend, saved: dict, dtype: type):
        """``backend`` is of the tokenizers library, ``saved`` what it saves."""
        self.backend, self.dtype = backend, np.dtype(dtype)
        added = "|".join(re.escape(token["content"]) for token in saved["added_tokens"])
        self.added = re.compile(added or r"\Z(?!\Z)")  # looked for in a text before it is cut or changed
        vocab = saved["model"]["vocab"]
        self.begins = np.zeros(1 + max(vocab.values()), bool)  # of each id: whether a word may begin with it
        self.begins[[index for piece, index in vocab.items() if piece.startswith(SPACE)]] = True
        self.ids: dict[str, bytes] = {}  # of each word that is kept

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids, (num_tokens,), of each text."""
        # A SPACE that the text itself holds decides whether one comes before it.
        apart = [not text or SPACE in text or bool(self.added.search(text)) for text in texts]
        by_words = iter(self.join_words([text for text, alone in zip(texts, apart, strict=True) if not alone]))
        encoded = iter(self.encode([text for text, alone in zip(texts, apart, strict=True) if alone]))
        return [next(encoded if alone else by_words) for alone in apart]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return encode_whole(self.backend, texts, self.dtype)

    def join_words(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of texts from those of their words."""
        import pyarrow as pa
        from pyarrow.compute import split_pattern

        if not texts:
            return []
        split = split_pattern(pa.array([broken(text) for text in texts], pa.large_string()), BREAK)
        words = split.values.dictionary_encode()  # each once, and where each is
        ids, order = self.ids_of(words.dictionary.to_pylist()), words.indices.to_numpy()
        sizes = np.fromiter(map(len, ids), np.int64, len(ids)) // self.dtype.itemsize
        begins, taken = (np.cumsum(sizes) - sizes)[order], sizes[order]
        ends = np.cumsum(taken)
        # A token's place among all words' ids: where its word begins there, and how far it is in its word.
        places = np.arange(ends[-1])
        places += np.repeat(begins - (ends - taken), taken)
        flat = np.frombuffer(b"".join(ids), self.dtype)[places]
        return np.split(flat, ends[split.offsets.to_numpy()[1:-1] - 1])

    def ids_of(self, words: list[str]) -> list[bytes]:
        """Ids of each word, which are kept for the next time."""
        if len(self.ids) > MOST:
            self.ids.clear()
        found = [*map(self.ids.get, words)]
        new = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(new, self.encode_words([words[place] for place in new]), strict=True):
            found[place] = ids
            if len(words[place]) <= LONGEST:
                self.ids[words[place]] = ids
        return found

    def encode_words(self, words: list[str]) -> list[bytes]:
        """Ids of words. Several are encoded as one text and parted again where a piece begins with a space."""
        alone = [len(word) > LONGEST or " " in word for word in words]
        short = [word for word, long in zip(words, alone, strict=True) if not long]
        rows = self.encode([" ".join(short[start : start + TOGETHER]) for start in range(0, len(short), TOGETHER)])
        together = iter([ids for row in rows for ids in self.part(row)])
        by_themselves = iter(self.encode([word for word, long in zip(words, alone, strict=True) if long]))
        return [next(by_themselves).tobytes() if long else next(together) for long in alone]

    def part(self, row: np.ndarray) -> list[bytes]:
        """The ids of each of several words."""
        ids, size = row.tobytes(), self.dtype.itemsize
        places = [*(size * np.flatnonzero(self.begins[row])).tolist(), len(ids)]
        return [ids[begin:end] for begin, end in pairwise(places)]


def broken(text: str) -> str:
    """A text with BREAK for each space that ends a word and begins another."""
    if "  " in text or text[0] == " " or text[-1] == " ":
        return AROUND_BREAK.sub(BREAK, text)
    return text.replace(" ", BREAK)
