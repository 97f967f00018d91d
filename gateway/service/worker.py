"""A worker: opens the listeners of its pipelines, serves their sessions, stops politely.

`Worker.open` does everything that can fail before the first connection is accepted: it binds, starts the
embedded upstreams, builds the pools, starts the stages, learns what the upstreams announce. A process tree can
be put around this one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from gateway.dns.resolver import Resolver
from gateway.frontend.conversation import Conversation
from gateway.frontend.imap import ImapConversation
from gateway.frontend.pop3 import Pop3Conversation
from gateway.frontend.served import Served
from gateway.frontend.smtp import SmtpConversation
from gateway.observe import logs
from gateway.pipeline.plan import ListenerPlan, Plan
from gateway.relay.spool import SpoolSpace
from gateway.relay.wire import Wire
from gateway.service.listening import StartError, bound, listen
from gateway.session import Listener
from gateway.sink.process import EmbeddedServer
from gateway.stage import Stage
from gateway.state.memory import MemoryStore
from gateway.state.store import Store
from gateway.upstream.pool import Pool, Pools, PoolSettings
from gateway.upstream.probe import Health, learn
from gateway.upstream.profile import ProfileStore
from gateway.upstream.smtp import quits_done

log = structlog.get_logger("gateway.worker")

ID_ALPHABET = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no 0, O, 1, I: ids are read out on the telephone
ID_LETTERS = ID_ALPHABET * 8  # a letter for each octet
LEARN_TIMEOUT = 5.0
GOODBYE_SECONDS = 1.0


CONVERSATIONS: dict[str, type[SmtpConversation] | type[ImapConversation] | type[Pop3Conversation]] = {
    "smtp": SmtpConversation,
    "lmtp": SmtpConversation,
    "imap": ImapConversation,
    "pop3": Pop3Conversation,
}


def new_id() -> str:
    """A session id: seven characters, `7KQ2-M9X`; 32^7 of them."""
    text = os.urandom(7).translate(ID_LETTERS).decode()
    return f"{text[:4]}-{text[4:]}"


class StageWorker:
    """What the stages of one pipeline get at `start` (`gateway.Worker`)."""

    def __init__(self, plan: Plan, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self.store = store
        self.loop = loop
        self.clock: Callable[[], float] = loop.time
        self.hostname = plan.hostname
        self.resolver = Resolver(
            plan.resolvers or None,
            plan.resolver.timeout,
            valid=plan.resolver.valid,
            ipv4=plan.resolver.ipv4,
            ipv6=plan.resolver.ipv6,
        )
        self.log = structlog.get_logger("gateway.stage").bind(pipeline=plan.name)


class ServedPipeline:
    """One pipeline of this worker: its plan, its listening sockets, its sessions."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sockets: list[tuple[ListenerPlan, socket.socket]] = []
        self.servers: list[asyncio.Server] = []
        self.embedded: list[EmbeddedServer] = []
        self.conversations: set[Conversation] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.health: list[Health] = []
        self.started: list[Stage] = []
        self.stage_worker: StageWorker | None = None
        self.served: Served | None = None

    # -- start ----------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Bind every listener; nothing listens yet. Raises StartError."""
        for listener in self.plan.listeners:
            self.sockets += [(listener, sock) for sock in bound(listener)]

    async def prepare(self, store: Store, profiles: ProfileStore) -> None:
        """Embedded upstreams, pools, stages. Raises StartError."""
        plan = self.plan
        loop = asyncio.get_running_loop()
        try:
            pools = {name: Pool(name, self._settings(name), clock=loop.time, store=profiles) for name in plan.pools}
        except ValueError as error:
            raise StartError(f"{plan.name}: upstreams: {error}") from None
        self.stage_worker = StageWorker(plan, store, loop)
        self.served = Served(
            name=plan.name,
            hostname=plan.hostname,
            instance=secrets.token_hex(4),
            chain=plan.chain,
            limits=plan.limits,
            pools=Pools(pools, dynamic=plan.dynamic_pool, clock=loop.time),
            pool=pools.get(plan.default_pool),
            hand_off=plan.hand_off,
            new_id=new_id,
            trust_proxy=plan.trust_proxy,
            trust_xclient=plan.trust_xclient,
            trust_clients=plan.trust_clients,
            debug_clients=plan.debug_clients,
            allow_plaintext_auth=plan.allow_plaintext_auth,
            auth_required=plan.auth_required,
            login_decides=plan.login_decides,
            line_endings=plan.line_endings,
            nul=plan.nul,
            spool=SpoolSpace(plan.spool.directory, memory=plan.spool.memory, total=plan.spool.total),
            always_spool=plan.spool.when == "always",
            soft_bounce=plan.soft_bounce,
            reply_id=plan.reply_id,
            always_hand_off=plan.always_hand_off,
            max_received=plan.max_received,
            end_of_data=plan.end_of_data,
            replies=plan.replies,
            disconnect_on=plan.disconnect_on,
            bare_lf=plan.bare_lf,
            unauthorized_pipelining=plan.unauthorized_pipelining,
            helo_required=plan.helo_required,
            pass_error_message=plan.pass_error_message,
            hand_off_at_login=plan.hand_off_at_login,
        )
        for stage in plan.chain.stages:
            start = getattr(stage, "start", None)
            try:
                if start is not None:
                    await start(self.stage_worker)
            except Exception as error:
                raise StartError(
                    f"{plan.name}: stage {stage.id} does not start: {type(error).__name__}: {error}"
                ) from error
            self.started.append(stage)
        for pool in pools.values():
            self.health.append(
                Health(
                    pool, hostname=plan.hostname, instance=self.served.instance, proxy_header=plan.sends_proxy_header
                )
            )

    def _settings(self, name: str) -> PoolSettings:
        """The pool's settings, with its embedded servers running and in place of their URLs."""
        settings = self.plan.pools[name]
        servers = []
        for url, weight in settings.servers:
            if url.startswith("embedded://"):
                embedded = EmbeddedServer()
                try:
                    url = embedded.start(Path(url.removeprefix("embedded://")))
                except (OSError, RuntimeError, TimeoutError) as error:
                    raise StartError(f"{url}: the embedded server does not start: {error}") from None
                self.embedded.append(embedded)
            servers.append((url, weight))
        return replace(settings, servers=tuple(servers))

    async def learn(self) -> None:
        """Ask the upstreams what they announce, before the first greeting; those that are down may be so."""
        logs.pipeline.set(self.plan.name)
        assert self.served is not None
        await asyncio.gather(*(learn(health, LEARN_TIMEOUT) for health in self.health if health.pool.settings.health))
        for health in self.health:
            health.start()

    async def accept(self) -> None:
        """Open the doors."""
        loop = asyncio.get_running_loop()
        for plan, sock in self.sockets:
            encrypts = plan.implicit_tls or plan.starttls
            listener = Listener(
                plan.url,
                name=plan.name,
                protocol=plan.protocol,
                implicit_tls=plan.implicit_tls,
                proxy_protocol=plan.proxy_protocol,
                login_required=self.plan.auth_required,
                tls=plan.tls if encrypts else None,
                capabilities=plan.capabilities,
            )

            def factory(listener: Listener = listener) -> Wire:
                return Wire(loop, lambda wire: self._connected(wire, listener))

            self.servers.append(
                await loop.create_server(factory, sock=sock, backlog=plan.backlog)
                if sock.family != socket.AF_UNIX
                else await loop.create_unix_server(factory, sock=sock, backlog=plan.backlog)
            )

    def _connected(self, wire: Wire, listener: Listener) -> None:
        assert self.served is not None
        conversation = CONVERSATIONS[listener.protocol](wire, self.served, listener)
        self.served.sessions += 1
        task = asyncio.get_running_loop().create_task(conversation.run())
        self.conversations.add(conversation)
        self.tasks.add(task)
        task.add_done_callback(lambda done: self._over(done, conversation))

    def _over(self, task: asyncio.Task[None], conversation: Conversation) -> None:
        assert self.served is not None
        self.served.sessions -= 1
        self.tasks.discard(task)
        self.conversations.discard(conversation)
        if not task.cancelled() and task.exception() is not None:
            log.error("internal_error", pipeline=self.plan.name, error=repr(task.exception()))

    # -- stop -----------------------------------------------------------------------------------------------

    async def stop(self, grace: float) -> None:
        """Stop accepting, let sessions finish their transaction, close the rest after `grace` seconds."""
        logs.pipeline.set(self.plan.name)
        for server in self.servers:
            server.close()
        if self.served is not None:
            self.served.draining = True
        for conversation in tuple(self.conversations):
            conversation.drain()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace)
        parting = [conversation.part_now() for conversation in tuple(self.conversations)]  # the time is up
        if any(parting):
            await asyncio.wait(self.tasks, timeout=GOODBYE_SECONDS)
        for task in tuple(self.tasks):
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=5.0)
        await self.release()

    async def release(self) -> None:
        """Give back everything but sessions."""
        for listener, sock in self.sockets:
            sock.close()
            if listener.path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(listener.path)
        for health in self.health:
            await health.stop()
        for stage in self.started:
            stop = getattr(stage, "stop", None)
            if stop is not None:
                try:
                    async with asyncio.timeout(stage.timeout):
                        await stop()
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"
                    log.warning("stage_failure", stage=stage.id, phase="stop", error=text, action="pass")
        if self.served is not None:
            self.served.pools.close_idle()
        await quits_done()
        if self.stage_worker is not None:
            self.stage_worker.resolver.close()
        for embedded in self.embedded:
            embedded.stop()


class Worker:
    """All pipelines of the process."""

    def __init__(self, plans: Sequence[Plan], profiles: Path | None = None) -> None:
        self.pipelines = [ServedPipeline(plan) for plan in plans]
        self.profiles = ProfileStore(profiles)

    async def open(self) -> None:
        """Bind, prepare, learn, accept; on a failure everything is given back. Raises StartError."""
        store = MemoryStore(asyncio.get_running_loop().time)
        try:
            for pipeline in self.pipelines:
                pipeline.bind()
            listen(pair for pipeline in self.pipelines for pair in pipeline.sockets)
            for pipeline in self.pipelines:
                await pipeline.prepare(store, self.profiles)
            await asyncio.gather(*(pipeline.learn() for pipeline in self.pipelines))
            for pipeline in self.pipelines:
                await pipeline.accept()
        except BaseException:
            for pipeline in self.pipelines:
                await pipeline.stop(0.0)
            raise
        for pipeline in self.pipelines:
            log.info(
                "start",
                pipeline=pipeline.plan.name,
                listen=[listener.url for listener in pipeline.plan.listeners],
                grade=pipeline.plan.grade,
                stages=[stage.id for stage in pipeline.plan.chain.stages],
            )

    async def close(self, grace: float) -> None:
        """Stop every pipeline."""
        await asyncio.gather(*(pipeline.stop(grace) for pipeline in self.pipelines))
        log.info("stop")
