r"""The MIME structure of a message in blocks: its parts, their types and file names (RFC 2045, 2046, 2183, 2231).

A stage that guards attachments needs to know what the parts are called, not what is in them. Hence only part
headers are kept, and bodies are searched for boundaries at C speed.

Whoever wants a file past a filter writes what readers read differently. So where readings differ all of them are
given (every file name, every boundary, every content type), and the reason stands in `defects`, for the caller to
refuse what is too odd. Only CRLF ends a line; bodies are not searched for bare CR or LF, for the content scanner
names or replaces them all (`gateway.protocol.content`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from gateway.protocol.headers import Header, parse_header
from gateway.protocol.mime_fields import Defect, Description, describe

_MESSAGES: Final = frozenset({"message/rfc822", "message/global", "message/news"})
_IDENTITIES: Final = frozenset({"7bit", "8bit", "binary"})
_LONGEST_BOUNDARY: Final = 70  # RFC 2046 5.1.1
_FEW: Final = 3  # so many boundaries are sooner found one by one than by the hyphens before them
_BEHIND_BOUNDARY: Final = 128  # octets of a delimiter line that are looked at behind its boundary
_FIELD: Final = re.compile(rb"[!-9;-~]+[ \t]*:")
_NO_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+[^:]|[^!-9;-~]")


@dataclass(frozen=True, slots=True)
class MimeLimits:
    """What is read at most: levels of parts below the message, parts, and octets of one part header."""

    depth: int = 20
    parts: int = 1000
    part_header: int = 32_768


@dataclass(frozen=True, slots=True)
class Part:
    """A part whose header is complete; the message itself is `index` 0 at `depth` 0.

    `content_types`, `disposition` and `encoding` are lower case, defaults filled in (RFC 2045 5.2, 6.1; the
    disposition has none and is empty). `names` are all readings of the file name, Content-Disposition first, as
    the sender wrote them: not fit for a log or a path as they are. `defects` are those known so far.
    """

    index: int
    depth: int
    content_types: tuple[str, ...]
    names: tuple[str, ...]
    disposition: str
    encoding: str
    defects: frozenset[Defect]

    @property
    def content_type(self) -> str:
        """The first reading of the content type."""
        return self.content_types[0]


class Found(NamedTuple):
    """A defect and the index of the part that has it."""

    part: int
    defect: Defect


@dataclass(slots=True, eq=False)
class _Level:
    """An open multipart."""

    part: int
    depth: int
    needles: tuple[bytes, ...]  # what begins its delimiters: CRLF, two hyphens, boundary
    child_type: str
    closed: bool = False
    hits: dict[bytes, int] = field(default_factory=dict)  # where in the data at hand each needle is next


class _Delimiter(NamedTuple):
    """What a line is that begins with a boundary."""

    level: int
    closing: bool
    junk: bool


class MimeScanner:
    """Gives the parts of a message whose body comes in blocks, each as soon as its header is complete.

    `start`, then `feed` for every block (content, not dot-stuffed), then `finish`. `defects` grows as they are
    found, also those of parts already given. Memory is bounded by the limits; how the blocks were cut makes no
    difference. Beyond the limit of parts the rest of the message is not read.
    """

    __slots__ = (
        "_collected",
        "_default_type",
        "_delimiters",
        "_depth",
        "_found",
        "_held",
        "_index",
        "_levels",
        "_limits",
        "_needle",
        "_root_open",
        "_skipping",
        "_stopped",
    )

    def __init__(self, limits: MimeLimits | None = None) -> None:
        self._found: dict[Found, None] = {}
        self._limits = limits or MimeLimits()
        self._levels: list[_Level] = []
        self._collected: bytearray | None = None  # the part header that is being read
        self._depth = 0  # of the part whose header that is
        self._default_type = "text/plain"
        self._index = 0  # of the next part
        self._delimiters = 0
        self._needle = 0  # octets of the longest needle
        self._held = b""  # what the next block decides; begins with the CRLF before a line
        self._skipping = False  # the rest of a delimiter line
        self._root_open = False  # no empty line ended the message's header
        self._stopped = False

    @property
    def defects(self) -> list[Found]:
        """All defects found so far, in the order they were found in."""
        return list(self._found)

    def start(self, header: Header) -> list[Part]:
        """Give the message itself as a part."""
        self._held = b"\r\n"
        self._root_open = not header.end
        return [self._complete(header, set())]

    def feed(self, block: bytes) -> list[Part]:
        """Take the next block of the body."""
        if block and self._root_open:
            self._root_open = False
            self._note(0, Defect.NO_SEPARATOR)
        return self._scan(block, final=False)

    def finish(self) -> list[Part]:
        """The message ended."""
        found = self._scan(b"", final=True)
        while self._collected is not None:
            self._end_header(-1, self._collected, found)
        for level in self._levels:
            self._leave(level)
        self._levels = []
        return found

    def _scan(self, block: bytes, *, final: bool) -> list[Part]:
        found: list[Part] = []
        if self._collected is None and not self._levels:
            return found
        data = self._held + block if self._held else block
        self._held = b""
        for level in self._levels:
            level.hits.clear()
        place = 0
        while place >= 0 and not self._stopped:
            if self._skipping:
                place = self._skip_line(data, place)
            elif self._collected is not None:
                place = self._read_header(data, place, self._collected, found, final=final)
            elif self._levels:
                place = self._search(data, place, final=final)
            else:
                break
        return found

    def _skip_line(self, data: bytes, place: int) -> int:
        end = data.find(b"\r\n", place)
        if end < 0:
            self._held = data[-1:] if data[-1:] == b"\r" else b""
        else:
            self._skipping = False
        return end

    def _read_header(self, data: bytes, place: int, collected: bytearray, found: list[Part], *, final: bool) -> int:
        """Read header lines; `place` is the CRLF before the line. Gives the CRLF the body comes after, -1: more."""
        cap = self._needle + _BEHIND_BOUNDARY
        while True:
            start, end = place + 2, data.find(b"\r\n", place + 2)
            room = self._limits.part_header - len(collected)
            if end < 0 and not final and len(data) - start <= max(room, cap):
                self._held = data[place:]
                return -1
            line = data[start:end] if end >= 0 else data[start:]
            if line[:2] == b"--" and self._delimiter(b"\r\n" + line[:cap]) is not None:
                return self._end_header(place, collected, found, Defect.NO_SEPARATOR)
            if not line:
                return self._end_header(end, collected, found)
            continues = line[:1] in (b" ", b"\t") and bool(collected)
            if len(line) + 2 > room:
                body = not continues and _NO_FIELD.match(line[: max(room, 0)])
                return self._end_header(place, collected, found, Defect.NO_SEPARATOR if body else Defect.OVER_HEADER)
            if continues or _FIELD.match(line):
                collected += line + b"\r\n"
            elif collected or not line.startswith((b"From ", b">From ")):  # an mbox line is skipped by readers
                return self._end_header(place, collected, found, Defect.NO_SEPARATOR)
            if end < 0:
                return self._end_header(-1, collected, found)
            place = end

    def _end_header(self, place: int, collected: bytearray, found: list[Part], *defects: Defect) -> int:
        self._collected = None
        found.append(self._complete(parse_header(bytes(collected))[0], set(defects)))
        return place

    def _complete(self, header: Header, defects: set[Defect]) -> Part:
        """Make the part of its header, and get ready for what its type says comes next."""
        described = describe(header, self._default_type)
        defects |= described.defects
        index, depth = self._index, self._depth
        self._index += 1
        multipart = any(value.startswith("multipart/") for value in described.types)
        message = not _MESSAGES.isdisjoint(described.types)
        if multipart and not described.boundaries:
            defects.add(Defect.NO_BOUNDARY)
        if multipart and any(len(boundary) > _LONGEST_BOUNDARY for boundary in described.boundaries):
            defects.add(Defect.LONG_BOUNDARY)
        if (multipart or message) and described.encoding not in _IDENTITIES:
            defects.add(Defect.ENCODED_COMPOSITE)
        if depth >= self._limits.depth and ((multipart and described.boundaries) or message):
            defects.add(Defect.OVER_DEPTH)
            multipart = message = False
        if multipart and described.boundaries:
            self._enter(index, depth, described, defects)
        if message:  # even if another Content-Type field says multipart
            self._begin_header(index, depth + 1, "text/plain", defects)
        for defect in Defect:
            if defect in defects:
                self._note(index, defect)
        return Part(
            index,
            depth,
            described.types,
            described.names,
            described.disposition,
            described.encoding,
            frozenset(defects),
        )

    def _enter(self, index: int, depth: int, described: Description, defects: set[Defect]) -> None:
        needles = tuple(b"\r\n--" + boundary for boundary in described.boundaries)
        if any(needle in needles for _, needle in self._needles()):
            defects.add(Defect.REUSED_BOUNDARY)
        child_type = "message/rfc822" if "multipart/digest" in described.types else "text/plain"
        self._levels.append(_Level(index, depth, needles, child_type))
        self._needle = max(self._needle, *map(len, needles))

    def _begin_header(self, parent: int, depth: int, default_type: str, defects: set[Defect] | None = None) -> None:
        if self._index >= self._limits.parts:
            self._stop(parent, defects)
            return
        self._collected = bytearray()
        self._depth = depth
        self._default_type = default_type

    def _stop(self, part: int, defects: set[Defect] | None = None) -> None:
        self._stopped = True
        if defects is not None:
            defects.add(Defect.OVER_PARTS)
        self._note(part, Defect.OVER_PARTS)
        self._levels = []
        self._held = b""

    def _search(self, data: bytes, place: int, *, final: bool) -> int:
        """Find the next delimiter from `place` on. Gives where its boundary ends, -1 if none is in the data."""
        at = self._next_hit(data, place)
        if at < 0:
            self._hold(data, place)
            return -1
        end = data.find(b"\r\n", at + 2)
        cap = at + 2 + self._needle + _BEHIND_BOUNDARY
        if end < 0 and not final and len(data) <= cap:
            self._held = data[at:]
            return -1
        delimiter = self._delimiter(data[at : min(end, cap) if end >= 0 else cap])
        if delimiter is not None:
            self._take(delimiter)
        return at + 2

    def _next_hit(self, data: bytes, place: int) -> int:
        """Where the next needle is. Each needle goes through the data once, however often the others hit."""
        needles = list(self._needles())
        if len(needles) > _FEW:
            place = data.find(b"\r\n--", place)
            if place < 0:
                return -1
        nearest = len(data)
        for level, needle in needles:
            hit = level.hits.get(needle, -1)
            if hit < place:
                hit = data.find(needle, place)
                hit = level.hits[needle] = len(data) if hit < 0 else hit
            nearest = min(nearest, hit)
        return nearest if nearest < len(data) else -1

    def _needles(self) -> Iterator[tuple[_Level, bytes]]:
        for level in reversed(self._levels):
            for needle in level.needles:
                yield level, needle

    def _hold(self, data: bytes, place: int) -> None:
        """Keep what may be the beginning of a needle, which has one CR, its first octet."""
        at = data.rfind(b"\r", max(place, len(data) - self._needle))
        if at >= 0 and any(needle.startswith(data[at:]) for _, needle in self._needles()):
            self._held = data[at:]

    def _delimiter(self, line: bytes) -> _Delimiter | None:
        """Whose delimiter the line (with the CRLF before it) is: the innermost open level's whose boundary fits.

        By RFC 2046 5.1.1 the line need only begin with the boundary, yet many readers want nothing but blanks
        behind it; what fits exactly goes first.
        """
        best: tuple[bool, bool, int, bool] | None = None
        for number, level in enumerate(self._levels):
            for needle in level.needles:
                if line.startswith(needle):
                    rest = line[len(needle) :]
                    junk = rest.rstrip(b" \t") not in (b"", b"--")
                    rank = (junk, level.closed, -number, rest.startswith(b"--"))
                    best = rank if best is None else min(best, rank)
        return None if best is None else _Delimiter(-best[2], best[3], best[0])

    def _take(self, delimiter: _Delimiter) -> None:
        """Leave the levels within the delimiter's own, then end that or begin its next part."""
        for level in self._levels[delimiter.level + 1 :]:
            self._leave(level)
        del self._levels[delimiter.level + 1 :]
        self._needle = max(len(needle) for _, needle in self._needles())
        level = self._levels[delimiter.level]
        self._delimiters += 1
        if delimiter.junk:
            self._note(level.part, Defect.JUNK_BEHIND_BOUNDARY)
        if self._delimiters > 3 * self._limits.parts:
            self._stop(level.part)
            return
        self._skipping = True
        if delimiter.closing:
            level.closed = True
            return
        if level.closed:
            self._note(level.part, Defect.PART_BEHIND_END)
        self._begin_header(level.part, level.depth + 1, level.child_type)

    def _leave(self, level: _Level) -> None:
        if not level.closed:
            self._note(level.part, Defect.UNCLOSED)

    def _note(self, part: int, defect: Defect) -> None:
        self._found[Found(part, defect)] = None
