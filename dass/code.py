"""What the code of a criterion, an update, an order or a source is, so that who edits one gets another run."""

import ast
import inspect
import json
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from dass.pruning.update import UPDATES
from dass.records import identity_of

OURS = "dass"
"""Of our own modules a function is followed in its module alone: `NUMERICS` stands for the rest."""


def code_of(function: Callable[..., Any]) -> str:
    """16 hex digits for the code of a function and of what it uses, without comments and words.

    Who edits an equation gets another run; who edits a docstring does not. Of a function of ours: the functions and
    classes of its own module that it uses, and constants; an update that calls another one follows it. Of a stranger's,
    for which no version of the numerics stands: the same of all modules but of the installed packages.

    Raises:
        OSError: there is no source, as the function was typed into a shell.
    """
    sources: dict[str, str] = {}
    followed: set[Any] = set()
    waiting: list[Any] = []

    def look_at(name: str, value: Any, user: Any) -> None:
        for part, used in _parts(name, value):
            if inspect.isfunction(used) or inspect.isclass(used):
                waiting.extend([used] * (user is None or _is_followed(used, user)))
            elif (constant := _constant(used)) is not None:
                sources[part] = constant

    look_at("", function, None)
    start = waiting[0]
    while waiting:
        if (one := waiting.pop()) in followed:
            continue
        followed.add(one)
        try:
            tree = _tree(one)
        except OSError:
            if one is start:
                raise
            continue  # made by a call, such as `namedtuple`
        if not (is_ours(one) and _names_fields_alone(tree.body[0])):
            label = _label(one, start)
            sources[label] = sources.get(label, "") + ast.unparse(tree)  # all lambdas have one name
        for name, used in _used(tree, inspect.getmodule(one), is_ours(one)):
            look_at(name, used, one)
    return identity_of(sources)


def _tree(one: Any) -> ast.Module:
    """The code of a function or class without its words; OSError where there is no source."""
    text = textwrap.dedent(inspect.getsource(one))
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda's source is the line that it stands in
        return ast.parse(repr(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def is_ours(one: Any) -> bool:
    """Whether a module, function or class is of this package."""
    module = one.__name__ if inspect.ismodule(one) else one.__module__
    return str(module).partition(".")[0] == OURS


def _label(one: Any, function: Callable[..., Any]) -> str:
    """Under which name a function or class stands: a stranger's with its module, where that is another one."""
    is_near = is_ours(one) or one.__module__ == function.__module__
    return one.__qualname__ if is_near else f"{one.__module__}.{one.__qualname__}"


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What stands behind a name: of a partial its function and arguments, of a wrapper what it wraps."""
    if isinstance(value, partial):
        yield from _parts(name, value.func)
        for key, argument in (*enumerate(value.args), *value.keywords.items()):
            yield from _parts(f"{name}({key})", argument)
    else:
        yield name, inspect.unwrap(value) if callable(value) else value


def _is_followed(used: Any, user: Any) -> bool:
    """Whether the code of a function or class counts for one that uses it."""
    if not is_ours(user):
        return _is_strangers(used)
    return used.__module__ == user.__module__ or used in [entry.function for entry in UPDATES.values()]


def _is_strangers(one: Any) -> bool:
    """Whether it is neither ours nor of an installed package."""
    try:
        file = inspect.getsourcefile(one)
    except TypeError:  # built in
        return False
    installed = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    return file is not None and not is_ours(one) and not any(folder in Path(file).parents for folder in installed)


def _names_fields_alone(tree: ast.stmt) -> bool:
    """Whether it is a class without values and methods, which holds no equation."""
    if not isinstance(tree, ast.ClassDef):
        return False
    words = (node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)))
    return all(isinstance(node, ast.AnnAssign) and node.value is None for node in words)


def _used(tree: ast.AST, module: Any, ours: bool) -> Iterator[tuple[str, Any]]:
    """The global names that code reads, and what stands behind each; of a stranger's also `module.name`."""
    for node in _nodes(tree):
        if isinstance(node, ast.Name):
            yield node.id, getattr(module, node.id, None)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not ours:
            owner = getattr(module, node.value.id, None)
            if inspect.ismodule(owner) and getattr(owner, "__file__", None) and _is_strangers(owner):
                yield f"{node.value.id}.{node.attr}", getattr(owner, node.attr, None)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but annotations, which change no number."""
    yield tree
    for field, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                yield from _nodes(child)


def _constant(value: Any) -> str | None:
    """A number, a text, or a collection or tensor of such, as text; None of what is none."""
    if isinstance(value, int | float | str):
        return repr(value)
    try:
        return None if value is None else json.dumps(_plain(value), sort_keys=True)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    """A collection as JSON holds it; TypeError of what is none."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, Sequence):
        return list(map(_plain, value))
    if callable(getattr(value, "tolist", None)):  # a tensor, an array
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no collection")
