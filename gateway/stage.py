"""What a stage is: a class with settings and methods named after phases (`hookspecs.py` has their contract)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from gateway.facts import Fact
from gateway.protocol.sasl import Certificate, Digest, Password, Token
from gateway.protocol.smtp import Reply

if TYPE_CHECKING:
    import asyncio

    import structlog

    from gateway.dns.resolver import Resolver
    from gateway.state.store import Store
    from gateway.verdicts import Cause


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


class Attempt(Protocol):
    """One AUTH of a client: what it gave, and a way to send a failure challenge (OAuth) before the end."""

    @property
    def credentials(self) -> Password | Digest | Token | Certificate: ...
    @property
    def number(self) -> int: ...
    async def challenge(self, data: bytes) -> bytes: ...


class Peer(Protocol):
    """The upstream server while its prelude runs.

    `local` is true over unix sockets and loopback; `tls` once the connection is encrypted and, where the pool
    asks for it, verified. `extensions` is the last EHLO: keyword to parameters.
    """

    @property
    def url(self) -> str: ...
    @property
    def local(self) -> bool: ...
    @property
    def tls(self) -> bool: ...
    @property
    def extensions(self) -> dict[str, str]: ...
    @property
    def address(self) -> tuple[str, int]: ...
    @property
    def local_address(self) -> tuple[str, int]: ...
    def write(self, data: bytes) -> None: ...
    async def command(self, line: bytes, *, secret: bool = False) -> Reply: ...
    async def hello(self, name: str = "") -> Reply: ...
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


class Outcome:
    """What was decided in a phase, for `settled`: the phase, the reply's first digit, cause and stage if refused.

    `recipient` is the address in `rcpt` where it was refused.
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
