"""Taking one check out of the program, to see what the attack behind it does.

`cut` names a function and the text of the condition, or of the call, that stands in it: the statement is removed
from the function's code wherever that function is used, and comes back when the test ends. A condition that is not
there any more fails the test, so the tables of attacks say what the program checks today.
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
    """Replaces every ``if`` whose condition, and every call whose text, holds the fragment."""

    def __init__(self, fragment: str) -> None:
        self._fragment = fragment
        self.found = 0

    def visit_If(self, node: ast.If) -> Any:  # noqa: N802 - named by ast
        if self._fragment not in ast.unparse(node.test):
            return self.generic_visit(node)
        self.found += 1
        return [self.visit(each) for each in node.orelse] or ast.Pass()

    def visit_Expr(self, node: ast.Expr) -> Any:  # noqa: N802
        if self._fragment not in ast.unparse(node):
            return node
        self.found += 1
        return ast.Pass()


def cut(target: Any, fragment: str) -> Removal:
    """Return what removes from `target` each check that holds `fragment`.

    Parameters
    ----------
    target : function or method
    fragment : str
        Part of the condition of an ``if``, or of a statement that is one call, as `ast.unparse` writes it.
    """
    function = target.__func__ if isinstance(target, MethodType) else target
    assert isinstance(function, FunctionType), target

    def remove(patch: pytest.MonkeyPatch) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
        definition.decorator_list = []
        cutter = _Cutter(fragment)
        cutter.visit(definition)
        assert cutter.found, f"{function.__qualname__} has no check {fragment!r}"
        ast.fix_missing_locations(tree)
        flags = __future__.annotations.compiler_flag
        # checks removed before by another `cut` of the same function stay removed
        code = compile(tree, f"<{function.__qualname__} without {fragment}>", "exec", flags, dont_inherit=True)
        names: dict[str, Any] = dict(function.__globals__)
        exec(code, names)  # noqa: S102 - the program's own source
        patch.setattr(function, "__code__", names[function.__name__].__code__)

    return remove


def replaced(owner: Any, name: str, value: Any) -> Removal:
    """Return what puts `value` in the place of an attribute."""

    def remove(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, name, value)

    return remove
