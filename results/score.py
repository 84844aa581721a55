"""Score raw outputs: translation with BLEU, spBLEU, chrF and COMET, transcription with WER and CER; 95% intervals.

Usage: python results/score.py --generations runs/generations/checkpoint-300 runs/generations/sft \\
           --model TowerSpeech --mixture 5to1 --output_dir results/TowerSpeech
       python results/score.py --hypotheses out.de --references ref.de --target_lang de --output scores.csv \\
           --metrics bleu,chrf2,comet22 --sources src.en

Reads checkpoints' folders of generations (generate/generate.py): <0_shot|5_shot|asr>/<task file>.jsonl and the
run_info.json that finished them; or plain files, one segment a line.
Writes one CSV a checkpoint, <output_dir>/<step>.csv, in long form: model, mixture, checkpoint, task, dataset, shots,
src_lang, tgt_lang, metric, score, ci_low, ci_high, n, signature, generations_sha256. What is scored already stays, and
other metrics come beside it; rows of changed outputs are replaced. WER and CER are shares (0.25), sacreBLEU's scores
lie in 0..100, COMET's are as COMET gives them; rows such as `empty` are counts. With plain files the hash is that of
the hashes of hypotheses and references; dataset, and model unless it is given, are their paths, seen from the CSV.
COMET-22 and CometKiwi (comet22, cometkiwi22) run in an environment of their own: bash install.sh comet.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from towerspeech.command import UserError, run
from towerspeech.files import check_exists, hash_file, locked
from towerspeech.metrics import (
    BOOTSTRAP_SAMPLES,
    ERROR_RATES,
    GET_SPBLEU,
    SACREBLEU_METRICS,
    SEED,
    TEST_SET,
    TRANSLATION_TASKS,
    read_results,
    write_results,
)
from towerspeech.records import prompt_hash, read_jsonl, read_lines, read_prompts
from towerspeech.stage import RUN_INFO

FACTS = ("task", "dataset", "shots", "src_lang", "tgt_lang")
GENERATED = ("id", *FACTS, "reference", "text", "finish_reason")
COMET_METRICS = ("comet22", "cometkiwi22")
METRICS = (*SACREBLEU_METRICS, *COMET_METRICS, *ERROR_RATES)
SHORT = {"chrf": "chrf2", "chrf++": "chrf2++"}  # what people also write
COMET_ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-comet"
SEGMENTS_A_PROCESS = 2000  # a process takes as long to start as so many take to score


class Outputs(NamedTuple):
    """One system's outputs for one test set."""

    file: Path
    facts: dict  # the columns of TEST_SET
    hypotheses: list[str]
    references: list[str]
    finish_reasons: list[str | None] | None
    sha256: str
    sources: list[str] | None = None  # None where a row has none
    sources_sha256: str = ""  # of a plain file, which sha256 leaves out


class Plan(NamedTuple):
    """What is wanted of one test set."""

    table: Path
    outputs: Outputs
    signed: dict[str, str]  # rows and their signatures


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


def read_generations(
    path: Path, sha256: str, model: str, mixture: str, checkpoint: str, prompts: list[dict] | None
) -> Outputs:
    """Read one file of generations; all of its rows must be of one test set, and answer the prompts, if given.

    Raises:
        UserError: A malformed row, a repeated id, rows of two test sets or of other prompts; names file and line.
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
    if prompts is not None:
        check_prompts(path, rows, prompts)
    facts = {"model": model, "mixture": mixture, "checkpoint": checkpoint} | {n: str(rows[0][n]) for n in FACTS}
    texts = ([row[name] for row in rows] for name in ("text", "reference", "finish_reason"))
    sources = [row.get("source") for row in rows]
    return Outputs(path, facts, *texts, sha256, sources if all(isinstance(text, str) for text in sources) else None)


def check_prompts(path: Path, rows: list[dict], prompts: list[dict]) -> None:
    """Raise UserError unless the rows answer these very prompts, all of them, and carry their references."""
    remedy = "generate anew from these prompts, or name those that were used"
    asked = {prompt["id"]: prompt for prompt in prompts}
    for number, row in enumerate(rows, 1):
        prompt = asked.pop(row["id"], None)
        if prompt is None:
            problem = f"is none of the prompts from {prompts[0]['where']} on"
        elif row.get("prompt_sha256") != prompt_hash(prompt):
            problem = f"was generated from another prompt than {prompt['where']}"
        elif row["reference"] != prompt.get("output"):
            problem = f"has another reference than {prompt['where']}"
        else:
            continue
        raise UserError(f"{path}:{number}: id {row['id']!r} {problem}", remedy)
    for prompt in asked.values():
        raise UserError(f"{path} has no output for {prompt['where']}, id {prompt['id']!r}", remedy)


def read_line_files(hypotheses: Path, references: Path, sources: Path | None, facts: dict) -> Outputs:
    """Read outputs, references and perhaps sources from plain files, one segment a line."""
    files = {"hypotheses": hypotheses, "references": references} | ({"sources": sources} if sources else {})
    texts = {name: read_lines(path) for name, path in files.items()}
    outputs = texts["hypotheses"]
    for name, lines in texts.items():
        if len(lines) != len(outputs):
            raise UserError(
                f"{len(outputs)} hypotheses in {hypotheses} for {len(lines)} {name} in {files[name]}",
                "all need one line a segment, in the same order",
            )
    sha256 = hashlib.sha256(f"{hash_file(hypotheses)} {hash_file(references)}".encode()).hexdigest()
    sources_sha256 = hash_file(sources) if sources else ""
    return Outputs(hypotheses, facts, outputs, texts["references"], None, sha256, texts.get("sources"), sources_sha256)


def read_checkpoints(
    folders: list[Path], model: str, mixture: str, output_dir: Path, prompt_files: list[Path]
) -> list[tuple[Path, Outputs]]:
    """Read all generations of all checkpoints, each with the CSV that it belongs to."""
    files = {folder: finished_files(folder) for folder in folders}
    prompts = read_prompts(prompt_files)
    generated = {str(path.relative_to(folder)) for folder in folders for path in files[folder]}
    for name in prompts:
        if name not in generated:
            raise UserError(f"--prompts has {name}, of which there are no generations", "check --prompts")
    checkpoints: dict[str, list[Path]] = {}  # generate.py's and generate_ASR.py's folders share a checkpoint's CSV
    for folder in folders:
        checkpoints.setdefault(checkpoint_name(folder), []).append(folder)
    sets = []
    for name, parts in checkpoints.items():
        found: dict[tuple, Outputs] = {}
        for folder, path in [(part, path) for part in parts for path in files[part]]:
            asked = prompts.get(str(path.relative_to(folder)))
            outputs = read_generations(path, files[folder][path], model, mixture, name, asked)
            other = found.setdefault(tuple(outputs.facts.values()), outputs)
            if other is not outputs:
                raise UserError(f"{path} and {other.file} hold the same test set", "score them into two --output_dir")
        sets += [(output_dir / f"{name}.csv", outputs) for outputs in found.values()]
    return sets


# --- The CSV --------------------------------------------------------------------------------------
def missing_rows(rows: list[dict[str, str]], plan: Plan) -> list[str]:
    """Those of the wanted rows that are not there, for these very outputs, computed in the same way."""
    facts = {**plan.outputs.facts, "generations_sha256": plan.outputs.sha256}
    same = (row for row in rows if all(row[name] == value for name, value in facts.items()))
    found = {row["metric"]: row["signature"] for row in same}
    return [metric for metric, signature in plan.signed.items() if found.get(metric) != signature]


def as_row(outputs: Outputs, **values) -> dict[str, str]:
    """A row of the CSV. Numbers are written in full."""
    values = {name: "" if value is None else str(value) for name, value in values.items()}
    return {**outputs.facts, **values, "generations_sha256": outputs.sha256}


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


@contextlib.contextmanager
def opened(path: Path, outputs: Outputs) -> Iterator[list[dict[str, str]]]:
    """Hold a CSV's lock; yield its rows.

    Raises:
        UserError: The CSV is another system's.
    """
    with locked(path.with_name(f".{path.stem}.lock")):
        for temporary in path.parent.glob(f".tmp-{path.name}-*"):  # a killed attempt's: we hold the lock
            temporary.unlink()
        rows = read_results(path) if path.is_file() else []
        for row, name in ((row, name) for row in rows for name in ("model", "mixture", "checkpoint")):
            if outputs.finish_reasons is not None and row[name] != outputs.facts[name]:
                raise UserError(
                    f"{path} is of {name} {row[name]!r}, not {outputs.facts[name]!r}", "name another --output_dir"
                )
        yield rows


def save(path: Path, rows: list[dict[str, str]], outputs: Outputs, new: list[dict[str, str]]) -> None:
    """Add a test set's new rows to a CSV, and say so, and of how many rows of other outputs they take the place."""
    of_test_set = [row for row in rows if all(row[name] == new[0][name] for name in TEST_SET)]
    replaced = sum(row["generations_sha256"] != outputs.sha256 for row in of_test_set)
    rows[:] = merge(rows, new)
    write_results(path, rows)
    shown = {"bleu": "BLEU {:.2f}", "spbleu": "spBLEU {:.2f}", "chrf2": "chrF2 {:.2f}", "chrf2++": "chrF2++ {:.2f}"}
    shown |= {
        "comet22": "COMET-22 {:.4f}",
        "cometkiwi22": "CometKiwi-22 {:.4f}",
        "wer_english": "WER (English) {:.4f}",
    }
    if new[0]["tgt_lang"] != "en":
        shown |= {"wer_basic": "WER (Basic) {:.4f}", "cer_basic": "CER (Basic) {:.4f}"}
    told = [shown[row["metric"]].format(float(row["score"])) for row in new if row["metric"] in shown]
    if replaced:
        told.append(f"in place of {replaced} rows of other outputs or references")
    print(f"scored {outputs.file}: {', '.join([f'{len(outputs.references):,} segments', *told])}", flush=True)


# --- Metrics --------------------------------------------------------------------------------------
def choose_metrics(words: list[str] | None) -> tuple[list[str] | None, list[str]]:
    """Names as people write them -> those computed here (None: all that are there), and COMET's."""
    if words is None:
        return None, []
    names = [SHORT.get(name, name) for word in words for name in word.split(",")]
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}", f"name of: {', '.join(METRICS)}")
    return [n for n in names if n not in COMET_METRICS], [n for n in COMET_METRICS if n in names]


def make_plans(
    sets: list[tuple[Path, Outputs]], chosen: list[str] | None, comet: dict[str, str], spbleu_model: Path | None
) -> list[Plan]:
    """What is wanted of each test set: metrics that are for its task. All are checked before one is scored.

    Args:
        sets: Test sets and their CSVs.
        chosen: Metrics to compute here.
        comet: COMET metrics and their signatures.
        spbleu_model: spBLEU's.
    """
    from towerspeech.metrics import signatures, spbleu_file

    translations = any(outputs.facts["task"] in TRANSLATION_TASKS for _, outputs in sets)
    if chosen is None and translations and not spbleu_file(spbleu_model):
        print(f"no spBLEU: its model is not in sacreBLEU's cache; {GET_SPBLEU}", flush=True)
    plans = []
    for path, outputs in sets:
        task, target_lang = outputs.facts["task"], outputs.facts["tgt_lang"]
        try:
            signed = signatures(task, target_lang, chosen, spbleu_model)
        except UserError as error:
            raise UserError(f"{outputs.file}: {error}") from None
        if outputs.finish_reasons is None:
            signed.pop("truncated", None)
        if task in TRANSLATION_TASKS and outputs.sources is not None:
            end = f"|sources:{outputs.sources_sha256[:16]}" if outputs.sources_sha256 else ""
            signed |= {metric: signature + end for metric, signature in comet.items()}
        elif task in TRANSLATION_TASKS and comet:
            print(f"no {', '.join(comet)} for {outputs.file}: it has no sources", flush=True)
        plans.append(Plan(path, outputs, signed))
    return plans


def compute(job: tuple[int, Outputs, list[str], Path | None]) -> tuple[int, list[dict[str, str]]]:
    """Compute a test set's rows, in whichever process; returns them with the job's number."""
    from towerspeech import metrics

    number, outputs, rows, spbleu_model = job
    try:
        scores = metrics.score(
            outputs.facts["task"],
            outputs.hypotheses,
            outputs.references,
            outputs.facts["tgt_lang"],
            outputs.finish_reasons,
            rows,
            spbleu_model,
        )
    except UserError as error:
        raise UserError(f"{outputs.file}: {error}") from None
    return number, [as_row(outputs, **score._asdict()) for score in scores]


def compute_all(jobs: list[tuple], processes: int) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Compute jobs, in several processes if that pays; yields each as it is done."""
    processes = min(processes, len(jobs), sum(len(job[1].references) for job in jobs) // SEGMENTS_A_PROCESS)
    if processes < 2:
        yield from map(compute, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # forked ones would keep the CSVs' locks
        yield from pool.imap_unordered(compute, jobs)


# --- COMET ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def comet_process(models: dict[str, str]) -> Iterator[Callable[[dict], dict]]:
    """Start predict_comet.py in COMET's environment; yield a function that asks it.

    Args:
        models: COMET metrics and their models.
    """
    command = [COMET_ENVIRONMENT / "bin/python", "-P", Path(__file__).with_name("predict_comet.py")]
    command += [word for metric, model in models.items() for word in (f"--{metric}", model)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it is gone, as the next line finds out
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise UserError(f"COMET ended with status {process.wait()}", "what it printed above says why")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"], reply["remedy"])
        return reply

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def comet_signature(ask: Callable[[dict], dict], metric: str) -> str:
    """How a COMET metric is computed."""
    found = ask({"metric": metric})
    return f"{found['model']}|bs:{BOOTSTRAP_SAMPLES}|seed:{SEED}|version:unbabel-comet-{found['version']}"


def comet_row(ask: Callable[[dict], dict], metric: str, plan: Plan) -> dict[str, str]:
    """Compute one COMET score: the mean of the segments' scores."""
    from towerspeech.metrics import mean_interval

    outputs = plan.outputs
    columns = {"src": outputs.sources, "mt": outputs.hypotheses}
    if metric == "comet22":
        columns["ref"] = outputs.references
    samples = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    found = ask({"metric": metric, "samples": samples})
    if not all(map(math.isfinite, found["scores"])):
        raise UserError(f"{outputs.file}: {metric} gives scores that are no numbers", "check the model")
    low, high = mean_interval(found["scores"])
    values = {"metric": metric, "score": found["mean"], "ci_low": low, "ci_high": high, "n": len(samples)}
    return as_row(outputs, **values, signature=plan.signed[metric])


# --- All of it ------------------------------------------------------------------------------------
def score_all(
    sets: list[tuple[Path, Outputs]],
    chosen: list[str] | None,
    models: dict[str, str],
    spbleu_model: Path | None,
    processes: int,
) -> None:
    """Bring the CSVs up to date with the outputs, saving after each test set."""
    with contextlib.ExitStack() as stack:
        ask = stack.enter_context(comet_process(models)) if models else None
        plans = make_plans(sets, chosen, {metric: comet_signature(ask, metric) for metric in models}, spbleu_model)
        if not any(plan.signed for plan in plans):
            tasks = ", ".join(sorted({outputs.facts["task"] for _, outputs in sets}))
            raise UserError(f"none of {', '.join([*(chosen or []), *models])} can be computed here ({tasks})")
        tables = {}
        for path, outputs in sorted(dict(sets).items()):
            tables[path] = stack.enter_context(opened(path, outputs))
        jobs, asked = [], []
        for number, plan in enumerate(plans):
            missing = missing_rows(tables[plan.table], plan)
            if plan.signed and not missing:
                print(f"already scored: {plan.outputs.file}", flush=True)
            rows = [metric for metric in missing if metric not in COMET_METRICS]
            if rows:
                jobs.append((number, plan.outputs, rows, spbleu_model))
            asked += [(metric, plan) for metric in missing if metric in COMET_METRICS]
        for number, new in compute_all(jobs, processes):
            save(plans[number].table, tables[plans[number].table], plans[number].outputs, new)
        for metric, plan in sorted(asked, key=lambda item: item[0]):  # one model after the other
            save(plan.table, tables[plan.table], plan.outputs, [comet_row(ask, metric, plan)])
        for path, rows in tables.items():
            print(f"{path}: {len(rows):,} rows")


def score(
    generations: list[Path] | None = None,
    model: str = "",
    mixture: str = "",
    output_dir: Path | None = None,
    prompts: list[Path] | None = None,
    hypotheses: Path | None = None,
    references: Path | None = None,
    sources: Path | None = None,
    target_lang: str | None = None,
    task: Literal["mt", "st", "cascaded_st", "asr"] = "mt",
    output: Path | None = None,
    metrics: list[str] | None = None,
    spbleu_model: Path | None = None,
    comet_model: str = "Unbabel/wmt22-comet-da",
    cometkiwi_model: str = "Unbabel/wmt22-cometkiwi-da",
    processes: int | None = None,
) -> None:
    """Score generations, or plain line files.

    Args:
        generations: Checkpoints' folders of generations, such as .../base .../checkpoint-300 .../sft.
        model: The model's name, for the CSV. For line files it may be left out: their path then stands there.
        mixture: The training mixture's name, for the CSV.
        output_dir: Folder of the checkpoints' CSVs: results/<model>.
        prompts: Prompt files that the generations of the same name must have come from; refused if they did not.
        hypotheses: Outputs, one a line, instead of generations.
        references: References, one a line.
        sources: Sources, one a line, which COMET reads too.
        target_lang: The hypotheses' language, such as de.
        task: What the line files hold.
        output: CSV to write for line files.
        metrics: Of bleu, chrf2, chrf2++, spbleu, comet22, cometkiwi22, wer, cer; with commas or spaces between them.
            Default: all but COMET's, and spbleu only if its model is there.
        spbleu_model: spBLEU's SentencePiece model (flores200). Default: where sacreBLEU downloads it to.
        comet_model: COMET-22: a name on the Hugging Face hub, or a local checkpoint.
        cometkiwi_model: CometKiwi: likewise.
        processes: For all but COMET. Default: one for each core that we may use.
    """
    folder_way = {"generations": generations, "output_dir": output_dir}
    line_way = {"hypotheses": hypotheses, "references": references, "target_lang": target_lang, "output": output}
    given = [name for name, value in (folder_way | line_way).items() if value]
    if given not in (list(folder_way), list(line_way)) or (generations and sources) or (hypotheses and prompts):
        given += [name for name, value in {"sources": sources, "prompts": prompts}.items() if value]
        raise UserError(
            f"got {', '.join(f'--{name}' for name in given) or 'neither generations nor hypotheses'}",
            "give either --generations and --output_dir (with --model, --mixture, --prompts), "
            "or --hypotheses, --references, --target_lang and --output (with --sources)",
        )
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}", "give at least 1")
    chosen, comet = choose_metrics(metrics)
    if comet and (not (COMET_ENVIRONMENT / "bin/python").exists() or (COMET_ENVIRONMENT / ".unfinished").exists()):
        raise UserError(f"{', '.join(comet)} run in {COMET_ENVIRONMENT}, which is not there", "bash install.sh comet")
    if generations:
        if not model:
            raise UserError("--model is missing", "name the model as it shall stand in the CSV")
        sets = read_checkpoints(generations, model, mixture, output_dir, prompts or [])
    else:
        # Not their names alone: a/out.de and b/out.de are two systems. Seen from the CSV, wherever we are called from.
        system, dataset = (os.path.relpath(path, output.parent) for path in (hypotheses, references))
        facts = {"model": model or system, "mixture": mixture, "checkpoint": ""}
        facts |= {"task": task, "dataset": dataset, "shots": "", "src_lang": "", "tgt_lang": target_lang}
        sets = [(output, read_line_files(hypotheses, references, sources, facts))]
    if comet and not any(outputs.sources for _, outputs in sets):
        remedy = "generate from prompts with a source" if generations else "give --sources"
        raise UserError(f"{', '.join(comet)} read the sources too, and there are none", remedy)
    models = {"comet22": comet_model, "cometkiwi22": cometkiwi_model}
    cores = processes or len(os.sched_getaffinity(0))
    score_all(sets, chosen, {metric: models[metric] for metric in comet}, spbleu_model, cores)


if __name__ == "__main__":
    run(score)
