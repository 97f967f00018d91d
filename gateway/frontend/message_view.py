"""A message as one stage sees it: `gateway.Message` over the spool in which the content arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, BinaryIO, cast

from gateway.frontend.draft import Draft, SpooledBody
from gateway.message import NewBody
from gateway.protocol.content import DotUnstuffer
from gateway.protocol.headers import Header
from gateway.relay.spool import Spool
from gateway.stage import Timed

if TYPE_CHECKING:
    from gateway.session import Transaction

BLOCK = 65_535  # the largest block that any filter takes (milter)


class MessageView(Timed):
    """One stage's reading of a draft."""

    __slots__ = ("_bodies", "_closed", "_draft", "_header", "_opened", "_reader", "_spool", "_transaction", "_whole")

    def __init__(self, draft: Draft, transaction: Transaction) -> None:
        super().__init__()
        self._draft = draft
        self._header = draft.header.copy()  # a stage that edits may answer before this one reads
        self._transaction = transaction
        self._spool = draft.body
        self._reader = self._spool.reader(draft.offset)
        self._opened = self._closed = False
        self._whole: Spool | None = None
        self._bodies: list[SpooledBody] = []

    @property
    def transaction(self) -> Transaction:
        """See `gateway.Message`."""
        return self._transaction

    @property
    def size(self) -> int:
        """See `gateway.Message`."""
        return self._transaction.size

    async def headers(self) -> Header:
        """See `gateway.Message`."""
        return self._header.copy()

    async def blocks(self) -> AsyncIterator[bytes]:
        """See `gateway.Message`."""
        if self._opened:
            raise RuntimeError("the body was read already; read the whole with open() instead")
        self._opened = True
        unstuffer, last = DotUnstuffer(), b"\r\n"
        while block := await self._read():
            if self._spool.dotless:  # most large messages; to look for dots would cost more than all else here
                last = (last + block[-2:])[-2:]
                yield block
                continue
            if last:
                unstuffer.feed(last)  # what was not shown to it ended so
                last = b""
            content = unstuffer.feed(block)
            if content:
                yield content

    async def open(self) -> BinaryIO:
        """See `gateway.Message`. Raises SpoolFull."""
        whole = self._whole = Spool(self._draft.space)
        whole.reader(waiting=True)  # everything stays until `close`
        header = self._header
        first = True
        async for block in self.blocks():
            if first:
                whole.write(header.encode(body_follows=True))
                first = False
            whole.write(block)
        if first:
            whole.write(header.encode(body_follows=False))
        whole.end()
        return cast("BinaryIO", whole.file())

    def new_body(self) -> NewBody:
        """See `gateway.Message`. Raises RuntimeError once the stage has answered, or was given up."""
        if self._closed:
            raise RuntimeError("the message is over")  # nobody would give back the room of this body
        body = SpooledBody(self._draft.space)
        self._bodies.append(body)
        return body

    def close(self) -> None:
        """The stage has answered: nothing is kept for it but the body that became the message's."""
        self._closed = True
        self._reader.close()
        if self._whole is not None:
            self._whole.close()
        for body in self._bodies:
            if body not in self._draft.bodies:
                body.spool.close()

    async def _read(self) -> bytes:
        """The next octets; the stage's clock stands still while the client has not sent them."""
        block = self._reader.read_now(BLOCK)
        if block is not None:
            return block
        with self.client_s_turn(asyncio.get_running_loop().time):
            return await self._reader.read(BLOCK)
