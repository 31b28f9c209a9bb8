"""Taking one check out of the program, to see what the attack behind it does.

`cut` names a function and the text of a condition, or of a call, that stands in it. The statement is removed from the
function's own code, wherever that function is used, and comes back when the test ends. A check that is not there any
more fails the test: the tables of attacks say what the program checks today.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import pytest

Removal = Callable[[pytest.MonkeyPatch], None]


class _Cutter(ast.NodeTransformer):
    """Removes every ``if`` by a fragment of its condition, and every call by a fragment of its text."""

    def __init__(self, fragments: tuple[str, ...]) -> None:
        self._fragments = fragments
        self.found: set[str] = set()

    def _is_one(self, text: str) -> bool:
        found = {fragment for fragment in self._fragments if fragment in text}
        self.found |= found
        return bool(found)

    def visit_If(self, node: ast.If) -> Any:
        if self._is_one(ast.unparse(node.test)):
            return [self.visit(each) for each in node.orelse] or ast.Pass()
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return ast.Pass() if self._is_one(ast.unparse(node)) else node


def cut(target: Any, *fragments: str) -> Removal:
    """Return what removes from a function or method each check that holds one of the fragments.

    A fragment is part of the condition of an ``if``, or of a statement that is a call, as `ast.unparse` writes it.
    """
    function = target.__func__ if isinstance(target, MethodType) else target
    assert isinstance(function, FunctionType), target

    def remove(patch: pytest.MonkeyPatch) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
        definition.decorator_list = []
        cutter = _Cutter(fragments)
        cutter.visit(definition)
        missing = set(fragments) - cutter.found
        assert not missing, f"{function.__qualname__} has no check {missing}"
        flags = __future__.annotations.compiler_flag
        code = compile(ast.fix_missing_locations(tree), "<without a check>", "exec", flags, dont_inherit=True)
        names: dict[str, Any] = dict(function.__globals__)
        exec(code, names)  # noqa: S102 - the program's own source
        patch.setattr(function, "__code__", names[function.__name__].__code__)

    return remove


def replaced(owner: Any, name: str, value: Any) -> Removal:
    """Return what puts `value` in the place of an attribute."""

    def remove(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, name, value)

    return remove
