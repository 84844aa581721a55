"""Score raw outputs: translation with BLEU, spBLEU and chrF, transcription with WER and CER; 95% intervals.

Usage: python results/score.py --generations runs/generations/checkpoint-300 runs/generations/sft \\
           --model TowerSpeech --mixture 5to1 --output_dir results/TowerSpeech
       python results/score.py --hypotheses out.de --references ref.de --target_lang de --output scores.csv \\
           --metrics bleu,chrf2

Reads checkpoints' folders of generations (generate/generate.py): <0_shot|5_shot|asr>/<task file>.jsonl and the
run_info.json that finished them; or plain files, one segment a line.
Writes one CSV a checkpoint, <output_dir>/<step>.csv, in long form: model, mixture, checkpoint, task, dataset, shots,
src_lang, tgt_lang, metric, score, ci_low, ci_high, n, signature, generations_sha256. What is scored already stays, and
other metrics come beside it; rows of changed outputs are replaced. WER and CER are shares (0.25), sacreBLEU's scores
lie in 0..100; rows such as `empty` are counts. With plain files the hash is that of the hashes of hypotheses and
references; dataset, and model unless it is given, are their paths, seen from the CSV.
COMET-22 and CometKiwi have a command of their own, results/score_comet.py, which adds to the same CSVs.
"""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from results.scores_csv import choose_metrics, opened, read_test_sets
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.generations import Outputs, naming
from towerspeech.metrics import (
    ERROR_RATES,
    GET_SPBLEU,
    SACREBLEU_METRICS,
    TRANSLATION_TASKS,
    Score,
    signatures,
    spbleu_file,
)
from towerspeech.metrics import score as score_texts
from towerspeech.stage import record

SEGMENTS_A_PROCESS = 2000  # a process takes as long to start as so many take to score
Work = tuple[int, Outputs, list[str], Path | None]  # a test set's number, its outputs, its rows, spBLEU's model


def wanted_rows(
    sets: list[tuple[Path, Outputs]], chosen: list[str] | None, spbleu_model: Path | None
) -> list[dict[str, str]]:
    """The rows of each test set that are wanted, and their signatures: of the chosen metrics, those for its task."""
    translations = any(outputs.facts["task"] in TRANSLATION_TASKS for _, outputs in sets)
    if chosen is None and translations and not spbleu_file(spbleu_model):
        print(f"no spBLEU: its model is not in sacreBLEU's cache; {GET_SPBLEU}", flush=True)
    wanted = []
    for _, outputs in sets:
        with naming(outputs):
            signed = signatures(outputs.facts["task"], outputs.facts["tgt_lang"], chosen, spbleu_model)
        if outputs.finish_reasons is None:
            signed.pop("truncated", None)
        wanted.append(signed)
    if not any(wanted):
        tasks = ", ".join(sorted({outputs.facts["task"] for _, outputs in sets}))
        raise UserError(f"none of {', '.join(chosen)} can be computed here ({tasks})")
    return wanted


def compute(work: Work) -> tuple[int, list[Score]]:
    """Compute a test set's rows, in whichever process; returns them with its number."""
    number, outputs, rows, spbleu_model = work
    task, target_lang = outputs.facts["task"], outputs.facts["tgt_lang"]
    texts = outputs.hypotheses, outputs.references
    with naming(outputs):
        return number, score_texts(task, *texts, target_lang, outputs.finish_reasons, rows, spbleu_model)


def compute_all(work: list[Work], processes: int) -> Iterator[tuple[int, list[Score]]]:
    """Compute test sets, in several processes if that pays; yields each as it is done."""
    segments = sum(len(outputs.references) for _, outputs, *_ in work)
    processes = min(processes, len(work), segments // SEGMENTS_A_PROCESS)
    if processes < 2:
        yield from map(compute, work)
        return
    long_first = sorted(work, key=lambda item: -sum(map(len, item[1].references)))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # forked ones would keep the CSVs' locks
        yield from pool.imap_unordered(compute, long_first)


def score(
    generations: list[Path] | None = None,
    model: str = "",
    mixture: str = "",
    output_dir: Path | None = None,
    prompts: list[Path] | None = None,
    hypotheses: Path | None = None,
    references: Path | None = None,
    target_lang: str | None = None,
    task: Literal["mt", "st", "cascaded_st", "asr"] = "mt",
    output: Path | None = None,
    metrics: list[str] | None = None,
    spbleu_model: Path | None = None,
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
        target_lang: The hypotheses' language, such as de.
        task: What the line files hold.
        output: CSV to write for line files.
        metrics: Of bleu, chrf2, chrf2++, spbleu, wer, cer; with commas or spaces between them. Default: all, but
            spbleu only if its model is there.
        spbleu_model: spBLEU's SentencePiece model (flores200). Default: where sacreBLEU downloads it to.
        processes: Number of processes. Default: one for each core that we may use.
    """
    arguments = dict(locals())
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}", "give at least 1")
    chosen = None if metrics is None else choose_metrics(metrics, (*SACREBLEU_METRICS, *ERROR_RATES))
    sets = read_test_sets(arguments)
    wanted = wanted_rows(sets, chosen, spbleu_model)
    with opened(sets) as tables:
        work = []
        for number, ((path, outputs), signed) in enumerate(zip(sets, wanted, strict=True)):
            missing = tables[path].missing(outputs, signed)
            if missing:
                work.append((number, outputs, missing, spbleu_model))
            elif signed:
                print(f"already scored: {outputs.file}", flush=True)
        for number, scores in compute_all(work, processes or len(os.sched_getaffinity(0))):
            path, outputs = sets[number]
            tables[path].add(outputs, scores)
        for path, csv in tables.items():
            print(f"{path}: {len(csv.table):,} rows")
    if output_dir:
        asked = {name: value for name, value in arguments.items() if name != "processes"}  # which are speed alone
        record(__file__, "score", output_dir, asked, ["generations"], list(tables))


if __name__ == "__main__":
    run(score)
