"""Bans: what adds up, who is refused and for how long, and who never is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
import structlog
from pydantic import ValidationError

from gateway import Cause, Lease, Outcome, Refuse, Session
from gateway.state.memory import MemoryStore
from gateway.state.store import Hit, ImmediateStore, StoreError, Window
from gateway.testing.stages import FakeClock, FakeWorker, ask, build, make_session
from stages.ban import Ban

pytestmark = pytest.mark.anyio

NO = Outcome("auth", 5, Cause.AUTH_FAILED, "auth_file", None)
YES = Outcome("auth", 2, None, "", None)


class FarStore(MemoryStore):
    """A store that takes time."""

    away = False

    @property
    def immediate(self) -> ImmediateStore | None:
        return None

    async def _travel(self) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise StoreError("away")

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        await self._travel()
        return await super().hit(key, windows, n)

    async def get(self, key: str) -> bytes | None:
        await self._travel()
        return await super().get(key)

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        await self._travel()
        await super().put(key, value, ttl)

    async def hold(self, key: str, limit: int) -> Lease | None:
        await self._travel()
        return await super().hold(key, limit)


@pytest.fixture(params=["near", "far"])
def worker(request: pytest.FixtureRequest) -> FakeWorker:
    clock = FakeClock(1_000_000.0)
    return FakeWorker(clock=clock, store=FarStore(clock) if request.param == "far" else None)


async def started(worker: FakeWorker, **settings: object) -> Ban:
    stage = build(Ban, {"limit": "6/10m", **settings})
    await stage.start(worker)
    return stage


async def told(stage: Ban, session: Session, *outcomes: Outcome) -> None:
    """Answers of one session, each counted before the next."""
    for outcome in outcomes:
        stage.settled(session, outcome)
        await stage.stop()


async def refused(stage: Ban, address: str = "192.0.2.1") -> bool:
    """Whether this client is banned now."""
    refuse = await ask(stage.connect(make_session(address=address)))
    await stage.stop()
    assert refuse is None or (refuse.cause, refuse.disconnect) == (Cause.BANNED, True)
    return refuse is not None


def outcome(phase: str, reply_class: int, cause: Cause | None) -> Outcome:
    return Outcome(phase, reply_class, cause, "", None)


@pytest.mark.parametrize(
    ("phase", "reply_class", "cause", "weights", "weight"),
    [
        ("auth", 5, Cause.AUTH_FAILED, {}, 3),
        ("auth", 4, Cause.AUTH_FAILED, {}, 3),  # soft_bounce
        ("auth", 5, Cause.LOGIN_REFUSED, {}, 3),
        ("mail", 5, Cause.LOGIN_REFUSED, {}, 0),  # the gateway's own
        ("auth", 4, Cause.AUTH_UNAVAILABLE, {}, 0),
        ("auth", 5, Cause.AUTH_UNAVAILABLE, {}, 0),
        ("auth", 5, Cause.AUTH_TOO_MANY, {}, 0),
        ("auth", 2, None, {}, 0),
        ("command", 5, Cause.PROTOCOL, {}, 2),
        ("command", 5, Cause.PIPELINING, {}, 2),
        ("greeting", 5, Cause.EARLY_TALKER, {}, 2),
        ("rcpt", 5, Cause.RELAY_DENIED, {}, 1),
        ("rcpt", 4, Cause.RELAY_DENIED, {}, 0),
        ("rcpt", 4, Cause.POLICY, {}, 0),  # greylisting
        ("mail", 5, Cause.AUTH_REQUIRED, {}, 1),
        ("mail", 5, Cause.TLS_REQUIRED, {}, 0),
        ("message", 5, Cause.CONTENT, {}, 1),
        ("mail", 5, Cause.MESSAGE_TOO_BIG, {}, 0),
        ("mail", 4, Cause.RATE_LIMIT, {}, 0),
        ("greeting", 4, Cause.TOO_MANY_CONNECTIONS, {}, 0),
        ("rcpt", 5, Cause.STAGE_FAILED, {}, 0),  # on_error: reject
        ("mail", 4, Cause.UPSTREAM_DOWN, {}, 0),
        ("mail", 5, Cause.UPSTREAM_LOST, {}, 0),
        ("rcpt", 5, None, {}, 0),
        ("rcpt", 5, None, {"upstream_refusals": 4}, 4),
        ("rcpt", 4, None, {"upstream_refusals": 4}, 0),
        ("rcpt", 2, None, {"upstream_refusals": 4}, 0),
        ("rcpt", 5, Cause.RELAY_DENIED, {"relay_denied": 9}, 9),
        ("rcpt", 5, Cause.RELAY_DENIED, {"relay_denied": 0}, 0),
        ("rcpt", 5, Cause.POLICY, {"relay_denied": 9, "refusals": 2}, 2),
        ("greeting", 4, Cause.RATE_LIMIT, {"rate_limit": 1}, 1),
        ("greeting", 5, Cause.BANNED, {"refusals": 7}, 0),
    ],
)
async def test_weights(
    worker: FakeWorker, phase: str, reply_class: int, cause: Cause | None, weights: dict[str, int], weight: int
) -> None:
    """The failure just misses the limit, and reaches it when the limit is its weight."""
    for limit, banned in ((weight, True), (weight + 1, False)):
        if not limit:
            continue
        stage = build(Ban, {"limit": f"{limit}/1m", "weights": weights}, id=f"ban{limit}")
        await stage.start(worker)
        await told(stage, make_session(), outcome(phase, reply_class, cause))
        assert await refused(stage) is banned


async def test_bans_grow_and_are_forgotten(worker: FakeWorker) -> None:
    stage = await started(worker, times=["10m", "1h"], forget="1d")
    for level, seconds in ((1, 600), (2, 3600), (3, 3600)):
        with structlog.testing.capture_logs() as logs:
            await told(stage, make_session(), NO)
            assert not await refused(stage), "the score began anew"
            await told(stage, make_session(), NO)
        assert [(log["step"], log["seconds"], log["network"], log["reason"]) for log in logs] == [
            (level, seconds, "192.0.2.1", "authentication failed")
        ]
        assert await refused(stage)
        assert not await refused(stage, "192.0.2.2")
        worker.fake_clock.advance(seconds - 1)
        assert await refused(stage), level
        worker.fake_clock.advance(2)
        assert not await refused(stage), level
    worker.fake_clock.advance(86_400)
    with structlog.testing.capture_logs() as logs:
        await told(stage, make_session(), NO, NO)
    assert [log["step"] for log in logs] == [1]


@pytest.mark.parametrize(("seconds", "level"), [(3659, 2), (3661, 1)])
async def test_forgetting_begins_with_the_end_of_a_ban(worker: FakeWorker, seconds: float, level: int) -> None:
    stage = await started(worker, times="1h", forget="1m")
    await told(stage, make_session(), NO, NO)
    worker.fake_clock.advance(seconds)
    with structlog.testing.capture_logs() as logs:
        await told(stage, make_session(), NO, NO)
    assert [log["step"] for log in logs] == [level]


async def test_the_score_adds_up_over_sessions_and_fades(worker: FakeWorker) -> None:
    stage = await started(worker)
    await told(stage, make_session(), NO)
    worker.fake_clock.advance(1201)
    await told(stage, make_session(), NO)
    assert not await refused(stage)
    await told(stage, make_session(), NO)
    assert await refused(stage)


async def test_failures_under_a_ban_do_not_wait_for_its_end(worker: FakeWorker) -> None:
    stage = await started(worker, times="1m")
    session = make_session()
    with structlog.testing.capture_logs() as logs:
        await told(stage, session, *[NO] * 6)
        worker.fake_clock.advance(61)
        await told(stage, make_session(), NO)
    assert len(logs) == 1, "one record a ban"
    assert not await refused(stage)


@pytest.mark.parametrize(
    ("per", "failed", "others"),
    [
        ("client", "192.0.2.1", {"192.0.2.1": True, "::ffff:192.0.2.1": True, "192.0.2.2": False}),
        ("client", "2001:db8::1", {"2001:db8::2:1": True, "2001:db8:0:1::1": False}),
        ("network", "192.0.2.1", {"192.0.2.200": True, "192.0.3.1": False}),
        ("network", "2001:db8::1", {"2001:db8:0:ffff::1": True, "2001:db8:1::1": False}),
        ("client", "", {"": False}),
        ("network", "unix:", {"unix:": False, "": False}),
    ],
)
async def test_who_is_banned_with_whom(worker: FakeWorker, per: str, failed: str, others: dict[str, bool]) -> None:
    stage = await started(worker, per=per)
    await told(stage, make_session(address=failed), NO, NO)
    assert {other: await refused(stage, other) for other in others} == others


async def test_network_prefixes_are_settings(worker: FakeWorker) -> None:
    stage = await started(worker, per="network", v4_prefix=16)
    await told(stage, make_session(address="198.51.100.1"), NO)
    await told(stage, make_session(address="198.51.200.1"), NO)
    assert await refused(stage, "198.51.0.1") and not await refused(stage, "198.52.0.1")


async def test_exempt_and_trusted_clients_are_neither_counted_nor_refused(worker: FakeWorker) -> None:
    stage = await started(worker, per="network", exempt=["192.0.2.0/28"])
    worker.trusted = {"192.0.2.100"}
    for address in ("192.0.2.1", "192.0.2.100"):
        await told(stage, make_session(address=address), *[NO] * 9)
        assert not await refused(stage, "192.0.2.200")
    await told(stage, make_session(address="192.0.2.200"), NO, NO)
    assert await refused(stage, "192.0.2.201")
    assert not await refused(stage, "192.0.2.1") and not await refused(stage, "192.0.2.100")


async def test_the_client_of_a_trusted_proxy_is_banned_and_the_proxy_is_not(worker: FakeWorker) -> None:
    stage = await started(worker)
    worker.trusted = {"192.0.2.100"}
    session = make_session(address="192.0.2.100")
    session.client.address = "203.0.113.9"  # PROXY, XCLIENT
    await told(stage, session, NO, NO)
    assert await refused(stage, "203.0.113.9") and not await refused(stage, "192.0.2.100")


async def test_a_login_protects_its_client_for_a_while(worker: FakeWorker) -> None:
    stage = await started(worker, per="network", trusted_login="1h", times="2h")
    user = make_session()
    await told(stage, user, NO, YES, *[NO] * 9)
    await told(stage, make_session(), *[NO] * 9)
    assert not await refused(stage) and not await refused(stage, "192.0.2.9")
    await told(stage, make_session(address="192.0.2.9"), NO, NO)
    assert await refused(stage, "192.0.2.9") and not await refused(stage)
    worker.fake_clock.advance(3601)
    assert await refused(stage), "that was not lately"
    assert await refused(stage, "192.0.2.9")


async def test_a_login_protects_its_own_session_at_once(worker: FakeWorker) -> None:
    stage = await started(worker)
    session = make_session(user="tim")
    for _ in range(9):
        stage.settled(session, NO)
    await stage.stop()
    assert not await refused(stage)


async def test_a_login_by_xclient_protects_too(worker: FakeWorker) -> None:
    stage = await started(worker)
    await told(stage, make_session(), NO, NO)
    assert await refused(stage)
    assert await ask(stage.connect(make_session(user="tim", trusted=True))) is None
    await stage.stop()
    assert not await refused(stage)


async def test_without_trusted_login_nobody_is_protected(worker: FakeWorker) -> None:
    stage = await started(worker, trusted_login=0)
    await told(stage, make_session(user="tim"), YES, NO, NO)
    assert await refused(stage)


@pytest.mark.parametrize(
    ("network", "address", "held"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.0/24", "192.0.2.1", True),
        ("192.0.0.0/16", "192.0.2.1", False),
        ("2001:db8::1", "2001:db8::1", True),
        ("2001:db8::1", "2001:db8::2", False),
        ("2001:db8::/64", "2001:db8::2", True),
        ("2001:db8::/48", "2001:db8:0:9::2", True),
    ],
)
async def test_bans_of_operators(worker: FakeWorker, network: str, address: str, held: bool) -> None:
    stage = await started(worker)
    await told(stage, make_session(address=address), YES)
    key = f"ban:test:ban:{network}"
    facts = {"until": 9, "level": 1, "reason": "spam", "by": "ctl"}
    await worker.store.put(key, json.dumps(facts).encode(), 60)
    refuse = await ask(stage.connect(make_session(address=address)))
    assert (refuse is not None) is held, "a login does not stand against an operator's word"
    assert refuse is None or refuse.log == f"ban of {network}: spam"
    worker.trusted = {address}
    assert not await refused(stage, address)
    worker.trusted = set()
    await worker.store.put(key, b"", 0)
    assert not await refused(stage, address)


@pytest.mark.parametrize("value", [b"", b"\xff", b"[1]", b"nonsense"])
async def test_a_ban_that_says_nothing_is_one(worker: FakeWorker, value: bytes) -> None:
    stage = await started(worker)
    await worker.store.put("ban:test:ban:192.0.2.1", value, 60)
    assert await refused(stage)


async def test_what_a_ban_holds(worker: FakeWorker) -> None:
    stage = await started(worker)
    await told(stage, make_session(), NO, NO)
    facts = json.loads(await worker.store.get("ban:test:ban:192.0.2.1") or b"")
    assert facts.pop("until") > 0
    assert facts == {"level": 1, "reason": "authentication failed", "by": "stage"}


async def test_many_failures_at_once_are_one_ban(worker: FakeWorker) -> None:
    stage, other = await started(worker), await started(worker)  # two workers with one store
    with structlog.testing.capture_logs() as logs:
        for number in range(40):
            (stage, other)[number % 2].settled(make_session(), NO)
        await asyncio.gather(stage.stop(), other.stop())
    assert [log["step"] for log in logs] == [1]
    assert await refused(stage) and await refused(other)


async def test_stages_and_pipelines_are_apart(worker: FakeWorker) -> None:
    stage = await started(worker)
    await told(stage, make_session(), NO, NO)
    assert await ask(stage.connect(make_session(pipeline="second"))) is None
    other = build(Ban, {"limit": "6/10m"}, id="other")
    await other.start(worker)
    assert not await refused(other)


@pytest.mark.parametrize(("refuse", "temporary"), [("tempfail", True), ("reject", False)])
async def test_the_reply_is_a_setting(worker: FakeWorker, refuse: str, temporary: bool) -> None:
    stage = await started(worker, refuse=refuse)
    await told(stage, make_session(), NO, NO)
    said = await ask(stage.connect(make_session()))
    assert isinstance(said, Refuse) and said.temporary is temporary


async def test_a_store_that_is_away_raises_where_on_error_can_decide_and_nowhere_else() -> None:
    store = FarStore(FakeClock())
    store.away = True
    stage = await started(FakeWorker(store=store))
    with pytest.raises(StoreError):
        await ask(stage.connect(make_session()))
    with structlog.testing.capture_logs() as logs:
        for away in (True, True, False, True):
            store.away = away
            await told(stage, make_session(), YES)
    assert [log["event"] for log in logs] == ["not_counted"] * 2  # when it begins
    store.away = False
    assert not await refused(stage)


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": "10 per hour"},
        {"weights": {"auth_failure": 3}},
        {"weights": {"banned": 3}},
        {"weights": {"refusals": -1}},
        {"weights": {"refusals": "two"}},
        {"times": []},
        {"times": [0]},
        {"times": "soon"},
        {"per": "user"},
        {"v4_prefix": 33},
        {"exempt": "10.0.0.1/8"},
        {"refuse": "drop"},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(Ban, wrong)


def test_short_form_and_defaults() -> None:
    stage = build(Ban, "5/1h")
    assert str(stage.settings.limit) == "5/hour"
    assert build(Ban).settings.weights == build(Ban, {"weights": {}}).settings.weights
    assert build(Ban, {"times": "1h"}).settings.times == (3600.0,)
    assert build(Ban, {"weights": {"loop": 2}}).settings.weights["auth_failures"] == 3
