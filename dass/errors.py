"""The one family of errors that a user can cause and mend."""


class DassError(Exception):
    """A fault in the input, told in one sentence that names the thing and says what to do.

    Raised anywhere in `dass`; printed in one place only, `experiments/app.py`.
    """
