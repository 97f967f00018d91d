"""Write docs/reference/ from the models, tables and docstrings (`make docs`).

A test compares what is committed with what this makes, so that the reference cannot fall behind the code.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from gateway import hookspecs, values, verdicts
from gateway.config import listen, log_settings, models, process, resolver, tls_settings
from gateway.facts import BUILT_IN, Fact
from gateway.limits import Limits
from gateway.observe.records import RECORDS
from gateway.pipeline.asked import hook_names
from gateway.pipeline.conditions import FUNCTIONS
from gateway.pipeline.reference import settings_rows
from gateway.pipeline.registry import GROUP, Registry
from gateway.replies import CAUSES, FAMILIES, FIXED, Replies
from gateway.stage import Attempt, Kind, Outcome, Peer, SaslStep, Stage, Worker
from gateway.verdicts import Refuse

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by `make docs` from the code; edit that. -->"


def built_in() -> list[str]:
    """Names of the stages of this distribution, not of packages that happen to be installed too."""
    return sorted(point.name for point in entry_points(group=GROUP) if point.value.startswith("stages."))


# -- markdown -------------------------------------------------------------------------------------------------


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *(part.strip("\n") for part in parts if part)]) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def settings_table(model: type[BaseModel]) -> str:
    rows = settings_rows(model)
    if not rows:
        return "It has no settings."
    return table(
        ["setting", "type", "default", "meaning"],
        ([code(row.name), row.type, _default(row.default), row.description] for row in rows),
    )


def _default(text: str) -> str:
    if text == "(required)":
        return "required"
    return text if text in ("none", "see below") or " " in text else code(text)


def nested(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Models within a model's fields, each once, in their order."""
    found: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        for kind in _within(field.annotation):
            found[kind] = None
            found.update(dict.fromkeys(nested(kind)))
    yield from found


def _within(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _within(argument)


# -- pipeline.md ----------------------------------------------------------------------------------------------

SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("The pipeline", "The keys of a document.", models.Pipeline),
    ("listen", "Each entry is a URL, or a mapping:", listen.Listener),
    ("listen: keepalive", "`on` takes the system's values, `off` sends no probes.", listen.Keepalive),
    ("tls", "", tls_settings.Tls),
    ("tls.certificates", "", tls_settings.Certificate),
    ("trust", "", models.Trust),
    ("limits", "", Limits),
    ("spool", "Or `spool: always`.", models.Spool),
    ("upstreams", "`upstreams` maps names to pools:", models.Pool),
    ("upstreams: servers", "Each entry is a URL, or a mapping:", models.Server),
    ("upstreams: health", "", models.Health),
    ("upstreams: reuse", "`reuse: on` takes the defaults.", models.Reuse),
    ("upstreams: capabilities", "", models.PoolCapabilities),
    ("dynamic_servers", "As a pool's, without `servers` and `balance`:", models.ServerSettings),
    ("replies", "[Replies](replies.md) lists the names.", models.WrittenReplies),
    ("tables", "`tables` maps names to lists, or to mappings:", models.Table),
    ("log", "", log_settings.Log),
    ("log: sinks", "", log_settings.LogSink),
    ("listen: log", "As the pipeline's, but for `debug_clients`:", log_settings.LogSinks),
    ("resolver", "", resolver.ResolverSettings),
    ("process", "At most one of all documents that are loaded together has it.", process.Process),
    ("process.store", "", process.Store),
    ("process.store.lmdb", "", process.LmdbStore),
    ("process.store.redis", "", process.RedisStore),
    ("process.admin", "", process.Admin),
    ("process.traces", "", process.Traces),
)

INTRODUCTION = """
A file is YAML and holds one pipeline, or several separated by `---`. `gateway check FILE` says what is wrong with it,
`gateway schema` prints a JSON schema for editors.

`${NAME}`, `${NAME:-default}` and `${file:path}` inside a value are replaced by an environment variable or the content
of a file; what they stand for is never logged. Unknown and duplicate keys are errors.
"""

STAGE_SETTINGS = """
An entry of `stages` is `name`, `name: {setting: value}`, or `name: value` for the one setting that the type declares as
its short form. Beside its own settings, which [Stages](stages.md) lists, every stage has these:
"""

MODES = """
`mode: observe` and a share (`10%`) are for checks and limits; stages that decide who the client is or where its mail
goes are `off` or `enforce`. `on_error: pass` is refused for guards. A stage whose `when` is known only later than its
first phase is asked from then on and hears first what it missed.
"""

FACTS = """
Facts are what `when:` and other expressions can read. A fact has its default until its phase has come; stages can set
more, named `<id>.<name>`, for the stages behind them ([Stages](stages.md)).
"""

FUNCTION_TEXT = """
Expressions are CEL: `==`, `!=`, `<`, `in`, `&&`, `||`, `!`, `? :`, `+`, and on texts `startsWith`, `endsWith`,
`contains`, `matches` (RE2) and `size`. Names and types are checked when the file is loaded. The gateway adds:
"""


def pipeline() -> str:
    parts = [INTRODUCTION, "## Values", _value_table()]
    for title, text, model in SECTIONS:
        parts += [f"## {title}", text or _docstring(model), settings_table(model)]
    parts += ["## stages", STAGE_SETTINGS, settings_table(models.Reserved), MODES]
    parts += ["## Facts", FACTS, _fact_table(BUILT_IN), "## Functions", FUNCTION_TEXT, _function_table()]
    return page("Pipeline files", *parts)


def _value_table() -> str:
    kinds: tuple[typing.Any, ...] = (
        values.Duration, values.Size, values.Rate, values.Percent, values.Cidr, values.PathValue, values.Condition,
        values.TextExpression, values.Secret, values.PoolReference,
    )  # fmt: skip
    rows = []
    for kind in kinds:
        schema = TypeAdapter(kind).json_schema()
        rows.append([str(schema[values.KIND]), str(schema["description"])])
    return table(["type", "how it is written"], rows)


def _fact_table(facts: Sequence[Fact]) -> str:
    return table(
        ["fact", "type", "default", "known from", "of the", "meaning"],
        (
            [code(fact.name), fact.type, _fact_default(fact), fact.phase.name.lower(), fact.scope.value, fact.help]
            for fact in facts
        ),
    )


def _fact_default(fact: Fact) -> str:
    if isinstance(fact.default, bool):
        return str(fact.default).lower()
    return '`""`' if fact.default == "" else code(str(fact.default))


def _function_table() -> str:
    return table(
        ["function", "gives", "meaning"],
        ([code(f"{name}({', '.join(f.arguments)})"), f.result, f.help] for name, f in FUNCTIONS.items()),
    )


# -- stages.md ------------------------------------------------------------------------------------------------

STAGES = """
One section a stage type, from its own module. A *guard* protects identity, resources or relaying: no `Allow` skips it
and it cannot be told to fail open. A *check* is policy. *Plumbing* carries things on.
"""


def stages() -> str:
    registry, names = Registry(), built_in()
    types = {name: registry.get(name) for name in names}
    listing = table(
        ["stage", "kind", "what it does"],
        ([f"[{name}](#{name})", type_.kind.value, _docstring(type_)] for name, type_ in types.items()),
    )
    return page("Stages", STAGES, listing, *(_stage(name, type_) for name, type_ in types.items()))


def _stage(name: str, type_: type[Stage]) -> str:
    module = inspect.getmodule(type_)
    short = type_.Settings.short_form
    parts = [
        f"## {name}",
        _stage_line(type_),
        inspect.getdoc(module) or _docstring(type_),
        settings_table(type_.Settings),
    ]
    if short is not None:
        parts.append(f"`{name}: value` is short for `{name}: {{{short}: value}}`.")
    for model in nested(type_.Settings):
        parts += [f"`{model.__name__.lower()}`: {_docstring(model)}", settings_table(model)]
    known = {fact.name: fact for fact in BUILT_IN}
    provided = [known[fact] for fact in sorted(type_.provides)]
    provided += [Fact(f"<id>.{f.name}", f.type, f.default, f.phase, f.scope, f.help) for f in type_.facts]
    if provided:
        parts += ["Facts it sets:", _fact_table(provided)]
    return "\n\n".join(parts)


def _stage_line(type_: type[Stage]) -> str:
    """Kind, phases and what the reserved settings may be."""
    asked = ", ".join(code(name) for name in hook_names(type_)) or "nothing"
    whole = type_.decides_identity or type_.kind is Kind.PLUMBING
    modes = "`off` or `enforce`" if whole else "`off`, `observe`, a share or `enforce`"
    fails = "cannot be `pass`" if type_.kind is Kind.GUARD or type_.never_pass else "may be `pass`"
    lines = [f"Kind: {type_.kind.value}. Asked in: {asked}.", f"`mode`: {modes}. `on_error` {fails}."]
    if type_.requires:
        lines.append(f"Requires: {', '.join(code(name) for name in sorted(type_.requires))}.")
    return " ".join(lines)


# -- hooks.md -------------------------------------------------------------------------------------------------

HOOKS = """
The contract of every method of a stage: [Writing a stage](../writing-a-stage.md) shows how to use it. The first letter
of each says what the method is: `s` a plain function, `a` a coroutine, `s/a` the author's choice. A method may name
fewer arguments than its hook, never others. None always means: go on.

`message`, `edits` and `Discard` belong to the content grade, which this version does not have yet: a stage with a
`message` method is refused when the file is loaded.
"""

VERDICTS = """
What a method answers, from `gateway`. Which may be given where stands in the signatures above; any other answer is a
failure of the stage, for which `on_error` has the verdict.
"""

OBJECTS: tuple[tuple[str, type], ...] = (
    ("worker", Worker),
    ("attempt", Attempt),
    ("peer", Peer),
    ("step", SaslStep),
    ("outcome", Outcome),
)


def hooks() -> str:
    parts = [HOOKS]
    for name, hook in vars(hookspecs).items():
        if inspect.isfunction(hook):
            parts += [f"### {name}", _definition(name, hook), _whole(hook)]
    parts += ["## Verdicts", VERDICTS]
    for verdict in typing.get_args(verdicts.Verdict):
        parts += [
            f"### {verdict.__name__}",
            f"```python\n{verdict.__name__}{_signature(verdict)}\n```",
            _whole(verdict),
        ]
    parts.append("## What methods are given")
    for name, kind in OBJECTS:
        members = ", ".join(code(member) for member in _members(kind))
        parts.append(f"`{name}`: {_whole(kind)}\n\nIt has {members}.")
    return page("Hooks", *parts)


def _signature(call: Callable[..., object]) -> str:
    signature = inspect.signature(call)
    parameters = []
    for name, parameter in signature.parameters.items():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{name}: {parameter.annotation}{default}")
    line = f"({', '.join(parameters)})"
    if len(line) > 100:
        line = "(\n    " + ",\n    ".join(parameters) + ",\n)"
    result = signature.return_annotation
    return line if result in (signature.empty, None, "None") else f"{line} -> {result}"


def _definition(name: str, hook: Callable[..., object]) -> str:
    waits = (hook.__doc__ or "").startswith("a.")
    return f"```python\n{'async ' if waits else ''}def {name}{_signature(hook)}\n```"


def _members(kind: type) -> Iterator[str]:
    slots = getattr(kind, "__slots__", ())
    names = [name for name in vars(kind) if not name.startswith("_")]
    for name in slots or names:
        member = inspect.getattr_static(kind, name)
        yield f"{name}()" if inspect.isfunction(member) else name


# -- replies.md, logs.md --------------------------------------------------------------------------------------

REPLIES = """
What a client reads for each cause of a refusal, unless the stage gives a text or a reply of its own. `soft_bounce` and
stages may ask for the temporary form. Where the gateway closes the connection, 450 and 451 become 421. The session's id
stands at the end unless `reply_id: false`.
"""


STORE_REPLIES = """
IMAP and POP3 have no numbers. A refused command is answered with what stands here (IMAP with its tag in front); a
session that is refused as a whole ends with `* BYE` in place of `NO`. Temporary forms have `UNAVAILABLE` or `SYS/TEMP`
where a cause has no response code of its own.
"""

WRITTEN = """
A pipeline may say something else: `replies: {smtp: {upstream_down: 451 4.3.0 come back later}}`. Names are those of the
causes, in lower case, and of these fixed replies to commands. What is written is said as it stands, without the
session's id. In SMTP `unknown_command`, `bad_argument`, `not_available`, `bad_sequence` and `bad_parameter` are all
errors of ours with the codes 500, 501, 502, 503 and 504 that have no name of their own. A greeting that is written
names no instance, so that a connection that leads back to this gateway is not noticed by it.
"""


def replies() -> str:
    rows, stores = [], []
    imap, pop3 = Replies("imap"), Replies("pop3")
    for cause, row in CAUSES.items():
        default = row.temporary if row.is_temporary else row.permanent
        other = row.permanent if row.is_temporary else row.temporary
        rows.append([code(cause.name), cause.value, default, other, row.text])
        stores.append([code(cause.name), imap.store(Refuse(cause)), pop3.store(Refuse(cause))])
    names = list(dict.fromkeys(name for family in FAMILIES for name in FIXED[family]))
    fixed = [
        [code(name), *(FIXED[family][name] or "computed" if name in FIXED[family] else "" for family in FAMILIES)]
        for name in names
    ]
    return page(
        "Replies",
        REPLIES,
        table(["cause", "in logs", "SMTP reply", "its other form", "text"], rows),
        "## IMAP and POP3",
        STORE_REPLIES,
        table(["cause", "IMAP", "POP3"], stores),
        "## Written replies",
        WRITTEN,
        table(["name", "SMTP", "IMAP", "POP3"], fixed),
    )


LOGS = """
Every record and its keys; [Logs](../logs.md) says how to use them. Each has `time` (RFC 3339, UTC), `level`, `logger`
and `record` (its name) too. Keys without a value are left out.
"""


def logs() -> str:
    parts = [LOGS]
    for name, record in RECORDS.items():
        keys = table(["key", "meaning"], ([code(key), text] for key, text in record.keys.items()))
        parts += [f"## {name}", record.help, keys if record.keys else ""]
    return page("Log records", *parts)


# -------------------------------------------------------------------------------------------------------------


def _docstring(thing: object) -> str:
    """Its first paragraph."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _whole(thing: object) -> str:
    return inspect.getdoc(thing) or ""


PAGES: dict[str, Callable[[], str]] = {
    "pipeline.md": pipeline,
    "stages.md": stages,
    "hooks.md": hooks,
    "replies.md": replies,
    "logs.md": logs,
}


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
