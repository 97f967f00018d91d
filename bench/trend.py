"""A straight line through samples: how fast something grows, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple


class Trend(NamedTuple):
    """`slope` and its standard `error` are in units a second, `seconds` is the time that the samples span."""

    slope: float
    error: float
    mean: float
    seconds: float

    @property
    def growth(self) -> float:
        """By how much the line rises over the samples."""
        return self.slope * self.seconds


def fit(samples: Sequence[tuple[float, float]]) -> Trend:
    """Least squares through (second, value) pairs.

    The error takes samples as independent of each other. Those of memory are not, so it is too small there.
    Raises ValueError for fewer than three samples.
    """
    count = len(samples)
    if count < 3:
        raise ValueError("a trend needs three samples")
    middle = sum(at for at, _ in samples) / count
    mean = sum(value for _, value in samples) / count
    spread = sum((at - middle) ** 2 for at, _ in samples)
    if not spread:
        raise ValueError("a trend needs samples of more than one time")
    slope = sum((at - middle) * (value - mean) for at, value in samples) / spread
    rest = sum((value - mean - slope * (at - middle)) ** 2 for at, value in samples)
    return Trend(slope, sqrt(rest / (count - 2) / spread), mean, samples[-1][0] - samples[0][0])
