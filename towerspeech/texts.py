"""Text and parallel text, in the forms that researchers have them in; bad rows are named by file and line.

A name means files:

    text/de.jsonl           one file
    text/c4/                the files of a folder, and of those in it, whose endings are below
    text/c4/*.json.gz       a pattern of the shell's kind (** is any number of folders)
    europarl.{de,en}.gz     in braces, each of several; for parallel text: two files of which line follows line

A file's form is told by its ending, before .gz or .zst:

    .jsonl .ndjson .json    an object a line, or one list of them
    .parquet                a row each
    .tsv                    a line each, columns apart by tabs; the first line may name them
    a folder that datasets.Dataset.save_to_disk wrote
    .txt, and others        plain text, UTF-8

A sentence pair is told by its fields: source and target, with src_lang and tgt_lang or in a direction that the caller
gives; or two languages, such as de and en, beside each other or inside ``translation``. Languages have their codes,
names or FLORES codes: de, German, deu_Latn.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import PACKED, check_exists, open_plain
from towerspeech.languages import LANGUAGES, find_language, parse_pair
from towerspeech.outside_text import check_outside_text
from towerspeech.records import check_texts, iter_jsonl

JSON, PARQUET, TSV, PLAIN = (".jsonl", ".ndjson", ".json"), (".parquet",), (".tsv",), (".txt",)
FIELDS = ("id", "src_lang", "tgt_lang", "source", "target")  # of sentence pairs
BRACES = re.compile(r"\{([^{}/]*,[^{}/]*)\}")
SAVED = ("state.json", "dataset_dict.json")  # in folders of save_to_disk: of one split, of several
BATCH_ROWS = 1024
NAME_FIELD = "text_field of a source says which field holds the text"


# --- Which files ----------------------------------------------------------------------------------
def form(path: Path) -> str:
    """The ending that tells a file's form."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def has_fields(path: Path) -> bool:
    """Whether the ending says that a file has fields or columns."""
    return form(path) in (*JSON, *PARQUET, *TSV)


def expand(name: str | Path, remedy: str = "check the path, or run the stage that makes it") -> list[Path]:
    """The files and folders that a name means, in a fixed order.

    Raises:
        UserError: One of them is not there, or is empty, or a pattern meets none; it ends with the remedy.
    """
    name = str(name)
    if not Path(name).exists() and (braces := BRACES.search(name)):
        parts = [f"{name[: braces.start()]}{part}{name[braces.end() :]}" for part in braces[1].split(",")]
        return [path for part in parts for path in expand(part, remedy)]
    paths = [Path(name)]
    if not paths[0].exists() and glob.has_magic(name):
        paths = []
        for path in map(Path, sorted(glob.glob(name, recursive=True))):
            if not {*paths}.intersection(path.parents):  # ** meets folders, and what is in them
                paths.append(path)
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


# --- Rows -----------------------------------------------------------------------------------------
def iter_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Stream a file's lines, each with its ``file:line``; only \\n ends a line. A BOM is no text."""
    with open_plain(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None
            yield f"{path}:{number}", text.rstrip("\r\n")


def iter_plain(path: Path) -> Iterator[tuple[str, str]]:
    """``iter_lines`` of plain text; UserError if it holds JSON, which would be read as if it were text."""
    begun = False
    for where, line in iter_lines(path):
        if not begun and line.strip():
            begun = True
            if re.match(r'\[?\s*\{\s*"', line.lstrip()):
                raise UserError(f"{where}: JSON, but the file's name does not end in .jsonl", "rename it")
        yield where, line


def iter_parquet(path: Path, field: str | None) -> Iterator[tuple[str, dict]]:
    """Stream a Parquet file's rows, of one column or of all, each with its place."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            check_column(path, file.schema_arrow.names, field)
            for batch in file.iter_batches(BATCH_ROWS, columns=[field] if field else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet, or cut short ({error})", "fetch or write it again") from None


def iter_saved(path: Path, field: str | None) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a folder that datasets.Dataset.save_to_disk wrote, as ``iter_parquet`` does."""
    if not (path / SAVED[0]).is_file():
        splits = ", ".join(str(path / split.name) for split in sorted(path.iterdir()) if split.is_dir())
        raise UserError(f"{path} holds several splits", f"name one: {splits}")
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(path))
    except Exception as error:  # of many classes
        raise UserError(f"{path} is no data set that can be read ({error})", "save or fetch it again") from None
    check_column(path, rows.column_names, field)
    for number, row in enumerate(rows.select_columns([field]) if field else rows, 1):
        yield f"{path}, row {number}", row


def check_column(path: Path, names: Sequence[str], field: str | None) -> None:
    """Raise UserError if a column that is wanted is not there."""
    if field and field not in names:
        raise UserError(f"{path}: field {field!r} is missing, there are {', '.join(names)}", NAME_FIELD)


def iter_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a file that has named fields, each with its place; all must have the field that is named."""
    if path.is_dir():
        yield from iter_saved(path, field)
    elif form(path) in PARQUET:
        yield from iter_parquet(path, field)
    else:
        for where, row in iter_jsonl(path):
            if field and field not in row:
                raise UserError(f"{where}: field {field!r} is missing", NAME_FIELD)
            yield where, row


# --- Text -----------------------------------------------------------------------------------------
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
    for path in chain.from_iterable(map(files_of, expand(name))):
        if form(path) in TSV:
            raise UserError(
                f"{path} has columns, and which is the text is not known", "use JSONL with a field, or .txt"
            )
        if path.is_dir() or form(path) in (*JSON, *PARQUET):
            for where, row in iter_rows(path, field):
                check_texts(row, [field], where)
                check_outside_text(row[field], where)
                yield where, row[field]
        else:
            for where, text in _paragraphs(iter_plain(path)) if paragraphs else iter_plain(path):
                check_outside_text(text, where)
                yield where, text


def _paragraphs(lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Join lines up to a blank one; the place is that of the first."""
    held: list[tuple[str, str]] = []
    for where, line in chain(lines, [("", "")]):
        if line.strip():
            held.append((where, line))
        elif held:
            yield held[0][0], "\n".join(text for _, text in held)
            held = []


# --- Parallel text --------------------------------------------------------------------------------
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
    asked = parse_direction(direction) if direction else None
    braces = None if Path(name).exists() or has_fields(Path(name)) else BRACES.search(str(name))
    if braces:
        rows = _aligned(str(name), braces, asked)
    else:
        rows = chain.from_iterable(_pairs(path, asked) for path in chain.from_iterable(map(files_of, expand(name))))
    for where, row in rows:
        for field in ("source", "target"):
            check_outside_text(row[field], f"{where}, {field}")
        yield where, row


def parse_direction(direction: str) -> tuple[str, str]:
    """The codes of ``de-en``, ``German-English`` or ``deu_Latn-eng_Latn``."""
    return parse_pair("-".join(find_language(part) or part for part in direction.split("-")))


def _aligned(name: str, braces: re.Match, asked: tuple[str, str] | None) -> Iterator[tuple[str, dict]]:
    """Sentence pairs of files of which line follows line, such as europarl.{de,en}.

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
    for source, target in zip(*sides, strict=True):
        for number, (one, other) in enumerate(zip_longest(iter_plain(source), iter_plain(target)), 1):
            if one is None or other is None:
                short, long = (source, target) if one is None else (target, source)
                raise UserError(f"{short} has {number - 1} lines, {long} has more", "line must follow line in both")
            named = {"id": f"{source.name}:{number}", "src_lang": codes[0], "tgt_lang": codes[1]}
            yield one[0], {**named, "source": one[1], "target": other[1]}


def _pairs(path: Path, asked: tuple[str, str] | None) -> Iterator[tuple[str, dict]]:
    """Sentence pairs of a file with fields or columns."""
    if form(path) in TSV:
        rows = _tsv_rows(path)
    elif path.is_dir() or form(path) in (*JSON, *PARQUET):
        rows = iter_rows(path)
    else:
        raise UserError(
            f"{path} holds plain text, one side of a pair at most",
            "name both sides, in quotes: 'europarl.{de,en}'; or use JSONL, TSV or Parquet",
        )
    for number, (where, row) in enumerate(rows, 1):
        pair = {"id": f"{path.name}:{number}", **row, **_sides(row, asked, where)}
        check_texts(pair, FIELDS[1:], where)
        pair["id"] = str(pair["id"])
        yield where, pair


def _tsv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Lines of a TSV as rows. Without a first line that names them, the first two columns are source and target."""
    lines = iter_lines(path)
    if (first := next(lines, None)) is None:
        raise UserError(f"{path} holds no rows", "check the path, or run the stage that makes it")
    names = first[1].split("\t")
    if not ({"source", "target"} <= {*names} or sum(find_language(name) is not None for name in names) > 1):
        names = ["source", "target"]
        lines = chain([first], lines)
    for where, line in lines:
        cells = line.split("\t")
        if len(cells) < len(names):
            raise UserError(f"{where}: {len(cells)} columns, but {', '.join(names)} are wanted", "mend the line")
        yield where, dict(zip(names, cells, strict=False))


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
