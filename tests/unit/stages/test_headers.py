"""Rules over header fields: what each makes of a message, for whom, and what the sender cannot make of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway import AddHeader, Cause, Edit, Fact, Phase, Refuse, Scope, Session
from gateway.testing.conformance import check_stage
from gateway.testing.messages import edited, make_message
from gateway.testing.stages import build, make_recipient, make_session, make_transaction
from stages.headers import Headers

pytestmark = pytest.mark.anyio

HEADER = (
    b"Received: from b\r\nReceived: from a\r\nX-Spam-Flag: YES\r\nx-spam-score: 5\r\n"
    b"Subject: =?utf-8?q?=C3=BC?=\r\n\tand more\r\nBcc: c@example.net\r\n"
)
CONTENT = HEADER + b"\r\nX-Spam-Flag: body\r\n"


def session(user: str = "", address: str = "192.0.2.1") -> Session:
    made = make_session(address=address, helo="client.example", user=user)
    make_recipient(made)
    return made


async def made(rules: object, content: bytes = CONTENT) -> bytes:
    """What the rules make of the message."""
    stage, of = build(Headers, rules), session()
    assert list(stage.phases()) == ["message"]
    message = make_message(of, content)
    assert stage.edits(message.transaction) == "head"
    verdict = await stage.message(of, message)
    if verdict is None:
        return content
    assert isinstance(verdict, Edit) and verdict.operations
    return edited(content, verdict)


@pytest.mark.parametrize(
    ("rules", "old", "new"),
    [
        ([{"delete": "x-SPAM-*"}], b"X-Spam-Flag: YES\r\nx-spam-score: 5\r\n", b""),
        ([{"delete": "bcc"}], b"Bcc: c@example.net\r\n", b""),
        ([{"delete": "X-None"}], b"", b""),
        ([{"delete": "Received", "occurrence": 1}], b"Received: from b\r\n", b""),
        ([{"delete": "Received", "occurrence": -1}], b"Received: from a\r\n", b""),
        ([{"delete": "Received", "occurrence": -3}], b"", b""),
        ([{"delete": "Received", "occurrence": 3}], b"", b""),
        ([{"delete": "*", "matches": "from|YES"}], HEADER[: HEADER.index(b"x-spam-score")], b""),
        ([{"delete": "Received", "matches": "from [ab]", "occurrence": 2}], b"Received: from a\r\n", b""),
        ([{"change": "X-Spam-*", "value": "no"}], b"YES\r\nx-spam-score: 5", b"no\r\nx-spam-score: no"),
        ([{"change": "X-None", "value": "no"}], b"", b""),
        ([{"change": "Received", "expression": "client.address"}], b"from b\r\nReceived: from a",
         b"192.0.2.1\r\nReceived: 192.0.2.1"),
        ([{"change": "Received", "matches": "from (a|x)", "with": r"by \1"}], b"from a", b"by a"),
        ([{"change": "Subject", "matches": "^", "with": "[EXT] "}], b"=?utf-8?q?=C3=BC?=\r\n\tand more",
         b"[EXT] =?utf-8?q?=C3=BC?=\tand more"),
        ([{"change": "Subject", "matches": r"(?i)^(?!=\?UTF)", "with": "[EXT] "}], b"", b""),
        ([{"change": "Subject", "matches": "and", "with": "and"}], b"", b""),
        ([{"rename": "Subject", "to": "X-Subject"}], b"Subject", b"X-Subject"),
        ([{"rename": "Received", "to": "X-Received"}], b"Received: from b\r\nReceived", b"X-Received: from b\r\nX-Received"),
        ([{"rename": "X-Spam-*", "to": "X-Spam-Old"}, {"delete": "X-Spam-Old", "occurrence": 2}],
         b"X-Spam-Flag: YES\r\nx-spam-score: 5\r\n", b"X-Spam-Old: YES\r\n"),
        ([{"append": "X-End", "value": "1"}, {"append": "X-End", "value": "2"}, {"change": "X-End", "value": "3",
           "occurrence": 1}], b"Bcc: c@example.net\r\n", b"Bcc: c@example.net\r\nX-End: 3\r\nX-End: 2\r\n"),
        ([{"insert": "X-In", "index": 2, "value": "1"}], b"X-Spam-Flag", b"X-In: 1\r\nX-Spam-Flag"),
        ([{"insert": "X-In", "value": "1"}, {"delete": "Received", "occurrence": 1}], b"Received: from b", b"X-In: 1"),
        ([{"add": "X-A", "value": "1"}, {"delete": "X-*"}, {"add": "X-B", "expression": "'b' + helo.name"}],
         HEADER[: HEADER.index(b"Subject")],
         b"X-A: 1\r\nX-B: bclient.example\r\nReceived: from b\r\nReceived: from a\r\n"),
    ],
)  # fmt: skip
async def test_rules(rules: object, old: bytes, new: bytes) -> None:
    assert HEADER.count(old) == 1 or not old, "the case says where the change is"
    assert await made(rules) == (CONTENT.replace(old, new, 1) if old else CONTENT)


async def test_long_values_are_folded_where_they_have_blanks() -> None:
    content = b"Subject: " + b"word " * 30 + b"end\r\n\r\n"
    new = await made([{"change": "Subject", "matches": "^word", "with": "first"}], content)
    lines = new.split(b"\r\n")[:-2]
    assert len(lines) == 3 and max(map(len, lines)) <= 78
    assert b"".join(lines) == content.replace(b"word", b"first", 1).removesuffix(b"\r\n\r\n")
    unbroken = b"X: " + b"y" * 200 + b"\r\n\r\n"
    assert await made([{"change": "X", "matches": "^", "with": "z"}], unbroken) == unbroken.replace(b"y", b"zy", 1)


@pytest.mark.parametrize(
    ("when", "user", "recipients", "holds"),
    [
        ("auth.trusted", "", ["a@example.net"], False),
        ("auth.trusted", "tim", ["a@example.net"], True),
        ('rcpt.domain == "example.net"', "", ["a@example.org", "b@example.net"], True),
        ('rcpt.domain == "example.net"', "", ["a@example.org"], False),
        ('mail.from == "sender@example.org"', "", [], True),
        ("scores.spam > 5", "", [], True),
        ("scores.spam > 6", "", [], False),
    ],
)
async def test_a_rule_has_a_condition(when: str, user: str, recipients: list[str], holds: bool) -> None:
    fact = Fact("scores.spam", "int", 0, Phase.MESSAGE, Scope.TRANSACTION, "Score.")
    stage = build(Headers, [{"delete": "Bcc", "when": when}, {"delete": "X-None"}], facts=[fact])
    of = make_session(user=user)
    transaction = make_transaction(of)
    transaction.facts = {"scores.spam": 6}
    for recipient in recipients:
        make_recipient(of, recipient)
    verdict = await stage.message(of, make_message(of, CONTENT))
    assert (verdict is not None) is holds


@pytest.mark.parametrize(
    ("rules", "phases"),
    [
        ([{"add": "X", "value": "1"}], ["data"]),
        ([{"add": "X", "expression": "client.address", "when": "mail.recipients > 1"}], ["data"]),
        ([{"add": "X", "expression": "rcpt.to"}, {"add": "Y", "value": "1"}], ["data"]),
        ([{"add": "X", "value": "1"}, {"append": "Y", "value": "1"}], ["message"]),
        ([{"insert": "X", "value": "1"}], ["message"]),
        ([{"add": "X", "value": "1", "when": "scores.spam > 5"}], ["message"]),
    ],
)
def test_fields_in_front_need_no_content(rules: object, phases: list[str]) -> None:
    fact = Fact("scores.spam", "int", 0, Phase.MESSAGE, Scope.TRANSACTION, "Score.")
    assert list(build(Headers, rules, facts=[fact]).phases()) == phases


def in_front(verdict: Edit | None) -> list[str]:
    assert verdict is not None
    fields = [one for one in verdict.operations if isinstance(one, AddHeader)]
    assert fields == verdict.operations
    return [f"{one.name}: {one.value}" for one in fields]


async def test_fields_in_front_at_data() -> None:
    stage = build(Headers, [
        {"add": "X-Client", "expression": "client.address"},
        {"add": "X-User", "expression": "auth.user", "when": "auth.trusted"},
        {"add": "X-Original-To", "expression": "rcpt.to"},
    ])  # fmt: skip

    def fields(of: Session) -> list[str]:
        assert of.transaction is not None
        return in_front(stage.data(of, of.transaction))

    one = session("tim")
    assert fields(one) == ["X-Client: 192.0.2.1", "X-User: tim", "X-Original-To: recipient@example.net"]
    make_recipient(one, "blind@example.net")
    assert fields(one) == ["X-Client: 192.0.2.1", "X-User: tim"], "blind copies stay blind"
    nothing = build(Headers, [{"add": "X", "value": "1", "when": "auth.trusted"}])
    assert nothing.data(session(), make_transaction(session())) is None


@pytest.mark.parametrize(
    ("smtputf8", "sender", "value"),
    [
        (False, "a\r\nX-Evil: 1@b", "a??X-Evil: 1@b"),
        (True, "a\r\nX-Evil: 1@b", "a??X-Evil: 1@b"),
        (False, "\xfc@b", "?@b"),
        (True, "\xfc@b", "\xfc@b"),
        (True, "a" * 5000, "a" * 800),
    ],
)
async def test_what_clients_choose_stays_in_bounds(smtputf8: bool, sender: str, value: str) -> None:
    of = make_session()
    transaction = make_transaction(of, sender, (("SMTPUTF8", None),) if smtputf8 else ())
    stage = build(Headers, [{"add": "X", "expression": "mail.from"}])
    assert in_front(stage.data(of, transaction)) == [f"X: {value}"]


async def test_broken_values_can_be_changed_and_renamed() -> None:
    content = b"X: a\0b\rc\r\n\td\r\n \r\n\r\n"
    assert await made([{"rename": "X", "to": "Y"}], content) == b"Y: a b c\r\n\td\r\n \r\n\r\n"
    assert await made([{"change": "X", "matches": "a", "with": "z"}], content) == b"X: z b c\td\r\n\r\n"


async def test_many_fields_cost_few_operations_or_a_refusal() -> None:
    content = b"X-Spam: 1\r\n" * 5000 + b"\r\n"
    stage = build(Headers, [{"delete": "X-*"}])
    verdict = await stage.message(session(), make_message(session(), content))
    assert isinstance(verdict, Edit) and len(verdict.operations) == 1
    stage = build(Headers, [{"change": "X-*", "value": "2"}])
    verdict = await stage.message(session(), make_message(session(), content))
    assert isinstance(verdict, Refuse) and verdict.cause is Cause.CONTENT


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({}, "no action"),
        ({"add": "X", "delete": "Y", "value": "1"}, "add and delete"),
        ({"add": "X"}, "either value or expression"),
        ({"add": "X", "value": "1", "expression": "helo.name"}, "either value or expression"),
        ({"add": "X y", "value": "1"}, "not the name of a header field"),
        ({"add": "X-*", "value": "1"}, "not the name of a header field"),
        ({"add": "X", "value": "a\r\nY: 1"}, "printable ASCII"),
        ({"add": "X", "value": "\xfc"}, "RFC 2047"),
        ({"add": "X", "value": "1", "matches": "x"}, "are for change, rename, delete"),
        ({"add": "X", "value": "1", "index": 1}, "index is for insert"),
        ({"delete": "X", "value": "1"}, "takes no value"),
        ({"delete": "X", "occurrence": 0}, "counts from 1"),
        ({"delete": "X", "matches": "("}, "not a regular expression"),
        ({"delete": "X:"}, "not the name"),
        ({"rename": "X"}, "belong together"),
        ({"change": "X"}, "or with"),
        ({"change": "X", "with": "1"}, "write matches"),
        ({"change": "X", "matches": "x", "with": r"\1"}, "invalid group reference"),
        ({"change": "X", "value": "1", "to": "Y"}, "belong together"),
        ({"change": "X", "valu": "1"}, "valu"),
    ],
)
def test_wrong_rules(rule: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build(Headers, [rule])


def test_rules_are_wanted() -> None:
    with pytest.raises(ValidationError):
        build(Headers, [])


@pytest.mark.parametrize(
    "rules",
    [
        [{"add": "X-Client", "expression": "client.address"}, {"add": "X-To", "expression": "rcpt.to"}],
        [{"delete": "X*", "when": "!auth.trusted"}, {"change": "*", "matches": "^", "with": "[EXT] "},
         {"add": "X-From", "expression": "mail.from"}, {"insert": "X-In", "value": "1", "index": 3}],
        [{"rename": "*", "to": "X-Was"}, {"append": "X-End", "value": "1"}],
    ],
)  # fmt: skip
async def test_keeps_the_contract(rules: object) -> None:
    await check_stage(Headers, rules)
