"""The chain at run time: asks the stages of a phase in the file's order and makes one decision of it.

Everything was resolved at load: a phase is a tuple of `Step`s, a step is a bound method and the few things
configured around it. Around every stage, in this order: allow-skip, `mode`, `when`, `timeout`, the call.
"""

from __future__ import annotations

import asyncio
import inspect
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import CoroutineType
from typing import Literal, assert_never

import structlog

from gateway import hookspecs
from gateway.facts import EvaluationError, Expression, Phase, Scope
from gateway.observe.traces import TracedSession
from gateway.pipeline.meter import Meter, RecordingMeter
from gateway.protocol.smtp import format_mail, format_rcpt
from gateway.replies import smtp_reply
from gateway.session import Recipient, Session, Transaction
from gateway.stage import Outcome, Stage, Timed
from gateway.state.keys import network_key
from gateway.state.store import is_logged
from gateway.verdicts import (
    AddHeader,
    Allow,
    Authenticated,
    Cause,
    Discard,
    Edit,
    Edits,
    Hold,
    Operation,
    Refuse,
    Rewrite,
    Upstream,
    Verdict,
)

OnError = Literal["tempfail", "reject", "disconnect", "pass"]
Subject = object
Call = Callable[[Session, Subject], "Verdict | Awaitable[Verdict | None] | None"]

log = structlog.get_logger("gateway.chain")

_EARLY = (Hold, Refuse, Allow)
ANSWERS: dict[Phase, tuple[type, ...]] = {
    Phase.CONNECT: _EARLY,
    Phase.SECURE: (Refuse, Allow),
    Phase.GREETING: _EARLY,
    Phase.HELO: _EARLY,
    Phase.AUTH: (Hold, Refuse, Authenticated),
    Phase.ROUTE: (Refuse, Upstream),
    Phase.MAIL: (*_EARLY, Rewrite, Edit),
    Phase.RCPT: (*_EARLY, Rewrite, Edit),
    Phase.DATA: (Hold, Refuse, Edit),
    Phase.MESSAGE: (Hold, Refuse, Edit, Discard, Upstream),
}
"""The verdicts that may be given in each phase (`hookspecs.py`); anything else is a failure of the stage."""


@dataclass(slots=True)
class Step:
    """One stage in one phase.

    `enforce` is the share of client networks (0 to 100) for which refusals count; 0 is observe. `postpone`
    keeps an early refusal for RCPT. `catch_up` are the stage's earlier phases, asked late when `when` first
    holds.
    """

    stage: Stage
    index: int
    phase: Phase
    call: Call
    skippable: bool
    enforce: int
    when: Expression | None
    timeout: float
    on_error: OnError
    postpone: bool
    catch_up: tuple[Step, ...] = ()
    may_discard: bool = False  # `discard: accept`
    stage_edits: Callable[[Transaction], Edits] | None = None
    meter: Meter | None = None  # None: not counted


@dataclass(slots=True)
class Result:
    """What the stages of a phase decided together.

    `refuse` with the id of the stage that gave it; `until` the loop time before which nothing is answered,
    and `early` for a client that talks before; `failed` a stage of `auth` could not answer. In the message phase:
    `operations` to apply, or `discard`, the reason to throw the message away.
    """

    refuse: Refuse | None = None
    stage: str = ""
    until: float = 0.0
    early: Refuse | None = None
    authenticated: Authenticated | None = None
    upstream: Upstream | None = None
    failed: bool = False
    operations: Sequence[Operation] = ()
    discard: str = ""


class StageFailure(Exception):
    """A stage raised or took too long; carries what the log says."""


def reason(error: BaseException) -> str:
    """What a stage failed with, for logs."""
    if isinstance(error, TimeoutError) and not str(error):
        return "time-out"
    if type(error).__module__.startswith("gateway."):
        return str(error)  # our own say all themselves
    return f"{type(error).__name__}: {error}"


def unanswered(step: Step, error: BaseException) -> Refuse:
    """The verdict that `on_error` stands for."""
    text = f"{step.stage.id} in {step.phase.name.lower()}: {reason(error)}"
    if step.on_error == "reject":
        return Refuse(Cause.STAGE_FAILED, temporary=False, log=text)
    return Refuse(Cause.STAGE_FAILED, disconnect=step.on_error == "disconnect", log=text)


class Chain:
    """The compiled stages of a pipeline, a tuple of steps a phase, and the hooks that only look."""

    def __init__(self, stages: Sequence[Stage], steps: dict[Phase, tuple[Step, ...]]) -> None:
        self.stages = tuple(stages)
        self.connect = steps.get(Phase.CONNECT, ())
        self.secure = steps.get(Phase.SECURE, ())
        self.greeting = steps.get(Phase.GREETING, ())
        self.helo = steps.get(Phase.HELO, ())
        self.auth = steps.get(Phase.AUTH, ())
        self.mail = steps.get(Phase.MAIL, ())
        self.rcpt = steps.get(Phase.RCPT, ())
        self.data = steps.get(Phase.DATA, ())
        self.message = steps.get(Phase.MESSAGE, ())
        self.edits_messages = any(step.stage_edits is not None for step in self.message)
        self.unknown = _hooks(stages, "unknown")
        self.settled = _hooks(stages, "settled")
        self.reset = _hooks(stages, "reset")
        self.close = _hooks(stages, "close")
        self.capabilities = _hooks([stage for stage in stages if stage.mode != "observe"], "capabilities")
        conditions = {step.stage: step.when for step in self.auth if step.when is not None}
        self.mechanisms = tuple(
            (stage, _where(conditions[stage], hook) if stage in conditions else hook)
            for stage, hook in _hooks(stages, "mechanisms")
        )
        self.upstream_connect = _hooks(stages, "upstream_connect")
        self.upstream_ready = _hooks(stages, "upstream_ready")
        self.upstream_login = _hooks(stages, "upstream_login")
        self.upstream_mail = _hooks(stages, "upstream_mail")
        routes = steps.get(Phase.ROUTE, ())
        self.route_early = tuple(step for step in routes if route_phase(step.stage) < Phase.RCPT)
        self.route_rcpt = tuple(step for step in routes if route_phase(step.stage) >= Phase.RCPT)
        self._steps = dict(steps)

    def measure(self, pipeline: str) -> None:
        """Count what its stages answer from now on, and let sessions remember it (`Session.trail`).

        Called in the worker, after `metrics.bind`.
        """
        for steps in self._steps.values():
            for step in steps:
                for one in (*step.catch_up, step):
                    one.meter = Meter(pipeline, one.stage.id, one.phase.name.lower())

    def recording(self, pipeline: str) -> Chain:
        """The same stages for sessions that are traced: when each was asked is written down as well.

        A chain of its own, so that all other sessions do nothing for it. Called in the worker, after `metrics.bind`.
        """
        return Chain(
            self.stages,
            {phase: tuple(_recorded(step, pipeline) for step in steps) for phase, steps in self._steps.items()},
        )

    async def ask(
        self,
        steps: tuple[Step, ...],
        session: Session,
        subject: Subject = None,
        transaction: Transaction | None = None,
        recipient: Recipient | None = None,
    ) -> Result:
        """Ask each step in turn until one refuses (or, in auth and route, answers)."""
        result = Result()
        for step in steps:
            if step.skippable and (
                session.allowed is not None
                or (transaction is not None and transaction.allowed)
                or (recipient is not None and recipient.allowed)
            ):
                continue
            begun = perf_counter()
            try:
                if step.when is not None:
                    if not _holds(step.when, session, transaction, recipient):
                        continue
                    if step.catch_up and await self._catch_up(step, result, session, transaction):
                        return result
                    _mark(step, session, transaction)
                verdict = step.call(session, subject)
                if verdict is not None:
                    if isinstance(verdict, (CoroutineType, Awaitable)):
                        async with asyncio.timeout(step.timeout) as clock:
                            if isinstance(subject, Timed):
                                subject.clock = clock
                            verdict = await verdict
                    _check_answer(step, verdict, transaction)
            except Exception as error:
                if self.failed(step, error, result, session, _since(begun, subject)):
                    return result
                continue
            finally:
                times = session.times
                if times is None:
                    times = session.times = {}
                took = perf_counter() - begun
                if isinstance(subject, Timed):
                    took -= subject.waited
                times[step.stage.id] = times.get(step.stage.id, 0.0) + took
            if step.meter is not None:
                step.meter.answered(session, type(verdict), step.enforce >= 100 or _enforced(step, session), took)
            if verdict is not None and self._apply(step, verdict, result, session, transaction, recipient):
                return result
        return result

    async def _catch_up(
        self, step: Step, result: Result, session: Session, transaction: Transaction | None
    ) -> bool:
        """Ask the stage's earlier phases that it missed while its `when` was unknown or false.

        A phase that refused or failed was not passed: it is asked again with the next command. What would be
        postponed to RCPT is refused at once where RCPT has come.
        """
        for missed in step.catch_up:
            if _was_asked(missed, session, transaction):
                continue
            about = transaction if missed.phase >= Phase.MAIL else None
            subjects = _subjects(missed, session, transaction)
            for subject in subjects:
                verdict = missed.call(session, subject)
                if isinstance(verdict, (CoroutineType, Awaitable)):
                    async with asyncio.timeout(missed.timeout):
                        verdict = await verdict
                _check_answer(missed, verdict, transaction)
                if isinstance(verdict, Rewrite):
                    raise TypeError(f"{missed.phase.name.lower()} was answered already; it is too late to rewrite it")
                recipient = subject if isinstance(subject, Recipient) else None
                if missed.meter is not None:
                    missed.meter.added(session, type(verdict), _enforced(missed, session))
                if verdict is not None and self._apply(missed, verdict, result, session, about, recipient):
                    return True
                if recipient is not None:
                    recipient.caught_up |= {missed.index}
            if subjects:  # all of them: who stands behind one that failed must not be forgotten
                _mark(missed, session, transaction)
        if step.phase >= Phase.RCPT and session.postponed is not None and session.postponed[1] == step.stage.id:
            result.refuse, result.stage = session.postponed
            return True
        return False

    def to_read(self, session: Session, transaction: Transaction) -> list[tuple[Step, Edits]]:
        """The steps of the message phase that this transaction is for, and what each may do to it. Asked at DATA."""
        found: list[tuple[Step, Edits]] = []
        for step in self.message:
            if step.skippable and (session.allowed is not None or transaction.allowed):
                continue
            try:
                if step.when is not None and step.when.phase < Phase.MESSAGE:  # else it is not known yet
                    if not _holds(step.when, session, transaction, None):
                        continue
                # Who is only looked on changes nothing, so that nobody waits for it.
                edits: Edits = "none"
                if step.stage_edits is not None and (step.enforce >= 100 or _enforced(step, session)):
                    edits = step.stage_edits(transaction)
                    if edits not in ("none", "head", "any"):
                        raise TypeError(f"edits says {edits!r}, which is none of none, head, any")
            except Exception as error:
                _look_failed(step.stage, "edits", session, error)
                edits = "any"  # asked again in the phase itself, where `on_error` applies
            found.append((step, edits))
        return found

    def failure(self, step: Step, error: Exception, session: Session) -> Result:
        """What `on_error` makes of a stage whose answer cannot be carried out."""
        result = Result()
        self.failed(step, error, result, session)
        return result

    def failed(
        self, step: Step, error: Exception, result: Result, session: Session, seconds: float | None = None
    ) -> bool:
        """`on_error`; True ends the phase. `seconds`: how long the stage took, None if that was counted already."""
        refuse = unanswered(step, error)
        if step.meter is not None:
            if seconds is None:
                step.meter.added(session, Exception, _enforced(step, session))
            else:
                step.meter.answered(session, Exception, _enforced(step, session), seconds)
        if not is_logged(error):  # while a store is away, its absence is in the log once, not once a session
            log.warning(
                "stage_failure",
                session=session.id,
                stage=step.stage.id,
                phase=step.phase.name.lower(),
                error=reason(error),
                action=step.on_error,
            )
        if step.phase is Phase.AUTH:
            result.failed = True
            return False
        if step.on_error == "pass":
            return False
        return self._refuse(step, refuse, result, session)

    def _refuse(self, step: Step, refuse: Refuse, result: Result, session: Session) -> bool:
        if step.enforce < 100 and not _enforced(step, session):
            log.info(
                "observed",
                session=session.id,
                stage=step.stage.id,
                phase=step.phase.name.lower(),
                client=session.client.address,
                cause=refuse.cause.value,
                text=refuse.text,
            )
            return False
        if step.postpone and not refuse.disconnect:
            if session.postponed is None:
                session.postponed = (refuse, step.stage.id)
            return False
        result.refuse = refuse
        result.stage = step.stage.id
        if refuse.hold:
            result.until = max(result.until, asyncio.get_running_loop().time() + refuse.hold)
        return True

    def _apply(
        self,
        step: Step,
        verdict: Verdict,
        result: Result,
        session: Session,
        transaction: Transaction | None,
        recipient: Recipient | None,
    ) -> bool:
        """Take a verdict in; True ends the phase."""
        if isinstance(verdict, Refuse):
            return self._refuse(step, verdict, result, session)
        if step.enforce < 100 and not _enforced(step, session):
            return False  # only looked on: no hold, no allowance, no change
        match verdict:
            case Hold():
                until = asyncio.get_running_loop().time() + verdict.seconds
                result.until = max(result.until, until)
                if verdict.early is not None:
                    result.early, result.stage = verdict.early, step.stage.id
            case Allow():
                if recipient is not None:
                    recipient.allowed = True
                elif transaction is not None:
                    transaction.allowed = True
                else:
                    session.allowed = verdict
                    session.postponed = None if session.postponed and _skippable(session, self) else session.postponed
            case Rewrite():
                target = recipient if recipient is not None else transaction
                if target is not None:
                    target.rewrite(verdict.address, verdict.parameters)
            case Edit():
                result.upstream = verdict.upstream
                if step.phase is Phase.MESSAGE:
                    result.operations = verdict.operations
                elif transaction is not None:
                    fields = [one for one in verdict.operations if isinstance(one, AddHeader)]
                    transaction.head = [*(transaction.head or ()), *fields]
            case Authenticated():
                result.authenticated, result.stage = verdict, step.stage.id
                return True
            case Upstream():
                result.upstream, result.stage = verdict, step.stage.id
                return True
            case Discard():
                if not step.may_discard:
                    return self._refuse(step, Refuse(Cause.CONTENT, log=f"discard: {verdict.reason}"), result, session)
                result.discard, result.stage = verdict.reason or "no reason given", step.stage.id
                return True
            case _:
                assert_never(verdict)
        return False

    def again(self, session: Session, phase: Phase) -> None:
        """The phase comes another time (HELO, a handshake): stages that start late must hear of it anew."""
        if session.asked:
            session.asked = {mark for mark in session.asked if mark[1] != phase}

    async def ask_unknown(self, session: Session, command: str) -> Refuse | None:
        """`unknown` of every stage: the first temporary refusal; what else they answer changes nothing."""
        for stage, hook in self.unknown:
            try:
                verdict = hook(session, command)
                if isinstance(verdict, Awaitable):
                    async with asyncio.timeout(stage.timeout):
                        verdict = await verdict
            except Exception as error:
                _look_failed(stage, "unknown", session, error)
                continue
            temporary = isinstance(verdict, Refuse) and smtp_reply(verdict).code < 500
            if isinstance(verdict, Refuse) and temporary and stage.mode == "enforce":
                return verdict
        return None

    def tell_settled(self, session: Session, outcome: Outcome) -> None:
        """`settled` of every stage; what they raise is logged."""
        for stage, hook in self.settled:
            try:
                hook(session, outcome)
            except Exception as error:
                _look_failed(stage, "settled", session, error)

    def tell_reset(self, session: Session, transaction: Transaction) -> None:
        """`reset` of every stage."""
        for stage, hook in self.reset:
            try:
                hook(session, transaction)
            except Exception as error:
                _look_failed(stage, "reset", session, error)

    async def tell_close(self, session: Session) -> None:
        """`close` of every stage."""
        for stage, hook in self.close:
            try:
                result = hook(session)
                if result is not None and isinstance(result, Awaitable):
                    async with asyncio.timeout(stage.timeout):
                        await result
            except Exception as error:
                _look_failed(stage, "close", session, error)


Hook = Callable[..., object]


def _hooks(stages: Sequence[Stage], name: str) -> tuple[tuple[Stage, Hook], ...]:
    return tuple((stage, bound_hook(stage, name)) for stage in stages if hasattr(stage, name) and stage.mode != "off")


def _where(when: Expression, hook: Hook) -> Hook:
    """`mechanisms` of a stage with a condition: none where it is false; one without a value offers them (454)."""

    def mechanisms(session: Session) -> object:
        try:
            holds = when.evaluate(session)
        except EvaluationError:
            holds = True
        return hook(session) if holds else ()

    return mechanisms


def bound_hook(stage: Stage, name: str) -> Hook:
    """The stage's method, callable with all arguments of its spec; it may name fewer, in any order."""
    method: Hook = getattr(stage, name)
    given = list(inspect.signature(getattr(hookspecs, name)).parameters)
    named = list(inspect.signature(method).parameters)
    if named == given:
        return method
    places = [(argument, given.index(argument)) for argument in named if argument in given]
    return lambda *arguments: method(**{argument: arguments[place] for argument, place in places})


def _check_answer(step: Step, verdict: object, transaction: Transaction | None) -> None:
    """Raises TypeError for what is no answer to this phase, LocalError or ValueError for a Rewrite without a form."""
    if verdict is not None and not isinstance(verdict, ANSWERS[step.phase]):
        raise TypeError(f"{step.phase.name.lower()} cannot be answered with {type(verdict).__name__}")
    if isinstance(verdict, Edit) and step.phase is not Phase.MESSAGE:
        late = verdict.upstream or next((one for one in verdict.operations if not isinstance(one, AddHeader)), None)
        if late is not None:
            raise TypeError(f"{type(late).__name__} is possible in message only")
    if isinstance(verdict, Rewrite):
        written = format_mail if step.phase is Phase.MAIL else format_rcpt
        written(verdict.address, verdict.parameters or ())  # raises LocalError for what has no form in SMTP
        if not verdict.address.isascii() and transaction is not None:
            said = verdict.parameters if step.phase is Phase.MAIL else None
            if ("SMTPUTF8", None) not in (transaction.parameters if said is None else said):
                raise ValueError(f"{verdict.address!r} in a transaction without SMTPUTF8")  # RFC 6531 3.4


def route_phase(stage: Stage) -> Phase:
    """The phase in which a stage's `route` is asked: the stage's own word, or that of its rules' facts."""
    phase = getattr(stage, "route_phase", Phase.MAIL)
    return phase if isinstance(phase, Phase) else Phase.MAIL


def _recorded(step: Step, pipeline: str) -> Step:
    """The step as it is asked in sessions that are traced."""
    call, stage = step.call, step.stage.id

    def recorded(session: Session, subject: Subject) -> Verdict | Awaitable[Verdict | None] | None:
        if isinstance(session, TracedSession):
            session.trace.asked(stage)
        return call(session, subject)

    return replace(
        step,
        call=recorded,
        catch_up=tuple(_recorded(missed, pipeline) for missed in step.catch_up),
        meter=RecordingMeter(pipeline, stage, step.phase.name.lower()),
    )


def _skippable(session: Session, chain: Chain) -> bool:
    """Whether the stage that gave the postponed refusal is a check, which an Allow skips."""
    assert session.postponed is not None
    stage_id = session.postponed[1]
    return any(step.stage.id == stage_id and step.skippable for step in (*chain.connect, *chain.greeting, *chain.helo))


def _enforced(step: Step, session: Session) -> bool:
    """`mode: N%`: a stable hash of the client's network, so that a client always meets the same rule."""
    if step.enforce <= 0 or step.enforce >= 100:
        return step.enforce > 0
    return zlib.crc32(network_key(session.client.address, 24, 48).encode()) % 100 < step.enforce


def _holds(when: Expression, session: Session, transaction: Transaction | None, recipient: Recipient | None) -> bool:
    """Whether the condition holds here; at DATA a condition over recipients holds if it does for one of them."""
    if when.scope is Scope.RECIPIENT and recipient is None and transaction is not None:
        return any(when.evaluate(session, transaction, one) for one in transaction.recipients)
    return bool(when.evaluate(session, transaction, recipient))


def _since(begun: float, subject: Subject) -> float:
    """Seconds that the stage took, without what it waited for the client."""
    return perf_counter() - begun - (subject.waited if isinstance(subject, Timed) else 0.0)


def _asked(step: Step, session: Session, transaction: Transaction | None) -> Session | Transaction:
    return transaction if transaction is not None and step.phase >= Phase.MAIL else session


def _was_asked(step: Step, session: Session, transaction: Transaction | None) -> bool:
    asked = _asked(step, session, transaction).asked
    return asked is not None and (step.index, step.phase) in asked


def _mark(step: Step, session: Session, transaction: Transaction | None) -> None:
    holder = _asked(step, session, transaction)
    if holder.asked is None:
        holder.asked = set()
    holder.asked.add((step.index, step.phase))


def _subjects(missed: Step, session: Session, transaction: Transaction | None) -> Sequence[Subject]:
    """What a missed phase would have been asked about and still has to be."""
    phase = missed.phase
    if phase is Phase.HELO:
        return [session.helo] if session.helo else []
    if phase is Phase.SECURE:
        return [None] if session.tls is not None else []
    if phase is Phase.RCPT:
        recipients = transaction.recipients if transaction is not None else []
        return [one for one in recipients if missed.index not in one.caught_up]
    if phase in (Phase.MAIL, Phase.DATA):
        return [transaction] if transaction is not None else []
    return [None]


def _look_failed(stage: Stage, hook: str, session: Session, error: Exception) -> None:
    log.warning(
        "stage_failure",
        session=session.id,
        stage=stage.id,
        phase=hook,
        error=f"{type(error).__name__}: {error}",
        action="pass",
    )
