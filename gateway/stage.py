"""What a stage is: a class with settings and methods named after phases (`hookspecs.py` has their contract)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from gateway.facts import Fact
from gateway.protocol.sasl import Certificate, Digest, Exchange, Password, Token
from gateway.protocol.smtp import Reply

if TYPE_CHECKING:
    import asyncio

    import structlog

    from gateway.dns.resolver import Resolver
    from gateway.state.store import Store
    from gateway.verdicts import Cause, Refuse


class Kind(Enum):
    """What a stage is for; `Allow` skips checks only, and guards cannot be told to fail open."""

    GUARD = "guard"
    CHECK = "check"
    PLUMBING = "plumbing"


class Settings(BaseModel):
    """Base of every stage's settings: unknown keys are errors, values do not change after the load.

    `short_form` names the one setting that `name: value` sets in a pipeline file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    short_form: ClassVar[str | None] = None


StageSettings = Settings


class Worker(Protocol):
    """What `start` gets: the services of the worker process."""

    @property
    def store(self) -> Store: ...
    @property
    def resolver(self) -> Resolver: ...
    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def log(self) -> structlog.typing.FilteringBoundLogger: ...
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def hostname(self) -> str: ...
    def trusts(self, address: str) -> bool:
        """Whether the address is in the pipeline's `trust`, or one of its upstream servers', as far as looked up."""
        ...


class Attempt(Protocol):
    """One login of a client: what it gave, and a way to send it a further challenge before the end.

    `credentials` are an `Exchange` where the stage says `relays_logins`: the mechanism and the client's initial
    response, decoded, None without one. `challenge` sends bytes, before base64, and gives the client's decoded answer;
    it raises PeerError where the client gives up or sends no base64. `open_upstream` opens the session's upstream
    with nobody logged in there; it stays the session's if the stage says that the login succeeded. `user` is whom the
    client says it is, for the log of a failure; a stage that relays an exchange sets it as far as it sees it.
    """

    user: str

    @property
    def credentials(self) -> Password | Digest | Token | Certificate | Exchange: ...
    @property
    def number(self) -> int: ...
    async def challenge(self, data: bytes) -> bytes: ...
    async def open_upstream(self) -> Peer | Refuse: ...


@dataclass(frozen=True, slots=True)
class SaslStep:
    """What an upstream answers in a SASL exchange: its next challenge, decoded, or its final reply (235, 4xx, 5xx)."""

    challenge: bytes | None
    reply: Reply | None


class Peer(Protocol):
    """The upstream server while its prelude runs.

    `protocol` is smtp, lmtp, imap or pop3. `local` is true over unix sockets and loopback; `tls` once the connection is
    encrypted and, where the pool asks for it, verified; `takes_secrets` where either holds or the pool allows clear
    text: nothing secret may be said elsewhere. `extensions` is the last EHLO (IMAP, POP3: the capabilities): keyword
    to parameters. `logged_in`: a login on this connection succeeded.

    `command` is one line and its reply; of stores it has the codes 250 (OK), 550 (NO, -ERR), 450 (where it is
    temporary), 500 (BAD), 334 (a continuation) and 421 (BYE), and IMAP's tag is added. `login` says user and password
    as the server wants them and gives 2xx, or a refusal; 504 where it takes no password. `sasl` begins an exchange
    with a message that is not encoded yet, `sasl_answer` goes on, `sasl_cancel` gives up. They raise LocalError for
    line ends and NUL where those could become commands.
    """

    @property
    def url(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def local(self) -> bool: ...
    @property
    def tls(self) -> bool: ...
    @property
    def takes_secrets(self) -> bool: ...
    @property
    def logged_in(self) -> bool: ...
    @property
    def extensions(self) -> dict[str, str]: ...
    @property
    def address(self) -> tuple[str, int]: ...
    @property
    def local_address(self) -> tuple[str, int]: ...
    @property
    def greeting(self) -> Reply | None: ...
    def write(self, data: bytes) -> None: ...
    async def command(self, line: bytes, *, secret: bool = False) -> Reply: ...
    async def hello(self, name: str = "", *, esmtp: bool = True) -> Reply: ...
    async def login(self, user: bytes, password: bytes) -> Reply: ...
    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep: ...
    async def sasl_answer(self, data: bytes) -> SaslStep: ...
    async def sasl_cancel(self) -> SaslStep: ...
    def before_mail(self, line: bytes, expect: Callable[[Reply], None] | None = None) -> None: ...
    def identified(self) -> None: ...


class Timed:
    """A subject whose stage may wait for the client, too: `clock` stands still meanwhile, `waited` sums it up.

    `clock` is the stage's time-out while it is being asked.
    """

    __slots__ = ("clock", "waited")

    def __init__(self) -> None:
        self.clock: asyncio.Timeout | None = None
        self.waited = 0.0

    @contextmanager
    def client_s_turn(self, now: Callable[[], float]) -> Iterator[None]:
        """While it lasts the client is waited for, not the stage; `now` is the loop's time."""
        clock = self.clock
        when = clock.when() if clock is not None else None
        begun = now()
        if clock is not None:
            clock.reschedule(None)
        try:
            yield
        finally:
            waited = now() - begun
            self.waited += waited
            if clock is not None and when is not None and not clock.expired():
                clock.reschedule(when + waited)


class Outcome:
    """What was decided in a phase, for `settled`: the phase, the reply's first digit, cause and stage if refused.

    `recipient` is the address in `rcpt` where it was refused. Phase `command`: what belongs to no phase, such as
    protocol errors of the client (cause PROTOCOL, without a reply).
    """

    __slots__ = ("cause", "phase", "recipient", "reply", "reply_class", "stage")

    def __init__(
        self, phase: str, reply_class: int, cause: Cause | None, stage: str, reply: Reply | None, recipient: str = ""
    ) -> None:
        self.recipient = recipient
        self.phase = phase
        self.reply_class = reply_class
        self.cause = cause
        self.stage = stage
        self.reply = reply


class Stage:
    """A configured step of the chain. One object per configured stage and worker.

    Subclasses set `Settings` and implement phases; every public method must be one of `hookspecs.py`.
    `facts` are those of its own (`<id>.<name>`), `provides` names facts of the table that it fills in,
    `requires` those it reads. `identity_guard` stages take only `mode: off | enforce`.
    """

    Settings: ClassVar[type[Settings]] = Settings
    kind: ClassVar[Kind] = Kind.CHECK
    facts: ClassVar[tuple[Fact, ...]] = ()
    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    terminal: ClassVar[bool] = False
    decides_identity: ClassVar[bool] = False  # auth_*, route, upstream_*, terminal: mode is off or enforce
    never_pass: ClassVar[bool] = False  # on_error: pass is a load error
    limits_recipients: ClassVar[bool] = False  # counts for the relay guard
    identifies_client: bool = False  # hands the client's identity upstream: counts for the relay guard
    own_credentials: bool = False  # logs in upstream as the gateway: to the relay guard, no xclient makes up for that
    names_servers: bool = False  # may choose servers that no pool names
    refuse_now: ClassVar[bool] = False  # its early refusals are not postponed to RCPT
    counts_received: ClassVar[bool] = False  # asks the relay to count Received fields (setting `max_hops`)
    sends_proxy_header: ClassVar[bool] = False  # health checks of its pipeline send one, too
    login_decides: bool = False  # the login is the upstream's to decide: it is opened before 235
    only_without_login: ClassVar[bool] = False  # its mail, rcpt and route matter for clients without a login alone
    relays_logins: ClassVar[bool] = False  # it takes exchanges as they are, for the upstream to judge
    required: bool = False  # MAIL before AUTH is 530 (auth stages)
    timeout: float = 5.0  # of one call, in seconds; the setting `timeout` replaces it

    id: str
    mode: Literal["off", "observe", "enforce"] | int = "enforce"
    on_error: Literal["tempfail", "reject", "disconnect", "pass"] = "tempfail"

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings

    @property
    def first_only(self) -> bool:
        """Its `mail` matters for the first MAIL alone: what it decides cannot change later."""
        return False
