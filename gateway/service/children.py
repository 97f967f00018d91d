"""The children of a generation: forked, watched, replaced.

A child that dies is replaced at once if it had served for a second, else after a pause that doubles; one whose event
loop is silent for `SILENT_SECONDS`, or that does not become ready, is ended and then replaced like any other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NoReturn

from gateway.observe import logs, metrics
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger
from gateway.service.channel import Channel, Message, pair

log = get_logger("gateway.generation")

SILENT_SECONDS: Final = 5.0
START_SECONDS: Final = 120.0  # until it is ready
LATE_SECONDS: Final = 2.0  # the generation looks every half second
LIVED_SECONDS: Final = 1.0
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0

Role = Literal["worker", "admin"]
State = Literal["starting", "ready", "serving", "draining"]  # "serving": it was told so
Key = tuple[Role, int, int]


@dataclass(eq=False)
class Running:
    """A child that runs. `since` is of the monotonic clock; `row` that of the counters."""

    role: Role
    number: int
    pid: int
    channel: Channel
    row: int
    since: float
    state: State = "starting"
    accepts: bool = False  # its doors are open
    ended_for: str = ""  # why we ended it


class Children:
    """`serve` is called in the forked process, with its end of the channel, and gives its exit status.

    `heard` gets the messages of the children, also the last words of one that has ended.
    """

    def __init__(
        self,
        map: CounterMap,
        serve: Callable[[Role, int, Channel, int], int],
        heard: Callable[[Running, Message], None],
    ) -> None:
        self.running: list[Running] = []
        self._map = map
        self._serve = serve
        self._heard = heard
        self._pauses: dict[Key, float] = {}
        self._due: dict[Key, float] = {}
        self._looked, self._awake = time.monotonic(), 0.0  # when last, and since when without a stop

    def start(self, role: Role, number: int, row: int) -> Running:
        """Fork one. Raises OSError."""
        ours, theirs = pair()
        self._map.row(row).take(0)
        # A signal must not find the handlers of the generation in the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for handled in (signal.SIGTERM, signal.SIGCHLD):
                    signal.signal(handled, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                ours.close()
                self._be(role, number, Channel(theirs), row)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child = Running(role, number, pid, Channel(ours), row, time.monotonic())
        self.running.append(child)
        return child

    def _be(self, role: Role, number: int, channel: Channel, row: int) -> NoReturn:
        """The child's whole life. What the generation had to tidy up at its end is not the child's."""
        status = 1
        try:
            self._map.row(row).take(os.getpid())
            for other in self.running:
                other.channel.socket.close()
            status = self._serve(role, number, channel, row)
        except BaseException as error:
            log.critical("internal_error", error=f"{role} {number}: {type(error).__name__}: {error}", exc_info=error)
        finally:
            with contextlib.suppress(Exception):
                logs.close()
            os._exit(status)

    def hear(self) -> None:
        """What they have to say."""
        for child in tuple(self.running):
            child.channel.hear(partial(self._heard, child))

    def restart_due(self) -> None:
        """Fork those whose pause is over."""
        now = time.monotonic()
        for key in [key for key, when in self._due.items() if when <= now]:
            del self._due[key]
            try:
                self.start(*key)
            except OSError as error:
                pause = self._longer_pause(key)
                self._due[key] = now + pause
                log.error("warning", text=f"{key[0]} {key[1]} does not start: {error}; again in {pause:.1f} seconds")

    def reap(self, *, replace: bool) -> list[tuple[Running, str]]:
        """Those that ended, and how; they are replaced if `replace`."""
        ended: list[tuple[Running, str]] = []
        for child in tuple(self.running):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            child.channel.hear(partial(self._heard, child))
            self.running.remove(child)
            child.channel.close()
            self._map.row(child.row).take(0)
            how = child.ended_for or how_it_died(status)
            ended.append((child, how))
            if replace:
                self._replace(child, how)
        return ended

    def _replace(self, child: Running, how: str) -> None:
        now = time.monotonic()
        key: Key = (child.role, child.number, child.row)
        if child.state in ("serving", "draining") and now - child.since >= LIVED_SECONDS:
            self._pauses.pop(key, None)
            pause = 0.0
        else:
            pause = self._longer_pause(key)
        self._due[key] = now + pause
        kind = "silent" if child.ended_for else "killed" if "signal" in how else "exited"
        metrics.counter("gateway_worker_restarts_total", how=kind).add()
        log.error(
            "worker_died",
            role=child.role,
            worker=child.number,
            pid=child.pid,
            how=how,
            seconds=round(now - child.since, 3),
            restart_in=round(pause, 3),
        )

    def _longer_pause(self, key: Key) -> float:
        pause = self._pauses[key] = min(LONGEST_PAUSE, 2 * self._pauses.get(key, FIRST_PAUSE / 2))
        return pause

    def end_silent(self) -> None:
        """Kill those whose loop does not turn any more, and those that do not become ready.

        Where we stood still ourselves, so did they (a container that was paused, a machine without memory or time):
        they have their time anew.
        """
        now = time.monotonic()
        if now - self._looked > LATE_SECONDS:
            self._awake = now
        self._looked = now
        for child in self.running:
            if child.ended_for:
                continue
            silent = now - max(child.since, self._map.row(child.row).heartbeat / 1000, self._awake)
            if child.state == "starting" and now - max(child.since, self._awake) > START_SECONDS:
                child.ended_for = f"it was not ready after {START_SECONDS:.0f} seconds"
            elif child.state != "starting" and silent > SILENT_SECONDS:
                child.ended_for = f"its event loop was silent for {silent:.0f} seconds"
            if child.ended_for:
                os.kill(child.pid, signal.SIGKILL)

    def kill(self) -> None:
        """All of them, now."""
        for child in self.running:
            os.kill(child.pid, signal.SIGKILL)


def how_it_died(status: int) -> str:
    """The words for what waitpid(2) says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = str(number)
        return f"killed by signal {name}"
    return f"exit status {os.WEXITSTATUS(status)}"
