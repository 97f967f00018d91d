"""A scripted upstream server for tests of stages that speak to one (`upstream_*`), without any connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gateway.protocol.smtp import Reply


class ScriptedPeer:
    """What a stage sees of an upstream server (`gateway.Peer`), with its replies written beforehand.

    `replies` are given to commands and EHLO in turn, as texts (`250 2.0.0 Ok`); after the last one everything is 250.
    Afterwards `lines` has the commands that the stage sent, `secrets` those it marked secret, `written` the bytes
    before the conversation, `before` the lines to go in front of MAIL with their callbacks, and `speaks_for_client`
    tells whether `identified` was called.
    """

    def __init__(
        self,
        extensions: Mapping[str, str] | None = None,
        replies: Sequence[str] = (),
        *,
        url: str = "smtp://192.0.2.25:25",
        local: bool = False,
        tls: bool = False,
    ) -> None:
        self.extensions = dict(extensions or {})
        self.url = url
        self.local = local
        self.tls = tls
        self.address = ("192.0.2.25", 25)
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
        assert b"\r" not in line and b"\n" not in line, "a command is one line"
        self.lines.append(line)
        if secret:
            self.secrets.append(line)
        return Reply.of(self._replies.pop(0) if self._replies else "250 2.0.0 Ok")

    async def hello(self, name: str = "") -> Reply:
        """EHLO; the extensions stay."""
        return await self.command(b"EHLO " + (name or "gateway.example").encode())

    def before_mail(self, line: bytes, expect: Callable[[Reply], None] | None = None) -> None:
        """Record the line."""
        self.before.append((line, expect))

    def identified(self) -> None:
        """The stage said who the client is."""
        self.speaks_for_client = True
