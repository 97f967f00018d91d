"""From a validated pipeline file to what a worker runs: stages built, expressions bound, promises checked.

Everything that can be wrong is found here, before anything starts: all problems of a file at once, each with
its place. The result says how far the conversation must be read (the grade) and why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from gateway import hookspecs
from gateway.config.documents import Document
from gateway.config.load import Loaded, validate_settings
from gateway.config.models import Pipeline, StageEntry, Table
from gateway.config.problems import ConfigError, Loc, Problem, did_you_mean, written_loc
from gateway.config.tls_settings import Tls
from gateway.facts import BUILT_IN, Expression, Fact, Phase
from gateway.frontend.served import HandOff, Networks
from gateway.pipeline import registry
from gateway.pipeline.asked import PHASE_NAMES, found_in, hook_names, implemented, login_required, needed_phases
from gateway.pipeline.chain import Call, Chain, Step, bound_hook, route_phase
from gateway.pipeline.checks import FAMILY, POSTPONED, LoadChecks
from gateway.pipeline.conditions import FUNCTIONS, ConditionError, Conditions
from gateway.pipeline.plan import (
    OTHER_GRACE,
    ListenerPlan,
    Plan,
    Row,
    listener_plans,
    pool_settings,
    server_settings,
)
from gateway.pipeline.server_context import server_context
from gateway.relay.tls import ServerContext, TlsConfigError
from gateway.replies import FAMILIES, Replies
from gateway.stage import Kind, Settings, Stage
from gateway.tables import ListFile
from gateway.verdicts import Cause

CAUGHT_UP = (Phase.CONNECT, Phase.SECURE, Phase.GREETING, Phase.HELO, Phase.MAIL, Phase.RCPT)
LOGIN_GRACE = 45.0  # seconds after the end of data, on listeners with a required login


def compile_all(loaded: Loaded) -> list[Plan]:
    """Every pipeline of the files. Raises ConfigError with all that is wrong with any of them."""
    types = registry.Registry()
    compiled: list[Plan] = []
    problems: list[Problem] = []
    for pipeline, document in loaded.pipelines:
        try:
            compiled.append(compile_pipeline(pipeline, document, types))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return compiled


def compile_pipeline(pipeline: Pipeline, document: Document, known: registry.Registry) -> Plan:
    """The whole of a pipeline. Raises ConfigError with every problem found."""
    return _Compiler(pipeline, document, known).plan()


class _Compiler(LoadChecks):
    """One use: walks the document once and collects problems."""

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
            for loc, expression in found_in(stage.settings, Expression, entry.loc):
                self._bind(conditions, expression, loc, entry, stage)
            if entry.reserved.when is not None:
                expression = entry.reserved.when
                self._bind(conditions, expression, (*entry.loc, "when"), entry, stage)
                self.when[stage] = expression
            routes = [found.phase for _, found in found_in(stage.settings, Expression, ())]
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

    # -- steps ----------------------------------------------------------------------------------------------

    def _steps(self) -> dict[Phase, tuple[Step, ...]]:
        steps: dict[Phase, list[Step]] = {phase: [] for phase in Phase}
        for index, (entry, stage) in enumerate(self.entries):
            if stage.mode == "off":
                continue
            own: list[Step] = []
            when = self.when.get(stage)
            needed = set(needed_phases(stage))
            for phase in implemented(stage):
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
        if any(login_required(stage) for stage in chain.stages):
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

    # -- the result -----------------------------------------------------------------------------------------

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
            plans += [replace(plan, tls=context) for plan in listener_plans(listener)]
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
        required = any(login_required(stage) for stage in stages)
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
            pools={name: pool_settings(pool) for name, pool in pipeline.upstreams.items()},
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
            dynamic_pool=server_settings(pipeline.dynamic_servers),
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
            needed = {phase.name.lower() for phase in needed_phases(stage)}
            when = self.when.get(stage)
            phases = [name for name in hooks if name not in PHASE_NAMES or name in needed]
            if when is not None:
                phases = [n for n in phases if n not in PHASE_NAMES or Phase[n.upper()] >= when.phase]
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
