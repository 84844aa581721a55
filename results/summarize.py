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

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from results.plots import Bars, Line, Panel, Point, checkpoint_order, draw_bars, draw_lines
from towerspeech.command import UserError, run
from towerspeech.files import check_exists, locked, publish
from towerspeech.metrics import CER_LEADS, markdown_table, read_results

FIGURES = ("scores.png", "comet.png", "forgetting.png", "wer_parts.png")
# metric: its heading, the factor to the numbers shown, and their digits
SHOWN = {
    "wer_english": ("WER", 100, 1),
    "cer_basic": ("CER basic", 100, 1),  # where it leads
    "wer_basic": ("WER basic", 100, 1),
    "wer": ("WER", 100, 1),
    "bleu": ("BLEU", 1, 1),
    "chrf2": ("chrF2", 1, 1),
    "chrf2++": ("chrF2++", 1, 1),
    "spbleu": ("spBLEU", 1, 1),
    "comet22": ("COMET", 100, 2),
    "cometkiwi22": ("Kiwi", 100, 2),
}
MAIN = ("wer_english", "cer_basic", "wer", "bleu", "chrf2", "comet22")  # what a wide table shows on the terminal
PARTS = {
    "wer_english_substitutions": ("substituted", 100, 1),
    "wer_english_deletions": ("deleted", 100, 1),
    "wer_english_insertions": ("inserted", 100, 1),
    "runaway_english": ("runaway", 1, 0),
    "empty": ("empty", 1, 0),
    "truncated": ("cut off", 1, 0),
}
METRICS = (*SHOWN, *PARTS)
TASKS = {"asr": "ASR", "mt": "", "st": "ST", "cascaded_st": "cascaded ST"}
REPORTED = "_reported"  # ends the metric's name in our columns; in the CSVs the signature says it
WIDE = 16  # a table of more columns shows means over language pairs


class System(NamedTuple):
    model: str
    mixture: str
    checkpoint: str


class Column(NamedTuple):
    task: str
    dataset: str
    pair: str  # de-en; or a direction with its number of pairs, xx-en (9)
    shots: str
    metric: str


class Value(NamedTuple):
    score: float
    low: float | None
    high: float | None
    pairs: int = 1  # language pairs that this is the mean of
    of: int = 1  # pairs that any system has


Table = dict[System, dict[Column, Value]]


# --- Reading --------------------------------------------------------------------------------------
def find_tables(folders: list[Path], output_dir: Path) -> list[Path]:
    """All results CSVs below the folders.

    Raises:
        UserError: There are none.
    """
    found = set()
    for folder in folders:
        check_exists(folder, "run results/score.py")
        # A CSV beside a page of its name was made from scores, by this script or by compare.py.
        found |= {path.resolve() for path in folder.rglob("*.csv") if not path.with_suffix(".md").is_file()}
    found.discard((output_dir / "table.csv").resolve())
    found = {path for path in found if not path.name.startswith(".")}
    if not found:
        raise UserError(f"no CSV below {', '.join(map(str, folders))}", "run results/score.py")
    return sorted(found)


def read_table(paths: list[Path]) -> tuple[Table, list[str]]:
    """Read all scores, and the signatures of those that are shown.

    Raises:
        UserError: Two files hold the same system's score for the same test set; or a score is no number.
    """
    table: Table = {}
    origin = {}
    signatures = set()
    for path in paths:
        for number, row in enumerate(read_results(path), 2):
            system = System(row["model"], row["mixture"], row["checkpoint"])
            reported = row["signature"].startswith("reported")
            pair, shots = f"{row['src_lang']}-{row['tgt_lang']}", row["shots"] and f"{row['shots']}-shot"
            column = Column(row["task"], row["dataset"], pair, shots, row["metric"] + REPORTED * reported)
            if (system, column) in origin:
                raise UserError(
                    f"{path}:{number}: {' '.join(system)} has its {row['metric']} on {row['dataset']} in "
                    f"{origin[system, column]} too",
                    "remove one of the files, or name --results more narrowly",
                )
            try:
                score = float(row["score"])
                bounds = [float(row[name]) if row[name] else None for name in ("ci_low", "ci_high")]
            except ValueError:
                score = math.nan
            if not math.isfinite(score):
                raise UserError(f"{path}:{number}: score or interval is no number", "score anew")
            origin[system, column] = path
            table.setdefault(system, {})[column] = Value(score, *bounds)
            if row["metric"] in SHOWN and is_for(row["metric"], row["tgt_lang"]):
                signatures.add(f"{row['metric']}|{row['signature']}")
    if not signatures:
        raise UserError(f"no {', '.join(SHOWN)} in {len(paths)} CSVs", "run results/score.py")
    return table, sorted(signatures)


# --- Order and names ------------------------------------------------------------------------------
def system_order(system: System) -> tuple:
    """base, checkpoints by step, sft, others by name; model by model."""
    return system.model, system.mixture, checkpoint_order(system.checkpoint)


def metric_order(metric: str) -> tuple[int, str]:
    """Known metrics first; a reported score after the one computed here."""
    base = metric.removesuffix(REPORTED)
    return METRICS.index(base) if base in METRICS else len(METRICS), metric


def column_order(column: Column) -> tuple:
    """Transcription first; then by dataset, shots and language pair, those into English first."""
    task = list(TASKS).index(column.task) if column.task in TASKS else len(TASKS)
    into_english = column.pair.split(" ")[0].endswith("-en")
    shots = column.shots.zfill(12)
    return task, column.dataset, shots, not into_english, column.pair, metric_order(column.metric)


def is_for(metric: str, target_lang: str) -> bool:
    """Whether a metric is shown of this language: CER where it leads."""
    return metric != "cer_basic" or target_lang in CER_LEADS


def columns_of(table: Table, metrics: Iterable[str]) -> list[Column]:
    """The columns of some metrics, ours or reported, in order."""
    found = {column for scores in table.values() for column in scores}
    return sorted(
        (c for c in found if c.metric.removesuffix(REPORTED) in metrics and is_for(c.metric, c.pair.split("-")[-1])),
        key=column_order,
    )


def labels(systems: list[System]) -> list[str]:
    """Short names: the checkpoint's, with model and mixture in front where these differ between rows."""
    differing = [i for i in (0, 1) if len({system[i] for system in systems}) > 1]
    return [" ".join([*(s[i] for i in differing if s[i]), s.checkpoint]).strip() or s.model for s in systems]


def heading(column: Column) -> list[str]:
    """A column's heading, line by line."""
    base = column.metric.removesuffix(REPORTED)
    name = (SHOWN | PARTS)[base][0] + (" reported" if base != column.metric else "")
    return [*place(column), name]


def place(column: Column) -> list[str]:
    """The test set, on three lines."""
    if column.task == "asr":
        return ["ASR", column.dataset, "" if column.shots == "0-shot" else column.shots]
    return [f"{TASKS.get(column.task, column.task)} {column.dataset}".strip(), column.pair, column.shots]


def cells(table: Table, systems: list[System], columns: list[Column]) -> list[list[str]]:
    """The numbers as shown, row by row."""

    def cell(system: System, column: Column) -> str:
        value = table[system].get(column)
        if not value:
            return "-"
        _, factor, digits = (SHOWN | PARTS)[column.metric.removesuffix(REPORTED)]
        return f"{value.score * factor:.{digits}f}" + (f" ({value.pairs})" if value.pairs < value.of else "")

    return [[cell(system, column) for column in columns] for system in systems]


# --- Means ----------------------------------------------------------------------------------------
def direction(pair: str) -> str:
    """xx-en or en-xx."""
    source, _, target = pair.partition("-")
    return f"{'en' if source == 'en' else 'xx'}-{'en' if target == 'en' else 'xx'}"


def average(table: Table) -> Table:
    """Put means by direction in place of several language pairs; the pairs that a system lacks are left out."""
    pairs: dict[Column, set[str]] = {}
    for column in {column for scores in table.values() for column in scores if column.task != "asr"}:
        pairs.setdefault(column._replace(pair=direction(column.pair)), set()).add(column.pair)
    means: Table = {}
    for system, scores in table.items():
        found: dict[Column, list[float]] = {}
        means[system] = {}
        for column, value in scores.items():
            mean = column._replace(pair=direction(column.pair))
            if len(pairs.get(mean, ())) > 1:
                found.setdefault(mean, []).append(value.score)
            else:
                means[system][column] = value
        for column, scores_of_pairs in found.items():
            num = len(pairs[column])
            value = Value(math.fsum(scores_of_pairs) / len(scores_of_pairs), None, None, len(scores_of_pairs), num)
            means[system][column._replace(pair=f"{column.pair} ({num})")] = value
    return means


def forgetting(table: Table) -> tuple[list[Line], list[Line], list[str]]:
    """What speech training costs in translation and gains in transcription, by mixture and step.

    A mixture's BLEU is compared with its base model's, or if that has none with its first checkpoint's, on the MT test
    sets that all of its systems share with it; which of them it is stands beside the line's first point. WER is the
    mean over the ASR test sets that all systems here share.

    Returns:
        Lines of changes in BLEU, lines of WER in percent, and the names of the ASR test sets.
    """
    named = dict(zip(table, group_names(list(table)), strict=True))
    trained = [system for system in sorted(table, key=system_order) if checkpoint_order(system.checkpoint)[0] < 3]
    changes, rates = [], []
    for group in dict.fromkeys(named[system] for system in trained):
        members = [system for system in trained if named[system] == group]
        for shots in sorted({c.shots for c in columns_of(table, ["bleu"])}):
            sets = {s: {c for c in table[s] if c[0] == "mt" and c[3:] == (shots, "bleu")} for s in members}
            scored = [system for system in members if sets[system]]
            if scored and scored[0].checkpoint == "base" and not any(sets[scored[0]] & sets[s] for s in scored[1:]):
                scored = scored[1:]
            shared = sorted(set.intersection(*(sets[system] for system in scored))) if scored else []
            if len(scored) < 2 or not shared:
                continue
            means = [math.fsum(table[system][c].score for c in shared) / len(shared) for system in scored]
            points = [Point(s.checkpoint, mean - means[0]) for s, mean in zip(scored, means, strict=True)]
            points[0] = points[0]._replace(note=f"since {scored[0].checkpoint}")
            changes.append(Line(group, shots, points))
    of_system = {}  # our own WERs, else reported ones; shuffled units are a control, which no model should hear
    for system in trained:
        for metric in ("wer_english", "wer" + REPORTED):
            rated = {
                column.dataset: 100 * value.score
                for column, value in table[system].items()
                if column.task == "asr" and column.metric == metric and not column.dataset.endswith("_shuffled")
            }
            if rated and system not in of_system:
                of_system[system] = metric, rated
    shared = sorted(set.intersection(*(set(rated) for _, rated in of_system.values()))) if of_system else []
    for group, metric in dict.fromkeys((named[system], metric) for system, (metric, _) in of_system.items()):
        points = [
            Point(system.checkpoint, math.fsum(rated[name] for name in shared) / len(shared))
            for system, (kind, rated) in of_system.items()
            if shared and (named[system], kind) == (group, metric)
        ]
        rates.append(Line(group, "", points, metric.endswith(REPORTED)))
    return changes, [line for line in rates if line.points], shared


# --- Output ---------------------------------------------------------------------------------------
def as_text(names: list[str], columns: list[Column], numbers: list[list[str]]) -> str:
    """A table for the terminal, each heading on up to four short lines."""
    heads = [list(line) for line in zip(["", "", "", "checkpoint"], *map(heading, columns), strict=True) if any(line)]
    lines = [*heads, *([name, *row] for name, row in zip(names, numbers, strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for first, *others in lines:
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        text.append("  ".join(padded).rstrip())
    text.insert(len(heads), "-" * (sum(widths) + 2 * len(columns)))
    return "\n".join(text)


def as_markdown(names: list[str], columns: list[Column], numbers: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [
        ["checkpoint", *(" ".join(filter(None, heading(column))) for column in columns)],
        ["---", *("---:" for _ in columns)],
        *([name, *row] for name, row in zip(names, numbers, strict=True)),
    ]
    return markdown_table(lines)


def render(table: Table, columns: list[Column], how) -> str:
    """One table by ``as_text`` or ``as_markdown``; systems that have none of its scores are left out."""
    systems = sorted(table, key=system_order)
    names = dict(zip(systems, labels(systems), strict=True))
    rows = [system for system in systems if any(column in table[system] for column in columns)]
    return how([names[system] for system in rows], columns, cells(table, rows, columns))


def blocks(columns: list[Column]) -> list[list[Column]]:
    """The columns of ASR, and of each dataset that is translated."""
    found: dict[tuple, list[Column]] = {}
    for column in columns:
        task = column.task.removeprefix("cascaded_")  # direct and cascaded speech translation, side by side
        found.setdefault((task, "" if task == "asr" else column.dataset), []).append(column)
    return list(found.values())


def terminal(table: Table) -> str:
    """The table, or where it is wide the means of the main metrics, a block a test set."""
    columns = columns_of(table, SHOWN)
    if len(columns) <= WIDE:
        return render(table, columns, as_text)
    means = average(table)
    texts = []
    for block in blocks(columns_of(means, SHOWN)):
        main = [column for column in block if column.metric.removesuffix(REPORTED) in MAIN]
        texts.append(render(means, main or block, as_text))
    return "\n\n".join(texts)


def markdown(table: Table, signatures: list[str]) -> str:
    """All that is shown, and how its numbers were computed."""
    columns = columns_of(table, SHOWN)
    if len(columns) <= WIDE:
        parts = [render(table, columns, as_markdown)]
    else:
        means = average(table)
        parts = [render(means, block, as_markdown) for block in blocks(columns_of(means, SHOWN))]
        parts.append(
            "Behind xx-en and en-xx: the number of language pairs; behind a score: of how many it is the mean.\n"
        )
        several = [column for column in columns if column not in {c for scores in means.values() for c in scores}]
        for task, dataset, shots, metric in dict.fromkeys((c[0], c[1], c[3], c[4]) for c in several):
            of_this = [c for c in several if (c[0], c[1], c[3], c[4]) == (task, dataset, shots, metric)]
            first, _, *others = heading(of_this[0])
            parts.append(f"## {' '.join(filter(None, [first, *others]))}\n")
            parts.append(render(table, of_this, as_markdown))
    counted = [column for column in columns_of(table, PARTS) if column.task == "asr"]
    if counted:
        parts.append("## Errors in transcription\n")
        parts.append("Shares of the reference's words in percent (they sum to WER), and numbers of outputs.\n")
        parts.append(render(table, counted, as_markdown))
    parts.append(
        "WER in percent, under Whisper's English (WER) and Basic (WER basic) normalizers; COMET and Kiwi times 100. "
        "Signatures:\n"
    )
    return "\n".join([*parts, *(f"- `{signature}`" for signature in signatures), ""])


def write_csv(path: Path, table: Table) -> None:
    """One row a system with every score in full (WER as a share)."""
    columns = sorted({column for scores in table.values() for column in scores}, key=column_order)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["_".join([*filter(None, place(column)), column.metric]).replace(" ", "_") for column in columns]
        writer.writerow([*System._fields, *names])
        for system in sorted(table, key=system_order):
            scores = [str(table[system][c].score).removesuffix(".0") if c in table[system] else "" for c in columns]
            writer.writerow([*system, *scores])


# --- Figures --------------------------------------------------------------------------------------
def group_names(systems: list[System]) -> list[str]:
    """Model and mixture of each, as far as they differ."""
    differing = [i for i in (0, 1) if len({system[i] for system in systems}) > 1] or [0, 1]
    return [" ".join(system[i] for i in differing if system[i]) for system in systems]


def score_panels(table: Table, metric: str, title: str) -> list[Panel]:
    """A panel for each test set and direction, with a line for each mixture and number of shots.

    A mean over half of a direction's pairs or less is left out; one over more than half says of how many it is.
    """
    means = average(table)
    systems = sorted(means, key=system_order)
    _, factor, _ = SHOWN[metric]
    wanted = {metric, metric + REPORTED} | ({"wer" + REPORTED} if metric == "wer_english" else set())
    panels: dict[tuple, dict[tuple, Line]] = {}
    for column in columns_of(means, SHOWN):
        if column.metric not in wanted or (column.task == "asr") != (metric == "wer_english"):
            continue
        for system, group in zip(systems, group_names(systems), strict=True):
            value = means[system].get(column)
            if value and 2 * value.pairs > value.of:
                bounds = (None if x is None else x * factor for x in (value.low, value.high))
                note = f"{value.pairs}/{value.of}" if value.pairs < value.of else ""
                point = Point(system.checkpoint, value.score * factor, *bounds, note)
                shots = "" if column.task == "asr" else column.shots
                line = Line(group, shots, [], column.metric.endswith(REPORTED))
                lines = panels.setdefault(column[:3], {})
                lines.setdefault((group, shots, line.reported), line).points.append(point)
    return [
        Panel(
            f"{' '.join(filter(None, place(Column(*key, '', metric))))}: {title}",
            list(lines.values()),
            key[0] == "asr",
        )
        for key, lines in panels.items()
    ]


def error_bars(table: Table) -> list[Bars]:
    """A panel for each ASR test set: substitutions, deletions and insertions of each system."""
    wanted = list(PARTS)[:3]
    panels = []
    for column in columns_of(table, wanted[:1]):
        three = [column._replace(metric=metric) for metric in wanted]
        systems = [s for s in sorted(table, key=system_order) if all(c in table[s] for c in three)]
        parts = [tuple(100 * table[system][c].score for c in three) for system in systems]
        above = []
        for system, heights in zip(systems, parts, strict=True):
            runaway = table[system].get(column._replace(metric="runaway_english"))
            above.append(f"{sum(heights):.1f}" + (f"\n({runaway.score:.0f})" if runaway and runaway.score else ""))
        ends = [i for i in range(1, len(systems)) if systems[i][:2] != systems[i - 1][:2]]
        title = f"{column.dataset}: WER, %" + (" (in brackets: runaway outputs)" if "(" in "".join(above) else "")
        panels.append(Bars(title, labels(systems), parts, above, ends))
    return [panel for panel in panels if panel.names]


def draw(table: Table, folder: Path) -> list[str]:
    """Draw the figures that there are scores for; remove an earlier run's others. Returns their names."""
    changes, rates, asr_sets = forgetting(table)
    groups = sorted(set(group_names(list(table))))
    tradeoff = [
        Panel("MT: change of mean BLEU since each line's first point", changes, zero_line=True),
        Panel(f"ASR: WER, %, mean of {', '.join(asr_sets)}", rates, from_zero=True),
    ]
    scores = score_panels(table, "wer_english", "WER, %") + score_panels(table, "bleu", "BLEU")
    comet, bars = score_panels(table, "comet22", "COMET-22"), error_bars(table)
    drawn = []
    for name, wanted, function, arguments in (
        ("scores.png", scores, draw_lines, (scores, groups)),
        ("comet.png", comet, draw_lines, (comet, groups)),
        ("forgetting.png", changes and rates, draw_lines, (tradeoff, groups, 1, True)),
        ("wer_parts.png", bars, draw_bars, (bars, ("substitutions", "deletions", "insertions"))),
    ):
        if wanted:
            with publish(folder / name) as path:
                function(path, *arguments)
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
    table, signatures = read_table(find_tables(results, output_dir))
    with locked(output_dir / ".summary.lock"):
        for temporary in output_dir.glob(".tmp-*"):  # a killed attempt's: we hold the lock
            temporary.unlink()
        with publish(output_dir / "table.md") as path:
            path.write_text(markdown(table, signatures), encoding="utf-8")
        with publish(output_dir / "table.csv") as path:
            write_csv(path, table)
        written = ["table.md", "table.csv", *draw(table, output_dir)]
    print(terminal(table))
    columns = columns_of(table, SHOWN)
    print(f"\nWER in %, COMET x 100, others in 0..100; {len(table)} systems, {len(columns)} columns")
    if len(columns) > WIDE:
        print("means over language pairs; a number in brackets says over how many. Every pair is in table.md")
    print(f"written: {', '.join(str(output_dir / name) for name in written)}")


if __name__ == "__main__":
    run(summarize)
