"""Score raw outputs: BLEU and chrF2 for translation, WER and CER for transcription, with 95% intervals.

Usage: python results/score.py --generations runs/generations/checkpoint-300 runs/generations/sft \\
           --model TowerSpeech --mixture 5to1 --output_dir results/TowerSpeech
       python results/score.py --hypotheses out.de --references ref.de --target_lang de --output scores.csv

Reads checkpoints' folders of generations (generate/generate.py): <0_shot|5_shot|asr>/<task file>.jsonl and the
run_info.json that finished them; or two plain files, one segment a line.
Writes one CSV a checkpoint, <output_dir>/<step>.csv, in long form: model, mixture, checkpoint, task, dataset, shots,
src_lang, tgt_lang, metric, score, ci_low, ci_high, n, signature, generations_sha256. What is scored already stays;
rows of changed outputs are replaced. WER and CER are shares (0.25), BLEU and chrF2 lie in 0..100; rows such as `empty`
are counts. With plain files the hash is that of both files' hashes.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from towerspeech.metrics import TEST_SET, read_results, write_results
from towerspeech.records import read_jsonl, read_lines
from towerspeech.stage import RUN_INFO, UserError, check_exists, hash_file, locked, run

FACTS = ("task", "dataset", "shots", "src_lang", "tgt_lang")
GENERATED = ("id", *FACTS, "reference", "text", "finish_reason")


class Outputs(NamedTuple):
    """One system's outputs for one test set."""

    file: Path
    facts: dict  # the columns of TEST_SET
    hypotheses: list[str]
    references: list[str]
    finish_reasons: list[str | None] | None
    sha256: str


# --- Reading --------------------------------------------------------------------------------------
def checkpoint_name(folder: Path) -> str:
    """``300`` for checkpoint-300, else the folder's name: base, sft."""
    name = folder.resolve().name
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return match[1] if match else name


def finished_files(folder: Path) -> dict[Path, str]:
    """A checkpoint's generation files and their hashes, which must be those that its run_info.json recorded.

    Raises:
        UserError: The generation is not finished, or a file is missing, changed or not of that run.
    """
    remedy = f"run generate/generate.py for {folder} (it resumes)"
    check_exists(folder, remedy)
    infos = sorted(folder.glob(f"*{RUN_INFO}"))
    if not infos:
        raise UserError(f"{folder} is not finished: it has no {RUN_INFO}", remedy)
    recorded = {}
    for info in infos:
        recorded |= json.loads(info.read_text(encoding="utf-8"))["outputs"]
    recorded = {folder / name: sha256 for name, sha256 in recorded.items() if name.endswith(".jsonl")}
    found = {path for path in folder.rglob("*.jsonl") if not path.name.startswith(".")}
    if not recorded:
        raise UserError(f"{infos[0]} records no generations", remedy)
    for path in sorted({*recorded, *found}):
        if path not in found:
            raise UserError(f"{path} is gone", remedy)
        if path not in recorded:
            raise UserError(f"{path} is not of the run that {infos[0]} records", "move it away, or generate anew")
        if hash_file(path) != recorded[path]:
            raise UserError(f"{path} changed since it was generated: not the hash in {infos[0].name}", "generate anew")
    return dict(sorted(recorded.items()))


def read_generations(path: Path, sha256: str, model: str, mixture: str, checkpoint: str) -> Outputs:
    """Read one file of generations; all of its rows must be of one test set.

    Raises:
        UserError: A malformed row, a repeated id, or rows of two test sets; names file and line.
    """
    rows = read_jsonl(path, GENERATED)
    seen = set()
    for number, row in enumerate(rows, 1):
        for name in FACTS:
            if row[name] != rows[0][name]:
                raise UserError(f"{path}:{number}: {name} is {row[name]!r}, above {rows[0][name]!r}", "generate anew")
        if not isinstance(row["text"], str) or not isinstance(row["reference"], str):
            raise UserError(f"{path}:{number}: text and reference must be strings", "give every prompt an output")
        if row["id"] in seen:
            raise UserError(f"{path}:{number}: id {row['id']!r} is there twice", "generate anew, from unique ids")
        seen.add(row["id"])
    facts = {"model": model, "mixture": mixture, "checkpoint": checkpoint} | {n: str(rows[0][n]) for n in FACTS}
    texts = ([row[name] for row in rows] for name in ("text", "reference", "finish_reason"))
    return Outputs(path, facts, *texts, sha256)


def read_line_files(hypotheses: Path, references: Path, facts: dict) -> Outputs:
    """Read outputs and references from plain files, one segment a line."""
    texts = [read_lines(path) for path in (hypotheses, references)]
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{len(texts[0])} hypotheses in {hypotheses} for {len(texts[1])} references in {references}",
            "both need one line a segment, in the same order",
        )
    sha256 = hashlib.sha256(f"{hash_file(hypotheses)} {hash_file(references)}".encode()).hexdigest()
    return Outputs(hypotheses, facts, *texts, None, sha256)


# --- The CSV --------------------------------------------------------------------------------------
def is_scored(rows: list[dict[str, str]], outputs: Outputs, signed: dict[str, str]) -> bool:
    """Whether all metrics of these very outputs are in the rows, computed in the same way."""
    found = {
        row["metric"]: row["signature"]
        for row in rows
        if all(row[name] == outputs.facts[name] for name in TEST_SET) and row["generations_sha256"] == outputs.sha256
    }
    return all(found.get(metric) == signature for metric, signature in signed.items())


def score_rows(outputs: Outputs) -> list[dict[str, str]]:
    """Compute one test set's rows. Numbers are written in full."""
    from towerspeech import metrics

    scores = metrics.score(
        outputs.facts["task"],
        outputs.hypotheses,
        outputs.references,
        outputs.facts["tgt_lang"],
        outputs.finish_reasons,
    )
    return [
        outputs.facts
        | {name: "" if value is None else str(value) for name, value in score._asdict().items()}
        | {"generations_sha256": outputs.sha256}
        for score in scores
    ]


def merge(old: list[dict[str, str]], new: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put a test set's new rows in place of its old ones; drop what was computed on other outputs of the system.

    Rows of other metrics on the same outputs stay. The order depends on the rows alone.
    """
    test_set = [new[0][name] for name in TEST_SET]
    metrics = {row["metric"] for row in new}
    kept = [
        row
        for row in old
        if [row[name] for name in TEST_SET] != test_set
        or (row["metric"] not in metrics and row["generations_sha256"] == new[0]["generations_sha256"])
    ]
    order = (*TEST_SET, "metric")
    return sorted([*new, *kept], key=lambda row: [row[n].zfill(9) if n == "shots" else row[n] for n in order])


def update(path: Path, sets: list[Outputs]) -> None:
    """Bring a CSV up to date with a system's outputs, saving after each test set."""
    from towerspeech import metrics

    signed = []
    for outputs in sets:
        try:
            wanted = metrics.signatures(outputs.facts["task"], outputs.facts["tgt_lang"])
        except UserError as error:
            raise UserError(f"{outputs.file}: {error}") from None
        signed.append({m: s for m, s in wanted.items() if m != "truncated" or outputs.finish_reasons is not None})
    with locked(path.with_name(f".{path.stem}.lock")):
        for temporary in path.parent.glob(f".tmp-{path.name}-*"):  # a killed attempt's: we hold the lock
            temporary.unlink()
        rows = read_results(path) if path.is_file() else []
        for row, name in ((row, name) for row in rows for name in ("model", "mixture", "checkpoint")):
            if sets[0].finish_reasons is not None and row[name] != sets[0].facts[name]:
                raise UserError(
                    f"{path} is of {name} {row[name]!r}, not {sets[0].facts[name]!r}", "name another --output_dir"
                )
        for outputs, wanted in zip(sets, signed, strict=True):
            if is_scored(rows, outputs, wanted):
                print(f"already scored: {outputs.file}", flush=True)
                continue
            try:
                new = score_rows(outputs)
            except UserError as error:
                raise UserError(f"{outputs.file}: {error}") from None
            rows = merge(rows, new)
            write_results(path, rows)
            shown = {"bleu": "BLEU {:.2f}", "chrf2": "chrF2 {:.2f}", "wer_english": "WER (English) {:.4f}"}
            told = [shown[row["metric"]].format(float(row["score"])) for row in new if row["metric"] in shown]
            print(f"scored {outputs.file}: {len(outputs.references):,} segments, {', '.join(told)}", flush=True)
    print(f"{path}: {len(rows):,} rows")


def score(
    generations: list[Path] | None = None,
    model: str = "",
    mixture: str = "",
    output_dir: Path | None = None,
    hypotheses: Path | None = None,
    references: Path | None = None,
    target_lang: str | None = None,
    task: Literal["mt", "asr"] = "mt",
    output: Path | None = None,
) -> None:
    """Score generations, or plain line files.

    Args:
        generations: Checkpoints' folders of generations, such as .../base .../checkpoint-300 .../sft.
        model: The model's name, for the CSV.
        mixture: The training mixture's name, for the CSV.
        output_dir: Folder of the checkpoints' CSVs: results/<model>.
        hypotheses: Outputs, one a line, instead of generations.
        references: References, one a line.
        target_lang: Their language's code, such as de.
        task: What the line files hold.
        output: CSV to write for line files.
    """
    folder_way = {"generations": generations, "output_dir": output_dir}
    line_way = {"hypotheses": hypotheses, "references": references, "target_lang": target_lang, "output": output}
    given = [name for name, value in (folder_way | line_way).items() if value]
    if given not in (list(folder_way), list(line_way)):
        raise UserError(
            f"got {', '.join(f'--{name}' for name in given) or 'neither generations nor hypotheses'}",
            "give either --generations and --output_dir (with --model, --mixture), "
            "or --hypotheses, --references, --target_lang and --output",
        )
    if not generations:
        facts = {"model": model or hypotheses.name, "mixture": mixture, "checkpoint": ""}
        facts |= {"task": task, "dataset": references.name, "shots": "", "src_lang": "", "tgt_lang": target_lang}
        update(output, [read_line_files(hypotheses, references, facts)])
        return
    if not model:
        raise UserError("--model is missing", "name the model as it shall stand in the CSV")
    files = {folder: finished_files(folder) for folder in generations}  # all are checked before one is scored
    checkpoints: dict[str, list[Path]] = {}  # generate.py's and generate_ASR.py's folders share a checkpoint's CSV
    for folder in generations:
        checkpoints.setdefault(checkpoint_name(folder), []).append(folder)
    for name, folders in checkpoints.items():
        found: dict[tuple, Outputs] = {}
        for path, sha256 in (item for folder in folders for item in files[folder].items()):
            outputs = read_generations(path, sha256, model, mixture, name)
            other = found.setdefault(tuple(outputs.facts.values()), outputs)
            if other is not outputs:
                raise UserError(f"{path} and {other.file} hold the same test set", "score them into two --output_dir")
        update(output_dir / f"{name}.csv", list(found.values()))


if __name__ == "__main__":
    run(score)
