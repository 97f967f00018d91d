"""MAIL and RCPT: asked of the chain, relayed to the upstream, answered with the upstream's words.

RCPTs of one pipelined group travel together: their replies are read when the group ends.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from gateway.facts import Phase
from gateway.frontend import lmtp
from gateway.frontend.served import HandOff
from gateway.frontend.smtp_upstream import (
    carried,
    drop,
    hand_off_now,
    in_place,
    rcpt_alone,
    replay,
    route_and_mail,
)
from gateway.protocol.smtp import PARAMETER_EXTENSION, Command, Reply, format_rcpt, parse_mail, parse_rcpt
from gateway.session import Recipient, Transaction
from gateway.stage import Outcome
from gateway.upstream.smtp import UpstreamError
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation
    from gateway.pipeline.chain import Step
    from gateway.verdicts import Edits


class Mail:
    """What the frontend keeps of a transaction beside the stages' view of it.

    `relayed` is the class of the upstream's reply to MAIL, 0 while no upstream has seen it; `server` its URL.
    `asked` is the recipient last asked about. `pending`: recipients sent upstream whose replies are still to come,
    with their place in the queue of replies. `sent`: the recipient that went upstream with MAIL. `lost`: what every
    further command of the transaction gets. `steps`: the stages that read its content, and what each may do to it;
    `edited`: the ids of those that did.
    """

    __slots__ = (
        "accepted", "asked", "begun", "edited", "lost", "pending", "refused", "relayed", "sent", "server", "steps",
    )  # fmt: skip

    def __init__(self) -> None:
        self.relayed = 0
        self.server = ""
        self.asked: Recipient | None = None
        self.accepted: list[Recipient] = []
        self.pending: list[tuple[int, Recipient]] = []
        self.sent: Recipient | None = None
        self.lost: Refuse | None = None
        self.refused: Reply | None = None
        self.steps: list[tuple[Step, Edits]] = []
        self.edited: list[str] = []
        self.begun = perf_counter()


async def mail(conversation: SmtpConversation, command: Command) -> bool:
    """MAIL FROM."""
    session, chain = conversation.session, conversation.chain
    if not session.helo and conversation.served.helo_required:
        conversation.error(f"503 5.5.1 send {'LHLO' if conversation.lmtp else 'HELO or EHLO'} first")
        return False
    if session.transaction is not None:
        conversation.error("503 5.5.1 nested MAIL command")
        return False
    if conversation.served.auth_required and not session.user:
        conversation.refuse(Refuse(Cause.AUTH_REQUIRED), "mail")
        conversation.count_error()
        return False
    if session.transactions >= conversation.limits.transactions:
        await conversation.refuse_and_close(
            Refuse(Cause.TOO_MANY_ERRORS, text="too many messages in one session", disconnect=True), "mail"
        )
    parsed = parse_mail(command.argument)
    refuse = _parameters_refused(conversation, parsed.parameters) or _too_big(conversation, parsed.parameters)
    if refuse is not None:
        conversation.refuse(refuse, "mail")
        conversation.count_error()
        return False
    session.transactions += 1
    transaction = Transaction(f"{session.id}.{session.transactions}", parsed.address, parsed.parameters)
    session.transaction = transaction
    conversation.mail = Mail()
    conversation.bdat = None
    if chain.mail:
        asked = await conversation.chain.ask(chain.mail, session, transaction, transaction)
        if await conversation.asked(asked, "mail") is not None:
            conversation.end_transaction()
            return False
    conversation.login_deadline = 0.0
    if chain.route_rcpt or session.postponed is not None:
        sender_ok = Reply.of(conversation.replies.fixed("sender_ok"))
        conversation.write(sender_ok.encode())
        conversation.tell_settled(Phase.MAIL, sender_ok)
        return False
    reply = await route_and_mail(conversation, None)
    if isinstance(reply, Refuse):
        conversation.end_if_told(reply, conversation.refuse(reply, "mail"))
    else:
        shown = pass_on(conversation, reply, Phase.MAIL)
        if shown.reply_class != 2:
            transaction.reply = shown
        if conversation.hand_off is HandOff.MAIL and await hand_off_now(conversation):
            return False
    if conversation.mail.relayed != 2:
        conversation.end_transaction()
    return False


def _parameters_refused(
    conversation: SmtpConversation, parameters: tuple[tuple[str, str | None], ...]
) -> Refuse | None:
    """A parameter of an extension that was not announced here is 555 5.5.4 (RFC 5321 4.1.1.11)."""
    if conversation.served.always_hand_off and conversation.hand_off is not HandOff.NEVER:
        return None  # the upstream reads them itself
    for keyword, value in parameters:
        if keyword == "BODY" and value is not None and value.upper() == "BINARYMIME":
            return Refuse(Cause.NOT_CARRIED, text="BINARYMIME not offered")
        extension = PARAMETER_EXTENSION.get(keyword)
        if extension is None or extension not in conversation.offer:
            if keyword == "SIZE" and conversation.session.esmtp:
                continue
            return Refuse(Cause.NOT_CARRIED, text=f"parameter {keyword} not offered")
    return None


def _too_big(conversation: SmtpConversation, parameters: tuple[tuple[str, str | None], ...]) -> Refuse | None:
    limit = size_limit(conversation)
    for keyword, value in parameters:
        if keyword == "SIZE" and value and limit and int(value) > limit:
            return Refuse(Cause.MESSAGE_TOO_BIG)
    return None


def size_limit(conversation: SmtpConversation) -> int:
    offered = conversation.offer.get("SIZE", "")
    return int(offered) if offered.isdigit() else conversation.limits.message_size


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
    if len(transaction.refused) >= conversation.limits.recipients:
        conversation.error("452 4.5.3 too many recipients")
        return False
    if mail.pending and lmtp.one_recipient(conversation):
        await settle(conversation)  # whether there is one already
    parsed = parse_rcpt(command.argument, utf8=transaction.smtputf8)
    recipient = mail.asked = Recipient(parsed.address, parsed.parameters, len(transaction.recipients))
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
        opened = mail.refused or await route_and_mail(conversation, recipient)
        if isinstance(opened, Refuse):
            _refuse_recipient(conversation, recipient, opened, "route")
            return False
        if opened.code // 100 != 2:
            # MAIL was answered by us before this upstream saw it: its word comes with the recipient.
            mail.refused = opened
            mail.relayed = 0
            transaction.refused.append((recipient.original, opened))
            pass_on(conversation, opened, Phase.RCPT)
            return False
    await _say_rcpt(conversation, recipient)
    if conversation.hand_off in (HandOff.RCPT, HandOff.MAIL) and session.postponed is None:
        await settle(conversation)
        if mail.lost is None:  # or the client would go on in a transaction that no server knows of
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
    if transaction.recipients and lmtp.one_recipient(conversation):
        return Refuse(Cause.TOO_MANY_RECIPIENTS, text="recipient needs a transaction of its own")
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
    conversation.end_if_told(refuse, reply)


async def _say_rcpt(conversation: SmtpConversation, recipient: Recipient) -> None:
    """Send RCPT upstream; its reply is awaited now, or with the group if more commands wait already."""
    connection = conversation.connection
    mail = conversation.mail
    if connection is not None and mail.sent is not recipient:
        parameters = carried(conversation, connection, recipient.parameters)
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
    """Read the replies to the recipients that are under way and put each in its place. Raises Closing."""
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
                reply = in_place(connection, await connection.reply())
                _recipient_answered(conversation, place, recipient, reply)
                answered += 1
        except UpstreamError as caught:
            error = caught
    if error is None:
        return
    rest = pending[answered:]
    if await replay(conversation, error):
        assert conversation.connection is not None
        try:
            for place, recipient in rest:
                reply = await rcpt_alone(conversation.connection, conversation, recipient)
                _recipient_answered(conversation, place, recipient, reply)
                answered += 1
            return
        except UpstreamError as again:
            drop(conversation, again)
    mail.lost = mail.lost or Refuse(Cause.UPSTREAM_LOST, log=str(error))
    reply = conversation.reply_to(mail.lost)
    for place, recipient in pending[answered:]:
        mail.asked = recipient
        conversation.record_refusal(mail.lost, "rcpt", "", reply)
        recipient.reply = reply
        conversation.session.transaction.refused.append((recipient.original, reply))  # type: ignore[union-attr]
        conversation.out[place] = reply.encode()
    if answered < len(pending):
        conversation.end_if_told(mail.lost, reply)


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
    shown = softened(conversation, reply)
    conversation.out[place] = shown.encode()
    conversation.tell_settled(Phase.RCPT, shown)


async def leave_chunks(conversation: SmtpConversation) -> None:
    """What came in BDAT chunks without a LAST is no message."""
    bdat, conversation.bdat = conversation.bdat, None
    if bdat is not None and bdat.relay is not None:
        await bdat.relay.leave()
        if bdat.relay.abandoned:
            conversation.connection = None


async def reset(conversation: SmtpConversation) -> None:
    """RSET, EHLO, or a refused DATA: forget the transaction here, and at the upstream before the next MAIL."""
    await leave_chunks(conversation)
    if conversation.session.transaction is None:
        return
    connection = conversation.connection
    if connection is not None and conversation.mail.relayed:
        connection.needs_reset = True
    conversation.end_transaction()


def softened(conversation: SmtpConversation, reply: Reply) -> Reply:
    if not conversation.served.soft_bounce or reply.code < 500:
        return reply
    return conversation.reply_to(Refuse(Cause.POLICY, reply=reply))


def pass_on(conversation: SmtpConversation, reply: Reply, phase: Phase) -> Reply:
    """The upstream's code and text to the client."""
    shown = softened(conversation, reply)
    conversation.write(shown.encode())
    told(conversation, shown, phase)
    return shown


def told(conversation: SmtpConversation, shown: Reply, phase: Phase) -> None:
    """`settled` for a reply of the upstream's."""
    if shown.code >= 400 and conversation.chain.settled:
        outcome = Outcome(phase.name.lower(), shown.code // 100, None, "upstream", shown)
        conversation.chain.tell_settled(conversation.session, outcome)
    else:
        conversation.tell_settled(phase, shown)
