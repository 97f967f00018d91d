"""The scripts played to one program: nginx with its file, or the gateway with that file imported.

Scripts run at the same time, for some wait for timers. The auth server and the upstream know whose requests they see:
each client has an address of its own, each script an upstream of its own. Scripts marked `alone` take turns.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.interop.gateway_process import GatewayProcess
from tests.interop.nginx_client import Client, Names, escaped
from tests.interop.nginx_scripts import OK, Script, octets
from tests.interop.nginx_servers import Site, greeting, pointer_zone, protocol
from tests.peers.dns import DnsServer
from tests.peers.nginx import NginxFile
from tests.peers.process import Process, free_port
from tests.peers.recording_auth_server import Answer, RecordingAuthServer
from tests.peers.recording_auth_server import Client as Asking
from tests.peers.recording_upstream import RecordingUpstream

AT_ONCE = 12
"""Scripts that run at the same time."""


@dataclass
class Outcome:
    """What was seen of a script: by the client, by the auth server (header lines by request), by the upstream."""

    client: list[str] = field(default_factory=list)
    auth: list[str] = field(default_factory=list)
    upstream: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """What stands around the program: auth server, name server, and whose turn it is."""

    site: Site
    auth: RecordingAuthServer
    names: DnsServer
    program: Process
    gateway: bool
    alone: asyncio.Lock
    places: asyncio.Semaphore
    stopping: asyncio.Barrier

    async def stop(self) -> None:
        """Tell the program to let its sessions end, once everybody is there who wants to see that."""
        if await self.stopping.wait() == 0:
            os.kill(self.program.pid, signal.SIGTERM if self.gateway else signal.SIGQUIT)


def play(site: Site, program: Process, numbered: Mapping[int, Script], gateway: bool) -> dict[str, Outcome]:
    """Play scripts to a program that this starts and stops; the outcome of each by its name.

    Those in which it is told to stop have a run of their own.
    """

    async def run(numbered: Mapping[int, Script], at_once: int) -> dict[str, Outcome]:
        program.output.unlink(missing_ok=True)  # it says there that it is ready
        async with _stage(site, program, gateway, at_once) as stage:
            await asyncio.to_thread(program.start)
            try:
                jobs = [_played(stage, number, script) for number, script in numbered.items()]
                outcomes = await asyncio.gather(*jobs)
            finally:
                await asyncio.to_thread(program.stop)
            assert not stage.auth.unclaimed, stage.auth.unclaimed
        return {script.name: outcome for script, outcome in zip(numbered.values(), outcomes, strict=True)}

    outcomes: dict[str, Outcome] = {}
    for stops in (False, True):
        wanted = {number: script for number, script in numbered.items() if script.stops == stops}
        outcomes |= asyncio.run(run(wanted, len(wanted) if stops else AT_ONCE)) if wanted else {}
    return outcomes


def nginx(site: Site) -> NginxFile:
    """nginx with the site's file."""
    return NginxFile(site.folder, site.configuration, site.ports["smtp"])


def imported_gateway(folder: Path, configuration: Path) -> GatewayProcess:
    """The gateway with a file imported. Raises AssertionError if the importer refuses it."""
    command = [sys.executable, "-m", "gateway", "import-nginx"]
    if subprocess.run([*command, "--help"], capture_output=True, check=False).returncode:
        pytest.skip("this gateway has no import-nginx")
    done = subprocess.run([*command, str(configuration)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    (folder / "mail.yaml").write_bytes(done.stdout)
    return GatewayProcess(folder, "mail.yaml", variables={"PYTHONUNBUFFERED": "1", **os.environ})


@asynccontextmanager
async def _stage(site: Site, program: Process, gateway: bool, at_once: int) -> AsyncIterator[Stage]:
    async with (
        RecordingAuthServer(site.auth, site.folder / "auth.sock") as auth,
        DnsServer(listen=("127.0.0.1", site.dns)) as names,
    ):
        places, stopping = asyncio.Semaphore(at_once), asyncio.Barrier(at_once)
        yield Stage(site, auth, names, program, gateway, asyncio.Lock(), places, stopping)


async def _played(stage: Stage, number: int, script: Script) -> Outcome:
    async with stage.places, AsyncExitStack() as stack:
        if script.alone or script.inside:
            await stack.enter_async_context(stage.alone)
        where = stage.site.ports["inside"] if script.inside else 0
        upstream = RecordingUpstream(protocol(script.server), _replies(script), where)
        await stack.enter_async_context(upstream)
        port = free_port() if script.refused else upstream.port
        return await _play_one(stage, Cast(number, script, stage.site, port), upstream)


@dataclass
class Cast:
    """What the placeholders of one script stand for; `port` is the upstream's."""

    number: int
    script: Script
    site: Site
    port: int = 0

    def __post_init__(self) -> None:
        self.client = f"127.1.{self.number // 200}.{self.number % 200 + 1}"
        self.claimed = self.client.replace("127.1", "10.1")
        self.claimed6 = f"2001:db8::{self.number + 1:x}"

    def substitute(self, text: str) -> str:
        """A text with what its placeholders stand for, but `$cport`."""
        for name, value in (
            ("$claimed6", self.claimed6),
            ("$claimed", self.claimed),
            ("$client", self.client),
            ("$host", f"host{int(ip_address(self.client)) & 0xFFFF}.test"),
            ("$port", str(self.port)),
            ("$listener", str(self.site.ports.get(self.script.server, 0))),
        ):
            text = text.replace(name, value)
        return text

    def expected_client(self, gateway: bool) -> list[str]:
        """What the client is to see, as `Outcome.client`."""
        lines = []
        for step in self.script.steps(gateway):
            match step.kind:
                case "<<":
                    lines += [f"< {line}" for line in greeting(self.script.server)]
                case "<" | "<|":
                    lines.append(f"{step.kind} {escaped(octets(self.substitute(step.text)))}")
                case _:
                    lines.append(str(step))
        return lines

    def header_line(self, text: str) -> str:
        """A header line of a script, as `Outcome.auth`."""
        return escaped(octets(self.substitute(text)))

    def expected_upstream(self, gateway: bool) -> list[str] | None:
        """What the upstream is to be sent, as `Outcome.upstream`; None if the script says nothing of it."""
        side = self.script.gateway if gateway and self.script.gateway.sent is not None else self.script.nginx
        if side.sent is None or side.sent == ["^~"]:
            return None
        if side.sent == ["^-"]:
            return []
        marked = (self.substitute(line).partition(" ") for line in side.sent)
        return [mark if mark == "^+" else f"{mark} {escaped(octets(text))}" for mark, _, text in marked]

    def answers(self) -> list[Answer]:
        """What the auth server says."""
        listed = self.script.answers or [(False, "@OK", "close")]
        answers = []
        for raw, text, then in listed:
            if raw:
                answers.append(Answer(octets(self.substitute(text)), then))
                continue
            lines = "\r\n".join(text.split(" | ")).replace("@OK", OK)
            start = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" if then == "keep" else b"HTTP/1.0 200 OK\r\n"
            answers.append(Answer(start + octets(self.substitute(lines)) + b"\r\n\r\n", then))
        return answers


def _replies(script: Script) -> dict[str, list[bytes]]:
    replies: dict[str, list[bytes]] = {}
    for verb, text in script.replies:
        text, bang, then = f" {text}".partition(" !")
        text = text.removeprefix(" ")
        replies.setdefault(verb, []).append(octets(text + "\r\n" * bool(text)) + octets(bang + then))
    return replies


async def _play_one(stage: Stage, cast: Cast, upstream: RecordingUpstream) -> Outcome:
    script, names, asking = cast.script, Names(), Asking(cast.answers())
    local = not isinstance(cast.site.destination(script.server), Path) and script.server != "smtp-six"
    for address in (cast.client, cast.claimed, cast.claimed6):
        stage.auth.clients[address] = asking
    if script.alone:
        stage.auth.default = asking
    if script.dns:
        stage.names.zone.update(pointer_zone(cast.client, script.dns))
    client = Client(
        cast.site.destination(script.server), cast.client if local else "", greeting(script.server), cast.substitute,
        cast.site.certificates, {"auth": asking.arrived, "up": upstream.arrived}, stage.stop, names,
    )  # fmt: skip
    seen = await client.play(script.steps(stage.gateway))
    try:
        await asyncio.wait_for(upstream.settled(), 5)
    except TimeoutError:
        seen.append("(the connection to the upstream stays)")
    return Outcome(seen, _requests(asking.requests, names, script.whole), _received(upstream, client.port))


def _requests(requests: Sequence[Sequence[bytes]], names: Names, whole: bool) -> list[str]:
    """Header lines, without what only belongs to the connection unless they are wanted whole."""
    lines = []
    for request in requests:
        for line in request:
            text = escaped(line)
            if whole:
                pass
            elif text.startswith("GET "):
                text = re.sub(r" HTTP/1\.[01]$", "", text)
            elif re.match(r"(Connection|Keep-Alive):", text, re.IGNORECASE):
                continue
            lines.append(names.salt(text) if text.startswith("Auth-Salt:") else text)
    return lines


def _received(upstream: RecordingUpstream, client_port: int) -> list[str]:
    lines: list[str] = []
    for number, data in enumerate(upstream.received):
        lines += ["^+"] if number else []
        for line in re.findall(rb"[^\n]*\n|[^\n]+", data):
            text = escaped(line.removesuffix(b"\r\n"))
            if text.startswith("PROXY "):
                text = text.replace(f" {client_port} ", " $cport ")
            lines += [f"^ {text}" if line.endswith(b"\r\n") else f"^| {text}"]
    return lines


def without(lines: Sequence[str], some: Sequence[str]) -> list[str]:
    """The lines in their order without some, of equal ones the last. One that is not there is noted."""
    backwards = [*reversed(lines)]
    for line in some:
        if line in backwards:
            backwards.remove(line)
        else:
            backwards.append(f"(not there: {line})")
    return backwards[::-1]
