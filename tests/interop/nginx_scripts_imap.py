"""IMAP before the hand-off: commands, strings and literals, AUTHENTICATE (language: nginx_scripts.py)."""

SCRIPTS = r"""
== imap greeting and LOGOUT
@ imap
> a1 LOGOUT
< * BYE
< a1 OK completed
<.
^-

== imap CAPABILITY of the defaults
@ imap
> a CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN
< a OK completed

== imap CAPABILITY with all mechanisms
@ imap-all
> a capability
< * CAPABILITY IMAP4rev1 IDLE X Y AUTH=PLAIN AUTH=LOGIN AUTH=CRAM-MD5 AUTH=EXTERNAL
< a OK completed

== imap CAPABILITY with imap_auth login
@ imap-login
> a CAPABILITY
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=LOGIN
< a OK completed

== imap NOOP, lower case, empty spaces
@ imap
> a.b-c_9 noop
< a.b-c_9 OK completed
> b   NooP
< b OK completed
> c NOOP\x20
< c OK completed

== imap a tag of 32 characters, and of 33
@ imap
> a2345678901234567890123456789012 NOOP
< a2345678901234567890123456789012 OK completed
> a23456789012345678901234567890123 NOOP
< * BAD invalid command
differs: imap-tags
> a2345678901234567890123456789012 NOOP
< a2345678901234567890123456789012 OK completed
> a23456789012345678901234567890123 NOOP
< a23456789012345678901234567890123 OK completed

== imap bad tags
@ imap
> a+b NOOP
< * BAD invalid command
> * NOOP
< * BAD invalid command
> NOOP
< * BAD invalid command

== imap an empty line
@ imap
>| \r\n
< * BAD invalid command
> a NOOP
< a OK completed

== imap commands of later states
@ imap
> a SELECT INBOX
< a BAD invalid command
> b ENABLE UTF8=ACCEPT
< b BAD invalid command
> c NAMESPACE
< c BAD invalid command
> d NOOP
< d OK completed

== imap ID
@ imap
> a ID NIL
< a BAD invalid command
> b ID ("name" "test")
< b BAD invalid command
differs: imap-id
> a ID NIL
< * ID NIL
< a OK completed
> b ID ("name" "test")
< * ID NIL
< b OK completed

== imap the fifth error ends the session
@ imap
> a X
< a BAD invalid command
> b X
< b BAD invalid command
> c X
< c BAD invalid command
> d X
< d BAD invalid command
> e X
< e BAD invalid command
<.
differs: last-word
> a X
< a BAD invalid command
> b X
< b BAD invalid command
> c X
< c BAD invalid command
> d X
< d BAD invalid command
> e X
< e BAD invalid command
< * BYE too many errors
<.

== imap max_errors 2
@ imap-errors
> a X
< a BAD invalid command
> * X
< * BAD invalid command
<.
differs: last-word
> a X
< a BAD invalid command
> * X
< * BAD invalid command
< * BYE too many errors
<.

== imap what is not counted as an error
@ imap-errors
> a AUTHENTICATE SCRAM-SHA-1
< a BAD invalid command
> a LOGIN joe
< a BAD invalid command
> a AUTHENTICATE
< a BAD invalid command
> a STARTTLS
< a BAD invalid command
> a NOOP
< a OK completed
differs: errors-counted last-word
> a AUTHENTICATE SCRAM-SHA-1
< a BAD invalid command
> a LOGIN joe
< a BAD invalid command
< * BYE too many errors
<.

== imap bare LF ends a command
@ imap
>| a NOOP\nb NOOP\n
< a OK completed
< b OK completed

== imap a carriage return within a command
@ imap
>| a NO\rOP\r\n
< a BAD invalid command

== imap pipelined commands
@ imap
>| a NOOP\r\nb CAPABILITY\r\nc FOO\r\nd LOGOUT\r\n
< a OK completed
< * CAPABILITY IMAP4 IMAP4rev1 UIDPLUS AUTH=PLAIN
< b OK completed
< c BAD invalid command
< * BYE
< d OK completed
<.

== imap an end between commands
@ imap
> a NOOP
< a OK completed
>.
<.

== imap an end within a command
@ imap
>| a NOOP\r\nb NOOP\r\nc NO
< a OK completed
< b OK completed
>.
<.

== imap LOGIN with atoms
@ imap
> t1 LOGIN joe secret
< t1 OK logged in
> t2 SELECT INBOX
< t2 OK up done
> t3 LOGOUT
< * BYE up
< t3 OK logout
<.
? GET /auth
? Host: 127.0.0.1
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret
? Auth-Protocol: imap
? Auth-Login-Attempt: 1
? Client-IP: $client
? X-Key: main
?! Client-Host
?! Auth-Salt
^ t1 LOGIN {3}
^ joe {6}
^ secret
^ t2 SELECT INBOX
^ t3 LOGOUT

== imap LOGIN with quoted strings
@ imap
> t LOGIN "joe" "se cret"
< t OK logged in
? Auth-User: joe
? Auth-Pass: se%20cret
^ t LOGIN {3}
^ joe {7}
^ se cret

== imap LOGIN with escapes in quoted strings
@ imap
> t LOGIN "j\\\\o\\"e" "\\a\\\\\\""
< t OK logged in
? Auth-User: j\\o"e
? Auth-Pass: a\\"
^~

== imap LOGIN with a quote in an atom
@ imap
> t LOGIN j"oe s"ec"
< t OK logged in
? Auth-User: j"oe
? Auth-Pass: s"ec"

== imap LOGIN with octets that the auth server is sent escaped
@ imap
> t LOGIN "j%\to e" "\xc3\xa9\x7f\xff"
< t OK logged in
? Auth-User: j%25%09o%20e
? Auth-Pass: \xc3\xa9\x7f\xff
differs: credentials-utf8
> t LOGIN "j%\to e" "\xc3\xa9\x7f\xff"
< t BAD invalid command
^-
?- *

== imap LOGIN with UTF-8, percent signs and control octets in the password
@ imap
> t LOGIN "j%o \xc3\xa9" "\xc3\xa9\t\x01%"
< t OK logged in
? Auth-User: j%25o%20\xc3\xa9
? Auth-Pass: \xc3\xa9%09%01%25
^~

== imap LOGIN with DEL in the password
@ imap
> t LOGIN joe "a\x7fb"
< t OK logged in
? Auth-Pass: a\x7fb
^ t LOGIN {3}
^ joe {3}
^ a\x7fb
differs: auth-delete
?- Auth-Pass: a\x7fb
?+ Auth-Pass: a%7Fb

== imap LOGIN with a control octet in the user name
@ imap
> t LOGIN "j\to" secret
< t OK logged in
? Auth-User: j%09o
^~
differs: credentials-control-characters
> t LOGIN "j\to" secret
< t BAD invalid command
^-
?- *

== imap LOGIN with an empty password
@ imap
> t LOGIN joe ""
< t OK logged in
? Auth-Pass:\x20
^ t LOGIN {3}
^ joe {0}
^
differs: empty-password
> t LOGIN joe ""
< t BAD invalid command
^-
?- *

== imap LOGIN with an empty user
@ imap
> t LOGIN "" secret
< t BAD invalid command
> t NOOP
< t OK completed
?! GET

== imap LOGIN with one argument, with three, with four
@ imap
> t LOGIN joe
< t BAD invalid command
> t LOGIN joe secret more
< t BAD invalid command
> t LOGIN joe secret more more
< t BAD invalid command
> t NOOP
< t OK completed

== imap LOGIN with literals
@ imap
> t LOGIN {3}
< + OK
> joe {6}
< + OK
> secret
< t OK logged in
? Auth-User: joe
? Auth-Pass: secret
^ t LOGIN {3}
^ joe {6}
^ secret

== imap LOGIN with literals that are not synchronizing
@ imap
>| t LOGIN {3+}\r\njoe {6+}\r\nsecret\r\n
< t OK logged in
? Auth-User: joe
? Auth-Pass: secret

== imap LOGIN with a literal and a quoted string
@ imap
> t LOGIN {3}
< + OK
> joe "secret"
< t OK logged in
? Auth-Pass: secret

== imap LOGIN with an atom and a literal
@ imap
> t LOGIN joe {6+}
>| secret\r\n
< t OK logged in
? Auth-Pass: secret

== imap a literal with CR, LF and NUL
@ imap
> t LOGIN joe {8}
< + OK
>| s\r\nx\0 y%\r\n
< t OK logged in
? Auth-Pass: s%0D%0Ax%00%20y%25
^~
differs: credentials-control-characters
> t LOGIN joe {8}
< + OK
>| s\r\nx\0 y%\r\n
< t BAD invalid command
^-
?- *

== imap an empty literal for the password
@ imap
> t LOGIN joe {0}
< + OK
>| \r\n
< t OK logged in
? Auth-Pass: %0D
^~
differs: imap-empty-literal empty-password
> t LOGIN joe {0}
< + OK
>| \r\n
< t BAD invalid command
^-
?- *

== imap a literal of something that is no number
@ imap
> t LOGIN {x}
< t BAD invalid command
> t LOGIN {3
< t BAD invalid command
> t NOOP
< t OK completed

== imap a literal that is larger than the buffer
@ imap-buffer
> t LOGIN {300}
< + OK
>| xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< t BAD invalid command
<.
differs: imap-literals
> t LOGIN {300}
< t BAD invalid command
> t NOOP
< t OK completed

== imap a wrong command with a literal that is not synchronizing
@ imap
> t APPEND x {5+}
< t BAD invalid command
<.
differs: imap-literals
>| t APPEND x {5+}\r\nLOGIN\r\n
< t BAD invalid command
> t NOOP
< t OK completed

== imap literals that are not synchronizing and larger than the buffer
@ imap-buffer
>| t LOGIN {300+}\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
< t BAD invalid command
<.

== imap a wrong command with a synchronizing literal
@ imap
> t APPEND x {5}
< t BAD invalid command
> t NOOP
< t OK completed

== imap AUTHENTICATE PLAIN
@ imap
> t AUTHENTICATE PLAIN
< +\x20
> AGpvZQBzZWNyZXQ=
< t OK logged in
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret
^ t LOGIN {3}
^ joe {6}
^ secret

== imap AUTHENTICATE PLAIN with an initial response
@ imap
> t authenticate plain AGpvZQBzZWNyZXQ=
< t OK logged in
? Auth-User: joe

== imap AUTHENTICATE PLAIN with an authorization identity
@ imap
> t AUTHENTICATE PLAIN YW5uAGpvZQBzZWNyZXQ=
< t OK logged in
? Auth-User: joe
^ t LOGIN {3}
^ joe {6}
^ secret
differs: sasl-authzid
> t AUTHENTICATE PLAIN YW5uAGpvZQBzZWNyZXQ=
< t NO [AUTHENTICATIONFAILED] authentication credentials invalid
^-
?- *

== imap AUTHENTICATE PLAIN with line ends in the password
@ imap
> t AUTHENTICATE PLAIN AGpvZQBzZQ0KY3JldA==
< t OK logged in
? Auth-Pass: se%0D%0Acret
^ t LOGIN {3}
^ joe {8}
^ se
^ cret
differs: credentials-control-characters
> t AUTHENTICATE PLAIN AGpvZQBzZQ0KY3JldA==
< t BAD invalid command
^-
?- *

== imap LOGIN with line ends in the password
@ imap
> t LOGIN joe {8}
< + OK
>| se\r\ncret\r\n
< t OK logged in
? Auth-Pass: se%0D%0Acret
^~
differs: credentials-control-characters
> t LOGIN joe {8}
< + OK
>| se\r\ncret\r\n
< t BAD invalid command
^-
?- *

== imap AUTHENTICATE LOGIN
@ imap
> t AUTHENTICATE LOGIN
< + VXNlcm5hbWU6
> am9l
< + UGFzc3dvcmQ6
> c2VjcmV0
< t OK logged in
? Auth-Method: plain
? Auth-User: joe
? Auth-Pass: secret

== imap AUTHENTICATE LOGIN with an initial response
@ imap
> t AUTHENTICATE LOGIN am9l
< + UGFzc3dvcmQ6
> c2VjcmV0
< t OK logged in
? Auth-User: joe

== imap AUTHENTICATE CRAM-MD5
@ imap-all
auth: @OK | Auth-Pass: other
> t AUTHENTICATE CRAM-MD5
< + base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< t OK logged in
? Auth-Method: cram-md5
? Auth-User: joe
? Auth-Pass: 0123456789abcdef0123456789abcdef
? Auth-Salt: <SALT1@mx.test>
^ t LOGIN {3}
^ joe {5}
^ other

== imap AUTHENTICATE CRAM-MD5 without a password for the upstream
@ imap-all
> t AUTHENTICATE CRAM-MD5
< + base64 of <SALT1@mx.test>
> am9lIDAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm
< * BAD internal server error
<.
^-
differs: upstream-farewell
^ g1 LOGOUT

== imap AUTHENTICATE EXTERNAL
@ imap-all
auth: @OK | Auth-Pass: other
> t AUTHENTICATE EXTERNAL
< + VXNlcm5hbWU6
> am9l
< t OK logged in
? Auth-Method: external
? Auth-User: joe
? Auth-Pass:\x20
differs: disabled-external
> t AUTHENTICATE EXTERNAL
< t BAD invalid command
> am9l
< * BAD invalid command
^-
?- *

== imap AUTHENTICATE EXTERNAL with an initial response
@ imap-all
auth: @OK | Auth-Pass: other | Auth-User: mapped
> t AUTHENTICATE EXTERNAL am9l
< t OK logged in
? Auth-Method: external
^ t LOGIN {6}
^ mapped {5}
^ other
differs: disabled-external
> t AUTHENTICATE EXTERNAL am9l
< t BAD invalid command
^-
?- *

== imap AUTHENTICATE EXTERNAL without a password for the upstream
@ imap-all
> t AUTHENTICATE EXTERNAL am9l
< * BAD internal server error
<.
^-
differs: disabled-external
> t AUTHENTICATE EXTERNAL am9l
< t BAD invalid command
?- *

== imap AUTHENTICATE with mechanisms that are off or unknown
@ imap
> t AUTHENTICATE CRAM-MD5
< t BAD invalid command
> t AUTHENTICATE XOAUTH2
< t BAD invalid command
> t AUTHENTICATE PLAIN AGpvZQBzZWNyZXQ= more
< t BAD invalid command
> t NOOP
< t OK completed

== imap AUTHENTICATE is canceled
@ imap
> t AUTHENTICATE PLAIN
< +\x20
> *
< t BAD invalid command
> t AUTHENTICATE LOGIN
< + VXNlcm5hbWU6
> am9l
< + UGFzc3dvcmQ6
> *
< t BAD invalid command
> t NOOP
< t OK completed

== imap AUTHENTICATE with bad base64
@ imap-errors
> t AUTHENTICATE PLAIN
< +\x20
> AGpvZ
< t BAD invalid command
> u AUTHENTICATE PLAIN AGpvZQ==
< u BAD invalid command
> v AUTHENTICATE PLAIN !!!!
< v BAD invalid command
> t NOOP
< t OK completed
differs: errors-counted last-word
> t AUTHENTICATE PLAIN
< +\x20
> AGpvZ
< t BAD invalid command
> u AUTHENTICATE PLAIN AGpvZQ==
< u BAD invalid command
< * BYE too many errors
<.

== imap a failed login and another
@ imap
auth: Auth-Status: [AUTHENTICATIONFAILED] wrong | Auth-Wait: 1
auth: @OK
> t LOGIN joe wrong
< t NO [AUTHENTICATIONFAILED] wrong
> u LOGIN joe secret
< u OK logged in
? Auth-Login-Attempt: 1
? Auth-Login-Attempt: 2
^ u LOGIN {3}
^ joe {6}
^ secret

== imap a failed login that ends the session
@ imap
auth: Auth-Status: wrong
> t LOGIN joe wrong
< t NO wrong
<.
^-

== imap pipelined commands behind a failed login
@ imap
auth: Auth-Status: wrong | Auth-Wait: 1
>| t LOGIN joe wrong\r\nu NOOP\r\n
< t NO wrong
< u OK completed

== imap pipelined commands behind LOGIN
@ imap
>| t LOGIN joe secret\r\nu SELECT INBOX\r\nv LOGOUT\r\n
< t OK logged in
< u OK up done
< * BYE up
< v OK logout
<.
^ t LOGIN {3}
^ joe {6}
^ secret
^ u SELECT INBOX
^ v LOGOUT

== imap the client says nothing
@ imap-timeout
<<
<.
differs: timeouts-answered
<<
< * BYE timeout exceeded
<.

== imap the client stops within a literal
@ imap-timeout
> t LOGIN {3}
< + OK
<.
differs: timeouts-answered
> t LOGIN {3}
< + OK
< * BYE timeout exceeded
<.

== imap STARTTLS where it is off
@ imap
> t STARTTLS
< t BAD invalid command

== imap a server name in the challenge and an empty line for AUTHENTICATE PLAIN
@ imap-all
> t AUTHENTICATE PLAIN
< +\x20
>
< t BAD invalid command
> t NOOP
< t OK completed

== imap LOGIN within a long pipeline of NOOP
@ imap-buffer
> a NOOP
< a OK completed
> b LOGIN joe secret
< b OK logged in
"""
