"""The results CSV, one a checkpoint, in long form: its columns, the metrics' names and directions, orders, Markdown.

CSVs are read as text, so that what is not changed keeps its bytes.
"""

import csv
import re
from pathlib import Path
from typing import NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import publish
from towerspeech.metrics import Score

COLUMNS = (
    *("model", "mixture", "checkpoint", "task", "dataset", "shots", "src_lang", "tgt_lang"),
    *("metric", "score", "ci_low", "ci_high", "n", "signature", "generations_sha256"),
)
SYSTEM = COLUMNS[:3]
TEST_SET = COLUMNS[:8]  # these name a system and a test set; with the metric, a row
REPORTED = "reported"  # begins the signature of a score that was not computed here


class Metric(NamedTuple):
    """How a metric is shown."""

    heading: str
    factor: int = 1  # from the CSV's number to the one shown
    digits: int = 1
    lower_is_better: bool = False


METRICS = {
    "wer_english": Metric("WER", 100, 1, True),
    "cer_basic": Metric("CER basic", 100, 1, True),
    "wer_basic": Metric("WER basic", 100, 1, True),
    "cer_english": Metric("CER", 100, 1, True),
    "wer": Metric("WER", 100, 1, True),  # as others report it
    "bleu": Metric("BLEU"),
    "chrf2": Metric("chrF2"),
    "chrf2++": Metric("chrF2++"),
    "spbleu": Metric("spBLEU"),
    "comet22": Metric("COMET", 100, 2),
    "cometkiwi22": Metric("Kiwi", 100, 2),
    "wer_english_substitutions": Metric("substituted", 100, 1, True),
    "wer_english_deletions": Metric("deleted", 100, 1, True),
    "wer_english_insertions": Metric("inserted", 100, 1, True),
    "runaway_english": Metric("runaway", 1, 0, True),
    "empty": Metric("empty", 1, 0, True),
    "truncated": Metric("cut off", 1, 0, True),
}


def checkpoint_order(name: str) -> tuple[int, int, str]:
    """base, checkpoints by step, sft, others (control systems) by name."""
    place = 1 if name.isdigit() else {"base": 0, "sft": 2}.get(name, 3)
    return place, int(name) if place == 1 else 0, name


def read_results(path: Path):
    """Read a results CSV, with a BOM and blank lines or without: a pandas.DataFrame of text, with ``COLUMNS``.

    Raises:
        UserError: It is no CSV in UTF-8, has other columns, or a row of another length; names file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(
                file
            )  # pandas would name no line of a malformed row, and fill up one that is too short
            lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV in UTF-8 ({error})", "mend it, or move it away") from None
    if not lines or tuple(lines[0][1]) != COLUMNS:
        raise UserError(f"{path}:1: no results CSV: its columns must be {','.join(COLUMNS)}", "name another file")
    for number, row in lines:
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}:{number}: {len(row)} values, wanted {len(COLUMNS)}", "score anew")
    import pandas

    return pandas.DataFrame([row for _, row in lines[1:]], columns=list(COLUMNS), dtype=str)


def as_rows(scores: list[Score], facts: dict[str, str], sha256: str):
    """A test set's scores as rows of a results CSV: a pandas.DataFrame of text, numbers in full.

    Args:
        scores: The scores.
        facts: The columns of ``TEST_SET``.
        sha256: Of the generations.
    """
    import pandas

    rows = pandas.DataFrame(scores, dtype=object).map(lambda value: "" if value is None else str(value))
    return rows.assign(**facts, generations_sha256=sha256).astype(str)


def write_results(path: Path, table) -> None:
    """Write a results CSV atomically: a pandas.DataFrame with ``COLUMNS``."""
    with publish(path) as temporary:
        table.to_csv(temporary, columns=list(COLUMNS), index=False, lineterminator="\n")


def one_line(name: object) -> str:
    """A name as it stands in tables and CSVs: without line breaks, and without blanks around it."""
    return " ".join(str(name).split())


def as_text(table, align: list[str], style: str = "pipe") -> str:
    """A pandas.DataFrame of text as a table.

    Args:
        table: Cells and headings; whatever they hold, in Markdown they stay cells.
        align: ``left`` or ``right``, column by column.
        style: One of tabulate's: ``pipe`` is Markdown.
    """

    def escape(cell: object) -> str:
        return re.sub(r"([\\|])", r"\\\1", one_line(cell))

    if style == "pipe":
        table = table.map(escape).rename(columns=escape)
    return table.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
