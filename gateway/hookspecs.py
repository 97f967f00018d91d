"""The stage contract: when each method is called, with what, and which verdicts it may give.

Signatures and docstrings only. A method may name fewer arguments than its spec, never others. `s` in the
first line: a plain function; `a`: a coroutine; `s/a`: the author's choice. None always means: go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from gateway.message import Message
    from gateway.session import Recipient, Session, Transaction
    from gateway.stage import Attempt, Outcome, Peer, Worker
    from gateway.verdicts import (
        Allow,
        Authenticated,
        Discard,
        Edit,
        Edits,
        Hold,
        Refuse,
        Rewrite,
        Upstream,
    )

hookspec = pluggy.HookspecMarker("gateway")


@hookspec
def start(worker: Worker) -> None:
    """a. In the worker, before the first connection is accepted; an exception stops the start."""


@hookspec
def stop() -> None:
    """a. In the worker, after the last session."""


@hookspec
def phases() -> Sequence[str]:
    """s. Names of the phases these settings need (default: all implemented). Decides the grade."""
    return ()


@hookspec
def mechanisms(session: Session) -> Sequence[str]:
    """s. SASL mechanisms that this stage can verify in this session."""
    return ()


@hookspec
def edits(transaction: Transaction) -> Edits:
    """s. Asked at DATA: whether the message will be edited: none, head (its header alone) or any.

    Without this hook: none. Later stages and the upstream wait for the verdict of one that edits.
    """
    return "none"


@hookspec
def connect(session: Session) -> Hold | Refuse | Allow | None:
    """s/a. The address of the client is known (PROXY header read); no byte was sent, no TLS begun."""


@hookspec
def secure(session: Session) -> Refuse | Allow | None:
    """s/a. After each TLS handshake; with implicit TLS before the greeting."""


@hookspec
def greeting(session: Session) -> Hold | Refuse | Allow | None:
    """s/a. Just before the greeting."""


@hookspec
def helo(session: Session, name: str) -> Hold | Refuse | Allow | None:
    """s/a. HELO or EHLO; several in one session are normal."""


@hookspec
def capabilities(session: Session, offer: dict[str, str]) -> None:
    """s. May remove keywords from the EHLO offer and narrow their parameters; additions are ignored."""


@hookspec
def auth(session: Session, attempt: Attempt) -> Hold | Refuse | Authenticated | None:
    """s/a. A client gave credentials. None: not my user, ask the next stage. The first other answer decides."""


@hookspec
def mail(session: Session, transaction: Transaction) -> Hold | Refuse | Allow | Rewrite | Edit | None:
    """s/a. MAIL, before the upstream hears of it."""


@hookspec
def rcpt(session: Session, recipient: Recipient) -> Hold | Refuse | Allow | Rewrite | Edit | None:
    """s/a. RCPT, before the upstream hears of it."""


@hookspec
def data(session: Session, transaction: Transaction) -> Hold | Refuse | Edit | None:
    """s/a. DATA or the first BDAT, with at least one accepted recipient."""


@hookspec
def message(session: Session, message: Message) -> Hold | Refuse | Edit | Discard | Upstream | None:
    """a. The content: header, body in blocks as the client sends it, or the whole.

    `Edit` and `Upstream` only if `edits` said so for this transaction: `head` for changes to the header, `any` for
    all others. With `recipients` a Refuse concerns those alone: LMTP answers each, SMTP 451 unless all are named.
    """


@hookspec
def unknown(session: Session, command: str) -> Refuse | None:
    """s/a. A command that nobody knows, before it is refused; only a temporary Refuse changes the reply."""


@hookspec
def route(session: Session, recipient: Recipient | None) -> Refuse | Upstream | None:
    """s/a. Choose the upstream; asked at the earliest moment all facts of the stage's rules are known.

    `recipient` is None when asked before RCPT.
    """


@hookspec
def upstream_connect(session: Session, peer: Peer) -> Refuse | None:
    """s. Connected; nothing sent or read yet. For the PROXY header."""


@hookspec
def upstream_ready(session: Session, peer: Peer) -> Refuse | None:
    """a. EHLO was answered, TLS is up if it will be. For XCLIENT; then `peer.hello()`."""


@hookspec
def upstream_login(session: Session, peer: Peer) -> Refuse | None:
    """a. For AUTH at the upstream."""


@hookspec
def upstream_mail(session: Session, peer: Peer) -> None:
    """s. Before each MAIL, in one write with it. For XFORWARD."""


@hookspec
def settled(session: Session, outcome: Outcome) -> None:
    """s. After each answer was decided: look only."""


@hookspec
def reset(session: Session, transaction: Transaction) -> None:
    """s. Once a transaction, however it ended: look only."""


@hookspec
def close(session: Session) -> None:
    """s/a. Once a session: look only; give back what was held."""


@hookspec
def clear_cache(user: str) -> int:
    """s. An operator wants what was remembered about a user's logins forgotten (all users': empty); how many were."""
    return 0


PHASES: tuple[str, ...] = ("connect", "secure", "greeting", "helo", "auth", "route", "mail", "rcpt", "data", "message")
