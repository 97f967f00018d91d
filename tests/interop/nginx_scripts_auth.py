"""The auth_http exchange: what is asked, every kind of answer (language: nginx_scripts.py)."""

SCRIPTS = r"""
== auth an answer of HTTP/1.1 that keeps the connection
@ smtp-all
auth: Auth-Status: OK | Auth-Server: 127.0.0.1 | Auth-Port: $port !keep
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth an answer without a status line
@ smtp-all
auth= Auth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: $port\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth the status code is not looked at
@ smtp-all
auth= HTTP/1.1 500 Error\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: $port\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth a 200 without headers
@ smtp-all
auth= HTTP/1.0 200 OK\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
^-

== auth a 401 without headers
@ smtp-all
auth= HTTP/1.0 401 Unauthorized\r\nServer: x\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth a body is ignored
@ smtp-all
auth= HTTP/1.0 200 OK\r\nContent-Length: 5\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: $port\r\n\r\nhello
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth names of headers in any case, blanks around values
@ smtp-all
auth= HTTP/1.0 200 OK\r\nauth-status:OK\r\nAUTH-SERVER:   127.0.0.1  \r\nAuth-Port:$port\r\nX-Other: y\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth lines that end in a bare LF
@ smtp-all
auth= HTTP/1.0 200 OK\nAuth-Status: OK\nAuth-Server: 127.0.0.1\nAuth-Port: $port\n\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth the order of the headers does not matter
@ smtp-all
auth: Auth-Port: $port | Auth-Server: 127.0.0.1 | Auth-Status: OK
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth the last of repeated headers counts
@ smtp-all
auth: Auth-Status: OK | Auth-Server: 127.0.0.9 | Auth-Server: 127.0.0.1 | Auth-Port: 1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth an error is not undone by a later OK
@ smtp-all
auth: Auth-Status: no | Auth-Status: OK | Auth-Server: 127.0.0.1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
<.

== auth without Auth-Status
@ smtp-all
auth: Auth-Server: 127.0.0.1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth with an empty Auth-Status
@ smtp-all
auth: Auth-Status:  | Auth-Server: 127.0.0.1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth imap with an empty Auth-Status
@ imap
auth: Auth-Status:  | Auth-Server: 127.0.0.1 | Auth-Port: $port
> t LOGIN joe secret
< t NO\x20
<.

== auth pop3 with an empty Auth-Status
@ pop3
auth: Auth-Status:  | Auth-Server: 127.0.0.1 | Auth-Port: $port
> USER joe
< +OK
> PASS secret
< -ERR\x20
<.

== auth a lower-case ok is an error text
@ smtp-all
auth: Auth-Status: ok | Auth-Server: 127.0.0.1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 ok
<.

== auth a lower-case wait is an error text
@ imap
auth: Auth-Status: wait | Auth-Wait: 1
> t LOGIN joe secret
< t NO wait
> t NOOP
< t OK completed

== auth an error closes
@ smtp-all
auth: Auth-Status: Invalid login or password
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 Invalid login or password
<.
^-

== auth an error with Auth-Wait keeps the session
@ smtp-all
auth: Auth-Status: Invalid login or password | Auth-Wait: 1
auth: @OK
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 Invalid login or password
> NOOP
< 250 2.0.0 OK
> AUTH PLAIN AGFubgBvdGhlcg==
< 235 2.0.0 OK
? Auth-User: joe
? Auth-Pass: secret
? Auth-Login-Attempt: 1
? Auth-User: ann
? Auth-Pass: other
? Auth-Login-Attempt: 2

== auth Auth-Wait of zero closes
@ smtp-all
auth: Auth-Status: no | Auth-Wait: 0
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
<.

== auth Auth-Wait that is no number is ignored
@ smtp-all
auth: Auth-Status: no | Auth-Wait: soon
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
<.

== auth Auth-Error-Code
@ smtp-all
auth: Auth-Status: try later | Auth-Error-Code: 454 4.7.0
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 454 4.7.0 try later
<.

== auth Auth-Error-Code means nothing to imap
@ imap
auth: Auth-Status: [UNAVAILABLE] try later | Auth-Error-Code: 454 4.7.0
> t LOGIN joe secret
< t NO [UNAVAILABLE] try later
<.

== auth Auth-Error-Code 421 means nothing to imap
@ imap
auth: Auth-Status: no | Auth-Error-Code: 421 4.7.0 | Auth-Wait: 1
> t LOGIN joe secret
< t NO no
> t NOOP
< t OK completed

== auth Auth-Error-Code 500 means nothing to imap
@ imap
auth: Auth-Status: no | Auth-Error-Code: 500 5.5.1 | Auth-Wait: 1
> t LOGIN joe secret
< t NO no
> t NOOP
< t OK completed

== auth Auth-Wait does not count
@ smtp-timeout
auth: Auth-Status: no | Auth-Wait: 1
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
late
> NOOP
< 250 2.0.0 OK

== auth a failed login starts the clock anew
@ smtp-timeout
auth: Auth-Status: no | Auth-Wait: 1
<<
late
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
late
> NOOP
< 250 2.0.0 OK
differs: login-clock timeouts-answered
<<
late
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
late
> NOOP
< 421 4.4.2 timeout exceeded
<.

== auth Auth-Error-Code means nothing to pop3
@ pop3
auth: Auth-Status: [SYS/TEMP] try later | Auth-Error-Code: 454 4.7.0
> USER joe
< +OK
> PASS secret
< -ERR [SYS/TEMP] try later
<.

== auth five failed logins are not errors
@ smtp-errors
auth: Auth-Status: no | Auth-Wait: 1
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
> NOOP
< 250 2.0.0 OK
? Auth-Login-Attempt: 3

== auth WAIT with Auth-Wait asks again
@ smtp-all
auth: Auth-Status: WAIT | Auth-Wait: 1
auth: @OK
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Auth-Pass: secret
? Auth-Login-Attempt: 1
? Auth-Pass: secret
? Auth-Login-Attempt: 1

== auth WAIT and then an error
@ imap
auth: Auth-Status: WAIT | Auth-Wait: 1
auth: Auth-Status: no
> t LOGIN joe secret
< t NO no
<.

== auth WAIT with CRAM-MD5
@ smtp-all
auth: Auth-Status: WAIT | Auth-Wait: 1
auth: @OK
> AUTH CRAM-MD5
< 334 base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< 235 2.0.0 OK
? Auth-Pass: 0123456789abcdef0123456789abcdef
? Auth-Login-Attempt: 1
? Auth-Pass:\x20
? Auth-Login-Attempt: 1
differs: auth-wait-digest
?- Auth-Pass:\x20
?+ Auth-Pass: 0123456789abcdef0123456789abcdef

== auth WAIT without Auth-Wait
@ smtp-all
auth: Auth-Status: WAIT
auth: @OK
auth: Auth-Status: no
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 535 5.7.0 no
<.
differs: auth-wait-loop
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ HELO mx.test
?- GET /auth
?- Host: 127.0.0.1
?- Auth-Method: plain
?- Auth-User: joe
?- Auth-Pass: secret
?- Auth-Protocol: smtp
?- Auth-Login-Attempt: 1
?- Client-IP: $client
?- Client-Host: [UNAVAILABLE]
?- X-Key: main

== auth names of users and passwords are replaced
@ imap
auth: @OK | Auth-User: other | Auth-Pass: pass word
> t LOGIN joe secret
< t OK logged in
^ t LOGIN {5}
^ other {9}
^ pass word

== auth pop3 names of users and passwords are replaced
@ pop3
auth: @OK | Auth-User: other | Auth-Pass: pass word
> USER joe
< +OK
> PASS secret
< +OK logged in
^ USER other
^ PASS pass word

== auth values are not decoded
@ imap
auth: @OK | Auth-User: a%20b | Auth-Pass: c%25d
> t LOGIN joe secret
< t OK logged in
^ t LOGIN {5}
^ a%20b {5}
^ c%25d

== auth escapes of all control octets
@ imap
> t AUTHENTICATE PLAIN AAECAx8gIX8A/iUmKw==
< t OK logged in
? Auth-User: %01%02%03%1F%20!\x7f
? Auth-Pass: \xfe%25&+
^~
differs: credentials-control-characters credentials-utf8
> t AUTHENTICATE PLAIN AAECAx8gIX8A/iUmKw==
< t BAD invalid command
^-
?- *

== auth no server
@ smtp-all
auth: Auth-Status: OK | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth no port
@ imap
auth: Auth-Status: OK | Auth-Server: 127.0.0.1
> t LOGIN joe secret
< * BAD internal server error
<.

== auth a port that is none
@ pop3
auth: Auth-Status: OK | Auth-Server: 127.0.0.1 | Auth-Port: 99999
> USER joe
< +OK
> PASS secret
< -ERR internal server error
<.

== auth a port of zero
@ smtp-all
auth: Auth-Status: OK | Auth-Server: 127.0.0.1 | Auth-Port: 0
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth the name of a server
@ smtp-all
auth: Auth-Status: OK | Auth-Server: localhost | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
differs: auth-server-names
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ HELO mx.test

== auth an IPv6 server that does not listen
@ smtp-all
auth: Auth-Status: OK | Auth-Server: ::1 | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth an IPv6 server in brackets
@ smtp-all
auth: Auth-Status: OK | Auth-Server: [::1] | Auth-Port: $port
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth an underscore in the name of a header
@ smtp-all
auth: @OK | X_Other: y
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
differs: auth-answer-size
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ HELO mx.test

== auth an answer of more than 1024 octets
@ smtp-auth-timeout
auth: @OK | X-Long: LONG !hang
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.
differs: auth-answer-size
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]

== auth an answer of less than 1024 octets
@ smtp-all
auth: @OK | X-Long: SHORT
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK

== auth the server closes without a word
@ smtp-all
auth=
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth imap the server closes without a word
@ imap
auth=
> t LOGIN joe secret
< * BAD internal server error
<.

== auth pop3 the server closes without a word
@ pop3
auth=
> USER joe
< +OK
> PASS secret
< -ERR internal server error
<.

== auth the server resets
@ smtp-all
auth= \x20!reset
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth the server closes within the headers
@ smtp-auth-timeout
auth= HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Ser
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth the server says something that is no HTTP
@ smtp-auth-timeout
auth= \x00\x01\x02garbage\xff\r\n\r\n
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth the server says nothing
@ smtp-auth-timeout
auth=  !hang
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth the server stops within the headers
@ smtp-auth-timeout
auth= HTTP/1.0 200 OK\r\nAuth-Status: OK\r\n !hang
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 451 4.3.2 Internal server error
<.

== auth headers of a server replace those of mail
@ smtp-headers
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [UNAVAILABLE]
? X-A: 1
? X-B: two words
? X-A: 2
?! X-Key
differs: auth-header-order
?- X-A: 2
?+ X-A: 2

== auth a URL without a path
@ smtp-root
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? GET /
? Host: 127.0.0.1

== auth a URL with a name, a path and a query
@ smtp-path
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? GET /a/b?c=d%20e
? Host: localhost

== auth a URL of a unix socket
@ smtp-socket
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? GET /over/there
? Host: localhost

== auth an error to the none flow
@ smtp-none
auth: Auth-Status: go away | Auth-Error-Code: 554 5.7.1
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 554 5.7.1 go away
<.
^-

== auth an error without a code to the none flow
@ smtp-none
auth: Auth-Status: go away | Auth-Wait: 1
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 535 5.7.0 go away
> RSET
< 250 2.0.0 OK

== auth a login from the none flow
@ smtp-none
auth: @OK | Auth-User: mapped
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=mapped NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== auth a request as it is
@ imap
whole
> t LOGIN joe secret
< t OK logged in
? GET /auth HTTP/1.0
? Host: 127.0.0.1
?! Connection
differs: auth-connections
?- GET /auth HTTP/1.0
?+ GET /auth HTTP/1.1

== auth the client resets while the auth server thinks
@ imap
auth: Auth-Status: WAIT | Auth-Wait: 1
auth: @OK
> t LOGIN joe secret
wait auth
>!
wait up
^ t LOGIN {3}
^ joe {6}
^ secret
differs: client-gone
> t LOGIN joe secret
wait auth
>!
late
late
^-
?- GET /auth
?- Host: 127.0.0.1
?- Auth-Method: plain
?- Auth-User: joe
?- Auth-Pass: secret
?- Auth-Protocol: imap
?- Auth-Login-Attempt: 1
?- Client-IP: $client
?- X-Key: main

== auth a location that lets everybody in, and a wrong password
@ imap-local
up inside
up LOGIN: $tag NO [AUTHENTICATIONFAILED] wrong
> t LOGIN joe wrong
< * BAD internal server error
<.
^ t LOGIN {3}
^ joe {5}
^ wrong
differs: upstream-farewell
^ t LOGIN {3}
^ joe {5}
^ wrong
^ g1 LOGOUT

== auth a location that lets everybody in, and the right password
@ imap-local
up inside
> t LOGIN joe secret
< t OK logged in
^ t LOGIN {3}
^ joe {6}
^ secret

== auth a location that lets everybody in, and AUTH where mail needs no login
@ smtp-local
up inside
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ HELO mx.test
differs: local-location
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 500 5.5.1 Invalid command
^-

== auth a location that lets everybody in, and mail
@ smtp-local
up inside
> HELO c.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
^ HELO mx.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== auth the client ends while the auth server thinks
@ imap
auth: Auth-Status: WAIT | Auth-Wait: 1
auth: @OK
> t LOGIN joe secret
wait auth
>.
< t OK logged in
<.
^ t LOGIN {3}
^ joe {6}
^ secret
""".replace("LONG", "x" * 1000).replace("SHORT", "x" * 800)
