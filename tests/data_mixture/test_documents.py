"""What build_mixture.py takes of its sources and what it leaves out, against plain loops over the same rows."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from data_mixture.build_mixture import build_mixture
from tests.data_mixture.test_build_mixture import build_whole, write_texts
from tests.test_stand_ins import in_script
from towerspeech import prompts, units
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.indexed import IndexedTokens
from towerspeech.mixture import Group, Source, with_budgets

REPO = Path(__file__).parents[2]
TEST_DATA = Path(os.environ.get("TOWERSPEECH_TEST_DATA", "nowhere"))
WORDS = [
    "the",
    "old",
    "captain",
    "dog",
    "boat",
    "sees",
    "a",
    "new",
    "house",
    "and",
    "goes",
    "home",
    "today",
    "with",
    "two",
    "green",
    "apples",
]


def texts_of(prefix: Path, tokenizer_dir: Path) -> list[str]:
    """The documents of a source, as text."""
    tokenizer, found = AutoTokenizer.from_pretrained(tokenizer_dir), IndexedTokens(prefix)
    parts = zip(found.offsets, found.sizes, strict=True)
    return [tokenizer.decode(found.tokens[start : start + size - 1]) for start, size in parts]


def manifest_of(mix: Path) -> dict:
    return json.loads((mix / "manifest.json").read_text())


def sentences(number: int, seed: int = 0, words: int = 9) -> list[str]:
    """Different sentences of known words."""
    rng = random.Random(seed)
    return [" ".join([*rng.choices(WORDS, k=words), f"{i:05}"]) for i in range(number)]


# --- How much is drawn ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """12,000 documents, as one gz and as forty Parquet files."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, texts = tmp_path_factory.mktemp("many"), sentences(12_000)
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    for number in range(40):
        (folder / "b").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts[number::40]}), folder / f"b/{number:02}.parquet", row_group_size=100)
    return [folder / "a.jsonl.gz", folder / "b"]


@pytest.mark.parametrize("form", [0, 1], ids=["gz", "Parquet"])
def test_no_more_is_drawn_than_the_budget_and_the_reserve(tmp_path, tokenizer_dir, many, form):
    """From all over the source, other documents for another seed; the estimate is within 2%."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = sentences(12_000)
    total = sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    source, drawn = Source("a", "text", [str(many[form])], total // 10), []
    for seed in (0, 1):
        mix = tmp_path / str(seed)
        build_mixture(tokenizer_dir, mix, [source], seed=seed)
        [facts] = manifest_of(mix)["sources"]
        assert facts["estimated_tokens"] == pytest.approx(total, rel=0.02)
        got = facts["tokens"] + facts["validation"]["tokens"]
        assert 1.1 * source.budget <= got <= 1.2 * source.budget
        places = [int(text.split()[-1]) for text in texts_of(mix / "a", tokenizer_dir)]
        assert len({*places}) == len(places) == facts["documents"]
        if form == 0:
            assert places == sorted(places)
            counts, _ = np.histogram(places, 10, (0, 12_000))
            assert counts.min() > 0.6 * counts.mean()
        drawn.append({*places})
    assert len(drawn[0] & drawn[1]) < 0.3 * len(drawn[0])


def test_a_source_that_the_sample_misjudged_is_drawn_again(tmp_path, tokenizer_dir):
    """Digits come first, where the sample is taken: most tokens for a byte. Further rounds draw what is missing."""
    digits = [" ".join(f"{number:09}") for number in range(9_000)]
    texts = [f"{text} n{number}" for number, text in enumerate([*digits, *sentences(40_000, words=12)])]
    source = Source("a", "text", [str(write_texts(tmp_path / "a.jsonl", texts))], 60_000)
    build_mixture(tokenizer_dir, tmp_path / "mix", [source])
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert len(facts["rounds"]) > 1
    assert facts["tokens"] + facts["validation"]["tokens"] >= 1.1 * 60_000
    found = texts_of(tmp_path / "mix/a", tokenizer_dir)
    assert len({*found}) == len(found) and {*found} < {*texts}


def test_held_out_documents_are_others(tmp_path, tokenizer_dir, many, make_units):
    """Of each source about as many tokens as asked for, never more than a hundredth; megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    speech = [{"units": [i % 50, (3 * i + 1) % 50], "text": text} for i, text in enumerate(sentences(2_000, 3))]
    sources = [
        Source("text", "text", [str(many[0])], 60_000),
        Source("speech", "speech", [str(make_units(tmp_path / "units", speech))], 20_000),
    ]
    build_mixture(tokenizer_dir, tmp_path / "mix", sources, validation_tokens=400)
    for facts in manifest_of(tmp_path / "mix")["sources"]:
        drawn = facts["tokens"] + facts["validation"]["tokens"]
        name, held_out = facts["name"], facts["validation"]["tokens"]
        wanted = min(400, drawn / 100)
        assert 0.4 * wanted <= held_out <= wanted, facts
        trained, tested = (texts_of(tmp_path / "mix" / each, tokenizer_dir) for each in (name, f"validation/{name}"))
        assert len(tested) == facts["validation"]["documents"] and not {*trained} & {*tested}
        ours = IndexedTokens(tmp_path / f"mix/validation/{name}")
        theirs = IndexedDataset(str(tmp_path / f"mix/validation/{name}"))
        assert sum(len(theirs[i]) for i in range(len(theirs))) == held_out == ours.sizes.sum()
        assert [theirs[i].tolist() for i in range(len(theirs))] == [
            ours.tokens[start : start + size].tolist() for start, size in zip(ours.offsets, ours.sizes, strict=True)
        ]


def test_a_long_document_is_not_held_out(tmp_path, tokenizer_dir):
    """If it is longer than what is wanted: the budget would be short of it."""
    texts = [f"{text} " * 40 for text in sentences(60)]
    source = Source("a", "text", [str(write_texts(tmp_path / "a.jsonl", texts))], 1)
    for seed in range(4):
        build_mixture(tokenizer_dir, tmp_path / str(seed), [source], seed=seed, reserve=1e6)
        [facts] = manifest_of(tmp_path / str(seed))["sources"]
        assert facts["documents"] == 60 and facts["validation"]["documents"] == 0


def test_a_budget_that_is_lowered_gives_what_a_fresh_run_does(tmp_path, tokenizer_dir):
    """Of a run that did not end: what depends on the budget, held-out documents too, is made anew."""
    texts = sentences(3_000)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    total = sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    source = Source("a", "text", [str(write_texts(tmp_path / "a.jsonl", texts))], int(0.95 * total))
    other = Source("b", "text", [str(write_texts(tmp_path / "b.jsonl", texts[:300] * 2))], total // 6)
    with pytest.raises(UserError, match="'b' has .* left out 300 twice"):
        build_mixture(tokenizer_dir, tmp_path / "mix", [source, other])
    for share in (0.997, 0.4):
        sources = [replace(source, budget=int(share * total)), replace(other, budget=total // 20)]
        build_mixture(tokenizer_dir, tmp_path / "fresh", sources, overwrite=True)
        shutil.copytree(tmp_path / "mix", tmp_path / f"{share}")
        build_mixture(tokenizer_dir, tmp_path / f"{share}", sources)
        assert files_of(tmp_path / f"{share}") == files_of(tmp_path / "fresh")


def test_sizes_are_told_from_all_forms_of_lines(tmp_path, tokenizer_dir):
    """Short ones, where what stands beside the text counts most; an empty file among them is none."""
    pairs = [(f"the dog {i:05}", f"der Hund {i:05}") for i in range(20_000)]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{one}\n" for one, _ in pairs))
    (folder / "b.txt").write_text("")
    (tmp_path / "a.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in pairs))
    for side, ending in enumerate(("en", "de")):
        (tmp_path / f"p.{ending}").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    (tmp_path / "q.txt").write_text("".join(f"{one}\n{other}\n\n" for one, other in pairs))
    (tmp_path / "list.json").write_text(json.dumps([{"text": one} for one, _ in pairs]))
    sources = [
        Source("plain", "text", [str(folder)], 5),
        Source("tsv", "parallel", [str(tmp_path / "a.tsv")], 5, direction="en-de"),
        Source("aligned", "parallel", [f"{tmp_path}/p.{{en,de}}"], 5),
        Source("paragraphs", "text", [str(tmp_path / "q.txt")], 5, paragraphs=True),
        Source("list", "text", [str(tmp_path / "list.json")], 5),
    ]
    build_whole(tokenizer_dir, tmp_path / "mix", sources)
    for facts in manifest_of(tmp_path / "mix")["sources"]:
        assert facts["documents"] == 20_000
        assert facts["estimated_tokens"] == pytest.approx(facts["tokens"], rel=0.02), facts["name"]


def test_the_plan_agrees_with_the_build(tmp_path, tokenizer_dir, many, capsys):
    source = Source("a", "text", [str(many[1])], 20_000)
    build_mixture(tokenizer_dir, tmp_path / "mix", [source], plan=True)
    assert not (tmp_path / "mix").exists()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    planned = int(row.split()[3].replace(",", ""))
    build_mixture(tokenizer_dir, tmp_path / "mix", [source])
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert facts["tokens"] + facts["validation"]["tokens"] == pytest.approx(planned, rel=0.02)
    greedy = Source("b", "text", [str(many[1])], 10**9)
    with pytest.raises(
        UserError, match=r"'b' has 3\d\d,\d{3} tokens for a budget .*: 999,\d{3},\d{3} missing.*\n.*1 of 2"
    ):
        build_mixture(tokenizer_dir, tmp_path / "mix", [source, greedy], plan=True)


def test_of_the_hub_what_comes_first_is_taken(tmp_path, tokenizer_dir):
    """Until there is enough: nobody knows how much there is. A local folder stands for a data set of the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    texts = sentences(9_000)
    pq.write_table(pa.table({"text": texts}), tmp_path / "data/train.parquet")
    source = Source("a", "text", [f"hub:{tmp_path / 'data'}"], 20_000)
    build_mixture(tokenizer_dir, tmp_path / "mix", [source])
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert 22_000 <= facts["tokens"] + facts["validation"]["tokens"] < 120_000  # a batch more at most
    found = texts_of(tmp_path / "mix/a", tokenizer_dir) + texts_of(tmp_path / "mix/validation/a", tokenizer_dir)
    assert sorted(found) == sorted(texts[: len(found)])
    info = json.loads((tmp_path / "mix/run_info.json").read_text())
    assert info["arguments"]["sources"] == [["a", "text", 0, {"hub": source.paths}]]


def test_of_the_hub_a_kill_before_the_end_adds_nothing(tmp_path, tokenizer_dir, monkeypatch):
    """Enough is drawn and noted, but not that nothing more comes: what goes on must not read on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": sentences(9_000)}), tmp_path / "data/train.parquet")
    source = Source("a", "text", [f"hub:{tmp_path / 'data'}"], 20_000)
    monkeypatch.setattr("data_mixture.output.NOTE_EVERY", 1)
    monkeypatch.setattr("data_mixture.reading.BATCH_ITEMS", 200)
    build_mixture(tokenizer_dir, tmp_path / "fresh", [source], num_processes=1)

    def killed(output) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_mixture.output.Output.note_finishing", killed)
        build_mixture(tokenizer_dir, tmp_path / "mix", [source], num_processes=1)
    build_mixture(tokenizer_dir, tmp_path / "mix", [source], num_processes=1)
    assert files_of(tmp_path / "mix") == files_of(tmp_path / "fresh")


def test_groups_share_their_budget_to_the_token():
    sources = [Source(name, "text", ["x"], group="g") for name in "abcdefg"]
    equal = with_budgets(sources, {"g": Group(1000)})
    assert sorted(each.budget for each in equal) == [142, 143, 143, 143, 143, 143, 143]
    weights = dict.fromkeys("abcdefg", 1.0) | {"c": 4.0}
    shares = {each.name: each.budget for each in with_budgets(sources, {"g": Group(1000, weights)})}
    assert shares.pop("c") == 400 and {*shares.values()} == {100}
    for groups, wrong, message in (
        ({}, sources, "group 'g', which is not there"),
        ({"g": Group(1000, {"a": 1.0})}, sources, "give each a weight"),
        ({"g": Group(1000)}, [Source("a", "text", ["x"], 5, group="g")], "needs a positive budget, or a group"),
        ({"g": Group(1000), "h": Group(5)}, sources, "group 'h' has a budget of 5 for \\[\\]"),
        ({"g": Group(3)}, sources, "budget of 3"),
        ({"g": Group(1000, weights | {"a": 1e-6})}, sources, "leaves no token to \\['a'\\]"),
    ):
        with pytest.raises(UserError, match=message):
            with_budgets(wrong, groups)


SYSTEMS = ("towerspeech_6b", "towerspeech_8b", "llamaspeech_6b", "tinyllama_10b", "llama2_10b")


def in_small(name: str, folder: Path, make_units) -> tuple[list[Source], dict[str, Group]]:
    """A system's sources and groups, a ten-thousandth of their size, and corpora that hold a little more; speech twice
    as much."""
    block = yaml.safe_load((REPO / f"systems/{name}.yaml").read_text())["build_mixture"]
    groups = {each: Group(group["budget"] // 10_000) for each, group in block["groups"].items()}
    sources = [Source(**source) for source in block["sources"]]
    for source in sources:
        if source.kind == "speech":
            source.budget //= 10_000
            for number, path in enumerate(source.paths):
                rows = [
                    {"units": [(i + j * j) % 50 for j in range(400)], "text": f"the dog {i}"} for i in range(1_300)
                ]
                make_units(folder / path, rows[number:])
            source.paths = [str(folder / path) for path in source.paths]
            continue
        path = folder / source.paths[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        number = sum(each.group == source.group for each in sources)
        texts = sentences(1 + groups[source.group].budget // (11 * number), seed=len(source.name))
        sides = source.direction.split("-") if source.direction else [source.language]
        rows = [[f"{in_script(code, text[:-5])}{text[-5:]}" for code in sides] for text in texts]
        keys = ["source", "target"] if source.direction else ["text"]
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
        source.paths = [str(path)]
    return sources, groups


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_five_systems_in_small(tmp_path, tokenizer_dir, make_units, capsys, name):
    """Each source's share is right to the token, and the plan agrees with the build within 2%."""
    from continued_pretraining.packing import Mixture

    sources, groups = in_small(name, tmp_path, make_units)
    build_mixture(tokenizer_dir, tmp_path / "mix", sources, groups, plan=True)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:1].strip()}
    build_mixture(tokenizer_dir, tmp_path / "mix", sources, groups)
    data = Mixture(tmp_path / "mix", 64)
    budgets = {source.name: source.budget for source in with_budgets(sources, groups)}
    assert data.tokens_seen(data.num_windows) == budgets
    block = yaml.safe_load((REPO / f"systems/{name}.yaml").read_text())["build_mixture"]
    whole = sum(each.get("budget", 0) for each in [*block["sources"], *block["groups"].values()])
    assert sum(budgets.values()) == whole // 10_000
    for facts in manifest_of(tmp_path / "mix")["sources"]:
        planned = int(lines[facts["name"]][3].replace(",", ""))
        few = 5 * facts["tokens"] / facts["documents"]  # documents that the draw may miss by, of as few as fifty
        drawn = facts["tokens"] + facts["validation"]["tokens"]
        assert drawn == pytest.approx(planned, rel=0.02, abs=few), facts["name"]


# --- What is left out -----------------------------------------------------------------------------
def test_thresholds_and_lengths(tmp_path, tokenizer_dir):
    rng = random.Random(0)
    rows = [
        {
            "text": " ".join(["dog"] * rng.randint(1, 9)) + f" {i}",
            "perplexity": rng.choice([1, 515.9, "516", 516.1, 9e9]),
        }
        for i in range(300)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bounds = {"keep": {"perplexity": "<= 516"}, "min_characters": 8, "max_characters": 30}
    build_whole(tokenizer_dir, tmp_path / "mix", [Source("a", "text", [str(path)], 5, **bounds)])
    near = [row["text"] for row in rows if float(row["perplexity"]) <= 516]
    kept = [text for text in near if 8 <= len(text) <= 30]
    assert texts_of(tmp_path / "mix/a", tokenizer_dir) == kept and 0 < len(kept) < len(near)
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert facts["left_out"] == {
        "beyond keep: perplexity": 300 - len(near),
        "longer than max_characters": sum(len(text) > 30 for text in near),
        "shorter than min_characters": sum(len(text) < 8 for text in near),
    }


def test_pairs_below_a_threshold_are_left_out(tmp_path, tokenizer_dir):
    pairs = [
        {"translation": {"en": f"the dog {i}", "de": f"der Hund {i}"}, "cometkiwi": i / 20, "bicleaner": 1 - i / 20}
        for i in range(20)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    keep = {"cometkiwi": ">= 0.25", "bicleaner": "> 0.5"}
    source = Source("a", "parallel", [str(path)], 5, direction="de-en", keep=keep)
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    wanted = [f"German: der Hund {i}\nEnglish: the dog {i}" for i in range(20) if i / 20 >= 0.25 and 1 - i / 20 > 0.5]
    assert texts_of(tmp_path / "mix/a", tokenizer_dir) == wanted and 3 < len(wanted) < 10


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("text", {"name": "unfinished"}, "a source is named 'unfinished'"),
        ("text", {"keep": {"p": "about 3"}}, "keep p: 'about 3' is no bound"),
        ("text", {"keep": {"p": "<= 3"}}, "its p is None, but keep wants a number"),
        ("text", {"direction": "de-en"}, "is of kind text, which has no direction"),
        ("text", {"templates": {"units": 1.0}}, "is of kind text, which has no templates"),
        ("parallel", {"paragraphs": True}, "is of kind parallel, which has no paragraphs"),
        ("speech", {"keep": {"p": "<= 3"}}, "is of kind speech, which has no keep"),
        ("speech", {"templates": {"songs": 1.0}}, "templates are {'songs': 1.0}"),
        ("text", {"language": "Klingon"}, "'Klingon' is none of the ten languages"),
        ("text", {"min_characters": 9, "max_characters": 8}, "keeps no document"),
        ("text", {"keep": {"p": ">= 1.2.3"}}, "keep p: '>= 1.2.3' is no bound"),
        ("text", {"max_epochs": 0}, "max_epochs above 0"),
        ("speech", {"duplicates": "exact"}, "is of kind speech, which has no duplicates"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, tokenizer_dir, kind, changed, message):
    path = write_texts(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=message):
        build_mixture(
            tokenizer_dir,
            tmp_path / "mix",
            [Source(**{"name": "a", "kind": kind, "paths": [str(path)], "budget": 1, **changed})],
        )


def test_documents_that_are_there_twice(tmp_path, tokenizer_dir, make_units, monkeypatch):
    """Exactly or nearly; the first stays, also from one batch to another. Speech is kept."""
    monkeypatch.setattr("data_mixture.reading.BATCH_ITEMS", 7)
    first = sentences(40, words=40)
    near = [f"{text} too" for text in first]
    texts = [*first, *(f"  {text.upper()}\n" for text in first[:30]), *near]
    path = str(write_texts(tmp_path / "a.jsonl", texts))
    units_dir = str(make_units(tmp_path / "units", [{"units": [1, 2], "text": "yes"}] * 5))
    sources = [Source(each, "text", [path], 5, duplicates=each) for each in ("keep", "exact", "near")]
    sources += [Source("default", "text", [path], 5), Source("speech", "speech", [units_dir], 5)]
    build_whole(tokenizer_dir, tmp_path / "mix", sources)
    left_out = {facts["name"]: facts["left_out"] for facts in manifest_of(tmp_path / "mix")["sources"]}
    assert left_out["keep"] == {} and left_out["exact"] == left_out["default"] == {"twice": 30}
    assert left_out["near"]["twice"] == 30 and left_out["near"]["nearly twice"] >= 36
    assert texts_of(tmp_path / "mix/exact", tokenizer_dir) == [*first, *near]
    assert texts_of(tmp_path / "mix/near", tokenizer_dir)[:40] == first
    assert left_out["speech"] == {}


def test_bad_rows_are_listed_and_left_out(tmp_path, tokenizer_dir, capsys):
    """Up to a share; a mistake in a file is none of them."""
    lines = [json.dumps({"text": text}) for text in sentences(400)]
    lines[7], lines[200], lines[399] = '{"text": "cut', '{"text": 5}', '{"text": "\U000f0001"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    build_whole(tokenizer_dir, tmp_path / "mix", [Source("a", "text", [str(path)], 5)])
    listed = [json.loads(line) for line in (tmp_path / "mix/left_out.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == ["a"] * 3
    for row, place in zip(listed, (8, 201, 400), strict=True):
        assert f"a.jsonl:{place}" in row["problem"]
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert (facts["documents"], facts["left_out"]) == (397, {"that cannot be read": 3})
    with pytest.raises(UserError, match=r"'a': 3 of 400 documents cannot be read, more than 0\.1%.*\n?.*a\.jsonl:8"):
        build_whole(tokenizer_dir, tmp_path / "strict", [Source("a", "text", [str(path)], 5)], max_bad_share=0.001)
    assert not (tmp_path / "strict/manifest.json").exists()


def test_a_number_beyond_all_is_a_bad_row(tmp_path, tokenizer_dir):
    lines = [json.dumps({"text": text, "p": 1}) for text in sentences(200)]
    lines[5] = json.dumps({"text": "the dog", "p": 10**400})
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    source = Source("a", "text", [str(tmp_path / "a.jsonl")], 5, keep={"p": "<= 2"})
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert (facts["documents"], facts["left_out"]) == (199, {"that cannot be read": 1})


def test_files_that_are_all_empty_are_one_message(tmp_path, tokenizer_dir):
    import gzip

    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "folder" / name).touch()
    gzip.open(tmp_path / "folder/c.jsonl.gz", "wb").close()
    source = Source("a", "text", [str(tmp_path / "folder")], 5)
    with pytest.raises(UserError, match="source 'a': all its files are empty"):
        build_whole(tokenizer_dir, tmp_path / "mix", [source])
    write_texts(tmp_path / "folder/d.jsonl", ["the dog sees a boat"])
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    assert manifest_of(tmp_path / "mix")["sources"][0]["documents"] == 1


def test_one_empty_side_of_two_is_no_empty_file(tmp_path, tokenizer_dir):
    import gzip

    for name, text in (("a.de.gz", b""), ("a.en.gz", b"the dog sees a boat\n")):
        (tmp_path / name).write_bytes(gzip.compress(text))
    source = Source("a", "parallel", [str(tmp_path / "a.{de,en}.gz")], 5, direction="de-en")
    with pytest.raises(UserError, match=r"a.de.gz has 0 lines, .*a.en.gz has more"):
        build_whole(tokenizer_dir, tmp_path / "mix", [source])


def test_no_row_group_is_too_small_to_be_read(tmp_path, tokenizer_dir):
    """A large one that packs well beside one of few rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = sentences(4)
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("text", pa.string())]), use_dictionary=False, compression="zstd"
    ) as file:
        file.write_table(pa.table({"text": ["a" * 30_000_000]}))
        file.write_table(pa.table({"text": texts}))
    source = Source("a", "text", [str(tmp_path / "a.parquet")], 5, max_characters=1000)
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    assert texts_of(tmp_path / "mix/a", tokenizer_dir) == texts


def test_a_gz_that_is_cut_is_no_bad_row(tmp_path, tokenizer_dir, many):
    data = many[0].read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is cut short or damaged"):
        build_whole(tokenizer_dir, tmp_path / "mix", [Source("a", "text", [str(tmp_path / "a.jsonl.gz")], 5)])
    assert not (tmp_path / "mix/manifest.json").exists()


# --- Languages ------------------------------------------------------------------------------------
SAMPLES = {
    "de": "Der alte Kapitän sieht heute zwei grüne Boote im Hafen und geht nach Hause.",
    "ru": "Старый капитан видит сегодня две зелёные лодки в порту и идёт домой.",
    "zh": "老船长今天在港口看见两艘绿色的小船，然后回家了。",
    "ko": "늙은 선장은 오늘 항구에서 초록색 배 두 척을 보고 집으로 간다.",
}


def test_letters_of_no_language_of_ours_count_too(tmp_path, tokenizer_dir):
    path = write_texts(tmp_path / "a.jsonl", [f"القبطان العجوز يرى اليوم قاربين أخضرين {i}" for i in range(20)])
    with pytest.raises(UserError, match="said to be German, but 100% of the letters .* most of them none of the ten"):
        build_whole(tokenizer_dir, tmp_path / "mix", [Source("a", "text", [str(path)], 5, language="de")])


@pytest.mark.parametrize(("said", "written"), [(s, w) for s in SAMPLES for w in SAMPLES], ids=lambda code: code)
def test_a_source_in_another_script_is_refused(tmp_path, tokenizer_dir, said, written):
    """By its language or, of pairs, by each side's; a loan word is no matter."""
    texts = [f"{SAMPLES[written]} Wikipedia {i}" for i in range(20)]
    path = write_texts(tmp_path / "a.jsonl", texts)
    pairs = tmp_path / "pairs.jsonl"
    pair = [{"en": f"The old captain goes home {i}.", said: text} for i, text in enumerate(texts)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in pair))
    for number, source in enumerate(
        [
            Source("a", "text", [str(path)], 5, language=said),
            Source("b", "parallel", [str(pairs)], 5, direction=f"en-{said}"),
        ]
    ):
        if said == written:
            build_whole(tokenizer_dir, tmp_path / f"{number}", [source])
            continue
        with pytest.raises(UserError, match=r"is said to be \w+, but \d+% of the letters .* most of them"):
            build_whole(tokenizer_dir, tmp_path / f"{number}", [source])


def test_speech_documents_by_template_and_language(tmp_path, tokenizer_dir, make_units):
    rows = [
        {"units": [i % 50, (3 * i + 1) % 50], "text": text, "language": "de" if i % 4 == 0 else "en"}
        for i, text in enumerate(sentences(800))
    ]
    folder = str(make_units(tmp_path / "units", rows))
    weights = {"transcript": 2.0, "units": 1.0, "text_to_speech": 1.0}
    source = Source("s", "speech", [folder], 5, templates=weights, languages=["English", "de"])
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    found = texts_of(tmp_path / "mix/s", tokenizer_dir)
    counts = dict.fromkeys(weights, 0)
    for text, row in zip(found, rows, strict=True):
        speech = units.to_text(row["units"])
        forms = {name: prompts.speech_document(speech, row["text"], name, row["language"]) for name in weights}
        [name] = [name for name, form in forms.items() if form == text]
        counts[name] += 1
    assert abs(counts["transcript"] - 400) < 60 and abs(counts["units"] - 200) < 50
    with pytest.raises(UserError, match=r"language 'de', but speech must be in \['en'\]"):
        build_whole(tokenizer_dir, tmp_path / "refused", [Source("s", "speech", [folder], 5)])


def test_the_prompts_of_the_templates():
    assert prompts.speech_document("UU", "Ja.", "transcript", "de") == "Speech:UU\nGerman: Ja."
    assert prompts.speech_document("UU", "Ja.", "units", "de") == "Speech:UU"
    assert prompts.speech_document("UU", "Ja.", "text_to_speech", "de") == "German: Ja.\nSpeech:UU"


# --- Test sets ------------------------------------------------------------------------------------
def test_documents_with_a_test_sentence_are_left_out(tmp_path, tokenizer_dir, make_units):
    tested = [" ".join(random.Random(i).choices(WORDS, k=15)) + f" {i}" for i in range(30)]
    (tmp_path / "flores").mkdir()
    (tmp_path / "flores/eng_Latn.devtest").write_text("\n".join(tested) + "\n")
    texts = sentences(200)
    planted = {7: f"Before. “{tested[3].upper()}”, after", 90: f"x {tested[4].replace(' ', '  ')}", 199: tested[5]}
    for place, text in planted.items():
        texts[place] = text
    pair = {"src_lang": "de", "tgt_lang": "en", "source": "Hund", "target": tested[9]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "target": "dog"}) + "\n")
    speech = [{"units": [1, 2], "text": tested[11]}, {"units": [1, 2], "text": "the dog"}]
    sources = [
        Source("text", "text", [str(write_texts(tmp_path / "a.jsonl", texts))], 5),
        Source("pairs", "parallel", [str(tmp_path / "pairs.jsonl")], 5),
        Source("speech", "speech", [str(make_units(tmp_path / "units", speech))], 5),
    ]
    build_whole(tokenizer_dir, tmp_path / "mix", sources, test_sets={"flores": [str(tmp_path / "flores")]})
    left_out = [facts["left_out"] for facts in manifest_of(tmp_path / "mix")["sources"]]
    assert left_out == [{"with a sentence of a test set": count} for count in (3, 1, 1)]
    assert texts_of(tmp_path / "mix/text", tokenizer_dir) == [t for i, t in enumerate(texts) if i not in planted]
    with open(tmp_path / "mix/contamination.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["source"] for row in rows] == ["text"] * 3 + ["pairs", "speech"]
    assert {row["test_set"] for row in rows} == {"flores"}
    assert [row["document"].rpartition(":")[2] for row in rows[:3]] == ["8", "91", "200"]
    assert [row["sentence"].rpartition(":")[2] for row in rows] == ["4", "5", "6", "10", "12"]
    with pytest.raises(UserError, match="nowhere does not exist\n.*check test_sets: flores"):
        build_whole(tokenizer_dir, tmp_path / "b", sources, test_sets={"flores": [str(tmp_path / "nowhere")]})


@pytest.mark.skipif(not TEST_DATA.is_dir(), reason="FLORES and WMT23 are not here")
def test_planted_flores_and_wmt23_sentences_are_found(tmp_path, tokenizer_dir):
    """200 of both, in case, quotes and spacing changed, between other text, in ten languages; no clean one is lost."""
    tested = {"flores": [str(TEST_DATA / "flores200/devtest")], "wmt23": [str(TEST_DATA / "wmt23/generaltest2023*")]}
    rng, lines = random.Random(0), []
    for names in tested.values():
        files = [path for name in names for path in sorted(Path(name).parent.glob(Path(name).name))]
        files = [path for each in files for path in (sorted(each.iterdir()) if each.is_dir() else [each])]
        lines.append([line for path in files for line in path.read_text().splitlines() if len(line) > 60])
    planted = rng.sample(lines[0], 100) + rng.sample(lines[1], 100)
    changes = [
        str.upper,
        lambda text: f"«{text}»",
        lambda text: text.replace(" ", "  "),
        lambda text: text.replace(",", ""),
    ]
    dirty = [f"Home, he said {i}. {rng.choice(changes)(text)} And so on." for i, text in enumerate(planted)]
    clean = sentences(2_000, words=25)
    texts = rng.sample([*dirty, *clean], len(dirty) + len(clean))
    source = Source("a", "text", [str(write_texts(tmp_path / "a.jsonl", texts))], 5)
    build_whole(tokenizer_dir, tmp_path / "mix", [source], test_sets=tested)
    [facts] = manifest_of(tmp_path / "mix")["sources"]
    assert facts["left_out"] == {"with a sentence of a test set": 200} and facts["documents"] == 2_000


# --- Processes and kills --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def build(tmp_path_factory, tokenizer_dir, make_units) -> Path:
    """A config of sources of three kinds, of which some is drawn, held out, and left out for every reason."""
    folder = tmp_path_factory.mktemp("build")
    rng, texts = random.Random(0), sentences(30_000, words=12)
    tested = rng.sample(texts, 20)
    (folder / "tested.txt").write_text("".join(f"{text}\n" for text in tested))
    again = [*texts[:500], *(f"{text} too" for text in texts[:500])]
    lines = [json.dumps({"text": text}) for text in [*texts, *again]]
    for place in rng.sample(range(len(lines)), 40):
        lines[place] = "{"
    (folder / "a.jsonl").write_text("\n".join(rng.sample(lines, len(lines))) + "\n")
    with open(folder / "p.tsv", "w") as file:
        file.writelines(f"{text}\t{text[::-1]}\n" for text in texts)
    speech = [{"units": [i % 50, (3 * i + 1) % 50], "text": text} for i, text in enumerate(texts[:9_000])]
    sources = [
        Source("text", "text", [str(folder / "a.jsonl")], 250_000, duplicates="near"),
        Source("pairs", "parallel", [str(folder / "p.tsv")], 100_000, direction="de-en"),
        Source("speech", "speech", [str(make_units(folder / "units", speech, num_shards=3))], 60_000),
    ]
    config = {"sources": [asdict(source) for source in sources], "test_sets": {"t": [str(folder / "tested.txt")]}}
    write_json(folder / "config.json", config)
    return folder


def command(build: Path, tokenizer_dir: Path, mix: Path, num_processes: int) -> list[str]:
    config = json.loads((build / "config.json").read_text())
    words = [f"--{name}={json.dumps(value)}" for name, value in config.items()]
    script = [sys.executable, str(REPO / "data_mixture/build_mixture.py"), *words, f"--num_processes={num_processes}"]
    return [*script, f"--tokenizer={tokenizer_dir}", f"--output_dir={mix}"]


def files_of(mix: Path) -> dict[str, bytes]:
    files = [path for path in mix.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(mix)): path.read_bytes() for path in files if path.name != "run_info.json"}


@pytest.fixture(scope="module")
def built(build, tokenizer_dir) -> dict[str, bytes]:
    subprocess.run(command(build, tokenizer_dir, build / "mix", 1), check=True, cwd=REPO)
    return files_of(build / "mix")


def test_what_is_built_has_something_of_everything(built, build):
    facts = {each["name"]: each for each in manifest_of(build / "mix")["sources"]}
    assert facts["text"]["left_out"].keys() == {
        "nearly twice", "that cannot be read", "twice", "with a sentence of a test set",
    }  # fmt: skip
    assert all(each["validation"]["documents"] for each in facts.values())
    assert {*built} == {"manifest.json", "left_out.jsonl", "contamination.csv"} | {
        f"{folder}{name}.{ending}" for folder in ("", "validation/") for name in facts for ending in ("bin", "idx")
    }
    assert facts["text"]["rounds"][0][1] < 1 and len(built["left_out.jsonl"].splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_number_of_processes_changes_no_byte(tmp_path, build, built, tokenizer_dir, num_processes):
    subprocess.run(command(build, tokenizer_dir, tmp_path / "mix", num_processes), check=True, cwd=REPO)
    assert files_of(tmp_path / "mix") == built


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_bytes(tmp_path, build, built, tokenizer_dir):
    """Twice (TOWERSPEECH_KILLS says otherwise); no process is left behind."""
    rng, kills, helped = random.Random(1), 0, 0
    wanted = int(os.environ.get("TOWERSPEECH_KILLS", "2"))
    for number in range(5 * wanted):  # some may have ended before
        mix = tmp_path / str(number)
        process = subprocess.Popen(
            command(build, tokenizer_dir, mix, 2), cwd=REPO, start_new_session=True, stderr=subprocess.DEVNULL
        )
        while not [*mix.glob(".*.bin")] and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        helped += bool(children_of(process.pid))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        for _ in range(100):
            if not children_of(process.pid):
                break
            time.sleep(0.1)
        assert not children_of(process.pid)
        subprocess.run(command(build, tokenizer_dir, mix, 2), check=True, cwd=REPO)
        assert files_of(mix) == built
        if kills == wanted:
            assert helped  # there were processes to leave behind
            return
    raise AssertionError(f"only {kills} of {wanted} runs were killed")


def children_of(session: int) -> list[int]:
    """Processes that a command started and left behind."""
    told = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True).stdout
    return [int(pid) for pid in told.split() if int(pid) != session]
