"""XCLIENT as it is read, XCLIENT and XFORWARD as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import xclient, xtext
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.xclient import TEMPUNAVAIL, address_value, format_command, format_xforward, parse


@pytest.mark.parametrize(
    ("args", "attributes"),
    [
        (b"ADDR=192.0.2.7", {"ADDR": b"192.0.2.7"}),
        (b"addr=ipv6:2001:DB8:0::7  Port=00025", {"ADDR": b"2001:db8::7", "PORT": b"25"}),
        (b"ADDR=IPV6:::ffff:192.0.2.7", {"ADDR": b"192.0.2.7"}),
        (b"NAME=[unavailable] REVERSE_NAME=[TempUnavail]", {"NAME": None, "REVERSE_NAME": TEMPUNAVAIL}),
        (b"PROTO=LMTP", {"PROTO": b"LMTP"}),
        (b"LOGIN=tim+2Bx+3Dy@b.example PROTO=esmtp", {"LOGIN": b"tim+x=y@b.example", "PROTO": b"ESMTP"}),
        (b"LOGIN=[UNAVAILABLE] ADDR=[UNAVAILABLE]", {"LOGIN": None, "ADDR": None}),
        (b"HELO=[192.0.2.7] DESTADDR=198.51.100.25 DESTPORT=65535",
         {"HELO": b"[192.0.2.7]", "DESTADDR": b"198.51.100.25", "DESTPORT": b"65535"}),
        (b"NAME=a_b.client.example", {"NAME": b"a_b.client.example"}),
        # what nginx sends
        (b"ADDR=192.0.2.7 LOGIN=tim NAME=[UNAVAILABLE]", {"ADDR": b"192.0.2.7", "LOGIN": b"tim", "NAME": None}),
    ],
)  # fmt: skip
def test_parse(args: bytes, attributes: dict[str, bytes | None]) -> None:
    assert parse(args) == attributes


def test_the_marker_is_the_constant() -> None:
    assert parse(b"NAME=[tempunavail]")["NAME"] is TEMPUNAVAIL


@pytest.mark.parametrize(
    "args",
    [
        b"", b" ", b"ADDR", b"ADDR=", b"=x", b"SESSION=x", b"ADDR=2001:db8::7", b"ADDR=IPV6:192.0.2.7", b"ADDR=unix:",
        b"ADDR=192.0.2", b"ADDR=192.0.2.07", b"ADDR=IPV6:fe80::1+25eth0", b"ADDR=[TEMPUNAVAIL]", b"PORT=65536",
        b"PORT=000025", b"PORT=-1", b"PORT=+2B1", b"PROTO=UUCP", b"NAME=a..b", b"NAME=a+20b", b"NAME=.", b"NAME=a.",
        b"NAME=" + b"a." * 127 + b"ab", b"HELO=a+0Ab", b"LOGIN=a+00", b"LOGIN=+2", b"LOGIN=" + b"a" * 256,
        b"ADDR=192.0.2.7 ADDR=192.0.2.8", b"ADDR=192.0.2.7\tPORT=25", b"NAME=a\xc3\xbf", b"N\xc3ME=a",
    ],
)  # fmt: skip
def test_refused(args: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse(args)
    assert caught.value.reply is not None
    assert caught.value.reply.startswith(b"501 5.5.4 ")
    assert b"\n" not in caught.value.reply


@given(st.binary(), st.sampled_from(xclient.ATTRIBUTES))
def test_any_bytes_parse_or_are_refused(data: bytes, name: str) -> None:
    for args in (data, name.encode() + b"=" + data, name.encode() + b"=" + xtext.encode(data)):
        try:
            attributes = parse(args)
        except PeerError:
            continue
        assert all(value is None or not set(value) & set(range(32)) for value in attributes.values())


@pytest.mark.parametrize(
    ("ip", "value"),
    [
        ("192.0.2.7", b"192.0.2.7"),
        ("::ffff:192.0.2.7", b"192.0.2.7"),
        ("2001:DB8::7", b"IPV6:2001:db8::7"),
        ("fe80::1%eth0", b"IPV6:fe80::1"),
    ],
)
def test_address_value(ip: str, value: bytes) -> None:
    assert address_value(ip) == value


def test_address_value_of_no_address() -> None:
    with pytest.raises(LocalError):
        address_value("unix:")


FULL = {
    "ADDR": b"IPV6:2001:db8::7", "PORT": b"52001", "NAME": b"[UNAVAILABLE]", "REVERSE_NAME": b"client.example",
    "PROTO": b"ESMTP", "LOGIN": b"tim+x@b.example", "HELO": b"a b",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "offered", "limit", "line"),
    [
        ({}, FULL, 512, b"XCLIENT ADDR=IPV6:2001:db8::7 PORT=52001 NAME=[UNAVAILABLE] REVERSE_NAME=client.example "
                        b"PROTO=ESMTP LOGIN=tim+2Bx@b.example HELO=a+20b"),
        ({}, ["LOGIN", "ADDR", "NAME"], 512, b"XCLIENT ADDR=IPV6:2001:db8::7 NAME=[UNAVAILABLE] "
                                             b"LOGIN=tim+2Bx@b.example"),
        ({}, ["HELO", "REVERSE_NAME", "PORT"], 48, b"XCLIENT PORT=52001 REVERSE_NAME=client.example"),
        ({}, ["HELO", "REVERSE_NAME", "PORT"], 47, b"XCLIENT PORT=52001"),
        ({"HELO": b"x" * 256, "REVERSE_NAME": b""}, ["HELO", "REVERSE_NAME", "PORT"], 512, b"XCLIENT PORT=52001"),
        ({"HELO": b"x" * 255}, ["HELO", "PORT"], 512, b"XCLIENT PORT=52001 HELO=" + b"x" * 255),
        ({"HELO": b"\x01" * 255}, ["HELO", "PORT"], 512, b"XCLIENT PORT=52001"),
    ],
)  # fmt: skip
def test_format_command(changes: dict[str, bytes], offered: list[str], limit: int, line: bytes) -> None:
    assert format_command(b"XCLIENT", FULL | changes, offered, limit) == line


@pytest.mark.parametrize(
    ("attributes", "offered"),
    [
        ({"LOGIN": b"\x01" * 255}, ["LOGIN"]),
        ({"LOGIN": b"x" * 256}, ["LOGIN"]),
        ({"LOGIN": b""}, ["LOGIN"]),
        ({"LOGIN": b"tim"}, ["ADDR"]),
        ({"HELO": b""}, ["HELO"]),
        ({"A B": b"x"}, ["A B"]),
        ({"HELO": b"\x01" * 255}, ["HELO"]),
    ],
)
def test_what_cannot_be_said(attributes: dict[str, bytes], offered: list[str]) -> None:
    with pytest.raises(LocalError):
        format_command(b"XCLIENT", attributes, offered)


HOSTS = st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,4}", fullmatch=True).map(str.encode)


@given(
    st.fixed_dictionaries(
        {"ADDR": st.ip_addresses().map(str)},
        optional={"NAME": HOSTS, "PORT": st.integers(0, 65535).map(lambda port: b"%d" % port),
                  "LOGIN": st.text("aä=+ @", min_size=1, max_size=40).map(str.encode), "HELO": HOSTS},
    )
)  # fmt: skip
def test_what_we_write_we_read(attributes: dict[str, bytes | str]) -> None:
    ip = str(attributes["ADDR"])
    values = {name: address_value(ip) if isinstance(value, str) else value for name, value in attributes.items()}
    line = format_command(b"XCLIENT", values, xclient.ATTRIBUTES, limit=1000)
    address = values["ADDR"].removeprefix(b"IPV6:")
    assert parse(line.removeprefix(b"XCLIENT ")) == values | {"ADDR": address}


@pytest.mark.parametrize(
    ("attributes", "limit", "lines"),
    [
        ({}, 512, []),
        ({"NAME": b"a", "ADDR": b"192.0.2.7", "X": b"no"}, 512, [b"XFORWARD NAME=a ADDR=192.0.2.7"]),
        ({"NAME": b"abc", "HELO": b"abc"}, 27, [b"XFORWARD NAME=abc", b"XFORWARD HELO=abc"]),
        ({"NAME": b"abc", "HELO": b"abc"}, 28, [b"XFORWARD NAME=abc HELO=abc"]),
        ({"NAME": b"\x01" * 200, "HELO": b"", "IDENT": b"x" * 256, "ADDR": b"a"}, 512, [b"XFORWARD ADDR=a"]),
    ],
)
def test_format_xforward(attributes: dict[str, bytes], limit: int, lines: list[bytes]) -> None:
    assert format_xforward(attributes, ["NAME", "ADDR", "HELO", "IDENT"], limit) == lines
