"""The verbs of SMTP: a table of handlers, and those that carry no mail.

A handler answers one command; True starts the session anew (XCLIENT).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from gateway.facts import Phase
from gateway.frontend import login, smtp_auth, smtp_data, smtp_mail, smtp_upstream, smtp_xclient
from gateway.frontend.closing import Closing
from gateway.frontend.offer import ehlo_offer
from gateway.protocol.smtp import Command, format_ehlo
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation


def _fixed(conversation: SmtpConversation, name: str) -> bytes:
    return f"{conversation.replies.fixed(name)}\r\n".encode()


async def _helo(conversation: SmtpConversation, command: Command) -> bool:
    session, chain = conversation.session, conversation.chain
    await conversation.must_be_last()
    name = command.argument.decode("ascii", "replace")
    if not name or " " in name or len(name) > 255 or not name.isprintable():
        conversation.error("501 5.5.4 needs one host name")
        return False
    if session.helo:
        conversation.count_junk()
    await smtp_mail.reset(conversation)
    session.helo, session.esmtp = name, command.verb != "HELO"
    chain.again(session, Phase.HELO)
    if chain.helo:
        reply = await conversation.asked(await chain.ask(chain.helo, session, name), "helo")
        if reply is not None:
            session.helo, session.esmtp = "", False
            return False
    if session.esmtp:
        conversation.offer = ehlo_offer(conversation)
        conversation.write(format_ehlo(conversation.served.hostname, conversation.offer))
    else:
        conversation.offer = {}
        conversation.write(f"250 {conversation.served.hostname}\r\n".encode())
    return False


async def _starttls(conversation: SmtpConversation, command: Command) -> bool:
    wire = conversation.wire
    if conversation.session.tls is not None:
        conversation.error(conversation.replies.fixed("tls_active"), "tls_active")
    elif conversation.session.listener.tls is None:
        conversation.error("502 5.5.1 STARTTLS not offered")
    elif command.argument:
        conversation.error("501 5.5.4 no parameters allowed")
    elif wire.buffered:
        # Whoever put them there may not be the one at the other end of TLS (RFC 3207 6, CVE-2011-0411).
        await conversation.refuse_and_close(
            Refuse(Cause.PIPELINING, text="commands sent behind STARTTLS", disconnect=True), "command"
        )
    else:
        # What was learned in clear is forgotten, the login too (RFC 3207 4.2).
        await smtp_mail.reset(conversation)
        login.forget_login(conversation)
        smtp_upstream.part(conversation)
        conversation.write(_fixed(conversation, "starttls"))
        conversation.flush()
        await conversation.start_tls()
    return False


async def _noop(conversation: SmtpConversation, command: Command) -> bool:
    conversation.count_junk()
    conversation.write(_fixed(conversation, "ok"))
    return False


async def _vrfy(conversation: SmtpConversation, command: Command) -> bool:
    await conversation.must_be_last()
    conversation.count_junk()
    if not command.argument:
        conversation.error("501 5.5.4 needs an address", "vrfy")
    else:
        conversation.write(_fixed(conversation, "vrfy"))
    return False


async def _expn(conversation: SmtpConversation, command: Command) -> bool:
    conversation.count_junk()
    conversation.write(_fixed(conversation, "expn"))
    return False


async def _help(conversation: SmtpConversation, command: Command) -> bool:
    conversation.count_junk()
    text = conversation.replies.written.get("help")
    if text is None:
        hello = "RFC 2033; commands: LHLO" if conversation.lmtp else "RFC 5321; commands: EHLO HELO"
        text = f"214 2.0.0 see {hello} MAIL RCPT DATA BDAT RSET NOOP VRFY AUTH STARTTLS QUIT"
    conversation.write(f"{text}\r\n".encode())
    return False


async def _rset(conversation: SmtpConversation, command: Command) -> bool:
    conversation.count_junk()
    if command.argument:
        conversation.error("501 5.5.4 no parameters allowed")
        return False
    await smtp_mail.reset(conversation)
    conversation.write(_fixed(conversation, "ok"))
    return False


async def _quit(conversation: SmtpConversation, command: Command) -> bool:
    conversation.write(_fixed(conversation, "quit"))
    raise Closing("quit")


Handler = Callable[["SmtpConversation", Command], Awaitable[bool]]

VERBS: dict[str, Handler] = {
    "EHLO": _helo,
    "HELO": _helo,
    "STARTTLS": _starttls,
    "AUTH": smtp_auth.auth,
    "XCLIENT": smtp_xclient.xclient,
    "XFORWARD": smtp_xclient.not_available,
    "BURL": smtp_xclient.not_available,
    "ETRN": smtp_xclient.not_available,
    "MAIL": smtp_mail.mail,
    "RCPT": smtp_mail.rcpt,
    "DATA": smtp_data.data,
    "BDAT": smtp_data.bdat,
    "RSET": _rset,
    "NOOP": _noop,
    "VRFY": _vrfy,
    "EXPN": _expn,
    "HELP": _help,
    "QUIT": _quit,
}
LMTP_VERBS = {verb: handler for verb, handler in VERBS.items() if verb not in ("EHLO", "HELO")} | {"LHLO": _helo}
"""RFC 2033 4.1: LHLO and neither of the others."""
