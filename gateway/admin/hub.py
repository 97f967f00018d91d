"""How the admin process reaches the others: what it asks, whom, and what comes back.

The API knows nothing of processes but this. Operations and their arguments: `gateway/service/answers.py` for workers,
`Status` and its neighbours here for the supervisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypedDict

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What JSON can say."""

Recipients = Literal["workers", "one", "supervisor"]
"""Every worker of every generation (draining ones too); one worker of the newest; the supervisor."""


class Answer(TypedDict):
    """What one process said; generations count from 1, the supervisor is worker -1.

    `error` is empty, or says why there is no result: a status of HTTP and a text (`404 no pool named mx`) where the
    process refused, a text without one where it did not answer.
    """

    generation: int
    worker: int
    result: Json
    error: str


class Hub(Protocol):
    """Whoever can ask the other processes."""

    async def ask(self, op: str, args: Mapping[str, Json], to: Recipients) -> list[Answer]:
        """One answer for each process asked, also for those that did not answer in time; raises nothing."""
        ...


class WorkerStatus(TypedDict):
    """One worker as the supervisor sees it; `started` is in seconds since 1970, `state` serving or draining."""

    generation: int
    worker: int
    pid: int
    started: float
    state: str


class Status(TypedDict):
    """The supervisor's answer to `status`.

    `state` is starting, serving, reloading, draining or stopping; the newest generation accepts connections in
    serving and reloading. `reason` says what it waits for, or what went wrong last; `restarts` counts workers that
    were replaced.
    """

    pid: int
    started: float
    generation: int
    state: str
    reason: str
    restarts: int
    workers: list[WorkerStatus]


class GenerationStatus(TypedDict):
    """One of the list that `generations` gives; `state` is starting, serving, draining, ended or failed (`error`)."""

    generation: int
    pid: int
    started: float
    state: str
    workers: int
    error: str


class ReloadResult(TypedDict):
    """The supervisor's answer to `reload`, once it is known. After a failure the old generation goes on."""

    ok: bool
    generation: int
    error: str
