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

from pathlib import Path
from typing import Literal

from results.randomisation import compare_texts
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.generations import FACTS, Outputs, naming, read_folder, read_line_files
from towerspeech.metrics import BOOTSTRAP_SAMPLES, SEED, signatures
from towerspeech.results_table import METRICS, as_text, one_line
from towerspeech.stage import stage

LEVEL = 0.05
TOO_FEW = 5  # where so many segments differ, the smallest p is 2 / 2^5
NOTE = (
    f"`*`: p < {LEVEL}, two-sided, by paired approximate randomisation: the share of {BOOTSTRAP_SAMPLES} random swaps"
    f" of the systems' outputs, segment by segment (seed {SEED}; where 9 segments or fewer differ, of all swaps that"
    " there are), after which the systems differ at least as much. It marks about one in twenty pairs of equally good"
    f" systems by chance. Where {TOO_FEW} segments or fewer differ, p cannot come below {LEVEL}, and the row says so."
    " WER and CER in percent, under Whisper's English normalizer unless it says basic, the lower the better. Each p is"
    " of one test set and one metric, not corrected for the number of rows. For a claim over k test sets, ask for"
    f" p < {LEVEL} / k (Bonferroni)."
)


COLUMNS = (
    *("task", "dataset", "src_lang", "tgt_lang", "shots_a", "shots_b", "metric"),
    *("score_a", "score_b", "difference", "p", "significant", "better", "n", "note", "signature"),
)  # of comparison.csv; the difference is b - a, better is A, B or empty, note says why nothing can be significant
ALIGN = ["left", "left", *["right"] * 4, "left", "right", "left"]  # of the columns that are shown


# --- Reading and pairing --------------------------------------------------------------------------
def read_system(folders: list[Path], option: str, shots: int | None) -> dict[tuple, Outputs]:
    """A system's test sets, by (task, dataset, source, target, shots); shots are left out where the user chose them.

    Raises:
        UserError: Unfinished or changed generations, a malformed row, or a test set in two files.
    """
    sets: dict[tuple, Outputs] = {}
    for outputs in (outputs for folder in folders for outputs in read_folder(folder)):
        facts = outputs.facts
        if shots is not None and facts["shots"] != str(shots):
            continue
        told_shots = facts["shots"] if shots is None else ""
        key = (facts["task"], facts["dataset"], facts["src_lang"], facts["tgt_lang"], told_shots)
        if key in sets:
            problem = f"{outputs.file} and {sets[key].file} hold the same test set"
            raise UserError(problem, f"name one of them in {option}")
        sets[key] = outputs
    if not sets:
        wanted = "" if shots is None else f" with {shots} shots"
        raise UserError(f"no test sets{wanted} in {option} {' '.join(map(str, folders))}", "name other folders")
    return sets


def read_systems(
    system_a: list[Path],
    system_b: list[Path],
    shots: tuple[int | None, int | None],
    references: Path | None,
    target_lang: str | None,
    task: str,
) -> list[dict[tuple, Outputs]]:
    """Both systems' test sets, from folders of generations or from line files; arguments as in ``compare``."""
    if bool(references) != bool(target_lang):
        raise UserError("--references and --target_lang belong together", "give both for line files, else neither")
    if (shots[0] is None) != (shots[1] is None):
        raise UserError("--shots_a and --shots_b belong together", "give both, such as --shots_a 0 --shots_b 5")
    if not references:
        if any(path.is_file() for path in (*system_a, *system_b)):
            problem = "line files need --references and --target_lang"
            raise UserError(problem, "give both, or name folders of generations")
        return [read_system(system_a, "--system_a", shots[0]), read_system(system_b, "--system_b", shots[1])]
    if len(system_a) + len(system_b) > 2 or shots[0] is not None:
        raise UserError("line files: one a system, and no --shots", "call this once for each test set")
    facts = dict.fromkeys(FACTS, "") | {"task": task, "dataset": references.name, "tgt_lang": target_lang}
    key = (task, references.name, "", target_lang, "")
    return [{key: read_line_files(path, references, None, facts)} for path in (*system_a, *system_b)]


def align(a: Outputs, b: Outputs) -> tuple[list[str], list[str], list[str]]:
    """Both systems' outputs and the references, segment by segment in the order of ``a``.

    Raises:
        UserError: A segment of one only, or with another reference or source, or an unknown task or language; names
            file and id.
    """
    with naming(a):
        signatures(a.facts["task"], a.facts["tgt_lang"])
    if a.ids is None:
        return a.hypotheses, b.hypotheses, a.references
    remedy = "generate both from the same test set"
    for one, other in ((a, b), (b, a)):
        missing = set(one.ids) - set(other.ids)
        if missing:
            raise UserError(f"{other.file} lacks id {min(missing)!r}, which {one.file} has", remedy)
    place = {name: i for i, name in enumerate(b.ids)}
    order = [place[name] for name in a.ids]
    texts = [("reference", a.references, b.references)]
    # What is spoken, or what another system heard, may be written in other units or words; a text may not.
    if a.facts["task"] == "mt" and a.sources is not None and b.sources is not None:
        texts.append(("source", a.sources, b.sources))
    for what, of_a, of_b in texts:
        for name, i, text in zip(a.ids, order, of_a, strict=True):
            if text != of_b[i]:
                raise UserError(
                    f"{b.file}: id {name!r} has the {what} {of_b[i][:60]!r}, but {text[:60]!r} in {a.file}", remedy
                )
    return a.hypotheses, [b.hypotheses[i] for i in order], a.references


# --- Tests ----------------------------------------------------------------------------------------
def compare_sets(a: Outputs, b: Outputs, texts: tuple[list[str], list[str], list[str]]) -> list[dict]:
    """All rows of one test set, with ``COLUMNS``; ``texts`` as ``align`` gives them."""
    facts = {name: a.facts[name] for name in COLUMNS[:4]} | {"shots_a": a.facts["shots"], "shots_b": b.facts["shots"]}
    rows = []
    with naming(a):
        compared = compare_texts(facts["task"], *texts, facts["tgt_lang"])
    for metric, (score_a, score_b, p, num_differing, signature) in compared.items():
        b_is_better = (score_b < score_a) == METRICS[metric].lower_is_better
        better = "" if p >= LEVEL else "B" if b_is_better else "A"
        note = f"only {num_differing} segments differ" if num_differing <= TOO_FEW else ""
        row = {"metric": metric, "score_a": score_a, "score_b": score_b, "difference": score_b - score_a, "p": p}
        row |= {"significant": "yes" if better else "no", "better": better, "n": len(texts[-1]), "note": note}
        rows.append(facts | row | {"signature": signature})
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


def shown(rows):
    """The table as shown: a pandas.DataFrame of text.

    Args:
        rows: A pandas.DataFrame with ``COLUMNS``.
    """
    import pandas

    metrics = [METRICS[name] for name in rows["metric"]]
    numbers = rows[["score_a", "score_b", "difference"]].mul([metric.factor for metric in metrics], axis=0)
    return pandas.DataFrame(
        {
            "test set": [test_set_name(*row) for row in rows[list(COLUMNS[:6])].itertuples(index=False)],
            "metric": [metric.heading for metric in metrics],
            "A": numbers["score_a"].map("{:.2f}".format),
            "B": numbers["score_b"].map("{:.2f}".format),
            "B - A": numbers["difference"].map("{:+.2f}".format) + rows["significant"].map({"yes": "*", "no": " "}),
            "p": rows["p"].map("{:.4f}".format),
            "better": rows["better"].replace("", "-"),
            "n": rows["n"].map("{:,}".format),
            "note": rows["note"],
        }
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
    sets_a, sets_b = read_systems(system_a, system_b, (shots_a, shots_b), references, target_lang, task)
    shared = sorted(sets_a.keys() & sets_b.keys())
    if not shared:
        raise UserError(
            f"no test set is in both: A has {', '.join(test_set_name(*key) for key in sorted(sets_a))};"
            f" B has {', '.join(test_set_name(*key) for key in sorted(sets_b))}",
            "name systems with a test set in common",
        )
    texts = {key: align(sets_a[key], sets_b[key]) for key in shared}  # all are checked before one is tested
    with stage(__file__, output_dir, arguments, inputs=["system_a", "system_b", "references"]) as work:
        if work.done:
            print((output_dir / "comparison.md").read_text(encoding="utf-8"), end="")
            return
        import pandas

        rows = []
        for number, key in enumerate(shared, 1):
            print(f"{number}/{len(shared)}: {test_set_name(*key)}", flush=True)
            rows += compare_sets(sets_a[key], sets_b[key], texts[key])
        rows = pandas.DataFrame(rows, columns=list(COLUMNS))
        with work.publish("comparison.csv") as path:
            rows.to_csv(path, index=False, lineterminator="\n")
        systems = [f"{letter}: {' + '.join(map(str, paths))}" for letter, paths in (("A", system_a), ("B", system_b))]
        notes = []
        for letter, mine, others in (("A", sets_a, sets_b), ("B", sets_b, sets_a)):
            alone = [test_set_name(*key) for key in sorted(mine.keys() - others.keys())]
            if alone:
                notes.append(f"Only in {letter}, not compared: {', '.join(alone)}.")
        notes.append(NOTE)
        table = shown(rows)
        signed = "\n".join(f"- `{name}`" for name in (rows["metric"] + "|" + rows["signature"]).unique())
        parts = [as_text(table, ALIGN), "  \n".join(systems), *notes, "Signatures:", signed]
        with work.publish("comparison.md") as path:
            path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        marked = int((rows["significant"] == "yes").sum())
        work.counts |= {"test_sets": len(shared), "rows": len(rows), "significant": marked}
        print("\n".join(["", as_text(table, ALIGN, "simple"), "", *systems, *notes]))
    print(f"{marked} of {len(rows)} differences are significant; written: {output_dir}/comparison.md, comparison.csv")


if __name__ == "__main__":
    run(compare)
