"""Questions on their way to several processes: who has yet to answer, what came, and until when to wait.

The supervisor asks its generations, a generation its workers; both collect what comes and pass it on as one answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.service.channel import Json

Party = TypeVar("Party")
Done = Callable[[list[Json]], None]


@dataclass(eq=False)
class _Question(Generic[Party]):
    waiting: list[Party]
    answers: list[Json]
    until: float
    done: Done


class Questions(Generic[Party]):
    """`missing(party, why)` is what stands for an answer that does not come; `clock` gives seconds."""

    def __init__(self, missing: Callable[[Party, str], Json], clock: Callable[[], float] = time.monotonic) -> None:
        self._missing = missing
        self._clock = clock
        self._number = 0
        self._open: dict[int, _Question[Party]] = {}

    def ask(self, parties: Iterable[Party], seconds: float, done: Done) -> int:
        """Note a question; its number. `done` gets all answers, at the latest with the first `tend` after `seconds`."""
        self._number += 1
        self._open[self._number] = _Question(list(parties), [], self._clock() + seconds, done)
        self._finish_answered()
        return self._number

    def answered(self, number: Json, party: Party, answers: Iterable[Json]) -> None:
        """What came of this party; of one that is not asked, or not any more, it is forgotten."""
        question = self._open.get(number) if isinstance(number, int) else None
        if question is not None and party in question.waiting:
            question.waiting.remove(party)
            question.answers += answers
            self._finish_answered()

    def without(self, party: Party, why: str) -> None:
        """The party is gone."""
        for question in self._open.values():
            if party in question.waiting:
                question.waiting.remove(party)
                question.answers.append(self._missing(party, why))
        self._finish_answered()

    def tend(self, why: str) -> None:
        """Wait no longer for those that are late. Call it about every half second."""
        now = self._clock()
        for question in self._open.values():
            if now >= question.until:
                question.answers += [self._missing(party, why) for party in question.waiting]
                question.waiting.clear()
        self._finish_answered()

    def _finish_answered(self) -> None:
        for number in [number for number, question in self._open.items() if not question.waiting]:
            question = self._open.pop(number)
            question.done(question.answers)
