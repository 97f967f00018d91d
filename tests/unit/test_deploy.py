"""What is in deploy/ fits the gateway: its metrics, its commands, its settings; and the tools that read it take it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config.process import Process
from gateway.observe.metric_table import METRICS
from tests.peers.require import require

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs/operations.md").read_text()
OF_PROMETHEUS = {"instance", "job", "le"}
ALWAYS = {"up"}

# --- Prometheus and Grafana


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]  # type: ignore[no-any-return]


def expressions() -> Iterator[tuple[str, str, str]]:
    """Where, the expression, and the text that shows its labels."""
    for rule in alerts():
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        yield rule["alert"], rule["expr"], " ".join(shown)
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], " ".join(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))


def metric_of(name: str) -> str:
    """The metric of a sample: a histogram has three kinds."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if base in METRICS and METRICS[base].type == "histogram" else name


def mistakes(expression: str, shown: str) -> list[str]:
    """What of an expression the gateway does not have."""
    found = []
    known = set(OF_PROMETHEUS)
    for name, selector in re.findall(r"\b(gateway_\w+)(?:\{([^}]*)\})?", expression):
        metric = METRICS.get(metric_of(name))
        if metric is None:
            found.append(name)
            continue
        if metric.type == "histogram" and metric_of(name) == name:
            found.append(f"{name} without _bucket, _sum or _count")
        if metric.type == "counter" and not re.search(rf"\b(?:rate|increase)\({name}\b", expression):
            found.append(f"{name} is a counter, without rate")
        known |= set(metric.labels)
        used = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector)
        found += [f"{name} has no {label}" for label in used if label not in {*metric.labels, *OF_PROMETHEUS}]
    grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    found += [f"label {label}" for label in sorted(grouped | set(shown.split())) if label not in known]
    if grouped:
        found += [f"{label} is shown and summed away" for label in shown.split() if label not in grouped]
    return found


@pytest.mark.parametrize(("where", "expression", "shown"), list(expressions()))
def test_expressions_name_metrics_and_labels_that_are_there(where: str, expression: str, shown: str) -> None:
    assert re.search(r"\bgateway_|\bup\{", expression), where
    assert mistakes(expression, shown) == []


@pytest.mark.parametrize(
    ("expression", "shown", "mistake"),
    [
        ("gateway_no_such_metric", "", "gateway_no_such_metric"),
        ('gateway_workers{pool="a"}', "", "gateway_workers has no pool"),
        ("sum by (pool) (gateway_workers)", "", "label pool"),
        ("gateway_workers", "server", "label server"),
        ("gateway_reloads_total > 0", "", "gateway_reloads_total is a counter, without rate"),
        ("rate(gateway_stage_seconds[1m])", "", "gateway_stage_seconds without _bucket, _sum or _count"),
        ("max by (pool) (gateway_upstream_up)", "server", "server is shown and summed away"),
    ],
)
def test_the_check_above_finds(expression: str, shown: str, mistake: str) -> None:
    assert mistakes(expression, shown) == [mistake]


def test_label_values_are_documented_ones() -> None:
    """`result="failed"` and its like: a value that the table does not name would never match."""
    from gateway.observe.metric_table import LABELS

    helps = {name: metric.help for name, metric in METRICS.items()}
    for where, expression, _ in expressions():
        for name, selector in re.findall(r"\b(gateway_\w+)\{([^}]*)\}", expression):
            for label, values in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selector):
                for value in values.split("|"):
                    told = LABELS.get(label, "") + helps[metric_of(name)]
                    assert value.startswith("$") or f"`{value}`" in told, f"{where}: {label}={value}"


def test_alerts_say_how_urgent() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"}), rule["alert"]


def test_dashboard_has_no_overlapping_panels() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
    identities = [panel["id"] for panel in panels()]
    assert len(identities) == len(set(identities))


# --- systemd, HAProxy, logrotate, the man page: as their own programs see them


def unit(name: str, section: str) -> dict[str, list[str]]:
    """The settings of a section."""
    _, _, rest = (DEPLOY / name).read_text().partition(f"[{section}]\n")
    lines = [line for line in rest.partition("\n[")[0].splitlines() if line and not line.startswith("#")]
    settings: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition("=")
        settings.setdefault(key, []).append(value)
    return settings


def test_unit_fits_the_gateway() -> None:
    service = unit("gateway.service", "Service")
    from gateway.service.supervisor import START_SECONDS

    drain = Process.model_fields["drain"].default
    assert float(service["TimeoutStopSec"][0]) > drain
    assert service["Type"] == ["notify"] and service["KillMode"] == ["mixed"]
    assert service["ExecReload"] == ["/opt/gateway/bin/gateway ctl reload"]
    assert float(service["TimeoutStartSec"][0]) > START_SECONDS
    needed = {"CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL"}
    assert set(service["CapabilityBoundingSet"][0].split()) == needed


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    require("systemd-analyze")
    text = (DEPLOY / "gateway.service").read_text().replace("/opt/gateway/bin/gateway", sys.executable)
    (tmp_path / "gateway.service").write_text(text)
    shutil.copy(DEPLOY / "gateway.socket", tmp_path)
    command = ["systemd-analyze", "verify", "--man=no", "./gateway.service", "./gateway.socket"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    about = [line for line in done.stdout.splitlines() if "gateway." in line]
    assert (done.returncode, about) == (0, [])
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", "./gateway.service"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-200:]


def test_haproxy_takes_its_file() -> None:
    require("haproxy")
    done = subprocess.run(
        ["haproxy", "-c", "-f", DEPLOY / "haproxy.cfg"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout


def test_groff_takes_the_man_page() -> None:
    require("groff")
    command = ["groff", "-mdoc", "-Tutf8", "-ww", "-b", str(DEPLOY / "gateway.8")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_man_page_has_all_commands_and_options_of_run() -> None:
    from gateway.cli import COMMANDS
    from gateway.cli.run import command

    text = (DEPLOY / "gateway.8").read_text()
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", text)] == []
    options = {option[2:] for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert {name for name in re.findall(r"Fl -([\w-]+)", text) if name != "help"} == options


def test_accounts_and_folders_agree() -> None:
    account = (DEPLOY / "gateway.sysusers").read_text().splitlines()[-1].split()
    folders = {
        line.split()[1]: line.split()[2:5]
        for line in (DEPLOY / "gateway.tmpfiles").read_text().splitlines()
        if line.startswith("d ")
    }
    assert account[:2] == ["u", "gateway"]
    assert folders["/var/log/gateway"][1:] == ["gateway", "gateway"]
    assert "su gateway gateway" in (DEPLOY / "gateway.logrotate").read_text()
    assert "ReadWritePaths=-/var/log/gateway" in (DEPLOY / "gateway.service").read_text()


# --- docs/operations.md


def test_page_names_what_is_there() -> None:
    """Files, commands, metrics and settings of `process`."""
    from gateway.cli import COMMANDS

    for name in re.findall(r"\bdeploy/([\w.-]+\w)", PAGE):
        assert (DEPLOY / name).exists(), name
    for file in DEPLOY.iterdir():
        assert f"deploy/{file.name}" in PAGE, file.name
    for name in re.findall(r"\bgateway_\w+", PAGE):
        assert metric_of(name) in METRICS, name
    for key in re.findall(r"\bprocess\.(\w+)", PAGE):
        assert key in Process.model_fields, key
    for command in re.findall(r"(?:`|bin/|    )gateway ([a-z-]+)", PAGE):
        assert command in COMMANDS, command


def test_page_has_every_alert() -> None:
    told = set(re.findall(r"`(Gateway\w+)`", PAGE))
    assert told == {str(rule["alert"]) for rule in alerts()}


def test_examples_of_process_settings_are_valid() -> None:
    examples = re.findall(r"```yaml\n(process:.*?)```", PAGE, re.DOTALL)
    assert examples
    for text in examples:
        Process.model_validate(yaml.safe_load(text)["process"])


def test_ctl_commands_exist() -> None:
    import click

    group = importlib.import_module("gateway.cli.ctl").command
    told = re.findall(r"gateway ctl ([a-z-]+)(?: ([a-z-]+))?((?: --\w+)*)", PAGE)
    assert len(told) > 10
    for name, second, options in told:
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group) and second:
            command = command.get_command(click.Context(command), second)
        assert command is not None, (name, second)
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options.split()) <= known, (name, options)
