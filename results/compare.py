"""Compare two systems test set by test set: paired bootstrap, significant differences marked.

Usage: python results/compare.py --system_a generations/mt/checkpoint-300 generations/asr/checkpoint-300 \\
           --system_b generations/mt/sft generations/asr/sft --output_dir comparisons/300_sft
       python results/compare.py --system_a a.de --system_b b.de --references ref.de --target_lang de \\
           --output_dir comparisons/a_b

Reads two systems' folders of generations (generate/generate.py), or two plain files of outputs, one segment a line.
Test sets are paired by task, dataset, languages and shots, their segments by id; references must agree, prompts need
not (a tuned model's chat prompts beside plain ones). With --shots_a 0 --shots_b 5 a model's 0-shot outputs are
compared with its own 5-shot ones.
Prints the table, and writes comparison.md, comparison.csv (numbers in full) and run_info.json.

Translation is tested by sacreBLEU's own paired bootstrap (``sacrebleu --paired-bs``): BLEU, chrF2, chrF++.
Transcription by a centred paired bootstrap over utterances: WER and CER under Whisper's Basic and English normalizers.
Where both systems score the same to the last digit p is 1 (sacreBLEU gives its smallest p to a system beside itself).
"""

import csv
import os
from pathlib import Path
from typing import Literal, NamedTuple

from score import FACTS, Outputs, finished_files, read_generations, read_line_files  # beside this script

from towerspeech.languages import language
from towerspeech.metrics import BOOTSTRAP_SAMPLES, NORMALIZERS, SEED, TASKS
from towerspeech.records import read_jsonl
from towerspeech.stage import UserError, run, stage

LEVEL = 0.05
# metric: its heading, and the factor to the numbers shown
SHOWN = {"bleu": ("BLEU", 1), "chrf2": ("chrF2", 1), "chrf2++": ("chrF2++", 1)}
SHOWN |= {f"{unit}_{name}": (f"{unit.upper()} {name}", 100) for unit in ("wer", "cer") for name in NORMALIZERS}
NOTE = (
    f"`*`: p < {LEVEL}, paired bootstrap ({BOOTSTRAP_SAMPLES} samples, seed {SEED}). WER and CER in percent, the lower"
    " the better; their test is two-sided, and marks about one in twenty pairs of equally good systems by chance."
    " BLEU's and chrF's p is sacreBLEU's own, which is more lenient: it marks about one in nine such pairs (measured),"
    " not one in twenty; about one in twenty have p < 0.025. Each p is of one test set and one metric, not corrected"
    f" for the number of rows. For a claim over k test sets, ask for p < {LEVEL} / k (Bonferroni)."
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
def compare_translations(a: list[str], b: list[str], references: list[str], target_lang: str) -> dict[str, tuple]:
    """metric -> (score of a, score of b, p, signature), by sacreBLEU's paired bootstrap."""
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    os.environ["SACREBLEU_SEED"] = str(SEED)  # the only way to tell it
    metrics = {
        "bleu": BLEU(tokenize=language(target_lang).bleu_tokenizer, force=True),
        "chrf2": CHRF(),
        "chrf2++": CHRF(word_order=2),
    }
    signatures, scores = PairedTest(
        [("a", a), ("b", b)], metrics, [references], test_type="bs", n_samples=BOOTSTRAP_SAMPLES
    )()
    of_metrics = zip(metrics, signatures.items(), strict=True)  # sacreBLEU has names of its own, in the same order
    return {
        metric: (float(scores[name][0].score), float(scores[name][1].score), scores[name][1].p_value, str(signature))
        for metric, (name, signature) in of_metrics
    }


def compare_transcriptions(a: list[str], b: list[str], references: list[str], target_lang: str) -> dict[str, tuple]:
    """metric -> (score of a, score of b, p, signature), by a paired bootstrap over utterances."""
    import numpy as np

    from towerspeech import metrics

    signatures = metrics.signatures("asr", target_lang)
    # Both systems are scored on the same resamples. Drawn as sacreBLEU draws them: (samples, utterances)
    drawn = np.random.default_rng(SEED).choice(len(references), size=(BOOTSTRAP_SAMPLES, len(references)))
    found = {}
    for name in NORMALIZERS:
        normalize = metrics.normalizer(name)
        texts_a, texts_b, spoken = ([normalize(text) for text in texts] for texts in (a, b, references))
        if not any(spoken):
            raise UserError(
                f"all {len(spoken)} references are empty under Whisper's {name} normalizer",
                "check the test set's text",
            )
        for unit in ("wer", "cer"):
            counts = [metrics.edits(texts, spoken, characters=unit == "cer") for texts in (texts_a, texts_b)]
            lengths = counts[0][:, 3]
            errors = [of_one[:, :3].sum(axis=1) for of_one in counts]
            # A draw of empty references alone has no rate; with one word as its length it stays finite.
            drawn_lengths = np.maximum(lengths[drawn].sum(axis=1), 1)
            more = errors[1] - errors[0]  # subtracted before division, so that ties stay ties
            p = p_value(more[drawn].sum(axis=1) / drawn_lengths, float(more.sum() / lengths.sum()))
            metric = f"{unit}_{name}"
            found[metric] = (*(float(of_one.sum() / lengths.sum()) for of_one in errors), p, signatures[metric])
    return found


def p_value(differences, difference: float) -> float:
    """Two-sided p of a paired bootstrap whose null hypothesis is that the systems do not differ.

    The resamples' differences scatter around the one seen; shifted by it they scatter around 0, as chance alone would
    have them (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 16). p is the share of them at
    least as far from 0 as the difference seen, with 1 added to both counts.
    Not what sacreBLEU 2.6 does (significance.py, ``_paired_bs_test``, after Moses'
    bootstrap-hypothesis-difference-significance.pl): it takes absolute values first and then shifts these by their
    mean. That folds one tail onto the other and shrinks the spread, so equally good systems too often differ.

    Args:
        differences: Of the resamples, (samples,).
        difference: Of the whole test set.
    """
    import numpy as np

    return (int((np.abs(differences - difference) >= abs(difference)).sum()) + 1) / (len(differences) + 1)


def compare_sets(a: Side, b: Side) -> list[Comparison]:
    """All rows of one test set."""
    facts = a.outputs.facts
    test = compare_transcriptions if facts["task"] == "asr" else compare_translations
    hypotheses_a, hypotheses_b, references = align(a, b)
    try:
        found = test(hypotheses_a, hypotheses_b, references, facts["tgt_lang"])
    except UserError as error:
        raise UserError(f"{a.outputs.file}: {error}") from None
    rows = []
    for metric, (score_a, score_b, p, signature) in found.items():
        if score_a == score_b:
            p = 1.0
        lower = test is compare_transcriptions  # is better
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
                signature,
            )
        )
    return rows


# --- Output ---------------------------------------------------------------------------------------
def test_set_name(task: str, dataset: str, src_lang: str, tgt_lang: str, *shots: str) -> str:
    """Such as ``flores de-en 5-shot``, ``ASR clean``."""
    if task == "asr":
        return f"ASR {dataset}"
    kind = {"mt": "", "st": "ST ", "cascaded_st": "cascaded ST "}.get(task, f"{task} ")
    pair = f"{src_lang}-{tgt_lang}" if src_lang else tgt_lang
    told = "/".join(dict.fromkeys(filter(None, shots)))
    return f"{kind}{dataset} {pair}{f' {told}-shot' if told else ''}"


def cells(rows: list[Comparison]) -> list[list[str]]:
    """The table as shown, its heading first."""
    lines = [["test set", "metric", "A", "B", "B - A", "p", "better", "n"]]
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
            ]
        )
    return lines


def as_text(lines: list[list[str]]) -> str:
    """The table for the terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def as_markdown(lines: list[list[str]], notes: list[str], signatures: list[str]) -> str:
    """The table in Markdown, what its letters mean, and how its numbers were computed."""
    table = [lines[0], ["---", "---", "---:", "---:", "---:", "---:", "---", "---:"], *lines[1:]]
    return "\n".join(
        [
            *(f"| {' | '.join(cell.strip() for cell in line)} |" for line in table),
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
    with stage(output_dir, arguments, inputs=["system_a", "system_b", "references"]) as job:
        if job.done:
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
        with job.publish("comparison.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Comparison._fields)
            writer.writerows(rows)
        with job.publish("comparison.md") as path:
            path.write_text(as_markdown(lines, notes, signatures), encoding="utf-8")
        marked = sum(row.significant == "yes" for row in rows)
        job.counts |= {"test_sets": len(shared), "rows": len(rows), "significant": marked}
        print("\n".join(["", as_text(lines), "", *named, *notes[1:]]))
    print(f"{marked} of {len(rows)} differences are significant; written: {output_dir}/comparison.md, comparison.csv")


if __name__ == "__main__":
    run(compare)
