"""How many TLS sessions a server keeps."""

from __future__ import annotations

import time
from collections import deque

from OpenSSL import SSL

from gateway.relay import tls_bindings


class KeptSessions:
    """Bounds OpenSSL's cache of sessions, whose size its Python binding cannot set.

    A handshake that is not a resumption may leave sessions in the cache: one, or in TLS 1.3 without tickets the two
    that OpenSSL then gives. Once `limit` of them are younger than `timeout` (seconds) the cache takes no more until the
    oldest has expired. With tickets only clients of TLS 1.2 that know none are kept; all of TLS 1.2 are counted.
    """

    def __init__(self, context: SSL.Context, limit: int, timeout: int, tickets: bool) -> None:
        self._context = context
        self._limit = limit
        self._timeout = timeout
        self._tickets = tickets
        self._since: deque[float] = deque()
        self._full = False

    def count(self, version: str) -> None:
        """A full handshake of this version is done."""
        if version != "TLSv1.3":
            self._since.append(time.monotonic())
        elif not self._tickets:
            self._since += [time.monotonic()] * 2
        self.renew()

    def renew(self) -> None:
        """Open or close the cache."""
        oldest = time.monotonic() - self._timeout
        while self._since and self._since[0] <= oldest:
            self._since.popleft()
        full = len(self._since) >= self._limit
        if full is not self._full:
            self._full = full
            closed = SSL.SESS_CACHE_NO_INTERNAL_STORE if full else 0
            tls_bindings.set_cache_mode(self._context, SSL.SESS_CACHE_SERVER | closed)
