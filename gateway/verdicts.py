"""What a stage answers when it is asked: a small closed set of frozen values that speak no protocol.

`None` means go on. `replies.py` turns a `Cause` into the reply of the protocol at hand.
Which verdict may be given in which phase stands in `hookspecs.py`; the chain refuses others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from gateway.protocol.smtp import Reply

if TYPE_CHECKING:
    from gateway.message import NewBody

_FIELD_NAME = re.compile(r"[!-9;-~]+")  # RFC 5322 2.2
_FIELD_VALUE = re.compile(r"(?:[^\r\n\0]|\r\n[ \t])*")


class Cause(Enum):
    """Why something is refused; `replies.py` has the reply of each protocol for each cause."""

    POLICY = "policy"
    ACCESS_DENIED = "access denied"
    EARLY_TALKER = "spoke before its turn"
    PIPELINING = "unauthorized pipelining"
    TOO_MANY_CONNECTIONS = "too many connections"
    RATE_LIMIT = "rate limit"
    BANNED = "banned"
    TLS_REQUIRED = "TLS required"
    CERTIFICATE_REQUIRED = "client certificate required"
    CERTIFICATE_FAILED = "client certificate not verified"
    AUTH_REQUIRED = "authentication required"
    AUTH_FAILED = "authentication failed"
    LOGIN_REFUSED = "the upstream refused the login"
    AUTH_UNAVAILABLE = "authentication unavailable"
    AUTH_TOO_MANY = "too many authentication failures"
    RELAY_DENIED = "relay denied"
    SENDER_DENIED = "sender not allowed for this user"
    SENDER_REJECTED = "sender rejected"
    RECIPIENT_REJECTED = "recipient rejected"
    NAME_LOOKUP = "client name lookup"
    TOO_MANY_RECIPIENTS = "too many recipients"
    OTHER_ROUTE = "recipient of another route"
    NO_ROUTE = "no route"
    MESSAGE_TOO_BIG = "message too big"
    LINE_ENDINGS = "illegal line ends"
    MALFORMED = "malformed content"
    LOOP = "mail loop"
    CONTENT = "content rejected"
    NOT_CARRIED = "not carried by the upstream"
    STAGE_FAILED = "stage failed"
    UPSTREAM_DOWN = "no upstream server answers"
    UPSTREAM_LOST = "upstream connection lost"
    UPSTREAM_BUSY = "upstream busy"
    UPSTREAM_MISCONFIGURED = "upstream misconfigured"
    TIMEOUT = "time-out"
    TOO_MANY_ERRORS = "too many errors"
    PROTOCOL = "protocol error"
    SHUTDOWN = "shutting down"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse what was asked.

    `text` is for the client (ASCII, one line); empty takes the cause's own text. `temporary` None takes the
    cause's default class. `reply` carries a foreign reply verbatim (a milter's, an upstream's). `hold` seconds
    pass before the answer. `disconnect` closes after the reply. `log` is for the administrator alone.
    `recipients` maps a recipient's index to its own reply (end of data, LMTP).
    """

    cause: Cause
    text: str = ""
    temporary: bool | None = None
    reply: Reply | None = None
    hold: float = 0.0
    disconnect: bool = False
    log: str = ""
    recipients: Mapping[int, Reply] | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Let the answer wait until `seconds` after the verdict; later stages run meanwhile.

    A client that talks before its turn meanwhile gets `early`; with `early=None` this is only noted
    (`session.early_talker`).
    """

    seconds: float
    early: Refuse | None = None


@dataclass(frozen=True, slots=True)
class Allow:
    """Skip later checks (never guards or plumbing): for the session, the transaction or the recipient."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Replace the address of this MAIL or RCPT (no angle brackets) and, if given, its ESMTP parameters."""

    address: str
    parameters: tuple[tuple[str, str | None], ...] | None = None


def _check_field(name: str, value: str) -> None:
    """Raises ValueError for what would end the field: the rest would be another field, or content."""
    if not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
        raise ValueError(f"{name[:60]!r} is no header field, or its value has a bare line end or a NUL")


@dataclass(frozen=True, slots=True)
class AddHeader:
    """One header field put in front of the message, above all that is there (`name: value`).

    Of several in one phase before `message` the first stands on top, in `message` the last.

    Folds stand in the value as CRLF + blank. `leading_space=False` writes the value right behind the colon, for
    those who bring their own blank. Raises ValueError for a name or a value that is none.
    """

    name: str
    value: str
    leading_space: bool = True

    def __post_init__(self) -> None:
        _check_field(self.name, self.value)


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """One header field put at a place of the header that the stage sees: 0 is the first, beyond the end the last.

    Fields that the gateway itself puts in front (`received`) are not seen and not counted; they stay above. With
    `below_trace` they count as one field, there or not: what milter filters expect, who put theirs at 0 to stand
    above the server's own Received, and at 1 to stand below it.
    """

    index: int
    name: str
    value: str
    leading_space: bool = True
    below_trace: bool = False

    def __post_init__(self) -> None:
        _check_field(self.name, self.value)


@dataclass(frozen=True, slots=True)
class AppendHeader:
    """One header field put at the end of the header."""

    name: str
    value: str
    leading_space: bool = True

    def __post_init__(self) -> None:
        _check_field(self.name, self.value)


@dataclass(frozen=True, slots=True)
class ChangeHeader:
    """Another value for the `occurrence`th field (1 is the first) of that name; appended where there are fewer."""

    name: str
    value: str
    occurrence: int = 1
    leading_space: bool = True

    def __post_init__(self) -> None:
        _check_field(self.name, self.value)


@dataclass(frozen=True, slots=True)
class DeleteHeader:
    """Remove the `occurrence`th field (1 is the first) of that name; 0 removes all. Nothing where there is none.

    The others are counted anew at once: delete from the last to the first.
    """

    name: str
    occurrence: int = 1


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """Another body: content with CRLF line ends, not dot-stuffed; a large one is written to `Message.new_body()`."""

    body: bytes | NewBody = field(repr=False)


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """One more recipient (no angle brackets), who hears nothing of the client and the client nothing of him."""

    address: str
    parameters: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveRecipient:
    """Take this recipient out; nothing if the message goes to no such address."""

    address: str


@dataclass(frozen=True, slots=True)
class ChangeSender:
    """Another envelope sender (no angle brackets; empty is `<>`) and, if given, other ESMTP parameters."""

    address: str
    parameters: tuple[tuple[str, str | None], ...] | None = None


Operation = (
    AddHeader
    | InsertHeader
    | AppendHeader
    | ChangeHeader
    | DeleteHeader
    | ReplaceBody
    | AddRecipient
    | RemoveRecipient
    | ChangeSender
)


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes to the message, applied in their order, together with the whole verdict or not at all.

    Before the message phase only `AddHeader` is possible. `upstream` sends the message elsewhere.
    """

    operations: Sequence[Operation] = ()
    upstream: Upstream | None = None


@dataclass(frozen=True, slots=True)
class Discard:
    """Accept the message and throw it away (logged with the reason, for each message).

    Only where the stage's entry says `discard: accept`; otherwise the message is refused.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where to go: the name of a pool, or one server (URL or `host:port`) given by an auth server.

    `identity` (secret in logs) is the login for that upstream of a client that did not log in.
    """

    pool: str = ""
    server: str = ""
    identity: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Authenticated:
    """The client is who it says.

    `user` is what the client typed; `identity` (secret in logs) overrides it towards upstreams;
    `password` or the OAuth `token` is for an upstream login; `upstream` a route that came with the answer. `reply` is
    an upstream's own word to the login that it took, to be passed on.
    """

    user: str
    identity: str = field(default="", repr=False)
    password: str | None = field(default=None, repr=False)
    upstream: Upstream | None = None
    token: str | None = field(default=None, repr=False)
    reply: Reply | None = None


Verdict = Refuse | Hold | Allow | Rewrite | Edit | Discard | Authenticated | Upstream
Edits = Literal["none", "head", "any"]
