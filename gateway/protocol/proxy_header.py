"""The PROXY protocol, versions 1 and 2: the address of the real client, in front of the first byte of a connection.

Rules: HAProxy's proxy-protocol.txt. `parse` refuses a wrong first byte at once, so that a client which speaks
directly to such a port is closed without waiting for more of it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from typing import Final, Literal

from gateway.protocol.errors import LocalError, PeerError

Endpoint = tuple[str, int]
"""IP address in text form, port."""

V1_LIMIT: Final = 107
"""Bytes of a version 1 line with its CRLF."""

V2_LIMIT: Final = 4096
"""Bytes of a version 2 header that are accepted; nginx takes as many."""

_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V1_KEYWORDS: Final = (b"TCP4 ", b"TCP6 ", b"UNKNOWN")
_V1_CHARACTERS: Final = b"0123456789abcdefABCDEF:. \r"
_V1_ADDRESSES: Final = re.compile(rb"([^ ]+) ([^ ]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})")
_V2_ADDRESS_SIZES: Final = (0, 12, 36, 216)
_V2_TCP4: Final = 0x11
_V2_TCP6: Final = 0x21


class Tlv(IntEnum):
    """Types of the values behind the addresses of version 2 (its section 2.2)."""

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    SSL_VERSION = 0x21
    SSL_CN = 0x22
    SSL_CIPHER = 0x23


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A PROXY header.

    `source` and `destination` are None where the proxy gave no address: UNKNOWN, LOCAL, unspecified, a unix socket;
    the connection's own then count. `local` is version 2's LOCAL, a health check. `tlvs` are in the order received.
    """

    source: Endpoint | None
    destination: Endpoint | None
    version: Literal[1, 2]
    local: bool
    tlvs: tuple[tuple[int, bytes], ...]

    def tlv(self, kind: int) -> bytes | None:
        """Return the first value of a type."""
        return next((value for found, value in self.tlvs if found == kind), None)


@dataclass(frozen=True, slots=True)
class Ssl:
    """The SSL value: how the client's connection to the proxy was secured.

    `verified` needs a certificate and a result of 0: the bare result is 0 also where there is no certificate.
    """

    tls: bool
    certificate_on_connection: bool
    certificate_in_session: bool
    verify: int
    version: str | None = None
    common_name: str | None = None
    cipher: str | None = None

    @property
    def verified(self) -> bool:
        """Whether the client showed a certificate and the proxy found it valid."""
        return self.tls and (self.certificate_on_connection or self.certificate_in_session) and self.verify == 0

    def encode(self) -> bytes:
        """Return the value for a TLV of type `Tlv.SSL`."""
        client = self.tls | self.certificate_on_connection << 1 | self.certificate_in_session << 2
        texts = ((Tlv.SSL_VERSION, self.version), (Tlv.SSL_CN, self.common_name), (Tlv.SSL_CIPHER, self.cipher))
        inner = [(int(kind), text.encode()) for kind, text in texts if text is not None]
        return struct.pack("!BI", client, self.verify) + _encode_tlvs(inner)


def parse_ssl(value: bytes) -> Ssl:
    """Return the meaning of an SSL value; raises `PeerError` if it is malformed or its texts are not UTF-8."""
    if len(value) < 5:
        raise PeerError("PROXY header: SSL value cut short")
    client, verify = struct.unpack_from("!BI", value)
    try:
        texts = {kind: text.decode() for kind, text in _parse_tlvs(value, 5) if 0x21 <= kind <= 0x23}
    except UnicodeDecodeError:
        raise PeerError("PROXY header: SSL text is not UTF-8") from None
    return Ssl(
        tls=bool(client & 1),
        certificate_on_connection=bool(client & 2),
        certificate_in_session=bool(client & 4),
        verify=verify,
        version=texts.get(Tlv.SSL_VERSION),
        common_name=texts.get(Tlv.SSL_CN),
        cipher=texts.get(Tlv.SSL_CIPHER),
    )


def parse(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Return the header at the start of `data` and its length in bytes, or None if more bytes are needed.

    v4-mapped addresses come as IPv4. A CRC32C is checked where present. Raises `PeerError` (without a reply: close
    silently) as soon as the bytes cannot become a header for TCP, an unspecified family or a unix stream.
    """
    if data.startswith(_SIGNATURE[: len(data)]):
        return _parse_v2(data)
    if data.startswith(b"PROXY "[: len(data)]):
        return _parse_v1(data)
    raise PeerError("no PROXY header")


def _parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    end = data.find(b"\n", 0, V1_LIMIT)
    if end < 0:
        _check_v1_start(data)
        return None
    line = data[6 : end - 1]
    if data[end - 1 : end] != b"\r" or b"\r" in line:
        raise PeerError("PROXY header: bad line end")
    keyword, _, rest = line.partition(b" ")
    if keyword == b"UNKNOWN":
        return ProxyHeader(None, None, 1, False, ()), end + 1
    match = _V1_ADDRESSES.fullmatch(rest)
    if keyword not in (b"TCP4", b"TCP6") or match is None:
        raise PeerError("PROXY header: malformed line")
    source = _v1_endpoint(keyword, match[1], match[3])
    destination = _v1_endpoint(keyword, match[2], match[4])
    return ProxyHeader(source, destination, 1, False, ()), end + 1


def _check_v1_start(data: bytes) -> None:
    """Refuse the beginning of a line that no further bytes can make right."""
    rest = data[6:]
    if len(data) >= V1_LIMIT or b"\r" in rest[:-1]:
        raise PeerError("PROXY header: line too long or bad line end")
    if not any(rest.startswith(word[: len(rest)]) for word in _V1_KEYWORDS):
        raise PeerError("PROXY header: unknown family")
    if rest.startswith(b"TCP") and rest[5:].translate(None, _V1_CHARACTERS):
        raise PeerError("PROXY header: bad character")


def _v1_endpoint(keyword: bytes, address: bytes, port: bytes) -> Endpoint:
    text = address.decode("latin-1")
    try:
        if keyword == b"TCP4":
            ip = str(IPv4Address(text))
        elif "%" in text:
            raise PeerError("PROXY header: address with a zone")
        else:
            ip = _ipv6_text(IPv6Address(text))
    except AddressValueError:
        raise PeerError("PROXY header: bad address") from None
    if int(port) > 65535:
        raise PeerError("PROXY header: bad port")
    return ip, int(port)


def _ipv6_text(address: IPv6Address) -> str:
    return str(address.ipv4_mapped or address)


def _parse_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    if len(data) > 12 and data[12] not in (0x20, 0x21):
        raise PeerError("PROXY header: unknown version or command")
    if len(data) > 13 and (data[13] >> 4 > 3 or data[13] & 15 > 2):
        raise PeerError("PROXY header: unknown family or transport")
    if len(data) < 16:
        return None
    end = 16 + (data[14] << 8 | data[15])
    if end > V2_LIMIT:
        raise PeerError("PROXY header: too long")
    local, family = data[12] == 0x20, data[13]
    if not local:
        if family & 15 == 2:
            raise PeerError("PROXY header: not a stream")
        if end - 16 < _V2_ADDRESS_SIZES[family >> 4]:
            raise PeerError("PROXY header: addresses cut short")
    if len(data) < end:
        return None
    if local or family >> 4 == 0:
        return ProxyHeader(None, None, 2, local, ()), end
    header = data[:end]
    tlvs = tuple(_parse_tlvs(header, 16 + _V2_ADDRESS_SIZES[family >> 4]))
    if any(kind == Tlv.CRC32C for kind, _ in tlvs):
        _check_crc(header, tlvs, 16 + _V2_ADDRESS_SIZES[family >> 4])
    source, destination = _v2_endpoints(family, header)
    return ProxyHeader(source, destination, 2, False, tlvs), end


def _v2_endpoints(family: int, header: bytes) -> tuple[Endpoint, Endpoint] | tuple[None, None]:
    if family == _V2_TCP4:
        a, b, c, d, e, f, g, h, source_port, destination_port = struct.unpack_from("!8BHH", header, 16)
        return (f"{a}.{b}.{c}.{d}", source_port), (f"{e}.{f}.{g}.{h}", destination_port)
    if family == _V2_TCP6:
        source, destination, source_port, destination_port = struct.unpack_from("!16s16sHH", header, 16)
        return (_ipv6_text(IPv6Address(source)), source_port), (_ipv6_text(IPv6Address(destination)), destination_port)
    return None, None


def _parse_tlvs(data: bytes, start: int) -> Iterable[tuple[int, bytes]]:
    while start < len(data):
        if start + 3 > len(data):
            raise PeerError("PROXY header: value cut short")
        end = start + 3 + (data[start + 1] << 8 | data[start + 2])
        if end > len(data):
            raise PeerError("PROXY header: value cut short")
        yield data[start], data[start + 3 : end]
        start = end


def _check_crc(header: bytes, tlvs: Sequence[tuple[int, bytes]], start: int) -> None:
    sums = []
    blanked = bytearray(header)
    for kind, value in tlvs:
        if kind == Tlv.CRC32C:
            sums.append(value)
            blanked[start + 3 : start + 3 + len(value)] = bytes(len(value))
        start += 3 + len(value)
    if len(sums) != 1 or sums[0] != crc32c(bytes(blanked)).to_bytes(4, "big"):
        raise PeerError("PROXY header: wrong checksum")


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`; the standard library has only the other polynomial."""
    crc, table = 0xFFFFFFFF, _CRC32C
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _pair(source: Endpoint, destination: Endpoint) -> tuple[IPv4Address, IPv4Address] | tuple[IPv6Address, IPv6Address]:
    """Return both addresses in one family: IPv4 if both are, v4-mapped or not, else IPv6."""
    if not (0 <= source[1] <= 65535 and 0 <= destination[1] <= 65535):
        raise LocalError("not a port")
    first, second = _unmapped(source[0]), _unmapped(destination[0])
    if isinstance(first, IPv4Address) and isinstance(second, IPv4Address):
        return first, second
    return _mapped(first), _mapped(second)


def _unmapped(ip: str) -> IPv4Address | IPv6Address:
    try:
        address = ip_address(ip.partition("%")[0])
    except ValueError:
        raise LocalError("not an IP address") from None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _mapped(address: IPv4Address | IPv6Address) -> IPv6Address:
    return IPv6Address(f"::ffff:{address}") if isinstance(address, IPv4Address) else address


def encode_v1(source: Endpoint | None, destination: Endpoint | None) -> bytes:
    """Return a version 1 line with CRLF; UNKNOWN if either endpoint is None.

    v4-mapped addresses are sent as IPv4, zones are left out, a mixed pair is sent as IPv6. Raises `LocalError` for what
    is no address or port.
    """
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    first, second = _pair(source, destination)
    return f"PROXY TCP{first.version} {first} {second} {source[1]} {destination[1]}\r\n".encode()


def encode_v2(
    source: Endpoint | None,
    destination: Endpoint | None,
    tlvs: Iterable[tuple[int, bytes]] = (),
    crc: bool = False,
) -> bytes:
    """Return a version 2 PROXY header with `tlvs`, closed by a CRC32C if `crc`; LOCAL if either endpoint is None.

    Addresses as in `encode_v1`. Receivers of Postfix's kind take 536 bytes at most. Raises `LocalError` for what is no
    address, port or TLV, and for more than `V2_LIMIT` bytes.
    """
    if source is None or destination is None:
        return encode_v2_local()
    first, second = _pair(source, destination)
    family = _V2_TCP4 if first.version == 4 else _V2_TCP6
    rest = first.packed + second.packed + struct.pack("!HH", source[1], destination[1])
    rest += _encode_tlvs([*tlvs, (Tlv.CRC32C, bytes(4))] if crc else tlvs)
    if 16 + len(rest) > V2_LIMIT:
        raise LocalError("PROXY header too long")
    header = _SIGNATURE + struct.pack("!BBH", 0x21, family, len(rest)) + rest
    return header[:-4] + crc32c(header).to_bytes(4, "big") if crc else header


def encode_v2_local() -> bytes:
    """Return the version 2 header of a connection of our own, such as a health check."""
    return _SIGNATURE + b"\x20\x00\x00\x00"


def _encode_tlvs(tlvs: Iterable[tuple[int, bytes]]) -> bytes:
    parts = []
    for kind, value in tlvs:
        if not 0 <= kind <= 255 or len(value) > 65535:
            raise LocalError("PROXY header: not a TLV")
        parts.append(struct.pack("!BH", kind, len(value)) + value)
    return b"".join(parts)
