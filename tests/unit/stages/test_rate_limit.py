"""Rates: what is counted when, by which key, and what a client over the limit gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from gateway import Cause, Outcome, Password, Refuse, Session, Transaction
from gateway.state.memory import MemoryStore
from gateway.state.store import Hit, ImmediateStore, StoreError, Window
from gateway.testing.stages import (
    TLS,
    FakeAttempt,
    FakeClock,
    FakeWorker,
    ask,
    build,
    make_recipient,
    make_session,
    make_transaction,
)
from stages.rate_limit import RateLimit

pytestmark = pytest.mark.anyio

LIMITED = (Cause.RATE_LIMIT, False)
CLOSED = (Cause.RATE_LIMIT, True)


class FarStore(MemoryStore):
    """A store that takes time."""

    away = False

    @property
    def immediate(self) -> ImmediateStore | None:
        return None

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        await asyncio.sleep(0)
        if self.away:
            raise StoreError("away")
        return await super().hit(key, windows, n)


@pytest.fixture(params=["near", "far"])
def worker(request: pytest.FixtureRequest) -> FakeWorker:
    clock = FakeClock()
    return FakeWorker(clock=clock, store=FarStore(clock) if request.param == "far" else None)


async def started(worker: FakeWorker, **settings: object) -> RateLimit:
    stage = build(RateLimit, settings)
    await stage.start(worker)
    return stage


def shown(refuse: Refuse | None) -> tuple[Cause, bool] | None:
    return None if refuse is None else (refuse.cause, refuse.disconnect)


@pytest.mark.parametrize(
    ("count", "per", "phases", "first_only"),
    [
        ("connections", None, ["connect"], True),
        ("connections", "tls.server_name", ["helo"], True),
        ("connections", "helo.name", ["helo"], True),
        ("connections", "auth.user", ["mail"], True),
        ("connections", "rcpt.domain", ["rcpt"], False),
        ("messages", "client.address", ["mail"], False),
        ("messages", "auth.user + rcpt.domain", ["rcpt"], False),
        ("recipients", None, ["rcpt"], False),
        ("auth_failures", "auth.user", ["auth"], False),
        ("bytes", "auth.user", ["mail"], False),
    ],
)
def test_phases_are_the_first_in_which_count_and_key_are_known(
    count: str, per: str | None, phases: list[str], first_only: bool
) -> None:
    stage = build(RateLimit, {"count": count, "limit": "1/hour", **({"per": per} if per else {})})
    assert list(stage.phases()) == phases
    assert stage.first_only is first_only


async def test_connections_over_the_rate_are_closed_until_time_has_passed(worker: FakeWorker) -> None:
    stage = await started(worker, count="connections", limit=["2/minute", "3/hour"])
    answers = []
    for _ in range(3):
        answers.append(shown(await ask(stage.connect(make_session()))))
    assert answers == [None, None, CLOSED]
    assert await ask(stage.connect(make_session(address="192.0.2.2"))) is None
    worker.fake_clock.advance(120)
    answers = [shown(await ask(stage.connect(make_session()))) for _ in range(2)]
    assert answers == [None, CLOSED], "the longer window counts too"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::2:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "", False),
    ],
)
async def test_a_client_is_an_address_or_a_64(worker: FakeWorker, one: str, other: str, same: bool) -> None:
    stage = await started(worker, count="connections", limit="1/hour")
    assert await ask(stage.connect(make_session(address=one))) is None
    assert (await ask(stage.connect(make_session(address=other))) is not None) is same


async def test_a_session_counts_once_for_each_key(worker: FakeWorker) -> None:
    stage = await started(worker, count="connections", per="tls.server_name + helo.name", limit="2/hour")
    session = make_session()
    answers = []
    for name in ("", "a", "a", "a"):
        session.helo = name
        answers.append(await ask(stage.helo(session)))
    session.tls = TLS
    answers.append(await ask(stage.helo(session)))
    assert answers == [None] * 5
    assert await ask(stage.helo(make_session(helo="a"))) is None
    assert shown(await ask(stage.helo(make_session(helo="a")))) == CLOSED


async def test_messages_by_user_leave_strangers_alone(worker: FakeWorker) -> None:
    stage = await started(worker, count="messages", per="auth.user", limit="2/hour")
    session, stranger = make_session(user="Alice"), make_session()
    answers = [shown(await ask(stage.mail(session, make_transaction(session)))) for _ in range(3)]
    assert answers == [None, None, LIMITED]
    for _ in range(3):
        assert await ask(stage.mail(stranger, make_transaction(stranger))) is None


async def test_messages_by_recipient_domain_count_once_a_transaction(worker: FakeWorker) -> None:
    stage = await started(worker, count="messages", per="rcpt.domain", limit="1/hour")
    session = make_session()
    for recipient in ("a@one.example", "b@one.example", "c@two.example"):
        assert await ask(stage.rcpt(session, make_recipient(session, recipient))) is None
    make_transaction(session)
    assert shown(await ask(stage.rcpt(session, make_recipient(session, "d@one.example")))) == LIMITED


async def test_each_recipient_counts(worker: FakeWorker) -> None:
    stage = await started(worker, count="recipients", limit="2/hour")
    session = make_session()
    answers = [shown(await ask(stage.rcpt(session, make_recipient(session)))) for _ in range(3)]
    assert answers == [None, None, LIMITED]


async def attempted(stage: RateLimit, session: Session, user: str, cause: Cause | None) -> tuple[Cause, bool] | None:
    """One AUTH: the answer of the stage, and if that is None the outcome is what a verifier said."""
    refuse = await ask(stage.auth(session, FakeAttempt(Password("", user, "guess", "PLAIN"))))
    stage.settled(session, Outcome("auth", 5, refuse.cause if refuse else cause, "x", None))
    await stage.stop()
    return shown(refuse)


async def test_failed_logins_shut_out_before_a_verifier_is_asked(worker: FakeWorker) -> None:
    stage = await started(worker, count="auth_failures", limit="2/hour")
    over = (Cause.AUTH_UNAVAILABLE, False)
    session = make_session()
    causes = [None, Cause.AUTH_UNAVAILABLE, Cause.AUTH_FAILED, Cause.AUTH_FAILED, None]
    answers = [await attempted(stage, session, "alice", cause) for cause in causes]
    assert answers == [None, None, None, None, over], "only what a verifier refused is counted"
    assert await attempted(stage, make_session(), "bob", None) == over
    assert await attempted(stage, make_session(address="192.0.2.9"), "alice", None) is None


async def test_failed_logins_by_user_count_the_user_that_was_tried(worker: FakeWorker) -> None:
    stage = await started(worker, count="auth_failures", per="auth.user", limit="1/hour")
    assert await attempted(stage, make_session(), "Alice", Cause.AUTH_FAILED) is None
    assert await attempted(stage, make_session(address="192.0.2.9"), "alice", None) is not None
    assert await attempted(stage, make_session(), "bob", None) is None


async def sent(stage: RateLimit, session: Session, size: int, *recipients: str) -> tuple[Cause, bool] | None:
    transaction: Transaction = make_transaction(session)
    ask_mail = "mail" in stage.phases()
    refuse = await ask(stage.mail(session, transaction)) if ask_mail else None
    for address in recipients:
        recipient = make_recipient(session, address)
        if not ask_mail:
            refuse = await ask(stage.rcpt(session, recipient)) or refuse
    if refuse is None:
        transaction.size = size
    stage.reset(session, transaction)
    await stage.stop()
    return shown(refuse)


async def test_bytes_are_counted_afterwards_and_one_big_message_fills_the_window(worker: FakeWorker) -> None:
    stage = await started(worker, count="bytes", limit="1000/hour")
    session = make_session()
    assert [await sent(stage, session, size) for size in (400, 0, 5000, 1)] == [None, None, None, LIMITED]
    assert await sent(stage, make_session(address="192.0.2.2"), 1) is None


async def test_bytes_by_recipient_domain(worker: FakeWorker) -> None:
    stage = await started(worker, count="bytes", per="rcpt.domain", limit="1000/hour")
    session = make_session()
    assert await sent(stage, session, 1000, "a@one.example", "b@one.example") is None
    assert await sent(stage, session, 1, "a@one.example") == LIMITED
    assert await sent(stage, session, 1, "a@two.example") is None


async def test_exempt_clients_are_not_counted(worker: FakeWorker) -> None:
    for count in ("messages", "bytes"):
        stage = await started(worker, count=count, limit="1/hour", exempt=["192.0.2.0/24"])
        session = make_session()
        for _ in range(3):
            assert await sent(stage, session, 100) is None


async def test_stages_and_pipelines_count_apart_and_long_keys_too(worker: FakeWorker) -> None:
    stage = await started(worker, count="connections", per="helo.name", limit="1/hour")
    other = build(RateLimit, {"count": "connections", "per": "helo.name", "limit": "1/hour"}, id="other")
    await other.start(worker)
    assert await ask(stage.helo(make_session(helo="a" * 250))) is None
    assert await ask(stage.helo(make_session(helo="a" * 249 + "b"))) is None
    assert await ask(stage.helo(make_session(helo="a" * 250))) is not None
    assert await ask(other.helo(make_session(helo="a" * 250))) is None
    assert await ask(stage.helo(make_session(helo="a" * 250, pipeline="second"))) is None


async def test_a_store_that_is_away_raises_where_on_error_can_decide_and_nowhere_else() -> None:
    store = FarStore(FakeClock())
    store.away = True
    stage = await started(FakeWorker(store=store), count="bytes", limit="1/hour")
    session = make_session()
    with pytest.raises(StoreError):
        await ask(stage.mail(session, make_transaction(session)))
    transaction = make_transaction(session)
    transaction.size = 10
    stage.reset(session, transaction)
    await stage.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": "messages"},
        {"count": "messages", "limit": []},
        {"count": "messages", "limit": "100 per hour"},
        {"count": "mails", "limit": "1/hour"},
        {"count": "auth_failures", "per": "mail.from", "limit": "1/hour"},
        {"count": "auth_failures", "per": "client.address + auth.user", "limit": "1/hour"},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(RateLimit, wrong)
