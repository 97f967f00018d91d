"""IMAP responses: what is read, what is refused, and that the network's cuts do not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import PeerError
from gateway.protocol.imap import Response, ResponseReader, capabilities_of
from gateway.testing.splits import splits

Parts = tuple[bytes, str, bytes, bytes]

RESPONSES: list[tuple[bytes, Parts]] = [
    (b"* OK ready\r\n", (b"*", "OK", b"", b"ready")),
    (b"* ok\r\n", (b"*", "OK", b"", b"")),
    (b"* OK \r\n", (b"*", "OK", b"", b"")),
    (b"* PREAUTH [A] hi\r\n", (b"*", "PREAUTH", b"A", b"hi")),
    (b"* BYE gone {3}\r\n", (b"*", "BYE", b"", b"gone {3}")),
    (b"* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] Dovecot ready.\r\n",
     (b"*", "OK", b"CAPABILITY IMAP4rev1 AUTH=PLAIN", b"Dovecot ready.")),
    (b"a NO [AUTHENTICATIONFAILED] no\r\n", (b"a", "NO", b"AUTHENTICATIONFAILED", b"no")),
    (b"a NO [ALERT]no\r\n", (b"a", "NO", b"ALERT", b"no")),
    (b'a NO [X "a]b\\"]" c] no\r\n', (b"a", "NO", b'X "a]b\\"]" c', b"no")),
    (b'a NO [X "a] no\r\n', (b"a", "NO", b'X "a', b"no")),
    (b"a NO [X no\r\n", (b"a", "NO", b"", b"[X no")),
    (b"a BAD what\r\n", (b"a", "BAD", b"", b"what")),
    (b"a OK [] in\r\n", (b"a", "OK", b"", b"in")),
    (b"+ \r\n", (b"+", "", b"", b"")),
    (b"+\r\n", (b"+", "", b"", b"")),
    (b"+ OK go\r\n", (b"+", "", b"", b"OK go")),
    (b"+PDQyPg==\r\n", (b"+", "", b"", b"PDQyPg==")),
    (b"++abc\r\n", (b"+", "", b"", b"+abc")),
    (b"+ [X] {3}\r\n", (b"+", "", b"", b"[X] {3}")),
    (b"* CAPABILITY IMAP4rev1\r\n", (b"*", "", b"", b"CAPABILITY IMAP4rev1")),
    (b"* 3 EXISTS\r\n", (b"*", "", b"", b"3 EXISTS")),
    (b'* ID ("a" {3}\r\n\r\na)\r\n', (b"*", "", b"", b'ID ("a" {3}\r\n\r\na)')),
    (b"* X {0}\r\n {2}\r\nab\r\n", (b"*", "", b"", b"X {0}\r\n {2}\r\nab")),
    (b"* X {7}\r\na OK b\n\r\n", (b"*", "", b"", b"X {7}\r\na OK b\n")),
]  # fmt: skip


def parts(response: Response) -> Parts:
    return response.tag, response.status, response.code, response.text


@pytest.mark.parametrize(("wire", "expected"), RESPONSES)
def test_responses(wire: bytes, expected: Parts) -> None:
    for pieces in splits(wire):
        reader = ResponseReader()
        responses = [response for piece in pieces for response in reader.feed(piece)]
        assert [parts(response) for response in responses] == [expected]
        assert responses[0].raw == wire
        assert not reader.pending and reader.take_rest() == b""


def test_responses_follow_each_other() -> None:
    wire = b"".join(wire for wire, _ in RESPONSES)
    for pieces in splits(wire):
        reader = ResponseReader()
        responses = [response for piece in pieces for response in reader.feed(piece)]
        assert [parts(response) for response in responses] == [expected for _, expected in RESPONSES]
        assert b"".join(response.raw for response in responses) == wire


def test_lf_alone_ends_a_line() -> None:
    responses = ResponseReader().feed(b"* OK a\n* X {1}\n\n\na OK b\n")
    assert [response.raw for response in responses] == [b"* OK a\r\n", b"* X {1}\r\n\n\r\n", b"a OK b\r\n"]


@pytest.mark.parametrize(
    "rest", [b"", b"*", b"* 1 EXI", b"* X {5}\r\n", b"* X {5}\r\nab", b"* X {2}\r\nab", b"* X {2}\r\nab c", b"* OK\r"]
)
def test_the_rest_is_for_who_reads_on(rest: bytes) -> None:
    for pieces in splits(b"a OK in\r\n" + rest):
        reader = ResponseReader()
        responses = [response for piece in pieces for response in reader.feed(piece)]
        assert [response.raw for response in responses] == [b"a OK in\r\n"]
        assert reader.pending == bool(rest)
        assert reader.take_rest() == rest
        assert not reader.pending
        assert len(reader.feed(b"* OK x\r\n")) == 1


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n", b"*\r\n", b"* \r\n", b"a\r\n", b"a \r\n", b"OK ready\r\n", b"a BYE x\r\n", b"a PREAUTH x\r\n",
        b"a FETCH x\r\n", b"220 mx ESMTP\r\n", b"-ERR x\r\n", b'"a" OK x\r\n', b"\xff OK x\r\n", b"*  OK\r\n",
        b"x" * 65 + b" OK x\r\n",
        b"* " + b"x" * 8191, b"* " + b"x" * 8190 + b"\n",
        b"* X {65536}\r\n", b"* X {99999999}\r\n",
        b"* X {60000}\r\n" + b"x" * 60000 + b" {6000}\r\n",
        (b"* X {0}\r\n" + b" {0}\r\n" * 20000),
    ],
)  # fmt: skip
def test_refused(wire: bytes) -> None:
    with pytest.raises(PeerError):
        ResponseReader().feed(wire)


def test_bounds() -> None:
    assert len(ResponseReader(max_line=10).feed(b"* OK 678\r\n" * 3)) == 3
    with pytest.raises(PeerError):
        ResponseReader(max_line=10).feed(b"* OK 6789\r\n")
    wire = b"* X {20}\r\n" + b"x" * 20 + b"\r\n"
    assert len(ResponseReader(max_total=len(wire)).feed(wire)) == 1
    with pytest.raises(PeerError):
        ResponseReader(max_total=len(wire) - 1).feed(wire)


@given(st.binary(max_size=80), st.integers(0, 80))
def test_cuts_do_not_matter_and_nothing_else_is_raised(data: bytes, cut: int) -> None:
    def outcome(*pieces: bytes) -> list[Response] | None:
        reader = ResponseReader()
        try:
            return [response for piece in pieces for response in reader.feed(piece)]
        except PeerError:
            return None

    for wire in (data, b"* " + data, b"* X {2}\r\n" + data):
        assert outcome(wire) == outcome(wire[:cut], wire[cut:])


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"* CAPABILITY IMAP4rev1 AUTH=PLAIN auth=login IDLE LITERAL+ COMPRESS=DEFLATE APPENDLIMIT=\r\n",
         {"IMAP4REV1": "", "AUTH": "PLAIN LOGIN", "IDLE": "", "LITERAL+": "", "COMPRESS": "DEFLATE", "APPENDLIMIT": ""}),
        (b"* OK [CAPABILITY imap4rev1 THREAD=REFERENCES THREAD=REFS THREAD=REFS] hi\r\n",
         {"IMAP4REV1": "", "THREAD": "REFERENCES REFS"}),
        (b"a OK [capability IMAP4rev1] in\r\n", {"IMAP4REV1": ""}),
        (b"* capability\r\n", {}),
        (b"* CAPABILITY =X A\x1bB IDLE\r\n", {"IDLE": ""}),
        (b"* OK CAPABILITY IMAP4rev1\r\n", None),
        (b"* OK [ALERT] CAPABILITY\r\n", None),
        (b"+ CAPABILITY IMAP4rev1\r\n", None),
        (b"* CAPABILITYX IDLE\r\n", None),
        (b"* OK ready\r\n", None),
    ],
)  # fmt: skip
def test_capabilities(wire: bytes, expected: dict[str, str] | None) -> None:
    (response,) = ResponseReader().feed(wire)
    assert capabilities_of(response) == expected
