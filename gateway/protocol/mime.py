r"""The MIME structure of a message in blocks: its parts, their types and file names (RFC 2045, 2046, 2183, 2231).

A stage that guards attachments needs to know what the parts are called, not what is in them. Hence only part
headers are kept, and bodies are searched for boundaries at C speed.

Whoever wants a file past a filter writes what readers read differently. So where readings differ all of them are
given (every file name, every boundary, every content type), and the reason stands in `defects`, for the caller to
refuse what is too odd. Only CRLF ends a line; bodies are not searched for bare CR or LF, for the content scanner
names or replaces them all (`gateway.protocol.content`).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from encodings.aliases import aliases
from enum import Enum
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from gateway.protocol.headers import Header, parse_header

# A lookup of a charset that is none is remembered by Python for ever, so only known names are looked up.
_CODECS: Final = frozenset({*aliases, *aliases.values()}) - {"idna", "punycode", "mbcs", "oem"}
_MESSAGES: Final = frozenset({"message/rfc822", "message/global", "message/news"})
_IDENTITIES: Final = frozenset({"7bit", "8bit", "binary"})
_LONGEST_BOUNDARY: Final = 70  # RFC 2046 5.1.1
_READINGS: Final = 4  # boundaries of one multipart that are looked for, if its parameters give several
_FEW: Final = 3  # so many boundaries are sooner found one by one than by the hyphens before them
_BEHIND_BOUNDARY: Final = 128  # octets of a delimiter line that are looked at behind its boundary

_TOKEN: Final = re.compile(r"[!#-'*+\-.0-9A-Z^-~]+")  # RFC 2045 5.1
_TYPE: Final = re.compile(r"[!#-'*+\-.0-9A-Z^-~]+/[!#-'*+\-.0-9A-Z^-~]+")
_SEGMENT: Final = re.compile(r'((?:[^;"]|"(?:[^"\\]|\\.?)*+(?:"|$))*+)(?:;|$)', re.DOTALL)
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.?)*+)("?)(.*)', re.DOTALL)
_QUOTATION_END: Final = re.compile(r'"(?:[^"\\]|\\.?)*+("?)', re.DOTALL)
_SLASH: Final = re.compile(r"(?<!\s)\s*+/\s*+")
_COMMENT_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.?)*+"?|\\.?|[()]|[^"\\()]+', re.DOTALL)
_EXTENDED: Final = re.compile(r"([^*]+)(?:\*([0-9]{1,4}))?(\*?)")  # RFC 2231 3, 4
_NO_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_WORD: Final = re.compile(r"=\?([^?*\s]+)(?:\*[^?\s]*)?\?([bBqQ])\?([^?]*)\?=")  # RFC 2047 2, RFC 2231 5
_BETWEEN_WORDS: Final = re.compile(r"(\?=)\s+(?==\?)")
_FIELD: Final = re.compile(rb"[!-9;-~]+[ \t]*:")
_NO_FIELD: Final = re.compile(rb"[!-9;-~]++[ \t]*+[^:]|[^!-9;-~]")
_EMPTY_FOLD: Final = re.compile(rb"\r\n[ \t]+(?=\r\n|\Z)")
_BARE_CR: Final = re.compile(rb"\r(?!\n)")
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")


class Defect(Enum):
    """What makes readers read a part differently, or keeps the scanner from reading it."""

    NO_BOUNDARY = "multipart without a boundary"
    LONG_BOUNDARY = "boundary of more than 70 octets"
    REUSED_BOUNDARY = "boundary of an enclosing multipart"
    UNCLOSED = "boundary never closed"
    JUNK_BEHIND_BOUNDARY = "text behind the boundary in its line"
    PART_BEHIND_END = "part behind the closing boundary"
    DUPLICATE_FIELD = "content field more than once"
    DUPLICATE_PARAMETER = "parameter more than once"
    MALFORMED_FIELD = "malformed content field"
    MALFORMED_PARAMETER = "malformed parameter"
    ENCODED_COMPOSITE = "multipart or message with a transfer encoding"
    NO_SEPARATOR = "no empty line behind the header"
    NUL = "NUL in the header"
    BARE_CR = "bare CR in the header"
    BARE_LF = "bare LF in the header"
    OVER_DEPTH = "nested too deeply"
    OVER_PARTS = "too many parts"
    OVER_HEADER = "header too big"


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


@dataclass(slots=True)
class ContentField:
    """A content field as its readers may read it: first values, and all readings of every parameter."""

    values: list[str] = field(default_factory=list)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    defects: set[Defect] = field(default_factory=set)

    def named(self, name: str) -> list[str]:
        """All readings of a parameter."""
        return self.parameters.get(name, [])


def parse_content_field(text: str) -> ContentField:
    """Read `value; attribute=value; ...` (RFC 2045 5.1, RFC 2231) from the unfolded text of a field.

    Values are lower case. Comments are read both as comments and as text, a quotation that nothing ends both as
    one and as none.
    """
    result = ContentField()
    readings = [_SEGMENT.findall(text)]
    if "(" in text:
        readings.insert(0, _SEGMENT.findall(_without_comments(text)))
    unended = "" in _QUOTATION_END.findall(text)
    if unended:
        result.defects.add(Defect.MALFORMED_PARAMETER)
    if unended or '\\"' in text:
        readings.append(text.split(";"))
    for number, (value, *segments) in enumerate(readings):
        head, *more = _SLASH.sub("/", value).split(None, 1)[:2] or [""]
        if (more or head != value.strip()) and number == 0:  # a semicolon is missing, or there are blanks in the type
            result.defects.add(Defect.MALFORMED_FIELD)
        if head and head.lower() not in result.values:
            result.values.append(head.lower())
        _read_parameters([*more, *segments], result, first=number == 0)
    return result


def _read_parameters(segments: Iterable[str], result: ContentField, *, first: bool) -> None:
    """Add the parameters to the result; only the first reading tells of defects."""
    found: dict[str, list[str]] = {}
    extended: dict[str, list[tuple[int | None, bool, str]]] = {}
    defects: set[Defect] = set()
    for segment in segments:
        if not segment.strip():
            continue
        name, equals, value = segment.partition("=")
        name = name.strip().lower()
        match = _EXTENDED.fullmatch(name)
        if not equals or match is None or not _TOKEN.fullmatch(name):
            defects.add(Defect.MALFORMED_PARAMETER)
            if match is None:
                continue
        readings = _value_readings(value.strip(), defects)
        if match[2] or match[3]:
            number = int(match[2]) if match[2] else None
            if match[2] and match[2] != str(number):
                defects.add(Defect.MALFORMED_PARAMETER)
            extended.setdefault(match[1], []).append((number, bool(match[3]), readings[0]))
        elif name in found:
            defects.add(Defect.DUPLICATE_PARAMETER)
            found[name] += readings
        else:
            found[name] = readings
    for name, pieces in extended.items():
        found.setdefault(name, []).extend(_extended_readings(pieces, defects))
    for name, readings in found.items():
        known = result.parameters.setdefault(name, [])
        known += [reading for reading in dict.fromkeys(readings) if reading not in known]
    if first:
        result.defects |= defects


def _value_readings(value: str, defects: set[Defect]) -> list[str]:
    """All readings of what stands behind the equals sign."""
    quoted = _QUOTED.match(value)
    if quoted is None:
        if _TOKEN.fullmatch(value):
            return [value]
        defects.add(Defect.MALFORMED_PARAMETER)
        return [value, *value.split()[:1]]
    inner, closed, rest = quoted.groups()
    readings = [re.sub(r"\\(.)", r"\1", inner, flags=re.DOTALL)]
    if "\\" in inner:  # many readers take a backslash before anything else for itself, as in a Windows path
        readings.append(re.sub(r"\\([\\\"])", r"\1", inner))
        readings.append(inner)
    if not closed or rest.strip():
        defects.add(Defect.MALFORMED_PARAMETER)
        readings.append(readings[0] + rest.replace('"', ""))
    return readings


def _extended_readings(pieces: list[tuple[int | None, bool, str]], defects: set[Defect]) -> list[str]:
    """Join continuations and decode charsets (RFC 2231 3, 4); readers differ on what is missing or there twice."""
    readings = []
    wholes = [piece for piece in pieces if piece[0] is None]
    parts = sorted((piece for piece in pieces if piece[0] is not None), key=lambda piece: piece[0] or 0)
    for whole in wholes:
        readings.append(_decode_extended([whole], defects))
    if len(wholes) > 1 or (wholes and parts):
        defects.add(Defect.DUPLICATE_PARAMETER)
    if parts:
        readings.append(_decode_extended(parts, defects))
        in_order = [number for number, _, _ in parts] == list(range(len(parts)))
        if not in_order:
            defects.add(Defect.MALFORMED_PARAMETER)
            once = {number: piece for piece in reversed(parts) if (number := piece[0]) is not None}
            unbroken = [once[number] for number in range(len(once)) if all(n in once for n in range(number + 1))]
            readings += [
                _decode_extended(chosen, defects) for chosen in (list(once.values())[::-1], unbroken) if chosen
            ]
    return readings


def _decode_extended(pieces: list[tuple[int | None, bool, str]], defects: set[Defect]) -> str:
    charset, octets = "", b""
    for place, (_, encoded, text) in enumerate(pieces):
        if encoded and place == 0:
            charset, quote, text = text.partition("'")
            text = text.partition("'")[2]
            if not quote:
                defects.add(Defect.MALFORMED_PARAMETER)
                charset, text = "", charset
        if encoded and _NO_PERCENT.search(text):
            defects.add(Defect.MALFORMED_PARAMETER)
        raw = text.encode("utf-8", "surrogateescape")
        octets += unquote_to_bytes(raw) if encoded else raw
    return _decode(octets, charset or "utf-8", defects)


def _decode(octets: bytes, charset: str, defects: set[Defect]) -> str:
    codec = re.sub(r"[^0-9a-z]+", "_", charset.lower())
    if codec in _CODECS:
        try:
            return octets.decode(codec, "replace")
        except (LookupError, ValueError):  # no text encoding, or one that cannot replace
            pass
    defects.add(Defect.MALFORMED_PARAMETER)
    return octets.decode("utf-8", "replace")


def _decode_words(text: str, defects: set[Defect]) -> str:
    """Decode encoded words wherever they stand, as mail readers do in file names though RFC 2047 5 forbids it."""

    def decoded(match: re.Match[str]) -> str:
        charset, encoding, encoded = match.groups()
        octets = encoded.encode("ascii", "ignore")
        try:
            raw = binascii.a2b_base64(octets + b"==") if encoding in "bB" else binascii.a2b_qp(octets, header=True)
        except binascii.Error:
            defects.add(Defect.MALFORMED_PARAMETER)
            return match[0]
        return _decode(raw, charset, defects)

    return _WORD.sub(decoded, _BETWEEN_WORDS.sub(r"\1", text))


def _without_comments(text: str) -> str:
    """The text without comments, which nest and may hold quoted pairs (RFC 5322 3.2.2)."""
    kept: list[str] = []
    depth = 0
    for token in _COMMENT_TOKEN.findall(text):
        if token == "(":
            depth += 1
        elif token == ")" and depth:
            depth -= 1
        elif not depth:
            kept.append(token)
        elif token[:1] == '"':  # within a comment a quotation mark is text
            depth = max(depth + token.count("(") - token.count(")"), 0)
    return "".join(kept)


@dataclass(frozen=True, slots=True)
class _Description:
    """What the content fields of one part say."""

    types: tuple[str, ...]
    names: tuple[str, ...]
    boundaries: tuple[bytes, ...]
    disposition: str
    encoding: str
    defects: set[Defect]


def _content_fields(header: Header, name: str, defects: set[Defect]) -> list[ContentField]:
    fields = header.all(name)
    if len(fields) > 1:
        defects.add(Defect.DUPLICATE_FIELD)
    # Blanks before the colon, or a fold that some read as the empty line.
    if any(each.raw[len(name) : len(name) + 1] != b":" or _EMPTY_FOLD.search(each.raw) for each in fields):
        defects.add(Defect.MALFORMED_FIELD)
    read = [parse_content_field(each.text) for each in fields]
    for content in read:
        defects |= content.defects
    return read


def _describe(header: Header, default_type: str) -> _Description:
    """Read the content fields of a header."""
    defects: set[Defect] = set()
    types = _content_fields(header, "Content-Type", defects)
    dispositions = _content_fields(header, "Content-Disposition", defects)
    encodings = _content_fields(header, "Content-Transfer-Encoding", defects)
    values = [value for content in types for value in content.values]
    if any(not content.values for content in types) or not all(_TYPE.fullmatch(value) for value in values):
        defects.add(Defect.MALFORMED_FIELD)
        values = [value for value in values if _TYPE.fullmatch(value)] or ["text/plain"]
    raw_names = [name for content in dispositions for name in content.named("filename")]
    raw_names += [name for content in types for name in content.named("name")]
    names = [reading for name in raw_names for reading in (_decode_words(name, defects), name) if reading]
    boundaries = [text.rstrip(" \t").encode("utf-8", "surrogateescape") for c in types for text in c.named("boundary")]
    boundaries = [boundary for boundary in boundaries if boundary and not set(boundary) & set(b"\0\r\n")]
    raw = b"\r\n".join([each.raw for each in header.fields])
    if b"\0" in raw:
        defects.add(Defect.NUL)
    if _BARE_CR.search(raw):
        defects.add(Defect.BARE_CR)
    if _BARE_LF.search(raw):
        defects.add(Defect.BARE_LF)
    return _Description(
        tuple(dict.fromkeys(values)) or (default_type,),
        tuple(dict.fromkeys(names)),
        tuple(dict.fromkeys(boundaries))[:_READINGS],
        next((value for content in dispositions for value in content.values), ""),
        next((value for content in encodings for value in content.values), "7bit"),
        defects,
    )


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
        described = _describe(header, self._default_type)
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

    def _enter(self, index: int, depth: int, described: _Description, defects: set[Defect]) -> None:
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
