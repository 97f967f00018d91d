"""Which store the settings open, and what is said when they cannot be followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gateway.state.lmdb_store import LmdbStore
from gateway.state.memory import MemoryStore
from gateway.state.opening import open_store
from gateway.state.settings import StoreSettings
from gateway.state.store import StoreError, Window
from gateway.state.watched import WatchedStore

pytestmark = pytest.mark.anyio


async def test_memory_and_lmdb(tmp_path: Path) -> None:
    store = await open_store(StoreSettings(), clock=lambda: 0.0, owner="w")
    assert isinstance(store, MemoryStore)
    far = await open_store(StoreSettings("lmdb", tmp_path / "s"), clock=lambda: 0.0, owner="w")
    assert isinstance(far, WatchedStore) and isinstance(far.store, LmdbStore) and far.immediate is None
    assert (await far.hit("k", [Window(1, 60)])).allowed
    await far.close()


async def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"lmdb store /.*/file/store: .*Not a directory"):
        await open_store(StoreSettings("lmdb", tmp_path / "file" / "store"), clock=lambda: 0.0, owner="w")


async def test_without_the_redis_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gateway.state.redis_store", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis" or "state.redis" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match=r"pip install .mail-gateway\[redis\]"):
        await open_store(StoreSettings("redis", url="redis://localhost"), clock=lambda: 0.0, owner="w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lmdb"}, "path"),
        ({"kind": "lmdb", "path": Path("x"), "size": 4096}, "smallest"),
        ({"kind": "redis"}, "url"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreSettings(**settings)  # type: ignore[arg-type]


def test_settings_show_no_password() -> None:
    assert "s3cret" not in repr(StoreSettings("redis", url="redis://:s3cret@localhost", password="s3cret"))
