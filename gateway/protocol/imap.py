"""The IMAP codec, as far as a session goes before its login (RFC 3501 and 9051, LITERAL+ RFC 7888, ID RFC 2971).

One name to import from; the parts live in `imap_commands` (reading a client), `imap_requests` (writing to a server),
`imap_responses` (reading a server) and `imap_id`.
"""

from __future__ import annotations

from gateway.protocol.imap_commands import BadCommand, Command, CommandReader, Literal, is_tag
from gateway.protocol.imap_id import id_command, parse_id
from gateway.protocol.imap_requests import check_login, login_steps, quoted
from gateway.protocol.imap_responses import Response, ResponseReader, capabilities_of

__all__ = [
    "BadCommand",
    "Command",
    "CommandReader",
    "Literal",
    "Response",
    "ResponseReader",
    "capabilities_of",
    "check_login",
    "id_command",
    "is_tag",
    "login_steps",
    "parse_id",
    "quoted",
]
