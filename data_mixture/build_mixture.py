"""Tokenize speech units and text into a mixture with exact token budgets.

Usage: python data_mixture/build_mixture.py --config systems/towerspeech_6b.yaml \\
           --tokenizer tokenizer/ --output_dir mixture/towerspeech_6b
       python data_mixture/build_mixture.py --config ... --plan true      # what it would be, from samples

Reads units Parquet, and text in the forms that towerspeech/texts.py tells. Writes, for each source, <source>.bin and
.idx in Megatron's indexed format, the same in validation/ with documents that are held out, and manifest.json:
documents, tokens, budget, epochs, what was left out, and the data_path that a Megatron trainer takes. left_out.jsonl
lists what could not be read, contamination.csv the documents that hold a sentence of a test set.

Of each source as many documents are drawn as its budget needs, and a reserve. Which of them are trained on, up to the
budget to the token, the trainer's seeded shuffle decides. One process reads while others encode; the same inputs give
the same bytes, whatever their number.

drawing.py decides what is drawn, reading.py reads and samples it, documents.py makes documents and tokens of it,
encoding.py does so as the Hugging Face tokenizer would (words.py each word once), output.py writes.
"""

import csv
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data_mixture.documents import Item, Maker
from data_mixture.drawing import AIM, Draw, Round
from data_mixture.encoders import Encoders
from data_mixture.output import LOOK_AFTER, NOTE_EVERY, Output, too_many_bad
from data_mixture.reading import Survey, batches, parts_of, read_items, survey
from towerspeech.command import run
from towerspeech.contamination import TestSentences, read_test_sets
from towerspeech.errors import UserError
from towerspeech.files import hash_file, write_json
from towerspeech.mixture import (
    Group,
    Source,
    check_sources,
    recorded_budgets,
    recorded_files,
    recorded_test_sets,
    with_budgets,
)
from towerspeech.stage import Stage, stage
from towerspeech.texts import Part, expand
from towerspeech.tokenizer import tokenizer_hash

VALIDATION_SHARE = 0.01  # of the tokens that are drawn, at most
FEW = 1000  # fewer items of a sample tell nothing of the share of bad ones
HELD_OUT = 1.25  # times the share that should be enough is taken from, until it is


class Wanted(NamedTuple):
    """How much is wanted of a source, in tokens."""

    drawn: int  # its budget and the reserve, of which those for validation are taken
    validation: int


def wanted_of(source: Source, reserve: float, validation_tokens: int) -> Wanted:
    """What is wanted of a source; the budget is there even with no reserve."""
    held_out = min(validation_tokens, round(VALIDATION_SHARE * source.budget))
    return Wanted(max(round(reserve * source.budget), source.budget + 2 * held_out), validation_tokens)


# --- One source -----------------------------------------------------------------------------------
def rounds(output: Output, draw: Draw, share: float, wanted: int) -> Iterator[list[Round]]:
    """The rounds of drawing up to the one that comes next, until the wanted tokens are drawn, or all there are.

    ``share`` is that of the source's tokens which the first round should draw.
    """
    state = output.state
    if not state["rounds"]:
        state["rounds"].append(draw.first_round(share))
    while True:
        known = [Round(*each) for each in state["rounds"]]
        yield known
        if drawn(state["counts"]) >= wanted or known[-1] == Round(len(draw.order), 1.0):
            return
        state["rounds"].append(draw.next_round(known[-1], drawn(state["counts"]) / wanted))
        state["at"] = [0, 0]


def items(
    source: Source, parts: list[Part], known: list[Round], draw: Draw, maker: Maker, at: list[int]
) -> Iterator[Item]:
    """Read a round's items, from where an earlier run came to."""
    for number in range(at[0], len(parts)):
        if takes := draw.takes(number, known):
            yield from read_items(source, parts[number], number, maker, takes, at[1] if number == at[0] else 0)


def tokenize(
    work: Stage, index: int, source: Source, found: Survey, wanted: Wanted, seed: int, encoders: Encoders, most: float
) -> Output:
    """Draw, tokenize and write a source's documents; a killed run goes on from the last note.

    Raises:
        UserError: More than the share ``most`` of the items cannot be read.
    """
    from tqdm import tqdm

    everything = not found.tokens_known or wanted.drawn * AIM >= found.tokens
    all_of_it = everything and found.tokens_known
    expected = max(1, round(found.tokens if all_of_it else wanted.drawn))
    to_spare = expected - source.budget / source.max_epochs
    validation = max(0, min(wanted.validation, round(VALIDATION_SHARE * expected), round(to_spare)))
    held_out = HELD_OUT * validation / expected, validation
    of = {"seed": seed, "validation": validation, "drawn": "all" if all_of_it else wanted.drawn}
    output = Output(work, source.name, encoders.maker.encoder.dtype, of)
    if output.finished or output.state.get("finishing"):
        output.finish()
        return output
    parts = parts_of(source)
    draw = Draw(source.name, seed, [part.size for part in parts])
    counts = output.state["counts"]
    bar = tqdm(total=expected, initial=drawn(counts), unit=" tokens", desc=source.name, unit_scale=True, mininterval=1)
    with output, bar:
        for known in rounds(output, draw, 1.0 if everything else wanted.drawn / found.tokens, wanted.drawn):
            if not found.tokens_known and drawn(counts) >= wanted.drawn:
                break  # a killed run had come so far
            coming = items(source, parts, known, draw, encoders.maker, output.state["at"])
            for made in encoders.map(batches(index, parts, coming)):
                output.add(made, held_out)
                bar.update(drawn(counts) - bar.n)
                if output.tasks % NOTE_EVERY == 0:
                    output.check_bad(most, LOOK_AFTER)
                if not found.tokens_known and drawn(counts) >= wanted.drawn:
                    break  # of the hub it is not known how much there is: what comes first is taken
        output.check_bad(most)
        output.note_finishing()
    output.finish()
    return output


def drawn(counts: dict) -> int:
    """Tokens for training and validation."""
    return counts["tokens"] + counts["validation_tokens"]


def look_at_all(work: Stage, sources: list[Source], encoders: Encoders, seed: int, most: float) -> list[Survey]:
    """The surveys of the sources, which a run that goes on need not make again.

    Raises:
        UserError: A source is too small, as far as that is known.
    """
    paths = [work.output_dir / f".{source.name}~{seed}.survey" for source in sources]  # no source's name holds ~
    surveys = [
        Survey(**json.loads(path.read_text())) if path.is_file() else look_at(index, source, encoders, most)
        for index, (source, path) in enumerate(zip(sources, paths, strict=True))
    ]
    check_sizes(sources, surveys)
    for path, found in zip(paths, surveys, strict=True):
        write_json(path, asdict(found))
    return surveys


# --- What the manifest tells ----------------------------------------------------------------------
def facts(source: Source, output: Output, found: Survey) -> dict:
    """What the manifest tells of a source that is tokenized, which must have enough tokens for its budget."""
    counts = output.state["counts"]
    left_out = {reason: count for reason, count in sorted(output.state["left_out"].items()) if count}
    if counts["bad"]:
        left_out["that cannot be read"] = counts["bad"]
    check_budget(source, counts, left_out)
    tokens = counts["tokens"] + counts["validation_tokens"]
    told = {
        "name": source.name,
        "kind": source.kind,
        "documents": counts["documents"],
        "left_out": left_out,
        "tokens": counts["tokens"],
        "budget": source.budget,
        "epochs": round(source.budget / counts["tokens"], 4),
        "tokens_per_character": round(tokens / counts["characters"], 4) if counts["characters"] else None,
        "validation": {"documents": counts["validation_documents"], "tokens": counts["validation_tokens"]},
        "sha256": hash_file(output.final("bin")),
        "estimated_tokens": round(found.tokens),
        "rounds": output.state["rounds"],
    }
    if counts["milliseconds"]:
        told["hours"] = round(counts["milliseconds"] / 3.6e6, 3)
        told["tokens_per_second"] = round(tokens / counts["milliseconds"] * 1000, 3)
    return told


def check_budget(source: Source, counts: dict, left_out: dict) -> None:
    """Raise UserError if a source has too few tokens for its budget."""
    tokens, held_out = counts["tokens"], counts["validation_tokens"]
    if source.budget > source.max_epochs * tokens:
        spared = f"; {held_out:,} are held out (--validation_tokens)" if held_out else ""
        raise UserError(
            too_small(source, tokens, left_out) + spared,
            "lower its budget or allow more max_epochs, and run this again: the other sources stay; or add data, and "
            "--overwrite true, which makes all of them anew",
        )


def too_small(source: Source, tokens: float, left_out: dict) -> str:
    """What is said of a source that has too few tokens."""
    told = "".join(f", left out {count:,} {reason}" for reason, count in left_out.items())
    missing = math.ceil(source.budget / source.max_epochs - tokens)
    epochs = f"{source.budget / tokens:.2f} epochs" if tokens else "endless epochs"
    return (
        f"source {source.name!r} has {tokens:,.0f} tokens for a budget of {source.budget:,} ({epochs}, max_epochs is "
        f"{source.max_epochs}){told}: {missing:,} missing"
    )


def check_sizes(sources: list[Source], surveys: list[Survey], planning: bool = False) -> None:
    """Raise UserError if sources have too few tokens for their budgets; it tells all of them.

    What only a sample tells is a warning, for it may be wrong (a file's first lines need not be like its others), but
    an error when one is planning.
    """
    pairs = [(source, found) for source, found in zip(sources, surveys, strict=True) if found.tokens_known]
    short = [each for each in pairs if each[0].budget > each[0].max_epochs * each[1].tokens]
    known = [too_small(source, found.tokens, found.left_out) for source, found in short if found.exact]
    likely = [
        f"{too_small(source, found.tokens, found.left_out)}, as a sample tells"
        for source, found in short
        if not found.exact
    ]
    if known or (planning and likely):
        told = "\n  ".join(known + likely)
        counted = f"{len(known + likely)} of {len(sources)} sources are too small"
        raise UserError(f"{told}\n  ({counted})", "add data, or lower their budgets, or allow more max_epochs")
    for line in likely:
        print(f"warning: {line}", flush=True)


def table(rows: list[dict]) -> str:
    """Sources as a table for people."""
    from tabulate import tabulate

    def cell(value):
        return f"{value:,}" if isinstance(value, int) else value

    cells = [{name: cell(value) for name, value in row.items()} for row in rows]
    return tabulate(cells, "keys", disable_numparse=True)


def row_of(told: dict) -> dict:
    """A source's line of the table."""
    return {
        "source": told["name"],
        "documents": told["documents"],
        "tokens": told["tokens"],
        "budget": told["budget"],
        "epochs": f"{told['epochs']:.2f}",
        "tokens/character": told["tokens_per_character"],
        "tokens/s": told.get("tokens_per_second"),
        "validation": told["validation"]["tokens"],
        "left out": ", ".join(f"{count:,} {reason}" for reason, count in told["left_out"].items()),
    }


def write_lists(work, outputs: list[Output], contamination: bool) -> None:
    """Write what could not be read, and which documents hold a sentence of a test set."""
    with work.publish("left_out.jsonl") as path, open(path, "w", encoding="utf-8") as file:
        for output in outputs:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in output.lines("bad"))
    if contamination:
        with work.publish("contamination.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "document", "test_set", "sentence", "by"])
            writer.writerows(row for output in outputs for row in output.lines("hits"))


# --- The plan -------------------------------------------------------------------------------------
def print_plan(sources: list[Source], surveys: list[Survey], wanted: dict[str, Wanted]) -> None:
    """Print what samples tell of the mixture."""
    rows = []
    for source, found in zip(sources, surveys, strict=True):
        tokens = min(found.tokens, wanted[source.name].drawn * AIM) if found.tokens_known else None
        rows.append(
            {
                "source": source.name,
                "documents there": round(found.documents),
                "tokens there": round(found.tokens),
                "to be drawn": tokens and round(tokens),
                "budget": source.budget,
                "epochs": f"{source.budget / tokens:.2f}" if tokens else None,
                "tokens/character": round(found.tokens / found.characters, 4) if found.characters else None,
                "hours": round(found.seconds / 3600, 1) if found.seconds else None,
                "known": "exactly" if found.exact else "from a sample" if found.tokens_known else "not",
            }
        )
    print(table(rows))


def look_at(index: int, source: Source, encoders: Encoders, most: float) -> Survey:
    """Survey a source; UserError if more than the share ``most`` of the sample cannot be read."""
    found = survey(index, source, parts_of(source), encoders)
    if found.bad > most * found.items and (found.exact or found.items >= FEW):
        raise too_many_bad(source.name, found.bad, found.items, most, found.first_bad)
    return found


# --- The stage ------------------------------------------------------------------------------------
def build_mixture(
    tokenizer: Path,
    output_dir: Path,
    sources: list[Source],
    groups: dict[str, Group] | None = None,
    test_sets: dict[str, list[str]] | None = None,
    bos: bool = False,
    seed: int = 0,
    reserve: float = 1.1,
    validation_tokens: int = 200_000,
    max_bad_share: float = 0.01,
    num_processes: int | None = None,
    plan: bool = False,
    overwrite: bool = False,
) -> None:
    """Build a mixture.

    Args:
        tokenizer: Folder written by merge_tokenizer.py (any Hugging Face folder, if no source is speech).
        output_dir: New folder.
        sources: What to mix; in YAML, a list of what towerspeech/mixture.py says of a source.
        groups: Budgets that sources share, by name: ``{text: {budget: 1_000_000_000, split: equal}}``.
        test_sets: Files, folders or patterns of each test set, by its name; documents that hold one of their sentences
            are left out.
        bos: Begin documents with BOS. Megatron does not; a model that is prompted with BOS and was not pretrained
            with it needs it.
        seed: Seed of the draw and of the trainer's shuffle.
        reserve: How many times its budget is drawn of a source that has more.
        validation_tokens: Tokens of each source that are held out from training, but no more than a hundredth of what
            is drawn.
        max_bad_share: Largest share of a source's documents that may be impossible to read.
        num_processes: Processes that encode beside the one that reads (all cores, if not given).
        plan: Print what samples tell of the mixture, and write nothing.
        overwrite: Replace the output of a run with other arguments.
    """
    sources = with_budgets(sources, groups)
    check_sources(sources)
    if reserve < 1 or validation_tokens < 0 or not 0 <= max_bad_share <= 1:
        told = f"reserve is {reserve}, validation_tokens {validation_tokens}, max_bad_share {max_bad_share}"
        raise UserError(told, "give 1 or more, 0 or more, and a share")
    tested = {
        name: [str(path) for each in names for path in expand(each, f"check test_sets: {name}")]
        for name, names in (test_sets or {}).items()
    }
    arguments = {
        "tokenizer": tokenizer,
        **recorded_files(sources, {source.name: source.files() for source in sources}),
        **recorded_test_sets(tested),
        "budgets": recorded_budgets(sources),
        "bos": bos,
        "seed": seed,
        "reserve": reserve,
        "validation_tokens": validation_tokens,
        "max_bad_share": max_bad_share,
        "num_processes": num_processes,
        "overwrite": overwrite,
    }
    tokenizer_sha256 = tokenizer_hash(tokenizer)  # refuses a folder that holds no tokenizer

    def make() -> Maker:
        sentences = TestSentences(read_test_sets(tested)) if tested else None
        return Maker(tokenizer, sources, sentences, bos, seed)

    wanted = {source.name: wanted_of(source, reserve, validation_tokens) for source in sources}
    processes = num_processes or len(os.sched_getaffinity(0))
    if plan:
        with Encoders(make(), processes) as encoders:
            surveys = [look_at(index, source, encoders, max_bad_share) for index, source in enumerate(sources)]
        print_plan(sources, surveys, wanted)
        check_sizes(sources, surveys, planning=True)
        return
    # Tokens depend on budgets as far as they decide how many are drawn: what is tokenized stays, if it is the same.
    late = ["budgets", "seed", "reserve", "validation_tokens", "max_bad_share"]
    inputs = ["tokenizer", "paths", "test_sets"]
    with stage(__file__, output_dir, arguments, inputs, ignore=["num_processes"], late=late) as work:
        if work.done:
            return
        maker = make()
        began, told, outputs = time.perf_counter(), [], []
        with Encoders(maker, processes) as encoders:
            surveys = look_at_all(work, sources, encoders, seed, max_bad_share)
            for index, (source, found) in enumerate(zip(sources, surveys, strict=True)):
                output = tokenize(work, index, source, found, wanted[source.name], seed, encoders, max_bad_share)
                outputs.append(output)
                told.append(facts(source, output, found))
                print(table([row_of(told[-1])]), flush=True)
        work.counts["last_attempt"] = {"tokenize_s": round(time.perf_counter() - began, 3)}
        write_lists(work, outputs, bool(tested))
        budget = sum(source.budget for source in sources)
        manifest = {
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": len(maker.tokenizer),
            "eod_id": maker.eod,
            "bos": bos,
            "seed": seed,
            "reserve": reserve,
            "budget": budget,
            "sources": told,
            # Megatron draws samples of equal length, so token budgets are its weights.
            "data_path": " ".join(f"{source.budget / budget:.6f} {source.name}" for source in sources),
        }
        write_json(output_dir / "manifest.json", manifest)
        work.counts.update({"budget": budget, **{each["name"]: each["tokens"] for each in told}})
        print(table([row_of(each) for each in told]))
        print(f"mixture of {budget:,} tokens: {output_dir}")


if __name__ == "__main__":
    run(build_mixture)
