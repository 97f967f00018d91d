"""MAIL, RCPT, DATA and BDAT: asked of the chain, relayed to the upstream, answered with the upstream's words.

The upstream is opened at the first accepted MAIL (at RCPT where routing needs the recipient). Until its DATA
was sent a lost connection is replaced and the accepted envelope replayed; after it nothing is retried
(promise 2). RCPTs of one pipelined group travel together: their replies are read when the group ends.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend.served import HandOff
from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import (
    PARAMETER_EXTENSION,
    Command,
    Reply,
    format_mail,
    format_rcpt,
    parse_bdat,
    parse_mail,
    parse_rcpt,
)
from gateway.relay.envelope import ContentRelay, adapted
from gateway.relay.splice import splice
from gateway.session import Recipient, Transaction
from gateway.stage import Outcome
from gateway.upstream.pool import Pool
from gateway.upstream.prelude import give_back, open_upstream
from gateway.upstream.smtp import Connection, UpstreamError
from gateway.verdicts import Cause, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation
    from gateway.upstream.server import Server

log = structlog.get_logger("gateway.smtp")

SENDER_OK = Reply.of("250 2.1.0 Ok")
FORBIDDEN_BEHIND_HAND_OFF = ("XCLIENT", "XFORWARD", "BURL")


class Mail:
    """What the frontend keeps of a transaction beside the stages' view of it.

    `answered`: MAIL was answered by us before any upstream saw it. `relayed` is the class of the upstream's
    reply to MAIL. `pending`: recipients sent upstream whose replies are still to come, with their place in the
    queue of replies. `lost`: what every further command of the transaction gets.
    """

    __slots__ = ("accepted", "answered", "begun", "lost", "pending", "refused", "relayed")

    def __init__(self) -> None:
        self.answered = False
        self.relayed = 0
        self.accepted: list[Recipient] = []
        self.pending: list[tuple[int, Recipient]] = []
        self.lost: Refuse | None = None
        self.refused: Reply | None = None
        self.begun = perf_counter()


class Bdat:
    """A BDAT sequence on its way upstream as DATA."""

    __slots__ = ("chunks", "failed", "relay", "stuffer")

    def __init__(self, stuffer: DotStuffer) -> None:
        self.stuffer = stuffer
        self.relay: ContentRelay | None = None
        self.failed: Reply | None = None
        self.chunks = 0


# -- MAIL -----------------------------------------------------------------------------------------------------


async def mail(conversation: SmtpConversation, command: Command) -> bool:
    """MAIL FROM."""
    session, chain = conversation.session, conversation.chain
    if not session.helo:
        conversation.error("503 5.5.1 send HELO or EHLO first")
        return False
    if session.transaction is not None:
        conversation.error("503 5.5.1 nested MAIL command")
        return False
    if conversation.served.auth_required and not session.user:
        conversation.refuse(Refuse(Cause.AUTH_REQUIRED), "mail")
        return False
    if session.transactions >= conversation.limits.transactions:
        await conversation.refuse_and_close(
            Refuse(Cause.TOO_MANY_ERRORS, text="too many messages in one session", disconnect=True), "mail"
        )
    parsed = parse_mail(command.argument)
    refuse = _parameters_refused(conversation, parsed.parameters) or _too_big(conversation, parsed.parameters)
    if refuse is not None:
        conversation.refuse(refuse, "mail")
        return False
    session.transactions += 1
    transaction = Transaction(f"{session.id}.{session.transactions}", parsed.address, parsed.parameters)
    session.transaction = transaction
    conversation.mail = Mail()
    if chain.mail:
        asked = await conversation.chain.ask(chain.mail, session, transaction, transaction)
        if await conversation.asked(asked, "mail") is not None:
            conversation.end_transaction()
            return False
    conversation.login_deadline = 0.0
    if chain.route_rcpt or session.postponed is not None:
        conversation.mail.answered = True
        conversation.write(SENDER_OK.encode())
        conversation.tell_settled(Phase.MAIL, SENDER_OK)
        return False
    reply = await _route_and_mail(conversation, None)
    if isinstance(reply, Refuse):
        conversation.refuse(reply, "mail")
    else:
        _pass_on(conversation, reply, Phase.MAIL)
        if conversation.hand_off is HandOff.MAIL and await hand_off_now(conversation):
            return False
    if conversation.mail.relayed != 2:
        conversation.end_transaction()
    return False


def _parameters_refused(
    conversation: SmtpConversation, parameters: tuple[tuple[str, str | None], ...]
) -> Refuse | None:
    """A parameter of an extension that was not announced here is 555 5.5.4 (RFC 5321 4.1.1.11)."""
    for keyword, _ in parameters:
        extension = PARAMETER_EXTENSION.get(keyword)
        if extension is None or extension not in conversation.offer:
            if keyword == "SIZE" and conversation.session.esmtp:
                continue
            return Refuse(Cause.NOT_CARRIED, text=f"parameter {keyword} not offered")
    return None


def _too_big(conversation: SmtpConversation, parameters: tuple[tuple[str, str | None], ...]) -> Refuse | None:
    limit = _size_limit(conversation)
    for keyword, value in parameters:
        if keyword == "SIZE" and value and limit and int(value) > limit:
            return Refuse(Cause.MESSAGE_TOO_BIG)
    return None


def _size_limit(conversation: SmtpConversation) -> int:
    offered = conversation.offer.get("SIZE", "")
    return int(offered) if offered.isdigit() else conversation.limits.message_size


# -- routing and the upstream ---------------------------------------------------------------------------------


async def _pool_for(conversation: SmtpConversation, recipient: Recipient | None) -> Pool | Refuse:
    """Where this mail goes: a stage's word, else the login's, else the pool of `splice`."""
    session, chain, served = conversation.session, conversation.chain, conversation.served
    steps = chain.route_early if recipient is None else (*chain.route_early, *chain.route_rcpt)
    chosen = session.upstream
    if steps:
        result = await chain.ask(steps, session, recipient, session.transaction, recipient)
        if result.refuse is not None:
            return result.refuse
        if result.upstream is not None:
            chosen = result.upstream
    return (
        _pool_named(conversation, chosen)
        if chosen is not None
        else served.pool or Refuse(Cause.NO_ROUTE, log="no stage routed this mail and splice names no pool")
    )


def _pool_named(conversation: SmtpConversation, chosen: Upstream) -> Pool | Refuse:
    pools = conversation.served.pools
    try:
        if chosen.server:
            return pools.server(chosen.server)
        return pools[chosen.pool]
    except KeyError:
        return Refuse(Cause.NO_ROUTE, log=f"no pool named {chosen.pool!r}")
    except ValueError as error:
        return Refuse(Cause.UPSTREAM_MISCONFIGURED, log=f"{chosen.server}: {error}")


async def _connect(conversation: SmtpConversation, pool: Pool, exclude: set[Server] | None = None) -> Refuse | None:
    """Make sure that the session is connected to this pool; a refusal that the client may read."""
    connection = conversation.connection
    if connection is not None:
        if conversation.upstream_pool is pool and _usable(connection):
            return None
        conversation.connection = None
        leave(connection)
    opened = await open_upstream(
        conversation.session,
        pool,
        conversation.chain,
        hostname=conversation.served.hostname,
        instance=conversation.served.instance,
        exclude=exclude or set(),
        transcript=conversation.transcript,
    )
    if isinstance(opened, Refuse):
        return opened
    conversation.connection = opened
    conversation.upstream_pool = pool
    return None


def _usable(connection: Connection) -> bool:
    """An upstream that said 421 or closed while the client paused is replaced, unnoticed."""
    return not connection.closing and not connection.wire.eof and not connection.wire.buffered


async def _route_and_mail(conversation: SmtpConversation, recipient: Recipient | None) -> Reply | Refuse:
    """Route, connect, say MAIL: the upstream's reply to MAIL, or a refusal of ours."""
    pool = await _pool_for(conversation, recipient)
    if isinstance(pool, Refuse):
        return pool
    if recipient is not None and conversation.mail.relayed:
        if pool is not conversation.upstream_pool:
            return Refuse(Cause.OTHER_ROUTE)
        return SENDER_OK
    tried: set[Server] = set()
    while True:
        refuse = await _connect(conversation, pool, tried)
        if refuse is not None:
            return refuse
        connection = conversation.connection
        assert connection is not None
        try:
            reply = await _say_mail(conversation, connection)
        except UpstreamError as error:
            _drop(conversation, error)
            if connection.server in tried:
                return Refuse(Cause.UPSTREAM_LOST, log=str(error))
            tried.add(connection.server)
            continue
        if isinstance(reply, Reply):
            conversation.mail.relayed = reply.code // 100
        return reply


async def _say_mail(conversation: SmtpConversation, connection: Connection) -> Reply | Refuse:
    session, transaction = conversation.session, conversation.session.transaction
    assert transaction is not None
    parameters = adapted(transaction.parameters, connection.extensions, trusted=session.trusted)
    if isinstance(parameters, Refuse):
        return parameters
    for _, hook in conversation.chain.upstream_mail:
        hook(session, connection)
    reply = await connection.mail(format_mail(transaction.sender, parameters))
    if reply.code == 421:
        raise UpstreamError("lost", connection.server.url, f"{reply.code} {reply.text}")
    return reply


def _drop(conversation: SmtpConversation, error: UpstreamError) -> None:
    """The connection is of no use any more."""
    connection, conversation.connection = conversation.connection, None
    log.info(
        "upstream_failure", session=conversation.session.id, server=error.server, kind=error.kind, error=str(error)
    )
    if connection is not None:
        connection.abort()


def leave(connection: Connection) -> None:
    """End politely, or keep for the next session where the pool allows it."""
    give_back(connection)


async def open_for_login(conversation: SmtpConversation) -> Refuse | None:
    """Open the upstream at once, because the login is its to decide or the hand-off follows."""
    pool = await _pool_for(conversation, None)
    if isinstance(pool, Refuse):
        return pool
    return await _connect(conversation, pool)


async def hand_off_now(conversation: SmtpConversation, last_word: bytes = b"") -> bool:
    """Join client and upstream if the upstream trusts us with nothing that the client would inherit.

    `last_word` is what the client still reads from us, once it is sure.     True when the session is over. False: it goes on being read, in the envelope grade.
    """
    if conversation.connection is None:
        refuse = await open_for_login(conversation)
        if refuse is not None:
            conversation.hand_off = HandOff.NEVER
            return False
    connection = conversation.connection
    assert connection is not None
    if not conversation.served.always_hand_off and _would_inherit(conversation, connection):
        conversation.hand_off = HandOff.NEVER
        return False
    conversation.write(last_word)
    conversation.flush()
    conversation.splicing = True
    conversation.end_transaction()
    session = conversation.session
    log.info("hand_off", session=session.id, server=connection.server.url)
    conversation.wire.on_gone = None
    try:
        result = await splice(conversation.wire, connection.wire, idle=conversation.limits.idle_timeout)
        conversation.reason = "handed off"
        log.info(
            "spliced",
            session=session.id,
            server=connection.server.url,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            reason=result.reason,
        )
    finally:
        conversation.connection = None
        connection.abort()
    return True


def _would_inherit(conversation: SmtpConversation, connection: Connection) -> bool:
    extensions = connection.extensions
    if any(keyword in extensions for keyword in FORBIDDEN_BEHIND_HAND_OFF):
        return True
    return "AUTH" in extensions and bool(conversation.chain.auth)


# -- RCPT -----------------------------------------------------------------------------------------------------


async def rcpt(conversation: SmtpConversation, command: Command) -> bool:
    """RCPT TO."""
    session, chain = conversation.session, conversation.chain
    transaction = session.transaction
    if transaction is None:
        conversation.error("503 5.5.1 need MAIL command")
        return False
    if conversation.bdat is not None:
        conversation.error("503 5.5.1 BDAT already begun")
        return False
    mail = conversation.mail
    parsed = parse_rcpt(command.argument, utf8=transaction.smtputf8)
    recipient = Recipient(parsed.address, parsed.parameters, len(transaction.recipients))
    refuse = _recipient_refused(conversation, recipient)
    if refuse is not None:
        _refuse_recipient(conversation, recipient, refuse, "")
        return False
    if chain.rcpt:
        result = await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
        if result.until or (result.refuse is not None and result.refuse.disconnect):
            await settle(conversation)
        reply = await conversation.asked(result, "rcpt")
        if reply is not None:
            transaction.refused.append((recipient.original, reply))
            return False
    if chain.route_rcpt or not mail.relayed:
        opened = mail.refused or await _route_and_mail(conversation, recipient)
        if isinstance(opened, Refuse):
            _refuse_recipient(conversation, recipient, opened, "route")
            return False
        if opened.code // 100 != 2:
            # MAIL was answered by us before this upstream saw it: its word comes with the recipient.
            mail.refused = opened
            mail.relayed = 0
            transaction.refused.append((recipient.original, opened))
            _pass_on(conversation, opened, Phase.RCPT)
            return False
    await _say_rcpt(conversation, recipient)
    if conversation.hand_off in (HandOff.RCPT, HandOff.MAIL):
        await settle(conversation)
        await hand_off_now(conversation)
    return False


def _recipient_refused(conversation: SmtpConversation, recipient: Recipient) -> Refuse | None:
    session, transaction = conversation.session, conversation.session.transaction
    assert transaction is not None
    refuse = _parameters_refused(conversation, recipient.parameters)
    if refuse is not None:
        return refuse
    if conversation.mail.lost is not None:
        return conversation.mail.lost
    if len(transaction.recipients) + len(conversation.mail.pending) >= conversation.limits.recipients:
        return Refuse(Cause.TOO_MANY_RECIPIENTS)
    if session.postponed is not None and not session.user:
        if recipient.address.partition("@")[0].lower() != "postmaster":
            return session.postponed[0]
    return None


def _refuse_recipient(conversation: SmtpConversation, recipient: Recipient, refuse: Refuse, stage: str) -> None:
    session = conversation.session
    if session.postponed is not None and refuse is session.postponed[0]:
        stage = session.postponed[1]
    reply = conversation.refuse(refuse, "rcpt", stage)
    if session.transaction is not None:
        session.transaction.refused.append((recipient.original, reply))
    if refuse.disconnect or reply.code == 421:
        from gateway.frontend.smtp import Closing

        raise Closing(refuse.cause.value)


async def _say_rcpt(conversation: SmtpConversation, recipient: Recipient) -> None:
    """Send RCPT upstream; its reply is awaited now, or with the group if more commands wait already."""
    connection = conversation.connection
    mail = conversation.mail
    if connection is not None:
        parameters = adapted(recipient.parameters, connection.extensions, trusted=conversation.session.trusted)
        if isinstance(parameters, Refuse):
            _refuse_recipient(conversation, recipient, parameters, "")
            return
        connection.send(format_rcpt(recipient.address, parameters) + b"\r\n")
    mail.pending.append((len(conversation.out), recipient))
    conversation.write(b"")  # the place of its reply
    pipelined = connection is not None and connection.pipelining and conversation.wire.has_line()
    if not pipelined or len(mail.pending) >= 100:
        await settle(conversation)


async def settle(conversation: SmtpConversation) -> None:
    """Read the replies to the recipients that are under way and put each in its place."""
    mail = conversation.mail
    if mail is None or not mail.pending:
        return
    pending, mail.pending = mail.pending, []
    connection = conversation.connection
    answered = 0
    error: UpstreamError | None = None
    if connection is None:
        error = UpstreamError("lost", "", "the connection was lost before")
    else:
        try:
            for place, recipient in pending:
                reply = await connection.reply()
                if reply.code == 421:
                    raise UpstreamError("lost", connection.server.url, f"421 {reply.text}")
                _recipient_answered(conversation, place, recipient, reply)
                answered += 1
        except UpstreamError as caught:
            error = caught
    if error is None:
        return
    rest = pending[answered:]
    if await _replay(conversation, error):
        assert conversation.connection is not None
        try:
            for place, recipient in rest:
                reply = await _rcpt_alone(conversation.connection, conversation, recipient)
                _recipient_answered(conversation, place, recipient, reply)
                answered += 1
            return
        except UpstreamError as again:
            _drop(conversation, again)
    mail.lost = mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))
    for place, recipient in pending[answered:]:
        reply = conversation.reply_to(mail.lost)
        conversation.record_refusal(mail.lost, "rcpt", "", reply)
        recipient.reply = reply
        conversation.session.transaction.refused.append((recipient.original, reply))  # type: ignore[union-attr]
        conversation.out[place] = reply.encode()


def _recipient_answered(conversation: SmtpConversation, place: int, recipient: Recipient, reply: Reply) -> None:
    transaction = conversation.session.transaction
    assert transaction is not None
    recipient.reply = reply
    if reply.code // 100 == 2:
        recipient.index = len(transaction.recipients)
        transaction.recipients.append(recipient)
        conversation.mail.accepted.append(recipient)
    else:
        transaction.refused.append((recipient.original, reply))
    shown = _softened(conversation, reply)
    conversation.out[place] = shown.encode()
    conversation.tell_settled(Phase.RCPT, shown)


async def _rcpt_alone(connection: Connection, conversation: SmtpConversation, recipient: Recipient) -> Reply:
    parameters = adapted(recipient.parameters, connection.extensions, trusted=conversation.session.trusted)
    if isinstance(parameters, Refuse):
        raise UpstreamError("lost", connection.server.url, "the next server lacks a parameter of the envelope")
    reply = await connection.command(format_rcpt(recipient.address, parameters))
    if reply.code == 421:
        raise UpstreamError("lost", connection.server.url, f"421 {reply.text}")
    return reply


async def _replay(conversation: SmtpConversation, error: UpstreamError) -> bool:
    """Give the accepted envelope to another server (or the same, anew); True if each reply has its class again."""
    lost = conversation.connection
    _drop(conversation, error)
    mail, pool = conversation.mail, conversation.upstream_pool
    if mail.lost is not None or not isinstance(pool, Pool):
        return False
    exclude = {lost.server} if lost is not None and len(pool.servers) > 1 else set()
    refuse = await _connect(conversation, pool, exclude)
    if refuse is not None:
        mail.lost = refuse
        return False
    connection = conversation.connection
    assert connection is not None
    try:
        reply = await _say_mail(conversation, connection)
        if isinstance(reply, Refuse) or reply.code // 100 != 2:
            mail.lost = Refuse(Cause.UPSTREAM_LOST, log="MAIL was refused when it was replayed")
            return False
        for recipient in mail.accepted:
            reply = await _rcpt_alone(connection, conversation, recipient)
            if reply.code // 100 != 2:
                mail.lost = Refuse(Cause.UPSTREAM_LOST, log="an accepted recipient was refused when it was replayed")
                return False
    except UpstreamError as again:
        mail.lost = Refuse(Cause.UPSTREAM_LOST, log=str(again))
        _drop(conversation, again)
        return False
    return True


# -- DATA and BDAT --------------------------------------------------------------------------------------------


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
    await _finish_content(conversation, relay)
    return False


def _line_policy(conversation: SmtpConversation) -> str:
    """`reject` or `normalize` for this client (design section 9)."""
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
        else:
            conversation.error("554 5.5.1 no valid recipients")
        return None
    if chain.data:
        reply = await conversation.asked(await chain.ask(chain.data, session, transaction, transaction), "data")
        if reply is not None:
            _record(conversation, reply)
            reset(conversation)
            return None
    said = await _say_data(conversation)
    if isinstance(said, Refuse):
        _record(conversation, conversation.refuse(said, "data"))
        conversation.end_transaction()
        return None
    reply = said
    if reply.code != 354:
        _record(conversation, _pass_on(conversation, reply, Phase.DATA))
        reset(conversation)
        return None
    return reply


async def _say_data(conversation: SmtpConversation) -> Reply | Refuse:
    """DATA upstream; a server that left before its 354 is replaced once more: it has none of the content."""
    connection = conversation.connection
    error = UpstreamError("lost", "", "the upstream closed before DATA")
    if connection is not None and _usable(connection):
        try:
            reply = await connection.command(b"DATA")
            if reply.code != 421:
                return reply
            error = UpstreamError("lost", connection.server.url, f"421 {reply.text}")
        except UpstreamError as caught:
            error = caught
    if not await _replay(conversation, error):
        return conversation.mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))
    assert conversation.connection is not None
    try:
        reply = await conversation.connection.command(b"DATA")
    except UpstreamError as caught:
        _drop(conversation, caught)
        return Refuse(Cause.UPSTREAM_LOST, log=str(caught))
    if reply.code == 421:
        _drop(conversation, UpstreamError("lost", "", f"421 {reply.text}"))
        return Refuse(Cause.UPSTREAM_LOST, log=f"421 {reply.text}")
    return reply


def _content_relay(conversation: SmtpConversation, connection: Connection) -> ContentRelay:
    served, transaction = conversation.served, conversation.session.transaction
    assert transaction is not None

    def commit(value: bool) -> None:
        conversation.committed = value

    relay = ContentRelay(
        conversation.wire,
        connection,
        size_limit=_size_limit(conversation),
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
    if isinstance(outcome, Refuse):
        relay.abandon()
        conversation.connection = None
        reply = conversation.refuse(outcome, "message")
    else:
        reply = _pass_on(conversation, outcome, Phase.MESSAGE)
        if outcome.code == 421 or relay.abandoned:
            relay.abandon()
            conversation.connection = None
    transaction.reply = reply
    _record(conversation, reply)
    conversation.end_transaction()


async def bdat(conversation: SmtpConversation, command: Command) -> bool:
    """BDAT (RFC 3030): chunks are checked like DATA and go upstream as DATA; each is consumed whatever happens."""
    from gateway.frontend.smtp import Closing

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
        reply = None if "CHUNKING" not in conversation.offer else await _begin_content(conversation)
        if reply is None:
            said = b"".join(conversation.out[before:]) or b"503 5.5.1 CHUNKING not offered\r\n"
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
    await _finish_content(conversation, relay)
    return False


async def _skip(conversation: SmtpConversation, size: int) -> None:
    wire = conversation.wire
    conversation.flush()
    while size:
        wire.set_deadline(conversation.limits.data_timeout)
        block = await wire.read(min(size, 1 << 18))
        if not block:
            from gateway.relay.wire import EndOfStream

            raise EndOfStream(b"")
        size -= len(block)


# -- the rest -------------------------------------------------------------------------------------------------


def reset(conversation: SmtpConversation) -> None:
    """RSET, EHLO, or a refused DATA: forget the transaction here, and at the upstream before the next MAIL."""
    if conversation.bdat is not None:
        if conversation.bdat.relay is not None:
            conversation.bdat.relay.abandon()
            conversation.connection = None
        conversation.bdat = None
    if conversation.session.transaction is None:
        return
    connection = conversation.connection
    if connection is not None and conversation.mail.relayed:
        connection.needs_reset = True
    conversation.end_transaction()


def _softened(conversation: SmtpConversation, reply: Reply) -> Reply:
    if not conversation.served.soft_bounce or reply.code < 500:
        return reply
    return conversation.reply_to(Refuse(Cause.POLICY, reply=reply))


def _pass_on(conversation: SmtpConversation, reply: Reply, phase: Phase) -> Reply:
    """The upstream's code and text to the client."""
    shown = _softened(conversation, reply)
    conversation.write(shown.encode())
    if shown.code >= 400 and conversation.chain.settled:
        outcome = Outcome(phase.name.lower(), shown.code // 100, None, "upstream", shown)
        conversation.chain.tell_settled(conversation.session, outcome)
    else:
        conversation.tell_settled(phase, shown)
    return shown


def _record(conversation: SmtpConversation, reply: Reply) -> None:
    """One record a transaction that we read."""
    session, transaction = conversation.session, conversation.session.transaction
    assert transaction is not None
    connection = conversation.connection
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
        upstream=connection.server.url if connection is not None else "",
        reply=f"{reply.code} {reply.text}",
        stage_ms=times,
        seconds=round(perf_counter() - conversation.mail.begun, 3),
    )
