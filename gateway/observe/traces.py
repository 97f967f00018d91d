"""What a sampled session writes down for its trace: when its stages, upstream connections and messages began and ended.

Whether a session is sampled is decided once, at its begin. One that is has a type of its own, `TracedSession`, and asks
the chain that records (`Chain.recording`); all others do nothing for traces at all. Spans are made of it when the
session is over: `spans.py`, which alone needs OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.session import Address, Listener, Seen, Session

if TYPE_CHECKING:
    from gateway.session import Transaction

MAX_CHILDREN: Final = 200
"""Children that a session's span may have; more are counted and left out. All are made in one turn of the loop."""


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where spans go (OTLP over HTTP), the share of sessions (0 to 1), and headers for the collector (secret)."""

    endpoint: str
    sample: float
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    service_name: str = "gateway"


class Answered(NamedTuple):
    """A stage was asked; `transaction` is the number of the message that was open, or 0. Times are `perf_counter`'s."""

    seen: Seen
    begun: float
    ended: float
    transaction: int


class Dialed(NamedTuple):
    """A new upstream connection was tried; `result` as in `gateway_upstream_connections_total`."""

    pool: str
    host: str
    port: int
    result: str
    begun: float
    ended: float
    transaction: int


class Carried(NamedTuple):
    """A message was answered, or left by its client; `code` of the reply is 0 then."""

    number: int
    id: str
    size: int
    recipients: int
    code: int
    begun: float
    ended: float


class Trace:
    """One session's. The clocks are read together once, so that all times have one order whatever the host's does."""

    __slots__ = ("_asked", "answers", "begun", "carried", "dialed", "left_out", "wall")

    def __init__(self) -> None:
        self.wall = time_ns()
        self.begun = perf_counter()
        self.answers: list[Answered] = []
        self.dialed: list[Dialed] = []
        self.carried: list[Carried] = []
        self.left_out = 0
        self._asked: dict[str, float] = {}

    def at(self, moment: float) -> int:
        """A time of `perf_counter` in nanoseconds since 1970."""
        return self.wall + int((moment - self.begun) * 1e9)

    @property
    def unanswered(self) -> dict[str, float]:
        """Stages that were still being asked when the session ended, and since when."""
        return self._asked

    def asked(self, stage: str) -> None:
        """A stage is asked from now on."""
        self._asked[stage] = perf_counter()

    def answered(self, seen: Seen, seconds: float, transaction: int) -> None:
        """It answered, after so many seconds of its own."""
        now = perf_counter()
        begun = self._asked.pop(seen.stage, now - seconds)
        if self._room():
            self.answers.append(Answered(seen, begun, now, transaction))

    def connected(self, pool: str, host: str, port: int, result: str, begun: float, transaction: int) -> None:
        """An attempt to connect to an upstream server ended; `host` may be the path of a unix socket, `port` 0 then."""
        if self._room():
            self.dialed.append(Dialed(pool, host, port, result, begun, perf_counter(), transaction))

    def transaction(self, number: int, transaction: Transaction, begun: float) -> None:
        """The session's message of this number is over."""
        if self._room():
            code = transaction.reply.code if transaction.reply is not None else 0
            recipients = len(transaction.recipients)
            self.carried.append(
                Carried(number, transaction.id, transaction.size, recipients, code, begun, perf_counter())
            )

    def _room(self) -> bool:
        if len(self.answers) + len(self.dialed) + len(self.carried) < MAX_CHILDREN:
            return True
        self.left_out += 1
        return False


class TracedSession(Session):
    """A session that was sampled."""

    __slots__ = ("trace",)

    def __init__(
        self, id: str, pipeline: str, listener: Listener, peer: Address, local: Address, started: float
    ) -> None:
        super().__init__(id, pipeline, listener, peer, local, started)
        self.trace = Trace()

    @property
    def open_transaction(self) -> int:
        """The number of the message that is open, or 0."""
        return self.transactions if self.transaction is not None else 0
