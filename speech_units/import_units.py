"""Take over units that were made elsewhere: .km lines, textlesslib's or slamkit's, into units Parquet.

Usage: python speech_units/import_units.py --units train.km --tsv train.tsv --texts train.txt --language en \\
           --num_units 500 --output_dir runs/units/train

Reads units, one of
    .km             ids separated by spaces, an utterance a line (fairseq's dump_km_label.py, export_units.py)
    with names      name<TAB>ids (textlesslib's transcribe.py --preserve_name)
    .jsonl          {"units": [...], "duration": [...], "file_name": ...} (slamkit's extract_features.py)
and, line by line, whose they are: --manifest (JSONL with id, audio, language and text, and duration_s if known; a
manifest, or what export_units.py wrote), or --tsv (fairseq's manifest: the root, then path<TAB>samples at 16 kHz),
or --ids (one a line); with --texts (a transcript a line) and --language where there is no manifest. Units that bring
a name (of .jsonl: the file's, without folder and ending) go to the utterance with that id instead, in any order, and
need none of these.
Writes, in output_dir: units-00000-of-00001.parquet and so on, as label_audio.py does.
"""

import codecs
import math
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path, PurePosixPath

from towerspeech import units as dsu
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists
from towerspeech.manifests import TEXTS, seconds
from towerspeech.outside_text import check_outside_text
from towerspeech.records import check_texts, iter_jsonl
from towerspeech.stage import stage
from towerspeech.units_parquet import shard_name, write_units

SAMPLE_RATE = 16000  # Hz, of fairseq's manifests: HuBERT hears nothing else


# --- Files ----------------------------------------------------------------------------------------
def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Stream the lines of a text file, each with its file:line; only \\n ends a line, and a BOM is no text."""
    check_exists(path, "check the path")
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is wanted", "name the file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None
            yield f"{path}:{number}", text


def together(one: Path, ones: Iterator[tuple], other: Path, others: Iterator[tuple]) -> Iterator[tuple[tuple, tuple]]:
    """Pair two files' lines, given as tuples that begin with file:line; UserError if one has more."""
    for number, (first, second) in enumerate(zip_longest(ones, others)):
        if first is None or second is None:
            shorter, longer = (one, second) if first is None else (other, first)
            raise UserError(
                f"{longer[0]}: {shorter} has no line for it, it has {number:,}", "the files must have as many lines"
            )
        yield first, second


def read_units_file(path: Path, num_units: int) -> Iterator[tuple[str, str | None, str, list[int]]]:
    """Stream a file's utterances: file:line, name or None, audio ("" if it is not said) and unit ids.

    Raises:
        UserError: A line holds something else than ids below ``num_units``; names file:line.
    """
    if path.suffix == ".jsonl":
        for where, row in iter_jsonl(path, required=["units"], texts=["file_name"]):
            units = row["units"]
            if not isinstance(units, list) or not all(type(unit) is int for unit in units):
                raise UserError(f"{where}: its units are no list of integers: {units!r:.80}", "mend the line")
            dsu.check_range(units, num_units, where)
            yield where, PurePosixPath(row["file_name"]).stem, row["file_name"], units
        return
    for where, line in lines(path):
        name, _, ids = line.partition("\t") if "\t" in line else (None, "", line)
        if "\t" in ids:
            problem = f"{where}: not unit ids, which are digits alone, with spaces between them: {ascii(ids[:40])}"
            raise UserError(problem, "one tab stands in a line, after the name")
        units = dsu.parse_km(ids.encode(), num_units, where)
        yield where, name, "", units


def read_tsv(path: Path) -> Iterator[tuple[str, dict]]:
    """Stream fairseq's manifest: audio, its length if it is said, and as id its name without folder and ending."""
    rest = lines(path)
    next(rest)  # the root, which is our audio_root
    for where, line in rest:
        audio, _, samples = line.partition("\t")
        if not audio or not (samples == "" or (samples.isascii() and samples.isdigit())):
            raise UserError(f"{where}: not path<TAB>samples: {line!r:.80}", "mend the line")
        length = int(samples) / SAMPLE_RATE if samples else None
        yield where, {"id": PurePosixPath(audio).stem, "audio": audio, "duration_s": length}


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Stream a manifest's rows; which part of a file they mean does not matter here."""
    for where, row in iter_jsonl(path, texts=TEXTS):
        try:
            length = seconds(row)
            right = length is None or (type(length) in (int, float) and 0 <= length < math.inf)
        except TypeError:
            right = False
        if not right:
            raise UserError(f"{where}: its length is no number of seconds", "check duration_s, start_s and end_s")
        yield where, {name: row[name] for name in TEXTS} | {"duration_s": length}


def read_utterances(
    manifest: Path | None, tsv: Path | None, ids: Path | None, texts: Path | None, language: str | None
) -> tuple[Path | None, Iterator[tuple[str, dict]]]:
    """The file that says whose the units are, and its rows: (file:line, row without units)."""
    if manifest:
        return manifest, read_rows(manifest)
    source, rows = tsv, read_tsv(tsv) if tsv else iter(())
    if ids:
        named = ((where, {"id": name, "audio": "", "duration_s": None}) for where, name in lines(ids))
        if tsv:
            named = ((where, row | {"id": name}) for (_, row), (where, name) in together(tsv, rows, ids, lines(ids)))
        source, rows = ids, named
    rows = ((where, row | {"language": language, "text": ""}) for where, row in rows)
    if texts and source:
        pairs = together(source, rows, texts, lines(texts))
        rows = ((where, row | {"text": text}) for (_, row), (where, text) in pairs)
    return source, rows


# --- Rows -----------------------------------------------------------------------------------------
def join(
    units: Path, num_units: int, source: Path | None, rows: Iterator[tuple[str, dict]], language: str | None
) -> Iterator[tuple[str, dict]]:
    """Pair units with the rows whose they are, by line, or by name where the units bring one."""
    found = read_units_file(units, num_units)
    if next(read_units_file(units, num_units))[1] is None:
        if source is None:
            raise UserError(f"nothing says whose units {units} holds", "give --manifest, --tsv or --ids")
        for (place, name, _, ids), (where, row) in together(units, found, source, rows):
            if name is not None:
                raise UserError(f"{place}: it brings a name, but earlier lines do not", "name all or none")
            yield where, row | {"units": ids}
        return
    known = {row["id"]: row for _, row in check_ids(rows)} if source else None
    used = 0
    for where, name, audio, ids in found:
        if name is None:
            raise UserError(f"{where}: it brings no name, but earlier lines do", "name all or none")
        row = {"id": name, "audio": audio, "language": language, "duration_s": None, "text": ""}
        if known is not None:
            if name not in known:
                raise UserError(f"{where}: {source} has no id {name!r}", "units' names must be ids of that file")
            row = known[name]
        yield where, row | {"units": ids}
        used += 1
    if known is not None and used < len(known):
        raise UserError(f"{source} has {len(known):,} utterances, but {units} {used:,}", "leave the others out")


def check_ids(rows: Iterator[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """Pass rows on; UserError if an id is blank or occurs twice, or a text spells units."""
    ids = set()
    for where, row in rows:
        check_texts(row, ["id"], where, blank=False)
        check_outside_text(row["text"], where)
        if row["id"] in ids:
            raise UserError(f"{where}: id {row['id']!r} is there a second time", "make ids unique, or give --ids")
        ids.add(row["id"])
        yield where, row


def import_units(
    units: Path,
    output_dir: Path,
    num_units: int,
    manifest: Path | None = None,
    tsv: Path | None = None,
    ids: Path | None = None,
    texts: Path | None = None,
    language: str | None = None,
    collapse: bool = True,
    num_shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Turn units that were made elsewhere into units Parquet.

    Args:
        units: A .km file, one with names before a tab, or slamkit's .jsonl.
        output_dir: Folder of units shards to write.
        num_units: Units of the k-means that they were made with.
        manifest: JSONL with id, audio, language and text of each utterance.
        tsv: Instead of it, fairseq's manifest; an id is an audio file's name without folder and ending.
        ids: An id a line, instead of the tsv's or of a manifest.
        texts: A transcript a line; without it, and without a manifest, texts are empty.
        language: The speech's language, where there is no manifest.
        collapse: Drop consecutive repeats, as label_audio.py does.
        num_shards: Files to write; a shard's rows are held in memory, so give one for every 100,000 utterances or so.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    dsu.check_num_units(num_units)
    if num_shards < 1:
        raise UserError(f"--num_shards is {num_shards}", "give at least 1")
    if manifest and (tsv or ids or texts or language):
        raise UserError("--manifest says it all, but --tsv, --ids, --texts or --language is given", "leave them out")
    if not manifest and not language:
        raise UserError("nothing says which language is spoken", "give --language, or --manifest")
    if texts and not (tsv or ids):
        raise UserError("nothing says whose --texts these are", "give --tsv, --ids, or --manifest without --texts")
    import numpy as np
    from tqdm import tqdm

    inputs = ["units", "manifest", "tsv", "ids", "texts"]
    with stage(__file__, output_dir, arguments, inputs) as work:
        if work.done:
            return
        is_jsonl = units.suffix == ".jsonl"
        num_rows = sum(1 for _ in (iter_jsonl(units) if is_jsonl else lines(units)))
        source, known = read_utterances(manifest, tsv, ids, texts, language)
        rows = check_ids(join(units, num_units, source, known, language))
        rows = iter(tqdm(rows, total=num_rows, desc=units.name, unit="utt"))
        before, after = 0, 0
        with work.publish() as folder:  # all shards or none: the last line may be the wrong one
            for index in range(num_shards):
                size = num_rows * (index + 1) // num_shards - num_rows * index // num_shards
                shard = []
                # The last one's file must end, so that what is found only then is found.
                for _, row in rows if index == num_shards - 1 else islice(rows, size):
                    kept = dsu.collapse(row["units"]) if collapse else row["units"]
                    before, after = before + len(row["units"]), after + len(kept)
                    shard.append(row | {"units": np.array(kept, dtype=np.uint16)})
                write_units(folder / f"{shard_name(index, num_shards)}.parquet", shard)
        work.counts.update(utterances=num_rows, units_read=before, units=after)
        print(f"{num_rows:,} utterances, {after:,} units", end="")
        print(f"; {before - after:,} consecutive repeats dropped" if before > after else "; no repeats dropped")
    print(output_dir)


if __name__ == "__main__":
    run(import_units)
