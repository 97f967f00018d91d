"""`gateway run` as administrators run it: a supervisor, a generation, workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import yaml

from tests.fault.client import Client
from tests.peers.process import free_port

GATEWAY = [sys.executable, "-m", "gateway"]
LIMIT = 60.0  # guards against a test that waits for ever

Record = dict[str, object]


class Service:
    """A service that is ready; `records` is its log so far."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process, port: int) -> None:
        self.folder = folder
        self.process = process
        self.port = port
        self.admin = folder / "admin.sock"
        self.lines: list[str] = []
        self.records: list[Record] = []
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            text = line.decode("utf-8", "replace").rstrip("\n")
            self.lines.append(text)
            if text.startswith("{"):
                self.records.append(json.loads(text))
            self._news.set()
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds; it is asked again with each line of the log."""
        async with asyncio.timeout(LIMIT):
            while not holds():
                assert not self._reader.done() or holds(), self.lines
                self._news.clear()
                if not holds():
                    await self._news.wait()

    async def record(self, name: str, count: int = 1) -> Record:
        """The count-th record of that name, once it is there."""
        await self.until(lambda: len(self.all(name)) >= count)
        return self.all(name)[count - 1]

    def all(self, name: str) -> list[Record]:
        """The records of that name."""
        return [record for record in self.records if record["record"] == name]

    def signal(self, number: signal.Signals) -> None:
        """To the supervisor."""
        self.process.send_signal(number)

    async def reload(self) -> None:
        """SIGHUP, and wait until it is done or has failed."""
        before = len(self.all("reload")) + len(self.all("reload_failed"))
        self.signal(signal.SIGHUP)
        await self.until(lambda: len(self.all("reload")) + len(self.all("reload_failed")) > before)

    def write(self, pipeline: Mapping[str, object], **process: object) -> None:
        """The pipeline file, with what every test needs."""
        write(self.folder, self.port, pipeline, **process)

    async def client(self) -> Client:
        """One more client, greeted."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        await client.hello()
        return client

    async def ctl(self, *arguments: str) -> tuple[int, str]:
        """`gateway ctl`: exit status, and what it said."""
        process = await asyncio.create_subprocess_exec(
            *GATEWAY, "ctl", "--socket", str(self.admin), *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, said.decode()

    async def ask(self, *arguments: str) -> object:
        """`gateway ctl --json`."""
        status, said = await self.ctl("--json", *arguments)
        assert status == 0, said
        return json.loads(said)

    async def api(self, path: str, method: str = "GET", **body: object) -> tuple[int, str]:
        """The admin API on its unix socket: status and body of the answer."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.admin))) as session,
            session.request(method, f"http://gateway{path}", json=body or None) as response,
        ):
            return response.status, await response.text()

    async def metrics(self) -> dict[str, float]:
        """All samples of /metrics."""
        status, text = await self.api("/metrics")
        assert status == 200, text
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {sample: float(value) for sample, _, value in samples}

    async def whole(self) -> list[int]:
        """Process ids of the newest generation's workers by their numbers, once all of them run."""
        async with asyncio.timeout(LIMIT):
            while True:
                info = json.loads((await self.api("/info"))[1])
                stats = json.loads((await self.api("/stats"))[1])
                pids = [one["pid"] for one in info["workers"] if one["generation"] == info["generation"]]
                said = {one["pid"] for one in stats["workers"]}
                if all(pid in said for pid in pids):
                    return pids

    def generations(self) -> list[int]:
        """Process ids of the generations that run."""
        return children(self.process.pid, "gateway.service.generation")

    def workers(self) -> list[int]:
        """Process ids of what the generations forked: workers, and the admin process last."""
        return [pid for generation in self.generations() for pid in children(generation)]

    async def ended(self) -> int:
        """Its exit status, once all was read."""
        async with asyncio.timeout(LIMIT):
            await self._reader
            return await self.process.wait()


def children(parent: int, command: str = "") -> list[int]:
    """Child processes, in the order of their ids, whose command line contains `command`."""
    found = []
    for entry in (Path("/proc") / name for name in os.listdir("/proc") if name.isdecimal()):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and command in line:
            found.append(int(entry.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write(folder: Path, port: int, pipeline: Mapping[str, object], **process: object) -> Path:
    """A pipeline file for one listener, whose service keeps everything in the folder."""
    document = {
        "hostname": "gw.example.org",
        "listen": [f"smtp://127.0.0.1:{port}"],
        "process": {"admin": f"unix:{folder}/admin.sock", "state_directory": str(folder / "state"), **process},
        "relay": "open",
        **pipeline,
    }
    path = folder / "pipeline.yaml"
    draft = folder / "pipeline.yaml.new"
    draft.write_text(yaml.safe_dump(document))
    draft.rename(path)
    return path


@contextmanager
def only(pid: int, workers: Sequence[int]) -> Iterator[None]:
    """New connections land in this one of the workers: the others stand still, for less than they may."""
    others = [other for other in workers if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)


def with_socket(given: socket.socket) -> list[str]:
    """The command with this listener from systemd; a shell sets LISTEN_PID to its own id (sd_listen_fds(3))."""
    script = f'exec 3<&{given.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"'
    return ["/bin/bash", "-c", script, *GATEWAY]


@asynccontextmanager
async def service(
    folder: Path,
    pipeline: Mapping[str, object],
    *options: str,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = GATEWAY,
    pass_fds: Sequence[int] = (),
    **process: object,
) -> AsyncIterator[Service]:
    """A service that is ready; what is left of it is killed at the end, with all its processes."""
    port = free_port()
    path = write(folder, port, pipeline, **process)
    started = await asyncio.create_subprocess_exec(
        *command, "run", *options, str(path),
        cwd=folder, stderr=asyncio.subprocess.PIPE, env={**os.environ, **(environment or {})}, pass_fds=pass_fds,
    )  # fmt: skip
    running = Service(folder, started, port)
    try:
        await running.until(lambda: "gateway: ready" in running.lines)
        yield running
    finally:
        family = [*running.workers(), *running.generations(), *children(started.pid)]
        if started.returncode is None:
            started.kill()
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        await started.wait()
        await running._reader
