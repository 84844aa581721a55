"""Ids word by word against the tokenizer's own of whole texts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_mixture import words
from data_mixture.words import Words, is_by_words
from towerspeech.outside_text import MARK, text_tokenizer

PARTS = ["the", " ", "  ", " dog", "\n", "\t", ".", "▁", " ▁", "▁▁ ", "Apfel,", "é", "e\u0301", "中文", "한국어 "]
PARTS += ["\u3000", "\xa0"]
ANY = st.characters(exclude_categories=["Cs"], max_codepoint=0xEFFFF)  # no unit, and no mark but those in PARTS
PARTS += ["<s>", "<EOD>", " <s> ", f"<{MARK}s>", f" <{MARK}EOD> ", "word" * 11, "a b c", "0", "\U0001f600", "\x00"]


def saved_of(backend: Tokenizer) -> dict:
    return json.loads(backend.to_str())


def words_of(backend: Tokenizer) -> Words:
    return Words(backend, saved_of(backend), np.uint16)


def other(backend: Tokenizer, **changed) -> Tokenizer:
    """A tokenizer with other parts, by name; those of its model by theirs."""
    saved = saved_of(backend)
    for name, part in changed.items():
        (saved if name in saved else saved["model"])[name] = part
    return Tokenizer.from_str(json.dumps(saved))


def prepending(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer in the older way."""
    mark = saved_of(backend)["normalizer"]
    spaces = {"type": "Sequence", "normalizers": words.PREPEND}
    return other(backend, pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [mark, spaces]})


@pytest.fixture(scope="module")
def backend(tokenizer_dir) -> Tokenizer:
    return text_tokenizer(AutoTokenizer.from_pretrained(tokenizer_dir)).backend_tokenizer


@pytest.fixture(scope="module")
def both(backend) -> dict[str, Words]:
    ways = {"Metaspace": backend, "Prepend": prepending(backend)}
    assert saved_of(backend)["pre_tokenizer"]["type"] == "Metaspace"
    assert all(is_by_words(saved_of(way)) for way in ways.values())
    return {name: words_of(way) for name, way in ways.items()}


@pytest.mark.parametrize("way", ["Metaspace", "Prepend"])
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    texts=st.lists(
        st.lists(st.one_of(st.sampled_from(PARTS), st.text(ANY, max_size=8)), max_size=12).map("".join), max_size=5
    )
)
def test_ids_are_those_of_the_whole_text(both, way, texts):
    mine = both[way]
    expected = [mine.backend.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # the second time all words are known
        assert [ids.tolist() for ids in mine(texts)] == expected


def test_nearly_all_texts_go_by_words(both, monkeypatch):
    mine = words_of(both["Metaspace"].backend)
    texts = ["the old captain sees a dog.\nthe dog", f"sees <{MARK}s> the  dog ", "中文 the"]
    expected = [mine.backend.encode(text, add_special_tokens=False).ids for text in texts]
    mine(texts)
    monkeypatch.setattr(mine, "encode", lambda encoded: [] if not encoded else pytest.fail(f"encoded {encoded}"))
    assert [ids.tolist() for ids in mine(texts)] == expected
    assert "dog.\nthe" in mine.ids and "the" in mine.ids


def test_memory_is_bounded(both, monkeypatch):
    monkeypatch.setattr(words, "MOST", 50)
    mine = words_of(both["Metaspace"].backend)
    for start in range(0, 1000, 20):
        texts = [f"dog{number} the {'long' * 10}{number}" for number in range(start, start + 20)]
        expected = [mine.backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in mine(texts)] == expected
        assert len(mine.ids) <= 50 + 21 and max(map(len, mine.ids)) <= words.LONGEST


def test_other_tokenizers_do_not_go_by_words(backend):
    saved = saved_of(backend)
    vocab, added = saved["model"]["vocab"], saved["added_tokens"]
    metaspace, mark = saved["pre_tokenizer"], saved["normalizer"]
    more = {**added[0], "id": len(vocab)}
    lower = {"type": "Sequence", "normalizers": [mark, {"type": "Lowercase"}]}
    for changed in (
        {"vocab": {**vocab, "e▁d": len(vocab)}},  # a piece from one word into the next
        {"vocab": {**vocab, "▁▁d": len(vocab)}},
        {"added_tokens": [*added, {**more, "content": "the dog"}]},
        {"added_tokens": [*added, {**more, "content": "▁dog"}]},
        {"added_tokens": [*added, *({**more, "id": len(vocab) + n, "content": f"<{n}>"} for n in range(200))]},
        {"dropout": 0.5},
        {"pre_tokenizer": {**metaspace, "split": True}},
        {"pre_tokenizer": {**metaspace, "prepend_scheme": "never"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},  # and no space before the text
        {"normalizer": lower},
    ):
        by_words = is_by_words(saved_of(other(backend, **changed)))
        # Pieces of several spaces and a word are no trouble: where a word begins, there is one space alone.
        assert by_words == (changed.get("vocab", {}).get("▁▁d") is not None), changed
