"""`process`: what holds for the whole service, whatever pipelines it runs."""

from __future__ import annotations

import importlib.util
import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from gateway.config.base import Findings, Model
from gateway.config.log_settings import Log
from gateway.values import KIND, Duration, ExistingFile, NotA, PathValue, Secret, Size, parse_percent, shown

_REDIS = re.compile(r"(?:rediss?|redis\+sentinel|rediss\+sentinel|redis\+cluster|rediss\+cluster|unix)://\S+")
_OTEL = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_OTLP = re.compile(r"https?://[^\s/?#@]+((?:/[^\s?#]*)?)")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_TEXT = re.compile(r"[!-~](?:[ -~]*[!-~])?|")
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+|\*):(\d{1,5})")


def _workers(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and 1 <= int(value) <= 64:
        return int(value)
    raise NotA("a number of workers", "a number from 1 to 64, or auto", f"{shown(value)} is no number of workers")


Workers = Annotated[
    int | Literal["auto"],
    PlainValidator(_workers),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 64}, {"const": "auto"}]}),
]


def _address(value: object) -> str:
    """`unix:/path` or `host:port`."""
    text = str(value)
    if isinstance(value, str) and text.startswith("unix:/") and "\0" not in text:
        return text
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None or not 0 < int(found[1]) < 65536:
        kind, example = "an address", "127.0.0.1:9115 or unix:/path"
        raise NotA(kind, example, f"{shown(value)} is not {kind}")
    return text


Address = Annotated[
    str,
    PlainValidator(_address),
    WithJsonSchema({"type": "string", KIND: "host:port, or unix:/path"}),
]


class LmdbStore(Model):
    """Shared by all workers of this host."""

    path: PathValue | None = Field(None, description="Its folder; `store` in `state_directory` by default.")
    size: Size = Field(32 << 20, ge=1 << 20, description="Most octets that it may take.")


def _redis_url(value: object) -> str:
    if not isinstance(value, str) or not _REDIS.fullmatch(value):
        kind, example = "a Redis URL", "redis://host:6379/0, rediss://, redis+sentinel:// or redis+cluster://"
        raise NotA(kind, example, "not a Redis URL")
    return value


class RedisStore(Model):
    """Shared by all gateways that name it."""

    url: Annotated[
        str, PlainValidator(_redis_url), WithJsonSchema({"type": "string", KIND: "Redis URL"})
    ] = Field(
        repr=False,
        description="redis://[user:password@]host[:port][/db], rediss:// with TLS, unix:///path, "
        "redis+sentinel://host:port,host:port/service, redis+cluster://host:port,host:port.",
    )
    password: Secret | None = Field(None, description="Instead of one in the URL.")
    prefix: str = Field("gateway:", pattern=r"^[!-z|~]{0,64}$", description="In front of every key.")
    timeout: Duration = Field(2.0, gt=0, description="Of one question; then the stage's `on_error` decides.")
    ca_file: ExistingFile | None = Field(None, description="CAs for TLS instead of the system's.")


class Store(Model):
    """Where limits are counted: `memory`, `lmdb` or `redis`, with their settings."""

    memory: bool = Field(False, description="In each worker's own memory: only for one worker, forgotten by a reload.")
    lmdb: LmdbStore | None = Field(None, description="For all workers of this host.")
    redis: RedisStore | None = Field(None, description="For all gateways.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.memory + (self.lmdb is not None) + (self.redis is not None) != 1:
            findings = Findings()
            findings.add((), None, "not one store", "write memory, lmdb or redis://host")
            findings.report(self)
        return self


def _store(value: object) -> object:
    """`memory`, `lmdb` and a Redis URL are short forms."""
    if value == "memory":
        return {"memory": True}
    if value == "lmdb":
        return {"lmdb": {}}
    if isinstance(value, str) and _REDIS.fullmatch(value):
        return {"redis": {"url": value}}
    if isinstance(value, dict) and value:
        return {key: {} if inner is None else inner for key, inner in value.items()}
    raise NotA("a store", "memory, lmdb or redis://host:6379", f"{shown(value)} is not a store")


class Admin(Model):
    """Where `gateway ctl` and other programs ask and steer."""

    listen: Address = Field(description="unix:/path, or host:port, which needs a token.")
    token: Secret | None = Field(None, description="What clients must show as `Authorization: Bearer ...`.")
    mode: Annotated[
        int,
        BeforeValidator(lambda value: _mode(value)),
        WithJsonSchema({"type": "string", "pattern": "^0?[0-7]{3}$", KIND: "file mode"}),
    ] = Field(0o600, description="File mode of the socket: who may connect.", json_schema_extra={"default": "0600"})

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        findings = Findings()
        if not self.listen.startswith("unix:") and self.token is None:
            findings.add(("listen",), None, "anybody could steer it over TCP", 'add `token: "${ADMIN_TOKEN}"`')
        if self.listen.startswith("unix:") and self.token is not None:
            findings.add(("token",), None, "a unix socket asks for none: its file mode decides", "remove it")
        elif self.token is not None and not self.token.strip():
            findings.add(("token",), None, "the token is empty", "`openssl rand -hex 32` gives a good one")
        findings.report(self)
        return self


def _mode(value: object) -> int:
    text = f"{value:o}" if isinstance(value, int) and value > 0o777 else str(value)
    if not re.fullmatch(r"0?o?[0-7]{3}", text):
        raise NotA("a file mode", '"0660"', f"{shown(value)} is not a file mode")
    return int(text[-3:], 8)


def _admin(value: object) -> object:
    if value in (False, "off"):
        return None
    return {"listen": value} if isinstance(value, str) else value


def _ratio(value: object) -> float:
    return parse_percent(value) / 100


def _is_there(module: str) -> bool:
    """Whether it could be imported; only the workers do."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False


def _otlp_url(value: object) -> str:
    """Where the collector takes spans; /v1/traces where no path is written (OTLP 1.x, "OTLP/HTTP Request")."""
    found = _OTLP.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        kind, example = "an OTLP address", "http://127.0.0.1:4318/v1/traces, and secrets into `headers`"
        raise NotA(kind, example, f"not {kind}")
    return found[0] if found[1] not in ("", "/") else found[0].removesuffix("/") + "/v1/traces"


def _headers(value: object) -> object:
    """Fit for HTTP (RFC 9110 5.1, 5.5), so that the first batch need not fail to say so."""
    if isinstance(value, dict):
        for name, text in value.items():
            if not _HEADER_NAME.fullmatch(str(name)):
                raise NotA("a header", "authorization", f"{shown(name)} is no name of a header")
            if isinstance(text, str) and not _HEADER_TEXT.fullmatch(text):
                raise NotA("a header", "it in ASCII on one line", f"the value of {name} does not fit into a header")
    return value


class Traces(Model):
    """OpenTelemetry: a span a session, its stages as children. Needs the extra `otel`."""

    endpoint: Annotated[
        str, PlainValidator(_otlp_url), WithJsonSchema({"type": "string", "pattern": "^https?://", KIND: "OTLP URL"})
    ] = Field(description="OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; that path by default.")
    sample: Annotated[
        float, PlainValidator(_ratio), WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)?%$", KIND: "share"})
    ] = Field(0.01, description="Share of the sessions.", json_schema_extra={"default": "1%"})
    headers: Annotated[dict[str, Secret], BeforeValidator(_headers)] = Field(
        {}, description="For the collector, such as an authorization."
    )
    service_name: str = Field("gateway", min_length=1, description="`service.name` of the spans.")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        findings = Findings()
        if not all(map(_is_there, _OTEL)):
            findings.add((), None, "OpenTelemetry is not installed", "pip install 'mail-gateway[otel]'")
        findings.report(self)
        return self


Account = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


class Process(Model):
    """What holds for the whole service, whatever pipelines it runs: at most one `process:` of all files."""

    workers: Workers = Field(1, description="Processes that serve, 1 to 64; auto: one for each processor.")
    user: Account | None = Field(
        None, description="Account that the workers run as, where the gateway is started as root; see operations."
    )
    group: Account | None = Field(None, description="Their group; the account's own by default.")
    store: Annotated[Store | None, BeforeValidator(_store)] = Field(
        None,
        description="Where limits are counted: memory, lmdb, redis://host:6379, or one of them with its settings. lmdb "
        "by default, memory with --no-supervisor.",
    )
    admin: Annotated[Admin | None, BeforeValidator(_admin)] = Field(
        None,
        description="Admin API: off, unix:/path, or `{listen, token}`. By default a socket in the service's runtime "
        "folder, where `gateway ctl` looks.",
    )
    metrics: Address | None = Field(
        None, description="Prometheus metrics without the rest of the admin API: host:port or unix:/path."
    )
    traces: Traces | None = Field(None, description="OpenTelemetry spans.")
    log: Log = Field(Log(), description="For pipelines that have no `log` of their own.")
    drain: Duration = Field(30.0, description="How long sessions may go on after a stop or a reload.")
    state_directory: PathValue | None = Field(
        None,
        description="For what outlives the process: what upstreams announced, the lmdb store. Where systemd says, else "
        "/var/lib/gateway for root, else a folder of the user.",
    )

    @property
    def admin_is_off(self) -> bool:
        """Written as off, which is not the same as not written."""
        return self.admin is None and "admin" in self.model_fields_set

    @model_validator(mode="after")
    def _fits(self) -> Self:
        findings = Findings()
        if self.store is not None and self.store.memory and self.workers != 1:
            findings.add(("store",), None, "workers do not see each other's memory", "write lmdb")
        if self.group is not None and self.user is None:
            findings.add(("group",), None, "a group without a user", "add `user: name`")
        findings.report(self)
        return self
