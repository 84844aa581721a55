"""A system's YAML: what it holds, what is refused and how, and what a command takes of it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from towerspeech.errors import UserError
from towerspeech.system import SpeechSet, is_command, moved, read_block, read_system

REPO = Path(__file__).resolve().parents[2]
SETS = {"t": {"root": "a", "corpus": "mls", "split": "train", "hours": 7}, "u": {"root": "c", "manifest": "u.jsonl"}}
PLACES = {"work": "runs/x", "base": "b", "sets": SETS, "train_sets": ["t"], "test_sets": ["u"]}
SYSTEM = {
    "system": PLACES,
    "build_mixture": {"bos": True, "sources": [{"paths": ["{work}/data/x"]}]},
    "base": {"build_mixture": {"bos": False}},
    "few_shot": {"build_instructions": {"shots": 5}},
    "score": {"model": "x"},
    "sbatch": {"generate_mt": ["--time=1:00:00"]},
}


def write(path: Path, blocks) -> Path:
    path.write_text(blocks if isinstance(blocks, str) else yaml.safe_dump(blocks))
    return path


def changed(name: str, **keys) -> dict:
    block = {**SYSTEM.get(name, {}), **keys}
    return {**SYSTEM, name: {key: value for key, value in block.items() if value != "<none>"}}


def test_places_have_defaults_below_work(tmp_path):
    blocks = read_system(write(tmp_path / "x.yaml", SYSTEM))
    assert blocks["system"] == {
        **PLACES,
        "sets": {name: {**{field.name: None for field in fields(SpeechSet)}, **given} for name, given in SETS.items()},
        "sft_sets": None,
        "manifests": "runs/x/manifests",
        "kmeans": "runs/x/kmeans",
        "units": "runs/x/units",
        "tokenizer": "runs/x/tokenizer",
        "shard_hours": 250,
        "array_limit": None,
        "nproc_per_node": None,
    }
    assert blocks["build_mixture"]["sources"][0]["paths"] == ["runs/x/data/x"]


def test_a_variant_lies_over_the_block(tmp_path):
    path = write(tmp_path / "x.yaml", SYSTEM)
    assert read_block(f"{path}", "build_mixture")["bos"] is True
    taken = read_block(f"{path}:base", "build_mixture")
    assert taken == {"bos": False, "sources": [{"paths": ["runs/x/data/x"]}]}
    assert read_block(f"{path}:few_shot", "build_instructions") == {"shots": 5}
    assert read_block(f"{path}", "build_instructions") == {}  # no block: a command's own defaults


def test_another_work_folder(tmp_path):
    path = write(tmp_path / "x.yaml", SYSTEM)
    for folder in (tmp_path / "elsewhere", tmp_path / "other"):
        blocks = read_system(moved(path, tmp_path / "other", folder))
        assert blocks["system"]["units"] == f"{tmp_path}/other/units"
    assert read_system(path)["system"]["work"] == "runs/x"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("", "has no blocks of commands"),
        ("a: [", "cannot be read"),
        ("seed: 1\n", "has no blocks of commands"),
        ({"score": {"model": "x"}}, "has no block 'system'"),
        ({**SYSTEM, "build_mixtures": {}}, "'build_mixtures' is no command's block"),
        ({**SYSTEM, "units": {}}, "'units' is no command's block"),  # a module of the library
        ({**SYSTEM, "base": {"build_mixtures": {}}}, "'base.build_mixtures' is no command's block"),
        ({**SYSTEM, "score": None}, "block 'score' holds no settings"),
        ({**SYSTEM, "few_shot": []}, "block 'few_shot' holds no settings"),
        ({**SYSTEM, "few_shot": {"score": 1}}, "block 'few_shot.score' holds no settings"),
        (changed("system", kmean="k"), "system has no key 'kmean'"),
        (changed("system", base="<none>"), "system does not say base"),
        (changed("system", work=""), "system.work is ''"),
        (changed("system", work="some thing"), "system.work holds 'some thing'"),
        (changed("system", units="runs/*"), r"system.units holds 'runs/\*'"),
        (changed("system", tokenizer="a\nb"), "system.tokenizer holds"),
        (changed("system", train_sets=[]), r"system.train_sets is \[\]"),
        (changed("system", train_sets="a"), "system.train_sets is 'a'"),
        (changed("system", test_sets=["a b"]), "system.test_sets holds 'a b'"),
        (changed("system", shard_hours="8"), "system.shard_hours is '8'"),
        (changed("system", shard_hours=0), "system.shard_hours is 0"),
        (changed("system", sets=["t"]), r"system.sets is \['t'\]"),
        (changed("system", sets={"t": SETS["t"]}), "system.test_sets names u, sets do not"),
        (changed("system", sets={**SETS, "u": "u.jsonl"}), "system.sets.u is 'u.jsonl'"),
        (changed("system", sets={**SETS, "u v": SETS["u"]}), "system.sets.u v is"),
        (changed("system", sets={**SETS, 7: SETS["u"]}), "system.sets has a set called 7, a int"),
        (changed("system", sets={**SETS, "u": {"corpus": "mls"}}), "system.sets.u does not say root"),
        (changed("system", sets={**SETS, "u": {"root": "a"}}), "system.sets.u does not say what it is"),
        (changed("system", sets={**SETS, "u": SETS["t"] | SETS["u"]}), "system.sets.u says corpus and manifest"),
        (changed("system", sets={**SETS, "u": {**SETS["u"], "corpora": 1}}), "system.sets.u has no key 'corpora'"),
        (changed("system", sets={**SETS, "u": {**SETS["u"], "hours": "5"}}), "system.sets.u.hours is '5'"),
        (changed("system", sets={**SETS, "u": {**SETS["u"], "root": "a b"}}), "system.sets.u.root holds 'a b'"),
        (changed("system", nproc_per_node=True), "system.nproc_per_node is True"),
        (changed("system", sft_sets=["other"]), "system.sft_sets names other, train_sets do not"),
        (changed("sbatch", generate=["--time=1"]), "sbatch.generate is no file of sbatch/"),
        (changed("sbatch", score="--time=1"), "sbatch.score is no list of sbatch's options"),
        (changed("sbatch", score=["time=1"]), "sbatch.score is no list of sbatch's options"),
    ],
)
def test_mistakes_are_named(tmp_path, blocks, message):
    path = write(tmp_path / "x.yaml", blocks)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.* ?{message}"):
        read_system(path)


def test_what_is_a_block_and_what_a_file_of_flags(tmp_path):
    flags = tmp_path / "flags.yaml"
    for text in (
        "metrics: [bleu]\n",
        "sft: {max_length: 5}\n",
        "checkpoints: [a]\nunits: [b]\n",
        "- a\n",
        "a: [\n",
        "",
    ):
        flags.write_text(text)
        assert read_block(str(flags), "score") is None
    assert read_block(f"{tmp_path}/nowhere.yaml", "score") is None
    assert is_command("instruction_tuning") and is_command("generate_ASR")
    for name in ("sft", "nothing", "units", "packing", "train_bpe_tokenizer"):  # the library's modules, a room's
        assert not is_command(name)
