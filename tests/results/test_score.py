"""score.py on generations folders and on line files: published scores, merging, refusals, done-again, SIGKILL."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import pytest
import sacrebleu

from results.score import score
from towerspeech import metrics
from towerspeech.records import write_jsonl
from towerspeech.stage import UserError, hash_file

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
MT = {"task": "mt", "dataset": "flores", "shots": 0, "src_lang": "de", "tgt_lang": "en"}
ASR = {"task": "asr", "dataset": "clean", "shots": 0, "src_lang": "en", "tgt_lang": "en"}
TEXTS = ["the cat sat on the mat", "a dog ran home", "we all sing today"]
OUTPUTS = ["the cat sat on a mat", "a dog ran", "we all sing today"]


def generated(facts: dict, texts=OUTPUTS, references=TEXTS, **changes) -> list[dict]:
    return [
        {
            "id": f"{facts['dataset']}:{i}",
            **facts,
            "source": "x",
            "reference": reference,
            "prompt_sha256": "0",
            "text": text,
            "finish_reason": "stop",
            "num_tokens": 3,
            **changes,
        }
        for i, (text, reference) in enumerate(zip(texts, references, strict=True))
    ]


def write_generations(folder: Path, files: dict[str, list[dict]]) -> Path:
    """A checkpoint's folder as generate.py leaves it."""
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    outputs = {name: hash_file(folder / name) for name in files}
    (folder / "run_info.json").write_text(json.dumps({"outputs": outputs}))
    return folder


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def values(path: Path, **wanted) -> dict[str, str]:
    rows = (row for row in read(path) if all(row[name] == value for name, value in wanted.items()))
    return {row["metric"]: row["score"] for row in rows}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    files = {"0_shot/flores_de-en.jsonl": generated(MT), "asr/clean.jsonl": generated(ASR)}
    return write_generations(tmp_path / "gen" / "checkpoint-300", files)


# --- Scores ---------------------------------------------------------------------------------------
def test_scores_equal_the_libraries(tmp_path, checkpoint):
    base = write_generations(tmp_path / "gen" / "base", {"asr/clean.jsonl": generated(ASR, texts=["", "x", "x"])})
    score([checkpoint, base], "TowerSpeech", "5to1", tmp_path / "out")
    rows = read(tmp_path / "out/300.csv")
    assert tuple(rows[0]) == metrics.COLUMNS
    assert {(row["model"], row["mixture"], row["checkpoint"]) for row in rows} == {("TowerSpeech", "5to1", "300")}
    mt = values(tmp_path / "out/300.csv", task="mt")
    assert float(mt["bleu"]) == sacrebleu.corpus_bleu(OUTPUTS, [TEXTS]).score
    assert float(mt["chrf2"]) == sacrebleu.corpus_chrf(OUTPUTS, [TEXTS]).score
    asr = values(tmp_path / "out/300.csv", task="asr")
    assert float(asr["wer_basic"]) == jiwer.wer(TEXTS, OUTPUTS) == 2 / 14
    assert float(asr["wer_basic_deletions"]) == float(asr["wer_basic_substitutions"]) == 1 / 14
    assert asr["empty"] == asr["truncated"] == "0"
    assert values(tmp_path / "out/base.csv", task="asr")["empty"] == "1"
    hashes = {row["task"]: row["generations_sha256"] for row in rows}
    assert hashes["asr"] == hash_file(checkpoint / "asr/clean.jsonl")
    assert all(row["n"] == "3" and row["signature"] for row in rows)


@pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")
def test_line_files_give_the_published_wmt23_scores(tmp_path):
    root = Path(DATA) / "wmt23"
    with open(root / "published_scores.csv", encoding="utf-8") as file:
        published = [row for row in csv.DictReader(file) if row["pair"] == "de-en"]
    for row in published:
        hypotheses = root / "systems" / f"generaltest2023.de-en.hyp.{row['system']}.en"
        score(
            hypotheses=hypotheses,
            references=root / "generaltest2023.de-en.ref.refA.en",
            target_lang="en",
            model=row["system"],
            output=tmp_path / "wmt.csv",
        )
    assert len({row["model"] for row in read(tmp_path / "wmt.csv")}) == 3
    for row in published:
        found = values(tmp_path / "wmt.csv", model=row["system"])
        assert float(found["bleu"]) == pytest.approx(float(row["bleu_refA"]), abs=1e-6)
        assert float(found["chrf2"]) == pytest.approx(float(row["chrf_refA"]), abs=1e-6)


# --- Again ----------------------------------------------------------------------------------------
def test_scoring_again_is_a_no_op_that_says_so(tmp_path, checkpoint, capsys):
    score([checkpoint], "m", "5to1", tmp_path / "out")
    path = tmp_path / "out/300.csv"
    before = path.read_bytes(), path.stat().st_mtime_ns
    capsys.readouterr()
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert capsys.readouterr().out.count("already scored: ") == 2
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_changed_outputs_replace_their_rows_and_no_others(tmp_path, checkpoint, capsys):
    score([checkpoint], "m", "5to1", tmp_path / "out")
    path = tmp_path / "out/300.csv"
    rows = read(path)
    comet = dict(next(row for row in rows if row["metric"] == "bleu"), metric="comet22", score="0.8")
    metrics.write_results(path, [*rows, comet])  # as another scorer would have added it
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert values(path, task="mt")["comet22"] == "0.8"
    asr = values(path, task="asr")
    files = {"0_shot/flores_de-en.jsonl": generated(MT, texts=TEXTS), "asr/clean.jsonl": generated(ASR)}
    write_generations(checkpoint, files)
    capsys.readouterr()
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert capsys.readouterr().out.count("already scored: ") == 1
    found = values(path, task="mt")
    assert float(found["bleu"]) == pytest.approx(100) and "comet22" not in found  # COMET's was of other outputs
    assert values(path, task="asr") == asr


def test_rows_of_another_signature_are_computed_again(tmp_path, checkpoint, capsys):
    score([checkpoint], "m", "5to1", tmp_path / "out")
    path = tmp_path / "out/300.csv"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"|tok:13a|", b"|tok:intl|"))
    capsys.readouterr()
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert capsys.readouterr().out.count("already scored: ") == 1
    assert path.read_bytes() == whole


def test_the_order_of_scoring_does_not_show(tmp_path, checkpoint):
    score([checkpoint], "m", "5to1", tmp_path / "a")
    rows = read(tmp_path / "a/300.csv")
    (tmp_path / "b").mkdir()
    metrics.write_results(tmp_path / "b/300.csv", rows[::-1][:7])
    score([checkpoint], "m", "5to1", tmp_path / "b")
    assert (tmp_path / "a/300.csv").read_bytes() == (tmp_path / "b/300.csv").read_bytes()


def test_killed_and_run_again(tmp_path):
    files = {
        f"0_shot/set{i}.jsonl": generated({**MT, "dataset": f"set{i}"}, OUTPUTS * 150, TEXTS * 150) for i in range(6)
    }
    for rows in files.values():
        for number, row in enumerate(rows):
            row["id"] = str(number)
    folder = write_generations(tmp_path / "gen" / "sft", files)
    score([folder], "m", "5to1", tmp_path / "whole")
    command = [sys.executable, str(ROOT / "results/score.py"), "--generations", str(folder), "--model", "m"]
    command += ["--mixture", "5to1", "--output_dir", str(tmp_path / "killed")]
    path = tmp_path / "killed/sft.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (path.parent / ".tmp-sft.csv-1-abc").write_text("half")  # what a kill during a write leaves
    assert path.read_bytes() != (tmp_path / "whole/sft.csv").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "already scored" in again.stdout and "scored " in again.stdout
    assert path.read_bytes() == (tmp_path / "whole/sft.csv").read_bytes()
    assert not list(path.parent.glob(".tmp-*"))


# --- Refusals -------------------------------------------------------------------------------------
def test_unfinished_changed_missing_and_foreign_files(tmp_path, checkpoint):
    def refused(message):
        with pytest.raises(UserError, match=message):
            score([checkpoint], "m", "5to1", tmp_path / "out")
        assert not list(tmp_path.glob("out/*.csv"))

    path = checkpoint / "asr/clean.jsonl"
    whole = path.read_bytes()
    write_jsonl(checkpoint / "asr/other.jsonl", generated(ASR))
    refused(r"asr/other\.jsonl is not of the run")
    (checkpoint / "asr/other.jsonl").unlink()
    path.write_bytes(whole + b"\n")
    refused(r"asr/clean\.jsonl changed since it was generated")
    path.unlink()
    refused(r"asr/clean\.jsonl is gone")
    path.write_bytes(whole)
    (checkpoint / "run_info.json").unlink()
    refused(r"checkpoint-300 is not finished.*\n.*generate/generate\.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].pop("text"), r"clean\.jsonl:2: field 'text' is missing"),
        (lambda rows: rows[2].update(id="clean:0"), r"clean\.jsonl:3: id 'clean:0' is there twice"),
        (lambda rows: rows[1].update(shots=5), r"clean\.jsonl:2: shots is 5, above 0"),
        (lambda rows: rows[1].update(text=None), r"clean\.jsonl:2: text and reference must be strings"),
        (lambda rows: [row.update(tgt_lang="xx") for row in rows], r"clean\.jsonl: unknown language 'xx'"),
        (lambda rows: [row.update(task="st") for row in rows], r"clean\.jsonl: unknown task 'st'"),
        (lambda rows: [row.update(reference="?") for row in rows], r"clean\.jsonl: all 3 references are empty"),
    ],
)
def test_bad_generations(tmp_path, change, message):
    rows = generated(ASR)
    change(rows)
    folder = write_generations(tmp_path / "base", {"asr/clean.jsonl": rows})
    with pytest.raises(UserError, match=message):
        score([folder], "m", "5to1", tmp_path / "out")
    assert not list(tmp_path.glob("out/*.csv"))


def test_malformed_line_is_named(tmp_path, checkpoint):
    path = checkpoint / "asr/clean.jsonl"
    path.write_text(path.read_text().replace('{"id": "clean:1"', '{"id": "clean:1'))
    (checkpoint / "run_info.json").write_text(json.dumps({"outputs": {"asr/clean.jsonl": hash_file(path)}}))
    (checkpoint / "0_shot/flores_de-en.jsonl").unlink()
    with pytest.raises(UserError, match=r"clean\.jsonl:2: not JSON"):
        score([checkpoint], "m", "5to1", tmp_path / "out")


def test_one_test_set_in_two_files(tmp_path):
    folder = write_generations(tmp_path / "base", {"asr/a.jsonl": generated(ASR), "asr/b.jsonl": generated(ASR)})
    with pytest.raises(UserError, match=r"b\.jsonl and .*a\.jsonl hold the same test set"):
        score([folder], "m", "5to1", tmp_path / "out")


def test_two_folders_for_one_csv_and_a_csv_of_another_model(tmp_path, checkpoint):
    other = write_generations(tmp_path / "asr" / "checkpoint-300", {"asr/clean.jsonl": generated(ASR)})
    with pytest.raises(UserError, match="hold the same test set"):
        score([checkpoint, other], "m", "5to1", tmp_path / "out")
    write_generations(other, {"asr/clean.jsonl": generated({**ASR, "dataset": "noisy"})})
    score([checkpoint, other], "m", "5to1", tmp_path / "out")  # MT and ASR are generated apart
    assert {row["dataset"] for row in read(tmp_path / "out/300.csv")} == {"flores", "clean", "noisy"}
    with pytest.raises(UserError, match=r"300\.csv is of model 'm', not 'n'"):
        score([checkpoint], "n", "5to1", tmp_path / "out")


def test_line_files_of_different_number(tmp_path):
    (tmp_path / "h").write_text("a\n" * 41)
    (tmp_path / "r").write_text("a\n" * 42)
    with pytest.raises(UserError, match=r"41 hypotheses in .*h for 42 references in .*r"):
        score(hypotheses=tmp_path / "h", references=tmp_path / "r", target_lang="de", output=tmp_path / "o.csv")
    assert not (tmp_path / "o.csv").exists()


def test_other_references_are_another_score(tmp_path, capsys):
    for name, text in (("h", "a b c d e\n"), ("r", "a b c d e\n")):
        (tmp_path / name).write_text(text)
    args = dict(hypotheses=tmp_path / "h", references=tmp_path / "r", target_lang="de", output=tmp_path / "o.csv")
    score(**args)
    (tmp_path / "r").write_text("v w x y z\n")
    score(**args)
    assert float(values(tmp_path / "o.csv")["bleu"]) < 50
    assert len(read(tmp_path / "o.csv")) == 3  # bleu, chrf2, empty: replaced, not doubled
    score(**args, task="asr")
    assert len(read(tmp_path / "o.csv")) == 3 + len(metrics.signatures("asr", "de")) - 1  # nothing says "truncated"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generations": ["g"]},
        {"hypotheses": "h", "references": "r", "target_lang": "de"},
        {"hypotheses": "h", "references": "r", "output": "o"},
        {"generations": ["g"], "output_dir": "d", "hypotheses": "h"},
        {
            "generations": ["g"],
            "output_dir": "d",
            "hypotheses": "h",
            "references": "r",
            "target_lang": "de",
            "output": "o",
        },
    ],
)
def test_exactly_one_of_the_two_ways(arguments):
    paths = {
        k: [Path(v[0])] if k == "generations" else v if k == "target_lang" else Path(v) for k, v in arguments.items()
    }
    with pytest.raises(UserError, match="give either --generations"):
        score(**paths)


def test_command_line(tmp_path, checkpoint):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "results/score.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    base = write_generations(tmp_path / "gen" / "base", {"asr/clean.jsonl": generated(ASR)})
    done = call("--generations", checkpoint, base, "--model", "m", "--mixture", "x", "--output_dir", "out")
    assert done.returncode == 0 and (tmp_path / "out/300.csv").is_file() and (tmp_path / "out/base.csv").is_file()
    failed = call("--generations", tmp_path / "none", "--model", "m", "--output_dir", "out")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert call("--generation", base).returncode != 0
