"""The relay rule: which recipients pass without a login."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway import Cause, Refuse
from gateway.testing.stages import build, make_recipient, make_session
from stages.recipient_domains import RecipientDomains


@pytest.mark.parametrize(
    ("recipient", "taken"),
    [
        ("a@example.org", True),
        ("a@EXAMPLE.org", True),
        ("a@sub.example.org", False),
        ("a@x.wild.test", True),
        ("a@y.x.wild.test", True),
        ("a@wild.test", False),
        ("a@evilwild.test", False),
        ("a@else.test", False),
        ("Postmaster", True),
        ("postmaster@else.test", False),
        ("a", False),
        ("a@[192.0.2.25]", False),
        ("a%else.test@example.org", False),
        ("else.test!a@example.org", False),
        ('"a@else.test"@example.org', False),
        ("a@else.test@example.org", False),
        ("a@example.org.", False),
    ],
)
def test_without_login_only_our_domains(recipient: str, taken: bool) -> None:
    stage = build(RecipientDomains, ["Example.org", ".wild.test"])
    session = make_session()
    refuse = stage.rcpt(session, make_recipient(session, recipient))
    assert refuse is None if taken else isinstance(refuse, Refuse) and refuse.cause is Cause.RELAY_DENIED


def test_a_login_may_write_to_anybody_but_trust_is_no_login() -> None:
    stage = build(RecipientDomains, ["example.org"])
    for session, taken in ((make_session(user="alice"), True), (make_session(trusted=True), False)):
        assert (stage.rcpt(session, make_recipient(session, "a@else.test")) is None) is taken


def test_a_file_is_reread_and_adds_to_the_inline_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "domains"
    path.write_text("one.test\n")
    monkeypatch.setattr("gateway.tables.CHECK_INTERVAL", 0.0)
    stage = build(RecipientDomains, {"domains": ["example.org"], "file": "domains"}, folder=tmp_path)
    session = make_session()

    def taken() -> list[bool]:
        addresses = ("a@example.org", "a@one.test", "a@two.test")
        return [stage.rcpt(session, make_recipient(session, address)) is None for address in addresses]

    assert taken() == [True, True, False]
    path.write_text("two.test\n")
    os.utime(path, (1, 1))
    assert taken() == [True, False, True]


def test_it_counts_for_the_relay_guard() -> None:
    assert RecipientDomains.limits_recipients
    assert RecipientDomains.never_pass


@pytest.mark.parametrize("wrong", [{}, [], ["localhost"], ["a@example.org"], ["exa mple.org"], {"file": "none"}])
def test_wrong_settings(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        build(RecipientDomains, wrong, folder=tmp_path)
