"""What a stage answers when it is asked: a small closed set of frozen values that speak no protocol.

`None` means go on. `replies.py` turns a `Cause` into the reply of the protocol at hand.
Which verdict may be given in which phase stands in `hookspecs.py`; the chain refuses others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from gateway.protocol.smtp import Reply

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
    TLS_REQUIRED = "TLS required"
    CERTIFICATE_REQUIRED = "client certificate required"
    AUTH_REQUIRED = "authentication required"
    AUTH_FAILED = "authentication failed"
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


@dataclass(frozen=True, slots=True)
class AddHeader:
    """One header field put in front of the message (`name: value`; folds as CRLF + blank).

    Raises ValueError for what would end the field: the rest would be another field, or content.
    """

    name: str
    value: str

    def __post_init__(self) -> None:
        if not _FIELD_NAME.fullmatch(self.name) or not _FIELD_VALUE.fullmatch(self.value):
            raise ValueError(f"{self.name[:60]!r} is no header field, or its value has a bare line end or a NUL")


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes to the message. Before the message phase only head edits (fields put in front) are possible."""

    operations: Sequence[AddHeader]


@dataclass(frozen=True, slots=True)
class Discard:
    """Accept the message and throw it away (logged with the reason, for each message)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where to go: the name of a pool, or one server (URL or `host:port`, numeric) given by an auth server."""

    pool: str = ""
    server: str = ""


@dataclass(frozen=True, slots=True)
class Authenticated:
    """The client is who it says.

    `user` is what the client typed; `identity` (secret in logs) overrides it towards upstreams;
    `password` is for an upstream login; `upstream` a route that came with the answer.
    """

    user: str
    identity: str = field(default="", repr=False)
    password: str | None = field(default=None, repr=False)
    upstream: Upstream | None = None


Verdict = Refuse | Hold | Allow | Rewrite | Edit | Discard | Authenticated | Upstream
Edits = Literal["none", "head", "any"]
