"""DATA and BDAT: content flows upstream as it comes; the answer to its end is the upstream's."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend.closing import Closing
from gateway.frontend.smtp_mail import pass_on, reset, size_limit
from gateway.frontend.smtp_upstream import say_data
from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Command, Reply, parse_bdat
from gateway.relay.envelope import ContentRelay
from gateway.relay.wire import EndOfStream
from gateway.upstream.smtp import Connection
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation

log = structlog.get_logger("gateway.smtp")


class Bdat:
    """A BDAT sequence on its way upstream as DATA."""

    __slots__ = ("chunks", "failed", "relay", "stuffer")

    def __init__(self, stuffer: DotStuffer) -> None:
        self.stuffer = stuffer
        self.relay: ContentRelay | None = None
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
    connection = conversation.connection
    assert connection is not None
    scanner = DataScanner(_line_policy(conversation))
    relay = _content_relay(conversation, connection)
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
        conversation.error("503 5.5.1 need MAIL and RCPT first")
        return None
    if not transaction.recipients:
        if mail.lost is not None:
            conversation.refuse(mail.lost, "data")
            conversation.count_error()
        else:
            conversation.error("554 5.5.1 no valid recipients")
        return None
    if chain.data:
        reply = await conversation.asked(await chain.ask(chain.data, session, transaction, transaction), "data")
        if reply is not None:
            transaction.reply = reply
            reset(conversation)
            return None
    said = await say_data(conversation)
    if isinstance(said, Refuse):
        reply = transaction.reply = conversation.refuse(said, "data")
        conversation.end_transaction()
        conversation.end_if_told(said, reply)
        return None
    reply = said
    if reply.code != 354:
        transaction.reply = pass_on(conversation, reply, Phase.DATA)
        reset(conversation)
        return None
    return reply


def _content_relay(conversation: SmtpConversation, connection: Connection) -> ContentRelay:
    served, transaction = conversation.served, conversation.session.transaction
    assert transaction is not None

    def commit(value: bool) -> None:
        conversation.committed = value

    relay = ContentRelay(
        conversation.wire,
        connection,
        size_limit=size_limit(conversation),
        data_timeout=conversation.limits.data_timeout,
        end_timeout=served.end_of_data,
        commit=commit,
        max_received=served.max_received,
    )
    relay.head(transaction.head or ())
    return relay


async def _finish_content(conversation: SmtpConversation, relay: ContentRelay) -> None:
    """After the client's end of data: hand over the end, or refuse; one record a transaction."""
    transaction = conversation.session.transaction
    assert transaction is not None
    transaction.size = relay.size
    outcome = relay.refused() or await relay.end()
    if isinstance(outcome, Reply) and outcome.code == 421:
        # It leaves, we stay: its 421 would tell the client that we leave too (RFC 5321 3.8).
        outcome = Refuse(Cause.UPSTREAM_LOST, log=f"421 {outcome.text} to the end of data")
    if isinstance(outcome, Refuse):
        relay.abandon()
        conversation.connection = None
        reply = conversation.refuse(outcome, "message")
    else:
        reply = pass_on(conversation, outcome, Phase.MESSAGE)
        if reply.reply_class == 2:
            conversation.errors = conversation.junk = 0  # both count what comes without mail
        if relay.abandoned:
            relay.abandon()
            conversation.connection = None
    transaction.reply = reply
    conversation.end_transaction()


async def bdat(conversation: SmtpConversation, command: Command) -> bool:
    """BDAT (RFC 3030): chunks are checked like DATA and go upstream as DATA; each is consumed whatever happens."""
    try:
        size, last = parse_bdat(command.argument)
    except PeerError as error:
        # How many octets follow is unknown: whatever came next could be read as commands.
        conversation.error((error.reply or b"501 5.5.4 bad BDAT").decode("ascii", "replace"))
        raise Closing("malformed BDAT") from None
    if conversation.bdat is None:
        conversation.bdat = Bdat(DotStuffer(_line_policy(conversation)))
    state = conversation.bdat
    state.chunks += 1
    if state.failed is None and state.relay is None:
        before = len(conversation.out)
        reply = None
        if "CHUNKING" in conversation.offer:
            reply = await _begin_content(conversation)
        else:
            conversation.error("503 5.5.1 CHUNKING not offered")
        if reply is None:
            said = b"".join(conversation.out[before:])
            del conversation.out[before:]
            state.failed = Reply.of(said.decode("ascii", "replace").replace("\r\n", "\n").rstrip("\n"))
        else:
            connection = conversation.connection
            assert connection is not None
            state.relay = _content_relay(conversation, connection)
    if state.chunks > conversation.limits.bdat_chunks:
        await conversation.refuse_and_close(
            Refuse(Cause.TOO_MANY_ERRORS, text="too many chunks", disconnect=True), "data"
        )
    relay = state.relay
    if relay is None:
        await _skip(conversation, size)
        assert state.failed is not None
        conversation.write(state.failed.encode())
        if last or conversation.session.transaction is None:
            conversation.bdat = None
        return False
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
    times = {stage: round(seconds * 1000, 3) for stage, seconds in (session.times or {}).items()}
    session.times = None
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
        stage_ms=times,
        seconds=round(perf_counter() - conversation.mail.begun, 3),
    )
