"""xtext, the encoding of parameter values in DSN, AUTH=, XCLIENT and XFORWARD (RFC 3461 section 4).

Bytes 33 to 126 stand for themselves except `+` and `=`; every other byte is `+` and two hexadecimal digits.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.protocol.errors import PeerError

_MUST_ENCODE: Final = re.compile(rb"[^!-*,-<>-~]")
_VALID: Final = re.compile(rb"(?:[!-*,-<>-~]|\+[0-9A-Fa-f]{2})*")
_ENCODED: Final = re.compile(rb"\+(..)")


def encode(value: bytes) -> bytes:
    """Return `value` as xtext, with upper-case digits."""
    return _MUST_ENCODE.sub(lambda match: b"+%02X" % match[0][0], value)


def decode(text: bytes) -> bytes:
    """Return the bytes that `text` stands for.

    Lower-case digits are taken too, as Postfix does. Anything else outside the grammar raises `PeerError`.
    """
    if not _VALID.fullmatch(text):
        raise PeerError("malformed xtext", b"501 5.5.4 Malformed xtext")
    if b"+" not in text:
        return text
    return _ENCODED.sub(lambda match: bytes.fromhex(match[1].decode()), text)
