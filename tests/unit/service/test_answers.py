"""What a worker answers and does, over a running pipeline."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.frontend import conversation
from gateway.observe import logs
from gateway.service.answers import AnswerError, Answers
from gateway.service.worker import Worker
from gateway.testing.gateway import free_port, running

pytestmark = pytest.mark.anyio

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Upstream:
    """An SMTP server that answers everything with 250; the end of a message when `taken` is set."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.ended = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mta ESMTP\r\n")
        content = False
        while line := await reader.readline():
            if content and line != b".\r\n":
                continue
            if content:
                self.ended.set()
                await self.taken.wait()
            content = line == b"DATA\r\n"
            writer.write(b"354 go on\r\n" if content else b"220-half" if line == b"HELP\r\n" else b"250 2.0.0 Ok\r\n")
        writer.close()


class Site:
    """A pipeline, its upstream, and what a worker with it answers."""

    def __init__(self, port: int, upstream: Upstream, worker: Worker) -> None:
        self.port, self.upstream, self.worker = port, upstream, worker
        self.answers = Answers(worker)
        self.clients: list[Client] = []

    async def ask(self, op: str, **args: Any) -> Any:
        found = await self.answers.answer(op, args)
        json.dumps(found)
        return found

    async def dialogue(self, *commands: str) -> Client:
        """A client that has said this, and read the answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append((reader, writer))  # or they are closed when nobody has them
        await line_of(reader)
        for command in commands:
            await say((reader, writer), command)
        return reader, writer

    async def only_session(self) -> dict[str, Any]:
        (row,) = (await self.ask("sessions"))["sessions"]
        assert isinstance(row, dict)
        return row


async def line_of(reader: asyncio.StreamReader) -> str:
    """The last line of a reply."""
    while (line := await reader.readline())[3:4] == b"-":
        pass
    return line.decode().rstrip("\r\n")


async def say(client: Client, command: str) -> str:
    client[1].write(command.encode() + b"\r\n")
    return await line_of(client[0])


@asynccontextmanager
async def site(*stages: object, handoff: str = "never", **more: object) -> AsyncIterator[Site]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    pool = {"servers": [upstream.url], "capabilities": {"assume": []}}
    pipeline: dict[str, object] = {
        "relay": "open",
        "stages": [*stages, {"splice": {"pool": "mta", "handoff": handoff}}],
        "upstreams": {"mta": pool},
        **more,
    }
    async with running(pipeline) as gateway:
        gateway.pipeline.plan.chain.measure("pipeline")
        worker = Worker([])
        worker.pipelines, worker.store = [gateway.pipeline], gateway.worker.store
        here = Site(gateway.port, upstream, worker)
        yield here
        for _, writer in here.clients:
            writer.close()
    server.close()


@pytest.fixture
def log(tmp_path: Path) -> Any:
    """The log so far."""
    path = tmp_path / "log"
    logs.configure("json", file=str(path))
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
    logs.close()


# -- sessions


async def test_sessions() -> None:
    async with site() as here:
        for name in ("one", "two", "three"):
            await here.dialogue(f"EHLO {name}")
        await here.dialogue("EHLO four", "MAIL FROM:<a@b.example>")
        found = await here.ask("sessions", limit=2)
        assert (found["total"], found["matched"]) == (4, 4)
        first, second = found["sessions"]
        assert (first["helo"], first["state"], second["helo"], second["state"]) == ("four", "transaction", "three", "command")
        assert first["client"].startswith("127.0.0.1:") and first["bytes_in"] > 0 and first["seconds"] >= 0
        for chosen, matched in (
            ({"client": "127.0.0.0/8"}, 4), ({"client": "127.0.0.2"}, 0), ({"client": "::/0"}, 0),
            ({"pipeline": first["pipeline"]}, 4), ({"pipeline": "other"}, 0), ({"user": "kim"}, 0), ({"limit": "0"}, 4),
        ):  # fmt: skip
            assert (await here.ask("sessions", **chosen))["matched"] == matched, chosen


async def test_one_session(tmp_path: Path, log: Any) -> None:
    users = tmp_path / "users"
    users.write_text("kim@b.example:{PLAIN}hunter2-hunter2\n")
    guard = {"auth_file": {"file": str(users), "required": False}}
    login = base64.b64encode(b"\0Kim@b.example\0hunter2-hunter2").decode()
    async with site(guard, allow_plaintext_auth=True) as here:
        client = await here.dialogue("EHLO client.test", f"AUTH PLAIN {login}", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>")
        row = await here.only_session()
        found = await here.ask("session", id=row["id"].lower())
        assert found["user"] == "Kim@b.example" and (await here.ask("sessions", user="KIM@b.example"))["matched"] == 1
        assert (found["facts"]["helo.name"], found["facts"]["mail.from"]) == ("client.test", "a@b.example")
        assert found["transaction"]["recipients"][0]["address"] == "c@d.example"
        verdicts = [{name: one[name] for name in ("stage", "phase", "verdict", "mode")} for one in found["verdicts"]]
        assert {"stage": "auth_file", "phase": "auth", "verdict": "authenticated", "mode": "enforce"} in verdicts
        assert "auth_file" in found["stage_ms"] and [one["record"] for one in found["log"]] == ["auth"]
        assert "hunter2" not in json.dumps(found) and login not in json.dumps(found)
        assert await say(client, "QUIT") == "221 2.0.0 Bye"
        await client[0].read()
        while here.worker.pipelines[0].tasks:
            await asyncio.wait(set(here.worker.pipelines[0].tasks))
        ended = await here.ask("session", id=row["id"])
        assert (ended["state"], ended["log"][-1]["record"]) == ("ended", "session")
        assert await here.ask("session", id="NOBODY") is None


# -- kill


def reasons(records: list[dict[str, Any]]) -> list[str]:
    return [record["reason"] for record in records if record["record"] == "session"]


GOODBYES = {
    "smtp": "421 4.3.2 session ended by the administrator",
    "imap": "* BYE [UNAVAILABLE] session ended by the administrator",
    "pop3": "-ERR [SYS/TEMP] session ended by the administrator",
}


@pytest.mark.parametrize("protocol", list(GOODBYES))
async def test_kill_says_goodbye(protocol: str, log: Any) -> None:
    port = free_port()
    pool = {"servers": [f"{protocol}://127.0.0.1:1"], "capabilities": {"assume": []}}
    more: dict[str, Any] = {"listen": [f"{protocol}://127.0.0.1:{port}"], "upstreams": {"mta": pool}}
    guards = [] if protocol == "smtp" else ["auth_relay"]
    async with site(*guards, handoff="auto" if guards else "never", allow_plaintext_auth=True, **more) as here:
        reader, _ = await here.dialogue()
        row = await here.only_session()
        assert row["state"] == ("command" if protocol == "smtp" else "login")
        assert await here.ask("kill", id=row["id"]) == {"id": row["id"], "state": "ending"}
        assert (await reader.read()).decode() == f"{GOODBYES[protocol]} ({row['id']})\r\n"
        assert await here.ask("kill", id="NOBODY") is None
    assert reasons(log()) == ["killed"]


async def test_kill_in_content(log: Any) -> None:
    """Nothing was promised yet: it ends at once, and the upstream never gets the end."""
    async with site() as here:
        client = await here.dialogue("EHLO c", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA")
        client[1].write(b"Subject: x\r\n\r\nfirst line\r\n")
        row = await here.only_session()
        await here.ask("kill", id=row["id"])
        assert (await line_of(client[0])).startswith("421 4.3.2 session ended")
        assert await client[0].read() == b"" and not here.upstream.ended.is_set()
    assert reasons(log()) == ["killed"]


async def test_kill_waits_for_the_answer_to_a_message(log: Any) -> None:
    async with site() as here:
        client = await here.dialogue("EHLO c", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA")
        client[1].write(b"Subject: x\r\n\r\n.\r\nNOOP\r\nNOOP\r\n")
        await here.upstream.ended.wait()
        row = await here.only_session()
        for _ in range(2):
            assert (await here.ask("kill", id=row["id"]))["state"] == "after its message"
        here.upstream.taken.set()
        assert (await line_of(client[0])).startswith("250 ")
        assert (await line_of(client[0])).startswith("421 4.3.2 session ended")
        assert await client[0].read() == b""
    assert reasons(log()) == ["killed"]


@pytest.mark.parametrize(("begun", "goodbye"), [("NOOP", True), ("HELP", False)])
async def test_kill_of_a_joined_session(monkeypatch: pytest.MonkeyPatch, log: Any, begun: str, goodbye: bool) -> None:
    """A goodbye behind a whole line of the upstream, none in the middle of one."""
    monkeypatch.setattr(conversation, "GOODBYE_QUIET", 0.0)
    monkeypatch.setattr(conversation, "KILL_SECONDS", 0.0)
    async with site(handoff="auto") as here:
        client = await here.dialogue("EHLO c", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>")
        client[1].write(begun.encode() + b"\r\n")
        await client[0].readexactly(len(b"220-half") if begun == "HELP" else len(b"250 2.0.0 Ok\r\n"))
        row = await here.only_session()
        assert row["state"] == "joined" and row["upstream"] == here.upstream.url
        assert (await here.ask("kill", id=row["id"]))["state"] == "ending"
        try:
            rest = await client[0].read()
        except ConnectionResetError:
            rest = b""
        assert rest.startswith(b"421 4.3.2 session ended by the administrator") is goodbye and bool(rest) is goodbye
    assert reasons(log()) == ["killed: goodbye" if goodbye else "killed"]


# -- upstreams


async def test_upstreams() -> None:
    pools = {
        "mta": {"servers": ["smtp://127.0.0.1:25", {"url": "smtp://[::1]:26", "weight": 2}], "capabilities": {"assume": []}},
        "two": {"servers": ["smtp://mx.example:25", "smtps://mx.example:465"], "capabilities": {"assume": []}},
    }
    async with site(upstreams=pools) as here:

        async def state(url: str) -> tuple[str, int]:
            servers = [server for pool in await here.ask("upstreams") for server in pool["servers"]]
            (one,) = [server for server in servers if server["url"] == url]
            return one["state"], one["weight"]

        for server in ("smtp://127.0.0.1:25", "127.0.0.1:25", "127.0.0.1"):
            done = await here.ask("upstream", pool="mta", server=server, action="drain")
            assert done["server"] == "smtp://127.0.0.1:25" and (await state(done["server"]))[0] == "draining"
            await here.ask("upstream", pool="mta", server=server, action="ready")
            assert await state(done["server"]) == ("up", 1)
        await here.ask("upstream", pool="mta", server="[::1]", action="weight", weight=7)
        assert await state("smtp://[::1]:26") == ("up", 7)
        for args, status, words in (
            ({"pool": "mx", "server": "a"}, 404, "no pool named mx; there are: mta, two"),
            ({"pool": "mta", "server": "a"}, 404, "there are: smtp://127.0.0.1:25, smtp://[::1]:26"),
            ({"pool": "mta", "server": "127.0.0.1", "pipeline": "x"}, 404, "no pool named mta"),
            ({"pool": "two", "server": "mx.example"}, 409, "smtp://mx.example:25, smtps://mx.example:465"),
            ({"pool": "two", "server": "127.0.0.1", "action": "stop"}, 400, "none of drain, ready, weight"),
            ({"pool": "mta", "server": "127.0.0.1", "action": "weight"}, 400, "weight is not a number"),
            ({"pool": "mta"}, 400, "server is missing"),
        ):
            with pytest.raises(AnswerError) as error:
                await here.ask("upstream", **{"action": "drain", **args})
            assert error.value.status == status and words in str(error.value), args


# -- what stages keep


async def test_limits() -> None:
    async with site({"rate_limit": {"limit": "2/1h", "count": "messages", "per": "client.address"}}) as here:
        await here.dialogue("EHLO c", "MAIL FROM:<a@b.example>")
        (entry,) = await here.ask("limits", prefix="rate:")
        assert (entry["kind"], entry["count"], entry["size"]) == ("rate", 1.0, 0) and entry["key"].endswith("127.0.0.1")
        assert await here.ask("limits", prefix="nothing:") == []
        assert await here.ask("limits_clear", key=entry["key"]) is True
        assert await here.ask("limits", prefix="rate:") == []
        assert await here.ask("limits_clear", key=entry["key"]) is False


async def test_bans() -> None:
    async with site({"ban": {"limit": "20/10m"}}) as here:
        assert await here.ask("bans") == []
        done = await here.ask("ban_add", network="127.0.0.1", seconds=60, reason="rude")
        assert done["network"] == "127.0.0.1" and len(done["pipelines"]) == 1
        await here.ask("ban_add", network="2001:db8::7/64")
        v4, v6 = await here.ask("bans")
        assert (v4["network"], v4["by"], v4["reason"], v4["stage"]) == ("127.0.0.1", "ctl", "rude", "ban")
        assert 0 < v4["seconds"] <= 60 and v6["network"] == "2001:db8::/64"
        assert await here.ask("ban_remove", network="127.0.0.1") == 1
        assert [ban["network"] for ban in await here.ask("bans")] == ["2001:db8::/64"]
        assert await here.ask("ban_remove", network="2001:db8::/64") == 1
        assert await here.ask("ban_remove", network="2001:db8::/64") == 0
        for network, words in (("mail.example", "neither an address"), ("10.0.0.0/8", "by /24, /32")):
            with pytest.raises(AnswerError, match=words):
                await here.ask("ban_add", network=network)
    async with site({"ban": {"limit": "20/10m", "exempt": ["127.0.0.0/8"]}}) as here:
        done = await here.ask("ban_add", network="127.0.0.1")
        assert done["exempt"] == done["pipelines"] and len(done["exempt"]) == 1
        assert (await here.ask("ban_add", network="192.0.2.1"))["exempt"] == []
    async with site() as here:
        with pytest.raises(AnswerError, match="409 no pipeline has the stage"):
            await here.ask("ban_add", network="127.0.0.1")


async def test_auth_cache(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("kim@b.example:{PLAIN}one\nlee@b.example:{PLAIN}two\n")
    guard = {"auth_file": {"file": str(users), "required": False, "cache": "60s"}}
    async with site(guard, allow_plaintext_auth=True) as here:
        for user, password in (("Kim@b.example", "one"), ("lee@b.example", "two")):
            login = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
            await here.dialogue("EHLO c", f"AUTH PLAIN {login}")
        assert await here.ask("auth_cache_clear", user="nobody") == 0
        assert await here.ask("auth_cache_clear", user="KIM@b.example") == 1
        assert await here.ask("auth_cache_clear") == 1
        assert await here.ask("auth_cache_clear") == 0


# -- the worker


async def test_log_level(log: Any) -> None:
    written = logs.get_logger("gateway.test")
    async with site() as here:
        for level, levels in (("error", {"error"}), ("debug", {"debug", "error"}), ("default", {"error"})):
            assert await here.ask("log_level", level=level) == {"level": level}
            before = len(log())
            written.debug("warning", text="x")
            written.error("warning", text="x")
            assert {record["level"] for record in log()[before:]} == levels, level
        with pytest.raises(AnswerError, match="400 level 'loud'"):
            await here.ask("log_level", level="loud")


async def test_descriptions(tls_files: tuple[Path, Path]) -> None:
    chain, key = tls_files
    port, secure = free_port(), free_port()
    more: Mapping[str, object] = {
        "listen": [f"smtp://127.0.0.1:{port}", f"smtps://127.0.0.1:{secure}"],
        "tls": {"certificates": [{"chain": str(chain), "key": str(key)}]},
    }
    async with site(**more) as here:  # type: ignore[arg-type]
        await here.dialogue("EHLO c")
        first, second = await here.ask("listeners")
        assert (first["tls"], first["sessions"], second["tls"], second["sessions"]) == ("starttls", 1, "implicit", 0)
        (pipeline,) = await here.ask("pipelines")
        assert pipeline["grade"] == "envelope" and pipeline["sessions"] == 1 and pipeline["stages"][-1]["id"] == "splice"
        (certificate,) = await here.ask("certs")
        assert certificate["chain"] == str(chain) and "gateway.test" in certificate["names"]
        assert certificate["listeners"] == [first["url"], second["url"]]
        assert certificate["not_before"] < certificate["not_after"]
        stats = await here.ask("stats")
        assert (stats["sessions"], stats["states"]) == (1, {"command": 1}) and stats["memory"] > 1 << 20


@pytest.mark.parametrize(
    ("op", "args", "words"),
    [
        ("nothing", {}, "404 no operation"),
        ("sessions", {"limit": -1}, "400 limit is not a number from 0"),
        ("sessions", {"limit": True}, "400 limit is not a number"),
        ("sessions", {"limit": "9" * 400}, "400 limit is not a number"),
        ("sessions", {"client": "x"}, "400 'x' is neither an address nor a network"),
        ("sessions", {"user": 5}, "400 user is not a text"),
        ("session", {}, "400 id is missing"),
        ("kill", {"id": ["x"]}, "400 id is not a text"),
    ],
)
async def test_bad_arguments(op: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(AnswerError, match=words):
        await Answers(Worker([])).answer(op, args)


async def test_no_store_yet() -> None:
    with pytest.raises(AnswerError, match="503 the worker is starting"):
        await Answers(Worker([])).answer("limits", {})
