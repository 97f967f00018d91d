"""What is written reads back as it was, whatever the words are."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.documents import parse
from gateway.nginx.write import Map, document

TEXTS = [
    "plain", "two words", "", " lead", "trail ", "a: b", "a:", "a #b", "#", "- a", "* BYE", "+OK", "-ERR x", "off", "true",
    "null", "~", "12", "1.5", "1m", "0x10", "1e5", "[a]", "{a}", "it's", 'say "x"', "it's \"x\"", "$x", "${x}", "$$", "$${x}",
    "a,b", "\\", "\\n", "tab\t", "é", "@a", "%a", "!a", "&a", "|", ">", "?", "a?", "=", "Infinity", ".nan", "a" * 300,
    "127.0.0.1:53", "smtp://[::1]:25", "1_000", "2026-01-01", "y", "\x7f", "\x85", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text: str) -> None:
    written = document(Map().put("value", text).put("list", [text]).put("key", Map().put(text or "k", 1)), ["head\nx"])
    (read,), problems = parse(written, "x.yaml", Path("/"), {})
    assert problems == []
    assert read.data == {"value": text, "list": [text], "key": {text or "k": 1}}


def test_the_form() -> None:
    inner = Map().put("url", "smtp://a:25", "listen a:25;").put("starttls", True)
    content = Map().put("listen", [inner, "x"], above=["why"]).put("empty", Map()).put("sub", Map().put("n", 1.5), "c")
    assert document(content, ["From a file."]) == (
        "# From a file.\n# why\nlisten:\n  - url: smtp://a:25  # listen a:25;\n    starttls: true\n  - x\n"
        "empty: {}\nsub:  # c\n  n: 1.5\n"
    )


def test_comments_cannot_become_settings() -> None:
    written = document(Map().put("a", 1, "x\nb: 2\x85c: 3"), ["y\nd: 4"])
    (read,), _ = parse(written, "x.yaml", Path("/"), {})
    assert read.data == {"a": 1}
