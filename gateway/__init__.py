"""A declarative, pipeline-based mail filtering gateway: what a stage author imports.

A *pipeline* (one YAML document) names *listeners*, a chain of *stages* and the *pools* of upstream servers.
A *session* is one client connection, a *transaction* one message in it. In each *phase* the chain asks its
stages in the file's order; a stage answers None (go on) or a *verdict*. What is known of a session are its
*facts*, typed and named. The last stage joins the client to the upstream server.

    from gateway import Cause, Refuse, Session, Settings, Stage

    class NoFridays(Stage):
        '''Refuse mail on Fridays.'''
        ...

`hookspecs.py` is the contract of each method, `gateway.testing` has what a stage's tests need.
"""

from typing import TYPE_CHECKING

from gateway.facts import EvaluationError, Expression, Fact, FactValue, Phase, Scope
from gateway.protocol.sasl import Certificate, Digest, Password, Token
from gateway.protocol.smtp import Reply, domain_of
from gateway.session import Client, Listener, Recipient, Session, Transaction
from gateway.stage import Attempt, Kind, Outcome, Peer, Settings, Stage, Worker
from gateway.state.keys import client_key, network_key
from gateway.state.store import Hit, Lease, Store, Window
from gateway.tables import ListFile, NameTable, NetworkTable
from gateway.values import (
    Cidr,
    CidrList,
    Condition,
    Duration,
    ExistingFile,
    PathValue,
    Percent,
    PoolReference,
    Rate,
    Secret,
    Size,
    TextExpression,
)
from gateway.verdicts import (
    AddHeader,
    Allow,
    Authenticated,
    Cause,
    Discard,
    Edit,
    Hold,
    Refuse,
    Rewrite,
    Upstream,
    Verdict,
)

if TYPE_CHECKING:
    from gateway.upstream.http import HttpClient, HttpError

_LATE = frozenset({"HttpClient", "HttpError"})  # they bring TLS with them


def __getattr__(name: str) -> object:
    """The HTTP client is imported by the stages that use it."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gateway.upstream import http

    return getattr(http, name)


__all__ = [
    "AddHeader", "Allow", "Attempt", "Authenticated", "Cause", "Certificate", "Cidr", "CidrList", "Client",
    "Condition", "Digest", "Discard", "Duration", "Edit", "EvaluationError", "ExistingFile", "Expression", "Fact",
    "FactValue", "Hit", "Hold", "HttpClient", "HttpError", "Kind", "Lease", "ListFile", "Listener", "NameTable",
    "NetworkTable", "Outcome", "Password", "PathValue", "Peer", "Percent", "Phase", "PoolReference", "Rate",
    "Recipient", "Refuse", "Reply", "Rewrite", "Scope", "Secret", "Session", "Settings", "Size", "Stage", "Store",
    "TextExpression", "Token", "Transaction", "Upstream", "Verdict", "Window", "Worker", "client_key", "domain_of",
    "network_key",
]  # fmt: skip
