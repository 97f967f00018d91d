"""The `tls:` keys of a pipeline or listener, and what nginx's ssl_conf_command means in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from gateway.config.base import Findings, Model
from gateway.config.problems import did_you_mean
from gateway.relay.tls_session import TlsConfigError
from gateway.relay.tls_settings import OPTIONS, UnknownOption, option_flags
from gateway.values import DEFAULT, KIND, Duration, ExistingFile, NotA, parse_size, shown

SESSION = 256  # octets that nginx's shared caches take for a session: 4000 in a megabyte


class Certificate(Model):
    """A certificate chain and its private key, both PEM."""

    chain: ExistingFile = Field(description="Certificate and intermediates, leaf first.")
    key: ExistingFile = Field(description="Private key; where it is encrypted `password_file` opens it.")


@dataclass(frozen=True, slots=True)
class SessionCache:
    """Where sessions that tickets do not carry are kept: `kind` as written, and room for how many."""

    kind: Literal["off", "none", "builtin", "shared"] = "none"
    sessions: int = 20480


def _session_cache(value: object) -> SessionCache:
    kind, example = "a session cache", "off, none, builtin, {builtin: 1000} or {shared: 1m}"
    match value:
        case SessionCache():
            return value
        case False:
            return SessionCache("off")
        case "off" | "none" | "builtin":
            return SessionCache(value)
        case {"builtin": int(sessions), **rest} if not rest and sessions > 0:
            return SessionCache("builtin", sessions)
        case {"shared": size, **rest} if not rest:
            octets = parse_size(size)
            if octets >= SESSION:
                return SessionCache("shared", octets // SESSION)
            raise NotA(kind, example, f"{shown(size)} is too small for {kind}", f"write {SESSION} or more")
    raise NotA(kind, example, f"{shown(value)} is not {kind}")


def _written(cache: SessionCache) -> object:
    if cache.kind == "shared":
        return {"shared": cache.sessions * SESSION}
    return cache.kind if cache == SessionCache(cache.kind) else {cache.kind: cache.sessions}


_CacheSetting = Annotated[
    SessionCache,
    PlainValidator(_session_cache),
    PlainSerializer(_written),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["off", "none", "builtin"]},
                {
                    "type": "object",
                    "properties": {"builtin": {"type": "integer"}, "shared": {"type": ["string", "integer"]}},
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
            ],
            KIND: "off | none | builtin | {builtin: sessions} | {shared: size}",
            DEFAULT: "none",
        }
    ),
]


def _version(value: object) -> object:
    """`1.2` and `TLSv1.2` are the same; so are 1, 1.0, TLSv1 and TLSv1.0."""
    text = str(value).removeprefix("TLSv")
    return "TLSv1" if text in ("1", "1.0") else f"TLSv{text}" if text in ("1.1", "1.2", "1.3") else value


Version = Annotated[Literal["TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"], BeforeValidator(_version)]
VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")


def _verify(value: object) -> object:
    return "off" if value is False else "required" if value is True or value == "on" else value


def _option(value: str) -> str:
    kind, example = "an option of OpenSSL", "PrioritizeChaCha or -SessionTicket"
    try:
        option_flags([value])
    except UnknownOption as error:
        near = did_you_mean(error.name, OPTIONS)
        raise NotA(kind, example, f"{shown(error.name)} is not {kind}", near or f"write {example}") from None
    except TlsConfigError as error:
        raise NotA(kind, example, str(error), "remove it") from None
    return value


class Tls(Model):
    """TLS towards clients."""

    certificates: tuple[Certificate, ...] = Field((), description="Chosen by SNI; the first is the default.")
    password_file: ExistingFile | None = Field(
        None, description="Passphrases of encrypted keys, one a line; each is tried."
    )
    client_ca: ExistingFile | None = Field(
        None, description="CAs that client certificates are verified with, and that clients are told."
    )
    trusted_ca: ExistingFile | None = Field(
        None, description="CAs that client certificates are verified with, and that clients are not told."
    )
    crl: ExistingFile | None = Field(
        None, description="Revocation lists (PEM), one of each CA in a client certificate's chain."
    )
    verify_client: Annotated[
        Literal["off", "optional", "optional_no_ca", "required"], BeforeValidator(_verify)
    ] = Field(
        "off",
        description="Ask clients for a certificate. required: one that verifies, or the session is refused; optional: "
        "none, or one that verifies; optional_no_ca: its issuer may be unknown, which `tls.verified` tells.",
    )
    verify_depth: int = Field(
        1, ge=0, le=100, description="Intermediate CAs that may stand between a client certificate and a CA."
    )
    dhparam: ExistingFile | None = Field(
        None, description="Diffie-Hellman parameters (PEM), for DHE with clients that offer no group of RFC 7919."
    )
    curves: str | None = Field(
        None, min_length=1, description="Groups for the key exchange, such as `X25519:prime256v1`; OpenSSL's own else."
    )
    session_cache: _CacheSetting = Field(
        SessionCache(),
        description="off: no session is resumed, by ticket neither; none: only by ticket; builtin: sessions are kept, "
        "for clients without tickets; {builtin: 1000}: that many; {shared: 1m}: one for each 256 octets. Never more "
        "than 20480, OpenSSL's own bound. Listeners that share these settings share the cache, whatever certificate "
        "they show.",
    )
    session_tickets: bool = Field(True, description="Give clients tickets (RFC 5077, RFC 8446) to resume with.")
    session_timeout: Duration = Field(
        300.0, ge=1, description="How long sessions and tickets can be resumed; whole seconds."
    )
    minimum_version: Version = Field(
        "TLSv1.2", description="Older ones are not spoken. TLSv1 and TLSv1.1 need `@SECLEVEL=0` in `ciphers`."
    )
    maximum_version: Version | None = Field(None, description="Newer ones are not spoken.")
    ciphers: str | None = Field(
        None,
        min_length=1,
        description="OpenSSL cipher list for TLS 1.2 and older; names that begin with TLS_ are for TLS 1.3.",
    )
    ciphersuites: str | None = Field(None, min_length=1, description="Those of TLS 1.3, separated by colons.")
    prefer_server_ciphers: bool = Field(False, description="The order of our ciphers counts, not the client's.")
    options: tuple[Annotated[str, AfterValidator(_option)], ...] = Field(
        (),
        description="OpenSSL's options by the names of SSL_CONF_cmd(3): `PrioritizeChaCha`, `-SessionTicket`; they "
        "count more than the settings above.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        findings = Findings()
        if self.verify_client in ("optional", "required") and self.client_ca is None and self.trusted_ca is None:
            findings.add(("verify_client",), None, "no CA to verify client certificates with", "add `client_ca: file`")
        minimum, maximum = self.minimum_version, self.maximum_version
        if maximum is not None and VERSIONS.index(maximum) < VERSIONS.index(minimum):
            text = f"{maximum} is older than minimum_version {minimum}"
            findings.add(("maximum_version",), maximum, text, f"write {minimum} or newer, or set minimum_version")
        elif minimum in ("TLSv1", "TLSv1.1") and "@SECLEVEL=0" not in (self.ciphers or "").upper():
            text = f"OpenSSL speaks {minimum} only at security level 0"
            advice = 'add `ciphers: "DEFAULT:@SECLEVEL=0"`, or write TLSv1.2'
            findings.add(("minimum_version",), minimum, text, advice)
        findings.report(self)
        return self


# nginx's ssl_conf_command


def _conf_options(value: str) -> dict[str, object]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    option_flags(names)
    return {"options": names}


def _conf_version(key: str, none: str) -> Callable[[str], dict[str, object]]:
    """MinProtocol and MaxProtocol; `None` there means no bound."""

    def version(value: str) -> dict[str, object]:
        written = none if value.lower() == "none" else _version(value)
        if written not in VERSIONS:
            raise ValueError(f"{value} is not a version of TLS that can be spoken")
        return {key: written}

    return version


def _conf_text(key: str) -> Callable[[str], dict[str, object]]:
    return lambda value: {key: value}


_CONF_COMMANDS: dict[str, Callable[[str], dict[str, object]]] = {
    "options": _conf_options,
    "certificate": lambda value: {"certificates": [{"chain": value}]},
    "privatekey": lambda value: {"certificates": [{"key": value}]},
    "ciphersuites": _conf_text("ciphersuites"),
    "cipherstring": _conf_text("ciphers"),
    "minprotocol": _conf_version("minimum_version", "TLSv1"),
    "maxprotocol": _conf_version("maximum_version", "TLSv1.3"),
    "curves": _conf_text("curves"),
    "groups": _conf_text("curves"),
    "dhparameters": _conf_text("dhparam"),
}


def conf_command(name: str, value: str) -> dict[str, object]:
    """The settings that a command of SSL_CONF_cmd(3) (file form, any case) stands for.

    Certificate and PrivateKey give a half of an entry of `certificates` each, `{"chain": file}` and `{"key": file}`.
    Raises ValueError for commands and values that have no setting.
    """
    convert = _CONF_COMMANDS.get(name.lower())
    if convert is None:
        raise ValueError(f"OpenSSL's command {name} has no setting")
    if not value:
        raise ValueError(f"OpenSSL's command {name} needs a value")
    return convert(value)
