"""The trainer's data order against a plain loop that writes every stream out."""

import json

import numpy as np
import pytest

from continued_pretraining.packing import IGNORE, Mixture, TokenStream
from towerspeech.indexed import IndexedTokens, write_index

LENGTH = 8


def write_source(folder, name: str, documents: list[list[int]]) -> None:
    folder.mkdir(exist_ok=True)
    np.array([token for document in documents for token in document], np.uint16).tofile(folder / f"{name}.bin")
    write_index(folder / f"{name}.idx", np.array([len(d) for d in documents], np.int32), np.uint16)


@pytest.fixture
def mixture(tmp_path):
    """Sources a (37 documents, budget 1000: several epochs) and b (5 documents, budget 21); all tokens distinct."""
    random = np.random.default_rng(1)
    tokens = iter(range(1, 60000))
    sources = {
        name: [[next(tokens) for _ in range(random.integers(1, 12))] for _ in range(count)]
        for name, count in (("a", 37), ("b", 5))
    }
    for name, documents in sources.items():
        write_source(tmp_path / "mix", name, documents)
    facts = [{"name": "a", "budget": 1000}, {"name": "b", "budget": 21}]
    (tmp_path / "mix/manifest.json").write_text(json.dumps({"seed": 3, "sources": facts}))
    return tmp_path / "mix", sources


def written_out(stream: TokenStream, documents: list[list[int]], count: int) -> list[int]:
    """The stream's first tokens, by joining whole documents epoch after epoch."""
    tokens: list[int] = []
    for epoch in range(1000):
        order, _ = stream.epoch(epoch)
        assert sorted(order.tolist()) == list(range(len(documents)))  # each document once an epoch
        tokens += [token for number in order for token in documents[number]]
        if len(tokens) >= count:
            return tokens[:count]
    raise AssertionError


def test_stream_equals_the_documents_joined(mixture):
    folder, sources = mixture
    stream = TokenStream(IndexedTokens(folder / "a"), (3, 0))
    expected = written_out(stream, sources["a"], 2000)
    random = np.random.default_rng(0)
    for _ in range(300):
        start, count = int(random.integers(0, 1900)), int(random.integers(1, 90))
        assert stream.read(start, count).tolist() == expected[start : start + count]
    orders = [stream.epoch(epoch)[0].tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_budgets_are_exact_to_the_token(mixture):
    folder, sources = mixture
    data = Mixture(folder, LENGTH)
    assert data.num_windows == 125 + 3
    trained = {"a": [], "b": []}
    for number in range(data.num_windows):
        inputs, targets = data.window(number)
        assert (targets[:-1][targets[:-1] != IGNORE] == inputs[1:][targets[:-1] != IGNORE]).all()
        name = "ab"[data.owner[number]]
        trained[name] += targets[targets != IGNORE].tolist()
    for number, (name, budget) in enumerate((("a", 1000), ("b", 21))):
        # Windows of one source come in the order of its stream: together they are its tokens 1..budget.
        assert trained[name] == written_out(data.streams[number], sources[name], budget + 1)[1:]
        assert len(trained[name]) == budget
    assert data.num_targets(range(data.num_windows)) == 1021
    inputs, targets = data.batch(range(120, 136))  # beyond the end: filled up
    assert (targets[8:] == IGNORE).all() and data.num_targets(range(120, 136)) == (targets != IGNORE).sum()


def test_tokens_seen_counts_targets(mixture):
    data = Mixture(mixture[0], LENGTH)
    for windows in (0, 1, 17, 64, 128, 200):
        targets = [data.window(number)[1] for number in range(windows)]
        owners = data.owner[:windows]
        expected = [
            sum(int((t != IGNORE).sum()) for t, o in zip(targets, owners, strict=False) if o == s) for s in (0, 1)
        ]
        assert list(data.tokens_seen(windows).values()) == expected


def test_blend_is_even_from_the_beginning(tmp_path):
    """The first half of a run sees each source in its share: no source is used up early."""
    for name in "ab":
        write_source(tmp_path / "mix", name, [[1] * 50] * 10)
    facts = [{"name": "a", "budget": 50_000}, {"name": "b", "budget": 10_000}]
    (tmp_path / "mix/manifest.json").write_text(json.dumps({"seed": 0, "sources": facts}))
    seen = Mixture(tmp_path / "mix", LENGTH).tokens_seen(3750)
    assert abs(seen["a"] / 25_000 - 1) < 0.05 and abs(seen["b"] / 5_000 - 1) < 0.12
