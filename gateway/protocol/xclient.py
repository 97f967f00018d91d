"""XCLIENT and XFORWARD: how one mail server tells another who the client really is.

`parse` reads the XCLIENT of a trusted peer; `format_command` and `format_xforward` write ours to the upstream.
The commands are Postfix's; its server refuses what these rules refuse (XCLIENT_README, XFORWARD_README).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from typing import Final, NoReturn

from gateway.protocol import xtext
from gateway.protocol.errors import LocalError, PeerError

ATTRIBUTES: Final = ("NAME", "REVERSE_NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
"""The XCLIENT attributes that `parse` takes, as an EHLO line lists them."""

UNAVAILABLE: Final = b"[UNAVAILABLE]"
"""Known to have no value; also the value to send for it."""

TEMPUNAVAIL: Final = b"[TEMPUNAVAIL]"
"""A name whose look-up failed for now: the value `parse` gives, and the value to send."""

MAX_VALUE: Final = 255
"""Bytes of a value before encoding; Postfix refuses longer ones."""

LINE_LIMIT: Final = 512
"""Bytes of a command with its CRLF."""

_ATTRIBUTE_NAME: Final = re.compile(r"[A-Z][A-Z0-9_-]*")
_HOST_NAME: Final = re.compile(rb"(?=.{1,255}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
_PORT: Final = re.compile(rb"[0-9]{1,5}")
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_DROPPED_FIRST: Final = ("HELO", "REVERSE_NAME")


def parse(args: bytes) -> dict[str, bytes | None]:
    """Return the attributes in `args`, the part of an XCLIENT line behind the verb.

    Names are upper-case. None is `[UNAVAILABLE]`; the constant `TEMPUNAVAIL` may stand for NAME and REVERSE_NAME.
    Addresses come in their shortest form without `IPV6:`, v4-mapped ones as IPv4; ports as plain decimals; PROTO
    upper-case. An unknown, repeated, empty or malformed attribute raises `PeerError` (501 5.5.4).
    """
    attributes: dict[str, bytes | None] = {}
    for word in args.split(b" "):
        if not word:
            continue
        raw_name, equals, text = word.partition(b"=")
        name = raw_name.upper().decode("latin-1")
        if not equals or name not in ATTRIBUTES:
            raise PeerError("unknown XCLIENT attribute", b"501 5.5.4 Unknown XCLIENT attribute")
        if name in attributes:
            _refuse(name)
        attributes[name] = _parse_value(name, text)
    if not attributes:
        raise PeerError("XCLIENT without attributes", b"501 5.5.4 Syntax: XCLIENT attribute=value...")
    return attributes


def _refuse(name: str) -> NoReturn:
    raise PeerError(f"bad XCLIENT {name}", b"501 5.5.4 Bad XCLIENT %s value" % name.encode())


def _parse_value(name: str, text: bytes) -> bytes | None:
    try:
        value = xtext.decode(text)
    except PeerError:
        _refuse(name)
    if not value or len(value) > MAX_VALUE:
        _refuse(name)
    marker = value.upper()
    if marker == UNAVAILABLE:
        return None
    if marker == TEMPUNAVAIL and name in ("NAME", "REVERSE_NAME"):
        return TEMPUNAVAIL
    if name in ("ADDR", "DESTADDR"):
        return _parse_address(name, value)
    if name in ("PORT", "DESTPORT"):
        if not _PORT.fullmatch(value) or int(value) > 65535:
            _refuse(name)
        return b"%d" % int(value)
    if name == "PROTO":
        if marker not in (b"SMTP", b"ESMTP", b"LMTP"):
            _refuse(name)
        return marker
    if name in ("NAME", "REVERSE_NAME"):
        if not _HOST_NAME.fullmatch(value):
            _refuse(name)
    elif _CONTROL.search(value):
        _refuse(name)
    return value


def _parse_address(name: str, value: bytes) -> bytes:
    text = value.decode("latin-1")
    try:
        if text[:5].upper() != "IPV6:":
            return str(IPv4Address(text)).encode()
        address = IPv6Address(text[5:])
    except AddressValueError:
        _refuse(name)
    if address.scope_id is not None:
        _refuse(name)
    return str(address.ipv4_mapped or address).encode()


def address_value(ip: str) -> bytes:
    """Return the value of ADDR or DESTADDR for an address in text form, which may carry a zone (`fe80::1%eth0`).

    IPv6 gets the prefix `IPV6:`; v4-mapped addresses become IPv4; zones, which mean nothing elsewhere, are left out.
    Raises `LocalError` if `ip` is no address.
    """
    try:
        address = ip_address(ip.partition("%")[0])
    except ValueError:
        raise LocalError("not an IP address") from None
    if isinstance(address, IPv4Address):
        return str(address).encode()
    return str(address.ipv4_mapped).encode() if address.ipv4_mapped else b"IPV6:" + str(address).encode()


def _encoded(attributes: Mapping[str, bytes], offered: Collection[str]) -> Iterable[tuple[str, bytes]]:
    """Yield the offered attributes as (name, `name=xtext`)."""
    for name, value in attributes.items():
        if not _ATTRIBUTE_NAME.fullmatch(name):
            raise LocalError("malformed attribute name")
        if name in offered:
            yield name, name.encode() + b"=" + xtext.encode(value)


def format_command(
    verb: bytes, attributes: Mapping[str, bytes], offered: Collection[str], limit: int = LINE_LIMIT
) -> bytes:
    """Return one command without CRLF, with those `attributes` that are `offered`, in the order of the mapping.

    Names are upper-case in both; values are raw, addresses from `address_value`. It is one command because a second
    XCLIENT resets what the first one set. HELO, then REVERSE_NAME, are left out if the line with its CRLF is longer
    than `limit`, or if their own value is empty or over 255 bytes: the EHLO that follows repeats the one, and the other
    is only for logs. Raises `LocalError` if it still cannot be said, or if nothing is left to say.
    """
    parts = dict(_encoded(attributes, offered))
    for name in list(parts):
        if not 0 < len(attributes[name]) <= MAX_VALUE:
            if name not in _DROPPED_FIRST:
                raise LocalError(f"the value of {name} is empty or too long")
            del parts[name]
    if not parts:
        raise LocalError("no attribute to send is offered")
    for name in ("", *_DROPPED_FIRST):
        parts.pop(name, None)
        line = b" ".join((verb, *parts.values()))
        if parts and len(line) + 2 <= limit:
            return line
    raise LocalError(f"the command is longer than {limit} bytes")


def format_xforward(attributes: Mapping[str, bytes], offered: Collection[str], limit: int = LINE_LIMIT) -> list[bytes]:
    """Return as few XFORWARD commands as `limit` allows, without CRLF, none if nothing is offered.

    Unlike XCLIENT's, XFORWARD's attributes add up over commands. The first presets all others to unavailable, so a
    value that is empty, over 255 bytes or does not fit a line of its own is left out. Arguments as `format_command`.
    """
    lines: list[bytes] = []
    for name, part in _encoded(attributes, offered):
        if not 0 < len(attributes[name]) <= MAX_VALUE or len(b"XFORWARD ") + len(part) + 2 > limit:
            continue
        if lines and len(lines[-1]) + 1 + len(part) + 2 <= limit:
            lines[-1] += b" " + part
        else:
            lines.append(b"XFORWARD " + part)
    return lines
