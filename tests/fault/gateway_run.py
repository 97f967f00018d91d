"""`gateway run` as a process of its own, ready, with all that it writes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.fault.client import Client
from tests.peers.process import free_port

GATEWAY = [sys.executable, "-m", "gateway"]


def configure(folder: Path, text: str) -> Path:
    """A pipeline file."""
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


@dataclass
class Running:
    """A gateway that is ready, with a listener a pipeline."""

    process: asyncio.subprocess.Process
    ports: list[int]
    log: list[str]

    @property
    def port(self) -> int:
        """The first pipeline's listener."""
        return self.ports[0]

    async def client(self, pipeline: int = 0) -> Client:
        """One more client, greeted."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.ports[pipeline]))
        await client.hello()
        return client

    async def ended(self) -> int:
        """Its exit status, with all that it wrote in `log`."""
        assert self.process.stderr is not None
        self.log += (await self.process.stderr.read()).decode().splitlines()
        return await self.process.wait()


@asynccontextmanager
async def started(
    folder: Path,
    pipeline: Mapping[str, object] | Sequence[Mapping[str, object]],
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Running]:
    """`gateway run` with one pipeline or several, ready; killed at the end of the body if it runs still."""
    documents = [pipeline] if isinstance(pipeline, Mapping) else pipeline
    ports = [free_port() for _ in documents]
    complete = [_completed(port, document) for port, document in zip(ports, documents, strict=True)]
    file = configure(folder, yaml.safe_dump_all(complete))
    process = await asyncio.create_subprocess_exec(
        *GATEWAY,
        "run",
        "--no-supervisor",
        *options,
        str(file),
        cwd=folder,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    log: list[str] = []
    try:
        assert process.stderr is not None
        while "gateway: ready" not in log:
            line = await process.stderr.readline()
            assert line, log
            log.append(line.decode().rstrip())
        yield Running(process, ports, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _completed(port: int, pipeline: Mapping[str, object]) -> dict[str, object]:
    return {
        "hostname": "gateway.test",
        "listen": [f"smtp://127.0.0.1:{port}"],
        "relay": "open",
        "limits": {"linger": "100ms"},
        **pipeline,
    }
