"""build_mixture.py against megatron-core's own reader and the fast tokenizer called line by line."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_mixture import build_mixture as script
from data_mixture.build_mixture import Encoder, Source, build_mixture
from towerspeech import prompts, units
from towerspeech.indexed import IndexedTokens
from towerspeech.records import read_units, write_units
from towerspeech.stage import UserError


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
    eod = tokenizer.convert_tokens_to_ids("<EOD>")
    return [[1] * bos + tokenizer.encode(text, add_special_tokens=False) + [eod] for text in texts]


@pytest.mark.parametrize("bos", [False, True])
def test_megatron_core_reads_the_same_documents(tmp_path, model_dir, sources, bos):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    build_mixture(model_dir, tmp_path / "mix", list(sources.values()), bos=bos)
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
    build_mixture(model_dir, tmp_path / "mix", [sources["speech"]])
    assert not (IndexedTokens(tmp_path / "mix/speech").tokens == 0).any()


def test_a_budget_beyond_the_data_is_refused_with_both_numbers(tmp_path, model_dir, sources):
    greedy = Source("mono", "text", sources["mono"].paths, 10_000_000)
    with pytest.raises(UserError, match=r"source 'mono' has [\d,]+ tokens for a budget of 10,000,000"):
        build_mixture(model_dir, tmp_path / "mix", [greedy])
    assert not (tmp_path / "mix/run_info.json").exists()
    # The tokens are kept for a smaller one; a finished mixture is not changed.
    tokens = tmp_path / "mix/mono.bin"
    made = tokens.stat()
    build_mixture(model_dir, tmp_path / "mix", [replace(greedy, budget=30)])
    assert (tokens.stat().st_ino, tokens.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert json.loads((tmp_path / "mix/manifest.json").read_text())["sources"][0]["budget"] == 30
    with pytest.raises(UserError, match=r"was written by another run: budgets was .*30.*, now .*29"):
        build_mixture(model_dir, tmp_path / "mix", [replace(greedy, budget=29)])


def test_corpora_of_two_kmeans_are_refused(tmp_path, model_dir, make_units):
    folders = [make_units(tmp_path / name, 5) for name in ("a", "b")]
    for folder in folders:
        labelled = {"inputs": {"kmeans": [folder.name]}, "outputs": {}}
        (folder / "units-00000-of-00001.run_info.json").write_text(json.dumps(labelled))
    speech = [Source(folder.name, "speech", [str(folder)], 10) for folder in folders]
    with pytest.raises(UserError, match="a and .*b were labelled with different k-means"):
        build_mixture(model_dir, tmp_path / "mix", speech)


def test_bad_input_is_named(tmp_path, base_model_dir, model_dir, sources, make_units):
    with pytest.raises(UserError, match="speech_units.json is missing"):
        build_mixture(base_model_dir, tmp_path / "a", [sources["speech"]])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl:2: field 'text' is missing"):
        build_mixture(model_dir, tmp_path / "b", [Source("bad", "text", [str(tmp_path / "bad.jsonl")], 5)])
    folder = make_units(tmp_path / "units", [{"units": [1, 2]}, {"units": [3, 50]}])
    with pytest.raises(UserError, match=r"row 2 \(id utt0001\): unit id 50 is outside 0..49"):
        build_mixture(model_dir, tmp_path / "c", [Source("speech", "speech", [str(folder)], 5)])
    good = {"id": "u", "audio": "u.wav", "language": "en", "duration_s": 1.0, "units": [1, 2], "text": "a"}
    for bad, message in (("text", "left out 1 without a transcript"), ("units", "row 2: units is null")):
        file = tmp_path / f"{bad}.parquet"
        write_units(file, [good, {**good, bad: None}])
        with pytest.raises(UserError, match=message):
            build_mixture(model_dir, tmp_path / f"null_{bad}", [Source("speech", "speech", [str(file)], 50)])
    with pytest.raises(UserError, match="distinct names"):
        build_mixture(model_dir, tmp_path / "d", [sources["mono"], sources["mono"]])
    with pytest.raises(UserError, match="nowhere does not exist"):
        build_mixture(model_dir, tmp_path / "e", [Source("x", "text", [str(tmp_path / "nowhere")], 5)])


def test_killed_in_the_middle_it_goes_on(tmp_path, model_dir, make_units):
    """SIGKILL between two notes; the second run tokenizes the rest, and the bytes are those of an unbroken run."""
    path = make_units(tmp_path / "units", 80_000, num_shards=2)
    sources = [{"name": "speech", "kind": "speech", "paths": [str(path)], "budget": 1000}]
    command = [sys.executable, script.__file__, "--tokenizer", str(model_dir), "--sources", json.dumps(sources)]
    killed = subprocess.Popen([*command, "--output_dir", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    note = tmp_path / "killed/.speech.json"
    while not note.is_file():
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert 0 < json.loads(note.read_text())["documents"] < 80_000
    for name in ("killed", "whole"):
        subprocess.run([*command, "--output_dir", str(tmp_path / name)], check=True, stderr=subprocess.DEVNULL)
    for file in ("speech.bin", "speech.idx", "manifest.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


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
    build_mixture(tokenizer_dir, tmp_path / "mix", [Source("speech", "speech", [str(folder)], 5)])
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
    build_mixture(folder, tmp_path / "mix", [source])
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
        build_mixture(tmp_path / "tokenizer", tmp_path / "mix", [source])
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
            st.lists(st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=20)), max_size=4).map("".join),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_encoder_equals_the_tokenizer(encoders, base, rows):
    encoder = encoders[base]
    stand_in = units.to_text([0])
    batch = [(prompts.speech_document(stand_in if run else "", text), np.array(run, np.uint32)) for run, text in rows]
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
    build_mixture(folder, tmp_path / "mix", [Source(kind, kind, [str(path)], 5) for kind, path in files.items()])
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
            build_mixture(tokenizer_dir, tmp_path / "mix", [source])
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
    build_mixture(tokenizer_dir, tmp_path / "mix", sources)
    speech, text = json.loads((tmp_path / "mix/manifest.json").read_text())["sources"]
    assert speech["documents"] == text["documents"] == 2
    assert speech["left_out"] == {"without units": 1, "without a transcript": 3}
    assert text["left_out"] == {"without text": 1}
    assert "left out 1 without units, left out 3 without a transcript" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", " ", "a b", "de/en", ".hidden", "a\nb", "ü"])
def test_a_sources_name_must_be_able_to_name_files(tmp_path, tokenizer_dir, sources, name):
    source = Source(name, "text", sources["mono"].paths, 5)
    with pytest.raises(UserError, match="a source is named"):
        build_mixture(tokenizer_dir, tmp_path / "mix", [source])
