"""Concurrent sessions: counted by client, network and pipeline, given back, never leaked by a later refusal."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway import Cause, Refuse, Session
from gateway.state.lmdb_files import FileLock
from gateway.state.lmdb_store import LmdbStore
from gateway.state.memory import MemoryStore
from gateway.state.settings import StoreSettings
from gateway.state.store import ImmediateStore, Lease
from gateway.testing.stages import FakeClock, FakeWorker, ask, build, make_session
from stages.connection_limit import ConnectionLimit

pytestmark = pytest.mark.anyio


class FarStore(MemoryStore):
    """A store that takes time; `lost` keys fail."""

    lost = ""

    @property
    def immediate(self) -> ImmediateStore | None:
        return None

    async def hold(self, key: str, limit: int) -> Lease | None:
        if self.lost and self.lost in key:
            raise ConnectionError("store away")
        return await super().hold(key, limit)


@pytest.fixture(params=["near", "far"])
def worker(request: pytest.FixtureRequest) -> FakeWorker:
    return FakeWorker(store=FarStore(FakeClock()) if request.param == "far" else None)


async def opened(stage: ConnectionLimit, address: str) -> Session | Refuse:
    session = make_session(address=address)
    refuse = await ask(stage.connect(session))
    return session if refuse is None else refuse


async def taken(stage: ConnectionLimit, address: str, times: int) -> list[Session]:
    """That many sessions of a client, all of which must get in."""
    sessions = []
    for _ in range(times):
        session = await opened(stage, address)
        assert isinstance(session, Session)
        sessions.append(session)
    return sessions


@pytest.mark.parametrize(
    ("settings", "first", "same", "other"),
    [
        ({"per_client": 2}, "192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ({"per_client": 2}, "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"),
        ({"per_network": 2}, "192.0.2.1", "192.0.2.200", "192.0.3.1"),
        ({"per_network": 2, "v4_prefix": 16}, "192.0.2.1", "192.0.99.1", "192.1.0.1"),
        ({"per_network": 2}, "2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:1::1"),
        ({"per_pipeline": 2}, "192.0.2.1", "198.51.100.7", ""),
    ],
)
async def test_one_too_many_is_refused_until_one_ends(
    worker: FakeWorker, settings: dict[str, object], first: str, same: str, other: str
) -> None:
    stage = build(ConnectionLimit, settings)
    await stage.start(worker)
    sessions = await taken(stage, first, 2)
    refused = await opened(stage, same)
    assert isinstance(refused, Refuse)
    assert (refused.cause, refused.disconnect) == (Cause.TOO_MANY_CONNECTIONS, True)
    if other:
        await taken(stage, other, 1)
    stage.close(sessions[0])
    stage.close(sessions[0])
    await taken(stage, same, 1)
    assert isinstance(await opened(stage, same), Refuse)


async def test_a_later_limit_that_refuses_gives_the_earlier_places_back(worker: FakeWorker) -> None:
    stage = build(ConnectionLimit, {"per_client": 2, "per_pipeline": 1})
    await stage.start(worker)
    [session] = await taken(stage, "192.0.2.1", 1)
    for _ in range(5):
        refused = await opened(stage, "192.0.2.2")
        assert isinstance(refused, Refuse)
        assert refused.log.startswith("per_pipeline")
    stage.close(session)
    await taken(stage, "192.0.2.2", 1)


async def test_a_store_that_fails_half_way_leaks_nothing() -> None:
    store = FarStore(FakeClock())
    stage = build(ConnectionLimit, {"per_client": 1, "per_pipeline": 1})
    await stage.start(FakeWorker(store=store))
    store.lost = "pipeline"
    session = make_session()
    with pytest.raises(ConnectionError):
        await ask(stage.connect(session))
    stage.close(session)
    store.lost = ""
    await taken(stage, "192.0.2.1", 1)


async def test_a_place_counted_after_the_time_out_is_given_back(tmp_path: Path) -> None:
    """Cancelled at any moment while another process has the store's lock, the stage keeps nothing."""
    store = LmdbStore(StoreSettings("lmdb", tmp_path / "store"))
    await store.open()
    lock = FileLock(tmp_path / "store" / "lock")
    stage = build(ConnectionLimit, {"per_client": 1, "per_network": 1, "per_pipeline": 1})
    await stage.start(FakeWorker(store=store))
    for turns in range(12):
        assert lock.take()
        session = make_session(address="192.0.2.1")
        asked = asyncio.ensure_future(ask(stage.connect(session)))
        await asyncio.sleep(0)
        lock.give()
        assert store._pump_timer is not None
        store._pump_timer.cancel()
        store._pump()  # counted; now the time-out comes, sooner or later
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        stage.close(session)
        await taken_and_given(stage)
    assert await store.entries("") == []
    lock.close()
    await store.close()


async def taken_and_given(stage: ConnectionLimit) -> None:
    [session] = await taken(stage, "192.0.2.1", 1)
    stage.close(session)


async def test_exempt_clients_and_pipelines_are_counted_apart(worker: FakeWorker) -> None:
    stage = build(ConnectionLimit, {"per_client": 1, "per_pipeline": 1, "exempt": ["10.0.0.0/8"]})
    await stage.start(worker)
    await taken(stage, "10.0.0.1", 3)
    await taken(stage, "192.0.2.1", 1)
    assert await ask(stage.connect(make_session(pipeline="other"))) is None


async def test_a_client_on_a_local_socket_counts_for_the_pipeline_only(worker: FakeWorker) -> None:
    stage = build(ConnectionLimit, {"per_client": 1, "per_network": 1, "per_pipeline": 2})
    await stage.start(worker)
    await taken(stage, "", 2)
    assert isinstance(await opened(stage, ""), Refuse)


@pytest.mark.parametrize("wrong", [{}, {"per_client": 0}, {"per_client": True}, {"per_network": 1, "v4_prefix": 33}])
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(ConnectionLimit, wrong)
