"""Hold a stage against the contract: everything that can be checked of any stage without knowing what it is for.

    async def test_keeps_the_contract() -> None:
        await check_stage(NoFridays, {"except": ["boss@example.org"]})

The stage is made from its settings, started, and asked in every phase about sessions of many kinds: in clear text and
under TLS, with and without names, login, HELO, an IP address at all; and in `message` about contents of many kinds:
empty, a header alone, no header, MIME, 8-bit, broken off, a header of 60 kB. It must answer each phase with a verdict
of that phase and change no more of a message than `edits` said, must not raise, must bear `close` for a session that
it never saw and twice for one that it did.

What this cannot see: whether the verdicts are the right ones, what happens when a helper hangs, whether two sessions
share a memory. Exceptions in `away` (OSError, which TimeoutError is too, and HttpError unless you say otherwise) mean
that a helper is not there in the test; they are what `on_error` is for.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from gateway import hookspecs
from gateway.facts import EvaluationError, Fact, Phase
from gateway.pipeline.chain import ANSWERS, bound_hook
from gateway.pipeline.conditions import ConditionError
from gateway.pipeline.reference import settings_rows
from gateway.pipeline.registry import StageError
from gateway.protocol.errors import LocalError
from gateway.protocol.sasl import Certificate, Credentials, Digest, Password, Token
from gateway.session import Session
from gateway.stage import Kind, Outcome, Stage
from gateway.testing.messages import FakeMessage, edited, make_message
from gateway.testing.peer import ScriptedPeer
from gateway.testing.stages import TLS, FakeAttempt, FakeWorker, build, make_recipient, make_session, make_transaction
from gateway.upstream.http import HttpError
from gateway.verdicts import (
    AddHeader,
    AppendHeader,
    Cause,
    ChangeHeader,
    DeleteHeader,
    Edit,
    InsertHeader,
    Refuse,
    Upstream,
)

AWAY: tuple[type[Exception], ...] = (OSError, HttpError, EvaluationError)

_SENDERS = ("sender@example.org", "", '"a b"@example.org', "üser@exämple.example", "postmaster")
_RECIPIENTS = ("recipient@example.net", "postmaster", "Postmaster@EXAMPLE.net", '"@"@example.net', "a@[192.0.2.1]")
_HELO_NAMES = ("client.example", "[192.0.2.1]", "x", "bücher.example")
_CREDENTIALS: tuple[Credentials, ...] = (
    Password("", "nobody@example.org", "secret", "PLAIN"),
    Password("other@example.org", "nobody", "secret", "LOGIN"),
    Digest("nobody", b"<1@example.org>", "0" * 32),
    Token("", "secret", "OAUTHBEARER"),
    Certificate(""),
)
_EXTENSIONS: tuple[dict[str, str], ...] = (
    {},
    {"PIPELINING": "", "SIZE": "1000"},
    {"XCLIENT": "NAME ADDR PORT PROTO HELO LOGIN", "XFORWARD": "NAME ADDR PROTO HELO", "AUTH": "PLAIN LOGIN"},
)
_COMMANDS = ("XYZZY", "STLS", "GET")
_MIME = (
    b"Received: from a by b; Mon, 1 Jan 2024 00:00:00 +0000\r\nFrom: a@example.org\r\nSubject: two\r\n\tlines\r\n"
    b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"x\"\r\n\r\n"
    b"--x\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nText\r\n.\r\n"
    b"--x\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\nText\r\n"
    b"--x\r\nContent-Disposition: attachment; filename*=utf-8''%C3%BC.bin\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    b"AAECAw==\r\n--x--\r\n"
)
_CONTENTS: Mapping[str, bytes] = {
    "an empty message": b"",
    "a header alone": b"From: a@example.org\r\nSubject: x\r\n",
    "a header and no body": b"Subject: x\r\n\r\n",
    "no header": b"\r\nText\r\n",
    "a body that begins at once": b"this is no field\r\nText\r\n",
    "MIME": _MIME,
    "8-bit octets": b"Subject: \xfc \xc3\xbc\r\nX: \x00\r\n\r\n\xff\xfe\x00\r\n",
    "MIME that is broken off": _MIME[:400],
}
_LARGE: Mapping[str, bytes] = {  # asked about in one session: they take their time
    "a header of 60 kB": b"Subject: x\r\n" + b"X-Long: " + b"y" * 900 + b"\r\n" + b"X: 1\r\n" * 9_900 + b"\r\nText\r\n",
    "a body of 200 kB": b"Subject: x\r\n\r\n" + b"0123456789012345678901234567890123456789\r\n" * 5_000,
}  # fmt: skip
_HEAD = (AddHeader, InsertHeader, AppendHeader, ChangeHeader, DeleteHeader)


class ConformanceError(AssertionError):
    """The stage breaks the contract; one line a finding."""


async def check_stage(
    stage_type: type[Stage],
    settings: object = None,
    *,
    id: str = "",
    folder: Path | None = None,
    facts: Sequence[Fact] = (),
    tables: Mapping[str, Iterable[str]] | None = None,
    away: tuple[type[Exception], ...] = AWAY,
) -> None:
    """Check the stage with these settings (as in a pipeline file; see `gateway.testing.stages.build`).

    Raises ConformanceError with everything that was found.
    """
    found = [*_described(stage_type)]
    try:
        stage = build(stage_type, settings, id=id, folder=folder, facts=facts, tables=tables)
    except (StageError, ValidationError, ConditionError) as error:
        raise ConformanceError("\n".join([*found, f"cannot be made: {error}"])) from error
    found += _shapes(stage)
    asked = _Asked(stage, away)
    await asked.everything()
    found += asked.found
    if found:
        raise ConformanceError("\n".join(dict.fromkeys(found)))


def _described(stage_type: type[Stage]) -> Iterator[str]:
    """What people and documentation need."""
    if not (stage_type.__doc__ or "").strip():
        yield "the class has no docstring"
    if not isinstance(stage_type.kind, Kind):
        yield f"kind is {stage_type.kind!r}, not a Kind"
    config = stage_type.Settings.model_config
    if config.get("extra") != "forbid" or not config.get("frozen"):
        yield "Settings do not inherit from gateway.Settings' configuration: unknown keys must be errors"
    for row in settings_rows(stage_type.Settings):
        if not row.description:
            yield f"setting {row.name} has no description"
    short = stage_type.Settings.short_form
    if short is not None and short not in {row.name for row in settings_rows(stage_type.Settings)}:
        yield f"short_form names {short!r}, which is no setting"
    types = {"string": str, "int": int, "double": float, "bool": bool}
    for fact in stage_type.facts:
        if "." in fact.name:
            yield f"fact {fact.name}: the id is put in front of the name; write it without a dot"
        if type(fact.default) is not types[fact.type]:
            yield f"fact {fact.name}: the default {fact.default!r} is not of type {fact.type}"


def _shapes(stage: Stage) -> Iterator[str]:
    """Plain functions where nobody awaits, coroutines where somebody does (first word of each hookspec)."""
    for name, spec in vars(hookspecs).items():
        if not inspect.isfunction(spec) or not hasattr(stage, name):
            continue
        wanted = (spec.__doc__ or "").partition(".")[0]
        is_coroutine = inspect.iscoroutinefunction(getattr(stage, name))
        if wanted == "s" and is_coroutine:
            yield f"{name} must be a plain function: nobody awaits it"
        elif wanted == "a" and not is_coroutine:
            yield f"{name} must be a coroutine"


def _sessions() -> Iterator[Session]:
    """Clients of many kinds, each before HELO."""
    yield make_session()
    yield make_session(address="2001:db8::1", listen="smtps://[2001:db8::25]:465", tls=TLS)
    yield make_session(address="", port=0)  # over a unix socket
    yield make_session(tls=TLS, helo="client.example", user="Nobody@Example.org", name="client.example")
    yield make_session(helo="client.example", esmtp=False, name_status="tempunavail", trusted=True)
    yield make_session(helo="x", reverse_name="claims.example", name_status="unavailable", user="nobody")
    lmtp = make_session(listen="lmtp://192.0.2.25:24", helo="client.example")
    lmtp.protocol = "lmtp"
    yield lmtp


class _Asked:
    """Asks one stage everything, and keeps what was wrong."""

    def __init__(self, stage: Stage, away: tuple[type[Exception], ...]) -> None:
        self.stage = stage
        self.away = away
        self.found: list[str] = []

    async def everything(self) -> None:
        """From start to stop."""
        await self._call("start", FakeWorker())
        for session in _sessions():
            await self._session(session)
        await self._messages(make_session(tls=TLS, helo="client.example"), _LARGE)
        untold = make_session()  # refused before this stage was asked
        await self._call("close", untold)
        await self._call("stop")

    async def _session(self, session: Session) -> None:
        await self._phase("connect", session)
        if session.tls is not None:
            await self._phase("secure", session)
        await self._phase("greeting", session)
        for name in [session.helo] if session.helo else _HELO_NAMES:
            session.helo, session.esmtp = name, True
            await self._phase("helo", session, name)
        await self._offer(session)
        for number, credentials in enumerate(_CREDENTIALS, 1):
            answers = [b"", b"", b""]
            await self._phase("auth", session, FakeAttempt(credentials, answers, number=number))
        await self._upstream(session)
        for command in _COMMANDS:
            verdict = await self._call("unknown", session, command)
            good = verdict is None or isinstance(verdict, Refuse)
            self._expect(good, f"unknown answers {type(verdict).__name__}; only Refuse may be said there")
        for sender in _SENDERS:
            await self._transaction(session, sender)
        await self._messages(session, _CONTENTS)

    async def _messages(self, session: Session, contents: Mapping[str, bytes]) -> None:
        """One after the other, and the session's end."""
        for name, content in contents.items():
            await self._transaction(session, "sender@example.org", name, content)
        await self._call("settled", session, Outcome("command", 4, Cause.TIMEOUT, "", None))
        await self._call("close", session)
        await self._call("close", session)

    async def _offer(self, session: Session) -> None:
        names = await self._call("mechanisms", session)
        if hasattr(self.stage, "mechanisms"):
            good = isinstance(names, (list, tuple)) and all(
                isinstance(one, str) and one == one.upper() for one in names
            )
            self._expect(good, f"mechanisms gives {names!r}, not a list of names in capitals")
        for keywords in ({}, {"SIZE": "1000", "AUTH": "PLAIN LOGIN", "STARTTLS": "", "PIPELINING": ""}):
            offer = dict(keywords)
            await self._call("capabilities", session, offer)
            self._expect(set(offer) <= set(keywords), f"capabilities adds {sorted(set(offer) - set(keywords))}")

    async def _transaction(
        self, session: Session, sender: str, name: str = "a message", content: bytes = b"Subject: x\r\n\r\nText\r\n"
    ) -> None:
        parameters = (("SIZE", "2000"), ("BODY", "8BITMIME")) if sender else ()
        transaction = make_transaction(session, sender, parameters)
        await self._phase("route", session, None)
        await self._phase("mail", session, transaction)
        for address in _RECIPIENTS:
            recipient = make_recipient(session, address, accepted=False)
            await self._phase("rcpt", session, recipient)
            await self._phase("route", session, recipient)
            transaction.recipients.append(recipient)
        await self._phase("data", session, transaction)
        edits: object = "none"
        if hasattr(self.stage, "edits"):
            edits = await self._call("edits", transaction)
            self._expect(edits in ("none", "head", "any"), f"edits gives {edits!r}, not none, head or any")
        message = make_message(session, content, block=4096)
        verdict = await self._phase("message", session, message, f" about {name}")
        self._message_verdict(verdict, message, edits, name)
        transaction.size = len(content)
        await self._call("settled", session, Outcome("message", 2, None, "", None))
        await self._call("reset", session, transaction)
        session.transaction = None

    def _message_verdict(self, verdict: object, message: FakeMessage, edits: object, name: str) -> None:
        """What may be changed is what `edits` said; what is refused for some recipients names such as there are."""
        if isinstance(verdict, (Edit, Upstream)):
            head = isinstance(verdict, Edit) and verdict.upstream is None and _is_head(verdict)
            allowed = edits == "any" or (edits == "head" and head)
            self._expect(allowed, f"message changes more than edits said, which was {edits!r}")
        if isinstance(verdict, Edit):
            try:
                edited(message.content, verdict)
            except (LocalError, ValueError) as error:
                self.found.append(f"message gives an edit that cannot be made of {name}: {error}")
        if isinstance(verdict, Refuse) and verdict.recipients is not None:
            known = {recipient.index for recipient in message.transaction.recipients}
            self._expect(set(verdict.recipients) <= known, "message refuses recipients that are not of the message")

    async def _upstream(self, session: Session) -> None:
        for extensions in _EXTENSIONS:
            for replies in ((), ("550 5.7.1 no",), ("421 4.3.2 gone",)):
                peer = ScriptedPeer(extensions, replies, tls=bool(extensions), local=not extensions)
                for hook in ("upstream_connect", "upstream_ready", "upstream_login"):
                    verdict = await self._call(hook, session, peer)
                    good = verdict is None or isinstance(verdict, Refuse)
                    self._expect(good, f"{hook} answers {type(verdict).__name__}; only Refuse may be said there")
        make_transaction(session)
        await self._call("upstream_mail", session, ScriptedPeer(_EXTENSIONS[-1]))
        session.transaction = None

    async def _phase(self, name: str, session: Session, subject: object = None, about: str = "") -> object:
        """One phase, if the stage is asked in it: where an expression's facts are not known yet it is not."""
        own = getattr(self.stage, "phases", None)
        if own is not None and name not in own():
            return None
        arguments = (session,) if name in ("connect", "secure", "greeting") else (session, subject)
        verdict = await self._call(name, *arguments, about=about)
        good = verdict is None or isinstance(verdict, ANSWERS[Phase[name.upper()]])
        self._expect(good, f"{name} cannot be answered with {type(verdict).__name__}")
        if name != "message" and isinstance(verdict, Edit):
            early = verdict.upstream is None and all(isinstance(one, AddHeader) for one in verdict.operations)
            self._expect(early, f"{name} gives an Edit with more than AddHeader; only the message phase may")
        return verdict

    async def _call(self, name: str, *arguments: object, about: str = "") -> object:
        """The hook's answer; None if the stage has no such hook or a helper is away."""
        if not hasattr(self.stage, name):
            return None
        try:
            answer = bound_hook(self.stage, name)(*arguments)
            if isinstance(answer, Awaitable):
                async with asyncio.timeout(self.stage.timeout):
                    answer = await answer
        except self.away:
            return None
        except Exception as error:
            session = next((one for one in arguments if isinstance(one, Session)), None)
            self.found.append(f"{name}{about} raises {type(error).__name__}: {error}{_of(session)}")
            return None
        return answer

    def _expect(self, good: bool, text: str) -> None:
        if not good:
            self.found.append(text)


def _is_head(edit: Edit) -> bool:
    return all(isinstance(operation, _HEAD) for operation in edit.operations)


def _of(session: Session | None) -> str:
    if session is None:
        return ""
    state = [f"client {session.client.address!r}", "TLS" if session.tls is not None else "clear text"]
    if session.user:
        state.append("logged in")
    return f" ({', '.join(state)})"
