"""What a server has of its own, of `mail {}`, of the main level; and what nginx refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.nginx.conftest import at

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.nginx.conftest import Import

SERVER = "server { listen 25; %s }"

# Directives in mail {}, in the server, and what the server's document has then.
INHERITED = [
    ("timeout 5s;", "", "limits.login_timeout", "5s"),
    ("timeout 5s;", "timeout 6s;", "limits.login_timeout", "6s"),
    ("xclient off;", "", "stages.xclient", None),
    ("xclient off;", "xclient on;", "stages.xclient.if_missing", "send"),
    ("auth_http_header A 1; auth_http_header B 2;", "", "stages.auth_http.headers", {"A": "1", "B": "2"}),
    ("auth_http_header A 1; auth_http_header B 2;", "auth_http_header C 3;", "stages.auth_http.headers", {"C": "3"}),
    ("smtp_capabilities X Y;", "smtp_capabilities Z;", "listen.0.capabilities", ["Z", "AUTH PLAIN LOGIN"]),
    ("smtp_auth none;", "smtp_auth plain;", "stages.auth_http.none", False),
    ("smtp_auth cram-md5;", "smtp_auth external;", "stages.auth_http.methods", ["plain", "login", "external"]),
    ("resolver 127.0.0.1;", "resolver off;", "stages.reverse_dns", None),
    ("resolver 127.0.0.1;", "", "resolvers", ["127.0.0.1:53"]),
    ("auth_http other.test;", "", "stages.auth_http.url", "http://other.test/"),
    ("auth_http a.test;", "auth_http b.test/c;", "stages.auth_http.url", "http://b.test/c"),
    ("error_log m;", "error_log s1; error_log s2;", "log.sinks.1.path", "/s2"),
    ("error_log m;", "", "log.sinks.1", None),
    ("", "", "log.sinks.0.path", "/main"),
    ("starttls on; ssl_certificate a; ssl_certificate_key b;", "starttls off;", "tls", None),
    ("ssl_certificate a; ssl_certificate_key b;", "starttls on; ssl_certificate c; ssl_certificate_key d;", "tls.certificates.1", None),
    ("set_real_ip_from 10.0.0.0/8;", "set_real_ip_from 192.0.2.0/24;", "trust.proxy", ["192.0.2.0/24"]),
]  # fmt: skip


@pytest.mark.parametrize(("mail", "server", "path", "expected"), INHERITED)
def test_inherits(imported: Import, mail: str, server: str, path: str, expected: object) -> None:
    auth = "" if "auth_http " in mail else "auth_http h.test;"
    listen = "listen 25 proxy_protocol;" if "real_ip" in mail else "listen 25;"
    result = imported(f"error_log main; mail {{ {auth} {mail} server {{ {listen} {server} }} }}")
    assert result.errors == []
    found = at(result.documents[0], path)
    if path.endswith(".path"):
        assert str(found).endswith(str(expected)) and str(found).startswith("/")
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("listens", "protocol"),
    [
        ("listen 587;", "smtp"),
        ("listen 2000; listen 465;", "smtp"),
        ("listen 2000; listen 993; listen 25;", "imap"),
        ("listen 995;", "pop3"),
        ("protocol pop3; listen 25;", "pop3"),
        ("listen 25; protocol imap;", "imap"),
        ("protocol pop3; listen 25; protocol imap;", "imap"),
    ],
)
def test_the_protocol(imported: Import, listens: str, protocol: str) -> None:
    (document,) = imported(f"mail {{ auth_http h.test; server {{ {listens} }} }}").documents
    assert str(at(document, "listen.0.url")).startswith(f"{protocol}://")


@pytest.mark.parametrize(
    ("conf", "error"),
    [
        ("events {}", "nginx.conf:0: there is no mail {} in this file or in what it includes"),
        ("mail {\n}", "nginx.conf:1: there is no server {} in mail {}"),
        ("mail {} mail {}", 'nginx.conf:1: "mail" directive is duplicate'),
        ("mail { server { listen 25; } }", 'nginx.conf:1: no "auth_http" is defined for server'),
        ("mail { auth_http a;\n server { } }", 'nginx.conf:2: no "listen" is defined for server'),
        ("mail { auth_http a;\n server { listen 26; } }", "nginx.conf:2: unknown mail protocol for server"),
        ("mail { auth_http a;\n server { listen 25-27; } }", "nginx.conf:2: unknown mail protocol for server"),
        ("mail { auth_http a; listen 25; }", 'nginx.conf:1: "listen" directive is not allowed here'),
        ("mail { auth_http a; protocol smtp; }", 'nginx.conf:1: "protocol" directive is not allowed here'),
        ("mail { auth_http a; server { listen 25; }\n server { listen *:25; } }", 'nginx.conf:2: duplicate "0.0.0.0:25" address and port pair'),
        ("mail { auth_http a; server { listen 587; }\n server { protocol imap; listen 580-590; } }", 'nginx.conf:2: duplicate "0.0.0.0:587" address and port pair'),
        ("mail { auth_http a; server { listen unix:/s; listen unix:/s; protocol smtp; } }", 'nginx.conf:1: duplicate "/s" address and port pair'),
        ("mail { timeout { } }", 'nginx.conf:1: directive "timeout" is not terminated by ";"'),
        ("mail; ", 'nginx.conf:1: directive "mail" has no opening "{"'),
        ("worker_shutdown_timeout x; mail {}", 'nginx.conf:1: "worker_shutdown_timeout" directive: invalid value "x", times are written 500ms, 30s, 1m30s, 1h, 1d'),
    ],
)  # fmt: skip
def test_what_nginx_refuses(imported: Import, conf: str, error: str) -> None:
    for lenient in (False, True):
        result = imported(conf, lenient=lenient)
        assert error in result.errors
        assert result.imported.documents == []


@pytest.mark.parametrize(
    ("conf", "only"),
    [
        ("mail {\n auth_http a;\n", 'nginx.conf:2: unexpected end of file, expecting "}"'),
        ("mail { listen 25; } }", 'nginx.conf:1: unexpected "}"'),
        ("include none.conf;", "nginx.conf:1: the included file FOLDER/none.conf cannot be read"),
        ("mail { auth_http a; server { listen 25 proxy_protocol; set_real_ip_from none.test; } }",
         'nginx.conf:1: host not found in set_real_ip_from "none.test"'),
    ],
)  # fmt: skip
def test_no_second_error_comes_of_the_first(imported: Import, tmp_path: Path, conf: str, only: str) -> None:
    assert imported(conf).errors == [only.replace("FOLDER", str(tmp_path))]


def test_several_addresses_on_one_port(imported: Import) -> None:
    conf = (
        "mail { auth_http a; server { listen 25; } server { listen 127.0.0.1:25; listen [::]:25; listen [::1]:25; } }"
    )
    result = imported(conf)
    assert result.errors == [] and len(result.documents) == 2


def test_the_main_level(imported: Import) -> None:
    result = imported(
        "user www-data; worker_processes 4; pid /run/x.pid; load_module m.so; worker_shutdown_timeout 1m;\n"
        "lua_thing { x; } worker_rlimit_nofile 9; events { worker_connections 50000; }\n"
        "mail { auth_http a; server { listen 25; } server { listen 143; } server { listen 587; protocol smtp; } }"
    )
    assert result.errors == []
    text = result.imported.text
    assert "# pid /run/x.pid; -> gateway run --pid-file PATH" in text
    process = {"user": "www-data", "workers": 4, "drain": "1m"}
    assert [data.get("process") for data in result.data] == [process, None, None, None]
    assert [at(document, "limits.sessions") for document in result.documents] == [25000] * 3
    assert [document["name"] for document in result.documents] == ["smtp-25", "imap-143", "smtp-587"]
    assert imported("mail { auth_http a; server { listen 25; } }").imported.process == ""
    two = imported("user mail post; worker_processes auto; mail { auth_http a; server { listen 25; } }")
    assert two.data[0]["process"] == {"user": "mail", "group": "post", "workers": "auto"}
