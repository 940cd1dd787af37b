"""Statistics of margin values against closed forms and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from robustmail.margin_lab.statistics import (
    auroc,
    auroc_behind,
    bootstrap,
    continuity,
    critical_among,
    hidden,
    rank_correlations,
    spearman,
    spread,
    truth,
)


def test_ties_are_counted_and_named():
    result = continuity(np.array([0, 1, 1, 2, 2, 2, 3, 4, 5, 6], np.float32))
    assert (result.distinct, result.ties, result.largest, result.verdict) == (7, 0.5, 0.3, "tied")
    assert continuity(np.ones(5)).verdict == "constant"
    assert continuity(np.arange(100.0) % 5).verdict == "discrete"
    assert continuity(np.arange(100.0)).verdict == "continuous"


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("n", [10, 30, 110, 1000])
def test_a_count_is_discrete_among_few_images_too(n: int, scale: float):
    """As LPS on a robust model: most images at its ends, few on the way."""
    rng = np.random.default_rng(n)
    steps = np.where(rng.random(n) < 0.3, rng.integers(1, 10, n), rng.choice([0, 10], n))
    assert continuity((scale * steps).astype(np.float32)).verdict == "discrete"


@pytest.mark.parametrize("n", [10, 30, 110, 1000])
def test_a_fine_margin_that_saturates_is_tied_and_not_discrete(n: int):
    fine = np.random.default_rng(n).normal(0, 3, n).clip(-1, 1).astype(np.float32)
    assert len(np.unique(fine)) <= n / 2
    assert continuity(fine).verdict == "tied"
    assert continuity(np.r_[np.ones(n), 0.3]).verdict == "tied"


def test_coarse_values_need_not_be_evenly_spaced():
    assert continuity(np.arange(100.0) % 5 ** (1 + np.arange(100) % 2)).verdict == "discrete"
    assert continuity(np.array([0.0, 0, 1, 1])).verdict == "discrete"


def test_critical_examples_are_correct_under_the_training_attack_and_broken_by_another():
    right, fell, broken = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]], bool)
    assert critical_among(right, fell, broken).tolist() == [True, False, False, False]


def test_the_same_values_on_every_path_have_no_spread_and_swapped_ones_a_known_one():
    values = np.array([0.0, 1.0, 2.0, 3.0])
    same = spread(np.stack([values, values, values]))
    assert (same.value, same.rank) == (0.0, 0.0)
    swapped = spread(np.stack([values, values[::-1]]))  # ranks move by 3, 1, 1, 3 of 4
    assert swapped.rank == pytest.approx(2 / 4)
    assert swapped.value == pytest.approx(np.sqrt(np.mean([2.25, 0.25, 0.25, 2.25])) / values.std())
    assert spread(np.array([[1.0, 1.0], [1.0, 2.0]])).value is None


def test_a_perfect_margin_has_auroc_one_and_its_negative_none():
    broken = np.array([True, True, False, False, False])
    margin = np.array([-2.0, -1.0, 1.0, 2.0, 3.0])
    result = truth(margin, broken, margin + 5, seed=0)
    assert (result.auroc.value, result.auroc.low, result.auroc.high) == (1.0, 1.0, 1.0)
    assert result.distance.value == pytest.approx(1.0)
    assert truth(-margin, broken, margin, seed=0).auroc.value == 0.0


def test_auroc_and_rank_correlation_agree_with_the_libraries_ties_included():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    margin, broken, distance = rng.integers(0, 5, 200) * 1.0, rng.random(200) < 0.3, rng.random(200)
    assert auroc(margin, broken) == pytest.approx(roc_auc_score(broken, -margin))
    assert spearman(margin, distance) == pytest.approx(spearmanr(margin, distance).statistic)


def test_what_is_not_defined_is_none_and_not_a_number():
    none_broken = np.zeros(6, bool)
    result = truth(np.arange(6.0), none_broken, np.arange(6.0), seed=0)
    assert result.auroc.value is None
    assert result.distance.value == pytest.approx(1.0)
    assert bootstrap(auroc, np.empty(0), np.empty(0), seed=0).value is None


def test_the_difference_of_a_margin_with_itself_is_zero_in_every_resample():
    rng = np.random.default_rng(1)
    margin, broken = rng.random(50), (rng.random(50) < 0.5) * 1.0
    result = auroc_behind(margin, margin, broken, seed=3)
    assert (result.value, result.low, result.high) == (0.0, 0.0, 0.0)


def test_critical_examples_at_the_maximum_are_hidden_and_their_auroc_is_one_half():
    margin = np.array([0.0, 1, 10, 10, 10, 10])
    safe = margin == 10
    critical = np.array([False, False, True, True, False, False])
    result = hidden(margin, safe, critical, seed=0)
    assert (result.at_maximum, result.critical_at_maximum, result.above_median) == (4, 2, 2)
    assert result.auroc.value == 0.5


def margins_with_ties(n: int) -> np.ndarray:
    """A fine margin, a function of it that saturates, steps, their opposite, noise and a constant, [6, N]."""
    rng = np.random.default_rng(0)
    fine = rng.normal(size=n)
    steps = (3 * fine + rng.normal(size=n)).round()
    return np.stack([fine, np.minimum(np.exp(fine), 1.5), steps, -steps, rng.normal(size=n), np.ones(n)])


def test_the_rank_correlations_are_scipys_symmetric_and_one_on_the_diagonal():
    margins = margins_with_ties(60)
    values = np.array([[estimate.value for estimate in row] for row in rank_correlations(margins, 0)], float)
    assert np.isnan(values[-1]).all()
    assert np.isnan(values[:, -1]).all(), "a constant has no rank correlation"
    varied = values[:-1, :-1]
    np.testing.assert_allclose(varied, spearmanr(margins[:-1], axis=1).statistic, rtol=1e-12)
    assert (varied == varied.T).all()
    assert (np.diagonal(varied) == 1).all()
    assert varied[2, 3] == -1


def test_the_intervals_of_rank_correlations_are_those_of_the_bootstrap():
    margins = margins_with_ties(40)
    found = rank_correlations(margins, 7)
    for i, j in (0, 1), (2, 4), (5, 0):
        assert found[i][j] == found[j][i] == bootstrap(spearman, margins[i], margins[j], seed=7)
    assert (found[2][2].low, found[2][2].high) == (1, 1)


def test_fewer_than_two_images_have_no_rank_correlation():
    for n in 0, 1:
        assert [e.value for row in rank_correlations(np.zeros((2, n)), 0) for e in row] == [None] * 4
