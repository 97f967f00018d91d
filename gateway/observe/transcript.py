"""The dialogue with a client of `debug_clients`, line by line in the log, without secrets and content.

A transcript is fed with the bytes of commands and replies in both directions; it does no I/O beyond logging. It
errs on the side of leaving out: only lines that begin with a known verb are shown, a line that belongs to a SASL
exchange never is, and of parameters that name or prove who the client is only the name remains. Message content
is not fed here but announced by its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.observe.logs import SHORT_SECRET, get_logger
from gateway.protocol.imap import is_tag

MAX_LINES: Final = 2000
"""Lines of one session; what follows is left out, since a session may last for days."""

MAX_SECRETS: Final = 100
"""Secrets of one session that are looked for in replies; the last ones."""

MAX_LENGTH: Final = 1000
"""Characters shown of a line."""

_SMTP_VERBS: Final = frozenset(
    b"EHLO HELO LHLO MAIL RCPT DATA BDAT RSET NOOP VRFY EXPN HELP QUIT STARTTLS XCLIENT XFORWARD ETRN".split()
)
_IMAP_VERBS: Final = frozenset(
    b"CAPABILITY NOOP LOGOUT STARTTLS ID ENABLE SELECT EXAMINE LIST LSUB STATUS NAMESPACE IDLE".split()
)
_POP3_VERBS: Final = frozenset(b"CAPA STLS USER NOOP QUIT STAT LIST RETR DELE RSET TOP UIDL UTF8 LANG XCLIENT".split())
_MECHANISMS: Final = frozenset(
    b"PLAIN LOGIN CRAM-MD5 DIGEST-MD5 EXTERNAL XOAUTH2 OAUTHBEARER SCRAM-SHA-1 SCRAM-SHA-256 GSSAPI NTLM".split()
)
_IDENTITY: Final = re.compile(rb"(?i)(\s(?:LOGIN|AUTH)=)(\S+)")
_REMOVED: Final = "[removed]"
_LITERAL: Final = re.compile(rb"\{[0-9]*[+-]?\}\Z")


def _to_log(session: str) -> Callable[[str], None]:
    log = get_logger("gateway.transcript")
    return lambda line: log.info("transcript", session=session, line=line)


@dataclass(frozen=True, slots=True)
class _Command:
    """What a command line shows, the secrets in it, and whether secrets may follow it until it is answered."""

    shown: str
    secrets: Sequence[bytes] = ()
    exchange: bool = False


def _no_command(line: bytes) -> _Command:
    return _Command(f"[{len(line)} octets that are no command]")


def _auth(begin: bytes, arguments: bytes) -> _Command:
    """AUTH and AUTHENTICATE: the mechanism."""
    mechanism, *responses = arguments.split() or [b""]
    name = f"{mechanism.upper().decode()} " if mechanism.upper() in _MECHANISMS else ""
    return _Command(f"{begin.decode()} {name}{_REMOVED}", responses, exchange=True)


def _smtp_command(line: bytes) -> _Command:
    verb, rest = _words(line)
    if verb == b"AUTH":
        return _auth(verb, rest)
    if verb not in _SMTP_VERBS:
        return _no_command(line)
    secrets = secrets_of(line) if verb == b"XCLIENT" else ()
    return _Command(_shown(_IDENTITY.sub(rb"\1" + _REMOVED.encode(), line)), secrets)


def _imap_command(line: bytes) -> _Command:
    """Behind the tag; the octets of literals are not fed, and what follows them may be as secret as they are."""
    tag, _, command = line.partition(b" ")
    verb, rest = _words(command)
    if not is_tag(tag):
        return _no_command(line)
    begin = tag + b" " + verb
    if verb == b"LOGIN":
        return _Command(f"{begin.decode()} {_REMOVED}", _login_secrets(rest), exchange=True)
    if verb == b"AUTHENTICATE":
        return _auth(begin, rest)
    if verb not in _IMAP_VERBS:
        return _no_command(line)
    return _Command(_shown(line), exchange=_LITERAL.search(line) is not None)


def _login_secrets(arguments: bytes) -> list[bytes]:
    """The password as it stands behind the user's name, and without its quotes."""
    begin, end = (1, b'"') if arguments[:1] == b'"' else (0, b" ")
    password = arguments[begin:].partition(end)[2].strip()
    bare = password.removeprefix(b'"').removesuffix(b'"')
    return [password, bare, bare.replace(b'\\"', b'"').replace(b"\\\\", b"\\")] if password else []


def _pop3_command(line: bytes) -> _Command:
    verb, rest = _words(line)
    if verb == b"AUTH":
        return _auth(verb, rest)
    if verb == b"PASS":
        return _Command(f"PASS {_REMOVED}", [rest])
    if verb == b"APOP":
        name, _, digest = rest.rpartition(b" ")
        return _Command(f"{_shown(b'APOP ' + name).rstrip()} {_REMOVED}", [digest])
    if verb not in _POP3_VERBS:
        return _no_command(line)
    return _Command(_shown(_IDENTITY.sub(rb"\1" + _REMOVED.encode(), line)))


def _words(line: bytes) -> tuple[bytes, bytes]:
    """The verb in upper case, and the rest."""
    verb, *rest = line.split(None, 1) or [b""]
    return verb.upper(), b"".join(rest)


@dataclass(frozen=True, slots=True)
class _Protocol:
    """How to read its commands, and of its replies the greeting, challenges, and those that end an exchange."""

    read: Callable[[bytes], _Command]
    greeting: re.Pattern[bytes]
    challenge: re.Pattern[bytes]
    end: re.Pattern[bytes]


_CONTINUATION: Final = re.compile(rb"\+(?= |\Z)")
_SMTP: Final = _Protocol(_smtp_command, re.compile(rb""), re.compile(rb"334"), re.compile(rb"(?s)(?!...-)"))
_IMAP: Final = _Protocol(_imap_command, re.compile(rb"\* "), _CONTINUATION, re.compile(rb"\* BYE|(?!\* )"))
_POP3: Final = _Protocol(_pop3_command, re.compile(rb"\+OK|-ERR"), _CONTINUATION, re.compile(rb"\+OK|-ERR"))


class _Side:
    """Commands and replies of one conversation; knows when a SASL exchange is under way.

    Which protocol it is, its first reply says: the greeting. Nobody is heard before that.
    """

    __slots__ = ("_exchange", "_partial", "_protocol", "_secrets", "command_mark", "reply_mark")

    def __init__(self, command_mark: str, reply_mark: str) -> None:
        self.command_mark = command_mark
        self.reply_mark = reply_mark
        self._protocol: _Protocol | None = None
        self._exchange = False
        self._partial = b""
        self._secrets: list[bytes] = []

    def hide(self, secrets: Iterable[bytes]) -> None:
        """What no reply may show either."""
        self._secrets = [*self._secrets, *secrets][-MAX_SECRETS:]

    def command(self, line: bytes) -> str:
        """What to show of a command line."""
        command = (self._protocol or _SMTP).read(line)
        if self._exchange and not command.exchange:
            return _REMOVED
        self.hide(command.secrets)
        self._exchange = self._exchange or command.exchange
        return command.shown

    def reply(self, line: bytes) -> str:
        """What to show of a reply line."""
        if self._protocol is None:
            self._protocol = next((one for one in (_IMAP, _POP3) if one.greeting.match(line)), _SMTP)
        challenge = self._protocol.challenge.match(line)
        if challenge is not None:
            return f"{challenge[0].decode()} {_REMOVED}"
        if self._protocol.end.match(line):
            self._exchange = False
        return _shown(without(line, self._secrets))

    def reply_lines(self, data: bytes) -> list[bytes]:
        """The complete lines in `data`; an incomplete end is kept for the next call."""
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[-MAX_LENGTH:]
        return lines


def secrets_of(line: bytes) -> list[bytes]:
    """What of SMTP's command is secret: the response in AUTH, the LOGIN of XCLIENT, or all of a SASL response.

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

    def hide(self, secret: bytes) -> None:
        """What no reply may show, neither the upstream's nor, in its words, ours."""
        self._client.hide((secret,))
        self._upstream.hide((secret,))

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
        self._upstream.hide(line.split())
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
