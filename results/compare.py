"""Compare two systems test set by test set: paired randomisation, significant differences marked.

Usage: python results/compare.py --system_a generations/mt/checkpoint-300 generations/asr/checkpoint-300 \\
           --system_b generations/mt/sft generations/asr/sft --output_dir comparisons/300_sft
       python results/compare.py --system_a a.de --system_b b.de --references ref.de --target_lang de \\
           --output_dir comparisons/a_b

Reads two systems' folders of generations (generate/generate.py), or two plain files of outputs, one segment a line.
Test sets are paired by task, dataset, languages and shots, their segments by id; references must agree, prompts need
not (a tuned model's chat prompts beside plain ones). With --shots_a 0 --shots_b 5 a model's 0-shot outputs are
compared with its own 5-shot ones.
Prints the table, and writes comparison.md, comparison.csv (numbers in full) and run_info.json.

Translation is compared by BLEU, chrF2 and chrF2++, transcription by WER and CER under Whisper's normalizers; each
difference by a paired approximate randomisation test, which marks one in twenty pairs of equally good systems, however
few segments there are (sacreBLEU's --paired-bs marks one in nine of many segments, and nearly all of one segment).
"""

import csv
import itertools
from pathlib import Path
from typing import Literal, NamedTuple

from results.score import FACTS, Outputs, finished_files, read_generations, read_line_files
from towerspeech.command import UserError, run
from towerspeech.languages import language
from towerspeech.metrics import BOOTSTRAP_SAMPLES, ERROR_RATES, NORMALIZERS, SEED, TASKS, markdown_table, one_line
from towerspeech.records import read_jsonl
from towerspeech.stage import stage

LEVEL = 0.05
TOO_FEW = 5  # where so many segments differ, the smallest p is 2 / 2^5
# metric: its heading, and the factor to the numbers shown
SHOWN = {"bleu": ("BLEU", 1), "chrf2": ("chrF2", 1), "chrf2++": ("chrF2++", 1)}
SHOWN |= {f"{unit}_{name}": (f"{unit.upper()} {name}", 100) for unit in ERROR_RATES for name in NORMALIZERS}
NOTE = (
    f"`*`: p < {LEVEL}, two-sided, by paired approximate randomisation: the share of {BOOTSTRAP_SAMPLES} random swaps"
    f" of the systems' outputs, segment by segment (seed {SEED}; where 9 segments or fewer differ, of all swaps that"
    " there are), after which the systems differ at least as much. It marks about one in twenty pairs of equally good"
    f" systems by chance. Where {TOO_FEW} segments or fewer differ, p cannot come below {LEVEL}, and the row says so."
    " WER and CER in percent, the lower the better. Each p is of one test set and one metric, not corrected for the"
    f" number of rows. For a claim over k test sets, ask for p < {LEVEL} / k (Bonferroni)."
)


class Side(NamedTuple):
    """One system's outputs for one test set."""

    outputs: Outputs
    ids: list[str] | None  # None for line files: the line is the id


class Comparison(NamedTuple):
    """A row of comparison.csv."""

    task: str
    dataset: str
    src_lang: str
    tgt_lang: str
    shots_a: str
    shots_b: str
    metric: str
    score_a: float
    score_b: float
    difference: float  # b - a
    p: float
    significant: str  # yes or no
    better: str  # A, B, or empty where the difference is not significant
    n: int  # segments
    note: str  # why nothing can be significant
    signature: str


# --- Reading and pairing --------------------------------------------------------------------------
def read_system(folders: list[Path], option: str, shots: int | None) -> dict[tuple, Side]:
    """A system's test sets, by (task, dataset, source, target, shots); shots are left out where the user chose them.

    Raises:
        UserError: Unfinished or changed generations, a malformed row, or a test set in two files.
    """
    found: dict[tuple, Side] = {}
    for path, sha256 in (item for folder in folders for item in finished_files(folder).items()):
        outputs = read_generations(path, sha256, "", "", "", None)
        facts = outputs.facts
        if shots is not None and facts["shots"] != str(shots):
            continue
        side = Side(outputs, [row["id"] for row in read_jsonl(path)])
        key = (facts["task"], facts["dataset"], facts["src_lang"], facts["tgt_lang"])
        other = found.setdefault((*key, facts["shots"] if shots is None else ""), side)
        if other is not side:
            raise UserError(f"{path} and {other.outputs.file} hold the same test set", f"name one of them in {option}")
    if not found:
        wanted = "" if shots is None else f" with {shots} shots"
        raise UserError(f"no test sets{wanted} in {option} {' '.join(map(str, folders))}", "name other folders")
    return found


def align(a: Side, b: Side) -> tuple[list[str], list[str], list[str]]:
    """Both systems' outputs and the references, segment by segment in the order of ``a``.

    Raises:
        UserError: A segment of one only, or with another reference or source; names file and id.
    """
    if a.ids is None:
        return a.outputs.hypotheses, b.outputs.hypotheses, a.outputs.references
    place = {name: i for i, name in enumerate(b.ids)}
    remedy = "generate both from the same test set"
    for one, other in ((a, b), (b, a)):
        for name in sorted(set(one.ids) - set(other.ids))[:1]:
            raise UserError(f"{other.outputs.file} lacks id {name!r}, which {one.outputs.file} has", remedy)
    order = [place[name] for name in a.ids]
    for what, of_a, of_b in (
        ("reference", a.outputs.references, b.outputs.references),
        ("source", a.outputs.sources, b.outputs.sources),
    ):
        # What is spoken, or what another system heard, may be written in other units or words; a text may not.
        if what == "source" and (a.outputs.facts["task"] != "mt" or None in (of_a, of_b)):
            continue
        for name, i, text in zip(a.ids, order, of_a, strict=True):
            if text != of_b[i]:
                raise UserError(
                    f"{b.outputs.file}: id {name!r} has the {what} {str(of_b[i])[:60]!r},"
                    f" but {str(text)[:60]!r} in {a.outputs.file}",
                    remedy,
                )
    return a.outputs.hypotheses, [b.outputs.hypotheses[i] for i in order], a.outputs.references


# --- Tests ----------------------------------------------------------------------------------------
def compare_texts(task: str, a: list[str], b: list[str], references: list[str], target_lang: str) -> dict[str, tuple]:
    """metric -> (score of a, score of b, p, segments that differ, signature)."""
    import numpy as np

    from towerspeech import metrics

    found = {}
    for metric, signature in metrics.signatures(task, target_lang, ("bleu", "chrf2", "chrf2++", *ERROR_RATES)).items():
        if metric not in SHOWN:
            continue
        counts = np.stack([metrics.segment_counts(metric, texts, references, target_lang) for texts in (a, b)])
        if metric not in metrics.SACREBLEU_METRICS and not counts[0, :, -1].any():
            raise UserError(
                f"{metric}: all {len(references)} references are normalised to nothing", "check their text"
            )
        scores = metrics.corpus_scores(metric, counts.sum(axis=1))
        differing = (counts[0] != counts[1]).any(axis=1)  # (segments,)
        num_differing = int(differing.sum())
        # Swapped[i, j]: whether try i gives a's output of segment j to b, and b's to a. The first swaps none.
        if 2**num_differing <= BOOTSTRAP_SAMPLES:
            swapped = np.zeros((2**num_differing, len(differing)))
            swapped[:, differing] = list(itertools.product((0, 1), repeat=num_differing))
        else:
            swapped = np.random.default_rng(SEED).integers(2, size=(BOOTSTRAP_SAMPLES, len(differing)), dtype=bool)
            swapped = np.vstack([np.zeros(len(differing)), swapped])  # drawn as sacreBLEU's --paired-ar draws
        one, other = (
            metrics.corpus_scores(metric, swapped @ x + (1 - swapped) @ y) for x, y in (counts[::-1], counts)
        )
        as_far = np.abs(other - one) >= abs(scores[1] - scores[0]) - 1e-9  # ties but for rounding are ties
        signature = signature.replace("|bs:", "|ar:")
        found[metric] = (*map(float, scores), float(as_far.mean()), num_differing, signature)
    return found


def compare_sets(a: Side, b: Side) -> list[Comparison]:
    """All rows of one test set."""
    facts = a.outputs.facts
    hypotheses_a, hypotheses_b, references = align(a, b)
    try:
        found = compare_texts(facts["task"], hypotheses_a, hypotheses_b, references, facts["tgt_lang"])
    except UserError as error:
        raise UserError(f"{a.outputs.file}: {error}") from None
    rows = []
    for metric, (score_a, score_b, p, differing, signature) in found.items():
        lower = facts["task"] == "asr"  # is better
        better = "" if p >= LEVEL else "A" if (score_a < score_b) == lower else "B"
        rows.append(
            Comparison(
                *(facts[name] for name in ("task", "dataset", "src_lang", "tgt_lang", "shots")),
                b.outputs.facts["shots"],
                metric,
                score_a,
                score_b,
                score_b - score_a,
                p,
                "yes" if better else "no",
                better,
                len(references),
                f"only {differing} segments differ" if differing <= TOO_FEW else "",
                signature,
            )
        )
    return rows


# --- Output ---------------------------------------------------------------------------------------
def test_set_name(task: str, dataset: str, src_lang: str, tgt_lang: str, *shots: str) -> str:
    """Such as ``flores de-en 5-shot``, ``ASR clean``."""
    if task == "asr":
        return one_line(f"ASR {dataset}" + (f" {tgt_lang}" if tgt_lang != "en" else ""))
    kind = {"mt": "", "st": "ST ", "cascaded_st": "cascaded ST "}.get(task, f"{task} ")
    pair = f"{src_lang}-{tgt_lang}" if src_lang else tgt_lang
    told = "/".join(dict.fromkeys(filter(None, shots)))
    return one_line(f"{kind}{dataset} {pair}{f' {told}-shot' if told else ''}")


def cells(rows: list[Comparison]) -> list[list[str]]:
    """The table as shown, its heading first."""
    lines = [["test set", "metric", "A", "B", "B - A", "p", "better", "n", "note"]]
    for row in rows:
        name, factor = SHOWN[row.metric]
        mark = "*" if row.significant == "yes" else ""
        lines.append(
            [
                test_set_name(*row[:6]),
                name,
                *(f"{score * factor:.2f}" for score in (row.score_a, row.score_b)),
                f"{row.difference * factor:+.2f}{mark or ' '}",
                f"{row.p:.4f}",
                row.better or "-",
                f"{row.n:,}",
                row.note,
            ]
        )
    return lines


def as_text(lines: list[list[str]]) -> str:
    """The table for the terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "  ".join(c.rjust(w) if 1 < i < 8 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def as_markdown(lines: list[list[str]], notes: list[str], signatures: list[str]) -> str:
    """The table in Markdown, what its letters mean, and how its numbers were computed."""
    aligned = ["---", "---", "---:", "---:", "---:", "---:", "---", "---:", "---"]
    return "\n".join(
        [
            markdown_table([lines[0], aligned, *lines[1:]]).rstrip("\n"),
            *(part for note in notes for part in ("", note)),
            *("", "Signatures:", ""),
            *(f"- `{signature}`" for signature in signatures),
            "",
        ]
    )


def compare(
    system_a: list[Path],
    system_b: list[Path],
    output_dir: Path,
    shots_a: int | None = None,
    shots_b: int | None = None,
    references: Path | None = None,
    target_lang: str | None = None,
    task: Literal["mt", "asr"] = "mt",
    overwrite: bool = False,
) -> None:
    """Compare two systems.

    Args:
        system_a: The first system's folders of generations, or with --references its outputs, one a line.
        system_b: The second system's.
        output_dir: Where comparison.md and comparison.csv go.
        shots_a: Of the first system, test sets with so many examples alone; with --shots_b, to compare over shots.
        shots_b: The same of the second system.
        references: References, one a line, for line files.
        target_lang: The line files' language, such as de.
        task: What the line files hold.
        overwrite: Replace another comparison.
    """
    arguments = dict(locals())
    if bool(references) != bool(target_lang):
        raise UserError("--references and --target_lang belong together", "give both for line files, else neither")
    if (shots_a is None) != (shots_b is None):
        raise UserError("--shots_a and --shots_b belong together", "give both, such as --shots_a 0 --shots_b 5")
    if not references and any(path.is_file() for path in (*system_a, *system_b)):
        raise UserError("line files need --references and --target_lang", "give both, or name folders of generations")
    if references:
        if len(system_a) + len(system_b) > 2 or shots_a is not None:
            raise UserError("line files: one a system, and no --shots", "call this once for each test set")
        facts = dict.fromkeys(FACTS, "") | {"task": task, "dataset": references.name, "tgt_lang": target_lang}
        sides = [Side(read_line_files(path, references, None, facts), None) for path in (*system_a, *system_b)]
        sets_a, sets_b = ({(task, references.name, "", target_lang, ""): side} for side in sides)
    else:
        sets_a = read_system(system_a, "--system_a", shots_a)
        sets_b = read_system(system_b, "--system_b", shots_b)
    shared = sorted(sets_a.keys() & sets_b.keys())
    if not shared:
        raise UserError(
            f"no test set is in both: A has {', '.join(test_set_name(*key) for key in sorted(sets_a))};"
            f" B has {', '.join(test_set_name(*key) for key in sorted(sets_b))}",
            "name systems with a test set in common",
        )
    for key in shared:  # all are checked before one is tested
        align(sets_a[key], sets_b[key])
        if key[0] not in TASKS:
            raise UserError(f"{sets_a[key].outputs.file}: unknown task {key[0]!r}", f"known are: {', '.join(TASKS)}")
        try:
            language(key[3])
        except UserError as error:
            raise UserError(f"{sets_a[key].outputs.file}: {error}") from None
    with stage(__file__, output_dir, arguments, inputs=["system_a", "system_b", "references"]) as work:
        if work.done:
            print((output_dir / "comparison.md").read_text(encoding="utf-8"), end="")
            return
        rows = []
        for number, key in enumerate(shared, 1):
            print(f"{number}/{len(shared)}: {test_set_name(*key)}", flush=True)
            rows += compare_sets(sets_a[key], sets_b[key])
        named = [f"{letter}: {' + '.join(map(str, paths))}" for letter, paths in (("A", system_a), ("B", system_b))]
        notes = ["  \n".join(named)]
        for letter, mine, others in (("A", sets_a, sets_b), ("B", sets_b, sets_a)):
            alone = [test_set_name(*key) for key in sorted(mine.keys() - others.keys())]
            if alone:
                notes.append(f"Only in {letter}, not compared: {', '.join(alone)}.")
        notes.append(NOTE)
        lines = cells(rows)
        signatures = list(dict.fromkeys(f"{row.metric}|{row.signature}" for row in rows))
        with work.publish("comparison.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Comparison._fields)
            writer.writerows(rows)
        with work.publish("comparison.md") as path:
            path.write_text(as_markdown(lines, notes, signatures), encoding="utf-8")
        marked = sum(row.significant == "yes" for row in rows)
        work.counts |= {"test_sets": len(shared), "rows": len(rows), "significant": marked}
        print("\n".join(["", as_text(lines), "", *named, *notes[1:]]))
    print(f"{marked} of {len(rows)} differences are significant; written: {output_dir}/comparison.md, comparison.csv")


if __name__ == "__main__":
    run(compare)
