"""What a milter filter is told of a session beside its events: macros, by the names that Postfix gives them.

postconf(5) milter_connect_macros and its like, MILTER_README. Only what is known has a value; `{auth_authen}`, empty
or not, is read as a login.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version

from gateway.session import Recipient, Session, Transaction

_RESOLVED = {"ok": "OK", "unavailable": "FAIL", "tempunavail": "TEMP"}


def connect_macros(session: Session) -> dict[str, str]:
    """Known when the client has connected: j v _ daemon_* client_* i."""
    client = session.client
    forged = " (may be forged)" if client.reverse_name and not client.name else ""
    return {
        "i": session.id,
        "j": session.hostname,
        "v": _version(),
        "_": f"{client.name or client.reverse_name or 'unknown'} [{client.address}]{forged}",
        "daemon_name": session.listener.name if session.listener.name != session.listener.url else session.hostname,
        "daemon_addr": session.local[0],
        "daemon_port": str(session.local[1]),
        "if_addr": session.local[0],
        "if_name": session.hostname,
        "client_addr": client.address,
        "client_name": client.name or "unknown",
        "client_ptr": client.reverse_name or "unknown",
        "client_port": str(client.port),
        "client_resolve": _RESOLVED.get(client.name_status, "FORGED" if forged else "OK" if client.name else "FAIL"),
    }


def helo_macros(session: Session) -> dict[str, str]:
    """Known at HELO: tls_version cipher cipher_bits cert_subject cert_issuer verify."""
    tls = session.tls
    if tls is None:
        return {}
    subject, issuer = _names(tls.certificate)
    verify = "OK" if tls.verified else "FAIL" if tls.certificate else "NO"
    return {
        "tls_version": tls.version,
        "cipher": tls.cipher,
        "cipher_bits": str(tls.bits),
        "tls_sni": tls.sni or "",
        "cert_subject": subject,
        "cert_issuer": issuer,
        "verify": verify,
    }


def mail_macros(session: Session, transaction: Transaction) -> dict[str, str]:
    """Known at MAIL: i auth_type auth_authen auth_author mail_addr mail_host mail_mailer; for `<>`, this host's."""
    return {
        "i": transaction.id,
        "auth_type": session.auth_mechanism if session.user else "",
        "auth_authen": session.typed_user,
        "auth_author": _author(session, transaction),
        "mail_addr": transaction.sender.lower(),
        "mail_host": transaction.sender.rpartition("@")[2] or session.hostname,
        "mail_mailer": "smtp",
    }


def _author(session: Session, transaction: Transaction) -> str:
    """AUTH= of MAIL, as it was written, of who has logged in (RFC 4954 5); `<>` names nobody."""
    author = dict(transaction.parameters).get("AUTH") if session.user else None
    return author if author and author != "<>" else ""


def rcpt_macros(recipient: Recipient) -> dict[str, str]:
    """Known at RCPT: rcpt_addr rcpt_host rcpt_mailer."""
    address = recipient.address
    return {"rcpt_addr": address.lower(), "rcpt_host": address.rpartition("@")[2], "rcpt_mailer": "smtp"}


def refused_rcpt_macros(code: str, text: str) -> dict[str, str]:
    """Known at a RCPT that was refused before the filter: the enhanced code and the text of the reply."""
    return {"rcpt_mailer": "error", "rcpt_host": code, "rcpt_addr": text}


@lru_cache(maxsize=1)
def _version() -> str:
    return f"mail-gateway {version('mail-gateway')}"


def _names(certificate: bytes | None) -> tuple[str, str]:
    """Common names of a certificate's subject and issuer; an issuer may have an organization's name instead."""
    if certificate is None:
        return "", ""
    from cryptography import x509

    name = x509.NameOID
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        subject = parsed.subject.get_attributes_for_oid(name.COMMON_NAME)
        issuer = parsed.issuer.get_attributes_for_oid(name.COMMON_NAME)
        issuer = issuer or parsed.issuer.get_attributes_for_oid(name.ORGANIZATION_NAME)
        return str(subject[0].value) if subject else "", str(issuer[0].value) if issuer else ""
    except (ValueError, x509.InvalidVersion):  # what a client shows is not always a certificate
        return "", ""
