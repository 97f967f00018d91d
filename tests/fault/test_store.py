"""Mail stores that refuse, hang, drip, talk nonsense or die at each step before the login, and clients that leave.

Nobody is logged in before the upstream says so, no fault is called a wrong password, nothing stays open.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence

import pytest

from gateway.testing.gateway import free_port, running
from tests.dialogue.stages import STAGES
from tests.fault.baseline import unchanged
from tests.fault.client import Client
from tests.peers.recording_auth_server import Answer, RecordingAuthServer
from tests.peers.recording_auth_server import Client as AuthClient
from tests.peers.scripted import Close, Drip, Expect, Garbage, Half, Reset, Scripted, Send, Step, Wait

PLAIN = base64.b64encode(b"\0tim\0tanstaaf")
LOGIN = {"imap": b"a LOGIN tim tanstaaf\r\n", "pop3": b"AUTH PLAIN %b\r\n" % PLAIN}
UNAVAILABLE = {"imap": b"a NO [UNAVAILABLE] ", "pop3": b"-ERR [SYS/TEMP] "}
REFUSED = {"imap": b"a NO [AUTHENTICATIONFAILED] ", "pop3": b"-ERR [AUTH] "}
NOOP = {"imap": (b"b NOOP\r\n", b"b OK"), "pop3": (b"NOOP\r\n", b"+OK")}

# The whole conversation of the gateway with a store of which nothing is assumed, ours and its part in turn.
STEPS: dict[str, list[tuple[bytes, bytes]]] = {
    "imap": [
        (b"", b"* OK hello\r\n"),
        (rb"g1 CAPABILITY\r\n", b"* CAPABILITY IMAP4rev1 ID\r\ng1 OK done\r\n"),
        (rb"g2 ID ", b"* ID NIL\r\ng2 OK trusted\r\n"),
        (rb'a LOGIN "t\\\\im" \{4\}\r\n', b"+ go\r\n"),
        ("pä".encode() + rb"w\r\n", b"a OK in\r\n"),
    ],
    "pop3": [
        (b"", b"+OK [XCLIENT] hello\r\n"),
        (rb"CAPA\r\n", b"+OK\r\nUSER\r\n.\r\n"),
        (rb"XCLIENT ", b"+OK\r\n"),
        (rb"USER t\\im\r\n", b"+OK\r\n"),
        ("PASS päw".encode() + rb"\r\n", b"+OK in\r\n"),
    ],
}
USERS = {"t\\im": "päw", "tim": "tanstaaf"}
FAULTS: dict[str, list[Step]] = {
    "close": [Close()],
    "reset": [Reset()],
    "half": [Half()],
    "hang": [],
    "garbage": [Garbage(2000), Send(b"\r\n")],
    "binary": [Send(b"\x00\xff\xfe\r\n")],
    "half a line": [Send(b"* ")],
    "half a line, then away": [Send(b"+O"), Close()],
    "a line without end": [Send(b"+OK " + b"x" * 200_000)],
    "endless lines": [Send(b"* OK and more\r\n" * 20_000)],
    "other answer": [Send(b"z9 OK welcome\r\n")],
    "empty line": [Send(b"\r\n")],
    "SMTP": [Send(b"220 mail.test ESMTP\r\n")],
}
DIRTY = {"imap": "a LOGIN \"t\\\\im\" \"päw\"\r\n".encode(), "pop3": "USER t\\im\r\nPASS päw\r\n".encode()}


def pipeline(protocol: str, ports: Sequence[int], **more: object) -> dict[str, object]:
    """To these ports with short clocks; nothing is assumed of the servers but for the announcement."""
    return {
        "listen": [f"{protocol}://127.0.0.1:0"],
        "allow_plaintext_auth": True,
        "limits": {"auth_delay": "0s", "auth_failures": 100, "linger": "100ms"},
        "upstreams": {
            "store": {
                "servers": [f"{protocol}://127.0.0.1:{port}" for port in ports],
                "connect_timeout": "300ms",
                "greeting_timeout": "300ms",
                "command_timeout": "300ms",
                "tls": "off",
            }
        },
        "stages": [{"users": {"users": USERS}}, {"xclient": "send"}, "splice"],
        **more,
    }


def assuming(protocol: str, ports: Sequence[int], **more: object) -> dict[str, object]:
    """The same, with what the servers can do told beforehand and without xclient: greeting and login are all."""
    settings = pipeline(protocol, ports, stages=[{"users": {"users": USERS}}, "splice"], **more)
    pools = settings["upstreams"]
    assert isinstance(pools, dict)
    pools["store"]["capabilities"] = {"assume": ["USER", "IDLE"]}
    return settings


def learned(protocol: str) -> list[Step]:
    """A connection that only asks what the server can do."""
    greeting, asked = STEPS[protocol][:2]
    return [Send(greeting[1]), Expect(asked[0]), Send(asked[1]), Expect(rb"(g2 LOGOUT|QUIT)\r\n")]


def up_to(protocol: str, step: int) -> list[Step]:
    """The conversation before the server's part of this step."""
    script: list[Step] = []
    for number, (ours, theirs) in enumerate(STEPS[protocol][: step + 1]):
        if ours:
            script.append(Expect(ours))
        if number < step:
            script.append(Send(theirs))
    return script


def sound(protocol: str) -> list[Step]:
    """The whole conversation."""
    return [*up_to(protocol, len(STEPS[protocol]) - 1), Send(STEPS[protocol][-1][1])]


async def greeted(port: int) -> Client:
    """A client that read its greeting."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    assert (await client.reader.readline())[:4] in (b"* OK", b"+OK ")
    return client


async def answer(client: Client, protocol: str) -> bytes:
    """The answer to the login: the tagged line, or the last of POP3's."""
    while True:
        line = await client.reader.readline()
        if protocol == "pop3" and line == b"+OK\r\n":
            continue  # to USER
        if not line or line[:2] not in (b"* ", b"+ "):
            return line


async def goes_on(client: Client, protocol: str) -> bool:
    """Whether the session takes further commands."""
    command, expected = NOOP[protocol]
    client.send(command)
    return (await client.reader.readline()).startswith(expected)


CASES = [(protocol, step) for protocol in STEPS for step in range(len(STEPS[protocol]))]


@pytest.mark.anyio
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("protocol", "step"), CASES)
async def test_a_faulty_store_is_an_outage(protocol: str, step: int, fault: str) -> None:
    """Temporary, whatever the step; never in; the session goes on."""
    script = [*up_to(protocol, step), *FAULTS[fault]]
    async with Scripted(learned(protocol), script) as store:
        settings = pipeline(protocol, [store.port])
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(DIRTY[protocol])
            got = await answer(client, protocol)
            assert got.startswith(UNAVAILABLE[protocol]), got
            assert await goes_on(client, protocol)
            client.leave("close")


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", STEPS)
@pytest.mark.parametrize("fault", ["close", "reset", "hang", "garbage", "binary"])
async def test_another_server_takes_over(protocol: str, fault: str) -> None:
    """At every step at which nobody has judged yet, the next server of the pool is asked the same."""
    for step in range(len(STEPS[protocol])):
        bad, good = [*up_to(protocol, step), *FAULTS[fault]], sound(protocol)
        async with Scripted(learned(protocol), bad) as broken, Scripted(learned(protocol), good) as whole:
            settings = pipeline(protocol, [broken.port, whole.port])
            async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
                for _ in range(2):  # in turn: one of the two begins at the broken one
                    client = await greeted(gateway.port)
                    client.send(DIRTY[protocol])
                    got = await answer(client, protocol)
                    assert got in (b"a OK in\r\n", b"+OK in\r\n"), (step, got)
                    client.leave("close")


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", STEPS)
async def test_a_store_that_drips_is_slow_and_sound(protocol: str) -> None:
    """Octet by octet, each answer is still the answer; what comes behind the last one is the client's."""
    script = [Drip(step.data) if isinstance(step, Send) else step for step in sound(protocol)]
    async with Scripted(learned(protocol), [*script, Send(b"* more\r\n"), Close()]) as store:
        settings = pipeline(protocol, [store.port])
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(DIRTY[protocol])
            assert await answer(client, protocol) in (b"a OK in\r\n", b"+OK in\r\n")
            assert await client.rest() == b"* more\r\n"
            client.leave("close")


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", STEPS)
async def test_nobody_listens(protocol: str) -> None:
    async with running(assuming(protocol, [free_port()]), stages=STAGES) as gateway, unchanged(gateway):
        client = await greeted(gateway.port)
        client.send(LOGIN[protocol])
        assert (await answer(client, protocol)).startswith(UNAVAILABLE[protocol])
        assert await goes_on(client, protocol)
        client.leave("close")


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", STEPS)
async def test_no_success_before_the_upstream_says_so(protocol: str) -> None:
    """Promise 1: as long as the upstream thinks, the client reads nothing; a wait that lasts ends in an outage."""
    thinks = asyncio.Event()
    greeting: dict[str, list[Step]] = {
        "imap": [Send(b"* OK\r\n"), Expect(rb"a LOGIN")],
        "pop3": [Send(b"+OK\r\n"), Expect(b"USER"), Send(b"+OK\r\n"), Expect(b"PASS")],
    }
    success = {"imap": b"a OK in\r\n", "pop3": b"+OK in\r\n"}[protocol]
    async with Scripted([*greeting[protocol], Wait(thinks), Send(success)]) as store:
        settings = assuming(protocol, [store.port])
        settings["upstreams"]["store"]["command_timeout"] = "30s"  # type: ignore[index]
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(LOGIN[protocol])
            await store.reached(len(greeting[protocol]))
            for _ in range(50):
                await asyncio.sleep(0)
            assert not client.reader._buffer  # type: ignore[attr-defined]
            thinks.set()
            assert await answer(client, protocol) == success
            client.leave("close")


VERDICTS = {
    "imap": [
        (b"a NO go away\r\n", REFUSED), (b"a NO [AUTHENTICATIONFAILED] no\r\n", REFUSED),
        (b"a NO [UNAVAILABLE] later\r\n", UNAVAILABLE), (b"a NO [IN-USE] later\r\n", UNAVAILABLE),
        (b"a BAD what\r\n", UNAVAILABLE), (b"* BYE away\r\n", UNAVAILABLE), (b"* OK fine\r\na NO no\r\n", REFUSED),
    ],
    "pop3": [
        (b"-ERR go away\r\n", REFUSED), (b"-ERR [AUTH] no\r\n", REFUSED), (b"-ERR [SYS/TEMP] later\r\n", UNAVAILABLE),
        (b"-ERR [IN-USE] later\r\n", UNAVAILABLE), (b"-ERR [LOGIN-DELAY] later\r\n", UNAVAILABLE),
        (b"-ERR [SYS/PERM] disk\r\n", UNAVAILABLE),
    ],
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", STEPS)
async def test_only_a_verdict_is_a_wrong_password(protocol: str) -> None:
    for said, expected in VERDICTS[protocol]:
        script = [*up_to(protocol, len(STEPS[protocol]) - 1), Send(said)]
        async with Scripted(learned(protocol), script) as store:
            settings = pipeline(protocol, [store.port])
            async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
                client = await greeted(gateway.port)
                client.send(DIRTY[protocol])
                got = await answer(client, protocol)
                assert got.startswith(expected[protocol]), (said, got)
                assert await goes_on(client, protocol)
                client.leave("close")


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["reset", "close", "half"])
@pytest.mark.parametrize(("protocol", "step"), CASES)
async def test_a_client_that_leaves_in_its_login(protocol: str, step: int, way: str) -> None:
    """At each step of the upstream's part: connection and place are given back, nobody stays logged in there."""
    silent = [*up_to(protocol, step)] if way != "half" else sound(protocol)
    async with Scripted(learned(protocol), silent) as store:
        settings: Mapping[str, object] = pipeline(protocol, [store.port])
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(DIRTY[protocol])
            if way == "half":
                client.leave("half")
                assert await answer(client, protocol) in (b"a OK in\r\n", b"+OK in\r\n")
            else:
                await store.reached(len(silent), connection=2)
            client.leave("reset" if way == "reset" else "close")


AUTH_FAULTS = {
    "refuses": None,
    "resets": Answer(b"", "reset"),
    "closes": Answer(b"", "close"),
    "half a head": Answer(b"HTTP/1.0 200 OK\r\nAuth-Sta", "close"),
    "garbage": Answer(b"\x00\xff\r\n\r\n", "close"),
    "500": Answer(b"HTTP/1.0 500 Oops\r\n\r\n", "close"),
    "no status": Answer(b"HTTP/1.0 200 OK\r\n\r\n", "close"),
    "no server": Answer(b"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\n\r\n", "close"),
    "server that is none": Answer(
        b"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Server: what ever\r\nAuth-Port: x\r\n\r\n", "close"
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("fault", AUTH_FAULTS)
@pytest.mark.parametrize("protocol", STEPS)
async def test_a_faulty_auth_server_is_an_outage(protocol: str, fault: str) -> None:
    given = AUTH_FAULTS[fault]
    async with RecordingAuthServer() as server:
        if given is not None:
            server.default = AuthClient([given])
        port = server.port if given is not None else free_port()
        stage = {"auth_http": {"url": f"http://127.0.0.1:{port}/auth", "request_timeout": "300ms"}}
        settings = {**assuming(protocol, [free_port()]), "stages": [stage, "splice"]}
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(LOGIN[protocol])
            got = await answer(client, protocol)
            assert got.startswith(UNAVAILABLE[protocol]), got
            assert await goes_on(client, protocol)
            client.leave("close")
            await gateway.idle()
            await gateway.pipeline.stop(1.0)


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["", "reset", "close"])
@pytest.mark.parametrize("protocol", STEPS)
async def test_an_auth_server_that_hangs(protocol: str, way: str) -> None:
    """An outage for who waits; who leaves meanwhile is let go."""
    async with Scripted([Expect(rb"GET /auth")]) as server:
        stage = {"auth_http": {"url": f"http://127.0.0.1:{server.port}/auth", "request_timeout": "300ms"}}
        settings = {**assuming(protocol, [free_port()]), "stages": [stage, "splice"]}
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(LOGIN[protocol])
            await server.reached(1)
            if not way:
                assert (await answer(client, protocol)).startswith(UNAVAILABLE[protocol])
                assert await goes_on(client, protocol)
            client.leave("reset" if way == "reset" else "close")
            await gateway.idle()
            await gateway.pipeline.stop(1.0)


RELAYED = {
    "imap": (["AUTH=LOGIN", "SASL-IR"], b"a AUTHENTICATE LOGIN\r\n", b"* OK\r\n", rb"a AUTHENTICATE LOGIN\r\n", b"+ VXNlcm5hbWU6\r\n"),
    "pop3": (["SASL LOGIN"], b"AUTH LOGIN\r\n", b"+OK\r\n", rb"AUTH LOGIN\r\n", b"+ VXNlcm5hbWU6\r\n"),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("who", ["client resets", "client closes", *(f"store: {fault}" for fault in FAULTS)])
@pytest.mark.parametrize("protocol", STEPS)
async def test_a_relayed_exchange_that_breaks(protocol: str, who: str) -> None:
    """auth_relay: whoever leaves, the other one is let go; the store's faults are outages, never wrong passwords."""
    assume, command, greeting, expected, challenge = RELAYED[protocol]
    fault = FAULTS[who.partition(": ")[2]] if who.startswith("store") else []
    talk: list[Step] = [Send(greeting), Expect(expected), Send(challenge)]
    if who.startswith("store"):
        talk.append(Expect(rb"dGlt\r\n"))
    async with Scripted([*talk, *fault]) as store:
        settings = {**assuming(protocol, [store.port]), "stages": ["auth_relay", "splice"]}
        settings["upstreams"]["store"]["capabilities"]["assume"] = assume  # type: ignore[index]
        async with running(settings, stages=STAGES) as gateway, unchanged(gateway):
            client = await greeted(gateway.port)
            client.send(command)
            assert await client.reader.readline() == challenge
            if who.startswith("store"):
                client.send(b"dGlt\r\n")
                got = await answer(client, protocol)
                assert got.startswith(UNAVAILABLE[protocol]), got
                assert await goes_on(client, protocol)
                client.leave("close")
            else:
                client.leave("reset" if who == "client resets" else "close")
