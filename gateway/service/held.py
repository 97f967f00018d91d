"""The listening sockets of a service, held from its start to its end, so that no reload and no crash unbinds them.

A listener that two configurations have is one socket that both accept from. One that is new is bound beside the
others; one that the running configuration has no more is closed when that one takes over. Sockets that the service
manager opened stay open to the end, whatever the configuration says: it keeps them open, too, and a later
configuration may want them again.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence

from gateway.pipeline.plan import ListenerPlan
from gateway.service.listening import Addresses, StartError, bound, change_options, listen, refuse_same
from gateway.service.privileges import socket_file

Key = tuple[str, int, str, bool, bool]
Inherited = Callable[[ListenerPlan], list[socket.socket]]


def key_of(plan: ListenerPlan) -> Key:
    """What cannot be changed on a socket that is bound."""
    return (plan.host, plan.port, plan.path, plan.ipv6only, plan.multipath)


class HeldSockets:
    """`inherited` gives what systemd bound for a listener."""

    def __init__(self, inherited: Inherited = lambda plan: []) -> None:
        self._inherited = inherited
        self._held: dict[Key, list[socket.socket]] = {}
        self._plans: dict[Key, ListenerPlan] = {}
        self._files: dict[Key, tuple[int, int]] = {}  # of unix sockets: device and inode
        self._foreign: set[Key] = set()  # systemd's: never unlinked

    def missing(self, plans: Iterable[ListenerPlan]) -> list[ListenerPlan]:
        """Those that are to be bound yet."""
        return [plan for plan in plans if key_of(plan) not in self._held and not self._inherited(plan)]

    def get(
        self,
        plans: Sequence[ListenerPlan],
        *,
        owner: tuple[int, int] | None = None,
        addresses: Addresses | None = None,
    ) -> list[list[socket.socket]]:
        """The sockets of each listener, listening. New unix sockets belong to `owner` (uid, gid).

        `addresses`: of host names that were looked up already. Raises StartError, and then nothing changed.
        """
        inherited = {key_of(plan): self._inherited(plan) for plan in plans if key_of(plan) not in self._held}
        known = self._held | {key: sockets for key, sockets in inherited.items() if sockets}
        by_key = {key_of(plan): plan for plan in plans}
        wanted = {key: plan for key, plan in by_key.items() if key not in known}
        ports = {plan.port for plan in wanted.values() if not plan.path}
        sharing = [sock for key, sockets in known.items() for sock in sockets if not key[2] and key[1] in ports]
        taken = {key[1] for key in known if not key[2]}
        new: dict[Key, list[socket.socket]] = {}
        _share(sharing, True)
        try:
            for key, plan in wanted.items():
                new[key] = bound(plan, share_port=plan.port in taken and not plan.path, addresses=addresses)
                if plan.path:
                    self._own(key, owner)
            all_of_them = known | new
            refuse_same((plan, sock) for key, plan in by_key.items() for sock in all_of_them[key])
            listen((wanted[key], sock) for key, sockets in new.items() for sock in sockets)
        except BaseException as error:
            for key, sockets in new.items():
                self._close(key, sockets)
            if isinstance(error, OSError):
                raise StartError(f"cannot listen: {error}") from None
            raise
        finally:
            _share(sharing, False)
        _share((sock for key, sockets in new.items() if not key[2] for sock in sockets), False)
        self._foreign |= {key for key, sockets in inherited.items() if sockets}
        self._held = known | new
        self._plans = {**by_key, **self._plans}  # options change when the configuration takes over
        return [self._held[key_of(plan)] for plan in plans]

    def keep(self, plans: Iterable[ListenerPlan]) -> None:
        """Close all others, and set the options that these have now."""
        wanted = {key_of(plan): plan for plan in plans}
        for key in [key for key in self._held if key not in wanted and key not in self._foreign]:
            self._close(key, self._held.pop(key))
        for key, plan in wanted.items():
            if key in self._held and plan != self._plans[key]:
                if key not in self._foreign:
                    for sock in self._held[key]:
                        change_options(sock, self._plans[key], plan)
                self._plans[key] = plan

    def close(self) -> None:
        """Close all: nobody listens any more."""
        for key in tuple(self._held):
            self._close(key, self._held.pop(key))

    def _own(self, key: Key, owner: tuple[int, int] | None) -> None:
        """Note which file it is, so that no other is ever removed, and whose it is to be."""
        path = key[2]
        found = os.lstat(path)
        self._files[key] = (found.st_dev, found.st_ino)
        socket_file(path, owner=owner)

    def _close(self, key: Key, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            sock.close()
        file = self._files.pop(key, None)
        if file is not None and key not in self._foreign:
            with contextlib.suppress(OSError):
                found = os.lstat(key[2])
                if (found.st_dev, found.st_ino) == file:
                    os.unlink(key[2])
        self._plans.pop(key, None)
        self._foreign.discard(key)


def _share(sockets: Iterable[socket.socket], on: bool) -> None:
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(on))


__all__ = ["HeldSockets", "StartError"]
