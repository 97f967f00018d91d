"""SMTP before the hand-off: commands, AUTH, the `none` flow, lines and buffers (language: nginx_scripts.py)."""

SCRIPTS = r"""
== smtp greeting and QUIT
@ smtp
> QUIT
< 221 2.0.0 Bye
<.
?! GET
^-

== smtp HELO
@ smtp
> HELO client.test
< 250 mx.test
^-

== smtp EHLO lists what was configured
@ smtp
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
^-

== smtp EHLO with every mechanism
@ smtp-all
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN CRAM-MD5 EXTERNAL

== smtp EHLO lists only what smtp_auth says
@ smtp-plain
> EHLO client.test
< 250-mx.test
< 250-8BITMIME
< 250-ENHANCEDSTATUSCODES
< 250 AUTH PLAIN

== smtp EHLO with mechanisms of two directives
@ smtp-external
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH CRAM-MD5 EXTERNAL

== smtp EHLO without AUTH
@ smtp-none
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250 PIPELINING

== smtp EHLO with none and plain
@ smtp-both
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN

== smtp server_name and capabilities of a server
@ smtp-name
> EHLO client.test
< 250-other.test
< 250-X ONE
< 250-Y TWO
< 250 AUTH PLAIN LOGIN
> HELO client.test
< 250 other.test

== smtp EHLO with an address
@ smtp
> EHLO [192.0.2.1]
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN

== smtp HELO and EHLO without an argument
@ smtp
> HELO
< 501 5.5.4 Invalid argument
> EHLO
< 501 5.5.4 Invalid argument

== smtp HELO and EHLO with two arguments
@ smtp
> HELO a b
< 501 5.5.4 Invalid argument
> EHLO a b
< 501 5.5.4 Invalid argument

== smtp lower case, spaces, and NOOP with arguments
@ smtp
> noop
< 250 2.0.0 OK
> NoOp  some   words
< 250 2.0.0 OK
> helo   client.test\x20\x20
< 250 mx.test

== smtp RSET
@ smtp
> RSET
< 250 2.0.0 OK
> RSET now
< 250 2.0.0 OK
differs: arguments-refused
> RSET
< 250 2.0.0 OK
> RSET now
< 501 5.5.4 Invalid argument

== smtp VRFY EXPN HELP are not counted as errors
@ smtp-errors
> VRFY joe
< 500 5.5.1 Invalid command
> EXPN joe
< 500 5.5.1 Invalid command
> HELP
< 500 5.5.1 Invalid command
> VRFY
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp DATA and unknown commands
@ smtp
> DATA
< 500 5.5.1 Invalid command
> FOO bar
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp BDAT
@ smtp
>| BDAT 6 LAST\r\nNOOP\r\n
< 500 5.5.1 Invalid command
< 250 2.0.0 OK
> NOOP
< 250 2.0.0 OK
differs: bdat-octets
>| BDAT 6 LAST\r\nNOOP\r\n
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp HTTP
@ smtp
> GET / HTTP/1.0
< 500 5.5.1 Invalid command
> Host: mx.test
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
differs: smtp-http
> GET / HTTP/1.0
< 554 5.5.0 this is an SMTP server, not for HTTP
<.

== smtp the fifth error ends the session
@ smtp
> X1
< 500 5.5.1 Invalid command
> XYZ
< 500 5.5.1 Invalid command
> ABC
< 500 5.5.1 Invalid command
> NOOPE
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
> FOO
< 500 5.5.1 Invalid command
<.
differs: last-word
> X1
< 500 5.5.1 Invalid command
> XYZ
< 500 5.5.1 Invalid command
> ABC
< 500 5.5.1 Invalid command
> NOOPE
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
> FOO
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp max_errors 2
@ smtp-errors
> X1
< 500 5.5.1 Invalid command
> X2
< 500 5.5.1 Invalid command
<.
differs: last-word
> X1
< 500 5.5.1 Invalid command
> X2
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp an empty line is an error
@ smtp-errors
>| \r\n
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
>| \r\n
< 500 5.5.1 Invalid command
<.
differs: last-word
>| \r\n
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
>| \r\n
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp more than ten arguments
@ smtp-errors
> NOOP 1 2 3 4 5 6 7 8 9 10
< 250 2.0.0 OK
> NOOP 1 2 3 4 5 6 7 8 9 10 11
< 250 2.0.0 OK
> NOOP 1 2 3 4 5 6 7 8 9 10 11 12
< 500 5.5.1 Invalid command
differs: noop-arguments
> NOOP 1 2 3 4 5 6 7 8 9 10
< 250 2.0.0 OK
> NOOP 1 2 3 4 5 6 7 8 9 10 11
< 250 2.0.0 OK
> NOOP 1 2 3 4 5 6 7 8 9 10 11 12
< 250 2.0.0 OK

== smtp bare LF ends a command
@ smtp
>| NOOP\n
< 250 2.0.0 OK
>| HELO client.test\nNOOP\n
< 250 mx.test
< 250 2.0.0 OK

== smtp a carriage return within a command
@ smtp-errors
>| NOOP\rX\r\n
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp a command in pieces
@ smtp
>| NO
>| OP
>| \r
>| \n
< 250 2.0.0 OK

== smtp pipelined commands
@ smtp
>| NOOP\r\nRSET\r\nHELO a\r\nXXXX\r\nNOOP\r\n
< 250 2.0.0 OK
< 250 2.0.0 OK
< 250 mx.test
< 500 5.5.1 Invalid command
< 250 2.0.0 OK

== smtp an end between commands
@ smtp
> NOOP
< 250 2.0.0 OK
>.
<.

== smtp an end within a command
@ smtp
>| NOOP\r\nRSET\r\nNOO
< 250 2.0.0 OK
< 250 2.0.0 OK
>.
<.

== smtp QUIT with commands behind it
@ smtp
>| NOOP\r\nQUIT\r\n
< 250 2.0.0 OK
< 221 2.0.0 Bye
<.

== smtp AUTH without an argument
@ smtp
> AUTH
< 501 5.5.4 Invalid argument

== smtp AUTH with an unknown mechanism is not counted
@ smtp-errors
> AUTH GSSAPI
< 500 5.5.1 Invalid command
> AUTH SCRAM-SHA-256
< 500 5.5.1 Invalid command
> AUTH XOAUTH2
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
differs: errors-counted last-word
> AUTH GSSAPI
< 500 5.5.1 Invalid command
> AUTH SCRAM-SHA-256
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp AUTH with a mechanism that is not enabled
@ smtp
> AUTH CRAM-MD5
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp AUTH EXTERNAL that is not enabled
@ smtp
> AUTH EXTERNAL
< 500 5.5.1 Invalid command
> AUTH EXTERNAL am9l
< 235 2.0.0 OK
? Auth-Method: external
differs: disabled-external
> AUTH EXTERNAL
< 500 5.5.1 Invalid command
> AUTH EXTERNAL am9l
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH with too many arguments
@ smtp
> AUTH PLAIN AGpvZQBzZWNyZXQ= more
< 500 5.5.1 Invalid command
> AUTH LOGIN am9l more
< 500 5.5.1 Invalid command

== smtp AUTH PLAIN with an initial response
@ smtp
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> MAIL FROM:<a@b>
< 250 2.0.0 up ok
> QUIT
< 221 2.0.0 up bye
<.
? GET /auth
? Host: 127.0.0.1
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret
? Auth-Protocol: smtp
? Auth-Login-Attempt: 1
? Client-IP: $client
? Client-Host: [UNAVAILABLE]
? X-Key: main
?! Auth-Salt
?! Auth-SMTP
?! Auth-SSL
?! Proxy
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ EHLO client.test
^ MAIL FROM:<a@b>
^ QUIT

== smtp AUTH PLAIN with a challenge
@ smtp-all
> AUTH PLAIN
< 334\x20
> AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-User: joe
? Auth-Pass: secret
^ HELO mx.test

== smtp AUTH PLAIN with an authorization identity
@ smtp-all
> AUTH PLAIN YW5uAGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-User: joe
? Auth-Pass: secret
differs: sasl-authzid
> AUTH PLAIN YW5uAGpvZQBzZWNyZXQ=
< 535 5.7.8 authentication credentials invalid
^-
?- *

== smtp AUTH PLAIN without a NUL
@ smtp-errors
> AUTH PLAIN am9lc2VjcmV0
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZQ==
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
^-
differs: errors-counted last-word
> AUTH PLAIN am9lc2VjcmV0
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZQ==
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp AUTH PLAIN with an empty password
@ smtp-all
> AUTH PLAIN AGpvZQA=
< 235 2.0.0 OK
? Auth-User: joe
? Auth-Pass:\x20
differs: empty-password
> AUTH PLAIN AGpvZQA=
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH with bad base64
@ smtp-errors
> AUTH PLAIN !!!!
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZ
< 500 5.5.1 Invalid command
> AUTH LOGIN
< 334 VXNlcm5hbWU6
> a*b
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
differs: errors-counted last-word
> AUTH PLAIN !!!!
< 500 5.5.1 Invalid command
> AUTH PLAIN AGpvZ
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp AUTH with base64 that has no padding
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ
< 235 2.0.0 OK
? Auth-Pass: secret
differs: sasl-malformed
> AUTH PLAIN AGpvZQBzZWNyZXQ
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH with something behind the padding
@ smtp-all
> AUTH PLAIN AGpvZQBzZWNyZXQ=xyz
< 235 2.0.0 OK
? Auth-Pass: secret
differs: sasl-malformed
> AUTH PLAIN AGpvZQBzZWNyZXQ=xyz
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH is canceled
@ smtp-errors
> AUTH LOGIN
< 334 VXNlcm5hbWU6
> *
< 500 5.5.1 Invalid command
> AUTH PLAIN
< 334\x20
> *
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
differs: errors-counted last-word
> AUTH LOGIN
< 334 VXNlcm5hbWU6
> *
< 500 5.5.1 Invalid command
> AUTH PLAIN
< 334\x20
> *
< 500 5.5.1 Invalid command
< 421 4.7.0 too many errors
<.

== smtp AUTH LOGIN
@ smtp-all
> AUTH LOGIN
< 334 VXNlcm5hbWU6
> am9l
< 334 UGFzc3dvcmQ6
> c2VjcmV0
< 235 2.0.0 OK
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret

== smtp AUTH LOGIN with the user name
@ smtp-all
> auth login am9l
< 334 UGFzc3dvcmQ6
> c2VjcmV0
< 235 2.0.0 OK
? Auth-User: joe
? Auth-Pass: secret

== smtp AUTH LOGIN that is not announced
@ smtp-plain
> AUTH LOGIN am9l
< 334 UGFzc3dvcmQ6
> c2VjcmV0
< 235 2.0.0 OK
? Auth-Method: plain

== smtp AUTH PLAIN that is not announced
@ smtp-external
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-Method: plain

== smtp AUTH LOGIN with an empty user name
@ smtp-all
> AUTH LOGIN
< 334 VXNlcm5hbWU6
>
< 334 UGFzc3dvcmQ6
> c2VjcmV0
< 235 2.0.0 OK
? Auth-User:\x20
differs: sasl-malformed
> AUTH LOGIN
< 334 VXNlcm5hbWU6
>
< 500 5.5.1 Invalid command
> c2VjcmV0
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH CRAM-MD5
@ smtp-all
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 235 2.0.0 OK
? Auth-Method: cram-md5
? Auth-User: joe
? Auth-Pass: 0123456789abcdef0123456789abcdef
? Auth-Salt: <SALT1@mx.test>
? Auth-Protocol: smtp

== smtp AUTH CRAM-MD5 with an initial response
@ smtp-all
> AUTH CRAM-MD5 am9l
< 500 5.5.1 Invalid command

== smtp AUTH CRAM-MD5 with a digest of a wrong length
@ smtp-all
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM=
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
^-

== smtp AUTH CRAM-MD5 without a digest
@ smtp-all
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9l
< 500 5.5.1 Invalid command

== smtp AUTH CRAM-MD5 twice
@ smtp-all
auth: Auth-Status: no | Auth-Wait: 1
auth: @OK
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 535 5.7.0 no
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 235 2.0.0 OK
? Auth-Salt: <SALT1@mx.test>
? Auth-Login-Attempt: 1
? Auth-Salt: <SALT1@mx.test>
? Auth-Login-Attempt: 2
differs: challenge-reuse
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 535 5.7.0 no
> AUTH CRAM-MD5
< 334 base64 of <SALT2@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 235 2.0.0 OK
?- Auth-Salt: <SALT1@mx.test>
?+ Auth-Salt: <SALT2@mx.test>

== smtp AUTH EXTERNAL
@ smtp-all
> AUTH EXTERNAL
< 334 VXNlcm5hbWU6
> am9l
< 235 2.0.0 OK
? Auth-Method: external
? Auth-User: joe
? Auth-Pass:\x20
differs: disabled-external
> AUTH EXTERNAL
< 500 5.5.1 Invalid command
> am9l
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH EXTERNAL with an initial response
@ smtp-all
> AUTH EXTERNAL am9l
< 235 2.0.0 OK
? Auth-Method: external
? Auth-User: joe
differs: disabled-external
> AUTH EXTERNAL am9l
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH EXTERNAL with an empty initial response
@ smtp-all
> AUTH EXTERNAL =
< 235 2.0.0 OK
? Auth-Method: external
? Auth-User:\x20
differs: disabled-external
> AUTH EXTERNAL =
< 500 5.5.1 Invalid command
^-
?- *

== smtp AUTH and pipelined mail
@ smtp-all
>| EHLO client.test\r\nAUTH PLAIN AGpvZQBzZWNyZXQ=\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nQUIT\r\n
< 250-mx.test
< 250-SIZE 1000
< 250-PIPELINING
< 250 AUTH PLAIN LOGIN CRAM-MD5 EXTERNAL
< 235 2.0.0 OK
< 250 2.0.0 up ok
< 250 2.1.5 recipient ok
< 221 2.0.0 up bye
<.
^ EHLO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
^ QUIT

== smtp MAIL and RCPT without a login
@ smtp
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> RCPT TO:<a@b>
< 503 5.5.1 Bad sequence of commands
> MAIL
< 530 5.7.1 Authentication required
> DATA
< 500 5.5.1 Invalid command
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
^-
differs: errors-counted last-word
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> RCPT TO:<a@b>
< 503 5.5.1 Bad sequence of commands
> MAIL
< 530 5.7.1 Authentication required
> DATA
< 500 5.5.1 Invalid command
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
< 421 4.7.0 too many errors
<.

== smtp many refused MAIL commands are no errors
@ smtp-errors
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> HELO
< 501 5.5.4 Invalid argument
> AUTH
< 501 5.5.4 Invalid argument
> NOOP
< 250 2.0.0 OK
differs: errors-counted last-word
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
> MAIL FROM:<a@b>
< 530 5.7.1 Authentication required
< 421 4.7.0 too many errors
<.

== smtp none: a mail
@ smtp-none
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250 PIPELINING
> MAIL FROM:<a@b> SIZE=100
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
> RCPT TO:<e@f>
< 250 2.1.5 recipient ok
> DATA
< 354 go ahead
>| Subject: x\r\n\r\n..text\r\n.\r\n
< 250 2.0.0 queued
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.7.0 welcome
> XYZ
< 250 2.0.0 up ok
> QUIT
< 221 2.0.0 up bye
<.
? GET /auth
? Auth-Method: none
? Auth-User:\x20
? Auth-Pass:\x20
? Auth-Protocol: smtp
? Auth-Login-Attempt: 1
? Client-IP: $client
? Client-Host: [UNAVAILABLE]
? Auth-SMTP-Helo: client.test
? Auth-SMTP-From: MAIL FROM:<a@b> SIZE=100
? Auth-SMTP-To: RCPT TO:<c@d>
? X-Key: main
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ EHLO client.test
^ MAIL FROM:<a@b> SIZE=100
^ RCPT TO:<c@d>
^ RCPT TO:<e@f>
^ DATA
^ Subject: x
^
^ ..text
^ .
^ AUTH PLAIN AGpvZQBzZWNyZXQ=
^ XYZ
^ QUIT

== smtp none: MAIL before HELO
@ smtp-none
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-SMTP-Helo:\x20
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== smtp none: after HELO
@ smtp-none
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ HELO client.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== smtp none: HELO without XCLIENT
@ smtp-none-off
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== smtp none: EHLO without XCLIENT
@ smtp-none-off
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250 PIPELINING
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ EHLO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== smtp none: EHLO and then HELO
@ smtp-none-off
> EHLO client.test
< 250-mx.test
< 250-SIZE 1000
< 250 PIPELINING
> HELO other.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-SMTP-Helo: other.test
^ EHLO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
differs: hello-last
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== smtp none: lines go as they were typed
@ smtp-none
> mail  from:<a@b>   SIZE=1\x20\x20
< 250 2.0.0 OK
> rcpt TO: c@d X
< 250 2.1.5 recipient ok
? Auth-SMTP-From: mail  from:<a@b>   SIZE=1
? Auth-SMTP-To: rcpt TO: c@d X
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ mail  from:<a@b>   SIZE=1
^ rcpt TO: c@d X
differs: mail-spelling
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b> SIZE=1
^ RCPT TO:<c@d> X
?- Auth-SMTP-From: mail  from:<a@b>   SIZE=1
?- Auth-SMTP-To: rcpt TO: c@d X
?+ Auth-SMTP-From: MAIL FROM:<a@b> SIZE=1
?+ Auth-SMTP-To: RCPT TO:<c@d> X

== smtp none: addresses are not looked at
@ smtp-none-off
> MAIL whatever
< 250 2.0.0 OK
> RCPT nonsense
< 250 2.1.5 recipient ok
? Auth-SMTP-From: MAIL whatever
? Auth-SMTP-To: RCPT nonsense
differs: mail-syntax
> MAIL whatever
< 501 5.5.4 Invalid argument
> RCPT nonsense
< 503 5.5.1 Bad sequence of commands
^-
?- *

== smtp none: the null sender and parameters
@ smtp-none-off
> MAIL FROM:<> BODY=8BITMIME SMTPUTF8
< 250 2.0.0 OK
> RCPT TO:<c@d> NOTIFY=NEVER
< 250 2.1.5 recipient ok
? Auth-SMTP-From: MAIL FROM:<> BODY=8BITMIME SMTPUTF8
? Auth-SMTP-To: RCPT TO:<c@d> NOTIFY=NEVER

== smtp none: 8-bit octets and TAB in addresses
@ smtp-none-off
> MAIL FROM:<\xc3\xa9@b>
< 250 2.0.0 OK
> RCPT TO:<c@\xff\td>
< 250 2.1.5 recipient ok
? Auth-SMTP-From: MAIL FROM:<\xc3\xa9@b>
? Auth-SMTP-To: RCPT TO:<c@\xff\td>
differs: mail-syntax
> MAIL FROM:<\xc3\xa9@b>
< 550 5.6.7 Non-ASCII address needs SMTPUTF8
> RCPT TO:<c@\xff\td>
< 500 5.5.1 Invalid command
^-
?- *

== smtp none: an address that is none, then one
@ smtp-none-off
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c d@e>
< 250 2.1.5 recipient ok
? Auth-SMTP-To: RCPT TO:<c d@e>
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c d@e>
differs: mail-syntax
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c d@e>
< 501 5.5.4 Invalid argument
^-
?- *

== smtp none: control octets in HELO
@ smtp-none-off
> HELO a\x01b
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-SMTP-Helo: a\x01b
differs: auth-control-characters
> HELO a\x01b
< 500 5.5.1 Invalid command
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
?- Auth-SMTP-Helo: a\x01b
?+ Auth-SMTP-Helo:\x20

== smtp none: sequence
@ smtp-none
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands
> MAIL
< 501 5.5.4 Invalid argument
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> MAIL FROM:<a@b>
< 503 5.5.1 Bad sequence of commands
> RCPT
< 501 5.5.4 Invalid argument
> RSET
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands
^-
differs: errors-counted last-word
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands
> MAIL
< 501 5.5.4 Invalid argument
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> MAIL FROM:<a@b>
< 503 5.5.1 Bad sequence of commands
> RCPT
< 501 5.5.4 Invalid argument
> RSET
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands
< 421 4.7.0 too many errors
<.

== smtp none: HELO forgets MAIL
@ smtp-none
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> HELO client.test
< 250 mx.test
> RCPT TO:<c@d>
< 503 5.5.1 Bad sequence of commands

== smtp none: DATA without RCPT
@ smtp-none
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> DATA
< 500 5.5.1 Invalid command

== smtp none: pipelined mail
@ smtp-none-off
>| EHLO c.test\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n
< 250-mx.test
< 250-SIZE 1000
< 250 PIPELINING
< 250 2.0.0 OK
< 250 2.1.5 recipient ok
< 354 go ahead
^ EHLO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
^ DATA

== smtp none: AUTH PLAIN and LOGIN are accepted all the same
@ smtp-none-off
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-Method: plain
^ HELO mx.test

== smtp none and plain: a login
@ smtp-both
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
> MAIL FROM:<a@b>
< 250 2.0.0 up ok
? Auth-Method: plain
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>

== smtp none and plain: a mail
@ smtp-both
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-Method: none

== smtp none: a failed login, then mail
@ smtp-both
auth: Auth-Status: no | Auth-Wait: 1
auth: @OK
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Auth-Method: plain
? Auth-Method: none
? Auth-Login-Attempt: 2
differs: old-credentials
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
?- Auth-User: joe
?- Auth-Pass: secret
?+ Auth-User:\x20
?+ Auth-Pass:\x20

== smtp none: a refused recipient and another
@ smtp-none-off
auth: Auth-Status: no such user | Auth-Wait: 1 | Auth-Error-Code: 550 5.1.1
auth: @OK
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 550 5.1.1 no such user
> RCPT TO:<e@f>
< 250 2.1.5 recipient ok
? Auth-Login-Attempt: 1
? Auth-SMTP-To: RCPT TO:<c@d>
? Auth-Login-Attempt: 2
? Auth-SMTP-From: MAIL FROM:<a@b>
? Auth-SMTP-To: RCPT TO:<e@f>
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<e@f>

== smtp none: a recipient that is refused without a wait ends the session
@ smtp-none-off
auth: Auth-Status: no such user | Auth-Error-Code: 550 5.1.1
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 550 5.1.1 no such user
<.
^-

== smtp a line that does not fit the buffer
@ smtp-buffer
>| NOOP xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< 500 5.5.1 Invalid command
<.
differs: buffers
>| NOOP xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
>| \r\n
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK

== smtp a line that just fits the buffer
@ smtp-buffer
> NOOP xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< 250 2.0.0 OK

== smtp pipelined commands across the end of the buffer
@ smtp-buffer
>| NOOP 1xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\nNOOP 2xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\nNOOP 3xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< 250 2.0.0 OK
< 250 2.0.0 OK
< 500 5.5.1 Invalid command
<.
differs: buffers
>| NOOP 1xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\nNOOP 2xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\nNOOP 3xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< 250 2.0.0 OK
< 250 2.0.0 OK
>| \r\n
< 250 2.0.0 OK

== smtp the client says nothing
@ smtp-timeout
<<
<.
differs: timeouts-answered
<<
< 421 4.4.2 timeout exceeded
<.

== smtp the client stops within AUTH
@ smtp-timeout
> AUTH LOGIN
< 334 VXNlcm5hbWU6
<.
differs: timeouts-answered
> AUTH LOGIN
< 334 VXNlcm5hbWU6
< 421 4.4.2 timeout exceeded
<.

== smtp early talk without a greeting delay
@ smtp
> NOOP
<<
< 250 2.0.0 OK

== smtp greeting delay
@ smtp-delay
<<
> NOOP
< 250 2.0.0 OK

== smtp the client speaks before a delayed greeting
@ smtp-delay
silent
> NOOP
< 503 5.5.0 Improper use of SMTP command pipelining
<.
?! GET

== smtp the client ends before a delayed greeting
@ smtp-delay
silent
>.
<.

== smtp a client ends after the greeting
@ smtp
>.
<.

== smtp STARTTLS where it is off
@ smtp
> STARTTLS
< 500 5.5.1 Invalid command
> NOOP
< 250 2.0.0 OK
"""
