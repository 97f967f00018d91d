"""The trace field: what it says of a client, a recipient, a protocol, and what it never lets through."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime

import pytest
from pydantic import ValidationError

from gateway import Session
from gateway.testing.stages import TLS, FakeWorker, build, make_recipient, make_session, make_transaction
from stages.received import Received

pytestmark = pytest.mark.anyio


async def field(session: Session, *recipients: str, smtputf8: bool = False) -> str:
    stage = build(Received)
    await stage.start(FakeWorker(hostname="gw.example"))
    transaction = make_transaction(session, parameters=(("SMTPUTF8", None),) if smtputf8 else ())
    transaction.id = "ID-1.1"
    for recipient in recipients:
        make_recipient(session, recipient)
    assert stage.edits(transaction) == "head"
    [header] = stage.data(session, transaction).operations
    assert header.name == "Received"
    return header.value


async def test_the_field_as_a_whole() -> None:
    value = await field(make_session(helo="client.example", name="real.example", tls=TLS, user="a"), "b@example.net")
    head, _, date = value.rpartition(";\r\n\t")
    assert head == (
        "from client.example (real.example [192.0.2.1])\r\n"
        "\t(using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384)\r\n"
        "\tby gw.example with ESMTPSA\r\n\tid ID-1.1\r\n\tfor <b@example.net>"
    )
    assert parsedate_to_datetime(date).tzinfo is not None


@pytest.mark.parametrize(
    ("session", "smtputf8", "protocol"),
    [
        (make_session(helo="c", esmtp=False), False, "SMTP"),
        (make_session(helo="c"), False, "ESMTP"),
        (make_session(helo="c", tls=TLS), False, "ESMTPS"),
        (make_session(helo="c", user="a"), False, "ESMTPA"),
        (make_session(helo="c", user="a", tls=TLS), True, "UTF8SMTPSA"),
        (make_session(helo="c", listen="lmtp://127.0.0.1:24"), False, "LMTP"),
        (make_session(helo="c", listen="lmtp+unix:/run/x", tls=TLS), True, "UTF8LMTPS"),
    ],
)
async def test_protocols(session: Session, smtputf8: bool, protocol: str) -> None:
    assert f" with {protocol}\r\n" in await field(session, smtputf8=smtputf8)


@pytest.mark.parametrize(
    ("helo", "address", "reverse_name", "start"),
    [
        ("[192.0.2.1]", "192.0.2.1", "", "from [192.0.2.1] (unknown [192.0.2.1])"),
        ("c.example", "2001:db8::1", "", "from c.example (unknown [IPv6:2001:db8::1])"),
        ("c.example", "", "", "from c.example (unknown [local])"),
        ("c(x)y;z", "192.0.2.1", "", "from unknown (unknown [192.0.2.1])"),
        ("c\r\nX-Evil:1", "192.0.2.1", "", "from unknown (unknown [192.0.2.1])"),
        ("c.example", "192.0.2.1", "unverified.example", "from c.example (unknown [192.0.2.1])"),
    ],
)
async def test_names_are_believed_only_as_far_as_they_were_checked(
    helo: str, address: str, reverse_name: str, start: str
) -> None:
    session = make_session(helo=helo, address=address, reverse_name=reverse_name)
    assert (await field(session)).startswith(start + "\r\n")


@pytest.mark.parametrize(
    ("recipients", "smtputf8", "shown"),
    [
        (["a@x.test"], False, True),
        (["a@x.test", "b@x.test"], False, False),
        (["ä@x.test"], False, False),
        (["ä@x.test"], True, True),
    ],
)
async def test_a_recipient_is_named_only_if_alone_and_only_in_its_charset(
    recipients: list[str], smtputf8: bool, shown: bool
) -> None:
    value = await field(make_session(helo="c"), *recipients, smtputf8=smtputf8)
    assert (" for <" in value.replace("\t", " ")) is shown
    assert all(re.match(r"\t\S", line) for line in value.split("\r\n")[1:]), "each fold begins with a blank"


def test_settings() -> None:
    assert build(Received).settings.max_hops == 50
    assert build(Received, 30).settings.max_hops == 30
    assert Received.counts_received
    for wrong in (0, "many"):
        with pytest.raises(ValidationError):
            build(Received, wrong)
