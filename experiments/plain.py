"""Entry points without Hydra: `key=value` arguments as a data class of settings, and errors as one sentence."""

import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any

from dass.errors import DassError, one_line
from dass.names import unknown
from dass.terminal import printing
from experiments.app import Settings, sentence, typed
from experiments.bounds import require_one_line, usable_path


def settings_of(kind: type[Settings], paths: Collection[str], arguments: list[str]) -> Settings:
    """The settings that `key=value` arguments give.

    Raises:
        DassError: a word without `=`, an unknown key, no path where `paths` has one, or a setting that is needed.
    """
    known, given = {field.name: field for field in fields(kind)}, {}  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise unknown("The setting", one_line(key), list(known))
        require_one_line(key, value)
        given[key] = usable_path(key, value) if key in paths else value
    for key, field in known.items():
        if field.default is MISSING and key not in given:
            raise DassError(f"{key}= is needed: give it.", field=key)
    return typed(kind, given)


def run_plain(task: Callable[[Any], None], kind: type[Any], paths: Collection[str], arguments: list[str]) -> None:
    """Do what the command line says; an error of the user is one sentence on stderr, and exit 1."""
    with printing():
        try:
            task(settings_of(kind, paths, arguments))
        except DassError as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(1)
