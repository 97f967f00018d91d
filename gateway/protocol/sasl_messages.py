"""The parts of clients' SASL messages that a server and an observer read alike: names, secrets, OAuth pairs."""

from __future__ import annotations

import re
from typing import Final

from gateway.protocol.errors import PeerError
from gateway.protocol.sasl_credentials import Digest, Password

DIGEST: Final = re.compile(rb"[0-9A-Fa-f]{32}")
"""MD5 in hexadecimal."""

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BEARER: Final = re.compile(rb"bearer +([!-~]+)", re.IGNORECASE)
_SASLNAME_ESCAPE: Final = re.compile(rb"=(2C|3D)?")


def malformed(text: str) -> PeerError:
    """Return the error for a message that cannot be read."""
    return PeerError(f"SASL: {text}", b"501 5.5.2 Cannot decode response")


def read_text(data: bytes, what: str, *, empty: bool = False) -> str:
    """Return a name as text: UTF-8 without control characters, which would end up in logs and headers."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise malformed(f"{what} is not UTF-8") from None
    if _CONTROL.search(text) or not (text or empty):
        raise malformed(f"{what} is empty or has control characters")
    return text


def read_secret(data: bytes) -> str:
    """Return a password as text: UTF-8, not empty, without NUL."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        raise malformed("password is empty, not UTF-8 or has a NUL")
    return text


def read_saslname(data: bytes) -> bytes:
    """Return a name with `=2C` and `=3D` decoded (RFC 5801 section 4, RFC 5802 section 5.1)."""
    return _SASLNAME_ESCAPE.sub(_saslname_character, data)


def _saslname_character(match: re.Match[bytes]) -> bytes:
    if match[1] is None:
        raise malformed("lone = in user name")
    return b"," if match[1] == b"2C" else b"="


def read_oauth_pairs(data: bytes) -> dict[bytes, bytes]:
    """Return the `key=value ^A` pairs of a message that a further ^A ends."""
    if not data.endswith(b"\x01\x01"):
        raise malformed("OAuth message without its end")
    pairs: dict[bytes, bytes] = {}
    for pair in data[:-2].split(b"\x01"):
        key, equals, value = pair.partition(b"=")
        if not equals or not key.isalpha() or key in pairs:
            raise malformed("malformed OAuth message")
        pairs[key] = value
    return pairs


def read_bearer(pairs: dict[bytes, bytes]) -> str:
    """Return the token of `auth=Bearer TOKEN`."""
    match = _BEARER.fullmatch(pairs.get(b"auth", b""))
    if match is None:
        raise malformed("OAuth message without bearer token")
    return match[1].decode()


def password(user: bytes, password: bytes, mechanism: str) -> Password:
    """Return the credentials of IMAP's LOGIN and POP3's USER and PASS under the name of a mechanism.

    Raises `PeerError` as PLAIN would for these octets: no UTF-8, empty, control characters in the name, a NUL.
    """
    return Password("", read_text(user, "user name"), read_secret(password), mechanism)


def apop_credentials(argument: bytes, challenge: bytes) -> Digest:
    """Return the credentials in APOP's argument, a name and a digest with one blank between (RFC 1939 section 7).

    `challenge` is the timestamp of our greeting with its brackets. Raises `PeerError` if the argument is malformed.
    """
    user, _, digest = argument.partition(b" ")
    if not DIGEST.fullmatch(digest):
        raise malformed("APOP without digest")
    return Digest(read_text(user, "user name"), challenge, digest.decode().lower(), "APOP")
