"""An upstream server as the administrator sees it, in plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from gateway.upstream.server import Server

Json = Union[None, bool, int, float, str, Sequence["Json"], Mapping[str, "Json"]]  # noqa: UP007  # it names itself


def describe_server(server: Server, now: float, share: float) -> dict[str, Json]:
    """How a server of a pool does at `now` of the pool's clock, with `share` (0 to 1) of its weight.

    `state` is `down` (active checks), `draining` (by the administrator, or weight 0), `ejected`, `resting` (see
    `Pool.failed`), `slow` (it was away and gets only its share) or `up`. `active` and `idle` connections are
    this worker's, `total` (in use) all workers'. `latency_ms`: the last check, `since`: seconds since the server last
    went or came back; None where that was never.
    """
    available = server.available(now)
    state = "up" if share >= 1 else "slow"
    if not available:
        reasons = (("down", server.down), ("draining", not server.in_service), ("ejected", server.ejected_until > now))
        state = next((reason for reason, holds in reasons if holds), "resting")
    return {
        "url": server.url,
        "weight": server.weight,
        "configured_weight": server.configured_weight,
        "drained": server.drained,
        "state": state,
        "active": server.active,
        "total": server.places.taken(server.active),
        "idle": len(server.idle),
        "failures": server.failures,
        "last_error": server.last_error,
        "share": round(share, 3) if available else 0.0,
        "latency_ms": None if server.latency is None else round(server.latency * 1000, 3),
        "since": None if server.changed is None else round(now - server.changed, 3),
    }
