"""The tables' order, numbers and files; means, forgetting and figures; what is refused; same bytes again."""

import csv
import math
import re
import statistics
from pathlib import Path

import pandas
import pytest

from results import plots
from results import summarize as script
from results.summarize import summarize
from towerspeech import results_table
from towerspeech.errors import UserError
from towerspeech.results_table import COLUMNS

INTO_ENGLISH = ("de-en", "es-en", "fr-en")
FROM_ENGLISH = ("en-de", "en-es", "en-fr")
PUBLISHED = Path(__file__).parents[2] / "results/published"
FIGURES = ("scores.png", "comet.png", "forgetting.png", "wer_parts.png")


def write_results(path, rows):
    results_table.write_results(path, pandas.DataFrame(rows, columns=list(COLUMNS)))


def read_scores(folder):
    return script.read_scores(script.find_tables([folder], folder / "none"))


def table_lines(text):
    """The rows of Markdown tables, without the blanks that pad their cells."""
    return [re.sub(r" +", " ", line) for line in text.splitlines() if not re.fullmatch(r"\|[:|-]+\|", line)]


def lines_of(panel):
    """A panel's lines, by mixture, shots and whether others report them; each a list of points."""
    return {key: list(line.itertuples()) for key, line in panel.rows.groupby(["group", "shots", "reported"])}


def row(checkpoint, metric, score, task="mt", dataset="flores", shots="0", pair="de-en", model="tiny", mixture="ci"):
    src, tgt = pair.split("-")
    return {
        "model": model,
        "mixture": mixture,
        "checkpoint": checkpoint,
        "task": task,
        "dataset": dataset,
        "shots": shots,
        "src_lang": src,
        "tgt_lang": tgt,
        "metric": metric,
        "score": str(score),
        "ci_low": str(score * 0.9),
        "ci_high": str(score * 1.1),
        "n": "10",
        "signature": f"of {metric}",
        "generations_sha256": "0",
    }


def write_all(folder, checkpoints=("sft", "900", "base", "shuffled-units", "300", "1200")):
    folder.mkdir(parents=True)
    for i, checkpoint in enumerate(checkpoints):
        rows = [
            row(checkpoint, metric, i + j / 4, shots=shots, pair=pair)
            for j, metric in enumerate(("bleu", "chrf2"))
            for shots in ("5", "0")
            for pair in ("en-de", "de-en")
        ]
        for metric in ("wer_basic", "wer_english", "wer_english_insertions"):
            rows.append(row(checkpoint, metric, 0.25 + i / 100, task="asr", dataset="clean", pair="en-en"))
        rows.append(row(checkpoint, "empty", 3) | {"ci_low": "", "ci_high": ""})
        write_results(folder / f"{checkpoint}.csv", rows)
    return folder


def test_rows_columns_and_numbers(tmp_path, capsys):
    summarize([write_all(tmp_path / "results/tiny")], tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[4:10]] == ["base", "300", "900", "1200", "sft", "shuffled-units"]
    assert printed[0].split() == ["ASR", "ASR", *["flores"] * 8]
    assert printed[1].split() == ["clean", "clean", *["de-en", "de-en", "en-de", "en-de"] * 2]
    assert printed[2].split() == ["0-shot"] * 4 + ["5-shot"] * 4
    assert printed[3].split() == ["checkpoint", "WER", "WER", "basic", *["BLEU", "chrF2"] * 4]
    assert printed[4].split() == ["base", "27.0", "27.0", *["2.0", "2.2"] * 4]
    markdown = table_lines((tmp_path / "out/table.md").read_text())
    assert markdown[1] == "| base | 27.0 | 27.0 | 2.0 | 2.2 | 2.0 | 2.2 | 2.0 | 2.2 | 2.0 | 2.2 |"
    assert "- `bleu|of bleu`" in markdown
    with open(tmp_path / "out/table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["checkpoint"] == "900" and rows[2]["ASR_clean_wer_english"] == "0.26"
    assert rows[2]["flores_de-en_5-shot_chrf2"] == "1.25"


def test_its_own_tables_are_no_results_and_names_break_none(tmp_path):
    folder = tmp_path / "results"
    write_results(folder / "a.csv", [{**row("300", "bleu", 12.5), "model": name} for name in ("a|b", "c, d")])
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "a.csv").read_bytes())
    for output in ("summary", "another"):  # the second finds the first one's table.csv
        summarize([folder], folder / output)
    assert (folder / "summary/table.md").read_bytes() == (folder / "another/table.md").read_bytes()
    rows = [line for line in (folder / "summary/table.md").read_text().splitlines() if "12.5" in line]
    assert [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows] == [
        ["a\\|b 300", "12.5"],
        ["c, d 300", "12.5"],
    ]


def test_cer_leads_where_spaces_do_not_tell_words(tmp_path, capsys):
    rows = [
        row("300", metric, score, task="asr", dataset=code, pair=f"{code}-{code}")
        for code in ("ko", "en")
        for metric, score in (("wer_basic", 0.5), ("cer_basic", 0.125))
    ]
    write_results(tmp_path / "results/a.csv", rows)
    summarize([tmp_path / "results"], tmp_path / "out")
    assert (tmp_path / "out/table.md").read_text().count("12.5") == 1 and "CER basic" in capsys.readouterr().out


def test_missing_scores_are_dashes(tmp_path, capsys):
    folder = write_all(tmp_path / "results", ["base", "300"])
    write_results(folder / "300.csv", [row("300", "bleu", 12.34)])
    summarize([folder], tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[5].split() == ["300", "-", "-", "12.3", *"-------"]
    with open(tmp_path / "out/table.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file))[1]["ASR_clean_wer_basic"] == ""


def test_same_bytes_again_also_into_the_results_folder(tmp_path):
    folder = write_all(tmp_path / "results/tiny")
    names = ("table.md", "table.csv", "scores.png")
    for out in (tmp_path / "out", folder, folder):
        summarize([tmp_path / "results"], out)
    assert all((tmp_path / "out" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".tmp-*"))


def test_models_are_named_when_there_are_two(tmp_path, capsys):
    write_all(tmp_path / "results/tiny", ["base"])
    write_results(tmp_path / "results/b.csv", [row("base", "bleu", 50, model="big")])
    summarize([tmp_path / "results/tiny", tmp_path / "results"], tmp_path / "out")  # found twice, read once
    printed = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in printed[4:6]] == ["big base ", "tiny base"]


def test_one_score_in_two_files(tmp_path):
    folder = write_all(tmp_path / "results", ["base", "300"])
    (folder / "copy.csv").write_bytes((folder / "300.csv").read_bytes())
    with pytest.raises(UserError, match=r"copy\.csv:2: tiny ci 300 has its bleu on flores in .*/300\.csv too"):
        summarize([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def reported(row):
    return row | {"signature": "reported|recorded elsewhere", "ci_low": "", "ci_high": ""}


def write_wide(folder):
    """Two mixtures over three checkpoints, six pairs, two numbers of shots, and ASR; returns the BLEU by its place."""
    bleu = {}
    for i, mixture in enumerate(("5to1", "5to3")):
        for j, checkpoint in enumerate(("base", "300", "900")):
            rows = []
            for k, pair in enumerate((*INTO_ENGLISH, *FROM_ENGLISH)):
                for shots in ("0", "5"):
                    if (mixture, checkpoint, pair) == ("5to1", "900", "en-fr"):
                        continue  # one output was lost
                    score = 30 - 5 * i - (2 + i) * j + k + (shots == "5")
                    bleu[mixture, checkpoint, pair, shots] = score
                    rows.append(row(checkpoint, "bleu", score, pair=pair, shots=shots, mixture=mixture))
                    rows.append(row(checkpoint, "spbleu", score + 2, pair=pair, shots=shots, mixture=mixture))
                    rows.append(row(checkpoint, "comet22", score / 50, pair=pair, shots=shots, mixture=mixture))
            for dataset, wer in (("clean", 0.9 - 0.2 * j), ("other", 1.0 - 0.2 * j)):
                speech = dict(task="asr", dataset=dataset, pair="en-en", mixture=mixture)
                if mixture == "5to3":
                    rows.append(reported(row(checkpoint, "wer", wer + 1, **speech)))
                    continue
                rows.append(row(checkpoint, "wer_english", wer, **speech))
                for part, share in (("substitutions", 0.5), ("deletions", 0.125), ("insertions", 0.375)):
                    rows.append(row(checkpoint, f"wer_english_{part}", wer * share, **speech))
                rows.append(row(checkpoint, "runaway_english", 7, **speech) | {"ci_low": "", "ci_high": ""})
            rows.append(row(checkpoint, "bleu", 12, task="st", dataset="covost", pair="en-de", mixture=mixture))
            cascaded = dict(task="cascaded_st", dataset="covost", pair="en-de", mixture=mixture)
            rows.append(row(checkpoint, "bleu", 14, **cascaded))
            write_results(folder / mixture / f"{checkpoint}.csv", rows)
    return bleu


def test_wide_table_shows_means_by_direction(tmp_path, capsys):
    bleu = write_wide(tmp_path / "results")
    summarize([tmp_path / "results"], tmp_path / "out")
    blocks = [[line.split() for line in text.splitlines()] for text in capsys.readouterr().out.split("\n\n")]
    asr, flores, covost, _ = blocks
    assert [line[:2] for line in flores[4:]] == [[m, c] for m in ("5to1", "5to3") for c in ("base", "300", "900")]
    assert flores[1] == ["xx-en", "(3)"] * 2 + ["en-xx", "(3)"] * 2 + ["xx-en", "(3)"] * 2 + ["en-xx", "(3)"] * 2
    assert flores[3] == ["checkpoint", *["BLEU", "COMET"] * 4]  # spBLEU is in the files
    mean = statistics.mean(bleu["5to3", "900", pair, "0"] for pair in INTO_ENGLISH)
    assert flores[-1][2:4] == [f"{mean:.1f}", f"{2 * mean:.2f}"]
    lost = statistics.mean(bleu["5to1", "900", pair, "0"] for pair in FROM_ENGLISH[:2])
    assert flores[6][4:6] == [f"{lost:.1f}", "(2)"]  # of two pairs, and so it says
    assert asr[2] == ["checkpoint", "WER", "WER", "reported", "WER", "WER", "reported"]
    assert asr[3] == ["5to1", "base", "90.0", "-", "100.0", "-"] and asr[-1][2:] == ["-", "150.0", "-", "160.0"]
    assert covost[4] == ["5to1", "base", "12.0", "14.0"]

    sections = (tmp_path / "out/table.md").read_text().split("\n## ")
    pairs = table_lines(next(text for text in sections if text.startswith("flores 5-shot spBLEU\n")))
    names = [f"flores {pair} 5-shot spBLEU" for pair in (*INTO_ENGLISH, *FROM_ENGLISH)]
    assert pairs[2] == f"| checkpoint | {' | '.join(names)} |"
    numbers = (bleu.get(("5to1", "900", pair, "5")) for pair in (*INTO_ENGLISH, *FROM_ENGLISH))
    assert pairs[5] == f"| 5to1 900 | {' | '.join('-' if n is None else f'{n + 2:.1f}' for n in numbers)} |"
    errors = next(text for text in sections if text.startswith("Errors in transcription"))
    assert "| 5to1 300 | 35.0 | 8.8 | 26.2 | 7 | 40.0 | 10.0 | 30.0 | 7 |" in table_lines(errors)
    assert "- `wer|reported|recorded elsewhere`" in errors
    with open(tmp_path / "out/table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[-1]["ASR_other_wer_reported"] == str(1.0 - 0.2 * 2 + 1)
    assert rows[2]["flores_en-es_5-shot_bleu"] == str(bleu["5to1", "900", "en-es", "5"])
    assert rows[2]["flores_en-fr_5-shot_bleu"] == "" and rows[0]["ASR_clean_runaway_english"] == "7"
    assert rows[0]["cascaded_ST_covost_en-de_0-shot_bleu"] == "14"


def test_forgetting_is_the_change_since_base_on_shared_test_sets(tmp_path):
    bleu = write_wide(tmp_path / "results")
    scores = read_scores(tmp_path / "results")
    changes, rates = script.forgetting(scores)
    assert list(lines_of(changes)) == [
        (mixture, shots, False) for mixture in ("5to1", "5to3") for shots in ("0-shot", "5-shot")
    ]
    for (mixture, shots, _), points in lines_of(changes).items():
        shared = [p for p in (*INTO_ENGLISH, *FROM_ENGLISH) if (mixture, p) != ("5to1", "en-fr")]
        assert [point.checkpoint for point in points] == ["base", "300", "900"]
        for point in points:
            means = [
                statistics.mean(bleu[mixture, checkpoint, pair, shots[0]] for pair in shared)
                for checkpoint in (point.checkpoint, "base")
            ]
            assert point.value == pytest.approx(means[0] - means[1])
    assert rates.title.endswith("mean of clean, other")
    assert list(lines_of(rates)) == [("5to1", "", False), ("5to3", "", True)]
    assert [point.value for point in lines_of(rates)["5to1", "", False]] == pytest.approx([95, 75, 55])
    assert [point.value for point in lines_of(rates)["5to3", "", True]] == pytest.approx([195, 175, 155])


def test_forgetting_without_a_base(tmp_path):
    folder = tmp_path / "results"
    for checkpoint, score in (("300", 30), ("900", 28), ("sft", 31), ("control", 1)):
        speech = row(checkpoint, "wer_english", score / 100, task="asr", dataset="clean", pair="en-en")
        shuffled = speech | {"dataset": "clean_shuffled", "score": "1"}
        write_results(folder / f"{checkpoint}.csv", [row(checkpoint, "bleu", score), speech, shuffled])
    scores = read_scores(folder)
    changes, rates = script.forgetting(scores)
    [points] = lines_of(changes).values()
    assert [(point.checkpoint, point.value) for point in points] == [("300", 0), ("900", -2), ("sft", 1)]
    assert [point.note for point in points] == ["since 300", "", ""]
    [points] = lines_of(rates).values()
    assert [point.value for point in points] == pytest.approx([30, 28, 31])
    assert rates.title.endswith("mean of clean")


def test_each_line_says_what_its_change_is_since(tmp_path):
    folder = tmp_path / "results"
    for mixture, checkpoints in (("5to1", ("base", "300")), ("5to3", ("300", "900"))):
        rows = [row(checkpoint, "bleu", 9, mixture=mixture) for checkpoint in checkpoints]
        rows.append(row("300", "wer_english", 0.5, task="asr", dataset="clean", pair="en-en", mixture=mixture))
        write_results(folder / f"{mixture}.csv", rows)
    scores = read_scores(folder)
    lines = lines_of(script.forgetting(scores)[0])
    notes = {mixture: [point.note for point in points] for (mixture, *_), points in lines.items()}
    assert notes == {"5to1": ["since base", ""], "5to3": ["since 300", ""]}


def test_no_line_joins_published_outputs_that_may_be_of_two_models():
    """Of the committed figures: `unnamed` and `base` are no training runs, their scores are points alone."""
    scores = read_scores(PUBLISHED)
    changes, rates = script.forgetting(scores)
    assert set(changes.rows["group"]) == {"TowerSpeech 5to1"}
    panels = [*script.score_panels(scores, "wer_english", ""), *script.score_panels(scores, "bleu", "")]
    groups = {group for panel in panels for group in panel.rows["group"]}
    shared = set(scores["group"][scores["mixture"].isin(["unnamed", "base"])])
    assert shared == {"TowerSpeech base", "TowerSpeech unnamed", "tinyllama_llama unnamed"} <= groups
    points = pandas.concat([panel.rows for panel in (changes, rates, *panels)])
    joined = points["checkpoint"].map(plots.is_trained).astype(bool)
    assert joined.any() and not shared & set(points["group"][joined])


def test_panels_are_means_by_direction(tmp_path):
    bleu = write_wide(tmp_path / "results")
    write_results(tmp_path / "results/other.csv", [row("300", "bleu", 99, pair="en-de", mixture="bilingual")])
    scores = read_scores(tmp_path / "results")
    panels = {panel.title: panel for panel in script.score_panels(scores, "bleu", "BLEU")}
    assert list(panels) == [
        *("flores xx-en (3): BLEU", "flores en-xx (3): BLEU"),
        *("ST covost en-de: BLEU", "cascaded ST covost en-de: BLEU"),
    ]
    lines = lines_of(panels["flores en-xx (3): BLEU"])
    of_all = {(mixture, shots, False) for mixture in ("5to1", "5to3") for shots in ("0-shot", "5-shot")}
    assert set(lines) == of_all  # of one pair in three: none
    for (mixture, shots, _), points in lines.items():
        for point in points:
            pairs = [pair for pair in FROM_ENGLISH if (mixture, point.checkpoint, pair, shots[0]) in bleu]
            mean = statistics.mean(bleu[mixture, point.checkpoint, pair, shots[0]] for pair in pairs)
            assert point.value == pytest.approx(mean) and math.isnan(point.low)
            assert point.note == ("2/3" if (mixture, point.checkpoint) == ("5to1", "900") else "")
    point = panels["ST covost en-de: BLEU"].rows.iloc[0]
    assert list(point[["value", "low", "high"]]) == pytest.approx((12, 12 * 0.9, 12 * 1.1))
    lines = lines_of(script.score_panels(scores, "wer_english", "WER, %")[0])
    assert list(lines) == [("5to1", "", False), ("5to3", "", True)]
    assert [points[1].value for points in lines.values()] == pytest.approx([70, 170])


def test_bars_are_the_parts_of_wer(tmp_path):
    write_wide(tmp_path / "results")
    scores = read_scores(tmp_path / "results")
    clean, other = (panel.rows for panel in script.error_bars(scores))
    assert list(clean["name"]) == ["base", "300", "900"]  # of 5to3 there are reported scores alone
    assert list(clean[script.WER_PARTS].sum(axis=1)) == pytest.approx([90, 70, 50])
    assert list(other[script.WER_PARTS].iloc[0]) == pytest.approx((50, 12.5, 37.5))
    assert other["above"][0] == "100.0\n(7)"


def test_figures_are_there_where_there_are_scores_for_them(tmp_path):
    out = tmp_path / "out"
    write_wide(tmp_path / "wide")
    summarize([tmp_path / "wide"], out)
    images = {name: (out / name).read_bytes() for name in FIGURES}
    assert all(image.startswith(b"\x89PNG") and b"matplotlib" not in image for image in images.values())
    summarize([tmp_path / "wide"], out)
    assert images == {name: (out / name).read_bytes() for name in FIGURES}
    write_results(tmp_path / "narrow/base.csv", [row("base", "bleu", 12)])
    summarize([tmp_path / "narrow"], out)  # what no longer belongs there goes
    assert [name for name in FIGURES if (out / name).exists()] == ["scores.png"]
    asr = row("base", "wer_english", 0.5, task="asr", dataset="clean", pair="en-en")
    write_results(tmp_path / "narrow/base.csv", [row("base", "chrf2", 12), asr])
    summarize([tmp_path / "narrow"], out)
    assert [name for name in FIGURES if (out / name).exists()] == ["scores.png"]
    write_results(tmp_path / "narrow/base.csv", [row("base", "chrf2", 12)])
    summarize([tmp_path / "narrow"], out)
    assert not [name for name in FIGURES if (out / name).exists()]


def test_positions_are_steps():
    at, space = plots.positions({"1500", "base", "sft", "5000", "control"})
    assert (at["base"], at["1500"], at["5000"]) == (0, 1500, 5000)
    assert 5000 < at["sft"] < at["control"] == at["sft"] + space
    assert plots.positions({"b", "a"})[0] == {"a": 1, "b": 2}


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="does not exist\n.*results/score.py"):
        summarize([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no CSV below"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "empty/x.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"x\.csv:1: no results CSV"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    write_results(tmp_path / "empty/x.csv", [row("base", "bleu", 1) | {"score": "12,3"}])
    with pytest.raises(UserError, match=r"x\.csv:2: score or interval is no number"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    write_results(tmp_path / "empty/x.csv", [row("base", "bleu", 1) | {"score": "nan"}])
    with pytest.raises(UserError, match=r"x\.csv:2: score or interval is no number"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    write_results(tmp_path / "empty/x.csv", [row("base", "empty", 1)])
    with pytest.raises(UserError, match="no wer_english, cer_basic, wer_basic, wer, bleu, .* in 1 CSVs"):
        summarize([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
