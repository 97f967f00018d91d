"""The session's upstream: routing, opening, replacing, and the hand-off.

The upstream is opened at the first accepted MAIL (at RCPT where routing needs the recipient). Until a message's
content began, a lost connection is replaced and the accepted envelope replayed; after that nothing is retried
(promise 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.frontend.routing import connect, open_early, pool_for, pool_named, usable
from gateway.frontend.served import HandOff
from gateway.protocol.smtp import Reply, format_mail, format_rcpt
from gateway.relay.envelope import Parameters, adapted
from gateway.session import Recipient
from gateway.upstream.pool import Pool
from gateway.upstream.prelude import give_back, stage_failed
from gateway.upstream.smtp import Connection, UpstreamError
from gateway.verdicts import Cause, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.frontend.draft import Draft
    from gateway.frontend.smtp import SmtpConversation
    from gateway.upstream.server import Server

log = structlog.get_logger("gateway.smtp")

SENDER_OK = Reply.of("250 2.1.0 Ok")
FORBIDDEN_BEHIND_HAND_OFF = ("XCLIENT", "XFORWARD", "BURL")


async def route_and_mail(conversation: SmtpConversation, recipient: Recipient | None) -> Reply | Refuse:
    """Route, connect, say MAIL: the upstream's reply to MAIL, or a refusal of ours."""
    pool = await pool_for(conversation, recipient)
    if isinstance(pool, Refuse):
        return pool
    if recipient is not None and conversation.mail.relayed:
        if pool is not conversation.upstream_pool:
            return Refuse(Cause.OTHER_ROUTE)
        return SENDER_OK
    tried: set[Server] = set()
    before_hand_off = conversation.served.always_hand_off and conversation.hand_off is not HandOff.NEVER
    while True:
        refuse = await connect(conversation, pool, tried)
        if refuse is not None:
            return refuse
        connection = conversation.connection
        assert connection is not None
        try:
            reply = await _say_mail(conversation, connection, recipient)
        except UpstreamError as error:
            drop(conversation, error)
            if connection.server in tried:
                return Refuse(Cause.UPSTREAM_LOST, log=str(error))
            tried.add(connection.server)
            continue
        if isinstance(reply, Reply):
            conversation.mail.relayed = reply.code // 100
            conversation.mail.server = connection.server.url
            if reply.reply_class != 2 and conversation.served.pass_error_message != "auto" and before_hand_off:
                passed = reply if conversation.served.pass_error_message == "always" else None
                return Refuse(Cause.UPSTREAM_DOWN, reply=passed, log=f"MAIL refused: {reply.code} {reply.text}")
        return reply


async def _say_mail(
    conversation: SmtpConversation, connection: Connection, recipient: Recipient | None = None
) -> Reply | Refuse:
    """MAIL, and in the same write the RCPT that waits for it, if the server takes that (`mail.sent`)."""
    session, transaction = conversation.session, conversation.session.transaction
    assert transaction is not None
    parameters = carried(conversation, connection, transaction.parameters)
    if isinstance(parameters, Refuse):
        return parameters
    if conversation.chain.edits_messages:  # their size is no longer what the client said
        parameters = tuple(pair for pair in parameters if pair[0] != "SIZE")
    for stage, hook in conversation.chain.upstream_mail:
        try:
            hook(session, connection)
        except Exception as error:
            part(conversation)  # what other stages wanted to say with this MAIL goes with none
            return stage_failed(stage, "upstream_mail", session, error)
    rcpt = None
    if recipient is not None and connection.pipelining:
        its_parameters = carried(conversation, connection, recipient.parameters)
        if not isinstance(its_parameters, Refuse):
            rcpt = format_rcpt(recipient.address, its_parameters)
    reply = in_place(connection, await connection.mail(format_mail(transaction.sender, parameters), rcpt))
    conversation.mail.sent = recipient if rcpt is not None else None
    return reply


def carried(conversation: SmtpConversation, connection: Connection, parameters: Parameters) -> Parameters | Refuse:
    """The parameters as this server takes them; all of them where it reads the client's own words from now on."""
    if conversation.served.always_hand_off and conversation.hand_off is not HandOff.NEVER:
        return parameters
    return adapted(parameters, connection.extensions, trusted=conversation.session.trusted)


def in_place(connection: Connection, reply: Reply) -> Reply:
    """A reply that ends its command. Raises UpstreamError for 421, and for 3xx, which would make the client go on."""
    if reply.code == 421:
        raise UpstreamError("lost", connection.server.url, f"421 {reply.text}")
    if reply.reply_class == 3:
        raise connection.failed("garbage", f"{reply.code} out of place")
    return reply


def drop(conversation: SmtpConversation, error: UpstreamError) -> None:
    """The connection is of no use any more."""
    connection, conversation.connection = conversation.connection, None
    log.info(
        "upstream_failure", session=conversation.session.id, server=error.server, kind=error.kind, error=str(error)
    )
    if connection is not None:
        connection.abort()


def part(conversation: SmtpConversation) -> None:
    """Leave the upstream: what it was told of the client (login, TLS) is true no more."""
    connection, conversation.connection = conversation.connection, None
    if connection is not None:
        give_back(connection)


async def hand_off_now(conversation: SmtpConversation, last_word: bytes = b"") -> bool:
    """Join client and upstream if the upstream trusts us with nothing that the client would inherit.

    `last_word` is what the client still reads from us, once it is sure. True when the session is over;
    False: it goes on being read, in the envelope grade.
    """
    if conversation.connection is None:
        refuse = await open_early(conversation)
        if refuse is not None:
            conversation.hand_off = HandOff.NEVER
            return False
    connection = conversation.connection
    assert connection is not None
    other_protocol = connection.server.lmtp != conversation.lmtp  # of a server that a stage named
    if other_protocol or (not conversation.served.always_hand_off and _would_inherit(conversation, connection)):
        conversation.hand_off = HandOff.NEVER
        return False
    conversation.write(last_word)
    conversation.flush()
    conversation.splicing = True  # its records say so
    conversation.end_transaction()
    await conversation.join(connection)
    return True


def _would_inherit(conversation: SmtpConversation, connection: Connection) -> bool:
    extensions = connection.extensions
    if any(keyword in extensions for keyword in FORBIDDEN_BEHIND_HAND_OFF):
        return True
    if conversation.session.relayed:  # its login is the client's own
        return False
    return "AUTH" in extensions and bool(conversation.chain.auth)


async def rcpt_alone(connection: Connection, conversation: SmtpConversation, recipient: Recipient) -> Reply:
    parameters = carried(conversation, connection, recipient.parameters)
    if isinstance(parameters, Refuse):
        raise UpstreamError("lost", connection.server.url, "the next server lacks a parameter of the envelope")
    return in_place(connection, await connection.command(format_rcpt(recipient.address, parameters)))


async def replay(conversation: SmtpConversation, error: UpstreamError) -> bool:
    """Give the accepted envelope to another server (or the same, anew); True if each reply has its class again."""
    lost = conversation.connection
    drop(conversation, error)
    mail, pool = conversation.mail, conversation.upstream_pool
    if mail.lost is not None or not isinstance(pool, Pool):
        return False
    exclude = {lost.server} if lost is not None and len(pool.servers) > 1 else set()
    refuse = await connect(conversation, pool, exclude)
    if refuse is not None:
        mail.lost = refuse
        return False
    connection = conversation.connection
    assert connection is not None
    mail.server = connection.server.url
    try:
        reply = await _say_mail(conversation, connection)
        if isinstance(reply, Refuse) or reply.code // 100 != 2:
            mail.lost = Refuse(Cause.UPSTREAM_LOST, log="MAIL was refused when it was replayed")
            part(conversation)
            return False
        for recipient in mail.accepted:
            reply = await rcpt_alone(connection, conversation, recipient)
            if reply.code // 100 != 2:
                mail.lost = Refuse(Cause.UPSTREAM_LOST, log="an accepted recipient was refused when it was replayed")
                part(conversation)  # it would take the message for some of its recipients
                return False
    except UpstreamError as again:
        mail.lost = Refuse(Cause.UPSTREAM_LOST, log=str(again))
        drop(conversation, again)
        return False
    return True


async def change_envelope(conversation: SmtpConversation, draft: Draft, to: Upstream | None) -> Refuse | None:
    """Tell the upstream what stages made of the envelope, and the pool `to` all of it; a refusal that follows.

    An added recipient is one more RCPT; all else begins the envelope anew. What the upstream refuses of it refuses
    the message: nobody would hear of it later.
    """
    mail, transaction, pool = conversation.mail, conversation.session.transaction, conversation.upstream_pool
    assert transaction is not None and isinstance(pool, Pool)
    chosen = pool if to is None else pool_named(conversation, to)
    if isinstance(chosen, Refuse):
        return chosen
    if chosen is pool and not draft.restart and not draft.added:
        return None
    if chosen.servers[0].lmtp and not conversation.lmtp and len(draft.recipients) > 1 and chosen is not pool:
        return Refuse(Cause.UPSTREAM_MISCONFIGURED, log=f"pool {chosen.name} takes one recipient of an SMTP client")
    if mail.lost is not None:
        return mail.lost
    transaction.rewrite(draft.sender, draft.parameters)
    mail.accepted = list(draft.recipients)
    before = conversation.connection
    if before is not None and draft.restart:
        before.needs_reset = True
    refuse = await connect(conversation, chosen)
    if refuse is not None:
        return refuse
    connection = conversation.connection
    assert connection is not None
    anew = draft.restart or connection is not before  # another pool, or a server that left meanwhile
    mail.server = connection.server.url
    try:
        return await _say_envelope(conversation, connection, draft, anew=anew)
    except UpstreamError as error:
        if await replay(conversation, error):
            return None
        return mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))


async def _say_envelope(
    conversation: SmtpConversation, connection: Connection, draft: Draft, *, anew: bool
) -> Refuse | None:
    """MAIL and RCPTs, or those that were added. Raises UpstreamError."""
    for recipient in draft.added:  # what a stage wants of this server for good is not tried again with another
        parameters = carried(conversation, connection, recipient.parameters)
        if isinstance(parameters, Refuse):
            return parameters
    if anew:
        reply = await _say_mail(conversation, connection)
        if isinstance(reply, Refuse):
            return reply
        if reply.code // 100 != 2:
            return _refused_edit(reply, f"the sender {draft.sender}")
    for recipient in draft.recipients if anew else draft.added:
        reply = await rcpt_alone(connection, conversation, recipient)
        if reply.code // 100 != 2:
            connection.needs_reset = True
            return _refused_edit(reply, recipient.address)
    return None


def _refused_edit(reply: Reply, what: str) -> Refuse:
    """The message as stages addressed it is not taken; the class of the upstream's reply is that of ours."""
    text = "an address of this message as it was rewritten is not accepted"
    log_text = f"{what}: {reply.code} {reply.text}"
    return Refuse(Cause.RECIPIENT_REJECTED, text=text, temporary=reply.code < 500, log=log_text)


def takes_bdat(conversation: SmtpConversation) -> bool:
    """Whether content goes out in chunks: the pool says so and the server announced it."""
    connection, pool = conversation.connection, conversation.upstream_pool
    if connection is None or not isinstance(pool, Pool):
        return False
    return pool.settings.bdat and "CHUNKING" in connection.extensions


async def ready_for_bdat(conversation: SmtpConversation) -> Refuse | None:
    """Make sure that the server is there before the first chunk; one that left is replaced: it has nothing."""
    if conversation.mail.lost is not None:
        return conversation.mail.lost
    connection = conversation.connection
    if connection is not None and usable(connection):
        return None
    error = UpstreamError("lost", "", "the upstream closed before BDAT")
    if await replay(conversation, error):
        return None
    return conversation.mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))


async def say_data(conversation: SmtpConversation) -> Reply | Refuse:
    """DATA upstream; a server that left before its 354 is replaced once more: it has none of the content."""
    if conversation.mail.lost is not None:
        return conversation.mail.lost
    connection = conversation.connection
    error = UpstreamError("lost", "", "the upstream closed before DATA")
    if connection is not None and usable(connection):
        try:
            return await _data_alone(connection)
        except UpstreamError as caught:
            error = caught
    if not await replay(conversation, error):
        return conversation.mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))
    assert conversation.connection is not None
    try:
        return await _data_alone(conversation.connection)
    except UpstreamError as caught:
        drop(conversation, caught)
        return Refuse(Cause.UPSTREAM_LOST, log=str(caught))


async def _data_alone(connection: Connection) -> Reply:
    """354, 4xx or 5xx; a 2xx would promise a message that nobody has seen. Raises UpstreamError."""
    reply = await connection.command(b"DATA")
    if reply.code == 354:
        return reply
    if reply.reply_class == 2:
        raise connection.failed("garbage", f"{reply.code} to DATA")
    return in_place(connection, reply)
