"""The one family of errors that a user can cause and mend, and the check that all numbers go through."""

import contextlib
from collections.abc import Iterator

import torch


class DassError(Exception):
    """A fault in the input, told in one sentence that names the thing and says what to do.

    Raised anywhere in `dass`; printed in one place only, `experiments/app.py`, which adds the name of the setting.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        """`field`: the setting at fault, such as `calibration.n_sequences`."""
        super().__init__(message)
        self.field = field


@contextlib.contextmanager
def told(what: str, advice: str, *kinds: type[Exception], field: str | None = None) -> Iterator[None]:
    """Tell another library's errors of these kinds in a sentence of ours: what failed, why, what to do."""
    try:
        yield
    except DassError:
        raise
    except kinds as error:
        raise DassError(f"{what} ({first_line(error)}): {advice}.", field) from error


def first_line(error: BaseException) -> str:
    """The gist of another library's error, to be quoted inside a sentence."""
    gist = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return gist.splitlines()[0].rstrip(".:")


def require_finite(values: torch.Tensor, what: str) -> None:
    """Raise DassError if a value is NaN or infinite; one pass and no copy, unlike `isfinite(...).all()`."""
    lowest, highest = torch.aminmax(values)
    if not (torch.isfinite(lowest) & torch.isfinite(highest)):
        raise DassError(f"{what} hold NaN or infinite values: check the model's weights and its dtype.")
