"""Statistics of margin values: ties, spread over attack paths, prediction of broken examples. NumPy arrays only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from robustmail.margin_lab.results import Continuity, Estimate, Hidden, Quartiles, Spread, Truth

__all__ = [
    "auroc",
    "auroc_behind",
    "bootstrap",
    "continuity",
    "critical_among",
    "hidden",
    "quartiles",
    "rank_correlations",
    "spearman",
    "spread",
    "truth",
]

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Statistic = Callable[..., Floats]

RESAMPLES = 1000
BLOCK_SIZE = 2_000_000  # indices drawn at once
TIED = 0.01  # "tied": a larger share of the examples shares its value with another
MOSTLY_TIED = 0.5  # "discrete" needs a larger share
COARSE = 1 / 3  # ... and either a larger share of the distinct values that are shared, or even steps
STEP_TOLERANCE = 1e-3


def continuity(values: Floats) -> Continuity:
    """Count ties among a margin's values, [N], and classify it:

    constant: one value.
    discrete: more than half of the examples share their value with another, and either all values lie on a grid of
        fewer than N equal steps, or more than a third of the distinct values between smallest and largest are shared.
    tied: more than 1 % of the examples share their value, as probabilities do that round to 1.
    continuous: none of these.
    """
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    ties = float(counts[counts > 1].sum() / n)
    verdict = "tied" if ties > TIED else "continuous"
    if len(counts) == 1:
        verdict = "constant"
    elif ties > MOSTLY_TIED and (_is_evenly_spaced(distinct, n) or _is_coarse(counts > 1)):
        verdict = "discrete"
    return Continuity(len(counts), ties, float(counts.max() / n), verdict)


def _is_evenly_spaced(distinct: Floats, n: int) -> bool:
    """Do sorted values lie on a grid of fewer than n equal steps? This recognises a count even among few examples."""
    gaps = np.diff(distinct.astype(np.float64))
    steps = gaps / gaps.min()
    return bool(steps.sum() < n and np.allclose(steps, steps.round(), rtol=0, atol=STEP_TOLERANCE) and len(steps) > 1)


def _is_coarse(shared: Bools) -> bool:
    """Are values shared over the whole range, [distinct values] in order? At its ends continuous margins saturate."""
    inner = shared[1:-1]
    return float(inner.mean()) > COARSE if len(inner) else bool(shared.all())


def spread(values: Floats) -> Spread:
    """Measure how much the values of the same examples, [paths, N], differ between paths; row 0 is the reference.

    value: sqrt(mean_i var_p m_pi) / std_i m_0i. rank: mean_i (max_p r_pi - min_p r_pi) / N, r = mid-ranks of a path.
    """
    from scipy.stats import rankdata

    over_paths, over_examples = float(np.sqrt(values.var(0).mean())), float(values[0].std())
    ranks = rankdata(values, axis=1) / values.shape[1]
    relative = over_paths / over_examples if over_examples else 0.0 if over_paths == 0 else None
    return Spread(relative, float((ranks.max(0) - ranks.min(0)).mean()))


def auroc(margin: Floats, broken: Floats) -> Floats:
    """P(margin of a broken example < margin of an unbroken one) + P(equal) / 2, over the last axis, in [0, 1].

    margin, broken: [..., N]; broken is 1 or 0. Computed as Mann and Whitney's U divided by its largest value. NaN where
    all or no examples are broken.
    """
    from scipy.stats import rankdata

    ranks = rankdata(-margin, axis=-1)
    n_broken, n = broken.sum(-1), broken.shape[-1]
    pairs = n_broken * (n - n_broken)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = ((ranks * broken).sum(-1) - n_broken * (n_broken + 1) / 2) / pairs
    return area


def spearman(a: Floats, b: Floats) -> Floats:
    """Spearman's rank correlation of a and b, [..., N], over the last axis, in [-1, 1]; NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Floats = (ranks[0] * ranks[1]).sum(-1) / np.sqrt((ranks[0] ** 2).sum(-1) * (ranks[1] ** 2).sum(-1))
    return rho


def bootstrap(statistic: Statistic, *columns: Floats, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Compute a statistic of columns, [N] each, and its 95 % percentile bootstrap interval over the examples.

    The resamples depend on (N, seed) alone, so two margins on the same examples are compared on the same resamples.
    """
    n = len(columns[0])
    value = float(statistic(*columns)) if n else float("nan")
    if np.isnan(value) or n < 2:
        return Estimate(None)
    blocks = _resampled_indices(n, seed, resamples)
    return _estimate(value, np.concatenate([statistic(*(column[indices] for column in columns)) for indices in blocks]))


def rank_correlations(margins: Floats, seed: int) -> list[list[Estimate]]:
    """Estimate Spearman's rank correlation of every two of M margins, [M, N]: M rows of M, intervals as in `bootstrap`.

    Equal values share their mean rank. A margin with one value has no rank correlation, not even with itself.
    """
    size, n = margins.shape
    if n < 2:
        return [[Estimate(None)] * size for _ in range(size)]
    values = _spearman_matrix(margins)
    blocks = _resampled_indices(n, seed, RESAMPLES)
    resampled = np.stack([_spearman_matrix(margins[:, indices]) for block in blocks for indices in block])
    return [[_estimate(float(values[i, j]), resampled[:, i, j]) for j in range(size)] for i in range(size)]


def auroc_behind(best: Floats, margin: Floats, broken: Floats, seed: int) -> Estimate:
    """Compute the AUROC of the best margin minus that of another margin, [N] each; paired: on the same resamples."""
    return bootstrap(lambda b, m, y: auroc(b, y) - auroc(m, y), best, margin, broken, seed=seed)


def truth(margin: Floats, broken: Bools, distance: Floats, seed: int) -> Truth:
    """Measure how well a margin, [N], predicts which examples are broken and their distance to the boundary, [N]."""
    unbroken = (~broken).astype(float)
    return Truth(
        len(margin),
        bootstrap(auroc, margin, broken.astype(float), seed=seed),
        bootstrap(spearman, margin, unbroken, seed=seed),
        bootstrap(spearman, margin, distance, seed=seed),
    )


def critical_among(correct: Bools, broken_in_training: Bools, broken: Bools) -> Bools:
    """Select the examples that the training attack leaves correct and a stronger attack breaks, [N] bool.

    correct: classified correctly without an attack, [N].
    broken_in_training: misclassified at the end of the training attack, [N].
    broken: misclassified under any attack, [N].
    """
    return correct & ~broken_in_training & broken


def hidden(margin: Floats, safe: Bools, critical: Bools, seed: int) -> Hidden:
    """Locate the critical examples among a margin's values.

    margin: [N].
    safe: [N] bool, examples that stay correct under the training attack.
    critical: [N] bool, those of the safe examples that a stronger attack breaks.
    seed: of the bootstrap.
    """
    from scipy.stats import rankdata

    at_maximum = margin == margin.max()
    above_median = rankdata(margin) > (len(margin) + 1) / 2
    detection = bootstrap(auroc, margin[safe], critical[safe].astype(float), seed=seed)
    return Hidden(
        int(at_maximum.sum()), int((at_maximum & critical).sum()), int((above_median & critical).sum()), detection
    )


def quartiles(values: Floats) -> Quartiles:
    """Compute the three quartiles of values, [N] with N > 0."""
    low, median, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return Quartiles(low, median, high)


def _estimate(value: float, resampled: Floats) -> Estimate:
    """A value with the interval of its resamples, without those that are NaN: no broken example, or one value."""
    if np.isnan(value):
        return Estimate(None)
    low, high = np.percentile(resampled[~np.isnan(resampled)], (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def _spearman_matrix(rows: Floats) -> Floats:
    """Spearman's rank correlation of every two rows, [M, N] -> [M, M]; NaN where one is constant.

    All sums are exact, so the matrix is symmetric to the bit and its diagonal is 1.
    """
    from scipy.stats import rankdata

    ranks = rankdata(rows, axis=-1) - (rows.shape[-1] + 1) / 2
    products = ranks @ ranks.T
    squares = np.diagonal(products)
    with np.errstate(invalid="ignore"):
        rho: Floats = products / np.sqrt(np.outer(squares, squares))
    return rho


def _resampled_indices(n: int, seed: int, resamples: int) -> Iterator[npt.NDArray[np.integer]]:
    """Indices of bootstrap resamples in blocks of at most BLOCK_SIZE numbers, [block, n]."""
    rng = np.random.default_rng((seed, n))
    block = max(1, BLOCK_SIZE // n)
    for start in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - start), n))
