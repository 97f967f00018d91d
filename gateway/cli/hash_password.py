"""`gateway hash-password`: a line for a users file."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("user", required=False)
@click.option("--scheme", type=click.Choice(["bcrypt", "argon2", "sha512-crypt"]), default="bcrypt", show_default=True)
def command(user: str | None, scheme: str) -> None:
    """Read a password (from the terminal, or one line of standard input) and print its hash, or USER:HASH."""
    if user is not None and (not user.isprintable() or set(user) & {":", " "} or user[:1] in ("", "#")):
        raise click.UsageError(f"{user!r} cannot be a user in a users file: no ':', no blanks, no '#' in front")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise click.UsageError("the password is empty; give one line on standard input")
    from gateway.passwords import hash_password

    try:
        hashed = hash_password(password, scheme)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{user}:{hashed}" if user else hashed)
