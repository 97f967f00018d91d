from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from gateway.protocol.errors import LocalError
from gateway.upstream import http
from gateway.upstream.http import HttpClient, HttpError

OK = b"HTTP/1.1 200 OK\r\nAuth-Status: OK\r\nContent-Length: 0\r\n\r\n"
HEADERS = [("Auth-Method", b"plain"), ("Auth-User", b"tim")]


class Server:
    """Answers the n-th request with the n-th of `answers` (the last again and again).

    None closes without an answer; `hang` waits for the client to go. `requests` are whole request heads,
    `connections` counts what was accepted, `open` what is still open; `none_open` is set when nothing is.
    """

    HANG = b"hang"

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.none_open = asyncio.Event()
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.none_open.clear()
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                self.asked.set()
                await self.go.wait()
                answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
                if answer is None:
                    return
                if answer == self.HANG:
                    await reader.read()
                    return
                writer.write(answer)
                if b"Connection: close" in answer or b"Content-Length" not in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.open -= 1
            if not self.open:
                self.none_open.set()


@asynccontextmanager
async def served(
    *answers: bytes | None, context: ssl.SSLContext | None = None, path: str = ""
) -> AsyncIterator[Server]:
    server = Server(list(answers))
    if path:
        listener = await asyncio.start_unix_server(server.serve, path)
        server.url = f"unix:{path}:/auth"
    else:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
        port = listener.sockets[0].getsockname()[1]
        server.url = f"{'https' if context else 'http'}://127.0.0.1:{port}/auth"
    try:
        yield server
    finally:
        listener.close()
        for writer in server.writers:
            writer.close()
        await listener.wait_closed()


@asynccontextmanager
async def client(*servers: str, **options: object) -> AsyncIterator[HttpClient]:
    made = HttpClient(servers, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        await made.aclose()
        assert all(not server.idle and not server.active for server in made._servers)


async def closed_port() -> int:
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port: int = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    return port


@pytest.mark.anyio
async def test_one_connection_serves_many_requests() -> None:
    async with served(OK) as server, client(server.url) as asking:
        for _ in range(3):
            response = await asking.get(HEADERS)
            assert response.status == 200 and ("auth-status", b"OK") in response.headers
        assert server.connections == 1
        assert server.requests[0] == (
            b"GET /auth HTTP/1.1\r\nHost: 127.0.0.1\r\nAuth-Method: plain\r\nAuth-User: tim\r\n\r\n"
        )


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\n\r\n", 200),
        (b"HTTP/1.1 500 Oops\r\nConnection: close\r\nAuth-Status: OK\r\n\r\n<html>", 500),
        (b"Auth-Status: OK\n\n", 0),
        (b"HTTP/1.1 200 OK\r\nAuth-Status: OK\r\nContent-Length: 0\r\n\r\nextra", 200),
    ],
)
@pytest.mark.anyio
async def test_connections_that_are_not_kept(answer: bytes, status: int) -> None:
    async with served(answer) as server, client(server.url) as asking:
        for _ in range(2):
            response = await asking.get(HEADERS)
            assert response.status == status and ("auth-status", b"OK") in response.headers
        assert server.connections == 2


@pytest.mark.anyio
async def test_a_body_is_skipped() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nAuth-Status: OK\r\n\r\nhello"
    async with served(answer) as server, client(server.url) as asking:
        await asking.get(HEADERS)
        await asking.get(HEADERS)
        assert server.connections == 1


@pytest.mark.anyio
async def test_a_kept_connection_that_died_is_replaced() -> None:
    async with served(OK, None, OK) as server, client(server.url) as asking:
        await asking.get(HEADERS)
        assert (await asking.get(HEADERS)).status == 200
        assert server.connections == 2 and len(server.requests) == 3


@pytest.mark.anyio
async def test_a_fresh_connection_that_dies_is_an_error() -> None:
    async with served(None) as server, client(server.url) as asking:
        with pytest.raises(HttpError, match="ended"):
            await asking.get(HEADERS)
        assert server.connections == 1


@pytest.mark.anyio
async def test_a_partial_answer_is_not_asked_for_again() -> None:
    async with served(OK, b"HTTP/1.1 200 OK\r\nAuth-St") as server, client(server.url) as asking:
        await asking.get(HEADERS)
        with pytest.raises(HttpError):
            await asking.get(HEADERS)
        assert server.connections == 1


@pytest.mark.anyio
async def test_an_idle_connection_ends_with_the_servers() -> None:
    async with served(OK) as server, client(server.url) as asking:
        await asking.get(HEADERS)
        assert len(asking._servers[0].idle) == 1
        server.writers[0].close()
        await server.none_open.wait()
        for _ in range(100):  # turns of the loop: the FIN is on its way
            await asyncio.sleep(0)
        assert not asking._servers[0].idle
        assert (await asking.get(HEADERS)).status == 200


@pytest.mark.anyio
async def test_bytes_that_nobody_asked_for_end_an_idle_connection() -> None:
    async with served(OK) as server, client(server.url) as asking:
        await asking.get(HEADERS)
        server.writers[0].write(b"HTTP/1.1 200 OK\r\nAuth-Status: OK\r\n\r\n")
        await server.none_open.wait()
        assert not asking._servers[0].idle


@pytest.mark.anyio
async def test_idle_connections_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.0)
    async with served(OK) as server, client(server.url) as asking:
        await asking.get(HEADERS)
        await server.none_open.wait()
        assert not asking._servers[0].idle


@pytest.mark.anyio
async def test_the_next_server_answers_for_one_that_is_down() -> None:
    port = await closed_port()
    async with served(OK) as server, client(f"http://127.0.0.1:{port}/", server.url) as asking:
        assert (await asking.get(HEADERS)).status == 200
        down = asking._servers[0]
        assert down.resting_until > asyncio.get_running_loop().time()
        down.url = None  # type: ignore[assignment]  # while it rests it is not touched
        assert (await asking.get(HEADERS)).status == 200


@pytest.mark.anyio
async def test_when_all_rest_all_are_tried() -> None:
    port = await closed_port()
    async with client(f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/second") as asking:
        for _ in range(2):
            with pytest.raises(HttpError) as error:
                await asking.get(HEADERS)
            assert str(error.value).count("cannot connect") == 2
            assert "tim" not in str(error.value)


@pytest.mark.anyio
async def test_a_hung_server_leaves_time_for_the_next() -> None:
    async with served(Server.HANG) as hung, served(OK) as server, client(hung.url, server.url, timeout=0.4) as asking:
        assert (await asking.get(HEADERS)).status == 200


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Server.HANG, "no answer in time"),
        (b"garbage\r\n\r\n", "HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20000, "too long"),
        (b"HTTP/1.1 200 OK\r\n : x\r\n\r\n", "malformed"),
    ],
)
@pytest.mark.anyio
async def test_what_is_no_answer(answer: bytes, text: str) -> None:
    async with served(answer) as server, client(server.url, timeout=0.3) as asking:
        with pytest.raises(HttpError, match=text):
            await asking.get(HEADERS)


@pytest.mark.anyio
async def test_an_answer_whose_body_does_not_come_is_one() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nAuth-Status: OK\r\n\r\nhalf"
    async with served(answer) as server, client(server.url, timeout=0.3) as asking:
        assert (await asking.get(HEADERS)).status == 200
        assert not asking._servers[0].idle


@pytest.mark.anyio
async def test_connections_are_bounded_and_questions_wait() -> None:
    async with served(OK) as server, client(server.url, max_connections=2) as asking:
        server.go.clear()
        questions = [asyncio.ensure_future(asking.get(HEADERS)) for _ in range(6)]
        await server.asked.wait()
        server.go.set()
        responses = await asyncio.gather(*questions)
        assert [response.status for response in responses] == [200] * 6
        assert server.connections == 2


@pytest.mark.anyio
async def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(OK) as server, client(server.url, max_connections=1, timeout=0.1) as asking:
        busy = asking._servers[0]
        busy.active = 1
        with pytest.raises(HttpError, match="in use"):
            await asking.get(HEADERS)
        monkeypatch.setattr(http, "WAITING", 0)
        with pytest.raises(HttpError, match="too many"):
            await asking.get(HEADERS)
        assert busy.resting_until < 0 and not busy.waiting
        busy.release()
        assert (await asking.get(HEADERS)).status == 200


@pytest.mark.anyio
async def test_a_cancelled_question_leaves_nothing() -> None:
    async with served(Server.HANG) as server, client(server.url, max_connections=1) as asking:
        first = asyncio.ensure_future(asking.get(HEADERS))
        await server.asked.wait()
        second = asyncio.ensure_future(asking.get(HEADERS))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await server.none_open.wait()
        assert asking._servers[0].active == 0 and not asking._servers[0].waiting


@pytest.mark.anyio
async def test_nothing_the_caller_says_becomes_a_header() -> None:
    async with served(OK) as server, client(server.url) as asking:
        for value in (b"a\r\nX: y", b"a\nb", b"a\0b"):
            with pytest.raises(LocalError):
                await asking.get([("Auth-User", value)])
        assert server.connections == 0


@pytest.mark.anyio
async def test_unix_sockets(tmp_path: Path) -> None:
    async with served(OK, path=str(tmp_path / "auth.sock")) as server, client(server.url) as asking:
        assert (await asking.get(HEADERS)).status == 200
        assert server.requests[0].startswith(b"GET /auth HTTP/1.1\r\nHost: localhost\r\n")


@pytest.mark.anyio
async def test_https_is_verified(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    async with served(OK, context=context) as server:
        async with client(server.url, ca_file=str(ca_file)) as asking:
            for _ in range(2):
                assert (await asking.get(HEADERS)).status == 200
            assert server.connections == 1
        async with client(server.url) as asking:
            with pytest.raises(HttpError, match="certificate"):
                await asking.get(HEADERS)


@pytest.mark.anyio
async def test_names_are_looked_up_once_a_minute() -> None:
    async with served(OK) as server:
        port = server.url.rpartition(":")[2]
        async with client(f"http://localhost:{port}") as asking:
            assert (await asking.get(HEADERS)).status == 200
            assert b"Host: localhost\r\n" in server.requests[0]
            known = asking._servers[0]
            assert ("127.0.0.1", int(port.partition("/")[0])) in known._addresses
            assert 59 < known._fresh_until - asyncio.get_running_loop().time() <= 60


@pytest.mark.anyio
async def test_every_address_of_a_name_is_tried() -> None:
    async with served(OK) as server, client("http://auth.example/") as asking:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        asking._servers[0]._addresses = [("127.0.0.1", await closed_port()), ("127.0.0.1", port)]
        asking._servers[0]._fresh_until = float("inf")
        assert (await asking.get(HEADERS)).status == 200


@pytest.mark.anyio
async def test_a_name_that_does_not_resolve() -> None:
    async with client("http://no-such-host.invalid/", timeout=5.0) as asking:
        with pytest.raises(HttpError, match=r"cannot look up no-such-host\.invalid"):
            await asking.get(HEADERS)


@pytest.mark.parametrize(
    "url", ["ftp://x/", "http://", "http://a b/", "http://h:0/", "http://h:99999/", "http://u:p@h/", "h:80", "unix:rel"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"write http|no port"):
        HttpClient([url])


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://h", (False, "h", 80, "", "/")),
        ("https://h/a?b=c", (True, "h", 443, "", "/a?b=c")),
        ("http://[::1]:8000/auth", (False, "::1", 8000, "", "/auth")),
        ("unix:/run/a.sock:/auth", (False, "localhost", 0, "/run/a.sock", "/auth")),
        ("http://unix:/run/a.sock:/auth", (False, "localhost", 0, "/run/a.sock", "/auth")),
        ("unix:/run/a.sock", (False, "localhost", 0, "/run/a.sock", "/")),
    ],
)
def test_urls(url: str, parts: tuple[bool, str, int, str, str]) -> None:
    parsed = HttpClient([url])._servers[0].url
    assert (parsed.tls, parsed.host, parsed.port, parsed.path, parsed.target) == parts

