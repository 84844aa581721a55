"""Put the scores of all checkpoints into one table and a few plots.

Usage: python results/summarize.py --results results/TowerSpeech --output_dir results/TowerSpeech/summary

Reads every results CSV (results/score.py) below the given folders.
Prints the table, and writes
  table.md        the table; for many language pairs their means by direction first (xx-en, en-xx), then every pair
  table.csv       every score of every metric, in full: one row a system
  scores.png      WER and BLEU by training step and mixture, a panel a test set and direction, with 95% intervals
  comet.png       the same for COMET-22
  forgetting.png  change of MT's mean BLEU since the base model (or the first checkpoint), above the mean WER
  wer_parts.png   WER's substitutions, deletions and insertions
the last three only where there are scores for them. Rows: base, the checkpoints by step, sft, then others such as
control systems. WER is in percent, under Whisper's English and Basic normalizers; COMET times 100. A score that is not
there is a dash; one that was not computed here but reported by others says so.
"""

import math
from pathlib import Path

from results.plots import Panel, draw_bars, draw_lines
from towerspeech import results_table
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, locked, publish
from towerspeech.metrics import CER_LEADS
from towerspeech.results_table import METRICS, REPORTED, checkpoint_order, read_results
from towerspeech.stage import record

RATES = ("wer_english", "cer_basic", "wer_basic", "wer")
SHOWN = (*RATES, "bleu", "chrf2", "chrf2++", "spbleu", "comet22", "cometkiwi22")
MAIN = ("wer_english", "cer_basic", "wer", "bleu", "chrf2", "comet22")  # what a wide table shows on the terminal
WER_PARTS = ["wer_english_substitutions", "wer_english_deletions", "wer_english_insertions"]
COUNTED = (*WER_PARTS, "runaway_english", "empty", "truncated")
TASKS = {"asr": "ASR", "mt": "", "st": "ST", "cascaded_st": "cascaded ST"}
SYSTEM = list(results_table.SYSTEM)
COLUMN = ["task", "dataset", "shots", "pair", "metric", "reported"]  # of a table
NUMBERS = ["score", "ci_low", "ci_high"]
WIDE = 16  # a table of more columns shows means over language pairs


# --- Reading --------------------------------------------------------------------------------------
def find_tables(folders: list[Path], output_dir: Path) -> list[Path]:
    """All results CSVs below the folders.

    Raises:
        UserError: There are none.
    """
    paths = set()
    for folder in folders:
        check_exists(folder, "run results/score.py")
        # A CSV beside a page of its name was made from scores, by this script or by compare.py.
        paths |= {path.resolve() for path in folder.rglob("*.csv") if not path.with_suffix(".md").is_file()}
    paths.discard((output_dir / "table.csv").resolve())
    paths = {path for path in paths if not path.name.startswith(".")}
    if not paths:
        raise UserError(f"no CSV below {', '.join(map(str, folders))}", "run results/score.py")
    return sorted(paths)


def read_scores(paths: list[Path]):
    """All scores, in the order of the tables' columns and rows: a pandas.DataFrame, a row a score.

    Beside the CSVs' columns it has ``pair`` (de-en), ``direction`` (xx-en; the pair where it is ASR's), ``num_pairs``
    (how many pairs of the direction any system has), ``missing`` (how many of them a mean lacks), ``reported`` (by
    others), ``name`` (the system's, in tables) and ``group`` (the mixture's, in plots). ``shots`` is 0-shot, ...

    Raises:
        UserError: A score is no number, two files hold the same one, or there is none that tables show.
    """
    import pandas

    tables = [read_results(path) for path in paths]
    scores = pandas.concat(tables, keys=paths, names=["file", "line"]).reset_index()
    scores["line"] += 2  # lines count from 1, and the first one is the header
    numbers = scores[NUMBERS].apply(pandas.to_numeric, errors="coerce")
    finite = numbers.abs() < math.inf
    wrong = ~finite["score"] | (~finite & (scores[NUMBERS] != "")).any(axis="columns")
    if wrong.any():
        row = scores[wrong].iloc[0]
        raise UserError(f"{row['file']}:{row['line']}: score or interval is no number", "score anew")
    scores[NUMBERS] = numbers
    scores["pair"] = scores["src_lang"] + "-" + scores["tgt_lang"]
    scores["shots"] = (scores["shots"] + "-shot").where(scores["shots"] != "", "")
    scores["reported"] = scores["signature"].str.startswith(REPORTED)
    again = scores.duplicated([*SYSTEM, *COLUMN])
    if again.any():
        row = scores[again].iloc[0]
        first = scores[(scores[[*SYSTEM, *COLUMN]] == row[[*SYSTEM, *COLUMN]]).all(axis="columns")].iloc[0]
        raise UserError(
            f"{row['file']}:{row['line']}: {' '.join(row[SYSTEM])} has its {row['metric']} on {row['dataset']} in "
            f"{first['file']} too",
            "remove one of the files, or name --results more narrowly",
        )
    if select(scores, SHOWN).empty:
        raise UserError(f"no {', '.join(SHOWN)} in {len(paths)} CSVs", "run results/score.py")
    scores["direction"] = scores["pair"].map(direction).where(scores["task"] != "asr", scores["pair"])
    of_direction = scores.groupby(["task", "dataset", "direction", "shots", "metric", "reported"])
    scores["num_pairs"], scores["missing"] = of_direction["pair"].transform("nunique"), 0
    return in_order(named(scores))


def direction(pair: str) -> str:
    """xx-en or en-xx."""
    source, _, target = pair.partition("-")
    return f"{'en' if source == 'en' else 'xx'}-{'en' if target == 'en' else 'xx'}"


# --- Order and names ------------------------------------------------------------------------------
def in_order(scores):
    """Sort by column, ASR and known metrics first; then by system: base, checkpoints by step, sft, others by name."""
    import pandas

    known = {metric: number for number, metric in enumerate((*SHOWN, *COUNTED))}
    orders = {
        **{"model": str, "mixture": str, "checkpoint": checkpoint_order, "dataset": str},
        "task": lambda task: (list(TASKS).index(task) if task in TASKS else len(TASKS), task),
        "shots": lambda shots: shots.zfill(12),
        "pair": lambda pair: (not pair.split(" ")[0].endswith("-en"), pair),  # those into English first
        "metric": lambda metric: (known.get(metric, len(known)), metric),
    }
    for name, order in orders.items():
        texts = scores[name].astype(str)
        scores[name] = pandas.Categorical(texts, sorted(texts.unique(), key=order), ordered=True)
    return scores.sort_values([*COLUMN, *SYSTEM], ignore_index=True)


def named(scores):
    """Add each system's ``group``, model and mixture as far as they differ, and its ``name``, with the checkpoint."""

    def joined(names: list[str]) -> list[str]:
        return [" ".join(filter(None, words)) for words in scores[names].itertuples(index=False)]

    differing = [name for name in ("model", "mixture") if scores[name].nunique() > 1]
    names = [name or model for name, model in zip(joined([*differing, "checkpoint"]), scores["model"], strict=True)]
    return scores.assign(name=names, group=joined(differing or ["model", "mixture"]))


def select(scores, metrics: tuple[str, ...]):
    """The rows of some metrics; of CER those of the languages where it leads."""
    leads = (scores["metric"] != "cer_basic") | scores["tgt_lang"].isin(CER_LEADS)
    return scores[scores["metric"].isin(metrics) & leads]


def place(task: str, dataset: str, shots: str, pair: str) -> list[str]:
    """A test set's name, on three lines."""
    if task == "asr":
        return ["ASR", dataset, "" if shots == "0-shot" else shots]
    return [f"{TASKS.get(task, task)} {dataset}".strip(), pair, shots]


def heading(column: tuple) -> list[str]:
    """A column's heading, line by line."""
    *test_set, metric, reported = column
    return [*place(*test_set), METRICS[metric].heading + (" reported" if reported else "")]


# --- Tables ---------------------------------------------------------------------------------------
def wide(scores, rows: list[str], columns: list[str], values: str = "score"):
    """A table with rows and columns in order (pandas leaves some as they come)."""
    return scores.pivot(index=rows, columns=columns, values=values).sort_index().sort_index(axis="columns")


def average(scores):
    """Put means by direction in place of several language pairs; the pairs that a system lacks are left out."""
    import pandas

    several = scores[scores["num_pairs"] > 1]
    same = [*SYSTEM, "name", "group", "task", "dataset", "direction", "shots", "metric", "reported", "num_pairs"]
    means = several.groupby(same, as_index=False).agg(score=("score", "mean"), num=("score", "size"))
    means["missing"] = means["num_pairs"] - means["num"]
    means["pair"] = means["direction"] + " (" + means["num_pairs"].astype(str) + ")"
    return in_order(pandas.concat([scores[scores["num_pairs"] == 1], means], ignore_index=True))


def as_table(scores, style: str = "pipe") -> str:
    """The numbers as shown: one row a system that has any, by its name; one column a test set and metric.

    Args:
        scores: What to show.
        style: tabulate's ``pipe`` is Markdown; ``plain``, for the terminal, has headings on up to four short lines.
    """

    def shown(row) -> str:
        metric = METRICS[row.metric]
        number = f"{row.score * metric.factor:.{metric.digits}f}"
        return f"{number} ({row.num_pairs - row.missing})" if row.missing else number

    cells = scores.assign(cell=[shown(row) for row in scores.itertuples()])
    table = wide(cells, [*SYSTEM, "name"], COLUMN, "cell").fillna("-")
    headings = [heading(column) for column in table.columns]
    if style == "pipe":
        names = ["checkpoint", *(" ".join(filter(None, lines)) for lines in headings)]
    else:
        used = [i for i, lines in enumerate(zip(*headings, strict=True)) if any(lines)]
        names = ["\n".join(lines[i] for i in used) for lines in (["", "", "", "checkpoint"], *headings)]
    table = table.reset_index("name").reset_index(drop=True)
    return results_table.as_text(table.set_axis(names, axis="columns"), ["left", *["right"] * len(headings)], style)


def num_columns(scores) -> int:
    return len(scores[COLUMN].drop_duplicates())


def blocks(scores) -> list:
    """The rows of ASR, and of each dataset that is translated."""
    task = scores["task"].astype(str).str.removeprefix("cascaded_")  # direct and cascaded translation, side by side
    dataset = scores["dataset"].astype(str).where(task != "asr", "")
    return [block for _, block in scores.groupby([task, dataset], sort=False)]


def terminal(scores) -> str:
    """The table, or where it is wide the means of the main metrics, a block a test set."""
    shown = select(scores, SHOWN)
    if num_columns(shown) <= WIDE:
        return as_table(shown, "plain")
    texts = []
    for block in blocks(average(shown)):
        main = select(block, MAIN)
        texts.append(as_table(block if main.empty else main, "plain"))
    return "\n\n".join(texts)


def markdown(scores) -> str:
    """All that is shown, and how its numbers were computed."""
    shown = select(scores, SHOWN)
    if num_columns(shown) <= WIDE:
        parts = [as_table(shown)]
    else:
        parts = [as_table(block) for block in blocks(average(shown))]
        parts.append(
            "Behind xx-en and en-xx: the number of language pairs; behind a score: of how many it is the mean."
        )
        several = shown[shown["num_pairs"] > 1]
        same = ["task", "dataset", "shots", "metric", "reported"]
        for (task, dataset, shots, *metric), rows in several.groupby(same, sort=False):
            words = heading((task, dataset, shots, "", *metric))
            parts += [f"## {' '.join(filter(None, words))}", as_table(rows)]
    counted = scores[(scores["task"] == "asr") & scores["metric"].isin(COUNTED)]
    if not counted.empty:
        parts.append("## Errors in transcription")
        parts.append("Shares of the reference's words in percent (they sum to WER), and numbers of outputs.")
        parts.append(as_table(counted))
    parts.append(
        "WER in percent, under Whisper's English (WER) and Basic (WER basic) normalizers; COMET and Kiwi times 100. "
        "Signatures:"
    )
    signatures = sorted(set(shown["metric"].astype(str) + "|" + shown["signature"]))
    return "\n\n".join([*parts, "\n".join(f"- `{signature}`" for signature in signatures)]) + "\n"


def write_csv(path: Path, scores) -> None:
    """One row a system with every score in full (WER as a share)."""
    texts = scores.assign(text=scores["score"].map(str).str.removesuffix(".0"))
    table = wide(texts, SYSTEM, COLUMN, "text")
    table.columns = [
        "_".join([*filter(None, place(*test_set)), f"{metric}_reported" if reported else metric]).replace(" ", "_")
        for *test_set, metric, reported in table.columns
    ]
    table.to_csv(path, lineterminator="\n")


# --- Figures --------------------------------------------------------------------------------------
def forgetting(scores) -> list[Panel]:
    """What speech training costs in translation and gains in transcription, by mixture and step.

    A mixture's BLEU is compared with its base model's, or if that has none with its first checkpoint's, on the MT test
    sets that all of its systems share with it; which of them it is stands beside the line's first point. WER is the
    mean over the ASR test sets that all systems here share.

    Returns:
        A panel of changes in BLEU, and one of WER in percent; nothing where one of them would be empty.
    """
    import pandas

    trained = scores[[checkpoint_order(name)[0] < 3 for name in scores["checkpoint"]]]
    bleu = trained[(trained["task"] == "mt") & (trained["metric"] == "bleu") & ~trained["reported"]]
    changes = []
    for (group, shots), rows in bleu.groupby(["group", "shots"]):
        table = wide(rows, ["checkpoint"], ["dataset", "pair"])
        there = table.notna()
        if table.index[0] == "base" and not (there.iloc[0] & there.iloc[1:].any()).any():
            table = table.iloc[1:]  # base was tested on other sets
        means = table.dropna(axis="columns").mean(axis="columns").dropna()
        if len(means) > 1:
            line = (means - means.iloc[0]).reset_index(name="value")
            notes = [f"since {means.index[0]}", *[""] * (len(means) - 1)]
            changes.append(line.assign(group=group, shots=shots, reported=False, note=notes))

    # Our own WERs, else reported ones; shuffled units are a control, which no model should hear.
    asr = trained[(trained["task"] == "asr") & ~trained["dataset"].astype(str).str.endswith("_shuffled")]
    own = (asr["metric"] == "wer_english") & ~asr["reported"]
    reported = (asr["metric"] == "wer") & asr["reported"] & ~own.groupby([asr[n] for n in SYSTEM]).transform("any")
    shared = wide(asr[own | reported], ["group", "reported", "checkpoint"], ["dataset", "shots", "pair"])
    shared = shared.dropna(axis="columns")
    if not changes or shared.empty:
        return []
    rates = (100 * shared.mean(axis="columns")).reset_index(name="value").assign(shots="", note="")
    datasets = ", ".join(shared.columns.get_level_values("dataset").unique())
    no_interval = {"low": math.nan, "high": math.nan}
    title = "MT: change of mean BLEU since each line's first point"
    return [
        Panel(title, pandas.concat(changes).assign(**no_interval), zero_line=True),
        Panel(f"ASR: WER, %, mean of {datasets}", rates.assign(**no_interval), from_zero=True),
    ]


def score_panels(scores, metric: str, title: str) -> list[Panel]:
    """A panel for each test set and direction, with a line for each mixture and number of shots.

    A mean over half of a direction's pairs or less is left out; one over more than half says of how many it is.
    """
    points = average(scores)
    is_asr = metric == "wer_english"
    wanted = (points["metric"] == metric) | (is_asr & (points["metric"] == "wer") & points["reported"])
    points = points[wanted & ((points["task"] == "asr") == is_asr) & (2 * points["missing"] < points["num_pairs"])]
    points = points.rename(columns=dict(zip(NUMBERS, ("value", "low", "high"), strict=True)))
    points[["value", "low", "high"]] *= METRICS[metric].factor
    num = points["num_pairs"] - points["missing"]
    points["note"] = (num.astype(str) + "/" + points["num_pairs"].astype(str)).where(points["missing"] > 0, "")
    if is_asr:
        points["shots"] = ""
    return [
        Panel(f"{' '.join(filter(None, place(task, dataset, '', pair)))}: {title}", rows, from_zero=is_asr)
        for (task, dataset, pair), rows in points.groupby(["task", "dataset", "pair"], sort=False)
    ]


def error_bars(scores) -> list[Panel]:
    """A panel for each ASR test set: substitutions, deletions and insertions of each system."""
    wanted = [*WER_PARTS, "runaway_english"]
    counts = scores[(scores["task"] == "asr") & ~scores["reported"] & scores["metric"].isin(wanted)]
    panels = []
    for (dataset, *_), rows in counts.groupby(["dataset", "shots", "pair"]):
        bars = wide(rows, [*SYSTEM, "group"], ["metric"]).reindex(columns=wanted)
        bars = bars.dropna(subset=WER_PARTS).reset_index()
        bars[WER_PARTS] *= 100
        runaway = bars["runaway_english"].fillna(0).map(lambda num: f"\n({num:.0f})" if num else "")
        bars["above"] = bars[WER_PARTS].sum(axis="columns").map("{:.1f}".format) + runaway
        bars = named(bars)
        title = f"{dataset}: WER, %" + (" (in brackets: runaway outputs)" if runaway.any() else "")
        panels.append(Panel(title, bars))
    return [panel for panel in panels if len(panel.rows)]


def draw(scores, folder: Path) -> list[str]:
    """Draw the figures that there are scores for; remove an earlier run's others. Returns their names."""
    groups = sorted(scores["group"].unique())
    part_names = {part: METRICS[part].heading for part in WER_PARTS}
    lines = score_panels(scores, "wer_english", "WER, %") + score_panels(scores, "bleu", "BLEU")
    drawn = []
    for name, panels, function, *arguments in (
        ("scores.png", lines, draw_lines, groups),
        ("comet.png", score_panels(scores, "comet22", "COMET-22"), draw_lines, groups),
        ("forgetting.png", forgetting(scores), draw_lines, groups, 1, True),
        ("wer_parts.png", error_bars(scores), draw_bars, part_names),
    ):
        if panels:
            with publish(folder / name) as path:
                function(path, panels, *arguments)
            drawn.append(name)
        else:
            (folder / name).unlink(missing_ok=True)
    return drawn


def summarize(results: list[Path], output_dir: Path) -> None:
    """Write and print the table, and draw the plots.

    Args:
        results: Folders with results CSVs, searched to any depth.
        output_dir: Where table.md, table.csv and the plots go.
    """
    scores = read_scores(find_tables(results, output_dir))
    with locked(output_dir / ".summary.lock"):
        for temporary in output_dir.glob(".tmp-*"):  # a killed attempt's: we hold the lock
            temporary.unlink()
        with publish(output_dir / "table.md") as path:
            path.write_text(markdown(scores), encoding="utf-8")
        with publish(output_dir / "table.csv") as path:
            write_csv(path, scores)
        written = ["table.md", "table.csv", *draw(scores, output_dir)]
        outputs = [output_dir / name for name in written]
        record(__file__, "summarize", output_dir, {"results": results}, ["results"], outputs)
    print(terminal(scores))
    systems, columns = len(scores[SYSTEM].drop_duplicates()), num_columns(select(scores, SHOWN))
    print(f"\nWER in %, COMET x 100, others in 0..100; {systems} systems, {columns} columns")
    if columns > WIDE:
        print("means over language pairs; a number in brackets says over how many. Every pair is in table.md")
    print(f"written: {', '.join(str(output_dir / name) for name in written)}")


if __name__ == "__main__":
    run(summarize)
