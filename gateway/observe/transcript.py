"""The dialogue with a client of `debug_clients`, line by line in the log, without secrets and content.

A transcript is fed with the bytes of commands and replies in both directions; it does no I/O beyond logging. It
errs on the side of leaving out: only lines that begin with a known verb are shown, a line that belongs to a SASL
exchange never is, and of parameters that name or prove who the client is only the name remains. Message content
is not fed here but announced by its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from gateway.observe.logs import SHORT_SECRET, get_logger

MAX_LINES: Final = 2000
"""Lines of one session; what follows is left out, since a session may last for days."""

MAX_SECRETS: Final = 100
"""Secrets of one session that are looked for in replies; the last ones."""

MAX_LENGTH: Final = 1000
"""Characters shown of a line."""

_VERBS: Final = frozenset(
    b"EHLO HELO LHLO MAIL RCPT DATA BDAT RSET NOOP VRFY EXPN HELP QUIT STARTTLS XCLIENT XFORWARD ETRN".split()
)
_MECHANISMS: Final = frozenset(
    b"PLAIN LOGIN CRAM-MD5 DIGEST-MD5 EXTERNAL XOAUTH2 OAUTHBEARER SCRAM-SHA-1 SCRAM-SHA-256 GSSAPI NTLM".split()
)
_IDENTITY: Final = re.compile(rb"(?i)(\s(?:LOGIN|AUTH)=)(\S+)")
_REMOVED: Final = "[removed]"


def _to_log(session: str) -> Callable[[str], None]:
    log = get_logger("gateway.transcript")
    return lambda line: log.info("transcript", session=session, line=line)


class _Side:
    """Commands and replies of one conversation; knows when a SASL exchange is under way."""

    __slots__ = ("_exchange", "_partial", "_secrets", "command_mark", "reply_mark")

    def __init__(self, command_mark: str, reply_mark: str) -> None:
        self.command_mark = command_mark
        self.reply_mark = reply_mark
        self._exchange = False
        self._partial = b""
        self._secrets: list[bytes] = []

    def hide(self, line: bytes) -> None:
        """What of this command no reply may show either."""
        self._secrets = [*self._secrets, *secrets_of(line)][-MAX_SECRETS:]

    def command(self, line: bytes) -> str:
        """What to show of a command line."""
        verb = line.split(None, 1)[0].upper() if line.strip() else b""
        if verb == b"AUTH":
            self.hide(line)
            self._exchange = True
            mechanism = b"".join(line.split(None, 2)[1:2]).upper()
            return f"AUTH {mechanism.decode()} {_REMOVED}" if mechanism in _MECHANISMS else f"AUTH {_REMOVED}"
        if self._exchange:
            return _REMOVED
        if verb not in _VERBS:
            return f"[{len(line)} octets that are no command]"
        if verb == b"XCLIENT":
            self.hide(line)
        return _shown(_IDENTITY.sub(rb"\1" + _REMOVED.encode(), line))

    def reply(self, line: bytes) -> str:
        """What to show of a reply line."""
        if line.startswith(b"334"):
            return f"334 {_REMOVED}"
        if self._exchange and line[3:4] != b"-":
            self._exchange = False
        return _shown(without(line, self._secrets))

    def reply_lines(self, data: bytes) -> list[bytes]:
        """The complete lines in `data`; an incomplete end is kept for the next call."""
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[-MAX_LENGTH:]
        return lines


def secrets_of(line: bytes) -> list[bytes]:
    """What of a command is secret: the response in AUTH, the LOGIN of XCLIENT, or all of a SASL response.

    Some servers repeat in their reply the command that they did not take (Sendmail: `500 5.5.1 Command unrecognized`).
    """
    words = line.split()
    verb = words[0].upper() if words else b""
    if verb == b"AUTH":
        return words[2:]
    if verb == b"XCLIENT":
        return [match[2] for match in _IDENTITY.finditer(line)]
    return words


def without(line: bytes, secrets: Iterable[bytes]) -> bytes:
    """The line with these removed; what is shorter than SHORT_SECRET occurs in everything and stays."""
    for secret in secrets:
        if len(secret) >= SHORT_SECRET:
            line = line.replace(secret, _REMOVED.encode())
    return line


def _shown(line: bytes) -> str:
    text = line[: MAX_LENGTH + 1].decode("utf-8", "backslashreplace")
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."


class Transcript:
    """The transcript of one session. `emit` gets each line with its mark in front; by default it goes to the log."""

    __slots__ = ("_client", "_emit", "_left", "_upstream")

    def __init__(self, session_id: str, emit: Callable[[str], None] | None = None) -> None:
        self._emit = emit or _to_log(session_id)
        self._left = MAX_LINES
        self._client = _Side("C:", "S:")
        self._upstream = _Side("U>", "U<")

    def from_client(self, data: bytes) -> None:
        """One or more complete command lines of the client, with or without their line end."""
        self._commands(self._client, data)

    def from_client_secret(self) -> None:
        """A line of the client that was read as a SASL response."""
        self._put("C:", _REMOVED)

    def to_client(self, data: bytes) -> None:
        """Replies to the client, as sent."""
        self._replies(self._client, data)

    def to_upstream(self, data: bytes) -> None:
        """One or more complete commands to the upstream."""
        self._commands(self._upstream, data)

    def to_upstream_secret(self, line: bytes = b"") -> None:
        """A line to the upstream that is a secret as a whole."""
        self._upstream.hide(line)
        self._put("U>", _REMOVED)

    def from_upstream(self, data: bytes) -> None:
        """Replies of the upstream, as received."""
        self._replies(self._upstream, data)

    def content(self, size: int) -> None:
        """`size` octets of message content passed from client to upstream."""
        self._put("C:", f"[{size} octets of content]")

    def note(self, text: str) -> None:
        """Something that is no line: TLS began, the conversation was handed off."""
        self._put("--", text)

    def _commands(self, side: _Side, data: bytes) -> None:
        lines = data.split(b"\n")
        if len(lines) > 1 and not lines[-1]:
            lines.pop()
        for line in lines:
            self._put(side.command_mark, side.command(line.rstrip(b"\r")))

    def _replies(self, side: _Side, data: bytes) -> None:
        for line in side.reply_lines(data):
            self._put(side.reply_mark, side.reply(line.rstrip(b"\r")))

    def _put(self, mark: str, text: str) -> None:
        self._left -= 1
        if self._left > 0:
            self._emit(f"{mark} {text}")
        elif self._left == 0:
            self._emit(f"-- [more than {MAX_LINES} lines; the rest is left out]")
