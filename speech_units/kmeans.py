"""k-means: the nearest centroid of frames, and fitting."""

from typing import Any, NamedTuple

from towerspeech.errors import UserError

BATCH_SIZE = 10_000  # frames of a k-means step; the default of HuBERT's own recipe
EPOCHS = 20  # passes over the frames, at most
MIN_STEPS = 100


class Nearest:
    """Finds the nearest centroid of each frame: |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and |f|^2 is the same for all c."""

    def __init__(self, centroids, device):
        import torch

        self.centroids = torch.from_numpy(centroids).to(device)
        self.norms = (self.centroids**2).sum(dim=1)

    def __call__(self, frames: list) -> list:
        """Tensors (frames, dim) -> tensors (frames,) of ids."""
        import torch

        return [torch.addmm(self.norms, part, self.centroids.T, alpha=-2).argmin(dim=1) for part in frames]


class Fit(NamedTuple):
    """One fit of k-means."""

    centroids: Any  # (num_units, dim) float32
    distance: float  # mean squared
    used: int  # centroids that are nearest to a frame
    distinct: int  # centroids that differ


def fit_once(frames, num_units: int, seed: int, **settings) -> Fit:
    """Fit scikit-learn's mini-batch k-means to frames, (frames, dim)."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    steps_an_epoch = max(1, len(frames) // BATCH_SIZE)
    model = MiniBatchKMeans(
        n_clusters=num_units,
        batch_size=BATCH_SIZE,
        max_iter=max(EPOCHS, -(-MIN_STEPS // steps_an_epoch)),
        max_no_improvement=100,
        init_size=3 * max(BATCH_SIZE, num_units),
        n_init=1,
        random_state=seed,
        **settings,
    )
    model.fit(frames)
    centroids = np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
    used, distinct = len(np.unique(model.predict(frames))), len(np.unique(centroids, axis=0))
    return Fit(centroids, float(-(model.score(frames) / len(frames))), used, distinct)


def differing_start(frames, num_units: int, seed: int):
    """Choose centroids to begin with among frames that differ, of which there must be enough: (num_units, dim)."""
    import numpy as np
    from sklearn.cluster import kmeans_plusplus

    keys = [hash((frame + 0.0).tobytes()) for frame in frames]  # 0.0 and -0.0 are the same
    _, rows, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(rows) < num_units:
        raise UserError(
            f"there are only {len(rows):,} distinct frames for {num_units:,} units",
            "lower --num_units, or add audio (digital silence is the same in every frame)",
        )
    order = rows.argsort()  # np.unique sorts by hash, which is another one in every process
    order = np.random.default_rng(seed).permutation(order)[: 3 * max(BATCH_SIZE, num_units)]
    weights = counts[order].astype(frames.dtype)
    return kmeans_plusplus(frames[rows[order]], num_units, sample_weight=weights, random_state=seed)[0]


def fit(frames, num_units: int, seed: int) -> Fit:
    """Mini-batch k-means (k-means++ start).

    Centroids that hardly any frame is nearest to are begun anew at random frames, which helps in speech; where many
    frames are the same, as in digital silence, it makes more and more centroids the same. So if any centroid is used
    by no frame, k-means is fitted a second time, begun at frames that differ and without that; the better fit is kept.
    On one thread: then the same frames give the same bytes on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        best = fit_once(frames, num_units, seed)
        if min(best.used, best.distinct) < num_units:
            start = differing_start(frames, num_units, seed)
            other = fit_once(frames, num_units, seed, init=start, reassignment_ratio=0)
            best = max(best, other, key=lambda fit: (min(fit.used, fit.distinct), -fit.distance))
    if best.distinct < num_units:
        raise UserError(
            f"only {best.distinct:,} of {num_units:,} centroids are distinct",
            "lower --num_units or add audio that differs",
        )
    return best
