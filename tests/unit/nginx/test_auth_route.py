"""An auth server in the same file's http {}: replaced where it decides nothing, else it has to keep running."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.nginx.conftest import at

if TYPE_CHECKING:
    from tests.unit.nginx.conftest import Import

FIELDS = "add_header Auth-Status OK; add_header Auth-Server 192.0.2.1; add_header Auth-Port 143; "
LOCATION = f"location = /auth {{ {FIELDS} return 204; }}"
LISTEN = "listen 127.0.0.1:8080;"


def conf(server: str = LISTEN + LOCATION, url: str = "127.0.0.1:8080/auth", mail: str = "protocol imap;") -> str:
    """An http {} that answers, and one mail server that asks."""
    return f"http {{ server {{ {server} }} }} mail {{ server {{ listen 2000; auth_http {url}; {mail} }} }}"


@pytest.mark.parametrize(
    ("server", "url"),
    [
        (LISTEN + LOCATION, "127.0.0.1:8080/auth"),
        (LISTEN + LOCATION, "localhost:8080/auth?x"),
        ("listen 8080; " + LOCATION, "localhost:8080/auth"),
        ("listen [::]:8080;" + LOCATION, "[::1]:8080/auth"),
        ("server_name auth.test; listen 80;" + LOCATION, "auth.test/auth"),
        (LOCATION, "localhost/auth"),
        ("listen unix:/s;" + LOCATION, "unix:/s:/auth"),
        (LISTEN + f"location /a {{ return 404; }} location /au {{ {FIELDS} return 200 'x'; }}", "localhost:8080/auth"),
        (LISTEN + FIELDS + "location / { return 200; }", "localhost:8080/auth"),
        (
            LISTEN + f"location /auth {{ {FIELDS} access_log off; default_type text/html; return 204; }}",
            "127.0.0.1:8080/auth",
        ),
        (LISTEN + "location /auth { " + FIELDS.replace(";", " always;") + " return 401; }", "127.0.0.1:8080/auth"),
        (LISTEN + LOCATION.replace("add_header Auth-Status OK;", ""), "127.0.0.1:8080/auth"),
    ],
)
def test_replaced_by_its_upstream(imported: Import, server: str, url: str) -> None:
    result = imported(conf(server, url))
    assert result.errors == []
    (document,) = result.documents
    assert at(document, "stages.auth_http") is None and "dynamic_servers" not in document
    assert at(document, "stages.upstream_auth.verify") == "upstream"
    assert at(document, "stages.splice.pool") == "upstream"
    assert at(document, "upstreams.upstream.servers") == ["imap://192.0.2.1:143"]
    assert "lets everybody in" in result.warnings[0]


@pytest.mark.parametrize(
    "server",
    [
        LISTEN + "location /auth { proxy_pass http://127.0.0.1:9; }",
        LISTEN + LOCATION + "location ~ \\.php$ { root /; }",
        LISTEN + LOCATION.replace("192.0.2.1", "$backend"),
        LISTEN + LOCATION.replace("return 204;", "deny all; return 204;"),
        LISTEN + "auth_basic x;" + LOCATION,
        LISTEN + LOCATION.replace("204", "401"),
        LISTEN + LOCATION.replace("Status OK", "Status No"),
        LISTEN + LOCATION.replace("192.0.2.1", "name.test"),
        LISTEN + LOCATION.replace("return", "add_header Auth-User x; return"),
        LISTEN + LOCATION.replace("Auth-Port 143", "Auth-Port x"),
    ],
)
def test_has_to_keep_running(imported: Import, server: str) -> None:
    result = imported(conf(server))
    assert result.errors == []
    assert at(result.documents[0], "stages.auth_http.url") == "http://127.0.0.1:8080/auth"
    assert any("IT MUST KEEP RUNNING" in warning for warning in result.warnings)
    assert "IT MUST KEEP" in result.imported.documents[0].text.replace("\n# ", " ")


@pytest.mark.parametrize("url", ["192.0.2.9:8080/auth", "other.test:8080/auth", "127.0.0.1:8081/auth", "unix:/s"])
def test_another_server(imported: Import, url: str) -> None:
    result = imported(conf(url=url))
    assert at(result.documents[0], "stages.auth_http") is not None and result.warnings == []


def test_smtp(imported: Import) -> None:
    """Where nginx would take any password there is no equal; without passwords there is one, and it is open."""
    (document,) = imported(conf(mail="protocol smtp; smtp_auth none;")).documents
    assert document["relay"] == "open" and at(document, "stages.auth_http") is None
    assert at(document, "stages.route.rules.0.to") == "upstream"
    (document,) = imported(conf(mail="protocol smtp; proxy_smtp_auth on;")).documents
    assert at(document, "stages.upstream_auth") == {
        "credentials": "client", "verify": "upstream", "mechanisms": ["PLAIN", "LOGIN"], "if_missing": "send",
    }  # fmt: skip
    for methods in ("plain", "plain none"):
        result = imported(conf(mail=f"protocol smtp; smtp_auth {methods};"))
        assert at(result.documents[0], "stages.auth_http") is not None
        assert "any password" in result.warnings[0]


def test_proxy_pass(imported: Import) -> None:
    def document(words: str) -> dict[str, object]:
        result = imported(f"mail {{ server {{ listen 587; {words} proxy_pass u.test:26; }} }}")
        assert result.errors == [] and "proxy_pass: nginx's mail module does not know it" in result.warnings[0]
        return result.documents[0]

    alone = document("")
    assert at(alone, "stages.auth_relay") == {} and at(alone, "listen.0.capabilities") is None
    assert at(alone, "upstreams.upstream.capabilities") is None  # it is asked what it has
    assert at(document("smtp_auth login cram-md5;"), "stages.auth_relay") == {"mechanisms": ["LOGIN", "CRAM-MD5"]}
    assert at(document("xclient off;"), "upstreams.upstream.hello") is None  # with EHLO
    assert at(document("proxy_smtp_auth on;"), "stages.upstream_auth") is None
    asked = document("auth_http h.test;")
    assert at(asked, "stages.auth_http") is not None and at(asked, "stages.splice.pool") == "upstream"
    nobody = document("smtp_auth none;")
    assert at(nobody, "stages.auth_relay") is None and nobody["relay"] == "open"
