"""Files and folders to pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from gateway.config.load import load, validate_settings
from gateway.config.problems import ConfigError, Loc
from gateway.values import Duration, PathValue

PIPELINE = """
listen: [smtp://127.0.0.1:0]
hostname: mail.example.org
stages: [{greeting_delay: 1s}, test: {delay: 2s, mode: observe}, splice]
upstreams: {mta: {servers: [10.0.0.5]}}
"""


def write(folder: Path, name: str, text: str = PIPELINE) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def said(*paths: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(paths)
    return [str(problem) for problem in caught.value.problems]


def test_names_and_documents(tmp_path: Path) -> None:
    both = write(tmp_path, "mx.yaml", f"---{PIPELINE}---{PIPELINE}---\nname: other{PIPELINE}")
    loaded = load([both])
    assert [pipeline.name for pipeline, _ in loaded.pipelines] == ["mx", "mx-2", "other"]
    assert loaded.pipelines[2][1].place(("name",)).line == 12


def test_folders(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "notes.txt"):
        write(tmp_path, name)
    loaded = load([tmp_path, tmp_path / "b.yaml"])
    assert [pipeline.name for pipeline, _ in loaded.pipelines] == ["a", "b"]


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "submission.yaml")
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "submision.yaml", tmp_path / "empty", tmp_path / "x" / "y.yaml") == [
        f"{tmp_path}/empty: no *.yaml in this folder; name another one",
        f"{tmp_path}/submision.yaml: no such file; did you mean {tmp_path}/submission.yaml?",
        f"{tmp_path}/x/y.yaml: no such file; the folder {tmp_path}/x does not exist",
    ]


def test_problems_of_all_files_at_once(tmp_path: Path) -> None:
    one = write(tmp_path, "1.yaml", PIPELINE + "colour: red\n")
    two = write(tmp_path, "2.yaml", "a: [\n")
    three = write(tmp_path, "3.yaml", PIPELINE.replace("smtp://", "smtp:/"))
    assert [line.partition(": ")[0] for line in said(three, two, one)] == [f"{one}:6:1", f"{two}:2:1", f"{three}:2:10"]


def test_process(tmp_path: Path) -> None:
    shared = write(tmp_path, "process.yaml", "process: {drain: 10s, log: {format: text, level: debug}}")
    own = write(tmp_path, "own.yaml", PIPELINE + "log: {level: error}\n")
    plain = write(tmp_path, "plain.yaml")
    loaded = load([plain, own, shared])
    assert loaded.process.drain == 10.0
    assert {pipeline.name: pipeline.log.level for pipeline, _ in loaded.pipelines} == {"plain": "debug", "own": "error"}
    inline = write(tmp_path, "inline.yaml", PIPELINE + "process: {drain: 5s}\n")
    assert load([inline]).process.drain == 5.0
    assert said(inline, shared) == [f"{shared}:1:1: `process` is written twice; the first is {inline}:6:1; keep one"]
    assert said(shared) == [f"{shared}: no pipeline here; write one: listen, stages, upstreams"]


class Test(BaseModel):
    __test__ = False
    model_config = ConfigDict(extra="forbid")
    short_form: ClassVar[str | None] = "delay"
    delay: Duration
    file: PathValue | None = None


class Plain(BaseModel):
    model_config = ConfigDict(extra="forbid")
    first: str = ""


@pytest.mark.parametrize(
    ("model", "stage", "lines"),
    [
        (Test, "x: 1s", []),
        (Test, "x: {delay: 1s, file: y}", []),
        (Test, "x: soon", ["2:8: stages[0].x: 'soon' is not a duration; write 1s, 250ms, 5m, 1h or 1d"]),
        (Test, "x: [1s]", ["2:8: stages[0].x: a list is not a duration; write 1s, 250ms, 5m, 1h or 1d"]),
        (Test, "x", ["2:5: stages[0].x.delay: is missing; add `delay: ...`"]),
        (Test, "x: {dealy: 1s}", ["2:8: stages[0].x.delay: is missing; add `delay: ...`",
                                  "2:9: stages[0].x: unknown setting 'dealy'; did you mean 'delay'?"]),
        (Plain, "x: 5", ["2:8: stages[0].x: takes no single value; write a mapping of first"]),
        (Plain, "x: [5]", ["2:8: stages[0].x: a list is not a mapping; write a mapping of first"]),
        (Plain, "x", []),
        (Plain, "x:", []),
    ],
)  # fmt: skip
def test_settings_of_a_stage(tmp_path: Path, model: type[BaseModel], stage: str, lines: list[str]) -> None:
    text = f"stages:\n  - {stage}\n{PIPELINE.replace('stages', '#')}"
    path = write(tmp_path, "x.yaml", text)
    pipeline, document = load([path]).pipelines[0]
    entry = pipeline.stages[0]
    loc: Loc = entry.loc
    result = validate_settings(model, document, loc, entry.settings)
    if lines:
        assert isinstance(result, list)
        assert [str(problem).removeprefix(f"{path}:") for problem in result] == lines
    else:
        assert isinstance(result, model)
        if isinstance(result, Test) and result.file is not None:
            assert result.file == tmp_path / "y"


def test_a_variable_may_hold_any_setting(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", PIPELINE + "allow_plaintext_auth: ${PLAIN}\nlimits: {recipients: '${N:-5}'}\n")
    pipeline, document = load([path], {"PLAIN": "true"}).pipelines[0]
    assert pipeline.allow_plaintext_auth is True and pipeline.limits.recipients == 5
    assert document.secrets == {"true"}


def test_loading_imports_little() -> None:
    """`gateway check` answers within 0.5 s: the models load without event loop, HTTP or TLS libraries."""
    code = (
        "import sys; sys.modules['gateway'] = m = type(sys)('gateway'); m.__path__ = [sys.argv[1]]\n"
        "import gateway.config.load\n"
        "heavy = {'asyncio', 'aiohttp', 'aiosmtpd', 'OpenSSL', 'cryptography', 'dns', 'structlog', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    import gateway.config.load

    package = Path(gateway.config.load.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(package)], check=True, cwd=package.parent, timeout=60)
