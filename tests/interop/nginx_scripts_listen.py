"""What `listen` and its neighbors say: addresses, PROXY headers, reverse DNS (language: nginx_scripts.py)."""

SCRIPTS = r"""
== listen the first of two addresses with one port
@ smtp-first
> HELO client.test
< 250 first.test

== listen the second of two addresses with one port
@ smtp-second
> HELO client.test
< 250 second.test

== listen the last of a range of ports
@ smtp-range
> HELO client.test
< 250 range.test

== listen on a unix socket
@ smtp-unix
alone
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Client-IP: unix:
? Client-Host: [UNAVAILABLE]
^ EHLO mx.test
^ XCLIENT ADDR=unix: NAME=[UNAVAILABLE]
^ HELO client.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>
differs: xclient-unix
^ EHLO mx.test
^ XCLIENT ADDR=[UNAVAILABLE] NAME=[UNAVAILABLE]
^ HELO client.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== listen on IPv6
@ smtp-six
alone
> HELO client.test
< 250 mx.test
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Client-IP: ::1
^ EHLO mx.test
^ XCLIENT ADDR=IPV6:::1 NAME=[UNAVAILABLE]
^ HELO client.test
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== proxy header v1 from a trusted peer
@ smtp-trusted
> PROXY TCP4 $claimed 192.0.2.1 4711 25
<<
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Client-IP: $claimed
? Proxy-Protocol-Addr: $claimed
? Proxy-Protocol-Port: 4711
? Proxy-Protocol-Server-Addr: 192.0.2.1
? Proxy-Protocol-Server-Port: 25
^ EHLO mx.test
^ XCLIENT ADDR=$claimed NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== proxy header v1 with IPv6
@ smtp-trusted
> PROXY TCP6 $claimed6 2001:db8::ffff 4711 25
<<
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Client-IP: $claimed6
? Proxy-Protocol-Addr: $claimed6
^ EHLO mx.test
^ XCLIENT ADDR=IPV6:$claimed6 NAME=[UNAVAILABLE]
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== proxy header v1 and commands in one segment
@ smtp-trusted
>| PROXY TCP4 $claimed 192.0.2.1 4711 25\r\nNOOP\r\n
<<
< 250 2.0.0 OK

== proxy header v1 UNKNOWN
@ smtp-trusted
> PROXY UNKNOWN
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-IP: $client
?! Proxy-Protocol

== proxy header from a peer that is not trusted
@ smtp-untrusted
> PROXY TCP4 $claimed 192.0.2.1 4711 25
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-IP: $client
? Proxy-Protocol-Addr: $claimed
? Proxy-Protocol-Port: 4711
? Proxy-Protocol-Server-Addr: 192.0.2.1
? Proxy-Protocol-Server-Port: 25
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
differs: proxy-untrusted
silent
> PROXY TCP4 $claimed 192.0.2.1 4711 25
<.
^-
?- *

== proxy header v2
@ smtp-trusted
>| \r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x09\x08\x07\xc0\x00\x02\x01\x12\x67\x00\x19
<<
> NOOP
< 250 2.0.0 OK

== proxy header v2 LOCAL
@ smtp-trusted
>| \r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-IP: $client
?! Proxy-Protocol

== proxy header missing
@ smtp-trusted
silent
> EHLO client.test
<.
?! GET

== proxy header that is wrong
@ imap-trusted
silent
> PROXY TCP4 nonsense
<.

== proxy header in two segments
@ smtp-trusted
silent
>| PROXY TCP4 10.9.
<.
differs: proxy-header-segments
silent
>| PROXY TCP4 10.9.
>| 8.7 192.0.2.1 4711 25\r\n
< 220 mx.test ESMTP ready

== proxy header before imap
@ imap-trusted
> PROXY TCP4 $claimed 192.0.2.1 4711 143
<<
> t LOGIN joe secret
< t OK logged in
? Client-IP: $claimed
? Proxy-Protocol-Addr: $claimed

== proxy header before pop3
@ pop3-trusted
> PROXY TCP4 $claimed 192.0.2.1 4711 110
<<
> USER joe
< +OK
> PASS secret
< +OK logged in
? Client-IP: $claimed

== proxy header to the upstream
@ smtp-out
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ PROXY TCP4 $client 127.0.0.1 $cport $listener
^ HELO mx.test

== proxy header to an imap upstream
@ imap-out
> t LOGIN joe secret
< t OK logged in
^ PROXY TCP4 $client 127.0.0.1 $cport $listener
^ t LOGIN {3}
^ joe {6}
^ secret

== proxy header to a pop3 upstream
@ pop3-out
> USER joe
< +OK
> PASS secret
< +OK logged in
^ PROXY TCP4 $client 127.0.0.1 $cport $listener
^ USER joe
^ PASS secret

== proxy header in and out
@ smtp-in-out
> PROXY TCP4 $claimed 192.0.2.1 4711 25
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
^ PROXY TCP4 $claimed 127.0.0.1 4711 $listener
^ HELO mx.test

== proxy header in with IPv6 and out
@ smtp-in-out
> PROXY TCP6 $claimed6 2001:db8::ffff 4711 25
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-IP: $claimed6
^ PROXY TCP6 $claimed6 127.0.0.1 4711 $listener
^ HELO mx.test
differs: proxy-mixed
^ PROXY TCP6 $claimed6 ::ffff:7f00:1 4711 $listener
^ HELO mx.test

== dns a verified name
@ smtp-dns
dns ok
> MAIL FROM:<a@b>
< 250 2.0.0 OK
> RCPT TO:<c@d>
< 250 2.1.5 recipient ok
? Client-Host: $host
^ EHLO mx.test
^ XCLIENT ADDR=$client NAME=$host
^ MAIL FROM:<a@b>
^ RCPT TO:<c@d>

== dns a name with several addresses
@ smtp-dns
dns several
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: $host

== dns a name with another address
@ smtp-dns
dns mismatch
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [UNAVAILABLE]
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]

== dns a name that there is not
@ smtp-dns
dns nowhere
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [UNAVAILABLE]

== dns a name whose server fails
@ smtp-dns
dns failing
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [TEMPUNAVAIL]
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[TEMPUNAVAIL]

== dns no name
@ smtp-dns
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [UNAVAILABLE]

== dns an empty answer
@ smtp-dns
dns empty
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [UNAVAILABLE]

== dns the server fails
@ smtp-dns
dns servfail
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [TEMPUNAVAIL]

== dns the server is silent
@ smtp-dns
dns silent
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [TEMPUNAVAIL]

== dns an alias
@ smtp-dns
dns alias
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: [TEMPUNAVAIL]
differs: dns-alias
^ EHLO mx.test
^ XCLIENT ADDR=$client LOGIN=joe NAME=[UNAVAILABLE]
?- Client-Host: [TEMPUNAVAIL]
?+ Client-Host: [UNAVAILABLE]

== dns and a greeting delay
@ smtp-dns-delay
dns ok
<<
> AUTH PLAIN AGpvZQBzZWNyZXQ=
< 235 2.0.0 OK
? Client-Host: $host

== dns and early talk
@ smtp-dns-delay
dns ok
silent
> EHLO client.test
< 503 5.5.0 Improper use of SMTP command pipelining
<.
"""
