"""`gateway ctl`, the admin API and the metrics of a running service: every command, over workers and generations."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import aiohttp
import pytest

from tests.fault.client import Client
from tests.fault.service import GATEWAY, LIMIT, Service, only, service
from tests.fault.upstream import Upstream
from tests.peers.process import free_port
from tests.peers.recording_auth_server import Answer, RecordingAuthServer
from tests.peers.recording_auth_server import Client as AuthClient

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, UVLOOP]

TIM = "AUTH PLAIN " + base64.b64encode(b"\0tim\0tanstaaf").decode()
SINK = {"stages": ["splice"], "upstreams": {"sink": {"servers": ["embedded://mail"]}}}

Row = dict[str, object]


def rows(found: object, name: str) -> list[Row]:
    """A list of an answer."""
    return cast("list[Row]", cast(Row, found)[name])


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask the service again until it is so."""
    async with asyncio.timeout(LIMIT):
        while not await holds():
            pass


async def sent(client: Client) -> str:
    """A message; the reply to its end."""
    for line, code in (("MAIL FROM:<a@example.org>", "250"), ("RCPT TO:<b@example.org>", "250"), ("DATA", "354")):
        assert (await client.say(line)).startswith(code)
    return await client.say("Subject: x\r\n\r\ntext\r\n.")


async def visit(running: Service, *lines: str) -> None:
    """A session to its end, with a message or these lines."""
    client = await running.client()
    if not lines:
        assert (await sent(client)).startswith("250")
    for line in lines:
        assert (await client.say(line))[0] in "23", line
    assert (await client.say("QUIT")).startswith("221")
    assert await client.reader.read() == b""
    client.writer.close()


async def visit_each(running: Service, *lines: str) -> None:
    """A session with each worker."""
    workers = await running.whole()
    for pid in workers:
        with only(pid, workers):
            await visit(running, *lines)


async def done(running: Service, *arguments: str) -> str:
    """What a command says that does what it is told."""
    status, said = await running.ctl(*arguments)
    assert status == 0, (arguments, said)
    return said


async def servers(running: Service) -> dict[str, Row]:
    """What /upstreams says of each, by URL."""
    status, text = await running.api("/upstreams")
    assert status == 200, text
    return {str(server["url"]): server for pool in rows(json.loads(text), "upstreams") for server in rows(pool, "servers")}


async def states(running: Service) -> dict[str, object]:
    """In which state how many workers see each server."""
    return {url: server["states"] for url, server in (await servers(running)).items()}


def total(samples: dict[str, float], name: str, *labels: str) -> float:
    """The sum of the series that have these labels."""
    return sum(n for sample, n in samples.items() if sample.startswith(f"{name}{{") and all(one in sample for one in labels))


async def test_sessions_of_all_generations(tmp_path: Path) -> None:
    """Status, sessions, one session, kill: of the newest generation and of two that drain; then a stop."""
    async with service(tmp_path, SINK, workers=2, drain="60s") as running:
        clients = []
        for number in range(3):
            if number:
                assert await done(running, "reload") == f"generation {number + 1} serves\n"
            client = await running.client()
            assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
            clients.append(client)

        found = cast(Row, await running.ask("status"))
        workers = rows(found["info"], "workers")
        assert {one["pid"] for one in workers} == {one["pid"] for one in rows(found["stats"], "workers")}
        assert {(one["generation"], one["state"]) for one in workers} == {
            (1, "draining"), (2, "draining"), (3, "serving"),
        }  # fmt: skip
        assert cast(Row, found["stats"])["sessions"] == 3
        said = await done(running, "status")
        assert "serving, generation 3" in said and "3 sessions: 3 transaction" in said, said

        found = cast(Row, await running.ask("sessions"))
        listed = rows(found, "sessions")
        assert [one["generation"] for one in listed] == [3, 2, 1] and found["missing"] == []
        ids = [str(one["id"]) for one in reversed(listed)]
        ports = [client.writer.get_extra_info("sockname")[1] for client in clients]
        assert [one["client"] for one in reversed(listed)] == [f"127.0.0.1:{port}" for port in ports]
        said = await done(running, "sessions", "--limit", "2")
        assert [one in said for one in ids] == [False, True, True] and "2 of 3 that match, 3 in all" in said
        assert await done(running, "sessions", "--client", "192.0.2.0/24") in ("no sessions\n0 of 0 that match, 3 in all\n")

        assert (await clients[0].say("DATA")).startswith("554")  # there is no recipient yet
        one = cast(Row, await running.ask("session", ids[0].lower()))
        assert (one["generation"], one["state"], one["helo"]) == (1, "transaction", "client.test")
        assert {(seen["stage"], seen["verdict"], seen["mode"]) for seen in rows(one, "verdicts")} == set()
        assert cast(Row, one["transaction"])["sender"] == "a@example.org"
        said = await done(running, "session", ids[0])
        assert ids[0] in said and "open message" in said, said

        assert await done(running, "kill", ids[0]) == f"{ids[0]}: ending\n"
        assert (await clients[0].reader.readline()).startswith(b"421")
        assert await clients[0].reader.read() == b""
        await running.until(lambda: any(record["session"] == ids[0] for record in running.all("session")))
        assert (await running.ctl("kill", ids[0])) == (1, f"gateway: no open session {ids[0]}\n")
        await running.record("generation_ended")
        assert (await running.ctl("session", ids[0]))[0] == 1  # with its process went what it knew
        assert await done(running, "kill", ids[2]) == f"{ids[2]}: ending\n"
        assert (await clients[2].reader.readline()).startswith(b"421")
        await running.until(lambda: any(record["session"] == ids[2] for record in running.all("session")))
        after = cast(Row, await running.ask("session", ids[2]))
        assert after["state"] == "ended"
        assert [(one["record"], one["reason"]) for one in rows(after, "log")][-1] == ("session", "killed")

        assert await done(running, "stop") == "stopping\n"
        assert (await clients[1].say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await clients[1].say("DATA")).startswith("354")
        assert (await clients[1].say("x\r\n.")).startswith("250")
        assert (await clients[1].say("QUIT")).startswith("221")
        assert await running.ended() == 0
    assert (await running.ctl("status"))[0] == 3


async def test_servers_are_steered_in_every_worker(tmp_path: Path) -> None:
    """Drained, weighed, and back: for both workers, for one that replaces another, and after a reload."""
    async with Upstream() as first, Upstream() as second:
        urls = [f"smtp://127.0.0.1:{one.port}" for one in (first, second)]
        pool = {**first.pool(health="off")["mta"], "servers": urls}  # type: ignore[dict-item]
        pipeline = {"stages": ["splice"], "upstreams": {"mta": pool}}
        async with service(tmp_path, pipeline, workers=2) as running:

            async def holds(drained: str, weight: int) -> None:
                """Now, with a new worker, and with a new generation."""
                for event in ("", "crash", "reload"):
                    if event == "crash":
                        os.kill((await running.whole())[1], signal.SIGKILL)
                        await running.record("worker_died", len(running.all("worker_died")) + 1)
                        await running.whole()
                    elif event == "reload":
                        await running.reload()
                    found = await servers(running)
                    assert found[urls[0]]["states"] == {drained: 2}, (event, found)
                    assert found[urls[1]]["weight"] == weight and found[urls[1]]["configured_weight"] == 1, (event, found)
                    before = [one.connections for one in (first, second)]
                    for _ in range(2):
                        await visit_each(running)
                    met = [one.connections - old for one, old in zip((first, second), before, strict=True)]
                    assert (met[0] == 0) is (drained == "draining") and sum(met) == 4, (event, met)

            place = urls[0].removeprefix("smtp://")
            assert await done(running, "upstream", f"mta/{place}", "drain") == f"mta/{urls[0]}: drain\n"
            assert await done(running, "upstream", f"mta/{urls[1]}", "weight", "7") == f"mta/{urls[1]}: weight 7\n"
            await holds("draining", 7)
            assert "draining" in await done(running, "upstreams")
            await done(running, "upstream", f"mta/{place}", "ready")
            await done(running, "upstream", f"mta/{urls[1]}", "weight", "1")
            await holds("up", 1)
            for wrong, said in (("mta/192.0.2.1", "no server 192.0.2.1 in mta"), ("mx/a", "no pool named mx; there are")):
                status, text = await running.ctl("upstream", wrong, "drain")
                assert status == 1 and said in text, text


async def test_what_stages_keep(tmp_path: Path) -> None:
    """Limits, remembered logins, bans."""
    async with Upstream() as upstream, RecordingAuthServer() as auth:
        fields = f"Auth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: {upstream.port}"
        welcome = auth.default = AuthClient([Answer(f"HTTP/1.0 200 OK\r\n{fields}\r\n\r\n".encode())])
        pipeline = {
            "allow_plaintext_auth": True,
            "stages": [
                "ban",
                {"rate_limit": {"count": "messages", "limit": "3/hour", "per": "client.address"}},
                {"auth_http": {"url": f"http://127.0.0.1:{auth.port}/auth", "cache": "1m"}},
                {"splice": {"handoff": "never"}},
            ],
            "upstreams": upstream.pool(health="off"),
        }
        async with service(tmp_path, pipeline, workers=2) as running:
            for _ in range(2):
                await visit_each(running, TIM)
            assert len(welcome.requests) == 2  # each worker remembers
            assert await done(running, "auth-cache", "clear", "nobody") == "0 forgotten\n"
            assert await done(running, "auth-cache", "clear", "tim") == "2 forgotten\n"
            await visit_each(running, TIM)
            assert len(welcome.requests) == 4
            assert await done(running, "auth-cache", "clear") == "2 forgotten\n"

            client = await running.client()
            assert (await client.say(TIM)).startswith("235")
            for reply in ("250", "250", "250", "450"):
                assert (await client.say("MAIL FROM:<a@example.org>")).startswith(reply)
                await client.say("RSET")
            client.writer.close()
            counted = [one for one in rows(await running.ask("limits", "show"), "limits") if one["kind"] == "rate"]
            (key,) = {str(one["key"]) for one in counted if "127.0.0.1" in str(one["key"])}
            assert key in await done(running, "limits", "show", key[:8])
            assert await done(running, "limits", "show", "no such thing") == "nothing is counted\n"
            assert await done(running, "limits", "clear", key) == f"{key}: cleared\n"
            assert await running.ctl("limits", "clear", key) == (1, f"gateway: nothing is counted for {key}\n")
            await visit_each(running, TIM, "MAIL FROM:<a@example.org>")

            async def greeting() -> str:
                """Of one who comes from another address."""
                stranger = Client(
                    *await asyncio.open_connection("127.0.0.1", running.port, local_addr=("127.0.0.7", 0))
                )
                said = await stranger.reply()
                stranger.writer.close()
                return said

            assert (await greeting()).startswith("220")
            assert "127.0.0.7 is banned until" in await done(
                running, "bans", "add", "127.0.0.7", "--for", "5m", "--reason", "noisy"
            )
            workers = await running.whole()
            for pid in workers:
                with only(pid, workers):
                    assert (await greeting()).startswith("421")
            (ban,) = rows(await running.ask("bans"), "bans")
            assert (ban["network"], ban["by"], ban["reason"]) == ("127.0.0.7", "ctl", "noisy")
            await running.reload()
            assert (await greeting()).startswith("421")
            assert await done(running, "bans", "remove", "127.0.0.7") == "127.0.0.7: not banned any more\n"
            assert (await greeting()).startswith("220")
            assert (await running.ctl("bans", "remove", "127.0.0.7")) == (1, "gateway: 127.0.0.7 is not banned\n")
            assert await done(running, "bans", "list") == "nobody is banned\n"


async def test_reload_and_log_level(tmp_path: Path) -> None:
    """What is wrong is said to who asked; the level holds for workers to come."""
    async with service(tmp_path, SINK, workers=2) as running:
        running.write({**SINK, "stages": ["splise"]}, workers=2)
        status, said = await running.ctl("reload")
        assert status == 1 and "stages[0].splise: unknown stage" in said and "did you mean 'splice'" in said, said
        assert "reason: reload failed" in await done(running, "status")
        running.write(SINK, workers=2)
        assert await done(running, "reload") == "generation 3 serves\n"
        assert "reason" not in await done(running, "status")

        await visit_each(running)
        await running.record("session", 2)
        assert await done(running, "log-level", "error") == "log level error\n"
        await visit_each(running)
        for number, pid in enumerate(await running.whole()):
            os.kill(pid, signal.SIGKILL)
            await running.record("worker_died", number + 1)
        await visit_each(running)
        await done(running, "reload")
        await visit_each(running)
        assert await done(running, "log-level", "default") == "log level default\n"
        await visit_each(running)
        await running.record("session", 4)
        samples = await running.metrics()
        assert total(samples, "gateway_sessions_total") == 10 and len(running.all("session")) == 4


async def test_the_admin_api_over_tcp(tmp_path: Path) -> None:
    """Only with the token; what is asked with GET changes nothing; readiness; a stop that does not wait."""
    admin, scraped, token = free_port(), free_port(), "a-long-and-secret-token"
    process = {"admin": {"listen": f"127.0.0.1:{admin}", "token": "${TOKEN}"}, "metrics": f"127.0.0.1:{scraped}"}
    pipeline = {**SINK, "stages": ["ban", "splice"]}
    environment = {"TOKEN": token, "GATEWAY_ADMIN_TOKEN": token}
    url = f"http://127.0.0.1:{admin}"
    async with (
        service(tmp_path, pipeline, environment=environment, workers=2, drain="60s", **process) as running,
        aiohttp.ClientSession() as http,
    ):

        async def asked(path: str, shown: str | None = token, method: str = "GET") -> tuple[int, str]:
            headers = {} if shown is None else {"Authorization": f"Bearer {shown}"}
            async with http.request(method, url + path, headers=headers) as response:
                return response.status, await response.text()

        for shown, expected in ((None, 401), ("", 403), ("wrong", 403), (token[:-1], 403), (token, 200)):
            for path in ("/ready", "/metrics", "/sessions"):
                assert (await asked(path, shown))[0] == expected, (shown, path)
        assert (await asked("/stop", None, "POST"))[0] == 401 and (await asked("/stop", "x", "POST"))[0] == 403
        async with http.get(f"http://127.0.0.1:{scraped}/metrics") as response:
            assert response.status == 200 and "gateway_workers 2\n" in await response.text()
        for path in ("/ready", "/sessions", "/stop"):
            async with http.get(f"http://127.0.0.1:{scraped}{path}") as response:
                assert response.status == 404

        client = await running.client()
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        before = await everything(asked)
        pool = json.loads(before["/upstreams"])["upstreams"][0]
        paths = [
            "/ready", "/live", "/info", "/stats", "/certs", "/metrics", "/reload", "/drain", "/stop?now=true", "/log-level",
            f"/sessions/{json.loads(before['/sessions'])['sessions'][0]['id']}", f"/sessions/{'x' * 3000}",
            f"/sessions/{json.loads(before['/sessions'])['sessions'][0]['id']}/kill", "/limits/clear?key=x",
            f"/upstreams/{pool['name']}/{pool['servers'][0]['url']}?action=drain", "/auth-cache/clear", "/bans?network=::1",
            "/limits?limit=x", "/sessions?limit=99999999", "/sessions?x=y", "/sessions?client=%00", "/%2e%2e/stop", "//stop",
        ]  # fmt: skip
        for path in [*before, *paths]:
            status, text = await asked(path)
            assert status in (200, 400, 404, 405), (path, status, text)
        assert await everything(asked) == before

        assert json.loads((await asked("/ready"))[1]) == {"ready": True, "state": "serving", "generation": 1, "reason": ""}
        reloading = asyncio.create_task(asked("/reload", method="POST"))
        seen = set()
        while not reloading.done():
            status, text = await asked("/ready")
            seen.add((status, json.loads(text)["state"]))
        assert await reloading == (200, '{"generation": 2}')
        assert seen <= {(200, "serving"), (200, "reloading")} and (200, "reloading") in seen

        process_ = await asyncio.create_subprocess_exec(
            *GATEWAY, "ctl", "--url", url, "stop", "--now",
            env={**os.environ, "GATEWAY_ADMIN_TOKEN": token}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert (await process_.communicate())[0] == b"stopping\n" and process_.returncode == 0
        assert (await client.reader.readline()).startswith(b"421 4.3.2")
        assert await running.ended() == 0
        assert not [line for line in running.lines if token in line]


async def everything(asked: Callable[[str], Awaitable[tuple[int, str]]]) -> dict[str, str]:
    """What can be steered, as the API shows it, without what time alone changes."""
    found = {}
    for path in ("/generations", "/pipelines", "/listeners", "/upstreams", "/sessions", "/limits", "/bans"):
        status, text = await asked(path)
        assert status == 200, (path, text)
        lasting = json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in ("seconds", "since")})
        found[path] = json.dumps(lasting)
    return found


async def test_readiness_while_it_drains(tmp_path: Path) -> None:
    """An operator sees what a stop waits for, ends it, or loses patience."""
    async with service(tmp_path, SINK, drain="60s") as running:
        clients = [await running.client() for _ in range(2)]
        for client in clients:
            assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
        assert await done(running, "stop") == "stopping\n"
        with pytest.raises(ConnectionRefusedError):
            while True:
                (await asyncio.open_connection("127.0.0.1", running.port))[1].close()
        status, text = await running.api("/ready")
        assert (status, json.loads(text)["state"]) == (503, "draining")
        listed = rows(await running.ask("sessions"), "sessions")
        assert len(listed) == 2
        await done(running, "kill", str(listed[0]["id"]))
        assert await done(running, "stop", "--now") == "stopping\n"
        for client in clients:
            assert (await client.reader.readline()).startswith(b"421")
        assert await running.ended() == 0


async def test_active_checks_are_seen(tmp_path: Path) -> None:
    """One worker asks, both know: down, slowly back, up; in ctl, in the metrics, in the log."""
    async with Upstream() as first, Upstream() as second:
        urls = [f"smtp://127.0.0.1:{one.port}" for one in (first, second)]
        health = {"interval": "100ms", "fall": 2, "rise": 2, "slow_start": "3s"}
        pool = {"servers": urls, "health": health}
        async with service(tmp_path, {"stages": ["splice"], "upstreams": {"mta": pool}}, workers=2) as running:
            server = f'server="{urls[0]}"'
            assert await states(running) == {url: {"up": 2} for url in urls}
            assert total(await running.metrics(), "gateway_upstream_up") == 2
            await first.close()
            down = await running.record("upstream_down")
            assert (down["pool"], down["server"]) == ("mta", urls[0])
            await until(lambda: _are(running, urls[0], {"down": 2}))
            said = await done(running, "upstreams")
            assert any(urls[0] in line and " down " in line for line in said.splitlines()), said
            samples = await running.metrics()
            assert total(samples, "gateway_upstream_up", server) == 0 and total(samples, "gateway_upstream_up") == 1
            assert total(samples, "gateway_upstream_checks_total", server, 'result="failed"') >= 2
            await visit_each(running)
            assert total(await running.metrics(), "gateway_upstream_connections_total", server) == 0
            async with first:
                assert (await running.record("upstream_up"))["server"] == urls[0]
                await until(lambda: _are(running, urls[0], {"slow": 2}))
                assert 0 < cast(float, (await servers(running))[urls[0]]["share"]) < 1
                assert total(await running.metrics(), "gateway_upstream_up", server) == 1
                await until(lambda: _are(running, urls[0], {"up": 2}))


async def _are(running: Service, url: str, wanted: Row) -> bool:
    return (await states(running))[url] == wanted


async def test_ejections_are_seen(tmp_path: Path) -> None:
    """What a session met in one worker holds for the other; a session brings the server back, slowly."""
    async with Upstream() as first, Upstream() as second:
        urls = [f"smtp://127.0.0.1:{one.port}" for one in (first, second)]
        assume = {"assume": first.ehlo}
        pool = {"servers": urls, "capabilities": assume, "health": {"interval": "1h", "slow_start": "3s"}}
        async with service(tmp_path, {"stages": ["splice"], "upstreams": {"mta": pool}}, workers=2) as running:
            server = f'server="{urls[0]}"'
            workers = await running.whole()
            await first.close()
            with only(workers[1], workers):
                while not total(await running.metrics(), "gateway_upstream_ejections_total", server):
                    await visit(running)

            async def ejected() -> bool:
                await visit(running)  # until it is away for long enough to be seen
                return (await states(running))[urls[0]] == {"ejected": 2}

            await until(ejected)
            said = await done(running, "upstreams")
            assert any(urls[0] in line and "ejected" in line and "refused" in line for line in said.splitlines()), said
            assert total(await running.metrics(), "gateway_upstream_up", server) == 0

            async def slow() -> bool:
                await visit(running)
                return "slow" in cast(Row, (await states(running))[urls[0]])

            async with first:
                await until(slow)
                await until(lambda: _are(running, urls[0], {"up": 2}))
                before = first.connections
                for _ in range(2):
                    await visit_each(running)
                assert first.connections == before + 2
                assert total(await running.metrics(), "gateway_upstream_up") == 2


async def test_counters_are_exact(tmp_path: Path) -> None:
    """Over workers that are killed with sessions in them, and over reloads."""
    async with service(tmp_path, SINK, workers=2) as running:
        made = cut = 0
        for event in ("crash", "reload", "crash", "reload"):
            for _ in range(10):
                await visit(running)
            made += 10
            if event == "crash":
                for number in range(2):
                    workers = await running.whole()
                    pid = workers[number]
                    with only(pid, workers):
                        client = await running.client()
                    os.kill(pid, signal.SIGKILL)
                    await running.record("worker_died", cut + 1)
                    assert await client.rest() == b""
                    cut += 1
                    client.writer.close()
            else:
                await running.reload()
        await visit_each(running)
        made += 2
        await running.record("generation_ended", 2)

        async def complete() -> bool:
            return total(await running.metrics(), "gateway_sessions_total") >= made

        await until(complete)
        samples = await running.metrics()
        assert total(samples, "gateway_sessions_total") == total(samples, "gateway_sessions_total", 'reason="quit"') == made
        assert total(samples, "gateway_sessions_started_total") == made + cut
        assert total(samples, "gateway_transactions_total", 'reply="2xx"') == made
        assert samples['gateway_session_seconds_count{pipeline="pipeline",protocol="smtp"}'] == made
        assert len(list((tmp_path / "mail" / "new").iterdir())) == made
        assert total(samples, "gateway_open_sessions") == 0 and samples["gateway_workers"] == 2
        assert total(samples, "gateway_worker_restarts_total") == cut == 4
        assert samples["gateway_generation"] == 3 and total(samples, "gateway_reloads_total", 'result="done"') == 2
