"""Entry points without Hydra: a data class of settings from `key=value`, and errors as one sentence."""

import sys
from collections.abc import Callable
from dataclasses import fields

from omegaconf import OmegaConf

from dass.errors import DassError
from dass.names import unknown
from experiments.app import Settings, sentence, typed


def settings_of(kind: type[Settings], arguments: list[str]) -> Settings:
    """The settings that `key=value` arguments give; DassError on a word without `=`, an unknown key or a wrong type."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or key not in known:
            raise unknown("The setting", key, known)
    return typed(kind, OmegaConf.from_cli(arguments))


def run_cli(task: Callable[[Settings], None], kind: type[Settings]) -> None:
    """Run `task` with the settings of the command line; an error of the user is one sentence on stderr, and exit 1."""
    try:
        task(settings_of(kind, sys.argv[1:]))
    except DassError as error:
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
