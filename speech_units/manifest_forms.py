"""Forms that corpora come in besides their own: lhotse's cuts, NeMo's and fairseq's manifests, Kaldi, Parquet.

For each a function that streams its utterances. Audio paths start from ``root`` where it is given.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from speech_units.utterances import (
    MALFORMED,
    MISSING,
    NO_FILE,
    NO_TRANSCRIPT,
    NOT_ONE_CHANNEL,
    Source,
    Utterance,
    json_objects,
    length,
    lines,
    milliseconds,
    tar_lengths,
)
from towerspeech.errors import UserError
from towerspeech.files import check_exists

SPLITS = ("train", "dev", "validation", "test")
TEXT_COLUMNS = ("text", "transcript", "transcription", "normalized_text", "sentence", "raw_text")
RAW_COLUMNS = ("raw_text", "raw_transcription")  # come first with --text raw
ROWS_AT_ONCE = 64  # of a Parquet file with audio: some tens of MB


def path_below(root: Path, path: str) -> str:
    return os.path.normpath(os.path.join(root, path))


def _name(root: Path, audio: str) -> str:
    """A recording's path below the root, without its ending: the id where a form gives none."""
    return os.path.splitext(audio.removeprefix(f"{root}/"))[0]


# --- lhotse ---------------------------------------------------------------------------------------
def cuts(path: Path, root: Path | None, text: str) -> Source:
    """lhotse's cuts: a .jsonl or .jsonl.gz, or a Shar folder, whose tar files hold the audio."""
    try:
        from lhotse.serialization import deserialize_item
    except ImportError:
        raise UserError("lhotse is not installed: it reads cuts", "bash install.sh corpora") from None
    check_exists(path, "check --cuts")
    is_shar = path.is_dir()
    index = sorted([*path.glob("cuts.*.jsonl"), *path.glob("cuts.*.jsonl.gz")]) if is_shar else [path]
    if not index:
        raise UserError(f"{path} is no Shar folder: it holds no cuts.*.jsonl.gz", "give a Shar folder or a .jsonl")
    base = path if is_shar else path.parent
    start = root or base

    def utterances() -> Iterator[Utterance]:
        for file in index:
            tar = path / f"recording.{file.name.split('.')[1]}.tar"
            members = None
            for where, item in json_objects(file):
                try:
                    utterance = _cut(where, deserialize_item(item), start)
                except Exception:  # whatever lhotse makes of a line that is no cut
                    utterance = Utterance(where, problem=MALFORMED)
                if is_shar and not utterance.problem and not utterance.audio:
                    members = tar_members(tar) if members is None else members
                    utterance.audio = str(tar)
                    member, utterance.length_s, utterance.problem = members.get(utterance.id, ("", 0.0, MISSING))
                    utterance.place = {"member": member}
                elif not utterance.problem and not utterance.audio:
                    utterance.problem = NO_FILE
                yield utterance

    return Source(base, index, utterances())


def tar_members(tar: Path) -> dict[str, tuple[str, float, str]]:
    """``tar_lengths`` by cut: Shar calls the recording <cut id>.<format>."""
    return {os.path.splitext(name)[0]: found for name, found in tar_lengths(tar).items()}


def _cut(where: str, cut, root: Path) -> Utterance:
    """A cut as an utterance; without audio where its recording is in a tar file beside (Shar)."""
    utterance = Utterance(where, cut.id)
    recording = getattr(cut, "recording", None)  # a MixedCut has none
    if recording is None or type(cut).__name__ != "MonoCut" or recording.num_channels != 1:
        utterance.problem = NOT_ONE_CHANNEL
        return utterance
    said = [supervision.text for supervision in cut.supervisions if supervision.text]
    speakers = {supervision.speaker for supervision in cut.supervisions if supervision.speaker}
    utterance.text = " ".join(said)
    utterance.fields = {"speaker": speakers.pop()} if len(speakers) == 1 else {}
    utterance.start_s, utterance.end_s = cut.start, round(cut.start + cut.duration, 6)
    changes = [change for change in recording.transforms or () if _change(change) != "Resample"]
    sources = [(source.type, source.source) for source in recording.sources]
    if changes or len(sources) != 1 or sources[0][0] not in ("file", "shar"):
        what = f"its {_change(changes[0])}" if changes else sources[0][0] if len(sources) == 1 else "several"
        utterance.problem = f"{NO_FILE} ({what})"
    elif sources[0][0] == "file":
        utterance.audio = path_below(root, sources[0][1])
    return utterance


def _change(transform) -> str:
    return transform.get("name", "?") if isinstance(transform, dict) else type(transform).__name__


# --- NeMo -----------------------------------------------------------------------------------------
def nemo(path: Path, root: Path | None, text: str) -> Source:
    """NeMo's manifest: JSONL of audio_filepath, duration, text, and offset where it means a part of the file."""
    check_exists(path, "check --nemo")
    start = root or path.parent

    def utterances() -> Iterator[Utterance]:
        for where, row in json_objects(path):
            try:
                audio = path_below(start, row["audio_filepath"])
                begin = float(row.get("offset") or 0)
                end = None if row.get("duration") is None else round(begin + float(row["duration"]), 6)
                said = row.get("text") or ""
                whole = "offset" not in row or (begin == 0 and end is None)
                name = _name(start, audio)
                name = name if whole else milliseconds(name, begin, end)
                yield Utterance(where, name, audio, said, begin, end)
            except (KeyError, TypeError, ValueError, AttributeError):
                yield Utterance(where, problem=MALFORMED)

    return Source(path.parent, [path], utterances())


# --- fairseq --------------------------------------------------------------------------------------
def fairseq(path: Path, root: Path | None, text: str) -> Source:
    """fairseq's TSV: the audio's folder, then path<TAB>samples; beside it .wrd, or .ltr (H E L L O | ...)."""
    check_exists(path, "check --fairseq")
    texts = [file for file in (path.with_suffix(".wrd"), path.with_suffix(".ltr")) if file.is_file()]
    if not texts:
        raise UserError(
            f"{path}: neither {path.stem}.wrd nor {path.stem}.ltr is beside it", "put its transcripts there"
        )
    rows, transcripts = (sum(1 for _ in lines(file)) for file in (path, texts[0]))
    if rows - 1 != transcripts:
        problem = f"{path} has {rows - 1} rows, but {texts[0].name} {transcripts} lines"
        raise UserError(problem, "give the two files that belong together")
    stated = (next(lines(path))[1] or "").strip()
    start = root or Path(path_below(path.parent, stated))

    def utterances() -> Iterator[Utterance]:
        audio_lines = lines(path)
        next(audio_lines)
        for (where, line), (_, said) in zip(audio_lines, lines(texts[0]), strict=True):
            name, tab, samples = (line or "").partition("\t")
            if not name or not samples.strip().isdigit() or said is None:
                yield Utterance(where, problem=MALFORMED)
                continue
            if texts[0].suffix == ".ltr":
                said = said.replace(" ", "").replace("|", " ").strip()
            audio = path_below(start, name)
            yield Utterance(where, _name(start, audio), audio, said)

    return Source(path.parent, [path, texts[0]], utterances(), start)


# --- Kaldi ----------------------------------------------------------------------------------------
def kaldi(path: Path, root: Path | None, text: str) -> Source:
    """Kaldi's data folder: text, wav.scp, segments if recordings are cut, utt2spk if there. No command is run.

    The files are read side by side, since Kaldi has them sorted; of the recordings of segments alone there is a table.
    """
    segments, speakers = path / "segments", path / "utt2spk"
    files = [path / "wav.scp", path / "text", *(file for file in (segments, speakers) if file.is_file())]
    for file in files[:2]:
        check_exists(file, "check --kaldi: it is a folder with wav.scp and text")
    start = root or path
    has_segments = segments.is_file()

    def utterances() -> Iterator[Utterance]:
        recordings = dict(_words(line) for _, line in lines(files[0])) if has_segments else {}
        columns = {"audio": _keyed(segments if has_segments else files[0]), "text": _keyed(files[1])}
        if speakers.is_file():
            columns["speaker"] = _keyed(speakers)
        for key, found in _side_by_side(columns):
            if "audio" not in found and "text" not in found:
                continue  # a speaker of nothing
            where, value = found.get("audio") or found["text"]
            utterance = Utterance(where, key, text=found.get("text", ("", ""))[1])
            if "speaker" in found:
                utterance.fields["speaker"] = found["speaker"][1]
            if not key:
                utterance.problem = MALFORMED
            elif "text" not in found:
                utterance.problem = NO_TRANSCRIPT
            elif "audio" not in found:
                utterance.problem = f"{MISSING} (not in {segments.name if has_segments else files[0].name})"
            elif has_segments:
                try:
                    recording, begin, end = value.split()[:3]
                    utterance.start_s, utterance.end_s = float(begin), float(end)
                    utterance.end_s = None if utterance.end_s == -1 else utterance.end_s  # Kaldi's: to the end
                    value = recordings.get(recording, "")
                except ValueError:
                    utterance.problem = MALFORMED
            if not utterance.problem:
                utterance.audio = path_below(start, value)
                if not value:
                    utterance.problem = f"{MISSING} (not in wav.scp)"
                elif value.endswith("|"):
                    utterance.problem = f"{NO_FILE} (a command)"
                elif re.search(r":\d+$", value):
                    utterance.problem = f"{NO_FILE} (an archive)"
            yield utterance

    return Source(path, files, utterances())


def _words(line: str | None) -> tuple[str, str]:
    """A line's first word and the rest."""
    key, *rest = (line or "").split(maxsplit=1)[:2] or [""]
    return key, rest[0].strip() if rest else ""


def _keyed(path: Path) -> Iterator[tuple[str, str, str]]:
    """Stream (key, file:line, the rest) of a file that is sorted by its first words; UserError where it is not."""
    last = ""
    for where, line in lines(path):
        if line is not None and not line.strip():
            continue
        key, rest = _words(line)
        if key:
            if key < last:
                problem = f"{where}: {key} comes after {last}, but Kaldi's files are sorted"
                raise UserError(problem, f"sort it: LC_ALL=C sort -k1,1 -o {path} {path}")
            last = key
        yield key or last, where, rest


def _side_by_side(columns: dict[str, Iterator[tuple[str, str, str]]]) -> Iterator[tuple[str, dict]]:
    """Go through sorted files together: (key, {name of each file that has it: (file:line, the rest)})."""
    heads = {name: next(rows, None) for name, rows in columns.items()}
    while any(heads.values()):
        key = min(head[0] for head in heads.values() if head)
        found = {name: head[1:] for name, head in heads.items() if head and head[0] == key}
        yield key, found
        for name in found:
            heads[name] = next(columns[name], None)


# --- Parquet --------------------------------------------------------------------------------------
def parquet(paths: list[Path], root: Path | None, text: str) -> Source:
    """Parquet files with audio in them, as the Hugging Face hub has them: a column audio of {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for path in paths:
        check_exists(path, "check --parquet")
        here = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        names = [str(file.relative_to(path)) for file in here] if path.is_dir() else []
        splits = [split for split in SPLITS if any(re.search(rf"(^|/){split}[-_./]", name) for name in names)]
        if len(splits) > 1:
            problem = f"{path} holds several splits: {', '.join(splits)}"
            raise UserError(problem, "name one's files, as a shell's pattern does: --parquet .../train-*.parquet")
        files += here
    if not files:
        raise UserError(f"{paths[0]} holds no Parquet file", "check --parquet")
    column = _check_parquet(files, text)
    base = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))

    def utterances() -> Iterator[Utterance]:
        for file in files:
            number, shard = 0, _name(base, str(file))
            try:
                # The audio is read as it is wanted: a row group has hundreds of MB.
                with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
                    names = [n for n in ("id", "speaker_id", column, "audio") if n in opened.schema_arrow.names]
                    for batch in opened.iter_batches(ROWS_AT_ONCE, columns=names):
                        for row in batch.to_pylist():
                            yield _parquet_row(f"{file}, row {number}", file, shard, number, row, column)
                            number += 1
            except (pa.ArrowException, OSError) as error:
                problem = f"{file}, row {number}: cannot be read ({str(error).splitlines()[0]})"
                raise UserError(problem, "get the file again, or leave it out") from None

    return Source(base, files, utterances())


def _parquet_row(where: str, file: Path, shard: str, number: int, row: dict, column: str) -> Utterance:
    audio = row["audio"] or {}
    name = row.get("id") if isinstance(row.get("id"), str) else None  # a number may be the sentence's (FLEURS)
    name = name or os.path.splitext(os.path.basename(audio.get("path") or ""))[0] or f"{shard}-{number}"
    utterance = Utterance(where, name, str(file), row[column] or "", place={"row": number})
    if row.get("speaker_id") is not None:
        utterance.fields["speaker"] = str(row["speaker_id"])
    if audio.get("bytes"):
        utterance.length_s, utterance.problem = length(io.BytesIO(audio["bytes"]))
    else:
        utterance.problem = f"{MISSING} (no bytes)"
    return utterance


def _check_parquet(files: list[Path], text: str) -> str:
    """Raise UserError unless all files have audio bytes and the same column of texts; its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_string(kind) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    wanted = (*RAW_COLUMNS, *TEXT_COLUMNS) if text == "raw" else TEXT_COLUMNS
    columns = {}
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is no Parquet ({str(error).splitlines()[0]})", "get the file again") from None
        kind = schema.field("audio").type if "audio" in schema.names else None
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            problem = f"{file}: no column audio with bytes among {', '.join(schema.names)}"
            raise UserError(problem, "give Parquet files that hold audio as the Hugging Face hub has it")
        found = [name for name in wanted if name in schema.names and is_string(schema.field(name).type)]
        if not found:
            raise UserError(f"{file}: none of the text columns {', '.join(wanted)}", "rename its column to text")
        columns.setdefault(found[0], file)
    if len(columns) > 1:
        one, other = list(columns.items())[:2]
        problem = f"{one[1]} has its text as {one[0]}, but {other[1]} as {other[0]}"
        raise UserError(problem, "give one data set's files at a time")
    return next(iter(columns))


FORMS: dict[str, Callable[..., Source]] = {
    "cuts": cuts,
    "nemo": nemo,
    "fairseq": fairseq,
    "kaldi": kaldi,
    "parquet": parquet,
}
