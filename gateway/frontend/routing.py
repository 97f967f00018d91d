"""Which pool a session goes to, and its connection there, in every protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.upstream.pool import Pool
from gateway.upstream.prelude import give_back, open_upstream
from gateway.verdicts import Cause, Refuse, Upstream

if TYPE_CHECKING:
    from gateway.frontend.conversation import Conversation
    from gateway.session import Recipient
    from gateway.stage import Peer
    from gateway.upstream.connection import UpstreamConnection
    from gateway.upstream.server import Server


async def pool_for(conversation: Conversation, recipient: Recipient | None) -> Pool | Refuse:
    """Where this session, or this mail, goes: a stage's word, else the login's, else the pool of `splice`."""
    session, chain, served = conversation.session, conversation.chain, conversation.served
    steps = chain.route_early if recipient is None else (*chain.route_early, *chain.route_rcpt)
    chosen = session.upstream
    if steps:
        result = await chain.ask(steps, session, recipient, session.transaction, recipient)
        if result.refuse is not None:
            return result.refuse
        if result.upstream is not None:
            chosen = result.upstream
            if not session.user and chosen.identity != session.identity:
                session.identity = chosen.identity
                await conversation.leave_upstream()  # it was told of another one
    if chosen is not None:
        return pool_named(conversation, chosen)
    pool = served.default_pool(session.protocol)
    return pool or Refuse(Cause.NO_ROUTE, log="no stage routed this mail and splice names no pool")


def pool_named(conversation: Conversation, chosen: Upstream) -> Pool | Refuse:
    """The pool of a stage's word; one of another protocol than the client speaks is none."""
    pools, protocol = conversation.served.pools, conversation.session.protocol
    try:
        pool = pools.server(chosen.server, protocol) if chosen.server else pools[chosen.pool]
    except KeyError:
        return Refuse(Cause.NO_ROUTE, log=f"no pool named {chosen.pool!r}")
    except ValueError as error:
        return Refuse(Cause.UPSTREAM_MISCONFIGURED, log=f"{chosen.server}: {error}")
    if family(pool.servers[0].protocol) != family(protocol):
        return Refuse(Cause.NO_ROUTE, log=f"pool {pool.name} speaks {pool.servers[0].protocol}, not {protocol}")
    return pool


def family(protocol: str) -> str:
    """SMTP and LMTP go together; the mail of one may be given to the other."""
    return "smtp" if protocol == "lmtp" else protocol


async def connect(
    conversation: Conversation, pool: Pool, exclude: set[Server] | None = None, *, login: bool = True
) -> Refuse | None:
    """Make sure that the session is connected to this pool; a refusal that the client may read.

    `login=False` leaves the login at the upstream to whoever relays it.
    """
    connection = conversation.connection
    if connection is not None:
        if conversation.upstream_pool is pool and usable(connection):
            return None
        conversation.connection = None
        give_back(connection)
    if conversation.session.relayed:  # nobody can log in again for the client
        return Refuse(Cause.UPSTREAM_LOST, disconnect=True, log="the connection with the client's login was lost")
    opened = await open_upstream(
        conversation.session,
        pool,
        conversation.chain,
        hostname=conversation.served.hostname,
        instance=conversation.served.instance,
        exclude=exclude or set(),
        transcript=conversation.transcript,
        pass_error_message=conversation.served.pass_error_message,
        login=login,
    )
    if isinstance(opened, Refuse):
        return opened
    conversation.connection = opened
    conversation.upstream_pool = pool
    return None


def usable(connection: UpstreamConnection) -> bool:
    """An upstream that said 421 or closed while the client paused is replaced, unnoticed.

    One that owes an answer (a login that took too long) too: it would be taken for the next command's.
    """
    return connection.idle


async def open_early(conversation: Conversation) -> Refuse | None:
    """Open the upstream at once, because the login is its to decide or the hand-off follows."""
    pool = await pool_for(conversation, None)
    if isinstance(pool, Refuse):
        return pool
    return await connect(conversation, pool)


async def open_for_relay(conversation: Conversation) -> Peer | Refuse:
    """The upstream for a login that a stage relays: nobody has logged in there."""
    pool = await pool_for(conversation, None)
    if isinstance(pool, Refuse):
        return pool
    connection = conversation.connection
    if connection is not None and (connection.logged_in or connection.in_transaction):
        conversation.connection = None
        give_back(connection)
    refuse = await connect(conversation, pool, login=False)
    if refuse is not None:
        return refuse
    assert conversation.connection is not None
    conversation.connection.client_tag = conversation.session.tag
    return conversation.connection
