"""What a margin's values say: ties, spreads over paths, and how well they foretell who is broken. Arrays, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from robustmail.margin_lab.results import Continuity, Estimate, Hidden, Per, Spread, Truth

__all__ = [
    "auroc", "auroc_behind", "bootstrap", "continuity", "critical_among", "hidden", "quartiles", "spearman", "spread",
    "truth",
]  # fmt: skip

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Statistic = Callable[..., Floats]

RESAMPLES = 1000
AT_ONCE = 2_000_000  # numbers in a block of resamples
TIED, MOST, COARSE, NEAR = 0.01, 0.5, 1 / 3, 1e-3


def continuity(values: Floats) -> Continuity:
    """Ties among a margin's values, [N].

    constant: one value. discrete: more than half of the examples share their value, and either the values are steps of
    one size, fewer than examples, or more than a third of those between the smallest and the largest are shared. tied:
    more than 1 % of the examples share theirs, as probabilities do that round to 1. continuous: neither.
    """
    n = len(values)
    different, counts = np.unique(values, return_counts=True)
    ties = float(counts[counts > 1].sum() / n)
    verdict = "tied" if ties > TIED else "continuous"
    if len(counts) == 1:
        verdict = "constant"
    elif ties > MOST and (_even(different, n) or _coarse(counts > 1)):
        verdict = "discrete"
    return Continuity(len(counts), ties, float(counts.max() / n), verdict)


def _even(different: Floats, n: int) -> bool:
    """Are some values, in order, steps of one size, fewer than n? So few images as there may be, a count shows."""
    gaps = np.diff(different.astype(np.float64))
    steps = gaps / gaps.min()
    return bool(steps.sum() < n and np.allclose(steps, steps.round(), rtol=0, atol=NEAR) and len(steps) > 1)


def _coarse(shared: Bools) -> bool:
    """Are values shared, [values] in order, all over the range, not at its ends alone, where fine margins saturate?"""
    within = shared[1:-1]
    return float(within.mean()) > COARSE if len(within) else bool(shared.all())


def spread(columns: Floats) -> Spread:
    """How much the values of the same examples, [paths, N], differ between paths; the first row is the reference.

    value: sqrt(mean_i var_p m_ip) / std_i m_i0. rank: mean_i (max_p r_ip - min_p r_ip) / N, r = mid-ranks of a path.
    """
    from scipy.stats import rankdata

    over_paths, over_examples = float(np.sqrt(columns.var(0).mean())), float(columns[0].std())
    ranks = rankdata(columns, axis=1) / columns.shape[1]
    value = over_paths / over_examples if over_examples else 0.0 if over_paths == 0 else None
    return Spread(value, float((ranks.max(0) - ranks.min(0)).mean()))


def auroc(margin: Floats, broken: Floats) -> Floats:
    """P(margin of a broken example < margin of one that stands) + half of P(equal), over the last axis, in [0, 1].

    Mann and Whitney's U over its largest value; NaN where all or none are broken.
    """
    from scipy.stats import rankdata

    ranks = rankdata(-margin, axis=-1)
    n_broken, n = broken.sum(-1), broken.shape[-1]
    pairs = n_broken * (n - n_broken)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = ((ranks * broken).sum(-1) - n_broken * (n_broken + 1) / 2) / pairs
    return found


def spearman(a: Floats, b: Floats) -> Floats:
    """Spearman's rank correlation over the last axis, in [-1, 1]; NaN where one of the two is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (ranks[0] * ranks[1]).sum(-1) / np.sqrt((ranks[0] ** 2).sum(-1) * (ranks[1] ** 2).sum(-1))
    return found


def bootstrap(statistic: Statistic, *columns: Floats, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """A statistic of examples, [N] each, with the 2.5 and 97.5 % quantiles over resamples of the examples.

    The resamples are a function of (N, seed) alone, so that two margins on the same examples see the same ones.
    """
    n = len(columns[0])
    value = float(statistic(*columns)) if n else float("nan")
    if np.isnan(value) or n < 2:
        return Estimate(None)
    blocks = _resampled(n, seed, resamples)
    drawn = np.concatenate([statistic(*(column[some] for column in columns)) for some in blocks])
    low, high = np.percentile(drawn[~np.isnan(drawn)], (2.5, 97.5))  # a resample without a broken example says nothing
    return Estimate(value, float(low), float(high))


def auroc_behind(best: Floats, margin: Floats, broken: Floats, seed: int) -> Estimate:
    """AUROC of the best margin minus that of another one, paired: both on the same resamples."""
    return bootstrap(lambda b, m, y: auroc(b, y) - auroc(m, y), best, margin, broken, seed=seed)


def truth(margin: Floats, broken: Bools, distance: Floats, seed: int) -> Truth:
    """How well a margin foretells who is broken, and how far away; [N] each."""
    stands = (~broken).astype(float)
    return Truth(
        len(margin),
        bootstrap(auroc, margin, broken.astype(float), seed=seed),
        bootstrap(spearman, margin, stands, seed=seed),
        bootstrap(spearman, margin, distance, seed=seed),
    )


def critical_among(right: Bools, fell: Bools, broken: Bools) -> Bools:
    """The examples that training takes for safe and a stronger attack breaks, [N] bool.

    right: as they are. fell: at the end of the training attack. broken: by any attack.
    """
    return right & ~fell & broken


def hidden(margin: Floats, safe: Bools, critical: Bools, seed: int) -> Hidden:
    """Where the critical examples lie among a margin's values.

    safe, critical: [N] bool, examples that stand under the training attack; those of them that the strongest breaks.
    """
    from scipy.stats import rankdata

    top = margin == margin.max()
    upper = rankdata(margin) > (len(margin) + 1) / 2
    told = bootstrap(auroc, margin[safe], critical[safe].astype(float), seed=seed)
    return Hidden(int(top.sum()), int((top & critical).sum()), int((upper & critical).sum()), told)


def quartiles(values: Floats) -> Per:
    """The three quartiles of some values, [N] with N > 0."""
    low, median, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return Per(low, median, high)


def _resampled(n: int, seed: int, resamples: int) -> Iterator[npt.NDArray[np.integer]]:
    """Indices of resamples, [some, n], a block at a time."""
    rng = np.random.default_rng((seed, n))
    block = max(1, AT_ONCE // n)
    for start in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - start), n))
