"""DATA and BDAT: content flows upstream as it comes; the answer to its end is the upstream's.

An LMTP client gets one answer a recipient (`lmtp.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend import lmtp
from gateway.frontend.closing import Closing
from gateway.frontend.smtp_content import GO_ON, FilteredContent, must_hold
from gateway.frontend.smtp_mail import pass_on, reset, size_limit, softened, told
from gateway.frontend.smtp_upstream import say_data
from gateway.observe.traces import TracedSession
from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Command, Reply, parse_bdat
from gateway.relay.checks import ContentChecks, ContentClock
from gateway.relay.envelope import ContentRelay
from gateway.relay.outgoing import Answer, Outgoing
from gateway.relay.wire import EndOfStream
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation

log = structlog.get_logger("gateway.smtp")


class Bdat:
    """A BDAT sequence on its way upstream as DATA; its LAST is owed `replies` replies, also where one chunk failed."""

    __slots__ = ("chunks", "failed", "relay", "replies", "stuffer")

    def __init__(self, stuffer: DotStuffer, replies: int = 1) -> None:
        self.stuffer = stuffer
        self.replies = replies
        self.relay: ContentRelay | FilteredContent | None = None
        self.failed: Reply | None = None
        self.chunks = 0


async def data(conversation: SmtpConversation, command: Command) -> bool:
    """DATA: the content flows upstream as it comes; the answer is the upstream's."""
    if command.argument:
        conversation.error("501 5.5.4 no parameters allowed")
        return False
    await conversation.must_be_last()
    if conversation.bdat is not None:
        conversation.error("503 5.5.1 BDAT already begun")
        return False
    reply = await _begin_content(conversation)
    if reply is None:
        return False
    conversation.write(reply.encode())
    conversation.flush()
    scanner = DataScanner(_line_policy(conversation))
    relay = _content_relay(conversation)
    await relay.data(scanner)
    if scanner.bare is not None and scanner.policy == "normalize":
        _record_line_endings(conversation, scanner.bare)
    await _finish_content(conversation, relay)
    return False


def _line_policy(conversation: SmtpConversation) -> str:
    """`reject` or `normalize` for this client (architecture, "Content and line ends")."""
    configured = conversation.served.line_endings
    if configured != "by_trust":
        return configured
    return "normalize" if conversation.session.user or conversation.trusted_lines else "reject"


async def _begin_content(conversation: SmtpConversation) -> Reply | None:
    """Ask the chain, say DATA upstream: its 354; or None, and the client has its answer."""
    session, chain, mail = conversation.session, conversation.chain, conversation.mail
    transaction = session.transaction
    if transaction is None:
        conversation.error("503 5.5.1 need MAIL and RCPT first", "no_recipients")
        return None
    if not transaction.recipients:
        if conversation.lmtp:
            conversation.error("503 5.5.1 no valid recipients", "no_recipients")  # RFC 2033 4.2
        elif mail.lost is not None:
            conversation.refuse(mail.lost, "data")
            conversation.count_error()
        else:
            conversation.error("554 5.5.1 no valid recipients", "no_recipients")
        return None
    if chain.data:
        reply = await conversation.asked(await chain.ask(chain.data, session, transaction, transaction), "data")
        if reply is not None:
            transaction.reply = reply
            await reset(conversation)
            return None
    mail.steps = chain.to_read(session, transaction) if chain.message else []
    if mail.steps and mail.lost is None and must_hold(conversation, mail.steps):
        return GO_ON
    said = await say_data(conversation)
    if isinstance(said, Refuse):
        reply = transaction.reply = conversation.refuse(said, "data")
        conversation.end_transaction()
        conversation.end_if_told(said, reply)
        return None
    reply = said
    if reply.code != 354:
        transaction.reply = pass_on(conversation, reply, Phase.DATA)
        await reset(conversation)
        return None
    return reply


def _content_relay(conversation: SmtpConversation) -> ContentRelay | FilteredContent:
    """What carries the content: with stages that read it or, as it comes, without."""
    served, transaction, limits = conversation.served, conversation.session.transaction, conversation.limits
    assert transaction is not None
    checks = ContentChecks(
        size_limit(conversation),
        max_received=served.max_received,
        text_line=limits.text_line,
        reject_nul=served.nul == "reject",
    )
    clock = ContentClock(conversation.wire, limits.data_timeout, limits.message_timeout)
    if conversation.mail.steps:
        content = FilteredContent(conversation, conversation.mail.steps, checks, clock, served.end_of_data)
        if not content.held:
            content.begin()
        return content
    connection = conversation.connection
    assert connection is not None

    def commit(value: bool) -> None:
        conversation.committed = value

    out = Outgoing(connection, data_timeout=limits.data_timeout, end_timeout=served.end_of_data, commit=commit)
    relay = ContentRelay(conversation.wire, out, checks, clock)
    relay.head(transaction.head or ())
    return relay


async def _finish_content(conversation: SmtpConversation, relay: ContentRelay | FilteredContent) -> None:
    """After the client's end of data: hand over the end, or refuse; one record a transaction."""
    transaction = conversation.session.transaction
    assert transaction is not None
    transaction.size = relay.size
    stages: list[str] = []
    if isinstance(relay, FilteredContent):
        answers, stages = await relay.end()
        conversation.mail.edited = relay.edited
    else:
        answers = await relay.end(len(transaction.recipients))
    connection = conversation.connection
    if relay.abandoned:
        conversation.connection = None
    elif connection is not None and connection.closing:
        connection.abort()
        conversation.connection = None
    answer_message(conversation, answers, stages)
    final = transaction.reply
    conversation.end_transaction()
    for answer in answers:
        if isinstance(answer, Refuse) and final is not None:
            conversation.end_if_told(answer, final)


def answer_message(conversation: SmtpConversation, answers: Sequence[Answer], stages: Sequence[str] = ()) -> None:
    """Answer the end of data: once, or an LMTP client for each recipient in order (RFC 2033 4.2).

    `answers` has one element, which holds for all recipients, or one for each. Each refusal is logged once, however
    many recipients it is for; `stages` has for each answer the stage that gave it, if one did. Sets `Recipient.final`
    and `Transaction.reply`.
    """
    transaction = conversation.session.transaction
    assert transaction is not None
    shown: list[Reply] = []
    refusals: dict[int, Reply] = {}
    for place, answer in enumerate(lmtp.finals(answers, len(transaction.recipients))):
        if isinstance(answer, Reply):
            shown.append(softened(conversation, answer))
            continue
        if id(answer) not in refusals:
            reply = refusals[id(answer)] = conversation.reply_to(answer)
            stage = stages[place] if place < len(stages) else ""
            conversation.record_refusal(answer, "message", stage, reply)
        shown.append(refusals[id(answer)])
    for recipient, reply in zip(transaction.recipients, shown, strict=False):
        recipient.final = reply
    final = transaction.reply = lmtp.best(shown) if conversation.lmtp else lmtp.worst(shown)
    for reply in shown if conversation.lmtp else [final]:
        conversation.write(reply.encode())
    if final not in refusals.values():
        told(conversation, final, Phase.MESSAGE)
    if final.reply_class == 2:
        conversation.errors = conversation.junk = 0  # both count what comes without mail


async def bdat(conversation: SmtpConversation, command: Command) -> bool:
    """BDAT (RFC 3030): chunks are checked like DATA and go upstream as DATA; each is consumed whatever happens."""
    try:
        size, last = parse_bdat(command.argument)
    except PeerError as error:
        # How many octets follow is unknown: whatever came next could be read as commands.
        conversation.error((error.reply or b"501 5.5.4 bad BDAT").decode("ascii", "replace"))
        raise Closing("malformed BDAT") from None
    if conversation.bdat is None:
        conversation.bdat = Bdat(DotStuffer(_line_policy(conversation)), lmtp.replies_due(conversation))
    state = conversation.bdat
    state.chunks += 1
    if state.failed is None and state.relay is None:
        conversation.flush()  # what is queued from now on is the answer to this command
        reply = None
        if "CHUNKING" in conversation.offer:
            reply = await _begin_content(conversation)
        else:
            conversation.error("503 5.5.1 CHUNKING not offered", "not_available")
        if reply is None:
            said = b"".join(conversation.out)
            conversation.out.clear()
            state.failed = Reply.of(said.decode("ascii", "replace").replace("\r\n", "\n").rstrip("\n"))
        else:
            state.relay = _content_relay(conversation)
    if state.chunks > conversation.limits.bdat_chunks:
        await conversation.refuse_and_close(
            Refuse(Cause.TOO_MANY_ERRORS, text="too many chunks", disconnect=True), "data"
        )
    relay = state.relay
    if relay is None:
        await _skip(conversation, size)
        assert state.failed is not None
        conversation.write(state.failed.encode() * (state.replies if last else 1))
        over = last or (conversation.session.transaction is None and state.replies == 1)
        conversation.bdat = None if over else state  # a client that waits for several replies to LAST gets them
        return False
    if conversation.wire.buffered < size:
        conversation.flush()  # the client may wait for the replies before it sends the octets
    await relay.chunk(state.stuffer, size)
    if not last:
        conversation.write(f"250 2.0.0 {size} octets received\r\n".encode())
        return False
    conversation.bdat = None
    relay.finish_chunks(state.stuffer)
    if state.stuffer.bare is not None and state.stuffer.policy == "normalize":
        _record_line_endings(conversation, state.stuffer.bare)
    await _finish_content(conversation, relay)
    return False


def _record_line_endings(conversation: SmtpConversation, bare: str) -> None:
    session = conversation.session
    log.info(
        "line_endings", session=session.id, pipeline=session.pipeline, client=session.client.address, bare=bare
    )


async def _skip(conversation: SmtpConversation, size: int) -> None:
    wire = conversation.wire
    conversation.flush()
    while size:
        wire.set_deadline(conversation.limits.data_timeout)
        block = await wire.read(min(size, 1 << 18))
        if not block:
            raise EndOfStream(b"")
        size -= len(block)


def record(conversation: SmtpConversation) -> None:
    """One record a transaction that we read; without a reply if the client left it."""
    session, transaction = conversation.session, conversation.session.transaction
    assert transaction is not None
    reply = transaction.reply
    accepted = [f"{r.original} {r.reply.code} {r.reply.text}" for r in transaction.recipients if r.reply is not None]
    refused = [f"{address} {answer.code} {answer.text}" for address, answer in transaction.refused]
    finals = None
    if conversation.lmtp or lmtp.speaks_lmtp(conversation.upstream_pool):
        finals = [f"{r.original} {r.final.code} {r.final.text}" for r in transaction.recipients if r.final is not None]
    times = {stage: round(seconds * 1000, 3) for stage, seconds in (session.times or {}).items()}
    session.times = None
    conversation.served.counts.transaction(transaction)
    if isinstance(session, TracedSession):
        session.trace.transaction(session.transactions, transaction, conversation.mail.begun)
    log.info(
        "transaction",
        session=session.id,
        id=transaction.id,
        pipeline=session.pipeline,
        client=session.client.address,
        user=session.typed_user,
        sender=transaction.original_sender,
        recipients=accepted,
        refused=refused,
        size=transaction.size,
        upstream=conversation.mail.server,
        reply=f"{reply.code} {reply.text}" if reply is not None else "",
        replies=finals or None,
        edited=conversation.mail.edited or None,
        stage_ms=times,
        seconds=round(perf_counter() - conversation.mail.begun, 3),
    )
