"""The pipeline file as pydantic models: every key, its type, its default.

Stage entries are only split here; the compiler validates their settings with the models of the stage types.
What one key means for another (a pool that does not exist, a listener without a certificate) is checked here where
it needs nothing but this file.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from gateway.config.addresses import Hostname, Resolver, ServerUrl
from gateway.config.base import Findings as _Findings
from gateway.config.base import Model as _Model
from gateway.config.base import as_url as _as_url
from gateway.config.listen import Listener
from gateway.config.log_settings import Log
from gateway.config.problems import Loc, did_you_mean
from gateway.config.resolver import ResolverSettings
from gateway.config.tls_settings import Tls
from gateway.limits import Limits
from gateway.replies import REFUSALS, Family
from gateway.replies import names as reply_names
from gateway.values import (
    DEFAULT,
    KIND,
    CidrList,
    Condition,
    Duration,
    ExistingFile,
    Identifier,
    NotA,
    PathValue,
    Size,
    parse_percent,
    shown,
)
from gateway.verdicts import Cause


class Trust(_Model):
    """Networks that are believed. Judged by the real TCP peer; loopback is not among them unless written."""

    proxy: CidrList = Field((), description="May send PROXY headers.")
    xclient: CidrList = Field((), description="May send XCLIENT.")
    clients: CidrList = Field((), description="Own systems: their line endings are mended instead of refused.")


# Upstreams


class Server(_Model):
    """A server of a pool."""

    url: ServerUrl = Field(
        description="smtp://host:port, host:port, or with smtps, lmtp, imap, imaps, pop3 or pop3s; lmtp+unix:/path; "
        "embedded://folder."
    )
    weight: int = Field(1, ge=1, le=1000, description="Its share among the servers of the pool.")


class Reuse(_Model):
    """Upstream connections serve several sessions, one after the other."""

    transactions: int = Field(20, ge=1, description="Then the connection is closed.")
    idle: Duration = Field(30.0, description="Then the connection is closed.")


class Health(_Model):
    """Active checks: connect, TLS, greeting, EHLO, QUIT."""

    interval: Duration = Field(10.0, gt=0, description="Between two checks of a server.")
    timeout: Duration = Field(5.0, gt=0, description="Of one check.")
    fall: int = Field(3, ge=1, description="Failures in a row until a server is out.")
    rise: int = Field(2, ge=1, description="Successes in a row until it is back.")
    slow_start: Duration = Field(30.0, description="Time until a server that came back has its full share.")


class PoolCapabilities(_Model):
    """What is known of the servers without asking them."""

    assume: tuple[str, ...] = Field(description="EHLO lines, such as `SIZE 10240000`.")


Balance = Literal["round_robin", "least_connections", "hash_client", "hash_user", "hash_domain"]


def _balance(value: object) -> object:
    return re.sub(r"^hash[ _](?:of[ _])?", "hash_", value) if isinstance(value, str) else value


def _reuse(value: object) -> object:
    if value in (False, "off"):
        return None
    return {} if value in (True, "on") else value


def _health(value: object) -> object:
    """`health: off` asks nothing of the servers but what sessions need."""
    return None if value in (False, "off") else value


class ServerSettings(_Model):
    """How servers are spoken to, those of a pool or those that a stage names."""

    max_connections: int = Field(80, ge=1, description="Per server, over all workers.")
    queue: int = Field(100, ge=0, description="Sessions that wait for a connection; more are 451 4.4.5.")
    queue_timeout: Duration = Field(10.0, description="How long they wait.")
    tls: Literal["off", "opportunistic", "required"] = Field(
        "opportunistic", description="required: verified, or no mail; opportunistic: where offered, and never for AUTH."
    )
    verify: bool = Field(True, description="Where TLS is required: certificate and name.")
    ca_file: ExistingFile | None = Field(None, description="CAs for `verify` instead of the system's.")
    server_name: str | None = Field(None, min_length=1, description="Name for SNI and `verify` instead of the host's.")
    source: str | None = Field(None, description="Local address of the connections.")
    bdat: bool = Field(
        False,
        description="Messages that stages read go out in BDAT chunks (RFC 3030) where the server announces CHUNKING; "
        "others always as DATA.",
    )
    reuse: Annotated[Reuse | None, BeforeValidator(_reuse)] = Field(None, description="off, on, or its limits.")
    capabilities: PoolCapabilities | None = Field(None, description="Believed instead of what the servers say.")
    connect_timeout: Duration = Field(10.0, gt=0, description="Wait for a connection.")
    greeting_timeout: Duration = Field(30.0, gt=0, description="Wait for each of TLS, greeting and EHLO.")
    command_timeout: Duration = Field(300.0, gt=0, description="Wait for a reply (RFC 5321 4.5.3.2).")
    data_done_timeout: Duration = Field(600.0, gt=0, description="Wait for the reply to the end of data.")
    health: Annotated[Health | None, BeforeValidator(_health)] = Field(
        Health(), description="Active checks; off: none, nor is anything asked before a session comes."
    )
    hello: Literal["ehlo", "as_client"] = Field(
        "ehlo", description="EHLO, or HELO for clients that said no EHLO (and then without any extension)."
    )
    allow_plaintext_login: bool = Field(
        False, description="Log in there in clear text over the network, too; unix sockets and loopback always may."
    )

    @field_validator("source")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            raise NotA("an address", "192.0.2.1", f"{shown(value)} is not an address") from None


class Pool(ServerSettings):
    """A named group of upstream servers."""

    servers: tuple[Annotated[Server, BeforeValidator(_as_url)], ...] = Field(
        min_length=1, description="The servers: URLs, or `{url, weight}`."
    )
    balance: Annotated[Balance, BeforeValidator(_balance)] = Field(
        "round_robin", description="Which server is next; hash_*: the same one for the same client, user or domain."
    )

    @field_validator("servers")
    @classmethod
    def _one_protocol(cls, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        """What a client may do in a transaction must not depend on which server is next."""
        if len({server.url.protocol for server in servers}) > 1:
            kind = "a pool of one protocol"
            raise NotA(kind, "one pool for each", "its servers speak several protocols", "write a pool for each")
        return servers


# Tables


class Table(_Model):
    """A named list for conditions (`listed`) and stages: inline, or a file with one entry a line."""

    entries: tuple[str, ...] = Field((), description="The entries; `name: [a, b]` is short for it.")
    file: ExistingFile | None = Field(None, description="One entry a line, `#` for comments; re-read when it changes.")


def _table(value: object) -> object:
    if isinstance(value, dict) and "entries" not in value:
        return value
    if isinstance(value, list):
        return {"entries": value}
    raise NotA("a table", "[one, two] or {file: path}", f"{shown(value)} is not a table")


# Stages


@dataclass(frozen=True, slots=True)
class Mode:
    """What a stage's refusals do: nothing is asked (off), only logged (observe), for `percent` of clients (enforce)."""

    kind: Literal["off", "observe", "enforce"] = "enforce"
    percent: float = 100.0


def _mode(value: object) -> Mode:
    match value:
        case Mode():
            return value
        case "off" | "observe" | "enforce":
            return Mode(value)
    try:
        return Mode("enforce", parse_percent(value))
    except NotA:
        raise NotA("a mode", "off, observe, enforce or 10%", f"{shown(value)} is not a mode") from None


class Reserved(_Model):
    """The settings that every stage has."""

    id: Identifier | None = Field(None, description="Name in logs and of the stage's facts; the type by default.")
    when: Condition | None = Field(None, description="Ask the stage only where this is true.")
    mode: Annotated[
        Mode,
        PlainValidator(_mode),
        WithJsonSchema(
            {
                "anyOf": [{"enum": ["off", "observe", "enforce"]}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}],
                KIND: "off | observe | enforce | share",
                DEFAULT: "enforce",
            }
        ),
    ] = Field(
        Mode(), description="Refuse, only log what would be refused, or refuse for that share of the client networks."
    )
    on_error: Literal["tempfail", "reject", "disconnect", "pass"] | None = Field(
        None, description="What its failure means: 451 (the default), 554, 421 and close, or go on without it."
    )
    timeout: Duration | None = Field(None, gt=0, description="Of one call's waiting; the type has its own default.")
    refuse_at: Literal["rcpt", "now"] | None = Field(
        None, description="When the client is told of a refusal before MAIL: checks wait for RCPT, guards do not."
    )
    discard: Literal["accept", "refuse"] | None = Field(
        None,
        description="When the stage wants a message thrown away: accept it and do so (logged), or refuse it (the "
        "default). For stages that read messages.",
    )


RESERVED = frozenset(Reserved.model_fields)
_RESERVED = TypeAdapter(dict[str, Reserved])


@dataclass(frozen=True, slots=True)
class StageEntry:
    """An entry of `stages`: the type's name, its settings as written (not validated), and the reserved ones.

    `settings` is None for a bare name, a dict without the reserved keys, or the value of the short form.
    """

    name: str
    settings: object = field(repr=False)
    reserved: Reserved
    index: int = 0

    @property
    def loc(self) -> Loc:
        """Where the settings stand in the document."""
        return ("stages", self.index, self.name)

    @property
    def id(self) -> str:
        """The id as written, or the type's name."""
        return self.reserved.id or self.name


def split_entry(raw: object) -> StageEntry:
    """Split `name`, `{name: settings}` or `{name: value}`. Raises NotA, ValidationError (for reserved settings)."""
    if isinstance(raw, StageEntry):
        return raw
    kind, example = "a stage", "`name`, `name: value` or `name: {setting: value}`"
    if isinstance(raw, str) and raw:
        return StageEntry(raw, None, Reserved())
    if not isinstance(raw, dict) or not raw:
        raise NotA(kind, example, f"{shown(raw)} is not a stage")
    name, settings = next(iter(raw.items()))
    if len(raw) > 1:
        second = list(raw)[1]
        text = f"{name!r} and {second!r} stand side by side in one entry"
        advice = f"indent {second!r} below {name!r}" if settings is None else "begin each stage with '- '"
        raise NotA(kind, example, text, advice)
    if not isinstance(settings, dict):
        return StageEntry(name, settings, Reserved())
    reserved = {key: value for key, value in settings.items() if key in RESERVED}
    own = {key: value for key, value in settings.items() if key not in RESERVED}
    return StageEntry(name, own, _RESERVED.validate_python({name: reserved})[name])


_ENTRY_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}],
    "description": "A stage: its name, or its name and settings.",
}
Entry = Annotated[StageEntry, PlainValidator(split_entry), WithJsonSchema(_ENTRY_SCHEMA)]


# The file


def own_hostname() -> str:
    """This machine's full name; asks the resolver only where the plain name is not a full one."""
    name = socket.gethostname()
    return name if "." in name.strip(".") else socket.getfqdn(name)


class Spool(_Model):
    """Where messages stay while a stage that edits them has not answered."""

    when: Literal["auto", "always"] = Field(
        "auto", description="auto: only where a stage may edit; always: every message that a stage reads."
    )
    directory: PathValue | None = Field(None, description="For large messages; the system's temporary folder.")
    memory: Size = Field(262_144, description="Octets of a message above which it goes to a file without a name.")
    total: Size = Field(4 << 30, description="Octets of all files together; above it messages are 452 4.3.1.")


def _spool(value: object) -> object:
    """`spool: always` is short for `spool: {when: always}`."""
    return {"when": value} if isinstance(value, str) else value


def _cause_name(value: str) -> str:
    if value.upper() not in Cause.__members__:
        kind, example = "a cause", "the name of a cause such as upstream_down"
        near = did_you_mean(value.lower(), (name.lower() for name in Cause.__members__))
        raise NotA(kind, example, f"{shown(value)} is not {kind}", near or f"write {example}")
    return value


class WrittenReplies(_Model):
    """Texts of our own replies by name: causes in lower case, and the fixed replies of each protocol."""

    smtp: dict[str, str] = Field({}, description="`name: 451 4.3.2 text`.")
    imap: dict[str, str] = Field({}, description="`name: NO text`, which gets the tag, or `name: '* BYE text'`.")
    pop3: dict[str, str] = Field({}, description="`name: -ERR text`.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        findings = _Findings()
        for family, pattern in _REPLY_FORMS.items():
            for name, text in getattr(self, family).items():
                if name not in reply_names(family):
                    advice = did_you_mean(name, reply_names(family)) or "`docs/reference/replies.md` lists them"
                    findings.add((family, name), name, f"{name!r} is no reply of {family.upper()}", advice)
                elif not pattern.fullmatch(text):
                    findings.add((family, name), text, f"{shown(text)} is no {family.upper()} reply", _EXAMPLES[family])
                elif name in REFUSALS and not _REFUSAL_FORMS[family].match(text):
                    # A client would go on as if it were logged in, or its mail taken.
                    findings.add((family, name), text, f"{shown(text)} is no refusal", _REFUSALS[family])
        findings.report(self)
        return self


_REPLY_FORMS: dict[Family, re.Pattern[str]] = {
    "smtp": re.compile(r"[2-5]\d\d(?: [^\x00-\x1f\x7f]*)?"),
    "imap": re.compile(r"(?:\* |\+ ?)?[^\x00-\x1f\x7f]+"),
    "pop3": re.compile(r"(?:\+OK|-ERR)(?: [^\x00-\x1f\x7f]*)?"),
}
_REFUSAL_FORMS: dict[Family, re.Pattern[str]] = {
    "smtp": re.compile(r"[45]"),
    "imap": re.compile(r"(?:\* )?(?:NO|BAD|BYE)\b"),
    "pop3": re.compile(r"-ERR"),
}
_REFUSALS = {"smtp": "write 451 4.3.2 text", "imap": "write NO text or '* BYE text'", "pop3": "write -ERR text"}
_EXAMPLES = {"smtp": "write 451 4.3.2 text", "imap": "write NO text or '* BYE text'", "pop3": "write +OK text"}


def _line_endings(value: object) -> object:
    return "normalize" if value == "normalise" else value


def _pool_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value):
        kind = "the name of a pool"
        raise NotA(kind, "letters, digits, '_', '.' and '-'", f"{shown(value)} is not {kind}")
    return value


class Pipeline(_Model):
    """One pipeline: listeners, stages, upstreams, and what holds for all of its sessions."""

    name: str = Field("", description="For logs and metrics; the file's name by default.")
    listen: tuple[Annotated[Listener, BeforeValidator(_as_url)], ...] = Field(
        min_length=1, description="Where clients connect: URLs, or mappings."
    )
    hostname: Hostname = Field(
        default_factory=own_hostname,
        description="Name in greetings, EHLO and trace fields; the machine's by default.",
        json_schema_extra={DEFAULT: "the machine's name"},
    )
    tls: Tls = Field(Tls(), description="Certificates and what is asked of clients.")
    trust: Trust = Field(Trust(), description="Networks that are believed.")
    limits: Limits = Field(Limits(), description="Limits and clocks of a session.")
    relay: Literal["open"] | None = Field(None, description="open: relaying for anyone is meant.")
    allow_plaintext_auth: bool = Field(False, description="Offer AUTH without TLS.")
    line_endings: Annotated[Literal["by_trust", "reject", "normalize"], BeforeValidator(_line_endings)] = Field(
        "by_trust",
        description="Lone CR or LF in content: refused (550 5.5.2) or mended; by_trust mends what comes from users who "
        "logged in and from `trust.clients`.",
    )
    nul: Literal["pass", "reject"] = Field("pass", description="NUL in content: passed on, or 550 5.6.0.")
    spool: Annotated[Spool, BeforeValidator(_spool)] = Field(
        Spool(), description="Where messages wait for the verdict of stages that edit them; or auto, always."
    )
    stages: tuple[Entry, ...] = Field(min_length=1, description="The chain, in order; the last one is `splice`.")
    upstreams: dict[Annotated[str, AfterValidator(_pool_name)], Pool] = Field(
        default_factory=dict, description="Pools of servers by name."
    )
    tables: dict[str, Annotated[Table, BeforeValidator(_table)]] = Field(
        default_factory=dict, description='Lists for conditions: `listed("name", text)`.'
    )
    log: Log = Field(Log(), description="Where and how it logs; by default as `process.log` says.")
    soft_bounce: bool = Field(False, description="Every refusal is temporary: for going live.")
    reply_id: bool = Field(True, description="Refusals show the session's id.")
    replies: WrittenReplies = Field(
        WrittenReplies(), description="Other texts for our own replies, by protocol and name (see replies)."
    )
    disconnect_on: tuple[Annotated[str, AfterValidator(_cause_name)], ...] = Field(
        (), description="Causes (see replies), in lower case, after which the session ends once the client was told."
    )
    helo_required: bool = Field(True, description="MAIL and AUTH want HELO or EHLO first (smtpd_helo_required).")
    bare_lf: Literal["refuse", "accept"] = Field(
        "refuse", description="A command that a bare LF ends: 500 5.5.2 and closed, or taken, until the hand-off."
    )
    unauthorized_pipelining: Literal["refuse", "accept"] = Field(
        "refuse",
        description="SMTP commands behind one that must end its group, such as EHLO, AUTH or DATA (RFC 2920 3.1): 554 "
        "5.5.0 and closed, or served. Behind STARTTLS never.",
    )
    dynamic_servers: ServerSettings = Field(
        ServerSettings(), description="How servers are spoken to that stages name and no pool lists (Auth-Server)."
    )
    resolvers: tuple[Resolver, ...] = Field((), description="Name servers; those of the system by default.")
    resolver: ResolverSettings = Field(ResolverSettings(), description="How name servers are asked.")

    @field_validator("stages")
    @classmethod
    def _numbered(cls, entries: tuple[StageEntry, ...]) -> tuple[StageEntry, ...]:
        return tuple(replace(entry, index=index) for index, entry in enumerate(entries))

    @model_validator(mode="after")
    def _listeners(self) -> Self:
        findings = _Findings()
        seen: set[str] = set()
        for index, listener in enumerate(self.listen):
            url, loc = listener.url, ("listen", index, "url")
            if url.implicit_tls and not listener.tls_possible(self.tls):
                advice = "add `tls: {certificates: [{chain: file, key: file}]}`"
                article = "a" if url.scheme == "pop3s" else "an"
                findings.add(loc, None, f"{article} {url.scheme} listener needs a certificate", advice)
            if listener.proxy_protocol == "required" and not self.trust.proxy and not url.path:
                where = ("listen", index, "proxy_protocol")
                findings.add(where, None, "no network may send PROXY headers", "add `trust: {proxy: [network]}`")
            addresses = {one.address for one in url.urls() if one.fixed}
            for address in sorted(addresses & seen):
                findings.add(loc, None, f"{address} is listened on twice", "remove one")
            seen |= addresses
        findings.report(self)
        return self
