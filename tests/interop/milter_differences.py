"""Two legs of the same mail (milter_legs.py) compared, message by message: a difference is known, with a reason, or wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.interop.generated_messages import Message
from tests.interop.milter_legs import Outcome

COUNT = 200
Aspect = Literal["replies", "stored", "events", "macros"]
ASPECTS: tuple[Aspect, ...] = ("replies", "stored", "events", "macros")


@dataclass(frozen=True, slots=True)
class Difference:
    """Messages for which `holds` is true may differ in these aspects; `why` is what the documentation says."""

    name: str
    aspects: frozenset[Aspect]
    holds: Callable[[Message], bool]
    why: str


def having(*traits: str) -> Callable[[Message], bool]:
    """Messages with one of these traits."""
    return lambda message: not message.traits.isdisjoint(traits)


def compared(
    mail: Sequence[Message], one: dict[int, Outcome], other: dict[int, Outcome], known: Sequence[Difference]
) -> tuple[list[str], set[str]]:
    """Differences that are not known, as texts; names of the known ones that were seen."""
    unexplained: list[str] = []
    seen: set[str] = set()
    for message in mail:
        for aspect in ASPECTS:
            left, right = getattr(one[message.number], aspect), getattr(other[message.number], aspect)
            if left == right:
                continue
            names = {each.name for each in known if aspect in each.aspects and each.holds(message)}
            seen |= names
            if not names:
                traits = ", ".join(sorted(message.traits))
                unexplained.append(f"message {message.number} ({traits}): {aspect}\n{contrast(left, right)}")
    return unexplained, seen


def contrast(left: object, right: object) -> str:
    """Where two outcomes part, shortened."""
    if isinstance(left, list) and isinstance(right, list):
        pairs = enumerate(zip(left, right, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
        left, right = left[same : same + 3], right[same : same + 3]
    return f"  Postfix: {shortened(left)}\n  gateway: {shortened(right)}"


def shortened(value: object) -> str:
    """Its text, the middle of a long one left out."""
    text = repr(value)
    return text if len(text) < 800 else f"{text[:400]} ... {text[-400:]}"
