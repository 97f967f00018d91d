"""IMAP's ID: what is read, what is refused, and that what we say is read as we meant it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.imap import CommandReader, id_command, parse_id
from gateway.protocol.imap_commands import Command

PAIRS_30 = b" ".join(b'"k%d" "v"' % i for i in range(30))
PAIRS_31 = PAIRS_30 + b' "k30" "v"'


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (b"NIL", {}),
        (b"nil", {}),
        (b"()", {}),
        (
            b'("name" "sodr" "version" "19.34" "vendor" "Pink Floyd Music Limited")',
            {"name": "sodr", "version": "19.34", "vendor": "Pink Floyd Music Limited"},
        ),
        (b'("os" NIL "x" nil)', {"os": None, "x": None}),
        (b'("os" "NIL" "NIL" "")', {"os": "NIL", "nil": ""}),
        (b'("X-Originating-IP" "192.0.2.7")', {"x-originating-ip": "192.0.2.7"}),
        (b'("a" "b\\"c\\\\d)")', {"a": 'b"c\\d)'}),
        (b'("a" {3}\r\nb") {1+}\r\nc NIL)', {"a": 'b")', "c": None}),
        ('("a" "ä")'.encode(), {"a": "ä"}),
        (b'("' + b"k" * 30 + b'" "' + b"v" * 1024 + b'")', {"k" * 30: "v" * 1024}),
        (b"(%b)" % PAIRS_30, {f"k{i}": "v" for i in range(30)}),
    ],
)
def test_parse(rest: bytes, expected: dict[str, str | None]) -> None:
    assert parse_id(rest) == expected


@pytest.mark.parametrize(
    "rest",
    [
        b"", b"x", b"NILx", b"(", b")", b"( )", b"(NIL)", b'("a")', b'("a" )', b'("a" "b"', b'("a" "b"))', b'("a" "b") ',
        b'("a" "b" )', b'( "a" "b")', b'("a"  "b")', b'("a" "b""c" "d")', b'("a" "b" "c")', b'(NIL "b")', b"(a b)",
        b'("a" "b" "A" "c")', b'("a" "\\x")', b'("a" "\xff")', b'("a" "\x1b")', b'("a" {2}\r\n\r\n)', b'("a" {5}\r\nab)',
        b'("a" {1}b)', b'("a" ("b"))', b'("a" NILS)',
        b'("' + b"k" * 31 + b'" "v")', b'("k" "' + b"v" * 1025 + b'")', b'("k" {1025}\r\n' + b"v" * 1025 + b")",
        b"(%b)" % PAIRS_31,
    ],
)  # fmt: skip
def test_refused(rest: bytes) -> None:
    with pytest.raises(PeerError):
        parse_id(rest)


def test_what_dovecot_proxies_say() -> None:
    values: dict[str, str | None] = {
        "x-session-id": "Ab1",
        "x-originating-ip": "192.0.2.7",
        "x-originating-port": "52001",
        "x-proxy-ttl": "4",
    }
    line = (
        b'I ID ("x-session-id" "Ab1" "x-originating-ip" "192.0.2.7" "x-originating-port" "52001" "x-proxy-ttl" "4")\r\n'
    )
    assert id_command(b"I", values) == line
    assert id_command(b"I", {}) == b"I ID NIL\r\n"
    assert id_command(b"I", {"a": None}) == b'I ID ("a" NIL)\r\n'


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.lower)
VALUES = st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@given(st.dictionaries(NAMES, VALUES, max_size=30))
def test_what_we_say_is_read(values: dict[str, str | None]) -> None:
    line = id_command(b"a", values)
    assert line.endswith(b"\r\n")
    command = CommandReader(max_size=65536).line(line[:-2])
    assert isinstance(command, Command) and command.name == "ID"
    assert parse_id(command.arguments[0]) == values


@pytest.mark.parametrize(
    "values",
    [{"a": "b\r\nc LOGOUT"}, {"a\nb": "c"}, {"a": "b\0"}, {"a": "\x1b"}, {"a": "ä"}, {"a": "\udce4"}, {"k" * 31: "v"},
     {"k": "v" * 1025}, {"a": "b", "A": "c"}, {f"k{i}": "v" for i in range(31)}],
)  # fmt: skip
def test_what_id_cannot_carry(values: dict[str, str | None]) -> None:
    with pytest.raises(LocalError):
        id_command(b"a", values)


def test_id_needs_a_tag() -> None:
    with pytest.raises(LocalError):
        id_command(b"a b", {})


@given(st.binary(max_size=60))
def test_any_list_is_read_or_refused(rest: bytes) -> None:
    for data in (rest, b"(" + rest + b")", b'("a" ' + rest):
        try:
            parse_id(data)
        except PeerError:
            pass
