"""Sessions, listeners, pipelines and certificates as an operator sees them, in plain JSON; nothing secret in them."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, cast

from gateway.admin.hub import Json
from gateway.facts import BUILT_IN, Scope
from gateway.frontend.conversation import Conversation
from gateway.pipeline.plan import ListenerPlan, Plan

if TYPE_CHECKING:
    from gateway.protocol.smtp import Reply
    from gateway.relay.tls_files import CertificateFacts
    from gateway.session import Session, Transaction

STORES = ("imap", "pop3")


def state(conversation: Conversation) -> str:
    """joined, transaction, login (it has to log in first) or command."""
    session = conversation.session
    if conversation.splicing:
        return "joined"
    if session.transaction is not None:
        return "transaction"
    must_log_in = session.protocol in STORES or session.listener.login_required
    return "login" if must_log_in and not session.user else "command"


def row(conversation: Conversation) -> dict[str, Json]:
    """A session in one line; `client` has the port, `seconds` since accept, `upstream` is a URL or empty."""
    session, wire, connection = conversation.session, conversation.wire, conversation.connection
    address = f"[{session.client.address}]" if ":" in session.client.address else session.client.address
    return {
        "id": session.id,
        "pipeline": session.pipeline,
        "listener": session.listener.name,
        "client": f"{address}:{session.client.port}",
        "name": session.client.name,
        "protocol": session.protocol,
        "tls": session.tls.version if session.tls is not None else "",
        "user": session.typed_user,
        "helo": session.helo,
        "state": state(conversation),
        "upstream": connection.url if connection is not None else "",
        "seconds": round(perf_counter() - session.started, 3),
        "bytes_in": wire.bytes_in,
        "bytes_out": wire.bytes_out,
        "transactions": session.transactions,
    }


def whole(conversation: Conversation) -> dict[str, Json]:
    """The line, and: facts, the open transaction, what each stage answered so far, milliseconds that each took."""
    session = conversation.session
    return {
        **row(conversation),
        "peer": f"{session.peer[0]}:{session.peer[1]}",
        "refusals": conversation.refusals,
        "errors": conversation.errors,
        "facts": _facts(session),
        "transaction": _transaction(session.transaction) if session.transaction is not None else None,
        "verdicts": [
            {"stage": seen.stage, "phase": seen.phase, "verdict": seen.verdict, "mode": seen.mode}
            for seen in session.trail or ()
        ],
        "stage_ms": {stage: round(seconds * 1000, 3) for stage, seconds in (session.times or {}).items()},
    }


def _facts(session: Session) -> dict[str, Json]:
    """What conditions may ask, by name; those of the transaction while there is one."""
    transaction = session.transaction
    scopes = (Scope.SESSION,) if transaction is None else (Scope.SESSION, Scope.TRANSACTION)
    facts: dict[str, Json] = {
        fact.name: fact.get(session, transaction, None)
        for fact in BUILT_IN
        if fact.get is not None and fact.scope in scopes
    }
    return {**facts, **(session.facts or {}), **(transaction.facts or {} if transaction is not None else {})}


def _transaction(transaction: Transaction) -> dict[str, Json]:
    return {
        "id": transaction.id,
        "sender": transaction.original_sender,
        "size": transaction.size,
        "recipients": [
            {"address": one.original, "upstream": one.address, "reply": _reply(one.reply)}
            for one in transaction.recipients
        ],
        "refused": [{"address": address, "reply": _reply(reply)} for address, reply in transaction.refused],
    }


def _reply(reply: Reply | None) -> str:
    return f"{reply.code} {reply.text}" if reply is not None else ""


def listener(plan: ListenerPlan) -> dict[str, Json]:
    """A listener as it is configured; `tls` is implicit, starttls or off."""
    offered = plan.tls is not None and plan.starttls
    return {
        "url": plan.url,
        "name": plan.name,
        "protocol": plan.protocol,
        "tls": "implicit" if plan.implicit_tls else "starttls" if offered else "off",
        "proxy_protocol": plan.proxy_protocol,
    }


def pipeline(plan: Plan) -> dict[str, Json]:
    """A pipeline as it was compiled; `reason` says why its grade is not lower."""
    kinds = {one.stage: one for one in plan.rows}
    return {
        "name": plan.name,
        "hostname": plan.hostname,
        "grade": plan.grade,
        "reason": plan.reason,
        "listeners": [one.url for one in plan.listeners],
        "pools": list(plan.pools),
        "stages": [
            {
                "id": stage.id,
                "kind": stage.kind.value,
                "phases": kinds[stage.id].phases if stage.id in kinds else "",
                "mode": stage.mode if isinstance(stage.mode, str) else f"{stage.mode}%",
            }
            for stage in plan.chain.stages
        ],
    }


def certificate(facts: CertificateFacts) -> dict[str, Json]:
    """A certificate; `days` are left until it expires, times are seconds since 1970."""
    return {
        "chain": str(facts.chain),
        "names": cast(Json, sorted(facts.names)),
        "subject": facts.subject,
        "issuer": facts.issuer,
        "serial": str(facts.serial),
        "not_before": facts.not_before.timestamp(),
        "not_after": facts.not_after.timestamp(),
    }
