"""The checks of a pipeline that only its whole can fail: order, facts, pools, protocols, certificates, relaying.

Each collects its problems, so that a file's are found at once; `compile.py` runs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from gateway.config.documents import Document
from gateway.config.models import Pipeline, StageEntry
from gateway.config.problems import Loc, Problem, did_you_mean, written_loc
from gateway.facts import BUILT_IN, Expression, Phase, PoolName
from gateway.pipeline import registry
from gateway.pipeline.asked import at_upstream, found_in, hook_names, login_required, needed_phases
from gateway.pipeline.plan import ListenerPlan, listener_plans
from gateway.stage import Kind, Stage

FAMILY = {"smtp": "smtp", "lmtp": "smtp", "imap": "imap", "pop3": "pop3"}
MAIL_HOOKS = frozenset(("helo", "mail", "rcpt", "data", "message", "edits", "upstream_mail"))
POSTPONED = (Phase.CONNECT, Phase.GREETING, Phase.HELO)


class LoadChecks:
    """A pipeline while it is compiled: its document, the stages built so far, the problems found."""

    def __init__(self, pipeline: Pipeline, document: Document, known: registry.Registry) -> None:
        self.pipeline = pipeline
        self.document = document
        self.registry = known
        self.problems: list[Problem] = []
        self.entries: list[tuple[StageEntry, Stage]] = []
        self.when: dict[Stage, Expression] = {}

    def problem(self, loc: Loc, text: str, suggestion: str = "", *, key: bool = False) -> None:
        self.problems.append(Problem(self.document.place(loc, key=key), written_loc(loc), text, suggestion))

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

    def _certificates(self) -> bool:
        return any(listener.tls_possible(self.pipeline.tls) for listener in self.pipeline.listen)

    def _listeners(self) -> list[ListenerPlan]:
        return [plan for listener in self.pipeline.listen for plan in listener_plans(listener)]

    def _mail_listeners(self) -> bool:
        """Whether anybody can send mail here."""
        return any(listener.url.protocol in ("smtp", "lmtp") for listener in self.pipeline.listen)

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
            if reserved.on_error == "pass" and (stage.never_pass or stage.kind is Kind.GUARD or at_upstream(stage)):
                self.problem(
                    (*entry.loc, "on_error"),
                    f"{entry.name} guards and cannot fail open",
                    "write tempfail, reject or disconnect",
                )
            if stage in self.when and login_required(stage):
                self.problem(
                    (*entry.loc, "when"),
                    f"clients for whom this is false could neither log in at {entry.name} nor send without",
                    "write required: false",
                )
            if reserved.refuse_at is not None and not any(hasattr(stage, p.name.lower()) for p in POSTPONED):
                self.problem((*entry.loc, "refuse_at"), f"{entry.name} refuses nothing before RCPT", "remove refuse_at")
            if reserved.discard is not None and Phase.MESSAGE not in needed_phases(stage):
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
            phases = [phase for phase in needed_phases(stage) if phase >= when.phase]
            upstream = at_upstream(stage)
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
            for loc, pool_name in found_in(stage.settings, PoolName, entry.loc):
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
            and any(login_required(stage) for _, stage in self.entries)
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
        if not self._mail_listeners() or self.pipeline.relay == "open":
            return
        if any(login_required(stage) for stage in stages):
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
