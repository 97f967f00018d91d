"""DNS messages (RFC 1035): a stub resolver's questions, and the answers to them.

Only the record types that a mail gateway asks for are understood; others are passed over. Who asks matches `id` and
`question` against what it sent.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple, TypeAlias

from gateway.protocol.errors import LocalError, PeerError

A: Final = 1
CNAME: Final = 5
SOA: Final = 6
PTR: Final = 12
MX: Final = 15
TXT: Final = 16
AAAA: Final = 28

NOERROR: Final = 0
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
REFUSED: Final = 5

_IN: Final = 1
_MAX_NAME: Final = 255
_MAX_POINTERS: Final = 127
_HEADER: Final = struct.Struct("!6H")
_RECORD: Final = struct.Struct("!HHIH")
_LABEL: Final = re.compile(r"[!-\[\]-~]{1,63}")
_SPECIAL: Final = re.compile(rb"[^!-\[\]-~]|\.")


class Mx(NamedTuple):
    """A mail exchanger; `exchange` is "." where the domain takes no mail (RFC 7505)."""

    preference: int
    exchange: str


class Soa(NamedTuple):
    """Start of authority; times in seconds."""

    mname: str
    rname: str
    serial: int
    refresh: int
    retry: int
    expire: int
    minimum: int


Data: TypeAlias = str | bytes | Mx | Soa
"""A, AAAA: address text. PTR, CNAME: name. TXT: its strings joined (RFC 7208 section 3.3)."""


@dataclass(frozen=True, slots=True)
class Record:
    """A resource record of class IN. Names are without the last dot, "." is the root; `ttl` in seconds.

    Bytes of a name that are no printable ASCII, and dots and backslashes inside a label, are `\\DDD` (RFC 1035
    section 5.1): what is no host name never looks like one.
    """

    name: str
    type: int
    ttl: int
    data: Data


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `question` is name and type, ("", 0) where the server did not repeat it.

    `records` is the answer section, empty if `truncated`: then ask again over TCP. `negative_ttl` is for how many
    seconds a missing name or type stays missing (RFC 2308 section 5), None without SOA.
    """

    id: int
    rcode: int
    truncated: bool
    question: tuple[str, int]
    records: tuple[Record, ...]
    negative_ttl: int | None


def query(id: int, name: str, qtype: int) -> bytes:
    """Return a question in class IN with recursion desired.

    `name` is ASCII, with or without the last dot. Raises `LocalError` for what is no name: an empty label, one over 63
    bytes, blanks, controls, backslashes, or over 255 bytes in all.
    """
    labels = name.removesuffix(".").split(".") if name != "." else []
    wire = bytearray()
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise LocalError("not a domain name")
        wire.append(len(label))
        wire += label.encode()
    wire.append(0)
    if len(wire) > _MAX_NAME:
        raise LocalError("domain name too long")
    return _HEADER.pack(id, 0x0100, 1, 0, 0, 0) + wire + struct.pack("!HH", qtype, _IN)


def reverse_name(ip: str) -> str:
    """Return the name whose PTR records name an address; v4-mapped counts as IPv4, a zone (`%eth0`) not at all.

    Raises `LocalError` if `ip` is no address.
    """
    try:
        address = ip_address(ip.partition("%")[0])
    except ValueError:
        raise LocalError("not an IP address") from None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.reverse_pointer
    return address.reverse_pointer


def parse(data: bytes) -> Answer:
    """Return what a response says; the additional section is not read. Raises `PeerError` if it is malformed."""
    if len(data) < _HEADER.size:
        raise PeerError("DNS: message cut short")
    number, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & 0xF800 != 0x8000 or questions > 1:
        raise PeerError("DNS: not a response to one query")
    question, position = ("", 0), _HEADER.size
    if questions:
        name, position = _name(data, position)
        if position + 4 > len(data):
            raise PeerError("DNS: question cut short")
        qtype, qclass = struct.unpack_from("!HH", data, position)
        if qclass != _IN:
            raise PeerError("DNS: question of another class")
        question, position = (name, qtype), position + 4
    truncated = bool(flags & 0x0200)
    records: tuple[Record, ...] = ()
    negative_ttl = None
    if not truncated:
        records, position = _section(data, position, answers)
        for record in _section(data, position, authorities)[0]:
            if isinstance(record.data, Soa):
                negative_ttl = min(record.ttl, record.data.minimum)
    return Answer(number, flags & 15, truncated, question, records, negative_ttl)


def _section(data: bytes, position: int, count: int) -> tuple[tuple[Record, ...], int]:
    """Return the records of a section that are understood, and where it ends."""
    records = []
    for _ in range(count):
        name, position = _name(data, position)
        start = position + _RECORD.size
        if start > len(data):
            raise PeerError("DNS: record cut short")
        kind, record_class, ttl, length = _RECORD.unpack_from(data, position)
        position = start + length
        if position > len(data):
            raise PeerError("DNS: record cut short")
        if record_class == _IN and kind in _UNDERSTOOD:
            # RFC 2181 section 8: a TTL with the highest bit is 0
            records.append(Record(name, kind, 0 if ttl >> 31 else ttl, _data(data, kind, start, position)))
    return tuple(records), position


_UNDERSTOOD: Final = frozenset({A, CNAME, SOA, PTR, MX, TXT, AAAA})


def _data(data: bytes, kind: int, start: int, end: int) -> Data:
    if kind == A:
        if end - start != 4:
            raise PeerError("DNS: A record of a wrong size")
        return ".".join(map(str, data[start:end]))
    if kind == AAAA:
        if end - start != 16:
            raise PeerError("DNS: AAAA record of a wrong size")
        return str(IPv6Address(data[start:end]))
    if kind == TXT:
        return _strings(data, start, end)
    if kind == MX:
        exchange, after = _name(data, start + 2)
        _check_end(after, end)
        return Mx(data[start] << 8 | data[start + 1], exchange)
    name, after = _name(data, start)
    if kind == SOA:
        rname, after = _name(data, after)
        _check_end(after + 20, end)
        return Soa(name, rname, *struct.unpack_from("!5I", data, after))
    _check_end(after, end)
    return name


def _check_end(after: int, end: int) -> None:
    if after != end:
        raise PeerError("DNS: record data of a wrong size")


def _strings(data: bytes, start: int, end: int) -> bytes:
    """Return the strings of a TXT record, joined."""
    if start == end:
        raise PeerError("DNS: TXT record without a string")
    parts = []
    while start < end:
        after = start + 1 + data[start]
        parts.append(data[start + 1 : after])
        start = after
    _check_end(start, end)
    return b"".join(parts)


def _name(data: bytes, position: int) -> tuple[str, int]:
    """Return the name at `position` and where what follows it starts (RFC 1035 section 4.1.4).

    A pointer must lead to an earlier place than what it was met in, which rules out loops; the number is limited too,
    against answers built to cost time.
    """
    labels: list[str] = []
    length = 1
    after = 0
    pointers = 0
    start = position
    while True:
        if position >= len(data):
            raise PeerError("DNS: name cut short")
        size = data[position]
        if size == 0:
            return ".".join(labels) or ".", after or position + 1
        if size >= 0xC0:
            if position + 1 >= len(data):
                raise PeerError("DNS: name cut short")
            target = (size & 0x3F) << 8 | data[position + 1]
            pointers += 1
            if target >= start or pointers > _MAX_POINTERS:
                raise PeerError("DNS: compression loop")
            after = after or position + 2
            position = start = target
            continue
        label = data[position + 1 : position + 1 + size]
        length += 1 + size
        if size > 63 or len(label) < size or length > _MAX_NAME:
            raise PeerError("DNS: malformed name")
        labels.append(_SPECIAL.sub(_escaped, label).decode())
        position += 1 + size


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"\\%03d" % match[0][0]
