"""auth_http's server refuses, hangs, answers garbage, drips, closes in the middle: that is 454 and never 535.

A client that was told 535 asks its user for another password. Nothing of a fault is left behind.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from gateway.testing.gateway import Gateway, free_port, running
from tests.fault.baseline import unchanged
from tests.fault.client import Client, connected
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records
from tests.peers.scripted import Close, Drip, Garbage, Half, Reset, Scripted, Send, Step, Until

pytestmark = pytest.mark.anyio

AUTH = "AUTH PLAIN " + base64.b64encode(b"\0tim\0tanstaaf").decode()
ASKED = Until(b"\r\n\r\n")


def answer(*fields: str, status: str = "200 OK", end: str = "\r\n") -> Send:
    """An HTTP answer."""
    return Send("\r\n".join([f"HTTP/1.1 {status}", *fields, end]).encode())


FAULTS: dict[str, Sequence[Step]] = {
    "hangs": [ASKED],
    "closes at once": [Close()],
    "resets at once": [Reset()],
    "closes": [ASKED, Close()],
    "resets": [ASKED, Reset()],
    "half-closes": [ASKED, Half()],
    "garbage": [ASKED, Garbage(4000), Close()],
    "garbage lines": [ASKED, Send(b"\x00\xff\xfe!!!\r\n\r\n")],
    "another protocol": [ASKED, Send(b"220 mail.test ESMTP\r\n\r\n")],
    "half a status": [ASKED, Send(b"HTTP/1.1 20"), Close()],
    "half an answer": [ASKED, Send(b"HTTP/1.1 200 OK\r\nAuth-Status: OK\r\nAuth-Ser"), Close()],
    "half an answer, hangs": [ASKED, Send(b"HTTP/1.1 200 OK\r\nAuth-Status: Invalid login\r\n")],
    "drips": [ASKED, Drip(b"HTTP/1.1 200 OK\r\nAuth-Status: OK\r\n" * 100, gap=0.02)],
    "too long a field": [ASKED, Send(b"HTTP/1.1 200 OK\r\nAuth-Status: " + b"x" * 70_000)],
    "too many fields": [ASKED, Send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000)],
    "an error page": [ASKED, answer("Content-Length: 0", status="500 Internal Server Error"), Close()],
    "a redirect": [ASKED, answer("Location: http://127.0.0.1/login", status="302 Found"), Close()],
    "no permission": [ASKED, answer("WWW-Authenticate: Basic", status="401 Unauthorized"), Close()],
    "nothing said": [ASKED, answer(), Close()],
    "no port": [ASKED, answer("Auth-Status: OK", "Auth-Server: 127.0.0.1"), Close()],
    "a wrong port": [ASKED, answer("Auth-Status: OK", "Auth-Server: 127.0.0.1", "Auth-Port: 99999"), Close()],
    "an outage": [ASKED, answer("Auth-Status: try later", "Auth-Error-Code: 451 4.3.0"), Close()],
}


@asynccontextmanager
async def serving(urls: Sequence[str], upstream: Upstream, **settings: object) -> AsyncIterator[Gateway]:
    """A gateway that asks these auth servers; with `none` also about clients without AUTH."""
    asks = {"urls": list(urls), "request_timeout": "200ms", **settings}
    pipeline: dict[str, object] = {
        "allow_plaintext_auth": True,
        "relay": "open",
        "stages": [{"auth_http": asks}, {"splice": {"handoff": "never"}}],
        "limits": {"auth_delay": "10ms", "linger": "100ms"},
        "upstreams": upstream.pool(),
    }
    async with running(pipeline) as gateway:
        yield gateway


async def try_login(client: Client) -> str:
    """The reply to AUTH; the session goes on after it."""
    await client.hello()
    reply = await client.say(AUTH)
    assert await client.say("NOOP") == "250 2.0.0 Ok\r\n"
    return reply


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_login_that_cannot_be_verified_is_454(fault: str, records: Records) -> None:
    async with Upstream() as upstream, Scripted(FAULTS[fault]) as server:
        url = f"http://127.0.0.1:{server.port}/auth"
        async with serving([url], upstream) as gateway, unchanged(gateway), connected(gateway) as client:
            reply = await try_login(client)
    # what an auth server itself calls an outage keeps its own 4xx code
    assert reply.startswith("451 4.3.0 try later" if fault == "an outage" else "454 4.7.0 "), reply
    assert records.one("auth_failure")["cause"] == "authentication unavailable"
    assert upstream.connections == 0


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_recipient_that_cannot_be_asked_about_is_451(fault: str, records: Records) -> None:
    async with Upstream() as upstream, Scripted(FAULTS[fault]) as server:
        url = f"http://127.0.0.1:{server.port}/auth"
        async with serving([url], upstream, none=True) as gateway, unchanged(gateway), connected(gateway) as client:
            await client.hello()
            assert await client.say("MAIL FROM:<a@example.org>") == "250 2.1.0 Ok\r\n"
            reply = await client.say("RCPT TO:<b@example.org>")
            assert (await client.say("DATA"))[:4] in ("503 ", "554 ", "451 ")
            assert await client.say("RSET") == "250 2.0.0 Ok\r\n"
    assert reply.startswith("451 4."), reply
    assert upstream.connections == 0


async def test_nobody_listens(records: Records) -> None:
    async with (
        Upstream() as upstream,
        serving([f"http://127.0.0.1:{free_port()}/"], upstream) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        assert (await try_login(client)).startswith("454 4.7.0 ")
    (failure,) = records.all("stage_failure")
    assert "Connection refused" in str(failure["error"])


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("an outage", "nothing said")])
async def test_another_server_answers(fault: str, records: Records) -> None:
    """What is no answer is left alone for a moment; what is one, however useless, counts."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(Upstream())
        sound: Sequence[Step] = [
            ASKED,
            answer("Auth-Status: OK", "Auth-Server: 127.0.0.1", f"Auth-Port: {upstream.port}"),
            Close(),
        ]
        servers = [await stack.enter_async_context(Scripted(script)) for script in (FAULTS[fault], sound)]
        urls = [f"http://127.0.0.1:{server.port}/auth" for server in servers]
        gateway = await stack.enter_async_context(serving(urls, upstream))
        async with unchanged(gateway):
            async with connected(gateway) as client:
                reply = await try_login(client)
            async with connected(gateway) as client:
                again = await try_login(client)
    answered = fault in ("an error page", "a redirect", "no permission", "no port", "a wrong port")
    assert reply.startswith("454 4.7.0 " if answered else "235 "), reply
    assert again[:3] == reply[:3]
    assert servers[0].connections == (2 if answered else 1)


async def test_a_server_that_goes_between_two_questions(records: Records) -> None:
    async with Upstream() as upstream, AsyncExitStack() as stack:
        said = answer("Auth-Status: Invalid login", "Content-Length: 0")
        server = await stack.enter_async_context(Scripted([ASKED, said]))
        async with serving([f"http://127.0.0.1:{server.port}/"], upstream) as gateway, connected(gateway) as client:
            assert (await try_login(client)).startswith("535 5.7.")
            await stack.aclose()
            async with unchanged(gateway):
                assert (await client.say(AUTH)).startswith("454 4.7.0 ")
                assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
