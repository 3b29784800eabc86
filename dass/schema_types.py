"""The types that the schema of records is written in: words, counts, shares, parts of which not all is read.

What does not fit is told in words.
"""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

CLOSE = 1e-6  # relative: beyond the rounding of sums, below what a table shows


def _plain(value: Any) -> Any:
    if value is not None and not isinstance(value, str) and not (isinstance(value, int | float) and abs(value) < 2**63):
        raise ValueError("should be a word, a number, true, false or null")
    return value


def _option(value: Any) -> Any:
    entries = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    for entry in entries:
        for part in entry.values() if isinstance(entry, dict) else [entry]:  # a method with other values than its own
            _plain(part)
    return value


Plain = Annotated[Any, AfterValidator(_plain)]
Option = Annotated[Any, AfterValidator(_option)]
Word = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Energy = Annotated[float, Field(ge=-CLOSE)]  # a sum of products, which rounding may take below 0
Measured = Annotated[float, Field(ge=0, lt=1e9)]  # seconds, GB


class Part(BaseModel):
    """A part of which only what is named here is read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class OpenPart(Part):
    """A part that tables show as a whole."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain] = Field(init=False)


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Tell the first thing that does not fit a schema: where it stands, and what is wrong."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")) from None
