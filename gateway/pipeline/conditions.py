"""Conditions and expressions: CEL text over the fact table, compiled when the file is loaded.

Types, names and the type of the result are checked at load with a column. cel-expr-python is kept behind this
file: `compile_expression` gives a program, the names it reads, and the phase from which all of them are known.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cel_expr_python import cel

from gateway.facts import EvaluationError, Expression, Fact, FactType, FactValue, Phase, Program, Scope
from gateway.session import Recipient, Session, Transaction

_TYPES: dict[FactType, cel.Type] = {
    "string": cel.Type.STRING,
    "int": cel.Type.INT,
    "double": cel.Type.DOUBLE,
    "bool": cel.Type.BOOL,
}
_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_UNDECLARED = re.compile(r"undeclared reference to '([^']*)'")
_STRING = re.compile(r"""("([^"\\]|\\.)*"|'([^'\\]|\\.)*')""")
_TABLE = re.compile(r"""\blisted\(\s*("[^"\\]*"|'[^'\\]*')""")
_SCOPES = (Scope.SESSION, Scope.TRANSACTION, Scope.RECIPIENT)

Listed = Callable[[str, str], bool]


class ConditionError(Exception):
    """The text is not a valid expression: `column` counts from 1 within it; `unknown` is a name nobody knows."""

    def __init__(self, text: str, column: int, unknown: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.column = column
        self.unknown = unknown


@lru_cache(maxsize=512)
def _parsed_network(cidr: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(cidr, strict=False)


def _network(address: str, cidr: str) -> bool:
    """network(address, cidr): whether the address lies in the network; false for what is no address."""
    try:
        network = _parsed_network(cidr)
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed in network


def _domain(address: str) -> str:
    return address.rpartition("@")[2].lower() if "@" in address else ""


def _local(address: str) -> str:
    return address.rpartition("@")[0] if "@" in address else address


@dataclass(frozen=True, slots=True)
class Function:
    """One function of ours, over texts: the names of its arguments, the type of its result, what it gives."""

    arguments: tuple[str, ...]
    result: FactType
    help: str


FUNCTIONS: dict[str, Function] = {
    "network": Function(("address", "cidr"), "bool", "Whether the address lies in the network."),
    "domain": Function(("address",), "string", "What stands after the last @, lower-cased; empty without one."),
    "local": Function(("address",), "string", "What stands before the last @."),
    "lower": Function(("text",), "string", "The text in lower case."),
    "listed": Function(
        ("table", "text"), "bool", "Whether the text, lower-cased, is an entry of that list below `tables`."
    ),
}


def _functions(listed: Listed) -> list[cel.FunctionDecl]:
    calls: dict[str, Callable[..., FactValue]] = {
        "network": _network, "domain": _domain, "local": _local, "lower": str.lower, "listed": listed,
    }  # fmt: skip
    declared = []
    for name, function in FUNCTIONS.items():
        types = [cel.Type.STRING] * len(function.arguments)
        overload = cel.Overload(f"{name}_{len(types)}", _TYPES[function.result], types, False, calls[name])
        declared.append(cel.FunctionDecl(name, [overload]))
    return declared


class Conditions:
    """Compiles the expressions of one pipeline.

    `facts` is the whole table of the pipeline (built-in and the stages' own); `listed` answers
    `listed(list, string)` from the pipeline's `tables`.
    """

    def __init__(self, facts: Iterable[Fact], listed: Listed) -> None:
        self.facts: Mapping[str, Fact] = {fact.name: fact for fact in facts}
        variables = {name: _TYPES[fact.type] for name, fact in self.facts.items()}
        self._env = cel.NewEnv(variables=variables, functions=_functions(listed))
        names = "|".join(re.escape(name) for name in sorted(self.facts, key=len, reverse=True))
        self._names = re.compile(rf"(?<![\w.])({names})(?![\w])")

    def names(self, text: str) -> tuple[str, ...]:
        """Facts that the text reads, each once."""
        return tuple(dict.fromkeys(self._names.findall(_STRING.sub('""', text))))

    def tables(self, text: str) -> tuple[str, ...]:
        """Tables that `listed` names in the text, where it names them by a plain string."""
        return tuple(dict.fromkeys(name[1:-1] for name in _TABLE.findall(text)))

    def compile(self, expression: Expression) -> tuple[str, ...]:
        """Bind the expression; the facts that it reads come back. Raises ConditionError."""
        try:
            compiled = self._env.compile(expression.text)
        except RuntimeError as error:
            raise _condition_error(str(error), expression.text) from None
        result = compiled.return_type().name().lower()
        if result != expression.result:
            raise ConditionError(f"gives {result}, not {expression.result}", 1)
        names = self.names(expression.text)
        facts = tuple(self.facts[name] for name in names)
        phase = max((fact.phase for fact in facts), default=Phase.CONNECT)
        scope = max((fact.scope for fact in facts), key=_SCOPES.index, default=Scope.SESSION)
        expression.bind(_program(compiled, facts, expression), phase, scope)
        return names


def read_fact(fact: Fact, session: Session, transaction: Transaction | None, recipient: Recipient | None) -> FactValue:
    """The value of a fact here and now: from its getter, or as a stage set it, or its default."""
    if fact.get is not None:
        return fact.get(session, transaction, recipient)
    if transaction is not None and transaction.facts is not None and fact.name in transaction.facts:
        return transaction.facts[fact.name]
    if session.facts is not None:
        return session.facts.get(fact.name, fact.default)
    return fact.default


def _program(compiled: cel.Expression, facts: tuple[Fact, ...], expression: Expression) -> Program:
    if len(facts) == 1 and expression.text.strip() == facts[0].name:
        only = facts[0]  # `per: client.address`: no need to ask CEL
        return lambda session, transaction, recipient: read_fact(only, session, transaction, recipient)

    def program(session: Session, transaction: Transaction | None, recipient: Recipient | None) -> FactValue:
        data = {fact.name: read_fact(fact, session, transaction, recipient) for fact in facts}
        value = compiled.eval(data=data)
        if value.type() == cel.Type.ERROR:
            raise EvaluationError(f"{expression.text}: {value.value()}")
        plain = value.value()
        if not isinstance(plain, (str, int, float, bool)):
            raise EvaluationError(f"{expression.text}: no plain value")
        return plain

    return program


def _condition_error(message: str, expression: str) -> ConditionError:
    """CEL's error with the column at which the name or sign in question begins."""
    found = _ERROR.search(message)
    if found is None:
        return ConditionError(message.splitlines()[0] if message else "not an expression", 1)
    before = expression.split("\n")[: int(found.group(1)) - 1]
    at = sum(len(line) + 1 for line in before) + int(found.group(2)) - 1
    text = found.group(3).replace(" (in container '')", "")
    text = re.sub(r" expecting \{.*", "", text).replace("INVALID_ARGUMENT", "").removesuffix(" []")
    unknown = _UNDECLARED.search(text)
    if unknown is not None:
        name = unknown.group(1)
        at = max(0, expression.rfind(name, 0, at + len(name)))  # CEL points at a dot or parenthesis of it
        if name in FUNCTIONS:
            return ConditionError(f"{name} is written {name}({', '.join(FUNCTIONS[name].arguments)})", at + 1)
        return ConditionError(text, at + 1, name)
    return ConditionError(text, at + 1)
