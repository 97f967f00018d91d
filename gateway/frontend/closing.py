"""How a session is told to end."""


class Closing(Exception):
    """The session ends: everything the client is to read was written. Carries the reason for the log."""
