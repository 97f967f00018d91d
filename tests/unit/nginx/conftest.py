"""Configurations of nginx imported, and read back as the pipeline files that they became."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import trustme

from gateway.config.documents import parse
from gateway.nginx.importer import Imported, import_file

ADDRESSES = {"trusted.test": ["192.0.2.7", "2001:db8::7"], "dns.test": ["192.0.2.53"]}


def lookup(name: str) -> list[str]:
    """A resolver that knows two names."""
    if name not in ADDRESSES:
        raise OSError(f"{name} is not known")
    return ADDRESSES[name]


def at(value: object, path: str) -> object:
    """The value at `key.0.key`; None where there is none. Of a list of stages `name` finds its settings."""
    for step in path.split("."):
        if isinstance(value, list):
            if step.isdecimal():
                value = value[int(step)] if int(step) < len(value) else None
            else:
                value = next((item[step] for item in value if isinstance(item, dict) and step in item), None)
        else:
            value = cast(dict[str, object], value).get(step) if isinstance(value, dict) else None
    return value


@dataclass
class Result:
    """What an import gave; `documents` are the pipelines as plain data, without those of the process."""

    imported: Imported

    @property
    def data(self) -> list[dict[str, object]]:
        documents, problems = parse(self.imported.text, "mail.yaml", Path("/"), {})
        assert problems == []
        return [document.data for document in documents]

    @property
    def documents(self) -> list[dict[str, object]]:
        return [data for data in self.data if "stages" in data]

    @property
    def errors(self) -> list[str]:
        return [f"{Path(one.file).name}:{one.line}: {one.text}" for one in self.imported.errors]

    @property
    def warnings(self) -> list[str]:
        return [f"{Path(one.file).name}:{one.line}: {one.text}" for one in self.imported.warnings]


Import = Callable[..., Result]


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """Import the text of an nginx.conf, with other files of its folder where given."""

    def run(text: str, lenient: bool = False, files: dict[str, str] | None = None) -> Result:
        for name, content in {**(files or {}), "nginx.conf": text}.items():
            (tmp_path / name).write_text(content)
        result = import_file(tmp_path / "nginx.conf", lenient=lenient, lookup=lookup, own_name=lambda: "Host.Test")
        return Result(result)

    return run


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chain.pem, key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    leaf = authority.issue_cert("mail.example.com")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    for pem in leaf.cert_chain_pems:
        pem.write_to_path(folder / "chain.pem", append=True)
    return folder
