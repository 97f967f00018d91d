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
late
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
late
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
differs: shutdown-answered
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
stop
< 421 4.3.2 service shutting down
<.

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
differs: shutdown-answered
> t LOGIN joe secret
< t OK logged in
stop
< * BYE [UNAVAILABLE] service shutting down
<.

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
differs: shutdown-answered
> USER joe
< +OK
> PASS secret
< +OK logged in
stop
< -ERR [SYS/TEMP] service shutting down
<.

== stop smtp that is joined and said something
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 250 2.0.0 up ok
stop
<.
differs: shutdown-answered
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 250 2.0.0 up ok
stop
< 421 4.3.2 service shutting down
<.

== stop imap that is joined and idle
@ imap
up IDLE: + idling
> t LOGIN joe secret
< t OK logged in
> u IDLE
< + idling
stop
<.
differs: shutdown-answered
> t LOGIN joe secret
< t OK logged in
> u IDLE
< + idling
stop
< * BYE [UNAVAILABLE] service shutting down
<.

== stop pop3 that is joined and said something
@ pop3
> USER joe
< +OK
> PASS secret
< +OK logged in
> STAT
< +OK up ok
stop
<.
differs: shutdown-answered
> USER joe
< +OK
> PASS secret
< +OK logged in
> STAT
< +OK up ok
stop
< -ERR [SYS/TEMP] service shutting down
<.

== stop imap within a reply
@ imap
up FETCH: $late* 1 FETCH ()\r\n$tag OK done
> t LOGIN joe secret
< t OK logged in
> u FETCH 1 ALL
stop
< * 1 FETCH ()
< u OK done
<.
differs: shutdown-answered
> t LOGIN joe secret
< t OK logged in
> u FETCH 1 ALL
stop
< * 1 FETCH ()
< u OK done
< * BYE [UNAVAILABLE] service shutting down
<.
"""
