"""`gateway run` with workers as a bench run sees it from outside: its processes, what they take, who serves how much.

Memory is the proportional share that the kernel accounts (Pss, proc_pid_smaps(5)): a page that three processes share
is a third of a page in each, so that figures may be added up. Who is a worker, and how many sessions it took, stands
in the counters that all processes of the service share.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from bench.peers import TICK, Process, cpu_of
from gateway.observe.counters import CounterMap, CounterRow
from gateway.testing.gateway import free_port

Role = Literal["supervisor", "generation", "worker", "admin", "starting"]
READY_SECONDS = 60.0


class Member(NamedTuple):
    """A process of the service. `generation` is the process id of its generation, 0 for the supervisor's own."""

    role: Role
    pid: int
    generation: int


class Supervised:
    """A service that is ready; `pipelines` are documents by name, `process` goes to all of them."""

    def __init__(
        self,
        folder: Path,
        pipelines: Mapping[str, Mapping[str, object]],
        workers: int,
        process: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.metrics_port = free_port()
        settings = {
            "admin": f"unix:{folder}/admin.sock",
            "metrics": f"127.0.0.1:{self.metrics_port}",
            "state_directory": str(self.state),
            "log": {"file": str(folder / "gateway.log")},
            **(process or {}),
        }
        paths = []
        for index, (name, document) in enumerate(pipelines.items()):
            path = folder / f"{name}.yaml"
            common = {"hostname": "gateway.test", **({"process": settings} if index == 0 else {})}
            path.write_text(yaml.safe_dump({**common, **document}))
            paths.append(str(path))
        said = folder / "service.log"
        argv = [sys.executable, "-m", "gateway", "run", "--workers", str(workers), *paths]
        self.process = Process(argv, said)
        self.pid = self.process.popen.pid
        self.workers = workers
        self._roles: dict[int, Role] = {}
        try:
            self.process.until(lambda: "gateway: ready" in said.read_text(), READY_SECONDS)
            self._map = CounterMap.attach(self._counters())
        except BaseException:
            self.stop()
            raise

    def _counters(self) -> int:
        """The descriptor of the shared counters, opened once more."""
        folder = Path(f"/proc/{self.pid}/fd")
        for entry in folder.iterdir():
            if "memfd:gateway-counters" in os.readlink(entry):
                return os.open(entry, os.O_RDWR)
        raise FileNotFoundError(f"no counters in {folder}")

    def members(self) -> list[Member]:
        """All processes that run now. Who has not said yet that it is ready to work is `starting`."""
        for row in self._rows():
            if (found := row.find("gateway_workers")) and found.value:
                self._roles[row.owner] = "worker"
        members = [Member("supervisor", self.pid, 0)]
        for generation in children(self.pid):
            found_here = children(generation)
            if sum(self._roles.get(child) == "worker" for child in found_here) == self.workers:
                for child in found_here:
                    self._roles.setdefault(child, "admin")
            members.append(Member("generation", generation, generation))
            members += [Member(self._roles.get(child, "starting"), child, generation) for child in found_here]
        return members

    def newest(self) -> list[Member]:
        """Those of the generation that accepts; the older ones are gone or drain."""
        members = self.members()
        last = max(members, key=lambda member: (started(member.generation or self.pid), member.generation)).generation
        return [member for member in members if member.generation == last]

    def _rows(self) -> Iterator[CounterRow]:
        return (self._map.row(index) for index in range(len(self._map)))

    def sessions_by_worker(self) -> dict[int, int]:
        """Connections that each worker has accepted so far, by process id."""
        workers = {member.pid for member in self.members() if member.role == "worker"}
        found = {}
        for row in self._rows():
            if row.owner in workers:
                names = [sample.startswith("gateway_sessions_started_total{") for sample, _ in row.series()]
                values = row.values()
                found[row.owner] = sum(value for value, wanted in zip(values, names, strict=False) if wanted)
        return found

    def open_sessions(self) -> int:
        """Sessions of all workers."""
        totals = self._map.totals()
        return sum(value for sample, value in totals.items() if sample.startswith("gateway_open_sessions{"))

    def scrape(self) -> dict[str, float]:
        """What Prometheus reads: sample to value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {sample: float(value) for sample, _, value in pairs}

    def store_octets(self) -> int:
        """What the store takes on disk."""
        return sum(path.stat().st_blocks * 512 for path in (self.state / "store").glob("**/*") if path.is_file())

    def stop(self) -> None:
        """End it, politely."""
        self.process.stop()


def children(parent: int) -> list[int]:
    """Child processes that run the same program (not an embedded server), by process id."""
    try:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return sorted(int(child) for child in found if runs(int(child)))
    except OSError:
        return []


def runs(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def started(pid: int) -> int:
    """When, in ticks since the system's start (proc_pid_stat(5), starttime)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def pss(pid: int) -> int:
    """Octets of memory, shared pages in proportion. Raises OSError."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def private(pid: int) -> int:
    """Octets of memory that only it has. Raises OSError."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def descriptors(pid: int) -> int:
    """How many are open. Raises OSError."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Cpu:
    """CPU seconds by group, also of processes that end meanwhile: `look` again and again, then `used`."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[str, float]] = {}
        self._begun = False
        self._machine = machine_times()
        self._time = time.monotonic()

    def look(self, group: str, pids: Sequence[int]) -> None:
        """Note what these have used so far."""
        for pid in pids:
            try:
                now = cpu_of(pid)
            except OSError:
                continue
            self._first.setdefault(pid, 0.0 if self._begun else now)
            self._last[pid] = (group, now)

    def begin(self) -> None:
        """All were looked at once: who is new from now on counts from its start."""
        self._begun = True
        self._machine = machine_times()
        self._time = time.monotonic()

    def used(self) -> dict[str, float]:
        """Seconds by group since `begin`."""
        found: dict[str, float] = {}
        for pid, (group, last) in self._last.items():
            found[group] = found.get(group, 0.0) + last - self._first[pid]
        return found

    def machine(self) -> dict[str, float]:
        """Shares of the machine's time since `begin`: idle, softirq, steal."""
        spent = [now - before for now, before in zip(machine_times(), self._machine, strict=True)]
        names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        shares = dict(zip(names, (one / max(sum(spent), 1e-9) for one in spent), strict=True))
        return {"idle": shares["idle"] + shares["iowait"], "softirq": shares["softirq"], "steal": shares["steal"]}

    def seconds(self) -> float:
        """Since `begin`."""
        return time.monotonic() - self._time


def machine_times() -> list[float]:
    """Seconds of all processors: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5))."""
    return [int(word) / TICK for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
