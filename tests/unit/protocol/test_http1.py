"""auth_http's codec: requests that cannot be injected into, responses as lenient as nginx, framing that is not."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import http1
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.http1 import ResponseParser, escape, get, request
from gateway.testing.splits import splits


def test_request() -> None:
    headers = [("Host", b"auth.example"), ("Auth-User", b"t\xfc%20m"), ("Auth-Pass", b"")]
    assert request("GET", "/auth?x=1", headers) == (
        b"GET /auth?x=1 HTTP/1.1\r\nHost: auth.example\r\nAuth-User: t\xfc%20m\r\nAuth-Pass: \r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "target", "name", "value"),
    [
        ("GET", "/", "Auth-Pass", b"secret\r\nAuth-Status: OK"), ("GET", "/", "A", b"secret\n"),
        ("GET", "/", "A", b"\rsecret"), ("GET", "/", "A", b"secret\0"), ("GET", "/", "A\r\nB", b"x"),
        ("GET", "/", "A B", b"x"), ("GET", "/", "A:", b"x"), ("GET", "/", "", b"x"), ("GET", "/", "Ä", b"x"),
        ("GET", "/ x", "A", b"x"), ("GET", "", "A", b"x"), ("GET", "/\r\n", "A", b"x"), ("GE T", "/", "A", b"x"),
    ],
)  # fmt: skip
def test_request_refuses(method: str, target: str, name: str, value: bytes) -> None:
    with pytest.raises(LocalError) as caught:
        request(method, target, [("Host", b"x"), (name, value)])
    assert "secret" not in str(caught.value)


@given(st.binary())
def test_escape(value: bytes) -> None:
    escaped = escape(value)
    assert unquote_to_bytes(escaped) == value
    assert not set(escaped) & {*range(33), 127}
    assert bytes(byte for byte in value if byte > 127) == bytes(byte for byte in escaped if byte > 127)
    request("GET", "/", [("Auth-User", escaped)])


def test_escape_example() -> None:
    assert escape(b"a b%\n\x7f\xff~") == b"a%20b%25%0A%7F\xff~"


OK = b"HTTP/1.1 200 OK\r\n"
AUTH = b"Auth-Status: OK\r\nAuth-Server:10.0.0.1 \r\nAuth-Port: \t25\r\n"
AUTH_HEADERS = (("auth-status", b"OK"), ("auth-server", b"10.0.0.1"), ("auth-port", b"25"))
CHUNKED = b"Transfer-Encoding: Chunked\r\n\r\n"

# response, status, whether the connection is kept
RESPONSES = [
    (OK + AUTH + b"Content-Length: 0\r\n\r\n", 200, True),
    (OK + AUTH + b"Content-Length: 5\r\n\r\nh\r\n\r\n", 200, True),
    (OK + AUTH + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 200, True),
    (OK + AUTH + CHUNKED + b"0\r\n\r\n", 200, True),
    (OK + AUTH + CHUNKED + b"5;x=y\r\nhello\r\n0A \r\n0123456789\r\n0\r\nX: y\r\nZ: 1\r\n\r\n", 200, True),
    (b"HTTP/1.1 204 No Content\r\n" + AUTH + b"\r\n", 204, True),
    (b"HTTP/1.1 304 Not Modified\r\n" + AUTH + b"Content-Length: 9\r\n\r\n", 304, True),
    (b"HTTP/1.0 200 OK\r\n" + AUTH + b"Connection: x, Keep-Alive\r\nContent-Length: 0\r\n\r\n", 200, True),
    (b"HTTP/1.1 103 Early Hints\r\nAuth-Status: no\r\n\r\nHTTP/1.1 100\r\n\r\n" + OK + AUTH
     + b"Content-Length: 0\r\n\r\n", 200, True),
    (b"HTTP/1.1 500 Internal Server Error\r\n" + AUTH + b"Content-Length: 0\r\n\r\n", 500, True),
    (b"HTTP/1.1 200\n" + AUTH.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n", 200, True),
    # what ends the connection
    (OK + AUTH + b"\r\n", 200, False),
    (OK + AUTH + b"Connection: close\r\nContent-Length: 0\r\n\r\n", 200, False),
    (b"HTTP/1.0 200 OK\r\n" + AUTH + b"Content-Length: 0\r\n\r\n", 200, False),
    (b"HTTP/1.1 101 Switching\r\n" + AUTH + b"\r\n", 101, False),
    (b"HTTP/2 200\r\n" + AUTH + b"Content-Length: 0\r\n\r\n", 200, False),
    (b"HTTP/1.1 OK\r\n" + AUTH + b"Content-Length: 0\r\n\r\n", 0, False),
    (b"200: fine\r\n" + AUTH + b"\r\n", 0, False),
    (b"nonsense\r\n" + AUTH + b"\r\n", 0, False),
    (AUTH + b"\r\n", 0, False),
    (AUTH.replace(b"\r\n", b"\n") + b"\n", 0, False),
    (OK + AUTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 200, False),
    (OK + AUTH + b"Content-Length: +1\r\n\r\n", 200, False),
    (OK + AUTH + b"Content-Length: 1048577\r\n\r\n", 200, False),
    (OK + AUTH + b"Content-Length: 99999999999999999999\r\n\r\n", 200, False),
    (OK + AUTH + b"Content-Length: 5\r\n" + CHUNKED, 200, False),
    (OK + AUTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 200, False),
    (OK + AUTH + CHUNKED + b"100001\r\n", 200, False),
    (OK + AUTH + CHUNKED + b"x\r\n", 200, False),
    (OK + AUTH + CHUNKED + b"-1\r\n", 200, False),
    (OK + AUTH + CHUNKED + b"1\r\nab\r\n", 200, False),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status", "keep_alive"), RESPONSES)
def test_response_at_every_cut(data: bytes, status: int, keep_alive: bool) -> None:
    for pieces in splits(data):
        parser = ResponseParser()
        for piece in pieces:
            assert not parser.done
            parser.feed(piece)
        assert parser.done
        response = parser.response
        fields = [(name, value) for name, value in response.headers if name.startswith("auth-")]
        assert (response.status, tuple(fields), response.keep_alive) == (status, AUTH_HEADERS, keep_alive)
        assert parser.reusable == keep_alive
        assert parser.leftover == b""


def test_a_body_that_nobody_will_skip_is_not_waited_for() -> None:
    parser = ResponseParser()
    parser.feed(OK + AUTH + b"Connection: close\r\nContent-Length: 5\r\n\r\n")
    assert parser.done and not parser.reusable


def test_the_first_empty_line_ends_the_header_fields() -> None:
    for pieces in splits(AUTH.replace(b"\r\n", b"\n") + b"\n\r\n"):
        parser = ResponseParser()
        for piece in pieces:
            parser.feed(piece)
        assert (parser.response.headers, parser.leftover) == (AUTH_HEADERS, b"\r\n")


def test_odd_fields() -> None:
    parser = ResponseParser()
    parser.feed(OK + b"Auth_Status:a\r\n: x\r\nX Y: \xff:z\r\nAUTH-STATUS: b\r\nAuth-Status:  c d\t\r\nE:\r\n\r\n")
    headers = parser.response.headers
    assert headers == (("auth_status", b"a"), ("", b"x"), ("x y", b"\xff:z"), ("auth-status", b"b"),
                       ("auth-status", b"c d"), ("e", b""))  # fmt: skip
    assert get(headers, "auth-status") == b"c d"
    assert get(headers, "e") == b""
    assert get(headers, "x") is None


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"\n", b"hello\r\n\r\n", OK + b"no colon\r\n\r\n", OK + b"A: b\r\n folded\r\n\r\n",
        OK + b"A: b\rC: d\r\n\r\n", OK + b"A: \0\r\n\r\n", OK + b"A: b\r\r\n\r\n", OK + b"A: " + b"x" * 16384,
        OK + b"A: " + b"x" * 16384 + b"\r\n\r\n", b"x" * 16385, (b"HTTP/1.1 100 x\r\n\r\n") * 1000,
        b"\x16\x03\x01\n\n",
    ],
)  # fmt: skip
def test_garbage(data: bytes) -> None:
    for pieces in splits(data):
        parser = ResponseParser()
        with pytest.raises(PeerError):
            for piece in pieces:
                parser.feed(piece)


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n", OK + AUTH])
def test_end_before_the_header_fields_end(data: bytes) -> None:
    parser = ResponseParser()
    parser.feed(data)
    with pytest.raises(LocalError):
        assert parser.response
    with pytest.raises(PeerError):
        parser.eof()


@pytest.mark.parametrize("rest", [b"Content-Length: 5\r\n\r\nhell", CHUNKED + b"5\r\n", b"Content-Length: 0\r\n\r\n"])
def test_end_of_stream_costs_only_the_connection(rest: bytes) -> None:
    parser = ResponseParser()
    parser.feed(OK + AUTH + rest)
    parser.eof()
    assert parser.done and parser.response.status == 200 and not parser.response.keep_alive


def test_leftover_forbids_reuse() -> None:
    parser = ResponseParser()
    parser.feed(OK + b"Content-Length: 1\r\n\r\nxHTTP")
    assert parser.done and parser.response.keep_alive and not parser.reusable
    assert parser.leftover == b"HTTP"


def test_a_large_body_is_skipped_without_being_kept() -> None:
    parser = ResponseParser()
    parser.feed(OK + b"Content-Length: %d\r\n\r\n" % http1.BODY_LIMIT)
    for _ in range(16):
        assert not parser.done
        parser.feed(bytes(65536))
    assert parser.reusable


@given(st.binary(), st.sampled_from([b"", OK, OK + AUTH, OK + CHUNKED, OK + CHUNKED + b"5\r\nhello", AUTH + b"\n"]))
def test_any_bytes_parse_alike_at_every_cut_or_are_refused(data: bytes, start: bytes) -> None:
    outcomes = set()
    for pieces in splits(start + data):
        parser = ResponseParser()
        try:
            for piece in pieces:
                parser.feed(piece)
            outcomes.add((parser.done, parser.response if parser.done else None, parser.leftover))
        except PeerError as error:
            outcomes.add((False, None, str(error).encode()))
    assert len(outcomes) == 1
