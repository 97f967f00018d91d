"""Find the client's host name: the PTR record of its address, believed if that name has the address.

Asked in `connect`, before the greeting, once a session. It refuses nobody; it sets what other stages, conditions and
XCLIENT use:

- `client.name`: the verified name, else empty;
- `client.reverse_name`: the first PTR name, verified or not;
- `client.name_status`: `ok`; `unavailable` (no such name, or it does not point back); `tempunavail` (a name server
  failed or did not answer within `wait`; the client is on a local socket, and nobody is asked).

Costs two or three questions to the pipeline's `resolvers`, cached by their TTL and asked while a `greeting_delay` above
it runs; `resolver` says which addresses are looked for, and for how long an answer is believed. A name server that
is down costs `wait` and makes the name `tempunavail`; the session goes on.

    stages:
      - reverse_dns
      - reverse_dns: 3s
"""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

from pydantic import Field

from gateway import Duration, Kind, Session, Settings, Stage, Worker


class ReverseDnsSettings(Settings):
    """How long a client may wait for its name."""

    short_form: ClassVar[str | None] = "wait"

    wait: Annotated[Duration, Field(gt=0, le=30)] = Field(
        5.0, description="All look-ups of a client together; after that its name is tempunavail."
    )


class ReverseDns(Stage):
    """Find the client's host name: the PTR record of its address, believed if that name has the address."""

    Settings = ReverseDnsSettings
    kind = Kind.PLUMBING
    provides = frozenset({"client.name", "client.reverse_name", "client.name_status"})
    timeout = 60.0  # `wait` is the clock that counts: a slow name server is a status, not a failure of the stage
    settings: ReverseDnsSettings
    _worker: Worker

    async def start(self, worker: Worker) -> None:
        """Keep the worker, for its resolver."""
        self._worker = worker

    async def connect(self, session: Session) -> None:
        """Look up the name of the client's address."""
        client = session.client
        if not _has_name(client.address):
            client.name_status = "tempunavail"
            return
        try:
            async with asyncio.timeout(self.settings.wait):
                found = await self._worker.resolver.forward_confirmed(client.address)
        except TimeoutError:
            client.name_status = "tempunavail"
            return
        client.name = found.name or ""
        client.reverse_name = found.unverified or ""
        client.name_status = found.status


def _has_name(address: str) -> bool:
    """Not so the client of a local socket, whose address is empty or a path."""
    return bool(address) and "/" not in address and not address.startswith("unix:")
