"""Recordings, and the parts of them that a manifest's rows mean, as samples at 16 kHz.

A recording is a file, a member of a tar file, or a row of a Parquet file. What is wrong with one is an AudioError.
"""

import functools
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from speech_units.containers import ends_early
from towerspeech.ahead import ahead
from towerspeech.errors import UserError
from towerspeech.manifests import TAR_FILES, seconds, segment

SAMPLE_RATE = 16000  # Hz
RATES = range(1000, 768_001)  # Hz; what else a header says is an error of its own
LOUDEST = 1000  # of samples that should lie between -1 and 1
SILENT = 16 / 32768  # no sample above it (-66 dB): silence, with or without dither
TOLERANCE_S = 0.05  # segments' times are rounded: so far a segment may reach beyond its recording
PREROLL_S = 1  # of Ogg files, read and thrown away
DURATION_TOLERANCE_S = 1  # between what a manifest says and what a file holds

# Longer utterances are read, encoded and labelled in windows that overlap; of each window its margins, where it knows
# one side alone, are left to its neighbours. LibriSpeech's longest utterance (35 s) is whole. In whole seconds, so
# that at every sampling rate windows start at a sample, and at a frame of HuBERT.
WINDOW_S, MARGIN_S = 60, 2
STRIDE_S = WINDOW_S - 2 * MARGIN_S

WHOLE = 1 << 20  # bytes; 30 s of WAV. A fingerprint takes smaller files whole, of larger ones three blocks
BLOCK = 1 << 14  # bytes
READERS = 16  # threads: on a cluster's file system it is the opening that takes time


class AudioError(Exception):
    """An utterance that cannot be used: a ``reason`` to count it by, and what the ``problem`` of this one is."""

    def __init__(self, reason: str, problem: str):
        super().__init__(reason, problem)
        self.reason, self.problem = reason, problem


class Piece(NamedTuple):
    """An utterance, or one window of a long one."""

    samples: Any  # float32 (n,) at 16 kHz
    number: int  # of the window, from 0
    last: bool
    duration_s: float  # of the utterance
    peak: float  # loudest sample

    @property
    def first_frame_s(self) -> float:
        """Where in the window the frames begin that are its own, in whole seconds."""
        return 0 if self.number == 0 else MARGIN_S


def is_silent(peak: float) -> bool:
    return peak <= SILENT


# --- Recordings -----------------------------------------------------------------------------------
class Recording:
    """One open recording, of which several utterances can be read.

    Raises:
        AudioError: It is missing, is no audio, or ends early.
    """

    def __init__(self, row: dict, audio_root: Path):
        import soundfile

        path = audio_root / row["audio"]
        try:
            self.bytes = _open(path, row.get("member"), row.get("row"))
            # By its path where it is a file of its own: libsndfile then reads without calling back.
            self.open = functools.partial(soundfile.SoundFile, self.bytes if is_archive(row) else path)
            self.file = self.open()
        except FileNotFoundError:
            raise AudioError("missing", "does not exist") from None
        except Exception as error:  # soundfile's own, and what its arguments, numpy, tarfile and the system raise
            is_m4a = str(row.get("member", path)).lower().endswith((".m4a", ".mp4", ".aac"))
            hint = "; libsndfile reads no m4a: convert it to FLAC" if is_m4a else ""
            raise AudioError("unreadable", f"is not readable audio ({_said(error)}){hint}") from None
        self.rate, self.is_mp3 = self.file.samplerate, self.file.format == "MP3"
        if self.rate not in RATES:
            possible = f"{RATES[0]:,} to {RATES[-1]:,} are possible"
            raise AudioError("unreadable", f"has {self.rate} samples a second, but {possible}")
        self.check_end(self.file.frames)

    def check_end(self, num_samples: int) -> None:
        stood = self.bytes.tell()
        self.bytes.seek(0)
        early = ends_early(self.bytes, self.file.format, num_samples)
        self.bytes.seek(stood)
        if early:
            said = "ends early: less of it can be read than its header or its frames announce, or its end is missing"
            raise AudioError("cut short", said)

    def pieces(self, row: dict, min_samples: int = 1, max_seconds: float | None = None) -> Iterator[Piece]:
        """Read one utterance: whole, or in windows if it lasts longer than WINDOW_S.

        Raises:
            AudioError: It reaches beyond the recording, is too short or too long, lasts another time than its row
                says, or holds what is no sound. Of a long utterance some pieces may have been given before.
        """
        first, num_samples = self.extent(row)
        # As resample_poly rounds, so that the length is known before it is read.
        samples_16k = -(-num_samples * SAMPLE_RATE // self.rate)
        duration_s = samples_16k / SAMPLE_RATE
        if samples_16k < min_samples:
            problem = f"has {samples_16k} samples at 16 kHz, at least {min_samples} are needed"
            raise AudioError("too short", problem)
        if max_seconds is not None and duration_s > max_seconds:
            raise AudioError("too long", f"lasts {duration_s:,.1f} s, more than --max_seconds {max_seconds:g}")
        said = seconds(row)
        if said is not None and not abs(duration_s - said) <= DURATION_TOLERANCE_S:
            problem = f"lasts {duration_s:.2f} s, but the manifest says {said!r}: does the row mean a part of it?"
            raise AudioError("another duration", problem)
        starts = range(0, max(1, num_samples - 2 * MARGIN_S * self.rate), STRIDE_S * self.rate)
        if num_samples <= WINDOW_S * self.rate:
            starts = range(1)
        for number, start in enumerate(starts):
            wanted = min(num_samples - start, WINDOW_S * self.rate) if len(starts) > 1 else num_samples
            samples = self.read(first + start, wanted)
            peak = float(abs(samples).max()) if len(samples) else 0.0
            yield Piece(self.resampled(samples), number, number == len(starts) - 1, duration_s, peak)

    def extent(self, row: dict) -> tuple[int, int]:
        """An utterance's first sample and its number of samples, at the recording's own rate."""
        start, end = segment(row)
        length_s = self.file.frames / self.rate
        if start > length_s or (end is not None and end > length_s + TOLERANCE_S):
            means = f"{start:g} to {'its end' if end is None else f'{end:g}'} s"
            raise AudioError("beyond the end", f"lasts {length_s:.3f} s, but the segment is {means}")
        first = round(start * self.rate)
        last = self.file.frames if end is None else min(round(end * self.rate), self.file.frames)
        return first, last - first

    def read(self, first: int, wanted: int):
        """Samples of all channels' mean, float32 (n,), at the recording's own rate."""
        import numpy as np

        try:
            if self.file.tell() != first:
                self.seek(first)
            samples = self.file.read(wanted, dtype="float32", always_2d=True)
        except Exception as error:
            raise AudioError("unreadable", f"is not readable audio ({_said(error)})") from None
        if len(samples) < wanted:
            if not self.is_mp3:  # which may announce an estimate
                raise AudioError("cut short", "ends early: less of it can be read than its header announces")
            self.check_end(first + len(samples))
        if len(samples) and not np.abs(samples).max() <= LOUDEST:  # nor if it is NaN
            problem = f"holds samples that are not numbers, or above {LOUDEST:,}; they should lie between -1 and 1"
            raise AudioError("no sound", problem)
        return samples.mean(axis=1)

    def seek(self, first: int) -> None:
        """Go to a sample, so that what is read there is what it is when all is read.

        libsndfile 1.2.2 does not promise that: after a read it sought Ogg Vorbis wrongly in 26 of 60 cases, but never
        in a file just opened (6,000 cases); Opus is exact from PREROLL_S on (3,000 cases; in 11 of 3,000 it was off by
        6e-8 without). MP3 was wrong in 1 of 200 even then, so that it is read from its beginning.
        """
        start = first
        if self.file.format == "OGG" or (self.is_mp3 and self.file.tell() > first):
            self.file.close()
            self.bytes.seek(0)
            self.file = self.open()
            start = max(0, first - PREROLL_S * self.rate)
        if not self.is_mp3:
            self.file.seek(start)
        while (left := first - self.file.tell()) > 0:
            if not len(self.file.read(min(left, WINDOW_S * self.rate), dtype="float32")):
                return  # it ends early, which the next read finds out

    def resampled(self, samples):
        import numpy as np
        from scipy.signal import resample_poly

        if self.rate == SAMPLE_RATE or not len(samples):
            return samples
        return resample_poly(samples, SAMPLE_RATE, self.rate).astype(np.float32)

    def close(self) -> None:
        self.file.close()
        self.bytes.close()


def _said(error: Exception) -> str:
    return getattr(error, "error_string", str(error)) or "it is damaged or ends early"  # without soundfile's path


def place(row: dict, audio_root: Path) -> str:
    """Where a row and its audio are."""
    inside = row.get("member", row.get("row"))
    return f"{row['where']}: {audio_root / row['audio']}{'' if inside is None else f':{inside}'}"


def _open(path: Path, member: str | None, row: int | None) -> io.BufferedIOBase:
    if member is not None:
        return io.BytesIO(_tar(path).read(member))
    if row is not None:
        return io.BytesIO(_parquet(path).read(row))
    return open(path, "rb")


def utterances(
    rows: Iterable[dict], audio_root: Path, min_samples: int = 1, max_seconds: float | None = None
) -> Iterator[tuple[dict, Piece | AudioError]]:
    """Read rows in order; those that follow one another in one recording open it once.

    Yields:
        A row, and a piece of it or what is wrong with it (after which no more of it comes).
    """
    for _, same in groupby(rows, lambda row: (row["audio"], row.get("member"), row.get("row"))):
        recording = None
        for row in same:
            try:
                recording = recording or Recording(row, audio_root)
                for piece in recording.pieces(row, min_samples, max_seconds):
                    yield row, piece
            except AudioError as error:
                yield row, error
        if recording:
            recording.close()


# --- Archives -------------------------------------------------------------------------------------
class Tar:
    """Members of a tar file by name; of a compressed one they are read fastest in their order."""

    def __init__(self, path: Path):
        self.file = tarfile.open(path)  # noqa: SIM115 (open as long as its members are read)
        self.members = {member.name: member for member in self.file if member.isfile()}

    def read(self, name: str) -> bytes:
        member = self.members.get(name)
        if member is None:
            raise FileNotFoundError(name)
        return self.file.extractfile(member).read()


class Parquet:
    """The audio bytes of a Parquet file's rows: Hugging Face's column of {bytes, path}."""

    def __init__(self, path: Path):
        import pyarrow.parquet as pq
        from pyarrow import types

        self.file = pq.ParquetFile(path)
        structs = [field for field in self.file.schema_arrow if types.is_struct(field.type)]
        columns = [field.name for field in structs if field.type.get_field_index("bytes") >= 0]
        if not columns:
            raise ValueError("it has no column of audio bytes, as Hugging Face's audio sets have")
        self.column = columns[0]
        metadata = self.file.metadata
        self.ends = [0]
        for group in range(metadata.num_row_groups):
            self.ends.append(self.ends[-1] + metadata.row_group(group).num_rows)
        self.group, self.values = -1, None

    def read(self, row: int) -> bytes:
        if row >= self.ends[-1]:
            raise FileNotFoundError(row)
        group = next(number for number, end in enumerate(self.ends[1:]) if row < end)
        if group != self.group:  # rows come in order
            table = self.file.read_row_group(group, columns=[f"{self.column}.bytes"])
            self.group, self.values = group, table.column(self.column)
        data = self.values[row - self.ends[group]]["bytes"].as_py()
        if data is None:
            raise ValueError("the row holds no bytes")
        return data


@functools.lru_cache(maxsize=2)
def _tar(path: Path) -> Tar:
    return Tar(path)


@functools.lru_cache(maxsize=2)
def _parquet(path: Path) -> Parquet:
    return Parquet(path)


def is_archive(row: dict) -> bool:
    return row["audio"].lower().endswith((*TAR_FILES, ".parquet"))


# --- Is it the same audio? ------------------------------------------------------------------------
def fingerprint(rows: Iterable[dict], audio_root: Path, max_bad_share: float) -> str:
    """SHA-256 over the rows' files: path in the manifest, size, and content (of large files three blocks).

    Raises:
        UserError: More than this share of the rows names a file that cannot be opened.
    """

    def digest(row: dict) -> tuple[dict, bytes, str]:
        path = Path(audio_root) / row["audio"]
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = hashlib.sha256(f"{row['audio']}\0{size}\0".encode())
                if size <= WHOLE:
                    content.update(file.read())
                else:
                    for place in (0, (size - BLOCK) // 2, size - BLOCK):
                        file.seek(place)
                        content.update(file.read(BLOCK))
                return row, content.digest(), ""
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            said = "does not exist" if missing else f"cannot be read ({error.strerror})"
            return row, hashlib.sha256(f"{row['audio']}\0".encode()).digest(), f"{row['where']}: {path} {said}"

    total, num_rows, bad = hashlib.sha256(), 0, []
    files = ((same := list(group))[0] | {"num_rows": len(same)} for _, group in groupby(rows, lambda r: r["audio"]))
    with ThreadPoolExecutor(READERS) as readers:
        for row, content, problem in ahead(readers, digest, files, 8 * READERS):
            total.update(content)
            num_rows += row["num_rows"]
            bad += [problem] * row["num_rows"] if problem else []
    if len(bad) > max_bad_share * num_rows:
        raise too_many_bad(len(bad), num_rows, max_bad_share, bad[0])
    return total.hexdigest()


def too_many_bad(num_bad: int, num_rows: int, max_bad_share: float, first: str) -> UserError:
    told = f"{num_bad:,} of {num_rows:,} utterances cannot be used, more than --max_bad_share {max_bad_share:g}"
    return UserError(f"{first}\n  {told}", "check --audio_root, mend the audio or the lines, or raise --max_bad_share")
