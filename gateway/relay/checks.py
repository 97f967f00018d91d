"""What is wrong with content on its way, whoever reads it: its size, its line ends and lines, NUL, a loop, its time."""

from __future__ import annotations

from typing import Protocol

from gateway.relay.wire import Wire
from gateway.verdicts import Cause, Refuse


class Scanned(Protocol):
    """What the scanners of `protocol.content` know of the content that passed them."""

    bare: str | None
    nul: bool
    policy: str


class ContentClock:
    """How long the client may take: `block` seconds for a block of content, `whole` seconds for all of the message."""

    __slots__ = ("_block", "_until", "_wire")

    def __init__(self, wire: Wire, block: float, whole: float) -> None:
        self._wire = wire
        self._block = block
        self._until = wire.loop.time() + whole

    def start(self) -> None:
        """The wait for the next block begins."""
        left = self._until - self._wire.loop.time()
        self._wire.set_deadline(max(0.001, min(self._block, left)))


class ContentChecks:
    """The limits of one message: octets in all, Received fields (0: not counted), octets of a line (0: any), NUL."""

    __slots__ = ("_header_tail", "_line", "_received", "max_received", "reject_nul", "size_limit", "text_line")

    def __init__(
        self, size_limit: int, *, max_received: int = 0, text_line: int = 0, reject_nul: bool = False
    ) -> None:
        self.size_limit = size_limit
        self.max_received = max_received
        self.text_line = text_line
        self.reject_nul = reject_nul
        self._received = 0
        self._header_tail: bytes | None = b"\r\n" if max_received else None
        self._line = b""  # the line whose end has not come

    def refused(self, content: bytes, size: int, scanned: Scanned) -> Refuse | None:
        """The next block in the form that DATA has; `size` octets have come with it."""
        if scanned.bare is not None and scanned.policy == "reject":
            return Refuse(Cause.LINE_ENDINGS, log=f"bare {scanned.bare}")
        if self.size_limit and size > self.size_limit:
            return Refuse(Cause.MESSAGE_TOO_BIG, log=f"more than the {self.size_limit} octets that were announced")
        if self.reject_nul and scanned.nul:
            return Refuse(Cause.MALFORMED, text="NUL octets in message", log="nul: reject")
        if self._header_tail is not None and self._loops(content):
            return Refuse(Cause.LOOP, log=f"more than {self.max_received} Received fields")
        if self.text_line and self._too_long(content):
            return Refuse(Cause.MALFORMED, text="line of message too long", log=f"limits.text_line: {self.text_line}")
        return None

    def _loops(self, content: bytes) -> bool:
        """Count Received fields while the header passes (RFC 5321 6.3)."""
        text = (self._header_tail or b"") + content
        end = text.find(b"\r\n\r\n")
        header = text if end < 0 else text[:end]
        self._received += header.lower().count(b"\r\nreceived:")
        # Keep what may be the start of a field name cut in two, without counting it twice.
        self._header_tail = None if end >= 0 else text[-10:]
        return self._received > self.max_received

    def _too_long(self, content: bytes) -> bool:
        """Whether a line is longer than allowed, without its end and a stuffed dot."""
        lines = (self._line + content).split(b"\r\n")
        self._line = lines[-1]
        if max(map(len, lines)) <= self.text_line:
            return False
        return any(len(line) - line.startswith(b".") > self.text_line for line in lines)
