"""The rows of IMAP and POP3: logins and large fetches beside nginx, memory of idle sessions, a login beside them.

One nginx and three gateways in front of the same small store and the same auth server: a gateway as it comes, its twin
that has no idle sessions, and one that is told what the store announces (`capabilities: {assume: ...}`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import store_clients
from bench.measured import Measured, job
from bench.peers import MAIL_MODULE, Process, answers, start_auth, start_gateway_for
from bench.store_server import BIG, CAPABILITIES
from gateway.testing.gateway import free_port

HEADING = "## Mail stores"
SESSION_ASKED, FETCH_ASKED, MEMORY_ASKED = 1.25, 0.5, 10.0
WARM_UP = 20


@dataclass(frozen=True)
class Amount:
    """How much of everything: rounds, sessions a round, fetches a round, idle clients, logins that are timed."""

    rounds: int
    sessions: int
    fetches: int
    idle: int
    timed: int


@dataclass(frozen=True)
class Proxy:
    """One of the proxies and its ports."""

    process: Process
    imap: int
    imaps: int
    pop3: int


@dataclass(frozen=True)
class Idle:
    """Idle sessions: KiB each, and the milliseconds of logins without and beside them."""

    name: str
    kib: float
    without: list[float]
    beside: list[float]


def run(folder: Path, certificate: tuple[Path, Path], quick: bool) -> str:
    """All rows: their section of docs/performance.md."""
    amount = Amount(2, 300, 2, 500, 50) if quick else Amount(5, 2000, 8, 5000, 200)
    place = folder / "stores"
    place.mkdir()
    place.chmod(0o755)
    started: list[Process] = []
    try:
        backends = {"imap": free_port(), "pop3": free_port()}
        log = place / "store.log"
        store = Process([sys.executable, "-m", "bench.store_server", *map(str, backends.values())], log)
        started.append(store)
        store.until(lambda: "ready" in log.read_text())
        auth, port = start_auth(place, backends)
        started.append(auth)
        nginx = _nginx(place, port, certificate)
        started.append(nginx.process)
        gateways = {}
        for name in ("plain", "assumed", "quiet"):
            gateways[name] = _gateway(place, name, port, backends, certificate)
            started.append(gateways[name].process)
        return _measured(amount, nginx, **gateways)
    finally:
        for one in reversed(started):
            one.stop()


def _nginx(folder: Path, auth: int, certificate: tuple[Path, Path]) -> Proxy:
    imap, imaps, pop3 = free_port(), free_port(), free_port()
    config = folder / "nginx.conf"
    config.write_text(f"""
load_module {MAIL_MODULE};
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log warn;
worker_rlimit_nofile 30000;
events {{ worker_connections 12000; }}
mail {{
    server_name proxy.test; auth_http 127.0.0.1:{auth}/auth; timeout 3600s;
    ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]}; ssl_protocols TLSv1.2 TLSv1.3;
    server {{ listen 127.0.0.1:{imap}; protocol imap; }}
    server {{ listen 127.0.0.1:{imaps} ssl; protocol imap; }}
    server {{ listen 127.0.0.1:{pop3}; protocol pop3; }}
}}
""")
    nginx = Process(["nginx", "-e", f"{folder}/nginx-error.log", "-c", str(config)], folder / "nginx.log")
    nginx.until(answers(imap))
    return Proxy(nginx, imap, imaps, pop3)


def _gateway(folder: Path, name: str, auth: int, backends: dict[str, int], certificate: tuple[Path, Path]) -> Proxy:
    assumed = {"imap": CAPABILITIES.decode().split(), "pop3": ["USER", "SASL PLAIN", "TOP", "UIDL", "PIPELINING"]}
    pools = [
        f"  {protocol}: {{servers: ['{protocol}://127.0.0.1:{port}'], tls: off, max_connections: 12000"
        + (f", capabilities: {{assume: {assumed[protocol]}}}" if name == "assumed" else "")
        + "}"
        for protocol, port in backends.items()
    ]
    text = "\n".join([
        f"tls: {{certificates: [{{chain: {certificate[0]}, key: {certificate[1]}}}]}}",
        "allow_plaintext_auth: true",
        f"stages: [{{auth_http: 'http://127.0.0.1:{auth}/auth'}}, splice]",
        "upstreams:", *pools,
    ])  # fmt: skip
    process, (imap, imaps, pop3) = start_gateway_for(folder, f"store-{name}", ("imap", "imaps", "pop3"), text)
    return Proxy(process, imap, imaps, pop3)


def _measured(amount: Amount, nginx: Proxy, plain: Proxy, assumed: Proxy, quiet: Proxy) -> str:
    rates: dict[str, dict[str, list[float]]] = {}

    def logins(name: str, protocol: str, gateway: Proxy) -> Measured:
        """Sessions at both, and how many there were a second."""
        found = rates.setdefault(name, {"nginx": [], "gateway": []})

        def at(who: str, proxy: Proxy) -> None:
            port = proxy.imap if protocol == "imap" else proxy.pop3
            found[who].append(store_clients.sessions(protocol, port, amount.sessions))

        peers = [(nginx.process, lambda: at("nginx", nginx)), (gateway.process, lambda: at("gateway", gateway))]
        measured = job(name, SESSION_ASKED, "ms a session", 1e3 / amount.sessions, peers, amount.rounds)
        print(f"  a second: nginx {median(found['nginx'][1:]):.0f}, gateway {median(found['gateway'][1:]):.0f}")
        return measured

    def fetch(name: str, tls: bool) -> Measured:
        def at(proxy: Proxy) -> None:
            store_clients.fetches(proxy.imaps if tls else proxy.imap, amount.fetches, tls)

        peers = [(nginx.process, lambda: at(nginx)), (plain.process, lambda: at(plain))]
        per = 1e9 / (amount.fetches * BIG)
        return job(name, None if tls else FETCH_ASKED, "s a GB", per, peers, amount.rounds)

    table = [
        logins("IMAP session", "imap", plain),
        logins("IMAP session, `capabilities: {assume}`", "imap", assumed),
        logins("POP3 session", "pop3", plain),
        logins("POP3 session, `capabilities: {assume}`", "pop3", assumed),
        fetch("FETCH of 25 MB, plain", False),
        fetch("FETCH of 25 MB under TLS", True),
    ]
    idle = [
        idle_sessions("gateway, plain", plain, amount, tls=False, quiet=quiet),
        idle_sessions("gateway, TLS", plain, amount, tls=True, quiet=quiet),
        idle_sessions("nginx, plain", nginx, amount, tls=False),
        idle_sessions("nginx, TLS", nginx, amount, tls=True),
    ]
    return _section(table, rates, idle, amount)


def idle_sessions(name: str, proxy: Proxy, amount: Amount, *, tls: bool, quiet: Proxy | None = None) -> Idle:
    """Sessions that logged in and idle. Logins in clear text beside them take turns with those at `quiet`, its twin."""
    port = proxy.imaps if tls else proxy.imap
    for client in store_clients.logged_in(port, 50, tls):
        client.close()
    before = proxy.process.memory()
    held = store_clients.logged_in(port, amount.idle, tls)
    grown = (proxy.process.memory() - before) / amount.idle / 1024
    print(f"{name}: {grown:.1f} KiB a session", flush=True)
    found = Idle(name, grown, [], [])
    for _ in range(amount.timed + WARM_UP if quiet is not None else 0):
        assert quiet is not None
        found.without.append(store_clients.login_time(quiet.imap))
        found.beside.append(store_clients.login_time(proxy.imap))
    for client in held:
        client.close()
    if quiet is not None:
        del found.without[:WARM_UP], found.beside[:WARM_UP]
        print(f"  a login: {median(found.without):.2f} ms without, {median(found.beside):.2f} ms beside", flush=True)
    return found


def _section(table: list[Measured], rates: dict[str, dict[str, list[float]]], idle: list[Idle], amount: Amount) -> str:
    def late(times: list[float]) -> float:
        return sorted(times)[len(times) * 95 // 100]

    speed = [
        f"| {name} | {median(found['nginx'][1:]):.0f} | {median(found['gateway'][1:]):.0f} |"
        for name, found in rates.items()
    ]

    def asked(one: Idle) -> str:
        if one.name != "gateway, plain":
            return ""
        return f"{MEMORY_ASKED:.0f}, {'reached' if one.kib <= MEMORY_ASKED else '**not reached**'}"

    memory = [f"| {one.name} | {one.kib:.1f} | {asked(one)} |" for one in idle]
    times = [
        f"| {one.name} "
        f"| {median(one.without):.2f} ({late(one.without):.2f}) | {median(one.beside):.2f} ({late(one.beside):.2f}) |"
        for one in idle
        if one.beside
    ]
    return "\n".join([
        HEADING, "",
        "`python -m bench --stores` runs these rows only. IMAP and POP3 sessions beside nginx, with the same auth "
        "server (asked at every login) and the same store behind both: a small server of our own that takes every "
        "login and sends 25 MB for FETCH. A session is greeting, LOGIN (USER and PASS), NOOP, LOGOUT (QUIT), "
        f"{store_clients.CLIENTS} clients at a time; {amount.sessions} sessions or {amount.fetches} fetches a round, "
        f"medians of {amount.rounds} rounds after a warm-up, nginx and gateway interleaved.",
        "", "| job | unit | nginx | gateway (range) | ratio asked | ratio |", "|---|---|---|---|---|---|",
        *[one.row() for one in table], "",
        "| logins a second, all on two cores | nginx | gateway |", "|---|---|---|", *speed, "",
        f"{amount.idle} idle sessions that are logged in, resident memory of the worker:", "",
        "| idle sessions | KiB each | asked |", "|---|---|---|", *memory, "",
        f"A login in clear text beside them, in turn with one at a gateway of the same kind without them: from "
        f"connecting to the answer, median of {amount.timed}, in brackets what 95 % stay below, one client at a time:",
        "", "| idle sessions | ms a login without them | beside them |", "|---|---|---|", *times, "",
    ])  # fmt: skip
