"""Which tokens the trainer sees, as a pure function of mixture, seed and step: exact budgets, exact resume.

Each source is an endless stream: its documents in a seeded order, a new order for every epoch. A stream is cut into
windows of sequence_length tokens; the source's budget says how many windows, and where the last one ends. A seeded
permutation blends the windows of all sources, and step t takes windows t*B to (t+1)*B - 1 of it. Documents are
packed without padding and see those before them in their window, as in Megatron.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from towerspeech.files import read_json
from towerspeech.indexed import IndexedTokens

IGNORE = -100  # target that the loss leaves out


class TokenStream:
    """One source's documents, shuffled and joined without end."""

    def __init__(self, tokens: IndexedTokens, seed: tuple[int, ...]):
        self.data = tokens
        self.seed = seed
        self.epoch_tokens = int(tokens.sizes.sum(dtype=np.int64))
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # windows come nearly in order; two for a window on the border

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of documents in an epoch and where each of them ends, both (num_documents,) int64."""
        order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.data.sizes))
        return order, np.cumsum(self.data.sizes[order], dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start+count-1 of the stream, (count,) int64."""
        parts = []
        while count:
            epoch, position = divmod(start, self.epoch_tokens)
            order, ends = self.epoch(epoch)
            place = int(np.searchsorted(ends, position, side="right"))
            while count and place < len(order):
                document = order[place]
                size = int(self.data.sizes[document])
                skip = position - (int(ends[place]) - size)
                first = int(self.data.offsets[document]) + skip
                part = self.data.tokens[first : first + min(size - skip, count)]
                parts.append(part)
                start, position, count = start + len(part), position + len(part), count - len(part)
                place += 1
        return np.concatenate(parts).astype(np.int64)


class Mixture:
    """A mixture folder as batches.

    Attributes:
        manifest: What build_mixture.py wrote.
        budgets: Tokens to be trained on, (num_sources,) int64.
        num_windows: Windows of the whole run.
    """

    def __init__(self, folder: Path, sequence_length: int):
        made_by = "run data_mixture/build_mixture.py; it writes the manifest last"
        self.manifest = read_json(Path(folder) / "manifest.json", made_by)
        self.sequence_length = sequence_length
        seed, sources = self.manifest["seed"], self.manifest["sources"]
        self.streams = [
            TokenStream(IndexedTokens(Path(folder) / source["name"]), (seed, number))
            for number, source in enumerate(sources)
        ]
        self.budgets = np.array([source["budget"] for source in sources], np.int64)
        windows = -(-self.budgets // sequence_length)
        self.num_windows = int(windows.sum())
        owner = np.repeat(np.arange(len(sources), dtype=np.int32), windows)
        self.owner = np.random.default_rng([seed, len(sources), self.num_windows]).permutation(owner)
        # The n-th window that a source owns in the blend is the n-th of its stream.
        self.place = np.empty(self.num_windows, np.int64)
        for number in range(len(sources)):
            self.place[self.owner == number] = np.arange(windows[number])

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one window, (sequence_length,) int64 each; targets beyond the budget are IGNORE.

        Numbers beyond the last window give one without targets, which fills the last batch up.
        """
        length = self.sequence_length
        if number >= self.num_windows:
            return np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
        source, start = self.owner[number], int(self.place[number]) * length
        tokens = self.streams[source].read(start, length + 1)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[max(0, int(self.budgets[source]) - start) :] = IGNORE
        return inputs, targets

    def batch(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of several windows, (len(numbers), sequence_length) int64 each."""
        inputs, targets = zip(*(self.window(number) for number in numbers), strict=True)
        return np.stack(inputs), np.stack(targets)

    def num_targets(self, numbers: range) -> int:
        """Targets in several windows, without reading them."""
        numbers = np.arange(numbers.start, min(numbers.stop, self.num_windows))
        left = self.budgets[self.owner[numbers]] - self.place[numbers] * self.sequence_length
        return int(np.minimum(left, self.sequence_length).sum())

    def tokens_seen(self, num_windows: int) -> dict[str, int]:
        """Tokens of each source in the first ``num_windows`` windows: what has been trained on by then."""
        counts = np.bincount(self.owner[:num_windows], minlength=len(self.budgets))
        seen = np.minimum(counts * self.sequence_length, self.budgets)
        return {source["name"]: int(n) for source, n in zip(self.manifest["sources"], seen, strict=True)}
