"""A scripted upstream server for tests of stages that speak to one (`upstream_*`), without any connection."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence

from gateway.protocol.errors import LocalError
from gateway.protocol.smtp import Reply
from gateway.stage import SaslStep

AUTH = {"smtp": b"AUTH ", "lmtp": b"AUTH ", "imap": b"AUTHENTICATE ", "pop3": b"AUTH "}
PORTS = {"smtp": 25, "lmtp": 24, "imap": 143, "pop3": 110}


class ScriptedPeer:
    """What a stage sees of an upstream server (`gateway.Peer`), with its replies written beforehand.

    `replies` are given to commands, EHLO, logins and SASL messages in turn, as texts (`250 2.0.0 Ok`); after the last
    one everything is 250, and a login succeeds. Stores have the same codes as `Peer.command` says; a challenge is 334
    with base64. Afterwards `lines` has the commands that the stage sent, without IMAP's tag, `secrets` those with
    secrets in them, `written` the bytes before the conversation, `before` the lines to go in front of MAIL with their
    callbacks, and `speaks_for_client` tells whether `identified` was called.

    SASL messages stand in `lines` in base64, an initial response behind its mechanism. A login with a password is
    what the protocol says with nothing else announced: AUTH PLAIN (LOGIN if `extensions` have only that), one line
    `LOGIN "user" "password"`, or USER and PASS.
    """

    def __init__(
        self,
        extensions: Mapping[str, str] | None = None,
        replies: Sequence[str] = (),
        *,
        protocol: str = "smtp",
        url: str = "",
        greeting: str = "220 ready",
        local: bool = False,
        tls: bool = False,
        takes_secrets: bool | None = None,
    ) -> None:
        self.protocol = protocol
        self.extensions = dict(extensions or {})
        self.greeting: Reply | None = Reply.of(greeting)
        self.address = ("192.0.2.25", PORTS[protocol])
        self.url = url or f"{protocol}://{self.address[0]}:{self.address[1]}"
        self.local = local
        self.tls = tls
        self.takes_secrets = local or tls if takes_secrets is None else takes_secrets
        self.logged_in = False
        self.local_address = ("192.0.2.1", 40000)
        self.lines: list[bytes] = []
        self.secrets: list[bytes] = []
        self.written = b""
        self.before: list[tuple[bytes, Callable[[Reply], None] | None]] = []
        self.speaks_for_client = False
        self._replies = list(replies)

    def write(self, data: bytes) -> None:
        """Bytes in front of the conversation."""
        self.written += data

    async def command(self, line: bytes, *, secret: bool = False) -> Reply:
        """Record the line and give the next reply."""
        return self._said(line, "250 2.0.0 Ok", secret=secret)

    def _said(self, line: bytes, otherwise: str, *, secret: bool = False) -> Reply:
        assert b"\r" not in line and b"\n" not in line, "a command is one line"
        self.lines.append(line)
        if secret:
            self.secrets.append(line)
        return Reply.of(self._replies.pop(0) if self._replies else otherwise)

    async def hello(self, name: str = "", *, esmtp: bool = True) -> Reply:
        """EHLO or HELO; the extensions stay."""
        return await self.command((b"EHLO " if esmtp else b"HELO ") + (name or "gateway.example").encode())

    async def login(self, user: bytes, password: bytes) -> Reply:
        """A login with a password; 504 where SMTP's `extensions` offer neither PLAIN nor LOGIN."""
        if any(octet in user + password for octet in (b"\r", b"\n", b"\0")):
            raise LocalError("CR, LF or NUL in a user name or password")
        if self.protocol == "imap":
            return self._logged(self._said(b'LOGIN "%b" "%b"' % (user, password), "250 Logged in", secret=True))
        if self.protocol == "pop3":
            reply = self._said(b"USER " + user, "250 Go on")
            if reply.code != 250:
                return reply
            return self._logged(self._said(b"PASS " + password, "250 Logged in", secret=True))
        offered = self.extensions.get("AUTH", "").upper().split()
        if "PLAIN" in offered:
            step = await self.sasl("PLAIN", b"\0" + user + b"\0" + password)
        elif "LOGIN" in offered:
            step = await self.sasl("LOGIN", None)
            for answer in (user, password):
                if step.reply is None:
                    step = await self.sasl_answer(answer)
        else:
            return Reply.of("504 5.5.4 the server offers no way to log in with a password")
        assert step.reply is not None, "a login that does not end"
        return step.reply

    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep:
        """Record the command and give the next reply as a step."""
        line = AUTH[self.protocol] + mechanism.encode("ascii")
        if initial is not None:
            line += b" " + (b64encode(initial) or b"=")
        return self._step(self._said(line, "235 2.7.0 Ok", secret=initial is not None))

    async def sasl_answer(self, data: bytes) -> SaslStep:
        """Record the message and give the next reply as a step."""
        return self._step(self._said(b64encode(data), "235 2.7.0 Ok", secret=True))

    async def sasl_cancel(self) -> SaslStep:
        """Record `*` and give the next reply as a step."""
        return self._step(self._said(b"*", "501 5.7.0 cancelled"))

    def _step(self, reply: Reply) -> SaslStep:
        if reply.code == 334:
            return SaslStep(b64decode(reply.lines[0]), None)
        return SaslStep(None, self._logged(reply))

    def _logged(self, reply: Reply) -> Reply:
        self.speaks_for_client = True
        if reply.reply_class == 2:
            self.logged_in = True
        return reply

    def before_mail(self, line: bytes, expect: Callable[[Reply], None] | None = None) -> None:
        """Record the line."""
        self.before.append((line, expect))

    def identified(self) -> None:
        """The stage said who the client is."""
        self.speaks_for_client = True
