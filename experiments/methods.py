"""From the config's words to a pruning method of the library."""

from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf

from dass.errors import DassError
from dass.pruning.blocks import INPUT_OF_ROLE
from dass.pruning.masks import NM, Pattern, Unstructured
from dass.pruning.method import BlockPruner, Method
from experiments.app import CONF
from experiments.schema import MethodConfig, PruneConfig, SparsityConfig


def pruners_of(config: PruneConfig) -> dict[str, BlockPruner]:
    """The methods of a run by name: none for the dense model, one, or those that `method=compare` names.

    Raises:
        DassError: a value or combination that means nothing.
    """
    names = config.method.get("methods")
    if names is None:
        pruner = _pruner(config, config.method)
        return {} if pruner is None else {str(config.method["name"]): pruner}
    if others := set(config.method) - {"name", "methods"}:
        raise DassError(f"method.{min(others)} has no effect where methods are compared as their files say: remove it.")
    pruners = {}
    for name in names:
        file = CONF / "method" / f"{name}.yaml"
        pruner = _pruner(config, OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else None  # type: ignore[arg-type]
        if pruner is None:
            raise DassError(f"method.methods names {name}, which is no method that prunes: see conf/method.")
        pruners[str(name)] = pruner
    if len(pruners) < 2:
        raise DassError("method.methods must name at least two methods to compare.")
    return pruners


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
        given["axis"] = dict.fromkeys(INPUT_OF_ROLE, axis)
    method: MethodConfig = OmegaConf.to_object(  # type: ignore[assignment]
        OmegaConf.merge(OmegaConf.structured(MethodConfig), {k: v for k, v in given.items() if k in shared})
    )
    parameters = {k: v for k, v in given.items() if k not in shared}
    for name, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DassError(f"method.{name}={value} is not a number: correct it.")
    if method.criterion is None:
        if parameters or method.axis or method.update != "none":
            raise DassError(f"method={method.name} has no criterion, so it prunes nothing: set `method.criterion`.")
        return None
    return BlockPruner(
        Method(
            method.criterion,
            method.axis,  # type: ignore[arg-type]  # checked by Method
            pattern_of(config.sparsity),
            method.update,  # type: ignore[arg-type]
            parameters,
            method.damping,
            method.block_size,
        ),
        config.targets,  # type: ignore[arg-type]
        "|".join(f"(?:{expression})" for expression in (method.exclude, config.exclude) if expression) or None,
    )
