"""`gateway run` as a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from tests.peers.process import Process, wait_for
from tests.peers.require import missing, require, require_root

PIPELINES = Path(__file__).parents[2] / "pipelines"


def installation(folder: Path, certificate: tuple[Path, Path]) -> Path:
    """A folder with the shipped pipelines as they are, and the development certificate that they name."""
    shutil.copytree(PIPELINES, folder / "pipelines")
    (folder / "var/tls").mkdir(parents=True)
    for source, name in zip(certificate, ("development.crt", "development.key"), strict=True):
        shutil.copy(source, folder / "var/tls" / name)
    return folder


class GatewayProcess(Process):
    """`gateway run FILE`, with `folder` as its working directory.

    `variables` are added to its environment. With `name_server` its resolv.conf names that address (and port 53),
    which takes a mount namespace. Before it starts its fixed ports have to become free: somebody may be trying
    the gateway out on this machine.
    """

    def __init__(
        self, folder: Path, file: str, *, variables: dict[str, str] | None = None, name_server: str = ""
    ) -> None:
        super().__init__(folder)
        self._file = file
        self._variables = variables or {}
        self._name_server = name_server

    def start(self) -> GatewayProcess:
        """Start it; after this it accepts connections."""
        for port in re.findall(r"smtps?://127\.0\.0\.1:(\d+)", self._listeners()):
            _wait_free(int(port))
        gateway = str(Path(sys.executable).with_name("gateway"))
        command = ["env", "-C", str(self.folder), gateway, "run", self._file]
        if self._name_server:
            require_root()
            resolv_conf = self.folder / "resolv.conf"
            resolv_conf.write_text(f"nameserver {self._name_server}\n")
            mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            command = [require("unshare"), "-m", "sh", "-c", mount, str(resolv_conf), *command]
        self.launch(command, lambda: "gateway: ready" in self.said_all(), {**os.environ, **self._variables})
        return self

    def said_all(self) -> str:
        """All it wrote."""
        return self.output.read_text(errors="replace")

    def records(self, name: str) -> list[dict[str, object]]:
        """The records of this name in its log so far."""
        lines = [json.loads(line) for line in self.said_all().splitlines() if line.startswith("{")]
        return [record for record in lines if record["record"] == name]

    def wait_record(self, name: str, count: int = 1) -> list[dict[str, object]]:
        """Wait until it logged so many records of this name."""
        wait_for(lambda: len(self.records(name)) >= count, f"{count} records {name}: {self.said_all()[-2000:]}")
        return self.records(name)

    def _listeners(self) -> str:
        """The `listen` part of the file, less what comes from the environment."""
        text = (self.folder / self._file).read_text()
        return text.partition("listen:")[2].partition("\nstages:")[0]


def _wait_free(port: int) -> None:
    def bind() -> bool:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return True

    try:
        wait_for(bind, f"port {port} free")
    except TimeoutError:
        missing(f"port {port} is in use")
