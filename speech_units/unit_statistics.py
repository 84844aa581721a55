"""What units are like, counted frame by frame: how they are used, how far frames lie from them, which phones they are.

Pure counting: memory is that of the tables, (num_units,) and (phones, num_units), whatever the number of frames.
"""

import numpy as np

# Squared distances are counted in 50 bins a decade; what lies outside counts in the first and the last.
DISTANCE_EDGES = np.geomspace(1e-4, 1e6, 501)


def entropy(counts) -> float:
    """Entropy of counts' distribution, in nats."""
    counts = np.asarray(counts, dtype=np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class UnitStatistics:
    """Counts of frames' units, their runs and their distances."""

    def __init__(self, num_units: int, dim: int):
        self.units = np.zeros(num_units, dtype=np.int64)  # frames of each
        self.runs = np.zeros(1, dtype=np.int64)  # number of runs by their length in frames, from 0 on
        self.distances = np.zeros(len(DISTANCE_EDGES) - 1, dtype=np.int64)
        self.squared_distance = 0.0  # sum over frames
        self.utterances = 0
        self._mean = np.zeros(dim)  # of the frames
        self._scatter = 0.0  # sum of frames' squared distances to their mean

    def add(self, frames, ids, distances) -> None:
        """Count one utterance.

        Args:
            frames: Features, (frames, dim).
            ids: Units of the frames, integers (frames,).
            distances: Squared distances of the frames to their centroids, (frames,).
        """
        self.utterances += 1
        if not len(ids):
            return
        num_before = self.frames
        self.units += np.bincount(ids, minlength=len(self.units))
        ends = np.append(np.flatnonzero(ids[1:] != ids[:-1]), len(ids) - 1)
        lengths = np.bincount(np.diff(ends, prepend=-1), minlength=len(self.runs))
        lengths[: len(self.runs)] += self.runs
        self.runs = lengths
        inside = np.clip(distances, DISTANCE_EDGES[0], DISTANCE_EDGES[-1])
        self.distances += np.histogram(inside, DISTANCE_EDGES)[0]
        self.squared_distance += float(distances.sum(dtype=np.float64))
        # The mean and the scatter about it are merged, so that no large sums are subtracted from one another.
        frames = np.asarray(frames, dtype=np.float64)
        mean, number = frames.mean(axis=0), len(frames)
        apart = mean - self._mean
        self._scatter += float(((frames - mean) ** 2).sum())
        self._scatter += float((apart**2).sum()) * num_before * number / (num_before + number)
        self._mean += apart * number / (num_before + number)

    @property
    def frames(self) -> int:
        return int(self.units.sum())

    @property
    def collapsed(self) -> int:
        """Units that are left without consecutive repeats."""
        return int(self.runs.sum())

    def figures(self, frames_a_second: float) -> dict:
        """The figures of a report; at least one frame must have been counted."""
        frames = self.frames
        return {
            "utterances": self.utterances,
            "frames": frames,
            "hours": frames / frames_a_second / 3600,
            "units": len(self.units),
            "units_used": int((self.units > 0).sum()),
            "perplexity": float(np.exp(entropy(self.units))),
            "repeated_frames": 1 - self.collapsed / frames,
            "units_a_second": self.collapsed / frames * frames_a_second,
            "mean_squared_distance": self.squared_distance / frames,
            "explained_variance": 1 - self.squared_distance / self._scatter if self._scatter else None,
        }


class PhoneStatistics:
    """Counts of frames' phones and units together."""

    def __init__(self, num_units: int):
        self.table: dict[str, np.ndarray] = {}  # frames of each unit, by phone
        self.num_units = num_units

    def add(self, phones: list[str | None], ids) -> None:
        """Count frames, given their phones and units; frames without a phone (None) are passed over."""
        for phone in {*phones} - {None}:
            its = np.array([other == phone for other in phones])
            counts = np.bincount(ids[its], minlength=self.num_units)
            self.table[phone] = self.table.get(phone, 0) + counts

    def figures(self) -> dict:
        """Phone purity, cluster purity and PNMI, as HuBERT's paper has them (arXiv 2106.07447).

        With p(i, j) the share of the frames that are phone i and unit j: phone purity is the sum over units of
        max_i p(i, j), the accuracy of taking each unit for its most frequent phone; cluster purity the sum over phones
        of max_j p(i, j); PNMI the mutual information over the phones' entropy, that is the share of what there is to
        know about the phone that the unit tells. With more units phone purity and PNMI grow, and cluster purity falls:
        compare k-means of one size. fairseq's examples/hubert/measure_teacher_quality.py calls them ref pur, hyp pur
        and MI/H(ref).
        """
        table = np.stack([self.table[phone] for phone in sorted(self.table)])
        frames = table.sum()
        of_phones = entropy(table.sum(axis=1))
        mutual = of_phones + entropy(table.sum(axis=0)) - entropy(table)
        return {
            "phones": len(table),
            "frames_with_phone": int(frames),
            "phone_purity": float(table.max(axis=0).sum() / frames),
            "cluster_purity": float(table.max(axis=1).sum() / frames),
            "pnmi": mutual / of_phones if of_phones else None,
        }
