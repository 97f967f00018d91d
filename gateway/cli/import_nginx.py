"""`gateway import-nginx FILE`: nginx's mail configuration as pipeline files."""

from __future__ import annotations

from pathlib import Path

import click

from gateway.nginx.importer import Imported, import_file


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Write a file each to DIR.",
              metavar="DIR")  # fmt: skip
@click.option("--lenient", is_flag=True, help="What has no equal becomes a warning comment.")
@click.option("--prefix", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="nginx's -p: where relative log files are.")  # fmt: skip
def command(file: Path, output: Path | None, lenient: bool, prefix: Path | None) -> None:
    """Write a pipeline for each server of nginx's mail {}, as one file on standard output.

    Problems go to standard error with their file:line. What nginx would refuse, and without --lenient what the gateway
    has no equal for, is an error: exit status 1, and nothing is written.
    """
    imported = import_file(file, lenient=lenient, prefix=prefix)
    for warning in imported.warnings:
        click.echo(f"{warning.place}: warning: {warning.text}", err=True)
    for error in imported.errors:
        click.echo(f"{error.place}: error: {error.text}", err=True)
    if imported.errors:
        raise SystemExit(1)
    if output is None:
        click.echo(imported.text, nl=False)
    else:
        _write(imported, output)


def _write(imported: Imported, folder: Path) -> None:
    """A file for each pipeline, and one for the process. Existing files are not touched."""
    texts = {f"{document.name}.yaml": imported.head + document.text for document in imported.documents}
    if imported.process:
        texts["process.yaml"] = imported.head + imported.process
    taken = [name for name in texts if (folder / name).exists()]
    if taken:
        click.echo(f"{folder / taken[0]}: error: is there already; choose another folder, or remove it", err=True)
        raise SystemExit(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            click.echo(str(folder / name))
    except OSError as error:
        click.echo(f"{error.filename or folder}: error: cannot be written ({error.strerror})", err=True)
        raise SystemExit(1) from None
