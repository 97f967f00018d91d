"""The little of HTTP/1 that a call to an auth_http server takes: a request without body, a response's header fields.

As lenient as nginx, whose servers people have written: the status line may say anything or be missing, names may be
odd. Unlike nginx's, connections are kept alive, so a body is skipped. Framing follows RFC 9112; what it leaves in
doubt costs the connection, never the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from gateway.protocol.errors import LocalError, PeerError

HEADER_LIMIT: Final = 16384
"""Bytes of status line and header fields, interim responses included."""

BODY_LIMIT: Final = 1 << 20
"""Bytes of a body that are worth skipping to keep a connection."""

_ESCAPED: Final = re.compile(rb"[\x00-\x20%\x7f]")
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET: Final = re.compile(r"[!-~]+")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")

Headers = tuple[tuple[str, bytes], ...]
"""Header fields in the order received: lower-case name, value without the blanks around it."""


def escape(value: bytes) -> bytes:
    """Return `value` with bytes 0x00 to 0x20, 0x7F and `%` as `%XX`, as nginx escapes Auth-User and Auth-Pass."""
    return _ESCAPED.sub(lambda match: b"%%%02X" % match[0][0], value)


@lru_cache(maxsize=128)
def _field_start(name: str) -> bytes:
    if not _TOKEN.fullmatch(name):
        raise LocalError("malformed header name")
    return name.encode() + b": "


@lru_cache(maxsize=128)
def _request_line(method: str, target: str) -> bytes:
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise LocalError("malformed request line")
    return f"{method} {target} HTTP/1.1\r\n".encode()


def request(method: str, target: str, headers: Iterable[tuple[str, bytes]]) -> bytes:
    """Return an HTTP/1.1 request without body; `headers` include Host and are written in their order.

    Raises `LocalError` for a name that is no token and for a value with CR, LF or NUL: nothing a mail client says may
    become a header of its own, so callers `escape` it.
    """
    fields = list(headers)
    parts = [_request_line(method, target)]
    for name, value in fields:
        parts += (_field_start(name), value, b"\r\n")
    parts.append(b"\r\n")
    data = b"".join(parts)
    lines = len(fields) + 2
    if data.count(b"\n") != lines or data.count(b"\r") != lines or b"\0" in data:
        raise LocalError("CR, LF or NUL in a header value")
    return data


@dataclass(frozen=True, slots=True)
class Response:
    """A response without its body; `status` is 0 where the status line is missing or no status line."""

    status: int
    headers: Headers
    keep_alive: bool


def get(headers: Headers, name: str) -> bytes | None:
    """Return the value of a field by its lower-case name; of repeated ones the last counts, as in nginx."""
    found = None
    for key, value in headers:
        if key == name:
            found = value
    return found


class ResponseParser:
    """Takes one response. `done` once `response` is final and, if the connection is kept, its body was skipped."""

    def __init__(self) -> None:
        self.done = False
        self._response: Response | None = None
        self._buffer = bytearray()
        self._searched = 0
        self._header_bytes = 0
        self._body_bytes = 0
        self._skip = 0
        self._chunked = False
        self._after_chunk = False
        self._trailers = False

    @property
    def response(self) -> Response:
        """The response; raises `LocalError` before `done`."""
        if self._response is None or not self.done:
            raise LocalError("the response is not complete")
        return self._response

    @property
    def leftover(self) -> bytes:
        """What came behind the response. It belongs to nothing we asked for."""
        return bytes(self._buffer) if self.done else b""

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.done and self.response.keep_alive and not self._buffer

    def feed(self, data: bytes) -> None:
        """Take bytes from the server; raises `PeerError` for garbage and for header fields beyond `HEADER_LIMIT`."""
        self._buffer += data
        while self._response is None:
            if not self._take_header():
                return
        if not self.done:
            self._skip_body()

    def eof(self) -> None:
        """Take the end of the stream: it may cut a body short, but not the header fields (`PeerError`)."""
        if self._response is None:
            raise PeerError("HTTP response ended before its header fields did")
        if not self.done or self._response.keep_alive:
            self._give_up()

    def _take_header(self) -> bool:
        """Take a header section, if it is there; one of an interim response leaves `_response` None."""
        buffer = self._buffer
        end, after = _section_end(buffer, self._searched)
        if self._header_bytes + (after if end >= 0 else len(buffer)) > HEADER_LIMIT:
            raise PeerError("HTTP response header too long")
        if end < 0:
            self._searched = max(0, len(buffer) - 2)
            return False
        head = bytes(buffer[:end])
        del buffer[:after]
        self._searched = 0
        self._header_bytes += after
        status, version, headers = _parse_head(head)
        if 100 <= status < 200 and status != 101:
            return True
        self._response = self._framed(status, version, headers)
        return True

    def _framed(self, status: int, version: bytes, headers: Headers) -> Response:
        """Find out where the body ends (RFC 9112 section 6.3); `done` at once if nobody can tell, or will reuse."""
        lengths = {value for name, value in headers if name == "content-length"}
        codings = [value for name, value in headers if name == "transfer-encoding"]
        keep_alive = _keeps_alive(version, headers) and status not in (0, 101)
        if status not in (204, 304):
            if codings:
                self._chunked = len(codings) == 1 and codings[0].lower() == b"chunked" and not lengths
                keep_alive = keep_alive and self._chunked
            else:
                text = lengths.pop() if len(lengths) == 1 else b""
                self._skip = int(text) if text.isdigit() and len(text) < 10 else BODY_LIMIT + 1
                keep_alive = keep_alive and self._skip <= BODY_LIMIT
        self.done = not keep_alive
        return Response(status, headers, keep_alive)

    def _skip_body(self) -> None:
        if not self._skip_bytes():
            return
        if not self._chunked:
            self.done = True
            return
        while not self.done and self._skip_line():
            if not self._skip_bytes():
                return

    def _skip_bytes(self) -> bool:
        """Drop what is there of a body or chunk; whether that is all of it."""
        taken = min(self._skip, len(self._buffer))
        del self._buffer[:taken]
        self._skip -= taken
        return self._skip == 0

    def _skip_line(self) -> bool:
        """Take one line of the chunked framing (RFC 9112 section 7.1), if it is there."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEADER_LIMIT:
                self._give_up()
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        self._body_bytes += end + 2
        if self._trailers:
            self.done = not line
        elif self._after_chunk:
            self._after_chunk = False
            if line:
                self._give_up()
        elif match := _CHUNK.fullmatch(line):
            self._skip = int(match[1], 16)
            self._body_bytes += self._skip
            self._after_chunk, self._trailers = self._skip > 0, self._skip == 0
        else:
            self._give_up()
        if self._body_bytes > BODY_LIMIT:
            self._give_up()
        return True

    def _give_up(self) -> None:
        """End here: the answer stands, the connection does not."""
        assert self._response is not None
        self._response = replace(self._response, keep_alive=False)
        self.done = True


def _section_end(buffer: bytearray, start: int) -> tuple[int, int]:
    """Return where the header section ends and where the empty line behind it does, or (-1, -1).

    Lines may end with LF alone. `start` is from where the search has not been made.
    """
    if buffer.startswith(b"\r\n"):
        return 0, 2
    if buffer.startswith(b"\n"):
        return 0, 1
    end = buffer.find(b"\n\r\n", start)
    bare = buffer.find(b"\n\n", start, end + 1 if end >= 0 else len(buffer))
    if bare >= 0:
        return bare, bare + 2
    return (end, end + 3) if end >= 0 else (-1, -1)


def _parse_head(head: bytes) -> tuple[int, bytes, Headers]:
    """Return status, HTTP version (b"" without a status line) and header fields of a section."""
    head = head.removesuffix(b"\r").replace(b"\r\n", b"\n")
    if b"\r" in head or b"\0" in head:
        raise PeerError("CR or NUL in the HTTP response header")
    lines = head.split(b"\n")
    status, version = 0, b""
    if lines[0].startswith(b"HTTP/"):
        words = lines[0].split(None, 2)
        version = words[0]
        if len(words) > 1 and len(words[1]) == 3 and words[1].isdigit():
            status = int(words[1])
        del lines[0]
    elif b":" not in lines[0]:
        del lines[0]
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or line[0] in b" \t":
            raise PeerError("malformed header field in the HTTP response")
        headers.append((name.decode("latin-1").lower(), value.strip(b" \t")))
    if not headers and not version:
        raise PeerError("no HTTP response")
    return status, version, tuple(headers)


def _keeps_alive(version: bytes, headers: Headers) -> bool:
    """Whether the server keeps the connection (RFC 9112 section 9.3)."""
    options = b",".join(value for name, value in headers if name == "connection").lower()
    tokens = [token.strip() for token in options.split(b",")]
    if b"close" in tokens:
        return False
    return version == b"HTTP/1.1" or (version == b"HTTP/1.0" and b"keep-alive" in tokens)
