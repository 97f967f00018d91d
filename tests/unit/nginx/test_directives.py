"""Every directive of the mail modules: what it becomes, or why it cannot be imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from gateway.nginx.directives import RULES
from tests.unit.nginx.conftest import at

if TYPE_CHECKING:
    from tests.unit.nginx.conftest import Import


class Row(NamedTuple):
    """Directives of a server, the place in its document that shows them, and what stands there."""

    directives: str
    path: str
    expected: object
    protocol: str = "smtp"


TLS = "starttls on; ssl_certificate c.pem; ssl_certificate_key k.pem; "
INTERNAL = "451 4.3.2 Internal server error"
UNLIMITED = 1_000_000

# fmt: off
ROWS = [
    # core
    Row("timeout 1m30s;", "limits.login_timeout", "90s"),
    Row("timeout '1m 30s';", "limits.command_timeout", "90s"),
    Row("timeout 500ms;", "limits.tls_timeout", "500ms"),
    Row("timeout 2w;", "dynamic_servers.connect_timeout", "14d"),
    Row("timeout 1M;", "limits.login_timeout", "30d"),
    Row("timeout 1y;", "limits.login_timeout", "365d"),
    Row("timeout 2d; proxy_timeout 3h;", "limits.idle_timeout", "3h"),
    Row("", "limits.idle_timeout", "1d"),
    Row("", "limits.login_timeout", "1m"),
    Row("", "limits.auth_failures", UNLIMITED),
    Row("", "limits.auth_delay", 0),
    Row("server_name mx.test;", "hostname", "mx.test"),
    Row("server_name mx.test;", "replies.smtp.greeting", "220 mx.test ESMTP ready"),
    Row("server_name '';", "hostname", "host.test"),
    Row("", "hostname", "host.test"),
    Row("error_log /x/y.log info;", "log.sinks.0", {"to": "file", "path": "/x/y.log", "level": "info"}),
    Row("error_log logs/e;", "log.sinks.0.level", "error"),
    Row("error_log stderr crit; error_log e debug_mail;", "log.sinks.0", {"to": "stderr", "level": "critical"}),
    Row("error_log stderr; error_log e debug_mail;", "log.sinks.1.level", "debug"),
    Row("error_log e notice;", "log.sinks.0.level", "notice"),
    Row(
        "error_log syslog:server=[::1]:5514,facility=mail,tag=mx,nohostname warn;",
        "log.sinks.0",
        {
            "to": "syslog", "address": "udp://[::1]:5514", "facility": "mail", "tag": "mx", "hostname": "off",
            "level": "warning",
        },
    ),
    Row("error_log syslog:server=unix:/dev/log;", "log.sinks.0.address", "unix:/dev/log"),
    Row("error_log syslog:server=logs.test;", "log.sinks.0.address", "udp://logs.test:514"),
    Row("error_log syslog:server=logs.test;", "log.sinks.0.facility", "local7"),
    Row("resolver 127.0.0.1 [::1]:5353 dns.test;", "resolvers", ["127.0.0.1:53", "[::1]:5353", "192.0.2.53:53"]),
    Row("resolver 127.0.0.1 valid=10s ipv6=off ipv4=on;", "resolver", {"timeout": "30s", "valid": "10s", "ipv6": False, "ipv4": True}),
    Row("resolver 127.0.0.1;", "stages.reverse_dns", "30s"),
    Row("resolver 127.0.0.1; resolver_timeout 2s;", "stages.reverse_dns", "4s"),
    Row("resolver off;", "resolvers", None),
    Row("resolver 127.0.0.1;", "resolvers", None, "imap"),
    Row("max_errors 3;", "limits.errors", 3),
    Row("max_errors 0;", "limits.errors", 1),
    Row("", "limits.errors", 5),
    # ssl
    Row("", "listen.0.starttls", False),
    Row("", "tls", None),
    Row(TLS, "listen.0.starttls", True),
    Row(TLS, "allow_plaintext_auth", True),
    Row(TLS.replace("on;", "only;"), "allow_plaintext_auth", False),
    Row("ssl on; ssl_certificate c.pem; ssl_certificate_key k.pem;", "listen.0.url", "smtps://127.0.0.1:2000"),
    Row("ssl off;", "listen.0.url", "smtp://127.0.0.1:2000"),
    Row(TLS + "ssl_certificate /d/c2; ssl_certificate_key /d/k2;", "tls.certificates.1", {"chain": "/d/c2", "key": "/d/k2"}),
    Row(TLS + "ssl_certificate_compression off;", "tls.options", None),
    Row(TLS + "ssl_password_file /p;", "tls.password_file", "/p"),
    Row(TLS + "ssl_protocols TLSv1.3;", "tls.minimum_version", "TLSv1.3"),
    Row(TLS + "ssl_protocols TLSv1.2;", "tls.maximum_version", "TLSv1.2"),
    Row(TLS + "ssl_protocols TLSv1.1; ssl_protocols TLSv1.2; ssl_ciphers ALL:@SECLEVEL=0;", "tls.minimum_version", "TLSv1.1"),
    Row(TLS + "ssl_protocols TLSv1 TLSv1.1 TLSv1.2;", "tls.minimum_version", "TLSv1.2"),
    Row(TLS, "tls.minimum_version", "TLSv1.2"),
    Row(TLS + "ssl_ciphers AES128-SHA;", "tls.ciphers", "AES128-SHA"),
    Row(TLS, "tls.ciphers", "HIGH:!aNULL:!MD5"),
    Row(TLS + "ssl_prefer_server_ciphers on;", "tls.prefer_server_ciphers", True),
    Row(TLS + "ssl_ecdh_curve X25519:prime256v1;", "tls.curves", "X25519:prime256v1"),
    Row(TLS + "ssl_ecdh_curve auto;", "tls.curves", None),
    Row(TLS + "ssl_dhparam /dh;", "tls.dhparam", "/dh"),
    Row(TLS, "tls.session_cache", "none"),
    Row(TLS + "ssl_session_cache off;", "tls.session_cache", "off"),
    Row(TLS + "ssl_session_cache builtin:900;", "tls.session_cache", {"builtin": 900}),
    Row(TLS + "ssl_session_cache builtin shared:M:1m;", "tls.session_cache", {"shared": 1048576}),
    Row(TLS + "ssl_session_tickets off;", "tls.session_tickets", False),
    Row(TLS + "ssl_session_timeout 1h;", "tls.session_timeout", "1h"),
    Row(TLS, "tls.session_timeout", "5m"),
    Row(TLS, "tls.verify_client", "off"),
    Row(TLS + "ssl_verify_client on; ssl_client_certificate /ca;", "tls.verify_client", "required"),
    Row(TLS + "ssl_verify_client on; ssl_client_certificate /ca;", "tls.verify_depth", 1),
    Row(TLS + "ssl_verify_client optional_no_ca; ssl_verify_depth 3;", "tls.verify_depth", 3),
    Row(TLS + "ssl_verify_client optional; ssl_trusted_certificate /ca;", "tls.trusted_ca", "/ca"),
    Row(TLS + "ssl_client_certificate /ca;", "tls.client_ca", "/ca"),
    Row(TLS + "ssl_crl /crl;", "tls.crl", "/crl"),
    Row(TLS + "ssl_conf_command Options -SessionTicket,PrioritizeChaCha;", "tls.options", ["-SessionTicket", "PrioritizeChaCha"]),
    Row(TLS + "ssl_conf_command MinProtocol TLSv1.3;", "tls.minimum_version", "TLSv1.3"),
    Row(TLS + "ssl_conf_command CipherString AES128-SHA; ssl_ciphers HIGH;", "tls.ciphers", "AES128-SHA"),
    Row(TLS + "ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;", "tls.ciphersuites", "TLS_AES_128_GCM_SHA256"),
    Row(TLS + "ssl_conf_command Certificate /c; ssl_conf_command PrivateKey /k;", "tls.certificates.1", {"chain": "/c", "key": "/k"}),
    # auth_http
    Row("auth_http h.test;", "stages.auth_http.url", "http://h.test/"),
    Row("auth_http http://h.test:81/a?b=c;", "stages.auth_http.url", "http://h.test:81/a?b=c"),
    Row("auth_http http://[::1]:81/a;", "stages.auth_http.url", "http://[::1]:81/a"),
    Row("auth_http unix:/s:/u;", "stages.auth_http.url", "unix:/s:/u"),
    Row("auth_http unix:/s;", "stages.auth_http.url", "unix:/s:/"),
    Row("auth_http a.test; auth_http b.test;", "stages.auth_http.url", "http://b.test/"),
    Row("auth_http_timeout 5s;", "stages.auth_http.request_timeout", "5s"),
    Row("", "stages.auth_http.timeout", "2m"),
    Row("auth_http_header X-A 'b c'; auth_http_header X-D '${e}$$';", "stages.auth_http.headers", {"X-A": "b c", "X-D": "${e}$$"}),
    Row("auth_http_header X-A 1; auth_http_header X-B 3; auth_http_header X-A 2;", "stages.auth_http.headers", {"X-A": ["1", "2"], "X-B": "3"}),
    Row("auth_http_header X-A 1; auth_http_header x-a 2;", "stages.auth_http.headers", {"X-A": "1", "x-a": "2"}),
    Row("auth_http_pass_client_cert on;", "stages.auth_http.pass_client_certificate", True),
    Row("", "stages.auth_http.close_without_wait", True),
    # proxy
    Row("proxy on;", "stages.splice.handoff", "always"),
    Row("proxy_buffer 8k;", "stages.splice.handoff", "always"),
    Row("proxy_timeout 1m;", "limits.idle_timeout", "1m"),
    Row("", "stages.splice.pass_error_message", "never"),
    Row("proxy_pass_error_message on;", "stages.splice.pass_error_message", "always"),
    Row("", "stages.xclient", {"if_missing": "send", "attributes": ["ADDR", "LOGIN", "NAME"], "login": True}),
    Row("xclient off;", "stages.xclient", None),
    Row("xclient off;", "dynamic_servers.hello", "as_client"),
    Row("xclient off;", "dynamic_servers.hello", None, "imap"),
    Row("", "dynamic_servers.hello", None),
    Row("", "stages.xclient", None, "imap"),
    Row("proxy_smtp_auth on;", "stages.upstream_auth", {"credentials": "client", "if_missing": "send"}),
    Row("proxy_smtp_auth on;", "stages.xclient.login", False),
    Row("proxy_smtp_auth on;", "stages.upstream_auth", None, "imap"),
    Row("proxy_protocol on;", "stages.proxy_header", {"version": 1, "destination": "local"}),
    Row("proxy_protocol v2;", "stages.proxy_header", {"version": 2, "destination": "local"}, "pop3"),
    Row("proxy_protocol off;", "stages.proxy_header", None),
    Row("proxy_pass u.test:26;", "upstreams.upstream.servers", ["smtp://u.test:26"]),
    Row("proxy_pass u.test;", "upstreams.upstream.servers", ["imap://u.test:143"], "imap"),
    Row("", "dynamic_servers.tls", "off"),
    Row("", "dynamic_servers.health", "off"),
    Row("", "dynamic_servers.capabilities", {"assume": []}),
    Row("", "dynamic_servers.allow_plaintext_login", True),
    # smtp
    Row("", "listen.0.capabilities", ["AUTH PLAIN LOGIN"]),
    Row("", "stages.auth_http.methods", ["plain", "login"]),
    Row("smtp_auth external; smtp_auth cram-md5;", "stages.auth_http.methods", ["plain", "login", "cram-md5", "external"]),
    Row("smtp_auth external; smtp_auth cram-md5;", "listen.0.capabilities", ["AUTH CRAM-MD5 EXTERNAL"]),
    Row("smtp_auth none;", "listen.0.capabilities", []),
    Row("smtp_auth none;", "stages.auth_http.none", True),
    Row("smtp_auth none;", "stages.auth_http.error_code", "535 5.7.0"),
    Row("smtp_auth none; xclient off; proxy_pass u.test;", "upstreams.upstream.hello", "as_client"),
    Row("smtp_auth none;", "relay", "open"),
    Row("", "relay", None),
    Row("smtp_auth none plain;", "stages.auth_http.methods", ["plain", "login"]),
    Row("smtp_capabilities 'SIZE 100' X; smtp_capabilities Y;", "listen.0.capabilities", ["SIZE 100", "X", "Y", "AUTH PLAIN LOGIN"]),
    Row(TLS + "smtp_capabilities X;", "listen.0.capabilities", ["X", "AUTH PLAIN LOGIN", "STARTTLS"]),
    Row("smtp_client_buffer 8k;", "limits.command_line", 8192),
    Row("smtp_client_buffer 128;", "limits.auth_line", 128),
    Row("", "limits.command_line", 4096),
    Row("smtp_greeting_delay 1500ms;", "stages.greeting_delay", "1.5s"),
    Row("smtp_greeting_delay 5;", "stages.greeting_delay", "5s"),
    Row("smtp_greeting_delay 0;", "stages.greeting_delay", None),
    Row("", "helo_required", False),
    Row("", "bare_lf", "accept"),
    Row("", "unauthorized_pipelining", "accept"),
    Row("", "unauthorized_pipelining", None, "pop3"),
    Row("", "replies.smtp.vrfy", "500 5.5.1 Invalid command"),
    Row("", "replies.smtp.certificate_failed", "421 4.7.1 SSL certificate error"),
    Row("", "replies.smtp.certificate_required", "421 4.7.1 No required SSL certificate"),
    Row("", "reply_id", False),
    Row("", "replies.smtp.upstream_down", INTERNAL),
    # imap
    Row("", "listen.0.capabilities", ["IMAP4", "IMAP4rev1", "UIDPLUS", "AUTH=PLAIN"], "imap"),
    Row("imap_auth login; imap_capabilities IMAP4rev1 'X Y';", "listen.0.capabilities", ["IMAP4rev1", "X Y", "AUTH=LOGIN"], "imap"),
    Row("imap_auth login;", "stages.auth_http.methods", ["plain", "login"], "imap"),
    Row(TLS.replace("on;", "only;"), "listen.0.capabilities", ["IMAP4", "IMAP4rev1", "UIDPLUS", "AUTH=PLAIN", "STARTTLS", "LOGINDISABLED"], "imap"),
    Row("imap_client_buffer 16k;", "limits.auth_line", 16384, "imap"),
    Row("", "replies.imap.greeting", "* OK IMAP4 ready", "imap"),
    # pop3
    Row("", "listen.0.capabilities", ["TOP", "USER", "UIDL", "SASL PLAIN LOGIN"], "pop3"),
    Row("pop3_auth apop;", "listen.0.capabilities.3", "SASL", "pop3"),
    Row("pop3_auth apop cram-md5;", "stages.auth_http.methods", ["plain", "login", "apop", "cram-md5"], "pop3"),
    Row(TLS + "pop3_capabilities USER;", "listen.0.capabilities", ["USER", "SASL PLAIN LOGIN", "STLS"], "pop3"),
    Row("", "limits.command_line", None, "pop3"),
    Row("", "replies.pop3.greeting", "+OK POP3 ready", "pop3"),
    # realip
    Row("set_real_ip_from 10.0.0.1/8; set_real_ip_from trusted.test;", "trust", None),
]
# fmt: on


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.protocol} {row.directives} {row.path}")
def test_becomes(imported: Import, row: Row) -> None:
    auth = "" if re.search(r"\bauth_http |proxy_pass ", row.directives) else "auth_http 127.0.0.1:9;"
    listen = f"listen 127.0.0.1:2000; protocol {row.protocol};"
    result = imported(f"mail {{ server {{ {listen} {auth} {row.directives} }} }}")
    assert result.errors == []
    (document,) = result.documents
    assert at(document, row.path) == row.expected


LISTEN = [
    ("25", {"url": "smtp://0.0.0.0:25"}),
    ("*:25", {"url": "smtp://0.0.0.0:25"}),
    ("[::]:25", {"url": "smtp://[::]:25"}),
    ("[::]:25 ipv6only=off", {"url": "smtp://[::]:25", "ipv6only": False}),
    ("127.0.0.1:25 ipv6only=on bind", {"url": "smtp://127.0.0.1:25"}),
    ("localhost:25", {"url": "smtp://localhost:25"}),
    ("unix:/run/s", {"url": "smtp+unix:/run/s"}),
    ("127.0.0.1:2000-2003", {"url": "smtp://127.0.0.1:2000-2003"}),
    ("1.2.3.4:25 backlog=10 rcvbuf=8k sndbuf=16k", {"url": "smtp://1.2.3.4:25", "backlog": 10, "rcvbuf": 8192, "sndbuf": 16384}),
    ("1.2.3.4:25 so_keepalive=on", {"url": "smtp://1.2.3.4:25", "keepalive": True}),
    ("1.2.3.4:25 so_keepalive=off", {"url": "smtp://1.2.3.4:25", "keepalive": False}),
    ("1.2.3.4:25 so_keepalive=30m::10", {"url": "smtp://1.2.3.4:25", "keepalive": {"idle": "30m", "count": 10}}),
    ("1.2.3.4:25 multipath", {"url": "smtp://1.2.3.4:25", "multipath": True}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), LISTEN)
def test_listen(imported: Import, words: str, expected: dict[str, object]) -> None:
    result = imported(f"mail {{ auth_http h.test; server {{ listen {words}; protocol smtp; }} }}")
    assert result.errors == []
    assert at(result.documents[0], "listen.0") == {
        "starttls": False, "capabilities": ["AUTH PLAIN LOGIN"], **expected,
    }  # fmt: skip


def test_listen_with_tls_and_proxy_protocol(imported: Import) -> None:
    real = "set_real_ip_from 10.0.0.1/8; set_real_ip_from trusted.test; set_real_ip_from unix:;"
    server = f"server {{ listen 465 ssl proxy_protocol; {real} ssl_certificate c; ssl_certificate_key k; }}"
    (document,) = imported(f"mail {{ auth_http h.test; {server} }}").documents
    assert at(document, "listen.0.proxy_protocol") == "required"
    assert at(document, "listen.0.url") == "smtps://0.0.0.0:465"
    assert at(document, "trust.proxy") == ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::7/128"]


# What cannot be imported: the text of the error, and whether --lenient makes it a warning.
ERRORS = [
    ("timeout 1 2;", 'invalid number of arguments in "timeout" directive', False),
    ("timeout abc;", '"timeout" directive: invalid value "abc", times are written 500ms, 30s, 1m30s, 1h, 1d', False),
    ("timeout 3s2m;", '"timeout" directive: invalid value "3s2m", times are written 500ms, 30s, 1m30s, 1h, 1d', False),
    ("timeout 3s; timeout 3s;", '"timeout" directive is duplicate', False),
    ("timeout 0;", "timeout: 0 ends every session at once", True),
    ("server_name a; server_name b;", '"server_name" directive is duplicate', False),
    ("server_name 'a b';", "server_name: 'a b' is no host name, which SMTP needs", True),
    ("error_log memory:1m debug;", "error_log: there is no log in memory; name a file, stderr or syslog:server=... instead", True),
    ("error_log e loud;", '"error_log" directive: invalid log level "loud"', False),
    ("error_log syslog:tag=x;", '"error_log" directive: no syslog server specified', False),
    ("resolver nobody.test;", '"resolver" directive: host not found in resolver "nobody.test"', False),
    ("resolver 127.0.0.1 status_zone=x;", "resolver: the parameter status_zone has no equal", True),
    ("resolver_timeout x;", '"resolver_timeout" directive: invalid value "x", times are written 500ms, 30s, 1m30s, 1h, 1d', False),
    ("max_errors many;", '"max_errors" directive: invalid number "many"', False),
    ("protocol http;", '"protocol" directive: invalid value "http", it must be smtp or imap or pop3', False),
    ("starttls yes;", '"starttls" directive: invalid value "yes", it must be off or on or only', False),
    ("starttls on;", 'no "ssl_certificate" is defined for TLS', False),
    ("starttls on; ssl_certificate c;", 'no "ssl_certificate_key" is defined for certificate "c"', False),
    (TLS + "ssl_certificate 'engine:pkcs11:x'; ssl_certificate_key k;", "ssl_certificate: only files can be named, not engine", True),
    (TLS + "ssl_certificate_compression on;", "ssl_certificate_compression: certificates are not compressed", True),
    (TLS + "ssl_protocols TLSv1.1 TLSv1.3;", "ssl_protocols: TLSv1.2 cannot be left out between others", True),
    (TLS + "ssl_protocols SSLv3;", "ssl_protocols: no version that OpenSSL speaks", True),
    (TLS + "ssl_session_ticket_key t;", "ssl_session_ticket_key: ticket keys are random, made new at each start; sessions do not resume at another gateway", True),
    (TLS + "ssl_session_cache shared:a:1k;", '"ssl_session_cache" directive: session cache "shared:a:1k" is too small', False),
    (TLS + "ssl_verify_client on;", "no ssl_client_certificate or ssl_trusted_certificate for ssl_verify_client", False),
    (TLS + "ssl_conf_command VerifyMode Once;", "ssl_conf_command: OpenSSL's command VerifyMode has no setting", True),
    (TLS + "ssl_conf_command Certificate /c;", "ssl_conf_command: Certificate and PrivateKey go together", True),
    ("auth_http http://${HOST}:80/;", 'auth_http "http://${HOST}:80/": nginx knows no variables there; write the host itself', False),
    ("auth_http https://h.test/;", 'auth_http "https://h.test/": nginx speaks only HTTP there; write http://, and https:// in the pipeline', False),
    ("auth_http h.test:0;", 'invalid port in auth_http "h.test:0"', False),
    ("auth_http_header X-A;", 'invalid number of arguments in "auth_http_header" directive', False),
    ("auth_http_header X_A 1;", "auth_http_header: 'X_A' has other characters than header fields of HTTP", True),
    ("xclient yes;", '"xclient" directive: invalid value "yes", it must be "on" or "off"', False),
    ("proxy_protocol v3;", '"proxy_protocol" directive: invalid value "v3", it must be off or on or v2', False),
    ("proxy_pass u.test:x;", "proxy_pass: invalid port", True),
    ("smtp_auth gssapi;", '"smtp_auth" directive: invalid value "gssapi", it must be plain or login or cram-md5 or external or none', False),
    ("pop3_auth login;", '"pop3_auth" directive: invalid value "login", it must be plain or apop or cram-md5 or external', False),
    ("smtp_client_buffer 4kk;", '"smtp_client_buffer" directive: invalid value "4kk", sizes are written 4096, 4k, 1m', False),
    ("smtp_client_buffer 0;", "smtp_client_buffer: no command fits into 0 octets", True),
    ("listen 25;", 'duplicate "0.0.0.0:25" address and port pair', False),
    ("listen 127.0.0.1;", '"listen" directive: no port in "127.0.0.1": nginx would listen on port 0', False),
    ("listen 26 reuseport;", '"listen" directive: the invalid "reuseport" parameter', False),
    ("listen 26 backlog=0;", '"listen" directive: invalid backlog "0"', False),
    ("listen 26 so_keepalive=::;", '"listen" directive: invalid so_keepalive value: "::"', False),
    ("worker_processes 4;", '"worker_processes" directive is not allowed here', False),
    ("server {}", '"server" directive is not allowed here', False),
    ("smtp_future on;", 'unknown directive "smtp_future"', True),
    ("sever_name a.test;", 'unknown directive "sever_name"; did you mean "server_name"?', True),
    ("if ($x) { root /; }", 'unknown directive "if"', True),
]  # fmt: skip


@pytest.mark.parametrize(("directives", "text", "lenient"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors(imported: Import, directives: str, text: str, lenient: bool) -> None:
    auth = "" if "auth_http " in directives else "auth_http 127.0.0.1:9;"
    conf = f"mail {{\n server {{ listen 0.0.0.0:25;\n {auth} {directives}\n }} }}"
    assert f"nginx.conf:3: {text}" in imported(conf).errors
    result = imported(conf, lenient=True)
    assert (f"nginx.conf:3: {text}" in result.warnings) is lenient
    assert (result.errors == []) is lenient
    if lenient:
        assert "NOT IMPORTED: " in result.imported.text and result.documents


def test_proxy_protocol_from_everybody(imported: Import) -> None:
    conf = "mail { auth_http h.test; server { listen 25 proxy_protocol; } }"
    (error,) = imported(conf).errors
    assert error.startswith("nginx.conf:1: listen: proxy_protocol without set_real_ip_from")
    (document,) = imported(conf, lenient=True).documents
    assert at(document, "trust.proxy") == ["127.0.0.0/8", "::1"]


def test_every_directive_is_in_a_table() -> None:
    """A rule without a row would be a mapping that nobody has looked at."""
    main_only = {name for name, rule in RULES.items() if rule.contexts == {"main"}}
    text = " ".join([row.directives for row in ROWS] + [line for line, _, _ in ERRORS] + ["set_real_ip_from "])
    shown = set(re.findall(r"[a-z0-9_]+(?= )", text))
    assert set(RULES) - main_only - shown == set()


def test_the_reference_has_no_other_directive() -> None:
    """The documentation page names them all, one by one."""
    page = (Path(__file__).parents[3] / "docs/nginx.md").read_text()
    assert {name for name in RULES if f"`{name}" not in page} == set()
