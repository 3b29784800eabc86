"""What a record may say of the machine that it comes from: no absolute path, and so no home folder and no user."""

import re
from pathlib import Path
from typing import Any

ABSOLUTE = re.compile(r"""(?<![\w.…~/\\-])(?:~[\w-]*)?/(?:[^\s/'"=,:;()\[\]{}]+/)*[^\s/'"=,:;()\[\]{}]+""")
"""A path from the root or a home folder; no part of an address or of a relative path."""


def public(value: Any) -> Any:
    """The same with every path relative to the working folder, or as its last name where it lies elsewhere."""
    if isinstance(value, str):
        return ABSOLUTE.sub(lambda found: _short(found[0]), value)
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    return [public(one) for one in value] if isinstance(value, list) else value


def _short(path: str) -> str:
    whole, here = Path(path).expanduser(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else f"…/{whole.name}"
