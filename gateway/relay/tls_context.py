"""OpenSSL's contexts: made from settings, and given certificates and authorities, also while they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

from OpenSSL import SSL, crypto

from gateway.relay import tls_bindings, tls_files
from gateway.relay.tls_files import Certificate, Pair
from gateway.relay.tls_session import TlsConfigError
from gateway.relay.tls_settings import (
    NO_COMPRESSION,
    NO_RENEGOTIATION,
    NO_TICKET,
    SERVER_PREFERENCE,
    ServerSettings,
    option_flags,
)

VERSIONS = {
    "TLSv1": SSL.TLS1_VERSION,
    "TLSv1.1": SSL.TLS1_1_VERSION,
    "TLSv1.2": SSL.TLS1_2_VERSION,
    "TLSv1.3": SSL.TLS1_3_VERSION,
}


def make_context(settings: ServerSettings) -> SSL.Context:
    """A context without certificates and authorities. Raises TlsConfigError."""
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
        context.set_verify_depth(settings.verify_depth)
        tls_bindings.set_verify(context)
    return context


def shape(pairs: Sequence[Pair]) -> list[tuple[int, type]]:
    """Which certificates stand beside each other: for each the first one of its context, and the type of its key.

    Those for the same names with keys of different types share a context, and OpenSSL picks one.
    """
    groups: dict[frozenset[str], list[tuple[int, type]]] = {}
    found: list[tuple[int, type]] = []
    for index, pair in enumerate(pairs):
        group, kind = groups.setdefault(pair.names, []), type(pair.key)
        beside = bool(group) and all(kind is not other for _, other in group)
        group.append((group[0][0] if beside else index, kind))
        found.append(group[-1])
    return found


def load_pair(context: SSL.Context, pair: Pair) -> None:
    """The certificate of new connections, beside those with keys of other types. Raises TlsConfigError."""
    try:
        with tls_files.as_file(pair.chain) as path:
            tls_bindings.use_pair(context, path, pair.key)
    except SSL.Error as error:
        raise TlsConfigError(f"{pair.facts.chain}: OpenSSL refuses it: {reason(error)}") from None


def authorities(settings: ServerSettings) -> crypto.X509Store:
    """What client certificates are verified with. Raises TlsConfigError."""
    store = crypto.X509Store()
    for path in (settings.client_ca, settings.trusted_ca):
        if path is not None:
            tls_files.read_chain(path)
            _loaded(path, store.load_locations)
    if settings.crl is not None:
        for crl in tls_files.read_crls(settings.crl):
            store.add_crl(crl)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
    return store


def load_authorities(context: SSL.Context, settings: ServerSettings, store: crypto.X509Store) -> None:
    """Verify new clients with `store`, and tell them the names in client_ca. Raises TlsConfigError."""
    if settings.client_ca is not None:
        _loaded(settings.client_ca, lambda path: tls_bindings.announce_authorities(context, path))
    tls_bindings.set_authorities(context, store)


def policy(settings: ServerSettings, alpn: Sequence[bytes], certificates: Sequence[Certificate]) -> bytes:
    """32 octets that differ where a session must not pass: they name what its client was asked for, and by whom.

    Of the files that client certificates are verified with it is the contents that count, so nobody comes back
    with a session who is revoked since; of our own certificates it is the paths, so sessions outlive a renewal.
    Raises TlsConfigError.
    """
    files = [settings.client_ca, settings.trusted_ca, settings.crl] if settings.verify != "off" else []
    held = [path and sha256(tls_files.read(path)).hexdigest() for path in files]
    asked = (settings.verify, settings.verify_depth, settings.minimum, settings.maximum, settings.ciphers,
             settings.ciphersuites, settings.options)  # fmt: skip
    ours = [one.chain for one in certificates]
    return sha256(repr((asked, held, list(alpn), ours)).encode()).digest()


def reason(error: SSL.Error | crypto.Error) -> str:
    """OpenSSL's reason from pyOpenSSL's [(library, function, reason), ...]."""
    first = error.args[0] if error.args else None
    return str(first[0][2]) if isinstance(first, list) and first else "broken record"


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


def _loaded(path: str, load: Callable[[str], object]) -> None:
    try:
        with tls_files.as_file(tls_files.read(path)) as held:
            load(held)
    except (SSL.Error, crypto.Error) as error:
        raise TlsConfigError(f"{path}: OpenSSL refuses it: {reason(error)}") from None
