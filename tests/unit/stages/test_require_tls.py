"""TLS enforcement: what is refused in clear text, what is offered, which phases that needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from gateway import Cause, Refuse
from gateway.testing.stages import TLS, build, make_session
from stages.require_tls import RequireTls


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        (None, ["auth", "mail"]),
        (["mail"], ["mail"]),
        ({"for": ["auth"]}, ["auth"]),
        ({"for": ["auth"], "client_certificate": "required"}, ["secure", "auth"]),
    ],
)
def test_only_what_is_named_is_asked(settings: object, phases: list[str]) -> None:
    assert list(build(RequireTls, settings).phases()) == phases


def test_clear_text_is_refused_and_tls_is_not() -> None:
    stage = build(RequireTls)
    assert stage.auth(make_session()) == stage.mail(make_session()) == Refuse(Cause.TLS_REQUIRED)
    assert stage.auth(make_session(tls=TLS)) is stage.mail(make_session(tls=TLS)) is None


@pytest.mark.parametrize(
    ("settings", "tls", "offered"), [(["auth"], False, False), (["auth"], True, True), (["mail"], False, True)]
)
def test_auth_is_offered_only_where_it_would_not_be_refused(settings: object, tls: bool, offered: bool) -> None:
    offer = {"AUTH": "PLAIN", "STARTTLS": ""}
    build(RequireTls, settings).capabilities(make_session(tls=TLS if tls else None), offer)
    assert ("AUTH" in offer, "STARTTLS" in offer) == (offered, True)


def test_a_certificate_must_be_verified() -> None:
    stage = build(RequireTls, {"client_certificate": "required"})
    refuse = stage.secure(make_session(tls=replace(TLS, verify_error="self-signed certificate")))
    assert refuse == Refuse(Cause.CERTIFICATE_REQUIRED, disconnect=True, log="self-signed certificate")
    assert stage.secure(make_session(tls=replace(TLS, verified=True))) is None


def test_it_guards() -> None:
    assert RequireTls.never_pass
    assert RequireTls.first_only


@pytest.mark.parametrize("wrong", [{"for": []}, {"for": ["helo"]}, {"client_certificate": "maybe"}])
def test_wrong_settings(wrong: object) -> None:
    with pytest.raises(ValidationError):
        build(RequireTls, wrong)
