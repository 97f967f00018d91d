"""Parts that are not wanted: every way to name a file, types, nesting, malformed MIME; and what happens to the message."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from gateway import Cause, Edit, Refuse
from gateway.testing.conformance import check_stage
from gateway.testing.messages import edited, make_message
from gateway.testing.stages import build, make_session
from stages import mime_guard
from stages.mime_guard import MimeGuard

pytestmark = pytest.mark.anyio

TEXT = b"Content-Type: text/plain\r\n\r\nHello\r\n"


def multipart(*parts: bytes, boundary: bytes = b"b1", end: bytes = b"--b1--\r\n") -> bytes:
    """A message of these parts, each with a header."""
    head = b'Subject: x\r\nContent-Type: multipart/mixed; boundary="' + boundary + b'"\r\n\r\npreamble\r\n'
    return head + b"".join(b"--" + boundary + b"\r\n" + part for part in parts) + end


def attached(fields: bytes) -> bytes:
    return multipart(TEXT, fields + b"\r\n\r\ncontent\r\n")


async def asked(settings: object, content: bytes, *, block: int = 65536) -> Refuse | Edit | None:
    session = make_session()
    return await build(MimeGuard, settings).message(session, make_message(session, content, block=block))


async def said(settings: object, content: bytes, *, block: int = 65536) -> str:
    """What the refusal says; empty if there is none."""
    verdict = await asked(settings, content, block=block)
    assert verdict is None or isinstance(verdict, Refuse)
    if verdict is None:
        return ""
    assert verdict.cause is Cause.CONTENT
    assert verdict.text.isascii() and verdict.text.isprintable()
    return verdict.text.removesuffix(" is not accepted")


DISPOSITION = b"Content-Disposition: attachment; "

FOUND = [
    b"filename=setup.exe",
    b'filename="SETUP.EXE"',
    b'filename="setup.exe. . "',
    b'filename="C:\\\\temp\\\\setup.exe"',
    b'filename="/tmp/setup.exe/"',
    b'filename="setup.exe:stream"',
    b"filename=\"'setup.exe'\"",
    b"filename*=utf-8''setup%2Eexe",
    b"filename*=utf-8'en'set%E2%80%8Bup.e%E2%80%8Bxe",
    b"filename*0=setup; filename*1=.e; filename*2=xe",
    b"filename*0*=utf-8''set; filename*1*=up%2e; filename*2=exe",
    b"filename=harmless.txt; filename=setup.exe",
    b"filename=harmless.txt; filename*=utf-8''setup.exe",
    b'filename="=?utf-8?q?setup=2Eexe?="',
    b'filename="=?utf-8?b?c2V0dXAuZXhl?="',
    b"filename*=utf-8''setup%EF%BC%8Eexe",  # a fullwidth full stop
    b"filename*=utf-8''setup.exe%00.txt",
    b"filename=setup.exe (a comment)",
    b"filename=\r\n\tsetup.exe",
    b"filename=setup.exe\r\nContent-Type: application/octet-stream; name=harmless.txt",
    b"filename=harmless.txt\r\nContent-Type: application/octet-stream; name=setup.exe",
    b"filename=harmless.txt\r\ncontent-disposition: attachment; filename=setup.exe",
]

PASSED = [
    b"filename=setup.txt",
    b"filename=exe",
    b'filename=".exe.txt"',
    b'filename="setup exe"',
    b'filename="about setup.exe files.txt"',
    b'filename="=?utf-8?q?=C3=BCbersicht.pdf?="',
    b"x-note=setup.exe",
    b'filename=""',
]


@pytest.mark.parametrize("parameters", FOUND)
async def test_every_reading_of_a_name_counts(parameters: bytes) -> None:
    content = attached(DISPOSITION + parameters)
    assert await said({"defects": "pass", "disguised": False}, content) == "file named *.exe"
    assert await said({"defects": "pass", "extensions": [], "names": ["*.exe"]}, content) != ""


@pytest.mark.parametrize("parameters", PASSED)
async def test_other_names_pass(parameters: bytes) -> None:
    assert await said(None, attached(DISPOSITION + parameters)) == ""


@pytest.mark.parametrize(
    ("settings", "name", "text"),
    [
        ({"extensions": [".SCR", "*.zip"]}, "a.zip", "file named *.zip"),
        (["scr"], "a.scr", "file named *.scr"),
        (["scr"], "a.exe", ""),
        (["exe"], "setup. exe", "file named *.exe"),
        (["scr"], "invoice.pdf.exe", "file named *.*.exe"),
        (["scr"], "invoice.pdf   .exe", "file named *.*.exe"),
        (["scr"], "version.number.exe", ""),
        ({"extensions": ["scr"], "disguised": False}, "invoice.pdf.exe", ""),
        (["scr"], "a.tar.gz", ""),
        ({"extensions": []}, "gpj.\u202eexe.txt", "file name written backwards"),
        ({"extensions": [], "disguised": False}, "gpj.\u202eexe.txt", ""),
        ({"extensions": [], "names": ["Invoice*.Z?P"]}, "INVOICE 7.zip", "file named Invoice*.Z?P"),
        ({"extensions": [], "names": ["invoice*.zip"]}, "my invoice.zip", ""),
        ({"extensions": [], "names": ["*\xfc*"]}, "\xdcbung", "file named *?*"),
    ],
)
async def test_settings_of_names(settings: object, name: str, text: str) -> None:
    assert await said(settings, attached(DISPOSITION + f'filename="{name}"'.encode())) == text


@pytest.mark.parametrize(
    ("types", "fields", "text"),
    [
        (["application/x-ms*"], b"Content-Type: Application/X-MSDownload; name=x", "content type application/x-ms*"),
        (["application/zip"], b"Content-Type: application/zip", "content type application/zip"),
        (["application/zip"], b"Content-Type: text/plain\r\nContent-Type: application/zip", "content type application/zip"),
        (["application/zip"], b"Content-Type: application/zipped", ""),
        (["text/plain"], b"X-None: 1", "content type text/plain"),
    ],
)  # fmt: skip
async def test_types(types: list[str], fields: bytes, text: str) -> None:
    content = multipart(fields + b"\r\n\r\ncontent\r\n")
    assert await said({"types": types, "defects": "pass"}, content) == text


async def test_fragments_are_refused_by_default() -> None:
    content = b"Content-Type: message/partial; id=1; number=1\r\n\r\nContent-Disposition: attachment; filename=a\r\n"
    assert await said(None, content) == "content type message/partial"


def nested(levels: int) -> bytes:
    """A program within so many attached messages."""
    return b"Content-Type: message/rfc822\r\n\r\n" * levels + DISPOSITION + b"filename=setup.exe\r\n\r\nMZ\r\n"


@pytest.mark.parametrize("block", [1, 7, 65536])
async def test_attached_messages_are_looked_into(block: int) -> None:
    inner = multipart(DISPOSITION + b"filename=setup.exe\r\n\r\nMZ\r\n", boundary=b"b2", end=b"--b2--\r\n")
    content = multipart(TEXT, b"Content-Type: message/rfc822\r\n\r\n" + inner)
    assert await said(None, content, block=block) == "file named *.exe"
    assert await said(None, nested(0)) == await said(None, nested(3)) == "file named *.exe"


@pytest.mark.parametrize(
    ("settings", "content", "text"),
    [
        ({"max_depth": 3}, nested(3), "file named *.exe"),
        ({"max_depth": 3, "defects": "pass"}, nested(4), "malformed MIME: nested too deeply"),
        ({"max_parts": 4}, multipart(*[TEXT] * 3), ""),
        ({"max_parts": 4, "defects": "pass"}, multipart(*[TEXT] * 4), "malformed MIME: too many parts"),
        ({"defects": "pass"}, multipart(b"X: " + b"y" * 40_000 + b"\r\n\r\n"), "malformed MIME: header too big"),
        (None, multipart(TEXT, end=b""), ""),
        ({"defects": "refuse"}, multipart(TEXT, end=b""), "malformed MIME: boundary never closed"),
        ({"defects": ["unclosed"]}, multipart(TEXT, end=b""), "malformed MIME: boundary never closed"),
        ({"defects": ["nul"]}, multipart(TEXT, end=b""), ""),
        (None, b"Content-Type: multipart/mixed\r\n\r\n--x\r\n", "malformed MIME: multipart without a boundary"),
        ({"defects": "pass"}, b"Content-Type: multipart/mixed\r\n\r\n--x\r\n", ""),
    ],
)
async def test_limits_and_defects(settings: object, content: bytes, text: str) -> None:
    assert await said(settings, content) == text


async def test_a_refusal_does_not_wait_for_the_rest() -> None:
    session = make_session()
    message = make_message(session, attached(DISPOSITION + b"filename=a.exe") + b"x" * 100_000, block=1000)
    assert await build(MimeGuard).message(session, message) is not None
    assert message.size <= 2000


async def test_a_mark_names_what_was_found_and_replaces_what_others_wrote() -> None:
    settings = {"action": "header", "types": ["application/zip"]}
    content = attached(DISPOSITION + b"filename=a.exe\r\nContent-Type: application/zip")
    verdict = await asked(settings, b"X-Mime-Guard: clean\r\n" + content)
    assert isinstance(verdict, Edit)
    mark = b"X-Mime-Guard: content type application/zip;\r\n\tfile named *.exe\r\n"
    assert edited(b"X-Mime-Guard: clean\r\n" + content, verdict) == mark + content
    verdict = await asked({**settings, "header": "X-Found"}, content)
    assert isinstance(verdict, Edit)
    assert edited(content, verdict) == mark.replace(b"X-Mime-Guard", b"X-Found") + content


async def test_a_mark_on_nothing() -> None:
    content = multipart(TEXT)
    assert await asked({"action": "header"}, content) is None
    verdict = await asked({"action": "header"}, b"x-mime-guard: forged\r\n" + content)
    assert isinstance(verdict, Edit)
    assert edited(b"x-mime-guard: forged\r\n" + content, verdict) == content


def test_only_marks_are_edits() -> None:
    message = make_message(make_session(), b"")
    assert build(MimeGuard).edits(message.transaction) == "none"
    assert build(MimeGuard, {"action": "header"}).edits(message.transaction) == "head"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"extensions": ["tar.gz"]}, "is not an extension"),
        ({"extensions": ["*"]}, "is not an extension"),
        ({"types": ["zip"]}, "is not a content type"),
        ({"defects": ["closed"]}, "is no defect; write refuse, pass, or a list of no_boundary"),
        ({"defects": ["over_depth"]}, "is no defect"),
        ({"action": "mark"}, "'refuse' or 'header'"),
        ({"header": "X Mark"}, "is not the name of a header field"),
        ({"max_depth": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings(wrong: object, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        build(MimeGuard, wrong)


def test_every_defect_is_documented() -> None:
    documented = set(re.findall(r"`([a-z_]+)`", mime_guard.__doc__ or ""))
    assert set(build(MimeGuard, {"defects": "refuse"}).settings.defects) <= documented


@pytest.mark.parametrize("settings", [None, {"action": "header", "defects": "refuse", "types": ["*/*"]}, ["bin"]])
async def test_keeps_the_contract(settings: object) -> None:
    await check_stage(MimeGuard, settings)
