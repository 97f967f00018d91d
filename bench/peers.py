"""The programs of a bench run: nginx as peer and as auth server, smtp-sink behind, the gateway itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gateway.testing.gateway import free_port

TICK = os.sysconf("SC_CLK_TCK")
MAIL_MODULE = Path("/usr/lib/nginx/modules/ngx_mail_module.so")

class Process:
    """A program of the run; its CPU is that of the process and its children, from the kernel's accounting."""

    def __init__(
        self, argv: list[str], log: Path, env: dict[str, str] | None = None, ends_by: int = signal.SIGTERM
    ) -> None:
        self.file = log.open("ab")
        self.argv, self.ends_by = argv, ends_by
        self.popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=self.file,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self.log = log

    def until(self, ready: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for an event; the program's death is an error with its log."""
        end = time.monotonic() + seconds
        while True:
            if self.popen.poll() is not None:
                raise RuntimeError(f"{self.argv[0]}: exit {self.popen.returncode}: {self.log.read_text()[-3000:]}")
            try:
                if ready():
                    return
            except OSError:
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"{self.argv[0]}: not ready: {self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """The process and its children that run the same program (nginx's workers)."""
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children")
        own = os.readlink(f"/proc/{self.popen.pid}/exe")
        found = [self.popen.pid]
        for child in children.read_text().split():
            if (
                os.readlink(f"/proc/{child}/exe") == own
                and b"gateway.sink" not in Path(f"/proc/{child}/cmdline").read_bytes()
            ):
                found.append(int(child))
        return found

    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        return sum(cpu_of(pid) for pid in self.pids())

    def memory(self) -> int:
        """Resident octets."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
        return total

    def peak_memory(self, *, anew: bool = False) -> int:
        """The most resident octets there were; `anew`: from now on."""
        total = 0
        for pid in self.pids():
            if anew:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
        return total

    def nameless_files(self) -> int:
        """Octets on disk of the files it holds open that have no name."""
        total = 0
        for pid in self.pids():
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if os.readlink(entry).endswith("(deleted)"):
                        total += entry.stat().st_blocks * 512
                except OSError:
                    continue  # closed meanwhile
        return total

    def stop(self) -> None:
        """End it by its id."""
        if self.popen.poll() is None:
            self.popen.send_signal(self.ends_by)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        self.file.close()


def cpu_of(pid: int) -> float:
    """Of a process and its threads, in nanosecond steps where the kernel has them, else in ticks."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


def cpu_of_the_dead(pid: int) -> float:
    """Of a process's children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / TICK


def answers(port: int) -> Callable[[], bool]:
    """Ready when a connection is accepted."""

    def connects() -> bool:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True

    return connects


def start_sink(folder: Path) -> tuple[Process, int]:
    """smtp-sink without XCLIENT, XFORWARD and AUTH: a plain server that throws mail away."""
    port = free_port()
    sink = Process(
        ["/usr/sbin/smtp-sink", "-u", "nobody", "-a", "-C", "-F", f"127.0.0.1:{port}", "512"], folder / "sink.log"
    )
    sink.until(answers(port))
    return sink, port


def start_auth(folder: Path, backends: Mapping[str, int]) -> tuple[Process, int]:
    """An nginx of its own as auth server: its CPU is on nobody's account. `backends`: the port for each protocol."""
    port = free_port()
    temporary = folder / "auth"
    temporary.mkdir()
    ports = " ".join(f"{protocol} {backend};" for protocol, backend in backends.items())
    config = folder / "auth.conf"
    config.write_text(f"""
daemon off; user root; worker_processes 1; pid {folder}/auth.pid; error_log {folder}/auth-error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {temporary}/1; proxy_temp_path {temporary}/2; fastcgi_temp_path {temporary}/3;
    uwsgi_temp_path {temporary}/4; scgi_temp_path {temporary}/5;
    map $http_auth_protocol $backend {{ {ports} }}
    server {{ listen 127.0.0.1:{port};
        location / {{ add_header Auth-Status OK; add_header Auth-Server 127.0.0.1;
                      add_header Auth-Port $backend; return 204; }} }}
}}
""")
    auth = Process(["nginx", "-e", f"{folder}/auth-error.log", "-c", str(config)], folder / "auth.log")
    auth.until(answers(port))
    return auth, port


def start_nginx(folder: Path, auth: int, certificate: tuple[Path, Path]) -> tuple[Process, int, int]:
    """nginx's mail proxy, method none, xclient off: (process, plain port, TLS port)."""
    plain, tls = free_port(), free_port()
    config = folder / "nginx.conf"
    config.write_text(f"""
load_module {MAIL_MODULE};
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log warn;
worker_rlimit_nofile 30000;
events {{ worker_connections 12000; }}
mail {{
    server_name proxy.test; auth_http 127.0.0.1:{auth}/auth; xclient off; smtp_auth none; timeout 600s;
    smtp_capabilities "SIZE 104857600" 8BITMIME PIPELINING;
    ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]}; ssl_protocols TLSv1.2 TLSv1.3;
    server {{ listen 127.0.0.1:{plain}; protocol smtp; }}
    server {{ listen 127.0.0.1:{tls} ssl; protocol smtp; }}
}}
""")
    nginx = Process(["nginx", "-e", f"{folder}/nginx-error.log", "-c", str(config)], folder / "nginx.log")
    nginx.until(answers(plain))
    return nginx, plain, tls


def start_gateway(
    folder: Path, name: str, pipeline: str, env: dict[str, str] | None = None
) -> tuple[Process, int, int]:
    """The gateway with these stages and upstreams: (process, plain port, TLS port)."""
    gateway, (plain, tls) = start_gateway_for(folder, name, ("smtp", "smtps"), f"relay: open\n{pipeline}", env)
    return gateway, plain, tls


def start_gateway_for(
    folder: Path, name: str, schemes: Sequence[str], pipeline: str, env: dict[str, str] | None = None
) -> tuple[Process, list[int]]:
    """The gateway with a listener for each scheme: the process, and the ports."""
    ports = [free_port() for _ in schemes]
    listen = ", ".join(f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(schemes, ports, strict=True))
    path = folder / f"{name}.yaml"
    path.write_text(f"hostname: proxy.test\nlisten: [{listen}]\n{pipeline}\n")
    log = folder / f"{name}.log"
    gateway = Process([sys.executable, "-m", "gateway", "run", "--no-supervisor", str(path)], log, env)
    gateway.until(lambda: "gateway: ready" in log.read_text())
    return gateway, ports
