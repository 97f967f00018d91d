"""`python -m bench [--quick] [--content] [--stores] [--scaling]`: run jobs and write docs/performance.md.

All of them, or one section, which leaves the others as they are. What is measured and how is said in the report.
`--soak [--minutes N] [--kill]` loads a service for long instead, and writes to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import tempfile
from pathlib import Path

from bench import clients, content, scaling, soak, soak_report, stores
from bench.measured import Measured, job, machine
from bench.peers import Process, start_auth, start_gateway, start_nginx, start_sink
from scripts.development_certificate import write

IDLE = 5000
REPORT = Path("docs/performance.md")
RELIABILITY = Path("docs/reliability.md")


def idle_memory(process: Process, port: int, tls: bool, count: int) -> float:
    """KiB of resident memory for each idle client."""
    clients.idle(port, 50, tls)
    before = process.memory()
    held = clients.idle(port, count, tls)
    grown = process.memory() - before
    for client in held:
        client.close()
    return grown / count / 1024


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds, no report")
    parser.add_argument("--content", action="store_true", help="only the content grade; the rest of the report stays")
    parser.add_argument("--stores", action="store_true", help="only IMAP and POP3; the rest of the report stays")
    parser.add_argument("--scaling", action="store_true", help="only one and two workers; the rest of the report stays")
    parser.add_argument("--soak", action="store_true", help="half the machine's capacity, for long; no other job")
    parser.add_argument("--minutes", type=float, default=soak.FULL_MINUTES, help="length of the soak; shorter ones "
                        "are not written to docs/reliability.md")  # fmt: skip
    parser.add_argument("--kill", action="store_true", help="kill -9 a worker at two thirds of the soak")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds, sessions, bulk, idle = (2, 300, 2, 500) if quick else (5, 2000, 8, IDLE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 30000), hard))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "tls")
        certificate = (folder / "tls/development.crt", folder / "tls/development.key")
        tls = f"tls: {{certificates: [{{chain: {certificate[0]}, key: {certificate[1]}}}]}}"
        if arguments.soak:
            raise SystemExit(_soak(folder, certificate, arguments.minutes, arguments.kill))
        every = not (arguments.content or arguments.stores or arguments.scaling)
        parts = sections(REPORT.read_text())
        if every:
            parts[""] = _run(folder, certificate, tls, rounds, sessions, bulk, idle)
        if every or arguments.stores:
            parts[stores.HEADING] = stores.run(folder, certificate, quick)
        if every or arguments.content:
            parts[content.HEADING] = content.run(folder, tls, quick)
        if every or arguments.scaling:
            parts[scaling.HEADING] = scaling.run(folder, quick)
    if not quick:
        order = ("", stores.HEADING, content.HEADING, scaling.HEADING)
        written = [parts.get(heading, "").strip("\n") + "\n" for heading in order]
        REPORT.write_text("\n".join([*written, Path("bench/notes.md").read_text()]))
        print(f"wrote {REPORT}")


def _soak(folder: Path, certificate: tuple[Path, Path], minutes: float, kill: bool) -> int:
    """The exit status: 1 if not all was as promised."""
    ran = soak.run(folder, certificate, minutes, kill)
    text = soak_report.report(ran)
    print(text)
    if minutes >= soak.FULL_MINUTES:
        RELIABILITY.write_text(soak_report.inserted(RELIABILITY.read_text(), text))
        print(f"wrote {RELIABILITY}")
    return 1 if soak_report.faults(ran) else 0


def sections(report: str) -> dict[str, str]:
    """Heading to text with its heading; what stands before the first under ""."""
    parts = report.split("\n## ")
    return {"": parts[0]} | {f"## {part.partition(chr(10))[0]}": f"## {part}" for part in parts[1:]}


def _run(
    folder: Path, certificate: tuple[Path, Path], tls: str, rounds: int, sessions: int, bulk: int, idle: int
) -> str:
    started: list[Process] = []

    def started_one(result: tuple[Process, int, int] | tuple[Process, int]) -> tuple[int, ...]:
        started.append(result[0])
        return tuple(result[1:])

    try:
        (sink,) = started_one(start_sink(folder))
        (auth,) = started_one(start_auth(folder, {"smtp": sink}))
        nginx = start_nginx(folder, auth, certificate)
        pool = f"upstreams: {{sink: {{servers: [smtp://127.0.0.1:{sink}], tls: off, max_connections: 12000"
        opaque = start_gateway(
            folder,
            "opaque",
            f"""{tls}
stages:
  - auth_http: {{url: "http://127.0.0.1:{auth}/auth", none: true, methods: []}}
  - splice
{pool}}}}}""",
        )
        envelope = start_gateway(
            folder,
            "envelope",
            f"""{tls}
stages: [{{splice: {{handoff: never}}}}]
{pool}, reuse: on}}}}""",
        )
        for gateway in (nginx, opaque, envelope):
            started.append(gateway[0])
        big = 25_000_000
        gib = bulk * big / 1e9
        session, octets = 1e3 / sessions, 1 / gib
        table = [
            job("session with `auth_http`, method none, one 1 kB message, opaque", 1.25, "ms a session", session,
                [(nginx[0], lambda: clients.source(nginx[1], sessions, 1000, 10)),
                 (opaque[0], lambda: clients.source(opaque[1], sessions, 1000, 10))], rounds),
            job("25 MB messages, opaque, plain", 0.5, "s a GB", octets,
                [(nginx[0], lambda: clients.source(nginx[1], bulk, big, 2)),
                 (opaque[0], lambda: clients.source(opaque[1], bulk, big, 2))], rounds),
            job("25 MB messages, envelope, plain", 1.2, "s a GB", octets,
                [(nginx[0], lambda: clients.source(nginx[1], bulk, big, 2)),
                 (envelope[0], lambda: clients.source(envelope[1], bulk, big, 2))], rounds),
            job("25 MB messages under TLS, opaque", 1.3, "s a GB", octets,
                [(nginx[0], lambda: clients.tls_messages(nginx[2], bulk, big)),
                 (opaque[0], lambda: clients.tls_messages(opaque[2], bulk, big))], rounds),
            job("TLS session, one 1 kB message, opaque", 1.4, "ms a session", 1e3 / (sessions // 4),
                [(nginx[0], lambda: clients.tls_messages(nginx[2], sessions // 4, 1000)),
                 (opaque[0], lambda: clients.tls_messages(opaque[2], sessions // 4, 1000))], rounds),
            job("session in envelope grade, no `auth_http`, `reuse: on` (nginx with its auth request)", 1.0,
                "ms a session", session,
                [(nginx[0], lambda: clients.source(nginx[1], sessions, 1000, 10)),
                 (envelope[0], lambda: clients.source(envelope[1], sessions, 1000, 10))], rounds),
        ]  # fmt: skip
        latency = (clients.pipelined_latency(nginx[1]), clients.pipelined_latency(envelope[1]))
        memory = [
            (name, idle_memory(process, port, under_tls, idle))
            for name, process, port, under_tls in (
                ("nginx, plain", nginx[0], nginx[1], False), ("gateway, plain", envelope[0], envelope[1], False),
                ("nginx, TLS", nginx[0], nginx[2], True), ("gateway, TLS", envelope[0], envelope[2], True),
            )
        ]  # fmt: skip
    finally:
        for process in reversed(started):
            process.stop()
    return _report(table, latency, memory, rounds, sessions, bulk, idle)


def _version(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[0]


def _report(table: list[Measured], latency: tuple[float, float], memory: list[tuple[str, float]], rounds: int,
            sessions: int, bulk: int, idle: int) -> str:  # fmt: skip
    rows = [one.row() for one in table]
    return "\n".join([
        "# Performance", "",
        "Written by `make bench`. nginx's mail proxy and the gateway do the same job in turn, in one run.", "",
        f"- Machine: {machine()}; 2 cores, shared and noisy: the ratios count, not the figures.",
        f"- Versions: {_version('nginx', '-v')}; Python {platform.python_version()} on uvloop; one worker each.",
        "- Method: smtp-source and smtp-sink at the ends (a small TLS client of our own where TLS is asked), "
        f"{sessions} "
        f"sessions or {bulk} messages of 25 MB a round, medians of {rounds} rounds after a warm-up, nginx and gateway "
        "interleaved. CPU is what the kernel charged the processes (user and system). The auth server is an nginx of "
        "its own, on nobody's account. All safeguards are on.",
        "", "| job | unit | nginx | gateway (range) | ratio asked | ratio |", "|---|---|---|---|---|---|", *rows, "",
        "| idle clients | KiB each |", "|---|---|",
        *[f"| {name}, {idle} of them | {kib:.1f} |" for name, kib in memory], "",
        f"A pipelined MAIL and RCPT are answered after {latency[1]:.1f} ms (median), "
        f"by nginx after {latency[0]:.1f} ms.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
