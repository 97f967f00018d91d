"""The stage by itself: no socket is opened, and the clock is the test's."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import ValidationError
from quiet_hours import QuietHours

from gateway import Cause, Refuse
from gateway.testing.conformance import check_stage
from gateway.testing.stages import build, make_session, make_transaction

NIGHT = {"from": "22:00", "to": "06:00"}


def asked(settings: dict[str, object], at: str, address: str = "10.20.0.1") -> tuple[Refuse | None, object]:
    """What the stage says at that time, and its fact."""
    stage = build(QuietHours, settings, id="quiet_hours")
    stage._now = lambda: datetime.fromisoformat(f"2024-05-05 {at}")
    session = make_session(address=address)
    transaction = make_transaction(session)
    return stage.mail(session, transaction), (transaction.facts or {}).get("quiet_hours.active", False)


@pytest.mark.parametrize(
    ("begin", "end", "at", "quiet"),
    [
        ("22:00", "06:00", "21:59:59", False),
        ("22:00", "06:00", "22:00:00", True),
        ("22:00", "06:00", "00:00:00", True),
        ("22:00", "06:00", "05:59:59", True),
        ("22:00", "06:00", "06:00:00", False),
        ("12:00", "13:30", "11:59:59", False),
        ("12:00", "13:30", "12:00:00", True),
        ("12:00", "13:30", "13:30:00", False),
    ],
)
def test_hours(begin: str, end: str, at: str, quiet: bool) -> None:
    refuse, active = asked({"from": begin, "to": end}, at)
    assert (refuse is not None) is quiet is active


def test_who_is_refused_and_how() -> None:
    settings: dict[str, object] = {**NIGHT, "networks": ["10.20.0.0/16"]}
    refuse, _ = asked(settings, "23:00:00")
    assert refuse == Refuse(Cause.POLICY, "no mail before 06:00", temporary=True)
    refuse, _ = asked({**settings, "answer": "reject"}, "23:00:00")
    assert refuse is not None and refuse.temporary is False
    assert asked({**settings, "answer": "none"}, "23:00:00") == (None, True)
    assert asked(settings, "23:00:00", "192.0.2.1") == (None, False)


def test_some_time_must_be_left() -> None:
    with pytest.raises(ValidationError, match="the same"):
        build(QuietHours, {"from": "22:00", "to": "22:00"})


@pytest.mark.anyio
async def test_keeps_the_contract() -> None:
    await check_stage(QuietHours, NIGHT)
