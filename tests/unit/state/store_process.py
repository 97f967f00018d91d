"""A process with an LMDB store of its own, told what to do by lines on its input; an answer is a line.

`python store_process.py FOLDER TIMEOUT`. Started by the tests beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from pathlib import Path

from gateway.state.lmdb_store import LmdbStore
from gateway.state.settings import StoreSettings
from gateway.state.store import Lease, StoreError, Window

FOREVER = 1e9


class Clock:
    """The wall clock, until it is set."""

    now: float | None = None

    def __call__(self) -> float:
        return time.time() if self.now is None else self.now


async def serve(store: LmdbStore, clock: Clock) -> None:
    leases: list[Lease] = []
    while words := (await asyncio.to_thread(sys.stdin.readline)).split():
        match words:
            case ["hits", key, limit, times]:  # so many, as fast as it can
                window = [Window(int(limit), FOREVER)]
                answer: object = sum([(await store.hit(key, window)).allowed for _ in range(int(times))])
            case ["at", now, key, limit, period]:
                clock.now = float(now)
                answer = int((await store.hit(key, [Window(int(limit), float(period))])).allowed)
            case ["count", key]:  # until it is killed; an octet for each hit that was counted
                for _ in itertools.count():
                    await store.hit(key, [Window(10**9, FOREVER)])
                    os.write(1, b"+")
            case ["hold", key, limit]:
                lease = await store.hold(key, int(limit))
                leases += [lease] if lease is not None else []
                answer = int(lease is not None)
            case ["lock"]:
                answer = "locked" if store._lock.take_within(10) else "no"
            case _:
                raise ValueError(words)
        print(answer, flush=True)


async def main(folder: str, timeout: str) -> None:
    clock = Clock()
    store = LmdbStore(StoreSettings("lmdb", Path(folder), timeout=float(timeout)), owner="test", clock=clock)
    try:
        await store.open()
    except StoreError as error:
        sys.exit(str(error))
    print("open", flush=True)
    await serve(store, clock)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
