"""The content grade where a transcript does not reach: any message through any chain, large ones, stages in each other's way."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway import AppendHeader, Edit, Edits, Kind, Message, Refuse, Session, Stage, Transaction
from gateway.observe import logs
from gateway.protocol.content import DotStuffer
from gateway.protocol.headers import parse_header
from gateway.relay.spool import HIGH, Spool
from gateway.testing.gateway import Gateway, free_port, running
from tests.dialogue.obliging import Client, ObligingUpstream, between
from tests.dialogue.stages import STAGES

LIMIT = 30.0

# -- who changes nothing

LINES = st.sampled_from(
    [
        b"",
        b".",
        b"..",
        b".x",
        b"A: 1",
        b"a : 2",
        b" fold",
        b"\tfold",
        b"no field",
        b"Received: x",
        b"\0\xff",
        b"x" * 990,
    ]
)
CONTENTS = st.lists(LINES, max_size=12).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
STAGE = st.fixed_dictionaries(
    {
        "read": st.sampled_from(["nothing", "headers", "body", "whole"]),
        "edits": st.sampled_from(["none", "none", "head", "any"]),
        "only": st.just("never"),
        "keep": st.sampled_from(["", "written in vain"]),
    }
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    CONTENTS,
    st.lists(STAGE, min_size=1, max_size=4),
    st.lists(st.integers(0, 2000), max_size=6),
    st.sampled_from(["auto", "always"]),
    st.booleans(),
)
def test_who_changes_nothing_changes_no_octet(
    content: bytes, stages: list[dict[str, str]], cuts: list[int], spool: str, bdat: bool
) -> None:
    """Whatever reads and might edit: the upstream has the octets that it would have had without."""
    header, offset = parse_header(content)
    assume(header.end or offset == len(content))  # else the empty line is put in
    asyncio.run(_through(content, stages, cuts, spool, bdat))


async def _through(content: bytes, stages: list[dict[str, str]], cuts: list[int], spool: str, bdat: bool) -> None:
    chain = [{"reads": {"id": f"s{number}", **stage}} for number, stage in enumerate(stages)]
    pipeline = {"spool": {"when": spool, "memory": 100}, "stages": [*chain, "splice"]}
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline) as gateway:
        client = await Client.connected(gateway.port)
        assert await client.code() == "220"
        for command in ("EHLO c", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>"):
            assert await client.say(command) == "250"
        stuffed = DotStuffer().feed(content)
        if bdat:
            edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
            pieces = [content[start:stop] for start, stop in pairwise(edges)]
            for piece in pieces[:-1]:
                await client.send(b"BDAT %d\r\n" % len(piece) + piece)
                assert await client.code() == "250"
            await client.send(b"BDAT %d LAST\r\n" % len(pieces[-1]) + pieces[-1])
        else:
            assert await client.say("DATA") == "354"
            edges = [0, *sorted(min(cut, len(stuffed)) for cut in cuts), len(stuffed)]
            for start, stop in pairwise(edges):
                await client.send(stuffed[start:stop])
            await client.send(b".\r\n")
        assert await client.code() == "250"
        assert upstream.contents == [b"\r\n" + stuffed]
        assert gateway.pipeline.served is not None and gateway.pipeline.served.spool.used == 0
        assert await client.say("QUIT") == "221"
        client.leave()


# -- large messages


class Counts(Stage):
    """Reads all and keeps nothing; says how much it was."""

    kind = Kind.CHECK

    def edits(self, transaction: Transaction) -> Edits:
        return "any"

    async def message(self, session: Session, message: Message) -> Edit:
        size = 0
        async for block in message.blocks():
            size += len(block)
        return Edit([AppendHeader("X-Size", str(size))])


class Waits(Stage):
    """Reads one block, then nothing before it is told to go on."""

    kind = Kind.CHECK
    go_on: asyncio.Event
    body = 0

    async def message(self, session: Session, message: Message) -> None:
        async for block in message.blocks():
            if not Waits.body:
                await Waits.go_on.wait()
            Waits.body += len(block)


class Sink:
    """An upstream that keeps of a message its size and first lines, and what memory this process had meanwhile."""

    def __init__(self) -> None:
        self.head = b""
        self.size = 0
        self.memory = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 sink\r\n")
        while line := await reader.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                writer.write(b"354 go\r\n")
                await self._content(reader)
            writer.write(b"250 ok\r\n")
            if verb == b"QUIT":
                break
        writer.close()

    async def _content(self, reader: asyncio.StreamReader) -> None:
        tail = b""
        while not tail.endswith(b"\r\n.\r\n"):
            block = await reader.read(1 << 18)
            if not block:
                raise ConnectionError
            self.head += block[: 200 - len(self.head)] if len(self.head) < 200 else b""
            self.size += len(block)
            self.memory = max(self.memory, resident())
            tail = tail[-4:] + block[-5:]


def resident() -> int:
    """Octets of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def before_sink(pipeline: Mapping[str, object]) -> AsyncIterator[tuple[Sink, Gateway, Client]]:
    """A gateway in front of a sink, and a client that is about to send content."""
    sink = Sink()
    server = await asyncio.start_server(sink.connected, "127.0.0.1", 0)
    url = f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    whole = {
        "relay": "open",
        "limits": {"message_size": "1GiB"},
        "upstreams": {"mta": {"servers": [url], "capabilities": {"assume": ["PIPELINING"]}}},
        **pipeline,
    }
    async with running(whole, stages={**STAGES, "counts": Counts, "waits": Waits}) as gateway:
        client = await Client.connected(gateway.port)
        assert await client.code() == "220"
        for command in ("EHLO c", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>"):
            assert await client.say(command) == "250"
        assert await client.say("DATA") == "354"
        yield sink, gateway, client
        assert gateway.pipeline.served is not None and gateway.pipeline.served.spool.used == 0
        client.leave()
        await gateway.idle()
    server.close()


BLOCK = (b"x" * 98 + b"\r\n") * 10_000


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
async def test_a_large_message_that_is_edited_stays_out_of_memory() -> None:
    async with before_sink({"stages": ["counts", "splice"]}) as (sink, _, client):
        await client.send(b"Subject: x\r\n\r\n")
        before = resident()
        for _ in range(200):
            client.writer.write(BLOCK)
            await client.writer.drain()
        await client.send(b".\r\n")
        async with asyncio.timeout(LIMIT):
            assert (await client.reader.readline())[:3] == b"250"
        assert sink.head.startswith(b"Subject: x\r\nX-Size: 200000000\r\n\r\nxxx")
        assert sink.size == 200_000_000 + len(b"Subject: x\r\nX-Size: 200000000\r\n\r\n.\r\n")
        assert sink.memory - before < 32 << 20


@pytest.mark.anyio
async def test_a_slow_reader_holds_the_client_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only live readers need is neither kept beyond a bound nor put into a file; the upstream waits with them."""
    Waits.go_on, Waits.body = asyncio.Event(), 0
    held, room = asyncio.Event(), Spool.room
    seen: list[tuple[int, bool]] = []

    async def watched(spool: Spool) -> None:
        if not spool._fits(HIGH):
            seen.append((spool.size - spool._kept, spool.in_file))
            held.set()
        await room(spool)

    monkeypatch.setattr(Spool, "room", watched)
    async with before_sink({"stages": ["waits", {"reads": {"read": "headers"}}, "splice"]}) as (sink, _, client):
        await client.send(b"Subject: x\r\n\r\n")
        sending = asyncio.create_task(client.send(BLOCK * 20 + b".\r\n"))
        async with asyncio.timeout(LIMIT):
            await held.wait()
            assert seen == [(seen[0][0], False)] and HIGH < seen[0][0] <= HIGH + (1 << 18)
            assert Waits.body == 0 and not sending.done() and sink.size <= seen[0][0] + 100
            Waits.go_on.set()
            await sending
            assert (await client.reader.readline())[:3] == b"250"
        assert Waits.body == 20 * len(BLOCK) and sink.size == 20 * len(BLOCK) + len(b"Subject: x\r\n\r\n.\r\n")
        assert not any(in_file for _, in_file in seen)


# -- one stage and another


class Cleans(Stage):
    """Takes a while to stop when it is cancelled, and notes when it did."""

    kind = Kind.CHECK
    notes: list[str]

    async def message(self, session: Session, message: Message) -> Refuse | None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.notes.append("cleaned")
        return None

    def mail(self, session: Session, transaction: Transaction) -> None:
        self.notes.append("mail")

    def reset(self, session: Session, transaction: Transaction) -> None:
        self.notes.append("reset")

    def close(self, session: Session) -> None:
        self.notes.append("close")


@pytest.mark.anyio
@pytest.mark.parametrize("ends", ["bare", "RSET", "EHLO c", "QUIT", "leave", "reset"])
async def test_a_stage_has_stopped_before_it_hears_of_the_end(ends: str) -> None:
    """What it does for a message that is given up is over when `reset` comes, and so before the next message."""
    Cleans.notes = []
    pipeline = {"stages": ["cleans", {"reads": {"edits": "any"}}, "splice"]}
    async with ObligingUpstream().listening() as upstream:
        url = f"smtp://127.0.0.1:{upstream.port}"
        whole = {"relay": "open", "upstreams": {"mta": {"servers": [url], "capabilities": {"assume": []}}}, **pipeline}
        async with running(whole, stages={**STAGES, "cleans": Cleans}) as gateway:
            client = await Client.connected(gateway.port)
            assert await client.code() == "220"
            for command in ("EHLO c", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>"):
                assert await client.say(command) == "250"
            await client.send(b"BDAT 9\r\nA: b\r\n\r\nx")
            assert await client.code() == "250"
            if ends == "bare":
                await client.send(b"BDAT 2 LAST\r\n\nx")
                assert await client.code() == "550"
            elif ends not in ("leave", "reset"):
                assert await client.say(ends) == ("221" if ends == "QUIT" else "250")
            if ends in ("bare", "RSET", "EHLO c"):
                assert Cleans.notes == ["mail", "cleaned", "reset"]
                assert await client.say("MAIL FROM:<c@example.org>") == "250"
                assert Cleans.notes[3:] == ["mail"]
                assert await client.say("RSET") == "250"
            if ends == "reset":
                client.leave()
            client.writer.close()
            await gateway.idle()
            assert Cleans.notes[:3] == ["mail", "cleaned", "reset"] and Cleans.notes[-1] == "close"
        assert upstream.contents == []


@pytest.mark.anyio
async def test_a_slow_client_costs_no_stage_its_time() -> None:
    """The time-out of a stage is shorter than the client's pause, which a Hold in another session measures."""
    chain = [
        {"says": {"at": "rcpt", "only": "wait", "hold": 0.3}},
        {"reads": {"id": "body", "timeout": "150ms"}},
        {"reads": {"id": "whole", "read": "whole", "edits": "any", "add": "X-A: 1", "timeout": "150ms"}},
        "splice",
    ]
    async with ObligingUpstream().listening() as upstream, between(upstream, {"stages": chain}) as gateway:
        slow, clock = await Client.connected(gateway.port), await Client.connected(gateway.port)
        for client in (slow, clock):
            assert await client.code() == "220"
            for command in ("EHLO c", "MAIL FROM:<a@example.org>"):
                assert await client.say(command) == "250"
        assert await slow.say("RCPT TO:<b@example.org>") == "250"
        assert await slow.say("DATA") == "354"
        await slow.send(b"Subject: x\r\n\r\nfirst\r\n")
        assert await clock.say("RCPT TO:<wait@example.org>") == "250"
        await slow.send(b"last\r\n.\r\n")
        assert await slow.code() == "250"
        assert upstream.contents == [b"\r\nX-A: 1\r\nSubject: x\r\n\r\nfirst\r\nlast\r\n"]
        slow.leave()
        clock.leave()


# -- what the log says


@pytest.mark.anyio
async def test_records_name_who_refused_and_who_edited(tmp_path: Path) -> None:
    """`edited` only where somebody got what was edited; each recipient that was refused by itself with its stage."""
    chain = [
        {"reads": {"id": "edits", "edits": "any", "add": "X-A: 1"}},
        {"reads": {"id": "one", "only": "named", "recipients": {0: "550 5.7.1 not for b"}}},
        {"reads": {"id": "two", "only": "named", "recipients": {1: "550 5.7.1 not for c"}}},
        {"reads": {"id": "eggs", "only": "eggs", "refuse": "content"}},
        {"reads": {"id": "gone", "only": "gone", "throws": "thrown", "discard": "accept"}},
        "splice",
    ]
    records: list[tuple[object, ...]] = []
    logs.configure("json", "info", file=str(tmp_path / "log"))
    try:
        async with ObligingUpstream().listening() as upstream:
            pipeline = {"stages": chain, "listen": [f"lmtp://127.0.0.1:{free_port()}"]}
            async with between(upstream, pipeline) as gateway:
                client = await Client.connected(gateway.port)
                assert await client.code() == "220"
                assert await client.say("LHLO c") == "250"
                for sender, word in (("a", "fine"), ("a", "named"), ("a", "eggs"), ("a", "gone"), ("spam", "fine")):
                    assert await client.say(f"MAIL FROM:<{sender}@example.org>") == "250"
                    for recipient in "bcd":
                        assert await client.say(f"RCPT TO:<{recipient}@example.org>") == "250"
                    assert await client.say("DATA") == "354"
                    await client.send(f"Subject: {word}\r\n.\r\n".encode())
                    records.append(tuple([await client.code() for _ in range(3)]))
                client.leave()
    finally:
        logs.configure("json", "info")
    assert records == [("250",) * 3, ("550", "550", "250"), ("554",) * 3, ("250",) * 3, ("554",) * 3]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line.get("edited") for line in lines if line["record"] == "transaction"] == [
        ["edits"],
        ["edits"],
        None,
        None,
        None,
    ]
    refusals = [(line["stage"], line["reply"][:3]) for line in lines if line["record"] == "refusal"]
    assert refusals == [("one", "550"), ("two", "550"), ("eggs", "554")]
    assert [line["stage"] for line in lines if line["record"] == "discard"] == ["gone"]
