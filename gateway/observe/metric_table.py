"""Every metric of the gateway: its name, type, labels and meaning. Functions that count are in `metrics.py`.

This is the one table of them; docs/metrics.md is made from it and tests hold the code against it. Names and units are
as Prometheus wants them (https://prometheus.io/docs/practices/naming/). Every label has few values, which the
configuration or the code names: nothing that a client says becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

Type = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """What a metric counts. A gauge is the sum over all processes, or the highest of them.

    `bounds` are the upper ends of a histogram's buckets, in seconds. `always` are values of the only label whose series
    are there from the start: `increase` does not see one that begins at 1.
    """

    type: Type
    help: str
    labels: tuple[str, ...] = ()
    highest: bool = False
    bounds: tuple[float, ...] = ()
    always: tuple[str, ...] = ()


LABELS: Final[Mapping[str, str]] = {
    "pipeline": "Name of the pipeline.",
    "listener": "Name of the listener: its URL unless it has a name.",
    "protocol": "`smtp`, `lmtp`, `imap` or `pop3`.",
    "reason": "How a session ended: `quit` (the client said so), `client_closed`, `client_lost` (reset, or gone within "
    "TLS), `timeout`, `refused` (by a stage, a limit or an upstream), `too_many_errors`, `bad_syntax` (what no client "
    "of the protocol says), `xclient` (a trusted peer began another session on its connection), `handed_off` (joined "
    "with the upstream until one of them left), `upstream_lost`, `tls_failed`, `shutdown`, `killed` (by the "
    "administrator) or `internal_error`.",
    "reply": "The final reply: `2xx`, `4xx`, `5xx`, or `none` where the client left before it.",
    "cause": "Why, as in the log: a cause of [Replies](reference/replies.md).",
    "phase": "The phase: `connect`, `secure`, `greeting`, `helo`, `auth`, `route`, `mail`, `rcpt`, `data` or "
    "`message`; `command` for a refusal outside of them.",
    "mechanism": "SASL mechanism; `PLAIN` or `LOGIN` also for IMAP's LOGIN and POP3's USER and PASS, `other` for any "
    "that is not registered.",
    "result": "What came of it; see the metric.",
    "stage": "Id of the stage.",
    "verdict": "`pass`, `hold`, `refuse`, `allow`, `rewrite`, `edit`, `authenticated`, `upstream`, `discard`, or "
    "`error` for a stage that failed.",
    "mode": "`enforce`, or `observe` for a verdict that was only looked at.",
    "pool": "Name of the upstream pool; `(dynamic)` for servers that the configuration does not name.",
    "server": "URL of the server; `(dynamic)` for those that auth servers and tables name.",
    "direction": "`in` or `out`, as the gateway sees it.",
    "side": "Who is at the other end: `client`, or `upstream` for every server that the gateway connects to.",
    "version": "Version of TLS or of the gateway.",
    "resumed": "`yes` or `no`.",
    "store": "`memory`, `lmdb` or `redis`.",
    "operation": "Call of the store: `hit`, `hold`, `get`, `put`, `entries`, `clear`.",
    "error": "`timeout`, `unreachable`, `full` or `other`.",
    "how": "How a worker died: `exited`, `killed` (by a signal) or `silent` (its loop stood still, and it was ended).",
    "state": "`starting`, `serving` or `draining`.",
    "certificate": "Its file.",
    "python": "Version of Python.",
}
"""What each label says; a label means the same wherever it occurs."""

_STAGE_BOUNDS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_CONNECT_BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SESSION_BOUNDS: Final = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)
_STORE_BOUNDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
_LAG_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

METRICS: Final[Mapping[str, Metric]] = {
    # sessions
    "gateway_sessions_started_total": Metric(
        "counter", "Connections accepted.", ("pipeline", "listener", "protocol")
    ),
    "gateway_sessions_total": Metric(
        "counter", "Sessions that ended, by what ended them.", ("pipeline", "listener", "protocol", "reason")
    ),
    "gateway_open_sessions": Metric("gauge", "Sessions that are open.", ("pipeline", "listener", "protocol")),
    "gateway_session_seconds": Metric(
        "histogram", "Time from accept to close.", ("pipeline", "protocol"), bounds=_SESSION_BOUNDS
    ),
    "gateway_client_bytes_total": Metric(
        "counter", "Octets that clients sent and were sent, TLS included.", ("pipeline", "direction")
    ),
    "gateway_upstream_bytes_total": Metric(
        "counter", "Octets that upstreams sent and were sent for sessions, TLS included.", ("pipeline", "direction")
    ),
    # mail
    "gateway_transactions_total": Metric("counter", "Messages, by their final reply.", ("pipeline", "reply")),
    "gateway_message_bytes_total": Metric("counter", "Octets of content of the messages.", ("pipeline",)),
    "gateway_refusals_total": Metric("counter", "Refusals of the gateway's own.", ("pipeline", "cause", "phase")),
    "gateway_auth_attempts_total": Metric(
        "counter",
        "Logins that were tried: `ok`, `refused`, `unavailable` (nobody could answer), `canceled` by the client or "
        "`malformed`.",
        ("pipeline", "mechanism", "result"),
    ),
    # stages
    "gateway_stage_verdicts_total": Metric(
        "counter", "Answers of stages.", ("pipeline", "stage", "phase", "verdict", "mode")
    ),
    "gateway_stage_seconds": Metric(
        "histogram",
        "Time that a stage took to answer, without what it waited for the client.",
        ("pipeline", "stage", "phase"),
        bounds=_STAGE_BOUNDS,
    ),
    # upstreams
    "gateway_upstream_connections_total": Metric(
        "counter",
        "Connections that were opened for sessions: `ok`, or how it failed: `down`, `busy`, `tls`, `timeout`, `lost`, "
        "`garbage`; `refused` for a client that the server or a stage does not let in, `canceled` where it left.",
        ("pipeline", "pool", "server", "result"),
    ),
    "gateway_upstream_connect_seconds": Metric(
        "histogram",
        "Time to open a connection: connect, TLS, greeting and what the server announces.",
        ("pipeline", "pool", "server"),
        bounds=_CONNECT_BOUNDS,
    ),
    "gateway_upstream_reused_total": Metric(
        "counter", "Sessions that got a connection which was open already.", ("pipeline", "pool", "server")
    ),
    "gateway_upstream_up": Metric(
        "gauge",
        "1 while the server is well, drained by hand or not; 0 while it is down or ejected.",
        ("pipeline", "pool", "server"),
        highest=True,
    ),
    "gateway_upstream_connections": Metric(
        "gauge", "Connections that sessions hold.", ("pipeline", "pool", "server")
    ),
    "gateway_upstream_idle_connections": Metric(
        "gauge", "Connections that are kept for the next session.", ("pipeline", "pool", "server")
    ),
    "gateway_upstream_waiting": Metric("gauge", "Sessions that wait for a connection.", ("pipeline", "pool")),
    "gateway_upstream_queue_timeouts_total": Metric(
        "counter", "Sessions that waited for a connection in vain.", ("pipeline", "pool")
    ),
    "gateway_upstream_checks_total": Metric(
        "counter", "Active health checks: `ok` or `failed`.", ("pipeline", "pool", "server", "result")
    ),
    "gateway_upstream_check_seconds": Metric(
        "histogram", "Time that an active health check took.", ("pipeline", "pool"), bounds=_CONNECT_BOUNDS
    ),
    "gateway_upstream_ejections_total": Metric(
        "counter", "Times that a server was ejected for what sessions met.", ("pipeline", "pool", "server")
    ),
    # TLS
    "gateway_tls_handshakes_total": Metric("counter", "TLS handshakes.", ("side", "version", "resumed")),
    "gateway_tls_failures_total": Metric("counter", "TLS handshakes that failed.", ("side",)),
    "gateway_certificate_expiry_timestamp_seconds": Metric(
        "gauge", "When a certificate expires, in seconds since 1970.", ("certificate",), highest=True
    ),
    # what is held
    "gateway_spool_bytes": Metric("gauge", "Octets of messages that are in files.", ("pipeline",)),
    "gateway_spool_limit_bytes": Metric("gauge", "Octets that may be in files, in all workers.", ("pipeline",)),
    # store
    "gateway_store_seconds": Metric(
        "histogram", "Time that the store took.", ("store", "operation"), bounds=_STORE_BOUNDS
    ),
    "gateway_store_errors_total": Metric(
        "counter", "Calls of the store that failed.", ("store", "operation", "error")
    ),
    "gateway_store_up": Metric("gauge", "Workers that reached their store when they last asked.", ("store",)),
    # the service
    "gateway_event_loop_lag_seconds": Metric(
        "histogram", "How late the event loops of the workers are.", bounds=_LAG_BOUNDS
    ),
    "gateway_workers": Metric("gauge", "Workers that run, of all generations."),
    "gateway_worker_restarts_total": Metric(
        "counter", "Workers that died and were replaced.", ("how",), always=("exited", "killed", "silent")
    ),
    "gateway_generation": Metric("gauge", "Number of the newest configuration that serves.", highest=True),
    "gateway_generations": Metric("gauge", "Generations of the configuration that have processes.", ("state",)),
    "gateway_reloads_total": Metric("counter", "Reloads: `done` or `failed`.", ("result",), always=("done", "failed")),
    "gateway_reload_timestamp_seconds": Metric(
        "gauge", "When the configuration was loaded last, in seconds since 1970.", highest=True
    ),
    "gateway_start_timestamp_seconds": Metric(
        "gauge", "When the service was started, in seconds since 1970.", highest=True
    ),
    "gateway_build_info": Metric("gauge", "Always 1.", ("version", "python"), highest=True),
    "gateway_log_lines_lost_total": Metric("counter", "Log lines that no sink could take."),
    "gateway_metrics_lost_total": Metric("counter", "What was counted for series that had no room."),
}
