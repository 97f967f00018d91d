"""Limit how often something happens: connections, messages, recipients, failed logins, bytes; for whatever `per` says.

`per` is a CEL expression that gives the key to count by: `client.address` (default; an IPv6 client counts as its /64),
`auth.user`, `rcpt.domain`, `client.address + " " + mail.from`. An empty key is not counted: before login there is no
`auth.user`. With several limits each must have room. Rates are sliding windows, an approximation whose bounds the
architecture states; what was refused is not counted.

| count | asked in | counted | over the limit |
|---|---|---|---|
| connections | connect | once a session and key | 421 4.7.28, closed |
| messages | MAIL | once a transaction and key | 450 4.7.28 |
| recipients | RCPT | each RCPT | 450 4.7.28 |
| auth_failures | AUTH | when a verifier said no | 454 4.7.0, and no verifier is asked |
| bytes | MAIL | the size of each message, when it is over | 450 4.7.28 until there is room again |

Facts that are known later move the question there: connections per `auth.user` are counted at the first MAIL, messages
per `rcpt.domain` at RCPT. `auth_failures` must stand above the auth stages; `per: auth.user` there means the user that
was tried.

Costs a look-up, without waiting where the store is this process's memory. When a shared store does not answer,
`on_error` decides; what is only counted after the fact is then not counted, which is logged when it begins.

    stages:
      - rate_limit: {count: connections, limit: [30/minute, 300/hour], exempt: [10.0.0.0/8]}
      - rate_limit: {id: guesses, count: auth_failures, per: auth.user, limit: 10/hour}
      - rate_limit: {count: messages, per: auth.user, limit: 100/hour}
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from gateway import (
    Attempt,
    Cause,
    Certificate,
    CidrList,
    Exchange,
    Expression,
    Hit,
    Kind,
    NetworkTable,
    Outcome,
    Phase,
    Rate,
    Recipient,
    Refuse,
    Scope,
    Session,
    Settings,
    Stage,
    TextExpression,
    Transaction,
    Window,
    Worker,
    client_key,
)
from gateway.protocol.sasl import Observer

MAX_KEY = 128  # longer ones are hashed: a client may send names of any length

_ROUNDING = 1e-9  # estimates are sums of shares
_LATER_THAN_AUTH = re.compile(r"\b(auth|mail|rcpt)\.")
_RATE = {"type": "string", "description": "A rate: 100/hour, 30/minute, 5/10s.", "x-kind": "rate"}

_Refusal = Callable[[str], Refuse]
_Answer = Refuse | Awaitable[Refuse | None] | None


def _as_list(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


_Rates = Annotated[
    tuple[Rate, ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_RATE, {"type": "array", "items": _RATE, "minItems": 1}]}),
]


class RateLimitSettings(Settings):
    """What is counted, by which key, and how much of it is allowed."""

    count: Literal["connections", "messages", "recipients", "auth_failures", "bytes"] = Field(
        description="What is counted."
    )
    per: TextExpression = Field(
        default_factory=lambda: Expression("client.address", "string"),
        description="CEL expression of the key to count by; an empty key is not counted.",
    )
    limit: _Rates = Field(description="A rate such as 100/hour, or a list of rates that must all have room.")
    exempt: CidrList = Field((), description="Clients that are neither limited nor counted.")

    @model_validator(mode="after")
    def _known_at_auth(self) -> Self:
        text = self.per.text.strip()
        if self.count == "auth_failures" and text != "auth.user" and _LATER_THAN_AUTH.search(text):
            raise ValueError("per: not known when AUTH fails; write auth.user alone, or facts of the client and helo")
        return self


class RateLimit(Stage):
    """Limit how often something happens, for whatever `per` says."""

    Settings = RateLimitSettings
    kind = Kind.GUARD
    settings: RateLimitSettings
    _worker: Worker

    def __init__(self, settings: RateLimitSettings) -> None:
        super().__init__(settings)
        self._windows = tuple(Window(rate.limit, rate.period) for rate in settings.limit)
        self._exempt = NetworkTable.of(settings.exempt)
        text = settings.per.text.strip()
        self._by_address = text == "client.address"
        self._by_user = text == "auth.user" and settings.count == "auth_failures"
        self._noting: set[asyncio.Task[None]] = set()
        self._lost = False  # the last count was, and that is in the log

    @property
    def first_only(self) -> bool:
        """A session is counted at its first MAIL; later ones need not be read for this."""
        return self.settings.count == "connections" and self.settings.per.scope is Scope.SESSION

    async def start(self, worker: Worker) -> None:
        """Keep the worker, for its store. Raises ValueError if the key is known only after RCPT."""
        if self.settings.per.phase > Phase.RCPT:
            raise ValueError(f"{self.id}: per: {self.settings.per.text} is known only after the last question")
        self._worker = worker

    async def stop(self) -> None:
        """Let counts that are still under way arrive."""
        await asyncio.gather(*self._noting)

    def phases(self) -> Sequence[str]:
        """The first phase in which both the thing counted and the key are known."""
        count, known = self.settings.count, self.settings.per.phase
        if count == "auth_failures":
            return ["auth"]
        if count == "recipients" or known >= Phase.RCPT:
            return ["rcpt"]
        if count in ("messages", "bytes") or known >= Phase.AUTH:
            return ["mail"]  # the user is known only after `auth`
        return ["connect"] if known is Phase.CONNECT else ["helo"]

    def connect(self, session: Session) -> _Answer:
        """Connections by what is known of the client."""
        return self._ask(session, None, None)

    def helo(self, session: Session) -> _Answer:
        """Connections by TLS or HELO facts."""
        return self._ask(session, None, None)

    def auth(self, session: Session, attempt: Attempt) -> _Answer:
        """Remember whose failure this may become; refuse when there were too many."""
        if session.client.address in self._exempt:
            return None
        key = self._store_key(session, _user_tried(attempt)) if self._by_user else self._key(session, None, None)
        session.state(self, list[str])[:] = [key]
        return self._probe(key, _too_many_failures) if key else None

    def mail(self, session: Session, transaction: Transaction) -> _Answer:
        """Messages; bytes so far; connections by user."""
        return self._ask(session, transaction, None)

    def rcpt(self, session: Session, recipient: Recipient) -> _Answer:
        """Recipients; the others by facts of the recipient."""
        return self._ask(session, session.transaction, recipient)

    def settled(self, session: Session, outcome: Outcome) -> None:
        """Count a failed AUTH."""
        if outcome.phase == "auth" and outcome.cause is Cause.AUTH_FAILED and session.has_state(self):
            for key in session.state(self, list[str]):
                self._note(key, 1)

    def reset(self, session: Session, transaction: Transaction) -> None:
        """Count the bytes of a message."""
        if self.settings.count != "bytes" or not transaction.size or session.client.address in self._exempt:
            return
        if self.settings.per.scope is Scope.RECIPIENT:
            keys = {self._key(session, transaction, recipient) for recipient in transaction.recipients}
        else:
            keys = {self._key(session, transaction, None)}
        for key in keys:
            self._note(key, transaction.size)

    def _ask(self, session: Session, transaction: Transaction | None, recipient: Recipient | None) -> _Answer:
        if session.client.address in self._exempt:
            return None
        key = self._key(session, transaction, recipient)
        if not key:
            return None
        count = self.settings.count
        if count == "bytes":
            return self._probe(key, _limited)
        if count == "recipients":
            return self._hit(key, None)
        holder = session if count == "connections" or transaction is None else transaction
        counted: set[str] = holder.state(self, set)
        return None if key in counted else self._hit(key, counted)

    def _hit(self, key: str, counted: set[str] | None) -> _Answer:
        """Count one; refuse if there is no room for it."""
        store = self._worker.store.immediate
        if store is None:
            return self._hit_later(key, counted)
        return self._counted(key, store.hit_now(key, self._windows), counted)

    async def _hit_later(self, key: str, counted: set[str] | None) -> Refuse | None:
        return self._counted(key, await self._worker.store.hit(key, self._windows), counted)

    def _counted(self, key: str, hit: Hit, counted: set[str] | None) -> Refuse | None:
        if not hit.allowed:
            return _limited(key, disconnect=self.settings.count == "connections")
        if counted is not None:
            counted.add(key)
        return None

    def _probe(self, key: str, refuse: _Refusal) -> _Answer:
        """Refuse if there is no room for one more; count nothing."""
        store = self._worker.store.immediate
        if store is None:
            return self._probe_later(key, refuse)
        return refuse(key) if self._room(store.hit_now(key, self._windows, 0)) < 1 else None

    async def _probe_later(self, key: str, refuse: _Refusal) -> Refuse | None:
        hit = await self._worker.store.hit(key, self._windows, 0)
        return refuse(key) if self._room(hit) < 1 else None

    def _room(self, hit: Hit) -> int:
        """How many more fit into every window."""
        pairs = zip(self._windows, hit.counts, strict=True)
        return min(int(window.limit - count + _ROUNDING) for window, count in pairs)

    def _note(self, key: str, n: int) -> None:
        """Count what has happened already; where it does not fit, fill up what room there is."""
        if not key:
            return
        store = self._worker.store.immediate
        if store is None:
            task = self._worker.loop.create_task(self._note_later(key, n))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)
            return
        hit = store.hit_now(key, self._windows, n)
        if not hit.allowed and (room := self._room(hit)) > 0:
            store.hit_now(key, self._windows, room)

    async def _note_later(self, key: str, n: int) -> None:
        store, room = self._worker.store, n
        try:
            while room > 0:  # it shrinks: others may count between two calls
                hit = await store.hit(key, self._windows, room)
                if hit.allowed:
                    break
                room = self._room(hit)
        except Exception as error:
            if not self._lost:
                self._worker.log.warning("not_counted", stage=self.id, count=self.settings.count, error=str(error))
            self._lost = True
        else:
            self._lost = False

    def _key(self, session: Session, transaction: Transaction | None, recipient: Recipient | None) -> str:
        """The store's key for `per` here; empty if it is not to be counted."""
        if self._by_address:
            return self._store_key(session, client_key(session.client.address))
        return self._store_key(session, str(self.settings.per.evaluate(session, transaction, recipient)))

    def _store_key(self, session: Session, key: str) -> str:
        if not key:
            return ""
        if len(key) > MAX_KEY:
            key = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return f"rate:{session.pipeline}:{self.id}:{key}"


def _user_tried(attempt: Attempt) -> str:
    """Whom the client says it is; of an exchange that is relayed, as far as its first message tells."""
    credentials = attempt.credentials
    if isinstance(credentials, Certificate):
        return credentials.authzid.lower()
    if isinstance(credentials, Exchange):
        observer = Observer(credentials.mechanism)
        if credentials.initial is not None:
            observer.message(credentials.initial)
        return observer.user.lower()
    return credentials.user.lower()


def _limited(key: str, *, disconnect: bool = False) -> Refuse:
    return Refuse(Cause.RATE_LIMIT, disconnect=disconnect, log=key)


def _too_many_failures(key: str) -> Refuse:
    return Refuse(Cause.AUTH_UNAVAILABLE, text="too many authentication failures; try again later", log=key)
