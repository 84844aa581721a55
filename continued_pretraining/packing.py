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
from towerspeech.mixture import VALIDATION

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
            document = order[place]
            last = int(self.data.offsets[document]) + int(self.data.sizes[document])
            first = last - (int(ends[place]) - position)
            part = self.data.tokens[first : min(last, first + count)]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)


class Mixture:
    """A mixture folder as batches: what is to be trained on, or what is held out, each document once.

    Attributes:
        names: The sources that have such documents.
        budgets: Tokens of each that are targets, (num_sources,) int64.
        num_windows: Windows of all.
        owner: The source of each window, (num_windows,) int32.
        targets: Targets in each window, (num_windows,) int64.
    """

    def __init__(self, folder: Path, sequence_length: int, held_out: bool = False):
        made_by = "run data_mixture/build_mixture.py; it writes the manifest last"
        manifest = read_json(Path(folder) / "manifest.json", made_by)
        self.sequence_length = sequence_length
        seed, sources = manifest["seed"], manifest["sources"]
        if held_out:  # a source's first token is no target
            folder = Path(folder) / VALIDATION
            budgets = [source.get("validation", {"tokens": 0})["tokens"] - 1 for source in sources]
            sources = [source for source, budget in zip(sources, budgets, strict=True) if budget > 0]
            budgets = [budget for budget in budgets if budget > 0]
        else:
            budgets = [source["budget"] for source in sources]
        self.names = [source["name"] for source in sources]
        self.streams = [
            TokenStream(IndexedTokens(Path(folder) / name), (seed, number)) for number, name in enumerate(self.names)
        ]
        self.budgets = np.array(budgets, np.int64)
        windows = -(-self.budgets // sequence_length)
        self.num_windows = int(windows.sum())
        owner = np.repeat(np.arange(len(sources), dtype=np.int32), windows)
        self.owner = np.random.default_rng([seed, len(sources), self.num_windows]).permutation(owner)
        # The n-th window that a source owns in the blend is the n-th of its stream.
        self.place = np.empty(self.num_windows, np.int64)
        for number in range(len(sources)):
            self.place[self.owner == number] = np.arange(windows[number])
        self.targets = np.minimum(self.budgets[self.owner] - self.place * sequence_length, sequence_length)

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one window, (sequence_length,) int64 each; targets beyond the budget are IGNORE.

        Numbers beyond the last window give one without targets, which fills the last batch up.
        """
        length = self.sequence_length
        if number >= self.num_windows:
            return np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
        tokens = self.streams[self.owner[number]].read(int(self.place[number]) * length, length + 1)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[self.targets[number] :] = IGNORE
        return inputs, targets

    def batch(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of several windows, (len(numbers), sequence_length) int64 each."""
        inputs, targets = zip(*(self.window(number) for number in numbers), strict=True)
        return np.stack(inputs), np.stack(targets)

    def num_targets(self, numbers: range) -> np.ndarray:
        """Targets of each source in several windows, (num_sources,) int64, without reading them."""
        part = slice(numbers.start, numbers.stop)
        return np.bincount(self.owner[part], self.targets[part], len(self.names)).astype(np.int64)

    def tokens_seen(self, num_windows: int) -> dict[str, int]:
        """Tokens of each source in the first ``num_windows`` windows: what has been trained on by then."""
        return dict(zip(self.names, self.num_targets(range(num_windows)).tolist(), strict=True))
