"""PROXY headers: worked examples, every cut, an oracle (proxy-protocol), and any bytes."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from socket import SOCK_STREAM

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResult, ProxyResultIPv4, ProxyResultIPv6
from proxyprotocol.tlv import ProxyProtocolSSLTLV, ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.proxy_header import (
    ProxyHeader,
    Ssl,
    Tlv,
    crc32c,
    encode_v1,
    encode_v2,
    encode_v2_local,
    parse,
    parse_ssl,
)
from gateway.testing.splits import splits

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
TCP4 = bytes.fromhex("c0000207 c6336419 cb21 0019")
TCP6 = bytes.fromhex("20010db8000000000000000000000007 20010db8000000000000000000000025 cb21 0019")
MAPPED = bytes.fromhex("00000000000000000000ffffc0000207 00000000000000000000ffffc6336419 cb21 0019")
SOURCE, DESTINATION = ("192.0.2.7", 52001), ("198.51.100.25", 25)
SOURCE6, DESTINATION6 = ("2001:db8::7", 52001), ("2001:db8::25", 25)
WITH_CRC = SIGNATURE + bytes.fromhex("21110019") + TCP4 + bytes.fromhex("050003616263 030004b2a0e6ce")


def v2(command: int, family: int, rest: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(rest).to_bytes(2, "big") + rest


HEADERS = [
    (b"PROXY TCP4 192.0.2.7 198.51.100.25 52001 25\r\n", ProxyHeader(SOURCE, DESTINATION, 1, False, ())),
    (b"PROXY TCP6 2001:DB8::7 2001:db8:0::25 52001 25\r\n", ProxyHeader(SOURCE6, DESTINATION6, 1, False, ())),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:c633:6419 0 65535\r\n",
     ProxyHeader(("192.0.2.7", 0), ("198.51.100.25", 65535), 1, False, ())),
    (b"PROXY UNKNOWN\r\n", ProxyHeader(None, None, 1, False, ())),
    (b"PROXY UNKNOWN ffff::x what ever\r\n", ProxyHeader(None, None, 1, False, ())),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", ProxyHeader(None, None, 1, False, ())),
    (v2(0x21, 0x11, TCP4), ProxyHeader(SOURCE, DESTINATION, 2, False, ())),
    (v2(0x21, 0x21, TCP6), ProxyHeader(SOURCE6, DESTINATION6, 2, False, ())),
    (v2(0x21, 0x21, MAPPED), ProxyHeader(SOURCE, DESTINATION, 2, False, ())),
    (v2(0x21, 0x11, TCP4 + b"\x04\x00\x00\x05\x00\x01x"),
     ProxyHeader(SOURCE, DESTINATION, 2, False, ((4, b""), (5, b"x")))),
    (WITH_CRC, ProxyHeader(SOURCE, DESTINATION, 2, False, ((5, b"abc"), (3, bytes.fromhex("b2a0e6ce"))))),
    (v2(0x20, 0, b""), ProxyHeader(None, None, 2, True, ())),
    (v2(0x20, 0x11, b"junk"), ProxyHeader(None, None, 2, True, ())),
    (v2(0x21, 0, b"junk"), ProxyHeader(None, None, 2, False, ())),
    (v2(0x21, 0x31, bytes(216) + b"\x04\x00\x00"), ProxyHeader(None, None, 2, False, ((4, b""),))),
    (v2(0x21, 0x11, TCP4 + b"\x04" + (4065).to_bytes(2, "big") + bytes(4065)),
     ProxyHeader(SOURCE, DESTINATION, 2, False, ((4, bytes(4065)),))),
]  # fmt: skip


@pytest.mark.parametrize(("data", "header"), HEADERS)
def test_parse_at_every_cut(data: bytes, header: ProxyHeader) -> None:
    assert parse(data) == (header, len(data))
    assert parse(data + b"EHLO x\r\n") == (header, len(data))
    for pieces in splits(data):
        so_far = b""
        for piece in pieces[:-1]:
            so_far += piece
            assert parse(so_far) is None


LATE = [  # needs the last byte to be seen wrong
    b"PROXY \r\n", b"PROXY TCP4\r\n", b"PROXY TCP4 192.0.2.7 198.51.100.25 52001\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.25 52001 25 \r\n", b"PROXY TCP4  192.0.2.7 198.51.100.25 52001 25\r\n",
    b"PROXY TCP4 192.0.2.07 198.51.100.25 52001 25\r\n", b"PROXY TCP4 192.0.2 198.51.100.25 52001 25\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::25 52001 25\r\n", b"PROXY TCP6 192.0.2.7 198.51.100.25 52001 25\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.25 052001 25\r\n", b"PROXY TCP4 192.0.2.7 198.51.100.25 65536 25\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.25 1 +25\r\n", b"PROXY UNKNOWNX\r\n", b"PROXY TCP4 1 2 3 4\n",
    b"PROXY UNKNOWN\n", b"PROXY UNKNOWN \0\n", b"PROXY TCP6 fe80::1%1 ::1 1 1\r\n", b"PROXY\tUNKNOWN\r\n",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    v2(0x21, 0x11, TCP4 + b"\x04"), v2(0x21, 0x11, TCP4 + b"\x04\x00\x01"), v2(0x21, 0x11, TCP4 + b"\x03\x00\x00"),
    v2(0x21, 0x11, TCP4 + b"\x03\x00\x04\x00\x00\x00\x00"), WITH_CRC[:-1] + b"\xcf",
    v2(0x21, 0x31, bytes(216) + b"\x04"), WITH_CRC.replace(b"abc", b"abd"),
]  # fmt: skip


@pytest.mark.parametrize("data", LATE)
def test_refused(data: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse(data)
    assert caught.value.reply is None


@pytest.mark.parametrize(
    "data",
    [
        b"E", b"\x16", b"PROXX", b"PROXY X", b"PROXY TCP5", b"PROXY TCP4 x", b"PROXY TCP4 1\rX", b"\r\nX",
        b"PROXY TCP6 fe80::1%", b"PROXY UNKNOWN" + b"x" * 94, b"PROXY TCP4 \n", SIGNATURE + b"\x11",
        SIGNATURE + b"\x22", SIGNATURE + b"\x20\x41", SIGNATURE + b"\x21\x13", SIGNATURE + b"\x21\x11\x00\x0b",
        SIGNATURE + b"\x21\x21\x00\x23", SIGNATURE + b"\x21\x12\x00\x0c", SIGNATURE + b"\x20\x00\x0f\xf1",
        SIGNATURE + b"\x21\x31\x00\xd7",
    ],
)  # fmt: skip
def test_refused_at_once_and_not_before(data: bytes) -> None:
    with pytest.raises(PeerError):
        parse(data)
    assert parse(data[:-1]) is None


V2_STARTS = [SIGNATURE + rest for rest in (b"", b"\x20\0\0", b"\x21\x11\0", b"\x21\x21\0")]
STARTS = [b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", *V2_STARTS]


@given(st.binary(), st.sampled_from(STARTS))
def test_any_bytes_parse_or_are_refused(data: bytes, start: bytes) -> None:
    data = start + data
    try:
        parsed = parse(data)
    except PeerError:
        return
    if parsed is not None:
        assert 0 < parsed[1] <= len(data)
        assert parse(data[: parsed[1]]) == parsed
        assert parse(data[: parsed[1] - 1]) is None


PORTS = st.integers(0, 65535)
PAIRS = st.one_of(
    st.tuples(st.tuples(st.ip_addresses(v=4), PORTS), st.tuples(st.ip_addresses(v=4), PORTS)),
    st.tuples(st.tuples(st.ip_addresses(v=6), PORTS), st.tuples(st.ip_addresses(v=6), PORTS)),
)
TLVS = st.lists(st.tuples(st.integers(0x30, 0xFF), st.binary(max_size=30)), max_size=4, unique_by=lambda tlv: tlv[0])
Pair = tuple[tuple[IPv4Address | IPv6Address, int], tuple[IPv4Address | IPv6Address, int]]


def plain(ip: IPv4Address | IPv6Address) -> str:
    return str((ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip)


@given(PAIRS, TLVS, st.booleans())
def test_we_write_what_the_oracle_reads(pair: Pair, tlvs: list[tuple[int, bytes]], crc: bool) -> None:
    source, destination = ((str(ip), port) for ip, port in pair)
    line = encode_v1(source, destination)
    assert len(line) <= 107
    header = encode_v2(source, destination, tlvs, crc)
    for result in (ProxyProtocolV1().unpack(line), ProxyProtocolV2().unpack(header)):
        assert isinstance(result, ProxyResultIPv4 | ProxyResultIPv6)
        assert [(plain(ip), port) for ip, port in (result.source, result.dest)] == [(plain(ip), p) for ip, p in pair]
    assert {kind: result.tlv[kind] for kind in result.tlv if kind != Tlv.CRC32C} == dict(tlvs)
    assert (Tlv.CRC32C in set(result.tlv)) == crc
    # and so do we
    for data, version in ((line, 1), (header, 2)):
        parsed = parse(data)
        assert parsed is not None
        assert parsed[0].source == (plain(pair[0][0]), pair[0][1])
        assert (parsed[0].destination, parsed[0].version) == ((plain(pair[1][0]), pair[1][1]), version)
        assert parsed[0].tlvs[: len(tlvs)] == (tuple(tlvs) if version == 2 else ())


@given(PAIRS, TLVS)
def test_we_read_what_the_oracle_writes(pair: Pair, tlvs: list[tuple[int, bytes]]) -> None:
    cls: Callable[..., ProxyResult] = ProxyResultIPv4 if isinstance(pair[0][0], IPv4Address) else ProxyResultIPv6
    result = cls(*pair, protocol=SOCK_STREAM, tlv=ProxyProtocolTLV(init=dict(tlvs)))
    expected = tuple((plain(ip), port) for ip, port in pair)
    for version, data in ((1, ProxyProtocolV1().pack(result)), (2, ProxyProtocolV2().pack(result))):
        parsed = parse(data)
        assert parsed is not None and parsed[1] == len(data)
        assert (parsed[0].source, parsed[0].destination) == expected
        assert dict(parsed[0].tlvs) == (dict(tlvs) if version == 2 else {})


def test_encode_examples() -> None:
    assert encode_v1(SOURCE, DESTINATION) == HEADERS[0][0]
    assert encode_v2(SOURCE, DESTINATION) == v2(0x21, 0x11, TCP4)
    assert encode_v2(SOURCE6, DESTINATION6) == v2(0x21, 0x21, TCP6)
    assert encode_v2(SOURCE, DESTINATION, [(Tlv.UNIQUE_ID, b"abc")], crc=True) == WITH_CRC
    assert encode_v2_local() == encode_v2(None, DESTINATION) == v2(0x20, 0, b"")
    assert encode_v1(SOURCE, None) == b"PROXY UNKNOWN\r\n"
    # demoted, promoted, without zone
    assert encode_v1(("::ffff:192.0.2.7", 1), DESTINATION) == b"PROXY TCP4 192.0.2.7 198.51.100.25 1 25\r\n"
    assert encode_v1(SOURCE, ("fe80::1%eth0", 25)) == b"PROXY TCP6 ::ffff:c000:207 fe80::1 52001 25\r\n"


@pytest.mark.parametrize(
    ("source", "tlvs"),
    [
        (("unix:", 0), []),
        (("192.0.2.7", 65536), []),
        (("192.0.2.7", -1), []),
        (SOURCE, [(256, b"")]),
        (SOURCE, [(5, bytes(65536))]),
        (SOURCE, [(5, bytes(4066))]),
    ],
)
def test_what_cannot_be_said(source: tuple[str, int], tlvs: list[tuple[int, bytes]]) -> None:
    with pytest.raises(LocalError):
        encode_v2(source, DESTINATION, tlvs)


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_ssl_without_certificate_is_not_verified() -> None:
    value = bytes.fromhex("0100000000 210007 544c5376312e33")
    ssl = parse_ssl(value)
    assert ssl == Ssl(True, False, False, 0, version="TLSv1.3")
    assert not ssl.verified
    assert ssl.encode() == value


ASCII = st.text(st.characters(codec="ascii"))


@given(st.builds(Ssl, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1),
                 st.none() | ASCII, st.none() | st.text(), st.none() | ASCII))  # fmt: skip
def test_ssl_against_the_oracle(ssl: Ssl) -> None:
    value = ssl.encode()
    assert parse_ssl(value) == ssl
    oracle = ProxyProtocolSSLTLV(value)
    assert (oracle.has_ssl, oracle.has_cert_conn, oracle.has_cert_sess) == (
        ssl.tls, ssl.certificate_on_connection, ssl.certificate_in_session)  # fmt: skip
    assert (oracle.verify, oracle.version, oracle.cn, oracle.cipher) == (
        ssl.verify, ssl.version, ssl.common_name, ssl.cipher)  # fmt: skip
    assert ssl.verified == (ssl.tls and (oracle.has_cert_conn or oracle.has_cert_sess) and oracle.verify == 0)


@given(st.binary())
def test_any_ssl_value_parses_or_is_refused(value: bytes) -> None:
    try:
        parse_ssl(value)
    except PeerError:
        pass
