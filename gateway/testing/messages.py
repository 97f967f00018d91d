"""Messages for the unit tests of stages that look at content, and what an `Edit` makes of one.

    session = make_session()
    message = make_message(session, b"Subject: hi\\r\\n\\r\\nText\\r\\n")
    verdict = await stage.message(session, message)
    assert edited(message.content, verdict) == b"X-Seen: yes\\r\\nSubject: hi\\r\\n\\r\\nText\\r\\n"

The content is written as it is: CRLF line ends, no dot-stuffing, no final dot.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import BinaryIO

from gateway.frontend.draft import Draft
from gateway.protocol.content import DotStuffer, DotUnstuffer
from gateway.protocol.headers import Header, parse_header
from gateway.relay.spool import Spool, SpoolSpace
from gateway.session import Session, Transaction
from gateway.testing.stages import make_transaction
from gateway.verdicts import Edit, Operation, ReplaceBody


class FakeNewBody:
    """A body that a stage writes; `content` is what it wrote so far."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.content += data


class FakeMessage:
    """One message whose content lies ready.

    Its body can be read once, by `blocks` or `open`; the second time raises RuntimeError, as in the gateway.
    """

    def __init__(self, transaction: Transaction, content: bytes, block: int) -> None:
        self.content = content
        self._opened = False
        self._transaction = transaction
        self._block = block
        self._header, self._offset = parse_header(content)
        self._size = 0

    @property
    def transaction(self) -> Transaction:
        return self._transaction

    @property
    def size(self) -> int:
        return self._size

    async def headers(self) -> Header:
        """A copy of the header section."""
        self._size = max(self._size, self._offset)
        return self._header.copy()

    async def blocks(self) -> AsyncIterator[bytes]:
        """The body, cut every `block` octets."""
        self._open()
        for at in range(self._offset, len(self.content), self._block):
            self._size = min(at + self._block, len(self.content))
            yield self.content[at : self._size]
        self._size = len(self.content)

    async def open(self) -> BinaryIO:
        """The whole content."""
        self._open()
        self._size = len(self.content)
        return io.BytesIO(self.content)

    def new_body(self) -> FakeNewBody:
        """A body in memory."""
        return FakeNewBody()

    def _open(self) -> None:
        if self._opened:
            raise RuntimeError("the body was read already")
        self._opened = True


def make_message(session: Session, content: bytes, *, block: int = 65536) -> FakeMessage:
    """A message of the session's open transaction (made if there is none), whose body comes in blocks of that size."""
    return FakeMessage(session.transaction or make_transaction(session), content, block)


def edited(content: bytes, edit: Edit) -> bytes:
    """The content after the operations on header and body, made as the gateway makes them.

    Operations on the envelope are checked, and change nothing here. Raises ValueError or LocalError for what has no
    form in a message or in SMTP.
    """
    header, offset = parse_header(content)
    space = SpoolSpace()
    body, stuffer = Spool(space), DotStuffer()
    kept = body.reader(waiting=True)
    body.write(stuffer.feed(content[offset:]) + stuffer.finish())
    body.end()
    draft = Draft(header, body, 0, Transaction("", "", ()), space)
    try:
        draft.apply([_with_octets(operation) for operation in edit.operations])
        reader = draft.body.reader(draft.offset)
        wire = draft.head(())
        while block := reader.read_now():
            wire += block
        reader.close()
    finally:
        draft.close()
        kept.close()
    return DotUnstuffer().feed(wire)


def _with_octets(operation: Operation) -> Operation:
    """What a FakeNewBody was written is the body."""
    if isinstance(operation, ReplaceBody) and isinstance(operation.body, FakeNewBody):
        return ReplaceBody(operation.body.content)
    return operation
