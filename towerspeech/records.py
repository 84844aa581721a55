"""JSONL, the original's JSON lists and sharded units Parquet, in and out; bad rows are named by file and line."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.stage import RUN_INFO, UserError, check_exists, publish, read_json

UNIT_COLUMNS = ("id", "audio", "language", "duration_s", "units", "text")


# --- JSONL ----------------------------------------------------------------------------------------
def iter_jsonl(path: Path, required: Iterable[str] = ()) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a JSONL file, each with its ``file:line``.

    Args:
        path: The file, in UTF-8. A JSON list, as the original TowerSpeech's prompt files are, is read whole.
        required: Fields that every row must have.

    Raises:
        UserError: The file is missing, empty or malformed, or a row lacks a field; names file and line.
    """
    path = Path(path)
    check_exists(path, "check the path, or run the stage that makes it")
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is wanted", f"name its files: {path}/*.jsonl")
    with open(path, "rb") as file:
        if file.read(1) == b"[":
            rows = ((f"{path}, item {i}", row) for i, row in enumerate(_loads(path.read_bytes(), path, 0), 1))
        else:
            file.seek(0)
            rows = ((f"{path}:{i}", _loads(line, path, i)) for i, line in enumerate(file, 1))
        for where, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{where}: an object is wanted, got {type(row).__name__}", "mend or remove the line")
            missing = [name for name in required if name not in row]
            if missing:
                raise UserError(f"{where}: field {missing[0]!r} is missing", f"every row needs: {', '.join(required)}")
            yield where, row


def _loads(line: bytes, path: Path, number: int):
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number or error.lineno}: not JSON ({error.msg})", "mend or remove the line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number or 1}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[dict]:
    """All rows of ``iter_jsonl``."""
    return [row for _, row in iter_jsonl(path, required)]


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
    """Read a plain text file, one sentence a line; only \\n ends a line, as in sacreBLEU."""
    check_exists(path, "check the path")
    try:
        text = Path(path).read_bytes().decode("utf-8")
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
        UserError: Incomplete shards, a file that is no units Parquet, or an id out of range; names file and row.
    """
    for shard, first, batch in _unit_batches(folder, UNIT_COLUMNS):
        for row_number, row in enumerate(batch.to_pylist(), first):
            if num_units is not None:
                dsu.check_range(row["units"], num_units, f"{shard}, row {row_number} (id {row['id']})")
            yield row


def read_unit_arrays(folder: Path, num_units: int, columns: Iterable[str] = ()) -> Iterator[tuple]:
    """Stream a units folder (or one file) in batches of rows, as arrays: 20 times as fast as ``read_units``.

    Yields:
        All units of a batch, one row's after another's, (num_units_in_batch,) uint32; where each row's end,
        (num_rows,) int64; and the pyarrow.RecordBatch with the columns asked for, and id.

    Raises:
        UserError: As ``read_units``; or a row's units, or one of them, are null.
    """
    import numpy as np

    for shard, first, batch in _unit_batches(folder, ("id", "units", *columns)):
        column = batch.column("units")
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{shard}, row {first + row}: units is null", "remove the row; no speech is an empty list")
        flat = column.flatten()
        if flat.null_count:
            row = next(row for row, units in enumerate(column.to_pylist()) if None in units)
            raise UserError(f"{shard}, row {first + row}: a unit is null", "mend or remove the row")
        units, ends = flat.to_numpy().astype("<u4"), column.value_lengths().to_numpy().cumsum(dtype="i8")
        if len(units) and units.max() >= num_units:
            row = int(np.searchsorted(ends, int(np.argmax(units >= num_units)), side="right"))
            where = f"{shard}, row {first + row} (id {batch.column('id')[row].as_py()})"
            dsu.check_range(column[row].as_py(), num_units, where)
        yield units, ends, batch


def read_unit_texts(folder: Path, num_units: int, offset: int = dsu.OFFSET) -> Iterator[str]:
    """Stream the utterances of a units folder (or one file) as ``units.to_text`` writes them, as fast.

    Raises:
        UserError: As ``read_unit_arrays``.
    """
    for units, ends, _ in read_unit_arrays(folder, num_units):
        yield from split_units(units, ends, offset)


def split_units(units, ends, offset: int = dsu.OFFSET) -> Iterator[str]:
    """Private-use text of each row, from all rows' units, (num_units,) uint32, and where a row's end, (num_rows,)."""
    text = (units + offset).tobytes().decode("utf-32-le")
    start = 0
    for end in ends.tolist():
        yield text[start:end]
        start = end


def _unit_batches(folder: Path, columns: Iterable[str]) -> Iterator[tuple]:
    """Each shard of a units folder, the number of a batch's first row (from 1), and that pyarrow.RecordBatch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in unit_shards(folder):
        try:
            file = pq.ParquetFile(shard)
            missing = set(UNIT_COLUMNS) - set(file.schema_arrow.names)
        except pa.ArrowInvalid:
            missing = set(UNIT_COLUMNS)
        if missing:
            raise UserError(
                f"{shard} is no units Parquet: it lacks {', '.join(sorted(missing))}", "run label_audio.py"
            )
        first = 1
        for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
            yield shard, first, batch
            first += len(batch)
