"""The listening sockets of a service, held from its start to its end, so that no reload and no crash unbinds them.

A listener that two configurations have is one socket that both accept from. One that is new is bound beside the
others; one that the running configuration has no more is closed once nobody of it accepts.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence

from gateway.pipeline.plan import ListenerPlan
from gateway.service.listening import StartError, bound, listen

Key = tuple[str, int, str, bool, bool]
Inherited = Callable[[ListenerPlan], list[socket.socket]]


def _key(plan: ListenerPlan) -> Key:
    """What cannot be changed on a socket that is bound."""
    return (plan.host, plan.port, plan.path, plan.ipv6only, plan.multipath)


class HeldSockets:
    """`inherited` gives what systemd bound for a listener."""

    def __init__(self, inherited: Inherited = lambda plan: []) -> None:
        self._inherited = inherited
        self._held: dict[Key, list[socket.socket]] = {}
        self._plans: dict[Key, ListenerPlan] = {}
        self._foreign: set[Key] = set()  # systemd's: never unlinked

    def get(self, plans: Sequence[ListenerPlan], *, owner: tuple[int, int] | None = None) -> list[list[socket.socket]]:
        """The sockets of each listener, listening. New unix sockets belong to `owner` (uid, gid).

        Raises StartError, and then nothing changed.
        """
        new: dict[Key, list[socket.socket]] = {}
        ports = {plan.port for plan in plans if not plan.path and _key(plan) not in self._held}
        sharing = [sock for key, socks in self._held.items() for sock in socks if not key[2] and key[1] in ports]
        _share(sharing, True)
        try:
            for plan in plans:
                key = _key(plan)
                if key in self._held or key in new:
                    continue
                if inherited := self._inherited(plan):
                    self._held[key], self._plans[key] = inherited, plan
                    self._foreign.add(key)
                    continue
                taken = any(other[1] == plan.port and not other[2] for other in self._held)
                new[key] = bound(plan, share_port=taken and not plan.path)
                self._plans[key] = plan
            listen((self._plans[key], sock) for key, socks in new.items() for sock in socks)
        except BaseException:
            for key, socks in new.items():
                self._close(key, socks)
            raise
        finally:
            _share(sharing, False)
        for key, socks in new.items():
            _share((sock for sock in socks if sock.family != socket.AF_UNIX), False)
            if key[2] and owner is not None and os.geteuid() == 0:
                os.chown(key[2], *owner)
        self._held |= new
        return [self._held[_key(plan)] for plan in plans]

    def keep(self, plans: Iterable[ListenerPlan]) -> None:
        """Close all others."""
        wanted = {_key(plan) for plan in plans}
        for key in [key for key in self._held if key not in wanted]:
            self._close(key, self._held.pop(key))

    def close(self) -> None:
        """Close all: nobody listens any more."""
        self.keep(())

    def _close(self, key: Key, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            sock.close()
        if key[2] and key not in self._foreign:
            with contextlib.suppress(OSError):
                os.unlink(key[2])
        self._plans.pop(key, None)
        self._foreign.discard(key)


def _share(sockets: Iterable[socket.socket], on: bool) -> None:
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(on))


__all__ = ["HeldSockets", "StartError"]
