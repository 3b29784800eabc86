"""Progress bars with the time left; silent when stderr is not a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T] | None, label: str, unit: str, total: int | None = None) -> "tqdm[T]":
    """A bar over items, or with `items=None` one that is moved by its `update()`."""
    return tqdm(items, desc=label, unit=unit, total=total, disable=None, leave=False, dynamic_ncols=True)


def say(bar: tqdm, line: str) -> None:
    """Print a line above a bar; silent where the bar is."""
    if not bar.disable:
        bar.write(line)
