"""Ask a milter: rspamd, OpenDKIM, clamav-milter or any other filter that speaks the milter protocol.

```yaml
- milter: "unix:/run/rspamd/milter.sock"
- milter:
    socket: "inet:127.0.0.1:8891"
    when: '!auth.trusted'
    content_timeout: 60s
    on_error: pass
```

The filter hears of each message what Postfix's milter client would tell it, with the same macros, and its verdicts
and changes count as there. Several stand in a chain in the order in which they are asked; each sees what those before
it changed. docs/milter.md compares the two line by line.

One filter connection serves one client session. It is opened at the first MAIL; a filter that decides by the address
or the name of the client wants `connect: early`. A filter that is lost costs the message at hand what `on_error`
says; the next MAIL opens a new connection. A filter that only reads does not hold a message up: the upstream gets the
content as it comes, and the end of it waits for the verdict. `limits.end_of_data_timeout` bounds all waiting behind
the client's end of data, whatever `content_timeout` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from gateway import (
    Cause,
    Discard,
    Duration,
    Edit,
    Edits,
    FilterAddress,
    FilterConnection,
    FilterLost,
    FilterTimeouts,
    Kind,
    Message,
    NewBody,
    Operation,
    Outcome,
    Recipient,
    Refuse,
    ReplaceBody,
    Session,
    Settings,
    Stage,
    TextExpression,
    Transaction,
    Worker,
    connect_macros,
    helo_macros,
    mail_macros,
    rcpt_macros,
    refused_rcpt_macros,
)
from gateway.protocol import milter
from gateway.protocol.milter_mta import MilterMta, Unasked
from stages.filter_words import Held, Quarantine, edits_of, operation, quarantined, refusal
from stages.milter_session import Asked, Filter

_STAGES = {
    "connect": milter.Stage.CONNECT,
    "helo": milter.Stage.HELO,
    "mail": milter.Stage.MAIL,
    "rcpt": milter.Stage.RCPT,
    "data": milter.Stage.DATA,
    "eoh": milter.Stage.EOH,
    "eom": milter.Stage.EOM,
}

MacroStage = Literal["connect", "helo", "mail", "rcpt", "data", "eoh", "eom"]


def _socket(value: str) -> str:
    FilterAddress.parse(value)
    return value


class MilterSettings(Settings):
    """Where the filter is, what it is told, and how long it may take."""

    short_form: ClassVar[str | None] = "socket"

    socket: Annotated[str, AfterValidator(_socket)] = Field(
        description="`unix:/path` or `inet:host:port`; unix sockets are faster."
    )
    connect: Literal["mail", "early"] = Field(
        "mail",
        description="When it is connected: at the first MAIL, or early, for filters that decide on the address of the "
        "client or its HELO.",
    )
    connect_timeout: Duration = Field(30.0, gt=0, description="To connect (milter_connect_timeout).")
    command_timeout: Duration = Field(30.0, gt=0, description="For the answer to a command (milter_command_timeout).")
    content_timeout: Duration = Field(
        300.0, gt=0, description="For the answer to header, body and end of the message (milter_content_timeout)."
    )
    version: Literal[2, 3, 4, 6] = Field(6, description="Version of the protocol that is offered (milter_protocol).")
    macros: Mapping[MacroStage, tuple[str, ...]] = Field(
        {}, description="Names sent at a stage to a filter that asks for none; Postfix's lists by default."
    )
    define: Mapping[str, TextExpression] = Field(
        {}, description="Macros of your own, name to expression over facts; sent at MAIL where `macros` lists them."
    )
    quarantine: Quarantine = Field(
        Held.REFUSE,
        description="For a message that it wants held: refuse it, add the field X-Quarantine, or route:pool.",
    )
    long_fields: Literal["refuse", "skip", "truncate"] = Field(
        "refuse",
        description="Header fields over 64 KiB, which break libmilter filters: refuse the message (552 5.3.4), or do "
        "not show the field, or not its end.",
    )


class Milter(Stage):
    """Let a milter filter decide on mail, and edit it."""

    Settings = MilterSettings
    kind = Kind.CHECK
    timeout = 600.0  # of a call in all; its own clocks are shorter
    settings: MilterSettings

    def __init__(self, settings: MilterSettings) -> None:
        super().__init__(settings)
        self._address = FilterAddress.parse(settings.socket)
        self._timeouts = FilterTimeouts(settings.connect_timeout, settings.command_timeout, settings.content_timeout)
        names = {_STAGES[stage]: listed for stage, listed in settings.macros.items()}
        self._macro_lists = {**milter.DEFAULT_MACROS, **names}

    def phases(self) -> tuple[str, ...]:
        """The filter is not told of the client before its first MAIL unless it is connected early."""
        late = ("mail", "rcpt", "data", "message")
        return ("connect", "helo", *late) if self.settings.connect == "early" else late

    async def start(self, worker: Worker) -> None:
        self._log = worker.log

    # -- the session

    async def connect(self, session: Session) -> Refuse | None:
        return await self._early(session, greeting=True)

    async def helo(self, session: Session, name: str) -> Refuse | None:
        session.state(self, Filter).helo = None
        return await self._early(session)

    async def _early(self, session: Session, *, greeting: bool = False) -> Refuse | None:
        """A filter that is away now may be there at MAIL, where its loss counts."""
        try:
            return await self._ready(session, session.state(self, Filter), greeting=greeting)
        except FilterLost:
            return None

    async def _ready(self, session: Session, filter: Filter, *, greeting: bool = False) -> Refuse | None:
        """Have a connection that knows of client and HELO (at the `greeting`, of the client); its word on them.

        Raises FilterLost.
        """
        connection = filter.connection
        if connection is None or not connection.usable:
            if connection is not None:
                connection.close()
            connection = filter.connection = FilterConnection(self._address, self._timeouts, self._macro_lists)
            filter.helo, filter.over = None, None
            await connection.open(self.settings.version)
            mta, client = connection.mta, session.client
            mta.macros(milter.Stage.CONNECT, connect_macros(session))
            name = client.name or (f"[{client.address}]" if client.address else "localhost")
            filter.answer(await connection.say(mta.connect(name, client.address, client.port)))
        helo = session.helo, session.tls is not None
        if session.helo and helo != filter.helo and filter.over is None and not greeting:
            filter.helo = helo
            connection.mta.macros(milter.Stage.HELO, helo_macros(session))
            filter.answer(await connection.say(connection.mta.helo(session.helo)))
        return None if filter.over is None else refusal(filter.over)

    # -- the envelope

    async def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        filter, asked = session.state(self, Filter), transaction.state(self, Asked)
        if self._was_lost(asked):
            return None
        try:
            refuse = await self._ready(session, filter)
        except FilterLost as lost:
            asked.lost = str(lost)
            raise
        if refuse is not None or isinstance(filter.over, milter.Accept):
            asked.over = True
            return refuse
        assert filter.connection is not None
        mta = filter.connection.mta
        own = {name: str(text.evaluate(session, transaction)) for name, text in self.settings.define.items()}
        mta.macros(milter.Stage.MAIL, {**mail_macros(session, transaction), **own})
        asked.begun, asked.edits = True, edits_of(mta.actions)
        data = mta.mail(f"<{transaction.sender}>", transaction.parameters)
        return await self._tell(session, asked, data, ends=True)

    async def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        connection, asked = self._open_message(session)
        if connection is None:
            return None
        await self._tell_refused(session, connection, asked)
        asked.told.add(recipient.original)
        connection.mta.macros(milter.Stage.RCPT, rcpt_macros(recipient))
        return await self._tell(session, asked, connection.mta.rcpt(f"<{recipient.address}>", recipient.parameters))

    async def data(self, session: Session, transaction: Transaction) -> Refuse | None:
        connection, asked = self._open_message(session)
        if connection is None:
            return None
        await self._tell_refused(session, connection, asked)
        return await self._tell(session, asked, connection.mta.data(), ends=True)

    async def unknown(self, session: Session, command: str) -> Refuse | None:
        filter = session.state(self, Filter)
        connection = filter.connection
        if connection is None or not connection.usable or filter.over is not None:
            return None
        word = command.split(" ", 1)[0]  # as Postfix does; what follows may be a secret
        return refusal(await connection.say(connection.mta.unknown(word.encode("utf-8", "replace"))))

    def settled(self, session: Session, outcome: Outcome) -> None:
        """Filters may ask to hear of refused recipients, too: the next event carries them along."""
        transaction = session.transaction
        if outcome.phase != "rcpt" or outcome.reply is None or transaction is None or not transaction.has_state(self):
            return
        asked = transaction.state(self, Asked)
        if outcome.recipient and outcome.recipient not in asked.told and outcome.reply.code >= 400:
            asked.refused.append((outcome.recipient, outcome.reply))

    async def _tell_refused(self, session: Session, connection: FilterConnection, asked: Asked) -> None:
        """RCPT_REJ: what the filter answers means nothing."""
        refused, asked.refused = asked.refused, []
        if not connection.mta.wants_rejected_recipients:
            return
        for address, reply in refused:
            code, _, text = reply.text.partition(" ")
            connection.mta.macros(milter.Stage.RCPT, refused_rcpt_macros(code, text))
            await self._said(session, asked, connection.mta.rcpt(f"<{address}>"))

    # -- the content

    def edits(self, transaction: Transaction) -> Edits:
        """A filter that agreed on no change, or wants to hear no more, holds nobody up."""
        if not transaction.has_state(self):
            return "any"
        asked = transaction.state(self, Asked)
        return asked.edits if asked.listens else "none"

    async def message(self, session: Session, message: Message) -> Refuse | Edit | Discard | None:
        connection, asked = self._open_message(session)
        if asked.discard:
            return Discard("filter")
        if connection is None:
            return None
        ended = await self._content(session, message, connection, asked)
        if asked.discard:
            return Discard("filter")
        if ended is not None or asked.over:
            return ended
        return await self._end_of_message(session, message, connection, asked)

    async def _content(
        self, session: Session, message: Message, connection: FilterConnection, asked: Asked
    ) -> Refuse | None:
        """Header and body, until the filter has heard enough."""
        mta = connection.mta
        for field in (await message.headers()).fields:
            name, value = field.name.encode(), field.value
            if b"\0" in value:
                value = value.replace(b"\0", b"?")  # has no place in a packet, and must not hide what follows it
            try:
                data = mta.header(name, value)
            except milter.PacketTooLong:
                if self.settings.long_fields == "refuse":
                    return Refuse(Cause.MESSAGE_TOO_BIG, text=f"header field {field.name[:40]} too long")
                room = milter.MAX_PAYLOAD - len(name) - 2
                if self.settings.long_fields == "skip" or room < 0:
                    continue
                data = mta.header(name, value[:room].rstrip(b"\r\n"))
            if (data or mta.expects_reply) and (refuse := await self._heard(session, asked, data)) is not None:
                return refuse
            if asked.over:
                return None
        refuse = await self._heard(session, asked, mta.eoh())
        if refuse is not None or asked.over:
            return refuse
        body = b""
        async for block in message.blocks():
            body = body + block if body else block
            if len(body) >= milter.MAX_PAYLOAD:
                refuse = await self._body(session, asked, mta, body[: milter.MAX_PAYLOAD])
                body = body[milter.MAX_PAYLOAD :]
                if refuse is not None or asked.over:
                    return refuse
        return await self._body(session, asked, mta, body)

    async def _body(self, session: Session, asked: Asked, mta: MilterMta, body: bytes) -> Refuse | None:
        data = mta.body(body)
        while data:
            refuse = await self._heard(session, asked, data)
            if refuse is not None or asked.over:
                return refuse
            data = mta.body()
        return None

    async def _heard(self, session: Session, asked: Asked, data: bytes) -> Refuse | None:
        return await self._tell(session, asked, data, content=True, ends=True)

    async def _end_of_message(
        self, session: Session, message: Message, connection: FilterConnection, asked: Asked
    ) -> Refuse | Edit | Discard | None:
        """The verdict, and the changes that come before it."""
        operations: list[Operation] = []
        body: NewBody | None = None
        held: str | None = None
        unasked: set[str] = set()
        verdict: milter.Verdict = milter.Continue()
        try:
            async for said in connection.end_of_message(connection.mta.end_of_message()):
                match said:
                    case milter.ReplaceBody():
                        body = body or message.new_body()
                        body.write(said.data)
                    case milter.Quarantine():
                        held = said.reason
                    case Unasked():
                        unasked.add(said.action.name or str(said.action))
                    case (
                        milter.Continue() | milter.Accept() | milter.Reject() | milter.Tempfail() | milter.Discard()
                        | milter.Skip() | milter.ReplyCode() | milter.Shutdown() | milter.ConnFail()
                    ):  # fmt: skip
                        verdict = said
                    case _:
                        operations.append(operation(said, message.transaction))
            if isinstance(verdict, milter.ConnFail):
                raise FilterLost(f"filter {self.settings.socket}: says that it failed")
        except FilterLost as lost:
            asked.lost = str(lost)
            raise
        finally:
            if unasked:
                self._log.warning("filter_action", stage=self.id, session=session.id, action=" ".join(sorted(unasked)))
        asked.over = True
        if isinstance(verdict, milter.Discard):
            return Discard("filter")
        refuse = refusal(verdict)
        if refuse is not None:
            return refuse
        if body is not None:
            operations.append(ReplaceBody(body))
        if held is not None:
            return quarantined(operations, self.settings.quarantine, held)
        return Edit(operations) if operations else None

    # -- what a filter says

    def _open_message(self, session: Session) -> tuple[FilterConnection | None, Asked]:
        """The connection on which this message is told; None if the filter has heard enough. Raises FilterLost."""
        transaction = session.transaction
        assert transaction is not None
        asked = transaction.state(self, Asked)
        if self._was_lost(asked):
            return None, asked
        connection = session.state(self, Filter).connection
        if not asked.listens:
            return None, asked
        assert connection is not None
        if connection.lost or connection.mta.expects_reply:
            asked.lost = connection.lost or f"filter {self.settings.socket}: still owes an answer"
            raise FilterLost(asked.lost)
        return connection, asked

    def _was_lost(self, asked: Asked) -> bool:
        """Whether it was lost to this message, which goes on without it. Raises FilterLost where it does not."""
        if asked.lost and self.on_error != "pass" and self.mode != "observe":
            raise FilterLost(asked.lost)
        return bool(asked.lost)

    async def _said(self, session: Session, asked: Asked, data: bytes, *, content: bool = False) -> milter.Verdict:
        connection = session.state(self, Filter).connection
        assert connection is not None
        try:
            return await connection.say(data, content=content)
        except FilterLost as lost:
            asked.lost = str(lost)
            raise

    async def _tell(
        self, session: Session, asked: Asked, data: bytes, *, content: bool = False, ends: bool = False
    ) -> Refuse | None:
        """Write an event, take its answer; `ends`: a refusal is for the whole message."""
        return asked.answer(await self._said(session, asked, data, content=content), ends=ends)

    # -- the ends

    def reset(self, session: Session, transaction: Transaction) -> None:
        """ABORT between messages, complete or not, as Postfix says it."""
        if transaction.has_state(self) and transaction.state(self, Asked).begun:
            connection = session.state(self, Filter).connection
            if connection is not None:
                connection.abort()

    def close(self, session: Session) -> None:
        if session.has_state(self):
            connection = session.state(self, Filter).connection
            if connection is not None:
                connection.close()
