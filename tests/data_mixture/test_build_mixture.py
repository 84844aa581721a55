"""build_mixture.py against megatron-core's own reader and the fast tokenizer called line by line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_mixture import build_mixture as script
from data_mixture.build_mixture import Source, build_mixture
from towerspeech import prompts, units
from towerspeech.indexed import IndexedTokens
from towerspeech.records import read_units
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


def test_bad_input_is_named(tmp_path, base_model_dir, model_dir, sources, make_units):
    with pytest.raises(UserError, match="speech_units.json is missing"):
        build_mixture(base_model_dir, tmp_path / "a", [sources["speech"]])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl:2: field 'text' is missing"):
        build_mixture(model_dir, tmp_path / "b", [Source("bad", "text", [str(tmp_path / "bad.jsonl")], 5)])
    folder = make_units(tmp_path / "units", [{"units": [1, 2]}, {"units": [3, 50]}])
    with pytest.raises(UserError, match=r"row 2 \(id utt0001\): unit id 50 is outside 0..49"):
        build_mixture(model_dir, tmp_path / "c", [Source("speech", "speech", [str(folder)], 5)])
    with pytest.raises(UserError, match="distinct names"):
        build_mixture(model_dir, tmp_path / "d", [sources["mono"], sources["mono"]])
    with pytest.raises(UserError, match="nowhere does not exist"):
        build_mixture(model_dir, tmp_path / "e", [Source("x", "text", [str(tmp_path / "nowhere")], 5)])


def test_killed_in_the_middle_it_goes_on(tmp_path, model_dir):
    """SIGKILL between two notes; the second run tokenizes the rest, and the bytes are those of an unbroken run."""
    path = tmp_path / "mono.jsonl"
    path.write_text("".join(json.dumps({"text": f"boat {i} sees the old captain"}) + "\n" for i in range(80_000)))
    sources = [{"name": "mono", "kind": "text", "paths": [str(path)], "budget": 1000}]
    command = [sys.executable, script.__file__, "--tokenizer", str(model_dir), "--sources", json.dumps(sources)]
    killed = subprocess.Popen([*command, "--output_dir", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    note = tmp_path / "killed/.mono.json"
    while not note.is_file():
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert 0 < json.loads(note.read_text())["documents"] < 80_000
    for name in ("killed", "whole"):
        subprocess.run([*command, "--output_dir", str(tmp_path / name)], check=True, stderr=subprocess.DEVNULL)
    for file in ("mono.bin", "mono.idx", "manifest.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
