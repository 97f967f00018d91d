"""What the sessions of a pipeline count: themselves, their messages, refusals, logins and octets."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final

from gateway.observe import metrics
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.session import Session, Transaction

ENDS: Final[dict[str, str]] = {
    "quit": "quit",
    "client closed": "client_closed",
    "no PROXY header": "client_closed",
    "client reset": "client_lost",
    "client lost": "client_lost",
    "time-out": "timeout",
    "shutdown": "shutdown",
    "killed": "killed",
    "handed off": "handed_off",
    "XCLIENT": "xclient",
    "internal error": "internal_error",
    "TLS handshake failed": "tls_failed",
    "too many errors": "too_many_errors",
    "too many junk commands": "too_many_errors",
    "bare LF in a command": "bad_syntax",
    "broken PROXY header": "bad_syntax",
    "TLS hello on a plain port": "bad_syntax",
    "malformed BDAT": "bad_syntax",
    "octets of a refused literal would be read as commands": "bad_syntax",
    "PROXY peer not trusted": "refused",
    "refused before TLS": "refused",
    "nobody is logged in at the upstream": "upstream_lost",
    "handed off: idle": "timeout",
    "handed off: goodbye": "shutdown",
    Cause.SHUTDOWN.value: "shutdown",
    Cause.PROTOCOL.value: "bad_syntax",
}
"""The label `reason` for what a session's record gives as its reason, or for that up to the first colon.

All others are causes of refusals: `refused`.
"""

MECHANISMS: Final = frozenset((
    "ANONYMOUS", "APOP", "CRAM-MD5", "DIGEST-MD5", "EXTERNAL", "GSS-SPNEGO", "GSSAPI", "LOGIN", "NTLM", "OAUTHBEARER",
    "PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS", "XOAUTH2",
))  # fmt: skip
"""Mechanisms with a label of their own (the IANA registry's, and those that everybody has)."""

_CLASSES: Final = {2: "2xx", 4: "4xx", 5: "5xx"}


class ListenerCounts:
    """Sessions of one listener."""

    __slots__ = ("ended", "open", "seconds", "started")

    def __init__(self, pipeline: str, listener: str, protocol: str) -> None:
        self.started = metrics.counter(
            "gateway_sessions_started_total", pipeline=pipeline, listener=listener, protocol=protocol
        )
        self.open = metrics.gauge("gateway_open_sessions", pipeline=pipeline, listener=listener, protocol=protocol)
        self.ended = metrics.counters(
            "gateway_sessions_total", "reason", pipeline=pipeline, listener=listener, protocol=protocol
        )
        self.seconds = metrics.histogram("gateway_session_seconds", pipeline=pipeline, protocol=protocol)


class Counts:
    """One pipeline's numbers; made in the worker, after `metrics.bind`."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._listeners: dict[tuple[str, str], ListenerCounts] = {}
        self._transactions = metrics.counters("gateway_transactions_total", "reply", pipeline=pipeline)
        self._content = metrics.counter("gateway_message_bytes_total", pipeline=pipeline)
        self._refusals = metrics.counters("gateway_refusals_total", "cause", "phase", pipeline=pipeline)
        self._logins = metrics.counters("gateway_auth_attempts_total", "mechanism", "result", pipeline=pipeline)
        self.received = metrics.counter("gateway_client_bytes_total", pipeline=pipeline, direction="in")
        self.sent = metrics.counter("gateway_client_bytes_total", pipeline=pipeline, direction="out")

    def began(self, session: Session) -> None:
        """A session was accepted."""
        counts = self._of(session)
        counts.started.add()
        counts.open.add()

    def ended(self, session: Session, reason: str) -> None:
        """It is over; `reason` as in its record."""
        counts = self._of(session)
        counts.open.add(-1)
        end = ENDS.get(reason) or ENDS.get(reason.partition(":")[0], "refused")
        counts.ended[end,].add()
        counts.seconds.observe(perf_counter() - session.started)

    def _of(self, session: Session) -> ListenerCounts:
        name, protocol = session.listener.name, session.listener.protocol
        counts = self._listeners.get((name, protocol))
        if counts is None:
            counts = self._listeners[name, protocol] = ListenerCounts(self._pipeline, name, protocol)
        return counts

    def transaction(self, transaction: Transaction) -> None:
        """A message was answered, or left by its client."""
        reply = transaction.reply
        self._transactions[_CLASSES.get(reply.code // 100, "none") if reply is not None else "none",].add()
        self._content.add(transaction.size)

    def refused(self, refuse: Refuse, phase: str) -> None:
        """A client was told so."""
        self._refusals[refuse.cause.value, phase].add()

    def login(self, mechanism: str, result: str) -> None:
        """Somebody tried to log in."""
        self._logins[mechanism if mechanism in MECHANISMS else "other", result].add()
