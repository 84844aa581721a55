"""Turn audio into speech units: the nearest k-means centroid of every frame, consecutive repeats collapsed.

Usage: python speech_units/label_audio.py --manifest manifests/train/manifest.jsonl --audio_root audio \
           --kmeans runs/kmeans --output_dir runs/units/train

Reads: a manifest (make_manifest.py; its fields stand in towerspeech/manifests.py), the audio, and the folder that
fit_kmeans.py wrote.
Writes, in output_dir: units-00000-of-00001.parquet and so on (id, audio, language, duration_s, units, text), and where
utterances had to be left out units-00000-of-00001.dropped.jsonl (id, audio, reason, problem). Each shard is finished,
or gone on with, by itself: array tasks with --shard N fill one folder together.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from speech_units.audio import fingerprint, is_silent, too_many_bad
from speech_units.features import BATCH_SECONDS, Encoder, load_kmeans
from speech_units.journal import Journal
from speech_units.kmeans import Nearest
from speech_units.sample import lengths_of
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.manifests import read_rows
from towerspeech.records import write_jsonl
from towerspeech.stage import Stage, stage
from towerspeech.units import collapse
from towerspeech.units_parquet import shard_name, write_units

# Arguments that do not change the output.
SETTINGS = ("audio_root", "shard", "num_workers", "batch_seconds", "max_bad_share", "device")


def boundaries(lengths, num_shards: int) -> list[int]:
    """The first row of each shard, and the number of rows: equal shares of the seconds of all rows, (rows,)."""
    import numpy as np

    ends = np.cumsum(lengths, dtype="f8")
    inner = np.searchsorted(ends, ends[-1] * np.arange(1, num_shards) / num_shards, side="right")
    return [0, *inner.tolist(), len(lengths)]


def units_rows(journal: Journal, rows: Iterator[dict]) -> Iterator[dict]:
    """Rows of the shard that have units, in the manifest's order."""
    for number, row in enumerate(rows):
        known = journal.read(number)
        if "units" in known:
            yield row | known


def dropped_rows(journal: Journal, rows: Iterator[dict]) -> Iterator[dict]:
    for number, row in enumerate(rows):
        known = journal.read(number)
        if "reason" in known:
            names = {name: row[name] for name in ("id", "audio", "member", "row", "start_s", "end_s") if name in row}
            yield {**names, "reason": known["reason"], "problem": known["problem"]}


def label_rows(frames, nearest: Nearest, journal: Journal, max_bad_share: float, progress) -> None:
    """Label what is missing of a shard; every utterance goes to the journal as soon as its last piece is encoded."""
    begun: dict[int, tuple[list[int], float]] = {}  # units and loudest sample of utterances in windows
    num_rows = len(journal.places)

    def finish(pieces: list, ids: list) -> None:
        for piece, found in zip(pieces, ids, strict=True):
            earlier, peak = begun.pop(piece.index, ([], 0.0))
            units, peak = earlier + found.tolist(), max(peak, piece.peak)
            if not piece.last:
                begun[piece.index] = units, peak
                continue
            row = {"row": piece.index, "duration_s": piece.duration_s, "units": collapse(units)}
            if is_silent(peak):
                row = bad(piece, "silent", "is silent from beginning to end")
            add(row)

    def bad(piece, reason: str, problem: str) -> dict:
        return {"row": piece.index, "place": piece.place, "reason": reason, "problem": problem}

    def add(row: dict) -> None:
        journal.add(row)
        progress.update()
        if "reason" in row:
            check_share()

    def check_share() -> None:
        num_bad = journal.reasons.total()
        if num_bad > max_bad_share * num_rows:
            journal.sync()
            raise too_many_bad(num_bad, num_rows, max_bad_share, journal.first_bad)

    check_share()  # of what an earlier run found
    waiting: tuple[list, list] = ([], [])  # a GPU encodes a batch while the one before is written down
    for pieces, encoded in frames:
        if not encoded:
            (piece,) = pieces
            begun.pop(piece.index, None)
            add(bad(piece, piece.error.reason, piece.error.problem))
            continue
        labelled = nearest(encoded)
        finish(*waiting)
        waiting = pieces, labelled
    finish(*waiting)
    journal.sync()


def write_shard(work: Stage, name: str, journal: Journal, rows: Callable[[], Iterator[dict]]) -> None:
    """Write what is known of a shard, in the order of the manifest's rows, and say how much speech it holds."""
    with work.publish(f"{name}.parquet") as path:
        write_units(path, units_rows(journal, rows()))
    work.counts.update(utterances=journal.utterances, units=journal.units, seconds_of_audio=round(journal.seconds, 2))
    said = f"{name}: {journal.utterances:,} utterances, {journal.units:,} units, {journal.seconds / 3600:.2f} h"
    if journal.seconds:
        said += f", {journal.units / journal.seconds:.1f} units a second"
    if journal.reasons:
        write_jsonl(work.output_dir / f"{name}.dropped.jsonl", dropped_rows(journal, rows()))
        reasons = dict(sorted(journal.reasons.items()))
        work.counts["dropped"] = reasons
        said += "; left out: " + ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
    print(said, flush=True)


def say_speed(work: Stage, frames, seconds: float) -> None:
    """Say how fast a shard, or what was left of it, was labelled."""
    if not frames.audio_s:
        return
    speed = round(frames.audio_s / seconds, 1)
    padding = round(frames.padding_s / (frames.audio_s + frames.padding_s), 4)
    idle = round(1 - frames.encoder_s() / seconds, 4)
    work.counts.update(audio_seconds_a_second=speed, padding_share=padding, encoder_idle_share=idle)
    said = f"{speed:,} seconds of audio a second; padding {padding:.1%}"
    print(said + (f", the encoder idle {idle:.1%} of the time" if frames.encoder.model else ""), flush=True)


def label_audio(
    manifest: Path,
    audio_root: Path,
    kmeans: Path,
    output_dir: Path,
    num_shards: int = 1,
    shard: int | None = None,
    num_workers: int | None = None,
    batch_seconds: float = BATCH_SECONDS,
    max_seconds: float = 7200,
    max_bad_share: float = 0.01,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Label every utterance of a manifest with units.

    Args:
        manifest: JSONL with "id", "audio", "language" and "text", and "start_s" and "end_s" of segments.
        audio_root: Folder that the manifest's audio paths start from.
        kmeans: Folder written by fit_kmeans.py.
        output_dir: Folder of units shards to write.
        num_shards: Files to write, of about as many hours each if the manifest says how long utterances are.
        shard: Write this one alone, counted from 0 (for array tasks); without it all, in turn.
        num_workers: Processes that decode audio ahead; default: on a GPU one for each CPU but one, else none.
        batch_seconds: Seconds of audio that a GPU encodes at a time, padding included. Units do not depend on it.
        max_seconds: Longer utterances are left out; those above 60 s are encoded in overlapping windows.
        max_bad_share: Of a shard's utterances, how many may be left out because their audio cannot be used.
        device: auto, cpu or cuda, for the encoder.
        overwrite: Replace a shard if it was made from other input.
    """
    arguments = dict(locals())
    if num_shards < 1 or (shard is not None and not 0 <= shard < num_shards):
        raise UserError(f"--shard {shard} of --num_shards {num_shards}", "shards are 0 to num_shards - 1")
    if (num_workers is not None and num_workers < 0) or batch_seconds <= 0 or not 0 <= max_bad_share <= 1:
        given = f"--num_workers {num_workers}, --batch_seconds {batch_seconds:g}, --max_bad_share {max_bad_share:g}"
        raise UserError(f"{given} make no sense", "give 0 or more processes, some seconds, a share from 0 to 1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: threads get in the decoding processes' way
    from tqdm import tqdm

    from speech_units.frames import Decoder, Frames

    centroids, config = load_kmeans(kmeans)
    begins = boundaries(lengths_of(manifest), num_shards)
    encoder = None
    for index in range(num_shards) if shard is None else [shard]:
        name, first, end = shard_name(index, num_shards), begins[index], begins[index + 1]
        rows = functools.partial(read_rows, manifest, first, end)
        arguments["audio"] = fingerprint(
            rows(), audio_root, max_bad_share
        )  # the same files elsewhere are the same input
        journal_path = output_dir / f".{name}.journal.jsonl"
        with stage(__file__, output_dir, arguments, ["manifest", "kmeans"], SETTINGS, part=name) as work:
            if not work.done:
                if encoder is None:
                    encoder = Encoder(config, device, dim=centroids.shape[1])
                    nearest = Nearest(centroids, encoder.device)
                with contextlib.closing(Journal(journal_path, first, end - first)) as journal:
                    decoder = Decoder(manifest, audio_root, config, max_seconds, first, end, journal.done())
                    frames = Frames(decoder, encoder, num_workers, batch_seconds)
                    started = time.monotonic()
                    with tqdm(total=end - first, initial=sum(journal.done()), desc=name, unit="utt") as progress:
                        label_rows(frames, nearest, journal, max_bad_share, progress)
                    say_speed(work, frames, time.monotonic() - started)
                    write_shard(work, name, journal, rows)
        journal_path.unlink(missing_ok=True)
    print(output_dir)


if __name__ == "__main__":
    run(label_audio)
