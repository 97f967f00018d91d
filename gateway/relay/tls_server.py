"""TLS towards clients: contexts with certificates and policy, and one session for each connection.

Renegotiation and compression are off. A client certificate is asked for and judged, but the handshake goes on whatever
it is worth: `ServerContext.refusal` says what to answer in words. A session whose client certificate failed can
never be resumed, so what a resumed session carries is the outcome of a verification that was good, or the absence of a
certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from gateway.relay import tls_bindings, tls_files
from gateway.relay.tls_cache import KeptSessions
from gateway.relay.tls_files import Certificate, Pair
from gateway.relay.tls_session import RECORD, TlsConfigError, TlsError, TlsInfo, TlsSession, pieces
from gateway.relay.tls_settings import (
    NO_COMPRESSION,
    NO_RENEGOTIATION,
    NO_TICKET,
    SERVER_PREFERENCE,
    ServerSettings,
    Verify,
    option_flags,
)

Refusal = Literal["", "failed", "missing"]

VERSIONS = {
    "TLSv1": SSL.TLS1_VERSION,
    "TLSv1.1": SSL.TLS1_1_VERSION,
    "TLSv1.2": SSL.TLS1_2_VERSION,
    "TLSv1.3": SSL.TLS1_3_VERSION,
}


class ServerSession(TlsSession):
    """The server's side of one connection; made by `ServerContext.session`."""

    __slots__ = ("_asked", "_connection", "_faults", "_kept")

    def __init__(self, context: SSL.Context, asked: bool, kept: KeptSessions | None) -> None:
        super().__init__()
        self._asked = asked
        self._kept = kept
        self._faults: list[int] = []  # not `self`, which would tie connection and session into a cycle
        self._connection = SSL.Connection(context, None)
        self._connection.set_app_data(self._faults)
        self._connection.set_accept_state()

    def feed(self, cipher: bytes) -> bytes:
        connection = self._connection
        clear: list[bytes] = []
        for piece in pieces(cipher):
            connection.bio_write(piece)
            try:
                if self.info is None:
                    connection.do_handshake()
                    self.info = self._settled()
                while True:
                    clear.append(connection.recv(RECORD))
            except SSL.WantReadError:
                continue
            except SSL.ZeroReturnError:
                self.closed = True
                break
            except SSL.Error as error:
                raise TlsError(_reason(error)) from None
        data = clear[0] if len(clear) == 1 else b"".join(clear)
        self.overhead += len(cipher) - len(data)
        return data

    def seal(self, clear: bytes) -> bytes:
        connection = self._connection
        sealed: list[bytes] = []
        try:
            for piece in pieces(clear):
                sent = connection.send(piece)
                while sent < len(piece):  # one record a call: pyOpenSSL allows partial writes
                    sent += connection.send(piece[sent:])
                sealed.append(connection.bio_read(sent + 4096))
        except SSL.Error as error:
            raise TlsError(_reason(error)) from None
        return sealed[0] if len(sealed) == 1 else b"".join(sealed)

    def outgoing(self) -> bytes:
        waiting: list[bytes] = []
        try:
            while True:
                waiting.append(self._connection.bio_read(RECORD))
        except SSL.WantReadError:
            return b"".join(waiting)

    def close_notify(self) -> bytes:
        try:
            self._connection.shutdown()
        except SSL.Error:
            return b""  # broken or unfinished: there is nothing that could be ended in good order
        return self.outgoing()

    def _settled(self) -> TlsInfo:
        connection = self._connection
        peer = connection.get_peer_certificate(as_cryptography=True)
        result = tls_bindings.verify_result(connection)
        faults = {*self._faults, result} if result else set(self._faults)
        fault = ""
        if self._asked and peer is None:
            fault = "no certificate shown"
        elif faults:
            fault = tls_bindings.fault_text(result or self._faults[-1])
        name = connection.get_servername()
        resumed = tls_bindings.resumed(connection)
        version = connection.get_protocol_version_name()
        if self._kept is not None and not resumed:
            self._kept.count(version)
        return TlsInfo(
            version=version,
            cipher=connection.get_cipher_name() or "",
            bits=connection.get_cipher_bits() or 0,
            sni=name.decode("ascii", "replace").lower() if name else None,
            alpn=connection.get_alpn_proto_negotiated().decode("ascii", "replace") or None,
            verified=self._asked and peer is not None and not faults,
            verify_error=fault,
            certificate=peer.public_bytes(Encoding.DER) if peer is not None else None,
            resumed=resumed,
            unknown_issuer=peer is not None and bool(faults) and faults <= tls_bindings.UNKNOWN_ISSUER,
        )


class ServerContext:
    """Certificates and policy of a listener; gives each connection its `ServerSession`.

    The certificate is chosen by the name that the client asks for (SNI, RFC 6066 section 3): the first in the list
    whose subject alternative names cover it, else the first of all. Certificates for the same names with keys of
    different types (RSA and ECDSA) stand beside each other and OpenSSL picks one. If `alpn` is given, a client that
    offers protocols of which none is ours is refused (RFC 7301 section 3.2). All certificates of a context share its
    session cache and its ticket keys; two contexts share nothing, so no session passes from one policy to another.

    Raises TlsConfigError.
    """

    def __init__(
        self,
        certificates: Sequence[Certificate],
        settings: ServerSettings = ServerSettings(),
        *,
        alpn: tuple[str, ...] = (),
    ) -> None:
        if not certificates:
            raise TlsConfigError("no certificate given")
        known = settings.client_ca or settings.trusted_ca
        if settings.verify in ("optional", "required") and known is None:
            raise TlsConfigError(
                f"client certificates are {settings.verify}, but no client_ca or trusted_ca file says whose to accept"
            )
        self.verify: Verify = settings.verify
        self._settings = settings
        self._alpn = [name.encode("ascii") for name in alpn]
        passphrases = tls_files.read_passphrases(settings.password_file) if settings.password_file else ()
        self._exact: dict[str, SSL.Context] = {}
        self._wildcard: dict[str, SSL.Context] = {}
        groups: dict[frozenset[str], list[tuple[type, SSL.Context]]] = {}
        contexts = [self._join(one, tls_files.check_pair(one, passphrases), groups) for one in certificates]
        self._first = contexts[0]
        self._first.set_tlsext_servername_callback(self._choose)
        self._kept: KeptSessions | None = None
        if settings.session_cache == "cache":
            # OpenSSL looks sessions up, and keeps them, where the connection began: in the first context.
            timeout, tickets = settings.session_timeout, settings.session_tickets
            self._kept = KeptSessions(self._first, settings.sessions, timeout, tickets)

    def session(self) -> ServerSession:
        """A fresh session that waits for the client's hello."""
        if self._kept is not None:
            self._kept.renew()
        return ServerSession(self._first, self.verify != "off", self._kept)

    def refusal(self, info: TlsInfo) -> Refusal:
        """What speaks against the client after its handshake: nothing, its certificate "failed", or is "missing".

        A required certificate must be there; any that is shown must be verified, but for optional_no_ca, which
        lets pass that nobody known issued it.
        """
        if self.verify == "off" or info.verified:
            return ""
        if info.certificate is None:
            return "missing" if self.verify == "required" else ""
        return "" if self.verify == "optional_no_ca" and info.unknown_issuer else "failed"

    def _join(
        self, certificate: Certificate, pair: Pair, groups: dict[frozenset[str], list[tuple[type, SSL.Context]]]
    ) -> SSL.Context:
        """Load one certificate into the context of its names, made if there is none."""
        group, kind = groups.setdefault(pair.names, []), type(pair.key)
        beside = bool(group) and all(kind is not other for other, _ in group)
        context = group[0][1] if beside else self._context()
        group.append((kind, context))
        try:
            context.use_certificate_chain_file(certificate.chain)
            context.use_privatekey(pair.key)  # type: ignore[arg-type]  # it fits the certificate
        except SSL.Error as error:
            raise TlsConfigError(f"{certificate.chain}: OpenSSL refuses it: {_reason(error)}") from None
        for name in pair.names:
            if name.startswith("*."):
                self._wildcard.setdefault(name[2:], context)
            else:
                self._exact.setdefault(name, context)
        return context

    def _context(self) -> SSL.Context:
        settings = self._settings
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(VERSIONS[settings.minimum])
        if settings.maximum is not None:
            context.set_max_proto_version(VERSIONS[settings.maximum])
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # saves an idle connection 32 KiB
        context.set_options(_flags(settings))
        _resume(context, settings)
        _set_ciphers(context, settings)
        if settings.curves is not None:
            tls_bindings.set_curves(context, settings.curves)
        if settings.dhparam is not None:
            tls_files.check_dh_parameters(settings.dhparam)
            _loaded(settings.dhparam, context.load_tmp_dh)
        if settings.verify != "off":
            _ask_for_certificate(context, settings)
        if self._alpn:
            context.set_alpn_select_callback(self._select)
        return context

    def _choose(self, connection: SSL.Connection) -> None:
        """OpenSSL's callback: the client's hello has been read."""
        asked = connection.get_servername()
        if not asked:
            return
        name = asked.decode("ascii", "replace").lower().rstrip(".")
        context = self._exact.get(name) or self._wildcard.get(name.partition(".")[2])
        if context is not None and context is not self._first:
            connection.set_context(context)

    def _select(self, connection: SSL.Connection, offered: list[bytes]) -> bytes:
        """OpenSSL's callback: the client offered protocols; raising sends the alert no_application_protocol."""
        for name in self._alpn:
            if name in offered:
                return name
        raise TlsError("none of the offered application protocols is ours")


# What a context is told


def _flags(settings: ServerSettings) -> int:
    flags = NO_RENEGOTIATION | NO_COMPRESSION
    if settings.prefer_server_ciphers:
        flags |= SERVER_PREFERENCE
    if not settings.session_tickets:
        flags |= NO_TICKET
    flags = option_flags(settings.options, flags)
    return flags | NO_TICKET if settings.session_cache == "off" else flags


def _resume(context: SSL.Context, settings: ServerSettings) -> None:
    modes = {
        "off": SSL.SESS_CACHE_OFF,
        "none": SSL.SESS_CACHE_SERVER | SSL.SESS_CACHE_NO_INTERNAL_STORE,
        "cache": SSL.SESS_CACHE_SERVER,
    }
    context.set_session_cache_mode(modes[settings.session_cache])
    context.set_timeout(settings.session_timeout)
    context.set_session_id(b"gateway")  # OpenSSL resumes nothing where client certificates are asked for without one


def _set_ciphers(context: SSL.Context, settings: ServerSettings) -> None:
    names = settings.ciphers.split(":") if settings.ciphers else []
    modern = settings.ciphersuites or ":".join(name for name in names if name.startswith("TLS_"))
    classic = ":".join(name for name in names if not name.startswith("TLS_"))
    for written, chosen, tell in (
        (settings.ciphers, classic, context.set_cipher_list),
        (settings.ciphersuites or settings.ciphers, modern, context.set_tls13_ciphersuites),
    ):
        try:
            if chosen:
                tell(chosen.encode())
        except SSL.Error:
            raise TlsConfigError(f"ciphers {written!r}: OpenSSL knows none of them, or not this form") from None


def _ask_for_certificate(context: SSL.Context, settings: ServerSettings) -> None:
    context.set_verify_depth(settings.verify_depth)
    for path in (settings.client_ca, settings.trusted_ca):
        if path is not None:
            tls_files.read_chain(path)
            _loaded(path, context.load_verify_locations)
    if settings.client_ca is not None:
        _loaded(settings.client_ca, lambda path: context.load_client_ca(path.encode()))
    if settings.crl is not None:
        store = context.get_cert_store()
        assert store is not None
        for crl in tls_files.read_crls(settings.crl):
            store.add_crl(crl)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
    tls_bindings.set_verify(context)


def _loaded(path: str, load: Callable[[str], object]) -> None:
    try:
        load(path)
    except SSL.Error as error:
        raise TlsConfigError(f"{path}: OpenSSL refuses it: {_reason(error)}") from None


def _reason(error: SSL.Error) -> str:
    """OpenSSL's reason from pyOpenSSL's [(library, function, reason), ...]."""
    first = error.args[0] if error.args else None
    return str(first[0][2]) if isinstance(first, list) and first else "broken record"
