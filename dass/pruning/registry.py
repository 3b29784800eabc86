"""What criteria and updates have in common: a name, the statistics they need, and parameters that are their own."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dass.errors import DassError
from dass.names import unknown
from dass.pruning.statistics import STATISTICS

Value = float | int | bool | str
"""A parameter of a criterion or an update."""
TAKEN = ("name", "criterion", "axis", "update", "order", "order_seed", "exclude")
"""The words that all methods share, and that are no parameters."""


@dataclass(frozen=True)
class Entry:
    """A registered function; its keyword arguments with defaults are its parameters."""

    function: Callable[..., Any]
    needs: tuple[str, ...]
    """The fields of `Statistics` that it reads."""
    needs_of_role: Mapping[str, tuple[str, ...]]
    """Other fields for certain roles."""
    positive: tuple[str, ...]
    """Parameters that must be above 0."""
    whole: bool = False
    """Whether an update works on the MLPs of a pruned block together, rather than on the projections of one input."""

    def needs_for(self, role: str) -> set[str]:
        """The fields of `Statistics` that it reads for a projection of this role."""
        return set(self.needs_of_role.get(role, self.needs))

    def parameters(self) -> dict[str, Value]:
        """The names and defaults of its own parameters, such as DaSS's alpha."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}

    def source(self) -> str:
        """Its source text: whoever edits an equation gets other runs."""
        return inspect.getsource(self.function)

    def checked(self, name: str, value: Value) -> Value:
        """A value for a parameter, as the type of its default; DassError where it is of another, or not finite."""
        kind: type = type(self.parameters()[name])
        if kind in (int, float):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
        else:
            fits = isinstance(value, kind)
        if not fits or (kind is int and value != int(value)):
            words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a word"}[kind]
            raise DassError(f"{name}={value} must be {words}.", field=f"method.{name}")
        if name in self.positive and not kind(value) > 0:
            raise DassError(f"{name}={value} must be above 0.", field=f"method.{name}")
        return kind(value)


class Registry(dict[str, Entry]):
    """Functions by name, found by `find` and added by `register`."""

    def __init__(self, what: str, leading: int) -> None:
        """`what` they are, in one word; `leading` arguments come before the parameters."""
        super().__init__()
        self.what, self.leading = what, leading

    def register(
        self, *needs: str, positive: tuple[str, ...] = (), whole: bool = False, **needs_of_role: tuple[str, ...]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a function to add it under its own name.

        Args:
            needs: the fields of `Statistics` that the function reads.
            positive: its parameters that must be above 0.
            whole: see `Entry`.
            needs_of_role: other fields for certain roles, such as `gate=("intermediate_norm",)`.

        Raises:
            DassError: an unknown statistic, or a parameter without a default of a type that a config can hold.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            for name in {*needs, *(name for own in needs_of_role.values() for name in own)} - set(STATISTICS):
                raise DassError(
                    f"The {self.what} {function.__name__} needs {name}, which is no statistic: the statistics are "
                    f"{', '.join(STATISTICS)}."
                )
            entry = Entry(function, needs, needs_of_role, positive, whole)
            arguments = list(inspect.signature(function).parameters.values())
            if len(arguments) < self.leading or any(p.default is not p.empty for p in arguments[: self.leading]):
                raise DassError(f"The {self.what} {function.__name__} must take {self.leading} arguments first.")
            own = arguments[self.leading :]
            if taken := [p.name for p in own if p.name in TAKEN]:
                raise DassError(
                    f"The parameter {taken[0]} of the {self.what} {function.__name__} has the name of a setting that "
                    f"every method has: choose another."
                )
            wrong = [p.name for p in own if type(p.default) not in (float, int, bool, str)]
            if wrong:
                raise DassError(
                    f"The parameter {wrong[0]} of the {self.what} {function.__name__} needs a default that is a "
                    f"number, a word or true or false."
                )
            self[function.__name__] = entry
            return function

        return add

    def find(self, name: str) -> Entry:
        """The entry of this name; DassError lists the known ones."""
        if name not in self:
            raise unknown(f"The {self.what}", str(name), sorted(self), f"method.{self.what}")
        return self[name]


def _finite(value: Value) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
