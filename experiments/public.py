"""What a record may say of the machine that it comes from: no absolute path, and so no home folder and no user."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

BEFORE = r"(?<![\w.…~/\\-])"
ABSOLUTE = re.compile(rf"""{BEFORE}(?:~[\w-]*)?/(?:[^\s/'"]+/)*[^\s/'"=,:;()\[\]{{}}]+""")
"""A path from the root or a home folder; no part of an address or of a relative path."""
STORES = "s3a?|gs|gcs|az|abfss?|wasbs?|hdfs|ssh|sftp|ftp|smb|nfs"
STORED = re.compile(rf"""\b(?i:{STORES})://[^\s'"]*""")
"""A path on another machine or in a bucket."""
SECRET = re.compile(r"""(://)(?:[^\s/@'"]*@)?([^\s?'"]*)(?:\?[^\s'"]*)?""")
"""An address: between its kind and its place, and behind that, stand who asks and with which key."""


def public(value: Any) -> Any:
    """Settings with every path relative to the working folder, or as its last name where it lies elsewhere.

    A text that begins as a path is one to its end; in any other each path ends at a space.
    """
    if isinstance(value, str):
        return _short(value) if value.startswith(("/", "~")) else public_text(value)
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    return [public(one) for one in value] if isinstance(value, list) else value


def public_override(override: str) -> str:
    """The same of an override: `key=path`, `key="path"`, or several paths that a sweep goes over."""
    key, equals, value = override.partition("=")
    quote = value[:1] if re.fullmatch("""'[^']*'|"[^"]*\"""", value) else ""
    paths = [value.strip(quote)] if quote else value.split(",")
    return key + equals + ",".join(quote + public(path) + quote for path in paths)


def public_text(text: str) -> str:
    """The same of a sentence; the folders that are known may hold spaces."""
    places = {os.getcwd(): "", os.path.expanduser("~"): "~/"}
    for place in sorted(places, key=len, reverse=True):
        if place.strip("/"):
            text = re.sub(rf"{BEFORE}{re.escape(place)}/", places[place], text)
    text = STORED.sub(lambda found: f"…/{PurePosixPath(found[0].partition('?')[0]).name}", text)
    return ABSOLUTE.sub(lambda found: _short(found[0]), SECRET.sub(r"\1\2", text))


def _short(path: str) -> str:
    whole, here, home = (Path(os.path.expanduser(one)) for one in (path, os.getcwd(), "~"))
    shows_home = here != home and home.is_relative_to(here) and whole.is_relative_to(home)
    return str(whole.relative_to(here)) if whole.is_relative_to(here) and not shows_home else f"…/{whole.name}"
