"""What nginx says: the replies of its three frontends, by the names of `gateway/replies.py`."""

from __future__ import annotations

INTERNAL = (
    "stage_failed", "upstream_down", "upstream_lost", "upstream_busy", "upstream_misconfigured", "no_route",
    "auth_unavailable", "login_refused",
)  # fmt: skip
"""Causes of trouble behind the gateway: nginx has one text for all of them, and closes after it."""

_SMTP_INVALID = "500 5.5.1 Invalid command"
_IMAP_INVALID = "BAD invalid command"
_POP3_INVALID = "-ERR invalid command"

SMTP = {
    "ok": "250 2.0.0 OK",
    "sender_ok": "250 2.0.0 OK",
    "quit": "221 2.0.0 Bye",
    "starttls": "220 2.0.0 Start TLS",
    "authenticated": "235 2.0.0 OK",
    "unknown_command": _SMTP_INVALID,
    "not_available": _SMTP_INVALID,
    "bad_parameter": _SMTP_INVALID,
    "sasl_cancelled": _SMTP_INVALID,
    "sasl_malformed": _SMTP_INVALID,
    "bad_argument": "501 5.5.4 Invalid argument",
    "bad_sequence": "503 5.5.1 Bad sequence of commands",
    "no_recipients": _SMTP_INVALID,
    "tls_active": _SMTP_INVALID,
    "vrfy": _SMTP_INVALID,
    "expn": _SMTP_INVALID,
    "help": _SMTP_INVALID,
    "tls_required": _SMTP_INVALID,
    "auth_required": "530 5.7.1 Authentication required",
    "early_talker": "503 5.5.0 Improper use of SMTP command pipelining",
    "certificate_required": "421 4.7.1 No required SSL certificate",
    "certificate_failed": "421 4.7.1 SSL certificate error",
    **dict.fromkeys(INTERNAL, "451 4.3.2 Internal server error"),
}
IMAP = {
    "greeting": "* OK IMAP4 ready",
    "ok": "OK completed",
    "bye": "* BYE",
    "starttls": "OK completed",
    "continue": "+ OK",
    "unknown_command": _IMAP_INVALID,
    "not_available": _IMAP_INVALID,
    "bad_parameter": _IMAP_INVALID,
    "bad_argument": _IMAP_INVALID,
    "bad_sequence": _IMAP_INVALID,
    "sasl_cancelled": _IMAP_INVALID,
    "sasl_malformed": _IMAP_INVALID,
    "tls_required": _IMAP_INVALID,
    "certificate_required": "* BYE No required SSL certificate",
    "certificate_failed": "* BYE SSL certificate error",
    **dict.fromkeys(INTERNAL, "* BAD internal server error"),
}
POP3 = {
    "greeting": "+OK POP3 ready",
    "ok": "+OK",
    "quit": "+OK",
    "starttls": "+OK",
    "capabilities": "+OK Capability list follows",
    "mechanisms": "+OK methods supported:",
    "unknown_command": _POP3_INVALID,
    "not_available": _POP3_INVALID,
    "bad_parameter": _POP3_INVALID,
    "bad_argument": _POP3_INVALID,
    "bad_sequence": _POP3_INVALID,
    "sasl_cancelled": _POP3_INVALID,
    "sasl_malformed": _POP3_INVALID,
    "tls_required": _POP3_INVALID,
    "certificate_required": "-ERR No required SSL certificate",
    "certificate_failed": "-ERR SSL certificate error",
    **dict.fromkeys(INTERNAL, "-ERR internal server error"),
}


def replies(protocol: str, hostname: str) -> dict[str, str]:
    """The replies of a protocol; `hostname` greets in SMTP."""
    if protocol == "smtp":
        return {"greeting": f"220 {hostname} ESMTP ready", **SMTP}
    return IMAP if protocol == "imap" else POP3
