"""Routing: the first rule that holds, the default, and nothing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway import Phase, Upstream
from gateway.facts import PoolName
from gateway.pipeline.conditions import ConditionError
from gateway.testing.stages import build, make_recipient, make_session, make_transaction
from stages.route import Route

RULES = {
    "rules": [
        {"when": 'auth.domain == "vip.example"', "to": "vip"},
        {"when": 'mail.domain == "news.example"', "to": "bulk"},
        {"when": 'rcpt.domain == "local.example"', "to": "local"},
    ]
}


@pytest.mark.parametrize(
    ("user", "sender", "recipient", "pool"),
    [
        ("a@vip.example", "a@news.example", "b@local.example", "vip"),
        ("a@else.example", "a@News.example", "b@local.example", "bulk"),
        ("", "a@else.example", "b@local.example", "local"),
        ("", "", "b@else.example", "mta"),
    ],
)
def test_the_first_rule_that_holds_decides(user: str, sender: str, recipient: str, pool: str) -> None:
    stage = build(Route, {**RULES, "default": "mta"})
    session = make_session(user=user)
    make_transaction(session, sender)
    assert stage.route(session, make_recipient(session, recipient)) == Upstream(pool)


def test_without_a_default_the_next_stage_decides() -> None:
    stage = build(Route, RULES)
    session = make_session()
    assert stage.route(session, None) is None


def test_short_form_is_the_default() -> None:
    assert build(Route, "mta").route(make_session(), None) == Upstream("mta")


def test_phases_and_pools_are_there_for_the_compiler() -> None:
    stage = build(Route, {**RULES, "default": "mta"})
    assert list(stage.phases()) == ["route"]
    assert max(rule.when.phase for rule in stage.settings.rules) is Phase.RCPT
    assert isinstance(stage.settings.default, PoolName)
    assert all(isinstance(rule.to, PoolName) for rule in stage.settings.rules)


@pytest.mark.parametrize("wrong", [{}, {"rules": [{"when": "true"}]}, {"rules": [{"to": "a"}]}])
def test_wrong_settings(wrong: object) -> None:
    with pytest.raises(ValidationError):
        build(Route, wrong)


@pytest.mark.parametrize("wrong", ["auth.user", "nobody.knows == 1", "1 +"])
def test_wrong_conditions(wrong: str) -> None:
    with pytest.raises(ConditionError):
        build(Route, {"rules": [{"when": wrong, "to": "a"}]})
