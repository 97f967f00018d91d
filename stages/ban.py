"""Refuse clients that failed too often, at connect and for a growing time.

Each failure adds its weight to a score. A client (an IPv4 address, an IPv6 /64) or, with `per: network`, a network
whose score reaches `limit` is banned for the first of `times`; banned again, for the next one; the last repeats.
`forget` after the end of a ban the first is next again. The score is a sliding window like that of `rate_limit` and
begins anew with each ban.

| failure | counted | default weight |
|---|---|---|
| `auth_failures` | a verifier, or the upstream, said no to a login | 3 |
| `protocol_errors` | an unknown or malformed command, a bare LF, talking too early, HTTP | 2 |
| `refusals` | a permanent refusal (5xx) by a stage or the gateway | 1 |
| `upstream_refusals` | a 5xx of the upstream to MAIL, RCPT or DATA | 0; 1 is a measure against address harvesting |

What is no failure of the client counts nothing: temporary refusals (greylisting, milters' 4xx), `rate_limit`,
`too_many_connections`, `too_many_recipients`, sizes, loops, a missing TLS, whatever fails on our side (stages, auth
servers, upstreams, routes) and what may follow from a refusal: SMTP commands out of sequence, errors in IMAP and POP3
behind a failed login. A cause that `weights` names has the weight written there, 0 too, whether the refusal is
permanent or not. Only what the client was told counts: refusals that are observed do not, postponed ones do at RCPT.
After a hand-off nothing is seen any more.

Never banned are addresses in `exempt`, in the pipeline's `trust` (`clients`, `xclient`, `proxy`) and of its upstream
servers, names as last looked up. So is, for the time `trusted_login`, a client from which somebody logged in, whatever
others of its network do: passwords can be guessed from there, which `rate_limit` of `auth_failures` by user slows
down. Loopback is no exception, unless an upstream server lives there: write the address of a local webmail into
`exempt`. Clients without an IP address are never banned. The client is who PROXY or XCLIENT says.

A banned client reads 421 4.7.0 (IMAP: BYE, POP3: -ERR) and is closed; on implicit TLS it is closed before the
handshake. Sessions that are open go on. Scores and bans are kept apart by pipeline and stage, and shared by all
that share the store. With `mode: observe` all is counted, kept and logged, and nobody refused; `when` says who is
refused, not who is counted. In front of the other stages it saves the most.

Bans are values `ban:<pipeline>:<stage id>:<network>` of the store, which an operator can list, add and remove. An
added one may name an address, an IPv6 /64, or a network of exactly `v4_prefix` or `v6_prefix`: these are looked up,
no others; write wider networks into an `access` stage. An operator's ban holds for users who logged in, too, but never
for the other exceptions. When a ban is removed, the next one is still a step longer until `forget` has passed.

Costs two look-ups a session (IPv6: three), without waiting where the store is this process's memory. When a shared
store does not answer, `on_error` decides (421 unless it says otherwise); failures are counted behind the session's back
and, where the store does not answer, are not, which is logged when it begins.

    stages:
      - ban: {limit: 20/10m, times: [10m, 1h, 1d], exempt: [10.0.0.0/8]}
      - ban: 20/10m                    # limit
      - ban: {id: harvesters, limit: 30/1h, per: network, weights: {upstream_refusals: 1, relay_denied: 10}}
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from gateway import (
    Cause,
    CidrList,
    Duration,
    Kind,
    NetworkTable,
    Outcome,
    Rate,
    Refuse,
    Session,
    Settings,
    Stage,
    Window,
    Worker,
    client_key,
    network_key,
)

WEIGHTS: Mapping[str, int] = {"auth_failures": 3, "protocol_errors": 2, "refusals": 1, "upstream_refusals": 0}

_ROUNDING = 1e-9  # estimates are sums of shares
_OF_THE_PROTOCOL = frozenset({Cause.PROTOCOL, Cause.PIPELINING, Cause.EARLY_TALKER})
_NO_FAILURES = frozenset({
    Cause.RATE_LIMIT, Cause.TOO_MANY_CONNECTIONS, Cause.TOO_MANY_RECIPIENTS, Cause.OTHER_ROUTE, Cause.NO_ROUTE,
    Cause.TLS_REQUIRED, Cause.AUTH_UNAVAILABLE, Cause.MESSAGE_TOO_BIG, Cause.NOT_CARRIED, Cause.LOOP,
    Cause.STAGE_FAILED, Cause.UPSTREAM_DOWN, Cause.UPSTREAM_LOST, Cause.UPSTREAM_BUSY, Cause.UPSTREAM_MISCONFIGURED,
    Cause.TIMEOUT, Cause.SHUTDOWN,
    Cause.AUTH_TOO_MANY, Cause.TOO_MANY_ERRORS,  # what led to these was counted
})  # fmt: skip
_NAMES = sorted({*WEIGHTS, *(cause.name.lower() for cause in Cause if cause is not Cause.BANNED)})
_TIME = {"type": ["string", "number"], "description": "A duration: 10m, 1h, 1d.", "x-kind": "duration"}


def _as_list(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def _over_the_defaults(written: dict[str, int]) -> dict[str, int]:
    for name in written:
        if name not in _NAMES:
            raise ValueError(f"{name[:60]!r} is nothing to weigh; write {', '.join(WEIGHTS)} or the name of a cause")
    return {**WEIGHTS, **written}


_Times = Annotated[
    tuple[Annotated[Duration, Field(gt=0)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_TIME, {"type": "array", "items": _TIME, "minItems": 1}]}),
]
_Weights = Annotated[
    dict[str, Annotated[int, Field(ge=0, strict=True)]],
    AfterValidator(_over_the_defaults),
    WithJsonSchema({
        "type": "object",
        "propertyNames": {"enum": _NAMES},
        "additionalProperties": {"type": "integer", "minimum": 0},
        "x-default": "{" + ", ".join(f"{name}: {weight}" for name, weight in WEIGHTS.items()) + "}",
    }),
]  # fmt: skip


class BanSettings(Settings):
    """What counts how much, who is banned for how long, and who never is."""

    short_form: ClassVar[str | None] = "limit"

    limit: Rate = Field(Rate(20, 600.0), description="The score that bans, and the time in which it adds up.")
    weights: _Weights = Field(
        default_factory=lambda: dict(WEIGHTS),
        description="What a failure adds to the score, by its name in the table above or by the name of a cause.",
    )
    times: _Times = Field(
        (600.0, 3600.0, 86400.0),
        description="How long the first ban lasts, the second, and so on; the last time repeats.",
        json_schema_extra={"x-default": "[10m, 1h, 1d]"},
    )
    forget: Duration = Field(86400.0, description="How long after a ban the next one is a step longer.")
    per: Literal["client", "network"] = Field(
        "client", description="Whose failures are added up, and who is banned: an address (or an IPv6 /64), a network."
    )
    v4_prefix: Annotated[int, Field(ge=0, le=32)] = Field(24, description="Prefix length of an IPv4 network.")
    v6_prefix: Annotated[int, Field(ge=0, le=128)] = Field(48, description="Prefix length of an IPv6 network.")
    exempt: CidrList = Field((), description="Clients that are neither counted nor banned.")
    trusted_login: Duration = Field(86400.0, description="How long a login protects the client it came from; 0: not.")
    refuse: Literal["tempfail", "reject"] = Field(
        "tempfail", description="421, after which mail servers try again, or 554, after which they give mail back."
    )


class Ban(Stage):
    """Refuse clients that failed too often, for a growing time."""

    Settings = BanSettings
    kind = Kind.GUARD
    settings: BanSettings
    _worker: Worker

    def __init__(self, settings: BanSettings) -> None:
        super().__init__(settings)
        self._windows = (Window(settings.limit.limit, settings.limit.period),)
        self._exempt = NetworkTable.of(settings.exempt)
        self._noting: set[asyncio.Task[None]] = set()
        self._lost = False  # the last of them was, and that is in the log

    async def start(self, worker: Worker) -> None:
        """Keep the worker, for its store."""
        self._worker = worker

    async def stop(self) -> None:
        """Let what is still being counted arrive."""
        await asyncio.gather(*self._noting)

    # -- who is banned

    def connect(self, session: Session) -> Refuse | Awaitable[Refuse | None] | None:
        """Refuse who is banned; remember a login that a trusted peer vouches for (XCLIENT LOGIN)."""
        address = session.client.address
        networks = self._banned_as(address)
        if not networks or address in self._exempt:
            return None
        if session.user:
            self._later(self._logged_in(session.pipeline, address))
        store = self._worker.store.immediate
        if store is None:
            return self._ask_later(session, networks)
        for network in networks:
            ban = store.get_now(self._key("ban", session.pipeline, network))
            if ban is None or self._worker.trusts(address):
                continue
            known = bool(session.user) or store.get_now(self._login_key(session.pipeline, address)) is not None
            if (refuse := self._judge(network, ban, known=known)) is not None:
                return refuse
        return None

    async def _ask_later(self, session: Session, networks: Sequence[str]) -> Refuse | None:
        """`connect` over a store that takes time: all look-ups at once."""
        store, address, pipeline = self._worker.store, session.client.address, session.pipeline
        bans = await asyncio.gather(*(store.get(self._key("ban", pipeline, network)) for network in networks))
        if not any(ban is not None for ban in bans) or self._worker.trusts(address):
            return None
        known = bool(session.user) or await store.get(self._login_key(pipeline, address)) is not None
        for network, ban in zip(networks, bans, strict=True):
            if ban is not None and (refuse := self._judge(network, ban, known=known)) is not None:
                return refuse
        return None

    def _judge(self, network: str, ban: bytes, *, known: bool) -> Refuse | None:
        """The refusal that a ban is for this client; `known`: somebody logged in from there."""
        facts = _facts(ban)
        if known and self.settings.trusted_login and facts.get("by") != "ctl":
            return None
        log = f"ban of {network}: {facts.get('reason') or 'no reason given'}"
        return Refuse(Cause.BANNED, temporary=self.settings.refuse == "tempfail", disconnect=True, log=log)

    def _banned_as(self, address: str) -> list[str]:
        """Under which names this client may be banned, the narrowest first; none for what is no IP address."""
        networks = (network_key(address, 32, 128), client_key(address), self._network(address))
        return [network for network in dict.fromkeys(networks) if network]

    # -- what is counted

    def settled(self, session: Session, outcome: Outcome) -> None:
        """Count a failure, remember a login; neither is waited for."""
        address = session.client.address
        if outcome.phase == "auth" and outcome.cause is None and outcome.reply_class == 2:
            self._later(self._logged_in(session.pipeline, address))
            return
        weight = 0 if _follows_from_a_refusal(session, outcome) else self._weight(outcome)
        if not weight or (session.user and self.settings.trusted_login):
            return
        if client_key(address) and address not in self._exempt and not self._worker.trusts(address):
            self._later(self._count(session, weight, outcome.cause.value if outcome.cause else "refused upstream"))

    def _weight(self, outcome: Outcome) -> int:
        """What this answer adds to the score."""
        weights, cause = self.settings.weights, outcome.cause
        if cause is None:
            return weights["upstream_refusals"] if outcome.reply_class == 5 else 0
        if cause is Cause.BANNED:
            return 0  # who is banned would never be anything else
        if (named := weights.get(cause.name.lower())) is not None:
            return named
        if cause in (Cause.AUTH_FAILED, Cause.LOGIN_REFUSED):
            return weights["auth_failures"] if outcome.phase == "auth" else 0  # later it is our own login
        if cause in _OF_THE_PROTOCOL:
            return weights["protocol_errors"]
        return weights["refusals"] if outcome.reply_class == 5 and cause not in _NO_FAILURES else 0

    async def _count(self, session: Session, weight: int, reason: str) -> None:
        store, pipeline, address = self._worker.store, session.pipeline, session.client.address
        known = self.settings.trusted_login and await store.get(self._login_key(pipeline, address)) is not None
        if known:
            return
        network = client_key(address) if self.settings.per == "client" else self._network(address)
        score = self._key("failures", pipeline, network)
        hit = await store.hit(score, self._windows, weight)
        if hit.allowed and hit.counts[0] < self.settings.limit.limit - _ROUNDING:
            return
        lease = await store.hold(self._key("banning", pipeline, network), 1)
        if lease is None:
            return  # another session's failure is about to ban it
        try:
            await self._ban(session, network, reason)
            await store.clear(score)
        finally:
            lease.release()

    async def _ban(self, session: Session, network: str, reason: str) -> None:
        """Ban a network, unless it is; one at a time."""
        store, times = self._worker.store, self.settings.times
        key, steps = self._key("ban", session.pipeline, network), self._key("bans", session.pipeline, network)
        if await store.get(key) is not None:
            return
        level = int(await store.get(steps) or 0) + 1
        seconds = times[min(level, len(times)) - 1]
        facts = {"until": int(time.time() + seconds), "level": level, "reason": reason, "by": "stage"}
        await store.put(key, json.dumps(facts).encode(), seconds)
        await store.put(steps, b"%d" % level, seconds + self.settings.forget)
        self._worker.log.info(
            "banned", session=session.id, client=session.client.address, stage=self.id, network=network, step=level,
            seconds=seconds, reason=reason,
        )  # fmt: skip

    async def _logged_in(self, pipeline: str, address: str) -> None:
        if self.settings.trusted_login and client_key(address):
            await self._worker.store.put(self._login_key(pipeline, address), b"1", self.settings.trusted_login)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = self._worker.loop.create_task(self._noted(work))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def _noted(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except Exception as error:
            if not self._lost:
                self._worker.log.warning("not_counted", stage=self.id, count="failures and logins", error=str(error))
            self._lost = True
        else:
            self._lost = False

    # -- names in the store

    def _network(self, address: str) -> str:
        return network_key(address, self.settings.v4_prefix, self.settings.v6_prefix)

    def _key(self, kind: str, pipeline: str, network: str) -> str:
        return f"{kind}:{pipeline}:{self.id}:{network}"

    def _login_key(self, pipeline: str, address: str) -> str:
        return self._key("login", pipeline, client_key(address))


def _follows_from_a_refusal(session: Session, outcome: Outcome) -> bool:
    """What a mail client sent together with its login, which failed: that is counted."""
    store = session.protocol in ("imap", "pop3")
    return store and session.auth_failures > 0 and outcome.phase == "command" and outcome.reply is None


def _facts(ban: bytes) -> Mapping[str, object]:
    """What a ban's value says; nothing if somebody wrote what is none: it is a ban all the same."""
    try:
        facts = json.loads(ban)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
