"""The embedded upstreams (`embedded://folder`) of a service: started once, kept over reloads, restarted if they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gateway.observe.logs import get_logger
from gateway.service import systemd
from gateway.service.listening import StartError
from gateway.sink.process import EmbeddedServer

log = get_logger("gateway.supervisor")

LONGEST_PAUSE: Final = 30.0

Account = tuple[int, int, tuple[int, ...]] | None
"""User id, group id and supplementary groups, where it does not run as the supervisor does."""

Key = tuple[str, Account]


@dataclass(eq=False)
class _Held:
    server: EmbeddedServer
    due: float = 0.0
    pause: float = 0.5
    busy: bool = False


class EmbeddedServers:
    """By URL and account. Starting one takes a moment, which a thread waits for."""

    def __init__(self) -> None:
        self._held: dict[Key, _Held] = {}
        self._environment = systemd.child_environment()

    async def get(self, url: str, account: Account) -> str:
        """The address of the server, which is started if it is not there. Raises StartError."""
        held = self._held.get((url, account))
        if held is not None:
            return held.server.address
        server = EmbeddedServer(account=account, environment=self._environment)
        try:
            address = await asyncio.to_thread(server.start, _folder(url))
        except (OSError, RuntimeError, TimeoutError) as error:
            raise StartError(f"{url}: the embedded server does not start: {error}") from None
        self._held[url, account] = _Held(server)
        return address

    async def keep(self, wanted: Iterable[Key]) -> None:
        """Stop all others."""
        wanted = set(wanted)
        unused = [self._held.pop(key) for key in tuple(self._held) if key not in wanted]
        await asyncio.gather(*(asyncio.to_thread(held.server.stop) for held in unused))

    async def tend(self) -> None:
        """Start those again that have ended, at their old address: who uses them knows no other."""
        now = time.monotonic()
        for (url, _), held in tuple(self._held.items()):
            if held.server.running or held.busy or now < held.due:
                continue
            held.due, held.pause = now + held.pause, min(LONGEST_PAUSE, 2 * held.pause)
            held.busy = True
            log.error("warning", text=f"{url}: the embedded server has ended; it is started again")
            try:
                await asyncio.to_thread(held.server.start, _folder(url))
            except (OSError, RuntimeError, TimeoutError) as error:
                log.error("warning", text=f"{url}: the embedded server does not start: {error}")
            finally:
                held.busy = False
            if held not in self._held.values():  # not wanted any more in the meantime
                await asyncio.to_thread(held.server.stop)


def _folder(url: str) -> str:
    return url.removeprefix("embedded://")
