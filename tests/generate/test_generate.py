"""generate.py and generate_ASR.py: real vLLM against transformers' greedy search; SIGKILL; bad prompts."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from generate import generate as script
from generate.generate import generate
from generate.generate_ASR import generate_ASR
from towerspeech import decoding, prompts
from towerspeech.errors import UserError
from towerspeech.records import read_jsonl, read_prompts, write_jsonl
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import stop_token_ids
from towerspeech.units_parquet import read_units

MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, model_dir) -> list[Path]:
    """A random model under two names: checkpoint-1 and checkpoint-2.

    Of the byte pieces it says the newline alone: how to show broken UTF-8 is each library's own choice.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("checkpoints")
    model_dir = Path(shutil.copytree(model_dir, folder / "model"))
    weights = load_file(model_dir / "model.safetensors")
    bytes_but_newline = [i for i in range(3, 259) if i != 3 + ord("\n")]
    weights["model.embed_tokens.weight"][bytes_but_newline] = 0
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    return [Path(shutil.copytree(model_dir, folder / f"checkpoint-{step}")) for step in (1, 2)]


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory) -> list[Path]:
    """0-shot and 5-shot files of the same name, one with chat messages, and a list in the original's form."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = [f"the old captain sees {'a small dog ' * (i % 7)}boat {i}" for i in range(30)]
    facts = {"task": "mt", "dataset": "flores", "src_lang": "en", "tgt_lang": "de", "output": "ein Boot"}
    for shots in (0, 5):
        examples = [("the boat", "das Boot")] * shots
        rows = [
            {
                **facts,
                "id": f"s{i}",
                "shots": shots,
                "source": text,
                "instruction": prompts.mt_few_shot("en", "de", text, examples)
                if shots
                else prompts.mt_0_shot("en", "de", text),
            }
            for i, text in enumerate(texts)
        ]
        write_jsonl(folder / f"{shots}_shot/flores_en-de.jsonl", rows)
    rows = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": t}], "output": ""} for i, t in enumerate(texts[:9])
    ]
    write_jsonl(folder / "chat.jsonl", rows)
    (folder / "original.json").write_text(json.dumps([{"instruction": t, "output": "x"} for t in texts[:9]]))
    return sorted(folder.rglob("*.json*"))


def transformers_greedy(model_dir: Path, row: dict) -> str:
    """The same prompt through transformers' generate; cut at the newline as the stop rule does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = transformers_greedy.__dict__.setdefault("model", AutoModelForCausalLM.from_pretrained(model_dir))
    if "messages" in row:
        text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = [tokenizer.bos_token_id, *tokenizer(row["instruction"], add_special_tokens=False)["input_ids"]]
    stop = stop_token_ids(tokenizer)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=stop, pad_token_id=2
        )
    new = out[0, len(ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return text if "messages" in row else text.split("\n")[0]


class Runs:
    """Starts generate.py on all prompt files, each time into a folder of its own name."""

    def __init__(self, root: Path, checkpoints: list[Path], prompt_files: list[Path]):
        self.root = root
        # No --dtype: a float32 checkpoint is decoded in float32. vLLM's own auto would take bfloat16.
        command = [sys.executable, script.__file__, "--max_new_tokens", str(MAX_NEW_TOKENS)]
        self.command = [*command, "--checkpoints", *map(str, checkpoints), "--prompts", *map(str, prompt_files)]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(self, name: str, *options: str) -> subprocess.Popen:
        words = [*self.command, *options, "--output_dir", str(self.root / name)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=self.environment, stderr=pipe, stdout=pipe, text=True)

    def finish(self, name: str, *options: str) -> str:
        process = self.start(name, *options)
        printed, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-2000:]
        return printed

    def files(self, name: str) -> dict[str, bytes]:
        paths = (self.root / name).rglob("*.jsonl")
        return {str(path.relative_to(self.root / name)): path.read_bytes() for path in paths}

    def count(self, name: str) -> int:
        """Results that are on the disk, in whatever file."""
        found = 0
        for path in [*(self.root / name).rglob("*.jsonl"), *(self.root / name).rglob(".*.partial")]:
            with contextlib.suppress(FileNotFoundError):  # just published
                found += path.read_bytes().count(b"\n")
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints, prompt_files) -> Runs:
    """With the uninterrupted run's outputs in ``whole``."""
    runs = Runs(tmp_path_factory.mktemp("runs"), checkpoints, prompt_files)
    runs.finish("whole")
    return runs


def kill_with_children(process: subprocess.Popen) -> list[psutil.Process]:
    """SIGKILL the script alone; return what it had started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    return children


@pytest.mark.slow
def test_outputs_are_transformers_own(runs, checkpoints, prompt_files):
    names = [f"checkpoint-1/{n}.jsonl" for n in ("0_shot/flores_en-de", "5_shot/flores_en-de", "chat", "original")]
    assert sorted(runs.files("whole"))[:4] == names
    for name, rows in read_prompts(prompt_files).items():
        results = read_jsonl(runs.root / "whole/checkpoint-1" / name)
        assert [result["id"] for result in results] == [row["id"] for row in rows]
        for result, row in zip(results, rows, strict=True):
            # vLLM keeps the space before the first word, transformers' decode drops it
            assert result["text"].removeprefix(" ") == transformers_greedy(checkpoints[0], row), (name, row["id"])
            assert result["reference"] == row["output"] and result["source"] == row.get("source")
    counts = json.loads((runs.root / "whole/checkpoint-2/run_info.json").read_text())["counts"]
    assert sum(counts["finish_reasons"].values()) == counts["prompts"] == 78
    last = counts["last_attempt"]
    assert last["prompts"] == 78 and last["new_tokens"] == counts["new_tokens"]
    assert last["cached_tokens"] > 0.1 * last["prompt_tokens"]  # the five shots are the same in all of a file
    assert runs.finish("whole").count("already done") == 2


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory, checkpoints) -> Runs:
    """Three files of 300 prompts: seconds of decoding, so that there is something to kill."""
    root = tmp_path_factory.mktemp("long_runs")
    for file in range(3):
        rows = [{"id": f"{i}", "instruction": f"boat {i * (file + 1)} and a dog", "output": "x"} for i in range(300)]
        write_jsonl(root / f"prompts/file{file}.jsonl", rows)
    return Runs(root, checkpoints[:1], sorted((root / "prompts").iterdir()))


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bytes(long_runs, pytestconfig):
    """By turns after a random number of results, wherever they are, and at a random second of a run."""
    runs, generator = long_runs, random.Random(0)
    began = time.monotonic()
    runs.finish("whole")
    seconds = time.monotonic() - began
    survivors, torn = [], 0
    for kill in range(pytestconfig.getoption("--kills")):
        before, process, began = runs.count("killed"), runs.start("killed"), time.monotonic()
        kill_at = generator.uniform(0.05, 0.9)
        if kill % 2 == 0:
            wanted = before + generator.randint(1, max(1, (900 - before) // 2))
            while process.poll() is None and runs.count("killed") < wanted:
                time.sleep(0.002)
        else:
            while process.poll() is None and time.monotonic() - began < seconds * kill_at:
                time.sleep(0.002)
        if process.poll() is None:
            survivors += kill_with_children(process)
        else:  # it was done: begin anew for the kills that are left
            process.communicate()
            shutil.rmtree(runs.root / "killed")
        for partial in (runs.root / "killed").rglob(".*.partial"):
            # A kill within a write leaves half a line; it is not taken for a result.
            with open(partial, "a") as file:
                file.write('{"id": "29", "text": "ha')
            torn += 1
    assert survivors and torn  # of the first kill, which waits for results
    assert not psutil.wait_procs(survivors, timeout=300)[1], "an engine outlived the script"
    left = runs.count("killed")  # nothing, if the last kill came too late and all began anew
    done = list((runs.root / "killed").rglob("run_info.json"))  # if it came in the last moment
    printed = runs.finish("killed")
    assert ("already done" in printed) == bool(done)
    assert ("of 900 prompts were done before" in printed) == (left > 0 and not done)
    assert runs.files("killed") == runs.files("whole")


@pytest.mark.slow
def test_an_engine_that_dies_is_told_of_and_loses_nothing(long_runs):
    process = long_runs.start("died")
    while long_runs.count("died") < 5:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    [engine] = [child for child in children if child.ppid() != process.pid]  # the fork server's child
    engine.kill()
    printed, errors = process.communicate(timeout=400)
    assert process.returncode not in (0, None) and "Traceback" not in errors
    assert "error: vLLM ended with status -9" in errors and "the same command goes on from there" in errors
    assert not list((long_runs.root / "died").rglob("run_info.json"))
    kept = long_runs.count("died")
    assert kept >= 5
    assert f"{kept:,} of 900 prompts were done before" in long_runs.finish("died")
    if not (long_runs.root / "whole").is_dir():
        long_runs.finish("whole")
    assert long_runs.files("died") == long_runs.files("whole")


@pytest.mark.slow
def test_two_engines_and_sampling(long_runs):
    """Two data-parallel engines give one engine's bytes, and a sample depends on its seed and its prompt alone."""
    sampled = ("--temperature", "0.8", "--seed", "3")
    long_runs.finish("sampled", *sampled)
    long_runs.finish("sampled_by_two", *sampled, "--data_parallel_size", "2")
    if not (long_runs.root / "whole").is_dir():
        long_runs.finish("whole")
    assert long_runs.files("sampled") == long_runs.files("sampled_by_two") != long_runs.files("whole")
    # Prompt i of file0 and prompt i / 2 of file1 are the same text: each draws from a stream of its own.
    one, other = (read_jsonl(long_runs.root / f"sampled/checkpoint-1/file{file}.jsonl") for file in (0, 1))
    same = [(one[2 * i], other[i]) for i in range(150)]
    assert all(a["prompt_sha256"] == b["prompt_sha256"] for a, b in same)
    assert sum(a["text"] != b["text"] for a, b in same) > 100  # a short answer may be drawn twice


@pytest.mark.slow
def test_asr_from_units_equals_asr_from_prompts(tmp_path, checkpoints, make_units):
    folder = make_units(tmp_path / "clean", 12)
    rows = speech_rows(folder, "clean", "original")
    assert [row["output"] for row in rows] == [row["text"] for row in read_units(folder)]
    write_jsonl(tmp_path / "asr/clean.jsonl", rows)
    settings = {"max_new_tokens": 8}
    generate_ASR(checkpoints[:1], tmp_path / "a", units=[folder], **settings)
    generate_ASR(checkpoints[:1], tmp_path / "b", prompts=[tmp_path / "asr/clean.jsonl"], **settings)
    ours, theirs = (tmp_path / name / "checkpoint-1/asr/clean.jsonl" for name in "ab")
    assert ours.read_bytes() == theirs.read_bytes()
    assert len(read_jsonl(ours)) == 12


def refused(tmp_path: Path, checkpoint: Path, rows: list[dict]) -> str:
    write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError) as error:
        generate([checkpoint], [tmp_path / "p.jsonl"], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    return str(error.value)


def test_prompts_that_must_not_run_are_named(tmp_path, model_dir, base_model_dir):
    fine = {"id": "a", "instruction": "the dog", "output": ""}
    long = {"id": "long", "instruction": "boat " * 600, "output": ""}
    assert "p.jsonl:2: prompt 'long' has" in (text := refused(tmp_path, model_dir, [fine, long])) and "512" in text
    outside = {"id": "b", "instruction": f"Speech: {chr(0xF0000 + 50)}\nEnglish:", "output": ""}
    text = refused(tmp_path, model_dir, [fine, outside])
    assert "p.jsonl:2: speech unit U+F0032 (id 50) is none of the tokenizer's 50" in text
    inside = {"id": "b", "instruction": f"Speech: {chr(0xF0000)}\nEnglish:", "output": ""}
    assert "is none of the tokenizer's 0" in refused(tmp_path, base_model_dir, [inside])
    chat = {"id": "c", "messages": [{"role": "user", "content": "hello"}]}
    assert "has no chat template" in refused(tmp_path, base_model_dir, [chat])
    assert "p.jsonl:2: id 'a' repeats" in refused(tmp_path, model_dir, [fine, fine])
    assert "p.jsonl:1: neither instruction nor messages" in refused(tmp_path, model_dir, [{"id": "a"}])


def test_a_tokenizer_that_does_not_belong_is_refused(tmp_path, model_dir, base_model_dir):
    """The extended tokenizer beside the base model: its units have no embeddings."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "mixed"))
    shutil.copy(base_model_dir / "config.json", folder / "config.json")
    text = refused(tmp_path, folder, [{"id": "a", "instruction": "the dog", "output": ""}])
    assert "only 400 embedding rows" in text and "extend_model.py" in text
    for file in folder.glob("*token*"):
        file.unlink()
    shutil.copy(model_dir / "config.json", folder / "config.json")
    assert "has no tokenizer that loads" in refused(tmp_path, folder, [{"id": "a", "instruction": "the dog"}])
    (folder / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(tmp_path, folder, [{"id": "a", "instruction": "the dog"}])


def test_wrong_folders_are_named(tmp_path, model_dir, base_model_dir, make_units):
    write_jsonl(tmp_path / "p.jsonl", [{"instruction": "a"}])
    with pytest.raises(UserError, match="config.json does not exist"):
        generate([tmp_path / "nowhere"], [tmp_path / "p.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="two checkpoints have the same name"):
        generate([model_dir, model_dir], [tmp_path / "p.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="q.jsonl does not exist"):
        generate([model_dir], [tmp_path / "q.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="already called p.jsonl"):
        generate([model_dir], [tmp_path / "p.jsonl", tmp_path / "p.jsonl"], tmp_path / "out")
    folder = make_units(tmp_path / "units", 3)
    with pytest.raises(UserError, match="speech_units.json is missing"):
        generate_ASR([base_model_dir], tmp_path / "out", units=[folder])
    with pytest.raises(UserError, match="either --units or --prompts"):
        generate_ASR([model_dir], tmp_path / "out")
    with pytest.raises(UserError, match="--style is of prompts made from units"):
        generate_ASR([model_dir], tmp_path / "out", prompts=[tmp_path / "p.jsonl"], style="chat")
    with pytest.raises(UserError, match="--data_parallel_size is 0"):
        generate([model_dir], [tmp_path / "p.jsonl"], tmp_path / "out", data_parallel_size=0)
    with pytest.raises(UserError, match="--max_model_len is 513, but the context of"):
        generate([model_dir], [tmp_path / "p.jsonl"], tmp_path / "out", max_model_len=513)
    write_jsonl(tmp_path / "q.jsonl", [{"id": ["a"], "instruction": "a"}])
    with pytest.raises(UserError, match=r"q.jsonl:1: its id is a list, but a text is wanted: \['a'\]"):
        generate([model_dir], [tmp_path / "q.jsonl"], tmp_path / "out")


def test_bos_comes_once_and_chats_have_none(model_dir):
    rows = [
        {"id": "a", "instruction": "the dog"},
        {"id": "b", "messages": [{"role": "user", "content": "the dog"}]},
    ]
    tokenizer, encoded = decoding.encode(model_dir, {"t.jsonl": rows}, 512, 10_000)
    ids, chat = encoded["t.jsonl"]
    assert ids[0] == 1 and ids.count(1) == 1  # Llama's BOS
    assert chat[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.decode(chat) == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    assert stop_token_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["</s>", "<EOD>", "<|im_end|>"]))
