"""nginx.conf in, pipeline documents out."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.nginx import values
from gateway.nginx.conf import Finding, Findings, read
from gateway.nginx.document import Document, Setting, pipeline
from gateway.nginx.merge import Main, merge
from gateway.nginx.values import Lookup
from gateway.nginx.write import Map, comment, document
from gateway.values import format_duration


@dataclass
class Imported:
    """What came of an import.

    `head` are comment lines; `process` the text of a document with `process:`, or ""; `errors` what nginx refuses or
    the gateway has no equal for, `warnings` the rest.
    """

    head: str
    process: str
    documents: list[Document]
    errors: list[Finding]
    warnings: list[Finding]

    @property
    def text(self) -> str:
        """All documents as one file."""
        parts = [self.process, *(document.text for document in self.documents)]
        return self.head + "".join(f"---\n{part}" for part in parts if part)


def import_file(
    path: Path, *, lenient: bool = False, prefix: Path | None = None, lookup: Lookup = values.addresses,
    own_name: Callable[[], str] = socket.gethostname,
) -> Imported:  # fmt: skip
    """Import a configuration file. With `lenient` what has no equal is a warning, also in the documents.

    `prefix`: where nginx's log files are (its -p); by default above a folder `conf`, else beside the file.
    """
    path = path.absolute()
    folder = path.parent
    findings = Findings()
    main, servers = merge(read(path, findings), str(path), findings)
    setting = Setting(folder, prefix or (folder.parent if folder.name == "conf" else folder), main, lookup, own_name)
    documents: list[Document] = []
    if not findings.all("fatal"):
        for server in servers:
            documents.append(pipeline(server, setting))
    head = _head(path, main, findings)
    for server in servers:
        findings.take(server.findings)
    kinds = ("fatal",) if lenient else ("fatal", "unequal")
    errors = _in_order(findings.all(*kinds))
    warnings = [finding for finding in findings.all() if finding not in errors]
    return Imported(head, _process(main), documents, errors, warnings)


def _in_order(findings: list[Finding]) -> list[Finding]:
    """As somebody who mends the files goes through them: file by file, from the top."""
    files = list(dict.fromkeys(finding.file for finding in findings))
    return sorted(findings, key=lambda finding: (files.index(finding.file), finding.line))


def _head(path: Path, main: Main, findings: Findings) -> str:
    """What holds for the process, and what is said elsewhere than in a pipeline."""
    texts = [f"Imported from {path} by `gateway import-nginx`; docs/nginx.md says what differs."]
    texts += [f"NOT IMPORTED: {finding}" for finding in findings.all("unequal")]
    for name, text in _ELSEWHERE.items():
        directive = main.one(name)
        if directive is not None:
            texts.append(f"{directive} -> {text}")
    return "".join(f"{line}\n" for text in texts for line in comment(text))


_ELSEWHERE = {"pid": "gateway run --pid-file PATH"}
MOST_WORKERS = 64


def _process(main: Main) -> str:
    settings = Map()
    if (user := main.one("user")) is not None:
        settings.put("user", user.arguments[0], str(user))
        if len(user.arguments) > 1:
            settings.put("group", user.arguments[1])
    if (workers := main.one("worker_processes")) is not None:
        word = workers.arguments[0]
        number = min(int(word), MOST_WORKERS) if word.isdecimal() else "auto"
        settings.put("workers", number, str(workers))
    if (timeout := main.one("worker_shutdown_timeout")) is not None:
        settings.put("drain", format_duration(values.seconds(timeout.arguments[0])), str(timeout))
    return document(Map().put("process", settings)) if settings else ""
