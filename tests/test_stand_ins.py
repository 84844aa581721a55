"""Each command of the five systems, as submit_pipeline.sh prints it, on small stand-ins of the right form.

Models, audio and text lie where the YAMLs look for them, and nothing of a YAML is changed. What no stand-in can have
(billions of tokens, 32 GPUs) is refused, for that reason alone; then it is scaled down by flags, and the next stage
reads its output.
"""

import csv
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import make_sentences, save_base_model
from tests.corpus_trees import CORPORA, write
from tests.test_systems import REPO
from tests.test_systems import SYSTEMS as PATHS
from towerspeech import chain
from towerspeech.decoding import Generation
from towerspeech.engine import Result
from towerspeech.files import read_json
from towerspeech.languages import LANGUAGES
from towerspeech.records import read_jsonl, read_prompts, write_jsonl
from towerspeech.speech_prompts import speech_rows
from towerspeech.stage import stage
from towerspeech.tokenizer import read_metadata
from towerspeech.units_parquet import read_units

pytestmark = pytest.mark.slow

SYSTEMS = {path.stem: chain.System(path) for path in PATHS}

# Sharded over nodes, and whole copies on one node. From export_checkpoint on, the others' commands are the same but
# for names (tests/test_systems.py), and are left out for the sake of time.
WHOLE = ("towerspeech_8b", "tinyllama_10b")


def save_hubert(folder: Path) -> None:
    """A narrow HuBERT-large: as many layers, random."""
    import torch
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=24, num_attention_heads=2, intermediate_size=16, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        feat_extract_norm="layer", conv_bias=True,
    )  # fmt: skip
    HubertModel(config).save_pretrained(folder)


def save_speech(folder: Path, sets: dict[str, dict]) -> None:
    """The corpora in their layouts, where the YAMLs look; of the first there are frames enough for 5,000 units."""
    generator, sentences = np.random.default_rng(0), make_sentences(80)
    for name, known in sets.items():
        root, split = folder / known["root"], known["split"]
        if known["corpus"] == "spgispeech":
            lines = ["wav_filename|wav_filesize|transcript"]
            for number, sentence in enumerate(sentences):
                path = root / split / f"call/{number}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, generator.normal(0, 0.1, 32_000), 16_000)
                lines.append(f"call/{number}.wav|64044|{sentence}")
            write(root / f"{split}.csv", *lines)
            continue
        tree = folder / "trees" / name  # whose only split is called test
        CORPORA[known["corpus"]](tree)
        for path in sorted(tree.rglob("*")):
            if path.is_file():
                moved = root / str(path.relative_to(tree)).replace("test", split, 1)
                moved.parent.mkdir(parents=True, exist_ok=True)
                data = path.read_bytes()
                if path.name == "GigaSpeech.json":
                    data = data.replace(b"{TEST}", b"{XL}")
                if path.name.startswith("asr_"):
                    data = gzip.compress(
                        gzip.decompress(data)
                        .replace(b"|99|train|", b"|99|dev|")
                        .replace(b"|99|test|", f"|99|{split}|".encode())
                    )
                    if moved.exists():  # another split of it is there
                        header, *lines = gzip.decompress(data).splitlines(keepends=True)
                        data = gzip.compress(gzip.decompress(moved.read_bytes()) + b"".join(lines))
                moved.write_bytes(data)


def in_script(code: str, text: str) -> str:
    """The same, in letters that the language is written in; in Chinese a word is two characters."""
    if code == "zh":
        words = [zlib.crc32(word.encode()) for word in text.lower().split()]
        return "".join(chr(0x4E00 + word % 5000) + chr(0x4E00 + word // 5000 % 5000) for word in words)
    first, step = {"ru": (0x430, 1), "ko": (0xAC00, 28)}.get(code, (ord("a"), 1))
    return text.lower().translate({ord("a") + i: chr(first + step * i) for i in range(26)})


def save_text(folder: Path) -> None:
    """Mono and parallel text of all languages; FLORES-200 with both splits, one direction of WMT23.

    In each file of mono text one document holds a sentence of FLORES.
    """
    sentences, tested = make_sentences(40), make_sentences(8, seed=1)
    for code, language in LANGUAGES.items():
        texts = [f"{language.name}: {in_script(code, text)}" for text in sentences]
        texts.insert(7, f"Before. {in_script(code, tested[2]).upper()} After.")
        write_jsonl(folder / f"text/mono/{code}.jsonl", ({"text": text} for text in texts))
        for src_lang, tgt_lang in () if code == "en" else ((code, "en"), ("en", code)):
            pair = {"src_lang": src_lang, "tgt_lang": tgt_lang}
            rows = [
                {"id": str(i), **pair, "source": in_script(src_lang, text), "target": in_script(tgt_lang, text)}
                for i, text in enumerate(sentences)
            ]
            write_jsonl(folder / f"text/parallel/{src_lang}-{tgt_lang}.jsonl", rows)
        for split, texts in (("dev", tested[:6]), ("devtest", tested[6:8])):
            path = folder / f"data/flores200/{split}/{language.flores}.{split}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{in_script(code, text)}\n" for text in texts), encoding="utf-8")
    (folder / "data/wmt23").mkdir()
    for side in ("src.de", "ref.refA.en"):
        (folder / f"data/wmt23/generaltest2023.de-en.{side}").write_text("".join(f"{side} {i}\n" for i in range(2)))


class Place:
    """A folder in which the five systems can be run."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(REPO / "systems", folder / "systems")
        save_hubert(folder / "facebook/hubert-large-ll60k")
        for system in SYSTEMS.values():
            if not (folder / system.places["base"]).is_dir():
                save_base_model(folder / system.places["base"], context=4096)
        save_speech(folder, system.places["sets"])
        save_text(folder)

    def run(self, line: str, *more, wrong: str = "", of: int = 1, processes: int = 1) -> None:
        """Run a printed command here, with ``more`` flags: in ``processes``, or as the first of many that never come.

        It must succeed, or end with one error that says ``wrong``.
        """
        script, own = chain.script_of(line.split(" "))
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(of)}
        typed = " ".join([shlex.join([*start, str(REPO / script)]), *own, shlex.join(map(str, more))])
        told = subprocess.run(["bash", "-c", typed], cwd=self.folder, env=env, capture_output=True, text=True)
        assert (told.returncode != 0) == bool(wrong) and wrong in told.stderr, f"{typed}\n{told.stdout}{told.stderr}"
        assert "Traceback" not in told.stderr

    def make_tokenizer(self, lines: list[str]) -> None:
        for line in lines[1:]:
            self.run(line)

    def answer(self, folder: Path, tasks: dict[str, list[dict]]) -> None:
        """Write generations that are the references, as if a model had."""
        with stage(__file__, folder, {}, inputs=[]) as work:
            for name, prompts in tasks.items():
                rows = (Generation.result_row(prompt, Result(0, prompt["output"], "stop", 1, 0)) for prompt in prompts)
                write_jsonl(work.output_dir / name, rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture(scope="module")
def walks(place, dry_runs) -> Iterator[dict[str, Future]]:
    """System -> its walk; two at a time. What systems share is made before, once."""
    with ThreadPoolExecutor(2) as pool:
        shown = {name: dry_runs[name] for name in SYSTEMS}
        stages = shown["towerspeech_6b"]
        manifests = [lines[1] for stage, lines in stages.items() if stage.startswith("manifest_")]
        list(pool.map(place.run, manifests))
        place.run(stages["fit_kmeans"][1], "--num_workers", 0)
        labels = [lines[1] for stage, lines in stages.items() if stage.startswith("label_")]
        list(pool.map(lambda line: place.run(line, "--num_shards", 1, "--num_workers", 0), labels))
        of_bases = {lines["train_bpe_tokenizer"][-1]: lines["train_bpe_tokenizer"] for lines in shown.values()}
        list(pool.map(place.make_tokenizer, of_bases.values()))
        yield {name: pool.submit(walk, place, name, stages) for name, stages in shown.items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_stage_takes_inputs_of_the_right_form(walks, name):
    walks[name].result()


def test_units_are_those_of_the_manifests(place, walks):
    manifests = [*place.folder.glob("manifests/*/manifest.jsonl")]
    assert len(manifests) == 9
    for manifest in manifests:
        rows = list(read_units(place.folder / "units" / manifest.parent.name, 5000))
        assert [row["id"] for row in rows] == [row["id"] for row in read_jsonl(manifest)]


def walk(place: Place, name: str, shown: dict[str, list[str]]) -> None:
    """All stages of a system from its mixture on; ``shown`` are its printed commands, each after its sbatch line."""
    system, work = SYSTEMS[name], place.folder / f"runs/{name}"
    stages = {stage: lines[1:] for stage, lines in shown.items()}

    [line] = stages["build_mixture"]
    place.run(line, wrong="tokens for a budget of 5,000,000,000")
    sources = [
        {**source, "budget": 4000} if source["kind"] == "speech" else source
        for source in system.blocks["build_mixture"]["sources"]
    ]
    small = {name: {"budget": 200 * len(sources)} for name in ("mono", "parallel")}
    whole = ["--reserve", 100, "--validation_tokens", 0]
    place.run(line, "--sources", json.dumps(sources), "--groups", json.dumps(small), *whole)
    mixed = read_json(work / "mixture/manifest.json", "")["sources"]
    assert [source["documents"] for source in mixed] == [86] + [40] * (len(sources) - 1)
    # VoxPopuli's two utterances for training say what those of the test set do.
    told = {source["kind"]: source["left_out"] for source in mixed}
    tested = "with a sentence of a test set"
    assert told == {"speech": {tested: 2}, "text": {tested: 1}, "parallel": {}}

    [line] = stages["continued_pretraining"]
    nodes = 4 if "--nnodes 4" in line else 1
    steps = system.blocks["continued_pretraining"]["keep_steps"]
    place.run(line, of=8 * nodes, wrong=f"--keep_steps {steps} lies outside the run's 1..1 steps")
    small = ["--replicate", 1, "--shard", 1, "--global_batch_size", 2, "--keep_steps", "[1]", "--sequence_length", 128]
    place.run(line, *small)
    data, train = stages["instruction_tuning"]
    place.run(data, "--num_asr", 4, "--num_mt", 4)
    if name not in WHOLE:
        return
    lines = stages["export_checkpoint"]
    assert [f"checkpoint-{step} " in line for step, line in zip(steps, lines, strict=True)] == [True] * len(steps)
    shutil.copytree(work / "cpt_run/checkpoint-1", work / f"cpt_run/checkpoint-{steps[-1]}")  # as if it were the last
    place.run(lines[-1])
    sharded = "fsdp" in system.blocks["instruction_tuning"]["sft"]
    place.run(train, "--sft.bf16", "false", processes=2 if sharded else 1)
    assert read_json(work / "models/sft/sft_config.json", "")["learning_rate"] == 8e-5

    models = {"": [place.folder / system.extended, *(work / f"models/checkpoint-{step}" for step in steps)]}
    models["_sft"] = [work / "models/sft"]
    for suffix, style in (("", "original"), ("_sft", "chat")):
        for line in stages[f"build_instructions{suffix}"]:
            place.run(line)
        for task in ("mt", "asr"):
            lines = stages[f"generate_{task}{suffix}"]
            assert len(lines) == len(models[suffix])
            too_long = f"--max_model_len is 5,000, but the context of {models[suffix][-1]} is 4,096"
            place.run(lines[-1], "--max_model_len", 5000, wrong=too_long)  # before vLLM starts, all else is checked
            shutil.rmtree(work / f"generations/{task}/{models[suffix][-1].name}", ignore_errors=True)
        prompts = read_prompts([*work.glob(f"instructions/{style}/*_shot/*.jsonl")], {})
        assert len(prompts) == 2 * 18 + 1  # WMT23 has no pool to show examples from
        for model in models[suffix]:
            place.answer(work / "generations/mt" / model.name, prompts)
            offset, heard = read_metadata(models["_sft"][0])["offset"], {}
            for test in system.places["test_sets"]:
                heard[f"asr/{test}.jsonl"] = speech_rows(place.folder / "units" / test, test, style, offset, 5000)
            place.answer(work / "generations/asr" / model.name, heard)
    for line in stages["score"]:
        place.run(line)
    [line] = stages["comet"]
    place.run(line, wrong="COMET is not installed here")
    [line] = stages["summarize"]
    place.run(line)
    tables = [*work.glob("results/*.csv")]
    assert {path.stem for path in tables} == {"base", "sft", *map(str, steps)}
    for path in tables:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        assert {(row["model"], row["mixture"]) for row in rows} == {(name, system.blocks["score"]["mixture"])}
        assert {row["score"] for row in rows if row["metric"] == "wer_basic"} == {"0.0"}
