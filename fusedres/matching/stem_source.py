"""Whether a model's method begins with its stem, read from the method's source.

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        ...                     # anything that names none of the four, and self only as in self.name

Such a method computes the same when the four are given stand-ins that hand on a stem computed at once.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType


@cache
def begins_with(function: object, parts: tuple[str, ...]) -> bool:
    """Whether the function has that form, with these names in this order. No source, no match."""
    if type(function) is not FunctionType or hasattr(function, "__wrapped__") or function.__closure__:
        return False
    definition = parse(function)
    if definition is None or definition.decorator_list:
        return False
    parameters = definition.args
    names = [a.arg for a in parameters.args]
    if len(names) != 2 or parameters.posonlyargs or parameters.kwonlyargs or parameters.defaults:
        return False
    if parameters.vararg or parameters.kwarg:
        return False
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    expected = [ast.dump(ast.parse(f"{names[1]} = {names[0]}.{part}({names[1]})").body[0]) for part in parts]
    if [ast.dump(statement) for statement in body[: len(parts)]] != expected:
        return False
    return all(harmless(statement, names[0], parts) for statement in body[len(parts) :])


def parse(function: FunctionType) -> ast.FunctionDef | None:
    """The function's definition; None where there is no source, or another than what runs."""
    code = function.__code__
    try:
        source = "".join(inspect.findsource(code)[0])
        compiled = compile(source, code.co_filename, "exec", dont_inherit=True)
    except (OSError, SyntaxError):
        return None
    if not any(same_code(found, code) for found in nested(compiled)):
        return None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (
            code.co_name,
            code.co_firstlineno,
        ):
            return node
    return None


def nested(code: CodeType) -> Iterator[CodeType]:
    """The code objects in one, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from nested(constant)


def same_code(a: CodeType, b: CodeType) -> bool:
    fields = ("co_name", "co_firstlineno", "co_code", "co_names", "co_varnames")
    return all(getattr(a, field) == getattr(b, field) for field in fields)


def harmless(statement: ast.stmt, self_name: str, parts: tuple[str, ...]) -> bool:
    """Whether self stands only in reads of attributes other than the parts."""
    reads = {
        id(node.value): node
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id == self_name:
            read = reads.get(id(node))
            if read is None or read.attr in parts:
                return False
        if isinstance(node, ast.Name) and node.id in ("super", "locals", "vars", "__class__"):
            return False
    return True
