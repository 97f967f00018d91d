"""Starts the auth server of `auth_script_page.py`, as a program of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.peers.dovecot_store import User
from tests.peers.process import Process, free_port, port_open

PAGE = Path(__file__).with_name("auth_script_page.py")


class AuthScript(Process):
    """Knows these users, and sends each protocol to its server on loopback; `url` is for `auth_http`."""

    def __init__(self, folder: Path, users: Sequence[User], servers: dict[str, int]) -> None:
        super().__init__(folder)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/mail/auth.php"
        settings = {
            "port": self._port,
            "users": {user.name: user.password for user in users},
            "tokens": {user.name: user.token for user in users},
            "servers": {protocol: ["127.0.0.1", port] for protocol, port in servers.items()},
            "log": str(folder / "requests"),
        }
        (folder / "settings.json").write_text(json.dumps(settings))

    def start(self) -> AuthScript:
        """Start it; after this it answers."""
        self.launch([sys.executable, "-I", str(PAGE), str(self.folder / "settings.json")], port_open(self._port))
        return self

    def requests(self) -> list[dict[str, str]]:
        """The header fields of each request, names in lower case."""
        lines = (self.folder / "requests").read_text().splitlines()
        return [request for request in map(json.loads, lines) if request]
