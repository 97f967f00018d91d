"""What both ends of TLS share: errors, what a handshake settled, and the interface that `Wire` turns bytes with.

Rules that every `TlsSession` keeps:

- whatever was fed is decrypted at once and completely: clear bytes given back are never more than cipher bytes fed,
  and nothing waits inside, so pausing the wire pauses everything;
- OpenSSL's memory buffers keep the size of the largest piece they ever held, so they are fed 64 KiB at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

RECORD = 16384  # the most clear bytes one TLS record carries (RFC 8446 section 5.1)
STEP = 4 * RECORD


class TlsError(ConnectionError):
    """A handshake or a record failed; the text is OpenSSL's reason and holds no peer data."""


class TlsConfigError(ValueError):
    """Certificates, keys or options cannot be used; the text names the file and what to mend."""


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """What a finished handshake settled.

    `verified` is true only if the peer showed a certificate and it was checked against our authorities;
    otherwise `verify_error` says why not (empty if no check was asked for). `unknown_issuer`: all that failed is that
    nobody known vouches for the certificate, which may be good enough for whoever only compares it.
    """

    version: str
    cipher: str
    bits: int
    sni: str | None
    alpn: str | None
    verified: bool
    verify_error: str
    certificate: bytes | None
    resumed: bool
    unknown_issuer: bool = False

    @property
    def verification(self) -> str:
        """"SUCCESS", "FAILED:reason", "NONE" (no certificate shown), or "" where none was asked for."""
        if self.verified:
            return "SUCCESS"
        if self.certificate is None:
            return "NONE" if self.verify_error else ""
        return f"FAILED:{self.verify_error}" if self.verify_error else ""


class TlsSession(ABC):
    """One TLS connection's state.

    `info` is set once the handshake is done, `closed` by the peer's close_notify. `overhead` counts fed bytes that
    carried nothing, for whoever bounds what control records may make us keep in `outgoing`.
    """

    __slots__ = ("closed", "info", "overhead")

    def __init__(self) -> None:
        self.info: TlsInfo | None = None
        self.closed = False
        self.overhead = 0

    def start(self) -> bytes:
        """The first flight that we send: the client's hello, nothing on a server."""
        return b""

    @abstractmethod
    def feed(self, cipher: bytes) -> bytes:
        """Take bytes from the network and return the clear bytes they hold. Raises TlsError.

        While the handshake runs, and after an error (an alert), `outgoing` has bytes to send afterwards.
        """

    @abstractmethod
    def seal(self, clear: bytes) -> bytes:
        """The records that carry `clear`. Raises TlsError."""

    @abstractmethod
    def outgoing(self) -> bytes:
        """Handshake bytes and alerts that wait to be sent."""

    @abstractmethod
    def close_notify(self) -> bytes:
        """The records that end our direction (RFC 8446 section 6.1); the peer may go on."""


def pieces(data: bytes) -> Iterable[bytes | memoryview]:
    """`data` in steps that OpenSSL's buffers may keep the size of."""
    if len(data) <= STEP:
        return (data,)
    view = memoryview(data)
    return (view[at : at + STEP] for at in range(0, len(data), STEP))
