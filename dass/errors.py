"""The one family of errors that a user can cause and mend."""


class DassError(Exception):
    """A fault in the input, told in one sentence that names the thing and says what to do.

    Raised anywhere in `dass`; printed in one place only, `experiments/app.py`.
    """


def first_line(error: BaseException) -> str:
    """The gist of another library's error, to be quoted inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
