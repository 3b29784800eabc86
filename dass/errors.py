"""The one family of errors that a user can cause and mend, and the check that all numbers go through."""

import torch


class DassError(Exception):
    """A fault in the input, told in one sentence that names the thing and says what to do.

    Raised anywhere in `dass`; printed in one place only, `experiments/app.py`, which adds the name of the setting.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        """`field`: the setting at fault, such as `calibration.n_sequences`."""
        super().__init__(message)
        self.field = field


def first_line(error: BaseException) -> str:
    """The gist of another library's error, to be quoted inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def require_finite(values: torch.Tensor, what: str) -> None:
    """Raise DassError if a value is NaN or infinite; one pass and no copy, unlike `isfinite(...).all()`."""
    lowest, highest = torch.aminmax(values)
    if not (torch.isfinite(lowest) & torch.isfinite(highest)):
        raise DassError(f"{what} hold NaN or infinite values: check the model's weights and its dtype.")
