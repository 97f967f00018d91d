"""The supervisor: the one process that lives as long as the service.

It keeps what must not be lost, the listening sockets, the counters and the embedded servers, and starts a generation
for each reading of the configuration. It reads no pipeline itself, imports no stage and speaks to no client, and is
therefore the only one that may stay root.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from gateway.admin import place
from gateway.observe import metrics
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger
from gateway.service import systemd
from gateway.service.certificates import FileWatch
from gateway.service.channel import Channel, Json, Message, pair, send_sockets
from gateway.service.child import files_message
from gateway.service.held import HeldSockets
from gateway.service.listening import StartError, plan_of
from gateway.sink.process import EmbeddedServer

log = get_logger("gateway.supervisor")

START_SECONDS: Final = 120.0
MOST_GENERATIONS: Final = 8
STOP_AFTER: Final = 20.0  # beyond the time for draining
FILES_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 4.0
REBORN_PAUSE: Final = 1.0

State = Literal["starting", "serving", "draining", "failed", "ended"]


@dataclass(eq=False)
class Generation:
    """One generation as the supervisor sees it. `rows` of the counters are its workers'."""

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    over: socket.socket
    started: float
    begun: asyncio.Future[str]  # "" once it is ready, else what is wrong
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = "starting"
    rows: list[int] = field(default_factory=list)
    listeners: list[Message] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    workers: int = 0
    drain: float = 30.0
    error: str = ""


@dataclass
class _Asked:
    """A question on its way: who still has to answer, and what has come."""

    waiting: set[int]
    answers: list[Json]
    done: Callable[[list[Json]], None]
    timer: asyncio.TimerHandle | None = None


class Supervisor:
    """`paths`, `workers` and `loop` go to every generation; `ready` is called when the first one serves."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        workers: str | None = None,
        loop: str = "auto",
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._orders: dict[str, Json] = {"paths": list(paths), "workers": workers, "loop": loop}
        self._ready = ready
        self._map = CounterMap.create()
        self._row = self._map.row(0)  # our own
        self._row.take(os.getpid())
        metrics.bind(self._row, self._map)
        self._free = list(range(1, len(self._map)))
        self._notifier = systemd.Notifier()
        self._inherited = systemd.inherited_sockets()
        self._held = HeldSockets(self._from_systemd)
        self._places: dict[str, socket.socket] = {}
        self._embedded: dict[str, EmbeddedServer] = {}
        self._generations: list[Generation] = []
        self._secret = secrets.token_bytes(32)
        self._sticky: dict[str, Message] = {}
        self._watch: FileWatch | None = None
        self._count = 0
        self._asked: dict[int, _Asked] = {}
        self._questions = 0
        self._reloading: asyncio.Task[Generation] | None = None
        self._reload_again = False
        self._stop: asyncio.Event
        self._now: asyncio.Event
        self._started = time.time()
        self._status = 0
        self._restarts = 0
        self._reason = ""
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self) -> int:
        """Serve until a signal or the admin API says stop; the exit status."""
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        try:
            first = await self._start()
            if first.error:
                print(first.error, file=sys.stderr, flush=True)
                return 2
            self._take_over(first)
            self._ready()
            self._notifier.ready(f"generation {first.number}: {first.workers} workers")
            print("gateway: ready", file=sys.stderr, flush=True)
            tending = asyncio.create_task(self._tend())
            await self._stop.wait()
            await self._drain_all()
            tending.cancel()
        finally:
            await self._end()
        return self._status

    # -- generations ----------------------------------------------------------------------------------------

    async def _start(self) -> Generation:
        """A new generation, ready or with its `error`."""
        loop = asyncio.get_running_loop()
        ours, theirs = pair()
        over, fetched = pair()
        self._count += 1
        passed = (theirs.fileno(), fetched.fileno(), self._map.fd)
        orders = self._orders | {
            "generation": self._count,
            "control": passed[0],
            "sockets": passed[1],
            "counters": passed[2],
        }
        with theirs, fetched:
            process = subprocess.Popen(  # noqa: ASYNC220 -- it waits for the exec only
                [sys.executable, "-P", "-m", "gateway.service.generation", json.dumps(orders)],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                env=systemd.child_environment(),
                start_new_session=True,  # a terminal's Ctrl-C is for us
            )
        generation = Generation(self._count, process, Channel(ours), over, time.time(), loop.create_future())
        self._generations.append(generation)
        generation.channel.attach(
            loop, lambda message: self._heard(generation, message), lambda: self._lost(generation)
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                generation.error = await generation.begun
        except TimeoutError:
            generation.error = f"gateway: not ready after {START_SECONDS:.0f} seconds"
        if generation.error:
            generation.state = "failed"
            if generation.process.poll() is None:
                generation.process.terminate()
        return generation

    def _take_over(self, new: Generation) -> None:
        """The new generation accepts, then the old ones stop."""
        new.state = "serving"
        new.channel.send({"op": "accept"})
        for old in self._generations:
            if old is not new and old.state == "serving":
                old.state = "draining"
                old.channel.send({"op": "drain", "seconds": old.drain})
        draining = [old for old in self._generations if old.state == "draining"]
        for old in draining[: max(0, len(draining) - MOST_GENERATIONS)]:
            old.channel.send({"op": "drain", "seconds": 0.0})
        self._held.keep(plan_of(spec) for spec in new.listeners)
        for address in [address for address in self._places if address not in new.places]:
            self._close_place(address)
        self._watch = FileWatch(new.files)
        metrics.gauge("gateway_generation").set(new.number)
        metrics.gauge("gateway_reload_timestamp_seconds").set(int(time.time()))

    async def reload(self) -> Generation:
        """A new generation in place of the present one, or, if it fails, none; calls that come meanwhile share one."""
        if self._reloading is None:
            self._reloading = asyncio.get_running_loop().create_task(self._reload())
        return await asyncio.shield(self._reloading)

    async def _reload(self) -> Generation:
        try:
            self._notifier.reloading("reads its configuration")
            generation = await self._start()
            if self._stop.is_set():
                generation.channel.send({"op": "drain", "seconds": 0.0})
            elif generation.error:
                self._reason = f"reload failed: {generation.error}"
                print(generation.error, file=sys.stderr, flush=True)
                metrics.counter("gateway_reloads_total", result="failed").add()
                self._log("error", "reload_failed", error=generation.error, generation=self._newest())
            else:
                self._reason = ""
                self._take_over(generation)
                metrics.counter("gateway_reloads_total", result="ok").add()
                self._log("info", "reload", generation=generation.number, workers=generation.workers)
            self._notifier.ready(f"generation {self._newest()}")
            return generation
        finally:
            self._reloading = None

    def _asked_to_reload(self) -> None:
        """SIGHUP; one that comes during a reload is for a file that may have been read already."""
        if self._stop.is_set():
            return
        if self._reloading is not None:
            self._reload_again = True
        else:
            self._spawn(self._reload_and_again())

    async def _reload_and_again(self) -> None:
        await self.reload()
        while self._reload_again and not self._stop.is_set():
            self._reload_again = False
            await self.reload()

    def _newest(self) -> int:
        return max((one.number for one in self._generations if one.state == "serving"), default=0)

    # -- what generations say -------------------------------------------------------------------------------

    def _heard(self, generation: Generation, message: Message) -> None:
        match message["op"]:
            case "open":
                self._spawn(self._open(generation, message))
            case "ready":
                generation.workers = int(str(message["workers"]))
                _settle(generation.begun, "")
            case "failed":
                _settle(generation.begun, str(message["error"]))
            case "ask":
                self._spawn(self._ask_for(generation, message))
            case "answers":
                self._answered(generation, message)

    async def _open(self, generation: Generation, message: Message) -> None:
        """Bind what the configuration wants and is not held yet, and hand over."""
        try:
            opened, sockets = await self._opened(generation, message)
        except (StartError, OSError) as error:
            generation.channel.send({"op": "refused", "error": str(error)})
            return
        generation.channel.send(opened)
        await asyncio.get_running_loop().run_in_executor(None, send_sockets, generation.over, sockets)
        generation.over.close()

    async def _opened(self, generation: Generation, message: Message) -> tuple[Message, list[socket.socket]]:
        identity = cast("list[int] | None", message["identity"])
        owner = None if identity is None else (identity[0], identity[1])
        listeners = cast("list[Message]", message["listeners"])
        groups = self._held.get([plan_of(one) for one in listeners], owner=owner)
        notes: list[str] = []
        generation.places = []
        for address in (self._admin_address(message), message["metrics"]):
            groups.append([] if address is None else self._place(generation, str(address), message, owner, notes))
        embedded = cast("list[str]", message["embedded"])
        addresses = {url: await self._embed(url, identity) for url in embedded}
        generation.listeners, generation.embedded = listeners, embedded
        generation.files = cast("list[str]", message["files"])
        generation.drain = float(str(message["drain"]))
        generation.rows = [self._free.pop(0) for _ in range(int(str(message["rows"])))]
        opened: Message = {
            "op": "opened",
            "sockets": [len(group) for group in groups],
            "rows": list(generation.rows),
            "embedded": addresses,
            "notes": notes,
            "secret": self._secret.hex(),
            "sticky": list(self._sticky.values()),
        }
        return opened, [sock for group in groups for sock in group]

    def _admin_address(self, message: Message) -> Json:
        return f"unix:{place.default_socket()}" if message["admin_default"] else message["admin"]

    def _place(
        self, generation: Generation, address: str, message: Message, owner: tuple[int, int] | None, notes: list[str]
    ) -> list[socket.socket]:
        """The socket of the admin API or the metrics; the default one is done without where it cannot be had."""
        generation.places.append(address)
        if address not in self._places:
            try:
                self._places[address] = place.bound(address, int(str(message["admin_mode"])))
                if address.startswith("unix:") and owner is not None and os.geteuid() == 0:
                    os.chown(address.removeprefix("unix:"), *owner)
            except OSError as error:
                text = f"{address}: cannot listen: {error.strerror or error}"
                if not message["admin_default"] or address == message["metrics"]:
                    raise StartError(text) from None
                notes.append(f"no admin API: {text}; write `admin: unix:/path` or `admin: off` below `process`")
                return []
        return [self._places[address]]

    async def _embed(self, url: str, identity: list[int] | None) -> str:
        """The embedded server of this URL, started at its first use; its address. Raises StartError."""
        server = self._embedded.get(url)
        if server is not None and server.running:
            return server.address
        account = None if identity is None else (identity[0], identity[1], tuple(identity[2:]))
        server = EmbeddedServer(account=account)
        folder = url.removeprefix("embedded://")
        try:
            address = await asyncio.get_running_loop().run_in_executor(None, server.start, folder)
        except (OSError, RuntimeError, TimeoutError) as error:
            raise StartError(f"{url}: the embedded server does not start: {error}") from None
        self._embedded[url] = server
        return address

    def _from_systemd(self, plan: object) -> list[socket.socket]:
        from gateway.pipeline.plan import ListenerPlan

        assert isinstance(plan, ListenerPlan)
        found = systemd.match(self._inherited, plan.host, plan.port, plan.path)
        return [found] if found is not None else []

    def _lost(self, generation: Generation) -> None:
        """Its channel is closed: it ended, or is about to."""
        self._spawn(self._buried(generation))

    async def _buried(self, generation: Generation) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, generation.process.wait, 10)
        except subprocess.TimeoutExpired:
            generation.process.kill()
            generation.process.wait()
        was, generation.state = generation.state, "ended"
        status = generation.process.returncode
        _settle(generation.begun, f"gateway: the new process ended with status {status}; its standard error says why")
        generation.channel.close()
        generation.over.close()
        if was == "failed":
            generation.state = "failed"
        if was in ("starting", "failed"):
            self._free += generation.rows
        else:
            self._recover_rows(generation)
        for asked in tuple(self._asked.values()):
            self._without(asked, generation)
        generation.gone.set()
        if was == "serving" and not self._stop.is_set():
            self._log("critical", "generation_died", generation=generation.number, status=status)
            self._spawn(self._replace_generation())
        elif was == "draining":
            self._log("info", "generation_ended", generation=generation.number)
        self._forget(generation)

    def _recover_rows(self, generation: Generation) -> None:
        """Its counters stay; rows whose process still runs (the generation itself was killed) are free later."""
        for index in generation.rows:
            row = self._map.row(index)
            if _is_gone(row.owner):
                row.clear_gauges()
                self._free.append(index)

    def _forget(self, generation: Generation) -> None:
        ended = [one for one in self._generations if one.state in ("ended", "failed")]
        for one in ended[:-5]:  # the last few are shown
            self._generations.remove(one)
        used = {url for one in self._generations if one.state not in ("ended", "failed") for url in one.embedded}
        for url in [url for url in self._embedded if url not in used]:
            if self._newest():
                self._spawn(_in_thread(self._embedded.pop(url).stop))

    async def _replace_generation(self) -> None:
        """The one that served was killed: its workers serve what they have, a new one accepts."""
        while not self._stop.is_set() and not self._newest():
            generation = await self.reload()
            if not generation.error:
                return
            await asyncio.sleep(REBORN_PAUSE)

    def _reap(self) -> None:
        """SIGCHLD: children that are nobody's news but ours."""
        for generation in self._generations:
            generation.process.poll()

    # -- questions ------------------------------------------------------------------------------------------

    async def _ask_for(self, generation: Generation, message: Message) -> None:
        """A question of the admin process: answer it, or ask the workers."""

        def answered(answers: list[Json]) -> None:
            generation.channel.send({"op": "answers", "id": message["id"], "from": message["from"], "answers": answers})

        if message["to"] != "supervisor":
            self._ask(message, answered)
            return
        try:
            args = cast("Mapping[str, Json]", message["args"])
            result, error = await self._own_answer(str(message["name"]), args), ""
        except StartError as problem:
            result, error = None, str(problem)
        answered([{"generation": self._newest(), "worker": -1, "result": result, "error": error}])

    def _ask(self, message: Message, done: Callable[[list[Json]], None]) -> None:
        alive = [one for one in self._generations if one.state in ("serving", "draining")]
        if message["to"] == "one":
            alive = [one for one in alive if one.number == self._newest()]
        elif message["name"] in ("upstream", "log_level"):  # holds for workers to come, too
            args = cast("Mapping[str, Json]", message["args"])
            key = f"{message['name']} {args.get('pipeline')} {args.get('pool')} {args.get('server')}"
            self._sticky[f"{key} weight" if args.get("action") == "weight" else key] = message
        self._questions += 1
        number = self._questions
        asked = self._asked[number] = _Asked({one.number for one in alive}, [], done)
        asked.timer = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._late, number)
        for one in alive:
            one.channel.send({**message, "id": number})
        if not alive:
            self._finish(number)

    def _answered(self, generation: Generation, message: Message) -> None:
        asked = self._asked.get(int(str(message["id"])))
        if asked is not None:
            asked.answers += cast("list[Json]", message["answers"])
            self._without(asked, generation)

    def _without(self, asked: _Asked, generation: Generation) -> None:
        asked.waiting.discard(generation.number)
        if not asked.waiting:
            for number in [number for number, one in self._asked.items() if one is asked]:
                self._finish(number)

    def _late(self, number: int) -> None:
        asked = self._asked[number]
        text = "the generation did not answer in time"
        asked.answers += [
            {"generation": one, "worker": -1, "result": None, "error": text} for one in sorted(asked.waiting)
        ]
        self._finish(number)

    def _finish(self, number: int) -> None:
        asked = self._asked.pop(number)
        if asked.timer is not None:
            asked.timer.cancel()
        asked.done(asked.answers)

    async def _own_answer(self, name: str, args: Mapping[str, Json]) -> Json:
        """What the supervisor itself is asked. Raises StartError for what it does not know."""
        match name:
            case "status":
                return self._describe()
            case "generations":
                return [_described(one) for one in self._generations]
            case "reload":
                generation = await self.reload()
                return {"ok": not generation.error, "generation": self._newest(), "error": generation.error}
            case "stop" | "drain":
                if name == "stop" and args.get("now"):
                    self._now.set()
                self._stop.set()
                return {"ok": True}
        raise StartError(f"404 the supervisor knows no {name}")

    def _describe(self) -> Message:
        newest = self._newest()
        state = "draining" if self._stop.is_set() else "reloading" if self._reloading is not None else "serving"
        workers: list[Json] = [
            {
                "generation": one.number,
                "worker": number,
                "pid": self._map.row(row).owner,
                "started": one.started,
                "state": one.state,
            }
            for one in self._generations
            if one.state in ("serving", "draining")
            for number, row in enumerate(one.rows[2:])
        ]
        return {
            "pid": os.getpid(),
            "started": self._started,
            "generation": newest,
            "state": state if newest else "starting",
            "reason": self._reason,
            "restarts": metrics.total("gateway_worker_restarts_total"),
            "workers": workers,
        }

    # -- all the time ---------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """The watchdog of systemd, and renewed certificates."""
        loop = asyncio.get_running_loop()
        pause = min(FILES_SECONDS, self._notifier.watchdog_seconds or FILES_SECONDS)
        look_at = loop.time() + FILES_SECONDS
        while True:
            self._notifier.watchdog()
            if loop.time() >= look_at and self._watch is not None and not self._stop.is_set():
                look_at = loop.time() + FILES_SECONDS
                files = await loop.run_in_executor(None, self._watch.changed)
                if files:
                    for one in self._generations:
                        if one.state in ("serving", "draining"):
                            one.channel.send(files_message(files))
            await asyncio.sleep(pause)

    def _reopen(self) -> None:
        for one in self._generations:
            if one.state in ("serving", "draining"):
                one.channel.send({"op": "reopen"})

    def _log(self, level: str, record: str, **fields: Json) -> None:
        """Into the log of the newest generation, which has the sinks; to standard error where there is none."""
        for one in reversed(self._generations):
            if one.state == "serving":
                one.channel.send({"op": "log", "level": level, "record": record, "fields": fields})
                return
        getattr(log, level)(record, **fields)

    # -- stop -----------------------------------------------------------------------------------------------

    def _asked_to_stop(self) -> None:
        """SIGTERM, SIGQUIT, SIGINT: drain; a second one: now."""
        if self._stop.is_set():
            self._now.set()
        self._stop.set()

    async def _drain_all(self) -> None:
        """Nobody listens any more; sessions go on for a while, or until somebody is impatient."""
        alive = [one for one in self._generations if one.state in ("starting", "serving", "draining")]
        seconds = max((one.drain for one in alive), default=0.0)
        self._notifier.stopping("drains", seconds + STOP_AFTER)
        for one in alive:
            one.state = "draining"
            one.channel.send({"op": "drain", "seconds": 0.0 if self._now.is_set() else one.drain})
        self._held.close()
        gone = asyncio.create_task(_all_gone(alive))
        now = asyncio.create_task(self._now.wait())
        done, _ = await asyncio.wait([gone, now], timeout=seconds + STOP_AFTER, return_when=asyncio.FIRST_COMPLETED)
        if gone not in done:
            for one in alive:
                one.channel.send({"op": "drain", "seconds": 0.0})
            await asyncio.wait([gone], timeout=STOP_AFTER)
        now.cancel()

    async def _end(self) -> None:
        """Whatever is left."""
        for one in self._generations:
            if one.process.poll() is None:
                one.process.terminate()
                try:
                    await asyncio.get_running_loop().run_in_executor(None, one.process.wait, 10)
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
        for server in self._embedded.values():
            await asyncio.get_running_loop().run_in_executor(None, server.stop)
        self._held.close()
        for address in tuple(self._places):
            self._close_place(address)

    def _close_place(self, address: str) -> None:
        self._places.pop(address).close()
        if address.startswith("unix:"):
            try:
                os.unlink(address.removeprefix("unix:"))
            except OSError:
                pass

    def _spawn(self, coroutine: Coroutine[object, object, object]) -> None:
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _settle(future: asyncio.Future[str], text: str) -> None:
    if not future.done():
        future.set_result(text)


async def _all_gone(generations: Sequence[Generation]) -> None:
    for generation in generations:
        await generation.gone.wait()


async def _in_thread(call: Callable[[], None]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, call)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == 0


def _described(generation: Generation) -> Message:
    return {
        "generation": generation.number,
        "pid": generation.process.pid,
        "started": generation.started,
        "state": generation.state,
        "workers": generation.workers,
        "error": generation.error,
    }
