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


def write_manifest(folder, seed: int, **budgets: int) -> None:
    facts = [{"name": name, "budget": budget} for name, budget in budgets.items()]
    (folder / "manifest.json").write_text(json.dumps({"seed": seed, "sources": facts}))


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
    write_manifest(tmp_path / "mix", 3, a=1000, b=21)
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
    assert len({tuple(stream.epoch(epoch)[0]) for epoch in range(3)}) == 3


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
    assert data.num_targets(range(data.num_windows)).sum() == 1021
    inputs, targets = data.batch(range(120, 136))  # beyond the end: filled up
    assert (targets[8:] == IGNORE).all() and data.num_targets(range(120, 136)).sum() == (targets != IGNORE).sum()


def test_held_out_documents_come_once(mixture):
    """Every token of theirs but each source's first is a target; a source without any is none."""
    folder, sources = mixture
    held_out = {"a": sources["a"][:9], "b": [[7]], "c": []}  # of one token nothing can be told
    write_manifest(folder, 3, a=1000, b=21, c=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    for source in manifest["sources"]:
        documents = held_out[source["name"]]
        write_source(folder / "validation", source["name"], documents)
        source["validation"] = {"documents": len(documents), "tokens": sum(map(len, documents))}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = Mixture(folder, LENGTH, held_out=True)
    assert data.names == ["a"]
    windows = [data.window(number) for number in range(data.num_windows)]
    targets = np.concatenate([targets[targets != IGNORE] for _, targets in windows]).tolist()
    first = windows[0][0][0]
    assert sorted([first, *targets]) == sorted(token for document in held_out["a"] for token in document)
    assert data.num_targets(range(data.num_windows)).tolist() == [len(targets)]


def test_tokens_seen_counts_targets(mixture):
    data = Mixture(mixture[0], LENGTH)
    targets = [int((data.window(number)[1] != IGNORE).sum()) for number in range(128)]
    for windows in (0, 1, 17, 64, 127, 128):
        expected = {"a": 0, "b": 0}
        for number in range(windows):
            expected["ab"[data.owner[number]]] += targets[number]
        assert data.tokens_seen(windows) == expected and sum(expected.values()) == sum(targets[:windows])
        assert data.num_targets(range(windows)).sum() == sum(targets[:windows])
        assert data.num_targets(range(windows, 200)).sum() == sum(targets[windows:])
    assert data.tokens_seen(200) == {"a": 1000, "b": 21}


@pytest.mark.parametrize(
    ("budget", "windows", "last"), [(1, 1, 1), (7, 1, 7), (8, 1, 8), (9, 2, 1), (16, 2, 8), (17, 3, 1), (23, 3, 7)]
)
def test_a_budget_met_exactly_or_missed_by_one(tmp_path, budget, windows, last):
    write_source(tmp_path / "mix", "a", [[1, 2, 3, 4, 5, 6]])  # in one order only
    write_manifest(tmp_path / "mix", 0, a=budget)
    data = Mixture(tmp_path / "mix", LENGTH)
    assert data.num_windows == windows
    inputs, targets = data.batch(range(windows + 1))
    stream = [i % 6 + 1 for i in range(windows * LENGTH + 1)]
    assert inputs[:-1].flatten().tolist() == stream[:-1] and not inputs[-1].any()
    assert targets.flatten().tolist() == stream[1 : budget + 1] + [IGNORE] * (windows * LENGTH + LENGTH - budget)
    assert (targets[windows - 1] != IGNORE).sum() == last
    assert data.num_targets(range(windows + 1)).sum() == budget and data.tokens_seen(windows) == {"a": budget}


def seen_order(folder, seed: int, **budgets: int) -> dict[str, list[int]]:
    """The first token of each document, in the order in which a mixture's windows bring them."""
    write_manifest(folder, seed, **budgets)
    data = Mixture(folder, LENGTH)
    found = {name: [] for name in budgets}
    blend = []
    for number in range(data.num_windows):
        name = list(budgets)[data.owner[number]]
        blend.append(name)
        found[name] += [token for token in data.window(number)[0].tolist() if token]
    return {**found, "blend": blend}


def test_seeds_and_orders(tmp_path):
    """Each source, each epoch and each seed has an order of its own; the same seed gives the same again."""
    documents = [[number, *[0] * 7] for number in range(1, 41)]
    for name in "abc":
        write_source(
            tmp_path / "mix", name, documents
        )  # equal sizes: their orders must differ by name of source alone
    budgets = dict.fromkeys("abc", 2 * 320)
    found = {seed: seen_order(tmp_path / "mix", seed, **budgets) for seed in (0, 1, 2)}
    orders = []
    for seed in (0, 1, 2):
        for name in "abc":
            epochs = found[seed][name][:40], found[seed][name][40:]
            assert all(sorted(epoch) == list(range(1, 41)) for epoch in epochs)
            orders += map(tuple, epochs)
    assert len({*orders}) == len(orders) == 18 and tuple(range(1, 41)) not in orders
    blends = {tuple(found[seed]["blend"]) for seed in found}
    assert len(blends) == 3 and all(blend.count("b") == 80 for blend in blends)
    assert seen_order(tmp_path / "mix", 1, **budgets) == found[1]


def test_numbers_beyond_32_bits(tmp_path):
    write_index(tmp_path / "a.idx", np.array([2**30] * 3, np.int32), np.uint16)
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(3 * 2**31)  # a file with holes
    write_manifest(tmp_path, 0, a=10**10 + 1)  # three epochs and a bit
    data = Mixture(tmp_path, 2**20)
    assert data.num_windows == 9537  # 10**10 / 2**20 = 9536.7
    assert (
        data.num_targets(range(9537)).sum() == 10**10 + 1
        and data.num_targets(range(9536, 9600)).sum() == 10**10 + 1 - 9536 * 2**20
    )
    assert data.tokens_seen(9536) == {"a": 9536 * 2**20} and data.tokens_seen(9537) == {"a": 10**10 + 1}
    assert (data.window(9536)[1] != IGNORE).sum() == 10**10 + 1 - 9536 * 2**20


def test_blend_is_even_from_the_beginning(tmp_path):
    """The first half of a run sees each source in its share: no source is used up early."""
    for name in "ab":
        write_source(tmp_path / "mix", name, [[1] * 50] * 10)
    write_manifest(tmp_path / "mix", 0, a=50_000, b=10_000)
    seen = Mixture(tmp_path / "mix", LENGTH).tokens_seen(3750)
    assert abs(seen["a"] / 25_000 - 1) < 0.05 and abs(seen["b"] / 5_000 - 1) < 0.12
