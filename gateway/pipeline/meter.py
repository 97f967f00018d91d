"""What stages answer and how long they take, counted: one `Meter` a step, made when a pipeline is prepared.

The numbers are written in place, without a call each, because every stage of every command passes here. Sessions that
are traced have chains with a `RecordingMeter`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from gateway.observe import metrics
from gateway.observe.metrics import METRICS
from gateway.observe.traces import TracedSession
from gateway.session import Seen, Session
from gateway.verdicts import (
    Allow,
    Authenticated,
    Discard,
    Edit,
    Hold,
    Refuse,
    Rewrite,
    Upstream,
)

NAMES: Final[dict[type, str]] = {
    type(None): "pass",
    Hold: "hold",
    Refuse: "refuse",
    Allow: "allow",
    Rewrite: "rewrite",
    Edit: "edit",
    Authenticated: "authenticated",
    Upstream: "upstream",
    Discard: "discard",
    Exception: "error",
}
"""What each answer is called; an exception is a stage that failed."""
MAX_TRAIL: Final = 2000
"""Answers of stages that a session remembers; of more the older half is forgotten."""

_BOUNDS: Final = METRICS["gateway_stage_seconds"].bounds


class Answers(dict[type, tuple[Seen, int]]):
    """Of a step in one mode: what is remembered of each kind of answer, and where it is counted."""

    __slots__ = ("_pipeline", "_seen")

    def __init__(self, pipeline: str, stage: str, phase: str, mode: str) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._seen = Seen(stage, phase, "pass", mode)

    def __missing__(self, kind: type) -> tuple[Seen, int]:
        name = next(name for known, name in NAMES.items() if issubclass(kind, known))
        seen = self._seen._replace(verdict=name)
        count = metrics.counter(
            "gateway_stage_verdicts_total",
            pipeline=self._pipeline, stage=seen.stage, phase=seen.phase, verdict=name, mode=seen.mode,
        )  # fmt: skip
        answer = self[kind] = (seen, count.cell[1])
        return answer


class Meter:
    """Counts the answers of one stage in one phase."""

    __slots__ = ("_cells", "_enforced", "_observed", "_places", "_sum")

    def __init__(self, pipeline: str, stage: str, phase: str) -> None:
        seconds = metrics.histogram("gateway_stage_seconds", pipeline=pipeline, stage=stage, phase=phase)
        self._cells, self._places, self._sum = seconds.places
        self._enforced = Answers(pipeline, stage, phase, "enforce")
        self._observed = Answers(pipeline, stage, phase, "observe")

    def answered(self, session: Session, kind: type, enforced: bool, seconds: float) -> None:
        """The stage gave an answer of this type (see `NAMES`), in so many seconds."""
        seen, place = self._enforced[kind] if enforced else self._observed[kind]
        cells = self._cells
        cells[place] += 1
        cells[self._places[bisect_left(_BOUNDS, seconds)]] += 1
        cells[self._sum] += int(seconds * 1_000_000 + 0.5)  # to the nearest: many stages take about one
        _remember(session, seen)

    def added(self, session: Session, kind: type, enforced: bool) -> None:
        """One more answer within the time of another: a phase that was missed, an edit that cannot be made."""
        seen, place = self._enforced[kind] if enforced else self._observed[kind]
        self._cells[place] += 1
        _remember(session, seen)


def _remember(session: Session, seen: Seen) -> None:
    trail = session.trail
    if trail is None:
        session.trail = [seen]
    else:
        trail.append(seen)
        if len(trail) > MAX_TRAIL:
            del trail[: MAX_TRAIL // 2]


class RecordingMeter(Meter):
    """Counts in the same places, and writes down when the stage was asked if the session is traced."""

    __slots__ = ()

    def answered(self, session: Session, kind: type, enforced: bool, seconds: float) -> None:
        """The stage gave an answer."""
        super().answered(session, kind, enforced, seconds)
        self._record(session, seconds)

    def added(self, session: Session, kind: type, enforced: bool) -> None:
        """One more answer."""
        super().added(session, kind, enforced)
        self._record(session, 0.0)

    @staticmethod
    def _record(session: Session, seconds: float) -> None:
        if isinstance(session, TracedSession) and session.trail:
            session.trace.answered(session.trail[-1], seconds, session.open_transaction)
