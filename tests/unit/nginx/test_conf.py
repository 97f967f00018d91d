"""Reading the file: words, quotes, includes, places."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.nginx.conf import Directive, Findings, read


def names(directives: tuple[Directive, ...]) -> list[tuple[str, str]]:
    """Each with its place."""
    return [(Path(one.file).name, str(one)) for one in directives]


def test_words(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(
        r"""a "b c" 'd e' f\"g;   # comment ;
        b 'it\'s' "tab\tnl\n" "back\\slash" \d+ 'quo"te';
        c { d ; }
        e "${x}" # comment {
          f;"""
    )
    findings = Findings()
    found = read(conf, findings)
    assert findings.all() == []
    assert [one.arguments for one in found] == [
        ("b c", "d e", 'f"g'), ("it's", "tab\tnl\n", "back\\slash", r"\d+", 'quo"te'), (), ("${x}", "f"),
    ]  # fmt: skip
    assert found[2].block is not None and found[2].block[0].name == "d"
    assert [one.line for one in found] == [1, 2, 3, 4]
    assert str(found[1]) == r"""b "it's" "tab\tnl\n" "back\\slash" "\\d+" "quo\"te";"""


def test_includes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, text in {"nginx.conf": "include d/*.conf;\ninclude none/*.conf; x { include d/1.conf; }", "d/1.conf": "a 1;\nb 2;",
                       "d/2.conf": "include d/3.part;", "d/3.part": "c 3;"}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    findings = Findings()
    found = read(tmp_path / "nginx.conf", findings)
    assert findings.all() == []
    assert names(found) == [("1.conf", "a 1;"), ("1.conf", "b 2;"), ("3.part", "c 3;"), ("nginx.conf", "x {}")]
    assert names(found[-1].block or ()) == [("1.conf", "a 1;"), ("1.conf", "b 2;")]
    assert found[1].place == f"{tmp_path}/d/1.conf:2"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a {", "nginx.conf:1: unexpected end of file"),
        ("a;\n}", 'nginx.conf:2: unexpected "}"'),
        ('a "b', "nginx.conf:1: unexpected end of file"),
        ("mail {\ninclude none.conf;\n}", "nginx.conf:2: the included file"),
        ("include nginx.conf;", "nginx.conf:1: files include each other without end"),
        ("include a b;", "nginx.conf:1: invalid number of arguments"),
    ],
)
def test_broken(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "nginx.conf").write_text(text)
    findings = Findings()
    read(tmp_path / "nginx.conf", findings)
    (finding,) = findings.all()
    assert str(finding).startswith(f"{tmp_path}/{where}") and finding.kind == "fatal"


def test_what_http_includes_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text("http { include mime.types; server { include no; } } stream { include no; }")
    findings = Findings()
    read(tmp_path / "nginx.conf", findings)
    assert findings.all() == []


def test_an_unreadable_file(tmp_path: Path) -> None:
    findings = Findings()
    read(tmp_path / "none.conf", findings)
    (finding,) = findings.all()
    assert "No such file" in finding.text
