"""The processes of a service in odd moments: signals while it starts, what they inherit, what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.fault.client import Client
from tests.fault.service import GATEWAY, LIMIT, Service, children, service, with_socket, write
from tests.peers.process import free_port

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, UVLOOP]

SINK: dict[str, object] = {"stages": ["splice"], "upstreams": {"sink": {"servers": ["embedded://mail"]}}}


def descriptors(pid: int) -> list[str]:
    """What the process has open, without names and numbers that differ from one to the next."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry).partition(":")[0]
            found.append(str(Path(target).parent) if "/owners/" in target else target)
    return sorted(found)


def sockets(pid: int) -> set[str]:
    """The sockets that the process has open, by their inodes; without the three that the test itself has the ends of."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if int(entry.name) < 3:
            continue
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry)
            if target.startswith("socket:"):
                found.add(target)
    return found


async def started(folder: Path) -> asyncio.subprocess.Process:
    """`gateway run`, not yet ready."""
    path = write(folder, free_port(), SINK)
    return await asyncio.create_subprocess_exec(
        *GATEWAY, "run", str(path), cwd=folder, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )


async def generation_of(pid: int) -> int:
    """Its first generation, as soon as it is there; it is not ready for long then."""
    async with asyncio.timeout(LIMIT):
        while not (found := children(pid, "gateway.service.generation")):
            await asyncio.sleep(0)
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_while_it_starts(tmp_path: Path, number: signal.Signals) -> None:
    """Nothing is waited for that nobody wants any more."""
    process = await started(tmp_path)
    generation = await generation_of(process.pid)
    os.kill(generation, signal.SIGSTOP)  # it would not get ready by itself
    process.send_signal(number)
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        os.kill(generation, signal.SIGCONT)
    _, said = await asyncio.wait_for(process.communicate(), LIMIT)
    assert process.returncode == 0 and b"gateway: ready" not in said and b"Traceback" not in said, said


async def test_a_reload_while_it_starts(tmp_path: Path) -> None:
    """SIGHUP waits until the first generation serves: the files may have changed after it read them."""
    process = await started(tmp_path)
    await generation_of(process.pid)
    process.send_signal(signal.SIGHUP)
    running = Service(tmp_path, process, 0)
    await running.until(lambda: "gateway: ready" in running.lines)
    assert (await running.record("reload"))["generation"] == 2
    await running.record("generation_ended")
    running.signal(signal.SIGTERM)
    assert await running.ended() == 0


async def test_reloads_in_a_row_end_with_the_last_configuration(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        for name in ("one", "two", "three"):
            running.write({**SINK, "hostname": f"{name}.example.org"})
            running.signal(signal.SIGHUP)
        await running.record("reload")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        while not (await reader.readline()).startswith(b"220 three.example.org"):
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.close()
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_a_stop_during_a_reload(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        running.signal(signal.SIGHUP)
        async with asyncio.timeout(LIMIT):
            while len(running.generations()) < 2:
                await asyncio.sleep(0)
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
        assert not running.all("reload_failed")


async def test_a_first_start_that_fails_says_what_check_says(tmp_path: Path) -> None:
    """Exit status 2 and the same text; sockets, files and processes are gone."""
    path = write(tmp_path, free_port(), {**SINK, "stages": ["splise"]})
    found = [subprocess.run([*GATEWAY, word, str(path)], capture_output=True, text=True, cwd=tmp_path) for word in
             ("check", "run")]  # fmt: skip
    assert found[0].returncode == found[1].returncode == 2
    assert found[0].stderr == found[1].stderr
    assert not (tmp_path / "admin.sock").exists()


async def test_workers_of_the_command_line_need_a_store_that_they_share(tmp_path: Path) -> None:
    path = write(tmp_path, free_port(), SINK, store="memory")
    done = subprocess.run([*GATEWAY, "run", "--workers", "2", str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "gateway: store: 2 workers do not see each other's memory; write `store: lmdb`\n",
    )  # fmt: skip


async def test_a_refused_reload_leaves_nothing(tmp_path: Path) -> None:
    """What was bound for a configuration that fails afterwards is given back."""
    second, unix = free_port(), tmp_path / "smtp.sock"
    async with service(tmp_path, SINK) as running:
        before = descriptors(running.process.pid)
        listen = [f"smtp://127.0.0.1:{running.port}", f"smtp://127.0.0.1:{second}", f"smtp+unix:{unix}"]
        other = {"sink": {"servers": ["embedded://other"]}}
        running.write({**SINK, "listen": listen, "stages": ["splise"], "upstreams": other}, metrics="127.0.0.1:0")
        await running.reload()
        assert running.all("reload_failed")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", second)
        assert not unix.exists()
        async with asyncio.timeout(LIMIT):
            while len(children(running.process.pid)) > 2:  # the generation that serves, the embedded server
                await asyncio.sleep(0)
            while len(descriptors(running.process.pid)) > len(before):  # it is yet to hear of their end
                await asyncio.sleep(0)
        assert descriptors(running.process.pid) == before


async def test_nothing_grows_with_reloads(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        await running.reload()
        await running.record("generation_ended")
        before = descriptors(running.process.pid), [descriptors(pid) for pid in running.workers()]
        for _ in range(5):
            await running.reload()
        await running.record("generation_ended", 6)
        async with asyncio.timeout(LIMIT):
            while len(running.generations()) > 1:
                await asyncio.sleep(0)
        assert (descriptors(running.process.pid), [descriptors(pid) for pid in running.workers()]) == before


async def test_who_has_which_socket(tmp_path: Path) -> None:
    """A worker has the listeners, not the admin API's socket, nor the ends of others; an embedded server has none."""
    async with service(tmp_path, SINK, workers=2) as running:
        (embedded,) = children(running.process.pid, "gateway.sink")
        first, second, admin = running.workers()
        held = sockets(running.process.pid)
        assert not sockets(embedded) & held
        assert len(sockets(first) & sockets(second) & held) == 1  # the listener
        assert not sockets(first) & sockets(admin)
        (generation,) = running.generations()
        assert sockets(generation) & sockets(first) == sockets(first) & held
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in (generation, first, second, admin)]
        assert names == ["gateway:gen 1", "gateway:work 0", "gateway:work 1", "gateway:admin"]
        assert b"{" not in Path(f"/proc/{generation}/cmdline").read_bytes()


async def test_rows_and_zombies_of_killed_generations(tmp_path: Path) -> None:
    """Their workers serve on, without a parent of their own; afterwards nothing is left of them."""
    async with service(tmp_path, SINK) as running:
        for count in (1, 2):
            client = await running.client()
            workers = running.workers()
            assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
            os.kill(running.generations()[0], signal.SIGKILL)
            await running.record("reload", count)
            assert set(workers) & set(children(running.process.pid))  # one has a session; the supervisor has it
            assert (await client.say("RSET")).startswith("250")
            assert (await client.say("QUIT")).startswith("221")
            async with asyncio.timeout(LIMIT):
                while any(Path(f"/proc/{pid}").exists() for pid in workers):
                    await asyncio.sleep(0)
        status, said = await running.ctl("--json", "status")
        assert status == 0, said


async def test_a_stop_waits_for_workers_without_a_generation(tmp_path: Path) -> None:
    async with service(tmp_path, SINK) as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        os.kill(running.generations()[0], signal.SIGKILL)
        await running.record("reload")
        running.signal(signal.SIGTERM)
        await running.record("stop")
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await client.say("DATA")).startswith("354")
        assert (await client.say("x\r\n.")).startswith("250")
        assert (await client.say("QUIT")).startswith("221")
        assert await running.ended() == 0


async def test_a_generation_that_stands_still_is_killed_at_a_stop(tmp_path: Path) -> None:
    """It cannot be asked; the second signal is the end of patience."""
    async with service(tmp_path, SINK, drain="1s") as running:
        (generation,) = running.generations()
        os.kill(generation, signal.SIGSTOP)
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
        assert not Path(f"/proc/{generation}").exists()


async def test_an_embedded_server_that_ends_comes_back(tmp_path: Path) -> None:
    """At its old address, which the workers know."""
    async with service(tmp_path, SINK) as running:
        for number in (signal.SIGKILL, signal.SIGTERM):  # with its socket left behind; with its folder removed
            (before,) = children(running.process.pid, "gateway.sink")
            os.kill(before, number)
            async with asyncio.timeout(LIMIT):
                while (found := children(running.process.pid, "gateway.sink")) in ([before], []):
                    await asyncio.sleep(0)
                assert len(found) == 1
                while not (await answered(running)).startswith("250"):
                    pass


async def answered(running: Service) -> str:
    """The reply to MAIL of a new client."""
    client = await running.client()
    try:
        return await client.say("MAIL FROM:<a@example.org>")
    finally:
        client.writer.close()


async def test_folders_of_embedded_servers_go_with_the_service(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a unix socket's path must be short
        async with service(tmp_path, SINK, environment={"TMPDIR": str(temporary)}) as running:
            assert list(temporary.glob("gateway-sink-*"))
            (embedded,) = children(running.process.pid, "gateway.sink")
            running.signal(number)
            await running.ended()
            async with asyncio.timeout(LIMIT):
                while Path(f"/proc/{embedded}").exists():
                    await asyncio.sleep(0)
            assert not list(temporary.glob("gateway-sink-*"))
        temporary.rmdir()


async def test_an_upstream_stays_drained(tmp_path: Path) -> None:
    """What an administrator decided holds in a worker that replaces another, and over reloads."""

    async def servers() -> list[dict[str, object]]:
        found = await running.ask("upstreams")
        assert isinstance(found, dict)
        return [server for pool in found["upstreams"] for server in pool["servers"]]

    async def state() -> set[object]:
        return {server["state"] for server in await servers()}

    async with service(tmp_path, SINK, workers=2) as running:
        url = (await servers())[0]["url"]
        status, said = await running.ctl("upstream", f"sink/{url}", "drain")
        assert status == 0, said
        assert await state() == {"draining"}
        os.kill(running.workers()[0], signal.SIGKILL)
        await running.record("worker_died")
        await running.whole()
        assert await state() == {"draining"}
        await running.reload()
        assert await state() == {"draining"}


async def test_options_of_a_listener_change_with_a_reload(tmp_path: Path) -> None:
    def options(**options: object) -> dict[str, object]:
        return {**SINK, "listen": [{"url": f"smtp://127.0.0.1:{running.port}", **options}]}

    async with service(tmp_path, SINK) as running:
        (line,) = listening(running.port)
        assert line["backlog"] == 511
        running.write(options(backlog=17))
        await running.reload()
        assert [line["backlog"] for line in listening(running.port)] == [17]


def listening(port: int) -> list[dict[str, int]]:
    """The listening sockets of the port, as ss(8) shows them."""
    said = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return [{"backlog": int(line.split()[2])} for line in said.splitlines()]


async def test_a_unix_listener_goes_and_comes_back(tmp_path: Path) -> None:
    """While a session of the old one is open; its file is not removed by whoever ends later."""
    unix = tmp_path / "smtp.sock"

    async def greeted() -> Client:
        client = Client(*await asyncio.open_unix_connection(str(unix)))
        await client.hello()
        return client

    async with service(tmp_path, SINK) as running:
        tcp = f"smtp://127.0.0.1:{running.port}"
        both = {**SINK, "listen": [tcp, f"smtp+unix:{unix}"]}
        running.write(both)
        await running.reload()
        client = await greeted()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        running.write(SINK)
        await running.reload()
        assert not unix.exists()
        running.write(both)
        await running.reload()
        (await greeted()).writer.close()
        assert (await client.say("QUIT")).startswith("221")
        await running.record("generation_ended", 3)
        assert stat.S_ISSOCK(unix.stat().st_mode)
        (await greeted()).writer.close()


async def test_wildcards_and_addresses_come_and_go(tmp_path: Path) -> None:
    """Every way from one set of addresses of a port to another, with IPv6."""
    hosts = ["127.0.0.1", "0.0.0.0", "[::1]"] if socket.has_dualstack_ipv6() else ["127.0.0.1", "0.0.0.0"]
    async with service(tmp_path, SINK) as running:
        for wanted in ([0, 1], [1], [1, 0], [0], [1, 0, 2][: len(hosts)], [0, 2][: len(hosts) - 1], [0]):
            listen = [f"smtp://{hosts[index]}:{running.port}" for index in wanted]
            running.write({**SINK, "listen": listen})
            await running.reload()
            assert not running.all("reload_failed"), running.lines[-3:]
            with contextlib.suppress(ConnectionResetError):  # a socket that is not wanted any more was just closed
                (await running.client()).writer.close()
            (await running.client()).writer.close()
        running.write({**SINK, "listen": [f"smtp://localhost:{running.port}"]})  # another name for the same
        await running.reload()
        (await running.client()).writer.close()


async def test_a_socket_of_systemd_may_be_left_out_for_a_while(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        pipeline = {**SINK, "listen": [f"smtp://127.0.0.1:{port}"]}
        async with service(tmp_path, pipeline, command=with_socket(given), pass_fds=[given.fileno()]) as running:
            running.write(SINK)
            await running.reload()
            running.write(pipeline)
            await running.reload()
            assert not running.all("reload_failed"), running.lines[-3:]
            running.port = port
            (await running.client()).writer.close()


async def test_clients_in_the_backlog_are_not_reset_at_a_stop(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, admin="off") as running:
        (worker,) = running.workers()
        os.kill(worker, signal.SIGSTOP)
        waiting = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(20)]
        running.signal(signal.SIGTERM)
        async with asyncio.timeout(LIMIT):
            while sockets(running.generations()[0]) & sockets(worker):  # it has closed its copy: the message is sent
                await asyncio.sleep(0)
        os.kill(worker, signal.SIGCONT)
        said = await asyncio.gather(*(reader.readline() for reader, _ in waiting))
        assert all(line[:3] in (b"220", b"421") for line in said), said
        for _, writer in waiting:
            writer.close()
        assert await running.ended() == 0


async def test_blocked_signals_of_whoever_starts_it(tmp_path: Path) -> None:
    """A mask and ignored signals are inherited; the service needs its own."""
    program = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD});"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    async with service(tmp_path, SINK, command=[GATEWAY[0], "-c", program, *GATEWAY]) as running:
        (await running.client()).writer.close()
        await running.reload()
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_gauges_of_the_service(tmp_path: Path) -> None:
    async with service(tmp_path, SINK, metrics=f"127.0.0.1:{(port := free_port())}") as running:
        await running.reload()
        await running.record("generation_ended")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        assert 'gateway_generations{state="serving"} 1' in text
        assert 'gateway_reloads_total{result="done"} 1' in text
        assert "gateway_start_timestamp_seconds 1" in text and "gateway_build_info{" in text


async def test_a_generation_that_is_told_to_end(tmp_path: Path) -> None:
    """By SIGTERM to itself: it goes on until another one accepts."""
    async with service(tmp_path, SINK) as running:
        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        os.kill(running.generations()[0], signal.SIGTERM)
        assert (await running.record("reload"))["generation"] == 2  # not first after its last session
        (await running.client()).writer.close()
        assert (await client.say("RSET")).startswith("250")
        assert (await client.say("QUIT")).startswith("221")
        await running.record("generation_ended")
        assert not running.all("generation_died")


async def test_buffers_larger_than_any(tmp_path: Path) -> None:
    """The kernel gives what it has; the reload does not end half-way."""
    async with service(tmp_path, SINK) as running:
        running.write({**SINK, "listen": [{"url": f"smtp://127.0.0.1:{running.port}", "rcvbuf": "4G", "sndbuf": "4G"}]})
        await running.reload()
        (await running.client()).writer.close()
        assert running.all("reload") and not running.all("internal_error")
