"""YAML with places: what is read as what, where it stands, expansion, and texts meant to exhaust the reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.documents import Document, parse, read
from gateway.config.problems import Problem


def one(text: str, environment: dict[str, str] | None = None, folder: Path = Path(".")) -> Document:
    documents, problems = parse(text, "x.yaml", folder, environment or {})
    assert problems == []
    assert len(documents) == 1
    return documents[0]


def problems(text: str, environment: dict[str, str] | None = None) -> list[str]:
    return [str(problem) for problem in parse(text, "x.yaml", Path("."), environment or {})[1]]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"), ("off", "off"), ("true", True), ("FALSE", False), ("~", None), ("", None), ("null", None),
        ("010", 10), ("0x1f", 31), ("0o17", 15), ("-3", -3), ("1e3", 1000.0), (".5", 0.5), (".inf", float("inf")),
        ("12:30:45", "12:30:45"), ("2026-01-01", "2026-01-01"), ("'5'", "5"), ("!!str 5", "5"), ("1_000", "1_000"),
        ("[1, {b: 2}]", [1, {"b": 2}]),
    ],
)  # fmt: skip
def test_core_schema(written: str, value: object) -> None:
    document = one(f"a: {written}")
    assert document.data == {"a": value}
    assert type(document.data["a"]) is type(value)


def test_places() -> None:
    document = one("listen:\n  - {url: 'smtp://x'}\n  - b\nstages: []\n")
    assert str(document.place(("listen", 0, "url"))) == "x.yaml:2:11"
    assert str(document.place(("listen", 0, "url"), key=True)) == "x.yaml:2:6"
    assert str(document.place(("listen", 1))) == "x.yaml:3:5"
    assert str(document.place(())) == "x.yaml:1:1"
    # steps that are not in the document are skipped, the rest is still found
    assert document.walk(("listen", "list[Listener]", 0, "Listener", "url")) == ("listen", 0, "url")
    assert str(document.place(("listen", 0, "port"))) == "x.yaml:2:5"
    assert document.value(("listen", 1)) == "b"


def test_columns_count_characters() -> None:
    assert str(one("ä: [öö, x]").place(("ä", 1))) == "x.yaml:1:9"


def test_several_documents() -> None:
    documents, wrong = parse("---\na: 1\n---\n---\nb: 2\n", "x.yaml", Path("."), {})
    assert [document.data for document in documents] == [{"a": 1}, {"b": 2}]
    assert wrong == []
    assert documents[1].place(("b",)).line == 5


def test_merge_keys_and_anchors() -> None:
    document = one("a: &a {x: 1, y: 2}\nb: &b {y: 3, <<: *a}\nc: {<<: [*b, {z: 5}], x: 4}\nd: *a\n'<<': 1\n")
    assert document.data["b"] == {"x": 1, "y": 3}
    assert document.data["c"] == {"x": 4, "y": 3, "z": 5}
    assert document.data["d"] == {"x": 1, "y": 2}
    assert document.data["<<"] == 1
    assert str(document.place(("b", "x"))) == "x.yaml:1:11"


def test_merge_of_no_mapping() -> None:
    assert problems("a: {<<: [1]}") == ["x.yaml:1:10: a: '<<' merges mappings only; write `<<: *name` of a mapping"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${NAME}", "value"), ("Bearer ${NAME}", "Bearer value"), ("${NAME}${NAME}", "valuevalue"),
        ("${UNSET:-default}", "default"), ("${EMPTY:-default}", "default"), ("${EMPTY}", ""), ("${UNSET:-}", ""),
        ("$$", "$"), ("$${NAME}", "${NAME}"), ("a$b$", "a$b$"), ("$2b$12$abc", "$2b$12$abc"), ("${TWICE}", "${NAME}"),
        ("${NAME:-other}", "value"), ("${UNSET:-a:-b\nc}", "a:-b\nc"),
    ],
)  # fmt: skip
def test_expansion(written: str, value: str) -> None:
    quoted = '"' + written.replace("\n", "\\n") + '"'
    document = one(f"a: [{quoted}]", {"NAME": "value", "EMPTY": "", "TWICE": "${NAME}"})
    assert document.data == {"a": [value]}


def test_a_value_cannot_change_the_structure() -> None:
    assert one("a: ${X}", {"X": "1\nb: 2"}).data == {"a": "1\nb: 2"}
    assert one("a: ${X}", {"X": "25"}).data == {"a": "25"}


def test_keys_are_not_expanded() -> None:
    assert one('"${X}": 1', {"X": "y"}).data == {"${X}": 1}


def test_secrets_are_remembered() -> None:
    document = one('a: "x ${A}"\nb: {c: "${B:-seen}"}', {"A": "hidden", "B": ""})
    assert document.secrets == {"hidden"}
    assert document.expanded(()) == [("x hidden", "x ${A}"), ("seen", "${B:-seen}")]
    assert document.expanded(("b", "c")) == [("seen", "${B:-seen}")]
    assert "hidden" not in repr(document).replace(repr(document.data), "")


def test_secret_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hidden\n\n")
    document = one('a: "${file:key}"', folder=tmp_path)
    assert document.data == {"a": "hidden\n"}
    assert document.secrets == {"hidden\n"}
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff")
    _, wrong = parse("a: ${file:large}\nb: ${file:binary}\nc: ${file:.}", "x.yaml", tmp_path, {})
    assert [problem.text for problem in wrong] == [
        "the file large is larger than 64 KiB",
        "the file binary is not UTF-8",
        "the file . cannot be read (Is a directory)",
    ]


def test_a_broken_reference_in_an_anchor_is_told_once() -> None:
    text = "a: &a ${X}\nb: *a\nc: *a\n"
    documents, wrong = parse(text, "x.yaml", Path("."), {})
    assert len({(problem.place, problem.text) for problem in wrong}) == 1
    assert documents[0].faulty == {("a",), ("b",), ("c",)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: \x01", "x.yaml:1:4: a control character; remove it"),
        ("ä: b\nö: \x01", "x.yaml:2:4: a control character; remove it"),
        ("a: @b", "x.yaml:1:4: '@' cannot begin a value; put the text in quotes"),
        ("a: *b", "x.yaml:1:4: an alias has no anchor before it; put text that begins with '*' in quotes"),
        ("a: [1", "x.yaml:2:1: a list is not closed; write ',' between its items and ']' at its end"),
        ("? [a]\n: 1", "x.yaml:1:3: a key is not a plain text; write `name: value`"),
        ("'': 1", "x.yaml:1:1: a key is not a plain text; write `name: value`"),
        ("a: !!float x", "x.yaml:1:4: a: 'x' is not a value of type float; put it in quotes"),
        ("a: " + "9" * 5000, f"x.yaml:1:4: a: '{'9' * 40}' is not a value of type int; put it in quotes"),
        ("", "x.yaml: is empty; write a pipeline: listen, stages, upstreams"),
    ],
)
def test_bad_text(text: str, said: str) -> None:
    if text.endswith("[1"):
        text += "\n"
    assert problems(text) == [said]


@pytest.mark.parametrize("text", ["[" * 300_000, "{a: " * 100_000, "- " * 100_000, "a:\n" + "- " * 200 + "x"])
def test_deep_nesting_is_refused(text: str) -> None:
    (said,) = problems(text)
    assert "nested more than 100 deep" in said or "is not a mapping" in said


def test_alias_bombs_are_refused() -> None:
    values = "a: &a [" + "x," * 99 + "x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + chr(ord(name) - 1)] * 50)}]\n" for name in "bcdefgh"
    )
    merges = "a: &a {k: 1}\n" + "".join(
        f"{name}: &{name} {{<<: [{', '.join(['*' + chr(ord(name) - 1)] * 50)}]}}\n" for name in "bcdefgh"
    )
    for text in (values, merges):
        (said,) = problems(text)
        assert "aliases repeat more than 10000 values" in said
    assert len(problems("a: &a {<<: *a}")) == 1


def test_long_lists_are_no_bomb() -> None:
    document = one("a:\n" + "".join(f"  - d{number}.example.org\n" for number in range(20_000)))
    assert len(document.data["a"]) == 20_000  # type: ignore[arg-type]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: ä\n".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"#" * (4 * 1024 * 1024 + 1))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")

    def said(name: str) -> list[Problem]:
        return read(tmp_path / name)[1]

    assert [(problem.place.line, problem.place.column, problem.text) for problem in said("latin.yaml")] == [
        (2, 4, "is not UTF-8")
    ]
    assert [problem.text for problem in said("large.yaml")] == ["is larger than 4 MiB"]
    assert "cannot be read" in said("none.yaml")[0].text
    assert read(tmp_path / "bom.yaml")[0][0].data == {"a": 1}


@given(st.text(alphabet=st.sampled_from("ab:-[]{},&*!|>'\"%@`$ \n\t#?~<0.\x07é"), max_size=60))
def test_any_text_is_data_or_problems(text: str) -> None:
    documents, wrong = parse(text, "x.yaml", Path("."), {})
    assert documents or wrong
    for document in documents:
        assert document.place(()).line > 0
