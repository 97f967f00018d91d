"""What is wrong with content, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.content import DataScanner, DotStuffer
from gateway.relay.checks import ContentChecks
from gateway.verdicts import Cause, Refuse

END = b".\r\n"


def checked(
    content: bytes, cuts: list[int], limits: Mapping[str, int], *, policy: str = "reject", bdat: bool = False
) -> Refuse | None:
    """The first refusal of content (DATA's form without its end, or that of BDAT) which comes in these pieces."""
    checks = ContentChecks(
        limits.get("size_limit", 0),
        max_received=limits.get("max_received", 0),
        text_line=limits.get("text_line", 0),
        reject_nul=bool(limits.get("reject_nul")),
    )
    scanner, stuffer, size = DataScanner(policy), DotStuffer(policy), 0
    whole = content if bdat else content + END
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    for start, stop in pairwise(edges):
        block = whole[start:stop]
        size += len(block)
        given_on = stuffer.feed(block) if bdat else scanner.feed(block).content
        refuse = checks.refused(given_on, size if bdat else scanner.size, stuffer if bdat else scanner)
        if refuse is not None:
            return refuse
    return checks.refused(stuffer.finish(), size, stuffer) if bdat else None


HEADER = b"Received: a\r\nX: received: not\r\nRECEIVED: b\r\n c\r\nreceived:c\r\n\r\n"
CASES: list[tuple[bytes, dict[str, int], Cause | None]] = [
    (b"x" * 98 + b"\r\n", {"size_limit": 100}, None),
    (b"x" * 99 + b"\r\n", {"size_limit": 100}, Cause.MESSAGE_TOO_BIG),
    (b"." * 50 + b"\r\n" + b"..\r\n", {"size_limit": 54}, None),
    (b"a\nb\r\n", {}, Cause.LINE_ENDINGS),
    (b"a\rb\r\n", {}, Cause.LINE_ENDINGS),
    (b"a\0b\r\n", {}, None),
    (b"a\0b\r\n", {"reject_nul": 1}, Cause.MALFORMED),
    (HEADER, {"max_received": 3}, None),
    (HEADER, {"max_received": 2}, Cause.LOOP),
    (HEADER + b"Received: body\r\n" * 3, {"max_received": 3}, None),
    (b"\r\n" + HEADER, {"max_received": 1}, None),
    (b"Received : a\r\nReceived:\r\n\r\n", {"max_received": 1}, None),
    (b"12345\r\n\r\n..2345\r\n1\r\n", {"text_line": 5}, None),
    (b"123456\r\n", {"text_line": 5}, Cause.MALFORMED),
    (b"..23456\r\n", {"text_line": 5}, Cause.MALFORMED),
    (b"1\r\n123456\r\n1\r\n", {"text_line": 5}, Cause.MALFORMED),
]


@pytest.mark.parametrize(("content", "limits", "cause"), CASES)
def test_cut_anywhere(content: bytes, limits: dict[str, int], cause: Cause | None) -> None:
    """Whole, octet by octet, and in two at each place."""
    for cuts in ([], list(range(len(content))), *([at] for at in range(len(content)))):
        refuse = checked(content, cuts, limits)
        assert (refuse and refuse.cause) == cause, cuts
        if b"." not in content:
            assert (checked(content, cuts, limits, bdat=True) is None) == (cause is None), cuts


def test_a_line_of_a_chunk_need_not_end() -> None:
    assert checked(b"12345", [], {"text_line": 5}, bdat=True) is None
    refuse = checked(b"123456", [3], {"text_line": 5}, bdat=True)
    assert refuse is not None and refuse.text == "line of message too long"
    refuse = checked(b"\0", [], {"reject_nul": 1}, bdat=True)
    assert refuse is not None and refuse.text == "NUL octets in message"


def test_normalized_line_ends_are_none_of_ours() -> None:
    assert checked(b"a\nb\rc\r\n", [], {}, policy="normalize") is None


def test_an_endless_line_is_not_kept() -> None:
    """What is kept of a line is bounded by what may come of it."""
    checks, scanner = ContentChecks(0, text_line=1000), DataScanner()
    for _ in range(3):
        checks.refused(scanner.feed(b"x" * 400).content, 0, scanner)
    assert len(checks._line) <= 1400


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 12), st.lists(st.integers(0, 99)))
def test_lines_of_any_length(lengths: list[int], limit: int, cuts: list[int]) -> None:
    content = b"".join(b"x" * length + b"\r\n" for length in lengths)
    assert (checked(content, cuts, {"text_line": limit}) is None) == (max(lengths) <= limit)
