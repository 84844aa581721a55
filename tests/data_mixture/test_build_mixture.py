"""build_mixture.py's documents against megatron-core's own reader and the fast tokenizer called line by line."""

import functools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_mixture.build_mixture import build_mixture
from data_mixture.encoding import Encoder
from tests.towerspeech import test_texts
from towerspeech import chain, prompts, units
from towerspeech.errors import UserError
from towerspeech.indexed import IndexedTokens
from towerspeech.mixture import Group, Source
from towerspeech.units_parquet import read_units, write_units

ROOT = Path(__file__).parents[2]
# All that there is, for training; in one process, since others take seconds to start.
WHOLE = {"reserve": 1e9, "validation_tokens": 0, "num_processes": 1}
build_whole = functools.partial(build_mixture, **WHOLE)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_units) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "mono.jsonl").write_text(
        "".join(json.dumps({"text": f"the dog sees {i} boats"}) + "\n" for i in range(90))
    )
    pair = {"src_lang": "en", "tgt_lang": "de", "source": "the dog", "target": "der Hund"}
    (folder / "parallel.jsonl").write_text(json.dumps(pair) + "\n")
    return {
        "speech": Source("speech", "speech", [str(make_units(folder / "units", 70, num_shards=2))], 1000),
        "mono": Source("mono", "text", [str(folder / "mono.jsonl")], 500),
        "parallel": Source("parallel", "parallel", [str(folder / "parallel.jsonl")], 30, max_epochs=4),
    }


def expected_documents(source: Source, tokenizer, bos: bool) -> list[list[int]]:
    if source.kind == "speech":
        texts = [prompts.speech_document(units.to_text(r["units"]), r["text"]) for r in read_units(source.paths[0])]
    elif source.kind == "text":
        texts = [json.loads(line)["text"] for line in Path(source.paths[0]).read_text().splitlines()]
    else:
        texts = ["English: the dog\nGerman: der Hund"]
    start, eod = [1] if bos else [], tokenizer.convert_tokens_to_ids("<EOD>")
    return [[*start, *tokenizer.encode(text, add_special_tokens=False), eod] for text in texts]


@pytest.mark.parametrize("bos", [False, True])
def test_megatron_core_reads_the_same_documents(tmp_path, model_dir, sources, bos):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    build_whole(model_dir, tmp_path / "mix", list(sources.values()), bos=bos)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    manifest = json.loads((tmp_path / "mix/manifest.json").read_text())
    for facts, source in zip(manifest["sources"], sources.values(), strict=True):
        expected = expected_documents(source, tokenizer, bos)
        read = IndexedDataset(str(tmp_path / "mix" / source.name))
        assert len(read) == len(expected) == facts["documents"]
        assert [read[i].tolist() for i in range(len(read))] == expected
        assert facts["tokens"] == sum(map(len, expected))
        ours = IndexedTokens(tmp_path / "mix" / source.name)
        assert ours.tokens.dtype == np.uint16
        assert ours.tokens.tolist() == [token for document in expected for token in document]
    weights = manifest["data_path"].split()[::2]
    assert [round(float(w) * 1530) for w in weights] == [1000, 500, 30] and manifest["budget"] == 1530


def test_unknown_tokens_do_not_occur(tmp_path, model_dir, sources):
    build_whole(model_dir, tmp_path / "mix", [sources["speech"]])
    assert not (IndexedTokens(tmp_path / "mix/speech").tokens == 0).any()


def test_a_budget_beyond_the_data_is_refused_with_both_numbers(tmp_path, model_dir, sources):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total = sum(map(len, expected_documents(sources["mono"], tokenizer, bos=False)))
    for budget in (10_000_000, total + 1):
        greedy = Source("mono", "text", sources["mono"].paths, budget)
        said = (
            rf"'mono' has {total:,} tokens for a budget of {budget:,} \([\d.]+ epochs, .*: {budget - total:,} missing"
        )
        with pytest.raises(UserError, match=said):
            build_whole(model_dir, tmp_path / "mix", [greedy])
        assert not (tmp_path / "mix/run_info.json").exists() and not (tmp_path / "mix/mono.bin").exists()
    build_whole(model_dir, tmp_path / "mix", [replace(greedy, budget=30)])
    assert json.loads((tmp_path / "mix/manifest.json").read_text())["sources"][0]["budget"] == 30
    with pytest.raises(UserError, match=r"was written by another run: budgets was .*30.*, now .*29"):
        build_whole(model_dir, tmp_path / "mix", [replace(greedy, budget=29)])


def test_what_is_tokenized_stays_if_another_source_is_too_small(tmp_path, model_dir):
    """How much is there twice is known late; then a smaller budget is enough."""
    one = write_texts(tmp_path / "a.jsonl", [f"the dog sees {i} boats" for i in range(50)])
    other = write_texts(tmp_path / "b.jsonl", ["the dog sees two boats"] * 50)
    sources = [Source("a", "text", [str(one)], 100), Source("b", "text", [str(other)], 100)]
    with pytest.raises(UserError, match=r"'b' has \d+ tokens for a budget of 100 .*, left out 49 twice: \d+ missing"):
        build_whole(model_dir, tmp_path / "mix", sources)
    made = (tmp_path / "mix/a.bin").stat()
    build_whole(model_dir, tmp_path / "mix", [sources[0], replace(sources[1], budget=5)])
    kept = (tmp_path / "mix/a.bin").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_corpora_of_two_kmeans_are_refused(tmp_path, model_dir, make_units):
    folders = [make_units(tmp_path / name, 5) for name in ("a", "b")]
    for folder in folders:
        labelled = {"inputs": {"kmeans": [folder.name]}, "outputs": {}}
        (folder / "units-00000-of-00001.run_info.json").write_text(json.dumps(labelled))
    speech = [Source(folder.name, "speech", [str(folder)], 10) for folder in folders]
    with pytest.raises(UserError, match="a and .*b were labelled with different k-means"):
        build_whole(model_dir, tmp_path / "mix", speech)


def test_bad_input_is_named(tmp_path, base_model_dir, model_dir, sources, make_units):
    with pytest.raises(UserError, match="speech_units.json is missing"):
        build_whole(base_model_dir, tmp_path / "a", [sources["speech"]])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match="1 of 2 documents cannot be read.*bad.jsonl:2: field 'text' is missing"):
        build_whole(model_dir, tmp_path / "b", [Source("bad", "text", [str(tmp_path / "bad.jsonl")], 5)])
    folder = make_units(tmp_path / "units", [{"units": [1, 2]}, {"units": [3, 50]}])
    with pytest.raises(UserError, match=r"row 2 \(id utt0001\): unit id 50 is outside 0..49"):
        build_whole(model_dir, tmp_path / "c", [Source("speech", "speech", [str(folder)], 5)])
    good = {"id": "u", "audio": "u.wav", "language": "en", "duration_s": 1.0, "units": [1, 2], "text": "a"}
    for bad, message in (("text", "left out 1 without a transcript"), ("units", "row 2: units is null")):
        file = tmp_path / f"{bad}.parquet"
        write_units(file, [good, {**good, bad: None}])
        with pytest.raises(UserError, match=message):
            build_whole(model_dir, tmp_path / f"null_{bad}", [Source("speech", "speech", [str(file)], 50)])
    with pytest.raises(UserError, match="distinct names"):
        build_whole(model_dir, tmp_path / "d", [sources["mono"], sources["mono"]])
    with pytest.raises(UserError, match="nowhere does not exist"):
        build_whole(model_dir, tmp_path / "e", [Source("x", "text", [str(tmp_path / "nowhere")], 5)])


# Builds a mixture in processes that kill themselves, each just before one of these moments: ("fsync" or a change of
# the file system, the file's name, how often it was named by then).
KILLED = """
import json
import os
import signal
import sys
from pathlib import Path

from transformers import AutoTokenizer  # once for all processes

from data_mixture import build_mixture as script
from data_mixture import reading
from towerspeech.mixture import Group, Source

tokenizer, source, root, options, *moments = map(json.loads, sys.argv[1:])
reading.BATCH_ITEMS = 5  # a note every 80 items
fsync = os.fsync


def kill_before(moment: list) -> None:
    seen = 0

    def happens(event: str, path) -> None:
        nonlocal seen
        seen += [event, os.path.basename(os.fsdecode(path))] == moment[:2]
        if seen == moment[2]:
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(descriptor: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def hook(event: str, args: tuple) -> None:
        if event in ("os.rename", "os.remove"):
            happens(event, args[1 if event == "os.rename" else 0])

    os.fsync = synced
    sys.addaudithook(hook)


for number, moment in enumerate(moments):
    child = os.fork()
    if not child:
        kill_before(moment)
        script.build_mixture(Path(tokenizer), Path(root, str(number)), [Source(**source)], seed=5, **options)
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# With each: of how many documents the note knows then, and the tokens on the disk. Two of the first 160 items are no
# documents.
MOMENTS = {
    "before any note": (("fsync", ".speech.bin", 1), 0, 80),
    "between notes": (("fsync", ".speech.bin", 2), 80, 158),
    "between notes, with the sizes on the disk": (("os.rename", ".speech.json", 2), 80, 158),
    "after a note": (("fsync", ".speech.bin", 3), 158, 238),
    "before the last note": (("os.rename", ".speech.json", 4), 238, 251),
    "before the index": (("os.rename", "speech.idx", 1), 251, 251),
    "before the tokens have their name": (("os.rename", "speech.bin", 1), 251, 251),
    "before the sizes are gone": (("os.remove", ".speech.sizes", 2), 251, 251),
    "before the manifest": (("os.rename", "manifest.json", 1), 251, 251),
}


def test_killed_at_any_moment_it_goes_on(tmp_path, tokenizer_dir, make_units):
    """Tokens and sizes that no note tells of are cut off; the bytes are megatron-core's, of all the documents."""
    rows = [{"units": [i % 50, (3 * i + 1) % 50], "text": f"the dog sees {i} boats."} for i in range(251)]
    left_out = [{"units": [], "text": "a"}, {"units": [1], "text": ""}]
    folder = make_units(tmp_path / "units", [*rows[:100], *left_out, *rows[100:], *left_out])
    source = {"name": "speech", "kind": "speech", "paths": [str(folder)], "budget": 50}
    words = (str(tokenizer_dir), source, str(tmp_path), WHOLE, *(moment for moment, *_ in MOMENTS.values()))
    command = [sys.executable, "-c", KILLED, *map(json.dumps, words)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"^status (.*)$", ran.stdout, re.M) == [str(-signal.SIGKILL)] * len(MOMENTS), ran.stderr

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    documents = [[*tokenizer.encode(text, add_special_tokens=False), eod] for text in documents_of(rows)]
    write_with_megatron(tmp_path / "megatron", documents)
    for number, (moment, (_, noted, on_disk)) in enumerate(MOMENTS.items()):
        mix = tmp_path / str(number)
        note = mix / ".speech.json"
        assert (json.loads(note.read_text())["counts"]["documents"] if note.is_file() else 0) == noted, moment
        [tokens] = [path for name in (".speech.bin", "speech.bin") if (path := mix / name).is_file()]
        assert tokens.stat().st_size == 2 * sum(map(len, documents[:on_disk])), moment
        if moment == "after a note":  # as if an earlier version had left it, with other documents: begun anew
            done = json.loads(note.read_text())
            note.write_text(json.dumps({"documents": done["counts"]["documents"] - 1, "tokens": 5}))
        build_whole(tokenizer_dir, mix, [Source(**source)], seed=5)
        for ending in ("bin", "idx"):
            assert (mix / f"speech.{ending}").read_bytes() == (tmp_path / f"megatron.{ending}").read_bytes(), moment
        [facts] = json.loads((mix / "manifest.json").read_text())["sources"]
        assert facts["documents"] == 251, moment
        assert facts["left_out"] == {"without units": 2, "without a transcript": 2}, moment
        assert not [path for path in mix.iterdir() if path.name.startswith(".tmp-") or path.suffix == ".sizes"], moment


# --- Numbers and orders ---------------------------------------------------------------------------
def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("max_epochs", "budget", "epochs"),
    [
        (1.0, 99, 0.99),
        (1.0, 100, 1.0),
        (1.0, 101, None),
        (1.1, 110, 1.1),
        (1.1, 111, None),
        (0.5, 50, 0.5),
        (0.5, 51, None),
    ],
)
def test_a_budget_met_exactly_and_missed_by_one_token(tmp_path, tokenizer_dir, max_epochs, budget, epochs):
    """Of 25 documents of 4 tokens: ▁the ▁old ▁captain <EOD>."""
    path = write_texts(tmp_path / "a.jsonl", ["the old captain"] * 25)
    source = Source("a", "text", [str(path)], budget, max_epochs, duplicates="keep")
    if epochs is None:
        wanted = (
            rf"'a' has 100 tokens for a budget of {budget} \({budget / 100:.2f} epochs, .* {max_epochs}\): \d missing"
        )
        with pytest.raises(UserError, match=wanted):
            build_whole(tokenizer_dir, tmp_path / "mix", [source])
        assert not (tmp_path / "mix/manifest.json").exists()
        return
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    [facts] = json.loads((tmp_path / "mix/manifest.json").read_text())["sources"]
    assert (facts["tokens"], facts["budget"], facts["epochs"]) == (100, budget, epochs)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_is_positive(tmp_path, tokenizer_dir, sources, budget):
    with pytest.raises(UserError, match="'mono' needs a positive budget, or a group"):
        build_whole(tokenizer_dir, tmp_path / "mix", [replace(sources["mono"], budget=budget)])
    with pytest.raises(UserError, match="'mono' needs paths"):
        build_whole(tokenizer_dir, tmp_path / "mix", [replace(sources["mono"], paths=[])])


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path, tokenizer_dir):
    source = Source("a", "text", [str(write_texts(tmp_path / "a.jsonl", ["", " \n"]))], 5, 1e9)
    with pytest.raises(UserError, match=r"'a' has 0 tokens for a budget of 5 .*, left out 2 without text"):
        build_whole(tokenizer_dir, tmp_path / "mix", [source])


@pytest.mark.parametrize(("size", "dtype"), [(65499, "<u2"), (65500, "<i4"), (70000, "<i4")])
def test_tokens_of_large_vocabularies_on_the_disk(tmp_path, size, dtype):
    """A tokenizer of single characters, U+20000 and on, in order; without <EOD>, documents end with its EOS."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(0x20000 + index): index for index in range(size - 2)}
    backend = Tokenizer(models.BPE({**vocabulary, "<s>": size - 2, "</s>": size - 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    documents = [[size - 2, 7, size - 3, 65000, size - 1], [size - 2, 300, size - 1]]
    texts = ["".join(chr(0x20000 + index) for index in document[1:-1]) for document in documents]
    path = write_texts(tmp_path / "a.jsonl", texts)
    build_whole(tmp_path / "tokenizer", tmp_path / "mix", [Source("a", "text", [str(path)], 3)], bos=True)
    assert (tmp_path / "mix/a.bin").read_bytes() == np.array(documents[0] + documents[1], dtype).tobytes()
    assert (tmp_path / "mix/a.idx").read_bytes()[17] == {"<u2": 8, "<i4": 4}[dtype]  # Megatron's code
    read = IndexedDataset(str(tmp_path / "mix/a"))
    assert [read[i].tolist() for i in range(len(read))] == documents
    manifest = json.loads((tmp_path / "mix/manifest.json").read_text())
    assert (manifest["eod_id"], manifest["vocab_size"], manifest["bos"]) == (size - 1, size, True)


def test_documents_stay_in_the_order_of_files_and_batches(tmp_path, tokenizer_dir, make_units, monkeypatch):
    """Many small batches, some of long documents, so that they are not ready in their order."""
    monkeypatch.setattr("data_mixture.reading.BATCH_ITEMS", 3)
    texts = ["the dog sees " * (400 if i % 6 == 0 else 1) + str(i) for i in range(50)]
    paths = [write_texts(tmp_path / name, part) for name, part in (("b.jsonl", texts[:31]), ("a.jsonl", texts[31:]))]
    rows = [{"units": [i % 50, 3], "text": text} for i, text in enumerate(texts)]
    folders = [make_units(tmp_path / name, part) for name, part in (("y", rows[:8]), ("x", rows[8:]))]
    sources = [
        Source("text", "text", [*map(str, paths)], 5),
        Source("speech", "speech", [*map(str, folders)], 5),
    ]
    build_whole(tokenizer_dir, tmp_path / "mix", sources, seed=11)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    for name, documents in (("text", texts), ("speech", documents_of(rows))):
        expected = [[*tokenizer.encode(text, add_special_tokens=False), eod] for text in documents]
        write_with_megatron(tmp_path / "megatron", expected)
        for ending in ("bin", "idx"):
            assert (tmp_path / f"mix/{name}.{ending}").read_bytes() == (tmp_path / f"megatron.{ending}").read_bytes()


def test_every_form_of_text_gives_the_same_tokens(tmp_path, tokenizer_dir):
    """One source of each form of tests/towerspeech/test_texts.py beside the same documents in our JSONL."""
    write_texts(tmp_path / "a.jsonl", test_texts.TEXTS)
    sources, pairs = [Source("jsonl", "text", [str(tmp_path / "a.jsonl")], 5)], []
    for kind, forms in (("text", test_texts.FORMS), ("parallel", test_texts.PARALLEL)):
        for write in forms:
            (folder := tmp_path / write.__name__).mkdir()
            asked = write(folder)
            reading = {
                name: asked[key] for name, key in (("text_field", "field"), ("direction", "direction")) if key in asked
            }
            (sources if kind == "text" else pairs).append(
                Source(write.__name__, kind, [str(asked["name"])], 5, **reading)
            )
    build_whole(tokenizer_dir, tmp_path / "mix", [*sources, *pairs])
    for ours, *others in (sources, pairs):
        expected = [(tmp_path / f"mix/{ours.name}.{ending}").read_bytes() for ending in ("bin", "idx")]
        assert len(IndexedTokens(tmp_path / f"mix/{ours.name}").sizes) == 40 + 4 * (ours.kind == "text")
        for source in others:
            made = [(tmp_path / f"mix/{source.name}.{ending}").read_bytes() for ending in ("bin", "idx")]
            assert made == expected, source.name


def test_a_direction_leaves_the_others_out(tmp_path, tokenizer_dir):
    pair = {"src_lang": "en", "tgt_lang": "de", "source": "the dog", "target": "der Hund"}
    other = {"src_lang": "de", "tgt_lang": "en", "source": "die Katze", "target": "the cat"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (other, pair, other)))
    build_whole(tokenizer_dir, tmp_path / "mix", [Source("a", "parallel", [str(path)], 5, direction="en-de")])
    (facts,) = json.loads((tmp_path / "mix/manifest.json").read_text())["sources"]
    assert (facts["documents"], facts["left_out"]) == (1, {"in another direction": 2})


def test_the_chain_knows_what_a_pattern_meant(tmp_path, tokenizer_dir):
    """Done is a mixture of the same files: one more, or another way to read them, and it is not."""
    for name in ("a", "b"):
        write_texts(tmp_path / f"{name}.jsonl", [name])
    source = Source("s", "text", [str(tmp_path / "*.jsonl")], 4)
    build_whole(tokenizer_dir, tmp_path / "mix", [source])
    info = json.loads((tmp_path / "mix/run_info.json").read_text())

    def told(source: Source) -> list[str]:
        flags = {"tokenizer": str(tokenizer_dir), "bos": False, "seed": 0, "sources": [asdict(source)]}
        flags |= {"groups": None, "test_sets": None}
        return chain.differences("build_mixture", flags, info, tmp_path / "mix")

    assert told(source) == []
    assert told(replace(source, text_field="content")) != []
    write_texts(tmp_path / "c.jsonl", ["c"])
    assert len(told(source)) == 2  # the number of its files, and their names
    for name in "abc":
        (tmp_path / f"{name}.jsonl").unlink()
    assert told(source)  # what the pattern meant cannot be known any more
    info["paths"]["paths"], info["inputs"]["paths"] = [str(tmp_path / "a.jsonl")], info["inputs"]["paths"][:1]
    info["arguments"]["sources"] = [["s", "text", 1]]
    assert told(replace(source, paths=[str(tmp_path / "a.jsonl")])) == []  # a name is enough


def test_the_chain_knows_groups_and_test_sets(tmp_path, tokenizer_dir):
    """Done is a mixture with the same budgets and test sets, in whatever words the budgets are said."""
    (tmp_path / "tested").mkdir()
    (tmp_path / "tested/a.devtest").write_text("Nothing of this is in any text, is it?\n")
    source = Source("s", "text", [str(write_texts(tmp_path / "a.jsonl", ["a", "b"]))], group="g")
    tested = {"flores": [str(tmp_path / "tested")]}
    build_whole(tokenizer_dir, tmp_path / "mix", [source], {"g": Group(4)}, tested)
    info = json.loads((tmp_path / "mix/run_info.json").read_text())

    def told(source: Source, budget: int, test_sets: dict | None) -> list[str]:
        groups = {"g": {"budget": budget, "split": "equal"}} if source.group else None
        flags = {"sources": [asdict(source)], "groups": groups, "test_sets": test_sets}
        return chain.differences("build_mixture", flags, info, tmp_path / "mix")

    assert told(source, 4, tested) == [] and told(replace(source, group=None, budget=4), 0, tested) == []
    assert told(source, 5, tested) and told(source, 4, None) and told(source, 4, {"wmt": tested["flores"]})
    assert told(source, 4, {"flores": [str(tmp_path / "tested/a.devtest")]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "parallel", "direction": "en-xx"}, "unknown language 'xx'"),
        ({"paths": ["{folder}/none*.gz"]}, r"no file is called .*none\*\.gz\n.*check paths of source 'a'"),
        ({"text_field": "content"}, r"a\.jsonl:1: field 'content' is missing\n.*text_field of a source"),
    ],
)
def test_a_source_that_cannot_be_read_so_is_refused(tmp_path, tokenizer_dir, changed, message):
    write_texts(tmp_path / "a.jsonl", ["a"])
    source = replace(Source("a", "text", [str(tmp_path / "a.jsonl")], 1), **changed)
    source.paths = [path.format(folder=tmp_path) for path in source.paths]
    with pytest.raises(UserError, match=message):
        build_whole(tokenizer_dir, tmp_path / "mix", [source])


def test_the_seed_reaches_the_trainer(tmp_path, tokenizer_dir, sources):
    """Two seeds: the same tokens, in two orders."""
    from continued_pretraining.packing import Mixture

    windows = {}
    for seed in (0, 1):
        mix = tmp_path / str(seed)
        build_whole(tokenizer_dir, mix, [sources["mono"], sources["speech"]], seed=seed)
        assert json.loads((mix / "manifest.json").read_text())["seed"] == seed
        data = Mixture(mix, 32)
        windows[seed] = data.owner.tolist(), data.batch(range(data.num_windows))[0].tolist()
    assert (tmp_path / "0/mono.bin").read_bytes() == (tmp_path / "1/mono.bin").read_bytes()
    assert windows[0][0] != windows[1][0] and sorted(windows[0][1]) != sorted(windows[1][1])
    with pytest.raises(UserError, match="was written by another run: seed was 0, now 1"):
        build_whole(tokenizer_dir, tmp_path / "0", [sources["mono"], sources["speech"]], seed=1)


def test_tokenizers_without_the_tokens_that_are_wanted(tmp_path, sources):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for name, tokens, bos, message in (
        ("a", {"bos_token": "0"}, False, "has no <EOD> or EOS token"),
        ("b", {"eos_token": "0"}, True, "has no BOS token"),
    ):
        backend = Tokenizer(models.WordLevel({"0": 0, "1": 1}, "1"))
        PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            build_whole(tmp_path / name, tmp_path / f"{name}_mix", [sources["mono"]], bos=bos)


# --- Units apart from text ------------------------------------------------------------------------
HARD_TEXTS = [
    "",
    " ",
    "  two spaces first",
    "\n\nEnglish: Speech:",
    units.to_text([0, 0, 7]),  # the stand-in itself
    f"the {units.to_text([3, 24])} dog {units.to_text([0])}",
    f"Speech:{units.to_text([0])}\nEnglish: ",
    "<EOD><|im_start|>the dog<|im_end|> <s></s><PAD>",
    "▁the ▁ dog 犬 \U000fffff\U0010fffd é\u0301",
]


ANY = st.characters(exclude_categories=["Cs"], max_codepoint=0xEFFFF)  # what text from outside may hold


@pytest.fixture(scope="module")
def utterances(tmp_path_factory, make_units) -> list[list[int]]:
    folder = make_units(tmp_path_factory.mktemp("utterances") / "units", 2500)
    return [row["units"] for row in read_units(folder)]


def documents_of(rows: list[dict], offset: int = units.OFFSET) -> list[str]:
    return [prompts.speech_document(units.to_text(row["units"], offset), row["text"]) for row in rows]


def write_with_megatron(prefix: Path, documents: list[list[int]]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def test_files_are_megatrons_of_the_documents_encoded_one_by_one(tmp_path, tokenizer_dir, make_units, utterances):
    runs = [*utterances[:12], [0], [0, 0, 0], [49]]
    texts = [text for text in HARD_TEXTS if text.strip() and not re.search("[\U000f0000-\U000fffff]|<EOD>", text)]
    rows = [{"units": run, "text": text} for run in runs for text in texts]
    rows += [{"units": run, "text": "the old captain."} for run in utterances]  # more than a batch
    folder = make_units(tmp_path / "units", rows)
    build_whole(tokenizer_dir, tmp_path / "mix", [Source("speech", "speech", [str(folder)], 5)])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    expected = [[*tokenizer.encode(text, add_special_tokens=False), eod] for text in documents_of(rows)]
    write_with_megatron(tmp_path / "megatron", expected)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"mix/speech.{ending}").read_bytes() == (tmp_path / f"megatron.{ending}").read_bytes()


def in_another_layout(tokenizer_dir: Path, folder: Path) -> Path:
    """As the original's: units from 990000, merges' ids not in the order in which they were learned, a word start.

    The token of a word start and unit 3 decodes to unit 3, but is no token of a run.
    """
    shutil.copytree(tokenizer_dir, folder)
    (folder / "tokenizer.model").unlink()
    saved = json.loads((folder / "tokenizer.json").read_text())
    moved = {ord(char): chr(990000 + index) for index, char in enumerate(units.to_text(range(50)))}
    vocabulary = {token.translate(moved): index for token, index in saved["model"]["vocab"].items()}
    merged = [token for token in vocabulary if len(token) > 1 and ord(token[0]) >= 990000]
    ids = [vocabulary[token] for token in merged]
    vocabulary.update(zip(merged, random.Random(0).sample(ids, len(ids)), strict=True))
    unit = chr(990003)
    vocabulary[f"▁{unit}"] = len(vocabulary)
    saved["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    saved["model"]["merges"] = [[part.translate(moved) for part in merge] for merge in saved["model"]["merges"]]
    saved["model"]["merges"].append(["▁", unit])
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    facts = json.loads((folder / "speech_units.json").read_text())
    (folder / "speech_units.json").write_text(json.dumps({**facts, "offset": 990000}))
    return folder


def test_merges_are_taken_in_their_own_order(tmp_path, tokenizer_dir, make_units, utterances):
    folder = in_another_layout(tokenizer_dir, tmp_path / "tokenizer")
    rows = [{"units": run, "text": "the dog."} for run in utterances[:200]]
    source = Source("speech", "speech", [str(make_units(tmp_path / "units", rows))], 5)
    build_whole(folder, tmp_path / "mix", [source])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    expected = [[*tokenizer.encode(text, add_special_tokens=False), eod] for text in documents_of(rows, 990000)]
    assert IndexedTokens(tmp_path / "mix/speech").tokens.tolist() == [token for row in expected for token in row]
    merges = [token for row in expected for token in row if 455 <= token < 485]
    assert len(set(merges)) > 20


@pytest.mark.parametrize("token", [":" + units.to_text([3]), units.to_text([3, 24, 4])])
def test_a_tokenizer_that_mixes_text_and_units_is_refused(tmp_path, tokenizer_dir, make_units, token):
    """Added tokens go before merges: one crosses the border, the other breaks the order of a run's merges."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([token])
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = [[1, 2], [3, 24, 4, 9]]
    folder = make_units(tmp_path / "units", [{"units": run, "text": "the dog."} for run in runs])
    source = Source("speech", "speech", [str(folder)], 5)
    with pytest.raises(UserError, match="depend on the text around them"):
        build_whole(tmp_path / "tokenizer", tmp_path / "mix", [source])
    assert not [path for path in (tmp_path / "mix").iterdir() if "speech" in path.name]


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory, units_bpe_dir) -> Path:
    """A byte-level BPE as GPT-2's, with units."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from train_bpe_tokenizer.merge_tokenizer import SENTENCES, merge_tokenizer

    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "base")
    merge_tokenizer(folder / "base", units_bpe_dir, folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def encoders(tokenizer_dir, byte_level_dir) -> dict[str, Encoder]:
    folders = {"SentencePiece": tokenizer_dir, "byte-level": byte_level_dir}
    return {base: Encoder(AutoTokenizer.from_pretrained(path), 50, units.OFFSET) for base, path in folders.items()}


@pytest.mark.parametrize("base", ["SentencePiece", "byte-level"])
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.one_of(st.integers(0, 49), st.sampled_from([0, 3, 24])), max_size=60),
            st.lists(st.one_of(st.sampled_from(HARD_TEXTS), st.text(ANY, max_size=20)), max_size=4).map("".join),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_encoder_equals_the_tokenizer(encoders, base, rows):
    encoder = encoders[base]
    stand_in = units.to_text([0])
    batch = [(prompts.speech_document(stand_in if run else "", text), units.to_text(run)) for run, text in rows]
    got = [ids.tolist() for ids in encoder(batch)]
    texts = documents_of([{"units": run, "text": text} for run, text in rows])
    assert got == [encoder.tokenizer.encode(text, add_special_tokens=False) for text in texts]


# --- Text from outside ----------------------------------------------------------------------------
CONTROLS = (
    "<s>9.99</s> <PAD> <EOD>",
    "Der Tag <s> endet",
    "a<|im_end|>\n<|im_start|>assistant",
    "<unk><<s>>",
    "<0x0A>",
)


@pytest.mark.parametrize("base", ["SentencePiece", "byte-level"])
def test_what_spells_a_control_token_is_text(tmp_path, tokenizer_dir, byte_level_dir, make_units, base):
    folder = {"SentencePiece": tokenizer_dir, "byte-level": byte_level_dir}[base]
    pairs = [{"src_lang": "de", "tgt_lang": "en", "source": text, "target": text} for text in CONTROLS]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CONTROLS))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    utterances = make_units(tmp_path / "units", [{"units": [3, 24, 4], "text": text} for text in CONTROLS])
    files = {"text": tmp_path / "text.jsonl", "parallel": tmp_path / "pairs.jsonl", "speech": utterances}
    build_whole(folder, tmp_path / "mix", [Source(kind, kind, [str(path)], 5) for kind, path in files.items()])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    speech = units.to_text([3, 24, 4])
    expected = {
        "text": CONTROLS,
        "parallel": [f"German: {text}\nEnglish: {text}" for text in CONTROLS],
        "speech": [f"Speech:{speech}\nEnglish: {text}" for text in CONTROLS],
    }
    for kind, texts in expected.items():
        found = IndexedTokens(tmp_path / "mix" / kind)
        documents = [
            found.tokens[start : start + size].tolist() for start, size in zip(found.offsets, found.sizes, strict=True)
        ]
        assert all(document[-1] == eod for document in documents)
        assert not {*tokenizer.all_special_ids, eod} & {index for d in documents for index in d[:-1]}
        assert [tokenizer.decode(document[:-1]) for document in documents] == list(texts)


def test_units_in_text_and_speech_of_other_languages_are_refused(tmp_path, tokenizer_dir, make_units):
    def refused(message, source):
        with pytest.raises(UserError, match=message):
            build_whole(tokenizer_dir, tmp_path / "mix", [source])
        assert not (tmp_path / "mix/manifest.json").exists()

    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n\n{"text": "an icon \U000f0005"}\n')
    refused(r"text\.jsonl:3: character 9 .* is U\+F0005", Source("a", "text", [str(tmp_path / "text.jsonl")], 5))
    pair = {"src_lang": "en", "tgt_lang": "de", "source": "a", "target": "\U000f0001"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    refused(r"pairs\.jsonl:1, target: character 1", Source("b", "parallel", [str(tmp_path / "pairs.jsonl")], 5))
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({**pair, "target": "b"}) + "\n" + json.dumps({**pair, "tgt_lang": "xx"})
    )
    refused(r"pairs\.jsonl:2: unknown language 'xx'", Source("b", "parallel", [str(tmp_path / "pairs.jsonl")], 5))
    for changes, message in (({"text": "a \U000f0005"}, "character 3"), ({"language": "de"}, "language 'de', but")):
        folder = make_units(tmp_path / message[:8], [{"units": [1]}, {"units": [2], **changes}])
        refused(rf"row 2 \(id utt0001\): {message}", Source("c", "speech", [str(folder)], 5))


def test_what_holds_nothing_to_learn_is_left_out_and_counted(tmp_path, tokenizer_dir, make_units, capsys):
    rows = [{"units": [1, 2]}, {"units": [], "text": "a"}, {"units": [3], "text": ""}, {"units": [3], "text": " \n"}]
    folder = make_units(tmp_path / "units", [*rows, {"units": [4], "text": None}, {"units": [4]}])
    (tmp_path / "text.jsonl").write_text('{"text": "a b c"}\n{"text": ""}\n{"text": "d"}\n')
    sources = [Source("u", "speech", [str(folder)], 5), Source("t", "text", [str(tmp_path / "text.jsonl")], 2)]
    build_whole(tokenizer_dir, tmp_path / "mix", sources)
    speech, text = json.loads((tmp_path / "mix/manifest.json").read_text())["sources"]
    assert speech["documents"] == text["documents"] == 2
    assert speech["left_out"] == {"without units": 1, "without a transcript": 3}
    assert text["left_out"] == {"without text": 1}
    assert "3 without a transcript, 1 without units" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", " ", "a b", "de/en", ".hidden", "a\nb", "ü"])
def test_a_sources_name_must_be_able_to_name_files(tmp_path, tokenizer_dir, sources, name):
    source = Source(name, "text", sources["mono"].paths, 5)
    with pytest.raises(UserError, match="a source is named"):
        build_whole(tokenizer_dir, tmp_path / "mix", [source])
