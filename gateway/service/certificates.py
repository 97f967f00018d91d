"""Certificates while the service runs: files that change are noticed, loaded where mail is served, and announced
before they expire.

The supervisor, which may read every key, has the `FileWatch`; what changed goes to the generation, so that workers
forked later begin with it, and to each worker. There `renew` loads it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, NamedTuple

import structlog

from gateway.config.models import Pipeline
from gateway.config.tls_settings import Tls
from gateway.observe import metrics
from gateway.pipeline.plan import Plan
from gateway.relay.tls import CertificateFacts, ServerContext, TlsConfigError

log = structlog.get_logger("gateway.tls")

PATIENCE: Final = 5  # looks at files of which some change all the time, until those that rest are reported
WARN_DAYS: Final = (21, 7, 3, 1)
DAY: Final = timedelta(days=1)
EXPIRY: Final = "gateway_certificate_expiry_timestamp_seconds"


# -- what there is


def named_files(pipelines: Iterable[Pipeline]) -> list[str]:
    """Every file that the TLS settings of the pipelines and their listeners name, each once, sorted."""
    files: set[str] = set()
    for pipeline in pipelines:
        for tls in (pipeline.tls, *(listener.tls for listener in pipeline.listen)):
            if tls is not None and tls.certificates:
                files.update(_files(tls))
    return sorted(files)


def _files(tls: Tls) -> Iterable[str]:
    others = (tls.password_file, tls.client_ca, tls.trusted_ca, tls.crl, tls.dhparam)
    pairs = (path for pair in tls.certificates for path in (pair.chain, pair.key))
    return (str(path) for path in (*pairs, *others) if path is not None)


def server_contexts(plans: Iterable[Plan]) -> list[ServerContext]:
    """The TLS contexts of all listeners, each once."""
    return list({id(at.tls): at.tls for plan in plans for at in plan.listeners if at.tls is not None}.values())


# -- what changes on disk


class _Stamp(NamedTuple):
    """What tells that a file is another one, or was written to; a symlink counts as what it leads to."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class FileWatch:
    """Files that are looked at now and then.

    What is written there may come in several steps (chain and key, a copy of many octets, a rename, a symlink that
    is turned), so changes are reported once nothing has moved between two looks.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._known: dict[str, bytes] = {}  # digests of the contents
        self._settled: dict[str, _Stamp | None] = dict.fromkeys(self._paths)
        self._seen = self._stamps()
        self._waited = 0

    def changed(self) -> dict[str, bytes]:
        """Contents by path of the files that have others than when last reported. Call it every few seconds.

        The first report has all files: whoever read them before may have read older ones. A file that is gone is
        nothing new; one that cannot be read is tried again.
        """
        stamps, seen = self._stamps(), self._seen
        self._seen = stamps
        self._waited = self._waited + 1 if stamps != seen else 0
        if 0 < self._waited < PATIENCE:
            return {}
        new: dict[str, bytes] = {}
        for path in self._paths:
            if stamps[path] != seen[path] or stamps[path] == self._settled[path]:
                continue
            data = _contents(path)
            if data is not None:
                new[path] = data
        after = self._stamps()
        if self._waited == 0 and after != stamps:
            self._seen = after
            return {}
        return {path: data for path, data in new.items() if after[path] == stamps[path] and self._is_new(path, data)}

    def _is_new(self, path: str, data: bytes) -> bool:
        """Note what was read; false if it is what was there before."""
        self._settled[path] = self._seen[path]
        before, self._known[path] = self._known.get(path), sha256(data).digest()
        return self._known[path] != before

    def _stamps(self) -> dict[str, _Stamp | None]:
        return {path: _stamp(path) for path in self._paths}


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _contents(path: str) -> bytes | None:
    """None unless it is a plain file that can be read: this process may be root, and must never wait for a pipe."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


# -- what is loaded


def renew(contexts: Iterable[ServerContext], files: Mapping[str, bytes], *, quiet: bool = False) -> int:
    """Load files that changed, where they are used. How many contexts have something new.

    What cannot be used is logged, and what was loaded before stays. `quiet` is for processes beside one that does
    the same and says so: then the log has failures only, at the level debug.
    """
    renewed = 0
    for context in contexts:
        before, policy = context.certificates(), context.policy
        try:
            context.renew(files)
        except TlsConfigError as error:
            if quiet:
                log.debug("certificate_not_renewed", error=str(error), action="what was loaded before stays")
            else:
                log.error("certificate_not_renewed", error=str(error), action="what was loaded before stays")
        new = [facts for old, facts in zip(before, context.certificates(), strict=True) if facts is not old]
        renewed += bool(new) or context.policy != policy
        if quiet:
            continue
        for one in new:
            log.info("certificate_renewed", certificate=one.chain, names=list(one.names), expires=_written(one))
        if context.policy != policy:
            log.info("authorities_renewed", certificate=before[0].chain)
    return renewed


def share_tickets(plans: Iterable[Plan], secret: bytes) -> bool:
    """Let sessions be resumed wherever the same pipeline is served with the same secret (32 random octets).

    False, with a warning in the log, where OpenSSL does not let itself be told.
    """
    told = [context.set_ticket_keys(secret, plan.name) for plan in plans for context in server_contexts([plan])]
    if not all(told):
        log.warning("warning", text="TLS sessions are not resumed after a reload: OpenSSL's ticket keys cannot be set")
    return all(told)


# -- what expires


class ExpiryWarnings:
    """Says in the log which certificates expire soon.

    From 21 days before its end each certificate is named once a day, and at once when 7, 3 and 1 are left.
    `clock` gives the time in UTC.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._said: dict[tuple[str, str], tuple[int, datetime]] = {}  # by chain and serial: days, when

    def warn(self, contexts: Iterable[ServerContext]) -> list[CertificateFacts]:
        """Log what is due, and return it. Call it every minute or so, in one process."""
        now, due = self._clock(), list[CertificateFacts]()
        for facts in _certificates(contexts):
            within = min((days for days in WARN_DAYS if facts.not_after - now <= days * DAY), default=None)
            if within is None:
                continue
            said, when = self._said.get((facts.chain, facts.serial), (0, now))
            if said == within and now - when < DAY:
                continue
            self._said[facts.chain, facts.serial] = (within, now)
            due.append(facts)
            log.warning(
                "certificate_expires",
                certificate=facts.chain,
                names=list(facts.names),
                expires=_written(facts),
                days=(facts.not_after - now) // DAY,
            )
        return due


_gauges: set[str] = set()


def set_expiry_gauges(contexts: Iterable[ServerContext]) -> None:
    """Set the gauge of each certificate to when it expires; of those that it was set for earlier, to 0.

    Of contexts that have loaded different ones from the same file the earliest counts. Only one process of a
    generation does this, again after `renew`, and with no contexts when it begins to drain.
    """
    expiry: dict[str, int] = {}
    for facts in _certificates(contexts):
        expiry[facts.chain] = min(int(facts.not_after.timestamp()), expiry.get(facts.chain, 1 << 62))
    for chain in _gauges - expiry.keys():
        metrics.gauge(EXPIRY, certificate=chain).set(0)
    for chain, seconds in expiry.items():
        metrics.gauge(EXPIRY, certificate=chain).set(seconds)
    _gauges.clear()
    _gauges.update(expiry)


def _certificates(contexts: Iterable[ServerContext]) -> Iterable[CertificateFacts]:
    """Each once, even if several contexts have it."""
    return dict.fromkeys(facts for context in contexts for facts in context.certificates())


def _written(facts: CertificateFacts) -> str:
    return f"{facts.not_after:%Y-%m-%dT%H:%M:%SZ}"
