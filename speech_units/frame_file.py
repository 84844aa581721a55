"""Frames on disk: more than memory holds, gone on with after a kill, in an order that no process decides."""

import json
import os
from pathlib import Path

from towerspeech.errors import space_needed
from towerspeech.files import cut_torn_line, publish


class FrameFile:
    """Float32 frames (n, dim), appended piece by piece, with an index beside them.

    The index is JSONL of {"key", "frames", "dim", "last"}. ``key`` is where a piece belongs in the order, (manifest,
    row, window); ``last`` says that its row ends there.
    """

    def __init__(self, path: Path):
        self.path, self.index_path = path, path.with_suffix(".jsonl")
        self.entries: dict[tuple, tuple[int, int]] = {}  # key: first frame, frames
        self.finished: set[tuple] = set()  # manifest and row
        self.end = self.dim = 0  # frames in the file, of a row that was begun twice too
        self.file, self.index = open(path, "a+b"), open(self.index_path, "a+b")  # noqa: SIM115 (``close`` closes them)
        cut_torn_line(self.index_path)
        size, end = os.fstat(self.file.fileno()).st_size, 0
        self.index.seek(0)
        for line in self.index:
            entry = json.loads(line)
            if (self.end + entry["frames"]) * 4 * entry["dim"] > size:
                break
            self.note(entry)
            end += len(line)
        self.index.truncate(end)
        self.file.truncate(self.end * 4 * self.dim)

    def close(self) -> None:
        self.file.close()
        self.index.close()

    @property
    def num_frames(self) -> int:
        return sum(count for _, count in self.entries.values())

    def done(self, manifest: int, num_rows: int):
        """Which rows of a manifest are all here, (num_rows,) of truth values."""
        import numpy as np

        done = np.zeros(num_rows, dtype=bool)
        done[[row for number, row in self.finished if number == manifest]] = True
        return done

    def note(self, entry: dict) -> None:
        self.entries[tuple(entry["key"])] = self.end, entry["frames"]
        self.end, self.dim = self.end + entry["frames"], entry["dim"]
        if entry["last"]:
            self.finished.add(tuple(entry["key"][:2]))

    def add(self, key: tuple, frames, last: bool) -> None:
        """Append one piece's frames, a float32 array (n, dim)."""
        entry = {"key": key, "frames": len(frames), "dim": frames.shape[1], "last": last}
        with space_needed(self.path):
            self.file.write(frames.tobytes())
            self.file.flush()  # before its entry
            self.index.write(json.dumps(entry).encode() + b"\n")
            self.index.flush()
        self.note(entry)

    def sorted(self, target: Path):
        """The frames in the keys' order, as a memory map (n, dim) of the file ``target``."""
        import numpy as np

        raw = np.memmap(self.path, "f4", "r", shape=(self.end, self.dim))
        if not target.exists():
            with publish(target) as path, open(path, "wb") as file:
                for first, count in (self.entries[key] for key in sorted(self.entries)):
                    file.write(raw[first : first + count].tobytes())
        return np.memmap(target, "f4", "r", shape=(self.num_frames, self.dim))
