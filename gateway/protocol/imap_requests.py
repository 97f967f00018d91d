"""What the gateway says to an IMAP server: strings and LOGIN (RFC 3501 section 6.2.3, RFC 7888)."""

from __future__ import annotations

from typing import Final

from gateway.protocol.errors import LocalError
from gateway.protocol.imap_commands import is_tag

MAX_UNANNOUNCED: Final = 4096
"""Octets of a literal sent without waiting: what LITERAL- allows, and few are longer under LITERAL+."""


def quoted(value: bytes) -> bytes | None:
    """Return `value` as a quoted string, None if only a literal carries it: 8-bit octets, CR, LF, NUL."""
    if not value.isascii() or b"\r" in value or b"\n" in value or b"\0" in value:
        return None
    return b'"%b"' % value.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def check_login(value: bytes) -> None:
    """Raise `LocalError` for a user name or password with CR, LF or NUL.

    Such octets could end a line or a string and begin a command; no server has such credentials. The text holds
    nothing of the value.
    """
    if b"\r" in value or b"\n" in value or b"\0" in value:
        raise LocalError("CR, LF or NUL in a user name or password")


def login_steps(tag: bytes, user: bytes, password: bytes, *, literal_plus: bool, literals: bool = False) -> list[bytes]:
    """Return a LOGIN command with its CRLF in pieces; before each further piece the server's `+` is awaited.

    Quoted strings where they can carry the value, unless `literals` asks for literals always. With `literal_plus`
    (LITERAL+ or LITERAL- announced) literals up to 4096 octets need no waiting. Raises `LocalError` for a bad
    tag and as `check_login`.
    """
    if not is_tag(tag):
        raise LocalError("not a tag")
    pieces: list[bytes] = []
    piece = tag + b" LOGIN"
    for value in (user, password):
        check_login(value)
        string = None if literals else quoted(value)
        if string is not None:
            piece += b" " + string
        elif literal_plus and len(value) <= MAX_UNANNOUNCED:
            piece += b" {%d+}\r\n%b" % (len(value), value)
        else:
            pieces.append(piece + b" {%d}\r\n" % len(value))
            piece = value
    return [*pieces, piece + b"\r\n"]
