"""Turn test sets into prompts, 0-shot and 5-shot.

Usage: python instructions/build_instructions.py --test_set flores200 --data_root data/flores200 --pairs de-en,en-zh \\
           --shots 5 --output_dir instructions

Reads one of
  flores200  FLORES-200's own layout: <split>/<code>.<split>, such as devtest/deu_Latn.devtest
  wmt23      plain files generaltest2023.<pair>.src.<lang> and generaltest2023.<pair>.ref.refA.<lang>
  units      a units Parquet folder with transcripts (speech_units/label_audio.py), for ASR
Writes <output_dir>/<0_shot|5_shot>/<dataset>_<pair>.jsonl or <output_dir>/asr/<dataset>.jsonl, one prompt a row: id,
instruction (or messages), output, task, dataset, shots, src_lang, tgt_lang, source; and beside each its run_info.json.

The 0-shot text is the original TowerSpeech's, byte for byte, except for its three WMT23 X-en files: those hold a
template fault (``German Text:: ...``). Examples come from the dev split, five other ones for each test sentence, the
same lines for all language pairs. (The original drew its FLORES examples from the test split.)
"""

import random
from pathlib import Path
from typing import Literal, NamedTuple

from towerspeech.languages import LANGUAGES, language, parse_pair
from towerspeech.records import dumps, read_lines
from towerspeech.stage import UserError, check_exists, run, stage

DATASETS = {"flores200": "flores", "wmt23": "wmt23"}  # the original's file names: flores_de-en, wmt23_en-ru
WMT23_PAIRS = ("de-en", "en-de", "en-ru", "en-zh", "ru-en", "zh-en")
# The original's WMT23 5-shot files have a space before every example but the first, and before the sentence itself.
SEPARATORS = {"flores200": "\n", "wmt23": "\n "}


class Side(NamedTuple):
    """Some lines of one pair's two files."""

    source_file: Path
    target_file: Path
    numbers: list[int]  # line numbers in the files, from 1
    sources: list[str]
    targets: list[str]


# --- Test sets ------------------------------------------------------------------------------------
def text_files(test_set: str, data_root: Path, split: str, pair: str) -> tuple[Path, Path]:
    """The source and the target file of a pair."""
    src, tgt = parse_pair(pair)
    if test_set == "wmt23":
        stem = f"generaltest2023.{pair}"
        return data_root / f"{stem}.src.{src}", data_root / f"{stem}.ref.refA.{tgt}"
    return tuple(data_root / split / f"{language(code).flores}.{split}" for code in (src, tgt))


def choose_pairs(test_set: str, data_root: Path, split: str, pairs: str) -> list[str]:
    """Parse ``de-en,en-zh``; ``all`` are the original's pairs whose files are there, from and into English."""
    if pairs != "all":
        chosen = ["-".join(parse_pair(pair.strip())) for pair in pairs.split(",")]
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--pairs {pairs} names a pair twice", "name each once")
        return chosen
    others = [code for code in LANGUAGES if code != "en"]
    known = WMT23_PAIRS if test_set == "wmt23" else [*(f"{c}-en" for c in others), *(f"en-{c}" for c in others)]
    found = [p for p in known if all(file.is_file() for file in text_files(test_set, data_root, split, p))]
    if not found:
        example = text_files(test_set, data_root, split, known[0])[0]
        raise UserError(f"no {test_set} files under {data_root} (such as {example})", "check --data_root and --split")
    if len(found) < len(known):
        print(f"no files for: {', '.join(pair for pair in known if pair not in found)}")
    return found


def parse_lines(lines: str | None, option: str) -> range | None:
    """Line numbers, from 1, both ends included: ``101-300``."""
    if lines is None:
        return None
    first, _, last = lines.partition("-")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--{option} {lines!r} is no range of lines", "write it as FIRST-LAST, such as 1-100")
    return range(int(first), int(last) + 1)


def read_side(files: tuple[Path, Path], wanted: range | None, option: str) -> Side:
    """Read the wanted lines of a pair's two files.

    Raises:
        UserError: A file is missing, they differ in length, are shorter than wanted, or a wanted line is empty.
    """
    for file in files:
        check_exists(file, "check --data_root, --split and --pairs")
    texts = [read_lines(file) for file in files]
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{files[0]} has {len(texts[0])} lines, {files[1]} {len(texts[1])}", "they must be translations by line"
        )
    numbers = list(wanted or range(1, len(texts[0]) + 1))
    if numbers[-1] > len(texts[0]):
        raise UserError(f"--{option} ends at line {numbers[-1]}, but {files[0]} has {len(texts[0])}", "name fewer")
    chosen = [[lines[number - 1] for number in numbers] for lines in texts]
    for file, lines in zip(files, chosen, strict=True):
        for number, line in zip(numbers, lines, strict=True):
            if not line.strip():
                raise UserError(f"{file}:{number}: the line is empty", "mend the file, or leave the line out")
    return Side(*files, numbers, *chosen)


def read_pool(test_set: str, data_root: Path, split: str, wanted: range | None, pair: str) -> Side:
    """Read the lines that examples are drawn from."""
    files = text_files(test_set, data_root, split, pair)
    remedy = "name --example_lines FIRST-LAST, apart from --test_lines"
    if test_set == "wmt23" and not wanted:
        raise UserError(f"no examples for {pair}: WMT23 has no dev split", remedy)
    if not all(file.is_file() for file in files):
        raise UserError(
            f"no examples for {pair}: {files[0]} or {files[1]} is not there",
            f"put FLORES-200's dev split there, or {remedy}, with --example_split devtest",
        )
    return read_side(files, wanted, "example_lines")


def check_pool(test: Side, pool: Side, shots: int) -> None:
    """Refuse a pool of examples that is too small, or that holds a sentence of the test set on either side."""
    if len(pool.numbers) < shots:
        raise UserError(f"{len(pool.numbers)} lines to draw {shots} examples from", "name more --example_lines")
    for test_file, pool_file, tested, shown in (
        (test.source_file, pool.source_file, test.sources, pool.sources),
        (test.target_file, pool.target_file, test.targets, pool.targets),
    ):
        lines = {line.strip(): number for number, line in zip(test.numbers, tested, strict=True)}
        for number, line in zip(pool.numbers, shown, strict=True):
            if line.strip() in lines:
                raise UserError(
                    f"{pool_file}:{number} is a test sentence ({test_file}:{lines[line.strip()]}): {line[:60]!r}",
                    "examples must not show the test set: name other --example_lines, or another --example_split",
                )


def draw_examples(pool: Side, test_line: int, shots: int, seed: int) -> list[tuple[str, str]]:
    """Draw the examples of one test line: the same lines for every pair, however many lines are tested."""
    drawn = random.Random(f"{seed} {test_line}").sample(range(len(pool.numbers)), shots)
    return [(pool.sources[i], pool.targets[i]) for i in drawn]


# --- Rows -----------------------------------------------------------------------------------------
def translation_rows(
    test_set: str, test: Side, pool: Side | None, dataset: str, pair: str, shots: int, style: str, seed: int
) -> list[dict]:
    """The prompts of one language pair, in the order of the test set."""
    from towerspeech import prompts

    src, tgt = parse_pair(pair)
    rows = []
    for number, source, target in zip(test.numbers, test.sources, test.targets, strict=True):
        if shots:
            examples = draw_examples(pool, number, shots, seed)
            instruction = prompts.mt_few_shot(src, tgt, source, examples, SEPARATORS[test_set])
        else:
            instruction = prompts.mt_0_shot(src, tgt, source)
        facts = dict(task="mt", dataset=dataset, shots=shots, src_lang=src, tgt_lang=tgt, source=source)
        rows.append(prompts.prompt_row(style, f"{dataset}_{pair}:{number}", instruction, target, **facts))
    return rows


def build_instructions(
    test_set: Literal["flores200", "wmt23", "units"],
    data_root: Path,
    output_dir: Path,
    pairs: str = "all",
    shots: Literal[0, 5] = 0,
    style: Literal["original", "chat"] = "original",
    dataset: str | None = None,
    split: str = "devtest",
    test_lines: str | None = None,
    example_split: str = "dev",
    example_lines: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Build prompt files.

    Args:
        test_set: Which layout data_root has.
        data_root: The folder that holds the test set.
        output_dir: Where the prompt files go; several calls (shots, test sets) may share it.
        pairs: de-en,en-zh,... or all: from and into English, as far as there are files. Not for units.
        shots: Examples in each prompt.
        style: original (a text to complete) or chat (the same text as a user's message, for SFT models).
        dataset: Name in the files' names and in the results; flores, wmt23 or the units folder's name if not given.
        split: FLORES-200's split to test on.
        test_lines: Test on these lines (or units rows) alone, such as 1-100.
        example_split: FLORES-200's split to draw examples from.
        example_lines: Draw examples from these lines alone, such as 101-300; needed for wmt23, which has no dev split.
        seed: Seed of the drawing.
        overwrite: Replace files that were built otherwise.
    """
    name = dataset or DATASETS.get(test_set) or data_root.resolve().name
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{name!r} cannot name a file", "give --dataset of letters, digits, - and _")
    check_exists(data_root, "check --data_root")
    wanted, shown = parse_lines(test_lines, "test_lines"), parse_lines(example_lines, "example_lines")
    facts = {"test_set": test_set, "shots": shots, "style": style, "dataset": name, "test_lines": test_lines}
    files = []  # all are read and checked before one is written: folder, name, arguments, rows
    if test_set == "units":
        if pairs != "all" or shots:
            raise UserError("--pairs and --shots 5 are for translation", "leave them out with --test_set units")
        from towerspeech.prompts import speech_rows

        rows = speech_rows(data_root, name, style, wanted=wanted)
        files.append(("asr", name, {**facts, "data": data_root}, rows))
    else:
        for pair in choose_pairs(test_set, data_root, split, pairs):
            sides = [read_side(text_files(test_set, data_root, split, pair), wanted, "test_lines")]
            if shots:
                sides.append(read_pool(test_set, data_root, example_split, shown, pair))
                check_pool(*sides, shots)
            pool = sides[1] if shots else None
            rows = translation_rows(test_set, sides[0], pool, name, pair, shots, style, seed)
            read = list(dict.fromkeys(file for side in sides for file in (side.source_file, side.target_file)))
            drawn = {"example_lines": example_lines, "seed": seed} if shots else {}
            files.append((f"{shots}_shot", f"{name}_{pair}", {**facts, **drawn, "data": read}, rows))
    for folder, stem, arguments, rows in files:
        with stage(output_dir / folder, {**arguments, "overwrite": overwrite}, inputs=["data"], part=stem) as job:
            if job.done:
                continue
            with job.publish(f"{stem}.jsonl") as path, open(path, "w", encoding="utf-8") as file:
                file.writelines(dumps(row) + "\n" for row in rows)
            job.counts["prompts"] = len(rows)
            print(f"{output_dir / folder / stem}.jsonl: {len(rows):,} prompts")


if __name__ == "__main__":
    run(build_instructions)
