"""The dialogue with the upstream, its refusals, and the splice (language: nginx_scripts.py)."""

SCRIPTS = r"""
== upstream replies of several lines
@ smtp
up GREETING: 220-up.test ESMTP\r\n220 welcome
up EHLO: 250-up.test\r\n250-PIPELINING\r\n250 XCLIENT NAME ADDR
up XCLIENT: 250 ok
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ EHLO client.test

== upstream XCLIENT after HELO
@ smtp
> HELO client.test
< 250 mx.test
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ HELO client.test

== upstream XCLIENT with a login of odd characters
@ smtp
> AUTH PLAIN AGorPcOpAHA=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=j+=\xc3\xa9 NAME=[UNAVAILABLE]
differs: xclient-xtext
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=j+2B+3D+C3+A9 NAME=[UNAVAILABLE]

== upstream XCLIENT with the auth server's login
@ smtp
auth: @OK | Auth-User: mapped
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=mapped NAME=[UNAVAILABLE]

== upstream refuses XCLIENT
@ smtp
up XCLIENT: 550 5.7.0 insufficient authorization
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ QUIT

== upstream refuses XCLIENT, told
@ smtp-pass
up XCLIENT: 550 5.7.0 insufficient authorization
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 550 5.7.0 insufficient authorization
<.
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ QUIT

== upstream refuses the second hello
@ smtp-pass
up EHLO: 250 up.test
up EHLO: 501 5.5.4 bad name
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 501 5.5.4 bad name
<.
differs: hello-refused
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ EHLO client.test
^ HELO client.test

== upstream refuses EHLO
@ smtp
up EHLO: 502 no
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
^ EHLO mx.test
differs: hello-refused
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ HELO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]

== upstream greets with 554
@ smtp
up GREETING: 554 no service
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
^-
differs: upstream-farewell
^ QUIT

== upstream greets with 554, told
@ smtp-pass
up GREETING: 554-no\r\n554 service
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 554-no
< 554 service
<.
^-
differs: upstream-farewell
^ QUIT

== upstream greets with 421 and closes
@ smtp
up GREETING: 421 busy !close
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream does not listen
@ smtp
up refused
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream does not listen, nothing to tell
@ smtp-pass
up refused
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream imap does not listen
@ imap
up refused
> t LOGIN joe secret
< * BAD internal server error
<.

== upstream pop3 does not listen
@ pop3
up refused
> USER joe
< +OK
> PASS secret
< -ERR internal server error
<.

== upstream closes without a greeting
@ smtp
up GREETING: !close
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream resets within the dialogue
@ smtp-pass
up XCLIENT: !reset
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream says nothing
@ smtp-timeout
up GREETING:
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream is slow
@ smtp-timeout
up GREETING: $late220 up.test ESMTP
up EHLO: $late250 up.test
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
^ EHLO mx.test
differs: upstream-clock
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]

== upstream imap says nothing to LOGIN
@ imap-timeout
up LOGIN:
> t LOGIN joe secret
< * BAD internal server error
<.

== upstream sends what is no reply
@ smtp
up GREETING: hello there
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== upstream login by AUTH PLAIN
@ smtp-login
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN CRAM-MD5 EXTERNAL
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ EHLO client.test
^ AUTH PLAIN AGpvZQBzZWNyZXQ=

== upstream login without XCLIENT
@ smtp-login-off
> AUTH LOGIN am9l
< 334 UGFzc3dvcmQ6
> c2VjcmV0
< 235 2.0.0 OK
^ HELO mx.test
^ AUTH PLAIN AGpvZQBzZWNyZXQ=

== upstream login with the auth server's words
@ smtp-login-off
auth: @OK | Auth-User: ann | Auth-Pass: other
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ HELO mx.test
^ AUTH PLAIN AGFubgBvdGhlcg==

== upstream login without a password
@ smtp-login
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 451 4.3.2 Internal server error
<.
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ QUIT

== upstream login after EXTERNAL with the auth server's password
@ smtp-login
auth: @OK | Auth-Pass: other
> AUTH EXTERNAL am9l
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ AUTH PLAIN AGpvZQBvdGhlcg==
differs: disabled-external
> AUTH EXTERNAL am9l
< 500 5.5.1 Invalid command
^-
?- *

== upstream refuses the login
@ smtp-login
up AUTH: 535 5.7.8 wrong
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ AUTH PLAIN AGpvZQBzZWNyZXQ=
^ QUIT

== upstream refuses the login, told
@ smtp-pass-login
up AUTH: 535-5.7.8 wrong\r\n535 5.7.8 really
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535-5.7.8 wrong
< 535 5.7.8 really
<.
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ AUTH PLAIN AGpvZQBzZWNyZXQ=
^ QUIT

== upstream none with proxy_smtp_auth
@ smtp-none-login
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== upstream refuses MAIL
@ smtp-none-off
up MAIL: 552 5.3.4 too large
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 451 4.3.2 Internal server error
<.
^ HELO mx.test
^ MAIL FROM:<a@b>
differs: upstream-farewell
^ HELO mx.test
^ MAIL FROM:<a@b>
^ QUIT

== upstream refuses MAIL, told
@ smtp-pass-none
up MAIL: 452 4.2.2 full
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 452 4.2.2 full
<.
differs: upstream-farewell
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ QUIT

== upstream refuses RCPT
@ smtp-none-off
up RCPT: 550 5.1.1 no such user
up RCPT: 250 2.1.5 ok
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 550 5.1.1 no such user
> RCPT TO:<e@f>
< 250 2.1.5 ok
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
^ RCPT TO:<e@f>

== upstream refuses RCPT in several lines
@ smtp-none-off
up RCPT: 450-4.2.0 come\r\n450 4.2.0 later
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 450-4.2.0 come
< 450 4.2.0 later
> QUIT
< 221 2.0.0 up bye
<.

== upstream a reply that does not fit proxy_buffer
@ smtp-reply
up GREETING: 220 xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
differs: upstream-reply-length
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]

== upstream imap refuses the login
@ imap
up LOGIN: $tag NO [AUTHENTICATIONFAILED] wrong
> t LOGIN joe secret
< * BAD internal server error
<.
differs: upstream-farewell
^ t LOGIN {3}
^ joe {6}
^ secret
^ g1 LOGOUT

== upstream imap refuses the login, told
@ imap-pass
up LOGIN: $tag NO [AUTHENTICATIONFAILED] wrong
> t1 LOGIN joe secret
< t1 NO [AUTHENTICATIONFAILED] wrong
<.
^ t1 LOGIN {3}
^ joe {6}
^ secret
differs: upstream-farewell
^ t1 LOGIN {3}
^ joe {6}
^ secret
^ g1 LOGOUT

== upstream imap with a capability code
@ imap
up LOGIN: $tag OK [CAPABILITY IMAP4rev1 IDLE] logged in
> t LOGIN joe secret
< t OK [CAPABILITY IMAP4rev1 IDLE] logged in

== upstream imap with an untagged line
@ imap
up LOGIN: * CAPABILITY IMAP4rev1 IDLE\r\n$tag OK logged in
> t LOGIN joe secret
< * BAD internal server error
<.
differs: imap-untagged-lines
> t LOGIN joe secret
< * CAPABILITY IMAP4rev1 IDLE
< t OK logged in

== upstream imap with two untagged lines
@ imap
up LOGIN: * CAPABILITY IMAP4rev1 IDLE\r\n* 1 EXISTS\r\n$tag OK logged in
> t LOGIN joe secret
< * BAD internal server error
<.
differs: imap-untagged-lines
> t LOGIN joe secret
< * CAPABILITY IMAP4rev1 IDLE
< * 1 EXISTS
< t OK logged in

== upstream imap with something behind the tagged line
@ imap
up LOGIN: $tag OK logged in\r\n* 3 EXISTS
> t LOGIN joe secret
< t OK logged in
< * 3 EXISTS

== upstream imap greets with PREAUTH
@ imap
up GREETING: * PREAUTH hello
> t LOGIN joe secret
< * BAD internal server error
<.
^-

== upstream imap greets with BYE
@ imap
up GREETING: * BYE busy !close
> t LOGIN joe secret
< * BAD internal server error
<.
^-

== upstream imap greets with BYE, told
@ imap-pass
up GREETING: * BYE busy
> t LOGIN joe secret
< * BYE busy
<.
^-

== upstream imap refuses the literal
@ imap-pass
up LITERAL: t BAD no literals
> t LOGIN joe secret
< t BAD no literals
<.
differs: upstream-farewell
^ t LOGIN {3}
^ g1 LOGOUT

== upstream pop3 refuses the greeting
@ pop3
up GREETING: -ERR busy
> USER joe
< +OK
> PASS secret
< -ERR internal server error
<.
^-
differs: upstream-farewell
^ QUIT

== upstream pop3 refuses PASS
@ pop3
up PASS: -ERR [AUTH] wrong
> USER joe
< +OK
> PASS secret
< -ERR internal server error
<.
differs: upstream-farewell
^ USER joe
^ PASS secret
^ QUIT

== upstream pop3 refuses PASS, told
@ pop3-pass
up PASS: -ERR [AUTH] wrong
> USER joe
< +OK
> PASS secret
< -ERR [AUTH] wrong
<.
differs: upstream-farewell
^ USER joe
^ PASS secret
^ QUIT

== upstream pop3 refuses USER, told
@ pop3-pass
up USER: -ERR [SYS/PERM] no
> USER joe
< +OK
> PASS secret
< -ERR [SYS/PERM] no
<.
^ USER joe
differs: upstream-farewell
^ USER joe
^ QUIT

== upstream pop3 after APOP and another password
@ pop3-apop
auth: @OK | Auth-Pass: other | Auth-User: ann
> APOP joe 0123456789abcdef0123456789abcdef
< +OK logged in
^ USER ann
^ PASS other

== splice the upstream ends
@ smtp-all
up NOOP: 421 going !close
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 421 going
<.

== splice the client ends
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 250 2.0.0 up ok
>.
<.
^ HELO mx.test
^ NOOP

== splice the client resets
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
>!
^ HELO mx.test

== splice half-close of the upstream
@ imap
up SELECT: $tag OK done !half
> t LOGIN joe secret
< t OK logged in
> u SELECT x
< u OK done
<.

== splice the client ends before the reply
@ imap
up SELECT: $late$tag OK done
> t LOGIN joe secret
< t OK logged in
> u SELECT x
>.
<.
differs: half-close
> t LOGIN joe secret
< t OK logged in
> u SELECT x
>.
< u OK done
<.

== splice bare LF, NUL and long lines go as they are
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
>| NOOP\n
< 250 2.0.0 up ok
>| X\0Y\xff\r\n
< 250 2.0.0 up ok
^ HELO mx.test
^| NOOP\n
^ X\0Y\xff

== splice nothing is looked at: STARTTLS, AUTH
@ smtp-starttls
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> STARTTLS
< 250 2.0.0 up ok
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.7.0 welcome
> EHLO again.test
< 250 2.0.0 up ok
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ STARTTLS
^ AUTH PLAIN AGpvZQBzZWNyZXQ=
^ EHLO again.test

== splice proxy_timeout
@ smtp-idle
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
<.

== splice proxy_timeout and a client that only reads
@ smtp-idle
up NOOP: 250-one\r\n$late250-two\r\n$late250 three
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 250-one
< 250-two
<.
differs: splice-clock
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> NOOP
< 250-one
< 250-two
< 250 three

== splice a message over many buffers
@ smtp-none-off
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
> DATA
< 354 go ahead
>| MANY\r\n.\r\n
< 250 2.0.0 queued
""".replace("MANY", "x" * 20_000)
