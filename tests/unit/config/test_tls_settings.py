"""The `tls:` keys: what is read as what, their way into a context, and nginx's ssl_conf_command."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError

from gateway.config.tls_settings import SessionCache, Tls, conf_command
from gateway.pipeline.server_context import server_context
from gateway.relay.tls import TlsConfigError

OLD = "DEFAULT:@SECLEVEL=0"


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        ("verify_client", True, "required"),
        ("verify_client", "on", "required"),
        ("verify_client", False, "off"),
        ("verify_client", "optional_no_ca", "optional_no_ca"),
        ("minimum_version", 1.3, "TLSv1.3"),
        ("minimum_version", "TLSv1.0", "TLSv1"),
        ("minimum_version", "1.1", "TLSv1.1"),
        ("session_cache", False, SessionCache("off")),
        ("session_cache", "none", SessionCache()),
        ("session_cache", "builtin", SessionCache("builtin", 20480)),
        ("session_cache", {"builtin": 100}, SessionCache("builtin", 100)),
        ("session_cache", {"shared": "1m"}, SessionCache("shared", 4096)),
        ("session_timeout", "5m", 300.0),
        ("options", ["-sessionticket", "+PrioritizeChaCha"], ("-sessionticket", "+PrioritizeChaCha")),
    ],
)
def test_forms_of_values(tmp_path: Path, key: str, written: object, read: object) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    tls = Tls.model_validate({"ciphers": OLD, "trusted_ca": str(ca), key: written})
    assert getattr(tls, key) == read
    dumped = Tls.model_validate(tls.model_dump(mode="json", exclude_unset=True))
    assert getattr(dumped, key) == read


@pytest.mark.parametrize(
    "settings",
    [
        {"verify_client": "optional"},
        {"verify_client": "required"},
        {"session_cache": "shared"},
        {"session_cache": {"shared": "1m", "builtin": 10}},
        {"session_cache": {"builtin": 0}},
        {"session_cache": True},
        {"minimum_version": "TLSv1"},
        {"minimum_version": "SSLv3", "ciphers": OLD},
        {"maximum_version": "TLSv1.1"},
        {"options": ["KTLS"]},
        {"options": ["-NoRenegotiation"]},
        {"options": ["Compression"]},
        {"options": ["TicketSession"]},
    ],
)
def test_what_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Tls.model_validate(settings)


def test_every_setting_reaches_the_context(tmp_path: Path) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("mx.example.org")
    chain, key, authority = tmp_path / "mx.crt", tmp_path / "mx.key", tmp_path / "ca.pem"
    issued.cert_chain_pems[0].write_to_path(str(chain))
    issued.private_key_pem.write_to_path(str(key))
    ca.cert_pem.write_to_path(str(authority))
    pair = {"chain": str(chain), "key": str(key)}
    settings: dict[str, object] = {
        "certificates": [pair],
        "client_ca": str(authority),
        "verify_client": "required",
        "session_cache": {"shared": "1m"},
    }
    context = server_context(Tls.model_validate(settings), ("imap",))
    assert context is not None and context.verify == "required"
    assert server_context(Tls(), ("imap",)) is None
    cases: list[tuple[dict[str, object], str]] = [
        ({"curves": "nonsense"}, "curves"),
        ({"ciphers": "nonsense"}, "ciphers"),
        ({"ciphersuites": "nonsense"}, "ciphers"),
        ({"dhparam": str(chain)}, "Diffie-Hellman"),
        ({"crl": str(chain)}, "revocation"),
        ({"trusted_ca": str(key)}, "PEM certificates"),
        ({"password_file": __file__, "certificates": [{**pair, "key": str(authority)}]}, "private key"),
    ]
    for wrong, text in cases:
        with pytest.raises(TlsConfigError, match=text):
            server_context(Tls.model_validate({**settings, **wrong}), ())


@pytest.mark.parametrize(
    ("name", "value", "settings"),
    [
        ("Options", "-SessionTicket, ServerPreference", {"options": ["-SessionTicket", "ServerPreference"]}),
        ("Ciphersuites", "TLS_AES_128_GCM_SHA256", {"ciphersuites": "TLS_AES_128_GCM_SHA256"}),
        ("CipherString", OLD, {"ciphers": OLD}),
        ("minprotocol", "TLSv1.2", {"minimum_version": "TLSv1.2"}),
        ("MinProtocol", "None", {"minimum_version": "TLSv1"}),
        ("MaxProtocol", "None", {"maximum_version": "TLSv1.3"}),
        ("Curves", "X25519:P-256", {"curves": "X25519:P-256"}),
        ("Groups", "X25519", {"curves": "X25519"}),
        ("DHParameters", "dh.pem", {"dhparam": "dh.pem"}),
        ("Certificate", "mx.crt", {"certificates": [{"chain": "mx.crt"}]}),
        ("PrivateKey", "mx.key", {"certificates": [{"key": "mx.key"}]}),
        ("Options", "-Nonsense", None),
        ("Options", "KTLS", None),
        ("MinProtocol", "SSLv3", None),
        ("MinProtocol", "DTLSv1.2", None),
        ("VerifyMode", "Peer", None),
        ("CipherString", "", None),
    ],
)
def test_conf_commands(name: str, value: str, settings: dict[str, object] | None) -> None:
    if settings is None:
        with pytest.raises(ValueError):
            conf_command(name, value)
    else:
        assert conf_command(name, value) == settings
