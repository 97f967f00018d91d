"""Conditions and expressions over the fact table: what they give, and what is said of those that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway import EvaluationError, Expression, Fact, Phase, Scope
from gateway.facts import BUILT_IN, FactType
from gateway.pipeline.conditions import FUNCTIONS, ConditionError, Conditions
from gateway.testing.stages import TLS, make_recipient, make_session, make_transaction

LISTS = {"paid": {"tim@example.org"}}
OWN = (
    Fact("score.value", "int", 0, Phase.CONNECT, Scope.SESSION, ""),
    Fact("score.share", "double", 0.5, Phase.MAIL, Scope.TRANSACTION, ""),
)
conditions = Conditions([*BUILT_IN, *OWN], lambda name, text: text.lower() in LISTS.get(name, ()))


def compiled(text: str, result: FactType = "bool") -> Expression:
    expression = Expression(text, result)
    conditions.compile(expression)
    return expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ('network(client.address, "192.0.2.0/24")', True),
        ('network(client.address, "2001:db8::/32")', False),
        ('network(client.address, "nonsense")', False),
        ('network("2001:db8::1", "2001:db8::/32")', True),
        ('network("", "0.0.0.0/0")', False),
        ('domain(mail.from) == "example.org"', True),
        ('domain("postmaster") == ""', True),
        ('domain("\\"a@b\\"@Example.ORG") == "example.org"', True),
        ('local("\\"a@b\\"@example.org") == "\\"a@b\\""', True),
        ('local("postmaster") == "postmaster"', True),
        ('lower("ÄB") == "äb"', True),
        ('listed("paid", auth.user) && !listed("paid", "eve@example.org")', True),
        ('listed("paid", "TIM@example.org")', True),
        ('auth.domain == "example.org" && auth.trusted', True),
        ('rcpt.domain.endsWith(".net") || rcpt.to.startsWith("x")', True),
        ("mail.size > 0 ? mail.size < 1000 : true", True),
        ("tls.active && !tls.verified && tls.version == 'TLSv1.3'", True),
        ("client.port > 0 && mail.recipients == 1", True),
        ("score.value == 0 && score.share < 0.6", True),
        ('client.name.matches("^mx[0-9]+[.]")', False),
        ('"mail.nonsense" == "mail.nonsense"', True),
    ],
)
def test_conditions(text: str, value: bool) -> None:
    session = make_session(address="192.0.2.7", user="Tim@example.org", tls=TLS)
    transaction = make_transaction(session, "a@example.org", (("SIZE", "500"),))
    recipient = make_recipient(session, "b@example.net")
    assert compiled(text).evaluate(session, transaction, recipient) is value


def test_facts_that_stages_set_are_read_where_they_live() -> None:
    session = make_session()
    transaction = make_transaction(session)
    session.facts = {"score.value": 7}
    transaction.facts = {"score.share": 0.25}
    assert compiled("score.value == 7 && score.share == 0.25").evaluate(session, transaction) is True
    assert compiled("score.share", "double").evaluate(session) == 0.5, "outside of a transaction: the default"


@pytest.mark.parametrize(
    ("text", "result", "value"),
    [
        ("client.address", "string", "192.0.2.1"),
        (" auth.user ", "string", "tim@example.org"),
        ('auth.user + "/" + client.address', "string", "tim@example.org/192.0.2.1"),
        ("mail.size * 2", "int", 0),
        ("domain(auth.user)", "string", "example.org"),
    ],
)
def test_expressions_of_other_types(text: str, result: FactType, value: object) -> None:
    assert compiled(text, result).evaluate(make_session(user="tim@example.org")) == value


@pytest.mark.parametrize(
    ("text", "names", "phase", "scope"),
    [
        ("true", (), Phase.CONNECT, Scope.SESSION),
        ("client.address == '192.0.2.1'", ("client.address",), Phase.CONNECT, Scope.SESSION),
        ("tls.active || helo.name == ''", ("tls.active", "helo.name"), Phase.HELO, Scope.SESSION),
        ("!auth.trusted", ("auth.trusted",), Phase.AUTH, Scope.SESSION),
        ("mail.size > 0 && auth.user == mail.from", ("mail.size", "auth.user", "mail.from"), Phase.MAIL,
         Scope.TRANSACTION),
        ("mail.recipients > 1", ("mail.recipients",), Phase.RCPT, Scope.TRANSACTION),
        ("rcpt.to == 'mail.from' && tls.active", ("rcpt.to", "tls.active"), Phase.RCPT, Scope.RECIPIENT),
        ('"tls.active" == client.address', ("client.address",), Phase.CONNECT, Scope.SESSION),
        ("client.name_status == client.name", ("client.name_status", "client.name"), Phase.CONNECT, Scope.SESSION),
    ],
)  # fmt: skip
def test_says_what_it_reads_and_from_when(text: str, names: tuple[str, ...], phase: Phase, scope: Scope) -> None:
    expression = Expression(text)
    assert conditions.compile(expression) == names
    assert (expression.phase, expression.scope) == (phase, scope)


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("client.adress == 'x'", 1, "undeclared reference to 'client.adress'"),
        ("tls.active && client.adress == 'x'", 15, "undeclared reference to 'client.adress'"),
        ("'client.adress' == client.adress", 20, "undeclared reference to 'client.adress'"),
        ("nope", 1, "undeclared reference to 'nope'"),
        ("client.address == 'ä' && nope", 26, "undeclared reference to 'nope'"),
        ("tls.active &&\n  nope", 17, "undeclared reference to 'nope'"),
        ("networks(client.address, '::/0')", 1, "undeclared reference to 'networks'"),
        ("tls.active && network(client.address)", 15, "network is written network(address, cidr)"),
        ("client.port == 'x'", 13, "'(int, string)'"),
        ("!auth.user", 1, "'(string)'"),
        ("client.address ==", 18, "Syntax error"),
        ("", 1, "Syntax error"),
        ("client.address = 'x'", 16, "Syntax error"),
        ("mail.size", 1, "gives int, not bool"),
        ("client.address", 1, "gives string, not bool"),
    ],
)
def test_says_where_it_is_wrong(text: str, column: int, said: str) -> None:
    with pytest.raises(ConditionError) as caught:
        conditions.compile(Expression(text))
    assert said in caught.value.text
    assert caught.value.column == column


def test_what_is_wrong_passes_through_a_context_manager() -> None:
    """Which sets the traceback of what is raised through it."""

    @contextmanager
    def checking() -> Iterator[None]:
        yield

    with pytest.raises(ConditionError, match="undeclared reference to 'nope'") as caught, checking():
        conditions.compile(Expression("tls.active && nope"))
    assert (caught.value.column, caught.value.unknown) == (15, "nope")


def test_the_result_has_the_type_of_the_setting() -> None:
    with pytest.raises(ConditionError, match="gives bool, not string"):
        compiled("tls.active", "string")
    with pytest.raises(ConditionError, match="gives int, not string"):
        compiled("mail.size", "string")


@pytest.mark.parametrize("text", ["mail.size / mail.recipients > 1", 'auth.user.matches("(")'])
def test_no_value_is_an_error_not_false(text: str) -> None:
    session = make_session()
    with pytest.raises(EvaluationError):
        compiled(text).evaluate(session, make_transaction(session))


def test_lists_that_are_named() -> None:
    assert conditions.tables("""listed("paid", auth.user) || listed( 'free',rcpt.to) || listed(auth.user, "x")""") == (
        "paid",
        "free",
    )


def test_every_fact_has_a_value_of_its_type_from_the_start() -> None:
    types: dict[FactType, type] = {"string": str, "int": int, "bool": bool, "double": float}
    for fact in BUILT_IN:
        assert fact.get is not None and fact.help
        value = fact.get(make_session(), None, None)
        assert type(value) is types[fact.type] is type(fact.default), fact.name


def test_functions_are_described() -> None:
    assert all(function.help.endswith(".") and function.arguments for function in FUNCTIONS.values())
