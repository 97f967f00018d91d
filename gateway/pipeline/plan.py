"""What a worker runs: a pipeline, compiled; and how listeners and pools of a file become parts of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.config.listen import Keepalive
from gateway.config.listen import Listener as ListenerModel
from gateway.config.models import Health, ServerSettings, Spool
from gateway.config.models import Pool as PoolModel
from gateway.config.resolver import ResolverSettings
from gateway.frontend.served import HandOff, Networks
from gateway.limits import Limits
from gateway.pipeline.chain import Chain
from gateway.relay.tls import ServerContext
from gateway.replies import Family, Replies
from gateway.upstream.pool import PoolSettings
from gateway.upstream.prelude import ErrorMessages
from gateway.verdicts import Cause

OTHER_GRACE = 240.0  # seconds after the end of data, on listeners without a required login


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """One listener, ready to bind."""

    url: str
    name: str
    host: str
    port: int
    path: str
    implicit_tls: bool
    proxy_protocol: bool
    capabilities: dict[str, str] | None = None
    tls: ServerContext | None = None
    protocol: str = "smtp"
    starttls: bool = True
    backlog: int = 511
    ipv6only: bool = True
    keepalive: Keepalive | None = field(default_factory=Keepalive)
    rcvbuf: int | None = None
    sndbuf: int | None = None
    multipath: bool = False


@dataclass(slots=True)
class Plan:
    """A pipeline, compiled. `grade`: opaque, envelope or content; `reason` says why; `rows` is the table of `check`."""

    name: str
    hostname: str
    listeners: list[ListenerPlan]
    chain: Chain
    limits: Limits
    pools: dict[str, PoolSettings]
    default_pool: str
    hand_off: HandOff
    grade: str
    reason: str
    rows: list[Row]
    dynamic_pool: PoolSettings = field(default_factory=PoolSettings)
    trust_proxy: Networks = field(default_factory=Networks)
    trust_xclient: Networks = field(default_factory=Networks)
    debug_clients: Networks = field(default_factory=Networks)
    allow_plaintext_auth: bool = False
    auth_required: bool = False
    login_decides: bool = False
    line_endings: str = "by_trust"
    nul: str = "pass"
    spool: Spool = field(default_factory=Spool)
    soft_bounce: bool = False
    reply_id: bool = True
    always_hand_off: bool = False
    sends_proxy_header: bool = False
    max_received: int = 0
    end_of_data: float = OTHER_GRACE
    trust_clients: Networks = field(default_factory=Networks)
    certificate_required: bool = False
    resolvers: list[tuple[str, int]] = field(default_factory=list)
    resolver: ResolverSettings = field(default_factory=ResolverSettings)
    replies: dict[Family, Replies] = field(default_factory=dict)
    disconnect_on: frozenset[Cause] = frozenset()
    bare_lf: bool = False
    unauthorized_pipelining: bool = False
    helo_required: bool = True
    pass_error_message: ErrorMessages = "auto"
    hand_off_at_login: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `gateway check`."""

    stage: str
    kind: str
    phases: str
    when: str
    mode: str
    provides: str
    requires: str


def listener_plans(listener: ListenerModel) -> list[ListenerPlan]:
    """One for each port of a range."""
    return [
        ListenerPlan(
            str(url),
            listener.name or str(url),
            url.host,
            url.port,
            url.path,
            url.implicit_tls,
            listener.proxy_protocol == "required",
            _keywords(listener),
            protocol=url.protocol,
            starttls=listener.starttls,
            backlog=listener.backlog,
            ipv6only=listener.ipv6only,
            keepalive=listener.keepalive,
            rcvbuf=listener.rcvbuf,
            sndbuf=listener.sndbuf,
            multipath=listener.multipath,
        )
        for url in listener.url.urls()
    ]


def _keywords(listener: ListenerModel) -> dict[str, str] | None:
    """The typed exception to computed capabilities: exactly these lines; IMAP's are words as they are written."""
    if listener.capabilities is None:
        return None
    if listener.url.protocol == "imap":
        return {word: "" for line in listener.capabilities for word in line.split()}
    pairs = (line.partition(" ") for line in listener.capabilities)
    return {keyword.upper(): parameters for keyword, _, parameters in pairs}


_BALANCE = {"hash_client": "client", "hash_user": "user", "hash_domain": "domain"}


def pool_settings(pool: PoolModel) -> PoolSettings:
    return replace(
        server_settings(pool),
        servers=tuple((str(server.url), server.weight) for server in pool.servers),
        balance=_BALANCE.get(pool.balance, pool.balance),  # type: ignore[arg-type]
    )


def server_settings(pool: ServerSettings) -> PoolSettings:
    health = pool.health or Health()
    return PoolSettings(
        max_connections=pool.max_connections,
        queue=pool.queue,
        queue_timeout=pool.queue_timeout,
        tls=pool.tls,
        verify=pool.verify,
        ca_file=str(pool.ca_file) if pool.ca_file else None,
        server_name=pool.server_name,
        source=pool.source,
        bdat=pool.bdat,
        reuse=pool.reuse is not None,
        reuse_transactions=pool.reuse.transactions if pool.reuse else 20,
        reuse_idle=pool.reuse.idle if pool.reuse else 30.0,
        assume=tuple(pool.capabilities.assume) if pool.capabilities else None,
        allow_plaintext_login=pool.allow_plaintext_login,
        hello=pool.hello,
        connect_timeout=pool.connect_timeout,
        greeting_timeout=pool.greeting_timeout,
        command_timeout=pool.command_timeout,
        data_done_timeout=pool.data_done_timeout,
        health=pool.health is not None,
        health_interval=health.interval,
        health_timeout=health.timeout,
        health_fall=health.fall,
        health_rise=health.rise,
        slow_start=health.slow_start,
    )
