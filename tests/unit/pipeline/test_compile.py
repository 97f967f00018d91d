"""What the compiler makes of a chain: how far it is read and why, its table, its promises, its warnings.

What it says of wrong files stands in tests/bad_configs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import Fact, Kind, Phase, Recipient, Refuse, Scope, Session, Stage, Transaction
from gateway.cli.check import table
from gateway.config.problems import ConfigError
from gateway.frontend.served import HandOff
from gateway.pipeline.plan import Plan
from gateway.testing.gateway import compiled

USERS = "tim@example.org:{PLAIN}secret\n"


class Looks(Stage):
    """Asked in connect only; what it refuses is told at RCPT."""

    def connect(self, session: Session) -> Refuse | None: ...


class LooksLater(Stage):
    """A guard, asked after the handshake."""

    kind = Kind.GUARD

    def secure(self, session: Session) -> Refuse | None: ...


class Narrows(Stage):
    """Changes what EHLO says."""

    kind = Kind.PLUMBING

    def capabilities(self, session: Session, offer: dict[str, str]) -> None: ...


class AsksAll(Stage):
    """Asked everywhere."""

    def connect(self, session: Session) -> None: ...

    def helo(self, session: Session, name: str) -> None: ...

    def mail(self, session: Session, transaction: Transaction) -> None: ...

    def rcpt(self, session: Session, recipient: Recipient) -> None: ...

    def data(self, session: Session, transaction: Transaction) -> None: ...


STAGES: dict[str, type[Stage]] = {"looks": Looks, "looks_later": LooksLater, "narrows": Narrows, "asks_all": AsksAll}


def plan_of(folder: Path, stages: list[object], handoff: str = "auto", /, **pipeline: object) -> Plan:
    (folder / "users").write_text(USERS)
    written: dict[str, object] = {
        "hostname": "gateway.test",
        "listen": ["smtp://127.0.0.1:2587"],
        "relay": "open",
        "allow_plaintext_auth": True,
        "stages": [*stages, {"splice": {"handoff": handoff}}],
        "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:2525"]}},
        **pipeline,
    }
    return compiled({key: value for key, value in written.items() if value is not None}, folder, STAGES)


def problems_of(folder: Path, stages: list[object], **pipeline: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, stages, **pipeline)
    return [f"{problem.where}: {problem.text}" for problem in caught.value.problems]


AUTH: dict[str, object] = {"auth_file": "users"}
OPTIONAL: dict[str, object] = {"auth_file": {"file": "users", "required": False}}
BY_USER = {"route": {"rules": [{"when": 'auth.user == "tim@example.org"', "to": "mta"}]}}
BY_CLIENT = {"route": {"rules": [{"when": 'network(client.address, "10.0.0.0/8")', "to": "mta"}]}}
BY_SENDER = {"route": {"rules": [{"when": 'mail.domain == "example.org"', "to": "mta"}]}}
BY_RECIPIENT = {"route": {"rules": [{"when": 'rcpt.domain == "example.org"', "to": "mta"}]}}
CONNECTIONS = {"rate_limit": {"count": "connections", "limit": "10/minute"}}
MESSAGES = {"rate_limit": {"count": "messages", "per": "auth.user", "limit": "10/minute"}}
DELAY: dict[str, object] = {"greeting_delay": "1s"}


@pytest.mark.parametrize(
    ("stages", "hand_off", "reason"),
    [
        ([], HandOff.GREETING, "nothing is needed after the greeting"),
        ([DELAY, "reverse_dns", {"connection_limit": 3}, CONNECTIONS], HandOff.GREETING,
         "nothing is needed after the greeting"),
        (["xclient"], HandOff.GREETING, "nothing is needed after the greeting"),
        ([{"proxy_header": 2}], HandOff.GREETING, "nothing is needed after the greeting"),
        ([BY_CLIENT], HandOff.GREETING, "nothing is needed after the greeting"),
        (["looks"], HandOff.MAIL, "a refusal before the greeting is given at RCPT"),
        ([{"looks": {"refuse_at": "now"}}], HandOff.GREETING, "nothing is needed after the greeting"),
        (["looks_later"], HandOff.MAIL, "a refusal before the greeting is given at RCPT"),
        (["narrows"], HandOff.MAIL, "nothing is needed after MAIL"),
        ([{"access": {"match": "helo", "deny": ["bad.example"]}}], HandOff.MAIL, "nothing is needed after MAIL"),
        ([AUTH], HandOff.LOGIN, "nothing is needed after the login"),
        ([AUTH, "xclient", BY_USER], HandOff.LOGIN, "nothing is needed after the login"),
        ([OPTIONAL], HandOff.MAIL, "nothing is needed after MAIL"),
        ([{"require_tls": {"for": ["mail"]}}, AUTH], HandOff.MAIL, "the first MAIL is the last thing needed"),
        ([BY_SENDER], HandOff.MAIL, "the first MAIL is the last thing needed"),
        ([AUTH, BY_RECIPIENT], HandOff.RCPT, "route needs the first recipient"),
        ([AUTH, MESSAGES], HandOff.NEVER, "rate_limit is asked at each MAIL"),
        ([{"sender_login": {"same_address": True}}], HandOff.NEVER, "sender_login is asked at each MAIL"),
        ([{"recipient_domains": ["example.org"]}, MESSAGES], HandOff.NEVER, "rate_limit is asked at each MAIL"),
        ([{"recipient_domains": ["example.org"]}], HandOff.NEVER, "recipient_domains is asked at each RCPT"),
        ([{"received": {"id": "trace"}}], HandOff.NEVER, "trace is asked at each DATA"),
        (["xforward"], HandOff.NEVER, "xforward speaks before each MAIL"),
        ([{"asks_all": {"mode": "observe"}}], HandOff.NEVER, "asks_all is asked at each MAIL"),
        ([{"asks_all": {"mode": "off"}}], HandOff.GREETING, "nothing is needed after the greeting"),
        ([{"asks_all": {"when": "mail.size > 100"}}], HandOff.NEVER, "asks_all is asked at each MAIL"),
        ([{"asks_all": {"when": "rcpt.domain != ''"}}], HandOff.NEVER, "asks_all is asked at each RCPT"),
    ],
)  # fmt: skip
def test_the_cheapest_grade_that_serves(
    tmp_path: Path, tls_files: tuple[Path, Path], stages: list[object], hand_off: HandOff, reason: str
) -> None:
    tls = None
    if any(isinstance(stage, dict) and "require_tls" in stage for stage in stages):
        tls = {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]}
    plan = plan_of(tmp_path, stages, tls=tls)
    assert (plan.hand_off, plan.reason) == (hand_off, reason)
    assert plan.grade == ("envelope" if hand_off is HandOff.NEVER else "opaque")
    assert table(plan).splitlines()[-2] == f"  grade: {plan.grade} ({reason})"


def test_what_else_is_asked_for_counts_too(tmp_path: Path) -> None:
    def grade(handoff: str = "auto", **pipeline: object) -> tuple[HandOff, str]:
        plan = plan_of(tmp_path, [], handoff, **pipeline)
        return plan.hand_off, plan.reason

    assert grade(soft_bounce=True) == (HandOff.NEVER, "soft_bounce changes replies")
    assert grade(line_endings="normalize") == (HandOff.NEVER, "line_endings are asked for")
    assert grade("never") == (HandOff.NEVER, "splice says handoff: never")
    assert grade("always") == (HandOff.GREETING, "nothing is needed after the greeting")


@pytest.mark.parametrize(
    ("listen", "servers", "hand_off"),
    [
        (["lmtp"], ["lmtp"], HandOff.GREETING),
        (["lmtp"], ["smtp"], HandOff.NEVER),
        (["smtp"], ["lmtp"], HandOff.NEVER),
        (["smtp", "lmtp"], ["smtp"], HandOff.NEVER),
        (["smtp"], ["smtp", "lmtp"], HandOff.NEVER),
    ],
)
def test_a_hand_off_needs_one_protocol(
    tmp_path: Path, listen: list[str], servers: list[str], hand_off: HandOff
) -> None:
    """SMTP has one reply to the end of data, LMTP one a recipient."""
    plan = plan_of(
        tmp_path, [], "always", listen=[f"{scheme}://127.0.0.1:{2587 + n}" for n, scheme in enumerate(listen)],
        upstreams={f"pool{n}": {"servers": [f"{scheme}://127.0.0.1:2525"]} for n, scheme in enumerate(servers)},
    )  # fmt: skip
    assert plan.hand_off is hand_off
    assert [listener.protocol for listener in plan.listeners] == listen


def test_lmtp_relays_for_nobody_either(tmp_path: Path) -> None:
    lmtp: dict[str, object] = {"listen": ["lmtp://127.0.0.1:2524"], "relay": None}
    (said,) = problems_of(tmp_path, [], **lmtp)
    assert "an open relay" in said
    assert plan_of(tmp_path, ["xclient"], **lmtp).listeners[0].protocol == "lmtp"


def test_starttls_must_be_read(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    certificates = {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]}
    plain: dict[str, object] = {"url": "smtp://127.0.0.1:2587"}
    assert plan_of(tmp_path, [], tls=certificates).hand_off is HandOff.MAIL
    assert plan_of(tmp_path, [], tls=certificates, listen=["smtps://127.0.0.1:2465"]).hand_off is HandOff.GREETING
    own = plan_of(tmp_path, [AUTH, "require_tls"], allow_plaintext_auth=None, listen=[{**plain, "tls": certificates}])
    assert own.listeners[0].tls is not None
    assert plan_of(tmp_path, [], listen=[{**plain, "tls": certificates}]).hand_off is HandOff.MAIL
    assert problems_of(tmp_path, ["require_tls"], listen=[{**plain, "tls": certificates}, "smtp://127.0.0.1:2588"]) == [
        "stages[0].require_tls: nobody can use TLS here: there is no certificate"
    ]


def test_certificates_that_do_not_work(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    import trustme

    other = tmp_path / "other.key"
    other.write_bytes(trustme.CA().issue_cert("other.test").private_key_pem.bytes())
    chain, key = map(str, tls_files)
    wrong = {"certificates": [{"chain": chain, "key": key}, {"chain": chain, "key": str(other)}]}
    (said,) = problems_of(tmp_path, [], tls=wrong)
    assert said.startswith("tls.certificates") and str(other) in said
    (tmp_path / "empty").write_text("")
    (said,) = problems_of(tmp_path, [], tls={"certificates": [{"chain": str(tmp_path / "empty"), "key": key}]})
    assert said.startswith("tls.certificates") and str(tmp_path / "empty") in said


# -- promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "open_relay"),
    [
        ([], True),
        ([DELAY, {"connection_limit": 3}, BY_CLIENT], True),
        (["xclient"], False),
        ([{"xclient": "continue"}], True),
        ([{"proxy_header": 1}], False),
        (["xforward"], True),  # the upstream may believe it, or not
        ([{"recipient_domains": ["example.org"]}], False),
        ([{"recipient_domains": {"domains": ["example.org"], "mode": "observe"}}], True),
        ([{"recipient_domains": {"domains": ["example.org"], "mode": "50%"}}], True),
        ([{"recipient_domains": {"domains": ["example.org"], "when": "mail.size > 100"}}], True),
        ([AUTH], False),
        ([OPTIONAL], True),
        ([{"auth_file": {"file": "users", "mode": "off"}}], True),
        ([{"upstream_auth": {"user": "gateway", "password": "secret"}}], True),
        (["xclient", {"upstream_auth": {"user": "gateway", "password": "secret"}}], True),
        (
            [{"recipient_domains": ["example.org"]}, {"upstream_auth": {"user": "gateway", "password": "secret"}}],
            False,
        ),
        ([{"upstream_auth": {"credentials": "client", "verify": "upstream"}}], False),
        ([{"sender_login": {"required": True}}], True),  # refuses, but AUTH is what the guard looks for
    ],
)
def test_no_open_relay_by_omission(tmp_path: Path, stages: list[object], open_relay: bool) -> None:
    """Promise 7."""
    if open_relay:
        (said,) = problems_of(tmp_path, stages, relay=None)
        assert "an open relay" in said
    else:
        plan_of(tmp_path, stages, relay=None)
    plan_of(tmp_path, stages, relay="open")


def test_the_embedded_server_relays_nowhere(tmp_path: Path) -> None:
    plan_of(tmp_path, [], relay=None, upstreams={"mta": {"servers": ["embedded://mail"]}})


def test_timeout_and_on_error_hold_at_the_upstream_too(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [{"xclient": {"timeout": "2s", "on_error": "reject"}}])
    (stage,) = [stage for stage, _ in plan.chain.upstream_ready]
    assert (stage.timeout, stage.on_error) == (2.0, "reject")


@pytest.mark.parametrize("upstreams", [{}, {"mta": {"servers": ["embedded://mail"]}}])
def test_servers_that_an_auth_server_names_are_not_embedded(tmp_path: Path, upstreams: dict[str, object]) -> None:
    asks = {"auth_http": {"url": "http://127.0.0.1:1/", "none": True}}
    (said,) = problems_of(tmp_path, [asks], relay=None, upstreams=upstreams)
    assert "an open relay" in said


@pytest.mark.parametrize("name", ["auth_file", "auth_http", "require_tls", "xclient", "proxy_header", "xforward"])
def test_what_guards_cannot_fail_open(tmp_path: Path, name: str) -> None:
    """Promise 4."""
    settings: dict[str, dict[str, object]] = {
        "auth_file": {"file": "users"}, "auth_http": {"url": "http://127.0.0.1:1/"}, "require_tls": {"for": ["mail"]},
    }  # fmt: skip
    stage = {name: {**settings.get(name, {}), "on_error": "pass"}}
    said = problems_of(tmp_path, [stage])
    assert f"stages[0].{name}.on_error: {name} guards and cannot fail open" in said


@pytest.mark.parametrize("name", ["route", "xclient", "auth_file"])
def test_who_decides_identity_is_not_observed(tmp_path: Path, name: str) -> None:
    settings = {"route": {"default": "mta"}, "xclient": {}, "auth_file": {"file": "users"}}[name]
    for mode in ("observe", "10%"):
        (said,) = problems_of(tmp_path, [{name: {**settings, "mode": mode}}], relay="open")
        assert said == f"stages[0].{name}.mode: {name} cannot be observed or enforced in part"


def test_a_listener_is_not_its_own_upstream(tmp_path: Path) -> None:
    def circle(listen: str, server: str) -> bool:
        try:
            plan_of(tmp_path, [], listen=[listen], upstreams={"mta": {"servers": [server]}})
        except ConfigError as error:
            assert "mail would go in a circle" in str(error)
            return True
        return False

    assert circle("smtp://127.0.0.1:25", "smtp://127.0.0.1:25")
    assert circle("smtp://:25", "smtp://127.0.0.1")
    assert circle("smtp://0.0.0.0:25", "localhost:25")
    assert circle("smtp://[::]:25", "[::1]:25")
    assert not circle("smtp://127.0.0.1:25", "smtp://127.0.0.1:26")
    assert not circle("smtp://:25", "smtp://192.0.2.1:25")


# -- facts ----------------------------------------------------------------------------------------------------


class Scores(Stage):
    """Sets a fact of its own."""

    facts = (Fact("value", "int", 0, Phase.CONNECT, Scope.SESSION, "How bad."),)

    def connect(self, session: Session) -> None:
        session.set_fact(self, "value", 7)


class NeedsNames(Stage):
    """Reads what others provide."""

    requires = frozenset({"client.name", "client.address"})

    def connect(self, session: Session) -> Refuse | None: ...


class NeedsScore(Stage):
    """Reads another stage's fact."""

    requires = frozenset({"scores.value"})

    def connect(self, session: Session) -> Refuse | None: ...


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["scores", {"looks": {"when": "scores.value > 3"}}], ""),
        ([{"scores": {"id": "spam"}}, {"looks": {"when": "spam.value > 3"}}], ""),
        ([{"looks": {"when": "scores.value > 3"}}, "scores"], "is set by a stage that comes later"),
        ([{"scores": {"mode": "off"}}, {"looks": {"when": "scores.value > 3"}}], "is set by a stage that comes later"),
        ([{"looks": {"when": "scores.value > 3"}}], "undeclared reference to 'scores.value'"),
        (["scores", "needs_score"], ""),
        (["needs_score", "scores"], "needs_score needs scores.value"),
        (["reverse_dns", "needs_names"], ""),
        (["needs_names", "reverse_dns"], "needs_names needs client.name"),
        (["reverse_dns", {"looks": {"when": "client.name != ''"}}], ""),
        ([{"looks": {"when": "client.name != ''"}}, "reverse_dns"], "is known only if a stage before this one"),
    ],
)  # fmt: skip
def test_facts_come_from_above(
    tmp_path: Path, stages: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"scores": Scores, "needs_names": NeedsNames, "needs_score": NeedsScore}
    for name, stage in own.items():
        monkeypatch.setitem(STAGES, name, stage)
    if said:
        assert any(said in problem for problem in problems_of(tmp_path, stages))
    else:
        plan_of(tmp_path, stages)


def test_a_stage_starts_where_its_condition_is_known(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [{"asks_all": {"when": "!auth.trusted && mail.size > 0"}}])
    chain = plan.chain
    assert (chain.connect, chain.helo) == ((), ())
    (mail,), (data,) = chain.mail, chain.data
    assert [step.phase for step in mail.catch_up] == [Phase.CONNECT, Phase.HELO]
    assert [step.phase for step in data.catch_up] == [Phase.CONNECT, Phase.HELO, Phase.MAIL, Phase.RCPT]
    assert plan.rows[0].phases == "mail rcpt data" and plan.rows[0].when == "!auth.trusted && mail.size > 0"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"looks": {"when": "mail.size > 0"}}, "known from mail on, but looks is asked only before that"),
        ({"rate_limit": {"count": "connections", "limit": "1/hour", "when": "rcpt.to != ''"}},
         "known from rcpt on, but rate_limit is asked only before that"),
        ({"auth_file": {"file": "users", "when": 'network(client.address, "10.0.0.0/8")'}},
         "clients for whom this is false could neither log in at auth_file nor send without"),
        ({"xclient": {"when": "mail.size > 0"}}, "xclient works at the upstream and takes no condition"),
    ],
)  # fmt: skip
def test_a_condition_that_would_never_be_asked(tmp_path: Path, stage: object, said: str) -> None:
    (problem,) = problems_of(tmp_path, [stage])
    assert problem.endswith(f".when: {said}")


# -- the table of `gateway check` -----------------------------------------------------------------------------


def test_check_shows_the_chain(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        [
            "reverse_dns",
            {"looks": {"id": "first", "mode": "observe", "when": 'client.name != ""'}},
            {"asks_all": {"mode": "25%"}},
            {"asks_all": {"mode": "off"}},
        ],
        listen=[{"url": "smtp://127.0.0.1:2587", "capabilities": ["PIPELINING", "SIZE 1000"]}],
        name="shown",
    )
    assert table(plan).splitlines() == [
        "pipeline shown: smtp://127.0.0.1:2587",
        "  stage        kind      phases                       when               mode     provides",
        "  reverse_dns  plumbing  connect                                         enforce  "
        "client.name client.name_status client.reverse_name",
        '  first        check     connect                      client.name != ""  observe',
        "  asks_all     check     connect helo mail rcpt data                     25%",
        "  asks_all_2   check     connect helo mail rcpt data                     off",
        "  splice       plumbing                                                  enforce",
        "  grade: envelope (asks_all is asked at each MAIL)",
        "  upstream mta: smtp://127.0.0.1:2525",
        "  warning: smtp://127.0.0.1:2587: capabilities are written by hand, not computed: "
        "what is announced there may not be carried",
    ]  # fmt: skip


def test_ids_are_unique(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["looks", "looks", {"looks": {"id": "mine"}}])
    assert [row.stage for row in plan.rows] == ["looks", "looks_2", "mine", "splice"]
    assert problems_of(tmp_path, [{"looks": {"id": "one"}}, {"looks": {"id": "one"}}]) == [
        "stages[1].looks: a second stage with the id 'one'"
    ]


def test_the_end_of_data_is_shorter_where_people_wait(tmp_path: Path) -> None:
    assert plan_of(tmp_path, [AUTH]).end_of_data == 45.0
    assert plan_of(tmp_path, []).end_of_data == 240.0
    assert plan_of(tmp_path, [AUTH], limits={"end_of_data_timeout": "20s"}).end_of_data == 20.0


def test_always_is_warned_about(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [], "always")
    assert plan.always_hand_off and len(plan.warnings) == 1 and "inherit" in plan.warnings[0]
