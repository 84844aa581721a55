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
import pandas
import pytest
import sacrebleu
from sacrebleu.tokenizers import tokenizer_spm

from results import score as script
from results.score import score
from towerspeech import metrics
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.records import prompt_hash, write_jsonl
from towerspeech.results_table import COLUMNS, read_results, write_results

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
MT = {"task": "mt", "dataset": "flores", "shots": 0, "src_lang": "de", "tgt_lang": "en"}
ASR = {"task": "asr", "dataset": "clean", "shots": 0, "src_lang": "en", "tgt_lang": "en"}
TEXTS = ["the cat sat on the mat", "a dog ran home", "we all sing today"]
OUTPUTS = ["the cat sat on a mat", "a dog ran", "we all sing today"]


@pytest.fixture(autouse=True)
def sacrebleu_dir(tmp_path, monkeypatch) -> Path:
    """An empty cache of sacreBLEU's: whether this machine has spBLEU's model must not matter."""
    monkeypatch.setenv("SACREBLEU", str(tmp_path / "sacrebleu"))
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path / "sacrebleu"))
    return tmp_path / "sacrebleu"


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
    assert tuple(rows[0]) == COLUMNS
    assert {(row["model"], row["mixture"], row["checkpoint"]) for row in rows} == {("TowerSpeech", "5to1", "300")}
    mt = values(tmp_path / "out/300.csv", task="mt")
    assert float(mt["bleu"]) == sacrebleu.corpus_bleu(OUTPUTS, [TEXTS]).score
    assert float(mt["chrf2"]) == sacrebleu.corpus_chrf(OUTPUTS, [TEXTS]).score
    assert float(mt["chrf2++"]) == sacrebleu.corpus_chrf(OUTPUTS, [TEXTS], word_order=2).score
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
    rows = read_results(path)
    comet = rows[rows["metric"] == "bleu"].assign(metric="comet22", score="0.8")
    write_results(path, pandas.concat([rows, comet]))  # as another scorer would have added it
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
    rows = read_results(tmp_path / "a/300.csv")
    (tmp_path / "b").mkdir()
    write_results(tmp_path / "b/300.csv", rows[::-1][:7])
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


# --- Metrics --------------------------------------------------------------------------------------
def test_the_metrics_that_are_named_alone_and_others_beside_them_later(tmp_path, checkpoint, capsys):
    score([checkpoint], "m", "5to1", tmp_path / "out", metrics=["bleu,chrf"])
    path = tmp_path / "out/300.csv"
    assert set(values(path)) == {"bleu", "chrf2", "empty", "truncated"}  # none is for transcription
    path.write_text(path.read_text().replace(",bleu,", ",bleu,1"))  # to see whether it is computed again
    marked = values(path)["bleu"]
    score([checkpoint], "m", "5to1", tmp_path / "out", metrics=["chrf++", "wer"])
    found = values(path, task="mt")
    assert set(found) == {"bleu", "chrf2", "chrf2++", "empty", "truncated"} and found["bleu"] == marked
    assert {name.split("_")[0] for name in values(path, task="asr")} == {"wer", "runaway", "empty", "truncated"}
    capsys.readouterr()
    before = path.read_bytes()
    score([checkpoint], "m", "5to1", tmp_path / "out", metrics=["chrf2", "wer", "chrf2++"])
    assert capsys.readouterr().out.count("already scored: ") == 2 and path.read_bytes() == before
    score([checkpoint], "m", "5to1", tmp_path / "out")  # all: only CER is missing
    score([checkpoint], "m", "5to1", tmp_path / "whole")
    whole = (tmp_path / "whole/300.csv").read_bytes()
    assert path.read_bytes() == whole.replace(b",bleu,", b",bleu,1")


@pytest.mark.parametrize("task", ["st", "cascaded_st"])
def test_translated_speech_is_scored_as_translation(tmp_path, task):
    folder = write_generations(tmp_path / "base", {"st/fleurs.jsonl": generated({**MT, "task": task})})
    score([folder], "m", "5to1", tmp_path / "out")
    assert float(values(tmp_path / "out/base.csv", task=task)["bleu"]) == sacrebleu.corpus_bleu(OUTPUTS, [TEXTS]).score


def test_spbleu_is_told_of_or_refused_where_its_model_is_missing(tmp_path, checkpoint, sacrebleu_dir, capsys):
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert capsys.readouterr().out.count("no spBLEU: its model is not in sacreBLEU's cache; fetch it") == 1
    assert "spbleu" not in values(tmp_path / "out/300.csv")
    with pytest.raises(UserError, match=r"flores_de-en\.jsonl: spBLEU's .*model is not in sacreBLEU's cache"):
        score([checkpoint], "m", "5to1", tmp_path / "out", metrics=["spbleu"])
    from sentencepiece import SentencePieceTrainer

    model = sacrebleu_dir / "models" / "flores200sacrebleuspm"
    model.parent.mkdir(parents=True)
    with open(model, "wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=20, minloglevel=2)
    score([checkpoint], "m", "5to1", tmp_path / "out")
    assert "no spBLEU" not in capsys.readouterr().out
    expected = sacrebleu.corpus_bleu(OUTPUTS, [TEXTS], tokenize="flores200").score
    assert float(values(tmp_path / "out/300.csv", task="mt")["spbleu"]) == expected


def test_several_processes_write_the_same(tmp_path, monkeypatch):
    files = {}
    for i in range(3):
        rows = generated({**MT, "dataset": f"set{i}"}, OUTPUTS * 20, TEXTS * 20)
        files[f"0_shot/set{i}.jsonl"] = [{**row, "id": str(number)} for number, row in enumerate(rows)]
    folder = write_generations(tmp_path / "sft", files)
    score([folder], "m", "5to1", tmp_path / "one", processes=1)
    monkeypatch.setattr(script, "SEGMENTS_A_PROCESS", 60)
    score([folder], "m", "5to1", tmp_path / "two", processes=2)
    assert (tmp_path / "one/sft.csv").read_bytes() == (tmp_path / "two/sft.csv").read_bytes()


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
        (lambda rows: rows[1].update(text=None), r"clean\.jsonl:2: it has no text, but a text is wanted"),
        (
            lambda rows: rows[2].update(reference=["?"]),
            r"clean\.jsonl:3: its reference is a list, but a text is wanted",
        ),
        (lambda rows: [row.update(tgt_lang="xx") for row in rows], r"clean\.jsonl: unknown language 'xx'"),
        (lambda rows: [row.update(task="sum") for row in rows], r"clean\.jsonl: unknown task 'sum'"),
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


def test_a_language_without_a_tokenizer_is_named_before_anything_is_scored(tmp_path, checkpoint):
    files = {"0_shot/flores_en-ja.jsonl": generated({**MT, "src_lang": "en", "tgt_lang": "ja"})}
    other = write_generations(tmp_path / "gen" / "sft", files)
    with pytest.raises(UserError, match=r"flores_en-ja\.jsonl: unknown language 'ja'"):
        score([checkpoint, other], "m", "5to1", tmp_path / "out")
    assert not list(tmp_path.glob("out/*.csv"))


def write_prompts(folder: Path) -> tuple[Path, dict[str, list[dict]]]:
    """Prompts, and generations of them as generate.py writes them."""
    rows = [{"id": f"clean:{i}", "instruction": f"Hear {i}", "output": text} for i, text in enumerate(TEXTS)]
    write_jsonl(folder / "asr/clean.jsonl", rows)
    answers = [{**row, "prompt_sha256": prompt_hash(prompt)} for row, prompt in zip(generated(ASR), rows, strict=True)]
    return folder / "asr/clean.jsonl", {"asr/clean.jsonl": answers, "0_shot/flores_de-en.jsonl": generated(MT)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(instruction="Hear!"), "id 'clean:1' was generated from another prompt than .*:2"),
        (lambda rows: rows[2].update(output="x"), "id 'clean:2' has another reference than .*:3"),
        (lambda rows: rows[2].update(id="y"), "id 'clean:2' is none of the prompts from .*:1 on"),
        (lambda rows: rows.append({**rows[0], "id": "z"}), "clean.jsonl has no output for .*:4, id 'z'"),
    ],
)
def test_generations_of_other_prompts(tmp_path, change, message):
    path, files = write_prompts(tmp_path / "prompts")
    folder = write_generations(tmp_path / "gen" / "base", files)
    score([folder], "m", "5to1", tmp_path / "out", prompts=[path])
    assert (tmp_path / "out/base.csv").is_file()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    write_jsonl(path, rows)
    with pytest.raises(UserError, match=message):
        score([folder], "m", "5to1", tmp_path / "other", prompts=[path])
    assert not (tmp_path / "other").exists()
    path.rename(path.with_name("typo.jsonl"))
    with pytest.raises(UserError, match=r"--prompts has asr/typo\.jsonl, of which there are no generations"):
        score([folder], "m", "5to1", tmp_path / "other", prompts=[path.with_name("typo.jsonl")])


def test_metrics_that_cannot_be(tmp_path, checkpoint):
    def refused(message, **arguments):
        with pytest.raises(UserError, match=message):
            score([checkpoint], "m", "5to1", tmp_path / "out", **arguments)
        assert not list(tmp_path.glob("out/*.csv"))

    refused("unknown metric 'blue'\n.*bleu, chrf2", metrics=["bleu,blue"])
    refused("--processes is 0", processes=0)
    remedy = r"comet22 has a command of its own\n.*results/score_comet\.py.*bash install\.sh comet"
    refused(remedy, metrics=["bleu", "comet22"])
    write_generations(checkpoint, {"asr/clean.jsonl": generated(ASR)})
    (checkpoint / "0_shot/flores_de-en.jsonl").unlink()
    refused("none of bleu can be computed here", metrics=["bleu"])


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
    args = dict(hypotheses=tmp_path / "h", target_lang="de", output=tmp_path / "o.csv")
    with pytest.raises(UserError, match=r"41 hypotheses in .*h for 42 references in .*r"):
        score(references=tmp_path / "r", **args)
    assert not (tmp_path / "o.csv").exists()


def test_other_references_are_another_score(tmp_path, capsys):
    for name, text in (("h", "a b c d e\n"), ("r", "a b c d e\n")):
        (tmp_path / name).write_text(text)
    args = dict(hypotheses=tmp_path / "h", references=tmp_path / "r", target_lang="de", output=tmp_path / "o.csv")
    score(**args)
    (tmp_path / "r").write_text("v w x y z\n")
    score(**args)
    assert float(values(tmp_path / "o.csv")["bleu"]) < 50
    assert len(read(tmp_path / "o.csv")) == 4  # bleu, chrf2, chrf2++, empty: replaced, not doubled
    score(**args, task="asr")
    assert len(read(tmp_path / "o.csv")) == 4 + len(metrics.signatures("asr", "de")) - 1  # nothing says "truncated"


def test_line_files_of_one_name_in_two_folders_are_two_systems_and_two_test_sets(tmp_path, monkeypatch, capsys):
    for i, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "out.de").write_text(f"a b c d e{' f' * i}\n")
        (tmp_path / folder / "ref.de").write_text(f"a b c d e{' g' * i}\n")
    found = []
    for folder in "ab":
        monkeypatch.chdir(tmp_path / folder)  # each user names what is in their own folder
        for other in "ab":
            references = Path("../", other, "ref.de")
            score(hypotheses=Path("out.de"), references=references, target_lang="de", output=Path("../o.csv"))
            found.append((f"{folder}/out.de", f"{other}/ref.de"))
    rows = read(tmp_path / "o.csv")
    assert sorted({(row["model"], row["dataset"]) for row in rows}) == found and len(rows) == 4 * 4
    assert "in place of" not in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("b/out.de").write_text("a b c d e g\n")  # changed: its rows are replaced, and we are told
    score(hypotheses=Path("b/out.de"), references=Path("b/ref.de"), target_lang="de", output=Path("o.csv"))
    assert "in place of 4 rows of other outputs or references" in capsys.readouterr().out
    assert len(read(tmp_path / "o.csv")) == 4 * 4
    assert float(values(tmp_path / "o.csv", model="b/out.de", dataset="b/ref.de")["bleu"]) == pytest.approx(100)
    assert float(values(tmp_path / "o.csv", model="a/out.de", dataset="b/ref.de")["bleu"]) < 99


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generations": ["g"]},
        {"hypotheses": "h", "references": "r", "target_lang": "de"},
        {"hypotheses": "h", "references": "r", "output": "o"},
        {"generations": ["g"], "output_dir": "d", "hypotheses": "h"},
        {"hypotheses": "h", "references": "r", "target_lang": "de", "output": "o", "prompts": ["p"]},
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
        k: [Path(v[0])] if k in ("generations", "prompts") else v if k == "target_lang" else Path(v)
        for k, v in arguments.items()
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
    (tmp_path / "h").write_text("a b c d\n")
    lines = call(
        *("--hypotheses", "h", "--references", "h", "--target_lang", "de", "--metrics", "bleu,chrf"),
        *("--output", "o.csv"),
    )
    assert lines.returncode == 0 and "BLEU 100.00, chrF2 100.00" in lines.stdout
    failed = call("--generations", tmp_path / "none", "--model", "m", "--output_dir", "out")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert call("--generation", base).returncode != 0
