"""Access lists: which entry decides, in which phase, and files that change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway import Allow, Cause, Kind, Refuse
from gateway.testing.stages import build, make_recipient, make_session, make_transaction
from stages.access import Access


def decision(verdict: Refuse | Allow | None) -> str:
    if isinstance(verdict, Refuse):
        assert verdict.cause is Cause.ACCESS_DENIED
        return verdict.text or "deny"
    return "allow" if isinstance(verdict, Allow) else "-"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", "deny"),
        ("10.9.9.9", "allow"),
        ("10.9.9.1", "go away"),
        ("192.0.2.1", "deny"),
        ("198.51.100.1", "-"),
        ("2001:db8::1", "deny"),
    ],
)
def test_the_longest_prefix_of_all_lists_decides(address: str, expected: str) -> None:
    stage = build(
        Access,
        {
            "deny": ["10.0.0.0/8", "10.9.9.1 go away", "192.0.2.0/24", "2001:db8::/32"],
            "allow": ["10.9.0.0/16", "192.0.2.0/24"],
        },
    )
    assert decision(stage.connect(make_session(address=address))) == expected


@pytest.mark.parametrize(
    ("sender", "expected"),
    [
        ("bad@example.org", "deny"),
        ("Good@Example.org", "allow"),
        ("good@sub.example.org", "deny"),
        ("abuse@anything.test", "allow"),
        ("", "no bounces"),
        ("x@else.test", "-"),
    ],
)
def test_the_most_specific_name_decides(sender: str, expected: str) -> None:
    stage = build(
        Access,
        {
            "match": "sender",
            "deny": ["example.org", ".example.org", {"match": "<>", "text": "no bounces"}],
            "allow": ["good@example.org", "abuse@"],
        },
    )
    session = make_session()
    assert decision(stage.mail(session, make_transaction(session, sender))) == expected


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({"match": "client"}, ["connect"]),
        ({"match": "client", "for": "phase"}, ["mail"]),
        ({"match": "helo"}, ["helo"]),
        ({"match": "helo", "for": "phase"}, ["mail"]),
        ({"match": "sender"}, ["mail"]),
        ({"match": "recipient", "for": "phase"}, ["rcpt"]),
        ({"match": "user"}, ["mail"]),
    ],
)
def test_phases(settings: dict[str, object], phases: list[str]) -> None:
    entry = "192.0.2.0/24" if settings["match"] == "client" else "example.org"
    stage = build(Access, {**settings, "deny": [entry]})
    assert list(stage.phases()) == phases
    assert stage.first_only is (settings["match"] == "user")


def test_each_subject_is_matched_with_its_own() -> None:
    session = make_session(address="192.0.2.1", helo="Mail.Example.org", user="Alice")
    transaction = make_transaction(session, "s@sender.test")
    recipient = make_recipient(session, "r@recipient.test")

    def stage(match: str, entry: str, **more: object) -> Access:
        return build(Access, {"match": match, "deny": [entry], **more})

    assert decision(stage("helo", "example.org").helo(session, session.helo)) == "-"
    assert decision(stage("helo", ".example.org").helo(session, session.helo)) == "deny"
    assert decision(stage("helo", "mail.example.org", **{"for": "phase"}).mail(session, transaction)) == "deny"
    assert decision(stage("client", "192.0.2.1", **{"for": "phase"}).mail(session, transaction)) == "deny"
    assert decision(stage("user", "alice").mail(session, transaction)) == "deny"
    assert decision(stage("user", "alice").mail(make_session(), transaction)) == "-"
    assert decision(stage("recipient", "recipient.test").rcpt(session, recipient)) == "deny"
    assert decision(stage("recipient", "sender.test").rcpt(session, recipient)) == "-"


def test_files_hold_texts_and_are_reread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "denied"
    path.write_text("192.0.2.1 spam was seen # in May\n")
    monkeypatch.setattr("gateway.tables.CHECK_INTERVAL", 0.0)
    stage = build(Access, {"deny_file": "denied", "allow": ["192.0.2.0/24"]}, folder=tmp_path)
    session = make_session()
    assert decision(stage.connect(session)) == "spam was seen"
    path.write_text("# nobody any more\n")
    os.utime(path, (1, 1))
    assert decision(stage.connect(session)) == "allow"


def test_it_is_a_check_so_that_it_waits_for_rcpt_and_an_allow_skips_it() -> None:
    assert Access.kind is Kind.CHECK
    assert not Access.refuse_now


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({}, "lists nothing"),
        ({"deny": ["example.org"]}, "not a network"),
        ({"deny": ["10.0.0.1/8"]}, "bits set"),
        ({"match": "sender", "deny": ["a b..c"], "allow": ["x..y"]}, "not a name"),
        ({"match": "sender", "for": "session", "deny": ["a.example"]}, "client and helo"),
        ({"deny": [{"match": "10.0.0.1", "text": "schöne Grüße"}]}, "cannot stand in a reply"),
        ({"deny_file": "none"}, "no file .none."),
        ({"deny_file": "broken"}, r"broken:2: .* not a network"),
    ],
)
def test_wrong_settings(tmp_path: Path, wrong: dict[str, object], text: str) -> None:
    (tmp_path / "broken").write_text("10.0.0.0/8\nexample.org\n")
    with pytest.raises(ValidationError, match=text):
        build(Access, wrong, folder=tmp_path)
