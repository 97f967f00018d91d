"""What LMTP changes (RFC 2033): the end of data is answered for each accepted recipient, in order.

| client | upstream | after the end of data |
|---|---|---|
| LMTP | LMTP | each recipient's own reply passes |
| LMTP | SMTP | the upstream's one reply holds for each recipient |
| SMTP | LMTP | one recipient a transaction (LIMITS RCPTMAX=1), whose reply is the message's |
| SMTP | SMTP | one reply |

A refusal of ours holds for each recipient. An upstream lost between its replies leaves 451 4.4.2 for the recipients
that it did not answer; nothing is retried (promise 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.protocol.smtp import Reply
from gateway.relay.outgoing import Answer
from gateway.upstream.pool import Pool
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation


def speaks_lmtp(pool: object) -> bool:
    """Whether the servers of this pool speak LMTP; those of one pool all speak the same."""
    return isinstance(pool, Pool) and pool.servers[0].lmtp


def one_recipient_only(conversation: SmtpConversation) -> bool:
    """Whether an SMTP client may come to a pool that leaves it one recipient a transaction."""
    return not conversation.lmtp and any(speaks_lmtp(pool) for pool in conversation.served.candidates("smtp"))


def one_recipient(conversation: SmtpConversation) -> bool:
    """Whether this transaction, which has an upstream, is for one recipient: SMTP has one reply, LMTP one for each."""
    return not conversation.lmtp and speaks_lmtp(conversation.upstream_pool)


def replies_due(conversation: SmtpConversation) -> int:
    """How many replies the client waits for after its end of data (RFC 2033 4.2, 4.3)."""
    transaction = conversation.session.transaction
    if not conversation.lmtp or transaction is None:
        return 1
    return max(1, len(transaction.recipients))


def finals(answers: Sequence[Answer], recipients: int) -> list[Answer]:
    """An answer for each recipient, where one that stands alone holds for all. A 421 is a Refuse.

    The server that says it leaves, we stay: its 421 would tell the client that we leave too (RFC 5321 3.8).
    """
    stay = [
        Refuse(Cause.UPSTREAM_LOST, log=f"421 {answer.text} to the end of data")
        if isinstance(answer, Reply) and answer.code == 421
        else answer
        for answer in answers
    ]
    return stay * recipients if len(stay) == 1 else stay


def best(replies: Sequence[Reply]) -> Reply:
    """The reply that says whether anybody got the message: 2xx before 4xx before 5xx."""
    return min(replies, key=lambda reply: reply.reply_class)


def worst(replies: Sequence[Reply]) -> Reply:
    """The one reply to an SMTP client for its recipients. Those that stages added are not among them.

    4xx before 5xx: what would make the client try again may not be hidden by what would not.
    """
    return min(replies, key=lambda reply: {4: 0, 5: 1}.get(reply.reply_class, 2))
