"""TLS towards clients: contexts with certificates and policy, and one session for each connection.

Renegotiation and compression are off. A client certificate is asked for and judged, but the handshake goes on whatever
it is worth: `ServerContext.refusal` says what to answer in words. A session whose client certificate failed can
never be resumed, so what a resumed session carries is the outcome of a verification that was good, or the absence of a
certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from gateway.relay import tls_bindings, tls_context, tls_files, tls_tickets
from gateway.relay.tls_cache import KeptSessions
from gateway.relay.tls_context import reason
from gateway.relay.tls_files import Certificate, CertificateFacts, Pair
from gateway.relay.tls_session import RECORD, TlsConfigError, TlsError, TlsInfo, TlsSession, pieces
from gateway.relay.tls_settings import ServerSettings, Verify

Refusal = Literal["", "failed", "missing"]


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
                raise TlsError(reason(error)) from None
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
            raise TlsError(reason(error)) from None
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
    session cache and its ticket keys. Two contexts share nothing but tickets, where `set_ticket_keys` was given the
    same, and even then no session passes from one policy to another.

    Certificates can be renewed while sessions go on (`renew`). Raises TlsConfigError.
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
        self.policy = b""
        """32 octets, different where sessions must not be shared; changes when other client certificates are good."""
        self._settings = settings
        self._alpn = [name.encode("ascii") for name in alpn]
        self._certificates = tuple(certificates)
        self._tickets = b""  # what ticket keys are derived from, if anything
        passphrases = self._passphrases()
        self._contexts: list[SSL.Context] = []
        self._exact: dict[str, SSL.Context] = {}
        self._wildcard: dict[str, SSL.Context] = {}
        self._kept: KeptSessions | None = None
        self._begin([tls_files.check_pair(one, passphrases) for one in certificates])

    def session(self) -> ServerSession:
        """A fresh session that waits for the client's hello."""
        if self._kept is not None:
            self._kept.renew()
        return ServerSession(self._contexts[0], self.verify != "off", self._kept)

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

    def certificates(self) -> list[CertificateFacts]:
        """What is loaded, in the order given."""
        return [pair.facts for pair in self._pairs]

    def set_ticket_keys(self, secret: bytes, name: str) -> bool:
        """Give out tickets that every context takes with the same secret, name, policy and certificates' paths.

        Without it keys are random: known to this context and, after a fork, to its copies. `secret` has 32 random
        octets or more; `name` tells apart what shares it, such as pipelines. A new secret makes all tickets given out
        before worthless, and their clients do a full handshake; who keeps one for long gives up forward secrecy in
        TLS 1.2 (RFC 5077 section 5.5). Sessions without tickets stay in the process that keeps them. False where
        OpenSSL's keys cannot be set, see `tls_tickets`.
        """
        if len(secret) < 32:
            raise ValueError("a secret for ticket keys has 32 octets or more")
        self._tickets = HKDF(SHA256(), 32, None, b"tickets " + name.encode()).derive(secret)
        return self._share_tickets()

    def renew(self, files: Mapping[str, bytes]) -> bool:
        """Take over files that changed, for new connections: chains, keys, passphrases, authorities, revocation lists.

        `files` (contents by path) are preloaded, see `tls_files.preload`. Where a certificate's pair of files, or the
        authorities, differ from what is loaded, they are checked and then loaded into the same OpenSSL contexts, so
        tickets and kept sessions stay good, and established connections notice nothing. Sessions from before other
        authorities or revocation lists are not resumed. Only where certificates stop or begin to stand beside each
        other, or the type of a key changed, OpenSSL's contexts are new: then kept sessions are gone, and tickets
        without `set_ticket_keys` too.

        True if anything was loaded. Raises TlsConfigError, whose text names the files, for what cannot be used; that
        stays as it was, and is tried again once its files are among `files` again. What else is new is loaded.
        """
        tls_files.preload(files)
        errors: list[str] = []
        pairs = self._renewed_pairs(files, errors)
        changed = [index for index, pair in enumerate(pairs) if pair is not self._pairs[index]]
        try:
            if tls_context.shape(pairs) != tls_context.shape(self._pairs):
                self._begin(pairs)
            else:
                for index in changed:
                    tls_context.load_pair(self._contexts[index], pairs[index])
                self._know(pairs)
        except TlsConfigError as error:  # another file that new contexts need is gone or broken
            changed = []
            errors.append(str(error))
        renewed = bool(changed) | self._renew_authorities(files, errors)
        if errors:
            raise TlsConfigError("; ".join(errors))
        return renewed

    def _renewed_pairs(self, files: Mapping[str, bytes], errors: list[str]) -> list[Pair]:
        """The pairs, new where their files are and fit; `errors` gets the texts of those that do not."""
        pairs = list(self._pairs)
        for index, one in enumerate(self._certificates):
            if files.keys().isdisjoint((one.chain, one.key, self._settings.password_file)):
                continue
            try:
                if tls_files.mark(one) != pairs[index].mark:
                    pair = tls_files.check_pair(one, self._passphrases())
                    tls_context.load_pair(tls_context.make_context(self._settings), pair)  # what OpenSSL thinks of it
                    pairs[index] = pair
            except TlsConfigError as error:
                errors.append(str(error))
        return pairs

    def _renew_authorities(self, files: Mapping[str, bytes], errors: list[str]) -> bool:
        settings = self._settings
        if files.keys().isdisjoint((settings.client_ca, settings.trusted_ca, settings.crl)):
            return False
        try:
            if self._policy() == self.policy:
                return False
            self._trust(self._contexts)
        except TlsConfigError as error:
            errors.append(str(error))
            return False
        self._separate()
        return True

    def _begin(self, pairs: list[Pair]) -> None:
        """New OpenSSL contexts for these certificates."""
        contexts: list[SSL.Context] = []
        for index, (owner, _) in enumerate(tls_context.shape(pairs)):
            contexts.append(contexts[owner] if owner < index else tls_context.make_context(self._settings))
            tls_context.load_pair(contexts[index], pairs[index])
        self._trust(contexts)
        for context in set(contexts):
            if self._alpn:
                context.set_alpn_select_callback(self._select)
        contexts[0].set_tlsext_servername_callback(self._choose)
        self._contexts = contexts
        self._know(pairs)
        self._separate()
        if self._settings.session_cache == "cache":
            # OpenSSL looks sessions up, and keeps them, where the connection began: in the first context.
            timeout, tickets = self._settings.session_timeout, self._settings.session_tickets
            self._kept = KeptSessions(contexts[0], self._settings.sessions, timeout, tickets)

    def _know(self, pairs: list[Pair]) -> None:
        """Choose by the names of these certificates from now on."""
        exact: dict[str, SSL.Context] = {}
        wildcard: dict[str, SSL.Context] = {}
        for pair, context in zip(pairs, self._contexts, strict=True):
            for name in pair.names:
                if name.startswith("*."):
                    wildcard.setdefault(name[2:], context)
                else:
                    exact.setdefault(name, context)
        self._pairs, self._exact, self._wildcard = pairs, exact, wildcard

    def _trust(self, contexts: Sequence[SSL.Context]) -> None:
        """Verify clients with what the files hold now."""
        if self._settings.verify == "off":
            return
        store = tls_context.authorities(self._settings)
        for context in set(contexts):
            tls_context.load_authorities(context, self._settings, store)

    def _separate(self) -> None:
        """Let sessions be resumed under this policy only."""
        self.policy = self._policy()
        for context in set(self._contexts):
            tls_bindings.set_session_context(context, self.policy)
        self._share_tickets()

    def _share_tickets(self) -> bool:
        if not self._tickets:
            return False
        keys = HKDF(SHA256(), tls_tickets.KEYS, None, self.policy).derive(self._tickets)
        return tls_tickets.set_keys(self._contexts[0], keys)  # OpenSSL asks the context where the connection began

    def _policy(self) -> bytes:
        return tls_context.policy(self._settings, self._alpn, self._certificates)

    def _passphrases(self) -> tuple[bytes, ...]:
        path = self._settings.password_file
        return tls_files.read_passphrases(path) if path else ()

    def _choose(self, connection: SSL.Connection) -> None:
        """OpenSSL's callback: the client's hello has been read."""
        asked = connection.get_servername()
        if not asked:
            return
        name = asked.decode("ascii", "replace").lower().rstrip(".")
        context = self._exact.get(name) or self._wildcard.get(name.partition(".")[2])
        if context is not None and context is not self._contexts[0]:
            connection.set_context(context)

    def _select(self, connection: SSL.Connection, offered: list[bytes]) -> bytes:
        """OpenSSL's callback: the client offered protocols; raising sends the alert no_application_protocol."""
        for name in self._alpn:
            if name in offered:
                return name
        raise TlsError("none of the offered application protocols is ours")

