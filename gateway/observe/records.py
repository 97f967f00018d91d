"""Every record that the gateway and its own stages log: its name, when it is written, and what its keys hold.

This is the one table of them; the documentation of the log is made from it and tests hold the log against it.
Each record also has `time` (RFC 3339, UTC), `level`, `logger` and `record` (its name). Keys without a value are
left out. `session` is the id that a refused client reads in its reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class RecordSpec(NamedTuple):
    """When a record is written (`help`), the meaning and unit of each of its keys, and the words for it.

    `text` is what the text form says instead of the record's name, if anything; `{key}` in it is that key's value.
    """

    help: str
    keys: Mapping[str, str]
    text: str = ""


ENVELOPE_KEYS: Final = ("time", "level", "logger", "record", "pipeline", "exception")
"""Keys that any record may have: `pipeline` in all of a session, `exception` is a traceback."""

_SESSION: Final = {
    "session": "Id of the session, as shown in refusals.",
    "pipeline": "Name of the pipeline.",
    "client": "Address of the client (after PROXY and XCLIENT).",
}
_STAGE: Final = {"stage": "Id of the stage.", "pipeline": "Name of the pipeline."}
_CERTIFICATE: Final = {
    "certificate": "Path of its chain.",
    "names": "DNS names that it is for.",
    "expires": "When it expires (RFC 3339, UTC).",
}
_USER: Final = {"user": "Login as the client typed it."}

RECORDS: Final[dict[str, RecordSpec]] = {
    "start": RecordSpec(
        "A pipeline accepts connections.",
        {
            "pipeline": "Name of the pipeline.",
            "listen": "URLs of its listeners.",
            "grade": "How far it reads: opaque, envelope or content.",
            "stages": "Ids of its stages, in order.",
        },
        "pipeline {pipeline} accepts connections",
    ),
    "stop": RecordSpec(
        "The worker served its last session.",
        {
            "sessions": "Sessions that were open when it began to stop.",
            "cut": "Those that were closed when the time was up.",
            "seconds": "From the begin to the last session's end.",
        },
        "the last session is over",
    ),
    "session": RecordSpec(
        "A session ended; one for each connection.",
        {
            **_SESSION,
            "port": "Port of the client.",
            "name": "Verified host name of the client.",
            "helo": "Name in its last HELO or EHLO.",
            **_USER,
            "tls": "TLS version, empty in clear text.",
            "transactions": "Messages that the gateway read.",
            "refusals": "Refusals that it was given.",
            "bytes_in": "Octets from the client.",
            "bytes_out": "Octets to the client.",
            "upstream": "URL of the server it was handed off to (opaque grade).",
            "bytes_up": "Octets to the upstream after the hand-off.",
            "bytes_down": "Octets to the client after the hand-off.",
            "seconds": "From accept to close.",
            "reason": "Who or what ended it.",
        },
        "session ended",
    ),
    "transaction": RecordSpec(
        "A message was answered, or left by the client; one for each that had a recipient or the upstream's refusal.",
        {
            **_SESSION,
            "id": "Id of the transaction.",
            **_USER,
            "sender": "Address in MAIL, as the client gave it.",
            "recipients": "Accepted recipients, each with its reply.",
            "refused": "Refused recipients, each with its reply.",
            "size": "Octets of content.",
            "upstream": "URL of the server that took or refused it.",
            "reply": "Final reply, the upstream's with its queue id; empty if the client left before it. An LMTP "
            "client had several: the best of them, 2xx before 4xx before 5xx.",
            "replies": "Accepted recipients, each with its final reply; only where LMTP is spoken on either side.",
            "edited": "Ids of the stages that changed the message.",
            "stage_ms": "Milliseconds that each stage took, without waiting for the client.",
            "seconds": "From MAIL to the final reply.",
        },
        "message answered",
    ),
    "refusal": RecordSpec(
        "A command, a connection or a message was refused by the gateway.",
        {
            **_SESSION,
            "phase": "Phase in which it was refused.",
            "stage": "Id of the stage that refused, empty if the gateway did by itself.",
            "cause": "Cause, one of a fixed set.",
            "reply": "Reply that the client got.",
            **_USER,
            "helo": "Name in its last HELO or EHLO.",
            "sender": "Address in MAIL.",
            "recipient": "Address in RCPT, where a recipient was refused.",
            "detail": "What only the operator is told.",
        },
        "refused by the gateway",
    ),
    "auth": RecordSpec(
        "A login succeeded.",
        {**_SESSION, **_USER, "mechanism": "SASL mechanism.", "stage": "Id of the stage that verified it."},
        "client logged in",
    ),
    "auth_failure": RecordSpec(
        "A login failed, or could not be verified.",
        {
            **_SESSION,
            **_USER,
            "mechanism": "SASL mechanism.",
            "cause": "`authentication failed` if a verifier said no; anything else is not the client's fault.",
            "stage": "Id of the stage that decided.",
            "detail": "What only the operator is told.",
        },
        "client login failed",
    ),
    "observed": RecordSpec(
        "A stage in mode observe, or outside its share of clients, would have refused.",
        {
            "session": "Id of the session.",
            "client": "Address of the client.",
            "stage": "Id of the stage.",
            "phase": "Phase in which it was asked.",
            "cause": "Cause, one of a fixed set.",
            "text": "Text of the refusal.",
        },
        "would have been refused, but is only observed",
    ),
    "banned": RecordSpec(
        "A client or network failed too often; it is refused at connect for a while.",
        {
            **_SESSION,
            "stage": "Id of the stage.",
            "network": "The address or network that is banned.",
            "step": "How many bans it had, this one too, without a long pause between them.",
            "seconds": "How long it is banned.",
            "reason": "The last of its failures.",
        },
        "{network} is banned",
    ),
    "discard": RecordSpec(
        "A message was accepted and not delivered, as a stage decided.",
        {**_SESSION, "stage": "Id of the stage.", "sender": "Address in MAIL.", "detail": "The stage's reason."},
        "message accepted and thrown away",
    ),
    "line_endings": RecordSpec(
        "Bare CR or LF in a trusted client's message was replaced.",
        {**_SESSION, "bare": "LF or CR: which came first."},
        "bare {bare} in a message was replaced",
    ),
    "upstream_failure": RecordSpec(
        "An upstream could not be used, or was lost.",
        {
            "session": "Id of the session.",
            "server": "URL of the server.",
            "pool": "Name of the pool.",
            "kind": "What went wrong, one of a fixed set.",
            "error": "The error; where a setting of the upstream is to mend, its name.",
        },
        "upstream {server} failed",
    ),
    "stage_failure": RecordSpec(
        "A stage raised an error or took too long. Of a store that is away only the first: see store_down.",
        {
            "session": "Id of the session.",
            "stage": "Id of the stage.",
            "phase": "Phase in which it was asked.",
            "error": "The error.",
            "action": "What follows from it (on_error).",
        },
        "stage {stage} failed",
    ),
    "proxy_header": RecordSpec(
        "A connection came without the PROXY header it needs, or with one that is not believed.",
        {"session": "Id of the session.", "client": "Address of the TCP peer.", "error": "What is wrong with it."},
        "bad PROXY header",
    ),
    "upstream_down": RecordSpec(
        "Active checks of an upstream server failed; it gets no sessions.",
        {
            "pool": "Name of the pool.",
            "server": "URL of the server.",
            "kind": "What went wrong, one of a fixed set.",
            "error": "The error.",
        },
        "upstream {server} is down",
    ),
    "upstream_up": RecordSpec(
        "An upstream server that was down passed its checks again.",
        {"pool": "Name of the pool.", "server": "URL of the server."},
        "upstream {server} is up again",
    ),
    "xforward_refused": RecordSpec(
        "An upstream offered XFORWARD and refused it; the mail went on without.",
        {**_STAGE, "session": "Id of the session.", "server": "URL of the server.", "reply": "Its reply."},
        "upstream {server} refused XFORWARD",
    ),
    "filter_action": RecordSpec(
        "A milter asked for changes to a message that it had not announced; they were not made.",
        {**_STAGE, "session": "Id of the session.", "action": "What it asked for."},
        "filter asked for what it had not announced: {action}",
    ),
    "not_counted": RecordSpec(
        "A limit could not count something that had happened already: the store did not answer. Once until it does.",
        {**_STAGE, "count": "What it counts.", "error": "The error."},
        "something that happened was not counted",
    ),
    "users_file": RecordSpec(
        "A users file could not be read.",
        {**_STAGE, "file": "Path.", "error": "The error.", "action": "What follows from it."},
        "users file {file} could not be read",
    ),
    "list_read": RecordSpec("A list that changed was read again.", {"file": "Path."}, "list {file} was read again"),
    "list_unreadable": RecordSpec(
        "A list that changed could not be read.",
        {"file": "Path.", "error": "The error.", "action": "What follows from it."},
        "list {file} could not be read",
    ),
    "profiles_not_read": RecordSpec(
        "What the upstreams announced last time could not be read.",
        {"file": "Path.", "error": "The error."},
        "profiles of upstreams could not be read",
    ),
    "profiles_not_written": RecordSpec(
        "What the upstreams announce could not be kept.",
        {"file": "Path.", "error": "The error."},
        "profiles of upstreams could not be kept",
    ),
    "store_down": RecordSpec(
        "Calls of the shared store began to fail; the `on_error` of each stage decides until they work again.",
        {"store": "lmdb or redis.", "operation": "The call that failed.", "error": "The error."},
        "the {store} store does not answer",
    ),
    "store_up": RecordSpec(
        "The shared store works again.",
        {"store": "lmdb or redis.", "seconds": "How long it did not.", "failures": "Calls that failed meanwhile."},
        "the {store} store works again",
    ),
    "store_unreachable": RecordSpec(
        "A worker starts without reaching the shared store, and goes on trying.",
        {"store": "redis.", "error": "The error."},
        "the {store} store cannot be reached yet",
    ),
    "store_restored": RecordSpec(
        "The lmdb store began anew: the host was started again, or its database was damaged.",
        {
            "store": "Its folder.",
            "reason": "Why: another boot, or what is wrong with the database.",
            "contents": "What it has now: copy (not older than a second), or empty.",
            "error": "Why it is empty although there was a copy.",
        },
        "the lmdb store began anew",
    ),
    "store_not_copied": RecordSpec(
        "The lmdb store could not be copied to disk; a crash of the host would lose more than its last second.",
        {"store": "Its folder.", "error": "The error."},
        "the lmdb store could not be copied to disk",
    ),
    "descriptors_short": RecordSpec(
        "New clients are refused with 421: the rest of the descriptors is for the sessions there are. At most every "
        "10 seconds, by each worker; raise LimitNOFILE (systemd) or `ulimit -Hn`.",
        {
            "limit": "Descriptors that the process may open (RLIMIT_NOFILE).",
            "reserve": "How many of them new clients do not get.",
            "refused": "Clients refused since the last such record.",
        },
        "descriptors run short: new clients are refused",
    ),
    "worker_died": RecordSpec(
        "A worker (or the process of the admin API) ended although nobody told it to; it is replaced.",
        {
            "role": "worker or admin.",
            "worker": "Its number.",
            "pid": "Its process id.",
            "how": "Signal or exit status, or why it was ended.",
            "seconds": "How long it had run.",
            "restart_in": "Seconds until the next one starts.",
        },
        "{role} {worker} died",
    ),
    "reload": RecordSpec(
        "A new generation serves; the one before it ends its sessions.",
        {"generation": "Its number.", "workers": "How many workers it has."},
        "reloaded",
    ),
    "reload_failed": RecordSpec(
        "A reload failed; the generation that served goes on.",
        {"generation": "The generation that goes on.", "error": "What is wrong."},
        "reload failed",
    ),
    "generation_died": RecordSpec(
        "The parent of the workers ended although nobody told it to; a new generation takes over.",
        {"generation": "Its number.", "status": "Its exit status; minus the signal's number."},
        "generation {generation} died",
    ),
    "generation_ended": RecordSpec(
        "The last session of an old generation is over.",
        {"generation": "Its number."},
        "generation {generation} ended",
    ),
    "certificate_renewed": RecordSpec(
        "A certificate that changed on disk is shown to new connections from now on.",
        {**_CERTIFICATE},
        "certificate {certificate} was renewed",
    ),
    "certificate_not_renewed": RecordSpec(
        "Files of a certificate, or of authorities, changed on disk and cannot be used.",
        {"error": "What is wrong, by file.", "action": "What follows from it."},
        "certificates were not renewed",
    ),
    "authorities_renewed": RecordSpec(
        "Authorities or revocation lists changed on disk; client certificates are verified with them from now on.",
        {"certificate": "Path of the chain of the listener's first certificate."},
        "authorities for client certificates were renewed",
    ),
    "certificate_expires": RecordSpec(
        "A certificate expires in 21 days or less, or has expired: once a day, and when 7, 3 and 1 days are left.",
        {**_CERTIFICATE, "days": "Whole days that are left; below 0 it has expired."},
        "certificate {certificate} expires",
    ),
    "internal_error": RecordSpec(
        "A fault of the gateway itself; the session was closed.",
        {"session": "Id of the session.", "pipeline": "Name of the pipeline.", "error": "The error."},
        "internal error",
    ),
    "admin": RecordSpec(
        "Somebody steers the gateway through the admin API; written before it is done.",
        {
            "action": "What is to be done.",
            "args": "Its arguments.",
            "by": "Address of the client, or the user id of a process at the unix socket.",
        },
        "{action} by {by}",
    ),
    "transcript": RecordSpec(
        "A line of the dialogue with a client of debug_clients; secrets and content are left out.",
        {
            "session": "Id of the session.",
            "line": "C: from the client, S: to it, U> to the upstream, U< from it; then the line.",
        },
        "{line}",
    ),
    "traces_failed": RecordSpec(
        "Spans for OpenTelemetry could not be sent and are lost; said once, until traces_resumed.",
        {"error": "The first error."},
        "traces cannot be sent",
    ),
    "traces_resumed": RecordSpec("Spans for OpenTelemetry are sent again.", {}, "traces are sent again"),
    "warning": RecordSpec(
        "Something an operator should mend, at load or while running.",
        {"pipeline": "Name of the pipeline.", "text": "What is wrong, and what would mend it."},
        "{text}",
    ),
    "lost_records": RecordSpec(
        "Records before this one could not be written (a full disk, a reader that is gone or slow).",
        {"count": "How many.", "error": "The last error."},
        "{count} records before this one were lost",
    ),
}


def undeclared(record: Mapping[str, object]) -> list[str]:
    """What a written record has that the table does not: its name, or keys. For tests; empty when all is declared."""
    name = str(record.get("record"))
    spec = RECORDS.get(name)
    if spec is None:
        return [name]
    return [f"{name}.{key}" for key in record if key not in spec.keys and key not in ENVELOPE_KEYS]
