from __future__ import annotations

import pytest

from gateway import Cause, Listener, Refuse, Session
from gateway.protocol.proxy_header import Tlv, parse, parse_ssl
from gateway.relay.tls import TlsInfo
from gateway.testing.peer import ScriptedPeer
from stages.proxy_header import MAX_HEADER, ProxyHeader, ProxyHeaderSettings


def make_session(address: str = "192.0.2.7", local: str = "198.51.100.25") -> Session:
    return Session("7KQ2-M9X", "p", Listener("smtp://198.51.100.25:25"), (address, 52001), (local, 25), 0.0)


def make_stage(**settings: object) -> ProxyHeader:
    stage = ProxyHeader(ProxyHeaderSettings.model_validate(settings))
    stage.id = "proxy_header"
    return stage


def tls_info(sni: str | None, certificate: bytes | None = None, verified: bool = False) -> TlsInfo:
    return TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256, sni, None, verified, "", certificate, False)


@pytest.mark.parametrize(
    ("version", "address", "local", "written"),
    [
        (1, "192.0.2.7", "198.51.100.25", b"PROXY TCP4 192.0.2.7 198.51.100.25 52001 25\r\n"),
        (1, "2001:db8::7", "2001:db8::25", b"PROXY TCP6 2001:db8::7 2001:db8::25 52001 25\r\n"),
        (2, "192.0.2.7", "198.51.100.25",
         bytes.fromhex("0d0a0d0a000d0a515549540a2111000cc0000207c6336419cb210019")),
    ],
)  # fmt: skip
def test_addresses(version: int, address: str, local: str, written: bytes) -> None:
    peer = ScriptedPeer()
    assert make_stage(version=version).upstream_connect(make_session(address, local), peer) is None
    assert peer.written == written and peer.speaks_for_client


@pytest.mark.parametrize(("destination", "written"), [("received", b"203.0.113.9"), ("local", b"198.51.100.25")])
def test_the_destination(destination: str, written: bytes) -> None:
    session, peer = make_session(), ScriptedPeer()
    session.local = "203.0.113.9", 587  # by a PROXY header
    make_stage(version=1, destination=destination).upstream_connect(session, peer)
    assert peer.written.split()[3] == written


def test_version_2_tells_of_tls() -> None:
    session, peer = make_session(), ScriptedPeer()
    session.tls = tls_info("mail.example", b"der", verified=True)
    make_stage(session_id=True).upstream_connect(session, peer)
    parsed = parse(peer.written)
    assert parsed is not None and parsed[1] == len(peer.written) <= MAX_HEADER
    header = parsed[0]
    assert header.source == ("192.0.2.7", 52001) and header.tlv(Tlv.AUTHORITY) == b"mail.example"
    assert header.tlv(Tlv.UNIQUE_ID) == b"7KQ2-M9X"
    ssl = parse_ssl(header.tlv(Tlv.SSL) or b"")
    assert ssl.verified and ssl.version == "TLSv1.3"


@pytest.mark.parametrize(("certificate", "verified"), [(None, False), (b"x", False), (b"x", True)])
def test_only_a_verified_certificate_is_called_so(certificate: bytes | None, verified: bool) -> None:
    session, peer = make_session(), ScriptedPeer()
    session.tls = tls_info(None, certificate, verified)
    make_stage().upstream_connect(session, peer)
    parsed = parse(peer.written)
    assert parsed is not None
    assert parse_ssl(parsed[0].tlv(Tlv.SSL) or b"").verified is verified


def test_never_longer_than_postfix_reads() -> None:
    session, peer = make_session(), ScriptedPeer()
    session.tls = tls_info("a" * 600)
    make_stage().upstream_connect(session, peer)
    assert len(peer.written) == 28


def test_a_client_without_address_is_not_passed_off_as_the_gateway() -> None:
    peer = ScriptedPeer()
    for version in (1, 2):
        refuse = make_stage(version=version).upstream_connect(make_session("unix:"), peer)
        assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_MISCONFIGURED
    assert peer.written == b""
