"""A stage for transcripts of the content grade: it reads what its settings say, and says what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from gateway import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    Cause,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    Discard,
    Edit,
    Edits,
    Fact,
    Hold,
    InsertHeader,
    Kind,
    Message,
    Operation,
    Phase,
    Refuse,
    RemoveRecipient,
    ReplaceBody,
    Reply,
    Scope,
    Session,
    Settings,
    Stage,
    Transaction,
    Upstream,
)


class ReadsSettings(Settings):
    """How much of the message, which words move it, and to what."""

    read: Literal["nothing", "headers", "body", "whole"] = "body"
    edits: Edits = "none"
    only: str = ""  # a word of what was read, without which it says nothing
    add: str = ""  # `Name: value` each
    insert: Mapping[str, int] = {}
    append: str = ""
    change: str = ""
    delete: str = ""
    body: str | None = None
    repeat: int = 0  # the new body, so often
    echo: bool = False  # the new body is the old one, in capitals
    add_recipient: Sequence[str] = ()  # may have a NOTIFY behind a blank
    remove_recipient: Sequence[str] = ()
    sender: str | None = None
    route: str = ""
    refuse: str = ""  # the name of a cause
    reply: str = ""
    recipients: Mapping[int, str] = {}  # index to reply
    throws: str = ""  # away: the reason; `discard` is a key of each entry
    hold: float = 0.0
    hang: bool = False
    fail: bool = False
    temporary: bool | None = None
    disconnect: bool = False
    keep: str = ""  # a body that is written and not used


class Reads(Stage):
    """Reads, then gives one verdict. What it saw it leaves in a fact, for the stages behind it."""

    Settings = ReadsSettings
    kind = Kind.CHECK
    settings: ReadsSettings
    facts: ClassVar[tuple[Fact, ...]] = (Fact("saw", "string", "", Phase.MESSAGE, Scope.TRANSACTION, "What it read."),)
    seen: ClassVar[list[tuple[str, bytes]]] = []  # of all of them, for tests

    def edits(self, transaction: Transaction) -> Edits:
        return self.settings.edits

    async def message(
        self, session: Session, message: Message
    ) -> Hold | Refuse | Edit | Discard | Upstream | None:
        said = self.settings
        if said.hang:
            await asyncio.Event().wait()
        if said.keep:
            message.new_body().write(said.keep.encode())
        content = await self._read(message)
        Reads.seen.append((self.id, content))
        session.set_transaction_fact(self, "saw", content.decode("latin-1"))
        if said.fail:
            raise RuntimeError("it fell over")
        if said.only and said.only.encode() not in content:
            return None
        if said.throws:
            return Discard(said.throws)
        if said.recipients:
            replies = {index: Reply.of(text) for index, text in said.recipients.items()}
            return Refuse(Cause.POLICY, recipients=replies)
        if said.refuse or said.reply:
            cause = Cause[said.refuse.upper()] if said.refuse else Cause.CONTENT
            reply = Reply.of(said.reply) if said.reply else None
            return Refuse(cause, temporary=said.temporary, reply=reply, disconnect=said.disconnect)
        if said.hold:
            return Hold(said.hold)
        operations = [*self._header_operations(), *self._other_operations(message, content)]
        to = Upstream(pool=said.route) if said.route else None
        if operations:
            return Edit(operations, to)
        return to

    async def _read(self, message: Message) -> bytes:
        if self.settings.read == "nothing":
            return b""
        if self.settings.read == "whole":
            file = await message.open()
            first = file.read(10)
            file.seek(0)
            content = file.read()
            assert content.startswith(first)
            return content
        header = await message.headers()
        content = header.encode(body_follows=True)
        if self.settings.read == "body":
            content += b"".join([block async for block in message.blocks()])
            assert message.size > 0 or not content.strip()
        return content

    def _header_operations(self) -> list[Operation]:
        said = self.settings
        found: list[Operation] = []
        for kind, text in ((AddHeader, said.add), (AppendHeader, said.append), (ChangeHeader, said.change)):
            for field in filter(None, text.split("; ")):
                name, _, value = field.partition(": ")
                found.append(kind(name, value))
        for field, index in said.insert.items():
            name, _, value = field.partition(": ")
            found.append(InsertHeader(index, name, value))
        found += [DeleteHeader(name, 0) for name in filter(None, said.delete.split("; "))]
        return found

    def _other_operations(self, message: Message, content: bytes) -> list[Operation]:
        said = self.settings
        found: list[Operation] = []
        if said.body is not None and said.repeat:
            body = message.new_body()
            for _ in range(said.repeat):
                body.write(said.body.encode())
            found.append(ReplaceBody(body))
        elif said.body is not None:
            found.append(ReplaceBody(said.body.encode()))
        elif said.echo:
            found.append(ReplaceBody(content.partition(b"\r\n\r\n")[2].upper()))
        for text in said.add_recipient:
            address, _, notify = text.partition(" ")
            found.append(AddRecipient(address, (("NOTIFY", notify),) if notify else ()))
        found += [RemoveRecipient(address) for address in said.remove_recipient]
        if said.sender is not None:
            found.append(ChangeSender(said.sender))
        return found
