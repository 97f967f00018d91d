"""A milter filter to read and to try: it refuses mail by its subject, marks what it has seen and replaces a footer.

It is written with pymilter (`pip install 'mail-gateway[milter]'`) and runs in either place. As a daemon, for the
gateway's `milter` stage as for Postfix:

    python examples/milter_filter.py unix:/tmp/filter.sock        # or inet:8800@127.0.0.1

    stages:
      - milter: {socket: "unix:/tmp/filter.sock"}

Or inside the gateway, without daemon and socket:

    stages:
      - pymilter: {class: "milter_filter:Filter", path: examples}
"""

# mypy: disable-error-code="misc, no-any-return, untyped-decorator"

from __future__ import annotations

import sys
from email.header import decode_header, make_header

import Milter

REFUSED_WORDS = ("lottery", "casino")
OLD_FOOTER = b"-- \r\nSent by the old mail system.\r\n"
NEW_FOOTER = b"-- \r\nExample Ltd, 1 Example Street, Exampleton\r\n"
MAX_BODY = 1_000_000  # octets; a larger message keeps its footer

# All that the filter changes: header fields are added, bodies replaced.
Milter.set_flags(Milter.ADDHDRS | Milter.CHGBODY)


class Filter(Milter.Base):
    """One SMTP session. Its methods are called one after the other, those of other sessions at the same time."""

    def __init__(self) -> None:
        self.body_parts: list[bytes] = []
        self.body_size = 0

    @Milter.noreply  # nobody needs to wait for the answer
    def envfrom(self, sender: str, *parameters: str) -> int:
        """MAIL begins a message: forget the one before."""
        self.body_parts, self.body_size = [], 0
        return Milter.CONTINUE

    def header(self, name: str, value: str) -> int:
        """Each header field, folds and all."""
        if name.lower() == "subject":
            subject = plain(value).lower()
            for word in REFUSED_WORDS:
                if word in subject:
                    self.setreply("550", "5.7.1", f"we take no mail about {word}")
                    return Milter.REJECT
        return Milter.CONTINUE

    def body(self, block: bytes) -> int:
        """The body as it comes, in pieces."""
        self.body_size += len(block)
        if self.body_size > MAX_BODY:
            self.body_parts = []
            return Milter.SKIP
        self.body_parts.append(block)
        return Milter.CONTINUE

    def eom(self) -> int:
        """The end of the message: the one place where it can be changed."""
        self.addheader("X-Filtered-By", self.getsymval("j") or "example filter")
        body = b"".join(self.body_parts)
        if body.endswith(OLD_FOOTER):
            self.replacebody(body.removesuffix(OLD_FOOTER))
            self.replacebody(NEW_FOOTER)
        return Milter.CONTINUE


def plain(value: str) -> str:
    """The text of a header field without folds and RFC 2047 words."""
    unfolded = value.replace("\r", "").replace("\n", "")
    try:
        return str(make_header(decode_header(unfolded)))
    except (UnicodeError, LookupError, ValueError):  # an unknown character set, or what is no word
        return unfolded


def main() -> None:
    """Serve the socket that the command line names until SIGTERM."""
    if len(sys.argv) != 2:
        sys.exit("usage: milter_filter.py unix:PATH | inet:PORT@HOST")
    Milter.factory = Filter
    Milter.runmilter("example", sys.argv[1], 240)


if __name__ == "__main__":
    main()
