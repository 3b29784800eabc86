"""A pruning method: criterion x group axis x pattern x neuron order x update."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dass.errors import DassError
from dass.pruning import mlp, swap  # noqa: F401  (they register updates)
from dass.pruning.blocks import ROLES
from dass.pruning.criteria import CRITERIA
from dass.pruning.masks import AXES, NM, Axis, Pattern, require_fitting
from dass.pruning.order import ORDERS
from dass.pruning.registry import Entry, Value
from dass.pruning.update import UPDATES


@dataclass(frozen=True)
class Method:
    """One point in the space of one-shot pruning methods."""

    criterion: str
    """A name in `CRITERIA`. `obs` with the update `obs` chooses from the already updated weights, as SparseGPT does."""
    axis: Mapping[str, Axis]
    """The group axis of each role; a role that is absent is pruned by Wanda's rule (wanda along `in`)."""
    pattern: Pattern
    update: str = "none"
    """A name in `UPDATES`."""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    """Those of the criterion and of the update, such as DaSS's alpha; one that both have is given to both."""
    order: str = "released"
    """A name in `ORDERS`: how the neurons of each MLP stand when groups are cut."""
    order_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing, with the reason."""
        entries = (CRITERIA.find(self.criterion), UPDATES.find(self.update))
        if ORDERS.find(self.order).needs and not isinstance(self.pattern, NM):
            raise DassError(
                f"The order {self.order} fits groups of N:M, and {self.pattern} has none: use released.", "method.order"
            )
        known = dict.fromkeys(name for entry in entries for name in entry.parameters())
        for name, value in self.parameters.items():
            owner = next((entry for entry in entries if name in entry.parameters()), None)
            if owner is None:
                raise DassError(
                    f"The criterion {self.criterion} with the update {self.update} has no parameter `{name}` (it has: "
                    f"{', '.join(known) or 'none'}): remove it.",
                    field=f"method.{name}",
                )
            owner.checked(name, value)
        for role, axis in self.axis.items():
            if role not in ROLES or axis not in AXES:
                raise DassError(
                    f"The axis {role}={axis} is unknown: roles are {', '.join(ROLES)}, axes are {', '.join(AXES)}.",
                    field=f"method.axis.{role}",
                )
            require_fitting(self.pattern, axis, f" of {role}")
            if axis == "both" and self.chooses_while_sweeping(role):
                raise DassError(
                    f"The group axis both of {role} takes whole tiles of M x M weights, but SparseGPT takes M columns "
                    "at a time while its update sweeps over them: use another criterion, whose mask comes first, or "
                    "update=none.",
                    field=f"method.axis.{role}",
                )

    def _owner(self, role: str) -> str | None:
        """The role whose axis this one has: a fused qkv is pruned as q."""
        return next((r for r in (role, "q" if role == "qkv" else role) if r in self.axis), None)

    def criterion_for(self, role: str) -> Entry:
        """The equation that scores a projection of this role."""
        return CRITERIA.find(self.criterion if self._owner(role) else "wanda")

    def axis_for(self, role: str) -> Axis:
        """The axis along which the weights of a projection of this role compete."""
        owner = self._owner(role)
        return self.axis[owner] if owner else "in"

    def all_parameters(self) -> dict[str, Value]:
        """The parameters of criterion and update, defaults included."""
        defaults = CRITERIA.find(self.criterion).parameters() | UPDATES.find(self.update).parameters()
        return defaults | dict(self.parameters)

    def parameters_of(self, entry: Entry) -> dict[str, Value]:
        """The parameters that one of them is called with."""
        own = entry.parameters()
        return own | {n: entry.checked(n, v) for n, v in self.parameters.items() if n in own}

    def needs_for(self, role: str) -> set[str]:
        """The fields of `Statistics` that criterion, update and order read for a projection of this role."""
        entries = (self.criterion_for(role), UPDATES.find(self.update), ORDERS.find(self.order))
        return {name for entry in entries for name in entry.needs_for(role)}

    def chooses_while_sweeping(self, role: str) -> bool:
        """Whether the mask comes out of the OBS sweep itself instead of being fixed before it."""
        return self.update == "obs" and self.criterion_for(role) is CRITERIA.find("obs")
