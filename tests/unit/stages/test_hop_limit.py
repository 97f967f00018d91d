"""Messages that go in a circle: counted, or recognized by whom they were delivered to."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway import Cause, Refuse
from gateway.testing.conformance import check_stage
from gateway.testing.messages import make_message
from gateway.testing.stages import build, make_recipient, make_session
from stages.hop_limit import HopLimit

pytestmark = pytest.mark.anyio


async def asked(settings: object, content: bytes, *recipients: str, protocol: str = "smtp") -> Refuse | None:
    session = make_session()
    session.protocol = protocol
    for recipient in recipients or ("a@example.net",):
        make_recipient(session, recipient)
    return await build(HopLimit, settings).message(session, make_message(session, content))


@pytest.mark.parametrize(
    ("settings", "hops", "refused"),
    [(None, 49, False), (None, 50, True), (3, 2, False), (3, 3, True), ({"max": 1}, 0, False), ({"max": 1}, 1, True)],
)
async def test_hops(settings: object, hops: int, refused: bool) -> None:
    content = b"received: from x\r\n\tby y\r\n" * hops + b"X-Received: no\r\n\r\nReceived: in the body\r\n"
    verdict = await asked(settings, content)
    assert (verdict is not None) is refused
    if verdict is not None:
        assert (verdict.cause, verdict.recipients) == (Cause.LOOP, None)


@pytest.mark.parametrize(
    ("field", "recipients", "protocol", "refused"),
    [
        (b"Delivered-To: a@example.net", ["a@example.net"], "smtp", "all"),
        (b"delivered-to: <A@Example.net>", ["a@example.net"], "smtp", "all"),
        (b"Delivered-To: b@example.net", ["a@example.net"], "smtp", "none"),
        (b"X-Delivered-To: a@example.net", ["a@example.net"], "smtp", "none"),
        (b"Delivered-To: b@example.net", ["a@example.net", "b@example.net"], "smtp", "all"),
        (b"Delivered-To: b@example.net", ["a@example.net", "b@example.net"], "lmtp", "1"),
        (b"Delivered-To: a@example.net\r\nDelivered-To: b@example.net", ["a@example.net", "b@example.net"], "lmtp", "all"),
    ],
)  # fmt: skip
async def test_delivered_to(field: bytes, recipients: list[str], protocol: str, refused: str) -> None:
    content = b"Received: x\r\n" + field + b"\r\n\r\nDelivered-To: a@example.net\r\n"
    verdict = await asked({"delivered_to": True}, content, *recipients, protocol=protocol)
    match refused:
        case "none":
            assert verdict is None
        case "all":
            assert verdict is not None and (verdict.cause, verdict.recipients) == (Cause.LOOP, None)
        case _:
            assert verdict is not None and verdict.recipients is not None
            assert {index: reply.code for index, reply in verdict.recipients.items()} == {int(refused): 554}
    assert await asked(None, content, *recipients, protocol=protocol) is None, "only where it is asked for"


@pytest.mark.parametrize("wrong", [0, 1001, "many", {"max": 5, "delivered": True}])
def test_wrong_settings(wrong: object) -> None:
    with pytest.raises(ValidationError):
        build(HopLimit, wrong)


@pytest.mark.parametrize("settings", [None, {"max": 1, "delivered_to": True}])
async def test_keeps_the_contract(settings: object) -> None:
    await check_stage(HopLimit, settings)
