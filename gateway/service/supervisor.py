"""The supervisor: the one process that lives as long as the service.

It keeps what must not be lost (`holdings`) and starts a generation for each reading of the configuration. It reads no
pipeline itself, imports no stage and speaks to no client, and is therefore the only one that may stay root. It never
waits for another process: what takes time is a thread's or a generation's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from importlib.metadata import version
from typing import Final, TypeVar, cast

from gateway.observe import metrics
from gateway.observe.logs import get_logger
from gateway.service import systemd
from gateway.service.certificates import FileWatch
from gateway.service.channel import Json, Message
from gateway.service.child import files_message
from gateway.service.decisions import Decisions
from gateway.service.generations import ALIVE, KILL_AFTER, Generation, launch
from gateway.service.holdings import NOTHING, Holdings, Wish
from gateway.service.listening import StartError
from gateway.service.prctl import adopt_orphans, set_name, started_at
from gateway.service.questions import Questions

log = get_logger("gateway.supervisor")

START_SECONDS: Final = 120.0
ACCEPT_SECONDS: Final = 5.0
SILENT_SECONDS: Final = 20.0  # a generation says every half second that it lives
LATE_SECONDS: Final = 5.0
MOST_DRAINING: Final = 8
TICK_SECONDS: Final = 0.5
FILES_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 4.0
STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
LIVED_SECONDS: Final = 10.0
LONGEST_PAUSE: Final = 15.0
T = TypeVar("T")


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
        self._notifier = systemd.Notifier()
        self._holdings = Holdings()
        self._map = self._holdings.counters
        self._generations: list[Generation] = []
        self._wish: Wish = NOTHING  # of the configuration that took over last
        self._count = 0
        self._questions: Questions[Generation] = Questions(_missing)
        self._decisions = Decisions()
        self._watch: FileWatch | None = None
        self._reloading: asyncio.Task[str] | None = None  # one that has not begun to read files
        self._replacing: asyncio.Task[None] | None = None
        self._looked, self._awake = time.monotonic(), 0.0  # when last, and since when without a stop
        self._started = time.time()
        self._reason = ""
        self._tasks: set[asyncio.Task[object]] = set()
        self._stop, self._now, self._changed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._turn = asyncio.Lock()  # to start a generation

    # -- from the start to the end --------------------------------------------------------------------------

    async def run(self) -> int:
        """Serve until a signal or the admin API says stop; the exit status."""
        self._begin()
        tending = [
            self._spawn(_every(TICK_SECONDS, self._look_after)),
            self._spawn(_every(FILES_SECONDS, self._look_at_files)),
        ]
        try:
            error = await self._start_first()
            if self._stop.is_set():
                await self._drain_all()
                return 0
            if error:
                _say(error)
                return 2
            if self._notifier.watchdog_seconds is not None:
                tending.append(self._spawn(_every(self._notifier.watchdog_seconds, self._say_alive)))
            await self._stop.wait()
            await self._drain_all()
            return 0
        finally:
            await self._end()
            for task in tending:
                task.cancel()

    def _begin(self) -> None:
        """Become who answers signals and counts."""
        row = self._map.row(0)
        row.take(os.getpid())
        metrics.bind(row, self._map)
        metrics.gauge("gateway_start_timestamp_seconds").set(int(self._started))
        metrics.gauge("gateway_build_info", version=version("mail-gateway"), python=platform.python_version()).set(1)
        set_name("gateway")
        adopt_orphans()
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked some

    async def _start_first(self) -> str:
        """What is wrong, or nothing."""
        async with self._turn:
            try:
                first = await self._start()
            except StartError as error:
                return str(error)
            try:
                self._ready()
            except OSError as error:
                first.fail(str(error))
                return f"gateway: pid file {error.filename}: {error.strerror or error}"
            await self._take_over(first)
            self._notifier.ready(f"generation {first.number}: {first.workers} workers")
            _say("gateway: ready")
            return ""

    async def _drain_all(self) -> None:
        """Nobody listens any more; sessions go on for a while, or until somebody is impatient."""
        alive = [one for one in self._generations if one.alive]
        seconds = max((one.wish.drain for one in alive), default=0.0)
        self._notifier.stopping("drains", seconds + 2 * KILL_AFTER)
        for one in alive:
            one.drain(0.0 if self._now.is_set() else one.wish.drain, last=True)
        self._holdings.close_listeners()
        self._count_states()
        hurry = self._spawn(self._hurry())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + KILL_AFTER + 1):
                await self._all_gone()
        hurry.cancel()

    async def _hurry(self) -> None:
        await self._now.wait()
        for one in self._generations:
            if one.alive:
                one.drain(0.0, last=True)
        self._holdings.rows.end_orphans()

    async def _all_gone(self) -> None:
        """Until there are neither generations nor workers that lost theirs."""
        while self._holdings.rows.orphans or any(one.process.returncode is None for one in self._generations):
            self._changed.clear()
            await self._changed.wait()

    async def _end(self) -> None:
        """Whatever is left, at once: sessions have had their time."""
        self._stop.set()
        for one in self._generations:
            if one.process.returncode is None:
                one.kill_after(5.0 if one.state == "failed" else 0.0)
        self._holdings.rows.end_orphans()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * KILL_AFTER):
                await self._all_gone()
        await self._holdings.close()
        for number in STOPPING:  # the end is near; the loop's own end would make it a violent one
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    # -- one generation after the other ---------------------------------------------------------------------

    async def _start(self) -> Generation:
        """A new generation that waits for `accept`. Raises StartError; then nothing stays of what it was given."""
        self._count += 1
        generation = launch(self._count, self._orders, self._map.fd)
        self._generations.append(generation)
        generation.channel.attach(
            asyncio.get_running_loop(),
            lambda message: self._heard(generation, message),
            lambda: generation.kill_after(KILL_AFTER / 2),  # it ends, or is in trouble
        )
        self._count_states()
        try:
            async with asyncio.timeout(START_SECONDS):
                error = await asyncio.shield(generation.begun)
        except TimeoutError:
            error = f"gateway: not ready after {START_SECONDS:.0f} seconds"
        if not error and generation.alive:
            return generation
        generation.fail(error or "gateway: the new process ended as soon as it was ready")
        await self._let_go()
        raise StartError(generation.error)

    async def _take_over(self, new: Generation) -> None:
        """The new generation accepts, then the old ones stop, so that there is always somebody.

        Raises StartError if the new one ends at once; then the old one serves on.
        """
        for message in self._decisions:
            new.channel.send(message)
        new.accept()
        with contextlib.suppress(TimeoutError):  # then somebody is slow; no reason to serve two configurations for long
            async with asyncio.timeout(ACCEPT_SECONDS):
                await new.accepts.wait()
        if not new.alive and self._newest():
            raise StartError("gateway: the new process ended as soon as it accepted; its standard error says why")
        for old in self._generations:
            if old is not new and old.state == "serving":
                old.drain(old.wish.drain)
        self._make_room(new)
        self._wish = new.wish
        self._watch = FileWatch(new.wish.files)
        metrics.gauge("gateway_generation").set(new.number)
        metrics.gauge("gateway_reload_timestamp_seconds").set(int(time.time()))
        self._count_states()
        await self._let_go()

    def _make_room(self, new: Generation) -> None:
        """The oldest that drain end now where there are too many, or the next generation would have no rows."""
        draining = [one for one in self._generations if one.state == "draining"]
        free = self._holdings.rows.free
        while draining and (len(draining) > MOST_DRAINING or free < len(new.rows)):
            oldest = draining.pop(0)
            free += len(oldest.rows)
            oldest.drain(0.0)

    async def _let_go(self) -> None:
        """What no generation uses any more; where none is starting."""
        self._holdings.keep(self._wish)
        await self._let_servers_go()

    async def _let_servers_go(self) -> None:
        used = [key for one in self._generations if one.alive for key in one.wish.servers]
        await self._holdings.embedded.keep([*used, *self._wish.servers])

    def reload(self) -> asyncio.Task[str]:
        """A new generation in place of the present one, or, if it fails, none; the outcome is what is wrong, or "".

        It begins when one that is under way has ended, since that one may have read its files already. Calls that
        come before it begins share it.
        """
        if self._reloading is None:
            self._reloading = self._spawn(self._reload())
        return self._reloading

    async def _reload(self) -> str:
        async with self._turn:
            self._reloading = None
            if self._stop.is_set():
                return "gateway: the service stops"
            self._notifier.reloading("reads its configuration")
            try:
                generation = await self._start()
                await self._take_over(generation)
                self._reason = ""
                metrics.counter("gateway_reloads_total", result="done").add()
                self._log("info", "reload", generation=generation.number, workers=generation.workers)
            except StartError as error:
                if not self._stop.is_set():
                    self._reload_failed(str(error))
                return str(error)
            finally:
                if not self._stop.is_set():
                    self._notifier.ready(f"generation {self._newest()}")
            return ""

    def _reload_failed(self, error: str) -> None:
        self._reason = f"reload failed: {error.removeprefix('gateway: ')}"
        _say(error)
        metrics.counter("gateway_reloads_total", result="failed").add()
        self._log("error", "reload_failed", error=error, generation=self._newest())

    async def _replace(self, lived: float) -> None:
        """The one that served was killed: its workers serve what they have, a new one accepts."""
        pause = 0.0 if lived >= LIVED_SECONDS else 1.0
        while not self._stop.is_set() and not self._newest():
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause or 1.0)
            async with self._turn:
                pass  # a reload that is under way may do
            if not self._newest():
                await self.reload()

    def _newest(self) -> int:
        return max((one.number for one in self._generations if one.state == "serving"), default=0)

    # -- children that end ----------------------------------------------------------------------------------

    def _reap(self) -> None:
        """SIGCHLD: generations, embedded servers, and workers whose generation was killed."""
        for generation in tuple(self._generations):
            if generation.state != "ended" and generation.process.returncode is None:
                if generation.process.poll() is not None:
                    self._bury(generation)
        own = {one.process.pid for one in self._generations if one.process.returncode is None}
        while (pid := _ended_child()) and pid not in own:
            with contextlib.suppress(ChildProcessError):  # the thread that ends an embedded server was faster
                os.waitpid(pid, os.WNOHANG)
            self._holdings.rows.reaped(pid)
        self._changed.set()

    def _bury(self, generation: Generation) -> None:
        generation.channel.hear(lambda message: self._heard(generation, message))  # its last words
        was, status = generation.state, generation.process.returncode
        generation.settle(f"gateway: the new process ended with status {status}; its standard error says why")
        generation.state = "failed" if was in ("starting", "failed") else "ended"
        generation.close()
        self._holdings.rows.give_back(generation.rows, time.monotonic() + generation.wish.drain + KILL_AFTER)
        self._questions.without(generation, "the generation has ended")
        self._count_states()
        if was == "serving" and not self._stop.is_set():
            self._log("critical", "generation_died", generation=generation.number, status=status)
            if self._replacing is None or self._replacing.done():
                self._replacing = self._spawn(self._replace(time.time() - generation.started))
        elif was == "draining":
            self._log("info", "generation_ended", generation=generation.number)
            self._spawn(self._let_servers_go())
        over = [one for one in self._generations if one.process.returncode is not None]
        for one in over[:-5]:  # the last few are shown
            self._generations.remove(one)

    # -- what generations say -------------------------------------------------------------------------------

    def _heard(self, generation: Generation, message: Message) -> None:
        match message["op"]:
            case "open":
                if not generation.asked:  # afterwards it is no longer trusted with what only root may do
                    generation.asked = True
                    generation.wish = Wish.of(message)
                    self._spawn(self._open(generation))
            case "ready":
                generation.workers = int(str(message["workers"]))
                generation.settle("")
            case "accepts":
                generation.accepts.set()
            case "failed":
                generation.settle(str(message["error"]))
            case "ask":
                self._spawn(self._ask_for(generation, message))
            case "answers":
                self._questions.answered(message["id"], generation, cast("list[Json]", message["answers"]))

    async def _open(self, generation: Generation) -> None:
        """Bind what the configuration wants and is not held yet, and hand over."""
        try:
            handed = await self._holdings.hand_over(generation.wish, lambda: generation.state == "starting")
            generation.hand(handed)
        except (StartError, OSError) as error:
            generation.channel.send({"op": "refused", "error": str(error)})
        except BaseException:
            generation.settle("gateway: internal error in the supervisor; its standard error says more")
            raise

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
        asked = [one for one in self._generations if one.state in ("serving", "draining")]
        if message["to"] == "one":
            asked = [one for one in asked if one.number == self._newest()]

        def answered(answers: list[Json]) -> None:
            if self._decisions.note(message, answers):
                for one in self._generations:
                    if one.state == "serving" and one not in asked:
                        one.channel.send({**message, "id": 0})  # it took over in the meantime
            done(answers)

        number = self._questions.ask(asked, ANSWER_SECONDS, answered)
        for one in asked:
            one.channel.send({**message, "id": number})

    async def _own_answer(self, name: str, args: Mapping[str, Json]) -> Json:
        """What the supervisor itself is asked. Raises StartError for what it does not know."""
        match name:
            case "status":
                return self._describe()
            case "generations":
                return [one.describe() for one in self._generations]
            case "reload":
                error = await asyncio.shield(self.reload())
                return {"ok": not error, "generation": self._newest(), "error": error}
            case "stop" | "drain":
                if name == "stop" and args.get("now"):
                    self._now.set()
                self._begin_to_stop()
                return {"ok": True}
        raise StartError(f"404 the supervisor knows no {name}")

    def _describe(self) -> Message:
        newest = self._newest() or max((one.number for one in self._generations if one.state == "draining"), default=0)
        state = "draining" if self._stop.is_set() else "reloading" if self._turn.locked() else "serving"
        workers: list[Json] = [
            {
                "generation": one.number,
                "worker": number,
                "pid": self._map.row(row).owner,
                "started": started_at(self._map.row(row).owner) or one.started,
                "state": one.state,
            }
            for one in self._generations
            if one.state in ("serving", "draining")
            for number, row in enumerate(one.rows[2:])
            if one.state == "serving" or self._map.row(row).owner  # where it drains they end one by one
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

    async def _look_after(self) -> None:
        """Generations whose time is up or that are silent, questions without an answer, embedded servers."""
        self._reap()
        now = time.monotonic()
        if now - self._looked > LATE_SECONDS:  # we stood still, and so did they: they have their time anew
            self._awake = now
        self._looked = now
        self._holdings.rows.end_orphans(now)
        for one in self._generations:
            if one.process.returncode is not None:
                continue
            if one.kill_at is not None and now >= one.kill_at:
                one.process.kill()
                continue
            silent = now - max(self._map.row(one.rows[0]).heartbeat / 1000, self._awake) if one.rows else 0.0
            if one.state == "serving" and silent > SILENT_SECONDS:
                log.critical("warning", text=f"generation {one.number} was silent for {SILENT_SECONDS:.0f} seconds")
                one.process.kill()
        self._questions.tend("the generation did not answer in time")
        if not self._stop.is_set():
            self._spawn(self._holdings.embedded.tend())

    async def _say_alive(self) -> None:
        self._notifier.watchdog()

    async def _look_at_files(self) -> None:
        """Renewed certificates."""
        if self._watch is None or self._stop.is_set():
            return
        files = await asyncio.to_thread(self._watch.changed)
        for one in self._generations if files else ():
            if one.state in ("serving", "draining"):
                one.channel.send(files_message(files))

    def _reopen(self) -> None:
        """SIGUSR1; those that start may have their logs open already."""
        for one in self._generations:
            if one.alive:
                one.channel.send({"op": "reopen"})

    def _count_states(self) -> None:
        for state in ALIVE:
            number = sum(one.state == state for one in self._generations)
            metrics.gauge("gateway_generations", state=state).set(number)

    def _asked_to_stop(self) -> None:
        """SIGTERM, SIGQUIT, SIGINT: drain; a second one: now."""
        if self._stop.is_set():
            self._now.set()
        self._begin_to_stop()

    def _begin_to_stop(self) -> None:
        self._stop.set()
        for one in self._generations:
            if one.state == "starting":
                one.settle("gateway: the service stops")

    def _log(self, level: str, record: str, **fields: Json) -> None:
        """Into the log of the newest generation, which has the sinks; to standard error where there is none."""
        for one in reversed(self._generations):
            if one.state == "serving":
                one.channel.send({"op": "log", "level": level, "record": record, "fields": fields})
                return
        getattr(log, level)(record, **fields)

    def _spawn(self, coroutine: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """A task whose end nobody has to wait for; how it fails is logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(cast("asyncio.Task[object]", task))
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(cast("asyncio.Task[object]", task))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal_error", error=f"{type(error).__name__}: {error}", exc_info=error)


async def _every(seconds: float, call: Callable[[], Awaitable[None]]) -> None:
    """Again and again; what goes wrong is logged."""
    while True:
        try:
            await call()
        except Exception as error:
            log.exception("internal_error", error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(seconds)


def _missing(generation: Generation, why: str) -> Json:
    return {"generation": generation.number, "worker": -1, "result": None, "error": why}


def _ended_child() -> int:
    """A child that has ended and is yet to be reaped; 0 if there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return found.si_pid if found is not None else 0


def _say(text: str) -> None:
    """To whoever started us, if they still listen; at once, or (PYTHONUNBUFFERED) logs could be in the middle of it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
