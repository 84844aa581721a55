"""k-means: the nearest centroid of frames, and fitting, on a CPU or a GPU."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from towerspeech.ahead import ahead
from towerspeech.errors import UserError
from towerspeech.files import publish

# Distances at a time, and frames at most: 64 MB a thread; 1 GB on a GPU.
TABLE = {"cpu": (1 << 24, 1 << 12), "cuda": (1 << 28, 1 << 16)}
THREADED = 1 << 20  # a table of so many distances is worth the start of threads

# How a fit goes; see ``fit``. Chosen on MFCC of recorded prompts, alone and 37 side by side, and on drawn clusters.
GROWTH = 4
FRAMES_A_UNIT, FEWEST_FRAMES = 10, 10_000  # of the smallest sample
START_BLOCK = {"cpu": 1 << 12, "cuda": 1 << 20}  # frames that are compared with the start's candidates at a time
MOVES = 15  # iterations in which units that few frames belong to are moved,
FEW = 0.25  # of the median unit's frames,
MOVED_PART = 10  # at most one unit in so many at a time
TOLERANCE = 0.005  # of the distance: what an iteration must gain for another
MOST_ITERATIONS = 20  # after the moves


class Nearest:
    """Finds the nearest centroid of each frame: |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and |f|^2 is the same for all c."""

    def __init__(self, centroids, device):
        import torch

        self.centroids = torch.as_tensor(centroids).to(device)
        self.norms = (self.centroids**2).sum(dim=1)
        table, most = TABLE[self.centroids.device.type]
        self.rows = min(max(64, table // len(self.centroids)), most)
        self.own = threading.local()  # each thread's table: a new one would cost a tenth of the time

    def __call__(self, frames: list) -> list:
        """Tensors (frames, dim) -> tensors (frames,) of ids, of equally near ones the first."""
        import torch

        return [torch.cat([self.block(block) for block in part.split(self.rows)]) for part in frames]

    def block(self, frames):
        """Tensor (frames, dim), at most ``rows`` of them -> (frames,)."""
        import torch

        if not hasattr(self.own, "table"):
            self.own.table = self.norms.new_empty(self.rows, len(self.centroids))
        table = self.own.table[: len(frames)]
        torch.addmm(self.norms, frames, self.centroids.T, alpha=-2, out=table)
        return self.places(table)

    def places(self, table):
        """Tensor (frames, num_units) -> (frames,): where the least number of each row is."""
        import numpy as np
        import torch

        if table.device.type != "cpu":
            return table.argmin(dim=1)
        # numpy's search takes a quarter of the time of torch's, but has one thread only.
        threads = torch.get_num_threads() if table.numel() >= THREADED else 1
        parts = np.array_split(table.numpy(), threads)
        if threads == 1:
            return torch.from_numpy(parts[0].argmin(axis=1))
        with ThreadPoolExecutor(threads) as pool:
            return torch.from_numpy(np.concatenate(list(pool.map(lambda part: part.argmin(axis=1), parts))))


def squared_distances(frames, centroids, ids):
    """Squared distances of frames to their centroids: tensors (frames, dim), (num_units, dim), (frames,) -> (frames,).

    Not from the table that the nearest ones are found in: where large numbers cancel, little is left of a small one.
    """
    return ((frames - centroids[ids]) ** 2).sum(dim=1)


# --- Fitting --------------------------------------------------------------------------------------
class Fit(NamedTuple):
    """One fit of k-means."""

    centroids: Any  # (num_units, dim) float32
    distance: float  # mean squared
    used: int  # centroids that are nearest to a frame


class Assigned(NamedTuple):
    """What a pass over frames finds."""

    sums: Any  # float64 (num_units, dim): of each unit's frames
    counts: Any  # (num_units,): frames of each unit
    distances: Any  # squared, to the nearest centroid, numpy float32 (frames,)

    @property
    def mean(self) -> float:
        return float(self.distances.mean(dtype="f8"))


class Sample:
    """Some rows of frames, (all frames, dim), which are read a block at a time; ``rows`` are numpy's, in order."""

    def __init__(self, frames, rows, device, spread: Callable):
        self.frames, self.rows, self.device, self.spread = frames, rows, device, spread

    def assign(self, centroids, told: str) -> Assigned:
        """Find each frame's nearest centroid.

        Every block is computed by one thread, and they are added up in order, so that the same frames give the same
        bytes on any number of cores. (A GPU adds in any order, to 64 bits.)
        """
        import numpy as np
        import torch
        from tqdm import tqdm

        nearest = Nearest(centroids, self.device)

        def block(first: int):
            # A copy in torch's memory: it lies where the processor likes it, whatever the row.
            frames = torch.tensor(self.frames[self.rows[first : first + nearest.rows]]).to(self.device)
            ids = nearest.block(frames)
            return frames, ids, check(squared_distances(frames, nearest.centroids, ids)).cpu().numpy()

        sums = torch.zeros_like(nearest.centroids, dtype=torch.float64)
        counts = torch.zeros(len(centroids), dtype=torch.int64, device=self.device)
        distances = np.empty(len(self.rows), dtype="f4")
        firsts = range(0, len(self.rows), nearest.rows)
        with tqdm(total=len(self.rows), desc=told, unit="frame", leave=False, delay=5) as bar:
            for first, (frames, ids, to_nearest) in zip(firsts, self.spread(block, firsts), strict=True):
                sums.index_add_(0, ids, frames.double())
                counts += torch.bincount(ids, minlength=len(counts))
                distances[first : first + len(ids)] = to_nearest
                bar.update(len(ids))
        return Assigned(sums, counts, distances)

    def draw(self, rng, distances, number: int):
        """Draw frames with a probability that is their squared distance: (up to number, dim), all different."""
        import numpy as np
        import torch

        weights = distances.astype("f8")
        number = min(number, np.count_nonzero(weights))
        drawn = rng.choice(len(weights), number, replace=False, p=weights / weights.sum()) if number else []
        return torch.tensor(np.unique(self.frames[self.rows[drawn]], axis=0)).to(self.device)

    def distinct(self):
        """Distinct frames on the device, (n, dim), and how often each is there, numpy float64 (n,)."""
        import numpy as np
        import torch

        keys = [hash((self.frames[row] + 0.0).tobytes()) for row in self.rows]  # 0.0 and -0.0 are the same
        _, firsts, counts = np.unique(keys, return_index=True, return_counts=True)
        order = firsts.argsort()  # np.unique sorts by hash, which is another one in every process
        return torch.tensor(self.frames[self.rows[firsts[order]]]).to(self.device), counts[order].astype("f8")

    def start(self, rng, num_units: int):
        """Choose distinct frames to begin with, (num_units, dim); if there are too few, all that there are.

        Greedy k-means++ (Arthur & Vassilvitskii 2007): each is the best of some that are drawn by their squared
        distance to those before.
        """
        import numpy as np
        import torch
        from tqdm import tqdm

        frames, counts = self.distinct()
        rows = START_BLOCK[self.device.type]
        if len(frames) < num_units:
            return frames
        norms = check((frames**2).sum(dim=1))
        weights = torch.from_numpy(counts).to(self.device)
        to_nearest = torch.full_like(norms, np.inf)
        chosen: list[int] = []
        mass = counts
        for _ in tqdm(range(num_units), desc="k-means: start", unit="unit", leave=False, delay=5):
            drawn = rng.choice(len(mass), 2 + int(np.log(num_units)) if chosen else 1, p=mass / mass.sum())
            candidates = frames[drawn]

            def block(first: int, candidates=candidates, drawn=drawn, to_nearest=to_nearest):
                part = slice(first, first + rows)
                table = torch.addmm(norms[drawn], frames[part], candidates.T, alpha=-2) + norms[part, None]
                return torch.minimum(table.clamp(min=0), to_nearest[part, None])

            table = torch.cat(list(self.spread(block, range(0, len(frames), rows))))
            best = int((weights @ table.double()).argmin())
            to_nearest = table[:, best].contiguous()
            chosen.append(int(drawn[best]))
            to_nearest[chosen[-1]] = 0
            mass = (weights * to_nearest).cpu().numpy()
            if not mass.any():  # the others are as good as equal to those chosen
                mass = np.ones(len(mass))
                mass[chosen] = 0
                to_nearest = torch.from_numpy(mass.astype("f4")).to(self.device)
        return frames[chosen]


def check(numbers):
    """Give a tensor back.

    Raises:
        UserError: Some of it is not finite.
    """
    if not numbers.isfinite().all():
        raise UserError("some frames hold what is no number", "check the encoder's weights, then the audio")
    return numbers


def smallest(num_units: int) -> int:
    """How many frames the smallest sample should hold."""
    return max(FRAMES_A_UNIT * num_units, FEWEST_FRAMES)


def sizes(num_frames: int, num_units: int) -> list[int]:
    """How many frames the samples of a fit hold."""
    found = [num_frames]
    while found[-1] // GROWTH >= smallest(num_units):
        found.append(found[-1] // GROWTH)
    return found[::-1]


@contextlib.contextmanager
def threads_for(device) -> Iterator[Callable]:
    """A ``map`` by threads: one for each CPU, whose work torch does not divide further; two that read for a GPU."""
    import torch

    before, number = torch.get_num_threads(), len(os.sched_getaffinity(0)) if device.type == "cpu" else 2
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(number) as threads:
            yield functools.partial(ahead, threads, limit=2 * number)
    finally:
        torch.set_num_threads(before)


def fit(frames, num_units: int, seed: int, device="cpu", kept: Path | None = None) -> Fit:
    """Fit k-means to frames, float32 (frames, dim), which may be a memory map.

    Lloyd's algorithm on a random sample of the frames, then on ever larger ones that hold it, at last on all. While
    the sample is small, units that few frames belong to are moved to where frames are far from their centroids, drawn
    by their squared distance. That mends most of what an unlucky start does, and costs little. Units that no frame
    belongs to are moved at any time. It ends when an iteration gains less than TOLERANCE.

    Args:
        frames: What to cluster.
        num_units: Centroids.
        seed: Decides samples, start and moves.
        device: torch.device, or its name.
        kept: A file that holds the work so far; a killed fit goes on from there as if nothing had happened.

    Raises:
        UserError: There are too few distinct frames, or some are no numbers.
    """
    import numpy as np
    import torch

    device = torch.device(device)
    order = np.random.default_rng([seed, 0]).permutation(len(frames))
    centroids, begun = _load(kept, device)
    with threads_for(device) as spread:

        def sample(size: int) -> Sample:
            return Sample(frames, np.sort(order[:size]), device, spread)

        growing = sizes(len(frames), num_units)
        if centroids is None:
            for size in (smallest(num_units), *growing):
                centroids = sample(size).start(np.random.default_rng([seed, 1]), num_units)
                if len(centroids) == num_units:
                    break
            else:
                raise UserError(
                    f"there are only {len(centroids):,} distinct frames for {num_units:,} units",
                    "lower --num_units, or add audio (digital silence is the same in every frame)",
                )
        for size in growing:
            state = State(size, 0, np.inf)
            if begun and size <= begun.size:
                if size < begun.size:
                    continue
                state = begun
            moves = 0 if size == len(frames) > growing[0] else MOVES
            centroids, found = _improve(sample(size), centroids, state, moves, seed, kept)
    centroids = centroids.cpu().numpy()
    distinct = len(np.unique(centroids, axis=0))
    if distinct < num_units:
        told = f"only {distinct:,} of {num_units:,} centroids are distinct"
        raise UserError(told, "lower --num_units or add audio that differs")
    return Fit(centroids, found.mean, int((found.counts > 0).sum()))


class State(NamedTuple):
    """How far a fit is."""

    size: int  # frames of the sample
    iteration: int  # of those on it, from 0
    before: float  # the mean squared distance in the iteration before


def _improve(
    sample: Sample, centroids, state: State, moves: int, seed: int, kept: Path | None
) -> tuple[Any, Assigned]:
    """Iterate on one sample until it hardly helps: the centroids, and what they are the nearest to.

    In so many iterations as ``moves`` says, units are moved.
    """
    import numpy as np
    import torch

    size, iteration, before = state
    while True:
        told = f"k-means: {size:,} frames, iteration {iteration + 1}"
        found = sample.assign(centroids, told)
        moving = iteration < moves
        few = found.counts < max(1, FEW * float(found.counts.median()) if moving else 0)
        settled = not moving and not few.any() and found.mean >= (1 - TOLERANCE) * before
        if settled or iteration == moves + MOST_ITERATIONS:
            print(f"{told}: mean squared distance {found.mean:.4g}", flush=True)
            return centroids, found
        means = (found.sums / found.counts.clamp(min=1)[:, None]).float()
        centroids = torch.where(found.counts[:, None] > 0, means, centroids)
        fewest = torch.nonzero(few)[:, 0]
        if moving:
            most = -(-len(centroids) // MOVED_PART)
            fewest = fewest[found.counts[fewest].argsort(stable=True)][:most]
        rng = np.random.default_rng([seed, 2, size, iteration])
        drawn = sample.draw(rng, found.distances, len(fewest))
        centroids[fewest[: len(drawn)]] = drawn
        before, iteration = found.mean, iteration + 1
        _save(kept, centroids, State(size, iteration, before))


def _save(kept: Path | None, centroids, state: State) -> None:
    from safetensors.torch import save_file

    if kept:
        with publish(kept) as path:
            save_file(
                {"centroids": centroids.contiguous()}, path, {key: repr(v) for key, v in state._asdict().items()}
            )


def _load(kept: Path | None, device) -> tuple[Any, State | None]:
    from safetensors import safe_open

    if not kept or not kept.exists():
        return None, None
    with safe_open(kept, "pt", device=str(device)) as file:
        told = file.metadata()
        state = State(int(told["size"]), int(told["iteration"]), float(told["before"]))
        return file.get_tensor("centroids"), state
