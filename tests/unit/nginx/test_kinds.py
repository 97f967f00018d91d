"""The common kinds of configuration: each is imported, and `gateway check` takes what came of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gateway.cli import main
from gateway.replies import names
from tests.unit.nginx.conftest import at

CONFIGS = Path(__file__).parent / "configs"

# Of each file: the pipelines with what is essential of them.
# fmt: off
KINDS: dict[str, dict[str, dict[str, object]]] = {
    "auth_http_xclient": {
        "smtp-25": {
            "hostname": "mail.example.com",
            "stages.auth_http.url": "http://auth.example.com:8080/mail/auth",
            "stages.auth_http.headers": {"X-Auth-Key": "secret_string"},
            "stages.xclient.if_missing": "send",
            "stages.splice.pass_error_message": "always",
            "limits.login_timeout": "5s",
            "listen.0.capabilities": [
                "SIZE 10485760", "ENHANCEDSTATUSCODES", "8BITMIME", "DSN", "AUTH PLAIN LOGIN CRAM-MD5",
            ],
        }
    },
    "shared_tls": {
        "smtp-25": {"tls.session_cache": {"shared": 10485760}, "allow_plaintext_auth": True},
        "smtps-465": {"listen.0.url": "smtps://0.0.0.0:465", "tls.session_timeout": "10m"},
        "imap-143": {"stages.auth_http.methods": ["plain", "login", "cram-md5"], "listen.0.starttls": True},
        "imaps-993": {"listen.0.url": "imaps://0.0.0.0:993"},
        "pop3-110": {"allow_plaintext_auth": False, "replies.pop3.quit": "+OK"},
        "pop3s-995": {"listen.1.url": "pop3s://0.0.0.0:995", "listen.0.ipv6only": True},
    },
    "submission_proxy_pass": {
        "smtp-587": {"stages.auth_relay": {"mechanisms": ["LOGIN", "PLAIN"]}, "upstreams.upstream.servers": ["smtp://127.0.0.1:10587"]},
        "smtps-465": {"stages.auth_relay": {"mechanisms": ["LOGIN", "PLAIN"]}, "stages.xclient": None},
    },
    "static_auth": {
        "imap-143": {"stages.upstream_auth.verify": "upstream", "upstreams.upstream.servers": ["imap://127.0.0.1:10143"]},
        "smtp-25": {"relay": "open", "upstreams.upstream.servers": ["smtp://127.0.0.1:10025"]},
        "smtp-587": {"stages.auth_http.url": "http://localhost:8080/smtp"},
    },
    "none_postfix": {
        "smtp-25": {
            "relay": "open",
            "stages.auth_http.none": True,
            "stages.greeting_delay": "1.5s",
            "stages.reverse_dns": "30s",
            "resolver": {"timeout": "30s", "valid": "30s", "ipv6": False},
        }
    },
}
# fmt: on


@pytest.fixture
def folder(tmp_path: Path, certificates: Path) -> Path:
    """The configurations with the certificates that they name."""
    shutil.copytree(CONFIGS, tmp_path, dirs_exist_ok=True)
    shutil.copytree(certificates, tmp_path / "tls")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_imported_and_checked(folder: Path, kind: str) -> None:
    result = CliRunner().invoke(main, ["import-nginx", str(folder / f"{kind}.conf")])
    assert result.exit_code == 0, result.stderr
    (folder / "mail.yaml").write_text(result.stdout)
    documents = {data["name"]: data for data in yaml.safe_load_all(result.stdout) if data and "name" in data}
    assert list(documents) == list(KINDS[kind])
    for name, essentials in KINDS[kind].items():
        assert {path: at(documents[name], path) for path in essentials} == essentials
    checked = CliRunner().invoke(main, ["check", str(folder / "mail.yaml")])
    assert checked.exit_code == 0, checked.stderr


def test_a_file_each(folder: Path) -> None:
    arguments = ["import-nginx", str(folder / "shared_tls.conf"), "-o", str(folder / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    written = sorted(path.name for path in (folder / "out").iterdir())
    assert written == sorted(["process.yaml", *(f"{name}.yaml" for name in KINDS["shared_tls"])])
    assert CliRunner().invoke(main, ["check", str(folder / "out")]).exit_code == 0
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "is there already" in again.stderr


def test_errors_write_nothing(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text("mail { auth_http a;\nsmtp_future on; server { listen 25; proxy on; } }")
    result = CliRunner().invoke(main, ["import-nginx", str(conf)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f'{conf}:2: error: unknown directive "smtp_future"' in result.stderr
    lenient = CliRunner().invoke(main, ["import-nginx", str(conf), "--lenient"])
    assert lenient.exit_code == 0
    assert f'{conf}:2: warning: unknown directive "smtp_future"' in lenient.stderr
    assert f'NOT IMPORTED: {conf}:2: unknown directive "smtp_future"' in lenient.stdout.replace("\n# ", " ")


def test_every_reply_has_a_name() -> None:
    from gateway.nginx.texts import IMAP, POP3, SMTP

    assert SMTP.keys() - names("smtp") == IMAP.keys() - names("imap") == POP3.keys() - names("pop3") == set()
