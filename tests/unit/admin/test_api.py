"""The admin API over a service that the test makes up: statuses, joined answers, tokens."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from gateway.admin.api import application, metrics_application
from gateway.admin.asked import LARGEST_BODY
from gateway.observe import logs
from gateway.observe.counters import CounterMap
from tests.unit.admin.conftest import FakeHub, Served

pytestmark = pytest.mark.anyio

STATUS = {
    "pid": 7, "started": 1.0, "generation": 2, "state": "serving", "reason": "", "restarts": 0,
    "workers": [{"generation": 2, "worker": 0, "pid": 8, "started": 1.0, "state": "serving"}],
}  # fmt: skip


def session(id: str, seconds: float) -> dict[str, object]:
    return {"id": id, "pipeline": "mx", "seconds": seconds}


async def said(client: ClientSession, method: str, path: str, **more: object) -> tuple[int, dict[str, Any]]:
    async with client.request(method, path, **more) as response:  # type: ignore[arg-type]
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("state", "reason", "status"),
    [("serving", "", 200), ("reloading", "", 200), ("starting", "", 503), ("draining", "SIGTERM", 503)],
)
async def test_ready(hub: FakeHub, served: Served, state: str, reason: str, status: int) -> None:
    hub.answers["status"] = {**STATUS, "state": state, "reason": reason}
    async with served() as client:
        code, found = await said(client, "GET", "/ready")
    assert (code, found["ready"], found["state"]) == (status, status == 200, state)
    assert code == 200 or found["error"] == (f"{state}: {reason}" if reason else state)


async def test_not_ready_without_supervisor(hub: FakeHub, served: Served) -> None:
    hub.answers["status"] = "!the supervisor did not answer in time"
    async with served() as client:
        assert await said(client, "GET", "/ready") == (503, {"error": "the supervisor did not answer in time"})
        assert await said(client, "GET", "/live") == (200, {"live": True})
        assert hub.asked == [("status", {}, "supervisor")]


async def test_info(hub: FakeHub, served: Served) -> None:
    hub.answers["status"] = STATUS
    async with served() as client:
        code, found = await said(client, "GET", "/info")
    assert code == 200 and STATUS.items() <= found.items()
    assert re.match(r"\d+\.\d+", found["version"]) and re.match(r"3\.\d+", found["python"]) and found["seconds"] > 0


async def test_sessions_of_all_workers(hub: FakeHub, served: Served) -> None:
    hub.answers["sessions"] = {
        (2, 0): {"total": 5, "matched": 2, "sessions": [session("A", 1), session("C", 30)]},
        (2, 1): {"total": 1, "matched": 1, "sessions": [session("B", 20)]},
        (1, 0): "!worker 0 of generation 1 did not answer in time",
    }
    async with served() as client:
        code, found = await said(client, "GET", "/sessions?user=Kim&limit=2")
    assert code == 200
    assert (found["total"], found["matched"]) == (6, 3)
    assert [(row["id"], row["worker"], row["generation"]) for row in found["sessions"]] == [("A", 0, 2), ("B", 1, 2)]
    assert [(one["generation"], one["worker"]) for one in found["missing"]] == [(1, 0)]
    assert hub.asked == [("sessions", {"user": "Kim", "limit": "2"}, "workers")]


async def test_one_session(hub: FakeHub, served: Served) -> None:
    hub.answers["session"] = {(2, 0): None, (2, 1): {"id": "A"}, (1, 0): None}
    async with served() as client:
        assert await said(client, "GET", "/sessions/A") == (200, {"id": "A", "worker": 1, "generation": 2})
        hub.answers["session"] = None
        assert await said(client, "GET", "/sessions/B") == (
            404, {"error": "no session B is open or ended lately; the log may have it"}
        )


async def test_sums_over_workers(hub: FakeHub, served: Served) -> None:
    def server(state: str, active: int) -> dict[str, object]:
        return {"url": "smtp://a:25", "state": state, "active": active, "idle": 1, "total": 9}

    hub.answers["pipelines"] = {who: [{"name": "mx", "sessions": 3}] for who in hub.workers}
    hub.answers["listeners"] = {who: [{"pipeline": "mx", "url": "smtp://:25", "sessions": 2}] for who in hub.workers}
    hub.answers["upstreams"] = {
        who: [{"pipeline": "mx", "name": "mta", "waiting": 1, "servers": [server(state, 4)]}]
        for who, state in zip(hub.workers, ("up", "ejected", "down"), strict=True)
    }
    worker = {"pid": 1, "sessions": 2, "states": {"command": 2}, "pipelines": {"mx": 2}, "cpu": 0.5, "memory": 10,
              "descriptors": None}  # fmt: skip
    hub.answers["stats"] = dict.fromkeys(hub.workers, worker)
    counters = CounterMap.create(rows=2)
    for sample, value in (('gateway_a_total{x="1"}', 2), ('gateway_a_total{x="2"}', 3), ("gateway_b", 9)):
        counters.row(0).slot(sample).add(value)
    async with served(counters=counters) as client:
        # Rows are those of the newest generation; numbers of draining workers are not lost in /stats.
        assert (await said(client, "GET", "/pipelines"))[1] == {"pipelines": [{"name": "mx", "sessions": 6}]}
        assert (await said(client, "GET", "/listeners"))[1]["listeners"][0]["sessions"] == 4
        (pool,) = (await said(client, "GET", "/upstreams"))[1]["upstreams"]
        _, stats = await said(client, "GET", "/stats")
    assert (pool["waiting"], pool["servers"][0]["active"], pool["servers"][0]["idle"]) == (2, 8, 2)
    assert pool["servers"][0]["state"] == "up" and pool["servers"][0]["states"] == {"up": 1, "ejected": 1}
    assert (stats["sessions"], stats["cpu"], stats["memory"], stats["descriptors"]) == (6, 1.5, 30, 0)
    assert stats["pipelines"] == {"mx": 6} and len(stats["workers"]) == 3
    assert stats["counters"]["gateway_a_total"] == 5 and "gateway_b" not in stats["counters"]


async def test_numbers_while_every_worker_is_replaced(hub: FakeHub, served: Served) -> None:
    """Then of all times they are wanted."""
    counters = CounterMap.create(rows=2)
    counters.row(0).slot("gateway_a_total").add(7)
    hub.answers["stats"] = "!the worker ended"
    async with served(counters=counters) as client:
        status, stats = await said(client, "GET", "/stats")
    assert (status, stats["sessions"], stats["workers"], len(stats["missing"])) == (200, 0, [], 3)
    assert stats["counters"]["gateway_a_total"] == 7


async def test_certificates(hub: FakeHub, served: Served) -> None:
    now = time.time()
    hub.answers["certs"] = [{"chain": name, "not_after": now + days * 86_400 + 60} for name, days in (("b", 9), ("a", -2))]
    async with served() as client:
        _, found = await said(client, "GET", "/certs")
    assert [(row["chain"], row["days"]) for row in found["certificates"]] == [("a", -2), ("b", 9)]


@pytest.mark.parametrize(
    ("path", "op", "to"),
    [("/generations", "generations", "supervisor"), ("/limits?prefix=rate:", "limits", "one"), ("/bans", "bans", "one")],
)
async def test_lists(hub: FakeHub, served: Served, path: str, op: str, to: str) -> None:
    hub.answers[op] = [{"x": 1}]
    async with served() as client:
        assert await said(client, "GET", path) == (200, {op: [{"x": 1}]})
    assert hub.asked == [(op, {"prefix": "rate:"} if op == "limits" else {}, to)]


STEERING = [
    # method, path, body, operation, arguments, answers, status, what is answered
    ("POST", "/reload", None, "reload", {}, {"ok": True, "generation": 3, "error": ""}, 200, {"generation": 3}),
    ("POST", "/reload", None, "reload", {}, {"ok": False, "generation": 2, "error": "mx.yaml:3: x"}, 422,
     {"error": "mx.yaml:3: x", "generation": 2}),
    ("POST", "/drain", None, "drain", {}, {"ok": True}, 202, {"state": "draining"}),
    ("POST", "/stop", {"now": True}, "stop", {"now": True}, {"ok": True}, 202, {"state": "stopping"}),
    ("POST", "/stop", None, "stop", {"now": False}, {"ok": True}, 202, {"state": "stopping"}),
    ("POST", "/sessions/A/kill", None, "kill", {"id": "A"}, {"id": "A", "state": "ending"}, 200,
     {"id": "A", "state": "ending"}),
    ("POST", "/sessions/A/kill", None, "kill", {"id": "A"}, None, 404, {"error": "no open session A"}),
    ("POST", "/upstreams/mta/smtp%3A%2F%2F[::1]%3A25", {"action": "drain"}, "upstream",
     {"pool": "mta", "server": "smtp://[::1]:25", "action": "drain"}, {"server": "x"}, 200, {"server": "x", "missing": []}),
    ("POST", "/upstreams/mta/unix:/run/mta", {"action": "weight", "weight": 3}, "upstream",
     {"pool": "mta", "server": "unix:/run/mta", "action": "weight", "weight": 3}, "!409 which one?", 409,
     {"error": "which one?"}),
    ("POST", "/log-level", {"level": "debug"}, "log_level", {"level": "debug"}, {"level": "debug"}, 200,
     {"level": "debug", "missing": []}),
    ("POST", "/limits/clear", {"key": "k"}, "limits_clear", {"key": "k"}, {(2, 0): False, (2, 1): True, (1, 0): False},
     200, {"key": "k"}),
    ("POST", "/limits/clear", {"key": "k"}, "limits_clear", {"key": "k"}, False, 404, {"error": "nothing is counted for k"}),
    ("POST", "/auth-cache/clear", None, "auth_cache_clear", {}, 2, 200, {"cleared": 6}),
    ("POST", "/bans", {"network": "192.0.2.1", "seconds": 60}, "ban_add", {"network": "192.0.2.1", "seconds": 60},
     {"network": "192.0.2.1"}, 200, {"network": "192.0.2.1"}),
    ("DELETE", "/bans?network=2001:db8::/64", None, "ban_remove", {"network": "2001:db8::/64"},
     {(2, 0): 1, (2, 1): 0, (1, 0): 0}, 200, {"removed": 1}),
    ("DELETE", "/bans?network=192.0.2.0/24", None, "ban_remove", {"network": "192.0.2.0/24"}, 0, 404,
     {"error": "192.0.2.0/24 is not banned"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "op", "args", "answers", "status", "expected"), STEERING)
async def test_steering(
    hub: FakeHub, served: Served, method: str, path: str, body: object, op: str, args: object, answers: object,
    status: int, expected: object,
) -> None:
    hub.answers[op] = answers
    async with served() as client:
        # As curl -d sends it, too: nobody looks at the Content-Type.
        data = json.dumps(body).encode() if body is not None else None
        found = await said(client, method, path, data=data, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert found == (status, expected)
    to = "supervisor" if op in ("reload", "drain", "stop") else "workers"
    assert hub.asked == [(op, args, to)]


@pytest.mark.parametrize(
    ("method", "path", "data", "status", "error"),
    [
        ("GET", "/nothing", None, 404, "nothing is at /nothing"),
        ("GET", "/reload", None, 405, "/reload takes POST"),
        ("POST", "/bans", b"x", 400, "the body is not JSON"),
        ("POST", "/bans", b"[" * 9999, 400, "the body is not JSON"),
        ("POST", "/bans", b"[1]", 400, "the body is not a JSON object"),
        ("POST", "/bans", b'{"net": 1}', 400, "unknown argument 'net'; there are: network, reason, seconds"),
        ("POST", "/reload", b'{"now": true}', 400, "unknown argument 'now'; there are none"),
        ("POST", "/stop", b'{"now": 1}', 400, "now is neither true nor false"),
        ("POST", "/bans", b" " * (LARGEST_BODY + 1), 413, f"the body is longer than {LARGEST_BODY} octets"),
        ("GET", "/sessions?clinet=x", None, 400, "unknown argument 'clinet'; there are: client, limit, pipeline, user"),
        ("GET", "/sessions?limit=x", None, 400, "limit is not a number"),
        ("GET", "/metrics", None, 404, "nothing is at /metrics"),
    ],
)
async def test_errors(hub: FakeHub, served: Served, method: str, path: str, data: bytes | None, status: int, error: str) -> None:
    hub.answers["sessions"] = "!400 limit is not a number"
    async with served() as client:
        assert await said(client, method, path, data=data) == (status, {"error": error})
    assert not hub.asked or hub.asked[0][0] == "sessions"


async def test_what_silence_means(hub: FakeHub, served: Served) -> None:
    """A refusal in words counts more than a silence, the newest generation's most; without any answer it is 503."""
    hub.answers["upstreams"] = {(2, 0): "!late", (2, 1): "!409 no", (1, 0): "!404 old"}
    hub.answers["certs"] = "!late"
    async with served() as client:
        assert await said(client, "GET", "/upstreams") == (409, {"error": "no"})
        assert await said(client, "GET", "/certs") == (503, {"error": "late"})
        hub.workers = ()
        assert await said(client, "GET", "/certs") == (503, {"error": "no worker serves"})


async def test_a_fault_of_the_api_itself(hub: FakeHub, served: Served) -> None:
    hub.answers["status"] = {}
    async with served() as client:
        assert await said(client, "GET", "/info") == (500, {"error": "a fault of the gateway; its log says more"})


async def test_get_and_head_with_a_body_change_nothing(hub: FakeHub, served: Served) -> None:
    hub.answers["bans"] = []
    async with served() as client:
        assert await said(client, "GET", "/bans", data=b'{"network": "192.0.2.1"}') == (200, {"bans": []})
        async with client.head("/bans") as response:
            assert response.status == 200 and not await response.read()
    assert {op for op, _, _ in hub.asked} == {"bans"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Basic c2VjcmV0"}, 401),
        ({"Authorization": "Bearer wrong"}, 403),
        ({"Authorization": "Bearer s\xe9cret"}, 403),
        ({"Authorization": "bearer secret"}, 200),
        ({"Authorization": "Bearer secret", "Host": "192.0.2.1:9999"}, 200),
        ({"Authorization": "Bearer secret", "Host": "[::1]:9999"}, 200),
        ({"Authorization": "Bearer secret", "Host": "gw.example.org"}, 200),
        ({"Authorization": "Bearer secret", "Host": "evil.example:9999"}, 403),
        ({"Host": "evil.example"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/live", "/metrics", "/nowhere"])
async def test_token(hub: FakeHub, served: Served, headers: dict[str, str], status: int, path: str) -> None:
    counters = CounterMap.create(rows=2)
    async with served(token="secret", counters=counters) as client, client.get(path, headers=headers) as response:
        found = await response.read()
        assert response.status == (404 if status == 200 and path == "/nowhere" else status)
        assert "Access-Control-Allow-Origin" not in response.headers
        assert (response.headers.get("WWW-Authenticate") is not None) is (status == 401)
    assert b"secret" not in found


async def test_metrics(served: Served) -> None:
    counters = CounterMap.create(rows=2)
    counters.row(0).slot("gateway_workers").set(2)
    async with served(metrics_application(counters)) as client:
        async with client.get("/metrics") as response:
            assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert "\ngateway_workers 2\n" in await response.text()
        assert (await said(client, "GET", "/live"))[0] == 200
        for path in ("/info", "/sessions"):
            assert (await said(client, "GET", path))[0] == 404
        assert (await said(client, "POST", "/metrics"))[0] == 405


async def test_who_did_what_is_logged(hub: FakeHub, served: Served, tmp_path: Path) -> None:
    hub.answers["ban_add"] = {"network": "192.0.2.1"}
    path = tmp_path / "log"
    logs.configure("json", file=str(path))
    try:
        async with served() as client:
            await said(client, "GET", "/bans")
            await said(client, "POST", "/bans", data=b'{"network": "192.0.2.1"}')
    finally:
        logs.close()
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (record["record"], record["action"], record["args"], record["by"]) == (
        "admin", "ban", "network=192.0.2.1", f"uid {os.getuid()}",
    )  # fmt: skip


def test_routes_are_documented(hub: FakeHub) -> None:
    """docs/admin.md has every endpoint."""
    text = Path("docs/admin.md").read_text()
    documented = set(re.findall(r"^\| `(GET|POST|DELETE) (/[^`?]*)", text, re.MULTILINE))
    app = application(hub, CounterMap.create(rows=2), None)
    routes = {
        (route.method, re.sub(r":[^}]*", "", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert documented == routes
