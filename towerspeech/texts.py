"""Text and parallel text, in the forms that researchers have them in; bad rows are named by file and line.

A name means files:

    text/de.jsonl           one file
    text/c4/                the files of a folder, and of those in it, whose endings are below
    text/c4/*.json.gz       a pattern of the shell's kind (** is any number of folders)
    europarl.{de,en}.gz     in braces, each of several; for parallel text: two files of which line follows line
    hub:allenai/c4:de       a data set of the Hugging Face hub, streamed: hub:OWNER/NAME:CONFIG:SPLIT, where CONFIG and
                            SPLIT (train) may be left out

A file's form is told by its ending, before .gz or .zst:

    .jsonl .ndjson .json    an object a line, or one list of them
    .parquet                a row each
    .tsv                    a line each, columns apart by tabs; the first line may name them
    a folder that datasets.Dataset.save_to_disk wrote
    .txt, and others        plain text, UTF-8

A sentence pair is told by its fields: source and target, with src_lang and tgt_lang or in a direction that the caller
gives; or two languages, such as de and en, beside each other or inside ``translation``. Languages have their codes,
names or FLORES codes: de, German, deu_Latn.

Reading and parsing are two steps: parsing is most of the work, and other processes can do it. ``read_raw`` reads a
part of what a name means, and raises what is wrong with a file; ``parse_text`` and ``parse_parallel`` raise what is
wrong with one row, which a caller may leave out. ``iter_texts`` and ``iter_parallel`` do both.
"""

import codecs
import contextlib
import functools
import glob
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import PACKED, check_exists, open_plain
from towerspeech.hub import asking_hub
from towerspeech.languages import LANGUAGES, find_language, parse_pair
from towerspeech.outside_text import check_outside_text
from towerspeech.records import check_object, check_texts, json_lines, parse_json

JSON, PARQUET, TSV, PLAIN = (".jsonl", ".ndjson", ".json"), (".parquet",), (".tsv",), (".txt",)
FIELDS = ("id", "src_lang", "tgt_lang", "source", "target")  # of sentence pairs
BRACES = re.compile(r"\{([^{}/]*,[^{}/]*)\}")
SAVED = ("state.json", "dataset_dict.json")  # in folders of save_to_disk: of one split, of several
HUB = "hub:"
BATCH_ROWS = 1024
BLOCK_ITEMS = 8192  # of how many items at once it is asked which are wanted
NAME_FIELD = "text_field of a source says which field holds the text"
# A line that str.strip would leave nothing of, before it is decoded: ASCII's white space, and Unicode's as UTF-8.
BLANK = re.compile(
    rb"(?:[\x09-\x0d\x1c-\x20]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*+"
    rb"\Z"
)
BEGINS_AS_JSON = re.compile(rb'\s*\[?\s*\{\s*"')


class Part(NamedTuple):
    """What is read by itself: a file, two files of which line follows line, or a row group of a Parquet file."""

    path: Path
    other: Path | None  # the target side, of two files
    group: int | None  # the row group, of a Parquet file
    first: int  # number of the part's first row in its file, from 0
    size: int  # bytes on the disk, of both sides; of a row group its share; 0 if streamed from the hub
    languages: tuple[str, str] | None = None  # of two files


@dataclass(frozen=True)
class Reading:
    """How parts are read.

    Attributes:
        text_field: The field that holds the text, where a file has fields.
        paragraphs: Whether a document of plain text ends at a blank line; else it is a line.
        direction: Of parallel text, such as de-en, for rows that do not say it.
        parallel: Whether the rows are sentence pairs.
        fields: Names of other fields of texts that are wanted, where rows have them.
    """

    text_field: str = "text"
    paragraphs: bool = False
    direction: str | None = None
    parallel: bool = False
    fields: tuple[str, ...] = ()


# An item as it was read. A line: bytes. A paragraph: the number of its first line, and bytes. A line of a TSV: its
# number, bytes, and the columns' names. A line of each of two files: bytes of both. A row of Parquet or of a data set,
# and an item of a JSON list: the value itself.
Raw = Any
Wanted = Callable[[int, int], Sequence[bool]]


# --- Which files ----------------------------------------------------------------------------------
@functools.lru_cache(4096)  # it is asked of every row
def form(path: Path) -> str:
    """The ending that tells a file's form."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def has_fields(path: Path) -> bool:
    """Whether the ending says that a file has fields or columns."""
    return form(path) in (*JSON, *PARQUET, *TSV)


def is_hub(name: str | Path) -> bool:
    """Whether a name means a data set of the hub."""
    return str(name).startswith(HUB)


def expand(name: str | Path, remedy: str = "check the path, or run the stage that makes it") -> list[Path]:
    """The files and folders that a name means, in a fixed order. A data set's name is left as it is.

    Raises:
        UserError: One of them is not there, or is empty, or a pattern meets none; it ends with the remedy.
    """
    name = str(name)
    if is_hub(name):
        return [Path(name)]
    if not Path(name).exists() and (braces := BRACES.search(name)):
        parts = [f"{name[: braces.start()]}{part}{name[braces.end() :]}" for part in braces[1].split(",")]
        return [path for part in parts for path in expand(part, remedy)]
    paths = [Path(name)]
    if not paths[0].exists() and glob.has_magic(name):
        found: dict[Path, None] = {}
        for path in map(Path, sorted(glob.glob(name, recursive=True))):
            if found.keys().isdisjoint(path.parents):  # ** meets folders, and what is in them
                found[path] = None
        paths = [*found]
        if not paths:
            raise UserError(f"no file is called {name}", remedy)
    for path in paths:
        check_exists(path, remedy)
    return paths


def files_of(path: Path) -> list[Path]:
    """A file or a saved data set itself; of another folder the files whose endings are known, hidden ones left out."""
    if not path.is_dir() or any((path / name).is_file() for name in SAVED):
        return [path]
    known = {*JSON, *PARQUET, *TSV, *PLAIN}
    inside = ((file, file.relative_to(path).parts) for file in sorted(path.rglob("*")) if file.is_file())
    files = [file for file, parts in inside if form(file) in known and not any(p.startswith(".") for p in parts)]
    if not files:
        raise UserError(f"{path} holds no text: {', '.join(sorted(known))}, plain or .gz or .zst", "name its files")
    return files


# --- Parts ----------------------------------------------------------------------------------------
def text_parts(name: str | Path) -> list[Part]:
    """The parts of the text that a name means, in order.

    Raises:
        UserError: A file is missing or empty, no Parquet, of units, or has columns of which none is known as the text.
    """
    parts = []
    for path in chain.from_iterable(map(files_of, expand(name))):
        if form(path) in TSV and not is_hub(path):
            raise UserError(
                f"{path} has columns, and which is the text is not known", "use JSONL with a field, or .txt"
            )
        parts += _parts(path, as_text=True)
    return parts


def parallel_parts(name: str | Path, direction: str | None = None) -> list[Part]:
    """The parts of the parallel text that a name means, in order.

    Raises:
        UserError: A file is missing or empty, no Parquet, plain text without its other side, or two files whose
            languages are not told.
    """
    asked = parse_direction(direction) if direction else None
    if not (is_hub(name) or Path(name).exists() or has_fields(Path(name))) and (braces := BRACES.search(str(name))):
        return _aligned_parts(str(name), braces, asked)
    parts = []
    for path in chain.from_iterable(map(files_of, expand(name))):
        if not (is_hub(path) or path.is_dir() or has_fields(path)):
            raise UserError(
                f"{path} holds plain text, one side of a pair at most",
                "name both sides, in quotes: 'europarl.{de,en}'; or use JSONL, TSV or Parquet",
            )
        parts += _parts(path)
    return parts


def _parts(path: Path, as_text: bool = False) -> list[Part]:
    """The parts of one file, saved data set, or data set of the hub."""
    if is_hub(path):
        return [Part(path, None, None, 0, 0)]
    if path.is_dir():
        if not (path / SAVED[0]).is_file():
            splits = ", ".join(str(path / split.name) for split in sorted(path.iterdir()) if split.is_dir())
            raise UserError(f"{path} holds several splits", f"name one: {splits}")
        return [Part(path, None, None, 0, sum(file.stat().st_size for file in path.glob("*.arrow")))]
    if form(path) in PARQUET:
        return _row_groups(path, as_text)
    return [Part(path, None, None, 0, path.stat().st_size)]


def _row_groups(path: Path, as_text: bool) -> list[Part]:
    """The parts of a Parquet file; UserError if units are given as text."""
    parts, first, size = [], 0, path.stat().st_size
    with _open_parquet(path) as file:
        if as_text and {"id", "units"} <= {*file.schema_arrow.names}:
            raise UserError(f"{path}: these are units of speech", "give them in a source of kind: speech")
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        total = sum(group.total_byte_size for group in groups)
        for number, group in enumerate(groups):
            share = max(1, size * group.total_byte_size // max(total, 1))  # 0 is a file that holds nothing
            parts.append(Part(path, None, number, first, share))
            first += group.num_rows
    return parts


def _aligned_parts(name: str, braces: re.Match, asked: tuple[str, str] | None) -> list[Part]:
    """The parts of files of which line follows line, such as europarl.{de,en}.

    Which side is which, endings say that are languages, whatever order the direction has; else the direction does.
    """
    ends = braces[1].split(",")
    named = tuple(find_language(end.strip(".")) for end in ends)
    codes = asked if asked and named == (None,) * 2 else named
    if len(ends) != 2 or None in codes or codes[0] == codes[1] or (asked and {*asked} != {*codes}):
        wanted = " and ".join(asked or ("two of the ten languages",))
        remedy = "write {de,en}; or endings that are no languages, such as {src,tgt}, and the direction of the source"
        raise UserError(f"{name}: {{{braces[1]}}} does not name {wanted}", remedy)
    if asked and codes != asked:
        ends, codes = ends[::-1], asked
    sides = [expand(f"{name[: braces.start()]}{end}{name[braces.end() :]}") for end in ends]
    if len(sides[0]) != len(sides[1]):
        problem = f"{name}: {len(sides[0])} files end in {ends[0]}, {len(sides[1])} in {ends[1]}"
        raise UserError(problem, "each wants its other side")
    pairs = zip(*sides, strict=True)
    return [Part(a, b, None, 0, a.stat().st_size + b.stat().st_size, codes) for a, b in pairs]


# --- Reading --------------------------------------------------------------------------------------
def read_raw(part: Part, reading: Reading, wanted: Wanted | None = None, start: int = 0) -> Iterator[tuple[int, Raw]]:
    """Stream a part's items, unparsed, each with its number in the part, from 0.

    Blank lines of JSONL have numbers too, but are not given.

    Args:
        part: Of ``text_parts`` or ``parallel_parts``.
        reading: How to read it.
        wanted: Is given ``first`` and ``count``, and says of so many items from ``first`` on whether to give each; the
            others are passed over, cheaply. It may be asked of numbers after the last.
        start: Number of the first item to give.

    Raises:
        UserError: The file is missing, cut short or damaged, holds no rows, or something else than its name says, or
            lacks the column of the text; two files have not the same number of lines.
    """
    if is_hub(part.path):
        return _read_hub(part, reading, wanted, start)
    if part.path.is_dir():
        return _read_saved(part, reading, wanted, start)
    if part.group is not None:
        return _read_row_group(part, reading, wanted, start)
    if form(part.path) in JSON and not part.other:
        return _read_json(part.path, wanted, start)
    if form(part.path) in TSV and not part.other:
        return _read_tsv(part.path, wanted, start)
    if part.other:
        return _choose(_two_sides(part), wanted, start)
    lines = _plain_lines(part.path)
    return _choose(_paragraphs(lines) if reading.paragraphs else lines, wanted, start)


def _choose(items: Iterable, wanted: Wanted | None, start: int) -> Iterator[tuple[int, Any]]:
    """The wanted items from number ``start`` on, each with its number. Nothing is done in Python for the others."""
    numbered = enumerate(items)
    next(islice(numbered, start, start), None)  # passes over them
    if wanted is None:
        yield from numbered
        return
    for item in numbered:
        block = chain([item], islice(numbered, BLOCK_ITEMS - 1))
        yield from compress(block, wanted(item[0], BLOCK_ITEMS))


def _lines(path: Path) -> Iterator[bytes]:
    """Stream a file's lines; only \\n ends a line. A BOM is no text."""
    with open_plain(path) as file:
        for first in file:
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from file


def _plain_lines(path: Path) -> Iterator[bytes]:
    """``_lines`` of plain text; UserError if it holds JSON, which would be read as if it were text."""
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if BEGINS_AS_JSON.match(line):
            raise UserError(f"{path}:{number}: JSON, but the file's name does not end in .jsonl", "rename it")
        yield line
        if not BLANK.match(line):  # the first that is not tells
            yield from lines


def _paragraphs(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Join lines up to a blank one, each with the number of its first, from 1."""
    held: list[bytes] = []
    for number, line in enumerate(chain(lines, [b""]), 1):
        if not BLANK.match(line):
            held.append(line.rstrip(b"\r\n"))
        elif held:
            yield number - len(held), b"\n".join(held)
            held = []


def _two_sides(part: Part) -> Iterator[tuple[bytes, bytes]]:
    """Lines of two files; UserError if one has more."""
    for number, (one, other) in enumerate(zip_longest(_plain_lines(part.path), _plain_lines(part.other))):
        if one is None or other is None:
            short, long = (part.path, part.other) if one is None else (part.other, part.path)
            raise UserError(f"{short} has {number} lines, {long} has more", "line must follow line in both")
        yield one, other


def _read_json(path: Path, wanted: Wanted | None, start: int) -> Iterator[tuple[int, Any]]:
    """Lines of JSONL that are not blank, or the items of a JSON list."""
    with open_plain(path) as file:
        lines, items = json_lines(path, file)
        if items is not None:
            yield from _choose(items, wanted, start)
        for number, line in _choose(lines, wanted, start):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _read_tsv(path: Path, wanted: Wanted | None, start: int) -> Iterator[tuple[int, tuple]]:
    """Lines of a TSV below its columns' names. Without names, the first two columns are source and target."""
    lines = _lines(path)
    if (first := next(lines, None)) is None:
        raise UserError(f"{path} holds no rows", "check the path, or run the stage that makes it")
    names = tuple(first.decode("utf-8", "replace").rstrip("\r\n").split("\t"))
    told = {"source", "target"} <= {*names} or sum(find_language(name) is not None for name in names) > 1
    names = tuple(_decode(first, path, 1).split("\t")) if told else ("source", "target")
    for number, line in _choose(lines if told else chain([first], lines), wanted, start):
        yield number, (number + 1 + told, line, names)


# --- Reading tables -------------------------------------------------------------------------------
def _numbers(wanted: Wanted | None, start: int, end: int) -> Sequence[int]:
    """The wanted numbers from ``start`` to ``end - 1``."""
    if wanted is None:
        return range(start, end)
    numbers: list[int] = []
    for first in range(start, end, BLOCK_ITEMS):
        count = min(BLOCK_ITEMS, end - first)
        numbers += compress(range(first, first + count), wanted(first, count))
    return numbers


def _columns(names: Sequence[str], path: Path, reading: Reading) -> list[str]:
    """Which of a table's columns to read: of pairs all; UserError if the text's is not there."""
    if reading.parallel:
        return list(names)
    if reading.text_field not in names:
        problem = f"{path}: field {reading.text_field!r} is missing, there are {', '.join(names)}"
        raise UserError(problem, NAME_FIELD)
    return [name for name in names if name == reading.text_field or name in reading.fields]


def _rows(table, first: int, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The rows with these numbers of an Arrow table or batch whose first row has number ``first``."""
    if not numbers:
        return
    if len(numbers) < table.num_rows:
        table = table.take([number - first for number in numbers])
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:  # which row's it is, shows one by one; it is that row's fault alone
        rows = [_row_or_error(table.slice(row, 1)) for row in range(len(numbers))]
    yield from zip(numbers, rows, strict=True)


def _row_or_error(table) -> Any:
    """The one row of an Arrow table, or what is wrong with its UTF-8."""
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator:
    """Open a Parquet file; UserError if it is none, also where this shows only while it is read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet, or cut short ({error})", "fetch or write it again") from None


def _read_row_group(part: Part, reading: Reading, wanted: Wanted | None, start: int) -> Iterator[tuple[int, Any]]:
    """Rows of a row group, of which nothing is read if none is wanted."""
    with _open_parquet(part.path) as file:
        columns = _columns(file.schema_arrow.names, part.path, reading)
        numbers = _numbers(wanted, start, file.metadata.row_group(part.group).num_rows)
        if not numbers:
            return
        first = 0
        for batch in file.iter_batches(BATCH_ROWS, [part.group], columns):
            end = first + batch.num_rows
            yield from _rows(batch, first, numbers[bisect_left(numbers, first) : bisect_left(numbers, end)])
            first = end
            if numbers[-1] < end:
                return


def _read_saved(part: Part, reading: Reading, wanted: Wanted | None, start: int) -> Iterator[tuple[int, Any]]:
    """Rows of a folder that datasets.Dataset.save_to_disk wrote."""
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(part.path))
    except Exception as error:  # of many classes
        problem = f"{part.path} is no data set that can be read ({error})"
        raise UserError(problem, "save or fetch it again") from None
    numbers = _numbers(wanted, start, len(rows))
    rows = rows.select_columns(_columns(rows.column_names, part.path, reading)).select(numbers).with_format("arrow")
    done = 0
    for table in rows.iter(BATCH_ROWS):
        yield from _rows(table, 0, numbers[done : done + table.num_rows])
        done += table.num_rows


def _read_hub(part: Part, reading: Reading, wanted: Wanted | None, start: int) -> Iterator[tuple[int, Any]]:
    """Rows of a data set of the hub, streamed, or of a folder that the datasets library takes for one."""
    from datasets import load_dataset

    name, config, split = [*str(part.path).removeprefix(HUB).split(":", 2), "", ""][:3]
    first = 0
    remedy = (
        "check the name (hub:OWNER/NAME:CONFIG:SPLIT), the network and HF_HUB_OFFLINE; a gated data set wants `hf auth"
        " login`; or fetch it with `hf download` and name its files"
    )
    with asking_hub(str(part.path), remedy):
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for table in rows.with_format("arrow").iter(BATCH_ROWS):
            end = first + table.num_rows
            if numbers := _numbers(wanted, max(start, first), end):
                table = table.select(_columns(table.column_names, part.path, reading))
                yield from _rows(table, first, numbers)
            first = end


# --- Parsing --------------------------------------------------------------------------------------
def parse_text(part: Part, number: int, raw: Raw, reading: Reading) -> tuple[str, str, dict]:
    """The place, the text, and the row of an item that ``read_raw`` gave; plain text has an empty row.

    Raises:
        UserError: The row is malformed, lacks the field, has something else where a text is wanted, or spells units;
            names file and line.
    """
    if isinstance(raw, tuple) or (isinstance(raw, bytes) and form(part.path) not in JSON):
        line, data = raw if isinstance(raw, tuple) else (number + 1, raw)
        where, text, row = f"{part.path}:{line}", _decode(data, part.path, line), {}
    else:
        where, row = _row(part, number, raw)
        if reading.text_field not in row:
            raise UserError(f"{where}: field {reading.text_field!r} is missing", NAME_FIELD)
        check_texts(row, [reading.text_field], where)
        text = row[reading.text_field]
    check_outside_text(text, where)
    return where, text, row


def parse_parallel(part: Part, number: int, raw: Raw, reading: Reading) -> tuple[str, dict]:
    """The place and the sentence pair of an item that ``read_raw`` gave: a row with ``FIELDS``, and its other fields.

    A row without an id gets its file's name and its number, in which blank lines of JSONL count. A row that says its
    direction keeps it.

    Raises:
        UserError: The row is malformed or lacks a field, its languages are not two of the ten, or a side is no text or
            spells units; names file and line.
    """
    return _pair(part, number, raw, reading, part.first + number + 1)


def _pair(part: Part, number: int, raw: Raw, reading: Reading, row_number: int) -> tuple[str, dict]:
    """``parse_parallel``; ``row_number`` is for rows without an id."""
    named = {"id": f"{part.path.name}:{row_number}"}
    if part.other:
        where = f"{part.path}:{number + 1}"
        source, target = (_decode(side, path, number + 1) for side, path in zip(raw, part[:2], strict=True))
        src_lang, tgt_lang = part.languages
        pair = {**named, "src_lang": src_lang, "tgt_lang": tgt_lang, "source": source, "target": target}
    else:
        where, row = _row(part, number, raw)
        asked = parse_direction(reading.direction) if reading.direction else None
        pair = {**named, **row, **_sides(row, asked, where)}
        check_texts(pair, FIELDS[1:], where)
        pair["id"] = str(pair["id"])
    for field in ("source", "target"):
        check_outside_text(pair[field], f"{where}, {field}")
    return where, pair


def _decode(data: bytes, path: Path, number: int) -> str:
    """A text of one or more lines, of which the first has this number."""
    try:
        return data.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None


def _row(part: Part, number: int, raw: Raw) -> tuple[str, dict]:
    """The place and the fields of an item that has named fields."""
    if isinstance(raw, tuple):
        line, data, names = raw
        where, cells = f"{part.path}:{line}", _decode(data, part.path, line).split("\t")
        if len(cells) < len(names):
            raise UserError(f"{where}: {len(cells)} columns, but {', '.join(names)} are wanted", "mend the line")
        return where, dict(zip(names, cells, strict=False))
    if isinstance(raw, bytes):
        where, row = f"{part.path}:{number + 1}", parse_json(raw, part.path, number + 1)
    else:
        where = f"{part.path}, {'item' if form(part.path) in JSON else 'row'} {part.first + number + 1}"
        row = raw
    if isinstance(row, UnicodeDecodeError):
        raise UserError(f"{where}: not UTF-8 ({row.reason})", "mend or remove the row")
    check_object(row, where)
    return where, row


@functools.cache  # it is asked of every row
def parse_direction(direction: str) -> tuple[str, str]:
    """The codes of ``de-en``, ``German-English`` or ``deu_Latn-eng_Latn``."""
    return parse_pair("-".join(find_language(part) or part for part in direction.split("-")))


# --- Both -----------------------------------------------------------------------------------------
def iter_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a file or saved data set that has fields or columns, whole, each with its place."""
    for part in _parts(path):
        for number, raw in read_raw(part, Reading(parallel=True)):
            yield _row(part, number, raw)


def iter_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Stream a file's lines, each with its ``file:line``."""
    for number, line in enumerate(_lines(path), 1):
        yield f"{path}:{number}", _decode(line, path, number)


def iter_texts(name: str | Path, field: str = "text", paragraphs: bool = False) -> Iterator[tuple[str, str]]:
    """Stream the documents that a name means, each with its place.

    Args:
        name: See above.
        field: The field that holds the text, where a file has fields.
        paragraphs: Whether a document of plain text ends at a blank line; else it is a line.

    Raises:
        UserError: A file is missing, cut short or malformed, a row lacks the field, has something else where a text is
            wanted, or spells units; names file and line.
    """
    reading = Reading(text_field=field, paragraphs=paragraphs)
    for part in text_parts(name):
        for number, raw in read_raw(part, reading):
            where, text, _ = parse_text(part, number, raw, reading)
            yield where, text


def iter_parallel(name: str | Path, direction: str | None = None) -> Iterator[tuple[str, dict]]:
    """Stream the sentence pairs that a name means, each with its place: rows with ``FIELDS``.

    Rows without an id get their file's name and their number. Rows that say their direction keep it, whatever
    ``direction`` is.

    Args:
        name: See above.
        direction: Such as de-en, for rows that do not say it; of rows in more than two languages it says which.

    Raises:
        UserError: A file is missing, cut short or malformed; a row lacks a field, its languages are not two of the
            ten, or a side is no text or spells units; two files have not the same number of lines.
    """
    reading = Reading(direction=direction, parallel=True)
    for part in parallel_parts(name, direction):
        # ids count rows, not blank lines
        for row_number, (number, raw) in enumerate(read_raw(part, reading), part.first + 1):
            yield _pair(part, number, raw, reading, row_number)


# --- Languages of a row ---------------------------------------------------------------------------
def _sides(row: dict, asked: tuple[str, str] | None, where: str) -> dict:
    """src_lang, tgt_lang, source and target of a row, as far as it has them."""
    if isinstance(row.get("translation"), dict):
        row = row["translation"]
    if "source" in row or "target" in row:
        texts = {field: row.get(field) for field in ("source", "target")}
        if "src_lang" not in row and "tgt_lang" not in row:
            if not asked:
                remedy = "add them, or say the direction of the source"
                raise UserError(f"{where}: it has neither src_lang nor tgt_lang", remedy)
            return {"src_lang": asked[0], "tgt_lang": asked[1], **texts}
        check_texts(row, ("src_lang", "tgt_lang"), where)
        codes = []
        for field in ("src_lang", "tgt_lang"):
            code = find_language(row[field])
            if code is None:
                problem = f"{where}: unknown language {row[field]!r} as {field}"
                raise UserError(problem, f"it must be one of: {', '.join(LANGUAGES)}")
            codes.append(code)
        if codes[0] == codes[1]:
            raise UserError(f"{where}: src_lang and tgt_lang are both {row['src_lang']!r}", "mend or remove the line")
        return {"src_lang": codes[0], "tgt_lang": codes[1], **texts}
    texts = {code: text for name, text in row.items() if (code := find_language(name))}
    pair = asked or tuple(texts)
    if len(pair) != 2 or not texts.keys() >= {*pair}:
        wanted = " and ".join(asked or ("source and target, or two languages",))
        remedy = "a pair has source and target, or two languages (de, en; more with a direction)"
        raise UserError(f"{where}: of {', '.join(row)}, none are {wanted}", remedy)
    return {"src_lang": pair[0], "tgt_lang": pair[1], "source": texts[pair[0]], "target": texts[pair[1]]}
