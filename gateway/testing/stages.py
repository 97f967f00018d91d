"""What the unit tests of a stage need: sessions, transactions and recipients as the frontend makes them, a worker
with a clock that the test moves, and `build`, which makes a stage from the settings as they stand in a pipeline file.

    stage = build(NoFridays, {"except": ["boss@example.org"]})
    session = make_session(address="192.0.2.1", helo="client.example")
    verdict = await ask(stage.mail(session, make_transaction(session, "a@example.org")))

No socket is opened and no time passes. `build` checks what the pipeline compiler checks of a stage alone: its
settings, its methods against `hookspecs.py`, its expressions. For whole conversations see `gateway.testing.dialogue`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

import structlog
from pydantic import BaseModel

from gateway.dns.resolver import Failed, Resolver, Result, ReverseName
from gateway.facts import BUILT_IN, Expression, Fact
from gateway.pipeline.conditions import Conditions
from gateway.pipeline.registry import new_manager, register
from gateway.protocol.sasl import Credentials
from gateway.relay.tls import TlsInfo
from gateway.session import Listener, Recipient, Session, Transaction
from gateway.stage import Peer, Stage
from gateway.state.memory import MemoryStore
from gateway.state.store import Store
from gateway.verdicts import Cause, Refuse

S = TypeVar("S", bound=Stage)
T = TypeVar("T")

Parameters = tuple[tuple[str, str | None], ...]

TLS = TlsInfo(
    version="TLSv1.3", cipher="TLS_AES_256_GCM_SHA384", bits=256, sni=None, alpn=None, verified=False,
    verify_error="", certificate=None, resumed=False,
)  # fmt: skip
"""An encrypted connection without a client certificate, for `make_session(tls=TLS)`."""


class FakeClock:
    """A clock that only the test moves: call it for the time in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class FakeResolver(Resolver):
    """A resolver that knows what the test tells it, and nothing else exists.

    `names` maps an address to its verified name, or to a whole `ReverseName`; `asked` lists the addresses asked for.
    `silent` makes it wait for ever, as a name server that does not answer.
    """

    def __init__(self, names: Mapping[str, str | ReverseName] | None = None, *, silent: bool = False) -> None:
        super().__init__([("127.0.0.1", 53)])
        self.names: dict[str, str | ReverseName] = dict(names or {})
        self.silent = silent
        self.asked: list[str] = []

    async def forward_confirmed(self, address: str) -> ReverseName:
        """What `names` says, else a name that does not exist."""
        self.asked.append(address)
        if self.silent:
            await asyncio.get_running_loop().create_future()
        found = self.names.get(address)
        if isinstance(found, ReverseName):
            return found
        return ReverseName(None, None, "unavailable") if found is None else ReverseName(found, found, "ok")

    async def query(self, name: str, qtype: int) -> Result:
        """No server can be asked in a unit test."""
        self.asked.append(name)
        return Failed("network")


class FakeWorker:
    """The worker that `start` gets: a memory store and a clock of its own, both open to the test.

    `trusted` are the addresses that `trusts` knows.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        resolver: Resolver | None = None,
        clock: FakeClock | None = None,
        hostname: str = "gateway.example",
        trusted: Iterable[str] = (),
    ) -> None:
        self.fake_clock = clock if clock is not None else FakeClock()
        self._store: Store = store if store is not None else MemoryStore(self.fake_clock)
        self._resolver = resolver
        self._hostname = hostname
        self.trusted = set(trusted)
        self._log: structlog.typing.FilteringBoundLogger = structlog.get_logger("gateway.testing")

    @property
    def store(self) -> Store:
        return self._store

    @property
    def resolver(self) -> Resolver:
        if self._resolver is None:
            self._resolver = FakeResolver()
        return self._resolver

    @property
    def clock(self) -> Callable[[], float]:
        return self.fake_clock

    @property
    def log(self) -> structlog.typing.FilteringBoundLogger:
        return self._log

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @property
    def hostname(self) -> str:
        return self._hostname

    def trusts(self, address: str) -> bool:
        """Whether the test said so."""
        return address in self.trusted


class FakeAttempt:
    """One AUTH: its credentials, and the client's answers to the challenges a stage may send.

    `challenges` keeps what was sent. A challenge without an answer left raises IndexError. `upstream` is what
    `open_upstream` gives: a `ScriptedPeer`, or (the default) a refusal, as if none were there.
    """

    def __init__(
        self,
        credentials: Credentials,
        answers: Iterable[bytes] = (),
        *,
        number: int = 1,
        upstream: Peer | Refuse | None = None,
    ) -> None:
        self._upstream = upstream or Refuse(Cause.UPSTREAM_DOWN)
        self._credentials = credentials
        self._number = number
        self.user: str = getattr(credentials, "user", "")
        self._answers = list(answers)
        self.challenges: list[bytes] = []

    @property
    def credentials(self) -> Credentials:
        return self._credentials

    @property
    def number(self) -> int:
        return self._number

    async def challenge(self, data: bytes) -> bytes:
        """Keep the challenge, give the next answer."""
        self.challenges.append(data)
        return self._answers.pop(0)

    async def open_upstream(self) -> Peer | Refuse:
        """The upstream that was given."""
        return self._upstream


_numbers = iter(range(1, 1_000_000_000))


def make_session(
    *,
    address: str = "192.0.2.1",
    port: int = 40_000,
    listen: str = "smtp://192.0.2.25:25",
    pipeline: str = "test",
    helo: str = "",
    esmtp: bool = True,
    user: str = "",
    tls: TlsInfo | None = None,
    name: str = "",
    reverse_name: str = "",
    name_status: Literal["", "ok", "unavailable", "tempunavail"] = "",
    trusted: bool = False,
) -> Session:
    """A session of a client at `address`, in whatever state the arguments say.

    `user` is the login as typed, `listen` the listener's URL; `smtps://` is implicit TLS, `lmtp://` is LMTP.
    """
    number = next(_numbers)
    protocol = "lmtp" if listen.startswith("lmtp") else "smtp"
    listener = Listener(listen, protocol=protocol, implicit_tls=listen.startswith("smtps:"))
    session = Session(f"TEST-{number}", pipeline, listener, (address, port), ("192.0.2.25", 25), 0.0)
    session.hostname = "gateway.example"
    session.helo, session.esmtp = helo, esmtp and bool(helo)
    session.typed_user, session.user = user, user.lower()
    session.auth_mechanism = "PLAIN" if user else ""
    session.tls = tls
    session.trusted = trusted
    client = session.client
    client.name, client.reverse_name = name, reverse_name or name
    client.name_status = name_status or ("ok" if name else "")
    return session


def make_transaction(session: Session, sender: str = "sender@example.org", parameters: Parameters = ()) -> Transaction:
    """The session's next transaction, as a stage sees it in `mail`; `parameters` are those of MAIL."""
    session.transactions += 1
    transaction = Transaction(f"{session.id}.{session.transactions}", sender, parameters)
    session.transaction = transaction
    return transaction


def make_recipient(
    session: Session, address: str = "recipient@example.net", parameters: Parameters = (), *, accepted: bool = True
) -> Recipient:
    """One more recipient of the open transaction (made if there is none).

    `accepted` puts it among the transaction's recipients, as the frontend does after a 2xx reply.
    """
    transaction = session.transaction or make_transaction(session)
    recipient = Recipient(address, parameters, len(transaction.recipients))
    if accepted:
        transaction.recipients.append(recipient)
    return recipient


async def ask(answer: T | Awaitable[T]) -> T:
    """What a phase that may be a plain function or a coroutine answers."""
    if inspect.isawaitable(answer):
        return await cast("Awaitable[T]", answer)
    return answer


def build(
    stage_type: type[S],
    settings: object = None,
    *,
    id: str = "",
    folder: Path | None = None,
    facts: Sequence[Fact] = (),
    tables: Mapping[str, Iterable[str]] | None = None,
) -> S:
    """A stage made of its settings as they stand in a pipeline file: a mapping, the short form's value, or None.

    `id` defaults to the type's name in lower case, `folder` is where relative paths begin, `facts` are those of other
    stages that expressions may read, `tables` the lists that `listed(name, s)` knows. Expressions are bound;
    `start` is not called.

    Raises pydantic.ValidationError for wrong settings, `gateway.pipeline.registry.StageError` for a method that is no
    hook, `gateway.pipeline.conditions.ConditionError` for a wrong expression.
    """
    model = stage_type.Settings
    if settings is None:
        settings = {}
    elif not isinstance(settings, Mapping):
        if model.short_form is None:
            raise ValueError(f"{stage_type.__name__} has no short form; give a mapping")
        settings = {model.short_form: settings}
    validated = model.model_validate(settings, context={"folder": folder or Path.cwd()})
    stage = stage_type(validated)
    stage.id = id or stage_type.__name__.lower()
    register(new_manager(), stage)
    lists = {name: frozenset(entries) for name, entries in (tables or {}).items()}
    conditions = Conditions([*BUILT_IN, *facts], lambda name, text: text.lower() in lists.get(name, ()))
    for expression in _expressions(validated):
        conditions.compile(expression)
    return stage


def _expressions(value: object) -> Iterator[Expression]:
    """Every expression in settings, however deep."""
    if isinstance(value, Expression):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _expressions(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _expressions(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _expressions(item)
