"""The stages of an imported pipeline, in the order of nginx's life of a connection."""

from __future__ import annotations

import re

from gateway.nginx import auth_http, limits, values
from gateway.nginx.conf import Directive
from gateway.nginx.merge import Server
from gateway.nginx.values import Invalid, Lookup
from gateway.nginx.write import Map, Scalar
from gateway.values import format_duration

DEFAULT_PORTS = {"smtp": 25, "imap": 143, "pop3": 110}
POOL = "upstream"
WAITS = 60.0  # how long WAIT may put off an answer, besides the question itself
LONGEST_LOOKUP = 30.0
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Stages:
    """Builds the chain of one server. `local`: what answers auth_http in the same file, if anything does."""

    def __init__(self, server: Server, local: auth_http.Local | None, lookup: Lookup) -> None:
        self.server = server
        self.local = local
        self.lookup = lookup
        self.methods = server.words(f"{server.protocol}_auth")
        self.none = server.protocol == "smtp" and "none" in self.methods
        self.open_relay = self.none
        self.upstreams = Map()

    def chain(self) -> list[Scalar | Map]:
        """The stages; fills `upstreams`."""
        server, smtp = self.server, self.server.protocol == "smtp"
        chain: list[Scalar | Map] = []
        if smtp and self._resolving:
            chain.append(self._reverse_dns())
        if smtp and server.seconds("smtp_greeting_delay"):
            delay = format_duration(server.seconds("smtp_greeting_delay"))
            chain.append(Map().put("greeting_delay", delay, server.comment("smtp_greeting_delay")))
        chain += self._identity()
        version = server.word("proxy_protocol")
        if version != "off":
            header = Map().put("version", 2 if version == "v2" else 1).put("destination", "local")
            chain.append(Map().put("proxy_header", header, server.comment("proxy_protocol")))
        if smtp and server.flag("xclient"):
            xclient = Map().put("if_missing", "send").put("attributes", ["ADDR", "LOGIN", "NAME"])
            xclient.put("login", not server.flag("proxy_smtp_auth"))
            chain.append(Map().put("xclient", xclient, server.comment("xclient")))
        if smtp and server.flag("proxy_smtp_auth") and not self.static:
            upstream_auth = Map().put("credentials", "client").put("if_missing", "send")
            chain.append(Map().put("upstream_auth", upstream_auth, server.comment("proxy_smtp_auth")))
        splice = Map()
        if self.upstreams:
            splice.put("pool", POOL)
        splice.put("handoff", "always")
        comment = server.comment("proxy_pass_error_message")
        passed = "always" if server.flag("proxy_pass_error_message") else "never"
        splice.put("pass_error_message", passed, comment)
        self._unused()
        return [*chain, Map().put("splice", splice)]

    # -- who may log in, and where they go

    @property
    def _static(self) -> tuple[str, int] | None:
        """The upstream of a location that decides nothing, where the gateway can do without asking it."""
        if self.local is None or self.server.written("proxy_pass"):
            return None
        passwords = self.server.protocol != "smtp" or self.server.flag("proxy_smtp_auth")
        if self.none:
            passwords = set(self.methods) == {"none"} and not self.server.flag("proxy_smtp_auth")
        return self.local.upstream if passwords else None

    @property
    def static(self) -> bool:
        """No auth server is asked, so none names servers."""
        return self._static is not None or not self.server.written("auth_http")

    def _identity(self) -> list[Scalar | Map]:
        server = self.server
        proxy_pass, directive = server.one("proxy_pass"), server.one("auth_http")
        if proxy_pass is not None:
            server.findings.warning(
                proxy_pass, "proxy_pass: nginx's mail module does not know it; imported as the one upstream"
            )
            self._pool(proxy_pass, proxy_pass.arguments[0])
            if directive is not None:
                if self.local is not None:
                    self._keep_http(directive, self.local)
                return [self._auth_http(directive)]
            return [self._auth_relay(proxy_pass)] if server.relays_auth else [self._route()]
        assert directive is not None
        if self.local is None:
            return [self._auth_http(directive)]
        static = self._static
        if static is None:
            self._keep_http(directive, self.local)
            return [self._auth_http(directive)]
        host = f"[{static[0]}]" if ":" in static[0] else static[0]
        location = self.local.location or self.local.server
        self._pool(location, f"{host}:{static[1]}")
        if self.none:
            text = "replaced by the upstream that it always names"
            server.findings.warning(directive, f"auth_http: {location.place} lets everybody send; {text}")
            return [self._route()]
        text = "replaced by the upstream that it always names, which has to know the passwords"
        server.findings.warning(directive, f"auth_http: {location.place} lets everybody in; {text}")
        verify = Map().put("credentials", "client").put("verify", "upstream").put("mechanisms", ["PLAIN", "LOGIN"])
        if server.protocol == "smtp":
            verify.put("if_missing", "send")
        return [Map().put("upstream_auth", verify, str(directive))]

    def _auth_relay(self, proxy_pass: Directive) -> Map:
        """AUTH is the upstream's, with the mechanisms that are listed, if any are."""
        name = f"{self.server.protocol}_auth"
        listed = [method.upper() for method in dict.fromkeys(self.methods) if method in ("plain", "login", "cram-md5")]
        settings, comment = Map(), str(proxy_pass)
        if self.server.written(name):
            settings.put("mechanisms", listed, self.server.comment(name))
            others = [method for method in self.methods if method.upper() not in listed]
            if others:
                text = f"{name}: {', '.join(others)} cannot be left to the upstream of proxy_pass"
                self.server.findings.unequal(self.server.written(name)[-1], text)
        return Map().put("auth_relay", settings, comment)

    def _route(self) -> Map:
        """Everybody to the one upstream; at the first recipient, as nginx, which answers EHLO and MAIL itself."""
        rule = Map().put("when", 'rcpt.to != ""').put("to", POOL)
        return Map().put("route", Map().put("rules", [rule]), "at the first RCPT, as nginx")

    def _keep_http(self, directive: Directive, local: auth_http.Local) -> None:
        text = (
            f"auth_http: this asks the server {{}} at {local.server.place} in http {{}}: IT MUST KEEP RUNNING in nginx"
        )
        if local.upstream is not None:
            text += "; it lets everybody in with any password, which has no equal here"
        self.server.findings.warning(directive, text)

    def _pool(self, directive: Directive, where: str) -> None:
        server = self.server
        try:
            host, port = values.host_port(where.removeprefix("http://").rstrip("/"))
            number = values.port_number(port) if port else DEFAULT_PORTS[server.protocol]
        except Invalid as error:
            server.findings.unequal(directive, f"{directive.name}: {error}")
            return
        if not host:
            server.findings.unequal(directive, f"{directive.name}: names no host")
            return
        host = f"[{host}]" if ":" in host else host
        pool = Map().put("servers", [f"{server.protocol}://{host}:{number}"], str(directive))
        pool.entries += (limits.computed_servers if self.server.relays_auth else limits.servers)(server).entries
        self.upstreams.put(POOL, pool)

    def _auth_http(self, directive: Directive) -> Map:
        server = self.server
        settings = Map()
        try:
            settings.put("url", str(auth_http.parse(directive.arguments[0])), str(directive))
        except Invalid as error:
            server.findings.fatal(directive, str(error))
        timeout = limits.positive(server, "auth_http_timeout")
        settings.put("request_timeout", format_duration(timeout), server.comment("auth_http_timeout"))
        settings.put("timeout", format_duration(timeout + WAITS), "with what the server may ask to wait")
        headers = self._headers()
        if headers:
            settings.put("headers", headers, "auth_http_header")
        extra = [name for name in ("apop", "cram-md5", "external") if name in self.methods]
        settings.put("methods", ["plain", "login", *extra], self._methods_comment())
        if server.protocol == "smtp":
            settings.put("none", self.none)
            if self.none:
                settings.put("per", "session", "the first recipient only").put("error_code", "535 5.7.0")
        settings.put("close_without_wait", True)
        passed = server.flag("auth_http_pass_client_cert")
        settings.put("pass_client_certificate", passed, server.comment("auth_http_pass_client_cert"))
        return Map().put("auth_http", settings)

    def _methods_comment(self) -> str:
        return f"{self.server.comment(f'{self.server.protocol}_auth')} plain and login are always taken"

    def _headers(self) -> Map:
        """A field for each directive; the values of a name together."""
        fields: dict[str, list[Scalar]] = {}
        for directive in self.server.written("auth_http_header"):
            name, value = directive.arguments
            if not _HEADER_NAME.fullmatch(name) or _CONTROL.search(value):
                text = f"auth_http_header: {name!r} has other characters than header fields of HTTP"
                self.server.findings.unequal(directive, text)
                continue
            fields.setdefault(name, []).append(value)
        written = Map()
        for name, values_of_name in fields.items():
            written.put(name, values_of_name if len(values_of_name) > 1 else values_of_name[0])
        return written

    # -- names of clients

    @property
    def _resolving(self) -> bool:
        return bool(self.server.words("resolver")) and self.server.word("resolver") != "off"

    def _reverse_dns(self) -> Map:
        """nginx gives each of two questions its time; the gateway both together."""
        timeout = limits.positive(self.server, "resolver_timeout")
        wait = format_duration(min(LONGEST_LOOKUP, 2 * timeout))
        return Map().put("reverse_dns", wait, f"twice: {self.server.comment('resolver_timeout')}")

    def resolvers(self, written: Map) -> None:
        """`resolvers` and `resolver`, which only SMTP has a use for."""
        if self.server.protocol != "smtp" or not self._resolving:
            return
        directive = self.server.written("resolver")[-1]
        names: list[str] = []
        options = Map().put("timeout", format_duration(limits.positive(self.server, "resolver_timeout")))
        for word in directive.arguments:
            key, equals, value = word.partition("=")
            try:
                if not equals:
                    names += self._resolver(word)
                elif key == "valid":
                    options.put("valid", format_duration(values.seconds(value)))
                elif key in ("ipv4", "ipv6"):
                    options.put(key, values.flag(value))
                else:
                    self.server.findings.unequal(directive, f"resolver: the parameter {key} has no equal")
            except Invalid as error:
                self.server.findings.fatal(directive, f'"resolver" directive: {error}')
        written.put("resolvers", names, str(directive)).put("resolver", options)

    def _resolver(self, word: str) -> list[str]:
        """The addresses of a name server, which nginx too looks up once. Raises Invalid."""
        if values.is_address(word):
            return [f"[{word}]:53" if ":" in word else f"{word}:53"]
        host, port = values.host_port(word)
        number = values.port_number(port) if port else 53
        try:
            found = [host] if values.is_address(host) else self.lookup(host)
        except OSError:
            raise Invalid(f'host not found in resolver "{host}"') from None
        return [f"[{address}]:{number}" if ":" in address else f"{address}:{number}" for address in found]

    def _unused(self) -> None:
        """Directives that change nothing, named so that nobody looks for them."""
        server = self.server
        proxy = server.one("proxy")
        if proxy is not None:
            server.findings.warning(proxy, "proxy: does nothing in nginx, and is left out")
        buffer = server.one("proxy_buffer")
        if buffer is not None:
            server.findings.warning(buffer, "proxy_buffer: the gateway's buffers have their own sizes")
