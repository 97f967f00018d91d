"""POP3: commands, responses however they are cut, capabilities, and that credentials inject nothing."""

from __future__ import annotations

import io
import poplib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import pop3
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.pop3 import Command, Response, ResponseReader
from gateway.testing.splits import splits


@pytest.mark.parametrize(
    ("line", "verb", "argument"),
    [
        (b"QUIT", "QUIT", b""),
        (b"quit  ", "QUIT", b""),
        (b"USER tim", "USER", b"tim"),
        (b"user  t i m ", "USER", b"t i m"),
        ("USER jürgen".encode(), "USER", "jürgen".encode()),
        (b"PASS  a b\t ", "PASS", b" a b\t "),
        (b"Pass \xff", "PASS", b"\xff"),
        (b"PASS", "PASS", b""),
        (b"PASS ", "PASS", b""),
        (b"AUTH PLAIN  AHRpbQB0YW5zdGFhZg== ", "AUTH", b"PLAIN  AHRpbQB0YW5zdGFhZg=="),
        (b"APOP mrose c4c9334bac560ecc979e58001b3e22fb", "APOP", b"mrose c4c9334bac560ecc979e58001b3e22fb"),
        (b"XCLIENT ADDR=192.0.2.7", "XCLIENT", b"ADDR=192.0.2.7"),
    ],
)
def test_commands(line: bytes, verb: str, argument: bytes) -> None:
    assert pop3.parse_command(line) == Command(verb, argument)


@pytest.mark.parametrize(
    "line",
    [b"", b" ", b" QUIT", b"QUIT\t", b"QU-IT", b"US\xc4R x", b"USER a\0", b"PASS a\rb", b"PASS a\nb", b"PASS a\r"],
)
def test_bad_commands(line: bytes) -> None:
    with pytest.raises(PeerError):
        pop3.parse_command(line)


def test_secrets_are_not_in_repr() -> None:
    assert "tanstaaf" not in repr(pop3.parse_command(b"PASS tanstaaf"))


CREDENTIAL = st.binary(max_size=40) | st.text(max_size=40).map(str.encode)


@given(CREDENTIAL)
def test_credentials_stay_data(value: bytes) -> None:
    """Whatever they hold: what a server reads is one command with this argument, or we say nothing."""
    safe = not {0, 10, 13} & set(value)
    try:
        line = pop3.pass_command(value)
    except LocalError:
        assert not safe
    else:
        assert safe and pop3.parse_command(line) == Command("PASS", value)
    try:
        line = pop3.user_command(value)
    except LocalError:
        assert not safe or not value
    else:
        assert safe and pop3.parse_command(line) == Command("USER", value.strip(b" "))


@pytest.mark.parametrize("octet", [b"\r", b"\n", b"\0", b"\r\n"])
def test_nothing_is_injected(octet: bytes) -> None:
    for build in (pop3.user_command, pop3.pass_command):
        with pytest.raises(LocalError) as caught:
            build(b"hunter2" + octet + b"QUIT")
        assert "hunter2" not in str(caught.value)


CAPA = b"+OK list\r\nTOP\r\n..dot\r\n...\r\n\r\nSASL PLAIN LOGIN\r\n.\r\n"
CAPA_LINES = (b"TOP", b".dot", b"..", b"", b"SASL PLAIN LOGIN")

RESPONSES: list[tuple[bool, bytes, Response]] = [
    (False, b"+OK\r\n", Response(True, b"")),
    (False, b"+OK \r\n", Response(True, b"")),
    (False, b"+OK ready <1@x>\r\n", Response(True, b"ready <1@x>")),
    (False, b"-ERR\r\n", Response(False, b"")),
    (False, b"-ERR [AUTH] no \xe4\r\n", Response(False, b"[AUTH] no \xe4")),
    (True, b"-ERR what\r\n", Response(False, b"what")),
    (True, CAPA, Response(True, b"list", CAPA_LINES)),
    (True, b"+OK\r\n.\r\n", Response(True, b"")),
    (True, b"+OK\r\n+OK\r\n-ERR x\r\n.\r\n", Response(True, b"", (b"+OK", b"-ERR x"))),
]


def expected(wire: bytes, response: Response) -> Response:
    return Response(response.ok, response.text, response.lines, wire)


@pytest.mark.parametrize(("multi", "wire", "response"), RESPONSES)
def test_responses(multi: bool, wire: bytes, response: Response) -> None:
    for pieces in splits(wire):
        reader = ResponseReader()
        reader.expect(multi)
        assert [found for piece in pieces for found in reader.feed(piece)] == [expected(wire, response)]
        assert not reader.pending and reader.take_rest() == b""


def test_responses_to_commands_sent_at_once() -> None:
    wire = b"+OK ready\r\n" + b"".join(wire for _, wire, _ in RESPONSES)
    for pieces in splits(wire):
        reader = ResponseReader()
        assert reader.feed(b"") == []
        reader.expect(False)  # the greeting
        for multi, *_ in RESPONSES:
            reader.expect(multi)
        found = [response for piece in pieces for response in reader.feed(piece)]
        assert found[1:] == [expected(line, response) for _, line, response in RESPONSES]


def test_continuations_are_not_the_end() -> None:
    reader = ResponseReader()
    assert reader.feed(b"+OK ready\r\n") == [Response(True, b"ready", (), b"+OK ready\r\n")]
    reader.expect(False)
    reader.expect(True)
    assert reader.feed(b"+ PDQyPg==\r\n") == [Response(True, b"PDQyPg==", (), b"+ PDQyPg==\r\n", continuation=True)]
    assert reader.feed(b"+ \r\n") == [Response(True, b"", (), b"+ \r\n", continuation=True)]
    assert reader.feed(b"+\n") == [Response(True, b"", (), b"+\r\n", continuation=True)]
    answer, capabilities = reader.feed(b"+OK in\n" + CAPA.replace(b"\r\n", b"\n"))
    assert (answer.text, answer.continuation) == (b"in", False)
    assert (capabilities.lines, capabilities.raw) == (CAPA_LINES, CAPA)


@pytest.mark.parametrize("rest", [b"", b"+", b"+OK", b"+OK x\r\n", b"+OK x\r\nTOP\r\n..", b"+OK x\r\n.\r"])
def test_the_rest_is_for_who_reads_on(rest: bytes) -> None:
    for pieces in splits(b"+OK in\r\n" + rest):
        reader = ResponseReader()
        reader.expect(False)
        reader.expect(True)
        assert len([response for piece in pieces for response in reader.feed(piece)]) == 1
        assert reader.pending == bool(rest)
        assert reader.take_rest() == rest
        assert not reader.pending


@pytest.mark.parametrize(
    "wire", [b"\r\n", b"OK\r\n", b"+OKAY\r\n", b"+ok\r\n", b"-ERROR\r\n", b"- ERR\r\n", b"+abc\r\n", b"* OK IMAP\r\n",
             b"220 mx ESMTP\r\n", b".\r\n", b"+OK " + b"x" * 8189, b"+OK " + b"x" * 8187 + b"\n"],
)  # fmt: skip
def test_bad_responses(wire: bytes) -> None:
    with pytest.raises(PeerError):
        ResponseReader().feed(wire)


def test_bounds() -> None:
    assert len(ResponseReader(max_line=11).feed(b"+OK ready\r\n" * 3)) == 3
    with pytest.raises(PeerError):
        ResponseReader(max_line=11).feed(b"+OK ready!\r\n")
    for limit, ends in ((len(CAPA), True), (len(CAPA) - 1, False)):
        reader = ResponseReader(max_total=limit)
        reader.expect(True)
        if ends:
            assert len(reader.feed(CAPA)) == 1
        else:
            with pytest.raises(PeerError):
                reader.feed(CAPA)


@given(st.binary(max_size=80), st.integers(0, 80), st.booleans())
def test_cuts_do_not_matter_and_nothing_else_is_raised(data: bytes, cut: int, multi: bool) -> None:
    def outcome(*pieces: bytes) -> list[Response] | None:
        reader = ResponseReader()
        reader.expect(multi)
        try:
            return [response for piece in pieces for response in reader.feed(piece)]
        except PeerError:
            return None

    for wire in (data, b"+OK\r\n" + data):
        assert outcome(wire) == outcome(wire[:cut], wire[cut:])


def test_capabilities() -> None:
    lines = [b"TOP", b"sasl  PLAIN   LOGIN ", b"EXPIRE 60 USER", b"", b"A\x1bB", b"TOP 2", b"IMPLEMENTATION \xff"]
    found = pop3.parse_capa(lines)
    assert found == {"TOP": "", "SASL": "PLAIN LOGIN", "EXPIRE": "60 USER", "IMPLEMENTATION": "\ufffd"}
    assert pop3.format_capa({"TOP": "", "SASL": "PLAIN LOGIN"}) == b"TOP\r\nSASL PLAIN LOGIN\r\n.\r\n"
    assert pop3.format_capa({}) == b".\r\n"


@pytest.mark.parametrize("capabilities", [{"": ""}, {".": ""}, {"A": "b\r\nC"}, {"A\n": ""}, {"A": "ä"}, {"": "b"}])
def test_what_is_no_capability(capabilities: dict[str, str]) -> None:
    with pytest.raises(LocalError):
        pop3.format_capa(capabilities)


WORDS = st.from_regex("[A-Z][A-Z0-9-]{0,9}", fullmatch=True)


@given(st.dictionaries(WORDS, st.lists(WORDS, max_size=3).map(" ".join), max_size=8))
def test_capabilities_are_read_as_written(capabilities: dict[str, str]) -> None:
    reader = ResponseReader()
    reader.expect(True)
    (response,) = reader.feed(b"+OK\r\n" + pop3.format_capa(capabilities))
    assert pop3.parse_capa(response.lines) == capabilities


def test_xclient() -> None:
    values = {"ADDR": "2001:db8::7", "PORT": "52001", "CLIENT-TRANSPORT": "TLS", "FORWARD": "dXNlcj10aW0="}
    line = b"XCLIENT ADDR=2001:db8::7 PORT=52001 CLIENT-TRANSPORT=TLS FORWARD=dXNlcj10aW0="
    assert pop3.xclient_command(values) == line
    assert len(pop3.xclient_command({"SESSION": "x" * 1006})) == 1022


@pytest.mark.parametrize(
    "values",
    [{}, {"ADDR": ""}, {"ADDR": "a b"}, {"ADDR": "a\r\nQUIT"}, {"ADDR": "a\0"}, {"ADDR": "a\t"}, {"NAME": "ä"},
     {"addr": "a"}, {"A=B": "c"}, {"": "c"}, {"A\n": "c"}, {"SESSION": "x" * 1007}],
)  # fmt: skip
def test_what_xclient_cannot_carry(values: dict[str, str]) -> None:
    with pytest.raises(LocalError):
        pop3.xclient_command(values)


@pytest.mark.parametrize(
    ("text", "code"),
    [(b"[AUTH] no", "AUTH"), (b"[sys/temp]", "SYS/TEMP"), (b"[XCLIENT] ready", "XCLIENT"), (b"[LOGIN-DELAY] x", "LOGIN-DELAY"),
     (b"", ""), (b"no [AUTH]", ""), (b"[] x", ""), (b"[A B] x", ""), (b"[AUTH", ""), (b"[\xff] x", "")],
)  # fmt: skip
def test_response_code(text: bytes, code: str) -> None:
    assert pop3.response_code(text) == code


@pytest.mark.parametrize(
    ("greeting", "timestamp"),
    [
        (b"POP3 server ready <1896.697170952@dbc.mtview.ca.us>", b"<1896.697170952@dbc.mtview.ca.us>"),
        (b"+OK <a@b>\r\n", b"<a@b>"),
        (b"<x> <1@a> <2@b> go", b"<2@b>"),
        (b"ready", None), (b"ready <host>", None), (b"<a b@c>", None), (b"<@>", None), (b"<a@b", None), (b"<\xff@b>", None),
    ],
)  # fmt: skip
def test_apop_timestamp(greeting: bytes, timestamp: bytes | None) -> None:
    assert pop3.apop_timestamp(greeting) == timestamp


class Poplib(poplib.POP3):
    """Python's own client on a server whose answers are written beforehand; keeps what the client said."""

    def __init__(self, answers: bytes) -> None:
        self.said: list[bytes] = []
        self.file = io.BytesIO(answers)
        self._debugging = 0
        self.welcome = self._getresp()  # type: ignore[attr-defined]

    def _putline(self, line: bytes) -> None:
        self.said.append(line)


def test_what_poplib_says() -> None:
    timestamp = b"<1896.697170952@dbc.mtview.ca.us>"
    client = Poplib(b"+OK ready " + timestamp + b"\r\n+OK\r\n+OK in\r\n+OK\r\n+OK\r\nSASL PLAIN LOGIN\r\n.\r\n")
    client.user("t i m")
    client.pass_(" a b ")
    client.apop("mrose", "tanstaaf")
    assert client.capa()["SASL"] == ["PLAIN", "LOGIN"]
    assert pop3.apop_timestamp(client.getwelcome()) == timestamp
    assert [pop3.parse_command(line) for line in client.said] == [
        Command("USER", b"t i m"),
        Command("PASS", b" a b "),
        Command("APOP", b"mrose c4c9334bac560ecc979e58001b3e22fb"),
        Command("CAPA", b""),
    ]
