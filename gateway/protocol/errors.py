"""The two ways in which a protocol can be broken: by the peer, or by us.

Every codec below `gateway.protocol` raises only these, whatever bytes it is fed.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """A protocol was broken; its text is fit for a log and never holds a secret."""


class PeerError(ProtocolError):
    """The peer broke the protocol.

    `reply` is the full reply line to give, in SMTP's form and without CRLF (`b"501 5.5.2 ..."`), or None
    where the protocol has no reply and the connection is to be closed. It never repeats the peer's bytes.
    """

    def __init__(self, text: str, reply: bytes | None = None) -> None:
        super().__init__(text)
        self.reply = reply


class LocalError(ProtocolError):
    """We asked a codec for something that its protocol cannot say."""
