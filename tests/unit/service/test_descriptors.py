"""Who is refused when descriptors run short, and how often that is logged."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gateway.observe import logs
from gateway.relay import descriptors
from gateway.relay.wire import connect
from gateway.service.descriptors import DescriptorReserve
from gateway.testing.gateway import running
from gateway.upstream import dial as dialing
from gateway.upstream.connection import UpstreamError
from gateway.upstream.pool import Pool, PoolSettings
from tests.interop.conftest import Records

LAST_WORDS = {"smtp": b"421 4.7.0 ", "imap": b"* BYE ", "pop3": b"-ERR ", "smtps": b""}


@pytest.mark.parametrize(("limit", "reserve"), [(20, 10), (64, 32), (200, 40), (1024, 204), (1 << 20, 209_715)])
def test_a_fifth_is_kept_and_at_least_32(limit: int, reserve: int) -> None:
    found = DescriptorReserve("mx", lambda: 0.0, limit)
    assert found.reserve == reserve
    assert not found.refuses(limit - reserve - 1) and found.refuses(limit - reserve)


@pytest.mark.parametrize(("limit", "first"), [(64, 48), (1024, 922), (1 << 20, (1 << 20) - 256)])
def test_connections_of_sessions_leave_the_last_ones(limit: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "limit", lambda: limit)
    assert descriptors.too_high(first) and not descriptors.too_high(first - 1)


@pytest.mark.anyio
@pytest.mark.parametrize("unix", [False, True])
async def test_a_connection_that_takes_one_of_the_last_is_none(
    unix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "too_high", lambda descriptor: descriptor > 2)

    async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.close()
        seen.set()

    seen = asyncio.Event()
    path = str(tmp_path / "socket")
    server = await (asyncio.start_unix_server(ended, path) if unix else asyncio.start_server(ended, "127.0.0.1", 0))
    with pytest.raises(OSError) as caught:
        await connect(path if unix else server.sockets[0].getsockname(), timeout=5)
    assert caught.value.errno == errno.EMFILE
    await seen.wait()
    server.close()


def test_it_is_logged_once_in_a_while(tmp_path: Path) -> None:
    times = [100.0, 101.0, 109.0, 110.0, 110.5]
    logs.configure("json", "info", file=str(tmp_path / "log"))
    records = Records(tmp_path / "log")
    reserve = DescriptorReserve("mx", iter(times).__next__, 64)
    for _ in times:
        assert reserve.refuses(40)
    logs.configure("json", "info")
    found = records.all("descriptors_short")
    assert [record["refused"] for record in found] == [1, 3]
    assert (found[0]["limit"], found[0]["reserve"], found[0]["pipeline"]) == (64, 32, "mx")


@pytest.mark.anyio
@pytest.mark.parametrize("scheme", LAST_WORDS)
async def test_the_last_word_in_each_protocol(
    scheme: str, tls_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no session. Who expects TLS first gets no word in clear."""
    monkeypatch.setattr(DescriptorReserve, "refuses", lambda self, descriptor: descriptor > 2)
    chain, key = map(str, tls_files)
    upstream = "smtp" if scheme == "smtps" else scheme
    login = {"upstream_auth": {"credentials": "client", "verify": "upstream"}}
    pipeline = {
        "listen": [f"{scheme}://127.0.0.1:0"],
        "tls": {"certificates": [{"chain": chain, "key": key}]},
        "allow_plaintext_auth": True,
        "stages": ["splice"] if upstream == "smtp" else [login, "splice"],
        "upstreams": {"mail": {"servers": [f"{upstream}://127.0.0.1:1"]}},
    }
    async with running(pipeline | ({"relay": "open"} if upstream == "smtp" else {})) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        said = await reader.read()
        writer.close()
        assert said.startswith(LAST_WORDS[scheme]) and (b"too many connections" in said) is (scheme != "smtps")
        assert not gateway.pipeline.tasks and gateway.pipeline.served is not None
        assert gateway.pipeline.served.sessions == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EMFILE, "busy"), (errno.ENFILE, "busy"), (errno.ECONNREFUSED, "down")]
)
async def test_our_own_shortage_does_not_speak_against_a_server(
    number: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`busy` takes no server out of its pool."""

    async def connect(*args: object, **options: object) -> None:
        raise OSError(number, "said the kernel")

    monkeypatch.setattr(dialing, "connect", connect)
    pool = Pool("mail", PoolSettings((("smtp://127.0.0.1:1", 1),)), clock=lambda: 0.0)
    with pytest.raises(UpstreamError) as caught:
        await dialing.dial(pool.servers[0], pool.settings, hostname="gw.test")
    assert caught.value.kind == kind
