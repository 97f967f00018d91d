"""A session (one client connection) and its transactions, as stages see them.

Plain slotted objects: the frontend writes them, stages read them. A stage keeps its own memory of a session
only through `state()`; identity is never set by hand but through verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gateway.facts import FactValue
from gateway.protocol.smtp import Reply, domain_of
from gateway.verdicts import AddHeader, Allow, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.protocol.proxy_header import ProxyHeader
    from gateway.relay.tls import ServerContext, TlsInfo
    from gateway.stage import Stage

T = TypeVar("T")
Address = tuple[str, int]


class Seen(NamedTuple):
    """What a stage answered. Many sessions share one of these, so that to remember an answer takes no memory.

    `verdict`: `pass`, `hold`, `refuse`, `allow`, `rewrite`, `edit`, `authenticated`, `upstream`, `discard` or `error`;
    `mode`: `enforce`, or `observe` for an answer that changed nothing.
    """

    stage: str
    phase: str
    verdict: str
    mode: str


class Listener:
    """What a session knows of its listener."""

    __slots__ = ("capabilities", "implicit_tls", "login_required", "name", "protocol", "proxy_protocol", "tls", "url")

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        protocol: str = "smtp",
        implicit_tls: bool = False,
        proxy_protocol: bool = False,
        login_required: bool = False,
        tls: ServerContext | None = None,
        capabilities: dict[str, str] | None = None,
    ) -> None:
        self.url = url
        self.name: str = name or url
        self.protocol = protocol
        self.implicit_tls = implicit_tls
        self.proxy_protocol = proxy_protocol
        self.login_required = login_required
        self.tls = tls  # the certificates; None: STARTTLS is not offered
        self.capabilities = capabilities  # written by hand instead of computed


class Client:
    """Who the client is: address and port after PROXY or XCLIENT, and its names once a stage looked them up.

    `name_status` is "" (nobody asked), "ok" (name is verified), "unavailable" (no name, or it does not point
    back) or "tempunavail" (the look-up failed).
    """

    __slots__ = ("address", "name", "name_status", "port", "reverse_name")

    def __init__(self, address: str, port: int) -> None:
        self.address: str = address
        self.port: int = port
        self.name: str = ""
        self.reverse_name = ""
        self.name_status = ""


class _Stateful:
    """`state(stage, Factory)`: a stage's own memory of this session or transaction, made at first use."""

    __slots__ = ("_states",)

    def __init__(self) -> None:
        self._states: dict[Stage, object] | None = None

    def state(self, stage: Stage, factory: Callable[[], T]) -> T:
        """The stage's state here; `factory` makes it the first time."""
        states = self._states
        if states is None:
            states = self._states = {}
        state = states.get(stage)
        if state is None:
            state = states[stage] = factory()
        return state  # type: ignore[return-value]

    def has_state(self, stage: Stage) -> bool:
        """Whether the stage has state here already."""
        return self._states is not None and stage in self._states


class Recipient:
    """One recipient: address, ESMTP parameters, and the replies once there are any.

    `reply` is the one to RCPT. `final` says what became of the message for this recipient: the reply to its end of
    data, which LMTP gives for each recipient and SMTP for all of them.
    """

    __slots__ = (
        "address", "allowed", "caught_up", "domain", "final", "index", "original", "parameters", "reply", "upstream",
    )  # fmt: skip

    def __init__(self, address: str, parameters: tuple[tuple[str, str | None], ...], index: int) -> None:
        self.original: str = address
        self.address: str = address
        self.domain: str = domain_of(address)
        self.parameters = parameters
        self.index = index
        self.allowed = False
        self.caught_up: frozenset[int] = frozenset()  # stages that heard of it later than at RCPT
        self.upstream: Upstream | None = None
        self.reply: Reply | None = None
        self.final: Reply | None = None

    def rewrite(self, address: str, parameters: tuple[tuple[str, str | None], ...] | None) -> None:
        """A `Rewrite` verdict: the new address goes upstream, `original` keeps the client's."""
        self.address = address
        self.domain = domain_of(address)
        if parameters is not None:
            self.parameters = parameters


class Transaction(_Stateful):
    """One message: sender, parameters, accepted recipients, size, and what stages want done to it."""

    __slots__ = (
        "allowed",
        "asked",
        "declared_size",
        "discard",
        "facts",
        "head",
        "id",
        "original_sender",
        "parameters",
        "recipients",
        "refused",
        "reply",
        "sender",
        "sender_domain",
        "size",
        "smtputf8",
        "upstream",
    )

    def __init__(self, id: str, sender: str, parameters: tuple[tuple[str, str | None], ...]) -> None:
        super().__init__()
        self.id = id
        self.original_sender: str = sender
        self.sender: str = sender
        self.sender_domain: str = domain_of(sender)
        self.parameters = parameters
        self.recipients: list[Recipient] = []
        self.refused: list[tuple[str, Reply]] = []
        self.declared_size: int = 0
        self.size: int = 0
        self.smtputf8: bool = False
        self.allowed: bool = False
        self.facts: dict[str, FactValue] | None = None
        self.head: list[AddHeader] | None = None
        self.discard = ""
        self.reply: Reply | None = None
        self.upstream: Upstream | None = None
        self.asked: set[tuple[int, int]] | None = None
        for keyword, value in parameters:
            if keyword == "SIZE" and value:
                self.declared_size = int(value)
            elif keyword == "SMTPUTF8":
                self.smtputf8 = True

    def rewrite(self, address: str, parameters: tuple[tuple[str, str | None], ...] | None) -> None:
        """A `Rewrite` verdict: the new sender goes upstream, `original_sender` keeps the client's."""
        self.sender = address
        self.sender_domain = domain_of(address)
        if parameters is not None:
            self.parameters = parameters


class Session(_Stateful):
    """One client connection, from accept to close.

    `peer` is the TCP peer, `client` who it speaks for (PROXY, XCLIENT); `accepted_at` our own end of that connection,
    `local` the address that the client connected to (PROXY, XCLIENT). `user` is what the client typed at
    AUTH, lower-cased; `identity` an override for upstreams (secret). `trusted`: a peer trusted for XCLIENT
    gave the login. `password` or the OAuth `token` is for upstreams (secret); `relayed`: the upstream itself took the
    login, so that no other connection has it. `upstream_offer` is what the upstreams in question announce. IMAP:
    `tag` of the login command, `client_id` what the client's ID said. `trail`: what stages answered so far, in order.
    """

    __slots__ = (
        "accepted_at",
        "allowed",
        "asked",
        "auth_failures",
        "auth_mechanism",
        "client",
        "client_id",
        "early_talker",
        "esmtp",
        "facts",
        "helo",
        "hostname",
        "id",
        "identity",
        "listener",
        "local",
        "password",
        "peer",
        "pipeline",
        "postponed",
        "protocol",
        "proxy_header",
        "relayed",
        "started",
        "tag",
        "times",
        "tls",
        "token",
        "trail",
        "transaction",
        "transactions",
        "trusted",
        "typed_user",
        "upstream",
        "upstream_offer",
        "user",
    )

    def __init__(
        self, id: str, pipeline: str, listener: Listener, peer: Address, local: Address, started: float
    ) -> None:
        super().__init__()
        self.id = id
        self.pipeline = pipeline
        self.listener: Listener = listener
        self.hostname: str = ""
        self.protocol: str = listener.protocol
        self.peer: Address = peer
        self.local: Address = local
        self.accepted_at: Address = local
        self.client: Client = Client(*peer)
        self.started = started
        self.proxy_header: ProxyHeader | None = None
        self.tls: TlsInfo | None = None
        self.early_talker: bool = False
        self.helo: str = ""
        self.esmtp: bool = False
        self.user: str = ""
        self.typed_user: str = ""
        self.identity: str = ""
        self.password: str | None = None
        self.token: str | None = None
        self.relayed: bool = False
        self.tag: bytes = b""
        self.client_id: dict[str, str | None] | None = None
        self.upstream_offer: Mapping[str, str] = {}
        self.auth_mechanism: str = ""
        self.auth_failures: int = 0
        self.trusted: bool = False
        self.upstream: Upstream | None = None
        self.transaction: Transaction | None = None
        self.transactions: int = 0
        self.allowed: Allow | None = None
        self.postponed: tuple[Refuse, str] | None = None
        self.facts: dict[str, FactValue] | None = None
        self.asked: set[tuple[int, int]] | None = None
        self.times: dict[str, float] | None = None
        self.trail: list[Seen] | None = None

    @property
    def login(self) -> str:
        """The login for upstreams: the override if there is one, else what the client typed. Secret in logs."""
        return self.identity or self.typed_user

    def set_fact(self, stage: Stage, name: str, value: FactValue) -> None:
        """Set a fact `<id>.<name>` that the stage declared, for the rest of the session."""
        if self.facts is None:
            self.facts = {}
        self.facts[f"{stage.id}.{name}"] = value

    def set_transaction_fact(self, stage: Stage, name: str, value: FactValue) -> None:
        """Set a fact `<id>.<name>` for the current transaction only."""
        transaction = self.transaction
        if transaction is None:
            raise ValueError(f"{stage.id}.{name}: no transaction is open")
        if transaction.facts is None:
            transaction.facts = {}
        transaction.facts[f"{stage.id}.{name}"] = value

    def __repr__(self) -> str:
        return f"<Session {self.id} {self.protocol} {self.client.address}>"
