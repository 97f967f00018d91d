"""`python -m bench --soak [--minutes N] [--kill]`: a service under half the machine's load, for long.

First a client without pauses finds what the machine carries with everything on it; then one paces half of that. Every
second memory, descriptors and CPU of each process are noted. What was found goes to docs/reliability.md if the run had
its full length; the exit status says whether all was as promised.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.numbered import Fate, Orders, Result, compare
from bench.peers import Process
from bench.supervised import Cpu, Member, Supervised, descriptors, pss, runs
from gateway.testing.gateway import free_port

FULL_MINUTES = 10.0
CAPACITY_SECONDS = 15.0
WORKERS = 2
IDLERS = 50
DRAIN = 20.0
RELOADS_AT = (0.2, 0.4)  # early, so that the last generation lives long enough for a slope
KILL_AT = 2 / 3
WARM_UP = 0.2  # of the whole time, for each process
SCRAPE_EVERY = 5


@dataclass(frozen=True)
class Sample:
    """One look: seconds since the begin, octets and descriptors by process, open sessions, octets of the store."""

    at: float
    memory: Mapping[Member, int]
    descriptors: Mapping[Member, int]
    sessions: int
    store: int


@dataclass
class Ran:
    """Everything that the report is made of. Times are seconds since the begin of the paced part."""

    minutes: float
    capacity: float
    rate: float
    result: Result
    fate: Fate
    samples: list[Sample]
    newest: list[Member]
    events: list[tuple[float, str]]
    before: dict[str, list[int]]  # descriptors at rest by role
    after: dict[str, list[int]]
    cpu: dict[str, float]
    machine: dict[str, float]
    lag: dict[str, float]
    records: dict[str, int]
    since: dict[Member, float]
    killed: bool


def run(folder: Path, certificate: tuple[Path, Path], minutes: float, kill: bool) -> Ran:
    """The whole run."""
    sink_ports, imap, counts = (free_port(), free_port()), free_port(), folder / "counts"
    argv = [sys.executable, "-m", "bench.counting", *map(str, sink_ports), str(imap), str(counts)]
    log = folder / "sink.log"
    sink = Process(argv, log)
    service: Supervised | None = None
    try:
        sink.until(lambda: "ready" in log.read_text())
        ports = {name: free_port() for name in ("smtp", "smtps", "content", "imap")}
        service = Supervised(folder, _pipelines(ports, sink_ports, imap, certificate), WORKERS, _process())
        return _Run(folder, service, sink, ports, minutes, kill).run(counts)
    finally:
        if service is not None:
            service.stop()
        sink.stop()


def _process() -> dict[str, object]:
    return {"store": "lmdb", "drain": f"{DRAIN:.0f}s"}


def _pipelines(
    ports: Mapping[str, int], sinks: tuple[int, int], imap: int, certificate: tuple[Path, Path]
) -> dict[str, dict[str, object]]:
    """Mail in grade envelope, mail in grade content, and a mail store; limits and bans in front."""
    limit: dict[str, object] = {"connection_limit": {"per_client": 30, "per_network": 500, "per_pipeline": 5000}}
    servers = [f"smtp://127.0.0.1:{port}" for port in sinks]
    mail: dict[str, object] = {
        "relay": "open",
        "tls": {"certificates": [{"chain": str(certificate[0]), "key": str(certificate[1])}]},
        "upstreams": {"sink": {"servers": servers, "tls": "off", "max_connections": 2000}},
    }
    ban = {"ban": {"limit": "20/1m", "times": ["10s", "20s"], "forget": "1m"}}
    return {
        "mail": {
            **mail,
            "listen": [f"smtp://127.0.0.1:{ports['smtp']}", f"smtps://127.0.0.1:{ports['smtps']}"],
            "stages": [
                limit, {"rate_limit": {"count": "connections", "limit": "600/minute"}}, ban,
                {"splice": {"handoff": "never"}},
            ],
        },
        "content": {
            **mail,
            "listen": [f"smtp://127.0.0.1:{ports['content']}"],
            "stages": [limit, "mime_guard", {"headers": [{"delete": "X-Spam-*"}]}, "splice"],
        },
        "stores": {
            "listen": [f"imap://127.0.0.1:{ports['imap']}"],
            "allow_plaintext_auth": True,
            "stages": [limit, {"rate_limit": {"count": "auth_failures", "limit": "10/minute"}}, "auth_relay",
                       "splice"],
            "upstreams": {"imap": {"servers": [f"imap://127.0.0.1:{imap}"], "tls": "off", "max_connections": 2000}},
        },
    }  # fmt: skip


class _Run:
    def __init__(
        self, folder: Path, service: Supervised, sink: Process, ports: Mapping[str, int], minutes: float, kill: bool
    ) -> None:
        self.folder, self.service, self.sink, self.ports = folder, service, sink, ports
        self.seconds, self.kill = minutes * 60, kill
        self.samples: list[Sample] = []
        self.events: list[tuple[float, str]] = []
        self.since: dict[Member, float] = {}
        self.cpu = Cpu()
        self.scrapes: list[dict[str, float]] = []

    def run(self, counts: Path) -> Ran:
        """Capacity, then the paced part, then rest."""
        first, marks = self._client(0, 0.0, min(CAPACITY_SECONDS, self.seconds / 4), lambda passed: None)
        done = sum(n for name, n in first.ended.items() if name.endswith(": done"))
        capacity = done / first.seconds
        print(f"the machine carries {capacity:.0f} sessions a second; half of it for {self.seconds:.0f} s", flush=True)
        before = self._at_rest()
        offset = len(marks) + 1
        self._plan()
        result, paced = self._client(offset, capacity / 2, self.seconds, self._look)
        newest = [*(member for member in self.service.members() if member.role == "supervisor"),
                  *self.service.newest()]  # fmt: skip
        after = self._at_rest()
        self.sink.stop()
        return Ran(
            self.seconds / 60, capacity, capacity / 2, result, compare([(0, marks), (offset, paced)],
            counts.read_bytes()), self.samples, newest, self.events, before, after, self.used, self.machine,
            _lag(self.scrapes), self._records(), self.since, self.kill,
        )  # fmt: skip

    def _client(self, first: int, rate: float, seconds: float, look: Callable[[float], None]) -> tuple[Result, bytes]:
        """Run a client to its end; `look` is called every second."""
        marks = self.folder / f"marks-{first}"
        orders = Orders(**self.ports, seconds=seconds, first=first, marks=str(marks), rate=rate,
                        idlers=IDLERS if rate else 0)  # fmt: skip
        said = self.folder / f"client-{first}.log"
        client = Process([sys.executable, "-m", "bench.numbered", json.dumps(asdict(orders))], said)
        self.client = client
        begun = time.monotonic()
        try:
            while client.popen.poll() is None:
                look(time.monotonic() - begun)
                time.sleep(max(0.0, 1.0 - (time.monotonic() - begun) % 1.0))
        finally:
            client.stop()
        if client.popen.returncode:
            raise RuntimeError(f"the client: {said.read_text()[-2000:]}")
        return Result(**json.loads(said.read_text())), marks.read_bytes()

    def _plan(self) -> None:
        """What happens meanwhile, by its time."""
        self.due: list[tuple[float, str]] = [(share * self.seconds, "reload") for share in RELOADS_AT]
        if self.kill:
            self.due.append((KILL_AT * self.seconds, "kill"))

    def _look(self, passed: float) -> None:
        """A sample, and what is due; nothing after the time, while the last sessions end."""
        if passed > self.seconds:
            return
        members = self.service.members()
        memory, files = {}, {}
        for member in members:
            try:
                memory[member], files[member] = pss(member.pid), descriptors(member.pid)
            except OSError:
                continue  # it ended just now
            self.since.setdefault(member, passed)
            self.cpu.look(member.role, [member.pid])
        self.cpu.look("sink", [self.sink.popen.pid])
        self.cpu.look("client", [self.client.popen.pid])
        self.cpu.look("what measures", [os.getpid()])
        if not self.samples:
            self.cpu.begin()
        self.samples.append(Sample(passed, memory, files, self.service.open_sessions(), self.service.store_octets()))
        if len(self.samples) % SCRAPE_EVERY == 1:
            self._scrape()
        self.used, self.machine = self.cpu.used(), self.cpu.machine()
        while self.due and passed >= self.due[0][0]:
            _, what = self.due.pop(0)
            if what == "reload":
                os.kill(self.service.pid, signal.SIGHUP)
                self.events.append((passed, "reload"))
            else:
                worker = next(member for member in self.service.newest() if member.role == "worker")
                os.kill(worker.pid, signal.SIGKILL)
                self.events.append((passed, f"worker {worker.pid} killed"))

    def _scrape(self) -> None:
        self.scrapes.append(self.service.scrape())

    def _at_rest(self) -> dict[str, list[int]]:
        """Descriptors by role once no session is open, and no old generation left."""
        end = time.monotonic() + DRAIN + 30
        while True:
            members = self.service.members()
            settled = len({member.generation for member in members if member.generation}) == 1
            if (settled and not self.service.open_sessions()) or time.monotonic() > end:
                break
            time.sleep(0.2)
        time.sleep(1.0)  # what was closed is closed
        found: dict[str, list[int]] = {}
        for member in self.service.members():
            if runs(member.pid):
                found.setdefault(member.role, []).append(descriptors(member.pid))
        return {role: sorted(counts) for role, counts in found.items()}

    def _records(self) -> dict[str, int]:
        """How often the log says what it should not."""
        words = ("internal_error", "worker_died", "generation_died", "reload_failed", "stage_failure", "store_down")
        found = dict.fromkeys(words, 0)
        with (self.folder / "gateway.log").open("rb") as log:
            for line in log:
                if b'"session' not in line:
                    for word in words:
                        found[word] += f'"{word}"'.encode() in line
        return found


def _lag(scrapes: list[dict[str, float]]) -> dict[str, float]:
    """Bucket end to the number of looks at the event loops that were at most that late, between two scrapes."""
    name = 'gateway_event_loop_lag_seconds_bucket{le="'
    first, last = scrapes[0], scrapes[-1]
    return {
        sample.removeprefix(name).removesuffix('"}'): value - first.get(sample, 0.0)
        for sample, value in last.items() if sample.startswith(name)
    }  # fmt: skip
