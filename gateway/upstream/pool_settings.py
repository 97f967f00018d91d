"""How a pool of upstream servers is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.upstream.balance import BalanceName

TlsPolicy = Literal["off", "opportunistic", "required"]


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """A pool as configured. Times are seconds.

    `servers` are URLs and weights. `balance`: in turn by weight, fewest connections for its weight, or the same
    server for the same client address, user or domain. `max_connections` holds per server, `queue` for sessions
    that wait for one, both over all workers. `source` is the local address to connect from. `assume` replaces what
    the servers announce (`("SIZE 10000000", "8BITMIME")`); stores are then not asked. `greeting_timeout` covers
    each of TLS, greeting and EHLO. Without `health` servers are not asked at the start nor watched. `health_fall`
    failures of the active check in a row take a server out, `health_rise` successes bring it back; what comes back
    has its full share after `slow_start`. `allow_plaintext_login` lets passwords pass in clear text over the
    network.
    """

    servers: tuple[tuple[str, int], ...] = ()
    balance: BalanceName = "round_robin"
    max_connections: int = 80
    queue: int = 100
    queue_timeout: float = 10.0
    tls: TlsPolicy = "opportunistic"
    verify: bool = True
    ca_file: str | None = None
    server_name: str | None = None
    source: str | None = None
    bdat: bool = False
    reuse: bool = False
    reuse_transactions: int = 20
    reuse_idle: float = 30.0
    assume: tuple[str, ...] | None = None
    connect_timeout: float = 10.0
    greeting_timeout: float = 30.0
    command_timeout: float = 300.0
    data_done_timeout: float = 600.0  # RFC 5321 4.5.3.2.6: clients wait ten minutes for the end of data
    allow_plaintext_login: bool = False
    hello: Literal["ehlo", "as_client"] = "ehlo"
    health: bool = True
    health_interval: float = 30.0
    health_timeout: float = 5.0
    health_fall: int = 3
    health_rise: int = 2
    slow_start: float = 30.0
