"""What make_manifest.py's readers give: utterances of a corpus, one after the other, and how long recordings last."""

import gzip
import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from towerspeech.errors import UserError

READERS = 16  # threads: on a cluster's file system it is the opening that takes time
AHEAD = 2048  # utterances read before the first of them is given on, so that their recordings are opened meanwhile
RECORDINGS_KNOWN = 100_000  # lengths remembered; corpora of segments have fewer recordings, others open each but once
LONGEST_S = 1e7  # what a header announces beyond it is no length, but that none is known

# Why an utterance is left out. What the text rules leave out is no fault of the data; all the rest is.
NO_TRANSCRIPT, GARBAGE, FOR_UNITS = "no transcript", "garbage", "characters that are for speech units"
BY_TEXT_RULES = (NO_TRANSCRIPT, GARBAGE, FOR_UNITS)
MALFORMED, DUPLICATE, MISSING, UNREADABLE = "malformed line", "duplicate id", "missing audio", "unreadable audio"
TOO_LONG, BACKWARDS = "ends after its recording", "ends before it starts"
NO_FILE = "its audio is no file"  # a command's output, a web address, an archive of Kaldi's
NOT_ONE_CHANNEL = "not one channel of one recording"


@dataclass(slots=True)
class Utterance:
    """One utterance as the corpus has it, or a line that is none, with the problem."""

    where: str  # index file:line
    id: str = ""
    audio: str = ""  # absolute path
    text: str = ""
    start_s: float | None = None
    end_s: float | None = None  # None: at the recording's end
    place: dict = field(default_factory=dict)  # the member of a tar file, or the row of a Parquet file
    length_s: float | None = None  # of the recording, if the reader has had it open
    problem: str = ""  # why it is left out: one of the reasons above, perhaps with details in brackets
    fields: dict = field(default_factory=dict)  # more for the manifest: speaker, sentence_id
    source: str = ""  # what the targets translate, if not the text
    targets: dict[str, str] = field(default_factory=dict)  # translations by language code


@dataclass
class Source:
    """A corpus that was found."""

    base: Path  # the folder that the index files lie below
    index: list[Path]  # the files that decide which utterances there are
    utterances: Iterable[Utterance]  # read when they are asked for
    root: Path | None = None  # where audio paths start from, if --root does not say it and it is not the base


# --- Lines of index files -------------------------------------------------------------------------
def lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Stream a text file's lines, each with its file:line; None for one that is not UTF-8. Only \\n ends a line."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    decoded = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    decoded = None
                yield f"{path}:{number}", decoded
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error})", "get or make the file again") from None


def header(path: Path, delimiter: str) -> list[str]:
    """The columns that a table's first line names."""
    return (next(lines(path), ("", ""))[1] or "").split(delimiter)


def table(path: Path, delimiter: str, columns: list[str] | None = None) -> Iterator[tuple[str, dict | None]]:
    """Stream a table's rows, each with its file:line; None where a line has more or fewer columns.

    Quotation marks are characters like others: corpora have them unbalanced.

    Args:
        path: The table.
        delimiter: What stands between columns.
        columns: Their names; without them the first line has them.
    """
    rows = lines(path)
    if columns is None:
        columns = (next(rows, ("", ""))[1] or "").split(delimiter)
    for where, line in rows:
        values = line.split(delimiter) if line is not None else []
        if line != "":
            yield where, dict(zip(columns, values, strict=True)) if len(values) == len(columns) else None


def json_objects(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Stream the objects of a JSONL file, each with its file:line; None where a line is no object."""
    for where, line in lines(path):
        if line == "":
            continue
        try:
            value = json.loads(line or "")
        except (ValueError, RecursionError):
            value = None
        yield where, value if isinstance(value, dict) else None


def milliseconds(recording: str, start_s: float, end_s: float | None) -> str:
    """The id of a segment that the corpus gives none."""
    return f"{recording}-{start_s * 1000:.0f}-{'end' if end_s is None else f'{end_s * 1000:.0f}'}"


# --- Lengths of recordings ------------------------------------------------------------------------
def length(file: str | io.BytesIO) -> tuple[float, str]:
    """How long a recording lasts by its header, in seconds; or 0 and the reason why that is not known."""
    import soundfile

    try:
        info = soundfile.info(file)
    except Exception as error:  # soundfile's own, and what its arguments and the system raise
        if isinstance(file, str) and not os.path.exists(file):
            return 0.0, MISSING
        reason = str(error).removeprefix(f"Error opening {file!r}: ").strip() or type(error).__name__
        return 0.0, f"{UNREADABLE} ({reason})" if isinstance(file, str) else UNREADABLE
    if not 0 < info.frames / info.samplerate < LONGEST_S:
        return 0.0, f"{UNREADABLE} (it holds {info.frames} samples)"
    return info.frames / info.samplerate, ""


def tar_lengths(path: Path) -> dict[str, tuple[str, float, str]]:
    """Each file of a tar file, by its name without folders: the member's name, and its ``length``; {} if unreadable.

    The tar file is read through once: a compressed one cannot be read at random.
    """
    found = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isfile() and not member.name.endswith(".json"):
                    data = tar.extractfile(member).read()
                    found[os.path.basename(member.name)] = (member.name, *length(io.BytesIO(data)))
    except (OSError, EOFError, zlib.error, tarfile.TarError):  # what was read before a cut-off end is there
        pass
    return found


def with_lengths(utterances: Iterable[Utterance]) -> Iterator[Utterance]:
    """Give ``length_s`` or a problem to each utterance that has neither, in order; threads open the recordings."""
    waiting: deque[tuple[Utterance, Future | None]] = deque()
    known: OrderedDict[str, Future] = OrderedDict()

    def next_one() -> Utterance:
        utterance, opened = waiting.popleft()
        if opened:
            utterance.length_s, utterance.problem = opened.result()
        return utterance

    with ThreadPoolExecutor(READERS) as threads:
        for utterance in utterances:
            opened = None
            if not utterance.problem and utterance.length_s is None:
                opened = known.pop(utterance.audio, None) or threads.submit(length, utterance.audio)
                known[utterance.audio] = opened  # as the latest
                if len(known) > RECORDINGS_KNOWN:
                    known.popitem(last=False)
            waiting.append((utterance, opened))
            if len(waiting) > AHEAD:
                yield next_one()
        while waiting:
            yield next_one()
