"""`gateway hash-password`: lines that auth_file takes, and no line that it would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import Result

from gateway.passwords import parse_stored, verify_password

Command = Callable[..., Result]


@pytest.mark.parametrize(
    ("scheme", "prefix"), [(None, "$2b$"), ("bcrypt", "$2b$"), ("argon2", "$argon2id$"), ("sha512-crypt", "$6$")]
)
def test_a_line_for_a_users_file(gateway: Command, scheme: str | None, prefix: str) -> None:
    options = ["--scheme", scheme] if scheme else []
    result = gateway("hash-password", *options, "joe@example.org", input="pass word\r\n")
    assert (result.exit_code, result.stderr) == (0, "")
    user, _, stored = result.stdout.rstrip("\n").partition(":")
    entry = parse_stored(stored)
    assert user == "joe@example.org" and stored.startswith(prefix) and entry is not None
    assert verify_password(entry, "pass word") and not verify_password(entry, "pass word\r")


def test_the_hash_alone(gateway: Command) -> None:
    result = gateway("hash-password", input="secret\n")
    assert result.exit_code == 0 and result.stdout.startswith("$2b$") and result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "password", "said"),
    [
        ([], "", "the password is empty"),
        ([], "\n", "the password is empty"),
        ([], "x" * 73 + "\n", "choose argon2"),
        (["joe:x"], "secret\n", "cannot be a user"),
        (["joe x"], "secret\n", "cannot be a user"),
        (["#joe"], "secret\n", "cannot be a user"),
        ([""], "secret\n", "cannot be a user"),
        (["--scheme", "md5"], "secret\n", "'md5' is not one of"),
    ],
)
def test_what_it_refuses(gateway: Command, arguments: list[str], password: str, said: str) -> None:
    result = gateway("hash-password", *arguments, input=password)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and "secret" not in result.stderr
