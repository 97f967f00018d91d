"""Pipelines whose upstream is a private Postfix, in both grades, and what became of the mail there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.interop.conftest import Records
from tests.peers.postfix import Postfix
from tests.peers.process import wait_for

AUTHORIZED = "smtpd_authorized_xclient_hosts = 127.0.0.1\n"
LOGIN_RELAYS = "smtpd_relay_restrictions = permit_sasl_authenticated, permit_mynetworks, reject_unauth_destination\n"
DISCARD_FOREIGN = "default_transport = discard:\n"
ELSEWHERE = "127.0.0.2"
SHORT = "smtpd_timeout = 1s\n"
FOREIGN = "somebody@foreign.test"

Stages = list[object]
GRADES: dict[str, Stages] = {
    "opaque": ["xclient", "splice"],
    "envelope": ["xclient", {"splice": {"handoff": "never"}}],
}
both_grades = pytest.mark.parametrize("grade", GRADES)
MESSAGE = b"Subject: test\r\n\r\nhello\r\n"


def pipeline(postfix: Postfix, stages: Stages, *, url: str = "", pool: dict[str, object] | None = None,
             **more: object) -> dict[str, object]:  # fmt: skip
    """A pipeline with this Postfix as its only upstream."""
    servers = [url or f"smtp://127.0.0.1:{postfix.port}"]
    return {"stages": stages, "upstreams": {"postfix": {"servers": servers, **(pool or {})}}, **more}


def certificate(chain: Path, key: Path, level: str = "may") -> str:
    """Postfix's TLS."""
    return (
        f"smtpd_tls_cert_file = {chain}\nsmtpd_tls_key_file = {key}\nsmtpd_tls_security_level = {level}\n"
        "smtpd_tls_loglevel = 1\nsmtpd_tls_received_header = yes\n"
    )


async def logged(postfix: Postfix, pattern: str) -> None:
    """Wait for a line in Postfix's log."""
    await asyncio.to_thread(postfix.wait_log, pattern)


async def stored(postfix: Postfix, count: int, mailbox: str = "user") -> list[bytes]:
    """Wait until a mailbox has this many messages."""
    await asyncio.to_thread(wait_for, lambda: len(postfix.delivered(mailbox)) >= count, f"{count} messages")
    return postfix.delivered(mailbox)


def handed_off(records: Records) -> bool:
    """Whether the last session was handed off."""
    return "upstream" in records.all("session")[-1]
