"""Manifests: JSONL that names utterances, one a row, with their audio, language and transcript.

A row has id, audio (a path below the audio root), language and text, and may have

    start_s, end_s   the utterance is this part of the recording, in seconds; without end_s up to its end
    duration_s       how long the utterance lasts, in seconds (also: duration)
    member           audio is a tar file, of which this member is the recording
    row              audio is a Parquet file, of which this row, counted from 0, holds the recording's bytes

Other fields are kept and mean nothing here.
"""

import functools
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.outside_text import check_outside_text
from towerspeech.records import iter_jsonl

TEXTS = ("id", "audio", "language", "text")
SEGMENT_FIELDS = ("start_s", "end_s")
TAR_FILES = (".tar", ".tar.gz", ".tgz")
# Other names that mean a part of a recording, in any unit and with anything before: t_end, offset_s, startTime.
UNIT = "time|timestamp|ts|at|offset|s|secs?|seconds?|ms|hms|samples?|frames?|byte"
SEGMENT = re.compile(
    f"(.*_)?(t?start|t?beg|begin|onset|offset|stop|t?end|segments?|seg|interval|span|timestamps?|[se]time|t[01]"
    f"|[tx]m(in|ax))_?({UNIT})?(_({UNIT}))*|(.*_)?chan(nel)?(_id)?|(from|to)(_({UNIT}))?"
)


def read_manifest(manifest: Path) -> Iterator[dict]:
    """Stream the manifest's rows, with "where" = manifest:line added. Audio is not looked at.

    Raises:
        UserError: A line is malformed, its segment ends before it starts, it names the part of a recording or of an
            archive in another way than this module's, or an id occurs twice; names manifest:line.
    """
    for where, row in iter_jsonl(manifest, texts=TEXTS, unique_ids=True):
        check_row(row, where)
        yield {**row, "where": where}


def read_rows(manifest: Path, start: int, stop: int) -> Iterator[dict]:
    """Stream rows ``start`` to ``stop`` - 1, counted from 0, of a manifest that ``read_manifest`` has read through."""
    if start < stop:
        for where, row in islice(iter_jsonl(manifest, start=start), stop - start):
            yield {**row, "where": where}


def check_row(row: dict, where: str) -> None:
    """Raise UserError unless a row that has its texts says rightly which part of which file it means."""
    check_outside_text(row["text"], where)
    _check_other_names(row, where)
    for name in (*SEGMENT_FIELDS, "duration_s", "duration"):
        if row.get(name) is not None and not _is_seconds(row[name]):
            raise UserError(f"{where}: its {name} is {row[name]!r}", "give seconds, 0 or more, as a number")
    start, end = segment(row)
    if end is not None and end <= start:
        raise UserError(f"{where}: its segment ends at {end} s, but starts at {start} s", "mend or remove the line")
    audio, member, number = row["audio"], row.get("member"), row.get("row")
    is_tar, is_parquet = audio.lower().endswith(TAR_FILES), audio.lower().endswith(".parquet")
    if is_tar != (isinstance(member, str) and bool(member)) or (member is not None and not is_tar):
        raise UserError(
            f"{where}: audio is {audio!r}, member {member!r}", "name the member of a tar file, of no other"
        )
    if is_parquet != (type(number) is int and number >= 0) or (number is not None and not is_parquet):
        raise UserError(
            f"{where}: audio is {audio!r}, row {number!r}", "number the row of a Parquet file, of no other"
        )


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def segment(row: dict) -> tuple[float, float | None]:
    """Where a row's utterance starts and ends in its recording, in seconds; None: at the recording's end."""
    return row.get("start_s") or 0.0, row.get("end_s")


def seconds(row: dict) -> float | None:
    """How long a row says that its utterance lasts, if it does."""
    start, end = segment(row)
    if end is not None:
        return end - start
    return next((row[name] for name in ("duration_s", "duration") if row.get(name) is not None), None)


def _check_other_names(row: dict, where: str) -> None:
    """Raise UserError if a row means a part of its recording by other names; an offset of 0 without a length is none.

    A duration may be the whole file's: it is compared with the audio.
    """
    has_length = any(re.match("dur|len|num", name) and value is not None for name, value in row.items())
    for name, value in row.items():
        if name in SEGMENT_FIELDS or not _means_a_part(name) or value is None or value == []:
            continue
        if not (name.startswith("offset") and value == 0 and not has_length):
            raise UserError(
                f"{where}: field {name!r} means a part of the recording, but start_s and end_s (seconds) say which",
                "rename it, or let speech_units/make_manifest.py write the manifest (from NeMo's and others)",
            )


@functools.cache
def _means_a_part(name: str) -> bool:
    snake_case = re.sub("(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).lower()
    return SEGMENT.fullmatch(snake_case) is not None
