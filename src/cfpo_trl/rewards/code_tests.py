"""Tests of programs, as datasets have them, read into what a sandbox can run without telling the answers.

What a program must print, or return, never enters its sandbox: a program that reads its tests, leaves early, patches
comparisons or prints everything has nothing to find. Of `assert f(2) == 4` the sandbox gets `f(2)` alone; the value is
compared elsewhere.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sandbox import SYNTAX_ERROR

ANSWER = "__answer_{}__"  # stands in a check for the value of a call
CHECKERS = {  # what a check may use beside values
    *("abs", "all", "any", "bool", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
    *("isinstance", "len", "list", "map", "math", "max", "min", "pow", "range", "repr", "reversed", "round", "set"),
    *("sorted", "str", "sum", "tuple", "type", "zip"),
}
PRINTED = ("stdin", "stdin_stdout")  # names that datasets have for tests by input and output
ALWAYS_TRUE = ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Lambda | ast.GeneratorExp
INPUT_NAMES, OUTPUT_NAMES = ("input", "stdin"), ("output", "stdout")


class UnreadableTests(ValueError):
    """Tests that are not surely understood; the message says why."""


@dataclass(frozen=True)
class OutputTest:
    """What a program must print for an input."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """Calls of the program's functions, and a check of their values, in which `__answer_0__`, … stand for them."""

    calls: tuple[str, ...]
    check: str


Test = OutputTest | CallTest


def columns_of_tests(tests: str = "tests", hidden_tests: str | None = None, **others: Any) -> list[str]:
    """The columns of tests that a code reward with these parameters reads."""
    return [tests] if hidden_tests is None else [tests, hidden_tests]


def read_tests(value: Any) -> list[Test]:
    """The tests in a cell of a dataset; a JSON text of one of these is read, too:

    - a list of `{"input": …, "output": …}` (or `stdin`, `stdout`), all texts;
    - `{"inputs": […], "outputs": […]}` (or `input`, `output`), lists of texts;
    - a list of asserts, `assert f(2) == 4`, each of them a text.

    Raises:
        UnreadableTests: there are none, or one that is not surely understood.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UnreadableTests(f"no JSON: {error}") from error
    if isinstance(value, dict):
        check_no_function(value)
        inputs, outputs = (value.get(f"{name}s", value.get(name)) for name in ("input", "output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise UnreadableTests("inputs and outputs are no lists of one length")
        value = [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
    if not isinstance(value, list) or not value:
        raise UnreadableTests("no tests" if not value else f"{type(value).__name__} is no list of tests")
    return [read_test(test) for test in value]


def read_test(test: Any) -> Test:
    """One of them; see [`read_tests`]."""
    if isinstance(test, str):
        return read_assert(test)
    if not isinstance(test, dict):
        raise UnreadableTests(f"{test!r:.100} is neither an assert nor a pair of input and output")
    check_no_function(test)
    return OutputTest(text_under(test, INPUT_NAMES), text_under(test, OUTPUT_NAMES))


def check_no_function(test: dict[str, Any]) -> None:
    """Refuses inputs that are arguments of a function, as some datasets mark them."""
    kind = test.get("testtype", test.get("type"))
    if test.get("fn_name") or (kind is not None and kind not in PRINTED):
        raise UnreadableTests(f"{test!r:.100} calls a function, where input and output are what is read and printed")


def text_under(test: dict[str, Any], names: Sequence[str]) -> str:
    found = [test[name] for name in names if name in test]
    if len(found) != 1 or not isinstance(found[0], str):
        raise UnreadableTests(f"{test!r:.100} has no text under {' or '.join(names)}")
    return found[0]


def read_assert(text: str) -> CallTest:
    """`assert abs(f(2) - 4) < 1e-6` as the call `f(2)` and the check `abs(__answer_0__ - 4) < 1e-6`.

    Raises:
        UnreadableTests: it is no single assert, calls nothing of the program's, or needs more of it than values.
    """
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableTests(f"{text!r:.100} is no Python: {error}") from error
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        raise UnreadableTests(f"{text!r:.100} is not one assert")
    if isinstance(statements[0].test, ALWAYS_TRUE):
        raise UnreadableTests(f"{text!r:.100} is always true")
    calls = Calls()
    check = calls.visit(statements[0].test)
    bound = bound_in(check)
    answers = {ANSWER.format(place) for place in range(len(calls.found))}
    names = names_in(check) - bound - answers
    if not calls.found:
        raise UnreadableTests(f"{text!r:.100} calls no function of the program")
    if inner := {name for call in map(ast.parse, calls.found) for name in names_in(call) - bound_in(call)} & bound:
        raise UnreadableTests(f"{text!r:.100} calls it with {min(inner)}, which only the check knows")
    if unknown := names - CHECKERS:
        raise UnreadableTests(f"{text!r:.100} uses {min(unknown)}, which is no value of a call")
    return CallTest(tuple(calls.found), ast.unparse(check))


def names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound_in(tree: ast.AST) -> set[str]:
    """The variables of comprehensions, lambdas and `:=`."""
    nodes = list(ast.walk(tree))
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return assigned | {node.arg for node in nodes if isinstance(node, ast.arg)}


class Calls(ast.NodeTransformer):
    """Takes the outermost calls of the program's functions out of a check; `found` are their sources."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        root: ast.expr = node.func
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name) and root.id not in CHECKERS:
            self.found.append(ast.unparse(node))
            return ast.Name(ANSWER.format(len(self.found) - 1), ast.Load())
        return self.generic_visit(node)


DRIVER = """
import json, os
lines = os.dup(1)
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)

def source(value):
    if type(value) is float and value in (1e999, -1e999):
        return "1e999" if value > 0 else "-1e999"
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if isinstance(value, dict):
        return "{{" + ", ".join(f"{{source(key)}}: {{source(one)}}" for key, one in value.items()) + "}}"
    for kinds, begin, end in ((list, "[", "]"), (tuple, "(", ",)"), ((set, frozenset), "{{", "}}")):
        if isinstance(value, kinds):
            empty = {{"[": "[]", "(": "()", "{{": "set()"}}
            return begin + ", ".join(map(source, value)) + end if value else empty[begin]
    raise TypeError(value)

scope = {{"__name__": "program"}}
try:
    code = compile({program!r}, "program.py", "exec")
except (SyntaxError, ValueError):
    os._exit({syntax_error})
exec(code, scope)
for call in {calls!r}:
    try:
        value = source(eval(call, scope))
    except Exception:
        value = None
    os.write(lines, (json.dumps(value) + "\\n").encode())
"""
CHECKER = """
import ast, math
for check, values in {checks!r}:
    try:
        scope = {{f"__answer_{{place}}__": ast.literal_eval(value) for place, value in enumerate(values)}}
        print(int(bool(eval(check, {{"math": math, **scope}}))))
    except Exception:
        print(0)
"""


def driver(program: str, tests: Sequence[CallTest]) -> str:
    """A program that runs the other, without its prints, and writes the values of the tests' calls, one per line."""
    return DRIVER.format(
        program=program, syntax_error=SYNTAX_ERROR, calls=[call for test in tests for call in test.calls]
    )


def checker(tests: Sequence[CallTest], output: str) -> str:
    """A program that prints 1 or 0 for each test, by what a [`driver`] wrote; nothing of the policy's runs in it.

    A value that is missing, or no plain one (a number, a text, None, or lists, tuples, sets, dicts of them), fails.
    """
    lines = iter(output.split("\n")[:-1])
    return CHECKER.format(checks=[(test.check, [value_in(next(lines, "")) for _ in test.calls]) for test in tests])


def value_in(line: str) -> str:
    """The value's source; where there is none, a text that is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""
