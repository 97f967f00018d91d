"""SMTP replies: the value, its wire form, and a reader for what an upstream server sends (RFC 5321 section 4.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from gateway.protocol.errors import LocalError, PeerError

MAX_LINE: Final = 2048
"""Octets of an upstream's reply line, line end included. RFC 5321 4.5.3.1.5 says 512; servers write more."""

MAX_LINES: Final = 200
"""Lines of one reply. RFC 5321 gives no limit."""

_ENHANCED: Final = re.compile(rb"[245]\.\d{1,3}\.\d{1,3}(?![^ ])")
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CODE: Final = re.compile(r"[2-5]\d\d(?=[ -]|$)")


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: its code and the text of each line, as raw bytes without code, separator and line end."""

    code: int
    lines: tuple[bytes, ...]

    @classmethod
    def of(cls, text: str) -> Self:
        r"""Make a reply from `550 5.7.1 text`; `\n` begins a new line, which may repeat the code or leave it out.

        Control characters become `?`, so that no text can end its line. Raises `LocalError` if it begins with
        no code.
        """
        code = text[:3]
        if not _CODE.match(text):
            raise LocalError("a reply begins with its code")
        lines = []
        for line in text.split("\n"):
            if line[:3] == code and line[3:4] in ("", " ", "-"):
                line = line[4:]
            lines.append(_UNSAFE.sub("?", line).encode("utf-8", "surrogateescape"))
        return cls(int(code), tuple(lines))

    @property
    def reply_class(self) -> int:
        """2, 3, 4 or 5."""
        return self.code // 100

    @property
    def enhanced(self) -> str | None:
        """The enhanced status code of the first line (RFC 2034), such as `5.7.1`."""
        match = _ENHANCED.match(self.lines[0])
        return match[0].decode("ascii") if match else None

    @property
    def text(self) -> str:
        """All lines joined by a blank, safe for a log: control characters and bytes that are not UTF-8 are `?`."""
        joined = b" ".join(self.lines).decode("utf-8", "replace").replace("\ufffd", "?")
        return _UNSAFE.sub("?", joined)

    def encode(self) -> bytes:
        """The whole reply as it goes over the wire."""
        *first, last = self.lines
        if not first:
            return b"%d %b\r\n" % (self.code, last)
        head = b"".join([b"%d-%b\r\n" % (self.code, line) for line in first])
        return b"%b%d %b\r\n" % (head, self.code, last)


class ReplyReader:
    """Reads replies out of the bytes an upstream sends, however the network cut them.

    A line may end in CRLF or, as clients generally take it, in LF alone. A reader that raised is of no further
    use: the two sides are out of step.
    """

    __slots__ = ("_code", "_lines", "_partial", "max_line", "max_lines")

    def __init__(self, max_line: int = MAX_LINE, max_lines: int = MAX_LINES) -> None:
        self.max_line = max_line
        self.max_lines = max_lines
        self._partial = b""
        self._code = 0
        self._lines: list[bytes] = []

    @property
    def pending(self) -> bool:
        """Whether a reply has begun that is not complete."""
        return bool(self._partial or self._lines)

    def feed(self, data: bytes) -> list[Reply]:
        """Take bytes, give the replies they complete, in order.

        Raises `PeerError` for what is no reply: another code than 2xx to 5xx, codes that differ between lines,
        a separator other than blank and hyphen, a line or a reply too long.
        """
        if self._partial:
            data = self._partial + data
            self._partial = b""
        end = data.find(b"\n") + 1
        if end == len(data) and end and not self._lines and data[3:4] == b" " and data[-2:] == b"\r\n":
            # One whole single-line reply, by far the most frequent read.
            self._check_length(end)
            return [Reply(_code(data), (data[4:-2],))]
        *lines, self._partial = data.split(b"\n")
        replies = []
        for line in lines:
            reply = self._line(line)
            if reply is not None:
                replies.append(reply)
        self._check_length(len(self._partial))
        return replies

    def _line(self, line: bytes) -> Reply | None:
        """Take one line without its LF: the reply, if it is its last line."""
        self._check_length(len(line) + 1)
        if line[-1:] == b"\r":
            line = line[:-1]
        code = _code(line)
        separator = line[3:4]
        if separator not in (b"", b" ", b"-"):
            raise PeerError("malformed reply line")
        if self._lines and code != self._code:
            raise PeerError("codes differ between the lines of a reply")
        self._lines.append(line[4:])
        if separator != b"-":
            reply = Reply(code, tuple(self._lines))
            self._lines = []
            return reply
        self._code = code
        if len(self._lines) >= self.max_lines:
            raise PeerError("reply has too many lines")
        return None

    def _check_length(self, octets: int) -> None:
        if octets > self.max_line:
            raise PeerError("reply line too long")


def _code(line: bytes) -> int:
    digits = line[:3]
    if len(digits) == 3 and digits.isdigit():
        code = int(digits)
        if 200 <= code <= 599:
            return code
    raise PeerError("malformed reply code")
