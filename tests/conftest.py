"""Fixtures for every test: async tests run on both event loops."""

from __future__ import annotations

import gc
from pathlib import Path

import hypothesis
import pytest

from gateway.observe import metrics
from gateway.observe.counters import CounterMap

# A busy machine is no bug: examples have no time limit of their own.
hypothesis.settings.register_profile("gateway", deadline=None)
hypothesis.settings.load_profile("gateway")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays: no garbage collection need walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def counters() -> None:
    """Counters of its own for each file: a process that serves thousands of pipelines has no room left in one row."""
    metrics.bind(CounterMap.private().row(0), None)


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The loops an async test runs on."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate chain and key for gateway.test and 127.0.0.1, as PEM files."""
    import trustme

    folder = tmp_path_factory.mktemp("tls")
    leaf = trustme.CA().issue_cert("gateway.test", "127.0.0.1")
    chain, key = folder / "gateway.crt", folder / "gateway.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return chain, key
