"""What the tests against real programs share: certificates, the gateway's log, a Postfix each.

Clients that block run in a thread, because the gateway is in the test's own loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from gateway.observe import logs
from tests.peers.dovecot import Dovecot
from tests.peers.postfix import Postfix
from tests.peers.process import scratch

StartPostfix = Callable[..., Postfix]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that `gateway run` takes; the dialogues are played on both."""
    return "asyncio", {"use_uvloop": True}


@dataclass
class Records:
    """The gateway's log."""

    path: Path

    def all(self, name: str) -> list[dict[str, object]]:
        """The records of this name so far."""
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [record for record in records if record["record"] == name]

    def one(self, name: str) -> dict[str, object]:
        """The only record of this name."""
        (record,) = self.all(name)
        return record


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    """What the gateway logs during the test."""
    path = tmp_path / "gateway.log"
    logs.configure("json", "info", file=str(path))
    yield Records(path)
    logs.forget_secrets()
    logs.configure("json", "info")


@pytest.fixture
def start_postfix() -> Iterator[StartPostfix]:
    """Start one or several Postfix, each in its own folder; takes the arguments of `Postfix`."""
    with ExitStack() as stack:

        def start(**options: str) -> Postfix:
            return stack.enter_context(Postfix(stack.enter_context(scratch()), **options))  # type: ignore[arg-type]

        yield start


class Authority:
    """A private certificate authority; its own certificate is the file `ca`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, *names: str) -> tuple[Path, Path]:
        """A certificate for these names and its key, as PEM files."""
        chain, key = self._folder / f"{names[0]}.crt", self._folder / f"{names[0]}.key"
        if not chain.exists():
            leaf = self._authority.issue_cert(*names)
            chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
            key.write_bytes(leaf.private_key_pem.bytes())
        return chain, key


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the test's certificates."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls(authority: Authority) -> dict[str, object]:
    """A pipeline's `tls` for a gateway that is called gateway.test and localhost."""
    chain, key = authority.issue("gateway.test", "localhost", "127.0.0.1")
    return {"certificates": [{"chain": str(chain), "key": str(key)}]}


@pytest.fixture
def users(tmp_path: Path) -> dict[str, object]:
    """`auth_file` with the user joe@example.org and the password secret."""
    path = tmp_path / "users"
    path.write_text("joe@example.org:{PLAIN}secret\n")
    return {"auth_file": {"file": str(path)}}


@pytest.fixture
def dovecot() -> Iterator[Dovecot]:
    """Knows the same user."""
    with scratch() as folder, Dovecot(folder, {"joe@example.org": "secret"}) as dovecot:
        yield dovecot
