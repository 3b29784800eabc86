"""Names that a user gives: the one sentence on a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches

from dass.errors import DassError


def unknown(what: str, name: str, known: Iterable[str], field: str | None = None) -> DassError:
    """The error, to be raised, on a name that is not among the known ones; asks for the nearest of them."""
    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? Choose" if near else "choose"
    return DassError(f"{what} {name} is unknown: {hint} one of {', '.join(known)}.", field)
