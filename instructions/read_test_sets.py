"""Find and read test sets: sentence pairs, translations of utterances, ASR outputs. Used by build_instructions.py."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import check_exists
from towerspeech.hub import asking_hub
from towerspeech.languages import FLORES_PLUS_CODES, LANGUAGES, language, parse_pair
from towerspeech.outside_text import check_outside_text
from towerspeech.records import check_texts, iter_jsonl, read_lines
from towerspeech.texts import expand, iter_parallel

WMT23_PAIRS = ("de-en", "en-de", "en-ru", "en-zh", "ru-en", "zh-en")
OTHERS = [code for code in LANGUAGES if code != "en"]
USUAL_PAIRS = {
    "flores200": [*(f"{code}-en" for code in OTHERS), *(f"en-{code}" for code in OTHERS)],
    "wmt23": WMT23_PAIRS,
}
TEST_SPLITS = {"flores200": "devtest", "wmt23": "test", "towereval": "test"}


class Missing(UserError):
    """Data that is not there: what is built from whatever is found skips this, and says why."""


class Line(NamedTuple):
    """A text, and where it stands (``file:line``), for messages."""

    text: str
    place: str


class SentencePair(NamedTuple):
    """A line of a test set and its translation."""

    number: int  # in the test set, from 1
    source: Line
    target: Line
    utterance: str | None = None  # id of the utterance, in a cascade
    heard: str | None = None  # what ASR made of it, to be translated in place of the source


class Parallel(NamedTuple):
    """Parallel text, and what was read."""

    pairs: list[SentencePair]
    files: list[Path]  # empty for a dataset of the hub


def parallel(files: list[Path], names: Sequence[str], texts: Sequence[list[str]]) -> Parallel:
    """All lines of two texts, which must be translations of each other by line; ``names`` say what they are."""
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{names[0]} has {len(texts[0])} lines, {names[1]} {len(texts[1])}", "they must be translations by line"
        )
    pairs = []
    for number, (source, target) in enumerate(zip(*texts, strict=True), 1):
        places = [f"{name}:{number}" for name in names]
        pairs.append(SentencePair(number, Line(source, places[0]), Line(target, places[1])))
    return Parallel(pairs, files)


def take(whole: Parallel, wanted: range | None, option: str) -> Parallel:
    """The wanted lines (default: all), which must be there, not empty, and spell no speech units."""
    pairs = whole.pairs
    if wanted:
        if wanted[-1] > len(pairs):
            file = pairs[-1].source.place.rpartition(":")[0]
            raise UserError(f"--{option} ends at line {wanted[-1]}, but {file} has {len(pairs)}", "name fewer")
        pairs = pairs[wanted[0] - 1 : wanted[-1]]
    for line in [*(pair.source for pair in pairs), *(pair.target for pair in pairs)]:
        if not line.text.strip():
            raise UserError(f"{line.place}: the line is empty", "mend the file, or leave the line out")
        check_outside_text(line.text, line.place)
    return Parallel(pairs, whole.files)


# --- FLORES-200 -----------------------------------------------------------------------------------
# Files such as devtest/deu_Latn.devtest; or a dataset of the hub (or a folder of that form) with one configuration a
# language and the columns id and text, as openlanguagedata/flores_plus, or id and sentence, as facebook/flores.
def is_hub_dataset(root: Path) -> bool:
    """Whether a data root is a dataset's name on the hub, or a folder of the form that such a dataset has."""
    if root.is_dir():
        return any(root.rglob("*.parquet"))
    return not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)) is not None


@functools.cache
def hub(root: Path, function: str, *arguments, **options):
    """Call a function of the datasets library, once; whatever goes wrong becomes one message."""
    import datasets

    remedy = (
        "there is no such folder here: check --data_root and the network; a gated dataset such as"
        " openlanguagedata/flores_plus wants its conditions accepted on its page, and `hf auth login`"
    )
    with asking_hub(str(root), remedy):
        return getattr(datasets, function)(str(root), *arguments, **options)


def read_hub(root: Path, code: str, split: str) -> tuple[list, list[str]]:
    """Ids and sentences of one language and split."""
    names = (code, FLORES_PLUS_CODES.get(code))
    configuration = next((name for name in names if name in hub(root, "get_dataset_config_names")), None)
    if configuration is None:
        raise Missing(f"{root} has no configuration {code}", "check --data_root and --pairs")
    splits = hub(root, "get_dataset_split_names", configuration)
    if split not in splits:
        raise Missing(f"{root} has no split {split} of {code}, but {', '.join(splits)}", "check --split")
    rows = hub(root, "load_dataset", configuration, split=split)
    column = next((name for name in ("text", "sentence") if name in rows.column_names), None)
    if column is None or "id" not in rows.column_names:
        raise UserError(f"{root}: columns {', '.join(rows.column_names)}", "FLORES has id and text (or sentence)")
    return list(rows["id"]), list(rows[column])


def read_hub_pair(root: Path, split: str, pair: str) -> Parallel:
    """Read a split of one pair from a dataset of the hub."""
    codes = [language(code).flores for code in parse_pair(pair)]
    (source_ids, sources), (target_ids, targets) = (read_hub(root, code, split) for code in codes)
    if source_ids != target_ids:
        raise UserError(
            f"{root}: {codes[0]} and {codes[1]} differ in ids ({split})", "they must be translations by id"
        )
    return parallel([], [f"{root} {code} {split}" for code in codes], [sources, targets])


# --- WMT23 ----------------------------------------------------------------------------------------
def wmt23_files(root: Path | None, pair: str) -> list[Path]:
    """The source and the target file: below ``root``, or downloaded by sacreBLEU."""
    src, tgt = parse_pair(pair)
    if root is not None:
        stem = f"generaltest2023.{pair}"
        return [root / f"{stem}.src.{src}", root / f"{stem}.ref.refA.{tgt}"]
    from sacrebleu.utils import SACREBLEU_DIR, get_reference_files, get_source_file

    try:
        return [Path(get_source_file("wmt23", pair)), Path(get_reference_files("wmt23", pair)[0])]
    except (Exception, SystemExit) as error:  # no network, no such pair, a wrong checksum, a torn archive
        raise UserError(
            f"sacreBLEU could not give wmt23 {pair}: {error}",
            f"check the network (and remove {Path(SACREBLEU_DIR) / 'wmt23'} if a download was cut off), or name a"
            " folder of generaltest2023.* files with --data_root",
        ) from None


# --- JSONL ----------------------------------------------------------------------------------------
def read_direction(path: Path, pair: str) -> Parallel:
    """Read the sentence pairs of one direction from parallel text, which may hold several."""
    rows = ((where, row) for where, row in iter_parallel(path) if f"{row['src_lang']}-{row['tgt_lang']}" == pair)
    return pairs_of_rows(rows, "source", "target", *expand(path))


def pairs_of_rows(rows: Iterable[tuple[str, dict]], source: str, target: str, *files: Path) -> Parallel:
    """Make sentence pairs of two fields of JSONL rows, each with its place."""
    pairs = []
    for number, (where, row) in enumerate(rows, 1):
        pairs.append(SentencePair(number, Line(row[source], where), Line(row[target], where)))
    return Parallel(pairs, list(files))


# --- All layouts ----------------------------------------------------------------------------------
def read_pairs(test_set: str, root: Path | None, name: str, split: str, pair: str) -> Parallel:
    """Read a split of one pair of a test set; ``name`` tells TowerEval's sets apart."""
    if test_set == "flores200" and is_hub_dataset(root):
        return read_hub_pair(root, split, pair)
    if test_set == "towereval":  # github.com/deep-spin/tower-eval
        files = [root / "mt" / f"{name}.{pair}" / f"{split}.jsonl"]
    elif test_set == "wmt23":
        files = wmt23_files(root, pair)
    else:
        files = [root / split / f"{language(code).flores}.{split}" for code in parse_pair(pair)]
    for file in files:
        if not file.is_file():
            raise Missing(f"{file} does not exist", "check --data_root, --pairs, and --dataset and --split if given")
    if test_set == "towereval":
        return pairs_of_rows(iter_jsonl(files[0], texts=("src", "ref")), "src", "ref", files[0])
    return parallel(files, [str(file) for file in files], [read_lines(file) for file in files])


def parse_pairs(pairs: str) -> list[str]:
    """The pairs of ``de-en,en-zh``, each named once; none of ``all``."""
    named = [] if pairs == "all" else ["-".join(parse_pair(pair.strip())) for pair in pairs.split(",")]
    if len(set(named)) < len(named):
        raise UserError(f"--pairs {pairs} names a pair twice", "name each once")
    return named


def read_text_sets(test_set: str, root: Path | None, split: str, pairs: str, name: str | None) -> dict:
    """Read {(set, pair): Parallel} of ``de-en,en-zh``; ``all`` are those of the ten languages whose data are there."""
    named = parse_pairs(pairs)
    if test_set == "towereval":
        asked = find_towereval(root, split, named, name)
    else:
        asked = [(name, pair) for pair in named or USUAL_PAIRS[test_set]]
    sets, absent = {}, {}
    for set_name, pair in asked:
        try:
            sets[set_name, pair] = read_pairs(test_set, root, set_name, split, pair)
        except Missing as error:
            if named:
                raise
            absent[pair] = str(error).splitlines()[0]
    if not sets:
        problem = next(iter(absent.values()))
        raise Missing(f"no {test_set} files under {root}: {problem}", "check --data_root and --split")
    if absent:
        print(f"no files for: {', '.join(absent)}")
    return sets


def find_towereval(root: Path, split: str, named: list[str], name: str | None) -> list[tuple[str, str]]:
    """TowerEval's sets and pairs: those named, or all that are there."""
    there = []
    for file in sorted(root.glob(f"mt/*.*-*/{split}.jsonl")):
        set_name, _, pair = file.parent.name.rpartition(".")
        if name in (None, set_name) and set(pair.split("-")) <= set(LANGUAGES):
            there.append((set_name, pair))
    missing = [pair for pair in named if pair not in {pair for _, pair in there}]
    if missing or not there:
        folder = root / "mt" / f"{name or 'flores'}.{missing[0] if missing else 'en-de'}"
        raise Missing(
            f"no such files: {folder / split}.jsonl",
            "--data_root is TowerEval's raw_data folder, which holds mt/; --dataset names a set in it, such as wmt23",
        )
    return [(set_name, pair) for set_name, pair in there if not named or pair in named]


# --- Translations of utterances, and ASR outputs --------------------------------------------------
def read_translations(path: Path, name: str) -> tuple[Path, dict[str, dict[str, Line]]]:
    """Read a speech test set's translations, from one file or <name>.jsonl, and say which: {language: {id: text}}."""
    file = path / f"{name}.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise Missing(f"{file} does not exist", "put the translations of this test set there: id, tgt_lang, target")
    translations: dict[str, dict[str, Line]] = {}
    for where, row in iter_jsonl(file, texts=("id", "tgt_lang", "target")):
        if row["tgt_lang"] not in OTHERS:
            raise UserError(f"{where}: tgt_lang is {row['tgt_lang']!r}", f"it must be one of: {', '.join(OTHERS)}")
        check_texts(row, ["target"], where, blank=False)
        check_outside_text(row["target"], where)
        by_id = translations.setdefault(row["tgt_lang"], {})
        if row["id"] in by_id:
            raise UserError(
                f"{where}: {row['id']!r} is translated twice (also {by_id[row['id']].place})", "remove one"
            )
        by_id[row["id"]] = Line(row["target"], where)
    return file, translations


def speech_targets(pairs: str, file: Path, translations: dict[str, dict]) -> list[str]:
    """The languages that English speech is translated into: ``en-de,en-fr``, or all that there are."""
    if pairs == "all":
        return [code for code in LANGUAGES if code in translations]
    targets = []
    for src, tgt in map(parse_pair, parse_pairs(pairs)):
        if src != "en":
            raise UserError(f"--pairs {pairs}: speech is English", "such as en-de,en-fr")
        if tgt not in translations:
            problem = f"{file} holds no translations into {language(tgt).name} ({tgt})"
            raise UserError(problem, f"it has: {', '.join(translations)}")
        targets.append(tgt)
    return targets


def find_transcriptions(root: Path) -> list[Path]:
    """ASR generations: the file named, or all below a checkpoint's folder."""
    check_exists(root, "name generations of generate/generate_ASR.py")
    files = [root] if root.is_file() else sorted(root.glob("asr/*.jsonl"))
    if not files:
        raise Missing(f"{root} holds no asr/*.jsonl", "name a checkpoint's folder that generate/generate_ASR.py wrote")
    return files


def read_transcriptions(path: Path) -> list[tuple[str, dict]]:
    """Read ASR generations, each with its ``file:line``; an empty output is one too."""
    rows = []
    for where, row in iter_jsonl(path, ["task", "dataset"], texts=("id", "text", "reference"), unique_ids=True):
        if row["task"] != "asr":
            raise UserError(
                f"{where}: task is {row['task']!r}", "a cascade starts from generations of generate_ASR.py"
            )
        check_texts(row, ("id", "reference"), where, blank=False)
        if rows and row["dataset"] != rows[0][1]["dataset"]:
            raise UserError(f"{where}: data sets {rows[0][1]['dataset']!r} and {row['dataset']!r}", "keep one a file")
        rows.append((where, row))
    return rows
