"""Every arrangement of CR, LF, dot and NUL up to seven octets: who reads how many messages (promise 5).

Each stands behind a line's text or at DATA's own first line, with a command behind it that somebody would like to
smuggle. What the codecs forward is read by servers that agree on nothing but CRLF.CRLF, each one regular expression:
all find one end of data, ours. What is refused has not shown any of them an end before.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

import pytest

from gateway.protocol.content import DataScanner, DotStuffer

pytestmark = pytest.mark.slow  # `make test` runs it, `make test-fast` does not

SEQUENCES = [bytes(octets) for length in range(1, 8) for octets in itertools.product(b"\r\n.\0", repeat=length)]
BEFORE = (b"x", b"")
BEHIND = b"M"
END = b"\r\n.\r\n"
BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")
READERS = {
    "strict": re.compile(rb"\r\n\.\r\n"),
    "Postfix with the client in mynetworks": re.compile(rb"\n\.\r*\n"),  # LF ends a line, CRs before it are dropped
    "sendmail's old way": re.compile(rb"(?:\n|\r\n)\.(?:\n|\r\n)"),
    "CR or LF or both": re.compile(rb"[\r\n]\.(?:\r\n|[\r\n])"),
}
Pieces = tuple[bytes, ...]

LINES = (b"QUJD" * 19 + b"\r\n") * 30  # equally long lines, which the codecs look at in another way


def messages(wire: bytes) -> dict[str, list[int]]:
    """Where each reader finds an end in what a server gets behind its 354."""
    text = b"\r\n" + wire
    return {name: [match.end() - 2 for match in reader.finditer(text)] for name, reader in READERS.items()}


def cuts(wire: bytes) -> Iterator[Pieces]:
    """Whole, cut in two at every place, cut in three around each octet, octet by octet."""
    yield (wire,)
    for place in range(1, len(wire)):
        yield wire[:place], wire[place:]
        yield wire[:place], wire[place : place + 1], wire[place + 1 :]
    yield tuple(wire[place : place + 1] for place in range(len(wire)))


def scanned(policy: str, pieces: Pieces) -> tuple[bytes, bytes, str | None]:
    """As the relay does it: what went upstream before the end of data or a refusal, the rest, and what was illegal."""
    scanner, sent = DataScanner(policy), b""
    for place, piece in enumerate(pieces):
        content, end, rest = scanner.feed(piece)
        if policy == "normalize" or scanner.bare is None:
            sent += content
        if end:
            return sent, rest + b"".join(pieces[place + 1 :]), scanner.bare
    raise AssertionError(f"no end in {pieces}")


def stuffed(policy: str, pieces: Pieces) -> tuple[bytes, str | None]:
    """The same for BDAT."""
    stuffer, sent = DotStuffer(policy), b""
    for piece in pieces:
        content = stuffer.feed(piece)
        if policy == "normalize" or stuffer.bare is None:
            sent += content
    content = stuffer.finish()
    return sent + content if policy == "normalize" or stuffer.bare is None else sent, stuffer.bare


def wrong(policy: str, illegal: bool, sent: bytes) -> list[str]:
    """Who reads something else than one message, or than none if it was refused."""
    if illegal and policy == "reject":
        return [name for name, ends in messages(sent).items() if ends]
    wire = sent + b".\r\n"
    return [name for name, ends in messages(wire).items() if ends != [len(wire)]]


def normalized(content: bytes) -> bytes:
    """A lone CR is a blank, a lone LF is CRLF."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", content))


def unstuffed(wire: bytes) -> bytes:
    return (b"\r\n" + wire).replace(b"\r\n.", b"\r\n")[2:]


def check_data(policy: str, sequence: bytes, wire: bytes, divided: Iterable[Pieces]) -> None:
    """However it is divided, DATA ends where a strict reader says, and so say all readers of what was forwarded."""
    head, _, rest = (b"\r\n" + wire).partition(END)
    content = (head + b"\r\n")[2:]
    illegal = BARE.search(content) is not None
    outcomes = {scanned(policy, pieces) for pieces in divided}
    assert {(left, bare is not None) for _, left, bare in outcomes} == {(rest, illegal)}, sequence
    check_sent(policy, sequence, {sent for sent, _, _ in outcomes}, unstuffed(content), illegal)


def check_bdat(policy: str, sequence: bytes, content: bytes, divided: Iterable[Pieces]) -> None:
    """The same of chunks, in which a dot has no meaning: all of it is one message."""
    illegal = BARE.search(content) is not None
    outcomes = {stuffed(policy, pieces) for pieces in divided}
    assert {bare is not None for _, bare in outcomes} == {illegal}, sequence
    check_sent(policy, sequence, {sent for sent, _ in outcomes}, content, illegal)


def check_sent(policy: str, sequence: bytes, sent: set[bytes], content: bytes, illegal: bool) -> None:
    for wire in sent:
        assert not wrong(policy, illegal, wire), (sequence, wire)
    if not illegal or policy == "normalize":
        assert {unstuffed(wire) for wire in sent} == {normalized(content)}, sequence


policies = pytest.mark.parametrize("policy", ["reject", "normalize"])
places = pytest.mark.parametrize("before", BEFORE, ids=["in a line", "at the start"])


@places
@policies
def test_data(policy: str, before: bytes) -> None:
    for sequence in SEQUENCES:
        wire = before + sequence + BEHIND + END
        check_data(policy, sequence, wire, cuts(wire))


@places
@policies
def test_bdat(policy: str, before: bytes) -> None:
    for sequence in SEQUENCES:
        content = before + sequence + BEHIND + b"\r\n"
        check_bdat(policy, sequence, content, cuts(content))


@policies
def test_among_equal_lines(policy: str) -> None:
    """Up to five octets in front of, between and behind lines that are looked at as one run, cut around them."""
    for sequence in SEQUENCES[: 4 + 4**2 + 4**3 + 4**4 + 4**5]:
        for front, back in ((b"x", LINES), (LINES, LINES), (LINES + b"x", b""), (LINES, b"")):
            wire = front + sequence + BEHIND + b"\r\n" + back + b".\r\n"
            around = range(max(len(front) - 1, 1), len(front) + len(sequence) + 1)
            divided = [(wire,), *((wire[:place], wire[place:]) for place in around)]
            check_data(policy, sequence, wire, divided)
            check_bdat(policy, sequence, wire, divided)
