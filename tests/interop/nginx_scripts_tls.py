"""TLS: STARTTLS in its three modes, implicit TLS, client certificates, ALPN (language: nginx_scripts.py)."""

from __future__ import annotations

_GREETED = {"smtp": "> HELO c.test\n< 250 mx.test", "imap": "> a NOOP\n< a OK completed", "pop3": "> NOOP\n< +OK"}
_GOODBYE = {"smtp": "< 421 4.7.1 ", "imap": "< * BYE ", "pop3": "< -ERR "}
_WRONG, _NONE = "SSL certificate error\n<.", "No required SSL certificate\n<."

# What becomes of a client with this certificate at a server with that ssl_verify_client: welcome, or the goodbye.
_VERDICTS = {
    "on": {"good": "", "": _NONE, "self": _WRONG, "other": _WRONG, "old": _WRONG, "revoked": ""},
    "optional": {"good": "", "": "", "self": _WRONG, "other": _WRONG, "old": _WRONG},
    "any": {"good": "", "": "", "self": "", "other": "", "old": _WRONG},
    "crl": {"good": "", "revoked": _WRONG},
    "trusted": {"good": "", "other": ""},
}


def _certificates() -> str:
    sections = []
    for protocol, welcome in _GREETED.items():
        for mode, verdicts in _VERDICTS.items():
            for certificate, goodbye in verdicts.items():
                end = f"{_GOODBYE[protocol]}{goodbye}" if goodbye else f"<<\n{welcome}"
                silent = "silent\n" if goodbye else ""
                shown = f" cert={certificate}" if certificate else ""
                sections.append(
                    f"== tls {protocol} ssl_verify_client {mode} and a certificate {certificate or 'of none'}\n"
                    f"@ {protocol}s-{mode}\n{silent}TLS{shown}\n{end}\n\n"
                )
    return "".join(sections)


SCRIPTS = _certificates() + r"""
== tls smtp STARTTLS
@ smtp-starttls
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250-AUTH PLAIN
< 250 STARTTLS
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN
> STARTTLS
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> QUIT
< 221 2.0.0 up bye
<.
? Client-Host: [UNAVAILABLE]
? Auth-SSL: on
? Auth-SSL-Protocol: TLSv1.3
? Auth-SSL-Cipher: TLS_AES_256_GCM_SHA384
?! Auth-SSL-Verify
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ EHLO client.test
^ QUIT

== tls smtp STARTTLS forgets HELO and MAIL
@ smtp-starttls
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-SMTP-Helo:\x20
? Auth-SMTP-From: MAIL FROM:<a@b>
? Auth-SSL: on
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== tls smtp STARTTLS with an argument
@ smtp-starttls
> STARTTLS now
< 220 2.0.0 Start TLS
TLS
> NOOP
< 250 2.0.0 OK
differs: arguments-refused
> STARTTLS now
< 501 5.5.4 Invalid argument
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> NOOP
< 250 2.0.0 OK

== tls smtp commands behind STARTTLS are thrown away
@ smtp-starttls
>| STARTTLS\r\nNOOP\r\n
< 220 2.0.0 Start TLS
TLS
> HELO client.test
< 250 mx.test
differs: starttls-injection
>| STARTTLS\r\nNOOP\r\n
< 554 5.5.0 commands sent behind STARTTLS
<.

== tls smtp AUTH in clear text under starttls on
@ smtp-starttls
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
?! Auth-SSL

== tls smtp starttls only
@ smtp-only
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 STARTTLS
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 500 5.5.1 Invalid command
> AUTH LOGIN
< 500 5.5.1 Invalid command
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL: on

== tls smtp starttls only and the none flow in clear text
@ smtp-only-none
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 STARTTLS
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
?! Auth-SSL

== tls smtp errors are counted across STARTTLS
@ smtp-starttls
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> X
< 500 5.5.1 Invalid command
<.
differs: last-word
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> X
< 500 5.5.1 Invalid command
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> X
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== tls smtp attempts are counted across STARTTLS
@ smtp-starttls
auth: Auth-Status: no | Auth-Wait: 1
auth: @OK
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> STARTTLS
< 220 2.0.0 Start TLS
TLS
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-Login-Attempt: 1
? Auth-Login-Attempt: 2
? Auth-SSL: on

== tls smtps
@ smtps
TLS
<<
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> STARTTLS
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL: on
? Auth-SSL-Protocol: TLSv1.3
?! Auth-SSL-Verify
?! Auth-SSL-Cert

== tls smtps with TLS 1.2
@ smtps
TLS max=1.2
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL-Protocol: TLSv1.2
? Auth-SSL-Cipher: ECDHE-ECDSA-AES256-GCM-SHA384

== tls smtps that has TLS 1.2 only
@ smtps-12
TLS
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL-Protocol: TLSv1.2
? Auth-SSL-Cipher: ECDHE-ECDSA-AES256-GCM-SHA384

== tls smtps with the right ALPN
@ smtps
TLS alpn=smtp
<<
> QUIT
< 221 2.0.0 Bye
<.

== tls smtps with a foreign ALPN
@ smtps
silent
TLS alpn=h2,http/1.1 fails: no application protocol

== tls imaps with the ALPN of pop3
@ imaps
silent
TLS alpn=pop3 fails: no application protocol

== tls STARTTLS with a foreign ALPN
@ smtp-starttls
> STARTTLS
< 220 2.0.0 Start TLS
TLS alpn=http/1.1 fails: no application protocol

== tls smtps with something that is no TLS
@ smtps
silent
> EHLO client.test
<.

== tls imap STARTTLS
@ imap-starttls
> a CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN STARTTLS
< a OK completed
> b STARTTLS
< b OK completed
TLS
> c CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN
< c OK completed
> d STARTTLS
< d BAD invalid command
> e LOGIN joe secret
< e OK logged in
> f LOGOUT
< * BYE up
< f OK logout
<.
? Auth-Protocol: imap
? Auth-SSL: on

== tls imap commands behind STARTTLS are thrown away
@ imap-starttls
>| a STARTTLS\r\nb NOOP\r\n
< a OK completed
TLS
> c NOOP
< c OK completed
differs: starttls-injection
>| a STARTTLS\r\nb NOOP\r\n
< * BYE commands sent behind STARTTLS
<.

== tls pop3 commands behind STLS are thrown away
@ pop3-starttls
>| STLS\r\nNOOP\r\n
< +OK
TLS
> NOOP
< +OK
differs: starttls-injection
>| STLS\r\nNOOP\r\n
< -ERR commands sent behind STARTTLS
<.

== tls imap starttls only
@ imap-only
> a CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS STARTTLS LOGINDISABLED
< a OK completed
> b LOGIN joe secret
< b BAD invalid command
> c AUTHENTICATE PLAIN
< c BAD invalid command
> d STARTTLS
< d OK completed
TLS
> e CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN AUTH=LOGIN
< e OK completed
> f LOGIN joe secret
< f OK logged in

== tls imaps
@ imaps
TLS alpn=imap
<<
> a CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN AUTH=LOGIN
< a OK completed
> b AUTHENTICATE PLAIN AGpvZQBzZWNyZXQ=
< b OK logged in
? Auth-SSL: on

== tls pop3 STLS
@ pop3-starttls
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< STLS
< .
> STLS
< +OK
TLS
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< .
> STLS
< -ERR invalid command
> USER joe
< +OK
> PASS secret
< +OK logged in
> QUIT
< +OK up bye
<.
? Auth-SSL: on

== tls pop3 STLS after USER
@ pop3-starttls
> USER joe
< +OK
> STLS
< -ERR invalid command
> STLS
< +OK
TLS
> NOOP
< +OK

== tls pop3 CAPA after USER has no STLS
@ pop3-starttls
> USER joe
< +OK
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< .

== tls pop3 starttls only
@ pop3-only
> CAPA
< +OK Capability list follows
< TOP
< UIDL
< STLS
< .
> USER joe
< -ERR invalid command
> AUTH PLAIN
< -ERR invalid command
> AUTH
< -ERR invalid command
> STLS
< +OK
TLS
> USER joe
< +OK
> PASS secret
< +OK logged in

== tls pop3s
@ pop3s
TLS
<<
> USER joe
< +OK
> PASS secret
< +OK logged in
? Auth-Protocol: pop3
? Auth-SSL: on

== tls facts of a certificate to the auth server
@ smtps-on
TLS cert=good
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL: on
? Auth-SSL-Verify: SUCCESS
?! Auth-SSL-Cert

== tls facts of no certificate
@ smtps-optional
TLS
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-SSL-Verify: NONE
?! Auth-SSL-Subject

== tls facts of a self-signed certificate
@ imaps-any
TLS cert=self
<<
> t LOGIN joe secret
< t OK logged in
? Auth-SSL-Subject: CN=self\\, made
? Auth-SSL-Issuer: CN=self\\, made
? Auth-SSL-Serial: 1267

== tls a certificate of another authority is told and passed
@ pop3s-any
TLS cert=other
<<
> USER joe
< +OK
> PASS secret
< +OK logged in
? Auth-SSL: on

== tls EXTERNAL with a certificate
@ smtps-external
TLS cert=good
<<
> AUTH EXTERNAL am9l
< 235 2.0.0 OK
? Auth-Method: external
? Auth-User: joe
? Auth-SSL-Verify: SUCCESS

== tls EXTERNAL after a failed attempt
@ smtps-external
auth: Auth-Status: no | Auth-Wait: 1
auth: @OK
TLS cert=good
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> AUTH EXTERNAL am9l
< 235 2.0.0 OK
? Auth-Method: plain
? Auth-Pass: secret
? Auth-Method: external
? Auth-Pass: secret
differs: stale-password
?- Auth-Pass: secret
?+ Auth-Pass:\x20

== tls STARTTLS and no certificate
@ smtp-starttls-on
> STARTTLS
< 220 2.0.0 Start TLS
TLS
< 421 4.7.1 No required SSL certificate
<.

== tls STARTTLS and a certificate
@ smtp-starttls-on
> STARTTLS
< 220 2.0.0 Start TLS
TLS cert=good
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN

== tls imap STARTTLS and a wrong certificate
@ imap-starttls-on
> a STARTTLS
< a OK completed
TLS cert=self
< * BYE SSL certificate error
<.

== tls pop3 STLS and no certificate
@ pop3-starttls-on
> STLS
< +OK
TLS
< -ERR No required SSL certificate
<.
"""
