"""After a fault everything is back where it was: tasks, descriptors, places in pools."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.testing.gateway import Gateway


def descriptors() -> set[str]:
    """What this process has open, without the descriptors of the listing itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return {entry for entry in found if "/proc/" not in entry}


@asynccontextmanager
async def unchanged(gateway: Gateway, limit: float = 10.0) -> AsyncIterator[None]:
    """The body leaves no session, task, descriptor or upstream connection behind. Fails with what is left."""
    tasks, opened = asyncio.all_tasks(), descriptors()
    yield
    try:
        async with asyncio.timeout(limit):
            await gateway.idle()
            while _left(gateway, tasks, opened):
                await asyncio.sleep(0)
                gc.collect(0)
    except TimeoutError:
        raise AssertionError(f"left behind: {_left(gateway, tasks, opened)}") from None


def _left(gateway: Gateway, tasks: set[asyncio.Task[object]], opened: set[str]) -> list[str]:
    left = [repr(task) for task in asyncio.all_tasks() - tasks if not task.done()]
    left += sorted(entry for entry in descriptors() - opened if "socket:" in entry or "pipe:" in entry)
    assert gateway.pipeline.served is not None
    for pool in gateway.pipeline.served.pools.values():
        left += [f"{server.url}: {server.active} connections" for server in pool.servers if server.active]
    return left
