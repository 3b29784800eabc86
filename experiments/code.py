"""What the code of a criterion, an update or an order is, so that who edits an equation gets another run."""

import ast
import inspect
import json
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dass.pruning.update import UPDATES
from dass.records import identity_of

OURS = "dass"
"""Of our own modules a function is followed in its module alone: `NUMERICS` stands for the rest."""


def code_of(function: Callable[..., Any]) -> str:
    """16 hex digits for the code of a function and of what it uses, without comments and words.

    Who edits an equation gets another run; who edits a docstring does not. Of a function of ours: what it calls in its
    own module, and constants there; an update that calls another one follows it. Of a stranger's, for which no version
    of the numerics stands: functions, classes and constants of all modules but of the installed packages.
    """
    sources: dict[str, str] = {}
    waiting: list[Any] = [function]
    updates = [entry.function for entry in UPDATES.values()]
    while waiting:
        one = waiting.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        sources[_label(one, function)] = ast.unparse(tree)
        ours = _is_ours(one)
        for name, used in _used(tree, inspect.getmodule(one), ours):
            if inspect.isfunction(used) or (inspect.isclass(used) and not ours):
                follows = used in updates or (used.__module__ == one.__module__ if ours else _is_strangers(used))
                waiting += [used] * (follows and _label(used, function) not in sources)
            elif (constant := _constant(used, ours)) is not None:
                sources[name] = constant
    return identity_of(sources)


def _label(one: Any, function: Callable[..., Any]) -> str:
    """Under which name a function or class stands: a stranger's with its module, where that is another one."""
    is_near = _is_ours(one) or one.__module__ == function.__module__
    return one.__qualname__ if is_near else f"{one.__module__}.{one.__qualname__}"


def _is_ours(one: Any) -> bool:
    module = one.__name__ if inspect.ismodule(one) else one.__module__
    return str(module).partition(".")[0] == OURS


def _is_strangers(one: Any) -> bool:
    """Whether it is neither ours nor of an installed package."""
    try:
        file = inspect.getsourcefile(one)
    except TypeError:  # built in
        return False
    installed = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    return file is not None and not _is_ours(one) and not any(folder in Path(file).parents for folder in installed)


def _used(tree: ast.AST, module: Any, ours: bool) -> Iterator[tuple[str, Any]]:
    """The global names that code reads, and what stands behind each; of a stranger's also `module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, getattr(module, node.id, None)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not ours:
            owner = getattr(module, node.value.id, None)
            if inspect.ismodule(owner) and getattr(owner, "__file__", None) and _is_strangers(owner):
                yield f"{node.value.id}.{node.attr}", getattr(owner, node.attr, None)


def _constant(value: Any, ours: bool) -> str | None:
    """A constant as text; None of what is none. Of a stranger's also collections and tensors."""
    if isinstance(value, int | float | str):
        return repr(value)
    if ours or value is None:
        return None
    try:
        return json.dumps(value, sort_keys=True, default=_as_list)
    except (TypeError, ValueError, AttributeError):
        return None


def _as_list(value: Any) -> Any:
    return sorted(value, key=repr) if isinstance(value, set | frozenset) else value.tolist()
