"""What a client reads: one table of causes for refusals, in each protocol, and the fixed replies to commands.

In SMTP code class and enhanced class agree. A pipeline may write other texts (`replies:`), by the names of the causes
in lower case and by the names in `FIXED`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gateway.protocol.smtp import Reply
from gateway.verdicts import Cause, Refuse


@dataclass(frozen=True, slots=True)
class CauseReply:
    """The SMTP replies of a cause: permanent and temporary code, which one is the default, and the text."""

    permanent: str
    temporary: str
    is_temporary: bool
    text: str


CAUSES: dict[Cause, CauseReply] = {
    Cause.POLICY: CauseReply("550 5.7.1", "450 4.7.1", False, "refused by local policy"),
    Cause.ACCESS_DENIED: CauseReply("554 5.7.1", "450 4.7.1", False, "access denied"),
    Cause.EARLY_TALKER: CauseReply("554 5.5.0", "450 4.5.0", False, "client spoke before its turn"),
    Cause.PIPELINING: CauseReply("554 5.5.0", "450 4.5.0", False, "command sent before the reply to the last one"),
    Cause.TOO_MANY_CONNECTIONS: CauseReply("554 5.7.0", "421 4.7.0", True, "too many connections; try again later"),
    Cause.RATE_LIMIT: CauseReply("550 5.7.28", "450 4.7.28", True, "rate limit exceeded; try again later"),
    Cause.BANNED: CauseReply("554 5.7.0", "421 4.7.0", True, "too many failures from your network; try again later"),
    Cause.TLS_REQUIRED: CauseReply("530 5.7.0", "451 4.7.0", False, "must issue a STARTTLS command first"),
    Cause.CERTIFICATE_REQUIRED: CauseReply("554 5.7.0", "421 4.7.0", True, "client certificate required"),
    Cause.CERTIFICATE_FAILED: CauseReply("554 5.7.0", "421 4.7.0", True, "client certificate not verified"),
    Cause.AUTH_REQUIRED: CauseReply("530 5.7.0", "451 4.7.0", False, "authentication required"),
    Cause.AUTH_FAILED: CauseReply("535 5.7.8", "454 4.7.0", False, "authentication credentials invalid"),
    Cause.LOGIN_REFUSED: CauseReply("535 5.7.8", "454 4.7.0", False, "authentication credentials invalid"),
    Cause.AUTH_UNAVAILABLE: CauseReply("535 5.7.0", "454 4.7.0", True, "temporary authentication failure"),
    Cause.AUTH_TOO_MANY: CauseReply("554 5.7.0", "421 4.7.0", True, "too many authentication failures"),
    Cause.RELAY_DENIED: CauseReply("550 5.7.1", "450 4.7.1", False, "relaying denied"),
    Cause.SENDER_DENIED: CauseReply("553 5.7.1", "450 4.7.1", False, "sender address not owned by user"),
    Cause.SENDER_REJECTED: CauseReply("550 5.7.1", "450 4.7.1", False, "sender address rejected"),
    Cause.RECIPIENT_REJECTED: CauseReply("550 5.7.1", "450 4.7.1", False, "recipient address rejected"),
    Cause.NAME_LOOKUP: CauseReply("550 5.7.25", "450 4.7.25", True, "cannot find your host name"),
    Cause.TOO_MANY_RECIPIENTS: CauseReply("552 5.5.3", "452 4.5.3", True, "too many recipients"),
    Cause.OTHER_ROUTE: CauseReply("552 5.5.3", "452 4.5.3", True, "recipient needs a transaction of its own"),
    Cause.NO_ROUTE: CauseReply("550 5.4.4", "451 4.4.4", True, "no route for this mail"),
    Cause.MESSAGE_TOO_BIG: CauseReply("552 5.3.4", "452 4.3.1", False, "message size exceeds limit"),
    Cause.LINE_ENDINGS: CauseReply("550 5.5.2", "451 4.5.2", False, "bare <LF> or <CR> in message"),
    Cause.MALFORMED: CauseReply("550 5.6.0", "451 4.6.0", False, "malformed message"),
    Cause.LOOP: CauseReply("554 5.4.6", "451 4.4.6", False, "mail loop detected"),
    Cause.CONTENT: CauseReply("554 5.7.1", "451 4.7.1", False, "message content rejected"),
    Cause.NOT_CARRIED: CauseReply("555 5.5.4", "451 4.5.4", False, "parameter not supported by the next server"),
    Cause.STAGE_FAILED: CauseReply("554 5.3.0", "451 4.3.0", True, "local error; try again later"),
    Cause.UPSTREAM_DOWN: CauseReply("554 5.4.1", "451 4.4.1", True, "mail server not available; try again later"),
    Cause.UPSTREAM_LOST: CauseReply("554 5.4.2", "451 4.4.2", True, "connection to mail server lost; try again later"),
    Cause.UPSTREAM_BUSY: CauseReply("554 5.4.5", "451 4.4.5", True, "mail system busy; try again later"),
    Cause.UPSTREAM_MISCONFIGURED: CauseReply("554 5.3.5", "451 4.3.5", True, "mail system misconfigured; try later"),
    Cause.TIMEOUT: CauseReply("554 5.4.2", "421 4.4.2", True, "timeout exceeded"),
    Cause.TOO_MANY_ERRORS: CauseReply("554 5.7.0", "421 4.7.0", True, "too many errors"),
    Cause.PROTOCOL: CauseReply("554 5.5.0", "421 4.5.0", False, "protocol error"),
    Cause.SHUTDOWN: CauseReply("554 5.3.2", "421 4.3.2", True, "service shutting down"),
}


def smtp_reply(refuse: Refuse, session_id: str = "", *, soft: bool = False) -> Reply:
    """The SMTP reply of a refusal.

    `session_id` (if not empty) stands in parentheses at the end of replies of ours, never of foreign ones.
    `soft` turns every permanent refusal of ours into a temporary one (`soft_bounce`, postconf(5)).
    """
    if refuse.reply is not None:
        if soft and refuse.reply.code >= 500:
            return _softened(refuse.reply)
        return refuse.reply
    row = CAUSES[refuse.cause]
    temporary = row.is_temporary if refuse.temporary is None else refuse.temporary
    code = row.temporary if temporary or soft else row.permanent
    if refuse.disconnect and code[:3] in ("450", "451"):
        # RFC 5321 3.8: a server that closes by itself says 421.
        code = "421 " + code[4:]
    text = refuse.text or row.text
    return Reply.of(f"{code} {text} ({session_id})" if session_id else f"{code} {text}")


def _softened(reply: Reply) -> Reply:
    """A foreign 5xx as 4xx, enhanced code included (postconf(5) soft_bounce)."""
    lines = tuple(b"4" + line[1:] if line[:2] == b"5." else line for line in reply.lines)
    return Reply(reply.code - 100, lines)


Family = Literal["smtp", "imap", "pop3"]
FAMILIES: tuple[Family, ...] = ("smtp", "imap", "pop3")

# The fixed replies to commands. None: computed where it is said; IMAP's begin with the tag unless with `*`.
FIXED: dict[Family, dict[str, str | None]] = {
    "smtp": {
        "greeting": None,
        "ok": "250 2.0.0 Ok",
        "sender_ok": "250 2.1.0 Ok",
        "quit": "221 2.0.0 Bye",
        "starttls": "220 2.0.0 ready to start TLS",
        "authenticated": "235 2.7.0 Authentication successful",
        "sasl_cancelled": "501 5.7.0 authentication cancelled",
        "sasl_malformed": "501 5.5.2 cannot decode",
        "unknown_command": None,  # any error of ours that begins with 500
        "bad_argument": None,  # 501
        "not_available": None,  # 502
        "bad_sequence": None,  # 503
        "bad_parameter": None,  # 504
        "no_recipients": None,  # DATA and BDAT without MAIL or without a recipient; 503 or 554
        "tls_active": "503 5.5.1 TLS already active",
        "vrfy": "252 2.1.5 cannot verify; send mail and see",
        "expn": "502 5.5.1 command not available",
        "help": None,  # the commands of SMTP or LMTP
    },
    "imap": {
        "greeting": None,
        "ok": "OK completed",
        "bye": "* BYE logging out",
        "starttls": "OK begin TLS negotiation now",
        "continue": "+ OK",
        "sasl_cancelled": "BAD authentication cancelled",
        "sasl_malformed": "BAD cannot decode the response",
        "unknown_command": "BAD unknown command",
        "bad_argument": "BAD syntax error in the command",
        "not_available": "BAD not available here",
        "bad_sequence": "BAD not in this state",
        "bad_parameter": "NO mechanism not available",
    },
    "pop3": {
        "greeting": None,
        "ok": "+OK",
        "quit": "+OK bye",
        "starttls": "+OK begin TLS negotiation now",
        "capabilities": "+OK capability list follows",
        "mechanisms": "+OK methods supported:",
        "sasl_cancelled": "-ERR authentication cancelled",
        "sasl_malformed": "-ERR cannot decode the response",
        "unknown_command": "-ERR unknown command",
        "bad_argument": "-ERR syntax error in the command",
        "not_available": "-ERR not available here",
        "bad_sequence": "-ERR not in this state",
        "bad_parameter": "-ERR mechanism not available",
    },
}
ERRORS = {500: "unknown_command", 501: "bad_argument", 502: "not_available", 503: "bad_sequence", 504: "bad_parameter"}
"""Which fixed reply an SMTP error of ours is, by its code."""

PROTOCOL_ERRORS = frozenset({"unknown_command", "bad_argument", "sasl_malformed"})
"""Fixed replies to what is wrong by itself; others may follow from a refusal before them (RFC 2920 3.1)."""

REFUSALS = frozenset(cause.name.lower() for cause in Cause) | {
    "sasl_cancelled", "sasl_malformed", "tls_active", "no_recipients", *ERRORS.values(),
}  # fmt: skip
"""The names of replies that must not read as success."""

# Response codes of RFC 5530 (IMAP) and RFC 2449, RFC 3206 (POP3): for what is temporary, and for what is not.
_STORE_CODES: dict[Cause, tuple[str, str]] = {
    Cause.AUTH_FAILED: ("AUTHENTICATIONFAILED", "AUTH"),
    Cause.LOGIN_REFUSED: ("AUTHENTICATIONFAILED", "AUTH"),
    Cause.TLS_REQUIRED: ("PRIVACYREQUIRED", "AUTH"),
    Cause.CERTIFICATE_REQUIRED: ("PRIVACYREQUIRED", "AUTH"),
    Cause.CERTIFICATE_FAILED: ("PRIVACYREQUIRED", "AUTH"),
    Cause.UPSTREAM_MISCONFIGURED: ("UNAVAILABLE", "SYS/TEMP"),
    Cause.AUTH_TOO_MANY: ("UNAVAILABLE", "AUTH"),
}
_NO_CODE = (Cause.TOO_MANY_ERRORS, Cause.PROTOCOL, Cause.PIPELINING, Cause.TIMEOUT, Cause.EARLY_TALKER)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_IMAP_STATUS = {500: "BAD", 421: "* BYE", 554: "* BYE"}
"""What an IMAP server said that these codes stand for."""
_ENHANCED = re.compile(r"\A[245]\.\d{1,3}\.\d{1,3} ")


def names(family: Family) -> frozenset[str]:
    """What `replies:` may name in this protocol: the causes in lower case, and the fixed replies."""
    return frozenset(cause.name.lower() for cause in Cause) | FIXED[family].keys()


class Replies:
    """What one pipeline says in one protocol: the tables, and what its `replies:` has instead."""

    def __init__(self, family: Family, written: Mapping[str, str] | None = None) -> None:
        self.family = family
        self.written = dict(written or {})
        self._fixed = {name: text for name, text in FIXED[family].items() if text is not None} | self.written

    def fixed(self, name: str) -> str:
        """A fixed reply, without its end."""
        return self._fixed[name]

    def error(self, text: str, name: str = "") -> str:
        """An SMTP error of ours, or what the pipeline says in its place."""
        if not self.written:
            return text
        return self.written.get(name or ERRORS.get(int(text[:3]), ""), text)

    def smtp(self, refuse: Refuse, session_id: str = "", *, soft: bool = False) -> Reply:
        """The SMTP reply of a refusal; `smtp_reply` unless the pipeline wrote its own."""
        if self.written and refuse.reply is None:
            text = self.written.get(refuse.cause.name.lower())
            if text is not None:
                return Reply.of(text)
        return smtp_reply(refuse, session_id, soft=soft)

    def store(self, refuse: Refuse, session_id: str = "", *, farewell: bool = False) -> str:
        """What IMAP (`NO ...`, `* BYE ...`) or POP3 (`-ERR ...`) says of a refusal, without tag and end.

        A foreign reply keeps its text; an SMTP code and enhanced code in front of it are no words of these protocols.
        An IMAP server's own, which has no enhanced code, keeps its status: 500 was BAD, 421 was BYE, as was the 554 of
        a greeting.
        `farewell`: it is the last word and answers no command.
        """
        imap = self.family == "imap"
        status = ("* BYE" if farewell else "NO") if imap else "-ERR"
        if refuse.reply is not None:
            text, enhanced = _ENHANCED.subn("", refuse.reply.text, count=1)
            if imap and not enhanced and not farewell:
                status = _IMAP_STATUS.get(refuse.reply.code, status)
            return f"{status} {text}"  # RFC 9051 7.1: with no text the blank stays
        written = self.written.get(refuse.cause.name.lower())
        if written is not None:
            return written
        row = CAUSES[refuse.cause]
        temporary = row.is_temporary if refuse.temporary is None else refuse.temporary
        code = ""
        if refuse.cause in _STORE_CODES:
            code = _STORE_CODES[refuse.cause][0 if imap else 1]
        elif refuse.cause not in _NO_CODE:
            if temporary:
                code = "UNAVAILABLE" if imap else "SYS/TEMP"
            else:
                code = "AUTHORIZATIONFAILED" if imap else "SYS/PERM"
        text = _UNSAFE.sub("?", refuse.text) or (row.text if imap else row.text.replace("STARTTLS", "STLS"))
        shown = f" ({session_id})" if session_id else ""
        return f"{status} {f'[{code}] ' if code else ''}{text}{shown}"

