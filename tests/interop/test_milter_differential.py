"""The same filter and the same mail through Postfix's milter client and through the gateway's: what differs is listed.

One leg is a Postfix with `smtpd_milters`; the other is the gateway with its `milter` stage before a Postfix without.
Compared are, message by message: the replies to the client, what each recipient got (without trace fields), what the
filter was told, and the macros that it knew. docs/milter.md lists KNOWN_DIFFERENCES and OWN_MACROS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given

from tests.interop.conftest import StartPostfix
from tests.interop.generated_messages import (
    BODIES,
    FIELDS,
    ORDERS,
    SENDERS,
    SHAPES,
    Message,
    messages,
    strategy,
)
from tests.interop.milter_differences import ASPECTS, COUNT, Difference, compared, having
from tests.interop.milter_legs import PIPELINE, Outcome, through_gateway, through_postfix

pytestmark = [pytest.mark.peers, pytest.mark.anyio, pytest.mark.slow]

ORDER = ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom", "abort", "close"]

KNOWN_DIFFERENCES = (
    Difference(
        "fields that Postfix drops",
        frozenset({"events"}),
        having("fields that Postfix drops"),
        "Postfix removes Bcc, Content-Length and Return-Path before filters see them (message_drop_headers).",
    ),
    Difference(
        "EHLO again",
        frozenset({"events", "macros"}),
        lambda message: message.greets_again,
        "The gateway connects to a filter at the first MAIL, and tells it the last EHLO only; all of them with "
        "`connect: early`.",
    ),
    Difference(
        "discarded mail",
        frozenset({"replies"}),
        lambda message: any(trait.startswith("discard") for trait in message.traits)
        or any(recipient.startswith("discard-") for recipient in message.recipients),
        "The gateway answers 250 to mail that it throws away only with `discard: accept`.",
    ),
    Difference(
        "recipient added twice",
        frozenset({"stored"}),
        having("same recipient"),
        "When a filter adds a recipient that is there already, Postfix delivers two copies to it; the gateway does "
        "not add it again.",
    ),
    Difference(
        "quarantine",
        frozenset({"replies"}),
        having("quarantine"),
        "Postfix holds the message in its queue and asks no later filter; the gateway has no queue: it refuses, or "
        "does what `quarantine` says, and later filters are asked.",
    ),
)

KNOWN_OF_BDAT = (
    Difference(
        "odd first line by BDAT",
        frozenset(ASPECTS),
        having("from line", "quoted from line", "begins with a blank"),
        "By BDAT, Postfix takes a first line `From ` for the end of the header, and drops a first line that begins "
        "with a blank; the gateway reads content the same however it comes, as Postfix does by DATA.",
    ),
)

@pytest.fixture(scope="module")
def mail() -> list[Message]:
    return messages(COUNT)


async def test_postfix_and_the_filter_agree_with_the_orders(start_postfix: StartPostfix, mail: list[Message]) -> None:
    """The Postfix leg by itself: what was accepted is stored, and what the orders ask for arrives."""
    found = await through_postfix(start_postfix, mail)
    lost = having("quarantine", *(trait for message in mail for trait in message.traits if trait.startswith("discard")))
    for message in mail:
        outcome = found[message.number]
        accepted = len(outcome.replies) == 2 + len(message.recipients) and outcome.replies[-1] == "250"
        if lost(message) or any(recipient.startswith("discard-") for recipient in message.recipients):
            assert not outcome.stored, message
        else:
            assert bool(outcome.stored) == accepted, message
        names = [str(event[0]) for event in outcome.events]
        assert names == sorted(names, key=ORDER.index), message
        if message.traits == {"usual", "text"} and "eom" in names:
            body = message.content.partition(b"\r\n\r\n")[2].decode("latin-1")
            assert outcome.events[names.index("body")] == ("body", body)
    # every order and every verdict left its mark
    by_trait = {trait: found[message.number] for message in reversed(mail) for trait in message.traits}
    own = {trait: message for message in reversed(mail) for trait in message.traits}
    for trait, expected in {
        "insert at 0": b"X-Inserted: before it\nX-Inserted: first\n",
        "insert at 1": b"X-Inserted: before it\nX-Inserted: first\n",
        "add folded": b"X-Added: one,\n\ttwo\n three\n\n",
        "body": b"\n\nnew\n.body\n",
        "large body": b"%062d\n" % 2047,
        "change received": b"Received: altered\n",
        "longer lines": b"\n.zzz",
        "eight-bit": bytes(range(128, 256)),
    }.items():
        [(_, content)] = next(iter(by_trait[trait].stored.values()))
        assert expected in content, (trait, content[:1000])
    assert {copies[0][0] for copies in by_trait["sender"].stored.values()} == {"new@x.test"}
    assert {copies[0][0] for copies in by_trait["null sender"].stored.values()} == {""}
    number = own["remove"].number
    assert f"m{number}@local.test" not in by_trait["remove"].stored
    assert f"m{number}-new@local.test" in by_trait["remove"].stored
    assert by_trait["reject at the end"].replies[-1] == "550 5.7.1 refused as asked"


def test_messages_are_the_same_at_each_run(mail: list[Message]) -> None:
    assert mail == messages(COUNT)
    traits = frozenset[str]().union(*(message.traits for message in mail))
    assert traits == {*SHAPES, *FIELDS, *BODIES, *ORDERS, *SENDERS}
    numbers = [re.findall(r"\bm(\d+)", recipient) for message in mail for recipient in message.recipients]
    assert numbers == [[str(message.number)] for message in mail for _ in message.recipients]


@given(strategy())
def test_messages_have_whole_line_ends(message: Message) -> None:
    assert b"\0" not in message.content
    assert message.content.count(b"\r") == message.content.count(b"\n") == message.content.count(b"\r\n")


async def test_postfix_leg_is_the_same_at_each_run(start_postfix: StartPostfix) -> None:
    some = messages(COUNT)[::7]
    one, other = await through_postfix(start_postfix, some), await through_postfix(start_postfix, some)
    assert compared(some, one, other, ()) == ([], set())


def test_the_comparison_tells_differences() -> None:
    some = messages(3)
    one = {message.number: Outcome(["250"], {}, [("mail", "a")]) for message in some}
    other = {message.number: Outcome(["250"], {}, [("mail", "a")]) for message in some}
    other[1].replies = ["550"]
    other[2].events.append(("rcpt", "b"))
    known = (Difference("one", frozenset({"replies"}), lambda message: message.number in (1, 2), "why"),)
    unexplained, seen = compared(some, one, other, known)
    assert seen == {"one"} and len(unexplained) == 1 and "message 2" in unexplained[0]


OPTIONS = [
    ["leading_space"],
    ["rcpt_rej", "skip"],
    ["noreply:header", "noreply:eoh", "noreply:body"],
    ["nocallback:header", "nocallback:body"],
]


async def test_gateway_differs_from_postfix_as_listed(start_postfix: StartPostfix, mail: list[Message]) -> None:
    one, other = await through_postfix(start_postfix, mail), await through_gateway(start_postfix, mail)
    unexplained, seen = compared(mail, one, other, KNOWN_DIFFERENCES)
    assert not unexplained, f"{len(unexplained)} differences\n" + "\n".join(unexplained[:20])
    assert seen == {each.name for each in KNOWN_DIFFERENCES}, "a difference is listed that there is not"


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
async def test_gateway_agrees_on_options_as_postfix(
    start_postfix: StartPostfix, mail: list[Message], options: list[str]
) -> None:
    same = [message for message in mail if not any(each.holds(message) for each in KNOWN_DIFFERENCES)]
    large = having("one chunk", "one chunk and an octet", "one long line", "large")
    some = [message for number, message in enumerate(same) if number % 4 == 0 or large(message)]
    one = await through_postfix(start_postfix, some, *options)
    other = await through_gateway(start_postfix, some, *options)
    assert_same(some, one, other)


WAYS = {
    "spool: always": PIPELINE.replace("stages:", "spool: always\nstages:"),
    "BDAT to Postfix": PIPELINE.replace("]}}", "], bdat: true}}"),
    "both": PIPELINE.replace("stages:", "spool: always\nstages:").replace("]}}", "], bdat: true}}"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bdat", [False, True], ids=["DATA", "BDAT"])
async def test_gateway_agrees_however_the_content_comes_and_goes(
    start_postfix: StartPostfix, mail: list[Message], bdat: bool, way: str
) -> None:
    start = list(WAYS).index(way)  # each way has messages of its own
    some = [message for message in mail if not any(each.holds(message) for each in KNOWN_DIFFERENCES)][start::3]
    one = await through_postfix(start_postfix, some, bdat=bdat)
    other = await through_gateway(start_postfix, some, pipeline=WAYS[way], bdat=bdat)
    unexplained, seen = compared(some, one, other, KNOWN_OF_BDAT if bdat else ())
    assert not unexplained, f"{len(unexplained)} differences\n" + "\n".join(unexplained[:20])
    assert bool(seen) == bdat


async def test_macros_that_a_filter_asks_for_are_the_same(start_postfix: StartPostfix, mail: list[Message]) -> None:
    spelled = [
        replace(mail[0], sender=sender, recipients=(recipient,), parameters=parameters)
        for sender, recipient, parameters in [
            ("M0.Sender@X.Test", "M0-Some@Local.TEST", ""),
            ('"m 0"@x.test', '"m0 other"@local.test', " BODY=8BITMIME"),
            ("m0@[192.0.2.1]", "m0+x@local.test", " SIZE=10"),
        ]
    ]
    some = [replace(message, number=number) for number, message in enumerate(spelled)]
    some = [replace(one, recipients=tuple(r.replace("0", str(one.number)) for r in one.recipients)) for one in some]
    asked = [
        "macros:connect={client_addr},{client_name},{client_ptr},{client_resolve},{daemon_name}",
        "macros:helo={tls_version},{cipher},{verify},{client_addr},j",
        "macros:mail={mail_addr},{mail_host},{mail_mailer},{auth_type},{client_name}",
        "macros:rcpt={rcpt_addr},{rcpt_host},{mail_addr},{auth_author},_",
        "macros:eom={mail_addr},{rcpt_addr},{client_addr},{auth_authen},{daemon_addr}",
    ]
    one = await through_postfix(start_postfix, some, *asked)
    other = await through_gateway(start_postfix, some, *asked)
    assert_same(some, one, other)


def assert_same(mail: Sequence[Message], one: dict[int, Outcome], other: dict[int, Outcome]) -> None:
    """Nothing differs, known or not."""
    unexplained, _ = compared(mail, one, other, ())
    assert not unexplained, f"{len(unexplained)} differences\n" + "\n".join(unexplained[:20])
