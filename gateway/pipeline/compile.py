"""From a validated pipeline file to what a worker runs: stages built, expressions bound, promises checked.

Everything that can be wrong is found here, before anything starts: all problems of a file at once, each with
its place. The result says how far the conversation must be read (the grade) and why.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from gateway import hookspecs
from gateway.config.documents import Document
from gateway.config.listen import Keepalive
from gateway.config.listen import Listener as ListenerModel
from gateway.config.load import validate_settings
from gateway.config.models import Health, Pipeline, ServerSettings, Spool, StageEntry, Table
from gateway.config.models import Pool as PoolModel
from gateway.config.problems import ConfigError, Loc, Problem, did_you_mean, written_loc
from gateway.config.resolver import ResolverSettings
from gateway.config.tls_settings import Tls
from gateway.facts import BUILT_IN, Expression, Fact, Phase, PoolName
from gateway.frontend.served import HandOff, Networks
from gateway.limits import Limits
from gateway.pipeline import registry
from gateway.pipeline.chain import Call, Chain, Step, bound_hook, route_phase
from gateway.pipeline.conditions import FUNCTIONS, ConditionError, Conditions
from gateway.pipeline.server_context import server_context
from gateway.relay.tls import ServerContext, TlsConfigError
from gateway.replies import FAMILIES, Family, Replies
from gateway.stage import Kind, Settings, Stage
from gateway.tables import ListFile
from gateway.upstream.pool import PoolSettings
from gateway.upstream.prelude import ErrorMessages
from gateway.verdicts import Cause

FoundT = TypeVar("FoundT")
POSTPONED = (Phase.CONNECT, Phase.GREETING, Phase.HELO)
CAUGHT_UP = (Phase.CONNECT, Phase.SECURE, Phase.GREETING, Phase.HELO, Phase.MAIL, Phase.RCPT)
FAMILY = {"smtp": "smtp", "lmtp": "smtp", "imap": "imap", "pop3": "pop3"}
MAIL_HOOKS = frozenset(("helo", "mail", "rcpt", "data", "message", "edits", "upstream_mail"))
LOGIN_GRACE, OTHER_GRACE = 45.0, 240.0


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


def compile_pipeline(pipeline: Pipeline, document: Document, known: registry.Registry) -> Plan:
    """The whole of a pipeline. Raises ConfigError with every problem found."""
    return _Compiler(pipeline, document, known).plan()


class _Compiler:
    """One use: walks the document once and collects problems."""

    def __init__(self, pipeline: Pipeline, document: Document, known: registry.Registry) -> None:
        self.pipeline = pipeline
        self.document = document
        self.registry = known
        self.problems: list[Problem] = []
        self.entries: list[tuple[StageEntry, Stage]] = []
        self.when: dict[Stage, Expression] = {}

    def problem(self, loc: Loc, text: str, suggestion: str = "", *, key: bool = False) -> None:
        self.problems.append(Problem(self.document.place(loc, key=key), written_loc(loc), text, suggestion))

    def plan(self) -> Plan:
        self._build_stages()
        if self.problems:  # what a stage that is missing means for the others nobody can say
            raise ConfigError(self.problems)
        self._bind_expressions()
        self._check_contract()
        self._check_terminal()
        self._check_modes()
        self._check_facts()
        self._check_order()
        self._check_pools()
        self._check_protocols()
        self._check_spool()
        self._check_tls()
        if self.problems:
            raise ConfigError(self.problems)
        steps = self._steps()
        chain = Chain([stage for _, stage in self.entries if stage.mode != "off"], steps)
        hand_off, reason = self._grade(chain)
        self._check_relay()
        if self.problems:
            raise ConfigError(self.problems)
        return self._result(chain, hand_off, reason)

    # -- stages ---------------------------------------------------------------------------------------------

    def _build_stages(self) -> None:
        ids: dict[str, int] = {}
        for entry in self.pipeline.stages:
            try:
                stage_type = self.registry.get(entry.name)
            except registry.StageError as error:
                text, _, hint = str(error).partition("; ")
                self.problem(entry.loc, text, hint, key=True)
                continue
            validated = validate_settings(stage_type.Settings, self.document, entry.loc, entry.settings)
            if not isinstance(validated, BaseModel):
                self.problems.extend(validated)
                continue
            assert isinstance(validated, Settings)
            try:
                stage = stage_type(validated)
            except Exception as error:
                text = self._as_written(entry.loc, f"{type(error).__name__}: {error}")
                self.problem(entry.loc, f"{entry.name} cannot be made: {text}")
                continue
            stage.id = entry.reserved.id or entry.name
            ids[stage.id] = ids.get(stage.id, 0) + 1
            if ids[stage.id] > 1:
                if entry.reserved.id:
                    self.problem(entry.loc, f"a second stage with the id {stage.id!r}", "write another id")
                stage.id = f"{stage.id}_{ids[stage.id]}"
            mode = entry.reserved.mode
            partial = mode.kind == "enforce" and mode.percent < 100
            stage.mode = int(mode.percent) if partial else mode.kind
            stage.timeout = entry.reserved.timeout or stage.timeout
            stage.on_error = entry.reserved.on_error or "tempfail"
            self.entries.append((entry, stage))

    def _bind_expressions(self) -> None:
        facts: list[Fact] = [*BUILT_IN]
        for _, stage in self.entries:
            for fact in stage.facts:
                facts.append(
                    Fact(f"{stage.id}.{fact.name}", fact.type, fact.default, fact.phase, fact.scope, fact.help)
                )
        conditions = Conditions(facts, _listed(self.pipeline.tables, self.document, self.problems))
        for entry, stage in self.entries:
            for loc, expression in _found(stage.settings, Expression, entry.loc):
                self._bind(conditions, expression, loc, entry, stage)
            if entry.reserved.when is not None:
                expression = entry.reserved.when
                self._bind(conditions, expression, (*entry.loc, "when"), entry, stage)
                self.when[stage] = expression
            routes = [found.phase for _, found in _found(stage.settings, Expression, ())]
            if hasattr(stage, "route") and not hasattr(stage, "route_phase"):
                stage.route_phase = max([Phase.CONNECT, *routes])  # type: ignore[attr-defined]

    def _bind(self, conditions: Conditions, expression: Expression, loc: Loc, entry: StageEntry, stage: Stage) -> None:
        try:
            names = conditions.compile(expression)
        except ConditionError as error:
            hint = did_you_mean(error.unknown, [*conditions.facts, *FUNCTIONS]) if error.unknown else ""
            written = self._as_written(loc, expression.text)
            if written != expression.text:  # what is wrong may be a part of a secret
                text = f"{written!r} is no expression with what it is expanded to"
                self.problem(loc, text, "write it without ${...}")
                return
            self.problem(
                loc,
                f"column {error.column} of {written!r}: {error.text}",
                hint or "`gateway stages --facts` lists the facts",
            )
            return
        for table in conditions.tables(expression.text):
            if table not in self.pipeline.tables:
                self.problem(loc, f"no list named {table!r} in tables", did_you_mean(table, self.pipeline.tables))
        for name in names:
            fact = conditions.facts[name]
            if fact.provided and not self._provided_before(stage, name):
                provider = next((n for n in self.registry.names() if _provides(self.registry, n, name)), "")
                self.problem(
                    loc,
                    f"{name} is known only if a stage before this one provides it",
                    f"add {provider or 'such a stage'} above {entry.name}",
                )
            owner = name.partition(".")[0]
            if fact.get is None and not any(s.id == owner for s in self._before(stage)):
                self.problem(loc, f"{name} is set by a stage that comes later", f"move {owner} above {entry.name}")

    def _as_written(self, loc: Loc, text: str) -> str:
        """The text with what was expanded in it as the file writes it: it may be a secret."""
        for value, written in self.document.expanded(loc):
            text = text.replace(value, written)
        return text

    def _before(self, stage: Stage) -> Iterable[Stage]:
        for _, other in self.entries:
            if other is stage:
                return
            if other.mode != "off":
                yield other

    def _provided_before(self, stage: Stage, name: str) -> bool:
        return any(name in other.provides for other in self._before(stage))

    def _known_to(self, stage: Stage, name: str) -> bool:
        """Whether a fact that the stage requires is known by itself or set by a stage before it."""
        if any(fact.name == name and not fact.provided for fact in BUILT_IN) or self._provided_before(stage, name):
            return True
        return any(f"{other.id}.{fact.name}" == name for other in self._before(stage) for fact in other.facts)

    # -- load checks ----------------------------------------------------------------------------------------

    def _check_contract(self) -> None:
        manager = registry.new_manager()
        for entry, stage in self.entries:
            try:
                registry.register(manager, stage)
            except registry.StageError as error:
                text, _, hint = str(error).partition("; ")
                self.problem(entry.loc, text, hint)

    def _check_terminal(self) -> None:
        terminals = [(entry, stage) for entry, stage in self.entries if stage.terminal]
        if not terminals:
            self.problem(("stages",), "no stage joins client and upstream", "end the list with splice", key=True)
            return
        for entry, _ in terminals[1:]:
            self.problem(entry.loc, f"a second terminal stage {entry.name!r}", "one pipeline ends in one")
        entry, stage = terminals[0]
        if stage is not self.entries[-1][1]:
            self.problem(entry.loc, f"{entry.name} ends the chain, but stages follow it", "write it last")
        if stage.mode == "off" or stage in self.when:
            self.problem(
                entry.loc, f"{entry.name} ends the chain and cannot be off or conditional", "remove its mode and when"
            )

    def _check_modes(self) -> None:
        for entry, stage in self.entries:
            reserved = entry.reserved
            identity = stage.decides_identity or stage.kind is Kind.PLUMBING
            if identity and stage.mode not in ("off", "enforce"):
                self.problem(
                    (*entry.loc, "mode"), f"{entry.name} cannot be observed or enforced in part", "write off or enforce"
                )
            if reserved.on_error == "pass" and (stage.never_pass or stage.kind is Kind.GUARD or _at_upstream(stage)):
                self.problem(
                    (*entry.loc, "on_error"),
                    f"{entry.name} guards and cannot fail open",
                    "write tempfail, reject or disconnect",
                )
            if stage in self.when and _required(stage):
                self.problem(
                    (*entry.loc, "when"),
                    f"clients for whom this is false could neither log in at {entry.name} nor send without",
                    "write required: false",
                )
            if reserved.refuse_at is not None and not any(hasattr(stage, p.name.lower()) for p in POSTPONED):
                self.problem((*entry.loc, "refuse_at"), f"{entry.name} refuses nothing before RCPT", "remove refuse_at")
            if reserved.discard is not None and Phase.MESSAGE not in _needed(stage):
                self.problem((*entry.loc, "discard"), f"{entry.name} reads no messages", "remove discard")

    def _check_order(self) -> None:
        """A limit on failed logins that stands behind the verifiers would never stop one."""
        verifiers = [index for index, (_, stage) in enumerate(self.entries) if hasattr(stage, "mechanisms")]
        for index, (entry, stage) in enumerate(self.entries):
            counts = getattr(stage.settings, "count", "") == "auth_failures"
            if counts and verifiers and index > verifiers[0]:
                self.problem(
                    entry.loc,
                    f"{entry.name} of auth_failures stands behind {self.entries[verifiers[0]][0].name}: never asked",
                    "move it above the auth stages",
                )

    def _check_facts(self) -> None:
        for entry, stage in self.entries:
            for name in sorted(stage.requires):
                if not self._known_to(stage, name):
                    self.problem(entry.loc, f"{entry.name} needs {name}", "add a stage that provides it above")
            when = self.when.get(stage)
            if when is None or stage.terminal:
                continue
            phases = [phase for phase in _needed(stage) if phase >= when.phase]
            upstream = _at_upstream(stage)
            if not phases and not upstream:
                self.problem(
                    (*entry.loc, "when"),
                    f"known from {when.phase.name.lower()} on, but {entry.name} is asked only before that",
                    "use facts that are known earlier",
                )
            elif upstream and not phases:
                self.problem(
                    (*entry.loc, "when"),
                    f"{entry.name} works at the upstream and takes no condition",
                    "route to another pool instead",
                )

    def _check_pools(self) -> None:
        known = self.pipeline.upstreams
        for entry, stage in self.entries:
            for loc, pool_name in _found(stage.settings, PoolName, entry.loc):
                if pool_name not in known:
                    name = self._as_written(loc, pool_name)
                    self.problem(loc, f"no pool named {name!r} in upstreams", did_you_mean(name, known))
        listening = {(listener.host, listener.port) for listener in self._listeners() if not listener.path}
        everywhere = {port for host, port in listening if host in ("", "0.0.0.0", "::")}
        for name, pool in known.items():
            for index, server in enumerate(pool.servers):
                url = server.url
                if not url.path and ((url.host, url.port) in listening or (url.local and url.port in everywhere)):
                    self.problem(
                        ("upstreams", name, "servers", index),
                        f"{server.url} is a listener of this pipeline: mail would go in a circle",
                        "name the real server",
                    )

    def _check_protocols(self) -> None:
        """Every listener's clients can be served: there are logins and servers in its protocol."""
        stages = [stage for _, stage in self.entries if stage.mode != "off"]
        logins = any(hasattr(stage, "mechanisms") for stage in stages)
        spoken = {FAMILY[server.url.protocol] for pool in self.pipeline.upstreams.values() for server in pool.servers}
        names_servers = any(stage.names_servers for stage in stages)
        listening = {FAMILY[listener.url.protocol] for listener in self.pipeline.listen}
        for index, listener in enumerate(self.pipeline.listen):
            protocol, loc = FAMILY[listener.url.protocol], ("listen", index)
            if protocol != "smtp" and not logins:
                text = f"nobody could log in to {protocol.upper()} here"
                self.problem(loc, text, "add an auth stage: auth_http, auth_file, auth_relay")
            if protocol not in spoken and not names_servers:
                text = f"no server in upstreams speaks {protocol.upper()}"
                self.problem(loc, text, f"add a pool of {protocol}:// servers")
        if "smtp" not in listening:
            for entry, stage in self.entries:
                hooks = [name for name in hook_names(stage) if name in MAIL_HOOKS]
                others = set(hook_names(stage)) - MAIL_HOOKS
                if hooks and not others and stage.mode != "off":
                    text = f"{entry.name} is asked about mail, which nobody sends to {' and '.join(sorted(listening))}"
                    self.problem(entry.loc, text, "remove it", key=True)

    def _check_spool(self) -> None:
        """A folder that is not there would be missed by the first large message only."""
        folder = self.pipeline.spool.directory
        if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            self.problem(("spool", "directory"), "there is no such folder to write to", "make it, or name another")

    def _check_tls(self) -> None:
        certificates = all(listener.tls_possible(self.pipeline.tls) for listener in self.pipeline.listen)
        auth = [entry for entry, stage in self.entries if hasattr(stage, "mechanisms") and stage.mode != "off"]
        if (
            not certificates
            and not self.pipeline.allow_plaintext_auth
            and any(_required(stage) for _, stage in self.entries)
        ):
            entry = auth[0]
            self.problem(
                entry.loc,
                "AUTH is offered only under TLS, and there is no certificate",
                "add tls.certificates, or allow_plaintext_auth: true",
            )
        for entry, stage in self.entries:
            if entry.name == "require_tls" and not certificates and stage.mode != "off":
                self.problem(entry.loc, "nobody can use TLS here: there is no certificate", "add tls.certificates")

    def _check_relay(self) -> None:
        """The relay guard: no open relay by omission (architecture, "Relay guard")."""
        stages = [stage for _, stage in self.entries if stage.mode == "enforce" and stage not in self.when]
        if not self._mail_listeners() or self.pipeline.relay == "open" or any(_required(stage) for stage in stages):
            return
        if any(stage.limits_recipients for stage in stages):
            return
        active = [stage for _, stage in self.entries if stage.mode != "off"]
        lends = any(stage.own_credentials for stage in active)
        if not lends and any(stage.identifies_client for stage in stages):
            return
        servers = [server for pool in self.pipeline.upstreams.values() for server in pool.servers]
        if all(server.url.embedded for server in servers) and not any(stage.names_servers for stage in active):
            return  # an embedded server delivers to its own Maildir only
        with_what = "login" if lends else "address"
        self.problem(
            ("stages",),
            f"mail without login reaches the upstream with the gateway's own {with_what}, "
            "which the upstream may trust: an open relay",
            f"add {'' if lends else 'xclient, proxy_header, '}recipient_domains or a required login, "
            "or write relay: open",
            key=True,
        )

    # -- steps ----------------------------------------------------------------------------------------------

    def _steps(self) -> dict[Phase, tuple[Step, ...]]:
        steps: dict[Phase, list[Step]] = {phase: [] for phase in Phase}
        for index, (entry, stage) in enumerate(self.entries):
            if stage.mode == "off":
                continue
            own: list[Step] = []
            when = self.when.get(stage)
            needed = set(_needed(stage))
            for phase in _implemented(stage):
                if phase not in needed:
                    continue
                step = self._step(index, entry, stage, phase, when)
                if when is not None:
                    step.catch_up = tuple(one for one in own if one.phase in CAUGHT_UP)
                own.append(step)
                if when is None or phase >= when.phase:
                    steps[phase].append(step)
        return {phase: tuple(found) for phase, found in steps.items()}

    def _step(self, index: int, entry: StageEntry, stage: Stage, phase: Phase, when: Expression | None) -> Step:
        reserved = entry.reserved
        postpone = phase in POSTPONED and stage.kind is Kind.CHECK and not stage.refuse_now
        if reserved.refuse_at is not None:
            postpone = phase in POSTPONED and reserved.refuse_at == "rcpt"
        mode = stage.mode
        enforce = 100 if mode == "enforce" else 0 if mode == "observe" else int(mode)
        return Step(
            stage,
            index,
            phase,
            _bound(stage, phase),
            stage.kind is Kind.CHECK,
            enforce,
            when,
            stage.timeout,
            stage.on_error,
            postpone,
            may_discard=reserved.discard == "accept",
            stage_edits=getattr(stage, "edits", None) if phase is Phase.MESSAGE else None,
        )

    # -- the grade ------------------------------------------------------------------------------------------

    def _grade(self, chain: Chain) -> tuple[HandOff, str]:
        """How long the conversation must be read, and because of whom. IMAP and POP3 are opaque after the login."""
        if not self._mail_listeners():
            return HandOff.LOGIN, "IMAP and POP3 need nothing after the login"
        splice = self.entries[-1][1].settings
        wanted = getattr(splice, "handoff", "auto")
        if wanted == "never":
            return HandOff.NEVER, "splice says handoff: never"
        if chain.message:
            return HandOff.NEVER, f"{chain.message[0].stage.id} reads the messages"
        if self.pipeline.nul != "pass" or self.pipeline.limits.text_line:
            return HandOff.NEVER, "the content is checked (nul, limits.text_line)"
        for steps, word in ((chain.mail, "MAIL"), (chain.rcpt, "RCPT"), (chain.data, "DATA")):
            for step in steps:
                if not (word == "MAIL" and step.stage.first_only):
                    return HandOff.NEVER, f"{step.stage.id} is asked at each {word}"
        if chain.upstream_mail:
            return HandOff.NEVER, f"{chain.upstream_mail[0][0].id} speaks before each MAIL"
        if any(stage.counts_received for stage in chain.stages):
            return HandOff.NEVER, "Received fields are counted"
        if self.pipeline.soft_bounce:
            return HandOff.NEVER, "soft_bounce changes replies"
        if self.pipeline.line_endings != "by_trust":
            return HandOff.NEVER, "line_endings are asked for"
        if len(self._protocols()) > 1:
            return HandOff.NEVER, "listeners and servers do not all speak the same protocol"
        if chain.route_rcpt:
            return HandOff.RCPT, f"{chain.route_rcpt[0].stage.id} needs the first recipient"
        if any(route_phase(step.stage) >= Phase.MAIL for step in chain.route_early) or chain.mail:
            return HandOff.MAIL, "the first MAIL is the last thing needed"
        if any(_required(stage) for stage in chain.stages):
            return HandOff.LOGIN, "nothing is needed after the login"
        plain = any(not listener.implicit_tls for listener in self._listeners())
        if chain.helo or chain.auth or chain.mechanisms or chain.capabilities or (plain and self._certificates()):
            return HandOff.MAIL, "nothing is needed after MAIL"
        if chain.secure or any(step.postpone for step in (*chain.connect, *chain.greeting)):
            return HandOff.MAIL, "a refusal before the greeting is given at RCPT"
        if self.pipeline.trust.xclient:
            return HandOff.MAIL, "trusted clients may say XCLIENT"
        return HandOff.GREETING, "nothing is needed after the greeting"

    def _joined_at_login(self, chain: Chain, hand_off: HandOff) -> bool:
        """With `handoff: always`: whether who logs in is handed off then, also where others are read up to RCPT."""
        always = getattr(self.entries[-1][1].settings, "handoff", "auto") == "always"
        if not always or hand_off is HandOff.NEVER or not chain.mechanisms:
            return False
        late = [step for step in chain.route_early if route_phase(step.stage) >= Phase.MAIL]
        steps = (*chain.mail, *chain.rcpt, *chain.data, *chain.route_rcpt, *late)
        return all(step.stage.only_without_login for step in steps)

    def _protocols(self) -> set[str]:
        """What mail is handed on with on either side: smtp, lmtp."""
        servers = {server.url.protocol for pool in self.pipeline.upstreams.values() for server in pool.servers}
        return (servers | {listener.url.protocol for listener in self.pipeline.listen}) & {"smtp", "lmtp"}

    def _mail_listeners(self) -> bool:
        """Whether anybody can send mail here."""
        return any(listener.url.protocol in ("smtp", "lmtp") for listener in self.pipeline.listen)

    # -- the result -----------------------------------------------------------------------------------------

    def _certificates(self) -> bool:
        return any(listener.tls_possible(self.pipeline.tls) for listener in self.pipeline.listen)

    def _listeners(self) -> list[ListenerPlan]:
        return [plan for listener in self.pipeline.listen for plan in _listener_plans(listener)]

    def _server_context(self, tls: Tls, protocol: str, loc: Loc) -> ServerContext | None:
        """Clients that ask for another protocol than this listener's get none (ALPN, RFC 7301)."""
        try:
            return server_context(tls, (FAMILY[protocol],))
        except TlsConfigError as error:
            raise ConfigError([Problem(self.document.place(loc), written_loc(loc), str(error))]) from None

    def _listeners_with_tls(self) -> list[ListenerPlan]:
        """The listeners with their certificates: their own, or the pipeline's, shared by those of a protocol."""
        plans, shared = [], dict[str, ServerContext | None]()
        for index, listener in enumerate(self.pipeline.listen):
            protocol = listener.url.protocol
            if listener.tls is not None:
                context = self._server_context(listener.tls, protocol, ("listen", index, "tls"))
            else:
                family = FAMILY[protocol]
                if family not in shared:
                    shared[family] = self._server_context(self.pipeline.tls, protocol, ("tls", "certificates"))
                context = shared[family]
            plans += [replace(plan, tls=context) for plan in _listener_plans(listener)]
        return plans

    def _default_pool(self) -> str:
        named = getattr(self.entries[-1][1].settings, "pool", None)
        if named:
            return str(named)
        pools = self.pipeline.upstreams
        mail = [name for name, pool in pools.items() if FAMILY[pool.servers[0].url.protocol] == "smtp"]
        if len(mail) == 1:  # stores have their own default: the only pool that speaks their protocol
            return mail[0]
        return next(iter(pools)) if len(pools) == 1 else ""

    def _result(self, chain: Chain, hand_off: HandOff, reason: str) -> Plan:
        pipeline, stages = self.pipeline, chain.stages
        required = any(_required(stage) for stage in stages)
        at_login = self._joined_at_login(chain, hand_off)
        received = [
            getattr(stage.settings, "max_hops", 0) for stage in stages if stage.counts_received
        ]
        limits = pipeline.limits
        plan = Plan(
            name=pipeline.name or Path(self.document.file).stem,
            hostname=pipeline.hostname,
            listeners=self._listeners_with_tls(),
            chain=chain,
            limits=limits,
            pools={name: _pool_settings(pool) for name, pool in pipeline.upstreams.items()},
            default_pool=self._default_pool(),
            hand_off=hand_off,
            grade="content" if chain.message else "envelope" if hand_off is HandOff.NEVER else "opaque",
            reason=reason,
            rows=self._rows(),
            trust_proxy=Networks(pipeline.trust.proxy),
            trust_xclient=Networks(pipeline.trust.xclient),
            trust_clients=Networks(pipeline.trust.clients),
            debug_clients=Networks(pipeline.log.debug_clients),
            allow_plaintext_auth=pipeline.allow_plaintext_auth,
            auth_required=required,
            # With `handoff: always` the client hears of its login once it is joined, as from nginx.
            login_decides=at_login or any(stage.login_decides for stage in stages),
            line_endings=pipeline.line_endings,
            nul=pipeline.nul,
            spool=pipeline.spool,
            soft_bounce=pipeline.soft_bounce,
            reply_id=pipeline.reply_id,
            always_hand_off=getattr(self.entries[-1][1].settings, "handoff", "auto") == "always",
            sends_proxy_header=any(stage.sends_proxy_header for stage in stages),
            max_received=max(received, default=0),
            end_of_data=limits.end_of_data_timeout or (LOGIN_GRACE if required else OTHER_GRACE),
            resolvers=[(one.host, one.port) for one in pipeline.resolvers],
            resolver=pipeline.resolver,
            replies={family: Replies(family, getattr(pipeline.replies, family)) for family in FAMILIES},
            disconnect_on=frozenset(Cause[name.upper()] for name in pipeline.disconnect_on),
            bare_lf=pipeline.bare_lf == "accept",
            unauthorized_pipelining=pipeline.unauthorized_pipelining == "accept",
            helo_required=pipeline.helo_required,
            pass_error_message=getattr(self.entries[-1][1].settings, "pass_error_message", "auto"),
            hand_off_at_login=at_login,
            dynamic_pool=_server_settings(pipeline.dynamic_servers),
        )
        if plan.always_hand_off:
            plan.warnings.append(
                "splice.handoff: always: the client may inherit what the upstream trusts the gateway with"
            )
        for listener in plan.listeners:
            if listener.capabilities is not None:
                plan.warnings.append(
                    f"{listener.url}: capabilities are written by hand, not computed: "
                    "what is announced there may not be carried"
                )
        return plan

    def _rows(self) -> list[Row]:
        rows = []
        for _, stage in self.entries:
            hooks = hook_names(stage)
            needed = {phase.name.lower() for phase in _needed(stage)}
            when = self.when.get(stage)
            phases = [name for name in hooks if name not in _PHASE_NAMES or name in needed]
            if when is not None:
                phases = [n for n in phases if n not in _PHASE_NAMES or Phase[n.upper()] >= when.phase]
            mode = stage.mode if isinstance(stage.mode, str) else f"{stage.mode}%"
            provides = sorted(stage.provides) + [f"{stage.id}.{fact.name}" for fact in stage.facts]
            rows.append(
                Row(
                    stage.id,
                    stage.kind.value,
                    " ".join(phases),
                    when.text if when else "",
                    mode,
                    " ".join(provides),
                    " ".join(sorted(stage.requires)),
                )
            )
        return rows


_PHASE_NAMES = frozenset(phase.name.lower() for phase in Phase)
_HOOKS = (
    *[phase.name.lower() for phase in Phase],
    "capabilities",
    "mechanisms",
    "unknown",
    "upstream_connect",
    "upstream_ready",
    "upstream_login",
    "upstream_mail",
)


def hook_names(stage: Stage | type[Stage]) -> list[str]:
    return [name for name in _HOOKS if hasattr(stage, name)]


def _at_upstream(stage: Stage) -> bool:
    return any(name.startswith("upstream_") for name in hook_names(stage))


def _implemented(stage: Stage) -> list[Phase]:
    return [phase for phase in Phase if hasattr(stage, phase.name.lower())]


def _needed(stage: Stage) -> list[Phase]:
    """The phases the stage's settings need: its own word if it has one."""
    own = getattr(stage, "phases", None)
    if own is None:
        return _implemented(stage)
    return [Phase[name.upper()] for name in own()]


def _required(stage: Stage) -> bool:
    return hasattr(stage, "mechanisms") and stage.mode != "off" and bool(stage.required)


def _provides(known: registry.Registry, name: str, fact: str) -> bool:
    try:
        return fact in known.get(name).provides
    except registry.StageError:
        return False


def _bound(stage: Stage, phase: Phase) -> Call:
    """The stage's method with the one signature the chain uses; a method may take fewer arguments than its spec."""
    name = phase.name.lower()
    hook = bound_hook(stage, name)
    if len(inspect.signature(getattr(hookspecs, name)).parameters) == 2:
        return hook  # type: ignore[return-value]
    return lambda session, _: hook(session)  # type: ignore[return-value]


def _found(value: object, wanted: type[FoundT], loc: Loc) -> Iterable[tuple[Loc, FoundT]]:
    """Every object of a type inside settings, with its place in the document."""
    if isinstance(value, wanted):
        yield loc, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _found(getattr(value, name), wanted, (*loc, name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _found(item, wanted, (*loc, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _found(item, wanted, (*loc, str(key)))


def _listener_plans(listener: ListenerModel) -> list[ListenerPlan]:
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


def _listed(tables: Mapping[str, Table], document: Document, problems: list[Problem]) -> Callable[[str, str], bool]:
    """`listed(list, s)` over the pipeline's tables: inline lists and files that are re-read when they change."""
    lists: dict[str, ListFile] = {}
    for name, source in tables.items():
        try:
            lists[name] = ListFile(source.file if source.file is not None else source.entries)
        except (OSError, ValueError) as error:
            loc = ("tables", name)
            problems.append(Problem(document.place(loc), written_loc(loc), str(error)))

    def listed(name: str, text: str) -> bool:
        table = lists.get(name)
        return table is not None and text.lower() in table

    return listed


_BALANCE = {"hash_client": "client", "hash_user": "user", "hash_domain": "domain"}


def _pool_settings(pool: PoolModel) -> PoolSettings:
    return replace(
        _server_settings(pool),
        servers=tuple((str(server.url), server.weight) for server in pool.servers),
        balance=_BALANCE.get(pool.balance, pool.balance),  # type: ignore[arg-type]
    )


def _server_settings(pool: ServerSettings) -> PoolSettings:
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
