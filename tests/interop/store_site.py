"""A site of mail stores: certificates, one or two Dovecots, and pipelines that have them as their upstreams.

@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    with store_site() as site:
        yield site
"""

from __future__ import annotations

import asyncio
import base64
import imaplib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trustme

from gateway.testing.gateway import Gateway
from tests.peers.dovecot_store import MailStore, User
from tests.peers.mail_clients import Mode, Place, Protocol
from tests.peers.process import scratch

PROTOCOLS: tuple[Protocol, ...] = ("imap", "pop3")
VERIFIED_BY_STORE = {"upstream_auth": {"credentials": "client", "verify": "upstream"}}
MESSAGE = b"From: a@x.test\r\nTo: user@local.test\r\nSubject: test\r\nMessage-ID: <1@x.test>\r\n\r\nhello\r\n.dot\r\n"

Pipeline = dict[str, object]
T = TypeVar("T")


def big_message() -> bytes:
    """A message of 25 MB; the same one each time."""
    content = base64.encodebytes(random.Random(1).randbytes(19 << 20)).replace(b"\n", b"\r\n")
    return b"From: a@x.test\r\nTo: user@local.test\r\nSubject: big\r\nMessage-ID: <2@x.test>\r\n\r\n" + content


@dataclass
class StoreSite:
    """`chain` and `key` are for localhost, gateway.test and 127.0.0.1; `folder` may be written to."""

    folder: Path
    ca: Path
    chain: Path
    key: Path
    stores: list[MailStore]

    @property
    def store(self) -> MailStore:
        """The first, or only one."""
        return self.stores[0]

    def place(self, protocol: Protocol, plain: int | None = None, tls: int = 0) -> Place:
        """The store itself, or a gateway at these ports."""
        if plain is not None:
            return Place(protocol, plain, tls, self.ca)
        ports = getattr(self.store, protocol)
        return Place(protocol, ports.plain, ports.tls, self.ca)

    def served(self, protocol: Protocol, gateway: Gateway) -> Place:
        """The gateway in the test's own loop, at its first two listeners."""
        return self.place(protocol, *gateway.ports[:2])

    def pool(self, protocol: Protocol, mode: Mode = "plain", store: MailStore | None = None) -> dict[str, object]:
        """An upstream pool with one store."""
        ports = getattr(store or self.store, protocol)
        if mode == "tls":
            return {"servers": [f"{protocol}s://localhost:{ports.tls}"], "ca_file": str(self.ca)}
        tls = {"tls": "required", "ca_file": str(self.ca)} if mode == "starttls" else {"tls": "off"}
        return {"servers": [f"{protocol}://localhost:{ports.plain}"], **tls}

    def pipeline(
        self,
        protocol: Protocol,
        stages: Sequence[object] = (VERIFIED_BY_STORE, "splice"),
        *,
        upstream: Mode = "plain",
        ports: tuple[int, int] = (0, 0),
        **more: object,
    ) -> Pipeline:
        """A pipeline with two listeners, in clear text with STARTTLS and with implicit TLS, in front of a store."""
        plain, implicit = ports
        return {
            "listen": [f"{protocol}://127.0.0.1:{plain}", f"{protocol}s://127.0.0.1:{implicit}"],
            "tls": {"certificates": [{"chain": str(self.chain), "key": str(self.key)}]},
            "allow_plaintext_auth": True,
            "limits": {"auth_delay": 0},
            "stages": list(stages),
            "upstreams": {"store": self.pool(protocol, upstream)},
            **more,
        }


@contextmanager
def store_site(*names: str, **options: str) -> Iterator[StoreSite]:
    """Start a store for each name (one by default), with the options of `MailStore`."""
    with ExitStack() as stack:
        folder = stack.enter_context(scratch("stores-"))
        authority = trustme.CA()
        # fetchmail wants a common name besides the names that count.
        leaf = authority.issue_cert("localhost", "gateway.test", "127.0.0.1", common_name="localhost")
        ca, chain, key = folder / "ca.pem", folder / "localhost.crt", folder / "localhost.key"
        authority.cert_pem.write_to_path(str(ca))
        chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        stores = []
        for name in names or ("store",):
            own = stack.enter_context(scratch("store-"))
            stores.append(stack.enter_context(MailStore(own, chain, key, name=name, **options)))
        yield StoreSite(folder, ca, chain, key, stores)


async def blocking(call: Callable[..., T], *arguments: object, **options: object) -> T:
    """A client that blocks, in a thread of its own."""
    return await asyncio.to_thread(call, *arguments, **options)


def fetch_imap(connection: imaplib.IMAP4) -> bytes:
    """The first message of the inbox, after the login."""
    status, (count,) = connection.select()
    assert status == "OK" and count not in (None, b"0"), (status, count)
    status, data = connection.fetch("1", "(BODY.PEEK[])")
    assert status == "OK" and isinstance(data[0], tuple), (status, data)
    return data[0][1]


def with_message(store: MailStore, message: bytes = MESSAGE) -> User:
    """Somebody with this one message."""
    user = store.user()
    store.put(user, message)
    return user
