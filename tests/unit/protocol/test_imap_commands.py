"""IMAP commands: what is read, what is refused and when the session must end, and that credentials stay data."""

from __future__ import annotations

import imaplib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.imap import BadCommand, Command, CommandReader, Literal, check_login, is_tag, login_steps, quoted


def read(wire: bytes, reader: CommandReader | None = None) -> tuple[list[Command], list[Literal]]:
    """Read commands from their octets on the wire; the literals that were announced on the way."""
    reader = reader or CommandReader()
    stream = io.BytesIO(wire)
    commands: list[Command] = []
    literals: list[Literal] = []
    while line := stream.readline():
        assert line.endswith(b"\r\n")
        step = reader.line(line[:-2])
        assert reader.pending == isinstance(step, Literal)
        if isinstance(step, Command):
            commands.append(step)
        else:
            literals.append(step)
            reader.literal(stream.read(step.size))
    return commands, literals


def wait(size: int) -> Literal:
    return Literal(size, synchronizing=True)


def fly(size: int) -> Literal:
    return Literal(size, synchronizing=False)


COMMANDS: list[tuple[bytes, str, tuple[bytes, ...], list[Literal]]] = [
    (b"a NOOP\r\n", "NOOP", (), []),
    (b"a noop  \r\n", "NOOP", (), []),
    (b"a LOGIN tim tanstaaf\r\n", "LOGIN", (b"tim", b"tanstaaf"), []),
    (b"a login   tim   tanstaaf \r\n", "LOGIN", (b"tim", b"tanstaaf"), []),
    (b'a LOGIN "t i m" ""\r\n', "LOGIN", (b"t i m", b""), []),
    (b'a LOGIN "t\\"i\\\\m" "\\x"\r\n', "LOGIN", (b't"i\\m', b"x"), []),
    (b'a LOGIN t"im" pa"ss\r\n', "LOGIN", (b't"im"', b'pa"ss'), []),
    (b"a LOGIN a\tb p{3}x\r\n", "LOGIN", (b"a\tb", b"p{3}x"), []),
    (b"a LOGIN x{3} y\r\n", "LOGIN", (b"x{3}", b"y"), []),
    (b'a LOGIN "{3}" "{3+}"\r\n', "LOGIN", (b"{3}", b"{3+}"), []),
    ("a LOGIN jürgen \"pä ß\"\r\n".encode(), "LOGIN", ("jürgen".encode(), "pä ß".encode()), []),
    (b"a LOGIN \xff )*%]\r\n", "LOGIN", (b"\xff", b")*%]"), []),
    (b"a LOGIN {3}\r\ntim {8}\r\ntanstaaf\r\n", "LOGIN", (b"tim", b"tanstaaf"), [wait(3), wait(8)]),
    (b"a LOGIN {3+}\r\ntim {8-}\r\ntanstaaf\r\n", "LOGIN", (b"tim", b"tanstaaf"), [fly(3), fly(8)]),
    (b'a LOGIN "tim" {003}\r\na\nb\r\n', "LOGIN", (b"tim", b"a\nb"), [wait(3)]),
    (b'a LOGIN {3}\r\ntim "pw" \r\n', "LOGIN", (b"tim", b"pw"), [wait(3)]),
    (b"a LOGIN tim {0}\r\n\r\n", "LOGIN", (b"tim", b""), [wait(0)]),
    (b"a LOGIN {0+}\r\n {0+}\r\n\r\n", "LOGIN", (b"", b""), [fly(0), fly(0)]),
    (b"a LOGIN tim {8+}\r\n\r\nb NOOP\r\n", "LOGIN", (b"tim", b"\r\nb NOOP"), [fly(8)]),
    (b"a LOGIN {3}\r\n\0\r\n pw\r\n", "LOGIN", (b"\0\r\n", b"pw"), [wait(3)]),
    (b"a AUTHENTICATE PLAIN AHRpbQB0YW5zdGFhZg==\r\n", "AUTHENTICATE", (b"PLAIN", b"AHRpbQB0YW5zdGFhZg=="), []),
    (b"a AUTHENTICATE EXTERNAL =\r\n", "AUTHENTICATE", (b"EXTERNAL", b"="), []),
    (b"a  NOOP  \r\n", "NOOP", (), []),
    (b"a ID NIL\r\n", "ID", (b"NIL",), []),
    (b"a id\r\n", "ID", (b"",), []),
    (b'a ID ("name" "x (y)" "os" NIL)\r\n', "ID", (b'("name" "x (y)" "os" NIL)',), []),
    (b'a ID ("name" {3}\r\na"b {2+}\r\nos NIL)\r\n', "ID", (b'("name" {3}\r\na"b {2+}\r\nos NIL)',), [wait(3), fly(2)]),
]  # fmt: skip


@pytest.mark.parametrize(("wire", "name", "arguments", "literals"), COMMANDS)
def test_commands(wire: bytes, name: str, arguments: tuple[bytes, ...], literals: list[Literal]) -> None:
    assert read(wire) == ([Command(b"a", name, arguments)], literals)


def test_commands_follow_each_other() -> None:
    commands, _ = read(b"".join(wire for wire, *_ in COMMANDS))
    assert [(command.name, command.arguments) for command in commands] == [row[1:3] for row in COMMANDS]


BAD: list[tuple[bytes, bytes, bool]] = [
    (b"", b"", False),
    (b" a NOOP", b"", False),
    (b"a+ NOOP", b"", False),
    (b"a* NOOP", b"", False),
    (b'"a" NOOP', b"", False),
    (b"t\xe4g NOOP", b"", False),
    (b"x" * 65 + b" NOOP", b"", False),
    (b"a", b"", False),
    (b"a ", b"a", False),
    (b"a NO-OP", b"a", False),
    (b"a NOOP\t", b"a", False),
    (b"a NO\xd6P", b"a", False),
    (b"a NOOP\0", b"a", False),
    (b"a LOGIN a\rb c", b"a", False),
    (b"a LOGIN a\nb c", b"a", False),
    (b'a LOGIN "a\rb" c', b"a", False),
    (b'a LOGIN "a\0b" c', b"a", False),
    (b"a NOOP\r", b"a", False),
    (b'a LOGIN "tim', b"a", False),
    (b'a LOGIN "tim\\"', b"a", False),
    (b'a LOGIN "tim"x y', b"a", False),
    (b'a LOGIN "tim""x"', b"a", False),
    (b"a LOGIN (tim) x", b"a", False),
    (b"a LOGIN t(im x", b"a", False),
    (b"a LOGIN {3} x", b"a", False),
    (b"a LOGIN {3}x", b"a", False),
    (b"a LOGIN {} x", b"a", False),
    (b"a LOGIN {}", b"a", False),
    (b"a LOGIN {-1}", b"a", False),
    (b"a LOGIN {3*}", b"a", False),
    (b"a LOGIN ~{3}", b"a", False),
    (b"a LOGIN tim{3}", b"a", False),
    (b"a LOGIN {99999999999}", b"a", False),
    (b"a LOGIN {8193}", b"a", False),
    (b"a X 1 2 3 4", b"a", False),
    (b"a X 1 2 3 {4}", b"a", False),
    (b"a X 1 2 3 {4+}", b"a", True),
    (b"a LOGIN {8193+}", b"a", True),
    (b"a LOGIN {4097-}", b"a", True),
    (b"a LOGIN {99999999999+}", b"a", True),
    (b"a LOGIN ~{3+}", b"a", True),
    (b"a LOGIN tim{3+}", b"a", True),
    (b'a LOGIN "tim {3+}', b"a", True),
    (b'a LOGIN "tim"{3-}', b"a", True),
    (b"a LOGIN (tim {3+}", b"a", True),
    (b"a LOGIN {+}", b"a", True),
    (b"a NO-OP {3+}", b"a", True),
    (b"* LOGIN tim {3+}", b"", True),
    (b"{3+}", b"", True),
    (b"a LOGIN tim {3+}\r", b"a", True),
    (b"a " + b"X" * 8192, b"a", False),
    (b"a " + b"X" * 8192 + b" {3+}", b"a", True),
    (b'a ID ("name {3+}', b"a", True),
    (b'a ID ("name" x{3}', b"a", False),
    (b'a ID ("name" {8193}', b"a", False),
]


@pytest.mark.parametrize(("line", "tag", "close"), BAD)
def test_bad_commands(line: bytes, tag: bytes, close: bool) -> None:
    reader = CommandReader()
    with pytest.raises(BadCommand) as caught:
        reader.line(line)
    assert (caught.value.tag, caught.value.close) == (tag, close)
    assert not reader.pending
    assert read(b"b NOOP\r\n", reader) == ([Command(b"b", "NOOP", ())], [])


@pytest.mark.parametrize(
    ("line", "close"),
    [(b"x", False), (b"{3}", False), (b"{3+}", True), (b"\0", False), (b" {8180}", False), (b" {8180+}", True),
     (b" " * 8192, False), (b" 2 3 4", False)],
)  # fmt: skip
def test_bad_behind_a_literal(line: bytes, close: bool) -> None:
    reader = CommandReader()
    reader.line(b"a LOGIN {3}")
    reader.literal(b"tim")
    with pytest.raises(BadCommand) as caught:
        reader.line(line)
    assert (caught.value.tag, caught.value.close) == (b"a", close)
    assert read(b"b NOOP\r\n", reader) == ([Command(b"b", "NOOP", ())], [])


def test_bounds_count_lines_and_literals() -> None:
    reader = CommandReader(max_size=20, max_arguments=2)
    assert reader.line(b"a LOGIN {3}") == wait(3)
    reader.literal(b"tim")
    assert reader.line(b" {2}") == wait(2)
    reader.literal(b"pw")
    with pytest.raises(BadCommand):
        reader.line(b" ")
    assert reader.line(b"a LOGIN tim tanstaaf") == Command(b"a", "LOGIN", (b"tim", b"tanstaaf"))
    with pytest.raises(BadCommand):
        reader.line(b"a LOGIN a b c")


def test_a_literal_is_due_or_not() -> None:
    reader = CommandReader()
    with pytest.raises(LocalError):
        reader.literal(b"")
    reader.line(b"a LOGIN {3}")
    for data in (b"", b"ti", b"tim "):
        with pytest.raises(LocalError):
            reader.literal(data)
    with pytest.raises(LocalError):
        reader.line(b"tim")
    reader.reset()
    assert read(b"b NOOP\r\n", reader) == ([Command(b"b", "NOOP", ())], [])


@pytest.mark.parametrize("tag", [b"a", b"A001", b"x" * 64, b"a]b", b"a.b-c_d", b"1", b"#&'~"])
def test_tags(tag: bytes) -> None:
    assert is_tag(tag)


@pytest.mark.parametrize(
    "tag", [b"", b"x" * 65, b"+", b"a+", b"*", b"a b", b"a(", b'"', b"%", b"\\", b"{", b"\x7f", b"\xe4", b"a\n"]
)
def test_no_tags(tag: bytes) -> None:
    assert not is_tag(tag)
    with pytest.raises(LocalError):
        login_steps(tag, b"tim", b"pw", literal_plus=False)


@given(st.binary(max_size=60))
def test_any_line_is_read_or_refused(rest: bytes) -> None:
    for line in (rest, b"a LOGIN " + rest, b"a ID (" + rest):
        reader = CommandReader()
        try:
            step = reader.line(line)
        except BadCommand:
            assert not reader.pending
        else:
            assert reader.pending == isinstance(step, Literal)


# -- what we say to a server

CREDENTIAL = st.binary(max_size=40) | st.text(max_size=40).map(str.encode)


def allowed(value: bytes) -> bool:
    return not {0, 10, 13} & set(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(b"", b'""'), (b"tim", b'"tim"'), (b'a"b\\c d', b'"a\\"b\\\\c d"'), (b"(\x7f)", b'"(\x7f)"'), (b"\xc3\xa4", None),
     (b"a\rb", None), (b"a\nb", None), (b"a\0b", None)],
)  # fmt: skip
def test_quoted(value: bytes, expected: bytes | None) -> None:
    assert quoted(value) == expected


LOGINS: list[tuple[bytes, bytes, bool, bool, list[bytes]]] = [
    (b"tim", b'p"w', False, False, [b'a LOGIN "tim" "p\\"w"\r\n']),
    (b"tim", b"", True, False, [b'a LOGIN "tim" ""\r\n']),
    (b"tim", b"\xe4", False, False, [b'a LOGIN "tim" {1}\r\n', b"\xe4\r\n"]),
    (b"\xe4", b"pw", False, False, [b"a LOGIN {1}\r\n", b'\xe4 "pw"\r\n']),
    (b"\xe4", b"\xe4", True, False, [b"a LOGIN {1+}\r\n\xe4 {1+}\r\n\xe4\r\n"]),
    (b"tim", b"", False, True, [b"a LOGIN {3}\r\n", b"tim {0}\r\n", b"\r\n"]),
    (b"tim", b"pw", True, True, [b"a LOGIN {3+}\r\ntim {2+}\r\npw\r\n"]),
    (b"tim", b"\xe4" * 4097, True, False, [b'a LOGIN "tim" {4097}\r\n', b"\xe4" * 4097 + b"\r\n"]),
]


@pytest.mark.parametrize(("user", "password", "literal_plus", "literals", "pieces"), LOGINS)
def test_login_steps(user: bytes, password: bytes, literal_plus: bool, literals: bool, pieces: list[bytes]) -> None:
    assert login_steps(b"a", user, password, literal_plus=literal_plus, literals=literals) == pieces


@given(CREDENTIAL, CREDENTIAL, st.booleans(), st.booleans())
def test_credentials_stay_data(user: bytes, password: bytes, literal_plus: bool, literals: bool) -> None:
    """Whatever they hold: what a server reads is one LOGIN with these two arguments, or we say nothing."""
    try:
        pieces = login_steps(b"a", user, password, literal_plus=literal_plus, literals=literals)
    except LocalError:
        assert not (allowed(user) and allowed(password))
        return
    assert allowed(user) and allowed(password)
    commands, announced = read(b"".join(pieces))
    assert commands == [Command(b"a", "LOGIN", (user, password))]
    assert len(pieces) == 1 + sum(literal.synchronizing for literal in announced)


@pytest.mark.parametrize("octet", [b"\r", b"\n", b"\0", b"\r\n"])
@pytest.mark.parametrize("literals", [False, True])
@pytest.mark.parametrize("literal_plus", [False, True])
def test_nothing_is_injected(octet: bytes, literals: bool, literal_plus: bool) -> None:
    evil = b"hunter2" + octet + b"b LOGOUT"
    for user, password in ((evil, b"pw"), (b"tim", evil)):
        with pytest.raises(LocalError) as caught:
            login_steps(b"a", user, password, literal_plus=literal_plus, literals=literals)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(LocalError):
        check_login(octet)


def test_secrets_are_not_in_repr_or_errors() -> None:
    assert "tanstaaf" not in repr(Command(b"a", "LOGIN", (b"tim", b"tanstaaf")))
    reader = CommandReader()
    with pytest.raises(PeerError) as caught:
        reader.line(b'a LOGIN tim "tanstaaf')
    assert "tanstaaf" not in str(caught.value) + repr(caught.value)


class Imaplib(imaplib.IMAP4):
    """Python's own client on a server that says OK to each line; keeps what the client said."""

    def __init__(self) -> None:
        self.said = b""
        self._answers = [b"* OK ready\r\n"]
        super().__init__()

    def open(self, host: str = "", port: int = 0, timeout: float | None = None) -> None:
        self.host, self.port = host, port

    def readline(self) -> bytes:
        return self._answers.pop(0)

    def send(self, data: bytes) -> None:  # type: ignore[override]
        self.said += data
        if data.endswith(b"\r\n"):
            last = self.said.splitlines()[-1]
            untagged = [b"* CAPABILITY IMAP4rev1\r\n"] if last.endswith(b"CAPABILITY") else []
            self._answers += [*untagged, last.partition(b" ")[0] + b" OK done\r\n"]

    def shutdown(self) -> None:
        pass


def test_what_imaplib_says() -> None:
    client = Imaplib()
    client.noop()
    client.login('t"im', 'p"w\\')
    commands, literals = read(client.said)
    assert [(command.name, command.arguments) for command in commands] == [
        ("CAPABILITY", ()),
        ("NOOP", ()),
        ("LOGIN", (b't"im', b'p"w\\')),
    ]
    assert not literals and len({command.tag for command in commands}) == 3
