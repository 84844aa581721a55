"""Turn test sets into prompts: translation 0-shot and 5-shot, ASR, speech translation, cascades.

Usage: python instructions/build_instructions.py --test_set flores200 --data_root data/flores200 --pairs de-en,en-zh \\
           --shots 5 --output_dir instructions
       python instructions/build_instructions.py --all true --data_root data --output_dir instructions

Reads one of
  flores200  FLORES-200's own layout, <split>/<code>.<split>, or a hub dataset's name, openlanguagedata/flores_plus
  wmt23      generaltest2023.<pair>.src.<lang> and .ref.refA.<lang>; without --data_root sacreBLEU downloads them
  towereval  TowerEval's raw_data folder: mt/<set>.<pair>/test.jsonl and dev.jsonl with src and ref
  units      a units Parquet folder with transcripts (speech_units/label_audio.py): ASR; with --translations (JSONL:
             id, tgt_lang, target) direct speech translation instead
  cascade    ASR generations of generate/generate_ASR.py (a file, or a checkpoint's folder with asr/*.jsonl), to be
             translated as text; with --translations
With --all true whatever is found below data_root: flores200/, wmt23/, towereval/, units/<name>/, cascade/ (such a
checkpoint's folder), translations/<name>.jsonl for the last two, and examples.jsonl, the pool of wmt23 and cascade.

Writes below output_dir <0_shot|5_shot>/<dataset>_<pair>.jsonl, asr/<dataset>.jsonl, st/<dataset>_<pair>.jsonl and
cascaded_st/<dataset>_<pair>.jsonl (with examples: <dataset>_<pair>_5_shot.jsonl), one prompt a row: id, instruction
(or messages), output, task, dataset, shots, src_lang, tgt_lang, source; and beside each its run_info.json. The source
of translated speech is its reference transcript, of a cascade too.

The 0-shot text is the original TowerSpeech's, byte for byte (but for the fault of its WMT23 X-en files, ``German
Text:: ...``). That of FLORES-200 and WMT23 is compared with recorded checksums, and lines that differ are named.
Examples come from the dev split or a named pool: five others for each test sentence, or the same five for all of a
file, and the same lines for all pairs. A pool that holds a sentence of the test split is refused.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from instructions import read_test_sets as test_sets
from instructions.checksums import verify
from instructions.read_test_sets import Line, Missing, Parallel, SentencePair
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists
from towerspeech.languages import parse_pair
from towerspeech.outside_text import PLANE_15
from towerspeech.records import write_jsonl
from towerspeech.speech_prompts import speech_rows
from towerspeech.stage import record, stage

TEXT_SETS = {"flores200": "flores", "wmt23": "wmt23", "towereval": None}  # file names: the original's, or TowerEval's
# The original's WMT23 5-shot files have a space before every example but the first, and before the sentence itself.
SEPARATORS = {"flores200": "\n", "wmt23": "\n "}
TAKEN_BY_ALL = ("output_dir", "data_root", "all", "style", "examples", "unit_offset", "seed", "overwrite")


@dataclass(frozen=True)
class Request:
    """The command's flags.

    Args:
        output_dir: Where the prompt files go; several calls (shots, test sets) may share it.
        test_set: Which layout data_root has.
        data_root: The folder (or hub dataset, or generations file) that holds the test set.
        all: Build all test sets found below data_root, 0-shot and where there is a pool 5-shot.
        pairs: de-en,en-zh,... or all: from and into English, as far as there are data.
        shots: Examples in each prompt.
        style: original (a text to complete), chat (the same text as a user's message, for SFT models) or spire
            (SpireLM's templates as a user's message).
        dataset: Name in the files' names and in the results, if not the usual one; of towereval, the set to take.
        split: Split to test on; default: flores200's devtest, towereval's test.
        test_lines: Test on these lines (or units rows) alone, such as 1-100.
        examples: per_sentence (others for each) or fixed (the same for a whole file: fast with prefix caching).
        example_split: Split to draw examples from; default: dev.
        example_lines: Draw examples from these lines alone, such as 101-300. If they are of the test split, lines that
            are not tested may be shown.
        example_file: Draw examples from this parallel text instead, in one of the forms of towerspeech/texts.py.
        translations: JSONL of translated utterances (id, tgt_lang, target), or a folder with <dataset>.jsonl.
        unit_offset: Code point of unit 0, as in the tokenizer's speech_units.json.
        seed: Seed of the drawing.
        overwrite: Replace files that were built otherwise.
    """

    output_dir: Path
    test_set: Literal["flores200", "wmt23", "towereval", "units", "cascade"] | None = None
    data_root: Path | None = None
    all: bool = False
    pairs: str = "all"
    shots: Literal[0, 5] = 0
    style: Literal["original", "chat", "spire"] = "original"
    dataset: str | None = None
    split: str | None = None
    test_lines: str | None = None
    examples: Literal["per_sentence", "fixed"] = "per_sentence"
    example_split: str | None = None
    example_lines: str | None = None
    example_file: Path | None = None
    translations: Path | None = None
    unit_offset: int = dsu.OFFSET
    seed: int = 0
    overwrite: bool = False


class PromptFile(NamedTuple):
    """One file to write, and what decided its content."""

    folder: str
    stem: str
    rows: list[dict]
    arguments: dict  # data: the files read
    counts: dict


def parse_lines(lines: str | None, option: str) -> range | None:
    """Line numbers, from 1, both ends included: ``101-300``."""
    if lines is None:
        return None
    first, _, last = lines.partition("-")
    if not (re.fullmatch("[0-9]+-[0-9]+", lines) and 1 <= int(first) <= int(last)):
        raise UserError(f"--{option} {lines!r} is no range of lines", "write it as FIRST-LAST, such as 1-100")
    return range(int(first), int(last) + 1)


# --- Examples -------------------------------------------------------------------------------------
def read_pool(request: Request, name: str, pair: str) -> Parallel:
    """Read the sentence pairs that the examples of one language pair are drawn from."""
    if request.example_file:
        pool = test_sets.read_direction(request.example_file, pair)
        if not pool.pairs:
            raise Missing(f"no examples for {pair}: {request.example_file} has no rows of it", "add some")
        return test_sets.take(pool, None, "")
    wanted = parse_lines(request.example_lines, "example_lines")
    remedy = "name a pool: --example_file (JSONL: src_lang, tgt_lang, source, target)"
    if request.test_set != "cascade":
        split = "" if request.test_set == "wmt23" else f" (--example_split {test_sets.TEST_SPLITS[request.test_set]})"
        remedy += f", or --example_lines FIRST-LAST of the test split{split}, apart from --test_lines"
    if request.test_set == "cascade" or (request.test_set == "wmt23" and not wanted):
        raise Missing(f"no examples for {pair}: {request.test_set} has no dev split", remedy)
    try:
        whole = test_sets.read_pairs(request.test_set, request.data_root, name, request.example_split or "dev", pair)
    except Missing as error:
        problem = str(error).splitlines()[0]
        raise Missing(f"no examples for {pair}: {problem}", f"put the dev split there, or {remedy}") from None
    return test_sets.take(whole, wanted, "example_lines")


def bare(line: str) -> str:
    """A sentence by its letters and digits: transcripts often come without case and punctuation."""
    return re.sub(r"[\W_]+", " ", line.casefold()).strip() or line.strip()


def check_pool(whole: Parallel, tested: Parallel, pool: Parallel, shots: int) -> None:
    """Refuse a pool of examples that is too small, or that holds a sentence of the test split on either side.

    Lines that are not tested may be shown only where the user cut one file in two (--test_lines, --example_lines).
    (The original drew its FLORES examples from the test split.)
    """
    if len(pool.pairs) < shots:
        raise UserError(f"{len(pool.pairs)} lines to draw {shots} examples from", "name more --example_lines")
    places = {pair.source.place for pair in whole.pairs}
    of_one_file = all(pair.source.place in places for pair in pool.pairs)
    secret = tested if of_one_file else whole
    for side in ("source", "target"):
        tested_at = {bare(line.text): line.place for line in [getattr(pair, side) for pair in secret.pairs]}
        for line in [getattr(pair, side) for pair in pool.pairs]:
            if bare(line.text) in tested_at:
                raise UserError(
                    f"{line.place} is a test sentence ({tested_at[bare(line.text)]}): {line.text[:60]!r}",
                    "examples must not show the test set: name other --example_lines, or another pool",
                )


def draw_examples(pool: Parallel, request: Request, number: int) -> list[tuple[str, str]]:
    """Draw the examples of one test line: the same lines for every pair, however many lines are tested."""
    key = number if request.examples == "per_sentence" else "fixed"
    drawn = random.Random(f"{request.seed} {key}").sample(pool.pairs, request.shots)
    return [(pair.source.text, pair.target.text) for pair in drawn]


# --- What is built --------------------------------------------------------------------------------
def facts_of(request: Request, name: str, read: Iterable[Parallel]) -> dict:
    """What decides a prompt file's content: arguments, and ``data``, the files read."""
    facts = {key: getattr(request, key) for key in ("test_set", "shots", "style", "test_lines")} | {"dataset": name}
    if request.shots:
        facts |= {key: getattr(request, key) for key in ("examples", "example_lines", "seed")}
    if any(not part.files for part in read):  # a dataset of the hub: no files of ours
        lines = [getattr(pair, side).text for part in read for side in ("source", "target") for pair in part.pairs]
        facts["data_sha256"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {**facts, "data": list(dict.fromkeys(file for part in read for file in part.files))}


def instruction(request: Request, name: str, langs: tuple[str, str], pair: SentencePair, pool: Parallel | None) -> str:
    """The instruction of one sentence, or of what ASR made of it."""
    text = pair.source.text
    if pair.heard is not None:
        # A model that went astray may have written units: they are no words to be translated.
        heard = PLANE_15.sub("", pair.heard)
        if pool is None and request.style != "spire":
            return prompts.cascaded_st(langs[1], heard)  # raw, as the original shows it
        text = " ".join(heard.split())  # one line, as the templates want it
    if pool is not None:
        separator = SEPARATORS.get(name if request.test_set == "towereval" else request.test_set, "\n")
        return prompts.mt_few_shot(*langs, text, draw_examples(pool, request, pair.number), separator)
    template = prompts.mt_spire if request.style == "spire" else prompts.mt_0_shot
    return template(*langs, text)


def text_file(request: Request, name: str, pair: str, whole: Parallel) -> PromptFile:
    """The prompts of one test set and language pair; ``whole`` is all of the test split, or what was heard of it."""
    src, tgt = parse_pair(pair)
    tested = test_sets.take(whole, parse_lines(request.test_lines, "test_lines"), "test_lines")
    if request.style == "original":
        for sentence in tested.pairs:
            prompts.check_reference(sentence.target.text, sentence.target.place)
    read, pool = [tested], None
    if request.shots:
        pool = read_pool(request, name, pair)
        check_pool(whole, tested, pool, request.shots)
        read.append(pool)
    task, folder, stem, counts = "mt", f"{request.shots}_shot", f"{name}_{pair}", {}
    if request.test_set == "cascade":
        task = folder = "cascaded_st"
        stem += f"_{request.shots}_shot" if request.shots else ""
        counts = asr_counts(tested.pairs)
    rows = []
    for sentence in tested.pairs:
        asked = instruction(request, name, (src, tgt), sentence, pool)
        row_id = sentence.utterance or f"{name}_{pair}:{sentence.number}"
        facts = dict(task=task, dataset=name, shots=request.shots, src_lang=src, tgt_lang=tgt)
        facts["source"] = sentence.source.text
        rows.append(prompts.prompt_row(request.style, row_id, asked, sentence.target.text, **facts))
    return PromptFile(folder, stem, rows, facts_of(request, name, read), counts)


def asr_counts(pairs: list[SentencePair]) -> dict[str, int]:
    """How many ASR outputs are empty, and how many hold units."""
    counts = {"empty_asr_outputs": sum(not pair.heard.strip() for pair in pairs)}
    with_units = sum(PLANE_15.search(pair.heard) is not None for pair in pairs)
    if with_units:
        counts["asr_outputs_without_their_units"] = with_units
    return counts


def translation_files(request: Request) -> list[PromptFile]:
    """The prompts of a text test set, a file a language pair."""
    split = request.split or test_sets.TEST_SPLITS[request.test_set]
    dataset = request.dataset or TEXT_SETS[request.test_set]
    sets = test_sets.read_text_sets(request.test_set, request.data_root, split, request.pairs, dataset)
    return [text_file(request, name, pair, whole) for (name, pair), whole in sets.items()]


def speech_files(request: Request) -> list[PromptFile]:
    """The prompts of a units folder: ASR, or with translations ST, a file a target language."""
    if request.shots or (request.pairs != "all" and not request.translations):
        raise UserError(
            "--shots 5 and --pairs are for translation",
            "leave them out with --test_set units; direct speech translation takes --pairs with --translations",
        )
    name = request.dataset or request.data_root.resolve().name
    data, written = [request.data_root], {"en": None}  # by language: translations, or none for the transcripts
    if request.translations:
        file, translations = test_sets.read_translations(request.translations, name)
        data.append(file)
        written = {tgt: translations[tgt] for tgt in test_sets.speech_targets(request.pairs, file, translations)}
    arguments = facts_of(request, name, []) | {"unit_offset": request.unit_offset, "data": data}
    wanted, files = parse_lines(request.test_lines, "test_lines"), []
    for tgt, lines in written.items():
        folder, stem, targets = "asr", name, None
        if lines:
            folder, stem, targets = "st", f"{name}_en-{tgt}", {key: line.text for key, line in lines.items()}
        rows = speech_rows(request.data_root, name, request.style, request.unit_offset, None, wanted, tgt, targets)
        files.append(PromptFile(folder, stem, rows, arguments, {}))
    return files


def cascade_files(request: Request) -> list[PromptFile]:
    """The prompts that translate ASR outputs, a file a data set and target language."""
    if not request.translations:
        raise UserError("a cascade is scored against translations", "name them with --translations")
    transcriptions = test_sets.find_transcriptions(request.data_root)
    if request.dataset and len(transcriptions) > 1:
        problem = f"--dataset {request.dataset} would name {len(transcriptions)} files"
        raise UserError(problem, "name one file as --data_root")
    files = []
    for generations in transcriptions:
        asr = test_sets.read_transcriptions(generations)
        name = request.dataset or asr[0][1]["dataset"]
        try:
            file, translations = test_sets.read_translations(request.translations, name)
        except Missing as error:  # of LibriSpeech, say, which is left out of a folder with others
            if len(transcriptions) == 1:
                raise
            print(f"left out: {str(error).splitlines()[0]}")
            continue
        for tgt in test_sets.speech_targets(request.pairs, file, translations):
            pairs = []
            for number, (place, row) in enumerate(asr, 1):
                if row["id"] not in translations[tgt]:
                    raise UserError(f"{place}: no translation of {row['id']!r} into {tgt}", f"add it to {file}")
                source, target = Line(row["reference"], place), translations[tgt][row["id"]]
                pairs.append(SentencePair(number, source, target, row["id"], row["text"]))
            files.append(text_file(request, name, f"en-{tgt}", Parallel(pairs, [generations, file])))
    if not files:
        raise Missing(f"{request.translations} translates none of {request.data_root}'s data sets", "see above")
    return files


def check_request(request: Request) -> None:
    """Raise UserError if options contradict each other or would do nothing, or the data are not there."""
    if request.shots and request.style == "spire":
        problem = "SpireLM publishes no template with examples"
        raise Missing(problem, "use --style original or chat with --shots 5")
    if not request.shots and (request.example_file or request.example_lines or request.example_split):
        raise UserError("a pool of examples, but --shots 0", "add --shots 5, or leave the examples out")
    if request.example_file and (request.example_lines or request.example_split):
        raise UserError("--example_file is a pool of its own", "leave --example_lines and --example_split out")
    for option, value in (("split", request.split), ("example_split", request.example_split)):
        if value and request.test_set not in ("flores200", "towereval"):
            raise UserError(f"{request.test_set} has no splits", f"leave --{option} out")
    if request.translations and request.test_set in TEXT_SETS:
        raise UserError("--translations are of utterances", "leave them out, or use --test_set units or cascade")
    if request.data_root is None and request.test_set != "wmt23":
        raise UserError(f"--test_set {request.test_set} needs --data_root", "only wmt23 is downloaded by sacreBLEU")
    on_hub = request.test_set == "flores200" and test_sets.is_hub_dataset(request.data_root)
    if request.data_root is not None and not on_hub:
        check_exists(request.data_root, "check --data_root")


def prompt_files(request: Request) -> list[PromptFile]:
    """Read and check all that a request needs, and make its prompts; nothing is written yet."""
    check_request(request)
    makers = {"units": speech_files, "cascade": cascade_files}
    files = makers.get(request.test_set, translation_files)(request)
    for name in {file.rows[0]["dataset"] for file in files}:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{name!r} cannot name a file", "give --dataset of letters, digits, - and _")
    return files


# --- Everything at once ---------------------------------------------------------------------------
def all_requests(asked: Request) -> Iterator[Request]:
    """What could be built from below ``data_root``, if all of it is there."""
    root, pool = asked.data_root, asked.data_root / "examples.jsonl"
    one = replace(asked, all=False)
    texts = [replace(one, test_set=name, data_root=root / name) for name in ("flores200", "wmt23")]
    towereval = replace(one, test_set="towereval", data_root=root / "towereval")
    names = {path.name.rpartition(".")[0] for path in towereval.data_root.glob("mt/*.*-*")}
    texts += [replace(towereval, dataset=name) for name in sorted(names) or [None]]
    translated = replace(one, translations=root / "translations")
    texts.append(replace(translated, test_set="cascade", data_root=root / "cascade"))
    for request in texts:
        yield request
        needs_pool = request.test_set in ("wmt23", "cascade")  # the others have a dev split
        yield replace(request, shots=5, example_file=pool if needs_pool and pool.is_file() else None)
    for folder in sorted(path for path in root.glob("units/*") if path.is_dir()) or [root / "units"]:
        yield replace(one, test_set="units", data_root=folder)
        yield replace(translated, test_set="units", data_root=folder)


def all_prompt_files(asked: Request) -> tuple[list[PromptFile], list[tuple[str, int, str]]]:
    """The prompts of whatever is found below ``data_root``; also what is skipped: (test set, shots, reason)."""
    unset = [field for field in fields(Request) if field.name not in TAKEN_BY_ALL]
    if asked.data_root is None or any(getattr(asked, field.name) != field.default for field in unset):
        raise UserError(
            "--all true takes --data_root and nothing that names a test set, its lines or its examples",
            f"it takes: {', '.join(f'--{name}' for name in TAKEN_BY_ALL)}",
        )
    check_exists(asked.data_root, "check --data_root")
    built: dict[tuple[str, str], PromptFile] = {}  # by folder and stem
    skipped = []
    for request in all_requests(asked):
        label = request.dataset or request.test_set
        if request.test_set == "units":
            label = f"{request.data_root.name} ({'st' if request.translations else 'asr'})"
        absent = [path for path in (request.data_root, request.translations) if path and not path.exists()]
        try:
            if absent:
                raise Missing(f"no {absent[0]}")
            files = prompt_files(request)
        except Missing as error:
            skipped.append((label, request.shots, str(error).splitlines()[0]))
            continue
        others = []  # TowerEval holds FLORES and WMT23 too
        for file in files:
            first = built.setdefault((file.folder, file.stem), file)
            if first is not file:
                others.append(first.arguments["test_set"])
        if others:
            reason = f"{len(others)} pairs are built from {', '.join(sorted(set(others)))}"
            skipped.append((label, request.shots, reason))
    return list(built.values()), skipped


def table(files: list[PromptFile], skipped: list[tuple[str, int, str]]) -> str:
    """What was built, a line a data set and number of shots, and what was skipped and why."""
    from tabulate import tabulate

    groups: dict[tuple, list[PromptFile]] = {}
    for file in files:
        groups.setdefault(tuple(file.rows[0][name] for name in ("dataset", "task", "shots")), []).append(file)
    lines = []
    for (dataset, task, shots), group in groups.items():
        num_prompts = sum(len(file.rows) for file in group)
        lines.append((dataset, task, shots, "-" if task == "asr" else len(group), f"{num_prompts:,}"))
    lines += [(label, "-", shots, "-", "-", f"skipped: {reason}") for label, shots, reason in skipped]
    headers = ("test set", "task", "shots", "pairs", "prompts", "")
    return tabulate(lines, headers, tablefmt="plain", disable_numparse=True)


def write_file(file: PromptFile, request: Request) -> None:
    """Write one prompt file, as a stage of its own."""
    folder, arguments = request.output_dir / file.folder, {**file.arguments, "overwrite": request.overwrite}
    with stage(__file__, folder, arguments, inputs=["data"], part=file.stem) as work:
        if work.done:
            return
        write_jsonl(folder / f"{file.stem}.jsonl", file.rows)
        work.counts.update({"prompts": len(file.rows), **file.counts})
        counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in work.counts.items())
        print(f"{folder / file.stem}.jsonl: {counted}")


def build_instructions(request: Request) -> None:
    """Build prompt files."""
    skipped = []
    if request.all:
        files, skipped = all_prompt_files(request)
    elif request.test_set is None:
        raise UserError("no test set", "name one with --test_set, or build all with --all true")
    elif request.examples == "fixed" and not request.shots:
        raise UserError("--examples fixed, but --shots 0", "add --shots 5, or leave --examples out")
    else:
        files = prompt_files(request)
    for file in files:
        write_file(file, request)
    outputs = [request.output_dir / file.folder / f"{file.stem}.jsonl" for file in files]
    name = f"{'all' if request.all else request.shots}_shot"
    named = ["data_root", "example_file", "translations"]
    record(__file__, name, request.output_dir, vars(request), [], outputs, named)
    if request.style == "original" and not request.test_lines and request.split in (None, "devtest"):
        for line in verify((f"{file.folder}/{file.stem}.jsonl", file.rows) for file in files):
            print(line)
    if request.all:
        print(table(files, skipped))


if __name__ == "__main__":
    run(build_instructions, Request)
