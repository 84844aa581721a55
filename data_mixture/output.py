"""What is written of one source: tokens for training and validation, what was left out, and a note to go on from.

Every file grows; the note says how far, so that a killed run cuts off what came after it and goes on.
"""

import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_mixture.documents import Made
from data_mixture.duplicates import NearSeen, Seen
from towerspeech.errors import UserError
from towerspeech.files import write_json
from towerspeech.indexed import write_index
from towerspeech.mixture import VALIDATION
from towerspeech.stage import Stage

NOTE_EVERY = 16  # tasks; a killed run repeats no more
LOOK_AFTER = 10_000  # items: as many must have been read before too many bad ones end the run
TWICE, NEARLY = "twice", "nearly twice"
LISTS = ("bad", "hits")
FILES = ("bin", "sizes", "validation_bin", "validation_sizes", "keys", "near", *LISTS)


class Output:
    """The files of one source.

    Attributes:
        state: What is done: how far the reading is, what was found, and how long each file is.
        finished: Whether all of it is done.
    """

    def __init__(self, work: Stage, name: str, dtype: type, of: dict):
        """Find what an earlier run left; ``of`` is what the documents depend on, beside what the stage compares."""
        self.work, self.name, self.dtype = work, name, dtype
        self.note = self.hidden("json")
        self.state = json.loads(self.note.read_text()) if self.note.is_file() else {}
        if self.state.get("of") != of:
            self.remove()
            self.state = {"of": of, "rounds": [], "at": [0, 0], "left_out": {}, "counts": Counter(), "lengths": {}}
        self.state["counts"], self.state["left_out"] = Counter(self.state["counts"]), Counter(self.state["left_out"])
        self.finished = self.note.is_file() and self.final("bin").is_file()

    def hidden(self, ending: str) -> Path:
        """A file of work in progress."""
        return self.work.output_dir / f".{self.name}.{ending}"

    def final(self, ending: str) -> Path:
        """A file of training tokens, with its name."""
        return self.work.output_dir / f"{self.name}.{ending}"

    def remove(self) -> None:
        """Remove whatever there is of this source."""
        held_out = (self.work.output_dir / VALIDATION / f"{self.name}.{ending}" for ending in ("bin", "idx"))
        mine = [self.hidden(name) for name in ("json", *FILES)] + [self.final("bin"), self.final("idx"), *held_out]
        for path in mine:
            path.unlink(missing_ok=True)

    # --- While it grows ---------------------------------------------------------------------------
    def __enter__(self) -> "Output":
        self.closing = ExitStack()
        opened = {name: open(self.hidden(name), "ab") for name in FILES}  # noqa: SIM115 (closed by __exit__)
        self.files = {name: self.closing.enter_context(file) for name, file in opened.items()}
        for name, file in self.files.items():
            file.truncate(self.state["lengths"].get(name, 0))
        self.seen, self.near, self.tasks = Seen(), NearSeen(), 0
        self.seen.load(self.hidden("keys"), self.state["lengths"].get("keys", 0) // 8)
        self.near.load(self.hidden("near"), self.state["lengths"].get("near", 0) // 8)
        return self

    def __exit__(self, *error) -> None:
        self.closing.close()

    def add(self, made: Made, validation: tuple[float, int]) -> None:
        """Write a task's documents.

        Args:
            made: The documents.
            validation: The share of the documents from which those for validation are taken, and the tokens wanted.
        """
        counts, left_out = self.state["counts"], self.state["left_out"]
        left_out.update(made.left_out)
        kept = self.without_duplicates(made)
        share, wanted = validation
        missing = wanted - counts["validation_tokens"]
        chosen = np.flatnonzero(kept & (made.held_out < share) & (made.sizes <= missing))
        held_out = np.zeros_like(kept)
        held_out[chosen[np.cumsum(made.sizes[chosen], dtype=np.int64) <= missing]] = True
        for mask, start in ((kept & ~held_out, ""), (held_out, "validation_")):
            # write, since tofile hides a full disk
            self.files[f"{start}bin"].write(made.ids[np.repeat(mask, made.sizes)].tobytes())
            self.files[f"{start}sizes"].write(made.sizes[mask].tobytes())
            counts[f"{start}documents"] += int(mask.sum())
            counts[f"{start}tokens"] += int(made.sizes[mask].sum(dtype=np.int64))
        counts["items"] += made.items
        counts["bad"] += len(made.bad)
        counts["characters"] += int(made.characters[kept].sum())
        counts["milliseconds"] += round(float(made.seconds[kept].sum()) * 1000)
        for problem in made.bad:
            self.files["bad"].write(json.dumps({"source": self.name, "problem": problem}).encode() + b"\n")
        for where, hit in made.hits:
            self.files["hits"].write(json.dumps([self.name, where, *hit]).encode() + b"\n")
        self.state["at"] = made.at
        self.tasks += 1
        if self.tasks % NOTE_EVERY == 0:
            self.note_down()

    def without_duplicates(self, made: Made) -> np.ndarray:
        """Tell which documents are not there already, (n,) bool."""
        kept = np.ones(len(made.sizes), bool)
        if made.keys is not None and len(kept):
            kept &= ~self.seen.add(made.keys)
            self.state["left_out"][TWICE] += int((~kept).sum())
            self.files["keys"].write(made.keys[kept].tobytes())
        if made.near is not None and kept.any():
            places, bands = np.flatnonzero(kept), made.near[kept]
            again = self.near.add(bands)
            self.state["left_out"][NEARLY] += int(again.sum())
            self.files["near"].write(bands.tobytes())
            kept[places[again]] = False
        return kept

    def note_down(self) -> None:
        """Note how far the work is, so that a killed run goes on from here."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.state["lengths"][name] = os.fstat(file.fileno()).st_size
        write_json(self.note, self.state)

    def check_bad(self, most: float, least: int = 1) -> None:
        """Raise UserError if more than this share of the items could not be read."""
        items, bad = self.state["counts"]["items"], self.state["counts"]["bad"]
        if items >= least and bad > most * items:
            self.files["bad"].flush()
            first = json.loads(self.hidden("bad").read_text(encoding="utf-8").splitlines()[0])["problem"]
            raise too_many_bad(self.name, bad, items, most, first)

    def note_finishing(self) -> None:
        """Note that nothing more comes, and files only want their names."""
        self.state["finishing"] = True
        self.note_down()

    def finish(self) -> None:
        """Give the files their names, those that have not got them: tokens for training come last."""
        if not self.finished:
            if self.state["counts"]["validation_documents"]:
                self.name_file("validation_", f"{VALIDATION}/")
            self.name_file("", "")
        for name in FILES:
            if name not in LISTS:  # it is only needed while it grows
                self.hidden(name).unlink(missing_ok=True)

    def name_file(self, start: str, folder: str) -> None:
        """Name tokens and write their index; nothing to do if a killed run came so far."""
        if self.hidden(f"{start}bin").is_file():
            with self.work.publish(f"{folder}{self.name}.idx") as path:
                sizes = self.hidden(f"{start}sizes")
                known = np.memmap(sizes, np.int32, "r") if sizes.stat().st_size else np.zeros(0, np.int32)
                write_index(path, known, self.dtype)
            os.replace(self.hidden(f"{start}bin"), self.work.output_dir / folder / f"{self.name}.bin")

    def lines(self, name: str) -> list:
        """What was listed: ``bad`` or ``hits``."""
        return [json.loads(line) for line in self.hidden(name).read_text(encoding="utf-8").splitlines()]


def too_many_bad(name: str, bad: int, items: int, most: float, first: str) -> UserError:
    return UserError(
        f"source {name!r}: {bad:,} of {items:,} documents cannot be read, more than {most:.1%} (--max_bad_share). "
        f"The first: {first}",
        "mend the source's settings or its files",
    )
