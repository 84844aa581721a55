"""From a manifest's rows to features: audio is decoded ahead by processes and encoded in batches of like lengths.

What the units of an utterance are never depends on its neighbours: on a CPU to the bit, on a GPU up to rounding.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from speech_units.audio import MARGIN_S, SAMPLE_RATE, STRIDE_S, AudioError, place, utterances
from speech_units.features import Encoder, FeatureConfig, prepare
from towerspeech.manifests import read_rows

JOB_ROWS = 16  # files that a process decodes in turn; a recording's or an archive's rows stay together,
MAX_JOB_ROWS = 256  # so many of them
PARCEL_S = 60  # seconds of audio that a process hands over at a time
PARCELS_AHEAD = 8  # a process: 60 s are 4 MB
POOL_BATCHES = 32  # of which audio is sorted by length before it is cut into batches
CLOCKED = 64  # batches whose times are held; older ones have ended, and a GPU is not waited for
SHORTEST = 0.9  # of a batch's longest piece is the shortest that may be padded to it


class Decoded(NamedTuple):
    """One piece of an utterance, decoded, or why there is none."""

    index: int  # of the manifest's row, from 0
    place: str  # of the row and its audio
    error: AudioError | None
    prepared: Any = None  # what the encoder takes
    num_samples: int = 0  # of the piece, at 16 kHz
    skip_s: int = 0  # its own frames begin here
    last: bool = True
    duration_s: float = 0.0  # of the utterance
    peak: float = 0.0


class Decoder(IterableDataset):
    """Decodes a manifest's rows ``start`` to ``stop`` - 1 but those in ``skip``; each process a part of them.

    Each reads the manifest by itself, so that no process holds all rows.
    """

    def __init__(
        self,
        manifest: Path,
        audio_root: Path,
        config: FeatureConfig,
        max_seconds: float | None = None,
        start: int = 0,
        stop: int = 0,
        skip: Sequence[bool] = (),
    ):
        self.manifest, self.audio_root, self.config, self.max_seconds = manifest, audio_root, config, max_seconds
        self.start, self.stop, self.skip = start, stop, skip

    def rows(self) -> Iterator[dict]:
        for index, row in enumerate(read_rows(self.manifest, self.start, self.stop), self.start):
            if not len(self.skip) or not self.skip[index - self.start]:
                yield {**row, "index": index}

    def __iter__(self) -> Iterator[list[Decoded]]:
        worker = get_worker_info()
        mine = (
            job
            for number, job in enumerate(jobs(self.rows()))
            if not worker or number % worker.num_workers == worker.id
        )
        parcel, seconds = [], 0.0
        for row, piece in utterances(
            chain.from_iterable(mine), self.audio_root, self.config.window_samples, self.max_seconds
        ):
            if isinstance(piece, AudioError):
                parcel.append(Decoded(row["index"], place(row, self.audio_root), piece))
                continue
            prepared, length = prepare(piece.samples, self.config), len(piece.samples)
            facts = (length, piece.first_frame_s, piece.last, piece.duration_s, piece.peak)
            parcel.append(Decoded(row["index"], place(row, self.audio_root), None, prepared, *facts))
            seconds += length / SAMPLE_RATE
            if seconds >= PARCEL_S:
                yield parcel
                parcel, seconds = [], 0.0
        if parcel:
            yield parcel


def jobs(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Cut rows into runs that one process decodes; not between rows of one file, if they are not too many."""
    job: list[dict] = []
    for row in rows:
        another = job and row["audio"] != job[-1]["audio"]
        if len(job) >= (JOB_ROWS if another else MAX_JOB_ROWS):
            yield job
            job = []
        job.append(row)
    if job:
        yield job


def plan(pieces: Sequence[Decoded], batches: str, batch_seconds: float) -> Iterator[list[Decoded]]:
    """Cut pieces into batches of at most ``batch_seconds`` with their padding, of like lengths, the longest first.

    ``batches`` is as an Encoder's: alone, equal (lengths alone go together) or padded.
    """
    batch: list[Decoded] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.num_samples, piece.index)):
        if batch:
            longest = batch[0].num_samples
            full = (len(batch) + 1) * longest > batch_seconds * SAMPLE_RATE
            shortest = longest if batches == "equal" else SHORTEST * longest
            if full or batches == "alone" or piece.num_samples < shortest:
                yield batch
                batch = []
        batch.append(piece)
    if batch:
        yield batch


class Frames:
    """Iterates over the features of what a Decoder decodes: (pieces, one tensor (frames, dim) each).

    A piece that could not be decoded comes by itself, without a tensor. Long utterances come in windows, in order; a
    tensor holds the frames that are the window's own.

    Attributes:
        audio_s, padding_s: Seconds of audio encoded so far, and of padding.
    """

    def __init__(self, decoder: Decoder, encoder: Encoder, num_workers: int | None, batch_seconds: float):
        self.encoder, self.batch_seconds = encoder, batch_seconds
        if num_workers is None:
            num_workers = max(1, len(os.sched_getaffinity(0)) - 1) if encoder.device.type == "cuda" else 0
        ahead = {"prefetch_factor": PARCELS_AHEAD, "multiprocessing_context": "spawn"} if num_workers else {}
        on_gpu = encoder.device.type == "cuda"  # then a thread takes what the processes send
        self.loader = DataLoader(
            decoder, batch_size=None, num_workers=num_workers, pin_memory=on_gpu, collate_fn=list, **ahead
        )
        self.audio_s = self.padding_s = self.owed = 0.0
        self.worked_s, self.clock = 0.0, deque()  # seconds that batches took; begin and end of the last few

    def now(self):
        """The time by the device's clock: a GPU works while we go on."""
        if self.encoder.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def encoder_s(self) -> float:
        """Seconds that the encoder has worked."""
        self.settle(0)
        return self.worked_s

    def settle(self, left: int) -> None:
        """Add up the oldest batches' times, so that no more than ``left`` are held: there may be millions."""
        while len(self.clock) > left:
            begin, end = self.clock.popleft()
            if self.encoder.device.type == "cuda":
                end.synchronize()
                self.worked_s += begin.elapsed_time(end) / 1000
            else:
                self.worked_s += end - begin

    def __iter__(self) -> Iterator[tuple[list[Decoded], list]]:
        pool_s = self.batch_seconds * (1 if self.encoder.batches == "alone" else POOL_BATCHES)
        parcels = iter(self.loader)
        pool, bad = self.take(parcels, pool_s)
        while pool or bad:
            yield from (([piece], []) for piece in bad)
            coming, bad = [], []
            for batch in plan(pool, self.encoder.batches, self.batch_seconds):
                yield batch, self.encode(batch)
                # As much audio as was encoded, so that decoding goes on evenly.
                more, wrong = self.take(parcels, sum(piece.num_samples for piece in batch) / SAMPLE_RATE)
                coming, bad = coming + more, bad + wrong
            pool = coming

    def take(self, parcels: Iterator[list[Decoded]], seconds: float) -> tuple[list[Decoded], list[Decoded]]:
        """The next parcels, of so much audio: its pieces, and the bad ones."""
        good, bad = [], []
        self.owed += seconds
        while self.owed > 0 and (parcel := next(parcels, None)) is not None:
            good += [piece for piece in parcel if not piece.error]
            bad += [piece for piece in parcel if piece.error]
            self.owed -= sum(piece.num_samples for piece in parcel) / SAMPLE_RATE
        return good, bad

    def encode(self, batch: list[Decoded]) -> list:
        started = self.now()
        found = self.encoder.encode([piece.prepared for piece in batch])
        hop = self.encoder.config.hop_samples
        own = []
        for piece, frames in zip(batch, found, strict=True):
            skip = piece.skip_s * SAMPLE_RATE // hop
            end = None if piece.last else (MARGIN_S + STRIDE_S) * SAMPLE_RATE // hop
            own.append(frames[skip:end])
        self.clock.append((started, self.now()))
        self.settle(CLOCKED)
        samples = sum(piece.num_samples for piece in batch)
        padded = len(batch) * max(piece.num_samples for piece in batch) if self.encoder.batches != "alone" else samples
        self.audio_s += samples / SAMPLE_RATE
        self.padding_s += (padded - samples) / SAMPLE_RATE
        return own
