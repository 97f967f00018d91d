"""What EHLO announces: the frontend's own ∩ what the upstream carries, narrowed by the chain (promise 3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import TYPE_CHECKING

import structlog

from gateway.frontend import smtp_xclient
from gateway.frontend.lmtp import one_recipient_only
from gateway.frontend.served import HandOff
from gateway.protocol import sasl

if TYPE_CHECKING:
    from gateway.frontend.conversation import Conversation
    from gateway.frontend.smtp import SmtpConversation
    from gateway.stage import Stage

log = structlog.get_logger("gateway.smtp")

# Carried unchanged from client to upstream, so announced only if every possible upstream has them.
CARRIED = ("8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES", "DELIVERBY", "MT-PRIORITY")
XCLIENT = "NAME ADDR PORT PROTO HELO LOGIN REVERSE_NAME DESTADDR DESTPORT"


def ehlo_offer(conversation: SmtpConversation) -> dict[str, str]:
    """Keyword to parameters, in the order in which they are announced."""
    served, session = conversation.served, conversation.session
    profile = upstream_profile(conversation)
    if session.listener.capabilities is not None:
        return narrowed(conversation, written_offer(conversation, session.listener.capabilities))
    offer: dict[str, str] = {}
    read = conversation.hand_off is HandOff.NEVER  # after a hand-off only the upstream's own words count
    if read or conversation.lmtp or "PIPELINING" in profile:
        offer["PIPELINING"] = ""
    offer["SIZE"] = str(_size(served.limits.message_size, profile.get("SIZE")))
    for keyword in CARRIED:
        if keyword in profile or (conversation.lmtp and keyword == "ENHANCEDSTATUSCODES"):  # RFC 2033 5
            offer[keyword] = profile[keyword] if keyword != "ENHANCEDSTATUSCODES" else ""
    if read or "CHUNKING" in profile:
        offer["CHUNKING"] = ""
    if read:
        most = 1 if one_recipient_only(conversation) else served.limits.recipients
        offer["LIMITS"] = f"RCPTMAX={_rcptmax(most, profile.get('LIMITS', ''))}"
    mechanisms = offered_mechanisms(conversation)
    if mechanisms:
        offer["AUTH"] = " ".join(mechanisms)
    if session.listener.tls is not None and session.tls is None:
        offer["STARTTLS"] = ""
    if smtp_xclient.may_xclient(conversation):
        offer["XCLIENT"] = XCLIENT
    return narrowed(conversation, offer)


def offered_mechanisms(conversation: Conversation) -> list[str]:
    """The mechanisms to be had here. In clear text, unless the pipeline says so, only what an upstream takes there."""
    served, session = conversation.served, conversation.session
    declared = declared_mechanisms(conversation)
    if session.tls is None and not served.allow_plaintext_auth:
        return [name for name, stage in declared.items() if stage.relays_logins and not sasl.shows_secret(name)]
    return list(declared)


def tls_would_help(conversation: Conversation, offered: Collection[str], wanted: Set[str]) -> bool:
    """None of the wanted mechanisms is offered now, but would be under TLS; where nothing is, whatever was wanted."""
    if conversation.session.tls is not None or not wanted.isdisjoint(offered):
        return False
    declared = declared_mechanisms(conversation)
    return bool(declared) and (not offered or not wanted.isdisjoint(declared))


def declared_mechanisms(conversation: Conversation) -> dict[str, Stage]:
    """The mechanisms of all auth stages, each with the first stage that has it."""
    session = conversation.session
    session.upstream_offer = upstream_profile(conversation)
    found: dict[str, Stage] = {}
    for stage, hook in conversation.chain.mechanisms:
        try:
            names = hook(session)
            if not isinstance(names, (list, tuple)):
                raise TypeError(f"mechanisms are a list or a tuple, not {type(names).__name__}")
        except Exception as error:
            _failed(conversation, stage, "mechanisms", error)
            continue
        for name in names:
            found.setdefault(name, stage)
    return found


def written_offer(conversation: Conversation, written: Mapping[str, str]) -> dict[str, str]:
    """Capabilities written by hand, without those that are not true at this moment: TLS is up, logins need it first."""
    served, session = conversation.served, conversation.session
    tls_offered = session.listener.tls is not None and session.tls is None
    may_log_in = session.tls is not None or served.allow_plaintext_auth

    def holds(keyword: str) -> bool:
        word = keyword.partition("=")[0].upper()
        if word in ("STARTTLS", "STLS"):
            return tls_offered
        if word == "LOGINDISABLED":
            return not may_log_in
        return word not in ("AUTH", "SASL", "USER") or may_log_in

    return {keyword: value for keyword, value in written.items() if holds(keyword)}


def upstream_profile(conversation: Conversation) -> dict[str, str]:
    """The keywords of the connected server, or those that all pools in question share."""
    if conversation.connection is not None:
        return conversation.connection.extensions
    shared: dict[str, str] | None = None
    for pool in conversation.served.candidates(conversation.session.protocol):
        profile = pool.profile() or {}  # a copy
        if shared is None:
            shared = profile
            continue
        both = {}
        for keyword, value in shared.items():
            if keyword not in profile:
                continue
            both[keyword] = value
            if keyword == "SIZE":
                both[keyword] = str(_size(_number(value), profile[keyword]))
        shared = both
    return shared or {}


def narrowed(conversation: Conversation, offer: dict[str, str]) -> dict[str, str]:
    """`capabilities` of the stages: they may remove and narrow, what they add is ignored."""
    for stage, hook in conversation.chain.capabilities:
        before = set(offer)
        try:
            hook(conversation.session, offer)
        except Exception as error:
            _failed(conversation, stage, "capabilities", error)
        for keyword in set(offer) - before:
            del offer[keyword]
    return offer


def _failed(conversation: Conversation, stage: Stage, phase: str, error: Exception) -> None:
    """What a stage cannot say is not offered, nor taken away."""
    text = f"{type(error).__name__}: {error}"
    log.warning(
        "stage_failure", session=conversation.session.id, stage=stage.id, phase=phase, error=text, action="pass"
    )


def _number(value: str) -> int:
    return int(value) if value.isdigit() else 0


def _size(own: int, theirs: str | None) -> int:
    """The smaller limit; 0 and absent mean none (RFC 1870 3)."""
    number = _number(theirs or "")
    if own and number:
        return min(own, number)
    return own or number


def _rcptmax(own: int, limits: str) -> int:
    for item in limits.split():
        name, _, value = item.partition("=")
        if name.upper() == "RCPTMAX" and value.isdigit():
            return min(own, int(value))
    return own
