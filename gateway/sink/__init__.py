"""The embedded upstream `embedded://folder`: a real mail server (aiosmtpd) in a process of its own.

It is for development, demonstrations and tests: it believes every XCLIENT, takes every recipient and stores what it
gets in one Maildir, with the envelope and the client's identity as header fields in front. It shares no code with
the gateway's own protocol engine, so that both ends of a test are not wrong in the same way.
"""
