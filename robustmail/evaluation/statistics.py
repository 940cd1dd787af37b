"""What a count says: intervals of one accuracy, and the difference of two on the same images."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

__all__ = ["Z80", "Z95", "Paired", "paired", "wilson"]

Z95 = 1.959963984540054
Z80 = 0.8416212335729143  # of a power of 80 %


@functools.lru_cache(4096)  # a report asks for the same few counts again and again, and each takes a millisecond
def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


class Paired(NamedTuple):
    """Two verdicts on the same n images: `only_first` stand in the first alone, `only_second` in the second alone."""

    n: int
    only_first: int
    only_second: int
    difference: float
    """first - second, in [-1, 1]"""
    low: float
    """lower end of its 95 % interval"""
    high: float
    p: float
    """McNemar's exact test: how often chance alone splits the images on which the two differ at least so unevenly"""

    @property
    def tie(self) -> bool:
        """Can the two not be told apart at this n?"""
        return self.p >= 0.05


def paired(n: int, only_first: int, only_second: int) -> Paired:
    """The difference of two accuracies on the same images, with Agresti and Min's (2005) interval: half an image is
    added to each of the four cells, which keeps its coverage where the two seldom differ."""
    from scipy.stats import binomtest

    differ = only_first + only_second
    p = binomtest(only_first, differ, 0.5).pvalue if differ else 1.0
    b, c, wide = only_first + 0.5, only_second + 0.5, n + 2
    middle, half = (b - c) / wide, Z95 * math.sqrt(max(b + c - (b - c) ** 2 / wide, 0.0)) / wide
    difference = (only_first - only_second) / n
    return Paired(n, only_first, only_second, difference, max(-1.0, middle - half), min(1.0, middle + half), float(p))
