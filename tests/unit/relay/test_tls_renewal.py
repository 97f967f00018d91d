"""Certificates, authorities and revocation lists renewed while sessions go on; ticket keys that contexts share."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
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
    PrivateFormat,
    load_pem_private_key,
)
from OpenSSL import SSL

from gateway.relay import tls_files, tls_tickets
from gateway.relay.tls import Certificate, ServerContext, ServerSession, ServerSettings, TlsConfigError, TlsInfo

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BOTH = pytest.mark.parametrize("version", [TLS12, TLS13])
ECDSA, RSA = trustme.KeyType.ECDSA, trustme.KeyType.RSA
MX = "mx.example.org"
SECRET = bytes(range(32))


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_files, "_preloaded", {})


@dataclass
class World:
    """An authority and the files that it fills."""

    path: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def write(self, name: str, data: bytes) -> str:
        path = self.path / name
        path.write_bytes(data)
        return str(path)

    def issue(self, stem: str, *names: str, kind: trustme.KeyType = ECDSA, phrase: bytes = b"") -> dict[str, bytes]:
        """The contents of a new pair of files."""
        issued = self.ca.issue_cert(*names, key_type=kind)
        key = issued.private_key_pem.bytes()
        if phrase:
            loaded = load_pem_private_key(key, None)
            key = loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(phrase))
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        return {str(self.path / f"{stem}.crt"): chain, str(self.path / f"{stem}.key"): key}

    def put(self, stem: str, *names: str, kind: trustme.KeyType = ECDSA, phrase: bytes = b"") -> Certificate:
        files = self.issue(stem, *names, kind=kind, phrase=phrase)
        for path, data in files.items():
            Path(path).write_bytes(data)
        chain, key = files
        return Certificate(chain, key)

    def client(self, version: ssl.TLSVersion | None = None, own: Certificate | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.write("ca.pem", self.ca.cert_pem.bytes()))
        if version is not None:
            context.minimum_version = context.maximum_version = version
        if own is not None:
            context.load_cert_chain(own.chain, own.key)
        return context

    def revocations(self, *serials: int) -> bytes:
        ca = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        key = load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder(ca.subject, now - timedelta(1), now + timedelta(9))
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder(serial, now - timedelta(1)).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@dataclass
class Talk:
    """An open connection: what the server made of it, and both ends."""

    info: TlsInfo
    server: ServerSession
    client: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    @property
    def serial(self) -> int:
        shown = self.client.getpeercert(True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number

    def echo(self) -> bool:
        self.client.write(b"ping")
        heard = self.server.feed(self.outgoing.read())
        self.incoming.write(self.server.seal(b"pong"))
        return heard == b"ping" and self.client.read(9) == b"pong"

    def end(self) -> ssl.SSLSession:
        session = self.client.session
        assert session is not None
        self.server.close_notify()  # OpenSSL forgets sessions that end without it
        return session


def talk(
    context: ServerContext,
    client: ssl.SSLContext,
    kept: ssl.SSLSession | None = None,
    name: str = MX,
    session: ServerSession | None = None,
) -> Talk:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(incoming, outgoing, server_hostname=name, session=kept)
    session = session or context.session()
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
    return Talk(session.info, session, peer, incoming, outgoing)


def serial(files: dict[str, bytes]) -> int:
    return x509.load_pem_x509_certificate(next(iter(files.values()))).serial_number


# -- certificates


@BOTH
@pytest.mark.parametrize("settings", [{}, {"session_cache": "cache", "session_tickets": False}], ids=["ticket", "kept"])
def test_new_connections_see_the_new_one_and_old_sessions_go_on(
    world: World, version: ssl.TLSVersion, settings: dict[str, object]
) -> None:
    context = ServerContext([world.put("mx", MX)], ServerSettings(**settings))  # type: ignore[arg-type]
    client = world.client(version)
    old = talk(context, client)
    kept = talk(context, client).end()
    waiting = context.session()  # for the client's hello; it has what it began with
    files = world.issue("mx", MX)
    assert context.renew(files)
    assert not context.renew(files), "it is loaded already"
    assert old.echo()
    new = talk(context, client)
    assert new.serial == serial(files) != old.serial
    assert talk(context, client, kept).info.resumed
    assert talk(context, client, session=waiting).serial in (old.serial, new.serial)
    (facts,) = context.certificates()
    assert (facts.serial, facts.names) == (f"{serial(files):x}", (MX,))
    assert facts.chain in files and facts.not_before < datetime.now(UTC) < facts.not_after
    assert "trustme" in facts.issuer and facts.subject


def test_a_pair_that_does_not_fit_waits_for_its_other_half(world: World) -> None:
    context = ServerContext([world.put("mx", MX)])
    before = talk(context, world.client()).serial
    files = world.issue("mx", MX)
    chain, key = files
    for _ in range(2):
        with pytest.raises(TlsConfigError, match=r"mx\.key: not the key of"):
            context.renew({chain: files[chain]})
        assert talk(context, world.client()).serial == before
    assert not context.renew({"/elsewhere": b""}), "nothing of ours changed"
    assert context.renew({key: files[key]}), "both halves are there"
    assert talk(context, world.client()).serial == serial(files)


def test_what_cannot_be_used_changes_nothing(world: World) -> None:
    context = ServerContext([world.put("mx", MX)])
    before = talk(context, world.client()).serial
    now = datetime.now(UTC)
    chain, key = world.issue("mx", MX)
    old = world.ca.issue_cert(MX, not_before=now - timedelta(9), not_after=now - timedelta(2))
    cases: list[tuple[dict[str, bytes], str]] = [
        ({chain: b"garbage"}, "not a chain of PEM"),
        ({chain: Path(chain).read_bytes(), key: b"garbage"}, "not a PEM private key"),
        ({chain: old.cert_chain_pems[0].bytes(), key: old.private_key_pem.bytes()}, "expired on"),
        (world.issue("mx", MX, phrase=b"secret"), "the key is encrypted"),
    ]
    for files, text in cases:
        with pytest.raises(TlsConfigError, match=text):
            context.renew(files)
        assert talk(context, world.client()).serial == before
    files = world.issue("mx", MX)
    assert context.renew(files)
    assert talk(context, world.client()).serial == serial(files)


def test_one_bad_pair_does_not_hold_up_the_others(world: World) -> None:
    context = ServerContext([world.put("mx", MX), world.put("imap", "imap.example.org")])
    files, other = world.issue("mx", MX), world.issue("imap", "imap.example.org")
    with pytest.raises(TlsConfigError, match=r"imap\.crt: not a chain"):
        context.renew({**files, next(iter(other)): b"garbage"})
    assert talk(context, world.client()).serial == serial(files)
    assert context.renew(other)
    assert talk(context, world.client(), name="imap.example.org").serial == serial(other)


def test_rsa_and_ecdsa_are_renewed_beside_each_other(world: World) -> None:
    context = ServerContext([world.put("ec", MX), world.put("rsa", MX, kind=RSA)])

    def shown() -> list[int]:
        found = []
        for cipher in ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256"):
            client = world.client(TLS12)
            client.set_ciphers(cipher)
            found.append(talk(context, client).serial)
        return found

    before = shown()
    rsa = world.issue("rsa", MX, kind=RSA)
    assert context.renew(rsa)
    assert shown() == [before[0], serial(rsa)]
    both = {**world.issue("ec", MX), **world.issue("rsa", MX, kind=RSA)}
    assert context.renew(both)
    assert len({*before, serial(rsa), *shown()}) == 5
    assert [int(facts.serial, 16) for facts in context.certificates()] == shown()


@BOTH
def test_another_type_of_key_leaves_nothing_behind(world: World, version: ssl.TLSVersion) -> None:
    """The RSA certificate must be gone once ECDSA took its place; tickets live on where the keys are shared."""
    context = ServerContext([world.put("mx", MX, kind=RSA)], alpn=("smtp",))
    assert context.set_ticket_keys(SECRET, "mx")
    client = world.client(version)
    old = talk(context, client)
    kept = talk(context, client).end()
    files = world.issue("mx", MX)
    assert context.renew(files)
    assert old.echo() and talk(context, client).serial == serial(files)
    assert talk(context, client, kept).info.resumed
    rsa_only = world.client(TLS12)
    rsa_only.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    with pytest.raises(ConnectionError, match="no shared cipher"):
        talk(context, rsa_only)
    client.set_alpn_protocols(["smtp"])
    assert talk(context, client).info.alpn == "smtp"


def test_names_change(world: World) -> None:
    context = ServerContext([world.put("mx", MX), world.put("more", "a.example.org", "*.b.example.org")])
    files = world.issue("more", "c.example.org", "*.d.example.org")
    assert context.renew(files)
    client = world.client()
    client.check_hostname = False
    for name, new in [
        ("a.example.org", False), ("x.b.example.org", False), ("c.example.org", True), ("x.d.example.org", True)
    ]:  # fmt: skip
        assert (talk(context, client, name=name).serial == serial(files)) is new, name


def test_encrypted_keys_and_new_passphrases(world: World) -> None:
    phrases = world.write("phrases", b"first\n")
    context = ServerContext([world.put("mx", MX, phrase=b"first")], ServerSettings(password_file=phrases))
    files = world.issue("mx", MX, phrase=b"first")
    assert context.renew(files)
    files = world.issue("mx", MX, phrase=b"second")
    with pytest.raises(TlsConfigError, match="no line of the password_file"):
        context.renew(files)
    assert context.renew({phrases: b"first\nsecond\n"})
    assert talk(context, world.client()).serial == serial(files)
    assert not context.renew({phrases: b"other\n"}), "the key is open already"


# -- authorities


@BOTH
@pytest.mark.parametrize("settings", [{}, {"session_cache": "cache", "session_tickets": False}], ids=["ticket", "kept"])
def test_whoever_is_revoked_does_not_come_back(
    world: World, version: ssl.TLSVersion, settings: dict[str, object]
) -> None:
    crl, ca = world.write("crl.pem", world.revocations()), world.write("ca.pem", world.ca.cert_pem.bytes())
    asked = ServerSettings(verify="optional", client_ca=ca, crl=crl, **settings)  # type: ignore[arg-type]
    context = ServerContext([world.put("mx", MX)], asked)
    context.set_ticket_keys(SECRET, "mx")
    own = world.put("user", "user.example.org")
    client = world.client(version, own)
    kept = talk(context, client).end()
    again = talk(context, client, kept)
    assert again.info.resumed and again.info.verified
    policy = context.policy
    with pytest.raises(TlsConfigError, match=r"crl\.pem: not a file of PEM"):
        context.renew({crl: b"garbage"})
    assert context.policy == policy and talk(context, client).info.verified
    gone = x509.load_pem_x509_certificate(Path(own.chain).read_bytes()).serial_number
    assert context.renew({crl: world.revocations(gone)})
    assert context.policy != policy and again.echo()
    info = talk(context, client, kept).info
    assert (info.resumed, info.verified, info.verify_error) == (False, False, "certificate revoked")


def test_another_authority(world: World) -> None:
    stranger = World(world.path / "stranger")
    stranger.path.mkdir()
    client = world.client(None, stranger.put("user", "user.example.org"))
    ca = world.write("client-ca.pem", world.ca.cert_pem.bytes())
    context = ServerContext([world.put("mx", MX)], ServerSettings(verify="optional", client_ca=ca))
    assert not talk(context, client).info.verified
    assert context.renew({ca: stranger.ca.cert_pem.bytes()})
    assert talk(context, client).info.verified
    peer = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    peer.set_connect_state()
    session = context.session()
    with pytest.raises(SSL.WantReadError):
        peer.do_handshake()
    session.feed(peer.bio_read(65536))
    peer.bio_write(session.outgoing())
    peer.do_handshake()
    subject = x509.load_pem_x509_certificate(stranger.ca.cert_pem.bytes()).subject.public_bytes()
    assert [name.der() for name in peer.get_client_ca_list()] == [subject]


# -- keys that only root reads


def forked(work: Callable[[], object]) -> None:
    """Do it in a forked process, which must come to its end without an error."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")
def test_root_reads_the_key_and_gives_up_root(world: World) -> None:
    """Keys, passphrases and lists that only root reads serve in a process that is not root, and are renewed there."""
    locked = world.put("mx", MX, phrase=b"phrase")
    ca, crl = world.write("clients.pem", world.ca.cert_pem.bytes()), world.write("crl.pem", world.revocations())
    phrases = world.write("phrases", b"phrase\n")
    files = [locked.chain, locked.key, phrases, ca, crl]
    for path in files:
        os.chmod(path, 0o600)
    client, new = world.client(), world.issue("mx", MX, phrase=b"phrase")
    settings = ServerSettings(verify="optional", client_ca=ca, crl=crl, password_file=phrases)

    def work() -> None:
        tls_files.preload({path: Path(path).read_bytes() for path in files})
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(PermissionError):
            Path(locked.key).read_bytes()
        context = ServerContext([locked], settings)
        assert context.set_ticket_keys(SECRET, "mx")
        kept = talk(context, client).end()
        assert context.renew(new)
        assert talk(context, client).serial == serial(new)
        assert talk(context, client, kept).info.resumed

    forked(work)


# -- tickets


@BOTH
def test_forked_processes_resume_each_others_sessions(world: World, version: ssl.TLSVersion) -> None:
    """Without any secret: the keys of a context go with the fork."""
    context, client = ServerContext([world.put("mx", MX)]), world.client(version)
    mine = talk(context, client)
    kept = mine.end()
    forked(lambda: _must(talk(context, client, kept).info.resumed))


@BOTH
def test_the_same_secret_makes_contexts_resume_each_others_sessions(world: World, version: ssl.TLSVersion) -> None:
    pair = world.put("mx", MX)
    first, client = ServerContext([pair]), world.client(version)
    assert first.set_ticket_keys(SECRET, "mx")
    kept = talk(first, client).end()

    def reloaded() -> None:
        """What a new generation does with a certificate that was renewed in between."""
        world.put("mx", MX)
        second = ServerContext([pair])
        _must(not talk(second, client, kept).info.resumed)
        _must(second.set_ticket_keys(SECRET, "mx"))
        _must(talk(second, client, kept).info.resumed)

    forked(reloaded)
    first.set_ticket_keys(SECRET[::-1], "mx")
    assert not talk(first, client, kept).info.resumed, "a new secret makes old tickets worthless"


@BOTH
def test_no_session_passes_to_another_policy(
    world: World, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by ticket keys, which differ, nor, were they the same, by the name of the sessions' context."""
    pair, ca = world.put("mx", MX), world.write("ca.pem", world.ca.cert_pem.bytes())
    other_ca = world.write("other.pem", trustme.CA().cert_pem.bytes())
    crl = world.write("crl.pem", world.revocations())
    own = world.put("user", "user.example.org")
    optional = ServerSettings(verify="optional", client_ca=ca)
    makers: list[Callable[[], ServerContext]] = [
        lambda: ServerContext([pair]),
        lambda: ServerContext([pair], alpn=("smtp",)),
        lambda: ServerContext([pair], optional),
        lambda: ServerContext([pair], ServerSettings(verify="optional_no_ca", client_ca=ca)),
        lambda: ServerContext([pair], ServerSettings(verify="optional", client_ca=other_ca)),
        lambda: ServerContext([pair], ServerSettings(verify="optional", client_ca=ca, trusted_ca=other_ca)),
        lambda: ServerContext([pair], ServerSettings(verify="optional", client_ca=ca, crl=crl)),
        lambda: ServerContext([pair], ServerSettings(verify="optional", client_ca=ca, verify_depth=3)),
        lambda: ServerContext([world.put("imap", MX)]),
    ]
    set_keys = tls_tickets.set_keys
    for same_keys in (False, True):
        if same_keys:
            monkeypatch.setattr(tls_tickets, "set_keys", lambda context, keys: set_keys(context, bytes(80)))
        ours, others = [make() for make in makers], [make() for make in makers]
        for context in (*ours, *others):
            assert context.set_ticket_keys(SECRET, "mx")
        assert len({context.policy for context in ours}) == len(makers)
        for index, context in enumerate(ours):
            client = world.client(version, own)
            kept = talk(context, client).end()
            resumed = [at for at, other in enumerate(others) if talk(other, client, kept).info.resumed]
            assert resumed == ([] if index == 4 else [index]), "a certificate that fails is never resumed"


def test_names_tell_apart_what_shares_a_secret(world: World) -> None:
    pair, client = world.put("mx", MX), world.client()
    first, second = ServerContext([pair]), ServerContext([pair])
    first.set_ticket_keys(SECRET, "mx")
    second.set_ticket_keys(SECRET, "submission")
    assert not talk(second, client, talk(first, client).end()).info.resumed
    with pytest.raises(ValueError, match="32 octets"):
        first.set_ticket_keys(b"short", "mx")


@pytest.mark.parametrize("hidden", ["name", "pointer", "keys"])
def test_where_the_place_of_the_keys_is_not_proven_nothing_is_written(
    world: World, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a library that is built otherwise: what the search reads is not what it expects."""
    read = tls_tickets._memory

    def memory(address: int, size: int) -> bytes:
        found = read(address, size)
        if hidden == "name":
            return bytes(size) if size != 64 else found
        if hidden == "pointer":
            return read(8, size) if size == 64 else found
        return os.urandom(size) if size == 64 else found

    def written(*_: object) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(tls_tickets, "_memory", memory)
    monkeypatch.setattr(tls_tickets, "_write", written)
    tls_tickets._offset.cache_clear()
    try:
        context, client = ServerContext([world.put("mx", MX)]), world.client()
        assert not context.set_ticket_keys(SECRET, "mx")
        assert talk(context, client, talk(context, client).end()).info.resumed
    finally:
        tls_tickets._offset.cache_clear()
    assert read(8, 64) == b""


def _must(true: bool) -> None:
    assert true
