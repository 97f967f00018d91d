"""How a phase's stages are asked and what is made of their answers: on compiled chains, without sockets."""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import structlog

from gateway import (
    AddHeader,
    Allow,
    Attempt,
    Authenticated,
    Cause,
    Discard,
    Edit,
    Hold,
    Kind,
    Outcome,
    Password,
    Phase,
    Recipient,
    Refuse,
    Rewrite,
    Session,
    Settings,
    Stage,
    Transaction,
    Upstream,
    hookspecs,
    verdicts,
)
from gateway.pipeline.chain import ANSWERS, Chain
from gateway.state.store import StoreError
from gateway.testing.gateway import compiled
from gateway.testing.stages import FakeAttempt, make_recipient, make_session, make_transaction

pytestmark = pytest.mark.anyio

EARLY = Refuse(Cause.EARLY_TALKER, disconnect=True)
SAYINGS: dict[str, object] = {
    "nothing": None,
    "refuse": Refuse(Cause.POLICY, "no"),
    "later": Refuse(Cause.RATE_LIMIT, hold=5.0),
    "goodbye": Refuse(Cause.POLICY, disconnect=True),
    "allow": Allow("known"),
    "hold 1": Hold(1.0),
    "hold 3": Hold(3.0, EARLY),
    "rewrite": Rewrite("new@example.net"),
    "header": Edit([AddHeader("X-One", "1")]),
    "header 2": Edit([AddHeader("X-Two", "2")]),
    "raise": OSError("the helper is gone"),
    "no store": StoreError("nobody there", "unreachable"),
    "nonsense": 42,
    "discard": Discard("spam"),
    "known": Authenticated("tim@example.org"),
    "wrong": Refuse(Cause.AUTH_FAILED),
    "route": Upstream("mta"),
}
heard: list[str] = []


class SaysSettings(Settings):
    """One saying, or one for each phase."""

    at: Mapping[str, str]


class Says(Stage):
    """Says what the test wants, and keeps who was asked what."""

    Settings = SaysSettings
    settings: SaysSettings

    def phases(self) -> Sequence[str]:
        return [name for name in self.settings.at if name in hookspecs.PHASES]

    def _say(self, phase: str, about: str = "") -> typing.Any:
        said = self.settings.at[phase]
        heard.append(f"{self.id}.{phase}{about}")
        if said == "hang":
            return asyncio.get_running_loop().create_future()
        if said.startswith("wait and "):
            return self._wait(SAYINGS[said.removeprefix("wait and ")])
        answer = SAYINGS[said]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _wait(self, answer: object) -> object:
        await asyncio.sleep(0)
        return answer

    def connect(self, session: Session) -> typing.Any:
        return self._say("connect")

    def secure(self, session: Session) -> typing.Any:
        return self._say("secure")

    def greeting(self, session: Session) -> typing.Any:
        return self._say("greeting")

    def helo(self, session: Session, name: str) -> typing.Any:
        return self._say("helo", f" {name}")

    def auth(self, session: Session, attempt: Attempt) -> typing.Any:
        return self._say("auth")

    def mail(self, session: Session, transaction: Transaction) -> typing.Any:
        return self._say("mail", f" {transaction.sender}")

    def rcpt(self, session: Session, recipient: Recipient) -> typing.Any:
        return self._say("rcpt", f" {recipient.address}")

    def data(self, session: Session, transaction: Transaction) -> typing.Any:
        return self._say("data")

    def settled(self, session: Session, outcome: Outcome) -> None:
        self._look("settled")

    def reset(self, session: Session, transaction: Transaction) -> None:
        self._look("reset")

    async def close(self, session: Session) -> None:
        self._look("close")

    def _look(self, hook: str) -> None:
        heard.append(f"{self.id}.{hook}")
        if hook in self.settings.at:
            raise RuntimeError(f"{self.id} cannot look")


class Guards(Says):
    kind = Kind.GUARD


class Plumbs(Says):
    kind = Kind.PLUMBING


class Stumbles(Says):
    """Fails the first time it hears of b@example.org."""

    def rcpt(self, session: Session, recipient: Recipient) -> typing.Any:
        first = f"{self.id}.rcpt b@example.org" not in heard
        self._say("rcpt", f" {recipient.address}")
        if first and recipient.address == "b@example.org":
            raise OSError("the helper is gone")


@pytest.fixture(autouse=True)
def nothing_heard() -> Iterator[None]:
    heard.clear()
    yield


def chain_of(folder: Path, *entries: tuple[str, object], **pipeline: object) -> Chain:
    """A chain of `says`, `guards` and `plumbs`, each with its id and what it says in which phase."""
    stages = [{kind: settings} for kind, settings in entries]
    written = {
        "hostname": "gateway.test", "listen": ["smtp://127.0.0.1:2587"], "relay": "open",
        "stages": [*stages, "splice"], "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:2525"]}}, **pipeline,
    }  # fmt: skip
    return compiled(written, folder, {"says": Says, "guards": Guards, "plumbs": Plumbs, "stumbles": Stumbles}).chain


def says(id: str, _kind: str = "says", /, **settings: object) -> tuple[str, object]:
    """An entry; phases are written as keywords, reserved settings with an underscore at the end."""
    reserved = {key[:-1]: value for key, value in settings.items() if key.endswith("_")}
    return _kind, {"id": id, "at": {k: v for k, v in settings.items() if not k.endswith("_")}, **reserved}


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_asks_in_the_files_order_until_one_refuses(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", mail="nothing"),
        says("b", mail="wait and nothing"),
        says("c", mail="wait and refuse"),
        says("d", mail="refuse"),
    )
    session = make_session()
    transaction = make_transaction(session, "x@example.org")
    result = await chain.ask(chain.mail, session, transaction, transaction)
    assert heard == ["a.mail x@example.org", "b.mail x@example.org", "c.mail x@example.org"]
    assert result.refuse == SAYINGS["refuse"] and result.stage == "c"
    assert session.times is not None and set(session.times) == {"a", "b", "c"}


async def test_the_longest_hold_wins_and_later_stages_run(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path, says("a", connect="hold 3"), says("b", connect="hold 1"), says("c", connect="wait and nothing")
    )
    before = now()
    result = await chain.ask(chain.connect, make_session())
    assert heard == ["a.connect", "b.connect", "c.connect"]
    assert result.refuse is None and result.early == EARLY
    assert before + 3 <= result.until <= now() + 3


async def test_a_refusal_may_hold_too(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", mail="hold 1"), says("b", mail="later"))
    session = make_session()
    transaction = make_transaction(session)
    result = await chain.ask(chain.mail, session, transaction, transaction)
    assert result.refuse == SAYINGS["later"] and result.until >= now() + 4


# -- Allow ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["connect", "secure", "greeting", "helo"])
async def test_allow_before_mail_is_for_the_session(tmp_path: Path, phase: str) -> None:
    chain = chain_of(
        tmp_path,
        says("a", **{phase: "allow"}),
        says("check", **{phase: "refuse", "mail": "refuse"}, refuse_at_="now"),
        says("guard", "guards", **{phase: "nothing", "mail": "nothing"}),
        says("plumbing", "plumbs", **{phase: "nothing", "mail": "refuse"}),
    )
    session = make_session(helo="client.example")
    result = await chain.ask(getattr(chain, phase), session, "client.example")
    assert result.refuse is None and session.allowed == Allow("known")
    about = " client.example" if phase == "helo" else ""
    assert heard == [f"a.{phase}{about}", f"guard.{phase}{about}", f"plumbing.{phase}{about}"]
    heard.clear()
    transaction = make_transaction(session, "x@example.org")
    result = await chain.ask(chain.mail, session, transaction, transaction)
    assert result.stage == "plumbing", "Allow skips checks only"
    assert heard == ["guard.mail x@example.org", "plumbing.mail x@example.org"]


async def test_allow_in_mail_is_for_the_transaction(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", mail="allow"), says("check", mail="refuse", rcpt="refuse", data="refuse"))
    session = make_session()
    transaction = make_transaction(session)
    assert (await chain.ask(chain.mail, session, transaction, transaction)).refuse is None
    recipient = make_recipient(session)
    assert (await chain.ask(chain.rcpt, session, recipient, transaction, recipient)).refuse is None
    assert (await chain.ask(chain.data, session, transaction, transaction)).refuse is None
    assert session.allowed is None
    following = Transaction("2", "y@example.org", ())
    assert (await chain.ask(chain.rcpt, session, recipient, following, recipient)).refuse is not None


async def test_allow_in_rcpt_is_for_the_recipient(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", rcpt="allow"), says("check", rcpt="refuse", data="refuse"))
    session = make_session()
    transaction = make_transaction(session)
    first = make_recipient(session)
    assert (await chain.ask(chain.rcpt, session, first, transaction, first)).refuse is None
    assert first.allowed and not transaction.allowed
    assert (await chain.ask(chain.data, session, transaction, transaction)).refuse is not None


# -- mode -----------------------------------------------------------------------------------------------------


async def test_observe_looks_only(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", connect="refuse", mail="rewrite", rcpt="header", greeting="hold 3", helo="allow", mode_="observe"),
        says("b", connect="nothing"),
    )
    session = make_session(helo="client.example")
    transaction = make_transaction(session, "x@example.org")
    recipient = make_recipient(session)
    with structlog.testing.capture_logs() as logs:
        assert (await chain.ask(chain.connect, session)).refuse is None
    assert [(entry["event"], entry["stage"], entry["cause"]) for entry in logs] == [("observed", "a", "policy")]
    result = await chain.ask(chain.greeting, session)
    assert result.until == 0.0 and result.early is None
    await chain.ask(chain.helo, session, "client.example")
    await chain.ask(chain.mail, session, transaction, transaction)
    await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
    assert (session.allowed, transaction.sender, transaction.head) == (None, "x@example.org", None)
    assert session.postponed is None
    assert len(heard) == 6, "it was asked all the same"


async def test_off_is_not_asked_at_all(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", mail="refuse", settled="raise", mode_="off"), says("b", rcpt="nothing"))
    assert chain.mail == () and [stage.id for stage, _ in chain.settled] == ["b"]


async def test_a_share_of_client_networks_always_the_same(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", mail="refuse", mode_="25%"))

    async def refused(address: str) -> bool:
        session = make_session(address=address)
        transaction = make_transaction(session)
        return (await chain.ask(chain.mail, session, transaction, transaction)).refuse is not None

    networks = [f"10.{high}.{low}" for high in range(20) for low in range(20)]
    first = [await refused(f"{network}.1") for network in networks]
    assert 0.15 < sum(first) / len(first) < 0.35
    assert first == [await refused(f"{network}.200") for network in networks]


# -- when, and what was missed --------------------------------------------------------------------------------


async def test_when_is_asked_each_time(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", rcpt="refuse", when_='rcpt.domain == "closed.example"'))
    session = make_session()
    transaction = make_transaction(session)
    refused = []
    for address in ("a@closed.example", "b@open.example", "c@CLOSED.example"):
        recipient = make_recipient(session, address)
        result = await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
        refused.append(result.refuse is not None)
    assert refused == [True, False, True]


async def test_catches_up_once_what_it_missed(tmp_path: Path) -> None:
    phases = dict.fromkeys(("connect", "secure", "greeting", "helo", "mail", "rcpt", "data"), "nothing")
    chain = chain_of(tmp_path, says("late", **phases, when_='mail.domain == "example.org"'))
    assert (chain.connect, chain.helo) == ((), ())
    session = make_session(helo="client.example")  # in clear text: no `secure` was missed
    other = make_transaction(session, "x@example.com")
    await chain.ask(chain.mail, session, other, other)
    assert heard == []
    for sender in ("one@example.org", "two@example.org"):
        transaction = make_transaction(session, sender)
        await chain.ask(chain.mail, session, transaction, transaction)
    assert heard == [
        "late.connect", "late.greeting", "late.helo client.example", "late.mail one@example.org",
        "late.mail two@example.org",
    ]  # fmt: skip


async def test_catches_up_with_the_transaction_too(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("late", connect="nothing", mail="nothing", rcpt="nothing", data="nothing", when_="mail.recipients > 1"),
    )
    session = make_session()
    for _ in range(2):
        transaction = make_transaction(session, "x@example.org")
        for address in ("a@example.org", "b@example.org"):
            recipient = Recipient(address, (), 0)
            await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
            transaction.recipients.append(recipient)
        await chain.ask(chain.data, session, transaction, transaction)
    once = [
        "late.mail x@example.org", "late.rcpt a@example.org", "late.rcpt b@example.org", "late.data",
    ]  # fmt: skip
    assert heard == ["late.connect", *once, *once]


async def test_nobody_is_forgotten_behind_a_recipient_that_failed(tmp_path: Path) -> None:
    at = dict.fromkeys(("mail", "rcpt", "data"), "nothing")
    chain = chain_of(tmp_path, says("late", "stumbles", **at, when_="mail.recipients > 2", on_error_="pass"))
    session = make_session()
    transaction = make_transaction(session, "x@example.org")
    transaction.recipients.extend(Recipient(f"{name}@example.org", (), place) for place, name in enumerate("abc"))
    for _ in range(3):
        assert (await chain.ask(chain.data, session, transaction, transaction)).refuse is None
    assert heard == [
        "late.mail x@example.org", "late.rcpt a@example.org", "late.rcpt b@example.org",
        "late.rcpt b@example.org", "late.rcpt c@example.org", "late.data", "late.data",
    ]  # fmt: skip


async def test_what_refuses_late_refuses_again(tmp_path: Path) -> None:
    """Whoever was refused when a phase was made up for is not let through by trying once more."""
    chain = chain_of(
        tmp_path,
        says("late", "guards", helo="refuse", mail="nothing", when_='mail.domain == "example.org"'),
        says("broken", "guards", connect="raise", mail="nothing", when_='mail.domain == "example.com"'),
    )
    session = make_session(helo="client.example")
    for sender, stage in [("a@example.org", "late"), ("b@example.org", "late"), ("c@example.com", "broken")] * 2:
        transaction = make_transaction(session, sender)
        result = await chain.ask(chain.mail, session, transaction, transaction)
        assert result.refuse is not None and result.stage == stage


@pytest.mark.parametrize(
    ("when", "asked", "refused"),
    [
        ('mail.domain == "example.org"', "mail", False),  # postponed from here to RCPT
        ('rcpt.domain == "example.org"', "rcpt", True),  # RCPT has come
    ],
)
async def test_what_a_missed_phase_postpones(tmp_path: Path, when: str, asked: str, refused: bool) -> None:
    chain = chain_of(tmp_path, says("late", helo="refuse", mail="nothing", rcpt="nothing", when_=when))
    session = make_session(helo="client.example")
    transaction = make_transaction(session, "a@example.org")
    recipient = make_recipient(session, "b@example.org")
    if asked == "mail":
        result = await chain.ask(chain.mail, session, transaction, transaction)
    else:
        result = await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
    assert session.postponed == (SAYINGS["refuse"], "late")
    assert (result.refuse is not None) is refused


async def test_verdicts_on_missed_phases_have_their_own_scope(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", helo="allow", rcpt="nothing", when_='rcpt.domain == "one.example"'),
        says("b", mail="allow", rcpt="nothing", when_='rcpt.domain == "two.example"'),
        says("c", mail="rewrite", rcpt="nothing", when_='rcpt.domain == "three.example"'),
    )

    async def ask(domain: str) -> tuple[Session, Transaction, Refuse | None]:
        session = make_session(helo="client.example")
        transaction = make_transaction(session, "x@example.org")
        recipient = make_recipient(session, f"r@{domain}")
        result = await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
        assert recipient.address == f"r@{domain}" and transaction.sender == "x@example.org"
        return session, transaction, result.refuse

    session, transaction, _ = await ask("one.example")
    assert session.allowed is not None and not transaction.allowed
    session, transaction, _ = await ask("two.example")
    assert session.allowed is None and transaction.allowed
    _, _, refuse = await ask("three.example")
    assert refuse is not None and "too late" in refuse.log


async def test_a_condition_without_a_value_is_a_failure(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", mail="nothing", when_="mail.size / session.transactions > 0", on_error_="reject"),
        says("b", mail="nothing", when_="mail.size / session.transactions > 0", on_error_="pass"),
    )
    session = make_session()
    transaction = make_transaction(session)
    session.transactions = 0
    result = await chain.ask(chain.mail, session, transaction, transaction)
    assert result.refuse is not None and result.refuse.temporary is False and result.stage == "a"
    assert "division" in result.refuse.log or "divide" in result.refuse.log
    assert heard == []


# -- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["raise", "hang", "nonsense", "discard", "known"])
@pytest.mark.parametrize(
    ("on_error", "expected"),
    [
        ("tempfail", Refuse(Cause.STAGE_FAILED)),
        ("reject", Refuse(Cause.STAGE_FAILED, temporary=False)),
        ("disconnect", Refuse(Cause.STAGE_FAILED, disconnect=True)),
        ("pass", None),
    ],
)
async def test_a_failing_stage_has_the_verdict_of_its_configuration(
    tmp_path: Path, said: str, on_error: str, expected: Refuse | None
) -> None:
    """Promise 4: it raised, took too long, or answered what nobody asked."""
    chain = chain_of(tmp_path, says("a", mail=said, on_error_=on_error, timeout_="1ms"), says("b", mail="nothing"))
    session = make_session()
    transaction = make_transaction(session)
    with structlog.testing.capture_logs() as logs:
        result = await chain.ask(chain.mail, session, transaction, transaction)
    assert [(entry["event"], entry["stage"], entry["action"]) for entry in logs] == [("stage_failure", "a", on_error)]
    assert session.transaction is transaction and not transaction.discard and not session.user
    if expected is None:
        assert result.refuse is None and heard[-1].startswith("b.mail")
        return
    assert result.refuse is not None and result.stage == "a"
    shown = (result.refuse.cause, result.refuse.temporary, result.refuse.disconnect)
    assert shown == (expected.cause, expected.temporary, expected.disconnect)
    assert result.refuse.log.startswith("a in mail: ") and len(heard) == 1
    assert ("time-out" in result.refuse.log) == (said == "hang")


@pytest.mark.parametrize("on_error", ["tempfail", "pass"])
async def test_a_store_that_is_away_is_logged_once(tmp_path: Path, on_error: str) -> None:
    """The decision is the same each time; a failure that the log has already is not said again."""
    chain = chain_of(tmp_path, says("a", mail="no store", on_error_=on_error))
    session = make_session()
    transaction = make_transaction(session)
    error = typing.cast(StoreError, SAYINGS["no store"])
    with structlog.testing.capture_logs() as logs:
        for error.logged in (False, True, True):
            result = await chain.ask(chain.mail, session, transaction, transaction)
            assert (result.refuse is None) == (on_error == "pass")
    assert [entry["event"] for entry in logs] == ["stage_failure"]


async def test_tempfail_is_the_default(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, says("a", mail="raise"))
    session = make_session()
    transaction = make_transaction(session)
    result = await chain.ask(chain.mail, session, transaction, transaction)
    assert result.refuse is not None and result.refuse.temporary is None and result.refuse.cause is Cause.STAGE_FAILED


async def test_every_verdict_is_allowed_where_its_hookspec_says_so() -> None:
    names = vars(verdicts)
    for name in hookspecs.PHASES:
        spec = inspect.signature(getattr(hookspecs, name)).return_annotation
        expected = {names[part.strip()] for part in spec.split("|") if part.strip() != "None"}
        assert set(ANSWERS[Phase[name.upper()]]) == expected, name


async def test_what_only_looks_cannot_do_harm(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", mail="nothing", settled="x", reset="x", close="x"),
        says("b", mail="nothing"),
    )
    session = make_session()
    transaction = make_transaction(session)
    with structlog.testing.capture_logs() as logs:
        chain.tell_settled(session, Outcome("mail", 2, None, "", None))
        chain.tell_reset(session, transaction)
        await chain.tell_close(session)
    assert heard == ["a.settled", "b.settled", "a.reset", "b.reset", "a.close", "b.close"]
    assert [(entry["event"], entry["phase"]) for entry in logs] == [
        ("stage_failure", "settled"), ("stage_failure", "reset"), ("stage_failure", "close"),
    ]  # fmt: skip


# -- postponed refusals ---------------------------------------------------------------------------------------


async def test_early_refusals_of_checks_wait_for_rcpt(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", connect="refuse"),
        says("b", helo="later"),
        says("c", connect="nothing", greeting="goodbye"),
        says("now", helo="refuse", refuse_at_="now"),
        says("guard", "guards", secure="refuse"),
    )
    session = make_session()
    assert (await chain.ask(chain.connect, session)).refuse is None
    assert heard == ["a.connect", "c.connect"], "the stages behind it are asked"
    assert session.postponed == (SAYINGS["refuse"], "a")
    assert (await chain.ask(chain.helo, session, "x")).stage == "now"
    assert session.postponed == (SAYINGS["refuse"], "a"), "the first one counts"
    assert (await chain.ask(chain.greeting, session)).stage == "c", "a goodbye is said now"
    assert (await chain.ask(chain.secure, session)).stage == "guard"


@pytest.mark.parametrize(("kind", "cleared"), [("says", True), ("guards", False)])
async def test_allow_clears_what_a_check_postponed(tmp_path: Path, kind: str, cleared: bool) -> None:
    chain = chain_of(tmp_path, says("a", kind, connect="refuse", refuse_at_="rcpt"), says("b", helo="allow"))
    session = make_session()
    await chain.ask(chain.connect, session)
    assert session.postponed is not None
    await chain.ask(chain.helo, session, "x")
    assert (session.postponed is None) is cleared


# -- auth, route, changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "user", "failed", "cause"),
    [
        (["nothing", "known", "wrong"], "tim@example.org", False, None),
        (["nothing", "wrong", "known"], "", False, Cause.AUTH_FAILED),
        (["raise", "known"], "tim@example.org", True, None),
        (["raise", "wrong"], "", True, Cause.AUTH_FAILED),  # the end is 454 all the same
        (["nothing", "nothing"], "", False, None),
    ],
)
async def test_the_first_that_knows_the_user_decides(
    tmp_path: Path, answers: list[str], user: str, failed: bool, cause: Cause | None
) -> None:
    chain = chain_of(
        tmp_path, *(says(f"s{i}", "guards", auth=answer, on_error_="reject") for i, answer in enumerate(answers))
    )
    attempt = FakeAttempt(Password("", "tim@example.org", "secret", "PLAIN"))
    result = await chain.ask(chain.auth, make_session(), attempt)
    assert (result.authenticated.user if result.authenticated else "") == user
    assert result.failed is failed
    assert (result.refuse.cause if result.refuse else None) is cause


async def test_changes_add_up(tmp_path: Path) -> None:
    chain = chain_of(
        tmp_path,
        says("a", mail="rewrite", rcpt="header"),
        says("b", mail="header", rcpt="rewrite", data="header 2"),
    )
    session = make_session()
    transaction = make_transaction(session, "old@example.org")
    await chain.ask(chain.mail, session, transaction, transaction)
    assert (transaction.sender, transaction.sender_domain) == ("new@example.net", "example.net")
    assert transaction.original_sender == "old@example.org"
    recipient = make_recipient(session, "old@example.com")
    await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
    assert (recipient.address, recipient.original) == ("new@example.net", "old@example.com")
    await chain.ask(chain.data, session, transaction, transaction)
    assert [header.name for header in transaction.head or ()] == ["X-One", "X-One", "X-Two"]


class Verifies(Stage):
    """Offers a mechanism, and hides what it wants."""

    kind: ClassVar[Kind] = Kind.GUARD

    def mechanisms(self, session: Session) -> Sequence[str]:
        return ("PLAIN",)

    def auth(self, session: Session) -> None: ...

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        offer.clear()


@pytest.mark.parametrize(
    ("settings", "offered", "narrowed"),
    [
        ({}, ["PLAIN"], True),
        ({"when": 'network(client.address, "192.0.2.0/24")'}, ["PLAIN"], True),
        ({"when": 'network(client.address, "10.0.0.0/8")'}, [], True),
        ({"when": "1 / auth.failures > 0"}, ["PLAIN"], True),  # has no value: AUTH will say 454
        ({"mode": "observe"}, ["PLAIN"], False),
        ({"mode": "off"}, [], False),
    ],
)
async def test_offers_only_what_would_be_asked(
    tmp_path: Path, settings: dict[str, object], offered: list[str], narrowed: bool
) -> None:
    written = {
        "hostname": "gateway.test", "listen": ["smtp://127.0.0.1:2587"], "relay": "open",
        "stages": [{"verifies": settings}, "splice"], "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:2525"]}},
    }  # fmt: skip
    chain = compiled(written, tmp_path, {"verifies": Verifies}).chain
    session = make_session()
    assert [name for _, hook in chain.mechanisms for name in hook(session)] == offered  # type: ignore[attr-defined]
    offer = {"SIZE": ""}
    for _, hook in chain.capabilities:
        hook(session, offer)
    assert (offer == {}) is narrowed


class Fewer(Stage):
    """Names fewer arguments than the specs, and in another order."""

    Settings = Settings
    kind: ClassVar[Kind] = Kind.CHECK

    def connect(self) -> None:
        heard.append("connect")

    def mail(self, transaction: Transaction, session: Session) -> None:
        heard.append(f"mail {transaction.sender} of {session.client.address}")

    def rcpt(self, recipient: Recipient) -> None:
        heard.append(f"rcpt {recipient.address}")

    def settled(self, outcome: Outcome) -> None:
        heard.append(f"settled {outcome.phase}")

    def reset(self, transaction: Transaction) -> None:
        heard.append(f"reset {transaction.sender}")

    def close(self) -> None:
        heard.append("close")


async def test_methods_may_name_fewer_arguments(tmp_path: Path) -> None:
    written = {
        "hostname": "gateway.test", "listen": ["smtp://127.0.0.1:2587"], "relay": "open",
        "stages": ["fewer", "splice"], "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:2525"]}},
    }  # fmt: skip
    chain = compiled(written, tmp_path, {"fewer": Fewer}).chain
    session = make_session(address="192.0.2.9")
    transaction = make_transaction(session, "a@example.org")
    recipient = make_recipient(session, "b@example.org")
    await chain.ask(chain.connect, session)
    await chain.ask(chain.mail, session, transaction, transaction)
    await chain.ask(chain.rcpt, session, recipient, transaction, recipient)
    chain.tell_settled(session, Outcome("rcpt", 2, None, "", None))
    chain.tell_reset(session, transaction)
    await chain.tell_close(session)
    assert heard == [
        "connect", "mail a@example.org of 192.0.2.9", "rcpt b@example.org", "settled rcpt", "reset a@example.org",
        "close",
    ]  # fmt: skip
