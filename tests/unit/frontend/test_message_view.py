"""What a stage reads of a body whose dots are stuffed, wherever it is cut and whatever the writer knows of dots."""

from __future__ import annotations

import asyncio
from itertools import combinations

import pytest

from gateway.frontend.draft import Draft
from gateway.frontend.message_view import MessageView
from gateway.protocol.content import DataScanner
from gateway.protocol.headers import parse_header
from gateway.relay.spool import Spool, SpoolFull, SpoolSpace
from gateway.session import Transaction
from gateway.verdicts import AddHeader, DeleteHeader, ReplaceBody

pytestmark = pytest.mark.anyio

WIRE = b"A: 1\r\n\r\nx\r\n..\r\n...y\r\n.\r\n"
BODY = b"x\r\n.\r\n..y\r\n"


@pytest.mark.parametrize("told", [True, False])
async def test_stuffed_dots_are_gone_wherever_the_body_is_cut(told: bool) -> None:
    header, offset = parse_header(WIRE)
    for first, second in combinations(range(offset, len(WIRE) + 1), 2):
        spool, scanner, transaction = Spool(SpoolSpace()), DataScanner(), Transaction("", "", ())
        spool.reader(0, waiting=True)
        spool.write(scanner.feed(WIRE[:offset]).content)
        view = MessageView(Draft(header, spool, offset, transaction, SpoolSpace()), transaction)
        reading = asyncio.create_task(read(view))
        for block in filter(None, (WIRE[offset:first], WIRE[first:second], WIRE[second:])):
            content = scanner.feed(block).content
            spool.dotless = told and scanner.size == spool.size + len(content)
            spool.write(content)
            await asyncio.sleep(0)
        spool.end()
        assert await reading == BODY, (first, second)
        spool.close()


async def read(view: MessageView) -> bytes:
    return b"".join([block async for block in view.blocks()])


class Place:
    """A view of a message that comes, and what writes it."""

    def __init__(self, head: bytes = b"A: 1\r\n\r\n", space: SpoolSpace | None = None) -> None:
        self.space = space or SpoolSpace()
        self.spool = Spool(self.space)
        self.kept = self.spool.reader(waiting=True)
        self.spool.write(head)
        header, offset = parse_header(head)
        transaction = Transaction("", "", ())
        self.draft = Draft(header, self.spool, offset, transaction, self.space)
        self.view = MessageView(self.draft, transaction)

    def close(self) -> None:
        """All is over; nothing may be left."""
        self.view.close()
        self.draft.close()
        self.spool.close()
        assert self.space.used == 0


async def test_the_clock_stands_still_while_the_client_is_waited_for() -> None:
    place = Place()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(1000) as clock:
        place.view.clock = clock
        limit = clock.when()
        assert limit is not None
        reading = asyncio.create_task(read(place.view))
        await asyncio.sleep(0)
        assert clock.when() is None
        place.spool.write(b"body\r\n")
        await asyncio.sleep(0)
        place.spool.end()
        assert await reading == b"body\r\n"
        ended = clock.when()
        assert ended is not None and limit <= ended <= loop.time() + 1000
        assert place.view.waited == pytest.approx(ended - limit)
    place.close()


async def test_what_is_there_costs_no_wait() -> None:
    place = Place()
    place.spool.write(b"x" * 100_000)
    place.spool.end()
    assert [len(block) async for block in place.view.blocks()] == [65_535, 34_465]
    assert place.view.waited == 0.0
    place.close()


async def test_the_body_is_read_once() -> None:
    place = Place()
    place.spool.end()
    assert await read(place.view) == b""
    with pytest.raises(RuntimeError, match="read already"):
        await read(place.view)
    with pytest.raises(RuntimeError, match="read already"):
        await place.view.open()
    place.close()


@pytest.mark.parametrize(
    ("head", "body", "whole"),
    [
        (b"A: 1\r\n\r\n", b"..x\r\n", b"A: 1\r\n\r\n.x\r\n"),
        (b"A: 1\r\n\r\n", b"", b"A: 1\r\n\r\n"),
        (b"A: 1\r\n", b"", b"A: 1\r\n"),
        (b"", b"", b""),
    ],
)
async def test_the_whole_as_a_file(head: bytes, body: bytes, whole: bytes) -> None:
    """To read and to seek, until the stage has answered."""
    place = Place(head, SpoolSpace(memory=1))
    opening = asyncio.create_task(place.view.open())
    await asyncio.sleep(0)
    assert not opening.done()
    place.spool.write(body)
    place.spool.end()
    file = await opening
    assert file.read() == whole
    file.seek(len(whole) // 2)
    assert file.read(3) == whole[len(whole) // 2 :][:3]
    place.view.close()
    file.seek(0)
    if whole:
        with pytest.raises(ValueError, match="closed"):
            file.read(1)
    place.close()


async def test_an_editor_that_answers_first_changes_nothing_for_who_reads_before_it() -> None:
    place = Place()
    place.spool.write(b"old\r\n")
    place.spool.end()
    after = place.view
    place.draft.apply([AddHeader("X", "1"), ReplaceBody(b"new")])
    assert [field.name for field in (await after.headers()).fields] == ["A"] and await read(after) == b"old\r\n"
    next_view = MessageView(place.draft, Transaction("", "", ()))
    place.draft.apply([DeleteHeader("A"), ReplaceBody(b"newer")])
    assert [field.name for field in (await next_view.headers()).fields] == ["X", "A"]
    assert await read(next_view) == b"new\r\n"
    next_view.close()
    place.close()


async def test_the_header_is_a_copy() -> None:
    place = Place()
    (await place.view.headers()).fields.clear()
    assert (await place.view.headers()).count("A") == 1 and not place.draft.changed
    place.close()


async def test_a_body_that_is_not_used_is_kept_for_nobody() -> None:
    place = Place(space=SpoolSpace(memory=1))
    used, unused = place.view.new_body(), place.view.new_body()
    used.write(b"one\r\n")
    unused.write(b"two\r\n")
    assert place.space.used == 18
    place.draft.apply([ReplaceBody(used)])
    place.view.close()
    assert place.space.used == 13
    place.close()


async def test_no_room() -> None:
    """A body is a file to its writer; the whole message is not there at all."""
    place = Place(space=SpoolSpace(memory=100, total=150))
    with pytest.raises(OSError, match="no room for a new body"):
        place.view.new_body().write(b"x" * 200)
    place.spool.write(b"x" * 100)
    place.spool.end()
    with pytest.raises(SpoolFull):
        await place.view.open()
    place.close()


async def test_a_body_that_comes_too_late_takes_no_room() -> None:
    """A filter that hangs may ask for one when the message is long over."""
    place = Place()
    place.view.close()
    with pytest.raises(RuntimeError, match="over"):
        place.view.new_body()
    place.close()
