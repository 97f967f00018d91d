"""AUTH: its place in a session and its words (RFC 4954); the login itself is `login.py`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.frontend import login
from gateway.frontend.offer import offered_mechanisms, tls_would_help
from gateway.protocol import sasl
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Command
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation


async def auth(conversation: SmtpConversation, command: Command) -> bool:
    """The AUTH command; always goes on with the session or raises Closing."""
    refusal = await _out_of_place(conversation, command)
    if refusal:
        conversation.error(refusal)
        return False
    mechanism, _, argument = command.argument.partition(b" ")
    name = mechanism.decode("ascii", "replace").upper()
    offered = offered_mechanisms(conversation)
    if tls_would_help(conversation, offered, {name}):
        conversation.refuse(Refuse(Cause.TLS_REQUIRED), "auth")
        return False
    if name not in offered:
        conversation.error("504 5.5.4 mechanism not available")
        return False
    argument = argument.strip()
    try:
        initial = sasl.decode_initial(argument) if argument else None
        credentials = await login.exchange(conversation, name, initial)
    except PeerError as error:
        # 501 for a cancel or what is no SASL: not a guess at a password, but one of the errors that count.
        kind = "sasl_cancelled" if isinstance(error, login.SaslCancelled) else "sasl_malformed"
        conversation.error((error.reply or b"501 5.5.2 cannot decode").decode("ascii", "replace"), kind)
        return False
    await login.log_in(conversation, credentials)
    return False


async def _out_of_place(conversation: SmtpConversation, command: Command) -> str:
    session = conversation.session
    if not command.argument:
        return "501 5.5.4 needs a mechanism"
    if not conversation.chain.mechanisms:
        return "502 5.5.1 AUTH not available"
    if not session.esmtp and conversation.served.helo_required:
        return "503 5.5.1 send EHLO first"
    if session.user:
        return "503 5.5.1 already authenticated"
    if session.transaction is not None:
        return "503 5.5.1 not during a mail transaction"
    await conversation.must_be_last()
    return ""
