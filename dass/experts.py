"""Experts that are read and written one by one, as checkpoints have them: each a tensor of its own, or a part of one.

transformers puts the experts of a block together into one parameter when it loads them, for which all of them must be
in memory, and writes that to the disk once more; here its own words for that say which tensors of a checkpoint are
which expert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dass.errors import DassError


@dataclass(frozen=True)
class Apart:
    """The experts of a parameter where a checkpoint has each as a tensor of its own, or as several."""

    names: list[tuple[str, ...]]
    """Of each expert those that are put together, such as gate and up."""
    axis: int
    """Of an expert, along which they are."""

    def cut(self, expert: Tensor) -> tuple[Tensor, ...]:
        """An expert in its parts."""
        return expert.chunk(len(self.names[0]), self.axis)


def named_in_model(model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """What transformers makes of the tensors of a checkpoint, in the order in which it puts several together.

    Of each its name, that of the parameter or buffer, and the pattern by which it is changed, or one of several; None
    where it is taken as it stands.

    Args:
        model: without weights.
        names: of the tensors in the checkpoint.
    """
    renamings, converters = _transforms(model)
    places = model.state_dict()
    for name in sorted(names, key=dot_natural_key):
        full, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if full not in places and name in places:  # it is in the model's own words already
            full, pattern = rename_source_key(name, [], [], model.base_model_prefix, places)
        yield name, full, pattern


def _transforms(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    found = get_model_conversion_mapping(model)
    renamings = [one for one in found if isinstance(one, WeightRenaming)]
    return renamings, [one for one in found if isinstance(one, WeightConverter)]


def found_apart(model: PreTrainedModel, names: Iterable[str], wanted: Iterable[str], needed: bool) -> dict[str, Apart]:
    """Which tensors of a checkpoint are which expert of a parameter, for those that lie apart.

    Args:
        model: without weights.
        names: of the tensors in the checkpoint.
        wanted: the full names of the parameters.
        needed: whether those that are not simply put one behind the other are refused, or else left to transformers.

    Raises:
        DassError: one is refused.
    """
    places, by_pattern = model.state_dict(), dict[str, dict[str, list[str]]]()
    for name, full, pattern in named_in_model(model, names):
        if pattern is not None and full in places:
            by_pattern.setdefault(full, {}).setdefault(pattern, []).append(name)
    _, converters = _transforms(model)
    found = {}
    for full in by_pattern.keys() & set(wanted):
        own = by_pattern[full]
        converter = next(one for one in converters if set(own) <= set(one.source_patterns))
        kinds = [(type(one), one.dim) for one in converter.operations if isinstance(one, MergeModulelist | Concatenate)]
        parts = [own.get(pattern, []) for pattern in converter.source_patterns]
        together = kinds[1][1] if len(kinds) == 2 else 1
        expected = [(MergeModulelist, 0), (Concatenate, together)][: len(converter.operations)]
        simply = kinds == expected and together and {len(part) for part in parts} == {places[full].shape[0]}
        if simply:
            found[full] = Apart(list(zip(*parts, strict=True)), together - 1)
        elif needed:
            raise DassError(
                f"{full} is put together from its file in a way of its own, so that its experts cannot be brought one "
                f"by one: use a machine whose memory holds a block.",
                field="memory",
            )
    return found
