"""Senders of logged-in users: own address, mapped addresses, nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway import Cause
from gateway.testing.stages import build, make_session, make_transaction
from stages.sender_login import SenderLogin

MAP = {"Alice@Example.org": ["Sales@example.org", "@news.example.org"], "demo": ["demo@example.org"]}


@pytest.mark.parametrize(
    ("settings", "user", "sender", "cause"),
    [
        (None, "alice@example.org", "Alice@Example.ORG", None),
        (None, "alice@example.org", "bob@example.org", Cause.SENDER_DENIED),
        (None, "alice", "alice@example.org", Cause.SENDER_DENIED),
        (None, "", "bob@example.org", None),
        ({"required": True}, "", "bob@example.org", Cause.AUTH_REQUIRED),
        (None, "alice@example.org", "", None),
        ({"null_sender": False}, "alice@example.org", "", Cause.SENDER_DENIED),
        ({"map": MAP}, "alice@example.org", "sales@EXAMPLE.org", None),
        ({"map": MAP}, "alice@example.org", "any@news.example.org", None),
        ({"map": MAP}, "alice@example.org", "any@sub.news.example.org", Cause.SENDER_DENIED),
        ({"map": MAP}, "alice@example.org", "alice@example.org", None),
        ({"map": MAP, "same_address": False}, "alice@example.org", "alice@example.org", Cause.SENDER_DENIED),
        ({"map": MAP}, "demo", "demo@example.org", None),
        ({"map": MAP}, "bob@example.org", "sales@example.org", Cause.SENDER_DENIED),
        ({"file": "senders"}, "carol", "c@example.org", None),
        ({"file": "senders"}, "carol", "carol@shop.example", None),
        ({"file": "senders"}, "carol", "x@example.org", Cause.SENDER_DENIED),
    ],
)
def test_whose_sender_is_whose(
    tmp_path: Path, settings: dict[str, object] | None, user: str, sender: str, cause: Cause | None
) -> None:
    (tmp_path / "senders").write_text("# user, addresses\nCarol c@example.org, @Shop.Example\n")
    stage = build(SenderLogin, settings, folder=tmp_path)
    session = make_session(user=user)
    refuse = stage.mail(session, make_transaction(session, sender))
    assert (refuse.cause if refuse else None) is cause


@pytest.mark.parametrize(
    "wrong",
    [
        {"same_address": False},
        {"map": {"a": ["example.org"]}},
        {"map": {"a": ["a@"]}},
        {"file": "none"},
        {"file": "broken"},
    ],
)
def test_wrong_settings(wrong: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("alice\n")
    with pytest.raises(ValidationError):
        build(SenderLogin, wrong, folder=tmp_path)
