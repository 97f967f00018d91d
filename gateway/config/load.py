"""From files and folders to validated pipelines.

Everything that is wrong in all files is found before anything is said, so that one `gateway check` shows it all.
The settings of stages are validated by the pipeline compiler, through `validate_settings`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from gateway.config.documents import Document, read
from gateway.config.explain import problems_from
from gateway.config.models import Pipeline
from gateway.config.problems import ConfigError, Loc, Place, Problem, written_loc
from gateway.config.process import Process
from gateway.values import shown

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Loaded:
    """All pipelines of the files given, each with the document it came from, and the settings of the process."""

    pipelines: list[tuple[Pipeline, Document]]
    process: Process


def load(paths: Sequence[Path], environment: Mapping[str, str] | None = None) -> Loaded:
    """Read files and folders (their *.yaml and *.yml, sorted). Raises ConfigError with every problem found.

    `environment` is what `${NAME}` is looked up in, the process's own by default.
    """
    problems: list[Problem] = []
    documents: list[Document] = []
    for path in _files(paths, problems):
        found, wrong = read(path, environment)
        documents += found
        problems += wrong
    process = _process(documents, problems)
    pipelines = list(_pipelines(documents, process, problems))
    problems += _clashes(pipelines)
    if not pipelines and not problems:
        file = ", ".join(map(str, paths)) or "no file"
        problems.append(Problem(Place(file), "", "no pipeline here", "write one: listen, stages, upstreams"))
    if problems:
        raise ConfigError(problems)
    return Loaded(pipelines, process)


def validate_settings(model: type[Model], document: Document, loc: Loc, raw: object) -> Model | list[Problem]:
    """The settings of a stage (or another plugin) from what `StageEntry.settings` holds, or what is wrong with them.

    Anything but a mapping is the value of the model's short form: the setting that its class attribute
    `short_form` names.
    """
    if raw is None:
        raw = {}
    elif not isinstance(raw, dict):
        short_form = getattr(model, "short_form", None)
        if not isinstance(short_form, str):
            names = ", ".join(field.alias or name for name, field in model.model_fields.items())
            advice = f"write a mapping of {names}" if names else "write its name only"
            text = f"{shown(raw)} is not a mapping" if isinstance(raw, list) else "takes no single value"
            return [Problem(document.place(loc), written_loc(loc), text, advice)]
        raw = {short_form: raw}
    return _validated(model, document, loc, raw)


def _validated(model: type[Model], document: Document, loc: Loc, raw: object) -> Model | list[Problem]:
    try:
        return model.model_validate(raw, context={"folder": document.folder})
    except ValidationError as error:
        return problems_from(error, document, loc, model)


def _files(paths: Sequence[Path], problems: list[Problem]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
            if not files:
                problems.append(Problem(Place(str(path)), "", "no *.yaml in this folder", "name another one"))
        elif path.exists():
            files = [path]
        else:
            problems.append(Problem(Place(str(path)), "", "no such file", _nearby(path)))
            continue
        for file in files:
            if file.resolve() not in seen:  # a folder and a file of it
                seen.add(file.resolve())
                yield file


def _nearby(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        return f"the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def _process(documents: Iterable[Document], problems: list[Problem]) -> Process:
    """The one `process:` mapping of all documents, or its defaults."""
    loc: Loc = ("process",)
    holders = [document for document in documents if "process" in document.data]
    if not holders:
        return Process()
    first = holders[0].place(loc, key=True)
    for other in holders[1:]:
        text = "`process` is written twice"
        problems.append(Problem(other.place(loc, key=True), "", text, f"the first is {first}; keep one"))
    result = _validated(Process, holders[0], loc, holders[0].data["process"])
    if isinstance(result, Process):
        return result
    problems += result
    return Process()


def _pipelines(
    documents: Iterable[Document], process: Process, problems: list[Problem]
) -> Iterator[tuple[Pipeline, Document]]:
    count: dict[str, int] = {}
    for document in documents:
        data = {key: value for key, value in document.data.items() if key != "process"}
        if not data and "process" in document.data:
            continue
        stem = Path(document.file).stem
        count[stem] = count.get(stem, 0) + 1
        data.setdefault("name", stem if count[stem] == 1 else f"{stem}-{count[stem]}")
        result = _validated(Pipeline, document, (), data)
        if isinstance(result, Pipeline):
            if "log" not in data:
                result = result.model_copy(update={"log": process.log})
            yield result, document
        else:
            problems += result


def _clashes(pipelines: Iterable[tuple[Pipeline, Document]]) -> Iterator[Problem]:
    """Names and addresses that two pipelines share."""
    names: dict[str, Place] = {}
    addresses: dict[str, Place] = {}
    for pipeline, document in pipelines:
        place = document.place(("name",))
        if pipeline.name in names:
            text = f"the name {pipeline.name!r} is taken ({names[pipeline.name]})"
            yield Problem(place, "name", text, "give each pipeline a `name`")
        names.setdefault(pipeline.name, place)
        own: dict[str, Place] = {}
        for index, listener in enumerate(pipeline.listen):
            loc: Loc = ("listen", index, "url")
            at = document.place(loc)
            for address in [one.address for one in listener.url.urls() if one.fixed]:
                if address in addresses:
                    text = f"{address} is listened on already ({addresses[address]})"
                    yield Problem(at, written_loc(document.walk(loc)), text, "choose another port")
                own[address] = at
        addresses = {**own, **addresses}
