"""Open the store that the settings name. Called in each worker, after the fork."""

from __future__ import annotations

from collections.abc import Callable

from gateway.state.lmdb_store import LmdbStore
from gateway.state.memory import MemoryStore
from gateway.state.settings import StoreSettings
from gateway.state.store import Store, StoreError
from gateway.state.watched import WatchedStore


async def open_store(settings: StoreSettings, *, clock: Callable[[], float], owner: str) -> Store:
    """The store, ready for use. `clock` is the loop's time, for the memory store; `owner` names the process.

    Raises StoreError if it cannot be reached, or needs what is not installed.
    """
    if settings.kind == "memory":
        return MemoryStore(clock)
    if settings.kind == "lmdb":
        lmdb = LmdbStore(settings, owner=owner)
        await lmdb.open()
        return WatchedStore(lmdb, settings.kind)
    try:
        from gateway.state.redis_store import RedisStore
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "redis":
            raise
        raise StoreError("a redis store needs the package redis: pip install 'mail-gateway[redis]'") from None
    redis = RedisStore(settings, owner=owner)
    await redis.open()
    return WatchedStore(redis, settings.kind)
