"""Which of the servers that can take one more connection gets it: the balance of a pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gateway.session import Session
    from gateway.upstream.server import Server

BalanceName = Literal["round_robin", "least_connections", "client", "user", "domain"]

SMALLEST_SHARE = 0.1


class Balance:
    """In turn by weight, fewest connections for its weight, or the same server for the same client, user or domain.

    A server that was away gets its full share only `slow_start` seconds after its return: its caches are cold.
    """

    def __init__(self, name: BalanceName, slow_start: float) -> None:
        self.name = name
        self._slow_start = slow_start
        self._turn = 0

    def choose(self, free: Sequence[Server], session: Session, now: float) -> Server:
        """One of `free`, of which there is at least one, and none with weight 0."""
        if len(free) == 1:
            return free[0]
        match self.name:
            case "round_robin":
                return self._next_in_turn(free, now)
            case "least_connections":
                self._turn += 1
                chosen = min(free, key=lambda s: ((s.active + 1) / self._weight(s, now), s.turn))
                chosen.turn = self._turn
                return chosen
            case _:
                key = self._hash_key(session)
                return max(free, key=lambda s: _rendezvous(key, s) * self._weight(s, now))

    def share(self, server: Server, now: float) -> float:
        """The part of its weight that a server has, 0 to 1 (1: all)."""
        since, whole = now - server.ejected_until, self._slow_start
        return 1.0 if since >= whole else max(SMALLEST_SHARE, since / whole)

    def _weight(self, server: Server, now: float) -> float:
        return server.weight * self.share(server, now)

    def _next_in_turn(self, free: Sequence[Server], now: float) -> Server:
        """Weighted round robin without bursts: each gains its share, the richest pays the total and is taken."""
        total = 0.0
        chosen = free[0]
        for server in free:
            weight = self._weight(server, now)
            total += weight
            server.share += weight
            if server.share > chosen.share:
                chosen = server
        chosen.share -= total
        return chosen

    def _hash_key(self, session: Session) -> bytes:
        """What stays with one server. Without a user (or sender domain) the client's address stands in."""
        key = ""
        if self.name == "user":
            key = session.user
        elif self.name == "domain":
            key = session.user.rpartition("@")[2] if "@" in session.user else ""
            if not key and session.transaction is not None:
                key = session.transaction.sender_domain
        return (key or session.client.address).encode()


def _rendezvous(key: bytes, server: Server) -> float:
    """Highest random weight: each key ranks the servers its own way, so a lost server moves only its own keys.

    Times the weight, it gives each server its share of the keys.
    """
    digest = blake2b(key, digest_size=8, key=server.key).digest()
    return -1.0 / math.log(((int.from_bytes(digest) >> 12) + 0.5) / 2**52)
