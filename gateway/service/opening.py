"""What a generation asks of its supervisor, which binds, counts and embeds for it, and what it gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.config.load import Loaded
from gateway.pipeline.plan import ListenerPlan, listener_plans
from gateway.service.channel import Message, receive_sockets
from gateway.service.listening import StartError, spec
from gateway.service.privileges import Identity


@dataclass
class Given:
    """`listeners`: of each pipeline the sockets of each listener. `rows` of the counters: own, admin's, workers'."""

    listeners: dict[str, list[list[socket.socket]]]
    admin: list[socket.socket]
    metrics: list[socket.socket]
    rows: list[int]
    embedded: dict[str, str]  # address by URL
    notes: list[str]  # warnings
    secret: bytes

    def close(self, *, mail: bool = False, admin: bool = False) -> None:
        """This process's copies: a socket refuses nobody as long as one is open."""
        if mail:
            for groups in self.listeners.values():
                for sock in (sock for group in groups for sock in group):
                    sock.close()
        if admin:
            for sock in (*self.admin, *self.metrics):
                sock.close()


def workers_of(loaded: Loaded, ordered: object) -> int:
    """How many, as ordered on the command line or written."""
    workers = ordered or loaded.process.workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else int(str(workers))


def request(loaded: Loaded, workers: int, files: Sequence[str], identity: Identity | None) -> Message:
    """The message `open`. A generation has two rows beside its workers': for itself and for the admin process."""
    process = loaded.process
    return {
        "op": "open",
        "listeners": [spec(plan) for plans in _listeners(loaded).values() for plan in plans],
        "admin": None if process.admin is None else process.admin.listen,
        "admin_default": process.admin is None and not process.admin_is_off,
        "admin_mode": process.admin.mode if process.admin is not None else 0o600,
        "metrics": process.metrics,
        "embedded": sorted(
            {
                str(server.url)
                for pipeline, _ in loaded.pipelines
                for pool in pipeline.upstreams.values()
                for server in pool.servers
                if str(server.url).startswith("embedded://")
            }
        ),
        "rows": workers + 2,
        "files": list(files),
        "identity": None if identity is None else [identity.uid, identity.gid, *identity.groups],
        "drain": process.drain,
    }


def receive(loaded: Loaded, opened: Message, over: socket.socket) -> Given:
    """What the message `opened` announces, over the socket `over`. Raises StartError."""
    counts, rows, embedded, notes = opened["sockets"], opened["rows"], opened["embedded"], opened["notes"]
    assert isinstance(counts, list) and isinstance(rows, list) and isinstance(embedded, Mapping)
    assert isinstance(notes, list)
    try:
        found = receive_sockets(over, sum(int(str(count)) for count in counts))
    except OSError as error:
        raise StartError(f"no sockets of the supervisor: {error}") from None
    groups: list[list[socket.socket]] = []
    for count in counts:
        groups.append(found[: int(str(count))])
        found = found[int(str(count)) :]
    metrics, admin = groups.pop(), groups.pop()
    listeners: dict[str, list[list[socket.socket]]] = {}
    for name, plans in _listeners(loaded).items():
        listeners[name], groups = groups[: len(plans)], groups[len(plans) :]
    return Given(
        listeners,
        admin,
        metrics,
        rows=[int(str(row)) for row in rows],
        embedded={str(url): str(address) for url, address in embedded.items()},
        notes=[str(note) for note in notes],
        secret=bytes.fromhex(str(opened["secret"])),
    )


def _listeners(loaded: Loaded) -> dict[str, list[ListenerPlan]]:
    return {
        pipeline.name: [plan for listener in pipeline.listen for plan in listener_plans(listener)]
        for pipeline, _ in loaded.pipelines
    }
