"""What a record must not say of whose machine it comes from: paths, names, addresses, secrets."""

import getpass
import platform
import re
from collections.abc import Iterator
from typing import Any

from dass.errors import one_line
from experiments.public import STORES, public

PUBLIC_HOSTS = re.compile(r"\b(?:[\w-]+\.)*(?:huggingface\.co|github\.com|pytorch\.org|arxiv\.org|hydra\.cc)\b")
BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
PAIR = r"[0-9a-f]{1,4}"  # of bytes, in an IPv6 address
IPV6 = rf"(?:(?:{PAIR}:){{7}}{PAIR}|(?:{PAIR}:){{1,6}}(?::{PAIR}){{1,6}}|(?:{PAIR}:){{1,7}}:|::1|::ffff:)"
MAC = r"[0-9a-f]{2}(?P<between>[:-])(?:[0-9a-f]{2}(?P=between)){4}[0-9a-f]{2}"
KINDS = {
    "the path": re.compile(
        r"\b[A-Za-z]:[\\/][^\s/]|\\\\\w|file:/|(?<![\w.])\.\./|\$(?:HOME|USER)\b|%USERPROFILE%"
        rf"|/(?:home|Users|root|mnt|scratch)/|\b(?i:{STORES})://"
    ),
    "the e-mail address or login": re.compile(r"[\w.+-]+@[\w-]+"),
    "the token": re.compile(
        r"\b(?:hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA)[\w-]{8,}|\beyJ[\w-]+\.eyJ|\bBearer\s+\w"
        r"|(?:TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY(?:_ID)?|SIGNATURE|CREDENTIAL|[?&]sig)\s*=\s*\S"
        r"|://[^\s/@]*:[^\s/@]*@",
        re.IGNORECASE,
    ),
    "the address": re.compile(
        rf"(?<![\w.-]){BYTE}(?:\.{BYTE}){{3}}(?!\w|[.-]\w)|\blocalhost\b"
        rf"|(?<![\w:.])(?:{IPV6})(?![\w:]|\.\w)|(?<![\w:-]){MAC}(?![\w:-])"
        r"|\b[a-z][\w-]*(?:\.[\w-]+)*\.(?:local|localdomain|lan|internal|intranet|corp|cluster|edu|com|org|net)\b",
        re.IGNORECASE,
    ),
}
WORDS = {"user", "username", "login", "host", "hostname", "node", "nodename", "home", "cwd", "email", "ip", "token"}
COMMON = {"root", "user", "admin", "ubuntu", "debian", "localhost", "linux", "dass"}  # names that tell nothing


def private_in(tree: dict[str, Any]) -> list[str]:
    """What a record or a manifest says of its machine, each with its place; nothing: it says nothing."""
    own = {name for name in (platform.node().partition(".")[0], getpass.getuser()) if len(name) > 3} - COMMON
    names = re.compile(rf"\b(?:{'|'.join(map(re.escape, own))})\b", re.IGNORECASE) if own else None
    found = []
    for place, text, is_key in _texts(tree):
        kinds = {kind for kind, pattern in KINDS.items() if pattern.search(PUBLIC_HOSTS.sub("", text))}
        if public(text) != text:
            kinds.add("the path")
        if (names is not None and names.search(text)) or (is_key and text.lower() in WORDS):
            kinds.add("the name")
        found += [f"{place} holds {kind} of a machine or person: {one_line(text[:60])}" for kind in sorted(kinds)]
    return found


def _texts(tree: Any, place: str = "") -> Iterator[tuple[str, str, bool]]:
    """All texts of a tree with their places, and whether they are keys."""
    if isinstance(tree, str):
        yield place or "it", tree, False
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield place or "it", key, True
            yield from _texts(value, f"{place}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, place)
