"""SMTP command lines: verb and argument (RFC 5321 section 4.1.1), and lines that are no SMTP at all.

The argument is left as it came; `smtp_envelope` reads those of MAIL and RCPT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import PeerError

NON_SMTP: Final = frozenset(
    {b"GET", b"POST", b"CONNECT", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"PATCH", b"TRACE", b"PRI"}
)
"""HTTP request methods; none of them is an SMTP verb."""

NON_SMTP_TLS: Final = b"\x16\x03"
"""How a TLS handshake record begins (RFC 8446 section 5.1)."""

_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_HEADER_LIKE: Final = re.compile(rb"[!-9;-~]+:")
_WORDS: Final = (
    *("HELO", "EHLO", "LHLO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "VRFY", "EXPN", "HELP", "QUIT"),
    *("STARTTLS", "AUTH", "XCLIENT", "XFORWARD", "ETRN", "BURL"),
)
_VERBS: Final = {form.encode(): word for word in _WORDS for form in (word, word.lower(), word.capitalize())}


@dataclass(frozen=True, slots=True)
class Command:
    """A command line: `verb` in upper case, `argument` without blanks around it, `line` as it came, without CRLF."""

    verb: str
    argument: bytes
    line: bytes

    def __repr__(self) -> str:
        # The argument of AUTH is a password as often as not.
        return f"Command({self.verb!r}, {len(self.argument)} octets)"


# Most commands without an argument are equal in every session; a value that never changes can be shared.
_BARE: Final = {form: Command(verb, b"", form) for form, verb in _VERBS.items()}


def parse_command(line: bytes) -> Command:
    """Read one command line, given without its line end.

    Raises `PeerError` with a 500 reply for an empty line, control characters (a NUL or a tab inside too) and a
    verb that is not ASCII. Argument bytes from 0x80 on pass here: whether they may depends on SMTPUTF8.
    """
    shared = _BARE.get(line)
    if shared is not None:
        return shared
    stripped = line.rstrip(b" \t")
    if stripped.isascii():
        if not stripped.decode("ascii").isprintable():
            raise PeerError("control character in a command", b"500 5.5.2 Control characters not allowed")
    elif _CONTROL.search(stripped):
        raise PeerError("control character in a command", b"500 5.5.2 Control characters not allowed")
    word, _, argument = stripped.partition(b" ")
    verb = _VERBS.get(word)
    if verb is None:
        if not word:
            raise PeerError("empty command", b"500 5.5.2 Command expected")
        if not word.isascii():
            raise PeerError("verb is not ASCII", b"500 5.5.2 Command not recognized")
        verb = word.decode("ascii").upper()
    return Command(verb, argument.lstrip(b" "), line)


def looks_like(line: bytes) -> str | None:
    """Name what a line that is no SMTP command comes from: `HTTP`, `header` or `TLS hello`; None if it may be SMTP.

    Browsers tricked into posting to a mail port, and senders out of step that send content as commands, talk
    like this; none of them reads our answer.
    """
    if line[:2] == NON_SMTP_TLS and line[2:3] in (b"\x00", b"\x01", b"\x02", b"\x03", b"\x04"):
        return "TLS hello"
    word, blank, _ = line.partition(b" ")
    if blank and word in NON_SMTP:
        return "HTTP"
    return "header" if _HEADER_LIKE.match(line) else None
