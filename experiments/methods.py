"""From the config's words to a pruning method of the library."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dass.errors import DassError, told
from dass.names import unknown
from dass.pruning.adaptive import AdaptivePruner
from dass.pruning.blocks import ROLES
from dass.pruning.criteria import CRITERIA
from dass.pruning.masks import NM, Pattern, Unstructured
from dass.pruning.method import Method
from dass.pruning.pruner import BlockPruner
from dass.pruning.update import UPDATES
from experiments.app import CONF, typed
from experiments.schema import MethodConfig, PruneConfig, SparsityConfig

Pruner = BlockPruner | AdaptivePruner
DENSE = "dense"
"""The name of the method that prunes nothing, by which tables know it."""


def name_by_file(config: DictConfig, overrides: Sequence[str]) -> None:
    """Give a method the name of its file in conf/method, so that a renamed copy is another method, unless one is given.

    Args:
        overrides: of the run, `key=value`; the last one of `method` names the file.
    """
    given = dict(one.lstrip("+").split("=", 1) for one in overrides if "=" in one)
    if "method" in given and "method.name" not in given and "method" in config:
        config.method.name = given["method"]


def pruners_of(config: PruneConfig) -> Mapping[str, Pruner]:
    """The methods of a run by name: none for the dense model, one, or those that `method=compare` names.

    Raises:
        DassError: a value or combination that means nothing.
    """
    names, candidates = config.method.get("methods"), config.method.get("candidates")
    if candidates is not None:
        return {str(config.method["name"]): _adaptive(config, candidates)}
    if names is None:
        pruner = _pruner(config, config.method)
        return {} if pruner is None else {str(config.method["name"]): pruner}
    if others := set(config.method) - {"name", "methods"}:
        raise DassError(f"method.{min(others)} has no effect where methods are compared as their files say: remove it.")
    return compared(config, names if isinstance(names, list) else [])


def compared(config: PruneConfig, methods: Sequence[Any]) -> dict[str, BlockPruner]:
    """Methods as `_from_files` reads them; DassError where one does not prune, or there is one alone."""
    pruners = _from_files(config, "methods", methods, {})
    if len(pruners) < 2:
        raise DassError("method.methods must name at least two methods to compare.")
    return pruners


def _adaptive(config: PruneConfig, candidates: Any) -> AdaptivePruner:
    """The choice between methods."""
    words = dict(config.method)
    names = ("order", "order_seed", "update", "exclude", *UPDATES.find(str(words.get("update", "none"))).parameters())
    shared = {key: words.pop(key) for key in names if key in words}
    share = words.pop("share", 0.25)
    if others := set(words) - {"name", "candidates"}:
        raise DassError(f"method.{min(others)} has no effect where candidates are chosen from: set it in one of them.")
    pruners = _from_files(config, "candidates", candidates if isinstance(candidates, list) else [], shared)
    if words["name"] == DENSE:
        raise DassError("method.name=dense is the name of what is not pruned: give another.", "method.name")
    if not isinstance(share, int | float) or isinstance(share, bool):
        raise DassError(f"share={share} must be a number.", field="method.share")
    return AdaptivePruner(pruners, share)


def _from_files(
    config: PruneConfig, where: str, methods: Sequence[Any], shared: Mapping[Any, Any]
) -> dict[str, BlockPruner]:
    """Several methods, each as its file says, with other values where they are given beside its name."""
    pruners = {}
    for one in methods:
        own = dict(one) if isinstance(one, dict) else {"name": one}
        file, changes = str(own.pop("name", None)), own
        name = " ".join([file, *(f"{key}={value}" for key, value in changes.items())])
        pruners[name] = _from_file(config, where, file, {**shared, **changes}, "update" in changes)
    return pruners


def _from_file(
    config: PruneConfig, where: str, name: str, changes: dict[str, Any], updates_itself: bool
) -> BlockPruner:
    """A method as its file in conf/method says, with some values changed; `updates_itself`: its own update, too."""
    known = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    if name not in known:
        raise unknown("The method", name, known, f"method.{where}")
    file = CONF / "method" / f"{name}.yaml"
    with told(f"{file} cannot be read", "correct it", Exception):  # whatever OmegaConf and its YAML raise
        words: Any = OmegaConf.to_container(OmegaConf.load(file))
    own = words.get("update", "none")
    if not updates_itself and own not in ("none", changes.get("update", own)):
        raise DassError(
            f"method.{where} names {name}, whose update is {own}, not {changes['update']}: write which it is to have, "
            f"as in {{name: {name}, update: {own}}}.",
            f"method.{where}",
        )
    pruner = _pruner(config, words | changes) if "criterion" in words else None
    if pruner is None:
        raise DassError(f"method.{where} names {name}, which is no method that prunes: see conf/method.")
    for key in changes:
        if is_idle(key, words | changes):
            raise DassError(f"{key} has no effect on {name}: remove it.", f"method.{where}")
    return pruner


def pattern_of(sparsity: SparsityConfig) -> Pattern:
    """The pattern; DassError unless either ratio or both n and m are set."""
    nm = (sparsity.n, sparsity.m)
    if sparsity.ratio is not None and nm == (None, None):
        return Unstructured(sparsity.ratio)
    if sparsity.ratio is None and sparsity.n is not None and sparsity.m is not None:
        return NM(sparsity.n, sparsity.m)
    raise DassError(
        f"sparsity={sparsity.name} has ratio={sparsity.ratio}, n={sparsity.n}, m={sparsity.m}: set either ratio "
        f"(unstructured) or both n and m (n of m are kept)."
    )


def _pruner(config: PruneConfig, words: dict[str, Any]) -> BlockPruner | None:
    """The method with its targets; None for the dense model."""
    shared = {f.name for f in fields(MethodConfig)}
    axis = words.get("axis")
    given = dict(words)
    if isinstance(axis, str):
        given["axis"] = {role: axis for role in ROLES if role != "qkv"}
    method = typed(MethodConfig, {key: value for key, value in given.items() if key in shared})
    parameters = {k: v for k, v in given.items() if k not in shared}
    if method.criterion is None:
        if parameters or method.axis or method.update != "none" or method.name != DENSE:
            raise DassError(
                f"The method {method.name} has no criterion, so it prunes nothing: set one.", field="method.criterion"
            )
        return None
    pruner = BlockPruner(
        Method(
            method.criterion,
            method.axis,  # type: ignore[arg-type]  # checked by Method
            pattern_of(config.sparsity),
            method.update,
            {k: v for k, v in parameters.items() if not is_idle(k, words)},
            method.order,
            method.order_seed,
        ),
        config.targets,  # type: ignore[arg-type]
        "|".join(map(_expression, filter(None, (method.exclude, config.exclude)))) or None,
    )
    if method.name == DENSE:
        raise DassError("method.name=dense is the name of what is not pruned: give another.", "method.name")
    return pruner


def _expression(exclude: str) -> str:
    """A regular expression as a part of another; DassError where it is none."""
    part = f"(?:{exclude})"
    kinds = (re.error, RecursionError, OverflowError)
    with told(f"exclude={exclude} is not a regular expression", "correct it", *kinds, field="exclude"):
        re.compile(part)
    return part


def is_idle(name: str, words: Mapping[str, Any]) -> bool:
    """Whether a setting of a method is a parameter of criteria or updates that are not its own."""
    own = (CRITERIA.find(str(words.get("criterion"))), UPDATES.find(str(words.get("update", "none"))))
    owners = [entry for entry in (*CRITERIA.values(), *UPDATES.values()) if name in entry.parameters()]
    return bool(owners) and not any(name in entry.parameters() for entry in own)
