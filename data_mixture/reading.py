"""A source's files as parts of numbered items, read in batches; and what a sample of them tells of the whole."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_mixture.documents import Item, Made, Maker, Task, Utterance, reading
from data_mixture.encoders import Encoders
from towerspeech import units
from towerspeech.errors import UserError
from towerspeech.files import unpacked_size
from towerspeech.languages import language
from towerspeech.mixture import Source
from towerspeech.texts import Part, Wanted, is_hub, parallel_parts, read_raw, text_parts
from towerspeech.units_parquet import read_unit_arrays, unit_shards

BATCH_ITEMS, BATCH_BYTES = 2048, 1 << 22  # of a task, at most
SAMPLED_PARTS, SAMPLED_ITEMS, SAMPLED_BYTES = 16, 8192, 1 << 25  # at most, together
SMALL = 1000  # bytes, beyond which a packed file holds something
COMPARED = 64  # documents of a source, with the tokenizer's own ids


# --- Items ----------------------------------------------------------------------------------------
def parts_of(source: Source) -> list[Part]:
    """A source's parts, in the order of its files."""
    if source.kind == "speech":
        shards = [shard for path in source.files() for shard in unit_shards(Path(path))]
        return [Part(shard, None, None, 0, shard.stat().st_size) for shard in shards]
    if source.kind == "text":
        parts = [part for name in source.paths for part in text_parts(name)]
    else:
        parts = [part for name in source.paths for part in parallel_parts(name, source.direction)]
    parts = [part for part in parts if is_hub(part.path) or not is_empty(part)]
    if not parts:
        raise UserError(f"source {source.name!r}: all its files are empty", "check its paths, or fetch them again")
    return parts


def is_empty(part: Part) -> bool:
    """Tell whether a file holds nothing, plain or packed: a folder may have such shards."""
    small = part.size <= SMALL and not part.path.is_dir()
    return small and not any(unpacked_size(path) for path in (part.path, part.other) if path)


def read_items(
    source: Source, part: Part, part_number: int, maker: Maker, wanted: Wanted | None = None, start: int = 0
) -> Iterator[Item]:
    """Stream a part's items that are wanted, from number ``start`` on."""
    if source.kind != "speech":
        for number, raw in read_raw(part, reading(source), wanted, start):
            yield Item(part_number, number, raw)
        return
    number = 0
    for flat, ends, batch, _ in read_unit_arrays(part.path, maker.num_units, ["language", "text", "duration_s"]):
        take = wanted(number, len(ends)) if wanted else np.ones(len(ends), bool)
        take[: max(0, start - number)] = False
        if take.any():
            runs = [*units.split_units(flat, ends, maker.offset)]
            columns = [batch.column(name).to_pylist() for name in ("language", "text", "duration_s", "id")]
            for row in np.flatnonzero(take).tolist():
                yield Item(part_number, number + row, Utterance(runs[row], *(column[row] for column in columns)))
        number += len(ends)


def size_of(raw) -> int:
    """About how many bytes an item holds in memory; see also ``bytes_of``."""
    if isinstance(raw, bytes | str):
        return len(raw)
    if isinstance(raw, dict):
        return sum(map(size_of, raw.values()))
    return sum(map(size_of, raw)) if isinstance(raw, tuple | list) else 8


def batches(source: int, parts: list[Part], items: Iterable[Item]) -> Iterator[Task]:
    """Gather items of one or more parts to tasks."""
    held, size = [], 0
    for item in items:
        held.append(item)
        size += size_of(item.raw)
        if len(held) == BATCH_ITEMS or size >= BATCH_BYTES:
            yield _task(source, parts, held, size)
            held, size = [], 0
    if held:
        yield _task(source, parts, held, size)


def _task(source: int, parts: list[Part], items: list[Item], size: int) -> Task:
    return Task(source, {number: parts[number] for number in {item.part for item in items}}, items, size)


# --- A sample -------------------------------------------------------------------------------------
@dataclass
class Survey:
    """What a sample tells of a source, before duplicates are left out.

    Attributes:
        documents, tokens, characters, seconds: Of the whole source, estimated.
        exact: Whether the sample was the whole source.
        items, bad, left_out: Of the sample: items, those that cannot be read, and what else is left out, by reason.
        first_bad: The first of them, and why.
        compared: Documents whose ids were compared with the tokenizer's own.
        tokens_known: Whether the source's size is known at all.
    """

    documents: float = 0
    tokens: float = 0
    characters: float = 0
    seconds: float = 0
    exact: bool = True
    items: int = 0
    bad: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""
    compared: int = 0
    tokens_known: bool = True

    def add_sizes(self, times: float, documents: float, tokens: float, characters: float, seconds: float) -> None:
        """Add what so many times these are."""
        self.documents += times * documents
        self.tokens += times * tokens
        self.characters += times * characters
        self.seconds += times * seconds


def extent(source: Source, part: Part) -> tuple[float, Callable]:
    """How much a part holds, unpacked bytes or rows, and a function that tells how much of it an item is."""
    if is_hub(part.path):
        return 0, lambda raw: 0
    if source.kind == "speech" or part.group is not None:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(part.path) as file:
            known = file.metadata if part.group is None else file.metadata.row_group(part.group)
            return known.num_rows, lambda raw: 1
    if part.path.is_dir():
        from datasets import load_from_disk

        return len(load_from_disk(str(part.path))), lambda raw: 1
    return sum(unpacked_size(path) for path in (part.path, part.other) if path), bytes_of


def bytes_of(raw) -> int:
    """How many bytes of its file an item takes."""
    if isinstance(raw, bytes):
        return len(raw)
    if isinstance(raw, tuple):  # of several lines, of two files, or with the names of columns
        of_paragraph = len(raw) == 2 and isinstance(raw[0], int)  # which ends with a line, and a blank one
        return sum(len(each) for each in raw if isinstance(each, bytes)) + 2 * of_paragraph
    return len(json.dumps(raw, ensure_ascii=False).encode("utf-8", "replace")) + 2  # an item of a list


@dataclass
class Look:
    """What was read of a part for the sample: its first tasks."""

    whole: float  # what the part holds, unpacked bytes or rows
    read: float = 0.0  # of that
    size: int = 0  # about how many bytes in memory
    items: int = 0
    compared: int = 0  # documents, with the tokenizer's own ids
    scripts: Counter = field(default_factory=Counter)
    done: bool = False  # whether that was all of it
    made: list[Made] = field(default_factory=list)


def survey(index: int, source: Source, parts: list[Part], encoders: Encoders) -> Survey:
    """Look at the first items of some parts, spread over a source.

    Raises:
        UserError: The encoder's ids are not the tokenizer's; the letters are of another script than the language.
    """
    places = sorted({*np.linspace(0, len(parts) - 1, min(len(parts), SAMPLED_PARTS)).astype(int).tolist()})
    looks: dict[int, Look] = {}
    for made in encoders.map(first_tasks(index, source, parts, places, encoders.maker, looks)):
        looks[made.at[0]].made.append(made)
    check_scripts(source, sum((look.scripts for look in looks.values()), Counter()))
    told = Survey(exact=len(places) == len(parts) and all(look.done for look in looks.values()))
    for look in looks.values():
        add_part(told, look)
    told.tokens_known = not any(is_hub(part.path) for part in parts)
    if told.tokens_known:
        times = sum(part.size for part in parts) / sum(parts[place].size for place in places)
        told.add_sizes(times - 1, told.documents, told.tokens, told.characters, told.seconds)
    return told


def first_tasks(
    index: int, source: Source, parts: list[Part], places: list[int], maker: Maker, looks: dict[int, Look]
) -> Iterator[Task]:
    """Read the first items of the parts at these places, and note in ``looks`` what is seen of them on the way."""
    for place in places:
        whole, of_item = extent(source, parts[place])
        look = looks[place] = Look(whole)
        items = read_items(source, parts[place], place, maker)
        for task in batches(index, parts, islice(items, SAMPLED_ITEMS // len(places))):
            if sum(each.compared for each in looks.values()) < COMPARED:
                look.compared += maker.compare(task, COMPARED)
            look.items += len(task.items)
            look.read += sum(of_item(item.raw) for item in task.items)
            look.size += task.size
            look.scripts.update(count_scripts(maker.said(task)))
            yield task
            if look.size > SAMPLED_BYTES // len(places):
                break
        look.done = next(items, None) is None


def add_part(told: Survey, look: Look) -> None:
    """Add what the first items of a part tell of all of it."""
    told.items += look.items
    told.compared += look.compared
    times = 1.0 if look.done or not look.read else max(1.0, look.whole / look.read)
    for made in look.made:
        told.add_sizes(
            times, len(made.sizes), int(made.sizes.sum()), int(made.characters.sum()), float(made.seconds.sum())
        )
        told.bad += len(made.bad)
        told.left_out = dict(Counter(told.left_out) + made.left_out)
        told.first_bad = told.first_bad or next(iter(made.bad), "")


# --- Scripts --------------------------------------------------------------------------------------
class Script(NamedTuple):
    letters: re.Pattern
    weight: int  # of a character, in letters of an alphabet


SCRIPTS = {
    "Latin": Script(re.compile("[A-Za-z\u00c0-\u024f]"), 1),
    "Cyrillic": Script(re.compile("[\u0400-\u052f]"), 1),
    "Han": Script(re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), 3),
    "Hangul": Script(re.compile("[\u1100-\u11ff\uac00-\ud7af]"), 2),
}
LETTER, OTHERS = re.compile(r"[^\W\d_]"), "none of the ten languages'"
OF_LANGUAGE = {"ru": "Cyrillic", "zh": "Han", "ko": "Hangul"}  # the others are written in Latin letters
FEWEST_LETTERS, LEAST_SHARE = 200, 0.5


def count_scripts(said: Iterable[tuple[str, str]]) -> Counter:
    """Letters by language and script, of texts that are said to be in a language."""
    counts: Counter = Counter()
    for code, text in said:
        others = len(LETTER.findall(text))
        for script, (letters, weight) in SCRIPTS.items():
            found = len(letters.findall(text))
            counts[code, script] += weight * found
            others -= found
        counts[code, OTHERS] += max(0, others)
    return counts


def check_scripts(source: Source, counts: Counter) -> None:
    """Raise UserError if most letters are not of the script that their language is written in."""
    for code in sorted({code for code, _ in counts}):
        found = {script: counts[code, script] for script in (*SCRIPTS, OTHERS)}
        letters, most = sum(found.values()), max(found, key=found.get)
        share = found[OF_LANGUAGE.get(code, "Latin")] / max(1, letters)
        if letters >= FEWEST_LETTERS and share < LEAST_SHARE:
            raise UserError(
                f"source {source.name!r} is said to be {language(code).name}, but {1 - share:.0%} of the letters in a "
                f"sample are of another script, most of them {most}",
                "name the files of that language, or mend the source's language or direction",
            )
