"""Records for syslog: datagrams in the form of RFC 3164, over UDP or to the socket of a local daemon.

Nothing is waited for. A daemon that is away costs a counter: it is tried again once a second, and what was lost is
said in one message when it is back. A datagram that UDP loses on its way is nobody's to know.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from contextlib import suppress
from typing import Final

from gateway.observe.lines import Clock, as_sentence
from gateway.observe.sinks import LEVELS, Level, Sink

UDP_SIZE: Final = 1024
"""Octets of a message over UDP (RFC 3164 4.1); what is longer ends with `...`."""
UNIX_SIZE: Final = 2048
"""Octets of a message to a local daemon, which takes more than the RFC asks for."""
PAUSE: Final = 1.0
"""Seconds until a daemon that is away is tried again."""
PORT: Final = 514

FACILITIES: Final[dict[str, int]] = {
    "kern": 0, "user": 1, "mail": 2, "daemon": 3, "auth": 4, "intern": 5, "lpr": 6, "news": 7, "uucp": 8, "clock": 9,
    "authpriv": 10, "ftp": 11, "ntp": 12, "audit": 13, "alert": 14, "cron": 15,
    **{f"local{number}": 16 + number for number in range(8)},
}  # fmt: skip
"""Names as in nginx's `facility=`, numbers as in RFC 3164 4.1.1."""

_SEVERITIES: Final = {10: 7, 20: 6, 25: 5, 30: 4, 40: 3, 50: 2}
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UDP: Final = re.compile(r"udp://(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::(\d{1,5}))?")


def parse_address(text: str) -> tuple[str, int] | str:
    """`udp://host:port` (514 by default) as host and port, `unix:/path` as the path. Raises ValueError."""
    if text.startswith("unix:/"):
        return text.removeprefix("unix:")
    match = _UDP.fullmatch(text)
    port = int(match[3] or PORT) if match is not None else 0
    if match is None or not 0 < port < 65536:
        raise ValueError(f"{text!r} is not udp://host:port or unix:/path")
    return match[1] or match[2], port


def _stamp(second: int) -> str:
    """`Mmm dd hh:mm:ss` in local time (RFC 3164 4.1.2)."""
    at = time.localtime(second)
    return f"{_MONTHS[at.tm_mon - 1]} {at.tm_mday:2d} {at.tm_hour:02d}:{at.tm_min:02d}:{at.tm_sec:02d}"


class Syslog(Sink):
    """One syslog daemon: `<PRI>Mmm dd hh:mm:ss host tag[pid]: text`.

    `hostname` None is this machine's short name over UDP and none to a local daemon, which expects none (syslog(3));
    an empty one is left out.
    """

    __slots__ = ("_address", "_clock", "_facility", "_good", "_hostname", "_next", "_size", "_socket", "_tag")

    def __init__(
        self,
        address: str,
        level: Level = "info",
        *,
        facility: str = "mail",
        tag: str = "gateway",
        hostname: str | None = None,
    ) -> None:
        """A host name is looked up here, once. Raises ValueError (address), OSError (no such host)."""
        super().__init__(level, as_sentence)
        target = parse_address(address)
        if hostname is None:
            hostname = "" if isinstance(target, str) else socket.gethostname().partition(".")[0]
        self._hostname = f"{hostname} " if hostname else ""
        self._tag = tag
        self._facility = FACILITIES[facility] * 8
        self._clock = Clock(_stamp)
        self._good = False  # over UDP a failure is known only at the next message
        self._next = 0.0
        self._size = UNIX_SIZE if isinstance(target, str) else UDP_SIZE
        self._address = target if isinstance(target, str) else ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if isinstance(target, str) else _udp(*target)
        self._socket.setblocking(False)

    def write(self, line: bytes, level: int, now: float) -> None:
        """One datagram, or one more that is lost."""
        if self._next > now > self._next - PAUSE:  # a clock that was set back does not make the pause longer
            self.lose(1)
            return
        try:
            self._send(line, level, now)
        except OSError as error:
            self.error = error.strerror or str(error)
            self._good = False
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):  # too fast for the daemon, which is there
                self._next = now + PAUSE
            # Over UDP this tells of the message before, and this one was not sent.
            self.lose(2 if error.errno == errno.ECONNREFUSED and not self._address else 1)
        else:
            if self.lost and (self._good or self._address):
                self._tell(now)
            self._good = True

    def _send(self, line: bytes, level: int, now: float) -> None:
        head = f"<{self._facility + _SEVERITIES[level]}>{self._clock.text(now)} {self._hostname}{self._tag}"
        packet = b"%b[%d]: %b" % (head.encode(), os.getpid(), line)
        if len(packet) > self._size:
            packet = packet[: self._size - 3].decode(errors="ignore").encode() + b"..."
        if self._address:
            self._socket.sendto(packet, self._address)  # the path each time: the daemon may have made it anew
        else:
            self._socket.send(packet)

    def _tell(self, now: float) -> None:
        try:
            self._send(self.notice(), LEVELS["error"], now)
        except OSError:
            return  # still lost, said with the next one
        self.lost = 0

    def close(self) -> None:
        """Say what was lost; close the socket."""
        if self.lost:
            self._tell(time.time())
        with suppress(OSError):
            self._socket.close()


def _udp(host: str, port: int) -> socket.socket:
    """Connected, so that the kernel tells of a port where nobody listens. Raises OSError."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.connect(target)
    except OSError:
        made.close()
        raise
    return made
