"""The greeting delay: where its clock starts, who is exempt, what an early talker gets."""

from __future__ import annotations

import pytest

from gateway import Cause, Hold, Refuse
from gateway.testing.stages import build, make_session
from stages.greeting_delay import GreetingDelay

REFUSED = Refuse(Cause.EARLY_TALKER, disconnect=True)


@pytest.mark.parametrize(
    ("listen", "connect", "greeting"),
    [
        ("smtp://192.0.2.25:25", Hold(1.0, REFUSED), None),
        ("smtps://192.0.2.25:465", None, Hold(1.0, REFUSED)),
    ],
)
def test_the_clock_starts_at_once_or_after_the_handshake(
    listen: str, connect: Hold | None, greeting: Hold | None
) -> None:
    stage = build(GreetingDelay, "1s")
    session = make_session(listen=listen)
    assert stage.connect(session) == connect
    assert stage.greeting(session) == greeting


def test_observe_only_notes_early_talkers() -> None:
    assert build(GreetingDelay, {"seconds": "250ms", "early": "observe"}).connect(make_session()) == Hold(0.25, None)


def test_exempt_clients_do_not_wait() -> None:
    stage = build(GreetingDelay, {"seconds": 1, "exempt": ["10.0.0.0/8"]})
    assert stage.connect(make_session(address="10.1.2.3")) is None
    assert stage.connect(make_session(address="192.0.2.1")) is not None
    assert stage.greeting(make_session(address="10.1.2.3", listen="smtps://192.0.2.25:465")) is None


def test_an_early_talker_is_refused_at_once_not_at_rcpt() -> None:
    assert GreetingDelay.refuse_now
