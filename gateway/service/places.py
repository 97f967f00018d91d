"""Where the service keeps what outlives it, and which store and which traces its settings mean."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.config.process import Process
from gateway.observe.traces import TraceSettings
from gateway.state.settings import StoreKind, StoreSettings


def state_directory(process: Process) -> Path:
    """`process.state_directory`; else where systemd says, /var/lib/gateway for root, or the user's own (XDG)."""
    if process.state_directory is not None:
        return process.state_directory
    if given := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/gateway")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gateway"


def store_settings(process: Process, state: Path, default: StoreKind) -> StoreSettings:
    """The store that is written, or the default."""
    store = process.store
    if store is None:
        return StoreSettings(default, path=state / "store") if default == "lmdb" else StoreSettings(default)
    if store.redis is not None:
        redis = store.redis
        return StoreSettings(
            "redis",
            url=redis.url,
            password=redis.password.reveal() if redis.password is not None else "",
            prefix=redis.prefix,
            timeout=redis.timeout,
            ca_file=redis.ca_file,
        )
    if store.lmdb is not None:
        return StoreSettings("lmdb", path=store.lmdb.path or state / "store", size=store.lmdb.size)
    return StoreSettings("memory")


def trace_settings(process: Process) -> TraceSettings | None:
    """Where spans go, if any are wanted."""
    traces = process.traces
    if traces is None:
        return None
    headers = {name: value.reveal() for name, value in traces.headers.items()}
    return TraceSettings(traces.endpoint, traces.sample, headers, traces.service_name)
