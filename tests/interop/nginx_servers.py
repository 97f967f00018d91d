"""The one nginx.conf of the differential test, and the things that it names: ports, certificates, sockets.

Each server has a name, by which scripts call it, and nothing in common with the others but what `mail{}` says.
"""

from __future__ import annotations

import datetime
import socket
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.peers.nginx import MODULE
from tests.peers.process import free_port

HEAD = """\
load_module $module;
daemon off;
user root;
worker_processes 1;
worker_shutdown_timeout 3s;
pid $folder/nginx.pid;
error_log $folder/error.log info;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path $folder/t1; proxy_temp_path $folder/t2; fastcgi_temp_path $folder/t3;
    uwsgi_temp_path $folder/t4; scgi_temp_path $folder/t5;
    server {
        listen 127.0.0.1:$port_http;
        location = /in {
            add_header Auth-Status OK;
            add_header Auth-Server 127.0.0.1;
            add_header Auth-Port $port_inside;
            return 204;
        }
    }
}
mail {
    server_name mx.test;
    timeout 20s;
    auth_http 127.0.0.1:$auth/auth;
    auth_http_timeout 10s;
    auth_http_header X-Key main;
    proxy on;
    smtp_capabilities "SIZE 1000" PIPELINING;
    ssl_certificate chain.pem;
    ssl_certificate_key key.pem;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_client_certificate client_ca.pem;
"""

SMTP = {
    "smtp": "",
    "smtp-all": "smtp_auth plain login cram-md5 external; xclient off;",
    "smtp-plain": "smtp_auth plain; smtp_capabilities 8BITMIME; smtp_capabilities ENHANCEDSTATUSCODES; xclient off;",
    "smtp-external": "smtp_auth external; smtp_auth cram-md5;",
    "smtp-none": "smtp_auth none;",
    "smtp-none-off": "smtp_auth none; xclient off;",
    "smtp-none-login": "smtp_auth none; proxy_smtp_auth on;",
    "smtp-both": "smtp_auth plain none;",
    "smtp-login": "proxy_smtp_auth on; smtp_auth plain login external cram-md5;",
    "smtp-login-off": "proxy_smtp_auth on; xclient off;",
    "smtp-pass": "proxy_pass_error_message on;",
    "smtp-pass-none": "proxy_pass_error_message on; smtp_auth none;",
    "smtp-pass-login": "proxy_pass_error_message on; proxy_smtp_auth on;",
    "smtp-errors": "max_errors 2;",
    "smtp-delay": "smtp_greeting_delay 300ms;",
    "smtp-timeout": "timeout 1s;",
    "smtp-auth-timeout": "auth_http_timeout 1s;",
    "smtp-buffer": "smtp_client_buffer 128;",
    "smtp-reply": "proxy_buffer 64; proxy_pass_error_message on;",
    "smtp-idle": "proxy_timeout 1s;",
    "smtp-trusted": "set_real_ip_from 10.0.0.0/8; set_real_ip_from 127.0.0.0/8; smtp_auth plain none;",
    "smtp-untrusted": "set_real_ip_from 10.0.0.0/8;",
    "smtp-out": "proxy_protocol on; xclient off;",
    "smtp-in-out": "proxy_protocol on; set_real_ip_from 127.0.0.0/8; xclient off;",
    "smtp-starttls": "starttls on; smtp_auth plain none;",
    "smtp-only": "starttls only;",
    "smtp-only-none": "starttls only; smtp_auth plain none;",
    "smtps": "starttls on; auth_http_pass_client_cert on;",
    "smtp-name": "server_name other.test; smtp_capabilities \"X ONE\" 'Y TWO';",
    "smtp-headers": 'auth_http_header X-A 1; auth_http_header X-B "two words"; auth_http_header X-A 2;',
    "smtp-root": "auth_http http://127.0.0.1:$auth;",
    "smtp-path": "auth_http http://localhost:$auth/a/b?c=d%20e;",
    "smtp-socket": "auth_http unix:$folder/auth.sock:/over/there;",
    "smtp-dns": "resolver 127.0.0.1:$dns; resolver_timeout 1s; xclient on; smtp_auth plain none;",
    "smtp-dns-delay": "resolver 127.0.0.1:$dns; resolver_timeout 1s; smtp_greeting_delay 100ms;",
    "smtp-unix": "smtp_auth plain none;",
    "smtp-range": "server_name range.test; listen 127.0.0.1:$port_range-$port_last;",
    "smtp-local": "auth_http 127.0.0.1:$port_http/in; smtp_auth none; xclient off;",
    "smtp-six": "smtp_auth plain none;",
    "smtp-first": "server_name first.test; listen 127.0.0.1:$port_shared;",
    "smtp-second": "server_name second.test; listen 127.0.0.2:$port_shared;",
}

IMAP = {
    "imap": "",
    "imap-all": 'imap_auth plain login cram-md5 external; imap_capabilities IMAP4rev1 IDLE "X Y";',
    "imap-login": "imap_auth login;",
    "imap-starttls": "starttls on;",
    "imap-only": "starttls only; imap_auth login plain;",
    "imaps": "imap_auth plain login;",
    "imap-pass": "proxy_pass_error_message on;",
    "imap-errors": "max_errors 2;",
    "imap-timeout": "timeout 1s;",
    "imap-local": "auth_http 127.0.0.1:$port_http/in;",
    "imap-buffer": "imap_client_buffer 256;",
    "imap-out": "proxy_protocol on;",
    "imap-trusted": "set_real_ip_from 127.0.0.0/8;",
}

POP3 = {
    "pop3": "",
    "pop3-all": "pop3_auth plain apop cram-md5 external; pop3_capabilities TOP USER 'EXPIRE NEVER';",
    "pop3-apop": "pop3_auth apop;",
    "pop3-starttls": "starttls on;",
    "pop3-cram": "pop3_auth plain cram-md5;",
    "pop3-only": "starttls only;",
    "pop3s": "",
    "pop3-pass": "proxy_pass_error_message on;",
    "pop3-errors": "max_errors 2;",
    "pop3-timeout": "timeout 1s;",
    "pop3-out": "proxy_protocol on;",
    "pop3-trusted": "set_real_ip_from 127.0.0.0/8;",
}

_VERIFY = {
    "on": "ssl_verify_client on;",
    "optional": "ssl_verify_client optional;",
    "any": "ssl_verify_client optional_no_ca; auth_http_pass_client_cert on;",
    "crl": "ssl_verify_client on; ssl_crl crl.pem;",
    "trusted": "ssl_verify_client on; ssl_trusted_certificate other_ca.pem; ssl_verify_depth 2;",
}
CERTIFICATES = {
    **{f"{protocol}s-{name}": text for protocol in ("smtp", "imap", "pop3") for name, text in _VERIFY.items()},
    "smtps-external": "ssl_verify_client on; smtp_auth plain external; xclient off;",
    "smtp-starttls-on": "starttls on; ssl_verify_client on;",
    "imap-starttls-on": "starttls on; ssl_verify_client on;",
    "pop3-starttls-on": "starttls on; ssl_verify_client on;",
    "smtps-12": "ssl_protocols TLSv1.2; ssl_ciphers ECDHE-ECDSA-AES256-GCM-SHA384; ssl_prefer_server_ciphers on;",
}

SERVERS = {**SMTP, **IMAP, **POP3, **CERTIFICATES}
PROXIED = ("smtp-trusted", "smtp-untrusted", "smtp-in-out", "imap-trusted", "pop3-trusted")
NAMES = {"smtp-name": "other.test", "smtp-first": "first.test", "smtp-second": "second.test", "smtp-range": "range.test"}


def protocol(server: str) -> str:
    """The protocol of a server, from its name."""
    return server[:4]


def greeting(server: str) -> list[str]:
    """The lines with which a server greets."""
    host = NAMES.get(server, "mx.test")
    challenge = f" <SALT1@{host}>" if server in ("pop3-all", "pop3-apop", "pop3-cram") else ""
    return {
        "smtp": [f"220 {host} ESMTP ready"],
        "imap": ["* OK IMAP4 ready"],
        "pop3": [f"+OK POP3 ready{challenge}"],
    }[protocol(server)]


@dataclass
class Site:
    """A folder with the file and all that it names."""

    folder: Path
    auth: int = field(default_factory=free_port)
    dns: int = field(default_factory=free_port)
    ports: dict[str, int] = field(default_factory=dict)
    certificates: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = {self.auth, self.dns}
        for name in [*SERVERS, "shared", "http", "inside"]:
            while (port := free_port()) in taken:
                pass
            taken.add(port)
            self.ports[name] = port
        self.ports["range"] = _three_ports(taken)
        self.ports["smtp-range"] = self.ports["last"] = self.ports["range"] + 2
        self._write_certificates()
        self.configuration.write_text(self._text())

    @property
    def configuration(self) -> Path:
        """The file."""
        return self.folder / "nginx.conf"

    def destination(self, server: str) -> tuple[str, int] | Path:
        """Where a script's client connects."""
        if server == "smtp-unix":
            return self.folder / "smtp.sock"
        if server in ("smtp-first", "smtp-second"):
            return "127.0.0.1" if server == "smtp-first" else "127.0.0.2", self.ports["shared"]
        return "::1" if server == "smtp-six" else "127.0.0.1", self.ports[server]

    def _text(self) -> str:
        blocks = [f"    server {{ {self._listen(name)}protocol {protocol(name)}; {SERVERS[name]} }}\n" for name in SERVERS]
        text = HEAD + "".join(blocks) + "}\n"
        values = {
            "module": MODULE, "folder": self.folder, "auth": self.auth, "dns": self.dns,
            **{f"port_{name}": self.ports[name] for name in ("shared", "http", "inside", "range", "last")},
        }  # fmt: skip
        for name, value in values.items():
            text = text.replace(f"${name}", str(value))
        return text

    def _listen(self, name: str) -> str:
        if "listen " in SERVERS[name]:
            return ""
        if name == "smtp-unix":
            return f"listen unix:{self.folder}/smtp.sock; "
        host = "[::1]" if name == "smtp-six" else "127.0.0.1"
        ssl = " ssl" if name.split("-")[0].endswith("s") else ""
        proxied = " proxy_protocol" if name in PROXIED else ""
        return f"listen {host}:{self.ports[name]}{ssl}{proxied}; "

    def _write_certificates(self) -> None:
        server, clients, others = trustme.CA(), trustme.CA(), trustme.CA()
        self._pair(server.issue_cert("mx.test"), "chain.pem", "key.pem")
        clients.cert_pem.write_to_path(str(self.folder / "client_ca.pem"))
        others.cert_pem.write_to_path(str(self.folder / "other_ca.pem"))
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        leaves = {
            "good": clients.issue_cert("joe@example.org"),
            "revoked": clients.issue_cert("ann@example.org"),
            "old": clients.issue_cert("old@example.org", not_before=past, not_after=past + datetime.timedelta(days=9)),
            "other": others.issue_cert("eve@example.org"),
        }
        for name, leaf in leaves.items():
            self.certificates[name] = self._pair(leaf, f"{name}.crt", f"{name}.key")
        self._write_self_signed()
        self._write_crl(clients, self.certificates["revoked"][0])

    def _pair(self, leaf: trustme.LeafCert, chain: str, key: str) -> tuple[Path, Path]:
        paths = self.folder / chain, self.folder / key
        paths[0].write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        paths[1].write_bytes(leaf.private_key_pem.bytes())
        return paths

    def _write_self_signed(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self, made")])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(4711).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=9))
        paths = self.folder / "self.crt", self.folder / "self.key"
        paths[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.certificates["self"] = paths

    def _write_crl(self, authority: trustme.CA, revoked: Path) -> None:
        certificate = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
        key = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.datetime.now(datetime.UTC)
        serial = x509.load_pem_x509_certificate(revoked.read_bytes()).serial_number
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = x509.CertificateRevocationListBuilder().issuer_name(certificate.subject).add_revoked_certificate(entry)
        builder = builder.last_update(now).next_update(now + datetime.timedelta(days=9))
        (self.folder / "crl.pem").write_bytes(
            builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )


def _three_ports(taken: set[int]) -> int:
    """The first of three ports in a row that are free."""
    while True:
        first = free_port()
        if not taken & {first, first + 1, first + 2} and all(map(_free, (first + 1, first + 2))):
            return first


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def pointer_zone(address: str, kind: str) -> dict[str, dict[str, object]]:
    """What the name server says of a client: `kind` is a script's word after `dns`."""
    name = f"host{int(ip_address(address)) & 0xFFFF}.test"
    pointer = ip_address(address).reverse_pointer
    entries: dict[str, tuple[dict[str, object], dict[str, object]]] = {
        "ok": ({"PTR": [f"{name}."]}, {"A": [address]}),
        "several": ({"PTR": [f"{name}."]}, {"A": ["192.0.2.1", address]}),
        "mismatch": ({"PTR": [f"{name}."]}, {"A": ["192.0.2.1"]}),
        "nowhere": ({"PTR": [f"{name}."]}, {"do": "nxdomain"}),
        "failing": ({"PTR": [f"{name}."]}, {"do": "servfail"}),
        "servfail": ({"do": "servfail"}, {}),
        "silent": ({"do": "silent"}, {}),
        "alias": ({"CNAME": [f"x.{name}."], "bare": True}, {"PTR": [f"{name}."]}),
        "empty": ({}, {}),
    }
    of_address, of_name = entries[kind]
    return {pointer: of_address, name: of_name}
