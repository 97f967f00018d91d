"""`gateway ctl`: see and steer a running gateway through its admin API.

Exit status: 0 done, 1 the gateway refused or does not know what was named, 2 wrong usage, 3 no gateway answers.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import click

from gateway.cli import ctl_views as views
from gateway.cli.ctl_client import Client, Object, Refused, Unreachable, path_of
from gateway.cli.ctl_tables import Table, lines, on_terminal, rich_table, show, shown

RELOAD_SECONDS: Final = 180.0
FOLLOW_SECONDS: Final = 1.0
LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "default")
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Control:
    """The API, and whether its JSON is wanted."""

    def __init__(self, client: Client, as_json: bool) -> None:
        self.client = client
        self.as_json = as_json

    def print(self, answer: Object, table: Table | None = None, text: str = "") -> None:
        """The answer as it is wanted."""
        if self.as_json:
            click.echo(json.dumps(answer, indent=2))
        elif table is not None:
            show(table)
        if text and not self.as_json:
            click.echo(shown(text))

    def warn(self, answer: Object) -> None:
        """Workers whose part of the answer is missing."""
        for row in views.rows(answer, "missing"):
            where = f"worker {row['worker']} of generation {row['generation']}"
            click.echo(f"gateway: {where} is not included: {shown(str(row['error']))}", err=True)


class _Statuses(click.Group):
    """Turns the API's errors into exit statuses."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Refused as error:
            for line in str(error).splitlines():
                click.echo(f"gateway: {shown(line.removeprefix('gateway: '))}", err=True)
            raise SystemExit(1) from None
        except Unreachable as error:
            click.echo(f"gateway: {shown(str(error))}", err=True)
            raise SystemExit(3) from None


def _want_json(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Control).as_json = True


_pass = click.make_pass_decorator(Control)


def _command(group: click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command that gets the Control first and may end in --json."""

    def decorate(function: Callable[..., None]) -> click.Command:
        option = click.option(
            "--json", is_flag=True, expose_value=False, callback=_want_json, help="Print the API's JSON."
        )
        return group.command(name)(option(_pass(function)))

    return decorate


@click.group(cls=_Statuses)
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Unix socket of the gateway's admin API.")
@click.option("--url", default="", help="Its address instead: http://host:port.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with the token that --url needs.")
@click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")
@click.pass_context
def command(ctx: click.Context, path: Path | None, url: str, token_file: Path | None, as_json: bool) -> None:
    """See and steer a running gateway.

    With --url the token is read from --token-file or GATEWAY_ADMIN_TOKEN.
    """
    if url and not re.match(r"https?://[^/?#]+/?\Z", url):
        raise click.UsageError("--url is http://host:port")
    token = os.environ.get("GATEWAY_ADMIN_TOKEN", "")
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not text"
            raise click.UsageError(f"--token-file {token_file}: {reason}") from None
    ctx.obj = Control(Client(path, url, token), as_json)


# -- the service


@_command(command, "status")
def status(control: Control) -> None:
    """Versions, state, sessions and workers."""
    info, stats = control.client.get("/info"), control.client.get("/stats")
    if control.as_json:
        control.print({"info": info, "stats": stats})
        return
    for line in views.status_lines(info, stats):
        click.echo(shown(line))
    show(views.workers(info, stats))
    control.warn(stats)


@_command(command, "reload")
def reload(control: Control) -> None:
    """Read the configuration again; waits for the result."""
    answer = control.client.post("/reload", timeout=RELOAD_SECONDS)
    control.print(answer, text=f"generation {answer['generation']} serves")


@_command(command, "stop")
@click.option("--now", is_flag=True, help="Do not wait for sessions.")
def stop(control: Control, now: bool) -> None:
    """Stop accepting, serve what is open to its end, stop."""
    control.print(control.client.post("/stop", {"now": now}), text="stopping")


@_command(command, "log-level")
@click.argument("level", type=click.Choice(LEVELS))
def log_level(control: Control, level: str) -> None:
    """Log less or more until a restart, over reloads too; `default` is what the configuration says."""
    answer = control.client.post("/log-level", {"level": level})
    control.print(answer, text=f"log level {level}")
    control.warn(answer)


@_command(command, "certs")
def certs(control: Control) -> None:
    """Certificates and when they expire."""
    answer = control.client.get("/certs")
    control.print(answer, views.certificates(answer))


# -- sessions


@_command(command, "sessions")
@click.option("--follow", "-f", is_flag=True, help="Again each second; in a pipe one line a new session. Ends by ^C.")
@click.option("--user", default="", help="Of this user.")
@click.option("--client", default="", help="Of this address or network.")
@click.option("--pipeline", default="", help="Of this pipeline.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="At most so many.")
def sessions(control: Control, follow: bool, **chosen: object) -> None:
    """Open sessions, the youngest first."""

    def asked() -> Object:
        return control.client.get("/sessions", **chosen)

    if follow:
        with _until_interrupted():
            _follow(control, asked)
        return
    answer = asked()
    control.print(answer, views.sessions(answer), views.session_count(answer))
    control.warn(answer)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo()


def _follow(control: Control, asked: Callable[[], Object]) -> None:
    if control.as_json or not on_terminal():
        _follow_lines(control, asked)
        return
    from rich.live import Live

    with Live(rich_table(views.sessions(asked())), auto_refresh=False, screen=True) as live:
        while True:
            _pause(FOLLOW_SECONDS)
            live.update(rich_table(views.sessions(asked())), refresh=True)


def _follow_lines(control: Control, asked: Callable[[], Object]) -> None:
    """New sessions only, in the order in which they came; as JSON one object a line."""
    seen: set[object] = set()
    while True:
        found = views.rows(asked(), "sessions")
        for row in reversed(found):
            if row["id"] in seen:
                continue
            if control.as_json:
                click.echo(json.dumps(row))
            else:
                text = list(lines(Table(views.SESSIONS, [views.session_cells(row)])))
                click.echo(" ".join(text[1].split()))
        seen = {row["id"] for row in found}
        _pause(FOLLOW_SECONDS)


_pause = time.sleep


@_command(command, "session")
@click.argument("id")
def session(control: Control, id: str) -> None:
    """One session: its facts, what stages answered so far, its log."""
    answer = control.client.get(path_of("sessions", id))
    if control.as_json:
        control.print(answer)
        return
    for heading, table in views.session_tables(answer):
        if heading:
            click.echo(f"\n{heading}")
        show(table)


@_command(command, "kill")
@click.argument("id")
def kill(control: Control, id: str) -> None:
    """End a session; one whose message is being answered ends right after."""
    answer = control.client.post(path_of("sessions", id, "kill"))
    control.print(answer, text=f"{answer['id']}: {answer['state']}")


# -- upstreams


@_command(command, "upstreams")
def upstreams(control: Control) -> None:
    """Pools and their servers."""
    answer = control.client.get("/upstreams")
    control.print(answer, views.upstreams(answer))
    control.warn(answer)


@_command(command, "upstream")
@click.argument("server", metavar="POOL/SERVER")
@click.argument("action", type=click.Choice(["drain", "ready", "weight"]))
@click.argument("weight", type=click.IntRange(0, 1000), required=False)
@click.option("--pipeline", default=None, help="Only there, where several have a pool of this name.")
def upstream(control: Control, server: str, action: str, weight: int | None, pipeline: str | None) -> None:
    """Give a server no new sessions (drain), take it back (ready), or change its weight.

    SERVER is its URL, host:port, or host. It lasts until the gateway is restarted, over reloads too.
    """
    pool, slash, name = server.partition("/")
    if not (pool and slash and name):
        raise click.UsageError("write POOL/SERVER, as `gateway ctl upstreams` lists them")
    if (action == "weight") is not (weight is not None):
        raise click.UsageError("`weight` takes a number" if action == "weight" else f"`{action}` takes no number")
    body = {"action": action, "weight": weight, "pipeline": pipeline}
    given = {name: value for name, value in body.items() if value is not None}
    answer = control.client.post(path_of("upstreams", pool, name), given)
    done = action if weight is None else f"weight {weight}"
    control.print(answer, text=f"{answer['pool']}/{answer['server']}: {done}")
    control.warn(answer)


# -- what stages keep


class _Listed(click.Group):
    """A group that lists where no command is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        wanted = next((arg for arg in args if not arg.startswith("-")), None)
        if wanted is None and "--help" not in args and "-h" not in args:
            args = ["list", *args]
        return super().parse_args(ctx, args)


@command.group("limits")
def limits() -> None:
    """What limits have counted."""


@_command(limits, "show")
@click.argument("prefix", default="")
def limits_show(control: Control, prefix: str) -> None:
    """Counters whose keys begin with PREFIX."""
    answer = control.client.get("/limits", prefix=prefix)
    control.print(answer, views.limits(answer), views.limits_left_off(answer))


@_command(limits, "clear")
@click.argument("key")
def limits_clear(control: Control, key: str) -> None:
    """Forget what is counted for exactly KEY."""
    control.print(control.client.post("/limits/clear", {"key": key}), text=f"{key}: cleared")


@command.group("auth-cache")
def auth_cache() -> None:
    """Logins that stages remember."""


@_command(auth_cache, "clear")
@click.argument("user", default="")
def auth_cache_clear(control: Control, user: str) -> None:
    """Forget those of USER, or all."""
    answer = control.client.post("/auth-cache/clear", {"user": user} if user else {})
    control.print(answer, text=f"{answer['cleared']} forgotten")


@command.group("bans", cls=_Listed)
def bans() -> None:
    """Clients that the stage `ban` refuses."""


@_command(bans, "list")
def bans_list(control: Control) -> None:
    """Who is banned, and for how long yet."""
    answer = control.client.get("/bans")
    control.print(answer, views.bans(answer))


def _seconds(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int:
    """`30m`, `1h`, `2d`, or seconds."""
    found = re.fullmatch(r"(\d{1,9})([smhd]?)", value)
    if found is None or not int(found[1]):
        raise click.BadParameter("write a duration: 30m, 1h, 2d")
    return int(found[1]) * UNITS[found[2] or "s"]


@_command(bans, "add")
@click.argument("network")
@click.option("--for", "seconds", default="1h", show_default=True, callback=_seconds, help="How long: 30m, 1h, 2d.")
@click.option("--reason", default="", help="For the log and the list.")
def bans_add(control: Control, network: str, seconds: int, reason: str) -> None:
    """Ban an address or a network."""
    answer = control.client.post("/bans", {"network": network, "seconds": seconds, "reason": reason})
    control.print(answer, text=f"{answer['network']} is banned until {views.clock(answer['until'])}")
    for pipeline in cast("list[str]", answer.get("exempt", [])):
        click.echo(f"gateway: {pipeline} lets it in all the same: its stage `ban` has it in `exempt`", err=True)


@_command(bans, "remove")
@click.argument("network")
def bans_remove(control: Control, network: str) -> None:
    """Lift the bans of exactly this address or network."""
    control.print(control.client.delete("/bans", network=network), text=f"{network}: not banned any more")
