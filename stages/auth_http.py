"""Ask an HTTP server who may log in or send, and which upstream serves them, in nginx's auth_http protocol.

A server written for nginx works unchanged: it gets every header field that nginx sends, in nginx's order, and may
answer with everything that nginx reads. Asked in auth (with the credentials), and with `none: true` also for mail
without AUTH: at RCPT, with HELO, MAIL and RCPT as Auth-SMTP-* (`per: session`: for the session's first recipient,
as nginx does; `transaction`, `recipient`: more often, which keeps the gateway reading the conversation). It costs
one request over a kept-alive connection. When no server answers, or with what is no answer, the client gets 454
at AUTH, and 451 at RCPT.

What a server may answer beyond nginx: names, `[v6]` and `unix:/path` in Auth-Server, Auth-Upstream with the name
of a pool; `Auth-Status: OK` alone leaves the choice to `route` and `splice`. Differences, on purpose:

- WAIT asks again after at least a second, at most ten times and within a minute;
- a failed AUTH without Auth-Wait does not close the session (`close_without_wait: true`: it does); the gateway's own
  limits do. Auth-Wait is capped at 120s;
- a refused recipient gets Auth-Error-Code or 550 5.7.1, where nginx says 535 5.7.0 (`error_code: 535 5.7.0`) and
  closes;
- an answer without Auth-Status counts as OK only if it names an upstream: an error page is no login;
- control characters in Auth-SMTP-* are sent as `?`; EXTERNAL is offered only with a verified certificate.

`auth.user` is what the client typed. Auth-User overrides it towards upstreams only (XCLIENT LOGIN, upstream
AUTH) and is never logged. With method none it goes with the upstream that the same answer names.

    stages:
      - auth_http: http://127.0.0.1:8000/auth
      - auth_http:
          urls: ["http://auth1.internal:8000/auth", "https://auth2.internal/auth"]
          headers: {X-Auth-Key: "${AUTH_KEY}", X-Site: [one, two]}
          methods: [plain, login, external]
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from secrets import token_bytes
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gateway import (
    Attempt,
    Authenticated,
    Cause,
    Certificate,
    Digest,
    Duration,
    Exchange,
    HttpClient,
    Kind,
    Password,
    Phase,
    Recipient,
    Refuse,
    Reply,
    Secret,
    Session,
    Settings,
    Stage,
    Token,
    Upstream,
    Worker,
)
from gateway.protocol.auth_http import ERROR_CODE, Answer, parse_answer
from gateway.protocol.http1 import escape
from gateway.protocol.smtp import format_mail, format_rcpt

WAITS = 10  # how often WAIT is obeyed, and the seconds that it may take together
WAIT_SECONDS = 60.0
HOLD_SECONDS = 120.0
CACHED = 10_000

Fields = list[tuple[str, bytes]]
Method = Literal["plain", "login", "cram-md5", "apop", "external", "xoauth2", "oauthbearer"]

_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_OUTSIDE_ASCII = re.compile(rb"[\x00-\x1f\x7f-\xff]")


class AuthServerError(Exception):
    """The auth server said what helps nobody; the text quotes nothing secret."""


def _url(url: str) -> str:
    HttpClient([url])  # raises ValueError with a text for the administrator
    return url


def _header_name(name: str) -> str:
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError("not the name of a header field; write letters, digits and -")
    return name


def _header_value(value: Secret) -> Secret:
    if _CONTROL.search(value.reveal().encode()):
        raise ValueError("a header field holds no control characters")
    return value


def _error_code(code: str) -> str:
    if not ERROR_CODE.fullmatch(code):
        raise ValueError("not the code of an error; write 535 5.7.0")
    return code


def _listed(value: object) -> object:
    if value == []:
        raise ValueError("an empty list would send nothing; remove it")
    return value if isinstance(value, (list, tuple)) else [value]


HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[Secret, AfterValidator(_header_value)]
HeaderValues = Annotated[
    tuple[HeaderValue, ...],
    BeforeValidator(_listed, json_schema_input_type=HeaderValue | tuple[HeaderValue, ...]),
]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class AuthHttpSettings(Settings):
    """Which servers are asked, for whom, with what."""

    short_form: ClassVar[str | None] = "url"

    url: Annotated[str, AfterValidator(_url)] | None = Field(
        None, description="The auth server: http://host:port/path, https://..., unix:/path:/uri."
    )
    urls: tuple[Annotated[str, AfterValidator(_url)], ...] = Field(
        (), description="Several servers: the first that answers counts; one that fails is left alone for 5s."
    )
    headers: dict[HeaderName, HeaderValues] = Field(
        default_factory=dict,
        description="Header fields sent with every request, such as a shared key; a list is a field for each value.",
    )
    request_timeout: Duration = Field(15.0, gt=0, description="One question, all servers tried together.")
    connections: int = Field(32, ge=1, description="Connections to each server; more questions wait.")
    methods: tuple[Annotated[Method, BeforeValidator(_lower)], ...] = Field(
        ("plain", "login"), description="SASL mechanisms that the server verifies; [] for none."
    )
    none: bool = Field(False, description="Ask about mail without AUTH too, with Auth-Method none, at RCPT.")
    per: Literal["session", "transaction", "recipient"] = Field(
        "session", description="How often a session without AUTH is asked about."
    )
    required: bool | None = Field(None, description="MAIL before AUTH is 530. Default: true unless `none`.")
    cache: Duration = Field(
        0.0, le=60, description="How long an OK is remembered for exactly the same request, at most 60s; 0: not."
    )
    error_code: Annotated[str, AfterValidator(_error_code)] | None = Field(
        None,
        description="Code where the server sends no Auth-Error-Code; default 535 5.7.0 at AUTH and 550 5.7.1 at RCPT.",
    )
    close_without_wait: bool = Field(
        False, description="As nginx: an error without Auth-Wait ends the session once the client has read it."
    )
    pass_client_certificate: bool = Field(False, description="Send the client's certificate as Auth-SSL-Cert.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.url is None) == (not self.urls):
            raise ValueError("write either url or urls")
        if not self.methods and not self.none:
            raise ValueError("methods: [] without none: true asks nothing")
        if self.required and not self.methods:
            raise ValueError("required: true needs methods")
        return self


class _Memory:
    """Of a session or transaction: the last answer with method none, and the recipient that it was about."""

    __slots__ = ("certificate", "count", "recipient", "verdict")

    def __init__(self) -> None:
        self.count = 0
        self.recipient: Recipient | None = None
        self.verdict: Refuse | Upstream | None = None
        self.certificate: Fields | None = None


class AuthHttp(Stage):
    """Ask an HTTP server in nginx's auth_http protocol."""

    Settings = AuthHttpSettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    names_servers = True
    only_without_login = True
    timeout = 15.0 + WAIT_SECONDS
    settings: AuthHttpSettings
    _clock: Callable[[], float]

    def __init__(self, settings: AuthHttpSettings) -> None:
        super().__init__(settings)
        self.required = not settings.none if settings.required is None else settings.required
        self.route_phase = Phase.RCPT
        urls = settings.urls or (settings.url or "",)
        self._client = HttpClient(urls, timeout=settings.request_timeout, max_connections=settings.connections)
        self._headers: Fields = [
            (name, value.reveal().encode()) for name, values in settings.headers.items() for value in values
        ]
        self._mechanisms = tuple(method.upper() for method in settings.methods)
        self._cache: dict[bytes, tuple[float, Answer, str]] = {}  # until when, what, about whom
        self._key = token_bytes(32)
        self._sleep = asyncio.sleep

    async def start(self, worker: Worker) -> None:
        """Connections are opened when the first client asks."""
        self._clock = worker.clock

    async def stop(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def phases(self) -> Sequence[str]:
        """AUTH; RCPT where later recipients are asked about too."""
        asked = ("auth",) if self._mechanisms else ()
        if not self.settings.none:
            return asked
        return (*asked, "route") if self.settings.per == "session" else (*asked, "route", "rcpt")

    def mechanisms(self, session: Session) -> Sequence[str]:
        """As configured; EXTERNAL only with a verified client certificate, APOP in POP3."""
        verified = session.tls is not None and session.tls.verified
        return tuple(
            name
            for name in self._mechanisms
            if (name != "EXTERNAL" or verified) and (name != "APOP" or session.protocol == "pop3")
        )

    async def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """Ask with the client's credentials."""
        given = attempt.credentials
        if isinstance(given, Exchange) or given.mechanism not in self.mechanisms(session):
            return None
        if isinstance(given, Password) and given.authzid not in ("", given.user):
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: no user may act for another")
        fields = _credentials(given)
        fields += [("Auth-Protocol", _protocol(session)), ("Auth-Login-Attempt", b"%d" % attempt.number)]
        asked = [*fields, *_client(session), *self._tls(session), *self._headers]
        answer = await self._ask(session, asked, _user(given))
        if answer.error is not None:
            code = answer.code or self.settings.error_code or "535 5.7.0"
            cause = Cause.AUTH_FAILED if code[0] == "5" else Cause.AUTH_UNAVAILABLE
            return self._refuse(session, cause, code, answer)
        user = _user(given) or answer.user
        if not user:
            raise AuthServerError("said OK without naming the user of a certificate (Auth-User)")
        typed = given.password if isinstance(given, Password) else None
        password = typed if answer.password is None else answer.password
        token = given.token if isinstance(given, Token) and answer.password is None else None
        return Authenticated(
            user, identity=answer.user, password=password, upstream=_upstream(answer), token=token
        )

    async def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        """Ask about every recipient, or every transaction, of a client without AUTH."""
        verdict = await self._without_auth(session, recipient)
        return verdict if isinstance(verdict, Refuse) else None

    async def route(self, session: Session, recipient: Recipient | None) -> Refuse | Upstream | None:
        """The upstream of a client without AUTH; with AUTH, the one that came with it."""
        return await self._without_auth(session, recipient)

    async def _without_auth(self, session: Session, recipient: Recipient | None) -> Refuse | Upstream | None:
        """Method none: the answer that still holds, or a new one."""
        transaction = session.transaction
        if session.user or transaction is None or recipient is None:
            return session.upstream
        memory = session.state(self, _Memory)
        asked = memory if self.settings.per == "session" else transaction.state(self, _Memory)
        holds = self.settings.per != "recipient" and not isinstance(asked.verdict, Refuse)
        if asked.recipient is recipient or (asked.recipient is not None and holds):
            return asked.verdict
        memory.count += 1
        helo = _clean(session.helo)
        mail = format_mail(transaction.original_sender, transaction.parameters)
        rcpt = format_rcpt(recipient.original, recipient.parameters)
        answer = await self._ask(
            session,
            [
                ("Auth-Method", b"none"),
                ("Auth-User", b""),
                ("Auth-Pass", b""),
                ("Auth-Protocol", _protocol(session)),
                ("Auth-Login-Attempt", b"%d" % (session.auth_failures + memory.count)),
                *_client(session),
                ("Auth-SMTP-Helo", helo),
                ("Auth-SMTP-From", _CONTROL.sub(b"?", mail)),
                ("Auth-SMTP-To", _CONTROL.sub(b"?", rcpt)),
                *self._tls(session),
                *self._headers,
            ],
        )
        if answer.error is not None:
            code = answer.code or self.settings.error_code or "550 5.7.1"
            asked.verdict = self._refuse(session, Cause.POLICY, code, answer)
        else:
            asked.verdict = _upstream(answer, answer.user)
        asked.recipient = recipient
        return asked.verdict

    async def _ask(self, session: Session, fields: Fields, user: str = "") -> Answer:
        """The server's last word, or what it said a moment ago. Raises HttpError, PeerError, AuthServerError."""
        if not self.settings.cache:
            return await self._decided(session.protocol, fields)
        key = _cache_key(self._key, fields)
        known = self._cache.get(key)
        if known is not None and known[0] > self._clock():
            return known[1]
        answer = await self._decided(session.protocol, fields)
        if answer.error is None:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[key] = (self._clock() + self.settings.cache, answer, (user or answer.user).lower())
        return answer

    def clear_cache(self, user: str) -> int:
        """Forget what the server said about `user` (about all if empty); how many answers."""
        keys = [key for key, (_, _, whose) in self._cache.items() if user.lower() in ("", whose)]
        for key in keys:
            del self._cache[key]
        return len(keys)

    async def _decided(self, protocol: str, fields: Fields) -> Answer:
        """Ask, and ask again while the server says WAIT."""
        waited = 0.0
        for _ in range(WAITS + 1):
            answer = parse_answer((await self._client.get(fields)).headers, protocol)
            if not answer.wait:
                return answer
            pause = max(1.0, answer.seconds)
            waited += pause
            if waited > WAIT_SECONDS:
                break
            await self._sleep(pause)
        raise AuthServerError("said WAIT for too long")

    def _refuse(self, session: Session, cause: Cause, code: str, answer: Answer) -> Refuse:
        """The server's error text as the client's reply, after Auth-Wait. IMAP and POP3 have no codes that close."""
        ends = code[:3] in ("421", "521") and session.protocol in ("smtp", "lmtp")
        if code[:3] in ("421", "521") and not ends:
            code = "454 4.7.0" if code[0] == "4" else "535 5.7.0"
        reply = Reply.of(f"{code} {answer.error}")
        return Refuse(
            cause,
            temporary=reply.code < 500,
            reply=reply,
            hold=min(answer.seconds, HOLD_SECONDS),
            disconnect=ends or (self.settings.close_without_wait and not answer.seconds),
        )

    def _tls(self, session: Session) -> Fields:
        """Auth-SSL-*: what the handshake settled, and the certificate if one was asked for."""
        tls = session.tls
        if tls is None:
            return []
        fields = [
            ("Auth-SSL", b"on"),
            ("Auth-SSL-Protocol", tls.version.encode()),
            ("Auth-SSL-Cipher", tls.cipher.encode()),
        ]
        if not tls.verification:
            return fields
        fields.append(("Auth-SSL-Verify", _clean(tls.verification)))
        if tls.certificate is None:
            return fields
        memory = session.state(self, _Memory)
        if memory.certificate is None:
            memory.certificate = _certificate(tls.certificate, self.settings.pass_client_certificate)
        return fields + memory.certificate


def _credentials(given: Password | Digest | Token | Certificate) -> Fields:
    """Auth-Method, -User, -Pass and, for CRAM-MD5 and APOP, -Salt."""
    salt: Fields = []
    if isinstance(given, Password):
        method, secret = b"plain", given.password
    elif isinstance(given, Digest):
        method, secret = given.mechanism.lower().encode(), given.digest
        salt = [("Auth-Salt", _CONTROL.sub(b"?", given.challenge))]
    elif isinstance(given, Token):
        method, secret = given.mechanism.lower().encode(), given.token
    else:
        method, secret = b"external", ""
    return [("Auth-Method", method), ("Auth-User", _escaped(_user(given))), ("Auth-Pass", _escaped(secret)), *salt]


def _client(session: Session) -> Fields:
    """Client-IP, Client-Host and, if a PROXY header had addresses, Proxy-Protocol-*."""
    client = session.client
    if client.name_status == "ok" and client.name:
        name = _clean(client.name)
    else:
        name = b"[TEMPUNAVAIL]" if client.name_status == "tempunavail" else b"[UNAVAILABLE]"
    fields = [("Client-IP", client.address.encode())]
    if session.protocol in ("smtp", "lmtp"):
        fields.append(("Client-Host", name))
    header = session.proxy_header
    if header is not None and header.source is not None and header.destination is not None:
        fields += [
            ("Proxy-Protocol-Addr", header.source[0].encode()),
            ("Proxy-Protocol-Port", b"%d" % header.source[1]),
            ("Proxy-Protocol-Server-Addr", header.destination[0].encode()),
            ("Proxy-Protocol-Server-Port", b"%d" % header.destination[1]),
        ]
    return fields


def _certificate(der: bytes, whole: bool) -> Fields:
    """What nginx tells of a client certificate: names as RFC 2253, serial number and SHA-1 in hexadecimal."""
    from cryptography import x509  # heavy: only where clients show certificates
    from cryptography.hazmat.primitives import hashes, serialization

    try:
        certificate = x509.load_der_x509_certificate(der)
        email = {x509.NameOID.EMAIL_ADDRESS: "emailAddress"}
        subject = certificate.subject.rfc4514_string(email)
        issuer = certificate.issuer.rfc4514_string(email)
    except ValueError:
        raise AuthServerError("cannot be told of a malformed client certificate") from None
    serial = f"{certificate.serial_number:X}"
    fields = [
        ("Auth-SSL-Subject", _ascii(subject)),
        ("Auth-SSL-Issuer", _ascii(issuer)),
        ("Auth-SSL-Serial", ("0" * (len(serial) % 2) + serial).encode()),
        ("Auth-SSL-Fingerprint", certificate.fingerprint(hashes.SHA1()).hex().encode()),
    ]
    if whole:
        fields.append(("Auth-SSL-Cert", escape(certificate.public_bytes(serialization.Encoding.PEM))))
    return [(name, value) for name, value in fields if value]


def _protocol(session: Session) -> bytes:
    return b"smtp" if session.protocol == "lmtp" else session.protocol.encode()


def _escaped(text: str) -> bytes:
    return escape(text.encode("utf-8", "surrogateescape"))


def _clean(text: str) -> bytes:
    """What goes unescaped into a header field, without control characters."""
    return _CONTROL.sub(b"?", text.encode("utf-8", "surrogateescape"))


def _ascii(name: str) -> bytes:
    r"""Other bytes as \XX, as OpenSSL writes RFC 2253 names."""
    return _OUTSIDE_ASCII.sub(lambda match: b"\\%02X" % match[0][0], name.encode())


def _cache_key(key: bytes, fields: Fields) -> bytes:
    """An HMAC over everything that the server would see."""
    mac = blake2b(key=key, digest_size=32)
    for name, value in fields:
        mac.update(b"%s: %d\r\n%s\r\n" % (name.encode(), len(value), value))
    return mac.digest()


def _upstream(answer: Answer, identity: str = "") -> Upstream | None:
    if answer.pool:
        return Upstream(pool=answer.pool, identity=identity)
    return Upstream(server=answer.server, identity=identity) if answer.server else None


def _user(given: Password | Digest | Token | Certificate) -> str:
    return given.authzid if isinstance(given, Certificate) else given.user
