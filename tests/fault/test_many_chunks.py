"""A million BDAT chunks of one octet: as a process the gateway needs no more memory for them than for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.client import Client
from tests.fault.gateway_run import started

CHUNKS, GROUP = 1_000_000, 1000
CONTENT = b"Subject: x\r\n\r\n" + (b"x" * 60 + b"\r\n") * (CHUNKS // 62 + 1)
MIB = 1024


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The client's loop; the gateway has its own."""
    return "asyncio", {"use_uvloop": True}


def peak(pid: int) -> int:
    """The most memory that the process has had, in KiB (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [[], [{"mime_guard": {}}], [{"headers": [{"append": "X-Seen", "value": "yes"}]}]],
    ids=["unread", "read", "edited"],
)
async def test_a_million_chunks_need_no_memory(stages: list[object], tmp_path: Path) -> None:
    pipeline = {
        "limits": {"bdat_chunks": 2 * CHUNKS},
        "stages": [*stages, "splice"],
        "upstreams": {"mta": {"servers": [f"embedded://{tmp_path}/mail"]}},
    }
    async with started(tmp_path, pipeline) as gateway:
        client = await gateway.client()
        before = peak(gateway.process.pid)
        for command in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>"):
            assert (await client.say(command)).startswith("250")
        await send_chunks(client)
        assert (await client.say("BDAT 0 LAST")).startswith("250 2.0.0 Ok: queued")
        assert peak(gateway.process.pid) - before < 32 * MIB
    (stored,) = (tmp_path / "mail" / "new").iterdir()
    assert stored.stat().st_size >= CHUNKS


async def send_chunks(client: Client) -> None:
    """All of them, in groups, each answered."""
    for start in range(0, CHUNKS, GROUP):
        group = b"".join([b"BDAT 1\r\n" + CONTENT[place : place + 1] for place in range(start, start + GROUP)])
        client.writer.write(group)
        for _ in range(GROUP):
            assert await client.reader.readline() == b"250 2.0.0 1 octets received\r\n"
