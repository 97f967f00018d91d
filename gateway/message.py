"""One message as a stage reads it in the `message` phase: header, body in blocks, or the whole as a file.

What a stage sees is what the stages before it made of the message. It says what it wants changed with an `Edit`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import BinaryIO, Protocol

from gateway.protocol.headers import Header
from gateway.session import Transaction


class NewBody(Protocol):
    """A body to come, for `ReplaceBody`: written piece by piece, kept outside of memory when it is large."""

    def write(self, data: bytes) -> None:
        """Content, not dot-stuffed; a lone CR or LF is mended as the gateway mends those of trusted clients.

        Raises OSError when there is no room for it; let that end the phase (`on_error`).
        """


class Message(Protocol):
    """The content of the open transaction.

    The client may still be sending it. Waiting for its bytes does not count against the stage's `timeout`.
    """

    @property
    def transaction(self) -> Transaction:
        """Sender and recipients as they were when the content began.

        What stages of the message phase do to them, the upstream hears when all have answered.
        """

    @property
    def size(self) -> int:
        """Octets of content that the client has sent so far; the message's size behind the last block."""

    async def headers(self) -> Header:
        """The header section: the stage's own copy."""

    def blocks(self) -> AsyncIterator[bytes]:
        """The body, once: blocks of up to 64 KiB, CRLF line ends, no dot-stuffing; nothing for an empty body."""

    async def open(self) -> BinaryIO:
        """The whole message, header and body, as a file to read and seek; waits for the message's end.

        Instead of `blocks`, not after it. The file ends with the call of the phase.
        """

    def new_body(self) -> NewBody:
        """A body to write and to hand back in `ReplaceBody`."""
