"""The POP3 codec: a client's commands, an upstream's responses, capabilities (RFC 1939, 2449, 3206, 5034).

Lines come and go without their ends, except where a function gives whole lines. How long a client's line may be is
for its reader to say.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.imap_requests import check_login

MAX_LINE: Final = 8192
"""Octets of a line of an upstream's response, its end included. RFC 2449 section 4 says 512; challenges are longer."""

MAX_TOTAL: Final = 65536
"""Octets of a multi-line response."""

XCLIENT_LIMIT: Final = 1024
"""Bytes of an XCLIENT command with its CRLF; Dovecot's server takes no longer line."""

_VERB: Final = re.compile(rb"[A-Za-z]+")
_CODE: Final = re.compile(rb"\[([!-Z\\^-~]+)\]")
_TIMESTAMP: Final = re.compile(rb"<[!-;=?A-~]+@[!-;=?A-~]+>")
_NAME: Final = re.compile(r"[A-Z][A-Z0-9-]*")
_VALUE: Final = re.compile(r"[!-~]+")
_CAPABILITY: Final = re.compile(r"[!-~]+(?: [ -~]+)?")


@dataclass(frozen=True, slots=True)
class Command:
    """A command line: `verb` in upper case; `argument` without blanks around it, except PASS's, which is kept whole."""

    verb: str
    argument: bytes

    def __repr__(self) -> str:
        # The arguments of PASS, AUTH and APOP are secrets.
        return f"Command({self.verb!r}, {len(self.argument)} octets)"


def parse_command(line: bytes) -> Command:
    """Read one command line, given without its line end.

    USER's name may hold blanks. Raises `PeerError`, to be answered with -ERR, for CR, LF and NUL anywhere and a verb
    that is not letters alone.
    """
    if b"\0" in line or b"\r" in line or b"\n" in line:
        raise PeerError("CR, LF or NUL within a line")
    word, _, argument = line.partition(b" ")
    if not _VERB.fullmatch(word):
        raise PeerError("no POP3 command")
    verb = word.decode("ascii").upper()
    return Command(verb, argument if verb == "PASS" else argument.strip(b" "))


def user_command(user: bytes) -> bytes:
    """Return the USER command without CRLF. Raises `LocalError` for CR, LF, NUL and an empty name."""
    check_login(user)
    if not user:
        raise LocalError("USER cannot carry an empty name")
    return b"USER " + user


def pass_command(password: bytes) -> bytes:
    """Return the PASS command without CRLF. Raises `LocalError` for CR, LF, NUL."""
    check_login(password)
    return b"PASS " + password


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    `text` is what follows the status, for a `continuation` the base64; `lines` are those of a multi-line response,
    dots unstuffed, without their ends; `raw` is the whole as it goes over the wire.
    """

    ok: bool
    text: bytes
    lines: tuple[bytes, ...] = ()
    raw: bytes = b""
    continuation: bool = False


class ResponseReader:
    """Reads responses out of the bytes an upstream sends, however the network cut them.

    Only the command tells whether a response has several lines, so say `expect` for each command, in order; what
    was not announced, as the greeting, is single. A line may end in LF alone. A reader that raised is of no further
    use.
    """

    __slots__ = ("_expected", "_first", "_lines", "_partial", "_raw", "_size", "max_line", "max_total")

    def __init__(self, max_line: int = MAX_LINE, max_total: int = MAX_TOTAL) -> None:
        self.max_line = max_line
        self.max_total = max_total
        self._expected: deque[bool] = deque()
        self._partial = b""
        self._first: bytes | None = None  # status line of a multi-line response that is not complete
        self._lines: list[bytes] = []
        self._raw: list[bytes] = []
        self._size = 0

    @property
    def pending(self) -> bool:
        """Whether a response has begun that is not complete."""
        return bool(self._partial) or self._first is not None

    def expect(self, multi: bool) -> None:
        """Say of the next command sent whether its +OK has further lines. -ERR never has, and `+` is none's end."""
        self._expected.append(multi)

    def take_rest(self) -> bytes:
        """Give back, and forget, the bytes of a response that is not complete: for whoever reads on."""
        rest = b"".join(self._raw) + self._partial
        self._partial = b""
        self._forget()
        return rest

    def feed(self, data: bytes) -> list[Response]:
        """Take bytes, give the responses they complete, in order.

        Raises `PeerError` for a first line without +OK, -ERR or `+`, and for too many octets.
        """
        *lines, self._partial = (self._partial + data).split(b"\n")
        responses = []
        for line in lines:
            response = self._line(line[:-1] if line[-1:] == b"\r" else line)
            if response is not None:
                responses.append(response)
        self._check_length(len(self._partial))
        return responses

    def _check_length(self, octets: int) -> None:
        if octets > self.max_line or self._size + octets > self.max_total:
            raise PeerError("response too long")

    def _line(self, line: bytes) -> Response | None:
        """Take one line without its end: the response, if it is its last line."""
        self._check_length(len(line) + 2)
        if self._first is None:
            return self._status_line(line)
        self._keep(line)
        if line != b".":
            self._lines.append(line[1:] if line[:1] == b"." else line)
            return None
        response = Response(True, self._first, tuple(self._lines), b"".join(self._raw))
        self._forget()
        return response

    def _status_line(self, line: bytes) -> Response | None:
        raw = line + b"\r\n"
        word, _, text = line.partition(b" ")
        if word == b"+":
            return Response(True, text, (), raw, continuation=True)
        if word not in (b"+OK", b"-ERR"):
            raise PeerError("malformed response line")
        multi = self._expected.popleft() if self._expected else False
        ok = word == b"+OK"
        if not ok or not multi:
            return Response(ok, text, (), raw)
        self._first = text
        self._keep(line)
        return None

    def _keep(self, line: bytes) -> None:
        self._raw.append(line + b"\r\n")
        self._size += len(line) + 2

    def _forget(self) -> None:
        self._first = None
        self._lines = []
        self._raw = []
        self._size = 0


def parse_capa(lines: Iterable[bytes]) -> dict[str, str]:
    """Return the capabilities of a CAPA response: upper-case name to parameters (RFC 2449 section 5).

    Lines that are empty or not printable are passed over; a name that comes twice keeps its first parameters.
    """
    capabilities: dict[str, str] = {}
    for line in lines:
        text = line.decode("utf-8", "replace").strip()
        name, _, parameters = text.partition(" ")
        if name and text.isprintable():
            capabilities.setdefault(name.upper(), " ".join(parameters.split()))
    return capabilities


def format_capa(capabilities: Mapping[str, str]) -> bytes:
    """Return the lines behind CAPA's +OK, the final `.` among them. Raises `LocalError` for what is no line."""
    lines = [f"{name} {parameters}" if parameters else name for name, parameters in capabilities.items()]
    for line in lines:
        if not _CAPABILITY.fullmatch(line) or line.startswith("."):
            raise LocalError("a capability is empty or not printable")
    return "".join(f"{line}\r\n" for line in [*lines, "."]).encode("ascii")


def xclient_command(attributes: Mapping[str, str]) -> bytes:
    """Return Dovecot's XCLIENT command without CRLF: `NAME=value` as they are, in order, without any encoding.

    Raises `LocalError` for no attributes, a malformed name, a value that is empty or holds blanks, control characters
    or what is not ASCII, and a line over 1024 bytes.
    """
    for name, value in attributes.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise LocalError("XCLIENT cannot carry this attribute")
    line = " ".join(["XCLIENT", *(f"{name}={value}" for name, value in attributes.items())]).encode("ascii")
    if not attributes or len(line) + 2 > XCLIENT_LIMIT:
        raise LocalError("XCLIENT without attributes, or too long")
    return line


def response_code(text: bytes) -> str:
    """Return the code in brackets that a response's text begins with, upper-case: "AUTH", "SYS/TEMP"; "" for none.

    RFC 2449 section 8, RFC 3206.
    """
    match = _CODE.match(text)
    return match[1].decode("ascii").upper() if match else ""


def apop_timestamp(greeting: bytes) -> bytes | None:
    """Return the `<...@...>` of a greeting, brackets included, None where APOP is not offered (RFC 1939 section 7)."""
    stamps = _TIMESTAMP.findall(greeting)
    return bytes(stamps[-1]) if stamps else None
