"""The command line before Hydra reads it: in the order that it wants, and quoted where its grammar needs it."""

import re
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from dass.names import unknown
from experiments.bounds import PATHS

OPTIONAL = ("experiment", "scale", "update")  # groups of which Hydra needs no option
SWEEPING = {"-m", "--multirun", "--cfg", "-c", "--help", "--hydra-help", "--info"}
ELSEWHERE = ("hydra.searchpath=", "--config-dir", "-cd", "--config-path", "-cp")  # where there may be more options
PLAIN = re.compile(r"[\w./+-]*", re.ASCII)
"""What Hydra's grammar takes for a word as it stands."""


def prepared(arguments: list[str], conf: Path) -> list[str]:
    """The same for Hydra: flags, which may stand anywhere, come first; an experiment is a sweep.

    Raises:
        DassError: an option that is not in its group in `conf`; asks for the nearest.
    """
    overrides = [word for word in arguments if word[:1] == "~" or ("=" in word and word[:1] != "-")]
    flags = [word for word in arguments if word not in overrides]
    if any(word.startswith("experiment=") for word in overrides) and not SWEEPING & set(flags):
        flags.insert(0, "--multirun")
    if not any(word.startswith(ELSEWHERE) for word in arguments):
        for override in overrides:
            _require_option(override, conf)
    sweeps = not {"-m", "--multirun"}.isdisjoint(flags)
    return flags + [quoted(override, sweeps) for override in overrides]


def quoted(override: str, sweeps: bool) -> str:
    """An override for Hydra: its path in quotes, or its several paths where it sweeps over them, if they need any."""
    key, _, value = override.partition("=")
    if sweeps and key.startswith(("method.", "model.")) and key not in PATHS and PLAIN.fullmatch(value):
        return f"{key}=choice({value})"  # a sweep over one: else Hydra looks for it in the default one first
    if key.lstrip("+") not in PATHS or value[:1] in ("'", '"') or (sweeps and "(" in value):
        return override
    paths = value.split(",") if sweeps else [value]
    return f"{key}=" + ",".join(one if PLAIN.fullmatch(one) else _in_quotes(one) for one in paths)


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _require_option(override: str, conf: Path) -> None:
    """Hydra passes over the missing option of an optional group, and does not ask for the nearest of any."""
    group, _, value = override.lstrip("+").partition("=")
    groups = {path.name for path in conf.iterdir() if path.is_dir() and path.name != "hydra"}
    if group in groups:
        known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        for name in value.split(","):
            if re.fullmatch(r"[\w.-]+", name) and name not in (*known, *["null"] * (group in OPTIONAL)):
                raise unknown(f"The {group}", name, known, group)
