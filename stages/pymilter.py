"""Run a filter written for pymilter inside the gateway: its class, without its daemon and its socket.

`class` names it as `package.module:Class`, a subclass of `Milter.Base` or `Milter.Milter`. Each session has an instance
of its own. The callbacks run in threads, those of one session one after the other, and get what libmilter would give:
`connect` and `hello` before the first MAIL at the latest, `envfrom`, `envrcpt`, `data`, then in the message phase
`header`, `eoh`, `body` and `eom`; `abort` for a message that ended without its verdict, `close` at the end. What
the class disabled (`@Milter.nocallback`, what it does not override, `negotiate`) is not called. Macros are Postfix's;
a class that asks for none by name can read all that are known. Changes are allowed in `eom` alone and made together
with its verdict. Postfix's rules hold: an inserted field counts as if the MTA's own Received stood on top, a deleted
one is gone from the count at once; of the ESMTP parameters of `addrcpt` and `chgfrom` those of DSN count, no others.

The module is imported when the file is loaded, by `gateway check` too, with `path` behind the folders where Python
looks for modules; `Milter.runmilter` belongs below `if __name__ == "__main__":`. `Milter.set_flags` at its top level,
or the class's `negotiate`, says what the filter may change, and it is held to that; without either all is allowed.
A filter that may change messages has each spooled; `read_only: true` forbids all changes and lets them stream.
`progress` does nothing: `timeout` is for each callback, and in the message phase for all of them together, without
the waiting for the client.

| the class returns | what follows |
|---|---|
| CONTINUE | go on; after `eom`: with the changes |
| ACCEPT | in `connect` and `hello`: no more of this session; later: no more of this message |
| REJECT, TEMPFAIL | refused, with what `setreply` said if its class fits; in `connect` and `hello` for the session |
| DISCARD | the entry's `discard` decides: `refuse` (default) or `accept` |
| SKIP | in `body`: no more of the body |

`quarantine` says what `self.quarantine(reason)` means here: `refuse` (default) refuses the message, `header` puts
`X-Quarantine: reason` in front of it, `route:pool` sends it to that pool. A callback that raises, returns what is
none of these or takes longer than `timeout` is what `on_error` is for; after a time-out the instance is given up, and
the next MAIL begins with a new one. The `threads` that hang in a filter are not free for others.

Needs pymilter, which is under the GPL: `pip install 'mail-gateway[milter]'` (Debian: `libmilter-dev` first). One
thread hop a callback, one for all header fields and one for each 64 KiB or more of a body.

    stages:
      - pymilter: company.filters:Disclaimer
      - pymilter: {class: "footer:Footer", path: filters, quarantine: "route:held", when: '!auth.trusted'}
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from gateway import (
    Cause,
    Discard,
    Edit,
    Kind,
    Message,
    PathValue,
    Recipient,
    Refuse,
    Session,
    Settings,
    Stage,
    Transaction,
    Worker,
)
from gateway.macros import connect_macros, helo_macros, mail_macros, rcpt_macros
from gateway.protocol.milter import Action, Step
from gateway.protocol.milter import Stage as At
from stages.filter_words import Held, Quarantine, quarantined
from stages.pymilter_context import Code, Threads
from stages.pymilter_filter import MAX_BLOCK, MilterFilter, arguments_of, client_of, find_class
from stages.pymilter_session import Mail, Question, Seat, refusal

if TYPE_CHECKING:
    import structlog

_STOP = 5.0  # seconds for the last callbacks


class PymilterSettings(Settings):
    """Which class, where it is found, and how it runs."""

    short_form: ClassVar[str | None] = "class"

    path: PathValue | None = Field(None, description="Folder with the module, if it is not installed.")
    class_: str = Field(alias="class", description="The filter's class, as package.module:Class.")
    threads: int = Field(8, ge=1, le=256, description="Threads in which callbacks run: so many at the same time.")
    read_only: bool = Field(False, description="The filter may change nothing; messages are not spooled for it.")
    quarantine: Quarantine = Field(
        Held.REFUSE,
        description="For a message that it wants held: refuse it, add the field X-Quarantine, or route:pool.",
    )

    @field_validator("class_")
    @classmethod
    def _can_be_imported(cls, name: str, info: ValidationInfo) -> str:
        if "path" in info.data:
            find_class(name, info.data["path"])
        return name


class Pymilter(Stage):
    """Run a filter class of pymilter inside the gateway."""

    Settings = PymilterSettings
    kind = Kind.CHECK
    timeout = 30.0
    settings: PymilterSettings
    _log: structlog.typing.FilteringBoundLogger

    def __init__(self, settings: PymilterSettings) -> None:
        super().__init__(settings)
        self._class = find_class(settings.class_, settings.path)
        self._threads = Threads(settings.threads, f"pymilter-{settings.class_}")
        no_edits = Action.SETSYMLIST
        if settings.quarantine is Held.REFUSE:
            no_edits |= Action.QUARANTINE
        self._edits = ~no_edits
        self._offered = Action.SETSYMLIST | (self._class.actions & (no_edits if settings.read_only else ~Action(0)))

    # -- the worker -----------------------------------------------------------------------------------------

    async def start(self, worker: Worker) -> None:
        """Keep the log."""
        self._log = worker.log

    async def stop(self) -> None:
        """Let the last callbacks end."""
        await asyncio.to_thread(self._threads.end, _STOP)

    def phases(self) -> Sequence[str]:
        """Those that the class has callbacks for, and those without which no message can be told."""
        optional = [("connect", Step.NOCONNECT), ("helo", Step.NOHELO), ("data", Step.NODATA)]
        return ["mail", "rcpt", "message", *(name for name, step in optional if not self._class.steps & step)]

    def edits(self, transaction: Transaction) -> Literal["none", "any"]:
        """Whether the filter may still change this message."""
        actions = self._offered
        mail = self._mail_of(transaction)
        if mail is not None:
            actions = mail.filter.context.actions if mail.listens else Action(0)
        return "any" if actions & self._edits else "none"

    # -- the session ----------------------------------------------------------------------------------------

    async def connect(self, session: Session) -> Refuse | None:
        """`connect`."""
        seat = self._seat(session)
        return await self._introduce(session, seat, "") if not seat.filter.lost else None

    async def helo(self, session: Session, name: str) -> Refuse | None:
        """`hello`; with `connect` if that was not called yet."""
        seat = self._seat(session)
        if not seat.filter.introduced:
            return await self._introduce(session, seat, name)
        if not seat.listens:
            return None
        self._abort(session, seat.mail)
        macros = helo_macros(session)

        def hello() -> Code:
            seat.filter.context.enter(At.HELO, macros)
            return seat.filter.hello(name)

        return await self._early(session, seat, hello)

    async def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        """`envfrom`; of a new instance if the last one was lost."""
        seat = self._seat(session)
        if self._has_failed(self._mail_of(transaction)):
            return None
        if seat.filter.lost:
            seat.filter = self._new_filter()
        if seat.refusal is not None:
            # RCPT is the place to say what was postponed, but not to a user, who is let through there.
            return seat.refusal if session.postponed is None or session.user else None
        if not seat.filter.introduced and not seat.done:
            refuse = await self._introduce(session, seat, session.helo)
            if refuse is not None:
                return refuse
        if seat.done:
            return None
        self._abort(session, seat.mail)
        mail = seat.mail = transaction.state(self, lambda: Mail(seat.filter))
        arguments = arguments_of(transaction.sender, transaction.parameters)
        macros = mail_macros(session, transaction)
        if seat.filter.steps & Step.NOHELO:  # nobody else tells these
            seat.filter.context.enter(At.HELO, helo_macros(session))
        asked = Question("envfrom", Step.NOMAIL, At.MAIL, macros, Cause.SENDER_REJECTED)
        return await self._ask(session, mail, asked, lambda: mail.filter.envfrom(arguments))

    async def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        """`envrcpt`; a refusal is for this recipient only."""
        transaction = session.transaction
        mail = self._open_mail(transaction)
        if transaction is None or mail is None:
            return None
        arguments = arguments_of(recipient.address, recipient.parameters)
        macros = {"i": transaction.id, **rcpt_macros(recipient)}
        asked = Question("envrcpt", Step.NORCPT, At.RCPT, macros, Cause.RECIPIENT_REJECTED, ends=False)
        return await self._ask(session, mail, asked, lambda: mail.filter.envrcpt(arguments))

    async def data(self, session: Session, transaction: Transaction) -> Refuse | None:
        """`data`."""
        mail = self._open_mail(transaction)
        if mail is None:
            return None
        asked = Question("data", Step.NODATA, At.DATA, {"i": transaction.id}, Cause.CONTENT)
        return await self._ask(session, mail, asked, mail.filter.data)

    async def message(self, session: Session, message: Message) -> Refuse | Edit | Discard | None:
        """`header`, `eoh`, `body` and `eom`."""
        transaction = message.transaction
        mail = self._open_mail(transaction)
        refuse = await self._content(session, mail, message) if mail is not None else None
        if refuse is not None:
            return refuse
        told = self._mail_of(transaction)
        if told is not None and told.discarded:
            return Discard(told.discarded)
        if mail is None or not mail.listens:
            return None
        macros, loop, filter = {"i": transaction.id}, asyncio.get_running_loop(), mail.filter
        asked = Question("eom", Step(0), At.EOM, macros, Cause.CONTENT)
        refuse = await self._ask(session, mail, asked, lambda: filter.eom(message, loop))
        mail.open = False
        if refuse is not None:
            return refuse
        return Discard(mail.discarded) if mail.discarded else self._changes(filter)

    async def unknown(self, session: Session, command: str) -> Refuse | None:
        """`unknown`; only a TEMPFAIL means something."""
        if self._class.steps & Step.NOUNKNOWN:
            return None
        seat = self._seat(session)
        if not seat.listens or seat.filter.steps & Step.NOUNKNOWN:
            return None
        code = await self._call(session, seat.filter, lambda: seat.filter.unknown(command))
        return refusal(seat.filter, code, Cause.POLICY, "unknown") if code is Code.TEMPFAIL else None

    def reset(self, session: Session, transaction: Transaction) -> None:
        """`abort` if the message ended without a verdict of the filter."""
        self._abort(session, self._mail_of(transaction))

    def close(self, session: Session) -> None:
        """`close`."""
        if session.has_state(self):
            seat = self._seat(session)
            self._leave(session, seat.filter, seat.mail)

    # -- the filter -----------------------------------------------------------------------------------------

    def _seat(self, session: Session) -> Seat:
        return session.state(self, lambda: Seat(self._new_filter()))

    def _new_filter(self) -> MilterFilter:
        return MilterFilter(self._class, self._offered, self._threads)

    def _mail_of(self, transaction: Transaction | None) -> Mail | None:
        """What the filter knows of the transaction."""
        if transaction is None or not transaction.has_state(self):
            return None
        return transaction.state(self, lambda: Mail(self._new_filter()))

    def _open_mail(self, transaction: Transaction | None) -> Mail | None:
        """The same, if the filter wants to hear more of it. Raises RuntimeError as `_has_failed`."""
        mail = self._mail_of(transaction)
        return mail if mail is not None and not self._has_failed(mail) and mail.listens else None

    def _has_failed(self, mail: Mail | None) -> bool:
        """Whether nobody can tell what the filter thinks of the message, which goes on without it.

        Raises RuntimeError where it does not: `on_error` holds for all of it.
        """
        failed = mail is not None and mail.failed
        if failed and self.on_error != "pass" and self.mode != "observe":
            raise RuntimeError("the filter failed earlier in this message")
        return failed

    async def _introduce(self, session: Session, seat: Seat, helo: str) -> Refuse | None:
        """`negotiate`, `connect` and, if the name is known, `hello`, in one go."""
        filter = seat.filter
        client, greeted = connect_macros(session), helo_macros(session)
        name, family, address = client_of(session)
        filter.introduced = True

        def introduce() -> Code:
            if not filter.begin():
                return Code.ACCEPT
            filter.context.enter(At.CONNECT, client)
            code = filter.connect(name, family, address)
            if code is Code.CONTINUE and helo:
                filter.context.enter(At.HELO, greeted)
                code = filter.hello(helo)
            return code

        return await self._early(session, seat, introduce)

    async def _early(self, session: Session, seat: Seat, callback: Callable[[], Code]) -> Refuse | None:
        """What connect or hello decides is decided for the session. One that raised there is given up."""
        try:
            code = await self._call(session, seat.filter, callback)
        except BaseException:
            self._leave(session, seat.filter, None)
            if session.transaction is not None:
                session.transaction.state(self, lambda: Mail(seat.filter, failed=True, open=False))
            raise
        seat.done = code is Code.ACCEPT
        if code in (Code.REJECT, Code.TEMPFAIL):
            seat.refusal = refusal(seat.filter, code, Cause.ACCESS_DENIED, "connect or hello")
        return seat.refusal

    async def _ask(
        self, session: Session, mail: Mail, asked: Question, callback: Callable[[], Code]
    ) -> Refuse | None:
        """Ask the filter about the message; what it says is kept in `mail`."""
        filter = mail.filter
        if filter.steps & asked.unwanted:
            filter.context.enter(asked.at, asked.macros)
            return None

        def call() -> Code:
            filter.context.enter(asked.at, asked.macros)
            return callback()

        try:
            code = await self._call(session, filter, call)
        except BaseException:
            mail.fail(asked)
            raise
        return mail.answer(asked, code)

    async def _content(self, session: Session, mail: Mail, message: Message) -> Refuse | None:
        """Header and body."""
        filter = mail.filter
        asked = Question("header", Step(0), At.EOH, {"i": message.transaction.id}, Cause.CONTENT)
        header = await message.headers()
        refuse = await self._ask(session, mail, asked, lambda: filter.header(header))
        if refuse is not None or not mail.open:
            return refuse
        asked = Question("body", Step.NOBODY, At.EOH, asked.macros, Cause.CONTENT)
        pending = b""
        async for block in message.blocks():  # to its end: eom comes behind it
            if mail.skipped:
                continue
            pending += block
            whole = len(pending) - len(pending) % MAX_BLOCK  # pieces are full, as those of an MTA
            if whole:
                refuse = await self._ask(session, mail, asked, partial(filter.body, pending[:whole]))
                pending = pending[whole:]
                if refuse is not None or not mail.open:
                    return refuse
        if not pending or mail.skipped:
            return None
        return await self._ask(session, mail, asked, partial(filter.body, pending))

    async def _call(self, session: Session, filter: MilterFilter, callback: Callable[[], Code]) -> Code:
        """Call back in a thread. An instance that is still at it when the time is over is given up."""
        future = filter.turns.ask(callback)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            seat = self._seat(session)
            self._leave(session, filter, seat.mail if seat.filter is filter else None)
            raise

    def _abort(self, session: Session, mail: Mail | None) -> None:
        if mail is not None and mail.open:
            mail.open = False
            if not mail.filter.lost:
                self._later(session, "abort", mail.filter, mail.filter.abort)

    def _leave(self, session: Session, filter: MilterFilter, mail: Mail | None) -> None:
        """The filter's end, behind what it is still asked. A message without its verdict has failed."""
        if not filter.lost:
            if mail is not None and mail.open:
                mail.failed = True
            self._abort(session, mail)
            filter.lost = True
            self._later(session, "close", filter, filter.close)

    def _later(self, session: Session, name: str, filter: MilterFilter, callback: Callable[[], None]) -> None:
        """Nobody waits for it; what it raises is logged."""
        number, log = session.id, self._log

        def ended(future: Future[None]) -> None:
            error = future.exception()
            if error is not None:
                text = f"{type(error).__name__}: {error}"
                log.warning("stage_failure", session=number, stage=self.id, phase=name, error=text, action="")

        filter.turns.ask(callback).add_done_callback(ended)

    def _changes(self, filter: MilterFilter) -> Refuse | Edit | None:
        """What eom wants done to the message."""
        context, operations = filter.context, filter.context.operations
        if context.quarantined:
            return quarantined(operations, self.settings.quarantine, context.quarantined)
        return Edit(list(operations)) if operations else None
