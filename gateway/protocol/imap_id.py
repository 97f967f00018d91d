"""ID: what a client says about itself, and what proxies tell a server about the client (RFC 2971)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.imap_commands import is_tag
from gateway.protocol.imap_requests import quoted

MAX_PAIRS: Final = 30
MAX_NAME: Final = 30
MAX_VALUE: Final = 1024
"""Octets of a value, and of a name the one before (RFC 2971 section 3.3)."""

_STRING: Final = re.compile(rb'"([^"\\\r\n]*+(?:\\["\\][^"\\\r\n]*+)*+)"')
_LITERAL: Final = re.compile(rb"\{([0-9]{1,10})[+-]?\}\r\n")
_NIL: Final = re.compile(rb"NIL(?=[ )])", re.IGNORECASE)
_ESCAPE: Final = re.compile(rb"\\(.)")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def parse_id(rest: bytes) -> dict[str, str | None]:
    """Return the pairs of an ID command, `rest` being the argument of its `Command`; {} for NIL and `()`.

    Names, which know no case, are in lower case; None is a value NIL. Raises `PeerError` for what RFC 2971 section 3.3
    forbids (a name twice, over 30 pairs, names over 30 octets, values over 1024), octets that are not UTF-8 and
    control characters.
    """
    if rest.upper() == b"NIL" or rest == b"()":
        return {}
    if rest[:1] != b"(":
        raise PeerError("ID without a list")
    pairs: dict[str, str | None] = {}
    position = 0
    while rest[position : position + 1] != b")":
        # behind "(" at first, then behind the blank that stands before each further pair
        if position and rest[position : position + 1] != b" ":
            raise PeerError("malformed ID list")
        name, position = _nstring(rest, position + 1, MAX_NAME)
        if name is None or rest[position : position + 1] != b" ":
            raise PeerError("malformed ID list")
        value, position = _nstring(rest, position + 1, MAX_VALUE)
        name = name.lower()
        if name in pairs or len(pairs) == MAX_PAIRS:
            raise PeerError("ID with a name twice or too many pairs")
        pairs[name] = value
    if position + 1 != len(rest):
        raise PeerError("text behind the ID list")
    return pairs


def _nstring(data: bytes, position: int, limit: int) -> tuple[str | None, int]:
    """Return the string or NIL at `position`, and where it ends."""
    match = _NIL.match(data, position)
    if match is not None:
        return None, match.end()
    match = _STRING.match(data, position)
    if match is not None:
        value, end = _ESCAPE.sub(rb"\1", match[1]), match.end()
    else:
        match = _LITERAL.match(data, position)
        if match is None:
            raise PeerError("malformed ID string")
        end = match.end() + int(match[1])
        value = data[match.end() : end]
        if end > len(data):
            raise PeerError("ID literal without its octets")
    if len(value) > limit:
        raise PeerError("ID string too long")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise PeerError("ID string is not UTF-8") from None
    if _CONTROL.search(text):
        raise PeerError("control character in an ID string")
    return text, end


def id_command(tag: bytes, values: Mapping[str, str | None]) -> bytes:
    """Return an ID command with its CRLF, all in quoted strings so that it needs no continuation; NIL for no values.

    Raises `LocalError` for what `parse_id` refuses, and for values that are not ASCII, which no quoted string carries.
    """
    if not is_tag(tag):
        raise LocalError("not a tag")
    if len(values) > MAX_PAIRS or len({name.lower() for name in values}) < len(values):
        raise LocalError("ID with a name twice or too many pairs")
    words = []
    for name, value in values.items():
        words += [_quoted(name, MAX_NAME), b"NIL" if value is None else _quoted(value, MAX_VALUE)]
    return b"%b ID %b\r\n" % (tag, b"(%b)" % b" ".join(words) if words else b"NIL")


def _quoted(text: str, limit: int) -> bytes:
    word = quoted(text.encode("utf-8", "surrogatepass"))
    if word is None or len(text) > limit or _CONTROL.search(text):
        raise LocalError("a name or value of ID is too long, not ASCII or has control characters")
    return word
