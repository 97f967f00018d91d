"""A generation: one reading of the configuration, and the parent of the workers that serve it.

A fresh process of the supervisor's (`python -m gateway.service.generation`), so that a reload runs the code that is
installed then. It reads the files and keys with the supervisor's rights, gets the sockets, drops the rights for good,
imports the stages, compiles everything and forks. It has neither an event loop nor threads: what forks must be simple.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn

from gateway.config.load import Loaded, load
from gateway.config.problems import ConfigError
from gateway.observe import logs, metrics
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger
from gateway.pipeline.compile import compile_all
from gateway.pipeline.plan import Plan
from gateway.relay import tls_files
from gateway.relay.tls import ServerContext
from gateway.service import certificates, opening, privileges
from gateway.service.certificates import named_files
from gateway.service.channel import Channel, Json, Message
from gateway.service.child import LoopFactory, files_of, loop_factory, reopen_logs
from gateway.service.children import Children, Role, Running
from gateway.service.decisions import Decisions
from gateway.service.heap import keep_heap
from gateway.service.listening import StartError
from gateway.service.log_set_up import set_up
from gateway.service.opening import Given
from gateway.service.places import state_directory, store_settings, trace_settings
from gateway.service.prctl import set_name
from gateway.service.questions import Questions

log = get_logger("gateway.generation")

ANSWER_SECONDS: Final = 3.0
TICK_SECONDS: Final = 0.5
KILL_AFTER: Final = 15.0  # beyond the time for draining
EXPIRY_SECONDS: Final = 60.0
FAILED: Final = 2


class Generation:
    """`control` is the channel to the supervisor."""

    orders: Mapping[str, Json]
    map: CounterMap
    loaded: Loaded
    identity: privileges.Identity | None
    state: Path
    given: Given
    children: Children
    loop: LoopFactory

    def __init__(self, control: Channel) -> None:
        self.control = control
        self.number = 0
        self.workers = 0
        self.plans: list[Plan] = []
        self.contexts: list[ServerContext] = []
        self.accepting = False
        self.draining_until: float | None = None
        self.reported = False
        self.status = 0
        self._told_to_end = False
        self._admin_told = False
        self._early: list[Message] = []  # came while something else was waited for
        self._news: dict[tuple[str, ...], Message] = {}
        self._decisions = Decisions()
        self._questions: Questions[Running] = Questions(self._missing)
        self._expiry = certificates.ExpiryWarnings()
        self._look_at_certificates = 0.0

    # -- start ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """From files to everything that workers need. Raises ConfigError, StartError, PrivilegeError."""
        self.orders = orders = self._wait_for("orders")
        self.number = int(str(orders["generation"]))
        set_name(f"gateway:gen {self.number}")
        over, counters = int(str(orders["sockets"])), int(str(orders["counters"]))
        for descriptor in (over, counters):
            os.set_inheritable(descriptor, False)
        self.map = CounterMap.attach(counters)
        paths = orders["paths"]
        assert isinstance(paths, list)
        self.loaded = load([Path(str(path)) for path in paths])
        process = self.loaded.process
        choice = privileges.choose(process.user, process.group)
        self.identity = choice.identity
        warning = self._check_code_is_readable(process.user is not None) or choice.warning
        files = named_files(pipeline for pipeline, _ in self.loaded.pipelines)
        tls_files.preload({path: data for path in files if (data := _content(path)) is not None})
        self.state = state_directory(process)
        privileges.directory_for(self.state, self.identity)
        self.workers = opening.workers_of(self.loaded, orders["workers"])
        if process.store is not None and process.store.memory and self.workers != 1:
            raise StartError(f"store: {self.workers} workers do not see each other's memory; write `store: lmdb`")
        self.control.send(opening.request(self.loaded, self.workers, files, self.identity))
        with socket.socket(fileno=over) as sock:
            self.given = opening.receive(self.loaded, self._wait_for("opened"), sock)
        privileges.drop(self.identity, stays_root=self.identity is None and privileges.is_root())
        self.plans = compile_all(self.loaded)
        set_up(self.plans, self.loaded)
        certificates.share_tickets(self.plans, self.given.secret)
        self.loop = loop_factory(str(orders["loop"]))
        for text in filter(None, (warning, *self.given.notes, *self._unsafe(files))):
            log.warning("warning", text=text)

    def _check_code_is_readable(self, written: bool) -> str:
        """Modules are imported after root is gone, too; a warning, or nothing.

        Where only root can read the installation, nobody else can serve from it: an error if an account is `written`,
        else the service is root's own, as for whoever tries it out in root's home. Raises PrivilegeError.
        """
        import gateway

        if self.identity is None:
            return ""
        for place in (Path(gateway.__file__).parent, Path(sys.prefix), Path(os.path.realpath(sys.executable))):
            barred = privileges.unreachable(place, self.identity)
            if barred is None:
                continue
            what = f"{self.identity.user} cannot read {barred}, where the gateway is installed"
            if written:
                raise privileges.PrivilegeError(f"process.user: {what}: install it where all may read, as in /opt")
            self.identity = None
            text = "THE STAGES RUN AS ROOT, though without its capabilities"
            return f"{text}: {what}; install it in /opt, say, and write `user: name` below `process`"
        return ""

    def _unsafe(self, files: Iterable[str]) -> Iterator[str]:
        """Root reads them for the workers, also when they are renewed: what a stage would put in their place, too."""
        if self.identity is not None:
            folders = {privileges.replaceable(Path(file), self.identity): file for file in files}
            for folder, file in folders.items():
                if folder is not None:
                    user = self.identity.user
                    yield f"{folder}: {user} may replace {file}, which root reads; give the folder to root, mode 755"

    def _wait_for(self, op: str) -> Message:
        while True:
            select.select([self.control], [], [])
            self._early += self.control.receive()
            for message in self._early:
                if message["op"] == "refused":
                    raise StartError(str(message["error"]))
                if message["op"] == op:
                    self._early.remove(message)
                    return message
            if self.control.closed:
                raise StartError("the supervisor is gone")

    # -- the children ---------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Fork the children and watch over them until the last is gone; the exit status. Raises StartError."""
        self._prepare_to_fork()
        self._handle_signals()
        self.children = Children(self.map, self._child, self._hear_child)
        own, admin, *workers = self.given.rows
        self._row = self.map.row(own)
        self._row.take(os.getpid())
        metrics.bind(self._row, self.map)
        self.contexts = certificates.server_contexts(self.plans)
        certificates.set_expiry_gauges(self.contexts)
        self._row.beat(int(time.monotonic() * 1000))
        try:
            for number, row in enumerate(workers):
                self.children.start("worker", number, row)
            if self.given.admin or self.given.metrics:
                self.children.start("admin", 0, admin)
        except OSError as error:
            self.fail(f"cannot start a process: {error.strerror or error}")
        for message in self._early:
            self._hear_supervisor(message)
        while self.children.running or self.draining_until is None:
            self._turn()
        logs.close()
        return self.status

    def _prepare_to_fork(self) -> None:
        """Import what children need, so that they share it, and leave no garbage to their collectors."""
        import gateway.service.worker_process

        if self.given.admin or self.given.metrics:
            import gateway.service.admin_process  # noqa: F401
        threads = len(os.listdir("/proc/self/task")) - 1
        if threads:
            text = f"modules of stages started {threads} threads when they were imported, which workers do not have"
            log.warning("warning", text=f"{text}; start them in `start`")
        gc.collect()
        gc.freeze()

    def _handle_signals(self) -> None:
        wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake = (wake, write)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, number: int, frame: object) -> None:
        self._told_to_end = True  # no more: it may come in the middle of a message

    def _turn(self) -> None:
        """Wait until something is to be read or written, a child ended, or it is time to look round; and do it."""
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        for channel in (self.control, *(child.channel for child in self.children.running)):
            if not channel.closed:
                poll.register(channel, select.POLLIN | (select.POLLOUT if channel.pending else 0))
        found = poll.poll(TICK_SECONDS * 1000)
        if any(descriptor == self._wake[0] for descriptor, _ in found):
            os.read(self._wake[0], 4096)
        for channel in (self.control, *(child.channel for child in self.children.running)):
            channel.flush()
        if not self.control.closed:
            self.control.hear(self._hear_supervisor)
        self.children.hear()
        self._reap()
        self._tend()

    def _reap(self) -> None:
        replace = self.reported and self.draining_until is None
        for child, how in self.children.reap(replace=replace):
            self._questions.without(child, "the worker ended")
            if not self.reported and self.draining_until is None:
                self.fail(f"{child.role} {child.number} ended while it started: {how}")
        if self.draining_until is not None and all(child.role == "admin" for child in self.children.running):
            self._end_admin()

    def _end_admin(self) -> None:
        for child in self.children.running:
            if not self._admin_told:
                child.channel.send({"op": "drain", "seconds": 0.0, "last": True})
                self._admin_told = True

    def _tend(self) -> None:
        now = time.monotonic()
        self._row.beat(int(now * 1000))
        if now >= self._look_at_certificates:
            self._look_at_certificates = now + EXPIRY_SECONDS
            self._expiry.warn(self.contexts)
        self._questions.tend("the worker did not answer in time")
        if self.draining_until is None and self._told_to_end and self.accepting and not self.control.closed:
            self._told_to_end = False  # another generation must accept before we stop
            question: Message = {"op": "ask", "id": 0, "from": 0, "to": "supervisor", "name": "reload", "args": {}}
            self.control.send(question)
        elif self.draining_until is None and (self._told_to_end or self.control.closed):
            if self.control.closed:
                log.critical("warning", text="the supervisor is gone: this generation serves what is open, and ends")
            self._drain(self.loaded.process.drain)
        self.children.end_silent()
        if self.draining_until is None:
            self.children.restart_due()
        elif now > self.draining_until + KILL_AFTER:
            self.children.kill()

    def fail(self, text: str) -> None:
        """It cannot serve: say so, and end."""
        self.status = FAILED
        if not self.reported:
            self.control.send({"op": "failed", "error": text})
        self.reported = True
        self._drain(0.0)
        self.children.kill()

    # -- what the children say ------------------------------------------------------------------------------

    def _hear_child(self, child: Running, message: Message) -> None:
        match message["op"]:
            case "ready":
                self._is_ready(child)
            case "accepts":
                child.accepts = True
                if all(one.accepts for one in self.children.running):
                    self.control.send({"op": "accepts"})
            case "failed":
                if not self.reported:
                    self.fail(str(message["error"]))
                else:
                    log.error("warning", text=f"{child.role} {child.number} does not start: {message['error']}")
            case "news":
                self._spread(child, message)
            case "answer":
                answer = message["answer"]
                assert isinstance(answer, Mapping)
                place: Message = {"generation": self.number, "worker": child.number}
                self._questions.answered(message["id"], child, [{**place, **answer}])
            case "ask":
                if child.role == "admin":  # the others have stages, and nothing to say here
                    self.control.send({**message, "from": child.pid})

    def _is_ready(self, child: Running) -> None:
        if self.draining_until is not None:
            return
        child.state = "ready"
        if child.role == "worker":
            for news in (*self._news.values(), *self._decisions):
                child.channel.send(news)
        if self.accepting:
            child.state = "serving"
            child.channel.send({"op": "accept"})
        elif not self.reported and all(one.state == "ready" for one in self.children.running):
            self.reported = True
            self.control.send({"op": "ready", "workers": self.workers})

    def _spread(self, child: Running, message: Message) -> None:
        """What one worker learned of an upstream is for all, also for those that are forked later."""
        news = message["news"]
        assert isinstance(news, dict)
        if news.get("kind") in ("check", "ejection"):
            place = (message["pipeline"], message["pool"], news.get("url"), news["kind"])
            self._news[tuple(str(part) for part in place)] = message
        for other in self.children.running:
            if other is not child and other.role == "worker" and other.state != "starting":
                other.channel.send(message)

    # -- what the supervisor says ---------------------------------------------------------------------------

    def _hear_supervisor(self, message: Message) -> None:
        match message["op"]:
            case "accept":
                self.accepting = True
                self._tell_all(message)
                for child in self.children.running:
                    child.state = "serving" if child.state == "ready" else child.state
            case "drain":
                self._drain(float(str(message["seconds"])), last=bool(message["last"]))
            case "reopen":
                reopen_logs()
                self._tell_all(message)
            case "files":
                self._renew(message)
            case "ask":
                self._ask(message)
            case "answers":
                for child in self.children.running:
                    if child.pid == message["from"]:
                        child.channel.send(message)
            case "log":
                fields = message["fields"]
                assert isinstance(fields, dict)
                getattr(log, str(message["level"]))(str(message["record"]), **fields)

    def _tell_all(self, message: Message) -> None:
        for child in self.children.running:
            child.channel.send(message)

    def _drain(self, seconds: float, *, last: bool = False) -> None:
        until = time.monotonic() + seconds
        self.draining_until = min(self.draining_until or until, until)
        for child in self.children.running:
            child.state = "draining"
        message: Message = {"op": "drain", "seconds": seconds, "last": last}
        stays = "admin" if last and seconds else ""  # it shows what a stop waits for, and ends after the workers
        for child in self.children.running:
            if child.role != stays:
                child.channel.send(message)
        self.given.close(mail=True, admin=True)
        certificates.set_expiry_gauges([])

    def _renew(self, message: Message) -> None:
        """New certificates: into our own contexts first, for the workers to come, and if they fit into theirs."""
        files = files_of(message)
        tls_files.preload(files)
        certificates.renew(self.contexts, files)
        certificates.set_expiry_gauges(self.contexts)
        self._tell_all(message)

    def _ask(self, message: Message) -> None:
        """Of the workers; what an administrator decides holds for those to come, too."""
        workers = [one for one in self.children.running if one.role == "worker" and one.state != "starting"]
        if message["to"] == "one":
            workers = workers[:1]

        def answered(answers: list[Json]) -> None:
            if self._decisions.note(message, answers):
                for child in self.children.running:
                    if child.role == "worker" and child.state != "starting" and child not in workers:
                        child.channel.send({**message, "id": 0})  # it was not ready yet
            self.control.send({"op": "answers", "id": message["id"], "answers": answers})

        number = self._questions.ask(workers, ANSWER_SECONDS, answered)
        for child in workers:
            child.channel.send({"op": "ask", "id": number, "name": message["name"], "args": message["args"]})

    def _missing(self, child: Running, why: str) -> Json:
        return {"generation": self.number, "worker": child.number, "result": None, "error": why}

    # -- in the forked process ------------------------------------------------------------------------------

    def _child(self, role: Role, number: int, channel: Channel, row: int) -> int:
        """Serve as a worker or as the admin process."""
        import asyncio

        set_name(f"gateway:work {number}" if role == "worker" else "gateway:admin")
        for descriptor in self._wake:
            os.close(descriptor)
        self.control.close()
        self.given.close(mail=role == "admin", admin=role == "worker")
        keep_heap()
        counters = self.map.row(row)
        metrics.bind(counters, self.map)
        process = self.loaded.process
        with asyncio.Runner(loop_factory=self.loop) as runner:
            if role == "admin":
                from gateway.service.admin_process import AdminProcess

                token = process.admin.token.reveal() if process.admin and process.admin.token else None
                sockets = self.given.admin, self.given.metrics
                return runner.run(AdminProcess(*sockets, self.map, token, channel, counters, process.drain).run())
            from gateway.service.worker import Worker
            from gateway.service.worker_process import WorkerProcess

            worker = Worker(
                self.plans,
                self.state,
                store=store_settings(process, self.state, "lmdb"),
                embedded=self.given.embedded,
                probing=number == 0,
                number=number,
                traces=trace_settings(process),
            )
            for pipeline in worker.pipelines:
                pipeline.take(self.given.listeners[pipeline.plan.name])
            return runner.run(WorkerProcess(worker, channel, counters, process.drain).run())


def _content(path: str) -> bytes | None:
    """The compiler says what is wrong with a file that cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _raise_descriptor_limit() -> None:
    """As many descriptors as the system lets us have (getrlimit(2), RLIMIT_NOFILE)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _control() -> Channel:
    """The channel to the supervisor, which is our standard input; nobody else is to read from there."""
    sock = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    return Channel(sock)


def main() -> NoReturn:
    """The process's whole life."""
    for theirs in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(theirs, signal.SIG_IGN)  # they are the supervisor's
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    control = _control()
    generation = Generation(control)
    try:
        _raise_descriptor_limit()
        generation.build()
        status = generation.serve()
    except (ConfigError, StartError, privileges.PrivilegeError) as error:
        text = str(error) if isinstance(error, ConfigError) else f"gateway: {error}"
        control.send({"op": "failed", "error": text})
        status = FAILED
    while control.pending and not control.closed:
        select.select([], [control], [], 1.0)
        control.flush()
    raise SystemExit(status)


if __name__ == "__main__":
    main()
