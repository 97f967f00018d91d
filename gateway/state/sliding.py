"""The arithmetic of a sliding window of two counters (see `store.py`), the same for every store that counts itself.

Bucket `i` of a period covers the seconds from `i * period` to `(i + 1) * period` of the store's clock.
"""

from __future__ import annotations

import math
from typing import Final

ROUNDING: Final = 1e-9
"""A hit exactly at its retry_after must not fail for a last binary digit."""


def bucket(now: float, period: float) -> int:
    """The number of the bucket that runs. Raises ValueError if the period is not positive."""
    if not period > 0:
        raise ValueError(f"a window's period is {period!r}, not a positive number of seconds")
    return int(now // period)


def share_inside(number: int, period: float, now: float) -> float:
    """The share of the bucket before `number` that is still inside the window, 0 to 1."""
    share = ((number + 1) * period - now) / period
    return share if 0.0 <= share <= 1.0 else (0.0 if share < 0.0 else 1.0)


def wait(limit: int, n: int, running: int, before: int, share: float, period: float) -> float:
    """Seconds until `n` more hits fit, when they do not fit now and nobody else hits."""
    if n > limit:
        return math.inf
    if running + n <= limit:
        return (share - (limit - running - n) / before) * period
    return (share + max(0.0, 1.0 - (limit - n) / running)) * period
