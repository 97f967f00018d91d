"""The rows of the content grade: beside Postfix with the same filter, octets that are only read, memory, latency."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import clients
from bench.filters import PostfixPeer, reading_stage, start_filter
from bench.peers import Process, start_gateway, start_sink

BIG = 25_000_000
MANY, HUGE = 50, 50_000_000
SMALL = 4000
HEADING = "## Content grade"
BEFORE_QUEUE = ("smtpd", "cleanup")


@dataclass(frozen=True)
class Amount:
    """How much of everything: rounds, small messages a round, big ones a round, messages that are timed."""

    rounds: int
    messages: int
    bulk: int
    timed: int


@dataclass
class Beside:
    """One job that both did, figures a round: CPU in `unit`, messages a second, and Postfix's CPU by program."""

    name: str
    unit: str
    postfix: list[float] = field(default_factory=list)
    before_queue: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)
    postfix_accepted: list[float] = field(default_factory=list)
    postfix_delivered: list[float] = field(default_factory=list)
    gateway_rate: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Gateway / Postfix, of the medians."""
        return median(self.gateway) / median(self.postfix)


def beside(
    name: str, unit: str, per: float, postfix: PostfixPeer, gateway: tuple[Process, int], amount: Amount,
    job: tuple[int, int, int, bool],
) -> Beside:  # fmt: skip
    """The same job at both, in turn; `job` is what `clients.source` takes behind the port; CPU times `per`."""
    row, (messages, octets, sessions, kept) = Beside(name, unit), job
    for turn in range(amount.rounds + 1):
        before, begun = postfix.cpu_by_program(), time.perf_counter()
        clients.source(postfix.port, messages, octets, sessions, kept=kept)
        accepted = time.perf_counter() - begun
        while postfix.queued():
            time.sleep(0.02)
        delivered = time.perf_counter() - begun
        used = {program: (cpu - before.get(program, 0.0)) * per for program, cpu in postfix.cpu_by_program().items()}
        cpu, begun = gateway[0].cpu(), time.perf_counter()
        clients.source(gateway[1], messages, octets, sessions, kept=kept)
        passed = time.perf_counter() - begun
        if turn:
            row.postfix.append(sum(used.values()))
            row.before_queue.append(sum(used.get(program, 0.0) for program in BEFORE_QUEUE))
            row.gateway.append((gateway[0].cpu() - cpu) * per)
            row.postfix_accepted.append(messages / accepted)
            row.postfix_delivered.append(messages / delivered)
            row.gateway_rate.append(messages / passed)
    print(
        f"{name}: Postfix {median(row.postfix):.3f} {unit} ({BEFORE_QUEUE}: {median(row.before_queue):.3f}), "
        f"gateway {median(row.gateway):.3f}, ratio {row.ratio:.2f}; messages a second: Postfix "
        f"{median(row.postfix_accepted):.0f} accepted, {median(row.postfix_delivered):.0f} delivered, "
        f"gateway {median(row.gateway_rate):.0f}",
        flush=True,
    )
    return row


def octets(name: str, gateway: tuple[Process, int], amount: Amount) -> tuple[str, list[float]]:
    """CPU seconds a GB of the gateway's process for big messages."""
    figures = []
    for turn in range(amount.rounds + 1):
        before = gateway[0].cpu()
        clients.source(gateway[1], amount.bulk, BIG, 2)
        if turn:
            figures.append((gateway[0].cpu() - before) / (amount.bulk * BIG / 1e9))
    print(f"{name}: {median(figures):.3f} s a GB (asked 1.5)", flush=True)
    return name, figures


def growth(name: str, gateway: tuple[Process, int], count: int) -> tuple[str, float, float]:
    """`count` senders of 50 MB at once: MB by which the gateway grew at most, and MB of its spool files at most."""
    process, port = gateway
    clients.source(port, 2, 1_000_000, 2)
    before, most, over = process.memory(), 0, threading.Event()
    process.peak_memory(anew=True)

    def watch() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, process.nameless_files())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        clients.together(port, count, HUGE)
    finally:
        over.set()
        watcher.join()
    grown = (process.peak_memory() - before) / 1e6
    print(f"{name}: {grown:.0f} MB (asked 200), spool files {most / 1e6:.0f} MB", flush=True)
    return name, grown, most / 1e6


def run(folder: Path, tls: str, quick: bool) -> str:
    """All rows: their section of docs/performance.md. `tls` is the `tls:` line of a pipeline file."""
    amount = Amount(2, 200, 2, 50) if quick else Amount(3, 1000, 8, 500)
    started: list[Process | PostfixPeer] = []
    try:
        sink, port = start_sink(folder)
        started.append(sink)
        filters = {}
        for mode in ("read", "header", "body"):
            process, filters[mode] = start_filter(folder, mode)
            started.append(process)
        postfix = PostfixPeer(folder, filters["read"], port)
        started.append(postfix)
        chains = {
            "read": f"{{milter: '{filters['read']}'}}, ",
            "stage": "bench_read, ",
            "header": f"{{milter: '{filters['header']}'}}, ",
            "body": f"{{milter: '{filters['body']}'}}, ",
            "both": f"{{milter: {{id: one, socket: '{filters['header']}'}}}}, "
            f"{{milter: {{id: two, socket: '{filters['body']}'}}}}, ",
            "none": "",
        }
        gateways, environment = {}, reading_stage(folder)
        for name, chain in chains.items():
            text = f"""{tls}
limits: {{message_size: 100M}}
spool: {{total: 16G}}
stages: [{chain}splice: {{handoff: never}}]
upstreams: {{sink: {{servers: [smtp://127.0.0.1:{port}], tls: off, reuse: on, max_connections: 1000}}}}
"""
            process, plain, _ = start_gateway(folder, f"content-{name}", text, environment)
            gateways[name] = (process, plain)
            started.append(process)
        return _measured(amount, postfix, gateways, 10 if quick else MANY)
    finally:
        for one in reversed(started):
            one.stop()


def _measured(amount: Amount, postfix: PostfixPeer, gateways: dict[str, tuple[Process, int]], many: int) -> str:
    each, gigabyte = 1e3 / amount.messages, 1e9 / (amount.bulk * BIG)
    table = [
        beside("4 kB, one message a session", "ms a message", each, postfix, gateways["read"], amount,
               (amount.messages, SMALL, 10, False)),
        beside("4 kB, all in ten sessions", "ms a message", each, postfix, gateways["read"], amount,
               (amount.messages, SMALL, 10, True)),
        beside("25 MB", "s a GB", gigabyte, postfix, gateways["read"], amount, (amount.bulk, BIG, 2, False)),
    ]  # fmt: skip
    bulk = [
        ("a milter that only reads", table[-1].gateway),
        octets("a stage that reads every block", gateways["stage"], amount),
    ]
    memory = [
        growth("a field added at the end", gateways["header"], many),
        growth("a new body of the same length", gateways["body"], many),
    ]
    names = ("none", "read", "header", "both")
    times = clients.end_latency([gateways[name][1] for name in names], SMALL, amount.timed)
    for name, (end, whole) in zip(names, times, strict=True):
        print(f"latency, {name}: {end:.2f} ms from the dot, {whole:.2f} ms from MAIL", flush=True)
    return _section(table, bulk, memory, dict(zip(names, times, strict=True)), amount, many)


def _postfix_version() -> str:
    done = subprocess.run(["postconf", "-dh", "mail_version"], capture_output=True, text=True, check=True)
    return f"Postfix {done.stdout.strip()}"


def _reached(measured: float, asked: float) -> str:
    return "reached" if measured <= asked else "**not reached**"


def _section(
    table: list[Beside], bulk: list[tuple[str, list[float]]], memory: list[tuple[str, float, float]],
    times: dict[str, tuple[float, float]], amount: Amount, many: int,
) -> str:  # fmt: skip
    rows = [
        f"| {one.name} | {one.unit} | {median(one.postfix):.3f} | {median(one.before_queue):.3f} "
        f"| {median(one.gateway):.3f} ({min(one.gateway):.3f} to {max(one.gateway):.3f}) | **{one.ratio:.2f}** "
        f"| {_reached(one.ratio, 1.0)} |"
        for one in table
    ]
    rates = [
        f"| {one.name} | {median(one.postfix_accepted):.0f} | {median(one.postfix_delivered):.0f} "
        f"| {median(one.gateway_rate):.0f} | {_reached(median(one.postfix_delivered), median(one.gateway_rate))} |"
        for one in table[:2]
    ]
    octets_rows = [
        f"| 25 MB, {name} | {median(figures):.3f} ({min(figures):.3f} to {max(figures):.3f}) | 1.5 "
        f"| {_reached(median(figures), 1.5)} |"
        for name, figures in bulk
    ]
    memory_rows = [
        f"| {name} | {grown:.0f} | 200 | {_reached(grown, 200)} | {files:.0f} |" for name, grown, files in memory
    ]
    (end, whole), asked = times["none"], 2.0
    said = {"read": "a filter that only reads", "header": "a filter that adds a field",
            "both": "a chain of two: one adds a field, the next gives a new body"}  # fmt: skip
    latency = [
        f"| {text} | {times[name][0] - end:.2f} | {asked:.0f} | {_reached(times[name][0] - end, asked)} "
        f"| {times[name][1] - whole:.2f} |"
        for name, text in said.items()
    ]
    return "\n".join([
        HEADING, "",
        f"{_postfix_version()}; `python -m bench --content` runs these rows only. "
        "The `milter` stage beside Postfix's `smtpd_milters`: one filter for both, bench/filter.c on libmilter, which "
        "wants every event, answers each and changes nothing; one smtp-sink behind both. The filter's and the sink's "
        f"CPU is on nobody's account. {amount.messages} messages of 4 kB or {amount.bulk} of 25 MB a round, ten or two "
        f"senders at a time, medians of {amount.rounds} rounds after a warm-up, Postfix and gateway interleaved.", "",
        "Postfix does what it does: it keeps each message in its queue and delivers it from there; its figure is the "
        "sum over all of its processes until the queue is empty, its log daemon among them. What smtpd and cleanup "
        "used of that, which is everything before the answer to the client, stands beside it. The gateway delivers "
        "before it answers and has no queue: that is the same job for the mail, but Postfix's could survive a crash.",
        "", "| message | unit | Postfix | of that smtpd, cleanup | gateway (range) | ratio, asked 1 | |",
        "|---|---|---|---|---|---|---|", *rows, "",
        "| messages a second | Postfix, accepted | Postfix, delivered | gateway, delivered | at least Postfix's |",
        "|---|---|---|---|---|", *rates, "",
        "The content grade without edits, CPU of the gateway alone:", "",
        "| content | s a GB | asked | |", "|---|---|---|---|", *octets_rows, "",
        f"{many} senders of 50 MB each through a filter that edits, so that every message is spooled. All send at the "
        "same time, and none its end before all have sent the rest (`spool: {total: 16G}`):", "",
        "| filter | worker's memory grew by at most, MB | asked | | spool files at most, MB |", "|---|---|---|---|---|",
        *memory_rows, "",
        f"What a chain adds to the time from the dot to its answer, which is {end:.2f} ms (median of {amount.timed}, "
        "4 kB) without stages, one client at a time. These filters take next to no time of their own; what they take "
        "is in these figures:", "",
        "| chain | ms added | asked | | ms added from MAIL to the answer |", "|---|---|---|---|---|", *latency, "",
    ])  # fmt: skip
