"""Put the scores of all checkpoints into one table and one plot.

Usage: python results/summarize.py --results results/TowerSpeech --output_dir results/TowerSpeech/summary

Reads every results CSV (results/score.py) below the given folders.
Prints the table, and writes table.md, table.csv (numbers in full) and scores.png (WER and BLEU by checkpoint, with
their 95% intervals). Rows: base, the checkpoints by step, sft, then others such as control systems. WER is in percent,
under Whisper's English and Basic normalizers. A score that is not there is a dash.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from towerspeech.metrics import read_results
from towerspeech.stage import UserError, check_exists, locked, publish, run

OUTPUTS = ("table.md", "table.csv", "scores.png")
# metric: its heading, and the factor to the numbers shown
SHOWN = {"wer_english": ("WER", 100), "wer_basic": ("WER basic", 100), "bleu": ("BLEU", 1), "chrf2": ("chrF2", 1)}
METRICS = tuple(SHOWN)
OTHER = 3  # place of systems that are no step of the training


class System(NamedTuple):
    model: str
    mixture: str
    checkpoint: str


class Column(NamedTuple):
    task: str
    dataset: str
    pair: str
    shots: str
    metric: str


Table = dict[System, dict[Column, dict[str, str]]]


def find_tables(folders: list[Path], output_dir: Path) -> list[Path]:
    """All CSVs below the folders, but our own output.

    Raises:
        UserError: There are none.
    """
    found = set()
    for folder in folders:
        check_exists(folder, "run results/score.py")
        found |= {path.resolve() for path in folder.rglob("*.csv") if not path.name.startswith(".")}
    found.discard((output_dir / "table.csv").resolve())
    if not found:
        raise UserError(f"no CSV below {', '.join(map(str, folders))}", "run results/score.py")
    return sorted(found)


def read_table(paths: list[Path]) -> Table:
    """Read the scores that are shown.

    Raises:
        UserError: Two files hold the same system's score for the same test set; or a score is no number.
    """
    table: Table = {}
    origin = {}
    for path in paths:
        for number, row in enumerate(read_results(path), 2):
            if row["metric"] not in SHOWN:
                continue
            system = System(row["model"], row["mixture"], row["checkpoint"])
            pair, shots = f"{row['src_lang']}-{row['tgt_lang']}", row["shots"] and f"{row['shots']}-shot"
            column = Column(row["task"], row["dataset"], pair, shots, row["metric"])
            if (system, column) in origin:
                raise UserError(
                    f"{path}:{number}: {' '.join(system)} has its {row['metric']} on {row['dataset']} in "
                    f"{origin[system, column]} too",
                    "remove one of the files, or name --results more narrowly",
                )
            try:
                [float(row[name]) for name in ("score", "ci_low", "ci_high")]
            except ValueError:
                raise UserError(f"{path}:{number}: score or interval is no number", "score anew") from None
            origin[system, column] = path
            table.setdefault(system, {})[column] = row
    if not table:
        raise UserError(f"no {', '.join(METRICS)} in {len(paths)} CSVs", "run results/score.py")
    return table


def system_order(system: System) -> tuple:
    """base, checkpoints by step, sft, others by name; model by model."""
    checkpoint = system.checkpoint
    place = 1 if checkpoint.isdigit() else {"base": 0, "sft": 2}.get(checkpoint, OTHER)
    return system.model, system.mixture, place, int(checkpoint) if place == 1 else 0, checkpoint


def column_order(column: Column) -> tuple:
    """Transcription first; then by dataset, shots and language pair."""
    return column.task, column.dataset, column.shots.zfill(12), column.pair, METRICS.index(column.metric)


def sort_table(table: Table) -> tuple[list[System], list[Column]]:
    """The rows and the columns, in order."""
    return sorted(table, key=system_order), sorted({c for scores in table.values() for c in scores}, key=column_order)


def labels(systems: list[System]) -> list[str]:
    """Short names: the checkpoint's, with model and mixture in front where these differ between rows."""
    differing = [i for i in (0, 1) if len({system[i] for system in systems}) > 1]
    return [" ".join([*(s[i] for i in differing if s[i]), s.checkpoint]).strip() or s.model for s in systems]


def heading(column: Column) -> list[str]:
    """A column's heading, line by line."""
    name, _ = SHOWN[column.metric]
    if column.task == "asr":
        return ["ASR", column.dataset, "", name]
    return [column.dataset, column.pair, column.shots, name]


def cells(table: Table, systems: list[System], columns: list[Column]) -> list[list[str]]:
    """The numbers as shown, row by row."""

    def cell(system: System, column: Column) -> str:
        row = table[system].get(column)
        return f"{float(row['score']) * SHOWN[column.metric][1]:.1f}" if row else "-"

    return [[cell(system, column) for column in columns] for system in systems]


# --- Output ---------------------------------------------------------------------------------------
def as_text(names: list[str], columns: list[Column], numbers: list[list[str]]) -> str:
    """The table for the terminal, each heading on four short lines."""
    lines = [[part, *parts] for part, *parts in zip(["", "", "", "checkpoint"], *map(heading, columns), strict=True)]
    lines += [[name, *row] for name, row in zip(names, numbers, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for first, *others in lines:
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        text.append("  ".join(padded).rstrip())
    return "\n".join([*text[:4], "-" * (sum(widths) + 2 * len(columns)), *text[4:]])


def as_markdown(names: list[str], columns: list[Column], numbers: list[list[str]], signatures: list[str]) -> str:
    """The table in Markdown, and how its numbers were computed."""
    lines = [
        ["checkpoint", *(" ".join(filter(None, heading(column))) for column in columns)],
        ["---", *("---:" for _ in columns)],
        *([name, *row] for name, row in zip(names, numbers, strict=True)),
    ]
    notes = ["", "WER in percent, under Whisper's English (WER) and Basic (WER basic) normalizers. Signatures:", ""]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes, *(f"- `{s}`" for s in signatures), ""])


def write_csv(path: Path, table: Table, systems: list[System], columns: list[Column]) -> None:
    """The table with one row a system and the scores in full (WER as a share)."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["_".join([*filter(None, heading(column)[:3]), column.metric]) for column in columns]
        writer.writerow([*System._fields, *names])
        for system in systems:
            writer.writerow([*system, *(table[system].get(column, {}).get("score", "") for column in columns)])


def plot(path: Path, table: Table, systems: list[System], columns: list[Column]) -> None:
    """WER and BLEU by checkpoint; systems that are no step of the training stand apart, without a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("wer_english", "WER, % (lower is better)"), ("bleu", "BLEU (higher is better)")]
    panels = [panel for panel in panels if any(column.metric == panel[0] for column in columns)]
    groups = list(dict.fromkeys((system.model, system.mixture) for system in systems))
    figure, axes = plt.subplots(
        len(groups),
        len(panels),
        figsize=(1.5 + 6.5 * len(panels), 0.7 + 3.9 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    for group, row in zip(groups, axes, strict=True):
        members = [system for system in systems if system[:2] == group]
        trained = sum(system_order(system)[2] < OTHER for system in members)
        for (metric, title), axis in zip(panels, row, strict=True):
            draw(axis, table, members, trained, [column for column in columns if column.metric == metric])
            axis.set_title(f"{', '.join(filter(None, group))}: {title}", fontsize=10, loc="left")
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw(axis, table: Table, members: list[System], trained: int, columns: list[Column]) -> None:
    """One panel: a line a test set, the first ``trained`` systems joined, the others as single points."""
    pairs = list(dict.fromkeys(column[:3] for column in columns))
    for i, column in enumerate(columns):
        color = f"C{pairs.index(column[:3]) % 10}"
        few_shot = column.shots not in ("", "0-shot")
        shift = 0.16 * ((i + 0.5) / len(columns) - 0.5)  # so that intervals do not hide each other
        factor = SHOWN[column.metric][1]
        at = [x for x, system in enumerate(members) if column in table[system]]
        rows = [table[members[x]][column] for x in at]
        low, score, high = ([float(row[name]) * factor for row in rows] for name in ("ci_low", "score", "ci_high"))
        # An interval around the mean of its resamples need not hold the score of a very small test set.
        below = [max(s - bound, 0) for s, bound in zip(score, low, strict=True)]
        above = [max(bound - s, 0) for s, bound in zip(score, high, strict=True)]
        axis.errorbar(
            [x + shift for x in at],
            score,
            yerr=[below, above],
            fmt="s" if few_shot else "o",
            color=color,
            markerfacecolor="white" if few_shot else color,
            markersize=4.5,
            capsize=2.5,
            linewidth=1.1,
            label=" ".join(filter(None, heading(column)[:3])),
        )
        joined = sum(x < trained for x in at)
        style = "--" if few_shot else "-"
        axis.plot([x + shift for x in at[:joined]], score[:joined], style, color=color, linewidth=1.3, zorder=1)
    if 0 < trained < len(members):
        axis.axvline(trained - 0.5, color="0.75", linewidth=0.8, linestyle=":")
    names = [system.checkpoint or system.model for system in members]
    slanted = max(map(len, names)) * len(names) > 60
    axis.set_xticks(range(len(members)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axis.set_xlim(-0.4, len(members) - 0.6)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=1 + len(columns) // 20, loc="upper left", bbox_to_anchor=(1, 1))


def summarize(results: list[Path], output_dir: Path) -> None:
    """Write and print the table, and draw the plot.

    Args:
        results: Folders with results CSVs, searched to any depth.
        output_dir: Where table.md, table.csv and scores.png go.
    """
    table = read_table(find_tables(results, output_dir))
    systems, columns = sort_table(table)
    names, numbers = labels(systems), cells(table, systems, columns)
    found = {(row["metric"], row["signature"]) for scores in table.values() for row in scores.values()}
    signatures = [f"{metric}|{signature}" for metric, signature in sorted(found)]
    with locked(output_dir / ".summary.lock"):
        for temporary in output_dir.glob(".tmp-*"):  # a killed attempt's: we hold the lock
            temporary.unlink()
        with publish(output_dir / "table.md") as path:
            path.write_text(as_markdown(names, columns, numbers, signatures), encoding="utf-8")
        with publish(output_dir / "table.csv") as path:
            write_csv(path, table, systems, columns)
        with publish(output_dir / "scores.png") as path:
            plot(path, table, systems, columns)
    print(as_text(names, columns, numbers))
    print(f"\nWER in %, chrF2 and BLEU in 0..100; {len(systems)} systems, {len(columns)} columns")
    print(f"written: {', '.join(str(output_dir / name) for name in OUTPUTS)}")


if __name__ == "__main__":
    run(summarize)
