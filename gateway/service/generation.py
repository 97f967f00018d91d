"""A generation: one reading of the configuration, and the parent of the workers that serve it.

A fresh process of the supervisor's (`python -m gateway.service.generation`), so that a reload runs the code that is
installed then. It reads the files and keys with the supervisor's rights, gets the sockets, drops the rights for good,
imports the stages, compiles everything and forks. It has neither an event loop nor threads: what forks must be simple.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from gateway.config.load import Loaded, load
from gateway.config.problems import ConfigError
from gateway.observe import logs, metrics
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger
from gateway.pipeline.compile import compile_all
from gateway.pipeline.plan import Plan, listener_plans
from gateway.relay import tls_files
from gateway.relay.tls import ServerContext
from gateway.service import certificates, privileges
from gateway.service.certificates import named_files
from gateway.service.channel import Channel, Json, Message, receive_sockets
from gateway.service.child import files_of, loop_factory, reopen_logs
from gateway.service.children import Children, Role, Running
from gateway.service.heap import keep_heap
from gateway.service.listening import StartError, spec
from gateway.service.log_set_up import set_up
from gateway.service.places import state_directory, store_settings, trace_settings

log = get_logger("gateway.generation")

ANSWER_SECONDS: Final = 3.0
TICK_SECONDS: Final = 0.5
KILL_AFTER: Final = 15.0  # beyond the time for draining
EXPIRY_SECONDS: Final = 60.0
FAILED: Final = 2
LASTING: Final = ("upstream", "log_level")


class Generation:
    """`orders` is what the supervisor said on the command line."""

    loaded: Loaded
    children: Children
    identity: privileges.Identity | None
    state: Path
    contexts: list[ServerContext]

    def __init__(self, orders: Mapping[str, Json]) -> None:
        self.orders = orders
        self._news: dict[tuple[str, ...], Message] = {}
        self._sticky: dict[str, Message] = {}
        self.control = Channel(socket.socket(fileno=int(str(orders["control"]))))
        self.map = CounterMap.attach(int(str(orders["counters"])))
        self.number = int(str(orders["generation"]))
        self.plans: list[Plan] = []
        self.sockets: dict[str, list[list[socket.socket]]] = {}
        self.admin: list[socket.socket] = []
        self.metrics: list[socket.socket] = []
        self.embedded: dict[str, str] = {}
        self.accepting = False
        self.draining_until: float | None = None
        self.reported = False
        self._expiry = certificates.ExpiryWarnings()
        self._look_at_certificates = 0.0
        self._questions: dict[int, _Question] = {}
        self._asked = 0

    # -- start ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """From files to everything that workers need. Raises ConfigError, StartError, PrivilegeError."""
        paths = self.orders["paths"]
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
        self._get_sockets(files)
        if self.identity is not None or not privileges.is_root():
            privileges.drop(self.identity)
        self.plans = compile_all(self.loaded)
        set_up(self.plans, self.loaded)
        certificates.share_tickets(self.plans, self.secret)
        if warning:
            log.warning("warning", text=warning)
        for text in self.notes:
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
            return f"THE STAGES RUN AS ROOT: {what}; install it in /opt, say, and write `user: name` below `process`"
        return ""

    def _get_sockets(self, files: list[str]) -> None:
        """Ask the supervisor for what it holds, and take it. Raises StartError."""
        process = self.loaded.process
        listeners = {
            pipeline.name: [plan for listener in pipeline.listen for plan in listener_plans(listener)]
            for pipeline, _ in self.loaded.pipelines
        }
        workers = self.orders["workers"] or process.workers
        self.workers = os.cpu_count() or 1 if workers == "auto" else int(str(workers))
        identity = self.identity
        self.control.send(
            {
                "op": "open",
                "listeners": [spec(plan) for plans in listeners.values() for plan in plans],
                "admin": None if process.admin is None else process.admin.listen,
                "admin_default": process.admin is None and not process.admin_is_off,
                "admin_mode": process.admin.mode if process.admin is not None else 0o600,
                "metrics": process.metrics,
                "embedded": sorted(
                    {
                        str(server.url)
                        for pipeline, _ in self.loaded.pipelines
                        for pool in pipeline.upstreams.values()
                        for server in pool.servers
                        if str(server.url).startswith("embedded://")
                    }
                ),
                "rows": self.workers + 2,
                "files": files,
                "identity": None if identity is None else [identity.uid, identity.gid, *identity.groups],
                "drain": process.drain,
            }
        )
        opened = self._wait_for("opened")
        counts = opened["sockets"]
        assert isinstance(counts, list)
        over = socket.socket(fileno=int(str(self.orders["sockets"])))
        found = receive_sockets(over, sum(int(str(count)) for count in counts))
        over.close()
        groups: list[list[socket.socket]] = []
        for count in counts:
            groups.append(found[: int(str(count))])
            found = found[int(str(count)) :]
        self.metrics, self.admin = groups.pop(), groups.pop()
        for name, plans in listeners.items():
            self.sockets[name], groups = groups[: len(plans)], groups[len(plans) :]
        rows, embedded, notes = opened["rows"], opened["embedded"], opened["notes"]
        assert isinstance(rows, list) and isinstance(embedded, dict) and isinstance(notes, list)
        self.rows = [int(str(row)) for row in rows]
        self.embedded = {str(url): str(address) for url, address in embedded.items()}
        self.notes = [str(note) for note in notes]
        self.secret = bytes.fromhex(str(opened["secret"]))
        sticky = opened["sticky"]
        assert isinstance(sticky, list)
        for message in sticky:
            assert isinstance(message, dict)
            self._keep(message)

    def _wait_for(self, op: str) -> Message:
        while True:
            select.select([self.control], [], [])
            for message in self.control.receive():
                if message["op"] == "refused":
                    raise StartError(str(message["error"]))
                if message["op"] == op:
                    return message
            if self.control.closed:
                raise StartError("the supervisor is gone")

    # -- the children ---------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Fork the children and watch over them until the last is gone; the exit status."""
        gc.collect()
        gc.freeze()  # what all share is not touched by their collectors
        self.children = Children(self.map, self._child)
        wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake = (wake, write)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for ours in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(ours, signal.SIG_IGN)  # they are the supervisor's
        signal.signal(signal.SIGTERM, lambda number, frame: self._drain(self.loaded.process.drain))
        own, admin, *workers = self.rows
        self.map.row(own).take(os.getpid())
        metrics.bind(self.map.row(own), self.map)
        self.contexts = certificates.server_contexts(self.plans)
        certificates.set_expiry_gauges(self.contexts)
        for number, row in enumerate(workers):
            self.children.start("worker", number, row)
        if self.admin or self.metrics:
            self.children.start("admin", 0, admin)
        status = self._watch()
        logs.close()
        return status

    def _watch(self) -> int:
        while self.children.running or self.draining_until is None:
            self._wait()
            if not self.control.closed:
                self._hear_supervisor()
            for child in tuple(self.children.running):
                for message in child.channel.receive():
                    self._hear_child(child, message)
            status = self._reap()
            if status:
                return status
            self._tend()
        return 0

    def _wait(self) -> None:
        """Until something is to be read or written, a child ended, or it is time to look round."""
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        for channel in (self.control, *(child.channel for child in self.children.running)):
            if not channel.closed:
                poll.register(channel, select.POLLIN | (select.POLLOUT if channel.pending else 0))
        found = poll.poll(TICK_SECONDS * 1000)
        for channel in (self.control, *(child.channel for child in self.children.running)):
            channel.flush()
        if any(descriptor == self._wake[0] for descriptor, _ in found):
            os.read(self._wake[0], 4096)

    def _reap(self) -> int:
        for child, how in self.children.reap(replace=self.reported and self.draining_until is None):
            for question in self._questions.values():
                question.without(child)
            if not self.reported and self.draining_until is None:
                self._fail(f"{child.role} {child.number} ended while it started: {how}")
                self.children.kill()
                return FAILED
        return 0

    def _tend(self) -> None:
        now = time.monotonic()
        if now >= self._look_at_certificates:
            self._look_at_certificates = now + EXPIRY_SECONDS
            self._expiry.warn(self.contexts)
        self.children.end_silent()
        if self.draining_until is None:
            self.children.restart_due()
        elif now > self.draining_until + KILL_AFTER:
            self.children.kill()
        for number, question in tuple(self._questions.items()):
            if not question.waiting or now > question.until:
                del self._questions[number]
                self.control.send({"op": "answers", "id": question.number, "answers": question.finished(self.number)})

    def _hear_child(self, child: Running, message: Message) -> None:
        match message["op"]:
            case "ready":
                child.state = "ready"
                if self.accepting:
                    child.state = "serving"
                    child.channel.send({"op": "accept"})
                elif not self.reported and all(one.state == "ready" for one in self.children.running):
                    self.reported = True
                    self.control.send(
                        {"op": "ready", "pipelines": [plan.name for plan in self.plans], "workers": self.workers}
                    )
                if child.role == "worker":
                    for news in (*self._news.values(), *self._sticky.values()):
                        child.channel.send(news)
            case "failed":
                if not self.reported:
                    self._fail(str(message["error"]))
                else:
                    log.error("warning", text=f"{child.role} {child.number} does not start: {message['error']}")
            case "news":
                self._spread(child, message)
            case "answer":
                for question in self._questions.values():
                    question.answered(child, message)
            case "ask":
                self.control.send({**message, "from": child.pid})

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

    def _hear_supervisor(self) -> None:
        for message in self.control.receive():
            match message["op"]:
                case "accept":
                    self.accepting = True
                    self._tell_all(message)
                    for child in self.children.running:
                        child.state = "serving" if child.state == "ready" else child.state
                case "drain":
                    self._drain(float(str(message["seconds"])))
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
        if self.control.closed and self.draining_until is None:
            log.critical("warning", text="the supervisor is gone: this generation serves what is open, and ends")
            self._drain(self.loaded.process.drain)

    def _tell_all(self, message: Message) -> None:
        for child in self.children.running:
            child.channel.send(message)

    def _drain(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.draining_until = min(self.draining_until or until, until)
        for child in self.children.running:
            child.state = "draining"
        self._tell_all({"op": "drain", "seconds": seconds})
        self._close_sockets(mail=True, admin=True)
        certificates.set_expiry_gauges([])

    def _renew(self, message: Message) -> None:
        """New certificates: into our own contexts first, for the workers to come, and if they fit into theirs."""
        files = files_of(message)
        tls_files.preload(files)
        certificates.renew(self.contexts, files)
        certificates.set_expiry_gauges(self.contexts)
        self._tell_all(message)

    def _close_sockets(self, *, mail: bool, admin: bool) -> None:
        """Our copies: a socket refuses nobody as long as one is open."""
        if mail:
            for groups in self.sockets.values():
                for sock in (sock for group in groups for sock in group):
                    sock.close()
        if admin:
            for sock in (*self.admin, *self.metrics):
                sock.close()

    # -- questions ------------------------------------------------------------------------------------------

    def _keep(self, message: Message) -> None:
        """What an administrator decided holds for workers to come, too: state and weight of servers, the log level."""
        args = message["args"]
        assert isinstance(args, dict)
        if message["name"] in LASTING:
            key = f"{message['name']} {args.get('pipeline')} {args.get('pool')} {args.get('server')}"
            if args.get("action") == "weight":
                key += " weight"
            self._sticky[key] = {"op": "ask", "id": 0, "name": message["name"], "args": args}

    def _ask(self, message: Message) -> None:
        self._keep(message)
        workers = [one for one in self.children.running if one.role == "worker" and one.state != "starting"]
        if message["to"] == "one":
            workers = workers[:1]
        self._asked += 1
        self._questions[self._asked] = question = _Question(int(str(message["id"])), self._asked, workers)
        for child in question.waiting:
            child.channel.send({"op": "ask", "id": self._asked, "name": message["name"], "args": message["args"]})

    def _fail(self, text: str) -> None:
        self.reported = True
        self.control.send({"op": "failed", "error": text})

    # -- in the forked process ------------------------------------------------------------------------------

    def _child(self, role: Role, number: int, channel: Channel, row: int) -> int:
        """Serve as a worker or as the admin process."""
        import asyncio

        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in self._wake:
            os.close(descriptor)
        self.control.close()
        keep_heap()
        counters = self.map.row(row)
        metrics.bind(counters, self.map)
        process = self.loaded.process
        with asyncio.Runner(loop_factory=loop_factory(str(self.orders["loop"]))) as runner:
            self._close_sockets(mail=role == "admin", admin=role == "worker")
            if role == "admin":
                from gateway.service.admin_process import AdminProcess

                token = process.admin.token.reveal() if process.admin and process.admin.token else None
                admin = AdminProcess(self.admin, self.metrics, self.map, token, channel, counters, process.drain)
                return runner.run(admin.run())
            from gateway.service.worker import Worker
            from gateway.service.worker_process import WorkerProcess

            worker = Worker(
                self.plans,
                self.state,
                store=store_settings(process, self.state, "lmdb"),
                embedded=self.embedded,
                probing=number == 0,
                number=number,
                traces=trace_settings(process),
            )
            for pipeline in worker.pipelines:
                pipeline.take(self.sockets[pipeline.plan.name])
            return runner.run(WorkerProcess(worker, channel, counters, process.drain).run())


class _Question:
    """What was asked of workers, until all have answered or the time is up."""

    def __init__(self, number: int, own: int, workers: list[Running]) -> None:
        self.number = number
        self.until = time.monotonic() + ANSWER_SECONDS
        self.waiting = list(workers)
        self._own = own
        self._answers: list[tuple[Running, Json, str]] = []

    def answered(self, child: Running, message: Message) -> None:
        """Note the answer, if it is one to this question."""
        if message["id"] == self._own and child in self.waiting:
            self.waiting.remove(child)
            answer = message["answer"]
            assert isinstance(answer, dict)
            self._answers.append((child, answer["result"], str(answer["error"])))

    def without(self, child: Running) -> None:
        """The child is gone."""
        if child in self.waiting:
            self.waiting.remove(child)
            self._answers.append((child, None, "the worker ended"))

    def finished(self, generation: int) -> list[Json]:
        """All answers, also of those that gave none."""
        late = [(child, None, "the worker did not answer in time") for child in self.waiting]
        return [
            {"generation": generation, "worker": child.number, "result": result, "error": error}
            for child, result, error in (*self._answers, *late)
        ]


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


def main() -> NoReturn:
    """The process's whole life."""
    orders = json.loads(sys.argv[1])
    generation = Generation(orders)
    try:
        _raise_descriptor_limit()
        generation.build()
        status = generation.serve()
    except (ConfigError, StartError, privileges.PrivilegeError) as error:
        text = str(error) if isinstance(error, ConfigError) else f"gateway: {error}"
        generation.control.send({"op": "failed", "error": text})
        status = FAILED
    while generation.control.pending and not generation.control.closed:
        select.select([], [generation.control], [], 1.0)
        generation.control.flush()
    raise SystemExit(status)

if __name__ == "__main__":
    main()
