"""A gateway in the test's own loop: a pipeline given as a mapping, served on free ports.

async with running({"stages": [...], "upstreams": {...}}) as gateway:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from gateway.config.load import load
from gateway.pipeline.compile import compile_pipeline
from gateway.pipeline.plan import Plan
from gateway.pipeline.registry import Registry
from gateway.service.listening import listen
from gateway.service.worker import ServedPipeline, StageWorker
from gateway.stage import Stage
from gateway.state.memory import MemoryStore
from gateway.upstream.profile import ProfileStore

_ports = random.Random(os.getpid())


@dataclass
class Gateway:
    """A running gateway. `port` is its first listener's."""

    pipeline: ServedPipeline
    port: int
    ports: list[int]

    @property
    def worker(self) -> StageWorker:
        """What its stages got at `start`."""
        assert self.pipeline.stage_worker is not None
        return self.pipeline.stage_worker

    async def idle(self) -> None:
        """Wait until no session is open."""
        while self.pipeline.tasks:
            await asyncio.wait(set(self.pipeline.tasks))


def free_port() -> int:
    """A port nobody listens on, below the range from which the kernel takes ports for outgoing connections."""
    while True:
        port = _ports.randrange(12_000, 32_000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def compiled(pipeline: Mapping[str, object], folder: Path, stages: Mapping[str, type[Stage]] | None = None) -> Plan:
    """Compile a pipeline given as a mapping. Raises ConfigError."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(dict(pipeline), sort_keys=False))
    registry = Registry()
    for name, stage in (stages or {}).items():
        registry.add(name, stage)
    loaded = load([path])
    model, document = loaded.pipelines[0]
    return compile_pipeline(model, document, registry)


@asynccontextmanager
async def running(
    pipeline: Mapping[str, object],
    *,
    stages: Mapping[str, type[Stage]] | None = None,
    learn: bool = False,
    folder: Path | None = None,
) -> AsyncIterator[Gateway]:
    """Serve a pipeline; `listen` and `hostname` are filled in, `learn` asks the upstreams for their EHLO first."""
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        complete = {"hostname": "gateway.test", "listen": [f"smtp://127.0.0.1:{port}"], **pipeline}
        plan = compiled(complete, folder or Path(scratch), stages)
        served = ServedPipeline(plan)
        try:
            served.bind()
            listen(served.sockets)
            await served.prepare(MemoryStore(asyncio.get_running_loop().time), ProfileStore(None))
            if learn:
                await served.learn()
            await served.accept()
            ports = [sock.getsockname()[1] for _, sock in served.sockets]
            yield Gateway(served, ports[0], ports)
        finally:
            await served.stop(1.0)
