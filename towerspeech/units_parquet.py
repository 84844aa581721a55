"""Units as Parquet: the shards that speech_units/label_audio.py writes, in and out."""

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json
from towerspeech.stage import RUN_INFO

UNIT_COLUMNS = ("id", "audio", "language", "duration_s", "units", "text")
REMAKE = "run speech_units/label_audio.py"
ROWS_HELD = 8192


def shard_name(shard: int, num_shards: int) -> str:
    """units-00003-of-00008, without the ending."""
    return f"units-{shard:05d}-of-{num_shards:05d}"


def write_units(path: Path, rows: Iterable[dict]) -> None:
    """Write one shard of units rows (``UNIT_COLUMNS``; other fields are left out) to ``path``, ROWS_HELD at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.string(), pa.string(), pa.float64(), pa.list_(pa.uint16()), pa.string())
    schema = pa.schema(list(zip(UNIT_COLUMNS, types, strict=True)))
    left = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        held = list(islice(left, ROWS_HELD))
        while True:
            file.write_table(pa.Table.from_pylist(held, schema=schema))
            if not (held := list(islice(left, ROWS_HELD))):
                return


def unit_shards(folder: Path) -> list[Path]:
    """The shards of a units folder, in order; UserError if some of the ``-of-N`` are not there (yet)."""
    check_exists(Path(folder), REMAKE)
    if Path(folder).is_file():
        return [Path(folder)]
    shards = sorted(Path(folder).glob("units-*-of-*.parquet"))
    if not shards:
        raise UserError(f"{folder} holds no units-*-of-*.parquet", REMAKE)
    totals = {int(re.search(r"-of-(\d+)\.parquet$", shard.name)[1]) for shard in shards}
    wanted = [f"{shard_name(i, max(totals))}.parquet" for i in range(max(totals))]
    if wanted != [shard.name for shard in shards]:
        sizes = f", of sets of different sizes {sorted(totals)}" if len(totals) > 1 else ""
        raise UserError(
            f"{folder} holds {len(shards)} of {max(totals)} shards{sizes}",
            f"{REMAKE} for the missing shards, and keep one set a folder",
        )
    return shards


def check_one_kmeans(paths: Iterable[Path]) -> None:
    """Raise UserError if units folders or Parquet files were labelled with different k-means.

    Their ids would mean different sounds. It is known of what label_audio.py wrote, not of .km files.
    """
    folders = {}  # by the hash of their k-means
    for path in paths:
        infos = path.glob(f"*{RUN_INFO}") if path.is_dir() else [path.with_suffix(f".{RUN_INFO}")]
        for info in sorted(info for info in infos if info.is_file()):
            labelled = read_json(info, "label the audio anew").get("inputs", {}).get("kmeans")
            if labelled:
                folders.setdefault(labelled[0], path)
    if len(folders) > 1:
        one, other, *_ = folders.values()
        raise UserError(
            f"{one} and {other} were labelled with different k-means: their unit ids mean different sounds",
            "label all corpora with the same one (speech_units/label_audio.py)",
        )


def read_units(folder: Path, num_units: int | None = None) -> Iterator[dict]:
    """Stream the rows of a units folder (or one file): id, audio, language, duration_s, units, text.

    Raises:
        UserError: Incomplete shards, a file that is no units Parquet; or units that are null or out of range (below
            ``num_units``, if given), with file and row.
    """
    for _, _, batch, _ in read_unit_arrays(folder, num_units, UNIT_COLUMNS):
        yield from batch.to_pylist()


def read_unit_texts(folder: Path, num_units: int, offset: int = dsu.OFFSET) -> Iterator[str]:
    """Stream the utterances of a units folder (or one file) as ``units.to_text`` writes them, as arrays are read."""
    for units, ends, *_ in read_unit_arrays(folder, num_units):
        yield from dsu.split_units(units, ends, offset)


def read_unit_arrays(folder: Path, num_units: int | None, columns: Iterable[str] = ()) -> Iterator[tuple]:
    """Stream a units folder (or one file) in batches of rows, as arrays: 20 times as fast as ``read_units``.

    Yields:
        All units of a batch, one row's after another's, (num_units_in_batch,) uint32; where each row's end,
        (num_rows,) int64; the pyarrow.RecordBatch with the columns asked for, units and id; and a function from a row
        of it, counted from 0, to its place: file, row and id.

    Raises:
        UserError: As ``read_units``.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for shard in unit_shards(folder):
        first = 1
        try:
            file = pq.ParquetFile(shard)
            _check_types(shard, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=["id", "units", *columns]):
                column = batch.column("units")
                if column.null_count or column.flatten().null_count:
                    row = next(i for i, units in enumerate(column.to_pylist()) if units is None or None in units)
                    what = "a unit" if column[row].is_valid else "units"
                    problem = f"{shard}, row {first + row}: {what} is null"
                    raise UserError(problem, "remove the row; no speech is an empty list")
                units = column.flatten().to_numpy(zero_copy_only=False)
                ends = pc.list_value_length(column).to_numpy().cumsum(dtype="i8")
                place = functools.partial(_place, shard, first, batch)
                most = dsu.MAX_NUM_UNITS if num_units is None else num_units
                bad = ((units < 0) | (units >= most)).nonzero()[0]  # before any cast
                if len(bad):
                    row = int(ends.searchsorted(bad[0], side="right"))
                    dsu.check_range([int(units[bad[0]])], most, place(row))
                yield units.astype("<u4"), ends, batch, place
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
