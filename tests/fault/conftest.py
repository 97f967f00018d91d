"""What the tests of faults share: the gateway's log, and TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.observe import logs
from tests.interop.conftest import Records


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    """What the gateway logs during the test."""
    path = tmp_path / "gateway.log"
    logs.configure("json", "info", file=str(path))
    yield Records(path)
    logs.configure("json", "info")


@pytest.fixture
def tls(tls_files: tuple[Path, Path]) -> dict[str, object]:
    """A pipeline's `tls`."""
    chain, key = tls_files
    return {"certificates": [{"chain": str(chain), "key": str(key)}]}


@pytest.fixture
def client_tls() -> ssl.SSLContext:
    """A client that believes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
