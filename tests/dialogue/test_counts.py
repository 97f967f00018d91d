"""What sessions count is what happened in them, and what a session remembers of its stages."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.frontend.counts import ENDS
from gateway.observe import metrics
from gateway.observe.counters import CounterMap
from gateway.relay.spool import Spool, SpoolSpace
from gateway.session import Seen
from gateway.testing.gateway import Gateway
from gateway.verdicts import Cause
from tests.dialogue.obliging import Client, ObligingUpstream, between

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def shared() -> Iterator[CounterMap]:
    """Counters of this test alone."""
    shared = CounterMap.create(1)
    metrics.bind(shared.row(0), shared)
    yield shared
    metrics.bind(CounterMap.private().row(0), None)


def counted(shared: CounterMap, name: str) -> dict[tuple[str, ...], int]:
    """The numbers of one metric that are not 0, by the values of their labels but pipeline, listener and server."""
    found = {}
    for sample, value in shared.totals().items():
        if value and sample.partition("{")[0] == name:
            labels = re.findall(r'(\w+)="([^"]*)"', sample)
            found[tuple(text for label, text in labels if label not in ("pipeline", "listener", "server"))] = value
    return found


def pipeline(*stages: object, **more: object) -> dict[str, object]:
    return {"name": "mx", "stages": [*stages, {"splice": {"handoff": "never"}}], **more}


async def greeted(gateway: Gateway) -> Client:
    client = await Client.connected(gateway.port)
    assert await client.code() == "220"
    assert await client.say("EHLO client.example") == "250"
    return client


async def mail(client: Client, sender: str, code: str) -> None:
    assert await client.say(f"MAIL FROM:<{sender}@example.org>") == "250"
    assert await client.say("RCPT TO:<b@example.org>") == "250"
    assert await client.say("DATA") == "354"
    await client.send(b"Subject: x\r\n\r\nhello\r\n.\r\n")
    assert await client.code() == code


STAGES = [
    {"says": {"id": "fails", "at": "helo", "fail": True, "on_error": "pass"}},
    {"says": {"id": "strict", "at": "rcpt", "only": "bad", "refuse": "POLICY"}},
    {"says": {"id": "looks", "at": "rcpt", "only": "b@", "refuse": "POLICY", "mode": "observe"}},
    {"says": {"id": "allows", "at": "mail", "only": "friend", "allow": True}},
]


async def test_messages_refusals_verdicts(shared: CounterMap) -> None:
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline(*STAGES)) as gateway:
        gateway.pipeline.plan.chain.measure("mx")
        client = await greeted(gateway)
        await mail(client, "a", "250")
        await mail(client, "spam", "554")
        assert await client.say("MAIL FROM:<friend@example.org>") == "250"  # checks are skipped from here on
        assert await client.say("RSET") == "250"
        assert await client.say("MAIL FROM:<a@example.org>") == "250"
        assert await client.say("RCPT TO:<bad@example.org>") == "550"
        assert counted(shared, "gateway_open_sessions") == {("smtp",): 1}
        (conversation,) = gateway.pipeline.conversations
        trail = list(conversation.session.trail or ())
        assert await client.say("QUIT") == "221"
        await gateway.idle()
    assert trail == [
        Seen("fails", "helo", "error", "enforce"),
        *2 * (
            Seen("allows", "mail", "pass", "enforce"),
            Seen("strict", "rcpt", "pass", "enforce"), Seen("looks", "rcpt", "refuse", "observe"),
        ),
        Seen("allows", "mail", "allow", "enforce"),
        Seen("allows", "mail", "pass", "enforce"),
        Seen("strict", "rcpt", "refuse", "enforce"),
    ]  # fmt: skip
    assert counted(shared, "gateway_stage_verdicts_total") == {
        ("fails", "helo", "error", "enforce"): 1,
        ("allows", "mail", "pass", "enforce"): 3,
        ("allows", "mail", "allow", "enforce"): 1,
        ("strict", "rcpt", "pass", "enforce"): 2,
        ("strict", "rcpt", "refuse", "enforce"): 1,
        ("looks", "rcpt", "refuse", "observe"): 2,
    }
    timed = metrics.histogram("gateway_stage_seconds", pipeline="mx", stage="strict", phase="rcpt")
    assert timed.count == 3
    assert counted(shared, "gateway_transactions_total") == {("2xx",): 1, ("5xx",): 1, ("none",): 1}
    assert counted(shared, "gateway_message_bytes_total") == {(): 42}
    assert counted(shared, "gateway_refusals_total") == {(Cause.POLICY.value, "rcpt"): 1}
    assert counted(shared, "gateway_sessions_started_total") == {("smtp",): 1}
    assert counted(shared, "gateway_sessions_total") == {("smtp", "quit"): 1}
    assert counted(shared, "gateway_open_sessions") == {}
    assert sum(counted(shared, "gateway_session_seconds_bucket").values()) == 1


async def test_octets_and_upstream_connections(shared: CounterMap) -> None:
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline()) as gateway:
        client = await Client.connected(gateway.port)
        said = got = 0
        got += len(await client.reply())
        for line in ("HELO client.example", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "QUIT"):
            await client.send(line.encode() + b"\r\n")
            said += len(line) + 2
            got += len(await client.reply())
        await gateway.idle()
        name = gateway.pipeline.plan.name
        assert metrics.total("gateway_client_bytes_total", pipeline=name, direction="in") == said
        assert metrics.total("gateway_client_bytes_total", pipeline=name, direction="out") == got
    assert b"QUIT\r\n" in upstream.commands
    sent = sum(len(command) for command in upstream.commands)
    assert counted(shared, "gateway_upstream_bytes_total")["out",] == sent
    assert counted(shared, "gateway_upstream_bytes_total")["in",] > 0
    ((labels, number),) = counted(shared, "gateway_upstream_connections_total").items()
    assert (labels[-1], number) == ("ok", 1)
    assert sum(counted(shared, "gateway_upstream_connect_seconds_bucket").values()) == 1


async def test_an_upstream_that_is_down(shared: CounterMap) -> None:
    async with ObligingUpstream().listening() as upstream:
        port = upstream.port
    async with between(ObligingUpstream(port=port), pipeline()) as gateway:
        client = await greeted(gateway)
        await client.say("MAIL FROM:<a@example.org>")
        await client.say("RCPT TO:<b@example.org>")
        client.leave()
    numbers = counted(shared, "gateway_upstream_connections_total")
    assert {labels[-1] for labels in numbers} == {"down"}
    assert counted(shared, "gateway_upstream_connect_seconds_bucket") == {}


async def test_logins(shared: CounterMap) -> None:
    users = {"users": {"users": {"tim": "tanstaaf"}}}
    right, wrong = (b64encode(f"\0tim\0{password}".encode()).decode() for password in ("tanstaaf", "x"))
    more = pipeline(users, allow_plaintext_auth=True, limits={"auth_delay": 0})
    async with ObligingUpstream().listening() as upstream, between(upstream, more) as gateway:
        client = await greeted(gateway)
        assert await client.say(f"AUTH PLAIN {wrong}") == "535"
        assert await client.say("AUTH CRAM-MD5") == "334"
        assert await client.say("*") == "501"
        assert await client.say("AUTH PLAIN !") == "501"
        assert await client.say("AUTH MY-OWN") == "504"
        assert await client.say(f"AUTH PLAIN {right}") == "235"
        client.leave()
        await gateway.idle()
    assert counted(shared, "gateway_auth_attempts_total") == {
        ("PLAIN", "refused"): 1,
        ("CRAM-MD5", "canceled"): 1,
        ("PLAIN", "ok"): 1,
    }
    assert counted(shared, "gateway_refusals_total") == {(Cause.AUTH_FAILED.value, "auth"): 1}


async def test_xclient_begins_another_session(shared: CounterMap) -> None:
    more = pipeline(trust={"xclient": ["127.0.0.1"]})
    async with ObligingUpstream().listening() as upstream, between(upstream, more) as gateway:
        client = await greeted(gateway)
        assert await client.say("XCLIENT ADDR=192.0.2.1") == "220"
        assert counted(shared, "gateway_open_sessions") == {("smtp",): 1}
        assert await client.say("QUIT") == "221"
        await gateway.idle()
    assert counted(shared, "gateway_sessions_started_total") == {("smtp",): 2}
    assert counted(shared, "gateway_sessions_total") == {("smtp", "xclient"): 1, ("smtp", "quit"): 1}
    assert counted(shared, "gateway_open_sessions") == {}


def test_what_is_spooled(shared: CounterMap, tmp_path: Path) -> None:
    space = SpoolSpace(tmp_path, memory=10, total=1000)
    space.measure("mx")
    assert counted(shared, "gateway_spool_limit_bytes") == {(): 1000}
    spools = [Spool(space), Spool(space)]
    for spool in spools:
        spool.reader(waiting=True)
        spool.write(b"x" * 100)
    assert counted(shared, "gateway_spool_bytes") == {(): 200}
    for spool in spools:
        spool.close()
    assert counted(shared, "gateway_spool_bytes") == {}


async def test_servers_that_nobody_configured_share_a_label(shared: CounterMap) -> None:
    async with ObligingUpstream().listening() as one, ObligingUpstream().listening() as other:
        routes = {"one.example": f"smtp://127.0.0.1:{one.port}", "other.example": f"smtp://127.0.0.1:{other.port}"}
        more = pipeline({"by_domain": {"pools": routes}})
        async with between(ObligingUpstream(port=1), more) as gateway:
            client = await greeted(gateway)
            for domain in routes:
                assert await client.say("MAIL FROM:<a@example.org>") == "250"
                assert await client.say(f"RCPT TO:<b@{domain}>") == "250"
                assert await client.say("RSET") == "250"
            client.leave()
    labels = {"pipeline": "mx", "pool": metrics.DYNAMIC, "server": metrics.DYNAMIC}
    assert metrics.total("gateway_upstream_connections_total", result="ok", **labels) == 2
    assert sum(counted(shared, "gateway_upstream_connections_total").values()) == 2


async def test_tls(shared: CounterMap, tls_files: tuple[Path, Path]) -> None:
    chain, key = tls_files
    tls = {"certificates": [{"chain": str(chain), "key": str(key)}]}
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline(tls=tls)) as gateway:
        client = await greeted(gateway)
        assert await client.say("STARTTLS") == "220"
        await client.start_tls()
        assert await client.say("QUIT") == "221"
        failing = await greeted(gateway)
        assert await failing.say("STARTTLS") == "220"
        await failing.send(b"NOOP\r\n" * 10)
        await failing.reader.read()
        failing.leave()
        await gateway.idle()
    assert counted(shared, "gateway_tls_handshakes_total") == {("client", "TLSv1.3", "no"): 1}
    assert counted(shared, "gateway_tls_failures_total") == {("client",): 1}
    assert counted(shared, "gateway_sessions_total") == {("smtp", "quit"): 1, ("smtp", "tls_failed"): 1}


@pytest.mark.parametrize(
    ("more", "lines", "reason"),
    [
        ({}, ["QUIT"], "quit"),
        ({}, [], "client_closed"),
        ({"limits": {"command_timeout": 0.01}}, None, "timeout"),
        ({"limits": {"errors": 2}}, ["X", "X"], "too_many_errors"),
        ({}, ["GET / HTTP/1.1"], "bad_syntax"),
        ({"stages": [{"guard_says": {"at": "connect", "refuse": "POLICY"}}, {"splice": {"handoff": "never"}}]}, [], "refused"),
        ({"stages": [{"splice": {"handoff": "always"}}]}, ["QUIT"], "handed_off"),
    ],
)  # fmt: skip
async def test_how_sessions_end(
    shared: CounterMap, more: dict[str, object], lines: list[str] | None, reason: str
) -> None:
    async with ObligingUpstream().listening() as upstream, between(upstream, {**pipeline(), **more}) as gateway:
        client = await Client.connected(gateway.port)
        if await client.code() == "220":
            for line in ["EHLO client.example", *(lines or [])]:
                await client.say(line)
        if lines is not None:
            client.writer.close()
        await gateway.idle()
        client.leave()
    assert counted(shared, "gateway_sessions_total") == {("smtp", reason): 1}


def test_every_reason_has_its_label() -> None:
    """What the source says to end a session is in the table, or is the cause of a refusal."""
    said = {"quit"}
    for path in (Path(__file__).parents[2] / "gateway" / "frontend").glob("*.py"):
        text = path.read_text()
        said |= set(re.findall(r'(?:Closing|last_word)\(\s*f?"([^":{]+)', text))
        said |= set(re.findall(r'\breason = f?"([^":{]+)', text))
    assert len(said) > 15
    assert said <= ENDS.keys()
