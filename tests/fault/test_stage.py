"""A stage that raises, takes too long, or answers what is no answer: the client gets what `on_error` says.

Exactly that (promise 4), in each phase; the session goes on where it can, and nobody else's session is touched.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from gateway import Kind, Session, Stage
from gateway.config.problems import ConfigError
from gateway.state.memory import MemoryStore
from gateway.state.store import StoreError
from gateway.testing.gateway import running
from tests.fault.baseline import unchanged
from tests.fault.client import Client, connected
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records

pytestmark = pytest.mark.anyio

AUTH = "AUTH PLAIN " + base64.b64encode(b"\0tim\0tanstaaf").decode()

# the phase, its arguments, and the command whose reply tells of it
PHASES = {
    "connect": ("session", "connect"),
    "secure": ("session", "TLS"),
    "greeting": ("session", "connect"),
    "helo": ("session, name", "EHLO"),
    "auth": ("session, attempt", "AUTH"),
    "mail": ("session, transaction", "MAIL"),
    "route": ("session, recipient", "MAIL"),
    "rcpt": ("session, recipient", "RCPT"),
    "data": ("session, transaction", "DATA"),
    "upstream_connect": ("session, peer", "MAIL"),
    "upstream_ready": ("session, peer", "MAIL"),
    "upstream_login": ("session, peer", "MAIL"),
    "upstream_mail": ("session, peer", "MAIL"),
}
UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
EARLY = ("connect", "greeting", "helo")
AT_ONCE = ("connect", "secure", "greeting")
"""Where a refusal is the last word, for there is no command yet that could be answered."""

FAULTS = {
    "raises": "raise RuntimeError('broken')",
    "hangs": "await forever()",
    "answers a text": "return 'yes'",
    "answers out of place": "return Discard('wrong')",
}
ACTIONS = {"tempfail": "451 4.3.0", "reject": "554 5.3.0", "disconnect": "421 4.3.0", "pass": ""}


def broken(phase: str, fault: str) -> type[Stage]:
    """A stage type that fails in this phase. Made of text, for a method must have its spec's own arguments."""
    arguments, _ = PHASES[phase]
    plain = "" if fault == "hangs" or phase in ("upstream_ready", "upstream_login") else "# "
    source = f"""
from __future__ import annotations
from asyncio import Event
from gateway import Discard, Kind, Stage
forever = lambda: Event().wait()
class Broken(Stage):
    kind = Kind.{"GUARD" if phase == "auth" else "CHECK"}
    required = False
    {f"async def {phase}" if not plain else f"def {phase}"}(self, {arguments}):
        {FAULTS[fault]}
    {'def mechanisms(self, session): return ("PLAIN",)' if phase == "auth" else ""}
"""
    names: dict[str, Any] = {"__name__": __name__}
    exec(source, names)
    return cast("type[Stage]", names["Broken"])


async def converse(client: Client, context: ssl.SSLContext, *, secure: bool, login: bool) -> dict[str, str]:
    """A whole message: each command's reply, as far as the session goes on; 4xx and 5xx end the attempt."""
    said: dict[str, str] = {"connect": await client.reply()}
    steps = ["EHLO client.test"]
    if secure:
        steps += ["STARTTLS", "TLS", "EHLO again.test"]
    if login:
        steps.append(AUTH)
    steps += ["MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "Subject: x\r\n\r\nhello\r\n."]
    for step in steps:
        if list(said.values())[-1][:1] not in ("2", "3"):
            return said
        if step == "TLS":
            await client.start_tls(context)
            if secure:
                client.send(b"NOOP\r\n")  # what is wrong is told without a command
                said["TLS"] = await client.reply()
            continue
        said[step.partition(" ")[0] if step[0] != "S" or step == "STARTTLS" else "end"] = await client.say(step)
    return said


CASES = [
    (phase, fault, action)
    for phase in PHASES
    for fault in FAULTS
    for action in ACTIONS
    if not (action == "pass" and (phase == "auth" or phase.startswith("upstream")))
    if not (fault == "hangs" and phase in ("upstream_connect", "upstream_mail"))  # plain functions
    if not (fault.startswith("answers") and phase == "upstream_mail")  # gives no answers
    if not (fault.startswith("answers") and action != "tempfail")  # whatever it is, it goes the way of an error
]


def pipeline(upstream: Upstream, tls: dict[str, object], *stages: object) -> dict[str, object]:
    """An envelope pipeline with these stages."""
    return {
        "relay": "open",
        "tls": tls,
        "allow_plaintext_auth": True,
        "limits": {"auth_delay": "1ms", "linger": "100ms"},
        "stages": [*stages, {"splice": {"handoff": "never"}}],
        "upstreams": upstream.pool(),
    }


@UVLOOP
@pytest.mark.parametrize(("phase", "fault", "action"), CASES)
async def test_a_stage_that_fails_has_the_verdict_that_its_configuration_says(
    phase: str, fault: str, action: str, tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    settings: dict[str, object] = {"on_error": action, "timeout": "20ms"}
    if phase in EARLY:
        settings["refuse_at"] = "now"
    _, command = PHASES[phase]
    expected = ACTIONS[action]
    if phase in AT_ONCE and action == "tempfail":
        expected = "421 4.3.0"
    if phase == "auth":
        expected = "454 4.7.0"  # an outage is no word about the password, whatever on_error says
    async with Upstream() as upstream:
        served = pipeline(upstream, tls, {"broken": settings})
        async with (
            running(served, stages={"broken": broken(phase, fault)}) as gateway,
            unchanged(gateway),
            asyncio.timeout(10),
            connected(gateway) as client,
        ):
            said = await converse(client, client_tls, secure=phase == "secure", login=phase == "auth")
            last, reply = list(said.items())[-1]
            if action == "pass":
                assert (last, reply) == ("end", "250 2.0.0 queued\r\n"), said
            else:
                assert last == command and reply.startswith(expected), said
            if expected[:3] == "421" or (expected and phase in AT_ONCE):
                assert await client.reply() == ""
            else:
                assert await client.say("NOOP") == "250 2.0.0 Ok\r\n"
    assert len(upstream.messages) == (action == "pass")
    failures = records.all("stage_failure")
    assert failures and {failure["phase"] for failure in failures} == {phase}
    assert {failure["action"] for failure in failures} == {action}
    assert records.all("internal_error") == []


@pytest.mark.parametrize("phase", EARLY)
async def test_an_early_failure_of_a_check_waits_for_the_recipient(
    phase: str, tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    async with Upstream() as upstream:
        served = pipeline(upstream, tls, "broken")
        async with (
            running(served, stages={"broken": broken(phase, "raises")}) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            said = await converse(client, client_tls, secure=False, login=False)
    assert list(said)[-1] == "RCPT" and said["RCPT"].startswith("451 4.3.0"), said
    assert upstream.connections == 0


# -- stages that only look, and what a stage announces ---------------------------------------------------------


class Looks(Stage):
    """Fails wherever it may only look."""

    kind = Kind.CHECK

    def settled(self, session: Session, outcome: object) -> None:
        raise RuntimeError("settled")

    def reset(self, session: Session, transaction: object) -> None:
        raise RuntimeError("reset")

    async def close(self, session: Session) -> None:
        await asyncio.Event().wait()

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        raise RuntimeError("capabilities")

    async def stop(self) -> None:
        raise RuntimeError("stop")


async def test_stages_that_only_look_change_nothing(
    tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    async with Upstream() as upstream:
        served = pipeline(upstream, tls, {"looks": {"timeout": "20ms"}})
        async with (
            running(served, stages={"looks": Looks}) as gateway,
            unchanged(gateway),
            connected(gateway) as client,
        ):
            said = await converse(client, client_tls, secure=False, login=False)
            assert await client.say("QUIT") == "221 2.0.0 Bye\r\n"
    assert said["end"] == "250 2.0.0 queued\r\n"
    failures = {str(failure["phase"]) for failure in records.all("stage_failure")}
    assert failures == {"settled", "reset", "close", "capabilities", "stop"}


@pytest.mark.parametrize("fault", ["raises", "answers a text"])
async def test_mechanisms_that_a_stage_cannot_name_are_not_offered(
    fault: str, tls: dict[str, object], records: Records
) -> None:
    class Mute(Stage):
        kind = Kind.GUARD
        required = False

        def mechanisms(self, session: Session) -> Sequence[str]:
            if fault == "raises":
                raise RuntimeError("broken")
            return "PLAIN"

        def auth(self, session: Session, attempt: object) -> None:
            raise AssertionError("never asked")

    async with (
        Upstream() as upstream,
        running(pipeline(upstream, tls, "mute"), stages={"mute": Mute}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.hello()
        assert (await client.say(AUTH)).startswith("504 5.5.4")
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
    assert {failure["phase"] for failure in records.all("stage_failure")} == {"mechanisms"}
    assert records.all("internal_error") == []


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase == "auth" or phase.startswith("upstream")])
async def test_no_guard_fails_open(phase: str, tls: dict[str, object]) -> None:
    async with Upstream() as upstream:
        with pytest.raises(ConfigError, match="cannot fail open"):
            served = pipeline(upstream, tls, {"broken": {"on_error": "pass"}})
            async with running(served, stages={"broken": broken(phase, "raises")}):
                pass


# -- others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
async def test_others_go_on_while_a_stage_fails_for_one(
    fault: str, tls: dict[str, object], client_tls: ssl.SSLContext, records: Records
) -> None:
    """The stage fails for one client in MAIL; another one's message passes meanwhile."""
    failing = broken("mail", fault)
    asked = asyncio.Event()

    class Sometimes(failing):  # type: ignore[misc, valid-type]  # a class made at run time
        async def mail(self, session: Session, transaction: object) -> object:
            if session.helo != "bad.test":
                return None
            asked.set()
            answer = super().mail(session, transaction)
            return await answer if asyncio.iscoroutine(answer) else answer

    async with Upstream() as upstream:
        served = pipeline(upstream, tls, {"sometimes": {"timeout": "300ms"}})
        async with (
            running(served, stages={"sometimes": Sometimes}) as gateway,
            unchanged(gateway),
            asyncio.timeout(10),
            connected(gateway) as bad,
            connected(gateway) as good,
        ):
            await bad.reply()
            await bad.say("EHLO bad.test")
            bad.send(b"MAIL FROM:<a@example.org>\r\n")
            await asked.wait()
            said = await converse(good, client_tls, secure=False, login=False)
            assert said["end"] == "250 2.0.0 queued\r\n"
            assert (await bad.reply()).startswith("451 4.3.0")
            assert await bad.say("NOOP") == "250 2.0.0 Ok\r\n"


# -- the store --------------------------------------------------------------------------------------------------


class Away(MemoryStore):
    """A store that answers nobody."""

    immediate = None

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)

    async def hit(self, *arguments: object, **named: object) -> Any:
        raise StoreError("the store is away")

    hold = get = put = hit


LIMITS: Sequence[tuple[dict[str, object], str, str]] = [
    ({"connection_limit": {"per_client": 5}}, "connect", "421 4.3.0"),
    ({"connection_limit": {"per_client": 5, "on_error": "reject"}}, "connect", "554 5.3.0"),
    ({"rate_limit": {"count": "connections", "per": "client.address", "limit": "5/minute"}}, "connect", "421 4.3.0"),
    ({"rate_limit": {"count": "messages", "per": "client.address", "limit": "5/minute"}}, "MAIL", "451 4.3.0"),
    ({"rate_limit": {"count": "recipients", "per": "client.address", "limit": "5/minute"}}, "RCPT", "451 4.3.0"),
]


@pytest.mark.parametrize(("stage", "command", "expected"), LIMITS)
async def test_limits_whose_store_is_away(
    stage: dict[str, object], command: str, expected: str, tls: dict[str, object], client_tls: ssl.SSLContext,
    records: Records, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("gateway.testing.gateway.MemoryStore", Away)
    async with (
        Upstream() as upstream,
        running(pipeline(upstream, tls, stage)) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        said = await converse(client, client_tls, secure=False, login=False)
    assert list(said)[-1] == command and said[command].startswith(expected), said
    assert upstream.messages == []
    assert "the store is away" in str(records.all("stage_failure")[0]["error"])
