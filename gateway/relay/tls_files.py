"""The files that TLS needs, read with messages that name the file and what is wrong with it.

A process that gave up root cannot read keys that only root may read. What `preload` was given stands for the files of
those names from then on, on disk or not: whoever still is root reads them, and hands them on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from gateway.relay.tls_session import TlsConfigError

_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)

_preloaded: dict[str, bytes] = {}


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of a PEM chain (the server's own certificate first) and of its PEM key."""

    chain: str
    key: str


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says: DNS names (lower case, sorted), subject and issuer (RFC 4514), serial number (hex).

    `chain` is the file that it was read from. Times are in UTC.
    """

    chain: str
    names: tuple[str, ...]
    subject: str
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate that fits its key: the DNS names it covers (lower case), the key, and the chain as PEM.

    `mark` is the same for the same octets in both files.
    """

    names: frozenset[str]
    key: PrivateKeyTypes
    chain: bytes
    mark: bytes
    facts: CertificateFacts


def preload(files: Mapping[str, bytes]) -> None:
    """From now on these octets are what the files of these paths hold; a path given again has the newer ones."""
    _preloaded.update(files)


def read(path: str) -> bytes:
    """What `preload` was given for the path, else the file. Raises TlsConfigError."""
    known = _preloaded.get(path)
    if known is not None:
        return known
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None


@contextmanager
def as_file(data: bytes) -> Iterator[str]:
    """A path that holds these octets, for functions of OpenSSL that only take paths; good inside of `with`."""
    fd = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def mark(certificate: Certificate) -> bytes:
    """`Pair.mark` of what the two files hold now. Raises TlsConfigError."""
    return _mark(read(certificate.chain), read(certificate.key))


def check_pair(certificate: Certificate, passphrases: Sequence[bytes] = ()) -> Pair:
    """Read chain and key and check that they fit and that it is the time for them. Raises TlsConfigError.

    An encrypted key is tried with each of `passphrases`.
    """
    text, secret = read(certificate.chain), read(certificate.key)
    chain, key = _chain(certificate.chain, text), _key(certificate.key, secret, passphrases)
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ours = key.public_key().public_bytes(*form)
    if chain[0].public_key().public_bytes(*form) != ours:
        if any(other.public_key().public_bytes(*form) == ours for other in chain[1:]):
            raise TlsConfigError(f"{certificate.chain}: the server's own certificate must come first")
        raise TlsConfigError(f"{certificate.key}: not the key of the certificate in {certificate.chain}")
    facts = certificate_facts(certificate.chain, chain[0])
    now = datetime.now(UTC)
    if facts.not_after < now:
        raise TlsConfigError(f"{certificate.chain}: expired on {facts.not_after:%Y-%m-%d}")
    if facts.not_before > now:
        raise TlsConfigError(f"{certificate.chain}: not valid before {facts.not_before:%Y-%m-%d}")
    return Pair(frozenset(facts.names), key, text, _mark(text, secret), facts)


def certificate_facts(path: str, certificate: x509.Certificate) -> CertificateFacts:
    """What the first certificate of a chain says."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = {name.lower() for name in extension.value.get_values_for_type(x509.DNSName)}
    except x509.ExtensionNotFound:
        names = set()
    return CertificateFacts(
        chain=path,
        names=tuple(sorted(names)),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def read_chain(path: str) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises TlsConfigError."""
    return _chain(path, read(path))


def read_crls(path: str) -> list[x509.CertificateRevocationList]:
    """The revocation lists of a PEM file, at least one. Raises TlsConfigError."""
    blocks = _CRL.findall(read(path))
    try:
        lists = [x509.load_pem_x509_crl(block) for block in blocks]
    except ValueError:
        lists = []
    if not lists:
        raise TlsConfigError(f"{path}: not a file of PEM revocation lists")
    return lists


def read_passphrases(path: str) -> tuple[bytes, ...]:
    """The passphrases of a file, one a line; empty lines count for nothing. Raises TlsConfigError."""
    passphrases = tuple(line for line in re.split(rb"\r?\n", read(path)) if line)
    if not passphrases:
        raise TlsConfigError(f"{path}: no passphrase in it; write one a line")
    return passphrases


def check_dh_parameters(path: str) -> None:
    """Raises TlsConfigError unless the file holds PEM parameters for Diffie-Hellman; OpenSSL reads them itself."""
    if re.search(rb"-----BEGIN (X9\.42 )?DH PARAMETERS-----", read(path)) is None:
        raise TlsConfigError(f"{path}: not PEM Diffie-Hellman parameters")


def _mark(chain: bytes, key: bytes) -> bytes:
    return sha256(chain).digest() + sha256(key).digest()


def _chain(path: str, text: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise TlsConfigError(f"{path}: not a chain of PEM certificates") from None


def _key(path: str, text: bytes, passphrases: Sequence[bytes]) -> PrivateKeyTypes:
    encrypted = False
    for passphrase in (None, *passphrases):
        try:
            return load_pem_private_key(text, passphrase)
        except TypeError:  # it needs a passphrase
            encrypted = True
        except (ValueError, UnsupportedAlgorithm):
            if not encrypted:
                raise TlsConfigError(f"{path}: not a PEM private key") from None
    if passphrases:
        raise TlsConfigError(f"{path}: the key is encrypted, and no line of the password_file opens it")
    advice = "store it without a passphrase, or name a password_file"
    raise TlsConfigError(f"{path}: the key is encrypted; {advice}")

