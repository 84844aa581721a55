"""Check that the pocket TowerSpeech has learned: its scores against limits that were fixed before the test was opened.

Usage: python tiny/check_scores.py --results runs/tiny/results --limits tiny/limits.yaml

Reads the results CSVs and a YAML of limits; prints a warning for each one that is broken. How the limits were found
stands in the YAML.
"""

from pathlib import Path

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists
from towerspeech.results_table import METRICS, read_results

OPERATORS = {"below": lambda a, b: a < b, "above": lambda a, b: a > b}


def read_scores(results: Path) -> dict[tuple, float]:
    """(checkpoint, test, metric) -> score; a test is asr, asr_shuffled, or such as de-en_0-shot; scores as shown."""
    scores = {}
    for path in sorted(results.glob("*.csv")):
        for row in read_results(path).to_dict("records"):
            if row["metric"] not in METRICS:
                continue
            test = f"{row['src_lang']}-{row['tgt_lang']}_{row['shots']}-shot"
            if row["task"] == "asr":
                test = "asr_shuffled" if row["dataset"].endswith("_shuffled") else "asr"
            scores[row["checkpoint"], test, row["metric"]] = float(row["score"]) * METRICS[row["metric"]].factor
    return scores


def problems(results: Path, limits: Path) -> list[str]:
    """What is broken, a line each.

    A limit is [checkpoint, test, metric, below or above, bound]; a bound is a number, or a checkpoint of the same test
    and metric, so that ``[840, asr, wer_english, below, 420]`` says that the error falls.

    Raises:
        UserError: A score that a limit names is not there.
    """
    import yaml

    check_exists(results, "run tiny/run.sh")
    check_exists(limits, "name a YAML such as tiny/limits.yaml")
    scores = read_scores(results)
    broken = []
    for checkpoint, test, metric, operator, bound in yaml.safe_load(limits.read_text(encoding="utf-8"))["limits"]:
        key = (str(checkpoint), test, metric)
        other = (bound, test, metric) if isinstance(bound, str) else None
        for wanted in filter(None, (key, other)):
            if wanted not in scores:
                raise UserError(f"{results} has no score {' '.join(wanted)}", "run tiny/run.sh to its end")
        value = scores[other] if other else bound
        if not OPERATORS[operator](scores[key], value):
            shown = f"{bound}'s {value:.1f}" if other else f"{value}"
            broken.append(f"{' '.join(key)} is {scores[key]:.1f}, but should be {operator} {shown}")
    return broken


def check_scores(results: Path, limits: Path) -> None:
    """Print what is broken.

    Args:
        results: Folder of one model's CSVs.
        limits: YAML of limits.
    """
    broken = problems(results, limits)
    for line in broken:
        print(f"warning: {line}")
    if not broken:
        print(f"the model has learned: all scores are within the limits of {limits}")


if __name__ == "__main__":
    run(check_scores)
