"""What stages made of a message, on its way to the upstream: the envelope, DATA or BDAT, header and body, answers.

The stages of the message phase have decided before (`smtp_content.py`); here nothing is decided any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from gateway.frontend import smtp_upstream
from gateway.frontend.draft import Draft
from gateway.protocol.smtp import Reply
from gateway.relay.envelope import head_bytes
from gateway.relay.outgoing import Answer, Outgoing
from gateway.verdicts import AddHeader, Cause, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation
    from gateway.session import Transaction

log = structlog.get_logger("gateway.smtp")

BLOCK = 1 << 18


def outgoing(conversation: SmtpConversation, end_timeout: float, *, bdat: bool = False) -> Outgoing:
    """The connected upstream, which waits for content."""
    assert conversation.connection is not None

    def commit(value: bool) -> None:
        conversation.committed = value

    return Outgoing(
        conversation.connection,
        data_timeout=conversation.limits.data_timeout,
        end_timeout=end_timeout,
        commit=commit,
        bdat=bdat,
    )


async def open_upstream(
    conversation: SmtpConversation, draft: Draft, to: Upstream | None, end_timeout: float
) -> Outgoing | Refuse | Reply:
    """Say the envelope where it changed, and DATA; the upstream's own word if it wants no content."""
    if not draft.recipients:
        return Refuse(Cause.CONTENT, log="no recipient is left")
    refuse = await smtp_upstream.change_envelope(conversation, draft, to)
    if refuse is not None:
        return refuse
    if smtp_upstream.takes_bdat(conversation):
        refuse = await smtp_upstream.ready_for_bdat(conversation)
        if refuse is not None:
            return refuse
    bdat = smtp_upstream.takes_bdat(conversation)  # the server may be another one now
    if not bdat:
        said = await smtp_upstream.say_data(conversation)
        if isinstance(said, Refuse) or said.code != 354:
            return said
    return outgoing(conversation, end_timeout, bdat=bdat)


async def send_content(
    out: Outgoing, draft: Draft, own: Sequence[AddHeader], begun: Callable[[], None]
) -> Refuse | None:
    """Header, with the gateway's `own` fields, and body, up to the end, which waits; what stopped it on the way.

    `begun` is called when the draft is being read: nothing need be kept for it any more.
    """
    if draft.changed:
        reader = draft.body.reader(draft.offset)
        await out.send(draft.head(own))
    else:
        reader = draft.body.reader()
        if own:
            await out.send(head_bytes(own))
    begun()
    try:
        while out.refused is None and (block := await reader.read(BLOCK)):
            await out.send(block)
    except OSError as error:  # of the file: Outgoing keeps those of the connection to itself
        return Refuse(Cause.STAGE_FAILED, log=f"spool: {error.strerror or error}")
    finally:
        reader.close()
    return out.refused


def spread(
    answers: Sequence[Answer], draft: Draft, transaction: Transaction, named: Mapping[int, Refuse], pipeline: str
) -> list[Answer]:
    """What the upstream's recipients got, for the client's: those may be others.

    Stages add and remove recipients; `named` were refused by themselves, by their index.
    """
    each = list(answers) * len(draft.recipients) if len(answers) == 1 else answers
    got = {id(recipient): answer for recipient, answer in zip(draft.recipients, each, strict=False)}
    for recipient in draft.added:
        answer = got.get(id(recipient))
        if isinstance(answer, Reply) and answer.reply_class != 2:
            text = f"{recipient.address}, added by a stage, was refused: {answer.code} {answer.text}"
            log.warning("warning", pipeline=pipeline, text=text)
    # Whom stages took out, for him the message is delivered if it is for anybody.
    rest = min(answers, key=_badness) if answers else Refuse(Cause.CONTENT)
    return [named.get(one.index) or got.get(id(one), rest) for one in transaction.recipients]


def _badness(answer: Answer) -> int:
    """The class of its reply; a refusal of ours counts as temporary."""
    return answer.reply_class if isinstance(answer, Reply) else 4
