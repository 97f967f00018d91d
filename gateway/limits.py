"""Every limit and clock of a session, with its default and the reason for it.

A pipeline overrides them by name below `limits:`. Sizes are octets, clocks are seconds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gateway.values import Duration, Size

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """Limits of one session. Postfix's value where it has one (postconf(5))."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command_line: Size = Field(
        2048, description="Octets of a command line; longer ones are 500 5.5.2 (line_length_limit)."
    )
    auth_line: Size = Field(12288, description="Octets of a SASL response line (RFC 4954 4).")
    message_size: Size = Field(
        52_428_800, description="Octets of a message; SIZE announces the smaller of this and the upstream's."
    )
    header_size: Size = Field(
        262_144, description="Octets of the header section of a message that stages read; more are 552 5.3.4."
    )
    header_fields: Count = Field(
        5000,
        description="Header fields of a message that stages read, each of which costs time; more are 552 5.3.4.",
    )
    text_line: int = Field(
        0, ge=0, description="Octets of a line of content without its end (RFC 5322: 998); 0: no limit. 550 5.6.0."
    )
    recipients: Count = Field(1000, description="Recipients of a message (smtpd_recipient_limit); more are 452 4.5.3.")
    errors: Count = Field(20, description="Errors of a session before 421 (smtpd_hard_error_limit).")
    junk_commands: Count = Field(
        100, description="NOOP, RSET, VRFY and repeated EHLO without mail before 421 (smtpd_junk_command_limit)."
    )
    auth_failures: Count = Field(3, description="Failed AUTH before 421 4.7.0.")
    transactions: Count = Field(
        1000, description="Messages of a session before 421: a client opens a new connection then."
    )
    sessions: Count = Field(10_000, description="Sessions at a time of one worker; more are 421.")
    bdat_chunks: Count = Field(
        10_000, description="BDAT chunks of a message: many tiny chunks cost more than they carry."
    )

    command_timeout: Duration = Field(300.0, description="Wait for a command (RFC 5321 4.5.3.2.7).")
    write_timeout: Duration = Field(300.0, description="Wait for a client to read what was written.")
    data_timeout: Duration = Field(180.0, description="Wait for a block of content (RFC 5321 4.5.3.2.5).")
    message_timeout: Duration = Field(
        7200.0, description="All of a message's content, however slowly it comes; it is kept for stages meanwhile."
    )
    tls_timeout: Duration = Field(60.0, description="A TLS handshake.")
    proxy_timeout: Duration = Field(5.0, description="A PROXY header (smtpd_upstream_proxy_timeout).")
    login_timeout: Duration = Field(600.0, description="Before login: until AUTH or the first accepted MAIL, in all.")
    end_of_data_timeout: Duration | None = Field(
        None,
        description="Everything between the client's end of data and the upstream's: 45s on listeners with login, "
        "240s otherwise, then 451 and the upstream never gets its end.",
    )
    session_timeout: Duration = Field(86_400.0, description="A session in all.")
    idle_timeout: Duration | None = Field(
        None,
        description="After the hand-off: no byte in either direction. By default 10m, and 35m for IMAP, whose clients "
        "repeat IDLE every 29 minutes (RFC 2177).",
    )
    auth_delay: Duration = Field(2.0, description="Wait before a failed AUTH is answered; it doubles, up to 15s.")
    linger: Duration = Field(
        2.0, description="Wait for a client to take our last reply before the connection is closed."
    )

    def idle(self, protocol: str) -> float:
        """`idle_timeout` as it holds for this protocol, in seconds."""
        if self.idle_timeout is not None:
            return self.idle_timeout
        return 2100.0 if protocol == "imap" else 600.0
