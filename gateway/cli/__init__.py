"""The `gateway` command; one file a command, imported when it is called."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "run": "Serve the pipelines of these files and folders.",
    "check": "Validate files; print each pipeline's chain and grade.",
    "ctl": "See and steer a running gateway.",
    "probe": "Connect to each upstream as a pipeline would and say what is believed.",
    "stages": "What stages are installed, and their settings.",
    "schema": "JSON schema of a pipeline file, for editors.",
    "import-nginx": "nginx's mail configuration as pipeline files.",
    "hash-password": "Hash a password for a users file.",
}


class _Lazy(click.Group):
    """Commands are imported when asked for, so that `gateway check` starts quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"gateway.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.short_help = COMMANDS[cmd_name]
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mail-gateway", prog_name="gateway")
def main() -> None:
    """A mail gateway: SMTP, LMTP, IMAP and POP3 connections pass a chain of stages and end at the upstream server."""
