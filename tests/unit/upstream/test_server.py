from __future__ import annotations

import asyncio
import socket

import pytest

from gateway.upstream.server import Server, parse_server


@pytest.mark.parametrize(
    ("written", "url", "local"),
    [
        ("10.0.0.5:2525", "smtp://10.0.0.5:2525", False),
        ("mx.Example.org", "smtp://mx.example.org:25", False),
        ("smtp://mx.example.org/", "smtp://mx.example.org:25", False),
        ("smtps://mx.example.org", "smtps://mx.example.org:465", False),
        ("smtp://[2001:DB8::0:1]:26", "smtp://[2001:db8::1]:26", False),
        ("[::1]", "smtp://[::1]:25", True),
        ("127.0.0.9:25", "smtp://127.0.0.9:25", True),
        ("unix:/run/mta", "smtp+unix:/run/mta", True),
        ("smtps+unix:/run/mta", "smtps+unix:/run/mta", True),
        ("lmtp://Store", "lmtp://store:24", False),
        ("lmtp+unix:/run/lmtp", "lmtp+unix:/run/lmtp", True),
        ("imap://Store", "imap://store:143", False),
        ("imaps://store", "imaps://store:993", False),
        ("pop3://[::1]", "pop3://[::1]:110", True),
        ("pop3s://store/", "pop3s://store:995", False),
        ("imap+unix:/run/imap", "imap+unix:/run/imap", True),
    ],
)
def test_urls_have_one_form(written: str, url: str, local: bool) -> None:
    server = Server(written)
    assert server.url == url
    assert server.local is local
    assert Server(url).url == url


@pytest.mark.parametrize(
    "url",
    ["", "milter://h", "smtp://", "h:0", "h:65536", "h:x", "h:+5", "::1", "2001:db8::1:25", "[::1", "[::1]x", "[h]:25",
     "unix:", "unix:mta", "foo+unix:/x", "smtp://a b", "smtp://user@h:25", "h\r\n:25",
     "mx..example.org", f"smtp://{'a' * 64}.example.org"],
)  # fmt: skip
def test_what_is_no_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_server(url)


@pytest.mark.parametrize(
    ("written", "scheme", "url", "protocol", "implicit_tls"),
    [
        ("192.0.2.1:143", "imap", "imap://192.0.2.1:143", "imap", False),
        ("192.0.2.1", "pop3", "pop3://192.0.2.1:110", "pop3", False),
        ("unix:/run/x", "imap", "imap+unix:/run/x", "imap", False),
        ("smtps://mx", "imap", "smtps://mx:465", "smtp", True),
        ("pop3s://mx", "smtp", "pop3s://mx:995", "pop3", True),
        ("lmtp+unix:/x", "imap", "lmtp+unix:/x", "lmtp", False),
    ],
)
def test_protocols(written: str, scheme: str, url: str, protocol: str, implicit_tls: bool) -> None:
    """A bare address is that of a server of the protocol at hand."""
    server = Server(written, default_scheme=scheme)
    assert (server.url, server.protocol, server.implicit_tls) == (url, protocol, implicit_tls)


def test_a_weight_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="weight"):
        Server("h:25", 0)


class Resolver:
    """In place of the loop's getaddrinfo: answers, or fails, in the order given."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.asked += 1
        answer = self.answers.pop(0)
        await self.gate.wait()
        if isinstance(answer, OSError):
            raise answer
        return [(socket.AF_INET, 1, 6, "", (address, port)) for address in answer]


class Loop:
    """The running loop with another clock and resolver."""

    def __init__(self, resolver: Resolver) -> None:
        self.now = 0.0
        self.getaddrinfo = resolver
        self.create_task = asyncio.get_running_loop().create_task

    def time(self) -> float:
        return self.now


@pytest.fixture
def with_loop(monkeypatch: pytest.MonkeyPatch) -> object:
    def use(loop: Loop) -> Loop:
        monkeypatch.setattr("gateway.upstream.server.asyncio.get_running_loop", lambda: loop)
        return loop

    return use


@pytest.mark.anyio
async def test_numeric_hosts_and_sockets_are_not_looked_up() -> None:
    assert await Server("10.0.0.5").addresses() == [("10.0.0.5", 25)]
    assert await Server("[::1]:26").addresses() == [("::1", 26)]
    assert await Server("unix:/run/x").addresses() == ["/run/x"]


@pytest.mark.anyio
async def test_names_are_kept_a_minute_and_the_old_answer_while_the_next_is_fetched(with_loop: object) -> None:
    resolver = Resolver(["10.0.0.1", "10.0.0.1", "10.0.0.2"], ["10.0.0.3"])
    loop = with_loop(Loop(resolver))  # type: ignore[operator]
    server = Server("mx.example")
    assert await server.addresses() == [("10.0.0.1", 25), ("10.0.0.2", 25)]
    loop.now = 59.0
    await server.addresses()
    assert resolver.asked == 1
    loop.now = 61.0
    resolver.gate.clear()
    assert await server.addresses() == [("10.0.0.1", 25), ("10.0.0.2", 25)]
    lookup = server._lookup
    assert lookup is not None
    resolver.gate.set()
    await lookup
    assert await server.addresses() == [("10.0.0.3", 25)]
    assert resolver.asked == 2


@pytest.mark.anyio
async def test_a_failed_look_up_keeps_the_old_answer_and_without_one_is_an_error(with_loop: object) -> None:
    gone = socket.gaierror(-2, "Name or service not known")
    resolver = Resolver(gone, ["10.0.0.1"], gone, ["10.0.0.2"])
    loop = with_loop(Loop(resolver))  # type: ignore[operator]
    server = Server("mx.example")
    with pytest.raises(OSError, match="not known"):
        await server.addresses()
    assert await server.addresses() == [("10.0.0.1", 25)]
    loop.now = 10_000.0  # too old to be used without asking, good enough when asking fails
    assert await server.addresses() == [("10.0.0.1", 25)]
    loop.now += 6.0
    await server.addresses()
    assert server._lookup is not None
    await server._lookup
    assert await server.addresses() == [("10.0.0.2", 25)]


@pytest.mark.anyio
async def test_sessions_share_one_look_up(with_loop: object) -> None:
    resolver = Resolver(["10.0.0.1"])
    with_loop(Loop(resolver))  # type: ignore[operator]
    resolver.gate.clear()
    server = Server("mx.example")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(server.addresses()) for _ in range(5)]
        group.create_task(_open(resolver.gate))
    assert [task.result() for task in tasks] == [[("10.0.0.1", 25)]] * 5
    assert resolver.asked == 1


async def _open(gate: asyncio.Event) -> None:
    gate.set()
