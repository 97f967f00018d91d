"""The pipeline file: defaults, short spellings, stage entries."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from pydantic import ValidationError

from gateway.config.addresses import ListenUrl, Resolver, ServerUrl
from gateway.config.log_settings import Log
from gateway.config.models import Mode, Pipeline, Pool, Reuse, StageEntry, own_hostname, split_entry
from gateway.config.process import Process
from gateway.values import NotA

LEAST: dict[str, object] = {
    "listen": ["smtp://127.0.0.1:0"],
    "hostname": "mail.example.org",
    "stages": ["splice"],
    "upstreams": {"mta": {"servers": ["10.0.0.5"]}},
}


def pipeline(**keys: object) -> Pipeline:
    return Pipeline.model_validate({**LEAST, **keys})


def pool(**keys: object) -> Pool:
    return Pool.model_validate({"servers": ["10.0.0.5"], **keys})


def test_defaults() -> None:
    least = pipeline()
    assert least.listen[0].url == ListenUrl("smtp", "127.0.0.1", 0)
    assert least.listen[0].proxy_protocol == "off"
    assert (least.trust.proxy, least.trust.xclient, least.trust.clients) == ((), (), ())
    assert least.relay is None and not least.allow_plaintext_auth and not least.soft_bounce and least.reply_id
    assert least.line_endings == "by_trust" and least.tls.certificates == ()
    mta = least.upstreams["mta"]
    assert mta.servers[0].url == ServerUrl("smtp", "10.0.0.5", 25) and mta.servers[0].weight == 1
    assert (mta.balance, mta.max_connections, mta.queue, mta.queue_timeout) == ("round_robin", 80, 100, 10.0)
    assert (mta.tls, mta.verify, mta.reuse) == ("opportunistic", True, None)
    process = Process()
    assert (process.workers, process.store, process.drain) == (1, None, 30.0)


def test_spellings() -> None:
    written = pipeline(
        listen=[{"url": "smtp://127.0.0.1:25", "name": "mx", "proxy_protocol": "required", "capabilities": ["SIZE 5"]}],
        trust={"proxy": "10.0.0.1", "xclient": ["::1"]},
        tls={"minimum_version": 1.3},
        line_endings="normalise",
        reply_id="off",
        limits={"command_timeout": "5m", "message_size": "10MiB"},
        resolvers=["127.0.0.1:5353"],
        tables={"vip": ["a", "b"]},
        log={"format": "text", "debug_clients": ["192.0.2.0/24"]},
    )
    assert written.trust.proxy == (ipaddress.ip_network("10.0.0.1/32"),)
    assert written.tls.minimum_version == "TLSv1.3"
    assert written.line_endings == "normalize" and written.reply_id is False
    assert (written.limits.command_timeout, written.limits.message_size) == (300.0, 10 << 20)
    assert written.resolvers == (Resolver("127.0.0.1", 5353),)
    assert written.tables["vip"].entries == ("a", "b")
    assert isinstance(written.log, Log) and written.log.format == "text"


@pytest.mark.parametrize("written", ["hash_user", "hash user", "hash of user", "hash_of_user"])
def test_balance(written: str) -> None:
    assert pool(balance=written).balance == "hash_user"


@pytest.mark.parametrize(
    ("written", "reuse"),
    [(False, None), ("off", None), (True, Reuse()), ("on", Reuse()), ({"idle": "5s"}, Reuse(idle=5.0))],
)
def test_reuse(written: object, reuse: Reuse | None) -> None:
    assert pool(reuse=written).reuse == reuse


@pytest.mark.parametrize(
    ("raw", "name", "settings"),
    [
        ("splice", "splice", None),
        ({"splice": None}, "splice", None),
        ({"splice": "mta"}, "splice", "mta"),
        ({"access": ["a", "b"]}, "access", ["a", "b"]),
        ({"access": {"deny": [1], "mode": "observe"}}, "access", {"deny": [1]}),
    ],
)
def test_entries(raw: object, name: str, settings: object) -> None:
    entry = split_entry(raw)
    assert (entry.name, entry.settings) == (name, settings)


def test_reserved_settings() -> None:
    settings = {"limit": 1, "id": "burst", "mode": "25%", "on_error": "pass", "timeout": "2s", "when": "true"}
    entry = split_entry({"rate_limit": settings})
    assert entry.settings == {"limit": 1} and entry.id == "burst"
    assert entry.reserved.mode == Mode("enforce", 25.0)
    assert entry.reserved.timeout == 2.0 and entry.reserved.on_error == "pass" and entry.reserved.refuse_at is None
    assert entry.reserved.when is not None and entry.reserved.when.text == "true"
    assert split_entry({"a": {"mode": "off"}}).reserved.mode.kind == "off"


def test_entries_know_their_place() -> None:
    entries = pipeline(stages=["reverse_dns", {"splice": "mta"}]).stages
    assert [entry.loc for entry in entries] == [("stages", 0, "reverse_dns"), ("stages", 1, "splice")]
    assert isinstance(entries[0], StageEntry) and entries[0].id == "reverse_dns"


@pytest.mark.parametrize("raw", [None, "", {}, [], 5, True, {"a": None, "b": 1}])
def test_no_entries(raw: object) -> None:
    with pytest.raises(NotA):
        split_entry(raw)


def test_settings_of_stages_are_not_in_the_repr() -> None:
    assert "hunter2" not in repr(pipeline(stages=[{"auth_http": {"password": "hunter2"}}]))


def test_port_0_may_be_listened_on_twice() -> None:
    assert len(pipeline(listen=["smtp://127.0.0.1:0", "smtp://127.0.0.1:0"]).listen) == 2
    with pytest.raises(ValidationError):
        pipeline(listen=["smtp://127.0.0.1:25", "smtp://127.0.0.1:25"])


def test_own_hostname_asks_nobody_where_the_name_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> str:
        raise AssertionError("asked the resolver")

    monkeypatch.setattr(socket, "gethostname", lambda: "mail.example.org")
    monkeypatch.setattr(socket, "getfqdn", forbidden)
    assert own_hostname() == "mail.example.org"
    monkeypatch.setattr(socket, "gethostname", lambda: "mail")
    monkeypatch.setattr(socket, "getfqdn", lambda name: name + ".example.net")
    assert own_hostname() == "mail.example.net"


def test_json_schema() -> None:
    schema = Pipeline.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"listen", "stages"}
    process = Process.model_json_schema()
    assert set(process["properties"]) == {
        "workers", "user", "group", "store", "admin", "metrics", "traces", "log", "drain", "state_directory"
    }  # fmt: skip


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_token_guards_nothing(token: str) -> None:
    """`Authorization: Bearer` alone would show it."""
    with pytest.raises(ValidationError, match="the token is empty"):
        Process.model_validate({"admin": {"listen": "127.0.0.1:9000", "token": token}})
