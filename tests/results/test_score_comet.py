"""score_comet.py against COMET called directly: tiny random models of the real ones' classes, made here."""

import csv
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from results.score import score
from towerspeech.files import hash_file
from towerspeech.records import write_jsonl

ROOT = Path(__file__).parents[2]
COMET_PYTHON = ROOT / ".venv-comet/bin/python"
needs_comet = pytest.mark.skipif(
    not COMET_PYTHON.exists() and not os.environ.get("CI"), reason="no .venv-comet: bash install.sh comet"
)
FACTS = {"shots": 0, "src_lang": "de", "tgt_lang": "en"}
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mat", "der", "Hund", "läuft", "新", "Ω")


# --- Run in COMET's environment ---------------------------------------------------------------------
def make_models(folder: str) -> None:
    """Save a COMET-22 and a CometKiwi over a random two-layer XLM-R: smaller, else like wmt22-comet-da's
    (RegressionMetric) and wmt22-cometkiwi-da's (UnifiedMetric of mt and src) hparams.yaml."""
    import random
    from pathlib import Path

    import torch
    import yaml
    from comet.models import RegressionMetric, UnifiedMetric
    from sentencepiece import SentencePieceTrainer
    from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

    root = Path(folder)
    generator = random.Random(0)
    words = ["the", "cat", "dog", "sat", "ran", "on", "mat", "der", "Hund", "läuft", "today", "again"]
    lines = [" ".join(generator.choices(words, k=8)) for _ in range(200)]
    (root / "text").write_text("\n".join(lines), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(root / "text"), model_prefix=str(root / "spm"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = XLMRobertaTokenizerFast(str(root / "spm.model"))
    tokenizer.save_pretrained(root / "encoder")
    XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=130,
        pad_token_id=1,
    ).save_pretrained(root / "encoder")
    shared = {
        "pretrained_model": str(root / "encoder"),
        "load_pretrained_weights": False,
        "hidden_sizes": [24, 12],
        "layer_transformation": "sparsemax",
        "layer_norm": False,
    }
    torch.manual_seed(0)
    for name, kind, more in (
        ("comet", RegressionMetric, {"layer": "mix", "pool": "avg"}),
        ("cometkiwi", UnifiedMetric, {"sent_layer": "mix", "word_layer": 2, "input_segments": ["mt", "src"]}),
    ):
        model = kind(**shared, **more)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that segments' scores differ
        hparams = dict(model.hparams)
        (root / name / "checkpoints").mkdir(parents=True)
        saved = {"state_dict": model.state_dict(), "hyper_parameters": hparams, "pytorch-lightning_version": "2.0"}
        torch.save(saved, root / name / "checkpoints" / "model.ckpt")
        (root / name / "hparams.yaml").write_text(yaml.safe_dump(hparams))


def call_comet(checkpoint: str, file: str) -> None:
    """Score a JSON file of lists of samples as COMET's documentation does; replace it by the answers."""
    import json
    from pathlib import Path

    import torch
    from comet import load_from_checkpoint

    model = load_from_checkpoint(checkpoint)
    answers = []
    for samples in json.loads(Path(file).read_text()):
        answer = model.predict(samples, batch_size=16, gpus=int(torch.cuda.is_available()), progress_bar=False)
        answers.append({"scores": answer.scores, "system_score": answer.system_score})
    Path(file).write_text(json.dumps(answers))


def run_there(function, *arguments) -> None:
    call = f"{function.__name__}({', '.join(repr(str(argument)) for argument in arguments)})"
    code = f"{inspect.getsource(function)}\n{call}"
    done = subprocess.run([COMET_PYTHON, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def call(expected_status: int = 0, **arguments) -> str:
    """Run score_comet.py in COMET's environment; returns what it prints."""
    command = [str(COMET_PYTHON), str(ROOT / "results/score_comet.py")]
    for name, value in arguments.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == expected_status, done.stderr
    assert "Traceback" not in done.stderr and (done.stderr == "") == (expected_status == 0), done.stderr
    return done.stdout + done.stderr


# --- Test sets --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """score_comet.py's arguments that name the models: one a folder, one a file."""
    folder = tmp_path_factory.mktemp("comet")
    run_there(make_models, folder)
    return {
        "comet_model": str(folder / "comet"),
        "cometkiwi_model": str(folder / "cometkiwi/checkpoints/model.ckpt"),
    }


def checkpoints_of(models: dict[str, str]) -> dict[str, Path]:
    return {
        "comet22": Path(models["comet_model"]) / "checkpoints/model.ckpt",
        "cometkiwi22": Path(models["cometkiwi_model"]),
    }


def make_rows(task: str, dataset: str, count: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(1, 15)))

    return [
        {
            "id": f"{dataset}:{i}",
            "task": task,
            "dataset": dataset,
            **FACTS,
            "source": sentence(),
            "reference": sentence(),
            "prompt_sha256": "0",
            "text": sentence() if i else "",
            "finish_reason": "stop",
            "num_tokens": 3,
        }
        for i in range(count)
    ]


def write_generations(folder: Path, files: dict[str, list[dict]]) -> Path:
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    (folder / "run_info.json").write_text(json.dumps({"outputs": {name: hash_file(folder / name) for name in files}}))
    return folder


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def direct(checkpoint: Path, sets: list[list[dict]], columns: dict[str, str], folder: Path) -> list[dict]:
    """What COMET itself says of the test sets."""
    file = folder / "samples.json"
    file.write_text(json.dumps([[{key: row[name] for key, name in columns.items()} for row in rows] for rows in sets]))
    run_there(call_comet, checkpoint, file)
    return json.loads(file.read_text())


COLUMNS = {
    "comet22": {"src": "source", "mt": "text", "ref": "reference"},
    "cometkiwi22": {"src": "source", "mt": "text"},
}


@pytest.mark.slow
@needs_comet
def test_scores_are_those_of_comet_called_directly(tmp_path, models):
    sets = [make_rows("mt", "flores", 40, 1), make_rows("st", "fleurs", 23, 2), make_rows("mt", "flores", 40, 3)]
    silent = [{**row, "source": None} for row in make_rows("mt", "silent", 3, 4)]
    base = {"0_shot/flores_de-en.jsonl": sets[0], "st/fleurs.jsonl": sets[1]}
    base |= {"asr/clean.jsonl": make_rows("asr", "clean", 3, 4), "0_shot/silent.jsonl": silent}
    folders = [
        write_generations(tmp_path / "base", base),
        write_generations(tmp_path / "checkpoint-300", {"0_shot/flores_de-en.jsonl": sets[2]}),
    ]
    arguments = {"generations": folders, "model": "m", "output_dir": tmp_path / "out"}
    score(**arguments)
    arguments |= models
    before = [read(tmp_path / f"out/{name}.csv") for name in ("base", "300")]
    printed = call(**arguments, metrics=["comet22", "cometkiwi22"])
    assert printed.count(" COMET ") == printed.count(" Kiwi ") == 3
    assert "no comet22, cometkiwi22 for" in printed and "silent.jsonl: it has no sources" in printed

    after = [read(tmp_path / f"out/{name}.csv") for name in ("base", "300")]
    assert all(row in new for old, new in zip(before, after, strict=True) for row in old)  # nothing else is touched
    rows = [row for table in after for row in table if row["metric"] in COLUMNS]
    assert len(rows) == sum(map(len, after)) - sum(map(len, before)) == 6
    drawn = {n: np.random.default_rng(12345).choice(n, size=(1000, n)) for n in (40, 23)}
    for metric, checkpoint in checkpoints_of(models).items():
        expected = direct(checkpoint, sets, COLUMNS[metric], tmp_path)
        for rows_of_set, answer, name in zip(sets, expected, ("base", "base", "300"), strict=True):
            (row,) = [
                row
                for row in rows
                if (row["metric"], row["checkpoint"], row["dataset"]) == (metric, name, rows_of_set[0]["dataset"])
            ]
            assert float(row["score"]) == answer["system_score"]
            assert len(set(answer["scores"])) > 10  # the model is no constant
            means = np.array(answer["scores"])[drawn[len(rows_of_set)]].mean(axis=1)
            interval = float(row["ci_low"]), float(row["ci_high"])
            assert interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12)
            assert row["n"] == str(len(rows_of_set))
            assert row["signature"] == (
                f"model:{checkpoint.parents[1].name}|sha256:{hash_file(checkpoint)[:16]}"
                "|bs:1000|seed:12345|version:unbabel-comet-2.2.7"
            )

    paths = [tmp_path / f"out/{name}.csv" for name in ("base", "300")]
    whole = [path.read_bytes() for path in paths]
    printed = call(**arguments, metrics=["cometkiwi22,comet22"])
    assert printed.count("already scored: ") == 6 and " COMET " not in printed
    assert [path.read_bytes() for path in paths] == whole
    write_generations(folders[1], {"0_shot/flores_de-en.jsonl": sets[0]})
    printed = call(**arguments, metrics=["comet22"])
    assert printed.count("already scored: ") == 2 and printed.count(" COMET ") == 1
    changed = {row["metric"]: row["score"] for row in read(paths[1])}
    assert changed.keys() == {"comet22"}  # the others were of other outputs
    (same,) = [row["score"] for row in after[0] if (row["metric"], row["dataset"]) == ("comet22", "flores")]
    assert changed["comet22"] == same


@pytest.mark.slow
@needs_comet
def test_line_files_and_what_changes_in_them(tmp_path, models):
    rows = make_rows("mt", "lines", 12, 5)
    for name in ("source", "reference", "text"):
        (tmp_path / name).write_text("".join(f"{row[name]}\n" for row in rows), encoding="utf-8")
    arguments = {"hypotheses": tmp_path / "text", "references": tmp_path / "reference", "target_lang": "en"}
    arguments |= {"output": tmp_path / "o.csv"}

    def found() -> dict[str, str]:
        return {row["metric"]: row["score"] for row in read(tmp_path / "o.csv")}

    score(**arguments, metrics=["chrf"])
    arguments |= {**models, "metrics": ["cometkiwi22"]}
    assert "or --hypotheses, --references, --sources, --target_lang" in call(1, **arguments)
    call(**arguments, sources=tmp_path / "source")
    (expected,) = direct(checkpoints_of(models)["cometkiwi22"], [rows], COLUMNS["cometkiwi22"], tmp_path)
    assert float(found()["cometkiwi22"]) == expected["system_score"]
    first = found()
    (tmp_path / "source").write_text("".join(f"{row['source']} der\n" for row in rows), encoding="utf-8")
    call(**arguments, sources=tmp_path / "source")
    assert found()["cometkiwi22"] != first["cometkiwi22"] and found()["chrf2"] == first["chrf2"]
    assert found().keys() == first.keys()


@pytest.mark.slow
@needs_comet
def test_killed_and_run_again(tmp_path, models):
    files = {f"0_shot/set{i}.jsonl": make_rows("mt", f"set{i}", 30, i) for i in range(8)}
    folder = write_generations(tmp_path / "sft", files)
    command = [str(COMET_PYTHON), str(ROOT / "results/score_comet.py"), "--generations", str(folder), "--model", "m"]
    command += ["--metrics", "comet22", "--comet_model", models["comet_model"], "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL, env=environment())
    path = tmp_path / "killed/sft.csv"
    process = subprocess.Popen([*command, str(path.parent)], stdout=subprocess.DEVNULL, env=environment())
    while not path.is_file() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(read(path)) < 8
    again = subprocess.run(
        [*command, str(path.parent)], check=True, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert again.stdout.count("already scored") >= 1
    assert path.read_bytes() == (tmp_path / "whole/sft.csv").read_bytes()


@pytest.mark.slow
@needs_comet
def test_models_that_cannot_be_used(tmp_path, models):
    folder = write_generations(tmp_path / "base", {"0_shot/flores.jsonl": make_rows("mt", "flores", 3, 1)})

    def refused(message, metric, **arguments):
        arguments |= {"generations": [folder], "model": "m", "output_dir": tmp_path / "out", "metrics": [metric]}
        assert re.search(f"^error: .*{message}", call(1, **arguments))
        assert not (tmp_path / "out/base.csv").exists()

    comet, kiwi = models["comet_model"], models["cometkiwi_model"]
    refused(r"none does not exist\n.*--comet_model", "comet22", comet_model=str(tmp_path / "none"))
    refused(r"is no COMET checkpoint: there is no .*model\.ckpt", "comet22", comet_model=str(tmp_path))
    refused(r"RegressionMetric that needs references\n.*--cometkiwi_model", "cometkiwi22", cometkiwi_model=comet)
    refused(r"UnifiedMetric that reads no references\n.*--comet_model", "comet22", comet_model=kiwi)
    broken = tmp_path / "broken"
    shutil.copytree(comet, broken)
    (broken / "checkpoints/model.ckpt").write_bytes(b"x")
    refused(r"model\.ckpt cannot be loaded: .*\n.*xlm-roberta-large", "comet22", comet_model=str(broken))


@pytest.mark.slow
@needs_comet
def test_models_of_the_hub_are_named_with_their_revision(tmp_path, models, monkeypatch):
    """Without a network, from a cache laid out as huggingface_hub's."""
    hub, revision = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    cached = hub / "models--Unbabel--wmt22-comet-da"
    shutil.copytree(models["comet_model"], cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_generations(tmp_path / "base", {"0_shot/flores.jsonl": make_rows("mt", "flores", 20, 1)})
    arguments = {"generations": [folder], "model": "m"}
    call(**arguments, output_dir=tmp_path / "hub_out", metrics=["comet22"])
    call(**arguments, output_dir=tmp_path / "local_out", comet_model=models["comet_model"])
    (row,), (local,) = read(tmp_path / "hub_out/base.csv"), read(tmp_path / "local_out/base.csv")
    assert row["signature"].startswith(f"model:Unbabel/wmt22-comet-da|revision:{revision}|bs:1000|")
    assert row["score"] == local["score"]
    refused = call(1, **arguments, output_dir=tmp_path / "hub_out", metrics=["cometkiwi22"])
    assert re.search(r"Unbabel/wmt22-cometkiwi-da cannot be had .*\n.*--cometkiwi_model", refused)


def test_without_comet(tmp_path):
    """The script answers where COMET is not; what it does not know, it refuses."""

    def run(*words):
        command = [sys.executable, str(ROOT / "results/score_comet.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    help_text = run("--help")
    assert help_text.returncode == 0 and "--cometkiwi_model" in help_text.stdout
    wrong = run("--comet", "x")
    assert wrong.returncode == 2 and "unrecognized arguments: --comet" in wrong.stderr
    refused = run("--generations", "g")
    assert refused.returncode == 1 and "bash install.sh comet" in refused.stderr
