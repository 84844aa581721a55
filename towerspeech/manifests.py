"""Manifests: JSONL that names audio files, one a row, with their language and transcript."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.outside_text import check_outside_text
from towerspeech.records import iter_jsonl

# Names that mean a part of a recording, in any unit and with anything before: start, t_end, offset_s, startTime.
UNIT = "time|timestamp|ts|at|offset|s|secs?|seconds?|ms|hms|samples?|frames?|byte"
SEGMENT = re.compile(
    f"(.*_)?(t?start|t?beg|begin|onset|offset|stop|t?end|segments?|seg|interval|span|timestamps?|[se]time|t[01]"
    f"|[tx]m(in|ax))_?({UNIT})?(_({UNIT}))*|(.*_)?chan(nel)?(_id)?|(from|to)(_({UNIT}))?"
)


def read_manifest(manifest: Path, audio_root: Path | None = None, start: int = 0) -> Iterator[dict]:
    """Stream the manifest's rows (id, audio, language, text), with "where" = manifest:line added.

    Every line is parsed; rows from ``start`` on, counted from 0, are given, and with ``audio_root`` their audio must
    exist.

    Raises:
        UserError: A line is malformed or speaks of a part of its recording, an id occurs twice, an audio file is
            missing; names manifest:line.
    """
    rows = iter_jsonl(manifest, texts=("id", "audio", "language", "text"), unique_ids=True)
    for number, (where, row) in enumerate(rows):
        _check_whole(row, where)
        check_outside_text(row["text"], where)
        if number < start:
            continue
        if audio_root is not None and not os.path.isfile(audio_root / row["audio"]):
            raise UserError(f"{where}: {audio_root / row['audio']} does not exist", "check --audio_root and the line")
        yield {**row, "where": where}


def _check_whole(row: dict, where: str) -> None:
    """Raise UserError if a row means a part of its recording; an offset of 0 without a length means none.

    A duration may be the whole file's: ``features.read_audio`` compares it.
    """
    has_length = any(re.match("dur|len|num", name) and value is not None for name, value in row.items())
    for name, value in row.items():
        if not _means_a_part(name) or value is None or value == []:
            continue
        if not (name.startswith("offset") and value == 0 and not has_length):
            raise UserError(
                f"{where}: field {name!r} means a part of the recording, but whole files are labelled",
                "cut the audio into a file an utterance, and leave the field out",
            )


@functools.cache
def _means_a_part(name: str) -> bool:
    snake_case = re.sub("(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).lower()
    return SEGMENT.fullmatch(snake_case) is not None


def duration(row: dict) -> float | None:
    """The seconds that a manifest row says its file lasts, if it does."""
    return next((row[name] for name in ("duration", "duration_s") if row.get(name) is not None), None)
