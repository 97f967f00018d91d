"""The SMTP codec: commands, envelope, replies and EHLO as bytes and values (RFC 5321 and its extensions).

One name to import from; the parts live in `smtp_commands`, `smtp_envelope`, `smtp_replies` and `smtp_ehlo`,
message content in `content`.
"""

from __future__ import annotations

from gateway.protocol.content import parse_bdat
from gateway.protocol.smtp_commands import NON_SMTP, NON_SMTP_TLS, Command, looks_like, parse_command
from gateway.protocol.smtp_ehlo import Ehlo, format_ehlo, parse_ehlo
from gateway.protocol.smtp_envelope import (
    PARAMETER_EXTENSION,
    Mail,
    Rcpt,
    domain_of,
    format_mail,
    format_rcpt,
    local_of,
    parse_mail,
    parse_rcpt,
)
from gateway.protocol.smtp_replies import Reply, ReplyReader

__all__ = [
    "NON_SMTP",
    "NON_SMTP_TLS",
    "PARAMETER_EXTENSION",
    "Command",
    "Ehlo",
    "Mail",
    "Rcpt",
    "Reply",
    "ReplyReader",
    "domain_of",
    "format_ehlo",
    "format_mail",
    "format_rcpt",
    "local_of",
    "looks_like",
    "parse_bdat",
    "parse_command",
    "parse_ehlo",
    "parse_mail",
    "parse_rcpt",
]
