"""`gateway probe FILE`: go to each upstream as the pipeline would, say what is found, end before DATA or the login."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import perf_counter

import click

from gateway.cli.loading import fail, plans
from gateway.observe.logs import configure
from gateway.pipeline.plan import Plan
from gateway.service.worker import StageWorker
from gateway.session import Client, Listener, Session
from gateway.state.memory import MemoryStore
from gateway.upstream.connection import UpstreamConnection, UpstreamError, quits_done
from gateway.upstream.dial import FIRST_QUESTION
from gateway.upstream.pool import Pool, PoolSettings
from gateway.upstream.prelude import open_upstream
from gateway.upstream.probe import Profile, probe_server
from gateway.upstream.server import Server
from gateway.upstream.store import StoreConnection
from gateway.verdicts import Cause, Refuse

CLIENT = ("192.0.2.1", 25252)  # TEST-NET-1: no real client has it (RFC 5737)


@click.command()
@click.argument("files", nargs=-1, required=True)
def command(files: tuple[str, ...]) -> None:
    """Connect to each upstream server; exit status 1 if a session would fail at one of them."""
    compiled, _ = plans(files)
    configure("text", "error")  # what an administrator is to know is printed below
    urls = [url for plan in compiled for pool in plan.pools.values() for url, _ in pool.servers]
    if any(url.startswith("embedded://") for url in urls):
        click.echo("embedded servers run inside `gateway run`; they are left out")
    good = asyncio.run(_probe_all(compiled))
    raise SystemExit(0 if good else 1)


async def _probe_all(compiled: list[Plan]) -> bool:
    good = True
    for plan in compiled:
        worker = await _start_stages(plan)
        if not plan.pools:
            click.echo(f"{plan.name}: no upstreams in this file; a stage names the servers when there is a client")
        for name, settings in plan.pools.items():
            for url, weight in settings.servers:
                if not url.startswith("embedded://"):
                    good = await _probe(plan, name, replace(settings, servers=((url, weight),))) and good
        for stage in plan.chain.stages:
            stop = getattr(stage, "stop", None)
            if stop is not None:
                await stop()
        worker.resolver.close()
    await quits_done()
    return good


async def _start_stages(plan: Plan) -> StageWorker:
    """Stages speak to upstreams with what they learned at `start`."""
    loop = asyncio.get_running_loop()
    worker = StageWorker(plan, MemoryStore(loop.time), loop)
    for stage in plan.chain.stages:
        start = getattr(stage, "start", None)
        if start is None:
            continue
        try:
            await start(worker)
        except Exception as error:
            fail(f"gateway: {plan.name}: stage {stage.id} does not start: {type(error).__name__}: {error}")
    return worker


async def _probe(plan: Plan, name: str, settings: PoolSettings) -> bool:
    """One server: what it says, then a session's whole prelude, for a mail store without its login."""
    server = Server(settings.servers[0][0])
    store = server.protocol in ("imap", "pop3")
    click.echo(f"{plan.name}: upstream {name}: {server.url}")
    try:
        seen = await probe_server(server, settings, hostname=plan.hostname, proxy_header=plan.sends_proxy_header)
    except UpstreamError as error:
        click.echo(f"  FAILED: {error.text}")
        return False
    click.echo(f"  greeting: {'' if store else f'{seen.greeting.code} '}{seen.greeting.text}")
    offer = ", ".join(" ".join(pair).strip() for pair in seen.ehlo.keywords.items()) or "nothing"
    click.echo(f"  {FIRST_QUESTION[server.protocol]}: {offer}")
    click.echo(f"  TLS: {_tls(settings, seen.tls)}")
    opened = await open_upstream(
        _session(plan), Pool(name, settings), plan.chain, hostname=plan.hostname, login=not store
    )
    asks = any(type(stage).__name__ == "Xclient" for stage, _ in plan.chain.upstream_ready)
    command = "ID" if server.protocol == "imap" else "XCLIENT"
    click.echo(f"  {command}: {_identified(opened, _offered(server, seen), asks, command)}")
    if isinstance(opened, Refuse):
        reply = f"{opened.reply.code} {opened.reply.text}" if opened.reply is not None else ""
        click.echo(f"  FAILED: {opened.log or reply or opened.text or opened.cause.value}")
        return False
    clear = isinstance(opened, StoreConnection) and not opened.takes_secrets
    opened.end_quietly()
    if clear:
        click.echo("  FAILED: passwords are not sent in clear text over the network; set tls: required on the pool")
    return not clear


def _offered(server: Server, seen: Profile) -> bool:
    """Whether it takes from us who the client is, in its protocol's form."""
    if server.protocol == "imap":
        return "ID" in seen.ehlo.keywords
    if server.protocol == "pop3":
        return "[XCLIENT]" in seen.greeting.text.upper()
    return "ADDR" in seen.ehlo.keywords.get("XCLIENT", "").upper().split()


def _identified(opened: UpstreamConnection | Refuse, offered: bool, asks: bool, command: str) -> str:
    if not asks:
        return "offered; no stage of this pipeline sends it" if offered else "not offered, and not sent"
    if isinstance(opened, Refuse):
        if not offered:
            return "NOT offered"
        believed = opened.cause is not Cause.UPSTREAM_MISCONFIGURED and "XCLIENT" not in opened.log
        return "offered, but the session fails" if believed else "offered, but NOT believed"
    if not offered:
        return "not offered; the session goes on without (if_missing: continue)"
    if command == "ID":  # Dovecot says OK to anybody
        return f"offered and sent; only the server's log tells whether it is believed (rip={CLIENT[0]})"
    return "offered and believed"


def _tls(settings: PoolSettings, info: object) -> str:
    if info is None:
        return f"none ({settings.tls})"
    version, cipher = getattr(info, "version", ""), getattr(info, "cipher", "")
    verified = "verified" if settings.tls == "required" and settings.verify else "not verified"
    return f"{version} {cipher}, {verified}"


def _session(plan: Plan) -> Session:
    """A session as a client in TEST-NET-1 would have it."""
    listener = plan.listeners[0]
    local = (listener.host, listener.port)
    session = Session("PROBE", plan.name, Listener(listener.url), ("127.0.0.1", 0), local, perf_counter())
    session.client = Client(*CLIENT)
    session.hostname = plan.hostname
    session.helo, session.esmtp = plan.hostname, True
    return session
