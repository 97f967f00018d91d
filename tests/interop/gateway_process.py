"""`gateway run` as a process of its own, in a folder of its own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tests.peers.process import LIMIT, Process, wait_for
from tests.peers.require import missing, require, require_root

TURN = 100.0
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
    which takes a mount namespace. Tests whose pipelines have fixed `ports` take turns, also those of other pytest
    processes; and the ports have to become free, since somebody may be trying the gateway out on this machine.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        *,
        ports: Sequence[int] = (),
        variables: dict[str, str] | None = None,
        name_server: str = "",
    ) -> None:
        super().__init__(folder)
        self._file = file
        self._variables = variables or {}
        self._name_server = name_server
        self._ports = ports
        self._turn: TextIO | None = None

    def start(self) -> GatewayProcess:
        """Start it; after this it accepts connections."""
        try:
            if self._ports:
                self._take_ports()
            self.launch(self._command(), self._ready, {**os.environ, **self._variables})
        except BaseException:
            self.stop()
            raise
        return self

    def _ready(self) -> bool:
        return "gateway: ready" in self.said_all()

    def _command(self) -> list[str]:
        gateway = str(Path(sys.executable).with_name("gateway"))
        # A test run that is killed takes the gateway along, or its fixed ports would stay in use.
        command = [require("setpriv"), "--pdeathsig", "TERM", "env", "-C", str(self.folder), gateway, "run",
                   "--no-supervisor", self._file]  # fmt: skip
        if self._name_server:
            require_root()
            resolv_conf = self.folder / "resolv.conf"
            resolv_conf.write_text(f"nameserver {self._name_server}\n")
            mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            command = [require("unshare"), "-m", "sh", "-c", mount, str(resolv_conf), *command]
        return command

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

    def stop(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int | None:
        """As for every process; then its ports are the next one's."""
        try:
            return super().stop(number, limit)
        finally:
            if self._turn is not None:
                self._turn.close()
                self._turn = None

    def _take_ports(self) -> None:
        turn = self._turn = (Path(tempfile.gettempdir()) / "gateway-fixed-ports.lock").open("w")
        wait_for(lambda: _locked(turn), "this test's turn", TURN)
        try:
            wait_for(lambda: all(map(_free, self._ports)), f"ports {self._ports} free")
        except TimeoutError:
            missing(f"one of the ports {self._ports} is in use")


def _locked(file: TextIO) -> bool:
    """Raises OSError while another process has it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _free(port: int) -> bool:
    """Raises OSError where somebody listens."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        return True
