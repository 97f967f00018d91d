"""A milter filter that hangs, drips, talks nonsense, breaks off or dies, at each event: `on_error` says what is answered.

Exactly that, and for the message at hand alone: the next MAIL of the same session opens a new filter connection, which
hears of the client and its HELO again. A message passes unchanged or not at all; the upstream never gets the end of
one that was refused (promise 4).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.testing.gateway import Gateway, free_port, running
from tests.fault.baseline import unchanged
from tests.fault.client import Client, Way, connected
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records
from tests.peers.scripted_milter import (
    ACCEPT,
    CONNECTION_FAILED,
    CONTINUE,
    DISCARD,
    PROGRESS,
    PROMISES,
    REJECT,
    SHUTDOWN,
    SKIP,
    Answer,
    Close,
    Drip,
    Garbage,
    Hang,
    Reset,
    ScriptedMilter,
    Step,
    Wait,
    add_header,
    add_recipient,
    change_header,
    change_sender,
    insert_header,
    options,
    replace_body,
    reply,
)

pytestmark = pytest.mark.anyio
UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])

CONTENT = b"From: a@example.org\r\nSubject: x\r\n\r\nhello\r\n..\r\n"
MAIL, RCPT = "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>"
QUEUED = "250 2.0.0 queued\r\n"
ACTIONS = {"tempfail": "451 4.3.0 ", "reject": "554 5.3.0 ", "disconnect": "421 4.3.0 ", "pass": QUEUED}
READS_ONLY = options(actions=0)

# the event, and the command whose reply tells of it
EVENTS = {
    "optneg": "MAIL", "connect": "MAIL", "helo": "MAIL", "mail": "MAIL", "rcpt": "RCPT", "data": "DATA",
    "header": "end", "header:2": "end", "eoh": "end", "body": "end", "eom": "end",
}  # fmt: skip
CONTENT_EVENTS = [event for event, told in EVENTS.items() if told == "end"]


FAULTS = (
    "hangs", "drips", "talks nonsense", "speaks another protocol", "answers what is not allowed",
    "says that it failed", "closes", "closes in the middle", "resets",
)  # fmt: skip


def clock(name: str) -> str:
    """What the filter is given: little where only time ends the wait (nonsense may look like a long packet)."""
    return "250ms" if name in ("hangs", "drips", "talks nonsense") else "10s"


def fault(name: str, event: str) -> Sequence[Step]:
    """What the filter does instead of an answer."""
    usual = options() if event == "optneg" else CONTINUE
    out_of_place = {"optneg": CONTINUE, "connect": DISCARD, "helo": DISCARD, "eom": SKIP}
    faults: Mapping[str, Sequence[Step]] = {
        "hangs": [Hang()],
        "drips": [Drip(usual[:-1] * 4, gap=0.1), Hang()],
        "talks nonsense": [Garbage(4000), Hang()],
        "speaks another protocol": [Answer(b"220 mail.test ESMTP\r\n"), Hang()],
        "answers what is not allowed": [Answer(out_of_place.get(event, add_header(b"X", b"y")) + usual), Hang()],
        "says that it failed": [Answer(CONNECTION_FAILED)],
        "closes": [Close()],
        "closes in the middle": [Answer(usual[:-1]), Close()],
        "resets": [Reset()],
    }
    return faults[name]


@asynccontextmanager
async def serving(
    upstream: Upstream, *stages: object, limits: Mapping[str, object] | None = None, **more: object
) -> AsyncIterator[Gateway]:
    """A gateway with these stages in front of the upstream. What the test waits for must come in time."""
    pipeline: dict[str, object] = {
        "relay": "open",
        "limits": {"linger": "100ms", **(limits or {})},
        "stages": [*stages, {"splice": {"handoff": "never"}}],
        "upstreams": upstream.pool(),
        **more,
    }
    async with running(pipeline) as gateway, asyncio.timeout(20):
        yield gateway


def asks(milter: ScriptedMilter | str, *, timeout: str = "10s", **settings: object) -> dict[str, object]:
    """The stage; its clocks are `timeout`."""
    socket = milter if isinstance(milter, str) else milter.address
    clocks = {"command_timeout": timeout, "content_timeout": timeout}
    return {"milter": {"socket": socket, **clocks, **settings}}


async def send(client: Client, read_by: ScriptedMilter | None = None) -> tuple[str, str]:
    """A message: the command that was not answered well, else `end`, and the reply to it.

    `read_by` a filter: the end of the content comes when it has read the beginning.
    """
    for line in (MAIL, RCPT, "DATA"):
        said = await client.say(line)
        if said[0] not in "23":
            return line.partition(" ")[0], said
    stuffed = CONTENT.replace(b"\r\n.", b"\r\n..") + b".\r\n"
    if read_by is not None:
        client.send(stuffed[:-12])
        stuffed = stuffed[-12:]
        await read_by.reached("header")
    client.send(stuffed)
    return "end", await client.reply()


def delivered(upstream: Upstream) -> list[bytes]:
    """The messages at the upstream."""
    return [message.replace(b"\r\n..", b"\r\n.") for message in upstream.messages]


WHOLE = ["optneg", "connect", "helo", "mail", "rcpt", "data", "header", "header", "eoh", "body", "eom"]
"""What a filter connection must hear of a session with one message."""


async def next_message(client: Client, milter: ScriptedMilter, connection: int) -> None:
    """It is delivered, and its filter connection hears everything from the beginning."""
    assert await send(client) == ("end", QUEUED)
    assert milter.events(connection)[: len(WHOLE)] == WHOLE
    assert milter.payloads("helo", connection) == [b"client.test\0"]


def verdict(action: str, event: str) -> tuple[str, str]:
    """The command with the bad answer, and the beginning of that."""
    return ("end" if action == "pass" else EVENTS[event], ACTIONS[action])


@UVLOOP
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", FAULTS)
async def test_a_filter_that_fails_has_the_verdict_that_its_configuration_says(
    name: str, event: str, action: str, records: Records
) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: fault(name, event)}, {}) as milter,
        serving(upstream, asks(milter, timeout=clock(name), on_error=action)) as gateway,
    ):
        await one_failure(gateway, upstream, milter, event, action)
    assert {failure["action"] for failure in records.all("stage_failure")} == {action}
    assert records.all("internal_error") == []


@UVLOOP
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("event", CONTENT_EVENTS)
@pytest.mark.parametrize(
    ("name", "live"), [("hangs", True), ("talks nonsense", True), ("closes", True), ("closes", False)]
)
async def test_a_filter_that_only_reads_fails_while_the_upstream_gets_the_content(
    name: str, live: bool, event: str, action: str, records: Records
) -> None:
    script = {event: fault(name, event)}
    async with (
        Upstream() as upstream,
        ScriptedMilter(script, {}, greeting=READS_ONLY) as milter,
        serving(upstream, asks(milter, timeout=clock(name), on_error=action)) as gateway,
    ):
        await one_failure(gateway, upstream, milter, event, action, live=live)
    assert records.all("internal_error") == []


async def one_failure(
    gateway: Gateway, upstream: Upstream, milter: ScriptedMilter, event: str, action: str, *, live: bool = False
) -> None:
    """A message that meets the fault, `live` while it comes in, then one that does not."""
    async with unchanged(gateway), connected(gateway) as client:
        await client.hello()
        told, answer = await send(client, milter if live else None)
        assert told == verdict(action, event)[0] and answer.startswith(verdict(action, event)[1]), (told, answer)
        assert delivered(upstream) == [CONTENT] * (action == "pass")
        if action == "disconnect":
            assert await client.rest() == b""
            async with connected(gateway) as another:
                await another.hello()
                await next_message(another, milter, 2)
        else:
            if told == "RCPT":
                assert await client.say("RSET") == "250 2.0.0 Ok\r\n"
            await next_message(client, milter, 2)
            assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
    assert delivered(upstream) == [CONTENT] * (1 + (action == "pass"))


# -- in the middle of changes ------------------------------------------------------------------------------------

HALF = {
    "a new body": replace_body(b"half of a new "),
    "header fields": insert_header(0, b"X-In", b"front") + change_header(1, b"Subject", b"y") + add_header(b"X", b"y"),
    "the envelope": change_sender(b"<c@example.org>") + add_recipient(b"<d@example.org>"),
}


@UVLOOP
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("name", FAULTS)
async def test_a_message_that_was_changed_by_half_passes_unchanged_or_not_at_all(
    name: str, half: str, action: str, records: Records
) -> None:
    script = {"eom": [Answer(HALF[half]), *fault(name, "eom")]}
    async with (
        Upstream() as upstream,
        ScriptedMilter(script, {}) as milter,
        serving(upstream, asks(milter, timeout=clock(name), on_error=action)) as gateway,
    ):
        await one_failure(gateway, upstream, milter, "eom", action)
    assert {line for line in upstream.commands if line[:4] in (b"MAIL", b"RCPT")} == {MAIL.encode(), RCPT.encode()}
    assert records.all("internal_error") == []


WRONG_CHANGES = {
    "a field that would be two": add_header(b"X", b"y\nInjected: z"),
    "a field without a name": insert_header(1, b"", b"y"),
    "an address with a line end": add_recipient(b"<d@example.org>\r\nDATA"),
    "no address": add_recipient(b""),
    "a body in two pieces": replace_body(b"one") + add_header(b"X", b"y") + replace_body(b"two"),
    "no reply code": reply(b"250 2.0.0 fine"),
    "reply codes at odds": reply(b"550-5.7.1 no\r\n450 4.7.1 never"),
    "a packet without end": b"\xff\xff\xff\xff" + b"c",
    "a packet of nothing": b"\0\0\0\0",
}


@UVLOOP
@pytest.mark.parametrize("action", ["reject", "pass"])
@pytest.mark.parametrize("change", WRONG_CHANGES)
async def test_changes_and_replies_that_the_protocol_does_not_allow(
    change: str, action: str, records: Records
) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": Answer(WRONG_CHANGES[change], CONTINUE)}, {}) as milter,
        serving(upstream, asks(milter, on_error=action)) as gateway,
    ):
        await one_failure(gateway, upstream, milter, "eom", action)
    assert records.all("internal_error") == []


# -- before, between and beside messages -------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["at MAIL", "early"])
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_filter_that_is_not_there_yet(action: str, early: bool, tmp_path: Path, records: Records) -> None:
    place = tmp_path / "milter.sock"
    connect = "early" if early else "mail"
    async with Upstream() as upstream, ScriptedMilter() as milter:
        stage = asks(f"unix:{place}", on_error=action, connect=connect)
        async with serving(upstream, stage) as gateway, unchanged(gateway):
            async with connected(gateway) as client:
                await client.hello()
                told, answer = await send(client)
                assert told == ("end" if action == "pass" else "MAIL") and answer.startswith(ACTIONS[action])
                place.symlink_to(milter.address.removeprefix("unix:"))
                if action != "disconnect":
                    await next_message(client, milter, 1)
            async with connected(gateway) as client:
                await client.hello()
                await next_message(client, milter, 1 + (action != "disconnect"))
    assert "cannot connect" in str(records.all("stage_failure")[0]["error"])


async def test_a_name_or_a_port_where_nobody_listens(records: Records) -> None:
    for place in (f"inet:127.0.0.1:{free_port()}", f"inet6:[::1]:{free_port()}", "inet:no-such-host.invalid:9"):
        async with (
            Upstream() as upstream,
            serving(upstream, asks(place)) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            await client.hello()
            assert (await send(client))[1].startswith("451 4.3.0 ")
            assert (await send(client))[1].startswith("451 4.3.0 ")
    assert len(records.all("stage_failure")) == 6 and records.all("internal_error") == []


@pytest.mark.parametrize("event", ["connect", "helo"])
@pytest.mark.parametrize("name", FAULTS)
async def test_a_filter_that_fails_early_is_asked_again_at_mail(name: str, event: str, records: Records) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: fault(name, event)}, {}) as milter,
        serving(upstream, asks(milter, timeout=clock(name), connect="early")) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        await next_message(client, milter, 2)
    assert milter.connections == 2


BETWEEN: Mapping[str, Step] = {
    "closes": Close(),
    "resets": Reset(),
    "speaks unasked": Answer(CONTINUE),
    "talks nonsense": Garbage(100),
}


@pytest.mark.parametrize("action", ["reject", "disconnect"])
@pytest.mark.parametrize("name", BETWEEN)
async def test_a_filter_that_goes_between_messages_costs_none(name: str, action: str, records: Records) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({"abort": BETWEEN[name]}, {}) as milter,
        serving(upstream, asks(milter, on_error=action)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
        await milter.reached("abort")
        for _ in range(3):  # what the filter did has come to the gateway by then
            await client.say("NOOP")
        await next_message(client, milter, 2)
    assert records.all("stage_failure") == []


async def test_a_filter_is_killed_and_started_again(tmp_path: Path, records: Records) -> None:
    place = tmp_path / "milter.sock"
    async with Upstream() as upstream, ScriptedMilter() as old, ScriptedMilter() as new:
        place.symlink_to(old.address.removeprefix("unix:"))
        async with (
            serving(upstream, asks(f"unix:{place}")) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            await client.hello()
            assert await send(client) == ("end", QUEUED)
            place.unlink()
            old.drop()
            await old.gone()
            await client.say("NOOP")
            assert (await send(client))[1].startswith("451 4.3.0 ")
            place.symlink_to(new.address.removeprefix("unix:"))
            await next_message(client, new, 1)


@UVLOOP
@pytest.mark.parametrize("action", ["reject", "pass"])
@pytest.mark.parametrize("event", [event for event in EVENTS if event not in ("optneg", "eom")])
async def test_two_answers_to_one_event_are_one_too_many(event: str, action: str, records: Records) -> None:
    """The second one would be taken for the answer to the next event."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Answer(CONTINUE + CONTINUE)}, {}) as milter,
        serving(upstream, asks(milter, on_error=action)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        told, answer = await send(client)
        assert told == verdict(action, event)[0] and answer.startswith(verdict(action, event)[1])
        if told == "RCPT":
            await client.say("RSET")
        await next_message(client, milter, 2)
    errors = {str(failure["error"]) for failure in records.all("stage_failure")}
    why = f"filter {milter.address}: the filter speaks when no reply is due"
    assert errors and all(why in error for error in errors)


async def test_an_answer_that_was_promised_not_to_come_is_not_that_to_the_next_event(records: Records) -> None:
    """The filter answers fields against its word: no other event, and not the message's end, may take it for its own."""
    greeting = options(protocol=PROMISES["header"])
    script = {"header": Answer(CONTINUE), "eom": Answer(REJECT)}
    async with (
        Upstream() as upstream,
        ScriptedMilter(script, {}, greeting=greeting) as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        told, answer = await send(client)
        assert told == "end" and answer[:1] in "45", answer
    assert upstream.messages == []


async def test_changes_that_were_not_announced_are_not_made_and_said_once(records: Records) -> None:
    adds_fields = options(actions=1)
    asked = change_header(1, b"Subject", b"y") * 20 + add_recipient(b"c@example.org") + add_header(b"X-Added", b"yes")
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": Answer(asked + ACCEPT)}, greeting=adds_fields) as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
    (content,) = upstream.messages
    assert b"Subject: x\r\nX-Added: yes\r\n" in content
    assert not [command for command in upstream.commands if b"c@example.org" in command]
    (record,) = records.all("filter_action")
    assert record["action"] == "ADDRCPT CHGHDRS"


@pytest.mark.parametrize("greeting", [options(), READS_ONLY], ids=["edits", "reads"])
@pytest.mark.parametrize("event", ["mail", "rcpt", "data", "header", "eoh", "body", "eom"])
async def test_changes_behind_the_verdict_do_not_lose_the_message(
    event: str, greeting: bytes, records: Records
) -> None:
    """rspamd may add a field behind its `accept`: the message passes, the filter connection is of no use any more."""
    script = {event: Answer(ACCEPT + insert_header(1, b"X-Late", b"yes"))}
    async with (
        Upstream() as upstream,
        ScriptedMilter(script, {}, greeting=greeting) as milter,
        serving(upstream, asks(milter, on_error="reject")) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
        assert delivered(upstream) == [CONTENT]
        await milter.gone(1)
        await next_message(client, milter, 2)
    assert records.all("stage_failure") == []


async def test_a_filter_that_fails_at_an_unknown_command(records: Records) -> None:
    for name in FAULTS:
        async with (
            Upstream() as upstream,
            ScriptedMilter({"unknown": fault(name, "unknown")}, {}) as milter,
            serving(upstream, asks(milter, timeout=clock(name), connect="early")) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            await client.hello()
            assert (await client.say("XYZZY"))[:3] in ("500", "451"), name
            assert await client.say("NOOP") == "250 2.0.0 Ok\r\n"
            await next_message(client, milter, 2)
    assert records.all("internal_error") == []


# -- time --------------------------------------------------------------------------------------------------------


@UVLOOP
@pytest.mark.parametrize("event", ["connect", "mail", "rcpt", "header", "body", "eom"])
async def test_progress_starts_the_clock_again(event: str, records: Records) -> None:
    """Six times a quarter of a second, where a whole one is allowed."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Drip(PROGRESS * 6 + CONTINUE, gap=0.05)}) as milter,
        serving(upstream, asks(milter, timeout="1s")) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
    assert records.all("stage_failure") == [] and milter.connections == 1


@UVLOOP
@pytest.mark.parametrize("action", ["reject", "pass"])
@pytest.mark.parametrize("event", CONTENT_EVENTS)
async def test_progress_without_end_is_ended_by_end_of_data_timeout(
    event: str, action: str, records: Records
) -> None:
    script = {event: Drip(PROGRESS * 1_000, gap=0.02)}
    async with Upstream() as upstream, ScriptedMilter(script, {}) as milter:
        limits = {"end_of_data_timeout": "300ms"}
        async with (
            serving(upstream, asks(milter, on_error=action), limits=limits) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            await client.hello()
            told, answer = await send(client)
            assert told == "end" and answer.startswith("451 4.3.0 "), answer
            await next_message(client, milter, 2)
    assert len(upstream.messages) == 1


@UVLOOP
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("event", ["optneg", "mail", "rcpt", "eom"])
async def test_the_time_of_the_stage_itself(event: str, action: str, records: Records) -> None:
    """The filter's own clocks are long: `timeout` of the stage ends the wait."""
    async with Upstream() as upstream, ScriptedMilter({event: Hang()}, {}) as milter:
        stage = {"milter": {"socket": milter.address, "timeout": "300ms", "on_error": action}}
        async with serving(upstream, stage) as gateway:
            await one_failure(gateway, upstream, milter, event, action)


async def test_a_filter_that_takes_no_connection(monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
    """Its listen queue is full, so that the connection is never made; the next MAIL tries again."""
    real, tried = asyncio.Event(), 0

    async def connect(address: object, *, timeout: float) -> object:
        nonlocal tried
        tried += 1
        await real.wait()
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr("gateway.upstream.milter.connect", connect)
    async with Upstream() as upstream:
        stage = {"milter": {"socket": "inet:127.0.0.1:9", "timeout": "50ms"}}
        async with serving(upstream, stage) as gateway, unchanged(gateway), connected(gateway) as client:
            await client.hello()
            for _ in range(3):
                assert (await send(client))[1].startswith("451 4.3.0 ")
    assert tried == 3
    assert all("time-out" in str(failure["error"]) for failure in records.all("stage_failure"))


# -- the client --------------------------------------------------------------------------------------------------


@UVLOOP
@pytest.mark.parametrize("way", ["close", "half", "reset"])
@pytest.mark.parametrize("event", EVENTS)
async def test_the_client_leaves_while_the_filter_thinks(event: str, way: Way, records: Records) -> None:
    thinks = asyncio.Event()
    usual = options() if event == "optneg" else CONTINUE
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: [Wait(thinks), Answer(usual)]}) as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        client.send(f"{MAIL}\r\n{RCPT}\r\nDATA\r\n".encode())
        if EVENTS[event] == "end":
            for _ in range(3):
                assert (await client.reply())[0] in "23"
            client.send(CONTENT + b".\r\n")
        await milter.reached(event)
        client.leave(way)
        thinks.set()
        await milter.gone()
        await gateway.idle()
    assert milter.events()[-1] in ("quit", "abort", event)
    assert milter.connections == 1 and records.all("internal_error") == []
    complete = EVENTS[event] == "end"
    assert len(upstream.messages) <= complete


@UVLOOP
@pytest.mark.parametrize("event", EVENTS)
async def test_a_reset_client_does_not_wait_for_the_filter(event: str, records: Records) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Hang()}) as milter,
        serving(upstream, asks(milter, timeout="10m")) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        client.send(f"{MAIL}\r\n{RCPT}\r\nDATA\r\n".encode())
        if EVENTS[event] == "end":
            for _ in range(3):
                assert (await client.reply())[0] in "23"
            client.send(CONTENT + b".\r\n")
        await milter.reached(event)
        client.leave("reset")
        await milter.gone()
    assert upstream.messages == [] and records.all("internal_error") == []


@UVLOOP
@pytest.mark.parametrize("way", ["close", "half", "reset"])
@pytest.mark.parametrize("after", [MAIL, RCPT, "DATA", "From: a@example.org\r\nSub", CONTENT[:-20].decode()])
async def test_the_client_leaves_a_message(after: str, way: Way, records: Records) -> None:
    """The filter must not take what it has for a message."""
    async with (
        Upstream() as upstream,
        ScriptedMilter() as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        lines = [MAIL, RCPT, "DATA"]
        for line in lines[: lines.index(after) + 1] if after in lines else lines:
            await client.say(line)
        if after not in lines:
            client.send(after.encode())
            if "\r\n\r\n" in after:
                await milter.reached("eoh")
        client.leave(way)
        await milter.gone()
    assert "eom" not in milter.events() and milter.events()[-1] in ("quit", "abort")
    assert upstream.messages == [] and records.all("internal_error") == []


@pytest.mark.parametrize("event", [event for event in EVENTS if event != "optneg"])
@pytest.mark.parametrize("said", ["shutdown", "421"])
async def test_a_filter_may_disconnect_the_client(said: str, event: str, records: Records) -> None:
    """Whatever `on_error` says: this is a verdict."""
    packets = SHUTDOWN if said == "shutdown" else reply(b"421 4.3.2 go away")
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Answer(packets)}, {}) as milter,
        serving(upstream, asks(milter, on_error="pass")) as gateway,
        unchanged(gateway),
    ):
        async with connected(gateway) as client:
            await client.hello()
            told, answer = await send(client)
            assert told == EVENTS[event] and answer.startswith("421 4.3.2 "), answer
            assert await client.rest() == b""
        async with connected(gateway) as client:
            await client.hello()
            await next_message(client, milter, 2)
    assert len(upstream.messages) == 1 and records.all("stage_failure") == []


# -- several filters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("event", EVENTS)
async def test_the_second_of_three_filters_dies(event: str, action: str, records: Records) -> None:
    changes = {"eom": Answer(add_header(b"X-First", b"yes"), ACCEPT)}
    third = {"eom": Answer(add_header(b"X-Third", b"yes"), CONTINUE)}
    async with (
        Upstream() as upstream,
        ScriptedMilter(changes) as one,
        ScriptedMilter({event: Close()}, {}) as two,
        ScriptedMilter(third) as three,
        serving(upstream, asks(one), asks(two, on_error=action), asks(three)) as gateway,
        unchanged(gateway),
    ):
        async with connected(gateway) as client:
            await client.hello()
            told, answer = await send(client)
            assert told == verdict(action, event)[0] and answer.startswith(verdict(action, event)[1])
            if action != "disconnect":
                if told == "RCPT":
                    await client.say("RSET")
                await one.reached("abort")
                assert await send(client) == ("end", QUEUED)
                assert one.events().count("mail") == 2 and one.connections == 1
                assert two.events(2)[:3] == ["optneg", "connect", "helo"]
        marked = CONTENT.replace(b"x\r\n\r\n", b"x\r\nX-First: yes\r\nX-Third: yes\r\n\r\n")
        expected = {"pass": 2, "disconnect": 0}.get(action, 1)
        assert delivered(upstream) == [marked] * expected
    assert three.events().count("eom") == expected and len(two.payloads("eom", 2)) == (action != "disconnect")


async def test_a_recipient_that_met_the_fault_is_the_only_one_named(records: Records) -> None:
    """The message at hand is the transaction: what was said before stands, all that follows gets `on_error`."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({"rcpt:2": Close()}, {}) as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.envelope()
        for line in (RCPT, RCPT, "DATA"):
            assert (await client.say(line)).startswith("451 4.3.0 "), line
        await next_message(client, milter, 2)


@pytest.mark.parametrize("how", [{"on_error": "pass"}, {"mode": "observe"}], ids=["pass", "observe"])
@pytest.mark.parametrize("when", [{}, {"when": 'rcpt.to != ""'}], ids=["always", "from RCPT on"])
@pytest.mark.parametrize("event", ["connect", "mail", "rcpt", "data", "body", "eom"])
async def test_a_message_that_goes_on_without_it_has_one_record(
    event: str, when: dict[str, object], how: dict[str, object], records: Records
) -> None:
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Close()}, {event: Close()}, {}) as milter,
        serving(upstream, {"milter": {"socket": milter.address, **when, **how}}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        for number in (1, 2):
            for line in (MAIL, RCPT, RCPT.replace("b@", "c@"), RCPT.replace("b@", "d@")):
                assert (await client.say(line)).startswith("250"), line
            assert (await client.say("DATA")).startswith("354")
            client.send(CONTENT.replace(b"..", b"...") + b".\r\n")
            assert await client.reply() == QUEUED
            assert len(records.all("stage_failure")) == number
        assert delivered(upstream) == [CONTENT, CONTENT] and milter.connections == 2
        await next_message(client, milter, 3)
    assert len(records.all("observed")) == (2 if "mode" in how else 0)


@UVLOOP
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("event", CONTENT_EVENTS)
async def test_chunks_of_a_message_that_met_a_fault_are_no_commands(event: str, action: str, records: Records) -> None:
    """BDAT: every chunk is read to its end, whatever became of the message."""
    content = CONTENT[:-7] + b"QUIT\r\n.\r\n"
    chunks = [content[:9], content[9:45], b"", content[45:]]
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Close()}, {}) as milter,
        serving(upstream, asks(milter, on_error=action)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.envelope()
        for chunk in chunks:
            client.send(b"BDAT %d\r\n" % len(chunk) + chunk)
            assert (await client.reply()).startswith("250 2.0.0 ")
        client.send(b"BDAT 0 LAST\r\n")
        assert (await client.reply()).startswith(ACTIONS[action])
        assert delivered(upstream) == [content] * (action == "pass")
        if action == "disconnect":
            assert await client.rest() == b""
        else:
            await next_message(client, milter, 2)


@UVLOOP
@pytest.mark.parametrize("event", ["mail", "rcpt", "data", "header", "body", "eom"])
async def test_commands_in_one_group_meet_the_same_fault_once(event: str, records: Records) -> None:
    """Two messages pipelined as far as that goes: the second one is none of the fault's business."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({event: Close()}, {}) as milter,
        serving(upstream, asks(milter)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        group = f"{MAIL}\r\n{RCPT}\r\nDATA\r\n".encode()
        client.send(group)
        answers = [await client.reply() for _ in range(3)]
        if answers[-1].startswith("354"):
            client.send(CONTENT.replace(b"..", b"...") + b".\r\nRSET\r\n" + group)
            answers = [await client.reply()]
        else:
            client.send(b"RSET\r\n" + group)
        assert [answer[:10] for answer in answers if answer[0] == "4"][:1] == ["451 4.3.0 "]
        assert [(await client.reply())[:3] for _ in range(4)] == ["250", "250", "250", "354"]
        client.send(CONTENT.replace(b"..", b"...") + b".\r\n")
        assert await client.reply() == QUEUED
        assert delivered(upstream) == [CONTENT] and milter.events(2)[: len(WHOLE)] == WHOLE


async def test_a_nul_does_not_hide_a_message_from_the_filter(records: Records) -> None:
    """What the protocol cannot carry is no reason to let the message pass unseen."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": Answer(REJECT)}) as milter,
        serving(upstream, asks(milter, on_error="pass")) as gateway,
        connected(gateway) as client,
    ):
        await client.envelope("DATA")
        client.send(b"Subject: one\0two\r\n\r\nhello\0\r\n.\r\n")
        assert (await client.reply()).startswith("550 5.7.1 ")
        assert milter.payloads("header") == [b"Subject\0one?two\0"]
        assert milter.payloads("body") == [b"hello\0\r\n"]
    assert upstream.messages == [] and records.all("stage_failure") == []


@pytest.mark.parametrize("connect", ["mail", "early"])
async def test_another_client_behind_xclient_has_another_filter_connection(connect: str, records: Records) -> None:
    """Whoever the filter was told of before is not the one whose message it judges."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({"connect": Answer(CONTINUE)}, {}) as milter,
        serving(upstream, asks(milter, connect=connect), trust={"xclient": ["127.0.0.1"]}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert await send(client) == ("end", QUEUED)
        assert (await client.say("XCLIENT ADDR=192.0.2.9 NAME=other.test"))[:3] == "220"
        await milter.gone()
        assert (await client.say("EHLO client.test"))[:3] == "250"
        await next_message(client, milter, 2)
        assert milter.payloads("connect", 2)[0].startswith(b"other.test\0004")
        assert b"192.0.2.9" in milter.payloads("connect", 2)[0]
