"""POP3 before the hand-off: its states, APOP and AUTH (language: nginx_scripts.py)."""

SCRIPTS = r"""
== pop3 greeting and QUIT
@ pop3
> QUIT
< +OK
<.
^-

== pop3 greeting with a challenge
@ pop3-all
> NOOP
< +OK

== pop3 greeting where CRAM-MD5 is to be had and APOP is not
@ pop3-cram
> APOP joe 0123456789abcdef0123456789abcdef
< -ERR invalid command
differs: pop3-timestamp
silent
< +OK POP3 ready
> APOP joe 0123456789abcdef0123456789abcdef
< -ERR invalid command

== pop3 CAPA of the defaults
@ pop3
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< .

== pop3 CAPA with everything
@ pop3-all
> capa
< +OK Capability list follows
< TOP
< USER
< EXPIRE NEVER
< SASL PLAIN LOGIN CRAM-MD5 EXTERNAL
< .

== pop3 CAPA with apop only
@ pop3-apop
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL
< .

== pop3 CAPA, NOOP in both states
@ pop3
> NOOP
< +OK
> USER joe
< +OK
> CAPA
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< .
> NOOP
< +OK
> PASS secret
< +OK logged in

== pop3 USER and PASS
@ pop3
> USER joe
< +OK
> PASS secret
< +OK logged in
> STAT
< +OK up ok
> RETR 1
< +OK message
< line
< .
> QUIT
< +OK up bye
<.
? GET /auth
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret
? Auth-Protocol: pop3
? Auth-Login-Attempt: 1
? Client-IP: $client
?! Auth-Salt
?! Client-Host
^ USER joe
^ PASS secret
^ STAT
^ RETR 1
^ QUIT

== pop3 spaces in PASS and USER
@ pop3
> USER jo e
< +OK
> PASS se  cret\x20
< +OK logged in
? Auth-User: jo%20e
? Auth-Pass: se%20%20cret%20
^ USER jo e
^ PASS se  cret\x20

== pop3 8-bit octets and percent signs
@ pop3
> user j\xc3\xa9%
< +OK
> pass \xff\x7f\t
< +OK logged in
? Auth-User: j\xc3\xa9%25
? Auth-Pass: \xff\x7f%09
differs: credentials-utf8
> user j\xc3\xa9%
< +OK
> pass \xff\x7f\t
< -ERR invalid command
^-
?- *

== pop3 UTF-8, percent signs and control octets in the password
@ pop3
> user j\xc3\xa9%
< +OK
> pass \xc3\xa9\t%
< +OK logged in
? Auth-User: j\xc3\xa9%25
? Auth-Pass: \xc3\xa9%09%25
^ USER j\xc3\xa9%
^ PASS \xc3\xa9\t%

== pop3 USER and PASS without arguments
@ pop3
> USER
< -ERR invalid command
> USER joe
< +OK
> PASS
< -ERR invalid command
> PASS secret
< -ERR invalid command

== pop3 an empty password
@ pop3
> USER joe
< +OK
> PASS\x20
< -ERR invalid command

== pop3 PASS before USER, and a second USER
@ pop3-errors
> PASS secret
< -ERR invalid command
> USER joe
< +OK
> USER ann
< -ERR invalid command
> PASS secret
< -ERR invalid command
> STAT
< -ERR invalid command
> NOOP
< +OK
differs: errors-counted last-word
> PASS secret
< -ERR invalid command
> USER joe
< +OK
> USER ann
< -ERR invalid command
< -ERR too many errors
<.

== pop3 QUIT after USER
@ pop3
> USER joe
< +OK
> QUIT
< +OK
<.

== pop3 commands that there are not
@ pop3
> STAT
< -ERR invalid command
> RETR 1
< -ERR invalid command
> APOP joe 0123456789abcdef0123456789abcdef
< -ERR invalid command
> STLS
< -ERR invalid command
> NOOP
< +OK

== pop3 max_errors 2
@ pop3-errors
> XYZ
< -ERR invalid command
> FOO
< -ERR invalid command
<.
differs: last-word
> XYZ
< -ERR invalid command
> FOO
< -ERR invalid command
< -ERR too many errors
<.

== pop3 an empty line
@ pop3-errors
>| \r\n
< -ERR invalid command
> NOOP
< +OK

== pop3 too many arguments
@ pop3
> NOOP a
< +OK
> CAPA a
< +OK Capability list follows
< TOP
< USER
< UIDL
< SASL PLAIN LOGIN
< .
> QUIT now
< +OK
<.

== pop3 bare LF ends a command
@ pop3
>| NOOP\nUSER joe\n
< +OK
< +OK

== pop3 a carriage return within a command
@ pop3
>| USER jo\re\r\n
< -ERR invalid command

== pop3 pipelined commands
@ pop3
>| NOOP\r\nUSER joe\r\nPASS secret\r\nSTAT\r\nQUIT\r\n
< +OK
< +OK
< +OK logged in
< +OK up ok
< +OK up bye
<.
^ USER joe
^ PASS secret
^ STAT
^ QUIT

== pop3 an end between commands
@ pop3
> NOOP
< +OK
>.
<.

== pop3 an end within a command
@ pop3
>| NOOP\r\nUSER joe\r\nPAS
< +OK
< +OK
>.
<.

== pop3 a line that does not fit the buffer of 128 octets
@ pop3
>| USER xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< -ERR invalid command
<.
differs: pop3-line-length
>| USER xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
>| \r\n
< +OK

== pop3 APOP
@ pop3-all
auth: @OK | Auth-Pass: other
> APOP joe 0123456789abcdef0123456789abcdef
< +OK logged in
? Auth-Method: apop
? Auth-User: joe
? Auth-Pass: 0123456789abcdef0123456789abcdef
? Auth-Salt: <SALT1@mx.test>
? Auth-Protocol: pop3
^ USER joe
^ PASS other

== pop3 APOP without a password for the upstream
@ pop3-apop
> APOP joe 0123456789abcdef0123456789abcdef
< -ERR internal server error
<.
^-
differs: upstream-farewell
^ QUIT

== pop3 APOP with wrong arguments
@ pop3-apop
> APOP
< -ERR invalid command
> APOP joe
< -ERR invalid command
> APOP joe 0123 4567
< -ERR invalid command
> NOOP
< +OK

== pop3 APOP after USER
@ pop3-apop
> USER joe
< +OK
> APOP joe 0123456789abcdef0123456789abcdef
< -ERR invalid command

== pop3 AUTH lists the mechanisms
@ pop3-all
> AUTH
< +OK methods supported:
< PLAIN
< LOGIN
< CRAM-MD5
< EXTERNAL
< .

== pop3 AUTH lists the defaults
@ pop3
> AUTH
< +OK methods supported:
< PLAIN
< LOGIN
< .

== pop3 AUTH lists nothing
@ pop3-apop
> AUTH
< +OK methods supported:
< .

== pop3 AUTH PLAIN
@ pop3
> AUTH PLAIN
< +\x20
> AGpvZQBzZWNyZXQ=
< +OK logged in
? Auth-User: joe
? Auth-Pass: secret
^ USER joe
^ PASS secret

== pop3 AUTH PLAIN with an initial response
@ pop3-apop
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< +OK logged in
? Auth-Method: plain
^ USER joe
^ PASS secret

== pop3 AUTH LOGIN
@ pop3
> AUTH LOGIN
< + VXNlcm5hbWU6
> am9l
< + UGFzc3dvcmQ6
> c2VjcmV0
< +OK logged in
? Auth-User: joe

== pop3 AUTH LOGIN with an initial response
@ pop3
> auth login am9l
< + UGFzc3dvcmQ6
> c2VjcmV0
< +OK logged in

== pop3 AUTH CRAM-MD5
@ pop3-all
auth: @OK | Auth-Pass: other
> AUTH CRAM-MD5
< + base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< +OK logged in
? Auth-Method: cram-md5
? Auth-Salt: <SALT1@mx.test>
^ USER joe
^ PASS other
differs: challenge-reuse
> AUTH CRAM-MD5
< + base64 of <SALT2@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< +OK logged in
?- Auth-Salt: <SALT1@mx.test>
?+ Auth-Salt: <SALT2@mx.test>

== pop3 AUTH EXTERNAL
@ pop3-all
auth: @OK | Auth-Pass: other
> AUTH EXTERNAL
< + VXNlcm5hbWU6
> am9l
< +OK logged in
? Auth-Method: external
^ USER joe
^ PASS other
differs: disabled-external
> AUTH EXTERNAL
< -ERR invalid command
> am9l
< -ERR invalid command
^-
?- *

== pop3 AUTH with mechanisms that are off or unknown
@ pop3-errors
> AUTH CRAM-MD5
< -ERR invalid command
> AUTH XOAUTH2
< -ERR invalid command
> AUTH PLAIN a b
< -ERR invalid command
> NOOP
< +OK
differs: errors-counted last-word
> AUTH CRAM-MD5
< -ERR invalid command
> AUTH XOAUTH2
< -ERR invalid command
< -ERR too many errors
<.

== pop3 AUTH is canceled
@ pop3
> AUTH PLAIN
< +\x20
> *
< -ERR invalid command
> AUTH LOGIN
< + VXNlcm5hbWU6
> *
< -ERR invalid command
> NOOP
< +OK

== pop3 AUTH with bad base64
@ pop3-errors
> AUTH PLAIN AGpvZ
< -ERR invalid command
> AUTH PLAIN AGpvZQ==
< -ERR invalid command
> NOOP
< +OK
differs: errors-counted last-word
> AUTH PLAIN AGpvZ
< -ERR invalid command
> AUTH PLAIN AGpvZQ==
< -ERR invalid command
< -ERR too many errors
<.

== pop3 AUTH PLAIN with line ends in the user name
@ pop3
up XEVIL:
> AUTH PLAIN AHUNClhFVklMIDEAcA==
< +OK logged in
? Auth-User: u%0D%0AXEVIL%201
^ USER u
^ XEVIL 1
^ PASS p
differs: credentials-control-characters
> AUTH PLAIN AHUNClhFVklMIDEAcA==
< -ERR invalid command
^-
?- *

== pop3 AUTH PLAIN with line ends in the password
@ pop3
up XEVIL:
> AUTH PLAIN AGpvZQBwDQpYRVZJTCAx
< +OK logged in
? Auth-Pass: p%0D%0AXEVIL%201
^ USER joe
^ PASS p
^ XEVIL 1
differs: credentials-control-characters
> AUTH PLAIN AGpvZQBwDQpYRVZJTCAx
< -ERR invalid command
^-
?- *

== pop3 AUTH PLAIN with an empty password
@ pop3
> AUTH PLAIN AGpvZQA=
< +OK logged in
? Auth-Pass:\x20
^~
differs: empty-password
> AUTH PLAIN AGpvZQA=
< -ERR invalid command
^-
?- *

== pop3 a failed login and another
@ pop3
auth: Auth-Status: [AUTH] wrong | Auth-Wait: 1
auth: @OK
> USER joe
< +OK
> PASS wrong
< -ERR [AUTH] wrong
> USER joe
< +OK
> PASS secret
< +OK logged in
? Auth-Pass: wrong
? Auth-Login-Attempt: 1
? Auth-Pass: secret
? Auth-Login-Attempt: 2

== pop3 PASS straight after a failed login
@ pop3
auth: Auth-Status: wrong | Auth-Wait: 1
> USER joe
< +OK
> PASS wrong
< -ERR wrong
> PASS secret
< -ERR invalid command

== pop3 a failed login that ends the session
@ pop3
auth: Auth-Status: wrong
> USER joe
< +OK
> PASS wrong
< -ERR wrong
<.
^-

== pop3 the client says nothing
@ pop3-timeout
<<
<.
differs: timeouts-answered
<<
< -ERR timeout exceeded
<.

== pop3 the client stops after USER
@ pop3-timeout
> USER joe
< +OK
<.
differs: timeouts-answered
> USER joe
< +OK
< -ERR timeout exceeded
<.
"""
