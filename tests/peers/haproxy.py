"""HAProxy in front of gateways: one port for clients, a PROXY v2 header in front of every connection it passes on.

    with HAProxy(folder, {"g1": 20101, "g2": 20102}) as proxy:
        ...                                     # proxy.port; proxy.sessions() says who got how many
"""

from __future__ import annotations

import csv
import io
import socket
from collections.abc import Mapping
from pathlib import Path

from tests.peers.process import Process, free_port, wait_for
from tests.peers.require import require

# A server is up when it greets: each check is a session that begins with a LOCAL header (PROXY protocol 2.2).
CONFIGURATION = """\
global
    maxconn 4000
    log stderr format raw local0 info
    stats socket {folder}/admin.sock mode 600 level admin
defaults
    mode tcp
    log global
    timeout connect 2s
    timeout client 1h
    timeout server 1h
    retries 1
    option redispatch
frontend smtp
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    balance {balance}
    option tcp-check
    tcp-check expect rstring ^220
    default-server check inter 200ms fastinter 50ms fall 2 rise 1 send-proxy-v2
    {servers}
"""


class HAProxy(Process):
    """One instance. `servers`: the port of each, by its name."""

    def __init__(self, folder: Path, servers: Mapping[str, int], *, balance: str = "roundrobin") -> None:
        super().__init__(folder)
        self._program = require("haproxy")
        self.port = free_port()
        self._servers = dict(servers)
        self._file = folder / "haproxy.cfg"
        lines = "\n    ".join(f"server {name} 127.0.0.1:{port}" for name, port in servers.items())
        self._file.write_text(
            CONFIGURATION.format(folder=folder, port=self.port, balance=balance, servers=lines)
        )  # fmt: skip

    def start(self) -> HAProxy:
        """Start it; after this every server has passed a check."""
        self.launch([self._program, "-db", "-f", str(self._file)], lambda: set(self._column("check_status")) == {"L7OK"})
        return self

    def sessions(self) -> dict[str, int]:
        """How many connections each server got so far, checks apart."""
        return dict(zip(self._servers, map(int, self._column("stot")), strict=True))

    def wait_up(self, name: str) -> None:
        """Wait until the checks call this server up."""
        wait_for(lambda: dict(zip(self._servers, self._column("status"), strict=True))[name] == "UP", f"{name} to be up")

    def _column(self, name: str) -> list[str]:
        """What `show stat` says of each server."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self.folder / "admin.sock"))
            client.sendall(b"show stat\n")
            text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        rows = {row["svname"]: row for row in csv.DictReader(io.StringIO(text.removeprefix("# ")))
                if row["pxname"] == "gateways"}  # fmt: skip
        return [rows[server][name] for server in self._servers]
