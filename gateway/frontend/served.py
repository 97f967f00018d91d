"""A pipeline as the frontends serve it: everything resolved, nothing read from files any more."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from gateway.frontend.counts import Counts
from gateway.limits import Limits
from gateway.relay.spool import SpoolSpace
from gateway.replies import FAMILIES, Family, Replies
from gateway.upstream.pool import Pool, Pools
from gateway.upstream.prelude import ErrorMessages
from gateway.verdicts import Cause

if TYPE_CHECKING:
    from gateway.observe.spans import Traces
    from gateway.pipeline.chain import Chain

FAMILY = {"smtp": ("smtp", "lmtp"), "lmtp": ("smtp", "lmtp"), "imap": ("imap",), "pop3": ("pop3",)}
"""What a pool's servers may speak for clients of each protocol."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class HandOff(IntEnum):
    """When the conversation stops being read: the opaque grade hands off early, `NEVER` is the envelope grade."""

    GREETING = 0
    LOGIN = 1
    MAIL = 2
    RCPT = 3
    NEVER = 4


class Networks:
    """A set of networks; asked once a session, so a plain walk will do."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    def __bool__(self) -> bool:
        return bool(self._networks)


@dataclass(slots=True)
class Served:
    """One pipeline in this worker.

    `pool` is where nothing routed. `line_endings`: by_trust, reject or normalize (see `smtp_data`).
    `replies` are the texts of our own replies, `disconnect_on` what ends a session once it is said; `bare_lf` lets
    commands end in a bare LF, `unauthorized_pipelining` lets them come behind one that must end its group.
    `pass_error_message`: when clients read the
    upstream's own words. `hand_off_at_login`: who logged in is handed off, though others are read further.
    `always_hand_off` hands off even to an upstream that offers XCLIENT and the like (`handoff: always`).
    `traces` and the chain of sampled sessions, `traced_chain`: both or neither.
    """

    name: str
    hostname: str
    instance: str
    chain: Chain
    limits: Limits
    pools: Pools
    pool: Pool | None
    hand_off: HandOff
    new_id: Callable[[], str]
    trust_proxy: Networks = field(default_factory=Networks)
    trust_xclient: Networks = field(default_factory=Networks)
    trust_clients: Networks = field(default_factory=Networks)
    debug_clients: Networks = field(default_factory=Networks)
    allow_plaintext_auth: bool = False
    auth_required: bool = False
    login_decides: bool = False
    line_endings: str = "by_trust"
    nul: str = "pass"
    spool: SpoolSpace = field(default_factory=SpoolSpace)
    always_spool: bool = False
    soft_bounce: bool = False
    replies: dict[Family, Replies] = field(default_factory=lambda: {name: Replies(name) for name in FAMILIES})
    disconnect_on: frozenset[Cause] = frozenset()
    bare_lf: bool = False
    unauthorized_pipelining: bool = False
    helo_required: bool = True
    pass_error_message: ErrorMessages = "auto"
    hand_off_at_login: bool = False
    reply_id: bool = True
    always_hand_off: bool = False
    max_received: int = 0
    end_of_data: float = 240.0
    traces: Traces | None = None
    traced_chain: Chain | None = None
    draining: bool = False
    sessions: int = 0
    counts: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = Counts(self.name)
        self.spool.measure(self.name)

    def candidates(self, protocol: str) -> list[Pool]:
        """Pools that a session of this protocol may be routed to while nothing is decided."""
        return [pool for pool in self.pools.values() if pool.servers[0].protocol in FAMILY[protocol]]

    def default_pool(self, protocol: str) -> Pool | None:
        """Where nothing routed: the pool of `splice` if it speaks the protocol, else the only one that does."""
        if self.pool is not None and self.pool.servers[0].protocol in FAMILY[protocol]:
            return self.pool
        candidates = self.candidates(protocol)
        return candidates[0] if len(candidates) == 1 else None
