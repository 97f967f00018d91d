"""Cuts of a byte string, for tests that a codec does not care how the network divided its input."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

RANDOM_CUTS = 8


def splits(data: bytes, seed: int = 0) -> Iterator[list[bytes]]:
    """Yield lists of pieces that join to `data`: whole, byte by byte, then `RANDOM_CUTS` random divisions.

    The same `seed` gives the same cuts. Pieces are never empty, so empty data yields empty lists.
    """
    yield [data] if data else []
    yield [data[i : i + 1] for i in range(len(data))]
    random = Random(seed)
    for _ in range(RANDOM_CUTS):
        cuts = sorted(random.sample(range(1, len(data)), random.randint(0, min(len(data) - 1, 8)))) if data else []
        yield [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True) if i < j]
