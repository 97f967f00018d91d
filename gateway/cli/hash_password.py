"""`gateway hash-password`: a line for a users file."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("user", required=False)
@click.option("--scheme", type=click.Choice(["bcrypt", "argon2", "sha512-crypt"]), default="bcrypt", show_default=True)
def command(user: str | None, scheme: str) -> None:
    """Read a password (from the terminal, or one line of standard input) and print its hash, or USER:HASH."""
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise click.UsageError("an empty password")
    from gateway.passwords import hash_password

    hashed = hash_password(password, scheme)
    click.echo(f"{user}:{hashed}" if user else hashed)
