"""What IMAP and POP3 have in common before the login, after which their clients speak with the upstream itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Set

from gateway.facts import Phase
from gateway.frontend import login
from gateway.frontend.closing import Closing
from gateway.frontend.conversation import Conversation
from gateway.frontend.offer import offered_mechanisms, tls_would_help
from gateway.protocol import sasl
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Reply
from gateway.verdicts import Authenticated, Cause, Refuse

LOGGED_IN = Reply.of("235 2.7.0 OK")
PASSWORD_MECHANISMS = frozenset(("PLAIN", "LOGIN"))
NOTHING: Mapping[str, str] = {}
HTTP_METHODS = frozenset(("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT"))


class StoreConversation(Conversation):
    """A session with a mail store: a login, then bytes both ways."""

    __slots__ = ()

    @abstractmethod
    def ok(self, name: str = "ok") -> None:
        """The end of a command that went well; `name` is that of `replies.FIXED`."""

    @abstractmethod
    def error(self, name: str) -> None:
        """An error that counts; `name` is that of `replies.FIXED`."""

    def challenge_line(self, encoded: bytes) -> bytes:
        """RFC 9051 6.2.2, RFC 5034 4."""
        return b"+ " + encoded + b"\r\n"

    @property
    def login_decides(self) -> bool:
        """Nobody is logged in before the upstream says so (promise 1)."""
        return True

    def mechanisms(self) -> list[str]:
        """Those of AUTHENTICATE and AUTH; APOP is a command of its own."""
        return [name for name in offered_mechanisms(self) if name != "APOP"]

    def takes_passwords(self) -> bool:
        """Whether LOGIN, and USER with PASS, are to be had now."""
        return not PASSWORD_MECHANISMS.isdisjoint(offered_mechanisms(self))

    def refused_in_clear(self, offered: list[str], wanted: Set[str]) -> bool:
        """A login that needs TLS first is refused before anything is asked for.

        `offered`: the mechanisms to be had, `wanted`: those that would do.
        """
        if not tls_would_help(self, offered, wanted):
            return False
        refuse = Refuse(Cause.TLS_REQUIRED)
        self.end_if_told(refuse, self.refuse(refuse, "auth"))
        return True

    async def refuse_http(self, word: str) -> None:
        """A browser was made to speak with us (cross-protocol attacks): one answer, and closed."""
        if word in HTTP_METHODS:
            text = f"this is an {self.session.protocol.upper()} server, not for HTTP"
            await self.refuse_and_close(Refuse(Cause.PROTOCOL, text=text, log="HTTP"), "command")

    async def upgrade(self, argument: bytes | tuple[bytes, ...]) -> None:
        """STARTTLS, STLS."""
        session = self.session
        if session.tls is not None:
            self.error("bad_sequence")
        elif session.listener.tls is None:
            self.error("not_available")
        elif argument:
            self.error("bad_argument")
        elif self.wire.buffered:
            # Whoever put them there may not be the one at the other end of TLS (RFC 9051 11.1, RFC 2595 9).
            refuse = Refuse(Cause.PIPELINING, text="commands sent behind STARTTLS", disconnect=True)
            await self.refuse_and_close(refuse, "command")
        else:
            await self.leave_upstream()  # a login was relayed to it; it knows of the client what was said in clear
            self.ok("starttls")
            self.flush()
            await self.start_tls()

    async def log_in_with_password(self, user: bytes, password: bytes) -> bool:
        """LOGIN, PASS: the same question to the stages as PLAIN; True when the session is over."""
        offered = offered_mechanisms(self)
        if self.refused_in_clear(offered, PASSWORD_MECHANISMS):
            return False
        try:
            credentials = sasl.password(user, password, "PLAIN" if "PLAIN" in offered else "LOGIN")
            check_line_ends(credentials)
        except PeerError:
            self.error("sasl_malformed")
            return False
        if credentials.mechanism not in offered:
            self.error("not_available")
            return False
        return await login.log_in(self, credentials)

    async def authenticate(self, mechanism: bytes, response: bytes | None) -> bool:
        """AUTHENTICATE, AUTH, `response` being the initial one, still base64; True when the session is over."""
        offered = offered_mechanisms(self)
        name = mechanism.decode("ascii", "replace").upper()
        if self.refused_in_clear(offered, {name}):
            return False
        if name not in offered or name == "APOP":
            self.error("bad_parameter")
            return False
        try:
            initial = None if response is None else sasl.decode_initial(response)
            credentials = await login.exchange(self, name, initial)
            check_line_ends(credentials)
        except PeerError as error:
            self.error("sasl_cancelled" if isinstance(error, login.SaslCancelled) else "sasl_malformed")
            return False
        return await login.log_in(self, credentials)

    async def logged_in(self, verdict: Authenticated) -> bool:
        """The upstream's own answer to the login; `_serve` then joins client and upstream."""
        connection = self.connection
        if connection is None or not connection.logged_in:
            raise Closing("nobody is logged in at the upstream")
        self.tell_settled(Phase.AUTH, LOGGED_IN)
        self.flush()
        self.wire.write(connection.login_answer)  # the transcript has it from the upstream, without secrets
        return True

    async def _serve(self) -> None:
        """Commands end with a login. The coroutines that led to it have returned when the two are joined, and what was
        known for it is forgotten: sessions idle by the thousand, for hours.
        """
        await super()._serve()
        session, connection = self.session, self.connection
        if connection is not None:
            session.password = session.token = None
            session.upstream_offer = NOTHING
            connection.hand_over()
            await self.join(connection)


def check_line_ends(credentials: sasl.Credentials) -> None:
    """No password of a mail store has CR or LF: LOGIN and PASS could not carry it upstream. Raises PeerError."""
    if isinstance(credentials, sasl.Password) and ("\r" in credentials.password or "\n" in credentials.password):
        raise PeerError("SASL: a line end in the password")
