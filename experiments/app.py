"""What every entry point shares: Hydra around a task, and the one place where errors become a sentence."""

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dass.distributed import joined, world
from dass.errors import DassError, one_line
from dass.terminal import leave, printing
from experiments.arguments import prepared
from experiments.signals import exit_on_signals

CONF = Path(__file__).parent.parent / "conf"
Settings = TypeVar("Settings")
SHARED = ("prune", "evaluate")
"""What several processes do together, under torchrun."""
USER_ERRORS = (DassError, HydraException, OmegaConfBaseException)


def sentence(error: BaseException) -> str:
    """An error as one line: the innermost message of a chain of Hydra's, without OmegaConf's trailing details."""
    error = innermost(error)
    if isinstance(error, DassError) and error.field is not None and error.field not in str(error):
        return one_line(f"{error} (setting: {error.field})")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[: lines.index("Config search path:")] if "Config search path:" in lines else lines
    details = ("full_key:", "object_type=", "reference_type=", "To append to your config")
    kept = [line for line in lines if not line.startswith(details)]
    where = [line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")]
    text = one_line(" ".join(kept)) or type(error).__name__
    if isinstance(error, AssertionError) and "Unexpected type for root" in text:  # OmegaConf's
        text = "a setting is part of one that is null here, as model.trained of most models is: remove it"
    if isinstance(error, OverrideParseException):
        text += """: a value with commas, brackets or spaces is quoted twice, as in 'model.path="a, b"'"""
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        text += ": no such setting, see the files in conf/ for those that exist"
    return f"{where[0]}: {text}" if where and where[0] not in text else text


def innermost(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of Hydra's, or one of ours above it."""
    while error.__cause__ is not None and not isinstance(error, DassError):
        error = error.__cause__
    return error


def typed(kind: type[Settings], values: Any) -> Settings:
    """Plain values as a data class of settings; DassError on an unknown key or a wrong type."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise DassError(sentence(error)) from error


def run_app(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `task` under Hydra with `conf/<config_name>.yaml`.

    An error of the user ends as one sentence on stderr and exit code 1; `debug=true` or `HYDRA_FULL_ERROR=1`
    brings the traceback back. In a sweep each failing job prints its sentence (a bug: its traceback), the others go on,
    and the exit code is 1. Of several processes the first speaks for all.
    """
    exit_on_signals()
    debug = "debug=true" in [argument.lower() for argument in sys.argv] or os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing and exiting
    os.environ.setdefault("DASS_SWEEP", time.strftime("%Y%m%d-%H%M%S"))  # inherited by the jobs of a sweep
    started = False

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        nonlocal started
        started = True
        try:
            if world() > 1 and config_name not in SHARED:
                raise DassError(f"This is not for several processes, only {' and '.join(SHARED)}: start it alone.")
            return task(config)
        except USER_ERRORS as error:
            if debug:
                raise
            why = sentence(error)
        except BrokenPipeError:
            leave()
        except Exception as error:
            if debug or HydraConfig.get().mode == RunMode.RUN:
                raise
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        print(f"error: {why}", file=sys.stderr, flush=True)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(1)
        # raised out here, so that no frame of the job, and no model in it, stays alive for the rest of the sweep
        raise Reported(why)

    with printing(), joined():
        try:
            sys.argv[1:] = prepared(sys.argv[1:], CONF)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        except Reported:
            sys.exit(1)
        except BrokenPipeError:
            raise
        except Exception as error:
            # before the task starts only composing the config can fail, and Hydra meets some of it with a ValueError
            if debug or (started and not isinstance(error, USER_ERRORS)):
                raise
            why, file = sentence(error), _file_read(error)
            print(f"error: {why if file is None or file in why else f'{file}: {why}'}", file=sys.stderr)
            sys.exit(1)


def _file_read(error: BaseException) -> str | None:
    """The config file that Hydra was reading when it failed; not all of its errors name it."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((str(names["full_path"]) for names in reversed(frames) if "full_path" in names), None)


class Reported(Exception):
    """A job's error that has been printed already, in words; only the exit code is left to set."""
