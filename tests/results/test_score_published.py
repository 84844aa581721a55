"""score_published.py: saved files taken apart, what is what, the original's own scores, and the committed figures."""

import csv
import os
import re
import shutil
from pathlib import Path

import pandas
import pytest
import sacrebleu

from results.published import score_published as published
from results.published.score_published import RECORDED, Case, place_utterances, read_saved, score_published, sort_out
from towerspeech import metrics
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.languages import LANGUAGES
from towerspeech.results_table import COLUMNS, TEST_SET, write_results
from towerspeech.results_table import read_results as read_frame

COMMITTED = Path(__file__).parents[2] / "results/published"
HEADER = "Data Path, Model Path: /data/prompts.json ... /models/tiny/1000"
RECORD = "Results bleu: {'bleu': 0.25, 'precisions': [0.5, 0.1]} results chrF: {'score': 54.5, 'char_order': 6}"
COMET = " results comet:{'mean_score': 0.75, 'scores': [0.7, 0.8]}"
ENGLISH = [
    "The captain paints a red boat.",
    "Seven children like green apples.",
    "My sister finds the quiet garden.",
    "Rain falls near the old station today.",
]
GERMAN = [
    "Der Kapitän malt ein Boot.",
    "Sieben Kinder mögen Äpfel.",
    "Sie findet den Garten.",
    "Heute regnet es dort.",
]


def save(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def read_results(path: Path) -> list[dict[str, str]]:
    return read_frame(path).to_dict("records")


# --- Taking files apart ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "runs"),
    [
        (" a\n b\n", [([" a", " b"], [])]),
        (f" a\n\n{RECORD}", [([" a", ""], [{"bleu": 25.0, "chrf2": 54.5}])]),
        (f" a\n b\n{RECORD}{COMET}", [([" a", " b"], [{"bleu": 25.0, "chrf2": 54.5, "comet22": 0.75}])]),
        ("\n\n a\nResults wer: 0.5 \n", [(["", "", " a"], [{"wer": 0.5}])]),
        # Glued to a header, to two, and to the score of the run before.
        (f"{HEADER} a\n b\n{HEADER}{RECORD} results comet: ", [([" a", " b"], [{"bleu": 25.0, "chrf2": 54.5}])]),
        (f"{HEADER}{HEADER} a\n{HEADER}{RECORD}", [([" a"], [{"bleu": 25.0, "chrf2": 54.5}])]),
        (
            f" a\n{RECORD} b\n{RECORD}",
            [([" a"], [{"bleu": 25.0, "chrf2": 54.5}]), ([" b"], [{"bleu": 25, "chrf2": 54.5}])],
        ),
        (f"{HEADER} a\n{HEADER} b\nResults wer: 1.5", [([" a"], []), ([" b"], [{"wer": 1.5}])]),
        (
            f"{HEADER} a\n{HEADER}{RECORD} results comet: {HEADER}{RECORD}{COMET.replace(':', ': ', 1)} ",
            [([" a"], [{"bleu": 25.0, "chrf2": 54.5}, {"bleu": 25.0, "chrf2": 54.5, "comet22": 0.75}])],
        ),
        ("", []),
    ],
)
def test_a_saved_file_is_taken_apart(tmp_path, text, runs):
    saved = read_saved(save(tmp_path, "file", text), "file")
    assert [(run.hypotheses, run.records) for run in saved.runs] == runs


def test_a_score_without_outputs_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="no outputs before it"):
        read_saved(save(tmp_path, "file", RECORD), "file")
    (tmp_path / "latin").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_saved(tmp_path / "latin", "latin")


def test_every_row_of_saved_files_is_of_a_system_and_test_set_of_the_committed_figures():
    known = published.read_known()
    accounts = {row["file"]: row for row in read_table(COMMITTED / "files.tsv")}
    assert known.keys() <= accounts.keys()
    for name, row in known.items():
        assert accounts[name]["outcome"] == (
            "scored" if row["references"] else "reported" if row["task"] else "no score"
        )
        if row["task"]:
            assert accounts[name]["csv"] == f"{row['mixture']}/{row['checkpoint']}.csv"
    unnamed = {name for name, row in known.items() if row["mixture"] in ("unnamed", "base") and row["task"]}
    for name in unnamed:  # files of two models may meet there: no line joins them
        assert not known[name]["checkpoint"].isdigit() and known[name]["checkpoint"] != "base"


TEXTS = published.Texts(dict.fromkeys(LANGUAGES, ["a", "b"]), ["a"], [])
KNOWN = published.read_known()


def test_raw_few_shot_text_is_cut_and_others_are_left_as_they_are(tmp_path):
    raw = " German: eins\\nGerman: zwei\nGerman text: drei\n"
    name = "En-De_outputs_tinyllama_llama/2250_wmt_few.txt"
    cut = sort_out(read_saved(save(tmp_path, "raw", raw), name), TEXTS, KNOWN)
    assert cut.hypotheses == ["eins", "drei"]
    whole = sort_out(read_saved(tmp_path / "raw", "MT/0_shot/flores_de-en"), TEXTS, KNOWN)
    assert whole.hypotheses == [" German: eins\\nGerman: zwei", "German text: drei"]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("MT/0_shot/flores_de-en", "", "empty"),
        ("MT/0_shot/flores_de-en", " a\n b\n c\n", "3 lines, for 2 references"),
        ("ASR/3000/ASR_5to1_fleurs.txt", " a\n b\n", "2 lines, for 0 references"),
        ("notes.txt", " a\n b\n", "not known"),
        ("ASR/1500/ASR_vox.txt", " a\n b\n", "no recorded score"),
    ],
)
def test_a_file_without_scores_says_why(tmp_path, name, text, why):
    case = sort_out(read_saved(save(tmp_path, "file", text), name), TEXTS, KNOWN)
    assert why in case.note and case.facts is None and case.csv == ""


def test_utterances_are_placed_by_their_best_transcript():
    good = [
        "seven children like green apple",
        "seven children liked apples",
        "x x x",
        "near the old station rain",
    ]
    other = ["x", "x", "my sister finds a garden", "x"]
    assert place_utterances([good, other], ENGLISH) == [1, 1, 2, 3]
    assert place_utterances([good, ["x"] * 4], ENGLISH) == []  # the third is like no sentence
    assert place_utterances([], ENGLISH) == []


def test_a_record_of_other_outputs_is_not_reported(tmp_path):
    other = RECORD.replace("0.25", "0.26")
    path = save(tmp_path, "file", f" a\n{RECORD} results comet: {other}{COMET}")
    saved = read_saved(path, "MT/0_shot/flores_de-en")
    case = Case(saved, "", dict.fromkeys(TEST_SET, "x"), [" a"], ["a"])
    ours = [metrics.Score(metric, score, 0.0, 99.0, 1, "s") for metric, score in (("bleu", 25.0), ("chrf2", 54.5))]
    assert list(published.make_rows(case, ours)["metric"]) == ["bleu", "chrf2"]
    rows = published.compare_recorded(case, {"bleu": 25.0, "chrf2": 54.5})
    answers = {(row[2], row[3]): (row[5], "not saved" in row[6]) for row in rows}
    assert answers == {
        ("bleu", "25.0"): ("yes", False),
        ("bleu", "26.0"): ("no", True),
        ("chrf2", "54.5"): ("yes", True),
        ("comet22", "0.75"): ("", True),
    }


# --- A whole folder -------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Made-up saved outputs of two systems, one of them doubled, and references."""
    for language in LANGUAGES.values():
        lines = {"en": ENGLISH, "de": GERMAN}.get(language.code, ["x"] * len(ENGLISH))
        save(tmp_path, f"flores/devtest/{language.flores}.devtest", "\n".join(lines) + "\n")
    save(tmp_path, "wmt23/generaltest2023.en-de.ref.refA.de", "Eins.\nZwei.\n")
    outputs = [" " + line.replace("red", "blue") for line in ENGLISH]
    bleu, chrf = sacrebleu.corpus_bleu(outputs, [ENGLISH]).score, sacrebleu.corpus_chrf(outputs, [ENGLISH]).score
    record = f"Results bleu: {{'bleu': {bleu / 100}, 'x': [1]}} results chrF: {{'score': {chrf}, 'beta': 2}}{COMET}"
    once = "\n".join(outputs) + "\n" + record
    save(tmp_path, "outputs/MT/5_shot/3000/flores_5to1_de-en", once)
    save(tmp_path, "outputs/MT/5_shot/3000/flores_5to1_fr-en", once + once)
    save(tmp_path, "outputs/MT/5_shot/base/flores_base_en-de", "\n".join(GERMAN) + "\n")
    save(tmp_path, "outputs/MT/5_shot/base2/flores_base_en-de", "\n".join(GERMAN) + "\n")
    save(tmp_path, "outputs/ASR/3000/ASR_5to1_ls_clean.txt", " a\n\nResults wer: 0.5 \n")
    save(tmp_path, "outputs/MT/0_shot/flores_de-en", "")
    return {name: tmp_path / name for name in ("outputs", "flores", "wmt23")} | {"output_dir": tmp_path / "out"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.[ct]sv")}


def test_a_folder_is_scored_and_every_file_accounted_for(folders, capsys):
    score_published(**folders, workers=1)
    out = folders["output_dir"]
    assert set(contents(out)) == {"5to1/3000.csv", "base/no_run_base.csv", "files.tsv", "recorded.tsv"}
    rows = read_results(out / "5to1/3000.csv")
    path = folders["outputs"] / "MT/5_shot/3000/flores_5to1_de-en"
    scores = {row["metric"]: row for row in rows if row["generations_sha256"] == hash_file(path)}
    outputs = path.read_text().split("\n")[:4]
    assert float(scores["bleu"]["score"]) == sacrebleu.corpus_bleu(outputs, [ENGLISH]).score
    assert (scores["comet22"]["score"], scores["comet22"]["ci_low"], scores["comet22"]["n"]) == ("0.75", "", "4")
    [wer] = [row for row in rows if row["task"] == "asr"]
    assert (wer["metric"], wer["score"], wer["n"]) == ("wer", "0.5", "2") and wer["signature"].startswith("reported|")
    accounts = {row["file"]: row for row in read_table(out / "files.tsv")}
    assert {name: row["outcome"] for name, row in accounts.items()} == {
        "ASR/3000/ASR_5to1_ls_clean.txt": "reported",
        "MT/0_shot/flores_de-en": "no score",
        "MT/5_shot/3000/flores_5to1_de-en": "scored",
        "MT/5_shot/3000/flores_5to1_fr-en": "scored",
        "MT/5_shot/base/flores_base_en-de": "scored",
        "MT/5_shot/base2/flores_base_en-de": "no score",
    }
    assert accounts["MT/5_shot/base2/flores_base_en-de"]["note"].startswith("the same bytes as MT/5_shot/base/")
    recorded = [row for row in read_table(out / "recorded.tsv") if row["metric"] in ("bleu", "chrf2")]
    assert [row["equal"] for row in recorded] == ["yes"] * 6  # one run, and two
    assert "recorded bleu: 3 equal to ours, 0 not" in capsys.readouterr().out
    assert not any(word.encode() in data for data in contents(out).values() for word in ("captain", "Kapit", "Sieben"))


def test_scoring_again_gives_the_same_files_and_those_of_what_changed(folders):
    score_published(**folders, workers=1)
    out, before = folders["output_dir"], contents(folders["output_dir"])

    # As a killed run leaves it: a CSV lacks, another is half there under a temporary name.
    (out / "5to1/3000.csv").unlink()
    save(out, "base/.tmp-no_run_base.csv-1-abc", "half")
    score_published(**folders, workers=1)
    assert contents(out) == before and not list(out.rglob(".tmp-*"))

    path = folders["outputs"] / "MT/5_shot/base/flores_base_en-de"
    save(path.parent, path.name, "\n".join(reversed(GERMAN)) + "\n")
    save(folders["outputs"], "MT/5_shot/base2/flores_base_en-de", "")
    score_published(**folders, workers=2)
    hashes = {row["generations_sha256"] for row in read_results(out / "base/no_run_base.csv")}
    assert hashes == {hash_file(path)} and contents(out)["5to1/3000.csv"] == before["5to1/3000.csv"]


def test_a_csv_that_is_not_of_these_outputs_and_missing_folders_are_refused(folders, tmp_path):
    write_results(folders["output_dir"] / "other/1.csv", pandas.DataFrame(columns=list(COLUMNS)))
    with pytest.raises(UserError, match="other/1.csv is not of these outputs"):
        score_published(**folders)
    with pytest.raises(UserError, match="deu_Latn|does not exist"):
        score_published(**folders | {"flores": tmp_path / "nowhere"})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        score_published(**folders | {"outputs": tmp_path / "nothing"})


# --- The committed figures ------------------------------------------------------------------------
def test_committed_files_hold_figures_alone_and_agree_with_each_other():
    rows = {path.relative_to(COMMITTED).as_posix(): read_results(path) for path in sorted(COMMITTED.rglob("*.csv"))}
    accounts = read_table(COMMITTED / "files.tsv")
    assert {row["csv"] for row in accounts} - {""} == set(rows)
    for row in (row for table in rows.values() for row in table):
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-\d+)?", row["score"]) and row["n"].isdigit()
        assert all(re.fullmatch(r"[\w.-]*", row[name]) for name in TEST_SET)
        assert row["signature"].startswith(("reported|", "nrefs:1|", "level:", "count|"))
        assert (row["ci_low"] == "") == row["signature"].startswith(("reported|", "count|"))
    for row in accounts:
        held = {
            r["signature"].startswith("reported|")
            for r in rows.get(row["csv"], [])
            if r["generations_sha256"] == row["sha256"]
        }
        expected = {
            "scored": ({False}, {False, True}),
            "reported": ({True},),
            "no score": (set(), {True}, {False, True}),
        }
        assert held in expected[row["outcome"]] or row["note"].startswith("the same bytes")


def test_readme_states_the_committed_counts():
    text = (COMMITTED / "README.md").read_text(encoding="utf-8")
    accounts, recorded = (read_table(COMMITTED / name) for name in ("files.tsv", "recorded.tsv"))
    assert f"the {len(accounts)} files" in text
    for metric, name in (("bleu", "BLEU"), ("chrf2", "chrF2")):
        files = {row["file"] for row in recorded if row["metric"] == metric}
        equal = {row["file"] for row in recorded if row["metric"] == metric and row["equal"] == "yes"}
        assert f"| {name} | {len(files)} | {len(equal)} |" in text
    unequal = {row["file"] for row in recorded if row["equal"] == "no"}
    assert unequal == {"En-De_outputs_tinyllama_llama/vllm_greedy/vllm_llama_flores_5"}
    for row in accounts:  # each file out of the ordinary is named, or its kind is
        if row["outcome"] == "no score" and "vox" not in row["file"]:
            assert Path(row["file"]).name in text


# --- With the original's files --------------------------------------------------------------------
DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set: no saved outputs to score")


def real(tmp_path: Path) -> dict[str, Path]:
    root = Path(DATA)
    return {"flores": root / "flores200", "wmt23": root / "wmt23", "output_dir": tmp_path / "out"}


@needs_data
def test_the_originals_own_scores_come_out(tmp_path):
    names = (
        "MT/5_shot/3000/flores_5to1_de-en",
        "MT/5_shot/3000/flores_base_zh-en",  # empty
        "MT/5_shot/5000/flores_5to1_en-de",  # a cascade
        "ASR/3000/ASR_5to1_fleurs.txt",
        "ASR/5000/ASR_prompt_fleurs_ST.txt",
        "En-De_outputs_tinyllama_llama/vllm_greedy/vllm_cpt_flores_5",  # glued
        "En-De_outputs_tinyllama_llama/vllm_greedy/vllm_llama_wmt_0",  # glued and doubled
    )
    for name in names:
        path = tmp_path / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(DATA) / "towerspeech_outputs" / name, path)
    score_published(outputs=tmp_path / "outputs", **real(tmp_path))

    rows = read_table(tmp_path / "out/recorded.tsv")
    assert tuple(rows[0]) == RECORDED
    compared = [row for row in rows if row["ours"]]
    assert len(compared) == 10 and {row["equal"] for row in compared} == {"yes"}
    assert all(float(row["ours"]) == pytest.approx(float(row["recorded"]), abs=1e-6) for row in compared)
    # Read with the eye in the files themselves.
    recorded = {(Path(row["file"]).name, row["metric"]): float(row["recorded"]) for row in rows}
    assert recorded["flores_5to1_de-en", "bleu"] == pytest.approx(44.142839914952997)
    assert recorded["flores_5to1_en-de", "bleu"] == pytest.approx(5.578339536174612)
    assert recorded["vllm_llama_wmt_0", "comet22"] == 0.7234041939089928
    assert recorded["ASR_5to1_fleurs.txt", "wer"] == 0.14207764952780694
    outcomes = {row["file"]: row["outcome"] for row in read_table(tmp_path / "out/files.tsv")}
    assert outcomes.pop("MT/5_shot/3000/flores_base_zh-en") == "no score" and set(outcomes.values()) == {"scored"}

    def keyed(path: Path, hashes: set[str]) -> dict[tuple, dict[str, str]]:
        held = [row for row in read_results(path) if row["generations_sha256"] in hashes]
        return {tuple(row[name] for name in (*TEST_SET, "metric")): row for row in held}

    hashes = {hash_file(tmp_path / "outputs" / name) for name in names}
    for path in (tmp_path / "out").rglob("*.csv"):
        found, committed = keyed(path, hashes), keyed(COMMITTED / path.relative_to(tmp_path / "out"), hashes)
        assert found.keys() == committed.keys()
        for key, row in found.items():
            for name in ("score", "ci_low", "ci_high"):
                values = [float(r.pop(name) or "nan") for r in (row, committed[key])]
                assert values[0] == pytest.approx(values[1], abs=1e-6, nan_ok=True)
            assert row == committed[key]


@needs_data
def test_committed_figures_are_of_the_saved_files_and_computed_as_they_would_be_now():
    root = Path(DATA)
    cases = published.read_cases(root / "towerspeech_outputs", root / "flores200", root / "wmt23")
    accounts = [tuple(row.values()) for row in read_table(COMMITTED / "files.tsv")]
    assert [published.account(case) for case in cases] == accounts
    expected, committed = set(), set()
    for case in cases:
        if case.references:
            signed = metrics.signatures(case.facts["task"], case.facts["tgt_lang"], published.METRICS)
            expected |= {(case.file.sha256, *row) for row in signed.items() if row[0] != "truncated"}
    for path in COMMITTED.rglob("*.csv"):
        rows = [row for row in read_results(path) if not row["signature"].startswith("reported|")]
        committed |= {(row["generations_sha256"], row["metric"], row["signature"]) for row in rows}
    assert committed == expected
