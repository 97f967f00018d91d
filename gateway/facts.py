"""Facts: the typed, named things known of a session, a transaction, a recipient; and expressions over them.

The table below is the whole vocabulary of `when:` and of expressions in stage settings (CEL, see
`pipeline/conditions.py`). Stages add their own as `<id>.<name>` (`Stage.facts`) or fill in one of the table
(`Stage.provides`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from gateway.session import Recipient, Session, Transaction

FactValue = str | int | float | bool
FactType = Literal["string", "int", "double", "bool"]


class Phase(IntEnum):
    """The moments at which stages are asked, in the order of a session."""

    CONNECT = 0
    SECURE = 1
    GREETING = 2
    HELO = 3
    AUTH = 4
    ROUTE = 5
    MAIL = 6
    RCPT = 7
    DATA = 8
    MESSAGE = 9


class Scope(Enum):
    """How long a fact lives."""

    SESSION = "session"
    TRANSACTION = "transaction"
    RECIPIENT = "recipient"


class Getter(Protocol):
    """Reads a fact; transaction and recipient are None outside of them."""

    def __call__(self, session: Session, transaction: Transaction | None, recipient: Recipient | None) -> FactValue: ...


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: dotted name, CEL type, value while unknown, the phase from which it is known, its scope."""

    name: str
    type: FactType
    default: FactValue
    phase: Phase
    scope: Scope
    help: str
    get: Getter | None = field(default=None, repr=False, compare=False)
    provided: bool = False  # known only if a stage of the chain provides it


class UnboundExpressionError(Exception):
    """An expression was evaluated before the pipeline compiler bound it (a bug, not a configuration error)."""


Program = Callable[["Session", "Transaction | None", "Recipient | None"], FactValue]


class Expression:
    """CEL text in a setting; the compiler binds it when the file is loaded.

    `result` is the type it must have. `evaluate` raises `EvaluationError` where CEL cannot give a value.
    """

    __slots__ = ("_program", "phase", "result", "scope", "text")

    def __init__(self, text: str, result: FactType = "bool") -> None:
        self.text = text
        self.result: FactType = result
        self.phase = Phase.CONNECT
        self.scope = Scope.SESSION
        self._program: Program | None = None

    def bind(self, program: Program, phase: Phase, scope: Scope) -> None:
        """Called once by the compiler: the program, the phase from which its facts are known, their scope."""
        self._program, self.phase, self.scope = program, phase, scope

    def evaluate(
        self, session: Session, transaction: Transaction | None = None, recipient: Recipient | None = None
    ) -> FactValue:
        """The value for this session, transaction, recipient."""
        if self._program is None:
            raise UnboundExpressionError(self.text)
        return self._program(session, transaction, recipient)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


class EvaluationError(Exception):
    """A condition or expression has no value for these facts (`on_error` applies)."""


def _session(
    name: str, type: FactType, default: FactValue, phase: Phase, get: Callable[[Session], FactValue], help: str
) -> Fact:
    return Fact(name, type, default, phase, Scope.SESSION, help, lambda s, t, r: get(s))


def _transaction(
    name: str, type: FactType, default: FactValue, phase: Phase, get: Callable[[Transaction], FactValue], help: str
) -> Fact:
    return Fact(name, type, default, phase, Scope.TRANSACTION, help, lambda s, t, r: default if t is None else get(t))


def _recipient(name: str, get: Callable[[Recipient], FactValue], help: str) -> Fact:
    return Fact(name, "string", "", Phase.RCPT, Scope.RECIPIENT, help, lambda s, t, r: "" if r is None else get(r))


def _tls(name: str, type: FactType, default: FactValue, attribute: str, help: str) -> Fact:
    def get(session: Session) -> FactValue:
        value = getattr(session.tls, attribute, None)
        return default if value is None else value

    return _session(name, type, default, Phase.SECURE, get, help)


_P = Phase
BUILT_IN: tuple[Fact, ...] = (
    _session("client.address", "string", "", _P.CONNECT, lambda s: s.client.address, "Address of the client."),
    _session("client.port", "int", 0, _P.CONNECT, lambda s: s.client.port, "Port of the client."),
    Fact(
        "client.name",
        "string",
        "",
        _P.CONNECT,
        Scope.SESSION,
        "Verified host name of the client (needs reverse_dns).",
        lambda s, t, r: s.client.name,
        provided=True,
    ),
    Fact(
        "client.reverse_name",
        "string",
        "",
        _P.CONNECT,
        Scope.SESSION,
        "Name in the PTR record, verified or not.",
        lambda s, t, r: s.client.reverse_name,
        provided=True,
    ),
    Fact(
        "client.name_status",
        "string",
        "",
        _P.CONNECT,
        Scope.SESSION,
        "ok, unavailable or tempunavail.",
        lambda s, t, r: s.client.name_status,
        provided=True,
    ),
    _session(
        "client.early", "bool", False, _P.GREETING, lambda s: s.early_talker, "The client spoke before the greeting."
    ),
    _session("listener.name", "string", "", _P.CONNECT, lambda s: s.listener.name, "Name or URL of the listener."),
    _session("listener.port", "int", 0, _P.CONNECT, lambda s: s.local[1], "Port of the listener."),
    _session("listener.address", "string", "", _P.CONNECT, lambda s: s.local[0], "Local address of the connection."),
    _session(
        "proxy.address", "string", "", _P.CONNECT, lambda s: s.peer[0], "The TCP peer: a proxy or the client itself."
    ),
    _session("protocol", "string", "smtp", _P.CONNECT, lambda s: s.protocol, "smtp, lmtp, imap or pop3."),
    _session("tls.active", "bool", False, _P.SECURE, lambda s: s.tls is not None, "The connection is encrypted."),
    _tls("tls.version", "string", "", "version", "TLSv1.2, TLSv1.3; empty in clear text."),
    _tls("tls.cipher", "string", "", "cipher", "Name of the cipher."),
    _tls("tls.server_name", "string", "", "sni", "Name the client asked for (SNI)."),
    _tls("tls.verified", "bool", False, "verified", "A client certificate was given and verified."),
    _session("helo.name", "string", "", _P.HELO, lambda s: s.helo, "Argument of HELO, EHLO or LHLO."),
    _session("helo.esmtp", "bool", False, _P.HELO, lambda s: s.esmtp, "The client said EHLO or LHLO."),
    _session(
        "auth.user", "string", "", _P.AUTH, lambda s: s.user, "The user as typed, lower-cased; empty before AUTH."
    ),
    _session(
        "auth.domain",
        "string",
        "",
        _P.AUTH,
        lambda s: s.user.rpartition("@")[2] if "@" in s.user else "",
        "What stands after the @ of the user.",
    ),
    _session("auth.mechanism", "string", "", _P.AUTH, lambda s: s.auth_mechanism, "SASL mechanism used."),
    _session(
        "auth.trusted",
        "bool",
        False,
        _P.AUTH,
        lambda s: bool(s.user) or s.trusted,
        "The client is authenticated, here or by the word of a trusted XCLIENT peer.",
    ),
    _session("auth.failures", "int", 0, _P.AUTH, lambda s: s.auth_failures, "Failed AUTH commands of this session."),
    _session("session.transactions", "int", 0, _P.CONNECT, lambda s: s.transactions, "Transactions so far."),
    _transaction("mail.from", "string", "", _P.MAIL, lambda t: t.sender, "Sender address; empty for <>."),
    _transaction("mail.domain", "string", "", _P.MAIL, lambda t: t.sender_domain, "Domain of the sender, lower-cased."),
    _transaction("mail.size", "int", 0, _P.MAIL, lambda t: t.declared_size, "SIZE= of MAIL; 0 if not given."),
    _transaction("mail.smtputf8", "bool", False, _P.MAIL, lambda t: t.smtputf8, "MAIL had SMTPUTF8."),
    _transaction("mail.recipients", "int", 0, _P.RCPT, lambda t: len(t.recipients), "Recipients accepted so far."),
    _recipient("rcpt.to", lambda r: r.address, "Recipient address."),
    _recipient("rcpt.domain", lambda r: r.domain, "Domain of the recipient, lower-cased."),
)


class PoolName(str):
    """The name of a pool in a stage's settings; the compiler checks that it exists."""

    __slots__ = ()
