"""JSONL, the original's JSON lists and sharded units Parquet, in and out; bad rows are named by file and line."""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.languages import LANGUAGES
from towerspeech.stage import RUN_INFO, UserError, check_exists, publish, read_json
from towerspeech.tokenizer import check_outside_text

UNIT_COLUMNS = ("id", "audio", "language", "duration_s", "units", "text")
REMAKE = "run speech_units/label_audio.py"


# --- JSONL ----------------------------------------------------------------------------------------
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that is half a character, or half of a pair


def iter_jsonl(path: Path, required: Iterable[str] = ()) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a JSONL file, each with its ``file:line``. Blank lines are passed over.

    Args:
        path: The file, in UTF-8, with or without a BOM. A JSON list, as the original TowerSpeech's prompt files are,
            is read whole.
        required: Fields that every row must have.

    Raises:
        UserError: The file is missing, empty or malformed, or a row lacks a field; names file and line.
    """
    path = _file(path)
    number_of_rows = 0
    for where, row in _json_rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: an object is wanted, got {type(row).__name__}", "mend or remove the line")
        missing = [name for name in required if name not in row]
        if missing:
            raise UserError(f"{where}: field {missing[0]!r} is missing", f"every row needs: {', '.join(required)}")
        yield where, row
        number_of_rows += 1
    if not number_of_rows:
        raise UserError(f"{path} holds no rows", "check the path, or run the stage that makes it")


def _file(path: Path) -> Path:
    """Raise UserError unless a path names a file that is not empty."""
    check_exists(Path(path), "check the path, or run the stage that makes it")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, but a file is wanted", f"name its files: {path}/...")
    return Path(path)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The values of a JSONL file or a JSON list, each with its place."""
    with open(path, "rb") as file:
        begun = False
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # in the middle too: files that were joined have one a file
            if not line.strip():
                continue
            if not begun and line.lstrip().startswith(b"["):
                items = _loads(line + file.read(), f"{path}", number)
                yield from ((f"{path}, item {i}", item) for i, item in enumerate(items, 1))
                return
            begun = True
            yield f"{path}:{number}", _loads(line, f"{path}", number)


def _loads(data: bytes, path: str, number: int):
    """Parse one JSON text that begins in line ``number``."""
    where = f"{path}:{number}"
    try:
        value = json.loads(data.rstrip().decode("utf-8"))
        if SURROGATE.search(data):
            dumps(value).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON ({error.msg})", "mend or remove the line") from None
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: half a character (the lone surrogate {half})", "mend or remove the row") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
        raise UserError(f"{where}: not JSON that can be read ({error})", "mend or remove the line") from None


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[dict]:
    """All rows of ``iter_jsonl``."""
    return [row for _, row in iter_jsonl(path, required)]


PARALLEL_FIELDS = ("src_lang", "tgt_lang", "source", "target")


def iter_parallel(path: Path, required: Iterable[str] = PARALLEL_FIELDS) -> Iterator[tuple[str, dict]]:
    """Stream sentence pairs from JSONL, each with its ``file:line``.

    Args:
        path: The file.
        required: Fields that every row must have, ``PARALLEL_FIELDS`` among them.

    Raises:
        UserError: A row lacks a field, its languages are not two of the ten, or a side is no text or spells units.
    """
    for where, row in iter_jsonl(path, required):
        for field in PARALLEL_FIELDS:
            if not isinstance(row[field], str):
                problem = f"{where}: {field} is {row[field]!r:.80}, but it must be text"
                raise UserError(problem, "mend or remove the line")
        for field in ("src_lang", "tgt_lang"):
            if row[field] not in LANGUAGES:
                problem = f"{where}: unknown language {row[field]!r} as {field}"
                raise UserError(problem, f"it must be one of: {', '.join(LANGUAGES)}")
        if row["src_lang"] == row["tgt_lang"]:
            raise UserError(f"{where}: src_lang and tgt_lang are both {row['src_lang']!r}", "mend or remove the line")
        for field in ("source", "target"):
            check_outside_text(row[field], f"{where}, {field}")
        yield where, row


ROLES = ("system", "user", "assistant")


def check_messages(messages, where: str) -> None:
    """Raise UserError unless these are the turns of a chat: objects with one of ``ROLES`` and a text as content.

    OpenAI's content parts (a list) are none: no tokenizer here reads audio or images.
    """
    if not isinstance(messages, list) or not messages:
        problem = f"{where}: messages must be a list of turns with role and content, got {messages!r:.80}"
        raise UserError(problem, "mend or remove the row")
    for number, turn in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise UserError(f"{place} is {turn!r:.80}, but an object with role and content is wanted", "mend the row")
        if turn.get("role") not in ROLES:
            found = f"its role is {turn['role']!r:.80}" if "role" in turn else "it has no role"
            raise UserError(f"{place}: {found}", f"use one of {', '.join(ROLES)}")
        content = turn.get("content")
        if not isinstance(content, str):
            found = f"its content is a {type(content).__name__}" if content is not None else "it has no content"
            raise UserError(f"{place}: {found}, but a text is wanted", "write the text itself, not a list of parts")
        if not content.strip():
            raise UserError(f"{place}: its content is blank", "remove the row, or write the text")


def dumps(row: dict) -> str:
    """One JSONL line, without its newline."""
    return json.dumps(row, ensure_ascii=False)


def write_jsonl(target: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSONL, atomically; returns their number."""
    count = 0
    with publish(target) as path, open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(dumps(row) + "\n")
            count += 1
    return count


def read_lines(path: Path) -> list[str]:
    """Read a plain text file, one sentence a line; only \\n ends a line, as in sacreBLEU. A BOM is no text."""
    try:
        text = _file(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})", "convert the file to UTF-8") from None
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


# --- Units Parquet --------------------------------------------------------------------------------
def shard_name(shard: int, num_shards: int) -> str:
    """units-00003-of-00008, without the ending."""
    return f"units-{shard:05d}-of-{num_shards:05d}"


def write_units(path: Path, rows: list[dict]) -> None:
    """Write one shard of units rows (``UNIT_COLUMNS``) to ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.string(), pa.string(), pa.float64(), pa.list_(pa.uint16()), pa.string())
    schema = pa.schema(list(zip(UNIT_COLUMNS, types, strict=True)))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def unit_shards(folder: Path) -> list[Path]:
    """The shards of a units folder, in order.

    Raises:
        UserError: There are none, or some of the ``-of-N`` are not there (yet).
    """
    made_by = "run speech_units/label_audio.py"
    check_exists(Path(folder), made_by)
    shards = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).glob("units-*-of-*.parquet"))
    if not shards:
        raise UserError(f"{folder} holds no units-*-of-*.parquet", made_by)
    if Path(folder).is_file():
        return shards
    totals = {int(re.search(r"-of-(\d+)\.parquet$", shard.name)[1]) for shard in shards}
    wanted = {f"{shard_name(i, max(totals))}.parquet" for i in range(max(totals))}
    if len(totals) > 1 or wanted != {shard.name for shard in shards}:
        raise UserError(
            f"{folder} holds {len(shards)} of {max(totals)} shards"
            + (f", of sets of different sizes {sorted(totals)}" if len(totals) > 1 else ""),
            f"{made_by} for the missing shards, and keep one set a folder",
        )
    return shards


def check_one_kmeans(paths: Iterable[Path]) -> None:
    """Raise UserError if units folders or Parquet files were labelled with different k-means.

    Their ids would mean different sounds. It is known of what label_audio.py wrote, not of .km files.
    """
    found = {}
    for path in paths:
        infos = path.glob(f"*{RUN_INFO}") if path.is_dir() else [path.with_suffix(f".{RUN_INFO}")]
        for info in sorted(info for info in infos if info.is_file()):
            labelled = read_json(info, "label the audio anew").get("inputs", {}).get("kmeans")
            if labelled:
                found.setdefault(labelled[0], path)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{one} and {other} were labelled with different k-means: their unit ids mean different sounds",
            "label all corpora with the same one (speech_units/label_audio.py)",
        )


def read_units(folder: Path, num_units: int | None = None) -> Iterator[dict]:
    """Stream the rows of a units folder (or one file): id, audio, language, duration_s, units, text.

    Args:
        folder: Folder of shards, or one Parquet file.
        num_units: If given, every id must lie below it.

    Raises:
        UserError: Incomplete shards, a file that is no units Parquet; or units that are null or out of range, with
            file and row.
    """
    for _, batch, _, _ in _unit_batches(folder, UNIT_COLUMNS, num_units):
        yield from batch.to_pylist()


def read_unit_arrays(folder: Path, num_units: int, columns: Iterable[str] = ()) -> Iterator[tuple]:
    """Stream a units folder (or one file) in batches of rows, as arrays: 20 times as fast as ``read_units``.

    Yields:
        All units of a batch, one row's after another's, (num_units_in_batch,) uint32; where each row's end,
        (num_rows,) int64; the pyarrow.RecordBatch with the columns asked for, and id; and a function from a row of it,
        counted from 0, to its place: file, row and id.

    Raises:
        UserError: As ``read_units``.
    """
    for place, batch, units, ends in _unit_batches(folder, ("id", "units", *columns), num_units):
        yield units.astype("<u4"), ends, batch, place


def read_unit_texts(folder: Path, num_units: int, offset: int = dsu.OFFSET) -> Iterator[str]:
    """Stream the utterances of a units folder (or one file) as ``units.to_text`` writes them, as fast.

    Raises:
        UserError: As ``read_unit_arrays``.
    """
    for units, ends, *_ in read_unit_arrays(folder, num_units):
        yield from split_units(units, ends, offset)


def split_units(units, ends, offset: int = dsu.OFFSET) -> Iterator[str]:
    """Private-use text of each row, from all rows' units, (num_units,) uint32, and where a row's end, (num_rows,)."""
    text = (units + offset).tobytes().decode("utf-32-le")
    start = 0
    for end in ends.tolist():
        yield text[start:end]
        start = end


def _unit_batches(folder: Path, columns: Iterable[str], num_units: int | None) -> Iterator[tuple]:
    """Read each shard of a units folder in batches, and check its units before any cast.

    Yields:
        A function from a row of the batch, counted from 0, to its place; the pyarrow.RecordBatch; all its units, in
        the integer type of the file; and where each row's end, (num_rows,) int64.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for shard in unit_shards(folder):
        first = 1
        try:
            file = pq.ParquetFile(shard)
            _check_types(shard, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                place = functools.partial(_place, shard, first, batch)
                column = batch.column("units")
                if column.null_count:
                    row = column.is_null().to_pylist().index(True)
                    problem = f"{shard}, row {first + row}: units is null"
                    raise UserError(problem, "remove the row; no speech is an empty list")
                flat, ends = column.flatten(), pc.list_value_length(column).to_numpy().cumsum(dtype="i8")
                if flat.null_count:
                    row = next(row for row, units in enumerate(column.to_pylist()) if None in units)
                    raise UserError(f"{shard}, row {first + row}: a unit is null", "mend or remove the row")
                units = flat.to_numpy(zero_copy_only=False)
                if len(units) and (units.min() < 0 or (num_units is not None and units.max() >= num_units)):
                    most = num_units if num_units is not None else dsu.MAX_NUM_UNITS
                    bad = int(((units < 0) | (units >= most)).argmax())
                    row = int(ends.searchsorted(bad, side="right"))
                    dsu.check_range([int(units[bad])], most, place(row))
                yield place, batch, units, ends
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{shard} is no units Parquet that can be read: {reason}", REMAKE) from None


def _place(shard: Path, first: int, batch, row: int) -> str:
    return f"{shard}, row {first + row} (id {batch.column('id')[row].as_py()})"


def _check_types(shard: Path, schema) -> None:
    """Raise UserError unless a Parquet file has the columns of a units row: texts, and lists of integers."""
    from pyarrow import types

    missing = set(UNIT_COLUMNS) - set(schema.names)
    if missing:
        raise UserError(f"{shard} is no units Parquet: it lacks {', '.join(sorted(missing))}", REMAKE)
    for name in ("id", "audio", "language", "text", "units"):
        kind, wanted = schema.field(name).type, "strings"
        right = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
        if name == "units":
            wanted = "lists of integers"
            right = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
            # If all of a file's utterances are empty, their lists are of nulls.
            right = right and (types.is_integer(kind.value_type) or types.is_null(kind.value_type))
        if not right:
            raise UserError(f"{shard}: {name} is of type {kind}, but {wanted} are wanted", REMAKE)
