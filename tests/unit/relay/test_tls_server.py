"""What a server's TLS can be told, each with real handshakes: client certificates, resumption, keys, versions, groups."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from OpenSSL import SSL

from gateway.relay.tls import Certificate, ServerContext, ServerSession, ServerSettings, TlsError, TlsInfo
from gateway.relay.tls_cache import KeptSessions

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BOTH = pytest.mark.parametrize("version", [TLS12, TLS13])


@dataclass
class Party:
    """Someone's certificate on disk."""

    certificate: Certificate
    leaf: x509.Certificate


@dataclass
class World:
    """An authority with an intermediate one below it, one that nobody knows, and who has which certificate."""

    path: Path
    root: trustme.CA = field(default_factory=trustme.CA)
    stranger: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.middle = self.root.create_child_ca()
        self.root_file = self.write("root.pem", self.root.cert_pem.bytes())
        self.stranger_file = self.write("stranger.pem", self.stranger.cert_pem.bytes())
        self.mx = self.issue("mx.example.org", self.root)
        self.parties: dict[str, Party | None] = {
            "nobody": None,
            "good": self.issue("good.example.org", self.root),
            "revoked": self.issue("revoked.example.org", self.root),
            "deep": self.issue("deep.example.org", self.middle),
            "stranger": self.issue("stranger.example.org", self.stranger),
            "expired": self.issue("expired.example.org", self.root, -5),
            "expired stranger": self.issue("expired.example.net", self.stranger, -5),
            "self-signed": self.self_signed(),
        }

    def write(self, name: str, data: bytes) -> str:
        path = self.path / name
        path.write_bytes(data)
        return str(path)

    def issue(self, name: str, ca: trustme.CA, days: int = 30, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> Party:
        now = datetime.now(UTC)
        issued = ca.issue_cert(name, key_type=kind, not_before=now - timedelta(10), not_after=now + timedelta(days))
        chain = self.write(f"{name}.crt", b"".join(part.bytes() for part in issued.cert_chain_pems))
        key = self.write(f"{name}.key", issued.private_key_pem.bytes())
        return Party(Certificate(chain, key), x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()))

    def self_signed(self) -> Party:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "self.example.org")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(9))
        leaf = builder.sign(key, hashes.SHA256())
        chain = self.write("self.crt", leaf.public_bytes(Encoding.PEM))
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Party(Certificate(chain, self.write("self.key", text)), leaf)

    def revocation_list(self, *parties: Party) -> bytes:
        ca = x509.load_pem_x509_certificate(self.root.cert_pem.bytes())
        key = load_pem_private_key(self.root.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder(ca.subject, now - timedelta(1), now + timedelta(9))
        for party in parties:
            revoked = x509.RevokedCertificateBuilder(party.leaf.serial_number, now - timedelta(1)).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def server(self, **settings: object) -> ServerContext:
        return ServerContext([self.mx.certificate], ServerSettings(**settings))  # type: ignore[arg-type]

    def client(self, party: Party | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.root_file)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        if party is not None:
            context.load_cert_chain(party.certificate.chain, party.certificate.key)
        return context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tls"))


def connect(
    server: ServerContext, client: ssl.SSLContext, kept: ssl.SSLSession | None = None
) -> tuple[TlsInfo, ssl.SSLObject]:
    """A connection from its handshake to its end in good order."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(incoming, outgoing, server_hostname="mx.example.org", session=kept)
    session = server.session()
    for _ in range(4):
        try:
            peer.do_handshake()
            peer.read(1)  # the tickets of TLS 1.3
        except ssl.SSLWantReadError:
            pass
        flight = outgoing.read()
        if flight:
            session.feed(flight)
        incoming.write(session.outgoing())
    assert session.info is not None
    session.close_notify()  # OpenSSL forgets sessions that end without it
    return session.info, peer


def again(server: ServerContext, client: ssl.SSLContext) -> TlsInfo:
    """What the second connection of a client settles that tries to resume its first."""
    _, peer = connect(server, client)
    return connect(server, client, peer.session)[0]


# -- client certificates

SELF_SIGNED, STRANGER = "self-signed certificate", "unable to verify the first certificate"


@BOTH
@pytest.mark.parametrize(
    ("who", "error", "refused"),
    [  # refused: by optional, optional_no_ca, required
        ("good", "", ("", "", "")),
        ("nobody", "no certificate shown", ("", "", "missing")),
        ("stranger", STRANGER, ("failed", "", "failed")),
        ("self-signed", SELF_SIGNED, ("failed", "", "failed")),
        ("expired", "certificate has expired", ("failed", "failed", "failed")),
        ("expired stranger", "certificate has expired", ("failed", "failed", "failed")),
    ],
)
def test_client_certificates_are_judged_after_the_handshake(
    world: World, who: str, error: str, refused: tuple[str, ...], version: ssl.TLSVersion
) -> None:
    client = world.client(world.parties[who], version)
    for verify, refusal in zip(("optional", "optional_no_ca", "required"), refused, strict=True):
        server = world.server(verify=verify, client_ca=world.root_file)
        for info in (connect(server, client)[0], again(server, client)):
            assert (info.verified, info.verify_error) == (who == "good", error)
            assert (info.certificate is None) == (who == "nobody")
            assert server.refusal(info) == refusal
            said = "SUCCESS" if who == "good" else "NONE" if who == "nobody" else f"FAILED:{error}"
            assert info.verification == said
    off = world.server()
    info, _ = connect(off, client)
    assert (info.verification, info.certificate, off.refusal(info)) == ("", None, "")


@BOTH
@pytest.mark.parametrize("kept", [{}, {"session_cache": "cache", "session_tickets": False}, {"session_cache": "cache"}])
@pytest.mark.parametrize("verify", ["optional", "optional_no_ca"])
def test_only_certificates_that_were_verified_are_resumed(
    world: World, version: ssl.TLSVersion, kept: dict[str, object], verify: str
) -> None:
    server = world.server(verify=verify, client_ca=world.root_file, **kept)
    for who in ("good", "stranger", "expired", "self-signed"):
        info = again(server, world.client(world.parties[who], version))
        assert (info.resumed, info.verified) == (who == "good", who == "good"), who
        assert info.certificate is not None
    assert again(server, world.client(None, version)).verification == "NONE"


def test_no_authority_is_needed_where_none_is_asked(world: World) -> None:
    server = world.server(verify="optional_no_ca")
    info, _ = connect(server, world.client(world.parties["good"]))
    assert (info.verified, info.unknown_issuer, server.refusal(info)) == (False, True, "")


def test_trusted_authorities_are_not_announced(world: World) -> None:
    """Both are believed; only those of client_ca are told to clients."""
    server = world.server(verify="required", client_ca=world.root_file, trusted_ca=world.stranger_file)
    for who in ("good", "stranger"):
        assert connect(server, world.client(world.parties[who]))[0].verified
    for settings, count in [
        ({"client_ca": world.root_file, "trusted_ca": world.stranger_file}, 1),
        ({"trusted_ca": world.stranger_file}, 0),
    ]:
        peer = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
        shake(world.server(verify="optional", **settings).session(), peer)
        names = [name.der() for name in peer.get_client_ca_list()]
        assert len(names) == count
        subject = x509.load_pem_x509_certificate(world.root.cert_pem.bytes()).subject.public_bytes()
        assert names == [subject][:count]


def test_revoked_certificates(world: World) -> None:
    revoked = world.parties["revoked"]
    assert revoked is not None
    empty = world.revocation_list()
    for crl, who, error in [
        (None, "revoked", ""),
        (empty, "revoked", ""),
        (world.revocation_list(revoked), "revoked", "certificate revoked"),
        (world.revocation_list(revoked), "good", ""),
        # every authority of the chain needs a list, as in nginx
        (empty, "deep", "unable to get certificate CRL"),
    ]:
        path = None if crl is None else world.write("crl.pem", crl)
        server = world.server(verify="optional_no_ca", client_ca=world.root_file, crl=path)
        info, _ = connect(server, world.client(world.parties[who]))
        assert (info.verified, info.verify_error) == (not error, error)
        assert server.refusal(info) == ("failed" if error else "")


@pytest.mark.parametrize(("depth", "enough"), [(0, False), (1, True), (2, True)])
def test_depth_counts_intermediates(world: World, depth: int, enough: bool) -> None:
    server = world.server(verify="required", client_ca=world.root_file, verify_depth=depth)
    assert connect(server, world.client(world.parties["good"]))[0].verified
    info, _ = connect(server, world.client(world.parties["deep"]))
    assert (info.verified, info.verify_error == "", server.refusal(info) == "") == (enough, enough, enough)


# -- resumption


@BOTH
@pytest.mark.parametrize(
    ("settings", "resumed"),
    [
        ({}, True),
        ({"session_tickets": False}, False),
        ({"options": ("-SessionTicket",)}, False),
        ({"session_tickets": False, "options": ("SessionTicket",)}, True),
        ({"session_cache": "off"}, False),
        ({"session_cache": "off", "options": ("SessionTicket",)}, False),
        ({"session_cache": "cache"}, True),
        ({"session_cache": "cache", "session_tickets": False}, True),
    ],
)
def test_what_resumes_a_session(
    world: World, settings: dict[str, object], resumed: bool, version: ssl.TLSVersion
) -> None:
    server = world.server(**settings)
    assert again(server, world.client(None, version)).resumed is resumed
    _, peer = connect(server, world.client(None, version))
    client = peer.context
    assert not connect(world.server(**settings), client, peer.session)[0].resumed, "another context's session"


@BOTH
def test_clients_are_told_the_timeout(world: World, version: ssl.TLSVersion) -> None:
    _, peer = connect(world.server(session_timeout=77), world.client(None, version))
    assert peer.session is not None
    assert peer.session.ticket_lifetime_hint == 77


@pytest.mark.parametrize(("version", "tickets", "room"), [(TLS12, False, 2), (TLS13, False, 4), (TLS13, True, 1)])
def test_a_full_cache_keeps_no_more_until_the_oldest_expires(
    world: World, version: ssl.TLSVersion, tickets: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("gateway.relay.tls_cache.time.monotonic", lambda: now[0])
    server = world.server(session_cache="cache", sessions=room, session_tickets=tickets, session_timeout=60)
    client = world.client(None, version)
    first, second = connect(server, client)[1].session, connect(server, client)[1].session
    third = connect(server, client)[1].session
    assert connect(server, client, first)[0].resumed
    assert connect(server, client, second)[0].resumed
    assert connect(server, client, third)[0].resumed is tickets  # tickets need no room
    now[0] += 61
    fourth = connect(server, client)[1].session
    assert connect(server, client, fourth)[0].resumed


def test_room_is_counted_by_sessions() -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    kept = KeptSessions(context, 2, 60, tickets=False)
    kept.count("TLSv1.2")
    assert not context.get_session_cache_mode() & SSL.SESS_CACHE_NO_INTERNAL_STORE
    kept.count("TLSv1.2")
    assert context.get_session_cache_mode() & SSL.SESS_CACHE_NO_INTERNAL_STORE


# -- keys, versions, ciphers, groups


def test_passphrases_are_tried_one_after_the_other(world: World) -> None:
    key = load_pem_private_key(Path(world.mx.certificate.key).read_bytes(), None)
    pairs = []
    for index, (phrase, form) in enumerate(
        [("first", PrivateFormat.PKCS8), ("with blanks ", PrivateFormat.TraditionalOpenSSL)]
    ):
        data = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(phrase.encode()))
        pairs.append(Certificate(world.mx.certificate.chain, world.write(f"locked{index}.key", data)))
    phrases = world.write("phrases", b"wrong\r\n\nfirst\nwith blanks \n")
    for certificates in (pairs[:1], pairs[1:], [*pairs, world.mx.certificate]):
        server = ServerContext(certificates, ServerSettings(password_file=phrases))
        assert connect(server, world.client())[0].version == "TLSv1.3"


def shake(server: ServerSession, peer: SSL.Connection) -> TlsInfo:
    """A handshake with a client of pyOpenSSL. Raises TlsError where the server fails it, SSL.Error where the client."""
    peer.set_connect_state()
    for _ in range(4):
        try:
            peer.do_handshake()
        except SSL.WantReadError:
            pass
        try:
            server.feed(peer.bio_read(100_000))
        except SSL.WantReadError:
            pass
        answer = server.outgoing()
        if answer:
            peer.bio_write(answer)
    assert server.info is not None
    return server.info


def pyopenssl_client(version: int, ciphers: bytes = b"DEFAULT:@SECLEVEL=0", curves: bytes = b"") -> SSL.Connection:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(version)
    context.set_max_proto_version(version)
    context.set_cipher_list(ciphers)
    if curves:
        assert SSL._lib.SSL_CTX_set1_curves_list(context._context, curves) == 1  # type: ignore[attr-defined]
    return SSL.Connection(context, None)


OLD = "DEFAULT:@SECLEVEL=0"


@pytest.mark.parametrize(
    ("settings", "spoken"),
    [
        ({}, {"TLSv1.2", "TLSv1.3"}),
        ({"minimum": "TLSv1.3"}, {"TLSv1.3"}),
        ({"maximum": "TLSv1.2"}, {"TLSv1.2"}),
        ({"minimum": "TLSv1.1", "ciphers": OLD}, {"TLSv1.1", "TLSv1.2", "TLSv1.3"}),
        ({"minimum": "TLSv1", "maximum": "TLSv1.1", "ciphers": OLD}, {"TLSv1", "TLSv1.1"}),
    ],
)
def test_versions(world: World, settings: dict[str, object], spoken: set[str]) -> None:
    server, versions = world.server(**settings), {}
    names = {"TLSv1": 0x301, "TLSv1.1": 0x302, "TLSv1.2": 0x303, "TLSv1.3": 0x304}
    for name, number in names.items():
        try:
            versions[name] = shake(server.session(), pyopenssl_client(number)).version
        except (TlsError, SSL.Error):
            continue
    assert versions == {name: name for name in spoken}


def test_whose_order_of_ciphers_counts(world: World) -> None:
    ours = "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256"
    small, large, chacha = (
        f"ECDHE-ECDSA-{name}" for name in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    )
    cases: list[tuple[dict[str, object], tuple[str, str], str]] = [
        ({}, (small, large), small),
        ({"prefer_server_ciphers": True}, (small, large), large),
        ({"options": ("ServerPreference",)}, (small, large), large),
        ({"prefer_server_ciphers": True, "options": ("-serverpreference",)}, (small, large), small),
        ({"options": ("ServerPreference", "PrioritizeChaCha")}, (chacha, large), chacha),
        ({"prefer_server_ciphers": True}, (chacha, large), large),
    ]
    for settings, theirs, chosen in cases:
        client = world.client(None, TLS12)
        client.set_ciphers(":".join(theirs))
        assert connect(world.server(ciphers=ours, **settings), client)[0].cipher == chosen, settings
    suites = world.server(ciphers=ours, ciphersuites="TLS_CHACHA20_POLY1305_SHA256")
    assert connect(suites, world.client())[0].cipher == "TLS_CHACHA20_POLY1305_SHA256"


@pytest.mark.parametrize("version", [0x303, 0x304])
def test_curves(world: World, version: int) -> None:
    rsa = world.issue("rsa.example.org", world.root, kind=trustme.KeyType.RSA).certificate  # its key is on no curve
    server = ServerContext([rsa], ServerSettings(curves="secp384r1:X25519"))
    for theirs in (b"X25519", b"secp384r1"):
        peer = pyopenssl_client(version, curves=theirs)
        shake(server.session(), peer)
        assert (peer.get_group_name() or "").lower() == theirs.decode().lower()
    with pytest.raises(TlsError):
        shake(server.session(), pyopenssl_client(version, b"ECDHE", b"prime256v1"))


# RFC 7919 appendix A.1, ffdhe2048: a group that needs no search for a prime.
FFDHE2048 = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


def test_dhparam(world: World) -> None:
    rsa = world.issue("rsa.example.org", world.root, kind=trustme.KeyType.RSA).certificate
    parameters = world.write("dh.pem", FFDHE2048)
    dhe = b"DHE-RSA-AES128-GCM-SHA256"
    server = ServerContext([rsa], ServerSettings(dhparam=parameters))
    # A client that offers groups of RFC 7919 gets one of them without any parameters.
    assert shake(server.session(), pyopenssl_client(0x303, dhe, b"X25519")).cipher == dhe.decode()
    with pytest.raises(TlsError, match="no shared cipher"):
        shake(ServerContext([rsa]).session(), pyopenssl_client(0x303, dhe, b"X25519"))


# -- another program as the client


@pytest.fixture
def listening(world: World) -> Iterator[tuple[int, list[str]]]:
    """A port where one connection is served and answered, and what came of it: its ALPN, or the error."""
    seen: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)
    settings = ServerSettings(verify="optional", client_ca=world.root_file)
    context = ServerContext([world.mx.certificate], settings, alpn=("imap",))

    def serve() -> None:
        with listener.accept()[0] as connection:
            session = context.session()
            try:
                while session.info is None:
                    session.feed(connection.recv(65536))
                    connection.sendall(session.outgoing())
                seen.append(f"{session.info.alpn} {session.info.verification}")
                connection.sendall(session.seal(b"* BYE served\r\n") + session.close_notify())
            except TlsError as error:
                connection.sendall(session.outgoing())
                seen.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1], seen
    thread.join(30)
    listener.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(
    ("alpn", "who", "said", "seen"),
    [
        ("imap", "good", "* BYE served", "imap SUCCESS"),
        (None, "stranger", "* BYE served", f"None FAILED:{STRANGER}"),
        ("http/1.1", "nobody", "no application protocol", "none of the offered application protocols is ours"),
    ],
)
def test_openssl_s_client(
    world: World, listening: tuple[int, list[str]], alpn: str | None, who: str, said: str, seen: str
) -> None:
    port, served = listening
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", world.root_file, "-ign_eof"]
    command += ["-alpn", alpn] if alpn else []
    party = world.parties[who]
    if party is not None:
        command += ["-cert", party.certificate.chain, "-key", party.certificate.key]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=60, check=False)
    output = (done.stdout + done.stderr).decode()
    assert said in output
    if said == "* BYE served":
        assert "Acceptable client certificate CA names" in output
    assert served == [seen]
