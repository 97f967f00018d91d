"""The content grade: stages read and edit a message while it comes in, and the upstream gets what they made of it.

The client's content goes into a spool as it comes. Stages that only read do so side by side, live; each stage that
edits is waited for, and the next one sees what it made. The upstream, too, is a reader of the spool, and begins when
the last stage that edits has answered: at once if there is none, so that a message that nobody edits streams through
and only its end waits for the verdicts. Backpressure and what is kept follow from who still has to read
(`relay/spool.py`).

    client -> checks -> spool -> stage, stage | editing stage -> draft -> stage ... -> upstream
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend.content_upstream import BLOCK, open_upstream, outgoing, send_content, spread
from gateway.frontend.draft import Draft
from gateway.frontend.message_view import MessageView
from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.headers import HeaderReader
from gateway.protocol.smtp import Reply
from gateway.relay.checks import ContentChecks, ContentClock
from gateway.relay.outgoing import Answer, Outgoing
from gateway.relay.spool import Spool, SpoolFull
from gateway.relay.wire import EndOfStream
from gateway.verdicts import Cause, Edits, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation
    from gateway.pipeline.chain import Result, Step

log = structlog.get_logger("gateway.smtp")

CLEANING_SECONDS = 5.0  # how long a stage that was cancelled may take to put its things in order
WITHHELD_SECONDS = 120.0  # how long an upstream that has the content waits for its end
GO_ON = Reply.of("354 End data with <CR><LF>.<CR><LF>")
HEADER_TOO_BIG = Refuse(
    Cause.MESSAGE_TOO_BIG, text="header of message too big", log="limits.header_size or limits.header_fields"
)
DISCARDED = Reply.of("250 2.0.0 Ok: discarded")


class FilteredContent:
    """One message on its way through the stages of the message phase: what `ContentRelay` is without them.

    `held`: nothing goes upstream before the verdicts, so that DATA is not said there yet.
    """

    def __init__(
        self,
        conversation: SmtpConversation,
        steps: Sequence[tuple[Step, Edits]],
        checks: ContentChecks,
        clock: ContentClock,
        end_timeout: float,
    ) -> None:
        transaction, limits = conversation.session.transaction, conversation.limits
        assert transaction is not None
        self.conversation = conversation
        self.transaction = transaction
        self.steps = steps
        self.checks = checks
        self.clock = clock
        self.size = 0
        self.out: Outgoing | None = None
        self.held = must_hold(conversation, steps)
        self.end_timeout = end_timeout if self.held else min(end_timeout, WITHHELD_SECONDS)
        self.spool = Spool(conversation.served.spool)
        self._all_or_nothing = conversation.served.always_spool or conversation.lmtp
        self._keep = self.spool.reader(waiting=True)  # for whoever has not begun
        self._reader: HeaderReader | None = HeaderReader(limits.header_size, limits.header_fields)
        self._header = self._reader
        self._judging: asyncio.Task[None] | None = None
        self._reading: list[asyncio.Task[Result]] = []
        self._tasks: list[asyncio.Task[None] | asyncio.Task[Result]] = []  # all of them, until they have ended
        self._refuse: Refuse | None = None
        self._stage = ""
        self._answers: list[Answer] | None = None  # what the client gets without an end of data upstream
        self._named: dict[int, Refuse] = {}  # recipients that were refused by themselves (LMTP)
        self._named_by: dict[int, str] = {}  # by which stage
        self._until = 0.0
        self._draft: Draft | None = None
        self._rerouted: Upstream | None = None
        self._doomed = False
        self._edited_by: list[str] = []
        self.delivered = False

    # -- from the client

    async def data(self, scanner: DataScanner) -> None:
        """From 354 to the client's end of data. Raises EndOfStream or WireTimeout of the client's wire."""
        client = self.conversation.wire
        try:
            while True:
                self.clock.start()
                block = await client.read(BLOCK)
                if not block:
                    raise EndOfStream(b"")
                scan = scanner.feed(block)
                self.size = self.transaction.size = scanner.size
                self.spool.dotless = scanner.size == self.spool.size + len(scan.content)
                self._take(scan.content, scanner, last=scan.end)
                if scan.end:
                    if scan.rest:
                        client.unread(scan.rest)
                    self._ended()
                    return
                await self.spool.room()
        except BaseException:
            await self.leave()
            raise

    async def chunk(self, stuffer: DotStuffer, size: int) -> None:
        """One BDAT chunk of `size` octets, whatever becomes of it."""
        client = self.conversation.wire
        try:
            while size:
                self.clock.start()
                block = await client.read(min(size, BLOCK))
                if not block:
                    raise EndOfStream(b"")
                size -= len(block)
                self.size += len(block)
                self.transaction.size = self.size
                self._take(stuffer.feed(block), stuffer)
                await self.spool.room()
        except BaseException:
            await self.leave()
            raise

    def finish_chunks(self, stuffer: DotStuffer) -> None:
        """After BDAT LAST: what the last line still needs."""
        self._take(stuffer.finish(), stuffer, last=True)
        self._ended()

    def _take(self, content: bytes, scanned: DataScanner | DotStuffer, *, last: bool = False) -> None:
        """The next block, in the form that DATA has."""
        if self._refuse is not None:
            return
        refuse = self.checks.refused(content, self.size, scanned)
        if refuse is not None:
            self._stop(refuse)
            return
        if not content:
            return
        try:
            self.spool.write(content)
        except SpoolFull as full:
            self._stop(Refuse(Cause.MESSAGE_TOO_BIG, temporary=True, text="no room for messages", log=full.why))
            return
        if self._reader is not None and self._reader.feed(content):
            self._reader = None
            if self._header.header is None:
                self._stop(HEADER_TOO_BIG)
            elif not last:
                self._judging = asyncio.get_running_loop().create_task(self._judge())
                self._tasks.append(self._judging)

    def _ended(self) -> None:
        """The client's end of data."""
        if self._refuse is not None:
            return
        if self._reader is not None:
            self._reader.finish()
            self._reader = None
            if self._header.header is None:
                self._stop(HEADER_TOO_BIG)
                return
        self.spool.end()

    def _stop(self, refuse: Refuse) -> None:
        """No stage's verdict matters any more."""
        self._refuse, self._stage = refuse, ""
        self._abandon()

    # -- the verdicts

    async def end(self) -> tuple[list[Answer], list[str]]:
        """Everything after the client's end of data: the answers to it, and for each the stage that gave it, if any."""
        try:
            try:
                async with asyncio.timeout(self.end_timeout) as clock:
                    if self._refuse is None:
                        await (self._judging if self._judging is not None else self._judge())
                    await self._hold()
            except TimeoutError:
                if not clock.expired():
                    raise
                text = f"no verdict {self.end_timeout:g}s after the end of data"
                self._stop(Refuse(Cause.STAGE_FAILED, log=text))
            if self._refuse is not None or self._answers is not None:
                if self.out is not None:
                    self.out.abandon()
                answers: list[Answer] = [self._refuse] if self._refuse is not None else self._answers or []
                return self._spread(answers), self._stages()
            assert self.out is not None and self._draft is not None
            answers = await self.out.end(len(self._draft.recipients))
            self.delivered = any(isinstance(answer, Reply) and answer.reply_class == 2 for answer in answers)
            return self._spread(answers), self._stages()
        except BaseException:
            self._abandon()
            raise
        finally:
            await self._ended_tasks()
            self._close()

    async def _hold(self) -> None:
        """A Hold of a stage: the answer waits."""
        loop = asyncio.get_running_loop()
        if self._until > loop.time():
            await asyncio.sleep(self._until - loop.time())

    async def _judge(self) -> None:
        """Ask the stages, then give the message to the upstream up to its end. Sets what came of it."""
        header, space = self._header.header, self.conversation.served.spool
        assert header is not None
        draft = self._draft = Draft(header, self.spool, self._header.body_offset, self.transaction, space)
        try:
            if not await self._asked(draft):
                return
            if self._doomed or not await self._open_upstream(draft):
                await self._settled()
                return
            await self._send(draft)
            await self._settled()
        finally:
            self._keep.close()
            self._give_up_reading()

    async def _asked(self, draft: Draft) -> bool:
        """Each stage begins when those before it that edit have answered. True once all that edit have."""
        last = len(self.steps) - 1
        for index, (step, edits) in enumerate(self.steps):
            if waits_for_facts(self.steps, index) and not await self._settled():
                return False
            view = MessageView(draft, self.transaction)
            if edits != "none" or (index == last and self.spool.ended):
                if not await self._edited(step, edits, view, draft):
                    return False
                continue
            asked = asyncio.get_running_loop().create_task(self._ask(step, edits, view))
            asked.add_done_callback(self._looked)
            self._reading.append(asked)
            self._tasks.append(asked)
        return not self._all_or_nothing or await self._settled()

    async def _edited(self, step: Step, edits: Edits, view: MessageView, draft: Draft) -> bool:
        """Wait for a stage's verdict and make its changes; True to go on."""
        result = await self._ask(step, edits, view, draft)
        if self._decided(result):
            await self._settled()  # the word of a stage before it comes first
            self._decide(result)
            return False
        self._decide(result)
        return True

    async def _ask(self, step: Step, edits: Edits, view: MessageView, draft: Draft | None = None) -> Result:
        """One stage's verdict; one that may not be given here is a failure of the stage."""
        chain, session = self.conversation.chain, self.conversation.session
        try:
            result = await chain.ask((step,), session, view, self.transaction)
            try:
                if result.operations or result.upstream is not None:
                    if edits == "none" or draft is None:
                        raise TypeError(f"{step.stage.id} said it does not edit this message")
                    draft.apply(result.operations)
                    self._edited_by.append(step.stage.id)
            except Exception as error:
                result = chain.failure(step, error, session)
            return result
        finally:
            view.close()

    def _looked(self, task: asyncio.Task[Result]) -> None:
        """A stage that only reads has answered: what is refused for certain need not go on upstream."""
        if not task.cancelled() and task.exception() is None and self._decided(task.result()):
            self._doomed = True
            if self.out is not None:
                self.out.stop(Refuse(Cause.CONTENT))

    def _decided(self, result: Result) -> bool:
        """Whether the message is refused as a whole, or thrown away."""
        refuse = result.refuse
        if refuse is None:
            return bool(result.discard)
        return not (self.conversation.lmtp and refuse.recipients is not None and not self._all_named(refuse))

    def _decide(self, result: Result) -> None:
        """Take in a verdict, unless one is there already."""
        self._until = max(self._until, result.until)
        if self._refuse is not None or self._answers is not None:
            return
        refuse = result.refuse
        if refuse is None:
            if result.discard:
                self._discard(result.discard, result.stage)
            elif result.upstream is not None:
                self._rerouted = result.upstream
            return
        if refuse.recipients is None:
            self._refuse, self._stage = refuse, result.stage
        else:
            self._refuse_named(refuse, result.stage)

    def _refuse_named(self, refuse: Refuse, stage: str) -> None:
        """A verdict for single recipients: LMTP answers each; in SMTP all must be named, or none gets the message."""
        named = refuse.recipients or {}
        if self.conversation.lmtp:
            for index, reply in named.items():
                if index not in self._named:
                    self._named[index] = replace(refuse, reply=reply, recipients=None)
                    self._named_by[index] = stage
            if self._all_named(refuse):
                self._answers = self._spread([])
        elif self._all_named(refuse) and len({reply.reply_class for reply in named.values()}) == 1:
            self._refuse, self._stage = replace(refuse, reply=next(iter(named.values())), recipients=None), stage
        else:
            log_text = f"refused for recipients {sorted(named)} only; {refuse.log}".rstrip("; ")
            text = "refused for some recipients; send to each by itself"
            self._refuse, self._stage = Refuse(Cause.CONTENT, text, True, log=log_text, hold=refuse.hold), stage

    def _all_named(self, refuse: Refuse) -> bool:
        named = {*(refuse.recipients or {}), *self._named}
        return all(one.index in named for one in self.transaction.recipients)

    def _discard(self, reason: str, stage: str) -> None:
        session = self.conversation.session
        log.info(
            "discard",
            session=session.id,
            pipeline=session.pipeline,
            client=session.client.address,
            stage=stage,
            sender=self.transaction.sender,
            detail=reason,
        )
        self._answers, self._stage = [DISCARDED], stage

    async def _settled(self) -> bool:
        """Wait for the stages that only read, in the chain's order; False if one ends the message."""
        while self._reading:
            task = self._reading.pop(0)
            result = await task
            self._decide(result)
            if self._refuse is not None or self._answers is not None:
                self._give_up_reading()
                return False
        return self._refuse is None and self._answers is None

    # -- to the upstream

    async def _open_upstream(self, draft: Draft) -> bool:
        """Have an upstream that waits for content; False if the message ends here."""
        if self.out is not None:
            return True
        if self._named:
            draft.recipients = [one for one in draft.recipients if one.index not in self._named]
            draft.restart = True
        opened = await open_upstream(self.conversation, draft, self._rerouted, self.end_timeout)
        if isinstance(opened, Refuse):
            self._refuse = opened
        elif isinstance(opened, Reply):
            self._answers = [opened]
        else:
            self.out = opened
        return self.out is not None

    def begin(self) -> None:
        """The upstream has said 354, before any stage was asked."""
        self.out = outgoing(self.conversation, self.end_timeout)

    async def _send(self, draft: Draft) -> None:
        """All of the message but its end."""
        assert self.out is not None
        refuse = await send_content(self.out, draft, self.transaction.head or (), self._keep.close)
        if refuse is not None and not self._doomed:
            self._stop(refuse)

    def _spread(self, answers: list[Answer]) -> list[Answer]:
        """The answers, one for all of the client's recipients or one for each."""
        if self._draft is None or (len(answers) == 1 and not self._named):
            return answers
        return spread(answers, self._draft, self.transaction, self._named, self.conversation.session.pipeline)

    def _stages(self) -> list[str]:
        """Who gave each of the answers."""
        return [self._named_by.get(one.index, self._stage) for one in self.transaction.recipients]

    # -- the end

    @property
    def edited(self) -> list[str]:
        """Ids of the stages that changed the message, once anybody got it."""
        return self._edited_by if self.delivered else []

    @property
    def abandoned(self) -> bool:
        """Whether the upstream connection is closed."""
        return self.out is not None and self.out.abandoned

    def _give_up_reading(self) -> None:
        """Nobody reads any more; what was kept is given back."""
        for task in self._reading:
            task.cancel()
        self._reading.clear()

    async def leave(self) -> None:
        """Give the message up: the upstream never gets its end, and no stage is at it any more."""
        self._abandon()
        await self._ended_tasks()
        self._close()

    def _abandon(self) -> None:
        if self._judging is not None and self._judging is not asyncio.current_task():
            self._judging.cancel()
        self._give_up_reading()
        conversation, connection = self.conversation, self.conversation.connection
        if self.out is not None:
            self.out.abandon()
        elif connection is not None and not connection.idle:
            # It owes a reply to what we said of the envelope: what is said next would be answered with that.
            connection.abort()
            conversation.connection = None
        self._close()

    async def _ended_tasks(self) -> None:
        """Wait until the stages that were cancelled have cleaned up: the next message finds them ready."""
        under_way = [task for task in self._tasks if not task.done()]
        if under_way:
            await asyncio.wait(under_way, timeout=CLEANING_SECONDS)

    def _close(self) -> None:
        """Give back what was kept."""
        self.spool.close()
        if self._draft is not None:
            self._draft.close()


def must_hold(conversation: SmtpConversation, steps: Sequence[tuple[Step, Edits]]) -> bool:
    """Whether the upstream must wait for verdicts before it hears DATA."""
    if conversation.served.always_spool or conversation.lmtp:
        return True
    return any(edits != "none" or waits_for_facts(steps, index) for index, (_, edits) in enumerate(steps))


def waits_for_facts(steps: Sequence[tuple[Step, Edits]], index: int) -> bool:
    """Whether this stage needs what those before it find in the content: it is asked when they have answered."""
    step = steps[index][0]
    if step.when is not None and step.when.phase is Phase.MESSAGE:
        return True
    found = {f"{other.stage.id}.{fact.name}" for other, _ in steps[:index] for fact in other.stage.facts}
    return not found.isdisjoint(step.stage.requires)
