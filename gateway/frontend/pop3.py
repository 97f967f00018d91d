"""The client's side of a POP3 session until somebody is logged in (RFC 1939, 2449, 2595, 5034); then bytes flow.

One coroutine takes command by command; the login itself is `login.py`'s. What the upstream said to it is the answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from time import time

from gateway.frontend import login
from gateway.frontend.closing import Closing
from gateway.frontend.offer import (
    declared_mechanisms,
    narrowed,
    offered_mechanisms,
    upstream_profile,
    written_offer,
)
from gateway.frontend.served import Served
from gateway.frontend.store import PASSWORD_MECHANISMS, StoreConversation
from gateway.protocol import pop3, sasl
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Reply
from gateway.relay.wire import LineTooLong, Wire
from gateway.session import Listener
from gateway.verdicts import Refuse

# Of an upstream's capabilities, what is ours to say before login, or changes a conversation that begins with us.
OWN = frozenset(("USER", "SASL", "STLS", "RESP-CODES", "AUTH-RESP-CODE", "UTF8", "LANG", "XCLIENT", "APOP"))


class Pop3Conversation(StoreConversation):
    """One POP3 session. `timestamp` is the challenge of APOP (RFC 1939 7), "" where no stage verifies it."""

    __slots__ = ("timestamp", "user")

    def __init__(self, wire: Wire, served: Served, listener: Listener) -> None:
        super().__init__(wire, served, listener, served.replies["pop3"])
        self.user: bytes | None = None
        self.timestamp = ""

    # -- what POP3 adds to a session

    def greeting(self) -> bytes:
        """`+OK`, with a timestamp where somebody verifies APOP (RFC 1939 4 and 7), or what the pipeline wrote."""
        served = self.served
        text = self.replies.written.get("greeting")
        if text is None:
            text = f"+OK {served.hostname} {served.instance} ready"
        if "APOP" in declared_mechanisms(self):
            self.timestamp = f"<{secrets.token_hex(8)}.{int(time())}@{served.hostname}>"
            text = f"{text} {self.timestamp}"
        return f"{text}\r\n".encode()

    def answer(self, refuse: Refuse, reply: Reply) -> bytes:
        """`-ERR ...`."""
        return f"{self.replies.store(refuse, self.shown_id)}\r\n".encode("utf-8", "surrogateescape")

    def farewell(self, refuse: Refuse) -> bytes:
        """`-ERR ...`, too."""
        return f"{self.replies.store(refuse, self.shown_id, farewell=True)}\r\n".encode("utf-8", "surrogateescape")

    def bare_lf_reply(self) -> bytes:
        """RFC 1939 3: lines end in CRLF."""
        return b"-ERR bare LF received\r\n"

    # -- commands

    async def commands(self) -> bool:
        """Take commands until the session ends."""
        while True:
            try:
                line = await self.next_line(self.limits.auth_line)
            except LineTooLong:
                self.user = None
                self.error("bad_argument")
                continue
            self.refuse_bare_lf()
            self.said = True
            if self.transcript is not None:
                self.transcript.from_client(line)
            try:
                command = pop3.parse_command(line)
            except PeerError:
                self.user = None
                self.error("bad_argument")
                continue
            handler = (COMMANDS if self.user is None else AFTER_USER).get(command.verb)
            if handler is None:
                await self._unknown(command)
            elif await handler(self, command):
                return True

    async def _unknown(self, command: pop3.Command) -> None:
        """Nobody's command, or one out of its place, which also takes USER back; HTTP is told so."""
        await self.refuse_http(command.verb)
        known = command.verb in COMMANDS or command.verb in AFTER_USER
        self.user = None
        self.error("bad_sequence" if known else "unknown_command")

    def ok(self, name: str = "ok") -> None:
        """A positive reply."""
        self.write(f"{self.replies.fixed(name)}\r\n".encode())

    def error(self, name: str) -> None:
        """An error that counts; `name` is that of `replies.FIXED`."""
        self.write(f"{self.replies.fixed(name)}\r\n".encode())
        self.count_error(name)

    def capabilities(self) -> dict[str, str]:
        """What CAPA lists before login: ours, and what every upstream has that matters after it."""
        session = self.session
        if session.listener.capabilities is not None:
            offer = written_offer(self, session.listener.capabilities)
            if self.user is not None:
                offer.pop("STLS", None)
            return offer
        offer = {word: value for word, value in upstream_profile(self).items() if word not in OWN}
        mechanisms = self.mechanisms()
        if self.takes_passwords():
            offer["USER"] = ""
        if mechanisms:
            offer["SASL"] = " ".join(mechanisms)
        offer |= {"RESP-CODES": "", "AUTH-RESP-CODE": ""}
        if session.listener.tls is not None and session.tls is None and self.user is None:
            offer["STLS"] = ""
        return narrowed(self, offer)


async def _capa(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    conversation.ok("capabilities")
    conversation.write(pop3.format_capa(conversation.capabilities()))
    return False


async def _noop(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    conversation.ok()
    return False


async def _quit(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    conversation.ok("quit")
    raise Closing("quit")


async def _stls(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    await conversation.upgrade(command.argument)
    return False


async def _user(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    if not command.argument:
        conversation.error("bad_argument")
        return False
    offered = offered_mechanisms(conversation)
    if not conversation.refused_in_clear(offered, PASSWORD_MECHANISMS):
        if PASSWORD_MECHANISMS.isdisjoint(offered):
            conversation.error("not_available")
        else:
            conversation.user = command.argument
            conversation.ok()
    return False


async def _pass(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    user, conversation.user = conversation.user or b"", None
    return await conversation.log_in_with_password(user, command.argument)


async def _apop(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    offered = offered_mechanisms(conversation)
    if conversation.timestamp and conversation.refused_in_clear(offered, {"APOP"}):
        return False
    if not conversation.timestamp or "APOP" not in offered:
        conversation.error("not_available")
        return False
    try:
        credentials = sasl.apop_credentials(command.argument, conversation.timestamp.encode())
    except PeerError:
        conversation.error("bad_argument")
        return False
    return await login.log_in(conversation, credentials)


async def _auth(conversation: Pop3Conversation, command: pop3.Command) -> bool:
    mechanism, _, argument = command.argument.partition(b" ")
    if not mechanism:  # the list of mechanisms, older than CAPA
        if not conversation.refused_in_clear(offered_mechanisms(conversation), frozenset()):
            conversation.ok("mechanisms")
            names = conversation.capabilities().get("SASL", "").split()
            conversation.write("".join(f"{name}\r\n" for name in [*names, "."]).encode())
        return False
    return await conversation.authenticate(mechanism, argument.strip() or None)


Handler = Callable[[Pop3Conversation, pop3.Command], Awaitable[bool]]

COMMANDS: dict[str, Handler] = {
    "USER": _user,
    "APOP": _apop,
    "AUTH": _auth,
    "CAPA": _capa,
    "STLS": _stls,
    "NOOP": _noop,
    "QUIT": _quit,
}
AFTER_USER: dict[str, Handler] = {"PASS": _pass, "CAPA": _capa, "NOOP": _noop, "QUIT": _quit}
"""Between USER and PASS; anything else takes USER back."""
