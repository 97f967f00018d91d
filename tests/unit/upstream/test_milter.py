"""A filter's address, and a connection to it: its clocks, its end, and what comes unasked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from gateway.protocol.errors import LocalError
from gateway.protocol.milter import (
    Accept,
    Action,
    AddHeader,
    Continue,
    Modification,
    Quarantine,
    Reject,
    ReplaceBody,
    Stage,
    Verdict,
)
from gateway.protocol.milter_mta import Unasked
from gateway.testing.gateway import free_port
from gateway.upstream.milter import FilterAddress, FilterConnection, FilterLost, FilterTimeouts
from tests.peers.scripted_milter import (
    ACCEPT,
    CONNECTION_FAILED,
    CONTINUE,
    PROGRESS,
    PROMISES,
    REJECT,
    Answer,
    Close,
    Hang,
    Script,
    ScriptedMilter,
    Wait,
    add_header,
    add_recipient,
    options,
    quarantine,
    replace_body,
)

PLENTY = FilterTimeouts(10.0, 10.0, 10.0)

# -- addresses ------------------------------------------------------------------------------------------------

ADDRESSES = {
    "unix:/run/milter.sock": ("/run/milter.sock", "", 0),
    "local:/run/milter.sock": ("/run/milter.sock", "", 0),
    "inet:127.0.0.1:8891": ("", "127.0.0.1", 8891),
    "inet:filter.example:1": ("", "filter.example", 1),
    "inet:8891@filter.example": ("", "filter.example", 8891),
    "inet:8891@[::1]": ("", "::1", 8891),
    "inet6:[::1]:65535": ("", "::1", 65535),
    "inet6:8891@::1": ("", "::1", 8891),
}
NOT_A_SOCKET = "is not the socket of a filter; write unix:/path or inet:host:port"
WRONG_ADDRESSES = {
    "": NOT_A_SOCKET,
    "/run/milter.sock": NOT_A_SOCKET,
    "127.0.0.1:8891": NOT_A_SOCKET,
    "tcp:127.0.0.1:8891": NOT_A_SOCKET,
    "UNIX:/run/milter.sock": NOT_A_SOCKET,
    "unix:": "needs an absolute path; write unix:/path",
    "unix:milter.sock": "needs an absolute path; write unix:/path",
    "local:milter.sock": "needs an absolute path; write local:/path",
    "inet:8891": "needs host and port; write inet:host:port",
    "inet:host": "needs host and port; write inet:host:port",
    "inet::8891": "needs host and port; write inet:host:port",
    "inet:host:": "needs host and port; write inet:host:port",
    "inet:host:0": "needs host and port; write inet:host:port",
    "inet:host:65536": "needs host and port; write inet:host:port",
    "inet:host:-1": "needs host and port; write inet:host:port",
    "inet:host:smtp": "needs host and port; write inet:host:port",
    "inet:host:\u0661": "needs host and port; write inet:host:port",
    "inet:8891@": "needs host and port; write inet:host:port",
    "inet6:[]:8891": "needs host and port; write inet6:host:port",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_address(text: str) -> None:
    address = FilterAddress.parse(text)
    assert (address.path, address.host, address.port) == ADDRESSES[text]
    assert address.text == text


@pytest.mark.parametrize("text", WRONG_ADDRESSES)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"needs|is not") as caught:
        FilterAddress.parse(text)
    assert repr(text) in str(caught.value) and str(caught.value).endswith(WRONG_ADDRESSES[text])


@pytest.mark.anyio
async def test_where_to_connect() -> None:
    for text, where in {
        "unix:/run/milter.sock": "/run/milter.sock",
        "inet:127.0.0.1:8891": ("127.0.0.1", 8891),
        "inet6:[0:0::1]:8891": ("::1", 8891),
    }.items():
        assert await FilterAddress.parse(text).resolved() == [where]
    assert ("127.0.0.1", 8891) in await FilterAddress.parse("inet:localhost:8891").resolved()


# -- connections ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(
    script: Script, *, greeting: bytes = options(), inet: bool = False, timeouts: FilterTimeouts = PLENTY
) -> AsyncIterator[tuple[FilterConnection, ScriptedMilter]]:
    """A connection to a filter with this script, after HELO."""
    async with ScriptedMilter(script, greeting=greeting, inet=inet) as milter:
        connection = FilterConnection(FilterAddress.parse(milter.address), timeouts)
        await connection.open()
        assert await connection.say(connection.mta.connect("client.test", "192.0.2.1", 25)) == Continue()
        assert await connection.say(connection.mta.helo("client.test")) == Continue()
        try:
            yield connection, milter
        finally:
            connection.close()
            await milter.gone()


async def begin(connection: FilterConnection) -> None:
    """A message up to its body."""
    mta = connection.mta
    events: list[Callable[[], bytes]] = [
        lambda: mta.mail("<a@x.test>"),
        lambda: mta.rcpt("<b@x.test>"),
        mta.data,
        lambda: mta.header(b"X", b" y"),
        mta.eoh,
    ]
    for event in events:
        assert await connection.say(event()) == Continue()


async def ended(connection: FilterConnection) -> list[Verdict | Modification | Unasked]:
    """What the filter says to the end of a message."""
    return [said async for said in connection.end_of_message(connection.mta.end_of_message())]


@pytest.mark.anyio
@pytest.mark.parametrize("inet", [False, True], ids=["unix", "inet"])
async def test_a_message(inet: bool) -> None:
    changes = Answer(quarantine(b"why"), add_header(b"X", b"y"), PROGRESS, replace_body(b"new"), ACCEPT)
    async with opened({"eom": changes}, inet=inet) as (connection, milter):
        await begin(connection)
        assert await connection.say(connection.mta.body(b"body"), content=True) == Continue()
        assert await ended(connection) == [Quarantine("why"), AddHeader(b"X", b" y"), ReplaceBody(b"new"), Accept()]
        connection.abort()
        assert connection.usable
        await begin(connection)
        connection.abort()
        connection.close()
        connection.close()
        assert not connection.usable
        await milter.gone()
        twice = ["mail", "rcpt", "data", "header", "eoh", "body", "eom", "abort"]
        assert milter.events() == ["optneg", "connect", "helo", *twice, *twice[:5], "abort", "quit"]


@pytest.mark.anyio
@pytest.mark.parametrize("inet", [False, True], ids=["unix", "inet"])
async def test_the_end_of_a_message_is_acknowledged_at_once_over_tcp(
    inet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TCP_QUICKACK after the packet that ends a message, and only where there is TCP."""

    class Sock:
        def __init__(self) -> None:
            self.set: list[tuple[int, int, int]] = []

        def setsockopt(self, *option: int) -> None:
            self.set.append((option[0], option[1], option[2]))

    async with opened({}, inet=inet) as (connection, _):
        assert (connection._sock is not None) == inet
        sock = Sock()
        if inet:
            monkeypatch.setattr(connection, "_sock", sock)
        for count in (1, 2):
            await begin(connection)
            quick = [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)]
            assert sock.set == quick * (count - 1) * inet
            assert await ended(connection) == [Continue()]
            assert sock.set == quick * count * inet
            connection.abort()


@pytest.mark.anyio
@pytest.mark.parametrize("version", [2, 3, 4, 6])
async def test_the_version_that_is_offered(version: int) -> None:
    async with ScriptedMilter(greeting=options(version=2)) as milter:
        connection = FilterConnection(FilterAddress.parse(milter.address), PLENTY)
        await connection.open(version)
        connection.close()
    actions = {2: 0x3F, 3: 0x3F, 4: 0x3F, 6: 0x1FF}[version]
    assert [(offered, said & actions) for offered, said, _ in milter.offers] == [(version, actions)]


@pytest.mark.anyio
async def test_changes_that_were_not_agreed_upon_are_told_and_dropped() -> None:
    greeting = options(actions=int(Action.ADDHDRS))
    async with opened({"eom": Answer(add_recipient(b"<c@x.test>"), ACCEPT)}, greeting=greeting) as (connection, _):
        assert connection.mta.actions == Action.ADDHDRS
        await begin(connection)
        assert await ended(connection) == [Unasked(Action.ADDRCPT), Accept()]


# -- its loss -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_filter_that_cannot_be_reached() -> None:
    port = free_port()
    texts = {f"inet:127.0.0.1:{port}": "cannot connect: ", "unix:/nowhere/milter.sock": "cannot connect: "}
    for text, why in texts.items():
        connection = FilterConnection(FilterAddress.parse(text), PLENTY)
        assert not connection.usable  # nor is one that was never opened
        connection.abort()
        with pytest.raises(FilterLost, match=f"^filter {text}: {why}") as caught:
            await connection.open()
        assert connection.lost == str(caught.value) and not connection.usable
        connection.close()


@pytest.mark.anyio
async def test_the_loss_of_a_filter_is_an_error_of_the_system_for_whoever_asks() -> None:
    """`gateway.testing.conformance` and others take it for a helper that is away."""
    assert issubclass(FilterLost, OSError) and str(FilterLost("filter x: gone")) == "filter x: gone"


LOSSES: dict[str, tuple[Script, FilterTimeouts, str]] = {
    "closes": ({"mail": Close()}, PLENTY, "closed the connection"),
    "hangs at a command": ({"mail": Hang()}, FilterTimeouts(10.0, 0.05, 10.0), "no answer within 0.05s"),
    "says that it failed": ({"mail": Answer(CONNECTION_FAILED)}, PLENTY, "says that it failed"),
    "breaks the protocol": ({"mail": Answer(add_header(b"X", b"y"))}, PLENTY, "ADDHEADER in reply to MAIL"),
    "no packet": ({"mail": Answer(b"\0\0\0\0")}, PLENTY, "packet of length 0"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", LOSSES)
async def test_a_filter_is_lost(name: str) -> None:
    script, timeouts, why = LOSSES[name]
    async with opened(script, timeouts=timeouts) as (connection, milter):
        with pytest.raises(FilterLost) as caught:
            await connection.say(connection.mta.mail("<a@x.test>"))
        assert str(caught.value).startswith(f"filter {milter.address}: {why}")
        assert connection.lost == str(caught.value) and not connection.usable
        connection.abort()  # nothing to say any more


@pytest.mark.anyio
async def test_content_has_a_clock_of_its_own() -> None:
    late = FilterTimeouts(10.0, 10.0, 0.05)
    async with opened({"body": Hang()}, timeouts=late) as (connection, _):
        await begin(connection)
        with pytest.raises(FilterLost, match=r"no answer within 0\.05s"):
            await connection.say(connection.mta.body(b"x"), content=True)
    async with opened({"eom": Hang()}, timeouts=late) as (connection, _):
        await begin(connection)
        with pytest.raises(FilterLost, match=r"no answer within 0\.05s"):
            await ended(connection)


@pytest.mark.anyio
async def test_a_filter_that_takes_nothing_is_not_waited_for_without_end() -> None:
    """It promised no replies to body packets, and reads none."""
    greeting, stop = options(protocol=PROMISES["body"]), asyncio.Event()
    script: Script = {"eoh": [Answer(CONTINUE), Wait(stop)]}
    async with opened(script, greeting=greeting, timeouts=FilterTimeouts(10.0, 10.0, 0.1)) as (connection, _):
        await begin(connection)
        with pytest.raises(FilterLost, match=r"takes nothing for 0\.1s"):
            for _ in range(1000):
                await connection.say(connection.mta.body(b"x" * 65_535), content=True)
        stop.set()


@pytest.mark.anyio
@pytest.mark.parametrize(("what", "why"), [(Answer(ACCEPT), "spoke when no reply was due"), (Close(), "closed the conn")])
async def test_what_comes_unasked_is_not_the_answer_to_the_next_event(what: Answer | Close, why: str) -> None:
    """It is noticed before anything is said, at the end of a message too."""
    now = asyncio.Event()
    async with opened({"body": [Answer(CONTINUE), Wait(now), what], "eom": Answer(REJECT)}) as (connection, milter):
        await begin(connection)
        assert await connection.say(connection.mta.body(b"x"), content=True) == Continue()
        assert connection.usable
        now.set()
        await connection.wire.wait_readable()
        assert not connection.usable
        with pytest.raises(FilterLost, match=why):
            await ended(connection)
        await milter.gone()
        assert "eom" not in milter.events()


@pytest.mark.anyio
async def test_what_comes_behind_a_verdict_is_left_with_the_connection() -> None:
    async with opened({"eom": Answer(REJECT, add_header(b"X", b"late"))}) as (connection, _):
        await begin(connection)
        assert await ended(connection) == [Reject()]
        assert not connection.usable and "speaks when no reply is due" in connection.lost


@pytest.mark.anyio
async def test_an_answer_that_nobody_waits_for_any_more_ends_the_connection() -> None:
    async with opened({"rcpt": Hang()}) as (connection, milter):
        await connection.say(connection.mta.mail("<a@x.test>"))
        waiting = asyncio.ensure_future(connection.say(connection.mta.rcpt("<b@x.test>")))
        await milter.reached("rcpt")
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not connection.usable
        with pytest.raises(LocalError, match="a reply is due"):
            connection.mta.data()
        connection.abort()
        assert connection.lost
        await milter.gone()


@pytest.mark.anyio
async def test_macros_for_a_filter_that_asks_for_none() -> None:
    lists = {Stage.MAIL: ("{mine}", "i")}
    async with ScriptedMilter() as milter:
        connection = FilterConnection(FilterAddress.parse(milter.address), PLENTY, lists)
        await connection.open()
        connection.mta.macros(Stage.MAIL, {"mine": "1", "i": "id", "j": "host"})
        await connection.say(connection.mta.mail("<a@x.test>"))
        assert milter.macros("mail") == {b"{mine}": b"1", b"i": b"id"}
        connection.close()
        await milter.gone()
