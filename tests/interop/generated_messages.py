"""Messages as they arrive from the world: odd header fields, odd bodies, odd shapes, orders for the recording filter.

`messages(200)` is the same list at each run and has every trait at least once; `strategy` is for hypothesis. Traits are
the names of FIELDS, BODIES, SHAPES, SENDERS and ORDERS, so that a test can say which messages it means. Line ends are
CRLF and there is no NUL: what becomes of others is a policy of the gateway, and tested as such.
"""

from __future__ import annotations

import base64
import quopri
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from hypothesis import strategies

SEED = 20240229
DOMAIN = "local.test"
CHUNK = 65535
"""Octets of the longest piece of a body that a filter is given."""

_WORDS = b"gateway filter sender quantity bicycle river seventeen although paper window letter morning".split()


@dataclass(frozen=True, slots=True)
class Message:
    """One transaction. Addresses are without brackets; each recipient is one message's alone and has its number (`m7`).

    `parameters` are those of MAIL. `content` is what is sent before the end of data, dots not yet stuffed. With
    `abandoned` the client says RSET where DATA would come; with `greets_again` it says EHLO before MAIL.
    """

    number: int
    sender: str
    parameters: str
    recipients: tuple[str, ...]
    content: bytes
    traits: frozenset[str]
    abandoned: bool = False
    greets_again: bool = False


def phrase(rng: Random, count: int = 4) -> bytes:
    """Some words."""
    return b" ".join(rng.choice(_WORDS) for _ in range(count))


def lines(rng: Random, count: int) -> bytes:
    """Lines of words."""
    return b"".join(phrase(rng, rng.randint(1, 9)) + b"\r\n" for _ in range(count))


def octets(rng: Random, count: int) -> bytes:
    """Exactly that many octets, in lines."""
    line = phrase(rng, 8)[:62].ljust(62, b"-") + b"\r\n"
    text = line * (count // 64 + 1)
    return text[: count - 2] + b"\r\n"


# -- header fields --------------------------------------------------------------------------------------------

Field = Callable[[Random], bytes]
FIELDS: dict[str, Field] = {
    "folded": lambda rng: b"Subject: %b\r\n %b\r\n" % (phrase(rng), phrase(rng)),
    "folded with a tab": lambda rng: b"X-Folded: %b,\r\n\t%b\r\n\t\t%b\r\n" % (phrase(rng), phrase(rng), phrase(rng)),
    "folded at once": lambda rng: b"X-Folded:\r\n %b\r\n" % phrase(rng),
    "folded over blank lines": lambda rng: b"X-Blank: %b\r\n \r\n\t\r\n %b\r\n" % (phrase(rng), phrase(rng)),
    "ends in a fold": lambda rng: b"X-Fold-Last: %b\r\n \r\n" % phrase(rng),
    "empty value": lambda rng: b"X-Empty:\r\nX-Empty: \r\nX-Empty: \t \r\n",
    "no blank": lambda rng: b"X-Near:%b\r\n" % phrase(rng),
    "tab": lambda rng: b"X-Tab:\t%b\t%b\r\n" % (phrase(rng), phrase(rng)),
    "blanks around": lambda rng: b"X-Wide:    %b   \r\n" % phrase(rng),
    "blank before the colon": lambda rng: b"X-Old : %b\r\nX-Older \t: %b\r\n" % (phrase(rng), phrase(rng)),
    "latin-1": lambda rng: "X-Name: Jürgen Groß aus Köln\r\n".encode("latin-1"),
    "utf-8": lambda rng: "Subject: žluťoučký kůň 🐎\r\n".encode(),
    "encoded words": lambda rng: b"Subject: =?utf-8?B?%b?=\r\n =?utf-8?Q?=C3=BC?=\r\n" % base64.b64encode(phrase(rng)),
    "long field": lambda rng: b"References: " + b"<%b@x.test> " % phrase(rng, 1) * 250 + b"\r\n",
    "long folded field": lambda rng: b"X-Long: " + b"\r\n ".join(phrase(rng, 9) for _ in range(300)) + b"\r\n",
    "same field again": lambda rng: b"X-Same: one\r\nx-same: two\r\nX-SAME: three\r\n",
    "own received": lambda rng: b"".join(
        b"Received: from h%d.test (h%d.test [192.0.2.%d])\r\n"
        b"\tby relay.test with ESMTP; Thu, 1 Feb 2024 10:00:0%d +0000\r\n"
        % (hop, hop, hop, hop)
        for hop in range(1, rng.randint(2, 6))
    ),
    "resent": lambda rng: b"Resent-From: r@x.test\r\nResent-To: s@x.test\r\nResent-Date: 1 Feb 2024 10:00:00 +0000\r\n",
    "odd name": lambda rng: b"X!#$%&'*+-/=?^_`{|}~9: odd\r\n",
    "colons and percents": lambda rng: b"X-Colons:: a:b: %s %d %% 100%\r\n",
    "many fields": lambda rng: b"".join(b"X-Many-%d: %b\r\n" % (i, phrase(rng)) for i in range(120)),
    "fields that Postfix drops": lambda rng: b"Bcc: secret@x.test\r\nContent-Length: 5\r\nReturn-Path: <r@x.test>\r\n",
    "addresses": lambda rng: b'From: "A, B" <a@x.test>, (c\r\n d) e@X.TEST\r\nTo: hidden-recipients:;\r\nCc: joe\r\n',
}  # fmt: skip


def fields(rng: Random) -> bytes:
    """What every mail program writes."""
    return (
        b"From: %b <a@x.test>\r\nTo: <user@%b>\r\nSubject: %b\r\nDate: Thu, 1 Feb 2024 10:00:00 +0000\r\n"
        b"Message-ID: <%d@x.test>\r\n"
    ) % (phrase(rng, 1), DOMAIN.encode(), phrase(rng), rng.randrange(10**9))


# -- bodies; a body that is a MIME entity begins with its own fields ------------------------------------------


def mime(rng: Random) -> bytes:
    """Text in two forms and an attachment, with a preamble and an epilogue."""
    attachment = base64.encodebytes(bytes(rng.randrange(256) for _ in range(rng.randint(100, 3000))))
    parts = [
        b"Content-Type: multipart/alternative; boundary=inner\r\n\r\n"
        b"--inner\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n%b\r\n--inner\r\nContent-Type: text/html\r\n\r\n<p>%b\r\n"
        b"--inner--\r\n" % (_crlf(quopri.encodestring("Grüße = ∞\n".encode())), phrase(rng)),
        b'Content-Type: application/octet-stream; name="a.bin"\r\nContent-Transfer-Encoding: base64\r\n'
        b"Content-Disposition: attachment; filename*0=a; filename*1=.bin\r\n\r\n%b" % _crlf(attachment),
    ]
    separated = b"".join(b"--outer\r\n%b\r\n" % part for part in parts)
    return (
        b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n\tboundary=outer\r\n\r\npreamble\r\n"
        + separated + b"--outer--\r\nepilogue\r\n"
    )  # fmt: skip


def nested(rng: Random) -> bytes:
    """A message in a message."""
    return b"MIME-Version: 1.0\r\nContent-Type: message/rfc822\r\n\r\n" + fields(rng) + mime(rng)


def unclosed(rng: Random) -> bytes:
    """Boundaries that do not fit."""
    kind = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=a\r\n"
    return kind + b"\r\n--a\r\n--a-\r\n--b--\r\n" + lines(rng, 3)


def _crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


BODIES: dict[str, Callable[[Random], bytes]] = {
    "text": lambda rng: b"\r\n" + lines(rng, rng.randint(1, 30)),
    "mime": mime,
    "nested message": nested,
    "unclosed mime": unclosed,
    "dots": lambda rng: b"\r\n.\r\n..\r\n.x\r\n...\r\n" + lines(rng, 1) + b".\r\n",
    "header-like": lambda rng: b"\r\nSubject: not a field\r\n folded\r\nX-Do: reject\r\n\r\nReceived: nor this\r\n",
    "eight-bit": lambda rng: b"\r\n" + bytes(range(128, 256)) + b"\r\n" + "žluťoučký\r\n".encode(),
    "control characters": lambda rng: b"\r\n" + bytes([*range(1, 10), 11, 12, *range(14, 32), 127]) + b"\r\n",
    "long line": lambda rng: b"\r\n" + b"y" * 1500 + b"\r\n" + lines(rng, 1),
    "longer lines": lambda rng: b"\r\n" + b"z" * 2048 + b"\r\n" + b"." + b"z" * 5000 + b"\r\n",
    "one long line": lambda rng: b"\r\n" + b"w" * 70000 + b"\r\n",
    "one chunk": lambda rng: b"\r\n" + octets(rng, CHUNK),
    "one chunk and an octet": lambda rng: b"\r\n" + octets(rng, CHUNK + 1),
    "large": lambda rng: b"\r\n" + octets(rng, 200_000),
    "blank lines": lambda rng: b"\r\n\r\n\r\n \r\n\r\n",
    "trailing blanks": lambda rng: b"\r\n" + phrase(rng) + b"  \t\r\n  \r\n",
    "no final line end": lambda rng: b"\r\n" + lines(rng, 2) + b"the end",
}

# -- shapes: how header and body become a message -------------------------------------------------------------

Shape = Callable[[bytes, bytes], bytes]
SHAPES: dict[str, Shape] = {
    "usual": lambda header, body: header + body,
    "empty body": lambda header, body: header + b"\r\n",
    "no body": lambda header, body: header,
    "empty header": lambda header, body: b"\r\n" + body,
    "no header": lambda header, body: b"just text\r\n" + body,
    "text in the header": lambda header, body: header + b"no field at all\r\nX-After: text\r\n" + body,
    "from line": lambda header, body: b"From a@x.test Thu Feb  1 10:00:00 2024\r\n" + header + body,
    "quoted from line": lambda header, body: b">From a@x.test Thu Feb  1 10:00:00 2024\r\n" + header + body,
    "begins with a blank": lambda header, body: b" folded from nothing\r\n" + header + body,
    "nothing but a line end": lambda header, body: b"\r\n",
    "nothing": lambda header, body: b"",
}

# -- what the recording filter is asked for: recording_milter.py ----------------------------------------------

VERDICTS = ("accept", "reject", "tempfail", "discard", "lines")
SENDERS = tuple(f"{verdict}{event}" for verdict in VERDICTS for event in ("", "-data", "-header", "-eoh", "-body"))
"""Local parts of a sender that are orders."""

# {own} is the message's own recipient, {other} a second one, {new} one that it does not have.
ORDERS: dict[str, tuple[str, ...]] = {
    "add": ("add X-Added: one", "add X-Added: two"),
    "add folded": ("add X-Added: one,\\n\ttwo\\n three",),
    "add empty": ("add X-Added: ",),
    "insert at 0": ("insert 0 X-Inserted: first", "insert 0 X-Inserted: before it"),
    "insert at 1": ("insert 1 X-Inserted: first", "insert 1 X-Inserted: before it"),
    "insert at 3": ("insert 3 X-Inserted: third",),
    "insert far away": ("insert 999 X-Inserted: last",),
    "insert and add": ("insert 0 X-Top: 1", "add X-End: 2", "insert 1 X-Next: 3", "change 1 X-Top: changed"),
    "change": ("change 1 Subject: changed",),
    "change the second": ("change 2 X-Do: changed", "nothing"),
    "change beyond": ("change 9 Subject: one more",),
    "change received": ("change 1 Received: altered",),
    "delete": ("delete 1 Subject",),
    "delete beyond": ("delete 9 Subject",),
    "delete many": ("delete_all X-Same X-Do Received To",),
    "delete and add": ("delete 1 From", "add From: new@x.test", "delete 1 From"),
    "sender": ("sender new@x.test",),
    "null sender": ("sender <>",),
    "sender with parameters": ("sender new@x.test RET=HDRS ENVID=abc",),
    "recipient": ("recipient {new}",),
    "recipient with parameters": ("recipient {new} NOTIFY=NEVER",),
    "same recipient": ("recipient {own}",),
    "remove": ("recipient {new}", "remove {own}"),
    "remove a stranger": ("remove nobody@foreign.test",),
    "body": ("body new\\n.body",),
    "empty header value and body": ("change 1 Subject: ", "body "),
    "large body": ("body_size 131072",),
    "progress": ("progress", "add X-Late: yes", "progress"),
    "everything": (
        "insert 1 X-First: top", "add X-Last: end", "change 1 Subject: changed", "delete 1 To", "sender new@x.test",
        "recipient {new}", "body new body",
    ),
    "quarantine": ("quarantine held",),
    **{f"{verdict} at the end": ("add X-Added: lost", verdict) for verdict in VERDICTS},
    **{f"{verdict} at eoh": (f"at eoh {verdict}",) for verdict in VERDICTS},
    **{f"{verdict} at body": (f"at body {verdict}",) for verdict in VERDICTS},
}  # fmt: skip

PARAMETERS = ("", "", "", " BODY=8BITMIME", " SIZE=1000", " SIZE=2000 BODY=8BITMIME", " RET=HDRS ENVID=abc")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a message is made of; empty strings for nothing unusual."""

    shape: str = "usual"
    fields: tuple[str, ...] = ()
    body: str = "text"
    order: str = ""
    sender: str = ""
    recipients: tuple[str, ...] = ()
    abandoned: bool = False
    greets_again: bool = False


def every_trait() -> Iterator[Traits]:
    """Each trait once, alone."""
    for shape in SHAPES:
        yield Traits(shape=shape)
    for name in FIELDS:
        yield Traits(fields=(name,))
    for name in BODIES:
        yield Traits(body=name)
    for name in ORDERS:
        yield Traits(order=name)
    for name in SENDERS:
        yield Traits(sender=name)
    for verdict in VERDICTS:
        yield Traits(recipients=(verdict,))
    yield Traits(abandoned=True)
    yield Traits(greets_again=True)


def mixed(rng: Random) -> Traits:
    """Some traits together."""
    return Traits(
        shape=rng.choice([*SHAPES, *["usual"] * 30]),
        fields=tuple(rng.sample(list(FIELDS), rng.randint(0, 5))),
        body=rng.choice(list(BODIES)),
        order=rng.choice(list(ORDERS)) if rng.random() < 0.5 else "",
        recipients=rng.choice([(), (), (), (), ("reject",), ("tempfail", "lines")]),
        abandoned=rng.random() < 0.03,
        greets_again=rng.random() < 0.1,
    )


def assemble(rng: Random, number: int, traits: Traits) -> Message:
    """The message with these traits."""
    own, other, new = (f"m{number}{suffix}@{DOMAIN}" for suffix in ("", "-other", "-new"))
    orders = "".join(f"X-Do: {order}\r\n" for order in ORDERS.get(traits.order, ()))
    ordered = orders.format(own=own, other=other, new=new).encode()
    pieces = [fields(rng), ordered, *(FIELDS[name](rng) for name in traits.fields)]
    rng.shuffle(pieces)
    content = SHAPES[traits.shape](b"".join(pieces), BODIES[traits.body](rng))
    spellings = (f"s{number}@x.test", f"S{number}@X.Test", "", f'"s {number}"@x.test', f"s{number}+b@x.test")
    usual_sender = rng.choice(spellings)
    return Message(
        number,
        f"{traits.sender}@x.test" if traits.sender else usual_sender,
        rng.choice(PARAMETERS),
        (*(f"{verdict}-{own}" for verdict in traits.recipients), own, *([other] if rng.random() < 0.3 else [])),
        content,
        frozenset(filter(None, (traits.shape, *traits.fields, traits.body, traits.order, traits.sender))),
        traits.abandoned,
        traits.greets_again,
    )


def messages(count: int) -> list[Message]:
    """The same messages at each run: first each trait alone, then mixed."""
    alone = list(every_trait())
    chosen = [*alone, *(mixed(Random(f"{SEED} mixed {number}")) for number in range(count - len(alone)))]
    return [assemble(Random(f"{SEED} {number}"), number, traits) for number, traits in enumerate(chosen[:count])]


@strategies.composite
def strategy(draw: strategies.DrawFn) -> Message:
    """For hypothesis: a message with any traits."""
    rng = draw(strategies.randoms(use_true_random=False))
    return assemble(rng, draw(strategies.integers(0, 999)), mixed(rng))
