"""Limit how many sessions a client, its network, or the whole pipeline has at a time.

Asked in `connect`; a session takes one place in each limit that is set and gives them back when it ends. One too many
is 421 4.7.0 and closed before it costs anything more. A client is an IPv4 address or an IPv6 /64; networks are cut
by `v4_prefix` and `v6_prefix`. Exempt clients are not counted anywhere. Clients without an IP address (a local
socket) count for the pipeline only.

Costs a look-up a limit, without waiting where the store is this process's memory. Over a shared store the limits
hold for all workers; when it does not answer, `on_error` decides (421 unless it says otherwise).

    stages:
      - connection_limit: {per_client: 20, per_network: 100, exempt: [10.0.0.0/8]}
      - connection_limit: 20          # per_client
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from gateway import (
    Cause,
    CidrList,
    Kind,
    Lease,
    NetworkTable,
    Refuse,
    Session,
    Settings,
    Stage,
    Worker,
    client_key,
    network_key,
)

_Count = Annotated[int, Field(ge=1, strict=True)]


class ConnectionLimitSettings(Settings):
    """How many sessions at a time, and of whom."""

    short_form: ClassVar[str | None] = "per_client"

    per_client: _Count | None = Field(None, description="Sessions of one client (an address, or an IPv6 /64).")
    per_network: _Count | None = Field(None, description="Sessions of one network.")
    per_pipeline: _Count | None = Field(None, description="Sessions of all clients of this pipeline together.")
    v4_prefix: Annotated[int, Field(ge=0, le=32)] = Field(24, description="Prefix length of an IPv4 network.")
    v6_prefix: Annotated[int, Field(ge=0, le=128)] = Field(48, description="Prefix length of an IPv6 network.")
    exempt: CidrList = Field((), description="Clients that are neither limited nor counted.")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.per_client is None and self.per_network is None and self.per_pipeline is None:
            raise ValueError("limits nothing; write per_client, per_network or per_pipeline")
        return self


class ConnectionLimit(Stage):
    """Limit how many sessions a client, its network, or the whole pipeline has at a time."""

    Settings = ConnectionLimitSettings
    kind = Kind.GUARD
    settings: ConnectionLimitSettings
    _worker: Worker

    def __init__(self, settings: ConnectionLimitSettings) -> None:
        super().__init__(settings)
        self._exempt = NetworkTable.of(settings.exempt)

    async def start(self, worker: Worker) -> None:
        """Keep the worker, for its store."""
        self._worker = worker

    def connect(self, session: Session) -> Refuse | Awaitable[Refuse | None] | None:
        """Take a place in each limit, or refuse."""
        address = session.client.address
        if address in self._exempt:
            return None
        limits = self._limits(session.pipeline, address)
        leases: list[Lease] = session.state(self, list)
        store = self._worker.store.immediate
        if store is None:
            return self._hold_each(limits, leases)
        for name, key, limit in limits:
            lease = store.hold_now(key, limit)
            if lease is None:
                return _refused(leases, name, limit)
            leases.append(lease)
        return None

    def close(self, session: Session) -> None:
        """Give back what `connect` took."""
        if session.has_state(self):
            _release(session.state(self, list))

    async def _hold_each(self, limits: list[tuple[str, str, int]], leases: list[Lease]) -> Refuse | None:
        """`connect` over a store that takes time; what it took before a failure is given back by `close`."""
        for name, key, limit in limits:
            lease = await self._worker.store.hold(key, limit)
            if lease is None:
                return _refused(leases, name, limit)
            leases.append(lease)
        return None

    def _limits(self, pipeline: str, address: str) -> list[tuple[str, str, int]]:
        """Name, key and limit of each limit that counts this client."""
        settings = self.settings
        prefix = f"connections:{pipeline}:{self.id}:"
        limits: list[tuple[str, str, int]] = []
        if settings.per_client is not None and (client := client_key(address)):
            limits.append(("per_client", f"{prefix}client:{client}", settings.per_client))
        if settings.per_network is not None:
            network = network_key(address, settings.v4_prefix, settings.v6_prefix)
            if network:
                limits.append(("per_network", f"{prefix}network:{network}", settings.per_network))
        if settings.per_pipeline is not None:
            limits.append(("per_pipeline", f"{prefix}pipeline", settings.per_pipeline))
        return limits


def _refused(leases: list[Lease], name: str, limit: int) -> Refuse:
    _release(leases)
    return Refuse(Cause.TOO_MANY_CONNECTIONS, disconnect=True, log=f"{name}: {limit} at a time")


def _release(leases: list[Lease]) -> None:
    while leases:
        leases.pop().release()
