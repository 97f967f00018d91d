"""The content fields of a part: types, parameters, file names, as any reader may read them (RFC 2045, 2183, 2231).

Where readers differ all readings are given, and the reason is a `Defect`.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from encodings.aliases import aliases
from enum import Enum
from typing import Final
from urllib.parse import unquote_to_bytes

from gateway.protocol.headers import Header

# A lookup of a charset that is none is remembered by Python for ever, so only known names are looked up.
_CODECS: Final = frozenset({*aliases, *aliases.values()}) - {"idna", "punycode", "mbcs", "oem"}
_READINGS: Final = 4  # boundaries of one multipart that are looked for, if its parameters give several

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
class Description:
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


def describe(header: Header, default_type: str) -> Description:
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
    return Description(
        tuple(dict.fromkeys(values)) or (default_type,),
        tuple(dict.fromkeys(names)),
        tuple(dict.fromkeys(boundaries))[:_READINGS],
        next((value for content in dispositions for value in content.values), ""),
        next((value for content in encodings for value in content.values), "7bit"),
        defects,
    )
