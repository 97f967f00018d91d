"""A program that is told to stop: sessions before the login and joined ones (language: nginx_scripts.py)."""

SCRIPTS = r"""
== stop smtp before the login
@ smtp
> NOOP
< 250 2.0.0 OK
stop
> NOOP
< 250 2.0.0 OK
differs: shutdown-answered
> NOOP
< 250 2.0.0 OK
stop
< 421 4.3.2 service shutting down
<.

== stop imap before the login
@ imap
> a NOOP
< a OK completed
stop
late
late
> a NOOP
< a OK completed
differs: shutdown-answered
> a NOOP
< a OK completed
stop
< * BYE [UNAVAILABLE] service shutting down
<.

== stop pop3 before the login
@ pop3
> NOOP
< +OK
stop
late
late
> NOOP
< +OK
differs: shutdown-answered
> NOOP
< +OK
stop
< -ERR [SYS/TEMP] service shutting down
<.

== stop smtp that is joined
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
stop
<.
^ HELO mx.test

== stop smtp while mail is on its way
@ smtp-none-off
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
> DATA
< 354 go ahead
stop
>| Subject: x\r\n\r\n.\r\n
< 250 2.0.0 queued
> QUIT
< 221 2.0.0 up bye
<.

== stop imap that is joined
@ imap
> t LOGIN joe secret
< t OK logged in
stop
<.
^ t LOGIN {3}
^ joe {6}
^ secret

== stop pop3 that is joined
@ pop3
> USER joe
< +OK
> PASS secret
< +OK logged in
stop
<.
^ USER joe
^ PASS secret
"""
