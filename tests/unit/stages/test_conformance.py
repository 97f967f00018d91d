"""Every installed stage keeps the contract; and the suite that says so finds what breaks it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field

from gateway import (
    AddHeader,
    AddRecipient,
    Allow,
    Cause,
    DeleteHeader,
    Edit,
    Edits,
    Fact,
    Message,
    Phase,
    Refuse,
    ReplaceBody,
    Reply,
    Scope,
    Session,
    Settings,
    Stage,
    Transaction,
    Upstream,
    Worker,
)
from gateway.pipeline.registry import Registry
from gateway.testing.conformance import ConformanceError, check_stage
from gateway.testing.gateway import free_port
from tests.peers.require import missing

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parents[3] / "examples"
SETTINGS: dict[str, list[object]] = {
    "access": [
        {"deny": ["192.0.2.0/24"], "allow": ["2001:db8::/32"]},
        {"match": "helo", "deny": ["x"]},
        {"match": "sender", "deny": ["<>", "example.org"]},
        {"match": "recipient", "deny": [".net"], "allow": ["postmaster@"]},
        {"match": "user", "allow": ["nobody"]},
    ],
    "auth_certificate": [None],
    "auth_file": ["users"],
    "auth_http": [
        {"url": "http://127.0.0.1:<port>/auth"},
        {"url": "http://127.0.0.1:<port>/auth", "none": True},
        {"url": "http://127.0.0.1:<port>/auth", "none": True, "per": "recipient", "methods": []},
    ],
    "auth_relay": [None, {"mechanisms": ["PLAIN"], "required": False}],
    "ban": [None, "3/1m", {"limit": "1/1m", "per": "network", "weights": {"policy": 9}, "refuse": "reject"}],
    "connection_limit": [3, {"per_network": 2, "per_pipeline": 5}],
    "greeting_delay": ["1s", {"seconds": "5s", "early": "observe"}],
    "headers": [
        [{"add": "X-Client", "expression": "client.address"}],
        [{"delete": "X-*", "when": "!auth.trusted"}, {"change": "Subject", "matches": "^", "with": "[EXT] "}],
    ],
    "hop_limit": [None, {"max": 1, "delivered_to": True}],
    "milter": ["unix:/nowhere/nobody.sock", {"socket": "inet:127.0.0.1:1", "connect": "early", "quarantine": "header"}],
    "mime_guard": [None, {"extensions": ["bin"]}, {"action": "header", "defects": "refuse"}],
    "proxy_header": [1, {"version": 2, "session_id": True}],
    "pymilter": [
        {"class": "milter_filter:Filter", "path": str(EXAMPLES)},
        {"class": "milter_filter:Filter", "path": str(EXAMPLES), "threads": 1, "quarantine": "route:mta"},
    ],
    "rate_limit": [
        {"count": count, "limit": "3/minute"}
        for count in ("connections", "messages", "recipients", "auth_failures", "bytes")
    ],
    "received": [None, 20],
    "recipient_domains": [{"domains": ["example.org"]}],
    "require_tls": [None, {"for": ["mail"], "client_certificate": "required"}],
    "reverse_dns": ["1s"],
    "route": ["mta", {"rules": [{"when": 'rcpt.domain == "example.net"', "to": "mta"}]}],
    "sender_login": [{"same_address": True, "required": True}, {"map": {"nobody": ["@example.org"]}}],
    "size_limit": ["1k", {"max": 9, "rules": [{"when": 'rcpt.domain == "example.net"', "max": 100}]}],
    "splice": [None, "mta"],
    "upstream_auth": [{"user": "gateway", "password": "secret"}, {"credentials": "client", "verify": "upstream"}],
    "xclient": [None, "continue"],
    "xforward": [None],
}


@pytest.mark.parametrize("name", Registry().names())
async def test_installed_stages(name: str, tmp_path: Path) -> None:
    if name == "pymilter" and importlib.util.find_spec("Milter") is None:
        missing("pymilter is not installed")
    (tmp_path / "users").write_text("tim@example.org:{PLAIN}secret\n")
    port = str(free_port())  # nobody listens there
    for settings in SETTINGS[name]:
        if isinstance(settings, dict) and "url" in settings:
            settings = {**settings, "url": settings["url"].replace("<port>", port)}
        await check_stage(Registry().get(name), settings, id=name, folder=tmp_path)


class Good(Stage):
    """Does nothing wrong."""

    facts = (Fact("seen", "int", 0, Phase.CONNECT, Scope.SESSION, "Sessions."),)

    async def start(self, worker: Worker) -> None:
        self._seen = 0

    def connect(self, session: Session) -> None:
        self._seen += 1
        session.set_fact(self, "seen", self._seen)

    async def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        raise ConnectionRefusedError("no helper here")


class Misspelled(Stage):
    """Has a hook that nobody calls."""

    def conect(self, session: Session) -> None: ...


class Trusting(Stage):
    """Thinks that everybody uses TLS."""

    def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        if session.tls is None:
            raise LookupError("no cipher")
        return None


class Forgetful(Stage):
    """Closes what it never opened."""

    def close(self, session: Session) -> None:
        session.state(self, list).pop()


class Awaited(Stage):
    """Has a coroutine where nobody awaits, and none where somebody does."""

    async def reset(self, session: Session, transaction: Transaction) -> None: ...

    def start(self, worker: Worker) -> None: ...


class Confused(Stage):
    """Answers what nobody asked."""

    def connect(self, session: Session) -> Any:
        return Upstream("mta")

    def rcpt(self, session: Session) -> Any:
        return True

    def upstream_connect(self, session: Session) -> Any:
        return Allow()

    def edits(self) -> Any:
        return "all"


class Greedy(Stage):
    """Offers more than there is."""

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        offer["XNEW"] = ""

    def mechanisms(self, session: Session) -> Sequence[str]:
        return ["plain"]


class Sneaky(Stage):
    """Changes more than it said."""

    def edits(self, transaction: Transaction) -> Edits:
        return "head"

    async def message(self, session: Session, message: Message) -> Edit:
        return Edit([ReplaceBody(b"")])


class Silent(Stage):
    """Changes what it said nothing of."""

    async def message(self, session: Session, message: Message) -> Edit:
        return Edit([AddHeader("X", "1")])


class Early(Stage):
    """Changes the message before it is there."""

    def data(self, session: Session) -> Edit:
        return Edit([DeleteHeader("X")])


class Insatiable(Stage):
    """Reads the body twice; and only of a message that has one."""

    async def message(self, session: Session, message: Message) -> None:
        async for _ in message.blocks():
            await message.open()


class Subjective(Stage):
    """Thinks that every message has a subject, and refuses whom nobody named."""

    async def message(self, session: Session, message: Message) -> Refuse:
        subject = (await message.headers()).first("Subject")
        if subject is None:
            raise LookupError("no subject")
        return Refuse(Cause.CONTENT, recipients={77: Reply.of("550 5.7.1 no")})


class Wordless(Stage):
    """Answers commands with what is no answer, and cannot make the field that it wants."""

    def unknown(self, session: Session, command: str) -> Any:
        return Allow()

    def edits(self) -> Edits:
        return "any"

    async def message(self, session: Session) -> Edit:
        return Edit([AddRecipient("a\r\nb@example.org")])


class Slow(Stage):
    """Waits for ever; here its own timeout is not forgiven."""

    timeout = 0.001

    async def connect(self, session: Session) -> None:
        import asyncio

        await asyncio.get_running_loop().create_future()


class LaxSettings(BaseModel):
    model_config = ConfigDict(extra="ignore")
    short_form: ClassVar[str | None] = "nothing"

    number: int = 5


class Undescribed(Stage):
    Settings = LaxSettings  # type: ignore[assignment]
    facts = (Fact("own.seen", "int", "", Phase.CONNECT, Scope.SESSION, ""),)


class NeedsSettings(Settings):
    """One number."""

    number: int = Field(description="A number.")


class Needs(Stage):
    """Cannot be made without."""

    Settings = NeedsSettings


@pytest.mark.parametrize(
    ("stage_type", "findings"),
    [
        (Good, []),
        (Misspelled, ["cannot be made: Misspelled.conect is no phase or hook; did you mean 'connect'?"]),
        (Trusting, ["mail raises LookupError: no cipher (client '192.0.2.1', clear text)",
                    "mail raises LookupError: no cipher (client '', clear text)",
                    "mail raises LookupError: no cipher (client '192.0.2.1', clear text, logged in)"]),
        (Forgetful, ["close raises IndexError: pop from empty list"]),
        (Awaited, ["reset must be a plain function: nobody awaits it", "start must be a coroutine"]),
        (Confused, ["connect cannot be answered with Upstream", "rcpt cannot be answered with bool",
                    "upstream_connect answers Allow; only Refuse may be said there",
                    "edits gives 'all', not none, head or any"]),
        (Greedy, ["capabilities adds ['XNEW']", "mechanisms gives ['plain'], not a list of names in capitals"]),
        (Undescribed, ["the class has no docstring", "setting number has no description",
                       "Settings do not inherit from gateway.Settings' configuration: unknown keys must be errors",
                       "short_form names 'nothing', which is no setting",
                       "fact own.seen: the id is put in front of the name; write it without a dot",
                       "fact own.seen: the default '' is not of type int"]),
        (Needs, ["cannot be made: 1 validation error"]),
        (Sneaky, ["message changes more than edits said, which was 'head'"]),
        (Silent, ["message changes more than edits said, which was 'none'"]),
        (Early, ["data gives an Edit with more than AddHeader; only the message phase may"]),
        (Insatiable, ["message about a body of 200 kB raises RuntimeError: the body was read already"]),
        (Subjective, ["message about an empty message raises LookupError: no subject",
                      "message refuses recipients that are not of the message"]),
        (Wordless, ["unknown answers Allow; only Refuse may be said there",
                    "message gives an edit that cannot be made of a message: "]),
    ],
)  # fmt: skip
async def test_finds_what_breaks_the_contract(stage_type: type[Stage], findings: list[str]) -> None:
    if not findings:
        await check_stage(stage_type)
        return
    with pytest.raises(ConformanceError) as caught:
        await check_stage(stage_type)
    said = str(caught.value)
    for finding in findings:
        assert finding in said


async def test_helpers_that_are_away_are_named() -> None:
    with pytest.raises(ConformanceError, match="connect raises TimeoutError"):
        await check_stage(Slow, away=(ConnectionError,))
    with pytest.raises(ConformanceError, match="mail raises ConnectionRefusedError: no helper here"):
        await check_stage(Good, away=())
