"""How large a message may be: what is announced, what SIZE= may say, what is really sent, and for whom."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway import Cause, Session
from gateway.testing.conformance import check_stage
from gateway.testing.messages import make_message
from gateway.testing.stages import build, make_recipient, make_session, make_transaction
from stages.size_limit import SizeLimit

pytestmark = pytest.mark.anyio

RULES = {
    "max": 1000,
    "rules": [
        {"when": 'network(client.address, "198.51.100.0/24")', "max": 100},
        {"when": 'rcpt.domain == "small.example"', "max": 200},
        {"when": 'auth.domain == "studio.example"', "max": 5000},
        {"when": 'mail.from == ""', "max": 500},
    ],
}


def session(user: str = "", address: str = "192.0.2.1", protocol: str = "smtp") -> Session:
    made = make_session(address=address, user=user, helo="c")
    made.protocol = protocol
    return made


@pytest.mark.parametrize(
    ("settings", "of", "announced", "narrowed"),
    [
        (1000, session(), "9999", "1000"),
        (1000, session(), "999", "999"),
        (1000, session(), "0", "1000"),
        (1000, session(), "", "1000"),
        (RULES, session(), "9999", "5000"),
        (RULES, session("a@studio.example"), "9999", "5000"),
        (RULES, session("a@other.example"), "9999", "1000"),
        (RULES, session(address="198.51.100.1"), "9999", "100"),
    ],
)
def test_the_announced_size_is_the_largest_possible(settings: object, of: Session, announced: str, narrowed: str) -> None:
    offer = {"SIZE": announced, "DSN": ""}
    build(SizeLimit, settings).capabilities(of, offer)
    assert offer == {"SIZE": narrowed, "DSN": ""}
    without = {"DSN": ""}
    build(SizeLimit, settings).capabilities(of, without)
    assert without == {"DSN": ""}


@pytest.mark.parametrize(
    ("of", "sender", "recipient", "at_mail", "at_rcpt"),
    [
        (session(), "a@x.example", "b@x.example", 1000, 1000),
        (session(), "", "b@x.example", 500, 500),
        (session(), "a@x.example", "b@small.example", 1000, 200),
        (session("a@studio.example"), "a@x.example", "b@x.example", 5000, 5000),
        (session("a@studio.example"), "", "b@small.example", 5000, 200),
        (session(address="198.51.100.1"), "a@x.example", "b@small.example", 100, 100),
    ],
)
def test_what_size_may_say(of: Session, sender: str, recipient: str, at_mail: int, at_rcpt: int) -> None:
    stage = build(SizeLimit, RULES)
    for size in (0, at_rcpt, at_rcpt + 1, at_mail, at_mail + 1):
        transaction = make_transaction(of, sender, (("SIZE", str(size)),) if size else ())
        refused = stage.mail(of, transaction)
        assert (refused is not None) is (size > at_mail)
        assert refused is None or refused.cause is Cause.MESSAGE_TOO_BIG
        assert (stage.rcpt(of, make_recipient(of, recipient)) is not None) is (size > at_rcpt)


@pytest.mark.parametrize(
    ("of", "recipients", "size", "refused"),
    [
        (session(), ["x.example"], 1000, []),
        (session(), ["x.example"], 1001, "all"),
        (session(), ["small.example"], 200, []),
        (session(), ["small.example"], 201, "all"),
        (session(), ["x.example", "small.example"], 201, "all"),
        (session("a@studio.example"), ["x.example", "y.example"], 5000, []),
        (session(protocol="lmtp"), ["x.example", "small.example", "x.example"], 201, [1]),
        (session(protocol="lmtp"), ["x.example", "small.example"], 200, []),
        (session(protocol="lmtp"), ["x.example", "small.example"], 1001, "all"),
    ],
)
@pytest.mark.parametrize("block", [7, 65536])
async def test_what_is_sent_is_counted(
    of: Session, recipients: list[str], size: int, refused: list[int] | str, block: int
) -> None:
    make_transaction(of)
    for recipient in recipients:
        make_recipient(of, f"a@{recipient}")
    content = b"Subject: x\r\n\r\n".ljust(size - 2, b"x") + b"\r\n"
    message = make_message(of, content, block=block)
    verdict = await build(SizeLimit, RULES).message(of, message)
    if refused == "all":
        assert verdict is not None and (verdict.cause, verdict.recipients) == (Cause.MESSAGE_TOO_BIG, None)
    else:
        replies = verdict.recipients if verdict is not None and verdict.recipients else {}
        assert list(replies) == refused
        assert all(reply.code == 552 for reply in replies.values())


async def test_what_nobody_may_have_is_not_read_to_its_end() -> None:
    of = session()
    make_recipient(of)
    message = make_message(of, b"A: b\r\n\r\n" + b"x" * 100_000, block=100)
    assert await build(SizeLimit, 1000).message(of, message) is not None
    assert message.size <= 1100


async def test_an_added_recipient_cannot_be_answered() -> None:
    of = session(protocol="lmtp")
    make_recipient(of, "a@x.example")
    make_recipient(of, "b@small.example").index = -1
    verdict = await build(SizeLimit, RULES).message(of, make_message(of, b"A: b\r\n\r\n" + b"x" * 300))
    assert verdict is not None and verdict.recipients is None


@pytest.mark.parametrize("wrong", [0, "big", {"rules": []}, {"max": 1, "rules": [{"max": 1}]}])
def test_wrong_settings(wrong: object) -> None:
    with pytest.raises(ValidationError):
        build(SizeLimit, wrong)


@pytest.mark.parametrize("settings", ["25MiB", RULES, 1])
async def test_keeps_the_contract(settings: object) -> None:
    await check_stage(SizeLimit, settings)
