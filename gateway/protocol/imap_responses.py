"""Reads what an IMAP server says before and at login (RFC 3501 section 7)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import PeerError
from gateway.protocol.imap_commands import is_tag

MAX_LINE: Final = 8192
"""Octets of one line of a response, its end included."""

MAX_TOTAL: Final = 65536
"""Octets of one response with its literals."""

_TAGGED: Final = frozenset({b"OK", b"NO", b"BAD"})
_UNTAGGED: Final = _TAGGED | {b"BYE", b"PREAUTH"}
_LITERAL: Final = re.compile(rb"\{([0-9]{1,10})\}\Z")
_CODE: Final = re.compile(rb'\[((?:[^\]"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+)\] ?')
_CODE_OF_ANY_FORM: Final = re.compile(rb"\[([^\]]*)\] ?")


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    `tag` is b"*", b"+" or a command's. `status` is OK, NO, BAD, BYE, PREAUTH, or "" for data and continuations.
    `code` is what stands in brackets behind the status, `text` what follows: all of it for data, for `+` the base64.
    `raw` is the whole with its CRLFs and literals.
    """

    tag: bytes
    status: str
    code: bytes
    text: bytes
    raw: bytes


class ResponseReader:
    """Reads responses out of the bytes a server sends, however the network cut them.

    A line may end in LF alone. A reader that raised is of no further use.
    """

    __slots__ = ("_literal", "_partial", "_raw", "max_line", "max_total")

    def __init__(self, max_line: int = MAX_LINE, max_total: int = MAX_TOTAL) -> None:
        self.max_line = max_line
        self.max_total = max_total
        self._partial = b""
        self._raw = b""  # of a response with literals: what came up to the end of the last
        self._literal = 0  # octets of a literal still to come

    @property
    def pending(self) -> bool:
        """Whether a response has begun that is not complete."""
        return bool(self._partial or self._raw)

    def take_rest(self) -> bytes:
        """Give back, and forget, the bytes of a response that is not complete: for whoever reads on."""
        rest = self._raw + self._partial
        self._raw = self._partial = b""
        self._literal = 0
        return rest

    def feed(self, data: bytes) -> list[Response]:
        """Take bytes, give the responses they complete, in order.

        Raises `PeerError` for a line without tag, a tagged line without OK, NO or BAD, and for too many octets.
        """
        data = self._partial + data
        responses = []
        position = 0
        while True:
            if self._literal:
                literal = data[position : position + self._literal]
                self._raw += literal
                self._literal -= len(literal)
                position += len(literal)
                if self._literal:
                    break
            end = data.find(b"\n", position) + 1
            if not end:
                break
            response = self._line(data[position:end])
            position = end
            if response is not None:
                responses.append(response)
        self._partial = data[position:]
        self._check_length(len(self._partial))
        return responses

    def _check_length(self, octets: int) -> None:
        if octets > self.max_line or len(self._raw) + octets > self.max_total:
            raise PeerError("response too long")

    def _line(self, line: bytes) -> Response | None:
        """Take one line with its LF: the response, if it is its last line."""
        self._check_length(len(line))
        line = line[:-2] if line[-2:] == b"\r\n" else line[:-1]
        whole = self._raw + line + b"\r\n"
        if self._raw:
            begin = self._raw
        elif line[:1] == b"+":
            return Response(b"+", "", b"", line[2:] if line[1:2] == b" " else line[1:], whole)
        else:
            begin = line
        tag, _, rest = begin.partition(b" ")
        word, _, text = rest.partition(b" ")
        status = word.upper()
        if tag != b"*":
            if not is_tag(tag) or status not in _TAGGED:
                raise PeerError("malformed response line")
        elif not word:
            raise PeerError("empty response")
        if status in _UNTAGGED:
            code, text = _code(text)
            return Response(tag, status.decode("ascii"), code, text, whole)
        literal = _LITERAL.search(line)
        if literal is None:
            self._raw = b""
            return Response(tag, "", b"", whole[2:-2], whole)
        self._raw = whole
        self._literal = int(literal[1])
        self._check_length(0)
        if len(self._raw) + self._literal > self.max_total:
            raise PeerError("literal of a response too long")
        return None


def _code(text: bytes) -> tuple[bytes, bytes]:
    """Divide the text of a status response into the code inside brackets, b"" for none, and the text behind it."""
    match = _CODE.match(text) or _CODE_OF_ANY_FORM.match(text)
    return (match[1], text[match.end() :]) if match else (b"", text)


def capabilities_of(response: Response) -> dict[str, str] | None:
    """Return the capabilities in a CAPABILITY response or response code, None if it is neither.

    Names are upper-case. `NAME=VALUE` is a name with its value; several values of a name are joined by blanks:
    `AUTH=PLAIN AUTH=LOGIN` gives {"AUTH": "PLAIN LOGIN"}.
    """
    data = response.code if response.status else response.text if response.tag == b"*" else b""
    words = data.decode("utf-8", "replace").split()
    if not words or words[0].upper() != "CAPABILITY":
        return None
    capabilities: dict[str, str] = {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        name = name.upper()
        if not name or not word.isprintable():
            continue
        if name == "AUTH":
            value = value.upper()
        values = capabilities.get(name, "").split()
        if value and value not in values:
            values.append(value)
        capabilities[name] = " ".join(values)
    return capabilities
