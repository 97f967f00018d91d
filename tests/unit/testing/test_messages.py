"""The messages that stages are tested with: what a stage reads of one, and what an edit makes of it."""

from __future__ import annotations

import pytest

from gateway import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    ChangeHeader,
    DeleteHeader,
    Edit,
    InsertHeader,
    Operation,
    ReplaceBody,
)
from gateway.testing.messages import edited, make_message
from gateway.testing.stages import make_session, make_transaction

pytestmark = pytest.mark.anyio

CONTENT = b"A: 1\r\nB: 2\r\nA: 3\r\n\r\nBody\r\n..\r\n"


async def test_a_message_opens_a_transaction_unless_one_is_open() -> None:
    session = make_session()
    message = make_message(session, CONTENT)
    assert message.transaction is session.transaction
    transaction = make_transaction(session)
    assert make_message(session, CONTENT).transaction is transaction


@pytest.mark.parametrize("block", [1, 3, 65536])
async def test_blocks_are_the_body_and_size_counts_what_came(block: int) -> None:
    message = make_message(make_session(), CONTENT, block=block)
    assert message.size == 0
    header = await message.headers()
    assert [field.text for field in header.fields] == ["1", "2", "3"]
    assert message.size == CONTENT.index(b"Body")
    body, sizes = b"", []
    async for one in message.blocks():
        assert 0 < len(one) <= block
        body += one
        sizes.append(message.size)
    assert body == b"Body\r\n..\r\n"
    assert sizes == sorted(set(sizes)) and sizes[-1] == message.size == len(CONTENT)


@pytest.mark.parametrize("content", [b"", b"A: 1\r\n", b"A: 1\r\n\r\n"])
async def test_an_empty_body_has_no_blocks(content: bytes) -> None:
    message = make_message(make_session(), content)
    assert [one async for one in message.blocks()] == []
    assert message.size == len(content)


async def test_the_header_is_a_copy() -> None:
    message = make_message(make_session(), CONTENT)
    (await message.headers()).delete("A", 1)
    assert (await message.headers()).count("A") == 2


async def test_the_whole_is_a_file() -> None:
    message = make_message(make_session(), CONTENT)
    with await message.open() as file:
        assert file.read() == CONTENT
        assert file.seek(0) == 0
    assert message.size == len(CONTENT)


@pytest.mark.parametrize("first", ["blocks", "open"])
@pytest.mark.parametrize("second", ["blocks", "open"])
async def test_the_body_is_read_once(first: str, second: str) -> None:
    message = make_message(make_session(), CONTENT)

    async def read(how: str) -> None:
        if how == "open":
            await message.open()
        else:
            assert [one async for one in message.blocks()]

    await read(first)
    with pytest.raises(RuntimeError, match="read already"):
        await read(second)


@pytest.mark.parametrize(
    ("operations", "content"),
    [
        ([], CONTENT),
        ([AddHeader("X", "1"), AddHeader("Y", "2")], b"Y: 2\r\nX: 1\r\n" + CONTENT),
        ([InsertHeader(1, "X", "1", leading_space=False)], b"A: 1\r\nX:1\r\nB: 2\r\nA: 3\r\n\r\nBody\r\n..\r\n"),
        ([InsertHeader(99, "X", "1"), AppendHeader("Y", "2")], b"A: 1\r\nB: 2\r\nA: 3\r\nX: 1\r\nY: 2\r\n\r\nBody\r\n..\r\n"),
        ([ChangeHeader("a", "\xfc\r\n\tx", 2)], b"A: 1\r\nB: 2\r\na: \xc3\xbc\r\n\tx\r\n\r\nBody\r\n..\r\n"),
        ([ChangeHeader("A", "4", 3)], b"A: 1\r\nB: 2\r\nA: 3\r\nA: 4\r\n\r\nBody\r\n..\r\n"),
        ([DeleteHeader("a", 2), DeleteHeader("C")], b"A: 1\r\nB: 2\r\n\r\nBody\r\n..\r\n"),
        ([DeleteHeader("a", 0)], b"B: 2\r\n\r\nBody\r\n..\r\n"),
        ([ReplaceBody(b"x\ny\rz")], b"A: 1\r\nB: 2\r\nA: 3\r\n\r\nx\r\ny z\r\n"),
        ([ReplaceBody(b""), AddRecipient("a@example.net")], b"A: 1\r\nB: 2\r\nA: 3\r\n\r\n"),
    ],
)  # fmt: skip
def test_edits(operations: list[Operation], content: bytes) -> None:
    assert edited(CONTENT, Edit(operations)) == content


def test_a_body_that_gets_a_header_is_parted_from_it() -> None:
    assert edited(b"no field\r\n", Edit([AddHeader("X", "1")])) == b"X: 1\r\n\r\nno field\r\n"
    assert edited(b"A: 1\r\n", Edit([ReplaceBody(b"x")])) == b"A: 1\r\n\r\nx\r\n"


def test_a_body_may_be_written_in_pieces() -> None:
    body = make_message(make_session(), CONTENT).new_body()
    body.write(b".\r")
    body.write(b"\nx")
    assert edited(b"A: 1\r\n\r\nold\r\n", Edit([ReplaceBody(body)])) == b"A: 1\r\n\r\n.\r\nx\r\n"
