"""The chain: what its stages read and write, what is done and what is not, and one that fails. Nothing is trained."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from towerspeech import chain
from towerspeech.errors import UserError
from towerspeech.stage import record

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "systems/tiny.yaml"


def system(folder: Path, source: Path = TINY, **changes: dict) -> chain.System:
    """A system with changed keys of blocks, its work folder below ``folder``."""
    blocks = yaml.safe_load(source.read_text())
    for name, block in {**changes, "system": {"work": str(folder / "work"), **changes.get("system", {})}}.items():
        blocks[name] = {**blocks.get(name, {}), **block}
    path = folder / "system.yaml"
    path.write_text(yaml.safe_dump(blocks, sort_keys=False))
    return chain.System(path)


def shown(asked: chain.System) -> dict[str, list[list[str]]]:
    return {stage.name: chain.commands(stage, asked, {}) for stage in chain.chain(asked)}


# --- The stages -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("split", "flores"), [("test", "devtest"), ("tuning", "dev")])
def test_nothing_learns_from_what_is_scored(tmp_path, split, flores):
    """What trains names neither the evaluated split nor FLORES; examples are never of the test split."""
    asked = system(tmp_path, system={"test_sets": [split]}, build_instructions={"split": flores})
    told = shown(asked)
    evaluation = ("make_controls", "build_", "generate_", "score", "summarize")
    learning = {name: words for name, words in told.items() if not name.startswith(evaluation)}
    named = {
        name
        for name, commands in learning.items()
        for word in sum(commands, [])
        if word.startswith(asked.work) and (split in Path(word).name or "flores" in word)
    }
    assert named == {f"manifest_{split}", f"label_{split}"}
    assert re.search(rf"--units {asked.units}/train --parallel", shlex.join(told["instruction_tuning"][0]))
    for name in ("build_instructions", "build_few_shot", "build_instructions_sft", "build_few_shot_sft"):
        flags = chain.parsed(told[name][0])
        assert (flags["split"], flags["test_lines"]) == (flores, "1-100")
        assert flags["shots"] == (5 if "few_shot" in name else 0)
        if flags["shots"]:
            assert (flags["example_split"], flags["example_lines"]) == ("dev", "151-200")


@pytest.mark.parametrize("name", ["tiny", "tiny_ci", "towerspeech_6b"])
def test_a_stage_comes_after_those_whose_output_it_reads(tmp_path, name):
    """Whatever a stage's command names was written by a stage that it waits for, itself or one before."""
    asked = system(tmp_path, REPO / f"systems/{name}.yaml")
    writes, waits = {}, {}
    for stage in chain.chain(asked):
        waits[stage.name] = {stage.name, *stage.after, *(name for other in stage.after for name in waits[other])}
        words = [word for words in chain.commands(stage, asked, {}) for word in words]
        flag = re.compile("--(output|shuffled|nearest)_dir")
        outputs = {words[i + 1] for i, word in enumerate(words) if flag.fullmatch(word)}
        for word in {*words} - outputs:
            makers = {maker for folder in writes if f"{word}/".startswith(f"{folder}/") for maker in writes[folder]}
            assert makers <= waits[stage.name], (stage.name, word)
        for folder in outputs:
            writes.setdefault(folder, set()).add(stage.name)
    assert asked.extended in writes and f"{asked.work}/summary" in writes


def test_the_order_and_what_each_stage_builds_on(tmp_path):
    told = shown(system(tmp_path))
    work = tmp_path / "work"
    exported = [chain.parsed(words)["checkpoint"] for words in told["export_checkpoint"]]
    assert exported == [f"{work}/cpt_run/checkpoint-{step}" for step in (600, 1200, 1800)]
    assert chain.parsed(told["instruction_tuning"][1])["model"] == f"{work}/models/checkpoint-1800"
    base = chain.parsed(told["base_build_mixture"][0])
    assert [source["kind"] for source in base["sources"]] == ["text", "parallel"] and base["bos"] is True
    assert chain.parsed(told["base_continued_pretraining"][0])["keep_steps"] == [320]
    scored = chain.parsed(told["score"][0])["generations"]
    assert len(scored) == 11  # the control, and five models' mt and asr
    heard = {name: chain.parsed(told[name][0])["units"] for name in ("generate_asr", "generate_asr_sft")}
    assert [*map(len, heard.values())] == [1, 2]  # shuffled units for the tuned model alone
    assert chain.parsed(told["generate_asr_sft"][0])["style"] == "chat"


def test_sets_for_instruction_tuning(tmp_path):
    places = {"train_sets": ["mls_en", "voxpopuli_en"], "sft_sets": ["voxpopuli_en"]}
    told = shown(system(tmp_path, REPO / "systems/llama2_10b.yaml", system=places))
    assert chain.parsed(told["train_bpe_tokenizer"][0])["units"] == ["units/mls_en", "units/voxpopuli_en"]
    assert chain.parsed(told["instruction_tuning"][0])["units"] == ["units/voxpopuli_en"]


def test_sets_of_speech(tmp_path):
    """Each form's flags, a manifest that is there, shards by hours; k-means is fitted on all that is learned from."""
    sets = {
        "cuts": {"root": "c", "cuts": "c/cuts.jsonl.gz", "hours": 250},
        "hub": {"root": "h", "parquet": ["h/0.parquet", "h/1.parquet"], "text": "raw", "hours": 250.1},
        "own": {"root": "o", "manifest": "o/own.jsonl"},
        "unused": {"root": "u", "nemo": "u.jsonl"},
    }
    places = {"sets": sets, "train_sets": ["cuts", "own"], "test_sets": ["hub"], "shard_hours": 125}
    asked = system(tmp_path, REPO / "systems/llama2_10b.yaml", system=places)
    told = shown(asked)
    assert [name for name in told if name.startswith("manifest_")] == ["manifest_cuts", "manifest_hub"]
    flags = chain.parsed(told["manifest_cuts"][0])
    assert (flags["cuts"], flags["root"], flags["output_dir"]) == ("c/cuts.jsonl.gz", "c", "manifests/cuts")
    flags = chain.parsed(told["manifest_hub"][0])
    assert (flags["parquet"], flags["text"]) == (["h/0.parquet", "h/1.parquet"], "raw")
    flags = chain.parsed(told["fit_kmeans"][0])
    assert flags["manifest"] == ["manifests/cuts/manifest.jsonl", "o/own.jsonl"] and flags["audio_root"] == ["c", "o"]
    stages = {stage.name: stage for stage in chain.chain(asked)}
    assert [stages[f"label_{name}"].tasks for name in ("cuts", "own", "hub")] == [2, 1, 3]
    assert stages["label_hub"].after == ["manifest_hub", "fit_kmeans"] and stages["label_own"].after == ["fit_kmeans"]
    assert "manifest_hub" in stages["build_mixture"].after  # its sentences are kept out of training
    assert chain.parsed(told["label_own"][0])["manifest"] == "o/own.jsonl"


def test_stages_are_chosen_by_name_or_by_file(tmp_path):
    stages = chain.chain(system(tmp_path))
    assert chain.choose(stages, []) == stages
    for names, chosen in (
        (["label_audio"], ["label_train", "label_test"]),
        (["label_test"], ["label_test"]),
        (["continued_pretraining", "build_mixture"], ["build_mixture", "continued_pretraining"]),  # not the base's
    ):
        assert [stage.name for stage in chain.choose(stages, names)] == chosen
    with pytest.raises(UserError, match="there is no stage 'mixture'\n.*build_mixture"):
        chain.choose(stages, ["mixture"])


# --- What is done ---------------------------------------------------------------------------------
@pytest.fixture
def labelled(tmp_path) -> tuple[dict, Path]:
    """The flags of a command that has labelled two shards, and its folder."""
    for name in ("manifest.jsonl", "kmeans/k"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    arguments = {"output_dir": tmp_path / "kmeans", "seed": 0}
    record("speech_units/fit_kmeans.py", "x", tmp_path / "kmeans", arguments, [], [tmp_path / "kmeans/k"])
    paths = {"manifest": str(tmp_path / "manifest.jsonl"), "kmeans": str(tmp_path / "kmeans")}
    flags = {**paths, "output_dir": str(tmp_path / "units"), "num_shards": 2, "shard": None, "num_workers": 1}
    (tmp_path / "units").mkdir()
    for shard in range(2):
        name = f"units-{shard:05d}-of-00002"
        (tmp_path / f"units/{name}.parquet").write_text(name)
        given = {**paths, "output_dir": tmp_path / "units", "num_shards": 2}
        outputs = [tmp_path / f"units/{name}.parquet"]
        record("speech_units/label_audio.py", name, tmp_path / "units", given, [*paths], outputs)
    return flags, tmp_path


def test_what_is_done_and_what_is_not(labelled):
    flags, folder = labelled
    done = chain.State(True, True, [])
    assert chain.state([("label_audio", flags)]) == done
    assert chain.state([("label_audio", {**flags, "num_workers": 2})]) == done  # speed
    assert chain.state([("label_audio", {**flags, "kmeans": os.path.relpath(flags["kmeans"])})]) == done

    found = chain.state([("label_audio", {**flags, "num_shards": 3})])
    assert not found.done and not found.there and not found.refused  # other files
    found = chain.state([("label_audio", {**flags, "manifest": f"{folder}/other.jsonl"})])
    assert not found.done and found.there and "manifest was" in found.refused[0] and len(found.refused) == 2

    kmeans = json.loads((folder / "kmeans/x.run_info.json").read_text())
    (folder / "kmeans/x.run_info.json").write_text(json.dumps({**kmeans, "outputs": {"k": "another hash"}}))
    assert "kmeans is another one now" in chain.state([("label_audio", flags)]).refused[0]
    (folder / "kmeans/x.run_info.json").write_text(json.dumps(kmeans))
    assert chain.state([("label_audio", flags)]) == done

    (folder / "manifest.jsonl").write_text("changed in its place")  # no corpus is read
    assert chain.state([("label_audio", flags)]) == done
    (folder / "units/units-00001-of-00002.parquet").unlink()
    assert "units-00001-of-00002.parquet is gone" in chain.state([("label_audio", flags)]).refused[0]
    (folder / "units/units-00001-of-00002.run_info.json").unlink()
    found = chain.state([("label_audio", flags)])
    assert not found.done and not found.there


def test_files_that_an_earlier_stage_wrote_are_compared_by_what_it_recorded(tmp_path):
    """At the top of its folder, or one below: data/audio/train.jsonl."""
    (tmp_path / "data/audio").mkdir(parents=True)
    for name in ("audio/train.jsonl", "mono.jsonl"):
        (tmp_path / "data" / name).write_text(name)
    outputs = [tmp_path / "data/audio/train.jsonl", tmp_path / "data/mono.jsonl"]
    record("tiny/make_data.py", "x", tmp_path / "data", {}, [], outputs)
    recorded = json.loads((tmp_path / "data/x.run_info.json").read_text())["outputs"]
    for name in ("audio/train.jsonl", "mono.jsonl"):
        assert chain.recorded_hash(tmp_path / "data" / name) == recorded[name]
    assert chain.recorded_hash(tmp_path / "data/other.jsonl") == ""
    assert chain.recorded_hash(tmp_path / "data/audio") == ""


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (["b/tokenizer.model", "b/tokenizer.json"], "b", True),  # of a folder some files were recorded
        (["c/tokenizer.model"], "b", False),
        (["u/a", "u/b"], ["u/a", "u/b"], True),
        (["u/a", "u/b"], ["u/a"], False),
        (["u/a"], ["u/a", "u/b"], False),
        ([], None, True),
        ([], "a", False),
        (["a"], None, False),
    ],
)
def test_same_paths(old, new, wanted):
    assert chain.same_paths(old, new) is wanted


# --- A run here -----------------------------------------------------------------------------------
def run(path: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "systems/run.py", "--system", path, *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_stage_that_fails_ends_the_run_and_is_named(tmp_path):
    asked = system(tmp_path, make_data={"templates": ["no_such"]})
    told = run(asked.config)
    assert told.returncode == 1 and "make_data ended with status 1\n  -> see above; run this again" in told.stderr
    assert "python tiny/make_data.py --config" in told.stdout and "make_base" not in told.stdout


def test_a_stage_whose_input_nobody_makes_is_refused_before_anything_runs(tmp_path):
    asked = system(tmp_path)
    told = run(asked.config, "--stages", "make_base,make_data,build_mixture")
    assert told.returncode == 1 and not told.stdout and not Path(asked.work).exists()
    assert "build_mixture reads what train_bpe_tokenizer makes, which is not there" in told.stderr


def test_a_dry_run_writes_nothing(tmp_path):
    told = run(TINY, "--work", str(tmp_path / "work"), "--dry_run", "true")
    assert told.returncode == 0 and told.stdout.count("# ") == 26 and not (tmp_path / "work").exists()


# --- What is shown --------------------------------------------------------------------------------
def test_a_shown_command_can_be_typed(tmp_path):
    """Patterns find their files, and every other word comes through the shell as it is."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    words = ["*.jsonl", "[1, 2]", "it's", "$HOME", "", "x*y z", "a;b"]
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {chain.typed(words)}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.stdout.split("\n")[:-1] == ["a.jsonl", "b.jsonl", *words[1:]]


@pytest.mark.parametrize(("options", "nodes"), [([], 1), (["--nodes=4"], 4), (["-N2"], 2), (["--nice=3"], 1)])
def test_nodes_of_a_job(options, nodes):
    (stage,) = chain.choose(chain.chain(chain.System(TINY)), ["summarize"])
    assert int(chain.allotted(stage, options)["SLURM_JOB_NUM_NODES"]) == nodes
