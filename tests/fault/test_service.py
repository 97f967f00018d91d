"""The processes of a service: what a reload, a crash and a stop do to sessions, listeners and counters."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.fault.client import Client
from tests.fault.service import LIMIT, alive, children, service, with_socket
from tests.peers.process import free_port

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, UVLOOP]

SINK = {"stages": ["splice"], "upstreams": {"sink": {"servers": ["embedded://mail"]}}}


async def sent(client: Client, number: int = 1) -> str:
    """A message; the reply to its end."""
    for line, code in (("MAIL FROM:<a@example.org>", "250"), ("RCPT TO:<b@example.org>", "250"), ("DATA", "354")):
        assert (await client.say(line)).startswith(code)
    return await client.say(f"Subject: {number}\r\n\r\ntext\r\n.")


def mails(folder: Path) -> int:
    """Messages in the embedded server's Maildir."""
    return len(list((folder / "mail" / "new").glob("*")))


async def test_a_reload_lets_a_transaction_end(tmp_path: Path) -> None:
    """The session keeps the generation it began with; the next one meets the new configuration."""
    async with service(tmp_path, SINK, workers=2) as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        old = running.generations()
        running.write({**SINK, "hostname": "new.example.org"}, workers=2)
        await running.reload()
        assert running.all("reload")[0]["generation"] == 2
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await client.say("DATA")).startswith("354")
        assert (await client.say("Subject: x\r\n\r\ntext\r\n.")).startswith("250 2.0.0")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        assert (await reader.readline()).startswith(b"220 new.example.org")
        other = Client(reader, writer)
        assert (await other.say("EHLO client.test")).startswith("250")
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("421 4.3.2")
        await running.record("generation_ended")
        assert mails(tmp_path) == 1 and old[0] not in running.generations()
        assert (await sent(other)).startswith("250 2.0.0")


async def test_an_accepted_client_gets_its_message_through_a_reload(tmp_path: Path) -> None:
    async with service(tmp_path, {**SINK, "limits": {"junk_commands": 1_000_000}}) as running:
        client = await running.client()
        reload = asyncio.create_task(running.reload())
        while not reload.done():
            assert (await client.say("NOOP")).startswith("250")  # who says nothing for two seconds has no turn
        await reload
        assert (await sent(client)).startswith("250 2.0.0")
        assert (await client.say("QUIT")).startswith("221")


async def test_a_quiet_client_is_told_of_a_reload(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, drain="3s") as running:
        client = await running.client()
        await running.reload()
        assert (await client.reader.readline()).startswith(b"421 4.3.2")
        assert await client.reader.read() == b""


async def test_a_configuration_with_errors_changes_nothing(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        running.write({**SINK, "stages": ["splise"]})
        await running.reload()
        failed = running.all("reload_failed")[0]
        assert "stages[0].splise: unknown stage" in str(failed["error"]) and failed["generation"] == 1
        assert any("unknown stage" in line and not line.startswith("{") for line in running.lines)
        assert (await sent(await running.client())).startswith("250")
        running.write(SINK)
        await running.reload()
        assert running.all("reload")


async def test_listeners_come_and_go_with_a_reload(tmp_path: Path) -> None:
    second, taken = free_port(), socket.create_server(("127.0.0.1", 0))
    with taken:
        async with service(tmp_path, SINK) as running:
            first = f"smtp://127.0.0.1:{running.port}"
            running.write({**SINK, "listen": [first, f"smtp://127.0.0.1:{second}"]})
            await running.reload()
            reader, writer = await asyncio.open_connection("127.0.0.1", second)
            assert (await reader.readline()).startswith(b"220")
            writer.close()
            running.write({**SINK, "listen": [first, f"smtp://127.0.0.1:{taken.getsockname()[1]}"]})
            await running.reload()
            assert "Address already in use" in str(running.all("reload_failed")[0]["error"])
            running.write({**SINK, "listen": [f"smtp://127.0.0.1:{second}"]})
            await running.reload()
            await running.record("generation_ended", 2)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", running.port)
            running.write({**SINK, "listen": [f"smtp://0.0.0.0:{second}", f"smtp://127.0.0.1:{second}"]})
            await running.reload()
            assert len(running.all("reload_failed")) == 1, running.lines[-3:]


async def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, workers=2, admin="off") as running:
        first, second = running.workers()
        client = await running.client()
        await client.say("NOOP")
        os.kill(first, signal.SIGKILL)
        died = await running.record("worker_died")
        assert (died["pid"], died["how"]) == (first, "killed by signal SIGKILL")
        os.kill(second, signal.SIGKILL)
        await running.record("worker_died", 2)
        assert await client.reader.read() == b""
        assert (await sent(await running.client())).startswith("250")  # it waited in the backlog
        assert not {first, second} & set(running.workers())


async def test_a_worker_whose_loop_stands_still_is_ended(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, admin="off") as running:
        (worker,) = running.workers()
        os.kill(worker, signal.SIGSTOP)
        died = await running.record("worker_died")
        assert died["pid"] == worker and "silent" in str(died["how"])
        assert (await sent(await running.client())).startswith("250")


async def test_a_generation_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """Its workers serve what they have, and a new generation accepts."""
    async with service(tmp_path, SINK) as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        os.kill(running.generations()[0], signal.SIGKILL)
        await running.until(lambda: any('"generation_died"' in line for line in running.lines))
        await running.until(lambda: bool(running.all("reload")))
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await client.say("DATA")).startswith("354")
        assert (await client.say("x\r\n.")).startswith("250")
        assert (await sent(await running.client())).startswith("250")


async def test_a_supervisor_that_is_killed_leaves_nobody_in_the_middle(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, drain="20s") as running:
        client = await running.client()
        family = [*running.generations(), *running.workers()]
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        running.process.kill()
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        client.writer.close()
        await running.ended()  # standard error is closed: nobody has it any more
        for pid in family:
            await gone(pid)


async def gone(pid: int) -> None:
    """The process has ended, or does so now (pidfd_open(2))."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(LIMIT):
            await asyncio.to_thread(select.select, [descriptor], [], [], LIMIT)
        assert not alive(pid)
    finally:
        os.close(descriptor)


async def refused(port: int) -> None:
    """Nobody listens any more."""
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                pass  # it was in the backlog in that moment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
async def test_a_stop_waits_for_transactions(tmp_path: Path, number: signal.Signals) -> None:
    async with service(tmp_path, SINK, workers=2) as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        running.signal(number)
        await refused(running.port)
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await client.say("DATA")).startswith("354")
        assert (await client.say("x\r\n.")).startswith("250")
        assert (await client.say("QUIT")).startswith("221")
        assert await running.ended() == 0
        assert sum(int(str(stop["sessions"])) for stop in running.all("stop")) >= 1
        assert not [stop for stop in running.all("stop") if stop["cut"]]


async def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, drain="10m") as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        running.signal(signal.SIGTERM)
        await refused(running.port)
        running.signal(signal.SIGTERM)
        assert (await client.reader.readline()).startswith(b"421 4.3.2")
        assert await running.ended() == 0
        assert int(str(running.all("stop")[-1]["cut"])) >= 1  # and whoever asked whether the port is closed


async def test_logs_are_opened_again(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    async with service(tmp_path, SINK, log={"file": str(log)}) as running:
        old = tmp_path / "gateway.log.1"
        log.rename(old)
        running.signal(signal.SIGUSR1)
        async with asyncio.timeout(LIMIT):
            while not log.exists() or '"session"' not in log.read_text():
                (await running.client()).writer.close()
        written = old.read_text()
        (await running.client()).writer.close()
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
        assert old.read_text() == written  # nobody holds it any more
        assert '"record":"stop"' in log.read_text()


async def test_the_embedded_server_survives_reloads(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        (before,) = children(running.process.pid, "gateway.sink")
        await running.reload()
        await running.record("generation_ended")
        assert children(running.process.pid, "gateway.sink") == [before]
        assert (await sent(await running.client())).startswith("250")


async def test_sockets_of_systemd_are_used(tmp_path: Path) -> None:
    """LISTEN_FDS: descriptor 3 is the listener (sd_listen_fds(3))."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        pipeline = {**SINK, "listen": [f"smtp://127.0.0.1:{port}"]}
        async with service(tmp_path, pipeline, command=with_socket(given), pass_fds=[given.fileno()]) as running:
            running.port = port
            assert (await sent(await running.client())).startswith("250")


async def notified(sock: socket.socket, word: str) -> str:
    """The next datagram that has the word."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(30):
        while True:
            text = (await loop.sock_recv(sock, 4096)).decode()
            if word in text:
                return text


async def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        async with service(tmp_path, SINK, environment=told) as running:
            await notified(manager, "READY=1")
            await notified(manager, "WATCHDOG=1")
            running.signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in await notified(manager, "RELOADING=1")
            await notified(manager, "READY=1")
            running.signal(signal.SIGTERM)
            await notified(manager, "STOPPING=1")
            assert await running.ended() == 0


async def test_the_pid_file_is_the_supervisor_s(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, "--pid-file", str(tmp_path / "pid")) as running:
        assert int((tmp_path / "pid").read_text()) == running.process.pid
        await running.reload()
        assert int((tmp_path / "pid").read_text()) == running.process.pid
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
    assert not (tmp_path / "pid").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
async def test_max_connections_hold_over_workers(tmp_path: Path) -> None:
    """Two workers, one place: the second client waits in the queue, wherever it landed."""
    pool = {"servers": ["embedded://mail"], "max_connections": 1, "queue_timeout": "200ms"}
    pipeline = {"stages": ["splice"], "upstreams": {"sink": pool}}
    async with service(tmp_path, pipeline, workers=2) as running:
        holders = [await running.client() for _ in range(6)]
        replies = await asyncio.gather(*(holder.say("MAIL FROM:<a@example.org>") for holder in holders))
        assert sorted(reply[:3] for reply in replies) == ["250", *["451"] * 5], replies


