"""The TLS context of listeners from their `tls:` settings."""

from __future__ import annotations

from pathlib import Path

from gateway.config.tls_settings import Tls
from gateway.relay.tls import Certificate, ServerContext, ServerSettings


def server_context(tls: Tls, alpn: tuple[str, ...]) -> ServerContext | None:
    """The context for listeners whose clients may ask for the protocols `alpn` (smtp, also for LMTP, imap, pop3).

    None where there are no certificates. Raises TlsConfigError, whose text names the file or setting.
    """
    if not tls.certificates:
        return None
    cache = tls.session_cache
    settings = ServerSettings(
        minimum=tls.minimum_version,
        maximum=tls.maximum_version,
        ciphers=tls.ciphers,
        ciphersuites=tls.ciphersuites,
        prefer_server_ciphers=tls.prefer_server_ciphers,
        curves=tls.curves,
        dhparam=_path(tls.dhparam),
        verify=tls.verify_client,
        verify_depth=tls.verify_depth,
        client_ca=_path(tls.client_ca),
        trusted_ca=_path(tls.trusted_ca),
        crl=_path(tls.crl),
        password_file=_path(tls.password_file),
        session_cache="off" if cache.kind == "off" else "none" if cache.kind == "none" else "cache",
        sessions=cache.sessions,
        session_tickets=tls.session_tickets,
        session_timeout=int(tls.session_timeout),
        options=tls.options,
    )
    pairs = [Certificate(str(pair.chain), str(pair.key)) for pair in tls.certificates]
    return ServerContext(pairs, settings, alpn=alpn)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
