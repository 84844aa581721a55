"""What is labelled of a shard so far, so that a killed run goes on where it was."""

import json
import os
import time
from collections import Counter
from pathlib import Path

from towerspeech.errors import space_needed
from towerspeech.files import cut_torn_line

SYNC_S = 10  # seconds between two syncs: no more work than that is lost


class Journal:
    """The utterances of a shard that are labelled or found bad, in the order in which they were: JSONL, appended.

    A line is {"row", "duration_s", "units"} or {"row", "place", "reason", "problem"}; ``row`` counts in the manifest
    from 0. What a killed run left of its last line is cut off.
    """

    def __init__(self, path: Path, first: int, num_rows: int):
        import numpy as np

        self.first, self.places = first, np.full(num_rows, -1)  # byte where a row's line begins
        self.utterances = self.units = 0
        self.seconds = 0.0
        self.reasons: Counter[str] = Counter()
        self.first_bad = ""
        self.synced = time.monotonic()
        self.file = open(path, "a+b")  # noqa: SIM115 (``close`` closes it)
        cut_torn_line(path)
        self.file.seek(0)
        self.end = 0
        for line in self.file:
            self.note(json.loads(line), self.end)
            self.end += len(line)

    def close(self) -> None:
        self.file.close()

    def note(self, row: dict, place: int) -> None:
        self.places[row["row"] - self.first] = place
        if "units" in row:
            self.utterances, self.units = self.utterances + 1, self.units + len(row["units"])
            self.seconds += row["duration_s"]
        else:
            self.reasons[row["reason"]] += 1
            self.first_bad = self.first_bad or f"{row['place']} {row['problem']}"

    def add(self, row: dict) -> None:
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with space_needed(Path(self.file.name)):
            self.file.write(line)
        self.note(row, self.end)
        self.end += len(line)
        if time.monotonic() - self.synced > SYNC_S:
            self.sync()

    def sync(self) -> None:
        with space_needed(Path(self.file.name)):
            self.file.flush()
            os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def done(self):
        """Which rows are in it, (num_rows,) of truth values."""
        return self.places >= 0

    def read(self, number: int) -> dict:
        """What is known of a row, counted from the shard's first."""
        self.file.seek(self.places[number])
        return json.loads(self.file.readline())
