"""The client's side of an IMAP session until somebody is logged in (RFC 9051, RFC 3501); then bytes go both ways.

One coroutine takes command by command; the login itself is `login.py`'s. What the upstream said to it is the answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache

from gateway.frontend.closing import Closing
from gateway.frontend.offer import narrowed, upstream_profile, written_offer
from gateway.frontend.served import Served
from gateway.frontend.store import PASSWORD_MECHANISMS, StoreConversation
from gateway.protocol import imap
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Reply
from gateway.relay.wire import EndOfStream, LineTooLong, Wire
from gateway.session import Listener
from gateway.verdicts import Cause, Refuse

# Of an upstream's capabilities, what is ours to say before login (RFC 9051 6.1.1), or needs a gateway that reads on.
OWN = frozenset(("IMAP4REV1", "AUTH", "STARTTLS", "LOGINDISABLED", "SASL-IR", "ID", "LOGIN-REFERRALS", "XMULTIPLEX"))


class ImapConversation(StoreConversation):
    """One IMAP session."""

    __slots__ = ("reader", "said_bye", "tag")

    def __init__(self, wire: Wire, served: Served, listener: Listener) -> None:
        super().__init__(wire, served, listener, served.replies["imap"])
        self.reader = imap.CommandReader(max_size=self.limits.auth_line)
        self.tag = b"*"
        self.said_bye = False

    # -- what IMAP adds to a session

    def greeting(self) -> bytes:
        """`* OK` with the capabilities (RFC 9051 7.1), or what the pipeline wrote."""
        text = self.replies.written.get("greeting")
        if text is None:
            served = self.served
            text = f"* OK [CAPABILITY {self.capabilities()}] {served.hostname} {served.instance} ready"
        return f"{text}\r\n".encode()

    def answer(self, refuse: Refuse, reply: Reply) -> bytes:
        """`tag NO ...`, or what an upstream or the pipeline says instead."""
        text = self.replies.store(refuse, self.shown_id)
        self.said_bye = text.startswith("* BYE")
        return self._tagged(text)

    def end_if_told(self, refuse: Refuse, reply: Reply) -> None:
        """After BYE too (RFC 9051 7.1.5)."""
        super().end_if_told(refuse, reply)
        if self.said_bye:
            raise Closing(refuse.cause.value)

    def farewell(self, refuse: Refuse) -> bytes:
        """`* BYE ...`."""
        text = self.replies.store(refuse, self.shown_id, farewell=True)
        if not text.startswith("* "):  # a pipeline's own words, which may be meant for an answer
            text = f"* BYE {text.partition(' ')[2]}"
        return f"{text}\r\n".encode("utf-8", "surrogateescape")

    def bare_lf_reply(self) -> bytes:
        """RFC 9051 2.2: lines end in CRLF."""
        return b"* BYE bare LF received\r\n"

    # -- commands

    async def commands(self) -> bool:
        """Take commands until the session ends."""
        while True:
            try:
                command = await self._next_command()
            except LineTooLong:
                # It may have announced a literal, whose octets would be read as commands.
                text = "line too long"
                await self.refuse_and_close(Refuse(Cause.PROTOCOL, text=text), "command")
            except imap.BadCommand as error:
                self.tag = error.tag or b"*"
                await self.refuse_http(self.tag.decode())
                self.error("bad_argument")
                if error.close:
                    raise Closing("octets of a refused literal would be read as commands") from None
                continue
            self.said = True
            self.tag = self.session.tag = command.tag
            handler = COMMANDS.get(command.name)
            if handler is None:
                await self.refuse_http(command.tag.decode("ascii", "replace"))
                self.error("unknown_command")
            elif await handler(self, command):
                return True

    async def _next_command(self) -> imap.Command:
        """A command with its literals. Raises BadCommand, LineTooLong."""
        reader, limit = self.reader, self.limits.auth_line
        while True:
            line = await self.next_line(limit)
            self.refuse_bare_lf()
            if self.transcript is not None and reader.pending:
                self.transcript.from_client_secret()
            elif self.transcript is not None:
                self.transcript.from_client(line)
            step = reader.line(line)
            if isinstance(step, imap.Command):
                return step
            if step.synchronizing:
                if reader.begun.name not in COMMANDS:  # its client need not send what nobody wants (RFC 9051 4.3)
                    begun = reader.begun
                    reader.reset()
                    return begun
                self.write(f"{self.replies.fixed('continue')}\r\n".encode())
            reader.literal(await self._octets(step.size))

    async def _octets(self, size: int) -> bytes:
        self.flush()
        data = b""
        while len(data) < size:
            self.set_command_deadline()
            block = await self.wire.read(size - len(data))
            if not block:
                raise EndOfStream(data)
            data += block
        return data

    def _tagged(self, text: str) -> bytes:
        tag = "" if text.startswith("* ") else f"{self.tag.decode('ascii', 'replace')} "
        return f"{tag}{text}\r\n".encode("utf-8", "surrogateescape")

    def ok(self, name: str = "ok") -> None:
        """The tagged end of a command that went well."""
        self.write(self._tagged(self.replies.fixed(name)))

    def error(self, name: str) -> None:
        """An error that counts; `name` is that of `replies.FIXED`."""
        self.write(self._tagged(self.replies.fixed(name)))
        self.count_error(name)

    # -- capabilities

    def capabilities(self) -> str:
        """What is announced before login: ours, and what every upstream has that matters after it."""
        session = self.session
        written = session.listener.capabilities
        if written is not None:
            return " ".join(written_offer(self, written))
        starttls = session.listener.tls is not None and session.tls is None
        offer = _offer(tuple(upstream_profile(self).items()), tuple(self.mechanisms()), starttls)
        return _written(tuple(narrowed(self, dict(offer)).items()))


# Of the sessions of a listener most announce the same: it is put together once.


@lru_cache(maxsize=64)
def _offer(profile: tuple[tuple[str, str], ...], mechanisms: tuple[str, ...], starttls: bool) -> dict[str, str]:
    # LITERAL+ and LITERAL- are the upstream's: its clients would not wait after the login either.
    offer = {"IMAP4rev1": "", "SASL-IR": "", "ID": ""}
    offer.update({word: value for word, value in profile if word not in OWN})
    if starttls:
        offer["STARTTLS"] = ""
    if mechanisms:
        offer["AUTH"] = " ".join(mechanisms)
    return offer


@lru_cache(maxsize=64)
def _written(offer: tuple[tuple[str, str], ...]) -> str:
    words = [f"{word}={value}" if value else word for word, value in offer if word != "AUTH"]
    mechanisms = dict(offer).get("AUTH", "").split()
    if PASSWORD_MECHANISMS.isdisjoint(mechanisms):
        words.append("LOGINDISABLED")
    return " ".join([*words, *(f"AUTH={name}" for name in mechanisms)])


async def _capability(conversation: ImapConversation, command: imap.Command) -> bool:
    conversation.write(f"* CAPABILITY {conversation.capabilities()}\r\n".encode())
    conversation.ok()
    return False


async def _noop(conversation: ImapConversation, command: imap.Command) -> bool:
    conversation.ok()
    return False


async def _logout(conversation: ImapConversation, command: imap.Command) -> bool:
    conversation.write(f"{conversation.replies.fixed('bye')}\r\n".encode())
    conversation.ok()
    raise Closing("quit")


async def _id(conversation: ImapConversation, command: imap.Command) -> bool:
    """RFC 2971; what the client said goes on to the upstream with what the `xclient` stage adds."""
    try:
        conversation.session.client_id = imap.parse_id(command.arguments[0] if command.arguments else b"")
    except PeerError:
        conversation.error("bad_argument")
        return False
    conversation.write(b"* ID NIL\r\n")
    conversation.ok()
    return False


async def _starttls(conversation: ImapConversation, command: imap.Command) -> bool:
    await conversation.upgrade(command.arguments)
    return False


async def _login(conversation: ImapConversation, command: imap.Command) -> bool:
    if len(command.arguments) != 2:
        conversation.error("bad_argument")
        return False
    user, password = command.arguments
    return await conversation.log_in_with_password(user, password)


async def _authenticate(conversation: ImapConversation, command: imap.Command) -> bool:
    match command.arguments:
        case (mechanism,):
            return await conversation.authenticate(mechanism, None)
        case (mechanism, response):
            return await conversation.authenticate(mechanism, response)
    conversation.error("bad_argument")
    return False


Handler = Callable[[ImapConversation, imap.Command], Awaitable[bool]]

COMMANDS: dict[str, Handler] = {
    "CAPABILITY": _capability,
    "NOOP": _noop,
    "LOGOUT": _logout,
    "ID": _id,
    "STARTTLS": _starttls,
    "LOGIN": _login,
    "AUTHENTICATE": _authenticate,
}
