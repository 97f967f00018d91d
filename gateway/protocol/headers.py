r"""The header section of a message: its fields, and changes to them (RFC 5322 2.2, RFC 2045 5, milter protocol).

A filter adds, changes and removes single fields, and a signature over the others must stay good. Hence every
field keeps the octets it came in, and a header that nobody changed encodes to the very octets it was read from.

Only CRLF ends a line here; a bare CR or LF is an octet of its line (`gateway.protocol.content` guards against
them). The section ends at the empty line or, as Postfix reads it, before the first line that is no field. Mailbox
lines (`From `) above all fields are read as fields `X-Mailbox-Line`, which is what Postfix makes of them.

Programs do not agree on what such lines are, so that a filter could be shown another header than the recipient gets.
Here alone a section does not encode to what it was read from: the empty line is put in, the fields are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import LocalError

_NAME: Final = re.compile(r"[!-9;-~]+")  # RFC 5322 2.2: printable ASCII but the colon
_FIELD: Final = re.compile(rb"([!-9;-~]+)[ \t]*:")  # blanks before the colon: RFC 5322 4.5
_NO_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+[^:]|[^!-9;-~]")  # so much of a line that it can become no field
_MAILBOX_LINE: Final = re.compile(rb">*From ")
_MAILBOX_START: Final = re.compile(rb">*+(?:From |(?:F(?:r(?:om?)?)?)?\Z)")  # so much of a line that it can become one
_MAILBOX_FIELD: Final = b"X-Mailbox-Line: "
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_BLANKS: Final = (0x20, 0x09)
_DOT: Final = 0x2E


@dataclass(frozen=True, slots=True)
class HeaderField:
    """One field: `name` as written, `raw` as it stands in the message, folds as CRLF + WSP, without the last CRLF."""

    name: str
    raw: bytes

    @property
    def value(self) -> bytes:
        """All that stands behind the colon, verbatim, with the leading blank and the folds."""
        return self.raw.partition(b":")[2]

    @property
    def text(self) -> str:
        """The value on one line (a bare CR or LF reads as a blank), without outer blanks; UTF-8, surrogateescape."""
        line = self.value.replace(b"\r\n", b"").replace(b"\r", b" ").replace(b"\n", b" ")
        return line.strip(b" \t").decode("utf-8", "surrogateescape")

    @classmethod
    def of(cls, name: str, value: str | bytes, *, leading_space: bool = True) -> HeaderField:
        """Make a field of a name and a value as a filter writes it: folds come as CRLF, LF or CR, then WSP.

        `leading_space` puts one blank between colon and value. Text is UTF-8 with surrogateescape. Raises
        `ValueError` for an illegal name, a NUL, or a line that would end the field (header injection).
        """
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"illegal header field name {name!r}")
        octets = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        if b"\0" in octets:
            raise ValueError(f"NUL in header field {name}")
        first, *folded = _LINE_END.split(octets)
        if not all(line.startswith((b" ", b"\t")) for line in folded):
            raise ValueError(f"a line of header field {name} begins with no blank")
        colon = b": " if leading_space else b":"
        return cls(name, name.encode("ascii") + colon + b"\r\n".join([first, *folded]))


class Header:
    r"""The header section, an ordered list of fields. Names are compared without regard to case.

    `end` is `b"\r\n"` if an empty line ended the section, `b""` if the message ended, or the body began with a
    line that is no field.
    """

    __slots__ = ("_parsed", "_terminated", "end", "fields")

    def __init__(
        self,
        fields: Iterable[HeaderField] = (),
        end: bytes = b"\r\n",
        *,
        terminated: bool = True,
        mailbox_lines: int = 0,
    ) -> None:
        """`terminated`: the last of the fields as read had its CRLF. So many of the first were `mailbox_lines`."""
        self.fields = list(fields)
        self.end = end
        self._parsed = self.fields[mailbox_lines:]
        self._terminated = terminated

    def __repr__(self) -> str:
        return f"Header({[field.name for field in self.fields]}, end={self.end!r})"

    @property
    def changed(self) -> bool:
        """Whether the fields are other than what was read."""
        return self.fields != self._parsed

    def all(self, name: str) -> list[HeaderField]:
        """All fields of the name, from the top."""
        wanted = name.lower()
        return [field for field in self.fields if field.name.lower() == wanted]

    def first(self, name: str) -> HeaderField | None:
        """The topmost field of the name."""
        wanted = name.lower()
        return next((field for field in self.fields if field.name.lower() == wanted), None)

    def count(self, name: str) -> int:
        """How many fields of the name there are."""
        return len(self.all(name))

    def insert(self, index: int, field: HeaderField) -> None:
        """Put the field before the one at `index`; 0 is the top, beyond the end appends."""
        self.fields.insert(max(index, 0), field)

    def append(self, field: HeaderField) -> None:
        """Put the field at the end."""
        self.fields.append(field)

    def change(self, name: str, occurrence: int, field: HeaderField) -> None:
        """Replace the field of that name and number (from 1; 0 is read as 1); beyond their count, append."""
        index = self._index(name, occurrence)
        if index is None:
            self.fields.append(field)
        else:
            self.fields[index] = field

    def delete(self, name: str, occurrence: int) -> bool:
        """Remove the field of that name and number, and renumber at once, as Postfix does; False if none is there."""
        index = self._index(name, occurrence)
        if index is None:
            return False
        del self.fields[index]
        return True

    def copy(self) -> Header:
        """Give a header that changes on its own; fields are shared, for nothing changes them."""
        copied = Header((), self.end, terminated=self._terminated)
        copied.fields = self.fields.copy()
        copied._parsed = self._parsed
        return copied

    def encode(self, *, body_follows: bool) -> bytes:
        """Give the content octets (not dot-stuffed) of the section with its end.

        A section that no empty line ended gets one if `body_follows`, lest the body's first line be read as a field
        or a fold.
        """
        section = b"".join([field.raw + b"\r\n" for field in self.fields])
        if not self._terminated and not self.changed:
            return section[:-2]
        return section + (b"\r\n" if body_follows else self.end)

    def _index(self, name: str, occurrence: int) -> int | None:
        wanted = name.lower()
        places = [i for i, field in enumerate(self.fields) if field.name.lower() == wanted]
        number = max(occurrence, 1)
        return places[number - 1] if number <= len(places) else None


def parse_header(data: bytes) -> tuple[Header, int]:
    """Read the header section that `data` (content, not dot-stuffed) begins with; give it and the body's offset.

    Nothing is an error: what is no field is body.
    """
    fields: list[HeaderField] = []
    start, size, terminated = 0, len(data), True
    while _MAILBOX_LINE.match(data, start):
        stop = data.find(b"\r\n", start)
        terminated = stop >= 0
        fields.append(HeaderField("X-Mailbox-Line", _MAILBOX_FIELD + data[start : stop if terminated else size]))
        start = stop + 2 if terminated else size
    mailbox_lines = len(fields)
    while start < size:
        match = _FIELD.match(data, start)
        if match is None:
            if data.startswith(b"\r\n", start):
                return Header(fields, b"\r\n", mailbox_lines=mailbox_lines), start + 2
            break
        stop = data.find(b"\r\n", match.end())
        while stop >= 0 and data[stop + 2 : stop + 3] in (b" ", b"\t"):
            stop = data.find(b"\r\n", stop + 2)
        terminated = stop >= 0
        fields.append(HeaderField(match[1].decode("ascii"), data[start : stop if terminated else size]))
        start = stop + 2 if terminated else size
    return Header(fields, b"", terminated=terminated, mailbox_lines=mailbox_lines), start


class HeaderReader:
    """Finds the header section in the wire form (dot-stuffed, as `DataScanner` gives it) of a message in blocks.

    Afterwards `header` is the section and `body_offset` the octets of the wire form before the body; or
    `too_big` is True and `header` None: more than `limit` octets without an end, or more than `max_fields` fields.
    What is kept is bounded by `limit`, and the outcome does not depend on how the blocks were cut.
    """

    __slots__ = (
        "_buffer", "_count", "_done", "_fields", "_limit", "_max_fields", "_scanned", "_start", "body_offset", "header",
        "too_big",
    )  # fmt: skip

    def __init__(self, limit: int, max_fields: int) -> None:
        self.header: Header | None = None
        self.body_offset = 0
        self.too_big = False
        self._limit = limit
        self._max_fields = max_fields
        self._count = 0
        self._buffer = bytearray()
        self._start = 0  # where the line begins whose end is not seen yet
        self._scanned = 0  # up to here there is no line end behind _start
        self._fields = False  # a field was seen, hence a leading blank continues it
        self._done = False

    def feed(self, block: bytes) -> bool:
        """Take the next block; True once the section is complete or too big. Raises `LocalError` after that."""
        if self._done:
            raise LocalError("the header section has ended")
        # Four octets more than the limit decide about the line that begins there.
        window = self._limit + 4
        self._buffer += block[: window - len(self._buffer)]
        while (stop := self._buffer.find(b"\r\n", self._scanned)) >= 0:
            if self._line(stop) or self._start > self._limit:
                return self._end(self._start)
            if self._count > self._max_fields:
                return self._end(self._limit + 1)
        self._scanned = max(self._start, len(self._buffer) - 1)
        if len(self._buffer) < window:
            return False
        return self._end(self._start if self._is_body(self._start) else window)

    def finish(self) -> None:
        """The message ended before the section did."""
        if not self._done:
            begun = len(self._buffer) > self._start
            self._end(self._start if begun and not self._continues(self._start) else len(self._buffer))

    def _line(self, stop: int) -> bool:
        """Take the line from `_start` to `stop`; True if it is the empty line, or belongs to the body."""
        start = self._start
        if stop == start + (self._buffer[start] == _DOT):
            self._start = stop + 2
            return True
        if not self._continues(start):
            return True
        self._fields = self._fields or not self._mailbox_line(start)
        self._count += self._buffer[start] not in _BLANKS
        self._start = self._scanned = stop + 2
        return False

    def _continues(self, start: int) -> bool:
        """Whether the line is a field, or the next line of one."""
        if self._mailbox_line(start):
            return True
        start += self._buffer[start] == _DOT
        if self._fields and start < len(self._buffer) and self._buffer[start] in _BLANKS:
            return True
        return _FIELD.match(self._buffer, start) is not None

    def _mailbox_line(self, start: int) -> bool:
        """Whether the line is one that programs put in front of a message; no field comes before it."""
        start += self._buffer[start] == _DOT
        return not self._fields and _MAILBOX_LINE.match(self._buffer, start) is not None

    def _is_body(self, start: int) -> bool:
        """Whether the unfinished line can become neither a field nor the next line of one."""
        start += self._buffer[start] == _DOT
        if self._fields and self._buffer[start] in _BLANKS:
            return False
        if not self._fields and _MAILBOX_START.match(self._buffer, start):
            return False
        return _NO_FIELD.match(self._buffer, start) is not None

    def _end(self, offset: int) -> bool:
        """End the section before the octet at `offset`."""
        self._done = True
        self.too_big = offset > self._limit
        if not self.too_big:
            section = bytes(self._buffer[:offset])
            section = section[section[:1] == b"." :].replace(b"\r\n.", b"\r\n")
            self.header = parse_header(section)[0]
            self.body_offset = offset
        self._buffer = bytearray()
        return True
