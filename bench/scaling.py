"""`python -m bench --scaling`: one worker and two, who of them gets the sessions, and what an idle service takes.

smtp-source and smtp-sink stand at the ends, since they cost least; on a machine of two cores they still need a part of
what a second worker could use. So the CPU of every group is measured besides sessions a second, and the report says
what two workers could reach at most with these ends on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.clients import idle, source
from bench.measured import machine
from bench.numbered import Orders
from bench.peers import start_sink
from bench.supervised import Cpu, Supervised, descriptors, private, pss
from gateway.testing.gateway import free_port

HEADING = "## Workers"
ASKED = 1.7
TOO_MUCH = 0.7
WHOLE = 1.8  # of two processors
SHARE_SECONDS = 10
RATES = (0.1, 0.3, 0.6)  # of what two workers carry: the loads at which shares are looked at
KEPT = 200


@dataclass(frozen=True)
class Chain:
    """What a session passes; `octets` of content."""

    name: str
    stages: list[object]
    octets: int
    reuse: bool


LIMITS: list[object] = [
    {"connection_limit": 1000}, {"rate_limit": {"count": "connections", "limit": "10000000/hour"}}, {"ban": "20/10m"},
]  # fmt: skip
CHAINS = (
    Chain("envelope grade, `reuse: on`, nothing else", [{"splice": {"handoff": "never"}}], 1000, True),
    Chain("limits and bans in lmdb, envelope grade, a connection each", [*LIMITS, {"splice": {"handoff": "never"}}],
          1000, False),
    Chain("limits and bans in lmdb, content grade (`mime_guard`, `headers`)",
          [*LIMITS, "mime_guard", {"headers": [{"delete": "X-Spam-*"}]}, "splice"], 4000, False),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One measurement: sessions a second, CPU seconds by group, shares of the machine."""

    rate: float
    sessions: int
    used: Mapping[str, float]
    machine: Mapping[str, float]

    def ms(self, *groups: str) -> float:
        """CPU of these groups, milliseconds a session."""
        return sum(self.used.get(group, 0.0) for group in groups) / self.sessions * 1000


GATEWAY = ("worker", "generation", "supervisor", "admin")
ENDS = ("smtp-source", "smtp-sink")


class Bench:
    """A sink, and services in front of it; `close` ends both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o755)
        self.sink, self.sink_port = start_sink(folder)
        self._count = 0

    def service(self, chain: Chain, workers: int) -> tuple[Supervised, int]:
        """A service for this chain and the port it listens on."""
        self._count += 1
        place = self.folder / str(self._count)
        place.mkdir()
        port = free_port()
        servers = [f"smtp://127.0.0.1:{self.sink_port}"]
        pool = {"servers": servers, "tls": "off", "max_connections": 2000, "reuse": chain.reuse}
        document = {"listen": [f"smtp://127.0.0.1:{port}"], "relay": "open", "stages": chain.stages,
                    "upstreams": {"sink": pool}}  # fmt: skip
        return Supervised(place, {"scaling": document}, workers, {"store": "lmdb", "drain": "2s"}), port

    def close(self) -> None:
        """End the sink."""
        self.sink.stop()


def measured(bench: Bench, service: Supervised, port: int, sessions: int, octets: int, together: int) -> Run:
    """smtp-source sends so many sessions of one message each."""
    cpu = Cpu()

    def look() -> None:
        for member in service.members():
            cpu.look(member.role, [member.pid])
        cpu.look("smtp-sink", [bench.sink.popen.pid])

    look()
    cpu.begin()
    children_before = os.times().children_user + os.times().children_system
    begun = time.monotonic()
    source(port, sessions, octets, together)
    taken = time.monotonic() - begun
    look()
    used = cpu.used() | {
        "smtp-source": os.times().children_user + os.times().children_system - children_before,
    }
    return Run(sessions / taken, sessions, used, cpu.machine())


def middle(runs: list[Run]) -> Run:
    """The median of each figure."""
    sessions = runs[0].sessions
    return Run(
        median(one.rate for one in runs),
        sessions,
        {group: median(one.used[group] for one in runs) for group in runs[0].used},
        {share: median(one.machine[share] for one in runs) for share in runs[0].machine},
    )


def scale(bench: Bench, chain: Chain, sessions: int, rounds: int) -> tuple[Run, Run]:
    """One worker and two, in turn."""
    found: dict[int, list[Run]] = {1: [], 2: []}
    services: dict[int, tuple[Supervised, int]] = {}
    try:
        for workers in (1, 2):
            services[workers] = bench.service(chain, workers)
        for turn in range(rounds + 1):
            for workers, (service, port) in services.items():
                run = measured(bench, service, port, sessions if turn else sessions // 4, chain.octets, 20 * workers)
                if turn:
                    found[workers].append(run)
    finally:
        for service, _ in services.values():
            service.stop()
    return middle(found[1]), middle(found[2])


def alone(bench: Bench, chain: Chain, sessions: int, rounds: int) -> Run:
    """One worker that has a processor to itself; everything else is on the other one."""
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        raise RuntimeError("two processors are needed")
    first, second, *_ = sorted(own)
    service, port = bench.service(chain, 1)
    try:
        for member in service.members():
            os.sched_setaffinity(member.pid, {first} if member.role == "worker" else {second})
        os.sched_setaffinity(bench.sink.popen.pid, {second})
        os.sched_setaffinity(0, {second})  # smtp-source inherits it
        measured(bench, service, port, sessions // 4, chain.octets, 20)
        return middle([measured(bench, service, port, sessions, chain.octets, 20) for _ in range(rounds)])
    finally:
        os.sched_setaffinity(0, own)
        os.sched_setaffinity(bench.sink.popen.pid, own)
        service.stop()


# -- who gets the sessions


@dataclass(frozen=True)
class Share:
    """What the busier one of two workers got, of all sessions."""

    name: str
    rate: float
    sessions: int
    share: float


def shares(bench: Bench, capacity: float, seconds: float) -> list[Share]:
    """Short sessions at several loads and without pauses, then long ones."""
    chain = CHAINS[1]
    service, port = bench.service(chain, 2)
    found = []
    try:
        for part in RATES:
            before = service.sessions_by_worker()
            _paced(bench, port, capacity * part, seconds)
            found.append(_share(f"short, at {part:.0%} of what two workers carry", before, service, seconds))
        for together in (2, 40):
            before = service.sessions_by_worker()
            begun = time.monotonic()
            source(port, max(500, int(capacity * seconds / 2)), chain.octets, together)
            name = f"short, smtp-source with {together} sessions at a time"
            found.append(_share(name, before, service, time.monotonic() - begun))
        before = service.sessions_by_worker()
        begun = time.monotonic()
        kept = idle(port, KEPT, False)
        found.append(_share(f"long, {KEPT} that connect one after the other", before, service,
                            time.monotonic() - begun))  # fmt: skip
        for client in kept:
            client.close()
    finally:
        service.stop()
    return found


def _share(name: str, before: Mapping[int, int], service: Supervised, seconds: float) -> Share:
    got = [count - before.get(pid, 0) for pid, count in service.sessions_by_worker().items()]
    return Share(name, sum(got) / seconds, sum(got), max(got) / max(1, sum(got)))


def _paced(bench: Bench, port: int, rate: float, seconds: float) -> None:
    """Sessions with one message, begun at this rate, by a client in a process of its own."""
    orders = Orders(smtp=port, seconds=seconds, marks=str(bench.folder / "marks"), rate=rate)
    argv = [sys.executable, "-m", "bench.numbered", json.dumps(asdict(orders))]
    subprocess.run(argv, check=True, timeout=seconds + 120, stdout=subprocess.DEVNULL)


# -- what an idle service takes


def idle_service(bench: Bench) -> list[tuple[str, float, float, int]]:
    """Role, MiB of proportional memory, MiB that only it has, descriptors: of a service nobody has connected to."""
    service, _ = bench.service(CHAINS[2], 2)
    try:
        time.sleep(3.0)
        return [
            (member.role, pss(member.pid) / 2**20, private(member.pid) / 2**20, descriptors(member.pid))
            for member in service.members()
        ]
    finally:
        service.stop()


def processors() -> float:
    """How much faster two busy processes are than one: 2 where the machine gives two whole processors."""
    one, two = (median(_spun(count) for _ in range(3)) for count in (1, 2))
    return 2 * one / two


def _spun(count: int) -> float:
    """Seconds that each of so many processes took for the same work."""
    work = "import time; begun = time.perf_counter(); sum(range(100_000_000)); print(time.perf_counter() - begun)"
    spinning = [subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) for _ in range(count)]
    return max(float(one.communicate()[0]) for one in spinning)


# -- the section


def run(folder: Path, quick: bool) -> str:
    """All of it: the section of docs/performance.md."""
    sessions, rounds, seconds = (600, 1, 3.0) if quick else (2000, 7, float(SHARE_SECONDS))
    both = processors()
    bench = Bench(folder / "scaling")
    try:
        pairs = [(chain, *scale(bench, chain, sessions, rounds)) for chain in CHAINS]
        by_itself = [alone(bench, chain, sessions, rounds) for chain in CHAINS]
        found = shares(bench, pairs[1][2].rate, seconds)
        empty = idle_service(bench)
    finally:
        bench.close()
    rows = [Row(chain.name, one, two, single) for (chain, one, two), single in zip(pairs, by_itself, strict=True)]
    text = "\n".join([*_head(both, sessions, rounds), *_rates(rows), *_costs(pairs), *_shares(found), *_idle(empty)])
    print(text, flush=True)
    return text


@dataclass(frozen=True)
class Row:
    """Sessions a second: with one worker, with two, with one that has a processor to itself."""

    name: str
    one: Run
    two: Run
    single: Run

    @property
    def factor(self) -> float:
        """Two workers to one."""
        return self.two.rate / self.one.rate

    @property
    def most(self) -> float:
        """What the factor could be at most here: all processors busy, nothing for what else runs."""
        own = self.two.ms("worker")
        return 2 * own / (own + self.two.ms("generation", "supervisor", "admin", *ENDS))

    @property
    def cost(self) -> float:
        """CPU of the gateway a session: two workers to one."""
        return self.two.ms(*GATEWAY) / self.one.ms(*GATEWAY)


def _head(both: float, sessions: int, rounds: int) -> list[str]:
    return [
        HEADING, "",
        "`python -m bench --scaling` runs these rows only. A supervised gateway, one message a session, smtp-source "
        f"and smtp-sink at the ends, 20 sessions at a time for each worker; {sessions} sessions a round, medians of "
        f"{rounds} rounds after a warm-up, one worker and two in turn. {machine()}, 2 cores for everything; two busy "
        f"loops did {both:.2f} times as much as one just before"
        + ("." if both >= WHOLE else ": **the machine had other work**, and rates say little, CPU more."), "",
    ]  # fmt: skip


def _rates(rows: list[Row]) -> list[str]:
    lines = [
        "| chain | one worker, sessions/s | two, sessions/s | factor | at most here | two workers' CPU a session to "
        "one's | one worker with a core to itself, sessions/s | extrapolated: two with a core each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row.single.rate * 2 / row.cost
        lines.append(
            f"| {row.name} | {row.one.rate:.0f} | {row.two.rate:.0f} | **{row.factor:.2f}** | {row.most:.2f} "
            f"| **{row.cost:.2f}** | {row.single.rate:.0f} | {own:.0f} |"
        )
    reached = [row for row in rows if row.factor >= ASKED]
    lines += [
        "",
        f"A factor of {ASKED} is asked for. "
        + (f"It is reached in {len(reached)} of {len(rows)} rows. " if reached else "No row reaches it here. ")
        + "*At most here* is what two workers could do on this machine if it were never idle and lost nothing: the "
        "ends and the other processes of the service take their part of the same two cores (the next table), so that "
        "the generator is the bound where this column is below it. What says how the service scales is the CPU that "
        "a session costs with two workers beside what it costs with one: 1.00 would be no loss. The last column is an "
        "**extrapolation, not measured**: the rate of one worker that has a core to itself (the ends have the other "
        "one), times two, divided by that loss.", "",
    ]  # fmt: skip
    return lines


def _costs(pairs: list[tuple[Chain, Run, Run]]) -> list[str]:
    lines = [
        "| chain | workers | worker, ms a session | generation, supervisor, admin | smtp-source | smtp-sink | part of "
        "the ends | machine idle | soft interrupts | stolen |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for chain, *both in pairs:
        for workers, one in enumerate(both, 1):
            ends = one.ms(*ENDS)
            lines.append(
                f"| {chain.name} | {workers} | {one.ms('worker'):.3f} "
                f"| {one.ms('generation', 'supervisor', 'admin'):.3f} | {one.ms('smtp-source'):.3f} "
                f"| {one.ms('smtp-sink'):.3f} | {ends / (ends + one.ms(*GATEWAY)):.0%} | {one.machine['idle']:.0%} "
                f"| {one.machine['softirq']:.0%} | {one.machine['steal']:.1%} |"
            )
    return [*lines, "", "What the kernel does for a packet on loopback is charged to who sends it.", ""]


def _shares(found: list[Share]) -> list[str]:
    lines = [
        "Workers accept from the same listening sockets; the kernel wakes both, and the faster one gets the "
        "connection. What the busier of two workers got:", "",
        "| sessions | a second | of them the busier worker |", "|---|---|---|",
        *(f"| {one.name} | {one.rate:.0f} | {one.share:.0%} |" for one in found), "",
    ]  # fmt: skip
    uneven = [one for one in found if one.share > TOO_MUCH]
    if not uneven:
        lines += [f"No load gave one worker more than {TOO_MUCH:.0%}.", ""]
    else:
        lines += [f"More than {TOO_MUCH:.0%} went to one worker: {', '.join(one.name for one in uneven)}.", ""]
    return lines


def _idle(found: list[tuple[str, float, float, int]]) -> list[str]:
    rows = [f"| {role} | {share:.1f} | {own:.1f} | {files} |" for role, share, own, files in found]
    total = sum(share for _, share, _, _ in found)
    return [
        "A service of two workers that nobody has connected to yet:", "",
        "| process | MiB, shared pages in proportion | MiB of its own | descriptors |", "|---|---|---|---|", *rows,
        f"| all | {total:.1f} | | |", "",
    ]  # fmt: skip
