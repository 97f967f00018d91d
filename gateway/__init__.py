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

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.facts import EvaluationError, Expression, Fact, FactValue, Phase, Scope
    from gateway.macros import connect_macros, helo_macros, mail_macros, rcpt_macros, refused_rcpt_macros
    from gateway.message import Message, NewBody
    from gateway.protocol.headers import Header, HeaderField
    from gateway.protocol.sasl import Certificate, Digest, Exchange, Password, Token
    from gateway.protocol.smtp import Reply, domain_of
    from gateway.session import Client, Listener, Recipient, Session, Transaction
    from gateway.stage import Attempt, Kind, Outcome, Peer, SaslStep, Settings, Stage, Worker
    from gateway.state.keys import client_key, network_key
    from gateway.state.store import Hit, Lease, Store, Window
    from gateway.tables import ListFile, NameTable, NetworkTable
    from gateway.upstream.http import HttpClient, HttpError
    from gateway.upstream.milter import FilterAddress, FilterConnection, FilterLost, FilterTimeouts
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
        AddRecipient,
        Allow,
        AppendHeader,
        Authenticated,
        Cause,
        ChangeHeader,
        ChangeSender,
        DeleteHeader,
        Discard,
        Edit,
        Edits,
        Hold,
        InsertHeader,
        Operation,
        Refuse,
        RemoveRecipient,
        ReplaceBody,
        Rewrite,
        Upstream,
        Verdict,
    )

_HOMES = {
    "facts": "EvaluationError Expression Fact FactValue Phase Scope",
    "macros": "connect_macros helo_macros mail_macros rcpt_macros refused_rcpt_macros",
    "message": "Message NewBody",
    "protocol.headers": "Header HeaderField",
    "protocol.sasl": "Certificate Digest Exchange Password Token",
    "protocol.smtp": "Reply domain_of",
    "session": "Client Listener Recipient Session Transaction",
    "stage": "Attempt Kind Outcome Peer SaslStep Settings Stage Worker",
    "state.keys": "client_key network_key",
    "state.store": "Hit Lease Store Window",
    "tables": "ListFile NameTable NetworkTable",
    "values": (
        "Cidr CidrList Condition Duration ExistingFile PathValue Percent PoolReference Rate Secret Size "
        "TextExpression"
    ),
    "verdicts": (
        "AddHeader AddRecipient Allow AppendHeader Authenticated Cause ChangeHeader ChangeSender "
        "DeleteHeader Discard Edit Edits Hold InsertHeader Operation Refuse RemoveRecipient ReplaceBody "
        "Rewrite Upstream Verdict"
    ),
    "upstream.http": "HttpClient HttpError",
    "upstream.milter": "FilterAddress FilterConnection FilterLost FilterTimeouts",
}
_HOME = {name: f"gateway.{module}" for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Each name is imported when it is first used: a command that needs few of them starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "AddHeader", "AddRecipient", "Allow", "AppendHeader", "Attempt", "Authenticated", "Cause", "Certificate",
    "ChangeHeader", "ChangeSender", "Cidr", "CidrList", "Client", "Condition", "DeleteHeader", "Digest", "Discard",
    "Duration", "Edit", "Edits", "EvaluationError", "Exchange", "ExistingFile", "Expression", "Fact", "FactValue",
    "FilterAddress", "FilterConnection", "FilterLost", "FilterTimeouts", "Header", "HeaderField", "Hit", "Hold",
    "HttpClient", "HttpError", "InsertHeader", "Kind", "Lease", "ListFile", "Listener", "Message", "NameTable",
    "NetworkTable", "NewBody", "Operation", "Outcome", "Password", "PathValue", "Peer", "Percent", "Phase",
    "PoolReference", "Rate", "Recipient", "Refuse", "RemoveRecipient", "ReplaceBody", "Reply", "Rewrite", "SaslStep",
    "Scope", "Secret", "Session", "Settings", "Size", "Stage", "Store", "TextExpression", "Token", "Transaction",
    "Upstream", "Verdict", "Window", "Worker", "client_key", "connect_macros", "domain_of", "helo_macros",
    "mail_macros", "network_key", "rcpt_macros", "refused_rcpt_macros",
]  # fmt: skip
