"""YAML documents whose values know where they stand, with `${...}` expanded.

A file is composed once into a node graph (YAML 1.2 core schema: `no` and `off` are texts, `010` is ten); plain
Python data and the place of each value and key are taken from it. Expansion happens inside values after
parsing, so what a variable holds can never change the structure of a file, and its value is kept apart as a
secret: problems quote the text of the file instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import yaml
from yamlcore import CCoreLoader

from gateway.config.problems import Loc, Place, Problem, written_loc

MAX_FILE = 4 * 1024 * 1024
MAX_ALIASED = 10_000  # nodes that aliases repeat: far above any real file, far below an alias bomb
MAX_DEPTH = 100
MAX_SECRET = 65_536
_DEPTH_CHECKED_FROM = 16_384  # shorter texts cannot nest deeply enough to exhaust the composer's stack

_TAG = "tag:yaml.org,2002:"
_REFERENCE = re.compile(r"\$(?:\$|\{([^{}]*)\}|\{)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_INFINITY = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its data as plain dict, list, str, int, float, bool, None, and where each part stands.

    `folder` is where relative paths begin, `secrets` what variables and files were expanded to, `faulty` the
    values that already have a problem.
    """

    file: str
    folder: Path
    data: dict[str, object]
    secrets: frozenset[str] = field(repr=False)
    faulty: frozenset[Loc] = field(repr=False)
    _values: Mapping[Loc, Place] = field(repr=False)
    _keys: Mapping[Loc, Place] = field(repr=False)
    _expanded: Mapping[Loc, tuple[str, str]] = field(repr=False)

    def walk(self, loc: Loc) -> Loc:
        """The part of `loc` that is in the document; steps that are not (names of union members) are skipped."""
        found: Loc = ()
        for step in loc:
            if (*found, step) in self._values:
                found = (*found, step)
        return found

    def value(self, loc: Loc) -> object:
        """The value at `loc`, expanded; of the innermost that exists."""
        value: object = self.data
        for step in self.walk(loc):
            value = value[step]  # type: ignore[index]
        return value

    def place(self, loc: Loc, key: bool = False) -> Place:
        """Where the value at `loc` begins, or its key; of the innermost value that exists."""
        found = self.walk(loc)
        if key and found in self._keys:
            return self._keys[found]
        return self._values[found]

    def expanded(self, loc: Loc) -> list[tuple[str, str]]:
        """(value, text as written) of each expanded scalar at or below `loc`."""
        found = self.walk(loc)
        return [pair for at, pair in self._expanded.items() if at[: len(found)] == found]


def read(path: Path, environment: Mapping[str, str] | None = None) -> tuple[list[Document], list[Problem]]:
    """The documents of a file and what is wrong with it. Raises nothing: an unreadable file is a problem."""
    file = str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        return [], [Problem(Place(file), "", f"cannot be read ({error.strerror})", "check its permissions")]
    if len(content) > MAX_FILE:
        return [], [Problem(Place(file), "", "is larger than 4 MiB", "put long lists in files of their own")]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place_at(file, content[: error.start].decode("utf-8-sig", "replace"))
        return [], [Problem(place, "", "is not UTF-8", "save the file as UTF-8")]
    return parse(text, file, path.parent, environment)


def parse(
    text: str, file: str, folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[list[Document], list[Problem]]:
    """The documents in `text` and its problems; `file` is only printed. `environment` defaults to the process's."""
    environment = os.environ if environment is None else environment
    documents: list[Document] = []
    problems: list[Problem] = []
    try:
        nodes = list(_compose(text, file))
    except _Unusable as error:
        return [], [error.problem]
    except yaml.YAMLError as error:
        return [], [_syntax_problem(error, text, file)]
    for node in nodes:
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null":
            continue  # an empty document between two `---`
        builder = _Builder(file, folder, environment)
        try:
            document = builder.document(node)
        except _Unusable as error:
            builder.problems.append(error.problem)
        else:
            documents.append(document)
        problems += builder.problems
    if not documents and not problems:
        problems.append(Problem(Place(file), "", "is empty", "write a pipeline: listen, stages, upstreams"))
    return documents, problems


class _Mark(Protocol):
    """A position that the parser remembers, counted from 0."""

    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


class _Unusable(Exception):
    """A document that cannot be made into data at all."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def _compose(text: str, file: str) -> Iterator[yaml.Node]:
    if len(text) > _DEPTH_CHECKED_FROM:
        _check_depth(text, file)
    loader = CCoreLoader(text)
    try:
        while loader.check_node():
            yield loader.get_node()
    finally:
        loader.dispose()


def _check_depth(text: str, file: str) -> None:
    """The C composer recurses without bound; the event stream does not."""
    depth = 0
    for event in yaml.parse(text, Loader=CCoreLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(_place(file, event.start_mark))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _too_deep(place: Place) -> _Unusable:
    return _Unusable(Problem(place, "", f"nested more than {MAX_DEPTH} deep", "write it flatter"))


class _Builder:
    """Makes data and places from the node graph of one document."""

    def __init__(self, file: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.file = file
        self.folder = folder
        self.environment = environment
        self.problems: list[Problem] = []
        self.secrets: set[str] = set()
        self.faulty: set[Loc] = set()
        self.values: dict[Loc, Place] = {}
        self.keys: dict[Loc, Place] = {}
        self.expanded: dict[Loc, tuple[str, str]] = {}
        self._seen: set[int] = set()
        self._aliased = 0

    def document(self, root: yaml.Node) -> Document:
        """Raises _Unusable."""
        if not isinstance(root, yaml.MappingNode):
            place = _place(self.file, root.start_mark)
            raise _Unusable(Problem(place, "", "is not a mapping", "write a pipeline: listen, stages, upstreams"))
        data = self._mapping(root, (), ())
        self.problems = list(dict.fromkeys(self.problems))
        return Document(
            self.file, self.folder, data, frozenset(self.secrets - {""}), frozenset(self.faulty),
            self.values, self.keys, self.expanded,
        )  # fmt: skip

    def _problem(self, mark: _Mark | None, loc: Loc, text: str, suggestion: str) -> None:
        self.faulty.add(loc)
        self.problems.append(Problem(_place(self.file, mark), written_loc(loc), text, suggestion))

    def _value(self, node: yaml.Node, loc: Loc, inside: tuple[int, ...]) -> object:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc, inside)
        if isinstance(node, yaml.SequenceNode):
            inside = self._enter(node, loc, inside)
            self._check_tag(node, loc, "seq")
            return [self._value(item, (*loc, index), inside) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        self._enter(node, loc, inside)
        return self._scalar(node, loc)

    def _enter(self, node: yaml.Node, loc: Loc, inside: tuple[int, ...]) -> tuple[int, ...]:
        """Count what aliases repeat, refuse what contains itself. Raises _Unusable."""
        place = _place(self.file, node.start_mark)
        self.values.setdefault(loc, place)
        if id(node) in inside:
            raise _Unusable(Problem(place, written_loc(loc), "contains itself through an alias", "remove the alias"))
        if len(inside) >= MAX_DEPTH:
            raise _too_deep(place)
        if id(node) in self._seen:
            self._aliased += 1
            if self._aliased > MAX_ALIASED:
                text = f"aliases repeat more than {MAX_ALIASED} values"
                raise _Unusable(Problem(place, "", text, "use fewer aliases"))
        self._seen.add(id(node))
        return (*inside, id(node))

    def _mapping(self, node: yaml.MappingNode, loc: Loc, inside: tuple[int, ...]) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, key_node, value_node, within in self._pairs(node, loc, inside):
            at = (*loc, key)
            if at in self.values:
                continue  # merged, and written out as well: the written one stands
            self.keys[at] = _place(self.file, key_node.start_mark)
            data[key] = self._value(value_node, at, within)
        return data

    def _pairs(
        self, node: yaml.MappingNode, loc: Loc, inside: tuple[int, ...]
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node, tuple[int, ...]]]:
        """Key, its node, the value's node and what that is inside of; what is written here, then what `<<` merges."""
        inside = self._enter(node, loc, inside)
        self._check_tag(node, loc, "map")
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                self._problem(key_node.start_mark, loc, "a key is not a plain text", "write `name: value`")
                continue
            key = key_node.value  # as written: `25:` and `on:` are names here
            if key in lines:
                text = f"{key!r} is written twice"
                self._problem(key_node.start_mark, loc, text, f"the first is in line {lines[key]}; remove one")
                continue
            lines[key] = key_node.start_mark.line + 1
            if key == "<<" and not key_node.style:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                yield key, key_node, value_node, inside
        for source in merged:
            if isinstance(source, yaml.MappingNode):
                yield from self._pairs(source, loc, inside)
            else:
                self._problem(source.start_mark, loc, "'<<' merges mappings only", "write `<<: *name` of a mapping")

    def _check_tag(self, node: yaml.Node, loc: Loc, *known: str) -> bool:
        if node.tag in {_TAG + name for name in known}:
            return True
        tag = node.tag.removeprefix(_TAG)
        self._problem(node.start_mark, loc, f"the tag {tag!r} is not known here", "remove it")
        return False

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> object:
        text: str = node.value
        if not self._check_tag(node, loc, "str", "null", "bool", "int", "float"):
            return text
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return self._expand(node, loc) if "$" in text else text
        try:
            return _plain(kind, text)
        except (ValueError, KeyError):
            self._problem(node.start_mark, loc, f"{text[:40]!r} is not a value of type {kind}", "put it in quotes")
            return text

    def _expand(self, node: yaml.ScalarNode, loc: Loc) -> str:
        broken: list[tuple[str, str]] = []
        references = False

        def value(match: re.Match[str]) -> str:
            nonlocal references
            if match.group() == "$$":
                return "$"
            references = True
            found = self._reference(match.group(1))
            if isinstance(found, str):
                return found
            broken.append(found)
            return match.group()

        text = _REFERENCE.sub(value, node.value)
        for wrong, suggestion in broken:
            self._problem(node.start_mark, loc, wrong, suggestion)
        if references:
            self.expanded[loc] = (text, node.value)
        return text

    def _reference(self, body: str | None) -> str | tuple[str, str]:
        """What `${body}` stands for, or (what is wrong, what to write)."""
        forms = "write ${NAME}, ${NAME:-default} or ${file:path}; $${ stands for itself"
        if body is None:
            return "'${' is not closed", forms
        if body.startswith("file:"):
            return self._secret_file(body.removeprefix("file:"))
        match = _VARIABLE.fullmatch(body)
        if match is None:
            return f"'${{{body}}}' is not a reference", forms
        name, default = match.groups()
        value = self.environment.get(name)
        if default is not None and not value:
            return str(default)  # it stands in the file, so it is no secret
        if value is None:
            return f"the variable {name} is not set", f"set it, or write ${{{name}:-default}}"
        self.secrets.add(value)
        return value

    def _secret_file(self, name: str) -> str | tuple[str, str]:
        path = self.folder / Path(name).expanduser()
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SECRET + 1)
            if len(content) > MAX_SECRET:
                return f"the file {name} is larger than 64 KiB", "name a file that holds one value"
            value = content.decode().removesuffix("\n").removesuffix("\r")
        except OSError as error:
            return f"the file {name} cannot be read ({error.strerror})", "paths are relative to this file's folder"
        except UnicodeDecodeError:
            return f"the file {name} is not UTF-8", "name a text file"
        self.secrets.add(value)
        return value


def _plain(kind: str, text: str) -> object:
    """A scalar of the core schema (YAML 1.2.2, 10.3). Raises ValueError, KeyError."""
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "float":
        return float(_INFINITY.get(text.lower(), text))
    if text[:2] in ("0o", "0x"):
        return int(text, 0)
    return int(text)


def _place(file: str, mark: _Mark | None) -> Place:
    assert mark is not None  # only nodes made in code have none
    return Place(file, mark.line + 1, mark.column + 1)


def _place_at(file: str, before: str) -> Place:
    """The place behind the text `before`."""
    return Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


_SYNTAX = {
    "mapping values are not allowed in this context": (
        "a ':' stands where no key can be", "put the text in quotes, or mend the indentation",
    ),
    "did not find expected key": ("the indentation does not fit the lines above", "mend the indentation"),
    "did not find expected '-' indicator": ("the indentation does not fit the list above", "begin the line with '- '"),
    "did not find expected ',' or ']'": ("a list is not closed", "write ',' between its items and ']' at its end"),
    "did not find expected ',' or '}'": ("a mapping is not closed", "write ',' between its keys and '}' at its end"),
    "could not find expected ':'": ("a key has no ':'", "write `key: value`"),
    "found unexpected end of stream": ("a quote is never closed", "close it"),
    "found undefined alias": ("an alias has no anchor before it", "put text that begins with '*' in quotes"),
    "did not find expected alphabetic or numeric character": (
        "'*' or '&' stands without a name", "put text that begins with it in quotes",
    ),
    "did not find expected node content": ("a value is missing, or something is not closed", "look for an open [ or {"),
    "found unknown escape character": ("an unknown escape in double quotes", "use single quotes, or write \\\\ for \\"),
}  # fmt: skip


def _syntax_problem(error: yaml.YAMLError, text: str, file: str) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        # a character that YAML does not allow; the reader counts octets
        position = getattr(error, "position", 0)
        before = text.encode()[:position].decode(errors="ignore")
        return Problem(_place_at(file, before), "", "a control character", "remove it")
    mark = error.problem_mark
    wrong, suggestion = _SYNTAX.get(error.problem or "", (f"is not YAML: {error.problem}", "mend it"))
    line = (text.splitlines()[mark.line : mark.line + 1] or [""])[0]
    if error.problem == "found unexpected end of stream" and error.context_mark is not None:
        mark = error.context_mark
    elif error.problem == "found character that cannot start any token":
        character = line[mark.column : mark.column + 1]
        if character == "\t":
            wrong, suggestion = "a tab stands in the indentation", "use spaces"
        else:
            wrong, suggestion = f"{character!r} cannot begin a value", "put the text in quotes"
    elif re.search(r"(?<!['\"])\$\{", line):
        suggestion = "put ${...} in quotes inside { } and [ ]"
    return Problem(_place(file, mark), "", wrong, suggestion)
