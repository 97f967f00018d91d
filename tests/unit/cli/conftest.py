"""A command run in this process, and upstream servers that it may ask."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli import main

Command = Callable[..., Result]
Serve = Callable[..., str]


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `gateway ARGUMENTS` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=input)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a pipeline file: an open relay to nowhere, with other keys where given."""

    def write_(name: str = "one.yaml", **keys: object) -> Path:
        text = {
            "hostname": "gw.example.org", "listen": "[smtp://127.0.0.1:2599]", "relay": "open", "stages": "[splice]",
            "upstreams": "{mta: {servers: [smtp://127.0.0.1:1]}}", **keys,
        }  # fmt: skip
        path = tmp_path / name
        path.write_text("".join(f"{key}: {value}\n" for key, value in text.items()))
        return path

    return write_


@pytest.fixture
def server() -> Iterator[Serve]:
    """Serve SMTP on a port of its own; EHLO says `keywords`, commands that `replies` does not name get 250."""
    servers: list[socketserver.ThreadingTCPServer] = []

    def serve(*keywords: str, seen: list[str] | None = None, **replies: str) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 mx.example ESMTP\r\n")
                for raw in self.rfile:
                    line = raw.decode().strip()
                    verb = line.split(" ")[0].upper()
                    if seen is not None:
                        seen.append(line)
                    lines = ["mx.example", *keywords] if verb == "EHLO" else [replies.get(verb, "250 Ok")[4:]]
                    code = "250" if verb == "EHLO" else replies.get(verb, "221 Bye" if verb == "QUIT" else "250 Ok")[:3]
                    head = "".join(f"{code}-{one}\r\n" for one in lines[:-1])
                    self.wfile.write(f"{head}{code} {lines[-1]}\r\n".encode())
                    if verb == "QUIT":
                        return

        made = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        made.daemon_threads = True
        servers.append(made)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        return f"127.0.0.1:{made.server_address[1]}"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()
