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

The 0-shot text is the original TowerSpeech's, byte for byte, except for its three WMT23 X-en files: those hold a
template fault (``German Text:: ...``). Examples come from the dev split or from a named pool, five other ones for each
test sentence or the same five for all of a file, and the same lines for all language pairs. A pool that holds a
sentence of the test split is refused. (The original drew its FLORES examples from the test split.)
"""

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from instructions import read_test_sets as test_sets
from instructions.read_test_sets import Missing, Parallel
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.command import UserError, run
from towerspeech.files import check_exists
from towerspeech.languages import parse_pair
from towerspeech.outside_text import PLANE_15
from towerspeech.records import dumps
from towerspeech.speech_prompts import speech_rows
from towerspeech.stage import stage

TEXT_SETS = {"flores200": "flores", "wmt23": "wmt23", "towereval": None}  # file names: the original's, or TowerEval's
# The original's WMT23 5-shot files have a space before every example but the first, and before the sentence itself.
SEPARATORS = {"flores200": "\n", "wmt23": "\n "}
NO_SPIRE_EXAMPLES = "SpireLM publishes no template with examples"


@dataclass(frozen=True)
class Request:
    """What to build; fields as in ``build_instructions``."""

    test_set: str
    data_root: Path | None
    pairs: str = "all"
    shots: int = 0
    style: str = "original"
    dataset: str | None = None
    split: str | None = None
    test_lines: str | None = None
    examples: str = "per_sentence"
    example_split: str | None = None
    example_lines: str | None = None
    example_file: Path | None = None
    translations: Path | None = None
    unit_offset: int = dsu.OFFSET
    seed: int = 0


class PromptFile(NamedTuple):
    """One file to write, and what decided its content."""

    folder: str
    dataset: str
    pair: str  # "" for ASR
    rows: list[dict]
    arguments: dict  # data: the files read
    counts: dict

    @property
    def stem(self) -> str:
        shots = self.rows[0]["shots"]
        name = f"{self.dataset}_{self.pair}" if self.pair else self.dataset
        return f"{name}_{shots}_shot" if self.folder == "cascaded_st" and shots else name


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
        pool = test_sets.read_jsonl_pairs(request.example_file, ("source", "target"), pair)
        if not pool.numbers:
            raise Missing(f"no examples for {pair}: {request.example_file} has no rows of it", "add some")
        return test_sets.take(pool, None, "")
    wanted = parse_lines(request.example_lines, "example_lines")
    test_split = test_sets.TEST_SPLITS.get(request.test_set)
    option = "" if request.test_set == "wmt23" else f" with --example_split {test_split}"
    remedy = "name a pool: --example_file (JSONL: src_lang, tgt_lang, source, target)"
    if test_split:
        remedy += f", or --example_lines FIRST-LAST of the test split, apart from --test_lines{option}"
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
    """
    if len(pool.numbers) < shots:
        raise UserError(f"{len(pool.numbers)} lines to draw {shots} examples from", "name more --example_lines")
    secret = tested if set(pool.source_places) <= set(whole.source_places) else whole
    for test_places, test_lines, places, lines in (
        (secret.source_places, secret.sources, pool.source_places, pool.sources),
        (secret.target_places, secret.targets, pool.target_places, pool.targets),
    ):
        found = {bare(line): place for place, line in zip(test_places, test_lines, strict=True)}
        for place, line in zip(places, lines, strict=True):
            if bare(line) in found:
                raise UserError(
                    f"{place} is a test sentence ({found[bare(line)]}): {line[:60]!r}",
                    "examples must not show the test set: name other --example_lines, or another pool",
                )


def draw_examples(pool: Parallel, request: Request, number: int) -> list[tuple[str, str]]:
    """Draw the examples of one test line: the same lines for every pair, however many lines are tested."""
    key = number if request.examples == "per_sentence" else "fixed"
    drawn = random.Random(f"{request.seed} {key}").sample(range(len(pool.numbers)), request.shots)
    return [(pool.sources[i], pool.targets[i]) for i in drawn]


# --- What is built --------------------------------------------------------------------------------
def facts_of(request: Request, name: str, read: Iterable[Parallel]) -> dict:
    """What decides a prompt file's content: arguments, and ``data``, the files read."""
    facts = {key: getattr(request, key) for key in ("test_set", "shots", "style", "test_lines")} | {"dataset": name}
    if request.shots:
        facts |= {key: getattr(request, key) for key in ("examples", "example_lines", "seed")}
    if any(not part.files for part in read):  # a dataset of the hub: no files of ours
        lines = [line for part in read for line in (*part.sources, *part.targets)]
        facts["data_sha256"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {**facts, "data": list(dict.fromkeys(file for part in read for file in part.files))}


def text_prompts(
    request: Request, name: str, pair: str, whole: Parallel, shown: list[str] | None = None
) -> tuple[list[tuple[int, str, str, str]], dict]:
    """Make the instructions of one language pair: (number, instruction, source, target), and ``facts_of`` them.

    Args:
        request: What is built.
        name: The test set.
        pair: The language pair.
        whole: All of the test split.
        shown: ASR outputs, shown in place of its sources.
    """
    src, tgt = parse_pair(pair)
    tested = test_sets.take(whole, parse_lines(request.test_lines, "test_lines"), "test_lines")
    if request.style == "original":
        for place, target in zip(tested.target_places, tested.targets, strict=True):
            prompts.check_reference(target, place)
    read = [tested]
    if request.shots:
        read.append(read_pool(request, name, pair))
        check_pool(whole, *read, request.shots)
    separator = SEPARATORS.get(name if request.test_set == "towereval" else request.test_set, "\n")
    made = []
    for number, source, target in zip(tested.numbers, tested.sources, tested.targets, strict=True):
        text = source if shown is None else " ".join(shown[number - 1].split())  # one line, as the templates want it
        if request.shots:
            examples = draw_examples(read[1], request, number)
            instruction = prompts.mt_few_shot(src, tgt, text, examples, separator)
        elif request.style == "spire":
            instruction = prompts.mt_spire(src, tgt, text)
        elif shown is not None:
            instruction = prompts.cascaded_st(tgt, shown[number - 1])  # raw, as the original shows it
        else:
            instruction = prompts.mt_0_shot(src, tgt, text)
        made.append((number, instruction, source, target))
    return made, facts_of(request, name, read)


def translation_files(request: Request) -> list[PromptFile]:
    """The prompts of a text test set, a file a language pair."""
    split = request.split or test_sets.TEST_SPLITS[request.test_set]
    dataset = request.dataset or TEXT_SETS[request.test_set]
    files = []
    for name, pair in test_sets.find_pairs(request.test_set, request.data_root, split, request.pairs, dataset):
        src, tgt = parse_pair(pair)
        whole = test_sets.read_pairs(request.test_set, request.data_root, name, split, pair)
        made, arguments = text_prompts(request, name, pair, whole)
        rows = []
        for number, instruction, source, target in made:
            facts = dict(task="mt", dataset=name, shots=request.shots, src_lang=src, tgt_lang=tgt, source=source)
            rows.append(prompts.prompt_row(request.style, f"{name}_{pair}:{number}", instruction, target, **facts))
        files.append(PromptFile(f"{request.shots}_shot", name, pair, rows, arguments, {}))
    return files


def speech_files(request: Request) -> list[PromptFile]:
    """The prompts of a units folder: ASR, or with translations ST, a file a target language."""
    if request.shots or (request.pairs != "all" and not request.translations):
        raise UserError(
            "--shots 5 and --pairs are for translation",
            "leave them out with --test_set units; direct speech translation takes --pairs with --translations",
        )
    name = request.dataset or request.data_root.resolve().name
    settings = dict(offset=request.unit_offset, wanted=parse_lines(request.test_lines, "test_lines"))
    facts = facts_of(request, name, []) | {"unit_offset": request.unit_offset}
    if not request.translations:
        rows = speech_rows(request.data_root, name, request.style, **settings)
        return [PromptFile("asr", name, "", rows, {**facts, "data": request.data_root}, {})]
    file, translations = test_sets.read_translations(request.translations, name)
    arguments = {**facts, "data": [request.data_root, file]}
    files = []
    for tgt in test_sets.speech_targets(request.pairs, file, translations):
        targets = {key: text for key, (_, text) in translations[tgt].items()}
        rows = speech_rows(request.data_root, name, request.style, **settings, tgt_lang=tgt, targets=targets)
        files.append(PromptFile("st", name, f"en-{tgt}", rows, arguments, {}))
    return files


def cascade_files(request: Request) -> list[PromptFile]:
    """The prompts that translate ASR outputs, a file a data set and target language."""
    if not request.translations:
        raise UserError("a cascade is scored against translations", "name them with --translations")
    found = test_sets.find_transcriptions(request.data_root)
    if request.dataset and len(found) > 1:
        raise UserError(f"--dataset {request.dataset} would name {len(found)} files", "name one file as --data_root")
    files = []
    for generations in found:
        places, asr = zip(*test_sets.read_transcriptions(generations), strict=True)
        name = request.dataset or asr[0]["dataset"]
        try:
            file, translations = test_sets.read_translations(request.translations, name)
        except Missing as error:  # of LibriSpeech, say, which is left out of a folder with others
            if len(found) == 1:
                raise
            print(f"left out: {str(error).splitlines()[0]}")
            continue
        for tgt in test_sets.speech_targets(request.pairs, file, translations):
            for place, row in zip(places, asr, strict=True):
                if row["id"] not in translations[tgt]:
                    raise UserError(f"{place}: no translation of {row['id']!r} into {tgt}", f"add it to {file}")
            target_places, targets = zip(*(translations[tgt][row["id"]] for row in asr), strict=True)
            sources, numbers = [row["reference"] for row in asr], list(range(1, len(asr) + 1))
            whole = Parallel(sources, targets, places, target_places, numbers, [generations, file])
            # A model that went astray may have written units: they are no words to be translated.
            shown = [PLANE_15.sub("", row["text"]) for row in asr]
            made, arguments = text_prompts(request, name, f"en-{tgt}", whole, shown=shown)
            rows = []
            for number, instruction, source, target in made:
                facts = dict(dataset=name, shots=request.shots, src_lang="en", tgt_lang=tgt, source=source)
                facts = {"task": "cascaded_st", **facts}
                rows.append(prompts.prompt_row(request.style, asr[number - 1]["id"], instruction, target, **facts))
            heard = [(asr[number - 1]["text"], shown[number - 1]) for number, *_ in made]
            counts = {"empty_asr_outputs": sum(not text.strip() for _, text in heard)}
            if astray := sum(raw != text for raw, text in heard):
                counts["asr_outputs_without_their_units"] = astray
            files.append(PromptFile("cascaded_st", name, f"en-{tgt}", rows, arguments, counts))
    if not files:
        raise Missing(f"{request.translations} translates none of {request.data_root}'s data sets", "see above")
    return files


def plan(request: Request) -> list[PromptFile]:
    """Read and check all that a request needs; nothing is written yet."""
    if request.shots and request.style == "spire":
        raise UserError(NO_SPIRE_EXAMPLES, "use --style original or chat with --shots 5")
    pool = {name: getattr(request, f"example_{name}") for name in ("file", "lines", "split")}
    if not request.shots and any(pool.values()):
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
    files = {"units": speech_files, "cascade": cascade_files}.get(request.test_set, translation_files)(request)
    for name in {file.dataset for file in files}:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{name!r} cannot name a file", "give --dataset of letters, digits, - and _")
    return files


# --- Everything at once ---------------------------------------------------------------------------
def plan_all(data_root: Path, common: dict) -> tuple[list[PromptFile], list[tuple[str, str, str]]]:
    """Plan whatever is found below ``data_root``; also what is skipped: (test set, shots, reason)."""
    check_exists(data_root, "check --data_root")
    towereval = data_root / "towereval"
    sets = sorted({path.name.rpartition(".")[0] for path in towereval.glob("mt/*.*-*")}) or [None]
    units = sorted(path for path in data_root.glob("units/*") if path.is_dir()) or [data_root / "units"]
    requests = [Request(name, data_root / name, **common) for name in ("flores200", "wmt23")]
    requests += [Request("towereval", towereval, dataset=name, **common) for name in sets]
    cascade = Request("cascade", data_root / "cascade", translations=data_root / "translations", **common)
    requests = [replace(request, shots=shots) for request in [*requests, cascade] for shots in (0, 5)]
    for folder in units:
        request = Request("units", folder, **common)
        requests += [request, replace(request, translations=data_root / "translations")]
    files, skipped = [], []
    for request in requests:
        label = {"units": f"{request.data_root.name} ({'st' if request.translations else 'asr'})"}
        label = (label.get(request.test_set, request.dataset or request.test_set), str(request.shots))
        pool = data_root / "examples.jsonl"
        if request.shots and pool.is_file() and request.test_set in ("wmt23", "cascade"):
            request = replace(request, example_file=pool)
        absent = [path for path in (request.data_root, request.translations) if path and not path.exists()]
        if absent or (request.shots and request.style == "spire"):
            skipped.append((*label, f"no {absent[0]}" if absent else NO_SPIRE_EXAMPLES))
            continue
        try:
            planned = plan(request)
        except Missing as error:
            skipped.append((*label, str(error).splitlines()[0]))
            continue
        built = {(file.folder, file.stem): file.arguments["test_set"] for file in files}
        new = [file for file in planned if (file.folder, file.stem) not in built]
        files += new
        if len(new) < len(planned):  # TowerEval holds FLORES and WMT23 too
            others = {built.get((file.folder, file.stem)) for file in planned} - {None}
            skipped.append((*label, f"{len(planned) - len(new)} pairs are built from {', '.join(sorted(others))}"))
    return files, skipped


def table(files: list[PromptFile], skipped: list[tuple[str, str, str]]) -> str:
    """What was built, a line a data set and number of shots, and what was skipped and why."""
    groups: dict[tuple, list[PromptFile]] = {}
    for file in files:
        groups.setdefault((file.dataset, file.rows[0]["task"], file.rows[0]["shots"]), []).append(file)
    lines = [("test set", "task", "shots", "pairs", "prompts", "")]
    for (dataset, task, shots), group in groups.items():
        prompts = sum(len(file.rows) for file in group)
        pairs = str(len(group)) if group[0].pair else "-"
        lines.append((dataset, task, str(shots), pairs, f"{prompts:,}", ""))
    lines += [(label, "-", shots, "-", "-", f"skipped: {reason}") for label, shots, reason in skipped]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5])).rstrip()
        for line in lines
    )


def build_instructions(
    output_dir: Path,
    test_set: Literal["flores200", "wmt23", "towereval", "units", "cascade"] | None = None,
    data_root: Path | None = None,
    all: bool = False,
    pairs: str = "all",
    shots: Literal[0, 5] = 0,
    style: Literal["original", "chat", "spire"] = "original",
    dataset: str | None = None,
    split: str | None = None,
    test_lines: str | None = None,
    examples: Literal["per_sentence", "fixed"] = "per_sentence",
    example_split: str | None = None,
    example_lines: str | None = None,
    example_file: Path | None = None,
    translations: Path | None = None,
    unit_offset: int = dsu.OFFSET,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Build prompt files.

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
        example_file: Draw examples from this parallel JSONL (src_lang, tgt_lang, source, target) instead.
        translations: JSONL of translated utterances (id, tgt_lang, target), or a folder with <dataset>.jsonl.
        unit_offset: Code point of unit 0, as in the tokenizer's speech_units.json.
        seed: Seed of the drawing.
        overwrite: Replace files that were built otherwise.
    """
    given = {name: value for name, value in locals().items() if name in Request.__annotations__}
    if all:
        common = {name: given[name] for name in ("style", "examples", "unit_offset", "seed")}
        if data_root is None or given != {**vars(Request(None, data_root)), **common}:
            raise UserError(
                "--all true takes --data_root and nothing that names a test set, its lines or its examples",
                f"besides --output_dir and --overwrite it takes: {', '.join(f'--{name}' for name in common)}",
            )
        files, skipped = plan_all(data_root, common)
    elif test_set is None:
        raise UserError("no test set", "name one with --test_set, or build all with --all true")
    elif examples == "fixed" and not shots:
        raise UserError("--examples fixed, but --shots 0", "add --shots 5, or leave --examples out")
    else:
        files, skipped = plan(Request(**given)), []
    for file in files:
        arguments = {**file.arguments, "overwrite": overwrite}
        with stage(output_dir / file.folder, arguments, inputs=["data"], part=file.stem) as work:
            if work.done:
                continue
            with work.publish(f"{file.stem}.jsonl") as path, open(path, "w", encoding="utf-8") as output:
                output.writelines(dumps(row) + "\n" for row in file.rows)
            work.counts.update({"prompts": len(file.rows), **file.counts})
            counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in work.counts.items())
            print(f"{output_dir / file.folder / file.stem}.jsonl: {counted}")
    if all:
        print(table(files, skipped))


if __name__ == "__main__":
    run(build_instructions)
