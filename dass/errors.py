"""The one family of errors that a user can cause and mend, and the check that all numbers go through."""

import contextlib
from collections.abc import Callable, Iterator

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


def one_line(text: object) -> str:
    """A text that is quoted, without what would break its line: line breaks and all else that is not to be seen."""
    return "".join(character if character.isprintable() else " " for character in str(text))


Answers = list[tuple[Callable[[], DassError], torch.Tensor]]
"""What makes the error, and whether all is well instead: a boolean that may still be on its way on the device."""


def require_finite(
    values: torch.Tensor, what: str, later: Answers | None = None, since: Callable[[], str] = lambda: ""
) -> None:
    """Raise DassError if a value is NaN or infinite.

    later: where the answer is put for `require_all`; without it the host waits for the device here.
    since: tells, if it comes to that, from where on.
    """

    def error() -> DassError:
        return DassError(f"{what} hold NaN or infinite values{since()}: check the model's weights and its dtype.")

    if later is None:
        require_all([(error, finite(values))])
    else:
        later.append((error, finite(values)))


def require_all(answers: Answers) -> None:
    """Raise the first error whose answer is no; the host waits for the device once, and again to find the culprit."""
    if answers and not torch.stack([answer for _, answer in answers]).all():
        raise next(error for error, answer in answers if not answer)()


def finite(values: torch.Tensor) -> torch.Tensor:
    """Whether no value is NaN or infinite, `()` bool; one pass and no copy, unlike `isfinite(...).all()`."""
    lowest, highest = torch.aminmax(values)
    return torch.isfinite(lowest) & torch.isfinite(highest)
