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
import select
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from gateway.dns.resolver import Resolver
from gateway.frontend.conversation import Conversation
from gateway.frontend.imap import ImapConversation
from gateway.frontend.pop3 import Pop3Conversation
from gateway.frontend.served import Served
from gateway.frontend.smtp import SmtpConversation
from gateway.observe import logs
from gateway.observe.traces import TraceSettings
from gateway.pipeline.plan import ListenerPlan, Plan
from gateway.relay.spool import SpoolSpace
from gateway.relay.wire import Wire
from gateway.service.descriptors import DescriptorReserve
from gateway.service.listening import StartError, bound, listen
from gateway.session import Listener
from gateway.sink.process import EmbeddedServer
from gateway.stage import Stage
from gateway.state.keys import network_key
from gateway.state.opening import open_store
from gateway.state.settings import StoreSettings
from gateway.state.store import Store, StoreError
from gateway.upstream.pool import Pool, Pools, PoolSettings
from gateway.upstream.probe import Health, learn
from gateway.upstream.profile import ProfileStore
from gateway.upstream.smtp import quits_done
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.observe.spans import Traces

log = structlog.get_logger("gateway.worker")

ID_ALPHABET = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no 0, O, 1, I: ids are read out on the telephone
ID_LETTERS = ID_ALPHABET * 8  # a letter for each octet
LEARN_TIMEOUT = 5.0
GOODBYE_SECONDS = 1.0
QUIET_SECONDS = 2.0  # at a stop: a client that says nothing for so long has nothing under way
WAITING_SECONDS = 1.0  # at the last stop: for those who connected and were not accepted yet
GOODBYES_A_SECOND = 50.0  # at a stop: as many clients a worker may come back at once
SPREAD_SHARE = 0.6  # of the time for a stop: the rest is for those that were told last


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
        self.pools = Pools({})
        self._trust = (plan.trust_clients, plan.trust_xclient, plan.trust_proxy)

    def trusts(self, address: str) -> bool:
        """Whether the address is in the pipeline's `trust`, or one of its upstream servers', as far as looked up."""
        if any(address in networks for networks in self._trust):
            return True
        known = {found for pool in self.pools.every() for one in pool.servers for found in one.known_addresses()}
        client = network_key(address, 32, 128)
        return any(isinstance(found, tuple) and network_key(found[0], 32, 128) == client for found in known)


class Drained(NamedTuple):
    """How a stop went: open sessions at its begin, those that had to be cut off at its end, and seconds it took."""

    sessions: int
    cut: int
    seconds: float


class ServedPipeline:
    """One pipeline of this worker: its plan, its listening sockets, its sessions."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sockets: list[tuple[ListenerPlan, socket.socket]] = []
        self.held = False  # the sockets are another process's, too
        self.servers: list[asyncio.Server] = []
        self.embedded: list[EmbeddedServer] = []
        self.conversations: set[Conversation] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.health: list[Health] = []
        self.started: list[Stage] = []
        self.stage_worker: StageWorker | None = None
        self.served: Served | None = None
        self._reserve: DescriptorReserve
        self._hurried = asyncio.Event()

    # -- start ----------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Bind every listener; nothing listens yet. Raises StartError."""
        for listener in self.plan.listeners:
            self.sockets += [(listener, sock) for sock in bound(listener)]

    def take(self, sockets: Sequence[Sequence[socket.socket]]) -> None:
        """Use the sockets of each listener, in the plan's order, that another process holds."""
        self.held = True
        for listener, found in zip(self.plan.listeners, sockets, strict=True):
            self.sockets += [(listener, sock) for sock in found]

    async def prepare(self, store: Store, profiles: ProfileStore, embedded: Mapping[str, str] | None = None) -> None:
        """Embedded upstreams, pools, stages. Raises StartError.

        `embedded`: where those are that run already, by their URLs; None: they are started here.
        """
        plan = self.plan
        loop = asyncio.get_running_loop()
        try:
            pools = {
                name: Pool(name, self._settings(name, embedded), clock=loop.time, store=profiles, pipeline=plan.name)
                for name in plan.pools
            }
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
        self.stage_worker.pools = self.served.pools
        plan.chain.measure(plan.name)
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

    def trace(self, traces: Traces) -> None:
        """Send spans of some of its sessions there; after `prepare`."""
        assert self.served is not None
        self.served.traces = traces
        self.served.traced_chain = self.plan.chain.recording(self.plan.name)

    def _settings(self, name: str, running: Mapping[str, str] | None) -> PoolSettings:
        """The pool's settings, with its embedded servers running and in place of their URLs."""
        settings = self.plan.pools[name]
        servers = []
        for url, weight in settings.servers:
            if running is not None:
                url = running.get(url, url)
            elif url.startswith("embedded://"):
                embedded = EmbeddedServer()
                try:
                    url = embedded.start(Path(url.removeprefix("embedded://")))
                except (OSError, RuntimeError, TimeoutError) as error:
                    raise StartError(f"{url}: the embedded server does not start: {error}") from None
                self.embedded.append(embedded)
            servers.append((url, weight))
        return replace(settings, servers=tuple(servers))

    async def learn(self, probing: bool = True) -> None:
        """Ask the upstreams what they announce, before the first greeting; those that are down may be so."""
        logs.pipeline.set(self.plan.name)
        assert self.served is not None
        await asyncio.gather(*(learn(health, LEARN_TIMEOUT) for health in self.health if health.pool.settings.health))
        for health in self.health:
            health.start(probing)

    async def accept(self) -> None:
        """Open the doors."""
        loop = asyncio.get_running_loop()
        self._reserve = DescriptorReserve(self.plan.name, loop.time)
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

            if sock.family != socket.AF_UNIX:
                server = await loop.create_server(factory, sock=sock, backlog=plan.backlog)
            elif sys.version_info >= (3, 13) and isinstance(loop, asyncio.SelectorEventLoop):
                # Others may listen there, too: the file stays.
                server = await loop.create_unix_server(factory, sock=sock, backlog=plan.backlog, cleanup_socket=False)
            else:
                server = await loop.create_unix_server(factory, sock=sock, backlog=plan.backlog)
            self.servers.append(server)

    def _connected(self, wire: Wire, listener: Listener) -> None:
        assert self.served is not None
        conversation = CONVERSATIONS[listener.protocol](wire, self.served, listener)
        if self._reserve.refuses(wire.transport.get_extra_info("socket").fileno()):
            conversation.turn_away(Refuse(Cause.TOO_MANY_CONNECTIONS, disconnect=True))
            return
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

    async def stop(self, grace: float) -> Drained:
        """Stop accepting, let sessions finish their transaction, close the rest after `grace` seconds.

        Quiet clients are told so one after the other, so that they do not all come back at once.
        """
        logs.pipeline.set(self.plan.name)
        for server in self.servers:
            server.close()
        if self.served is not None:
            self.served.draining = True
            self.served.pools.close_idle()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        open_sessions = tuple(self.conversations)
        quiet = min(QUIET_SECONDS, grace / 10)
        spread = min(grace * SPREAD_SHARE, len(open_sessions) / GOODBYES_A_SECOND)
        for index, conversation in enumerate(open_sessions):
            loop.call_later(spread * index / len(open_sessions), conversation.drain, quiet)
        await self._over_or_hurried(grace)
        cut = len(self.tasks)
        parting = [conversation.part_now() for conversation in tuple(self.conversations)]  # the time is up
        if any(parting):
            await asyncio.wait(self.tasks, timeout=GOODBYE_SECONDS)
        for task in tuple(self.tasks):
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=5.0)
        seconds = loop.time() - begun
        await self.release()
        return Drained(len(open_sessions), cut, seconds)

    def hurry(self) -> None:
        """The time for the stop is up now."""
        self._hurried.set()

    async def _over_or_hurried(self, grace: float) -> None:
        """Wait for the last session, at most `grace` seconds, or until somebody is impatient."""
        hurried = asyncio.create_task(self._hurried.wait())
        over = asyncio.create_task(_all(self.tasks))
        await asyncio.wait([hurried, over], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        over.cancel()

    async def release(self) -> None:
        """Give back everything but sessions."""
        for listener, sock in self.sockets:
            sock.close()
            if listener.path and not self.held:
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


async def _all(tasks: set[asyncio.Task[None]]) -> None:
    """Until there is none any more."""
    while tasks:
        await asyncio.wait(tuple(tasks))


class Worker:
    """All pipelines of the process.

    `state` is the folder for what outlives it. `embedded` as in `ServedPipeline.prepare`. `probing`: this worker
    watches the upstreams, for all. `traces`: where spans of sessions go.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        state: Path | None = None,
        *,
        store: StoreSettings = StoreSettings(),
        embedded: Mapping[str, str] | None = None,
        probing: bool = True,
        number: int = 0,
        traces: TraceSettings | None = None,
    ) -> None:
        self.pipelines = [ServedPipeline(plan) for plan in plans]
        self.profiles = ProfileStore(state / "upstreams.json" if state is not None else None)
        self.number = number
        self.store: Store | None = None
        self._store_settings = store
        self._embedded = embedded
        self._probing = probing
        self._trace_settings = traces
        self.traces: Traces | None = None

    async def open(self) -> None:
        """Bind, prepare, accept; on a failure everything is given back. Raises StartError."""
        try:
            for pipeline in self.pipelines:
                pipeline.bind()
            listen(pair for pipeline in self.pipelines for pair in pipeline.sockets)
            await self.prepare()
            await self.accept()
        except BaseException:
            await self.close(0.0)
            raise

    async def prepare(self) -> None:
        """Everything that can fail before the first connection. Raises StartError."""
        loop = asyncio.get_running_loop()
        try:
            self.store = await open_store(self._store_settings, clock=loop.time, owner=f"{os.getpid()}.{self.number}")
        except StoreError as error:
            raise StartError(f"process.store: {error}") from None
        if self._trace_settings is not None:
            from gateway.observe.spans import Traces  # needs an extra, and a quarter of a second

            self.traces = Traces(self._trace_settings)
        for pipeline in self.pipelines:
            await pipeline.prepare(self.store, self.profiles, self._embedded)
            if self.traces is not None:
                pipeline.trace(self.traces)
        await asyncio.gather(*(pipeline.learn(self._probing) for pipeline in self.pipelines))

    async def accept(self) -> None:
        """Open the doors of every pipeline."""
        for pipeline in self.pipelines:
            await pipeline.accept()
        for pipeline in self.pipelines if self.number == 0 else ():  # said once, not by every worker
            log.info(
                "start",
                pipeline=pipeline.plan.name,
                listen=[listener.url for listener in pipeline.plan.listeners],
                grade=pipeline.plan.grade,
                stages=[stage.id for stage in pipeline.plan.chain.stages],
            )

    async def accept_waiting(self) -> None:
        """Let in whoever waits in a backlog: nobody will after us, and the kernel resets those whom nobody accepted."""
        loop = asyncio.get_running_loop()
        until = loop.time() + WAITING_SECONDS
        waiting = select.poll()
        for pipeline in self.pipelines:
            for _, sock in pipeline.sockets:
                waiting.register(sock, select.POLLIN)
        while waiting.poll(0) and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0)  # some loops accept one at a time

    def hurry(self) -> None:
        """While it closes: do not wait any longer."""
        for pipeline in self.pipelines:
            pipeline.hurry()

    async def close(self, grace: float) -> None:
        """Stop every pipeline."""
        drained = await asyncio.gather(*(pipeline.stop(grace) for pipeline in self.pipelines))
        if self.store is not None:
            await self.store.close()
        if self.traces is not None:
            await self.traces.close()
        log.info(
            "stop",
            sessions=sum(one.sessions for one in drained),
            cut=sum(one.cut for one in drained),
            seconds=round(max((one.seconds for one in drained), default=0.0), 3),
        )
