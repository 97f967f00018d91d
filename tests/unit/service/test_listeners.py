"""Listeners of a running pipeline: their options reach the sessions."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from gateway.testing.gateway import free_port, running

pytestmark = pytest.mark.anyio

PIPELINE: dict[str, object] = {
    "relay": "open",
    "stages": [{"splice": {"pool": "mta", "handoff": "auto"}}],
    "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:1"], "capabilities": {"assume": []}}},
}


async def said(port: int, *commands: bytes) -> list[bytes]:
    """The last line of each reply, that of the greeting first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = []
    for command in (b"", *commands):
        writer.write(command)
        while (line := await reader.readline())[3:4] == b"-":
            lines.append(line)
        lines.append(line)
    writer.close()
    return lines


@pytest.mark.parametrize("starttls", [True, False])
async def test_starttls_is_offered_or_unknown(tls_files: tuple[Path, Path], starttls: bool) -> None:
    chain, key = tls_files
    pipeline = {
        **PIPELINE,
        "listen": [{"url": f"smtp://127.0.0.1:{free_port()}", "starttls": starttls}],
        "tls": {"certificates": [{"chain": str(chain), "key": str(key)}]},
    }
    async with running(pipeline) as gateway:
        lines = await said(gateway.port, b"EHLO client.test\r\n", b"STARTTLS\r\n")
    assert any(b"STARTTLS" in line for line in lines[1:-1]) is starttls
    assert lines[-1].startswith(b"220 2.0.0" if starttls else b"50"), lines[-1]


def free_range(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


async def test_every_port_of_a_range() -> None:
    first = free_range(3)
    pipeline = {**PIPELINE, "listen": [f"smtp://127.0.0.1:{first}-{first + 2}"]}
    async with running(pipeline) as gateway:
        assert gateway.ports == [first, first + 1, first + 2]
        for port in gateway.ports:
            assert (await said(port))[0].startswith(b"220 gateway.test ")
