"""Replies and EHLO: what is read, what is refused, and that the network's cuts do not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.smtp import Ehlo, Reply, ReplyReader, format_ehlo, parse_ehlo
from gateway.testing.splits import splits


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("250 Ok", b"250 Ok\r\n"),
        ("550 5.7.1 no\nreally", b"550-5.7.1 no\r\n550 really\r\n"),
        ("550-5.7.1 no\n550 5.7.1 really", b"550-5.7.1 no\r\n550 5.7.1 really\r\n"),
        ("334 ", b"334 \r\n"),
        ("250", b"250 \r\n"),
        ("554 bad\r\x00text", b"554 bad??text\r\n"),
        ("554 \u00e9\u2028", "554 \u00e9?\r\n".encode()),
    ],
)
def test_of_and_encode(text: str, wire: bytes) -> None:
    assert Reply.of(text).encode() == wire


@pytest.mark.parametrize("text", ["", "Ok", "25 x", "199 x", "600 x", "2500 x", "250_x", "\u0662\u0665\u0660 x"])
def test_of_wants_a_code(text: str) -> None:
    with pytest.raises(LocalError):
        Reply.of(text)


@pytest.mark.parametrize(
    ("text", "reply_class", "enhanced"),
    [
        ("250 2.1.0 Ok", 2, "2.1.0"),
        ("450 4.7.28", 4, "4.7.28"),
        ("250 2.1.0Ok", 2, None),
        ("354 Go", 3, None),
        ("550 9.1.1 x", 5, None),
    ],
)
def test_class_and_enhanced_code(text: str, reply_class: int, enhanced: str | None) -> None:
    reply = Reply.of(text)
    assert (reply.reply_class, reply.enhanced) == (reply_class, enhanced)


def test_text_is_safe_for_a_log() -> None:
    assert Reply(550, (b"a\x1b[31m\r\0b", b"\xff\xc2\x85c")).text == "a?[31m??b ??c"


REPLIES = [
    pytest.param(b"250 Ok\r\n", [(250, (b"Ok",))], id="one"),
    pytest.param(b"250\r\n", [(250, (b"",))], id="no text"),
    pytest.param(b"250 Ok\n", [(250, (b"Ok",))], id="LF alone"),
    pytest.param(b"250-a\r\n250-b\r\n250 c\r\n", [(250, (b"a", b"b", b"c"))], id="three lines"),
    pytest.param(b"250-a\n250\r\n", [(250, (b"a", b""))], id="mixed ends, bare last line"),
    pytest.param(b"250 a\r\n354 b\r\n", [(250, (b"a",)), (354, (b"b",))], id="two replies"),
    pytest.param(b"220-a\r\n220 b\r\n250 c\r\n", [(220, (b"a", b"b")), (250, (b"c",))], id="multi-line first"),
    pytest.param(b"550 a\0\xff\x1bb\r\r\n", [(550, (b"a\0\xff\x1bb\r",))], id="raw octets kept"),
    pytest.param(b"334 \r\n", [(334, (b"",))], id="empty challenge"),
    pytest.param(b"250 " + b"x" * 2042 + b"\r\n", [(250, (b"x" * 2042,))], id="longest line"),
    pytest.param(b"250-\r\n" * 199 + b"250 \r\n", [(250, (b"",) * 200)], id="most lines"),
]


@pytest.mark.parametrize(("wire", "expected"), REPLIES)
def test_reader(wire: bytes, expected: list[tuple[int, tuple[bytes, ...]]]) -> None:
    for pieces in splits(wire):
        reader = ReplyReader()
        replies = [reply for piece in pieces for reply in reader.feed(piece)]
        assert replies == [Reply(*reply) for reply in expected]
        assert not reader.pending


@pytest.mark.parametrize("wire", [b"2", b"250 Ok", b"250 Ok\r", b"250-a\r\n", b"250 a\r\n250-b\r\n"])
def test_pending(wire: bytes) -> None:
    for pieces in splits(wire):
        reader = ReplyReader()
        for piece in pieces:
            reader.feed(piece)
        assert reader.pending


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n",
        b"25\r\n",
        b"150 x\r\n",
        b"600 x\r\n",
        b"2x0 x\r\n",
        b"250_x\r\n",
        b"250\tx\r\n",
        b"2500 x\r\n",
        b"250-a\r\n550 b\r\n",
        b"250-a\r\nb\r\n",
        b"* OK IMAP\r\n",
        b"+OK POP3\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\x15\x03\x01\x00\x02\x02\x0a\n",
        b"250 " + b"x" * 2043 + b"\r\n",
        b"2" * 2049,
        b"250-\r\n" * 200 + b"250 \r\n",
        "\u0662\u0665\u0660 x\r\n".encode(),
    ],
)
def test_reader_refuses(wire: bytes) -> None:
    for pieces in splits(wire):
        reader = ReplyReader()
        with pytest.raises(PeerError) as caught:
            for piece in pieces:
                reader.feed(piece)
        assert caught.value.reply is None


def test_limits_are_settings() -> None:
    assert ReplyReader(max_line=10).feed(b"250 1234\r\n") == [Reply(250, (b"1234",))]
    with pytest.raises(PeerError, match="too long"):
        ReplyReader(max_line=10).feed(b"250 12345\r\n")
    with pytest.raises(PeerError, match="too many lines"):
        ReplyReader(max_lines=2).feed(b"250-\r\n250-\r\n")


LINES = st.lists(
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").rstrip(b"\r")), min_size=1, max_size=5
)


@given(st.lists(st.builds(Reply, st.integers(200, 599), LINES.map(tuple)), max_size=4), st.integers(0, 9))
def test_reader_takes_what_encode_gives(replies: list[Reply], seed: int) -> None:
    for pieces in splits(b"".join(reply.encode() for reply in replies), seed):
        reader = ReplyReader()
        assert [reply for piece in pieces for reply in reader.feed(piece)] == replies


@given(st.binary(max_size=60), st.integers(0, 9))
def test_any_bytes_are_replies_or_a_peer_error(wire: bytes, seed: int) -> None:
    outcomes = set()
    for pieces in splits(wire, seed):
        reader, replies = ReplyReader(), []
        try:
            for piece in pieces:
                replies += reader.feed(piece)
        except PeerError:
            outcomes.add((len(replies), "error"))
        else:
            outcomes.add((len(replies), "pending" if reader.pending else "done"))
    # An error hides the good replies before it in the same block, but not that there was one.
    assert len({kind for _, kind in outcomes}) <= 1


EHLO = Reply(
    250,
    (
        b"mx.example.org at your service",
        b"pipelining",
        b"SIZE 1000",
        b"AUTH PLAIN LOGIN",
        b"AUTH=LOGIN cram-md5",
        b"XCLIENT NAME ADDR PORT LOGIN",
        b"LIMITS RCPTMAX=20 MAILMAX=x Rcptdomainmax=3",
        b"size 5",
        b"-odd",
        b"X=Y",
        b"BAD\x00LINE",
        b"",
    ),
)


def test_ehlo() -> None:
    ehlo = parse_ehlo(EHLO)
    assert ehlo.name == "mx.example.org"
    assert ehlo.keywords == {
        "PIPELINING": "",
        "SIZE": "1000",
        "AUTH": "PLAIN LOGIN cram-md5",
        "XCLIENT": "NAME ADDR PORT LOGIN",
        "LIMITS": "RCPTMAX=20 MAILMAX=x Rcptdomainmax=3",
    }
    assert ehlo.size == 1000
    assert ehlo.auth_mechanisms == {"PLAIN", "LOGIN", "CRAM-MD5"}
    assert ehlo.xclient == {"NAME", "ADDR", "PORT", "LOGIN"}
    assert ehlo.limits == {"RCPTMAX": 20, "RCPTDOMAINMAX": 3}


@pytest.mark.parametrize(
    ("keywords", "size"),
    [
        ({}, None),
        ({"SIZE": ""}, 0),
        ({"SIZE": "0"}, 0),
        ({"SIZE": "12"}, 12),
        ({"SIZE": "many"}, 0),
        ({"SIZE": "²"}, 0),
    ],
)
def test_ehlo_size(keywords: dict[str, str], size: int | None) -> None:
    assert Ehlo("a", keywords).size == size


def test_old_auth_form_alone() -> None:
    assert parse_ehlo(Reply.of("250-a\n250 AUTH=PLAIN")).keywords == {"AUTH": "PLAIN"}


def test_format_ehlo() -> None:
    wire = format_ehlo("gw.example.org", {"PIPELINING": "", "SIZE": "1000"})
    assert wire == b"250-gw.example.org\r\n250-PIPELINING\r\n250 SIZE 1000\r\n"
    assert format_ehlo("gw", {}) == b"250 gw\r\n"
    (reply,) = ReplyReader().feed(wire)
    assert parse_ehlo(reply) == Ehlo("gw.example.org", {"PIPELINING": "", "SIZE": "1000"})


@pytest.mark.parametrize(
    ("name", "keywords"), [("", {}), ("a\r\nb", {}), ("a", {"X\n": ""}), ("a", {"X": "1\r\n250 Y"})]
)
def test_format_ehlo_breaks_no_line(name: str, keywords: dict[str, str]) -> None:
    with pytest.raises(LocalError):
        format_ehlo(name, keywords)
