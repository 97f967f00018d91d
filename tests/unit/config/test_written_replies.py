"""`replies:`: other words for our own replies, never another meaning."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway.config.models import WrittenReplies


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        ("smtp", "auth_failed", "235 2.7.0 Ok"),
        ("smtp", "upstream_lost", "250 2.0.0 Ok"),
        ("smtp", "no_recipients", "354 go ahead"),
        ("imap", "auth_failed", "OK welcome"),
        ("imap", "upstream_down", "* OK later"),
        ("imap", "sasl_malformed", "+ go on"),
        ("pop3", "login_refused", "+OK"),
    ],
)
def test_no_refusal_reads_as_success(family: str, name: str, text: str) -> None:
    with pytest.raises(ValidationError, match="no refusal"):
        WrittenReplies.model_validate({family: {name: text}})


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        ("smtp", "auth_failed", "535 5.7.0 no"),
        ("smtp", "vrfy", "252 2.0.0 see"),
        ("smtp", "ok", "250 2.0.0 OK"),
        ("imap", "upstream_down", "* BAD internal server error"),
        ("imap", "auth_failed", "* BYE"),
        ("imap", "ok", "OK completed"),
        ("pop3", "login_refused", "-ERR"),
    ],
)
def test_others_are_taken(family: str, name: str, text: str) -> None:
    written = WrittenReplies.model_validate({family: {name: text}})
    assert getattr(written, family) == {name: text}
