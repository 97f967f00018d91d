"""One table of causes: what a client reads for each, in each protocol. Code class and enhanced class agree."""

from __future__ import annotations

from dataclasses import dataclass

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
    Cause.TLS_REQUIRED: CauseReply("530 5.7.0", "451 4.7.0", False, "must issue a STARTTLS command first"),
    Cause.CERTIFICATE_REQUIRED: CauseReply("554 5.7.0", "421 4.7.0", True, "client certificate required"),
    Cause.AUTH_REQUIRED: CauseReply("530 5.7.0", "451 4.7.0", False, "authentication required"),
    Cause.AUTH_FAILED: CauseReply("535 5.7.8", "454 4.7.0", False, "authentication credentials invalid"),
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
